"""How long a GPU needs for a piece of work, and how much memory.

Three things spoil such figures, and each has its remedy here. Data left in the L2 cache by the run before: it is
overwritten between runs. The launch from Python, 20 to 100 µs an operation: short work is captured once in a CUDA graph
and replayed, and before any other the GPU sleeps a millisecond, in which the host gets ahead. A clock that only the host
reads: CUDA events, on the device.
"""

import contextlib
import statistics
from collections.abc import Callable

import torch

L2_FLUSH_BYTES = 256 << 20  # several times the 50 MB of an H100
HEAD_START_CYCLES = 2_000_000  # a millisecond at 2 GHz


def own_stream():
    """A context with a stream of its own: work made and timed in it can be captured, that of the default stream cannot."""
    return torch.cuda.stream(torch.cuda.Stream()) if torch.cuda.is_available() else contextlib.nullcontext()


def quantiles_ms(work: Callable, graph: bool, budget_ms: float = 200.0) -> tuple[float, float, float]:
    """(p20, p50, p80) in milliseconds of as many runs as fit the budget, 10 to 200. graph: replay it as a CUDA graph.

    Work that waits for the device cannot be captured; it must not be short either.
    """
    for _ in range(3):  # compiles, allocates
        work()
    torch.cuda.synchronize()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, stream=torch.cuda.current_stream()):
            work()
        work = captured.replay
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    once = _runs_ms(work, flush, 3)[1]
    times = sorted(_runs_ms(work, flush, max(10, min(200, int(budget_ms / once)))))
    return times[len(times) // 5], statistics.median(times), times[-1 - len(times) // 5]


def _runs_ms(work: Callable, flush: torch.Tensor, n: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
    for start, end in events:
        flush.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def peak_bytes(work: Callable) -> int:
    """Most bytes allocated during the work beyond what was before."""
    work()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_bytes_s() -> float:
    """Bytes a second, read and written, of a copy of 2 GiB: what memory-bound kernels can reach at the most."""
    source = torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))  # a memcpy; a kernel, often faster
    return 2 * source.nbytes / min(quantiles_ms(way, graph=False)[1] for way in ways) * 1e3


def gemm_flop_s() -> float:
    """FLOP a second of an 8,192-cubed bf16 product of normal numbers (zeros would be faster: they draw less power)."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * 8192**3 / quantiles_ms(lambda: a @ b, graph=False)[1] * 1e3
