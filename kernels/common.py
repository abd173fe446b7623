"""What all kernels share: Triton where there is one, checks of their arguments, and a device to launch on.

Triton comes with the CUDA builds of PyTorch. Where it is missing its decorator does nothing: the files still import and
their torch twins still run. TRITON_INTERPRET=1, set before the first import, runs the same kernels in numpy on the CPU:
slow (2 ms a program), but it makes every claim about them testable without a GPU.

Every kernel keeps to these rules, each one a bug seen elsewhere:
- load → float32 → compute → round once, at the store: bf16 arithmetic loses digits, and the interpreter has none;
- row numbers are int64: 16,384 tokens times 152,064 logits are past 2^31;
- every masked load says what stands in for the masked: on a GPU it is undefined;
- no autotuning (a first call that takes seconds, a choice that nobody can repeat), no atomics (their order is chance,
  and so are the sums' last bits), nothing that waits for the device;
- scalars are cast on arrival: torch.compile hands Python floats over as float64, and float64 arithmetic is slow.
"""

import sys
from types import SimpleNamespace

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit = triton.jit
    INTERPRETED = triton.knobs.runtime.interpret
except ImportError:
    triton, tl, INTERPRETED = None, SimpleNamespace(constexpr=int), False

    def jit(function=None, **_options):
        """Leave the function as it is: nothing will launch it."""
        return function or (lambda function: function)


def accumulator(dtype: torch.dtype):
    """The Triton type to compute in: float32, or float64 for float64 tensors (only tests of the gradients have such)."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def warps_for(block: int) -> int:
    """Warps of a program that holds `block` elements of a row: 16 elements a thread, so that nothing spills."""
    return min(32, max(4, block // 512))


def next_power_of_2(n: int) -> int:
    """The block size that holds n elements: tl.arange takes powers of two only."""
    return 1 << max(0, n - 1).bit_length()


def check(what: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    """TypeError or ValueError, naming the argument, unless x has this shape (and dtype) in memory a kernel can walk.

    A row may lie anywhere, but its elements side by side. dtype None: any floating-point type.
    """
    tensors = sys.modules.get("torch.distributed.tensor")  # whoever shards has imported it: half as slow as torch
    if tensors is not None and isinstance(x, tensors.DTensor):
        raise TypeError(f"{what} is a DTensor; call the kernel inside a module that FSDP has gathered")
    if x.dtype != dtype if dtype is not None else not x.is_floating_point():
        raise TypeError(f"{what} is {x.dtype}, expected {dtype or 'a floating-point type'}")
    if x.shape != shape:
        raise ValueError(f"{what} has shape {tuple(x.shape)}, expected {tuple(shape)}")
    if x.ndim and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{what} has stride {x.stride(-1)} in its last dimension, expected 1; call .contiguous()")
    if x.device.type == "cpu" and not INTERPRETED:
        raise ValueError(f"{what} is on the CPU, where Triton has no kernels; use the function that ends in _torch")
    if triton is None:
        raise ValueError(f"{what}: Triton is not installed; use the function that ends in _torch")


def check_width(what: str, n: int, most: int) -> None:
    """ValueError if a row is too long for a program to hold in registers: it would spill to memory, or not launch at all."""
    if n > most:
        raise ValueError(f"{what} has {n:,} elements in a row, at most {most:,} fit; use the function that ends in _torch")


def check_rows_apart(what: str, x: Tensor) -> None:
    """ValueError if rows of x (N, D), which is written in place, share memory, as those of x.expand(N, D) do."""
    if x.shape[0] > 1 and x.stride(0) < x.shape[1]:
        raise ValueError(f"{what} has rows that share memory (stride {x.stride(0)}), but is written in place; call .clone()")


def walkable(x: Tensor) -> Tensor:
    """x, or a copy of it where its last dimension is not contiguous: autograd hands over gradients of any layout."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def n_programs(x: Tensor, per_sm: int) -> int:
    """Programs of a persistent grid on x's device: `per_sm` on each of its multiprocessors."""
    if x.device.type != "cuda":
        return 4  # in the interpreter: a few, so that tests see rows shared out
    return per_sm * torch.cuda.get_device_properties(x.device).multi_processor_count


def on_device_of(x: Tensor):
    """A context in which kernels launch on x's GPU, whichever is current."""
    return torch.cuda.device_of(x)
