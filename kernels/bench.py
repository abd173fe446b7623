"""The kernels beside everybody else's, on the GPU at hand, in per cent of what that GPU can do at all.

    python -m nanomed.kernels.bench                  three models, 8,192 and 32,768 tokens
    python -m nanomed.kernels.bench --quick          one model, 8,192 tokens: under 4 minutes
    python -m nanomed.kernels.bench --op rope swiglu --model mistral-7b

First the device: its copy bandwidth and its rate of matrix products set the roofline. Then every operation, forward,
backward and both, for every provider that is installed; one whose results are wrong is not timed. Everything lands in
OUT/bench.json after each operation, so that a cut run still counts, and in OUT/bench.md and OUT/bench.svg at the end.

Without a GPU: the predicted floors, and what the compiler makes of the kernels.
"""

import argparse
import datetime
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from tqdm import tqdm

from . import common, peers, registers, timing
from .roofline import GUESSED, MODELS, OPS, Device, Model, floor_s, traffic

CHECK_TOKENS = 128  # of the comparison with float64, which would not fit memory at full size


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m nanomed.kernels.bench",
        description=__doc__.splitlines()[0],
        epilog="Without a GPU it prints the predicted floors and the compiler's register table.",
    )
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS, help="operations to measure (default: all)")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS), help="whose shapes (default: all)")
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 32768], help="in a call (default: 8192 32768)")
    parser.add_argument("--quick", action="store_true", help="qwen2.5-7b at 8,192 tokens only")
    parser.add_argument("--out", type=Path, default=Path("runs/kernels"), help="folder for bench.json, .md and .svg")
    args = parser.parse_args()
    models, tokens = (["qwen2.5-7b"], [8192]) if args.quick else (args.model, args.tokens)
    if min(tokens) < 1:
        sys.exit(f"error: --tokens {min(tokens)}: must be at least 1")
    if not torch.cuda.is_available():
        print(predicted(args.op, [MODELS[m] for m in models], tokens))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine(), "rows": []}
    jobs = [(op, MODELS[m], n) for op in args.op for m in models for n in tokens]
    for job in tqdm(jobs, "benchmark"):
        result["rows"] += rows_of(*job, result["machine"])
        written = args.out / "bench.json.tmp"
        written.write_text(json.dumps(result, indent=1))
        os.replace(written, args.out / "bench.json")
    text = as_text(result)
    (args.out / "bench.md").write_text(text)
    draw(result, args.out / "bench.svg")
    print(f"{text}\n{args.out}/bench.json, bench.md, bench.svg")
    if failed := own_failures(result["rows"]):
        sys.exit(f"error: {len(failed)} of our own kernels failed; {failed[0]}")


def own_failures(rows: list[dict]) -> list[str]:
    """What went wrong with ours: unlike a peer's, no result to be content with."""
    return [f"{row['op']}: {row['absent']}" for row in rows if row["provider"] == "ours" and "absent" in row]


def machine() -> dict:
    """The GPU with its measured rates, and every version that matters."""
    versions = {"torch": torch.__version__, "triton": common.triton.__version__, "cuda": torch.version.cuda}
    for package in ("liger-kernel", "quack-kernels", "cut-cross-entropy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "commit": _said("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
        "copy_bytes_s": timing.copy_bytes_s(),
        "gemm_flop_s": timing.gemm_flop_s(),
        "date": datetime.date.today().isoformat(),
        **versions,
    }


def _said(*command: str) -> str | None:
    """The first line of what a command prints; None where it cannot."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return None


def rows_of(op: str, m: Model, n: int, of_machine: dict) -> list[dict]:
    """One row for every provider of the operation: milliseconds, per cent of the floor, bytes, error; or why not."""
    rows = []
    torch._dynamo.reset()  # else the ninth shape of an operation is run without torch.compile, under its name
    device = Device(of_machine["gpu"], of_machine["copy_bytes_s"], of_machine["gemm_flop_s"])
    everybody = peers.everybody(op)
    eager_error = error_of(peers.formula(op), op, m)
    for provider, function in everybody.items():
        row = {"op": op, "model": m.name, "tokens": n, "provider": provider}
        rows.append(row)
        if isinstance(function, str):
            row["absent"] = function
            continue
        try:
            row["error"] = error_of(function, op, m)
            if row["error"] <= 2 * eager_error + 1e-3:
                row |= measured(function, op, m, n, device)
            else:
                row["absent"] = f"wrong: relative error {row['error']:.1e}, eager's {eager_error:.1e}"
        except Exception as error:  # a peer's failure, out of memory too, is a result; our own is told at the end
            row["absent"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def measured(function, op: str, m: Model, n: int, device: Device) -> dict:
    """Milliseconds and share of the floor of each part, and the most bytes beyond the inputs. Frees all it made."""
    costs, row = traffic(op, m, n), {}
    for part in costs:
        with timing.own_stream():  # autograd runs on the stream of the forward pass, and only another can be captured
            work = work_of(part, function, op, m, n)
            p20, p50, p80 = timing.quantiles_ms(work, graph="cross_entropy" not in op)
        row[part] = {"ms": [p20, p50, p80], "of_floor": floor_s(costs[part], device) * 1e3 / p50}
        if part == "both":
            row["extra_bytes"] = timing.peak_bytes(work)
    return row


def work_of(part: str, function, op: str, m: Model, n: int) -> Callable:
    """The work to time: `forward`, `backward` (of a graph made once) or `both`, on fresh tensors.

    Who works in place (the losses; Liger's SwiGLU and RoPE) finds its own results there from the second run on.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    leaves = peers.inputs(op, m, n, torch.bfloat16, device)
    rest = peers.extras(op, m, n, torch.bfloat16, device)
    if part == "forward":
        return lambda: function(*leaves, *rest)
    outputs = as_tuple(function(*leaves, *rest))
    above = [torch.ones_like(y) if y.ndim == 0 else torch.randn_like(y) for y in outputs]
    if part == "backward":
        return partial(torch.autograd.grad, outputs, leaves, above, retain_graph=True)
    return lambda: torch.autograd.grad(as_tuple(function(*leaves, *rest)), leaves, above)


def as_tuple(outputs) -> tuple:
    """One output or several, as a tuple."""
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


def error_of(function, op: str, m: Model) -> float:
    """Largest relative error of any output or gradient against the formula in float64, both on bf16 inputs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = []
    for f, dtype in ((function, torch.bfloat16), (peers.formula(op), torch.float64)):
        rounded = peers.inputs(op, m, CHECK_TOKENS, torch.bfloat16, device)
        leaves = [x.detach().to(dtype).requires_grad_() for x in rounded]
        outputs = as_tuple(f(*[x * 1 for x in leaves], *peers.extras(op, m, CHECK_TOKENS, dtype, device)))
        above = [torch.ones_like(y) if y.ndim == 0 else _noise(y, i) for i, y in enumerate(outputs)]
        results.append([*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, above)])
    pairs = zip(*results, strict=True)
    return max(((x.double() - y).norm() / y.norm().clamp(min=1e-30)).item() for x, y in pairs)


def _noise(y: torch.Tensor, seed: int) -> torch.Tensor:
    """The same bf16 numbers for any dtype of y."""
    generator = torch.Generator(y.device).manual_seed(seed)
    return torch.randn(y.shape, generator=generator, device=y.device).bfloat16().to(y.dtype)


# --- what people see -----------------------------------------------------------------------------------------------


def as_text(result: dict) -> str:
    """The result as Markdown: a table an operation and size, with what was absent, and why, below."""
    m = result["machine"]
    lines = [
        f"{m['gpu']}: copies {m['copy_bytes_s'] / 1e12:.2f} TB/s, multiplies {m['gemm_flop_s'] / 1e12:.0f} TFLOP/s (bf16). "
        f"torch {m['torch']}, triton {m['triton']}, {m['date']}. Times are medians, % are of the floor these rates set."
    ]
    for key in dict.fromkeys((r["op"], r["model"], r["tokens"]) for r in result["rows"]):
        rows = [r for r in result["rows"] if (r["op"], r["model"], r["tokens"]) == key]
        lines += ["", f"**{key[0]}**, {key[1]}, {key[2]:,} tokens", ""]
        lines += ["| | forward ms | % | backward ms | % | both ms | % | extra MB | error |", "|---" * 9 + "|"]
        for row in rows:
            if "absent" not in row:
                cells = [f"{row[p]['ms'][1]:.3f} | {row[p]['of_floor']:.0%}" if p in row else " | " for p in PARTS]
                extra, error = row["extra_bytes"] / 1e6, row["error"]
                lines.append(f"| {row['provider']} | {' | '.join(cells)} | {extra:,.0f} | {error:.1e} |")
        lines += [""] + [f"- {row['provider']}: {row['absent']}" for row in rows if "absent" in row]
    return "\n".join(lines)


PARTS = ("forward", "backward", "both")


def draw(result: dict, path: Path) -> None:
    """Bars of forward and backward together in per cent of the floor, a panel an operation; the roofline is at 100 %."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    keys = list(dict.fromkeys((r["op"], r["model"], r["tokens"]) for r in result["rows"]))
    columns = min(3, len(keys))
    figure = Figure(figsize=(5 * columns, 2.6 * -(-len(keys) // columns)), layout="constrained")
    for i, key in enumerate(keys):
        rows = [r for r in result["rows"] if (r["op"], r["model"], r["tokens"]) == key and "absent" not in r]
        axes = figure.add_subplot(-(-len(keys) // columns), columns, i + 1)
        of_floor = [100 * r["both"]["of_floor"] for r in rows]
        colours = ["tab:red" if r["provider"].startswith("ours") else "tab:gray" for r in rows]
        bars = axes.barh([r["provider"] for r in rows], of_floor, color=colours)
        box = dict(facecolor="white", edgecolor="none", pad=1)  # or the roofline would cross the figure
        axes.bar_label(bars, fmt="%.0f %%", padding=3, fontsize=8, bbox=box)
        axes.axvline(100, color="black", linewidth=1, zorder=0)
        axes.set_xlim(0, max([115, *(1.15 * x for x in of_floor)]))
        axes.invert_yaxis()
        axes.set_title(f"{key[0]}, {key[1]}, {key[2]:,} tokens", fontsize=9)
        axes.tick_params(labelsize=8)
    figure.suptitle(f"{result['machine']['gpu']}: % of the floor, forward and backward together", fontsize=11)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "nanomed"}):  # text stays text, the same figures the same bytes
        figure.savefig(path, metadata={"Date": None})


def predicted(ops, models: list[Model], tokens: list[int]) -> str:
    """What to expect of GPUs that are not here: floors for guessed rates, and the compiler's view of the kernels."""
    lines = ["No GPU here: nothing is measured. Floors in ms, with rates that are plausible and not measured by us:"]
    for d in GUESSED.values():
        lines.append(f"- {d.name}: copies {d.copy / 1e12} TB/s, multiplies {d.gemm / 1e12:.0f} TFLOP/s")
    names = [d.name for d in GUESSED.values()]
    lines += ["", f"| operation | model | tokens | part | {' | '.join(names)} |", "|---" * (4 + len(names)) + "|"]
    for op in ops:
        for m in models:
            for n in tokens:
                for part, cost in traffic(op, m, n).items():
                    floors = " | ".join(f"{floor_s(cost, d) * 1e3:.3f}" for d in GUESSED.values())
                    lines.append(f"| {op} | {m.name} | {n:,} | {part} | {floors} |")
    if common.triton is None or common.INTERPRETED:
        return "\n".join([*lines, "", "Triton is not here to compile: no register table."])
    gpus = ", ".join(f"sm_{generation} = {names}" for generation, names in registers.GENERATIONS.items())
    lines += ["", f"What the compiler makes of the kernels ({gpus}):", "", registers.as_text(registers.table())]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
