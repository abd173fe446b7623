"""Intervals and comparisons. Every function takes one number per question (its mean over shot seeds), since questions are
what was sampled: the seeds of one question are no further evidence.

    wilson            interval of a share: right at small n and near 0 and 1, where p ± 1.96 s is not
    score_interval    the same for numbers between two ends: ties, several shot seeds, differences of two models
    sign_test         exact p of "the two differ" on the same questions; McNemar's test where answers are right or wrong
    compare           both, of paired differences; they never contradict each other
    bootstrap         interval of any other statistic, questions resampled
    calibration_error how far the model's own probabilities are from being right that often

tests/bench/coverage.py measures how often the intervals hold the truth.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np

Z95 = 1.959963984540054
ALPHA = 0.05
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


def score_interval(values: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """95 % interval of the mean of independent numbers in [low, high]: every mean that the score test does not reject.

    The test of a mean m compares (mean(values) - m)² n with z² times the variance of the likeliest distribution whose mean is
    m, over the values that occur and both ends. For 0 and 1 this is Wilson's interval, for -1, 0 and 1, the differences of
    two models on the same questions, Tango's (1998). It needs no spread: of 12 values of 1 it says what 12 can say.
    """
    values = np.asarray(values, float)
    points, counts = np.unique(np.append(values, (low, high)), return_counts=True)
    counts = counts - np.isin(points, (low, high))  # the ends were added once
    x, c, n, mean = points.tolist(), counts.tolist(), len(values), float(np.mean(values))

    def rejected(m: float) -> bool:
        return n * (mean - m) ** 2 > Z95**2 * restricted_variance(x, c, m)

    def end(stop: float) -> float:
        inside, outside = mean, stop
        if not rejected(stop):
            return stop
        for _ in range(42):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if rejected(middle) else (middle, outside)
        return inside

    return end(low), end(high)


def restricted_variance(points: list[float], counts: list[int], mean: float) -> float:
    """The variance of the likeliest distribution with this mean on the points, of which counts were seen.

    Lagrange: p_i = c_i / (n (1 + t (x_i - mean))), t by bisection. Where no t gives the mean, the rest of the probability is
    at the end that was not seen. points: ascending, with both ends of what is possible.
    """
    if not points[0] < mean < points[-1]:
        return 0.0
    x, n = [p - mean for p in points], sum(counts)
    least, most = -1 / x[-1], -1 / x[0]
    for _ in range(48):
        t = (least + most) / 2
        excess = sum(c * d / (1 + t * d) for c, d in zip(counts, x, strict=True) if c)
        least, most = (t, most) if excess > 0 else (least, t)
    shares = [c / (n * (1 + t * d)) if c else 0.0 for c, d in zip(counts, x, strict=True)]
    rest = max(0.0, 1 - sum(shares))
    return sum(p * d * d for p, d in zip(shares, x, strict=True)) + rest * x[0 if t > 0 else -1] ** 2


def sign_test(difference: np.ndarray) -> float:
    """Two-sided exact p: how rare is a sum as far from 0, if every difference might as well have had the other sign?

    For differences of -1, 0 and 1 this is McNemar's exact test. difference: multiples of one fraction, 1 / shot seeds say.
    """
    difference = np.asarray(difference, float)
    scale = next(k for k in range(1, 10_000) if np.allclose(difference * k, np.rint(difference * k), atol=1e-6))
    units = np.rint(difference * scale).astype(int)
    chances, reach = np.ones(1), 0  # of the sums -reach ... reach
    for size in np.unique(np.abs(units[units != 0])):
        k = int((np.abs(units) == size).sum())
        log = [math.lgamma(k + 1) - math.lgamma(i + 1) - math.lgamma(k - i + 1) - k * math.log(2) for i in range(k + 1)]
        of_size = np.zeros(2 * size * k + 1)
        of_size[:: 2 * size] = np.exp(log)
        chances, reach = np.convolve(chances, of_size), reach + size * k
    sums = np.arange(-reach, reach + 1)
    return min(1.0, float(chances[np.abs(sums) >= abs(units.sum())].sum()))


def compare(difference: np.ndarray) -> tuple[float, tuple[float, float], float]:
    """(mean, its 95 % interval, p) of paired differences in [-1, 1]: score_interval and sign_test, which agree about 0.

    The exact test is the more careful one where few questions differ: where it does not reject 0, the interval reaches to 0.
    """
    difference = np.asarray(difference, float)
    value, p = float(difference.mean()), sign_test(difference)
    low, high = score_interval(difference, -1.0, 1.0)
    if p >= ALPHA:
        return value, (min(low, 0.0), max(high, 0.0)), p
    tiny = math.ulp(1.0)
    return value, (max(low, tiny), high) if value > 0 else (low, min(high, -tiny)), p


def reliability(confidence: np.ndarray, correct: np.ndarray, n_bins: int = 10) -> Iterator[tuple[float, float, int]]:
    """(mean confidence, share right, questions) of every non-empty bin of confidence."""
    bins = np.minimum((np.asarray(confidence) * n_bins).astype(int), n_bins - 1)
    for i in np.unique(bins):
        inside = bins == i
        yield float(confidence[inside].mean()), float(correct[inside].mean()), int(inside.sum())


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Expected calibration error: |confidence - share right| over ten bins, weighted by their questions (Naeini 2015)."""
    return sum(abs(c - r) * n for c, r, n in reliability(confidence, correct)) / len(confidence)
