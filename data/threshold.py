"""Threshold: from which score does a document count as medical? Chosen on one held-out part, measured on another.

    python data/threshold.py clf --target-precision 0.9        # choose again; no training, no sweep

classify.py leaves the scores of both held-out parts in CLF/held_out.parquet. Of the thresholds at which the precision on
the part `choose` reaches the target, the one with the highest recall is taken, and of several such the one with the highest
precision: going lower would only add wrong documents. On that part the choice looks a little too good, so precision and
recall are reported from the part `report`, which played no role in it.
Intervals are Wilson's, 95 %: they hold for small counts and near 0 and 1, where the textbook's ± does not.
(E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 1927.)

Both figures are against the annotator's labels; `annotate.py --audit` measures what those are worth.
"""

import argparse
from pathlib import Path

import numpy as np

from documents import read_documents
from finding import read_record
from nanomed import InputError, run_script
from nanomed.evaluation.stats import wilson
from nanomed.figures import canvas, save
from nanomed.files import write_json


def share_of(hits: int, n: int) -> list[float | None]:
    """[share, low, high] of hits among n, 95 %; [None, 0, 1] for n = 0, since JSON has no NaN."""
    return [hits / n, *wilson(hits / n, n)] if n else [None, 0.0, 1.0]


def curve(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision and recall at every possible threshold, from the highest down: (thresholds, precisions, recalls).

    scores: (N,) float; labels: (N,) 0 or 1, at least one of them 1. A document counts where score ≥ threshold. A
    threshold lies halfway to the next lower score, so that a score's rounding error moves no document.
    """
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order].astype(np.float64), np.cumsum(labels[order])
    last = np.append(ranked[1:] < ranked[:-1], True)  # equal scores are one point
    below = np.append(ranked[1:], max(0.0, 2 * ranked[-1] - 1))
    kept = np.arange(1, ranked.size + 1)
    return ((ranked + below) / 2)[last], (hits / kept)[last], (hits / hits[-1])[last]


def choose(scores: np.ndarray, labels: np.ndarray, target_precision: float) -> float:
    """The highest threshold of the highest recall at a precision of the target or more. InputError if none reaches it."""
    thresholds, precisions, recalls = curve(scores, labels)
    enough = np.flatnonzero(precisions >= target_precision)
    if enough.size == 0:
        best = int(np.argmax(precisions))
        found = f"at best {precisions[best]:.3f} at a recall of {recalls[best]:.3f}"
        raise InputError(
            f"no threshold reaches precision {target_precision} on the part `choose`: {found}; lower --target-precision"
        )
    return float(thresholds[np.searchsorted(recalls, recalls[enough[-1]])])  # recalls rise: the first that is so high


def measure(scores: np.ndarray, labels: np.ndarray, threshold: float) -> dict:
    """Precision and recall at a threshold, each [value, low, high], and the counts behind them."""
    kept, true = scores >= threshold, labels == 1
    n_hits = int((kept & true).sum())
    return {
        "precision": share_of(n_hits, int(kept.sum())),
        "recall": share_of(n_hits, int(true.sum())),
        "n_report": int(labels.size),
        "n_report_medical": int(true.sum()),
        "n_report_kept": int(kept.sum()),
    }


def read_held_out(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """part → (scores, labels) of held_out.parquet."""
    parts: dict[str, list] = {"choose": [], "report": []}
    for row in read_documents(path, ("id", "part", "label"), ("score",)):
        if row["part"] in parts:
            parts[row["part"]].append((row["score"], row["label"] == "medical"))
    return {part: (np.array([s for s, _ in rows], np.float64), np.array([y for _, y in rows], np.int64))
            for part, rows in parts.items()}  # fmt: skip


def check_target(target_precision: float) -> None:
    """InputError for what is no precision."""
    if not 0 < target_precision <= 1:
        raise InputError(f"--target-precision is {target_precision}, expected above 0 and at most 1")


def set_threshold(folder: Path, target_precision: float, about: dict) -> dict:
    """Choose, measure, draw, and write FOLDER/threshold.json last; returns its content. about: what else goes into it."""
    check_target(target_precision)
    parts = read_held_out(folder / "held_out.parquet")
    threshold = choose(*parts["choose"], target_precision)
    result = {"threshold": threshold, "target_precision": target_precision}
    result |= measure(*parts["report"], threshold) | about
    draw_curve(folder / "precision_recall.svg", parts, threshold, result)
    draw_histogram(folder / "scores.svg", parts["report"], threshold)
    write_json(folder / "threshold.json", result)
    return result


def summary(result: dict) -> str:
    """The figures in one line."""
    shown = []
    for name in ("precision", "recall"):
        value, low, high = result[name]
        shown.append(f"{name} {'unknown' if value is None else f'{value:.3f}'} [{low:.3f}, {high:.3f}]")
    counts = f"{result['n_report']:,} held-out documents, {result['n_report_medical']:,} of them medical"
    return f"threshold {result['threshold']:.4f}: {', '.join(shown)} (95 %, {counts})"


# ---- pictures ----


def draw_curve(path: Path, parts: dict, threshold: float, result: dict) -> None:
    """Precision over recall of both parts; the point chosen on one, and what it is worth on the other."""
    figure, [axes] = canvas(6, 4.5)
    axes.set(title="Precision and recall on held-out documents", xlabel="recall", ylabel="precision")
    for (part, (scores, labels)), color in zip(parts.items(), ("0.7", "C0"), strict=True):
        _, precisions, recalls = curve(scores, labels)
        axes.step(recalls, precisions, where="post", color=color, label=f"{part} ({labels.size:,} documents)")
    axes.axhline(result["target_precision"], color="0.8", lw=1, ls="--", zorder=0)
    (p, *p_ends), (r, *r_ends) = result["precision"], result["recall"]
    if p is not None:
        bars = dict(xerr=np.abs(np.array([r_ends]).T - r), yerr=np.abs(np.array([p_ends]).T - p))
        label = f"threshold {threshold:.3f}, 95 % intervals"
        axes.errorbar([r], [p], **bars, fmt="o", color="C3", capsize=3, label=label)
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02))
    axes.legend(frameon=False, loc="lower left")
    save(figure, path)


def draw_histogram(path: Path, part: tuple[np.ndarray, np.ndarray], threshold: float) -> None:
    """The scores of either label around the threshold; counts on a log axis, since most documents lie at 0."""
    figure, [axes] = canvas(6, 4.5)
    axes.set(title="Scores of the part `report`", xlabel="score", ylabel="documents")
    scores, labels = part
    bins = np.linspace(0, 1, 41)
    for value, name, color in ((0, "labelled not medical", "0.6"), (1, "labelled medical", "C0")):
        axes.hist(scores[labels == value], bins, histtype="stepfilled", alpha=0.6, color=color, label=name)
    axes.axvline(threshold, color="C3", lw=1.2, label=f"threshold {threshold:.3f}")
    axes.set(xlim=(0, 1), yscale="log")
    axes.legend(frameon=False, loc="upper right" if threshold < 0.5 else "upper left", bbox_to_anchor=(0.06, 0, 0.88, 1))
    save(figure, path)


def main() -> None:
    """The command line; bad input ends it with one line and exit status 1."""
    parser = argparse.ArgumentParser(
        description="Choose another threshold for a trained classifier, for another precision, without training."
    )
    parser.add_argument("classifier", type=Path, metavar="CLF", help="the folder that data/classify.py wrote")
    parser.add_argument("--target-precision", type=float, required=True, metavar="P", help="precision to reach, 0 to 1")
    args = parser.parse_args()
    about = read_record(args.classifier / "threshold.json", "data/classify.py")
    chosen = ("threshold", "target_precision", *measure(np.ones(1), np.ones(1), 0.5))
    about = {key: value for key, value in about.items() if key not in chosen}
    print(summary(set_threshold(args.classifier, args.target_precision, about)))


if __name__ == "__main__":
    run_script(main)
