"""curves.svg from metrics.jsonl: the training loss, and the forgetting meter.

    python -m nanomed.plot runs/x

The forgetting meter is the question of continual pre-training in one picture: bits per byte of every validation set,
relative to where the model started. The target domain should fall; how far a general set rises is the price.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from nanomed import InputError


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, oldest first. InputError where there is none."""
    if not path.exists():
        raise InputError(f"{path}: no such file; is this a run folder?")
    return [json.loads(line) for line in path.read_text().splitlines()]


def plot_curves(run: Path) -> Path:
    """Write RUN/curves.svg from RUN/metrics.jsonl; its path."""
    rows = read_metrics(run / "metrics.jsonl")
    train = [r for r in rows if "loss" in r]
    names = sorted({k for r in rows for k in r if k.startswith("val_") and k.endswith("_bpb")})
    plt.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "nanomed", "axes.spines.top": False, "axes.spines.right": False}
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot([r["tokens"] / 1e6 for r in train], [r["loss"] for r in train], lw=0.8, color="0.6", label="training")
    for name in names:
        points = [(r["tokens"] / 1e6, r[name.replace("_bpb", "_loss")], r[name]) for r in rows if name in r]
        tokens, loss, bpb = zip(*points, strict=True)
        label = name.removeprefix("val_").removesuffix("_bpb")
        left.plot(tokens, loss, marker="o", ms=3, label=label)
        right.plot(tokens, [100 * (b / bpb[0] - 1) for b in bpb], marker="o", ms=3)
        right.annotate(f"{label}: {bpb[0]:.3f} → {bpb[-1]:.3f}", (tokens[-1], 100 * (bpb[-1] / bpb[0] - 1)),
                       xytext=(-4, 6), textcoords="offset points", ha="right")  # fmt: skip
    left.set(title="Loss", xlabel="million tokens", ylabel="nats per token")
    left.legend(frameon=False)
    right.axhline(0, color="0.8", lw=1, zorder=0)
    right.set(title="Forgetting meter", xlabel="million tokens", ylabel="bits per byte, % from the start")
    path = run / "curves.svg"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


if __name__ == "__main__":
    try:
        print(plot_curves(Path(sys.argv[1])))
    except (InputError, IndexError) as error:
        sys.exit(f"error: {error}" if sys.argv[1:] else "usage: python -m nanomed.plot RUN_FOLDER")
