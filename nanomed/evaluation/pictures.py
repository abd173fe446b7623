"""The report's pictures, each an SVG string."""

from itertools import cycle

import numpy as np

from nanomed.evaluation.win_rate import fit
from nanomed.figures import canvas, svg

BLUE, GREY, RED = "#2f6f9f", "#999999", "#b5523b"


def bars(axes, rows: list[tuple[str, float, list[float], str]]) -> None:
    """Horizontal bars of (label, per cent, interval, colour), each with its number."""
    for y, (_, value, (low, high), colour) in enumerate(rows):
        axes.barh(y, value, color=colour, height=0.65)
        axes.errorbar(value, y, xerr=[[max(0, value - low)], [max(0, high - value)]], color="0.2", lw=1, capsize=2)
        axes.text(max(value, high) + 1, y, f"{value:.1f}", va="center", size=8)
    axes.set_yticks(range(len(rows)), [label for label, *_ in rows], size=8)


def win_rates(rows: list[tuple[str, dict]]) -> str:
    """For each comparison (label, results of judge) the win rate, and the rate at equal lengths."""
    figure, [axes] = canvas(9, 1.2 + 0.6 * len(rows))
    lines = []
    for label, r in rows:
        lines.append((label, 100 * r["win_rate"], [100 * x for x in r["ci"]], BLUE))
        if r["length_controlled"] is not None:
            controlled = [100 * x for x in r["length_controlled_ci"]]
            lines.append(("at equal lengths", 100 * r["length_controlled"], controlled, GREY))
    bars(axes, lines)
    axes.axvline(50, color="0.6", lw=1, ls="--", zorder=0)
    axes.set(xlim=(0, 110), xticks=range(0, 101, 20), xlabel="win rate, % (a tie is half a win)")
    axes.invert_yaxis()
    return svg(figure)


def length_and_win(label: str, points: list[dict], controlled: float | None) -> str:
    """Who won each prompt, over the difference of lengths; with the curve whose value at 0 is the length-controlled rate,
    unless there is none."""
    figure, [axes] = canvas(6, 3.2)
    difference = np.array([p["length_a"] - p["length_b"] for p in points], dtype=float)
    worth = np.array([p["worth"] for p in points])
    jitter = 0.04 * np.sin(12.9898 * np.arange(len(points)))  # separates coinciding points, always in the same way
    axes.plot(difference, worth + jitter, "o", ms=4, alpha=0.5, color=BLUE, mew=0)
    if controlled is not None:
        scale = difference.std() or 1.0
        theta, gamma = fit(worth, np.tanh(difference / scale), np.ones((1, len(points))))
        x = np.linspace(min(difference.min(), 0), max(difference.max(), 0), 200)
        axes.plot(x, 1 / (1 + np.exp(-(theta + gamma * np.tanh(x / scale)))), color=RED, lw=1.2)
    axes.axvline(0, color="0.8", lw=1, zorder=0)
    axes.set_yticks([0, 0.5, 1], ["lost", "tie", "won"])
    axes.set(xlabel="characters longer than the other answer", ylim=(-0.15, 1.15))
    axes.set_title(label, size=9, loc="left")
    return svg(figure)


def against_t(curves: dict[str, list[tuple[float, dict]]]) -> str:
    """A curve per figure: (t, {value, ci}) of the models whose t is known."""
    figure, [axes] = canvas(7, 3.4)
    for (label, points), style in zip(curves.items(), cycle(("o-", "s--", "^:", "D-.")), strict=False):
        t, found = zip(*sorted(points, key=lambda point: point[0]), strict=True)
        value = 100 * np.array([f["value"] for f in found])
        low, high = (np.abs(100 * np.array([f["ci"][i] for f in found]) - value) for i in (0, 1))
        axes.errorbar(t, value, yerr=[low, high], fmt=style, ms=4, lw=1.2, capsize=2, label=label)
    axes.set(xlabel="t (0: the instruct model, 1: the continued one)", ylabel="%", ylim=(0, 105))
    axes.legend(frameon=False, fontsize=8)
    return svg(figure)
