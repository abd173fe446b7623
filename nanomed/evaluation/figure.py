"""Accuracy in one figure: bars with intervals, preference for letters, calibration."""

import numpy as np

from nanomed.evaluation.pictures import RED
from nanomed.figures import canvas, svg

CHANCE = 0.25
PAPER_GROUPS = ("german_medical", "german_medical_bioinstructqa")  # of ours, those that average what the paper does
PAPER = {  # arXiv 2604.19394: mean of MMLU-de (medical) and MedQA-de, in per cent; for other models than the runs'
    "BioMistral-7B": 43.55, "BioMistral-7B-SLERP": 48.22, "Mistral-7B-Instruct": 49.73,
    "DeFineMed-Mistral-7B-SLERP": 56.46, "Qwen2.5-7B-Instruct": 59.08, "DeFineMed-Qwen2.5-7B": 64.91,
}  # fmt: skip


def draw(results: dict, paper: bool = False) -> str:
    """The <svg> of the results of `knowledge`. paper: with the paper's numbers as marks below the bars."""
    models = results["models"]
    n_rows = (len(models[0]["tasks"]) + bool(models[0]["group"])) * (len(models) + 1)
    height = max(3.5, 1.2 + 0.16 * (n_rows + len(models) + 1)) + 0.22 * len(PAPER) * paper
    figure, (bars, letters, curve) = canvas(13, height, columns=3, width_ratios=(1.6, 1, 1))
    _bars(bars, models, paper)
    _letters(letters, models)
    _reliability(curve, models)
    return svg(figure)


def _bars(axes, models: list[dict], paper: bool) -> None:
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
        for place, end, text in zip(y, high, value, strict=True):
            axes.text(end + 1.5, place, f"{text:.1f}", va="center", size=8)
    axes.axvline(100 * CHANCE, color="0.5", lw=1, ls=":", label="chance, four options")
    ticks, labels = list(range(len(rows))), rows
    if paper:
        ticks += [len(rows) - 0.3 + 1.4 * i / (len(models) + 1) for i in range(len(PAPER))]
        labels = rows + list(PAPER)
        axes.plot([*PAPER.values()], ticks[len(rows) :], "D", color=RED, ms=4, label="the paper's models")
        for place, value in zip(ticks[len(rows) :], PAPER.values(), strict=True):
            axes.text(value + 1.5, place, f"{value:.1f}", va="center", size=8, color=RED)
    axes.set(title="Accuracy, 95 % interval", xlabel="% right", xlim=(0, 100))
    axes.set_yticks(ticks, labels, size=9)
    axes.invert_yaxis()
    _legend_below(axes, 3)


def _letters(axes, models: list[dict]) -> None:
    """How often each letter is chosen, and how often it is right; if whole answers are scored, places mean nothing."""
    counts = {model["name"]: [e["letters"] for e in model["tasks"] if e["letters"] and e["metric"] == "acc"] for model in models}
    first = counts[models[0]["name"]]
    if not first:
        return axes.set_axis_off()
    n = max(len(c["gold"]) for c in first)
    shown = [("right", [c["gold"] for c in first], "0.8")]
    shown += [(name, [c["chosen"] for c in found], f"C{m}") for m, (name, found) in enumerate(counts.items())]
    width = 0.8 / len(shown)
    for i, (label, rows, colour) in enumerate(shown):
        total = np.sum([np.pad(row, (0, n - len(row))) for row in rows], 0)
        x = np.arange(n) + (i - (len(shown) - 1) / 2) * width
        axes.bar(x, 100 * total / total.sum(), 0.92 * width, color=colour, label=label)
    axes.set(title="Letter chosen", ylabel="% of questions", xticks=range(n), xticklabels="ABCDEFGHIJ"[:n])
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= 100])
    _legend_below(axes, 2)


def _reliability(axes, models: list[dict]) -> None:
    """Share right against confidence: on the diagonal if the model is calibrated."""
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
    _legend_below(axes, 2)


def _legend_below(axes, columns: int) -> None:
    """Below the axes, where it hides nothing, however many models there are."""
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns)
