"""Intervals and comparisons. Every function takes one number per question (its mean over shot seeds), since questions are
what was sampled: the seeds of one question are no further evidence.

    wilson            interval of one accuracy: right at small n and near 0 and 1, where p ± 1.96 s is not
    bootstrap         interval of any statistic, questions resampled
    paired_bootstrap  interval of a difference between two models on the same questions
    mcnemar           exact p of "the models differ" from the questions that one got right and the other wrong
    calibration_error how far the model's own probabilities are from being right that often
"""

import math
from collections.abc import Callable, Iterator

import numpy as np

Z95 = 1.959963984540054
RESAMPLES = 10_000


def wilson(p: float, n: int) -> tuple[float, float]:
    """95 % interval of a share p of n questions (Wilson 1927); of no questions, [0, 1]."""
    if not n:
        return 0.0, 1.0
    centre, spread = p + Z95**2 / (2 * n), Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    scale = 1 + Z95**2 / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def bootstrap(statistic: Callable[[np.ndarray], np.ndarray], n: int, resamples: int = RESAMPLES) -> tuple[float, float]:
    """The percentile bootstrap's 95 % interval. statistic: how often each of n questions was drawn, (R, n), → (R,)."""
    rng, values = np.random.default_rng(0), []
    step = max(1, 2_000_000 // n)  # 16 MB at a time
    for start in range(0, resamples, step):
        k = min(step, resamples - start)
        drawn = rng.integers(n, size=(k, n)) + n * np.arange(k)[:, None]
        values.append(statistic(np.bincount(drawn.ravel(), minlength=k * n).reshape(k, n).astype(float)))
    low, high = np.quantile(np.concatenate(values), (0.025, 0.975))
    return float(low), float(high)


def unseen(n: int) -> float:
    """Of n questions that are all alike, the share that may still differ (exact binomial, 95 %): resampling them shows no
    spread."""
    return 1 - 0.025 ** (1 / n)


def paired_bootstrap(a: np.ndarray, b: np.ndarray) -> tuple[float, tuple[float, float]]:  # (n,) twice
    """mean(a) - mean(b) on the same questions, and its 95 % interval. If all questions differ alike, the `unseen` ones may differ
    by anything from -1 to 1."""
    difference = np.asarray(a, float) - np.asarray(b, float)
    value, n = float(difference.mean()), len(difference)
    if np.ptp(difference) == 0:
        return value, (value - unseen(n) * (1 + value), value + unseen(n) * (1 - value))
    return value, bootstrap(lambda drawn: drawn @ difference / n, n)


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:  # (n,) bool twice
    """Two-sided exact p: how rare is this split of the questions on which they differ, if each side is as likely?"""
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def reliability(confidence: np.ndarray, correct: np.ndarray, n_bins: int = 10) -> Iterator[tuple[float, float, int]]:
    """(mean confidence, share right, questions) of every non-empty bin of confidence."""
    bins = np.minimum((np.asarray(confidence) * n_bins).astype(int), n_bins - 1)
    for i in np.unique(bins):
        inside = bins == i
        yield float(confidence[inside].mean()), float(correct[inside].mean()), int(inside.sum())


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Expected calibration error: |confidence - share right| over ten bins, weighted by their questions (Naeini 2015)."""
    return sum(abs(c - r) * n for c, r, n in reliability(confidence, correct)) / len(confidence)
