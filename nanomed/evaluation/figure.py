"""accuracy.svg: every model's accuracy with its interval, which letters it likes, and whether its confidence is earned."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

CHANCE = 0.25


def draw(results: dict, path: Path) -> None:
    """Write the picture (SVG, or PNG by its suffix) of the results of `knowledge`."""
    models = results["models"]
    names = [entry["task"] for entry in models[0]["tasks"]]
    figure = Figure(figsize=(13, max(3.5, 1.2 + 0.16 * (len(names) + 1) * (len(models) + 1))))
    FigureCanvasSVG(figure) if path.suffix == ".svg" else FigureCanvasAgg(figure)
    bars, letters, curve = figure.subplots(1, 3, width_ratios=(1.6, 1, 1))
    _bars(bars, models)
    _letters(letters, models)
    _reliability(curve, models)
    for axes in (bars, letters, curve):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "nanomed"}
    ):  # text stays text, same input same bytes
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _bars(axes, models: list[dict]) -> None:
    rows = [entry["task"] for entry in models[0]["tasks"]]
    rows += [f"{models[0]['group']['name']}, macro"] if models[0]["group"] else []
    height = 0.8 / len(models)
    for m, model in enumerate(models):
        entries = [(e["accuracy"], *e["ci"]) for e in model["tasks"]]
        entries += [(model["group"]["macro"], *model["group"]["ci"])] if model["group"] else []
        value, low, high = np.array(entries).T * 100
        y = np.arange(len(rows)) + (m - (len(models) - 1) / 2) * height
        errors = [np.maximum(0, value - low), np.maximum(0, high - value)]
        axes.barh(y, value, 0.92 * height, xerr=errors, color=f"C{m}", ecolor="0.25", capsize=2, label=model["name"])
    axes.axvline(100 * CHANCE, color="0.5", lw=1, ls=":", label="chance, four options")
    axes.set(
        title="Accuracy, 95 % interval", xlabel="% right", xlim=(0, 100), yticks=range(len(rows)), yticklabels=rows
    )
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8)


def _letters(axes, models: list[dict]) -> None:
    """Share of each place among the choices of all tasks, beside its share among the right answers."""
    counted = [e["letters"] for e in models[0]["tasks"] if e["letters"]]
    if not counted:
        return axes.set_axis_off()
    n = max(len(c["gold"]) for c in counted)
    shown = [("right", [e["letters"]["gold"] for e in models[0]["tasks"] if e["letters"]], "0.8")]
    for m, model in enumerate(models):
        shown.append((model["name"], [e["letters"]["chosen"] for e in model["tasks"] if e["letters"]], f"C{m}"))
    width = 0.8 / len(shown)
    for i, (label, counts, colour) in enumerate(shown):
        total = np.sum([np.pad(c, (0, n - len(c))) for c in counts], 0)
        x = np.arange(n) + (i - (len(shown) - 1) / 2) * width
        axes.bar(x, 100 * total / total.sum(), 0.92 * width, color=colour, label=label)
    axes.set(title="Place of the choice", ylabel="% of questions", xticks=range(n), xticklabels="ABCDEFGHIJ"[:n])
    axes.legend(frameon=False, fontsize=8)


def _reliability(axes, models: list[dict]) -> None:
    """Share right against confidence: on the diagonal where the model knows what it knows."""
    drawn = [(m, model, [e for e in model["tasks"] if e["reliability"]]) for m, model in enumerate(models)]
    if not any(entries for _, _, entries in drawn):
        return axes.set_axis_off()
    axes.plot([0, 100], [0, 100], color="0.8", lw=1)
    for m, model, entries in drawn:
        bins = np.array([b for e in entries for b in e["reliability"]])
        place = np.minimum((bins[:, 0] * 10).astype(int), 9)
        merged = [bins[place == i] for i in np.unique(place)]
        x, y = ([100 * np.average(b[:, k], weights=b[:, 2]) for b in merged] for k in (0, 1))
        size = [10 + 150 * b[:, 2].sum() / bins[:, 2].sum() for b in merged]
        error = np.average([e["ece"] for e in entries], weights=[e["n"] for e in entries])
        axes.plot(x, y, color=f"C{m}", lw=1, label=f"{model['name']}: off by {100 * error:.1f} points")
        axes.scatter(x, y, size, color=f"C{m}")
    axes.set(title="Calibration", xlabel="confidence, %", ylabel="% right", xlim=(0, 100), ylim=(0, 100))
    axes.legend(frameon=False, fontsize=8)
