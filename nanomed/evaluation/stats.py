"""Intervals and comparisons. Every function takes one number a question (its mean over shot seeds), since questions are
what was sampled: the seeds of one question are no further evidence.

    wilson           interval of one accuracy: right at small n and near 0 and 1, where p ± 1.96 s is not
    paired_bootstrap interval of a difference between two models on the same questions
    mcnemar          exact p of "the models differ" from the questions that one got right and the other wrong
    calibration_error  how far the model's own probabilities are from being right that often
"""

import math
from collections.abc import Iterator

import numpy as np

Z95 = 1.959963984540054
RESAMPLES = 10_000


def wilson(p: float, n: int) -> tuple[float, float]:
    """95 % interval of a share p of n questions (Wilson 1927)."""
    centre, spread = p + Z95**2 / (2 * n), Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    scale = 1 + Z95**2 / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def resampled_means(values: np.ndarray, seed: int = 0) -> np.ndarray:  # (n,) -> (RESAMPLES,)
    """Means of as many questions drawn with replacement. One seed and one n give the same draws: pairs stay pairs."""
    rng = np.random.default_rng(seed)
    step = max(1, 2_000_000 // len(values))  # 16 MB of indices at a time
    sizes = [min(step, RESAMPLES - at) for at in range(0, RESAMPLES, step)]
    return np.concatenate([values[rng.integers(len(values), size=(k, len(values)))].mean(1) for k in sizes])


def interval(means: np.ndarray) -> tuple[float, float]:
    """The middle 95 %."""
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def paired_bootstrap(a: np.ndarray, b: np.ndarray) -> tuple[float, tuple[float, float]]:  # (n,) twice
    """mean(a) - mean(b) on the same questions, and its 95 % interval. Where no question tells them apart, resampling
    shows no spread, and the exact binomial bound on how many may stands in."""
    difference = np.asarray(a, float) - np.asarray(b, float)
    if not difference.any():
        others = 1 - 0.025 ** (1 / len(difference))
        return 0.0, (-others, others)
    return float(difference.mean()), interval(resampled_means(difference))


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:  # (n,) bool twice
    """Two-sided exact p: were the questions on which they differ split evenly, how rare would this split be?"""
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def reliability(confidence: np.ndarray, correct: np.ndarray, n_bins: int = 10) -> Iterator[tuple[float, float, int]]:
    """(mean confidence, share right, questions) of every bin of confidence that is not empty."""
    bins = np.minimum((np.asarray(confidence) * n_bins).astype(int), n_bins - 1)
    for i in np.unique(bins):
        mine = bins == i
        yield float(confidence[mine].mean()), float(correct[mine].mean()), int(mine.sum())


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Expected calibration error: |confidence - share right| over ten bins, weighted by their questions (Naeini 2015)."""
    return sum(abs(c - r) * n for c, r, n in reliability(confidence, correct)) / len(confidence)
