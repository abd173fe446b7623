"""curves.svg from metrics.jsonl: the training loss, and the forgetting meter.

    python -m nanomed.plot runs/x

The forgetting meter shows the trade-off of continual pre-training: bits per byte of every validation set, relative to the
start. The target domain should fall; the rise of a general set is the price.
"""

import argparse
from pathlib import Path

import numpy as np

from nanomed import InputError, run_script
from nanomed.figures import canvas, save
from nanomed.files import read_jsonl


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, oldest first. InputError if there is none."""
    if not path.exists():
        raise InputError(f"{path}: no such file; is this a run folder?")
    return [row for _, row in read_jsonl(path)]


def plot_curves(run: Path) -> Path:
    """Write RUN/curves.svg from RUN/metrics.jsonl; returns its path."""
    rows = read_metrics(run / "metrics.jsonl")
    train = [r for r in rows if "loss" in r and not r.get("skipped")]
    skipped = [r["tokens"] / 1e6 for r in rows if r.get("skipped") is True]
    measured = [key for r in rows for key, value in r.items() if key.endswith("_bpb") and value is not None]  # null: not finite
    names = list(dict.fromkeys(key.removeprefix("val_").removesuffix("_bpb") for key in measured))
    figure, panels = canvas(11, 4, columns=2) if names else canvas(6, 4)
    left = panels[0]
    if train:
        tokens, loss = np.array([r["tokens"] / 1e6 for r in train]), np.array([r["loss"] for r in train])
        left.plot(tokens, loss, lw=0.6, color="0.85")
        n = max(1, len(loss) // 50)
        left.plot(tokens[n - 1 :], np.convolve(loss, np.ones(n) / n, "valid"), lw=1.2, color="0.5", label="training")
    for i, tokens in enumerate(skipped):
        left.axvline(tokens, color="tab:red", lw=0.6, alpha=0.5, label="" if i else f"skipped: {len(skipped)}")
    for name in names:
        points = [
            (r["tokens"] / 1e6, r[f"val_{name}_loss"], r[f"val_{name}_bpb"]) for r in rows if r.get(f"val_{name}_bpb") is not None
        ]
        tokens, loss, bpb = map(np.array, zip(*points, strict=True))
        left.plot(tokens, loss, marker="o", ms=3, label=name)
        panels[1].plot(tokens, 100 * (bpb / bpb[0] - 1), marker="o", ms=3, label=f"{name}: {bpb[0]:.3f} → {bpb[-1]:.3f}")
    left.set(title="Loss", xlabel="million tokens", ylabel="nats per token")
    if names:
        panels[1].axhline(0, color="0.8", lw=1, zorder=0)
        panels[1].set(title="Forgetting meter", xlabel="million tokens", ylabel="bits per byte, % from the start")
    for axes in panels:
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False)
    path = run / "curves.svg"
    save(figure, path)
    return path


def main() -> None:
    """Redraw the curves of a run."""
    parser = argparse.ArgumentParser(prog="python -m nanomed.plot", description=main.__doc__)
    parser.add_argument("run", type=Path, help="run folder, the --out of train.py")
    print(plot_curves(parser.parse_args().run))


if __name__ == "__main__":
    run_script(main)
