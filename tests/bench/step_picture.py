"""Where the time of a training step goes, as a picture: of results/gpu-train-h100.json, what was profiled.

    python tests/bench/step_picture.py        writes results/gpu-step-h100.svg

A bar is a step of Qwen2.5-7B, 16,384 tokens; its pieces are the profiler's 40 dearest kernels by what they are for. What the clock
shows beyond them is time in which the device waited, but for 2 ms of smaller kernels.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from nanomed.figures import canvas, save  # noqa: E402

RESULTS = Path(__file__).parent / "results"
PARTS = {  # the first that fits a kernel's name
    "matrix products": r"nvjet",
    "attention": r"flash|cutlass_kernel",
    "sums of gradients": r"^_add$|CUDAFunctor_add<c10::BFl",
    "AdamW": r"^_step$|lerp",
    "clipping": r"multi_tensor|reduce_kernel<512, 1, at::native::ReduceOp<c10::BFl",
    "norms, SwiGLU, RoPE, loss, the rest": r"",
}
BARS = {  # (commit, side): what is written beside it
    ("efa7d0b", "ours"): "nanomed,\ntorch's attention",
    ("ac4f6fe", "ours"): "nanomed,\nflash-attn-4",
    ("ac4f6fe", "transformers + liger"): "transformers + Liger\n+ torchao, flash-attn-4",
}


def parts(row: dict) -> dict[str, float]:
    """Milliseconds of a step by PARTS, and those without a kernel."""
    found = dict.fromkeys(PARTS, 0.0)
    for kernel in row["kernels_of_a_step"]:
        found[next(name for name, pattern in PARTS.items() if re.search(pattern, kernel["kernel"]))] += kernel["ms"]
    return found | {"waiting": max(0.0, row["step_s"] * 1e3 - sum(found.values()))}


def main() -> None:
    """Draw it."""
    runs = json.loads((RESULTS / "gpu-train-h100.json").read_text())["runs"]
    rows = {(run["commit"], row["side"]): row for run in runs for row in run["rows"] if row["model"] == "qwen2.5-7b"}
    figure, [axes] = canvas(10, 3.2)
    for i, key in enumerate(BARS):
        left, row = 0.0, rows[key]
        for j, (name, ms) in enumerate(parts(row).items()):
            color = "lightgrey" if name == "waiting" else f"C{j}"
            axes.barh(-i, ms, left=left, height=0.6, color=color, label=name if i == 0 else None)
            if ms > 25:
                axes.text(left + ms / 2, -i, f"{ms:.0f}", ha="center", va="center", color="black" if name == "waiting" else "white")
            left += ms
        axes.text(left + 8, -i, f"{row['step_s'] * 1e3:,.0f} ms, {row['mfu']:.1%} MFU", va="center")
    axes.set_yticks([-i for i in range(len(BARS))], BARS.values())
    axes.set_xlim(0, 1720)
    axes.set_xlabel("milliseconds of a step: Qwen2.5-7B, full parameters, 16,384 tokens, one H100")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    save(figure, RESULTS / "gpu-step-h100.svg")


if __name__ == "__main__":
    main()
