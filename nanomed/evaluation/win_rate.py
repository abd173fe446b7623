"""Win rates and their intervals.

A won prompt is worth 1, a tie 0.5, a loss 0; the win rate is the mean. Its interval is the score interval over *prompts*: a
prompt's two games, one per order, are not independent, and counting them as if they were gives a "95 %" interval that
covers 88 % (tests/bench/coverage.py measures it). The p beside it is the exact sign test's; the two never contradict.

The length-controlled rate answers: what if both answers had been equally long? As in AlpacaEval 2 (Dubois et al. 2024,
arXiv 2404.04475), without its term for the prompt's difficulty, which needs many models:

    P(A wins) = sigmoid(theta + gamma tanh((length_a - length_b) / s)),  s the standard deviation of the differences

fitted to the prompts' worths; the rate is sigmoid(theta), its value at difference 0, if there are prompts on both sides.
"""

from collections.abc import Callable

import numpy as np

from nanomed.evaluation import stats

N_RESAMPLES = 2000
RIDGE = 1e-3  # on gamma and theta, per prompt: a fit exists even if one side wins every prompt


def interval(statistic: Callable[[np.ndarray], np.ndarray], n: int) -> list[float]:
    """The percentile bootstrap's interval of a statistic of weights (R, n) -> (R,)."""
    return list(stats.bootstrap(statistic, n, N_RESAMPLES))


def mean_interval(values: np.ndarray) -> list[float]:
    """Of the mean of the prompts' worths; `stats.compare` of wins and losses, so it agrees with the sign test about 0.5."""
    return [(1 + x) / 2 for x in stats.compare(2 * np.asarray(values, float) - 1)[1]]


def share(flags: list[bool]) -> dict:
    """{value, ci} of a share of prompts (Wilson's interval: the bootstrap's is too narrow where few or nearly all are flagged)."""
    value = float(np.mean(flags))
    return {"value": value, "ci": list(stats.wilson(value, len(flags)))}


def mean(numbers: list[float]) -> dict:
    """{value, ci} of a mean over prompts of numbers of any size."""
    values = np.array(numbers, dtype=np.float64)
    return {"value": float(values.mean()), "ci": interval(lambda weights: weights @ values / len(values), len(values))}


def ratio_of_sums(top: list[float], bottom: list[float]) -> dict:
    """{value, ci} of a sum over a sum, prompts resampled; 0 if the lower sum is 0."""
    above, below = np.array(top, dtype=np.float64), np.array(bottom, dtype=np.float64)
    ratio = lambda weights: weights @ above / np.maximum(weights @ below, 1e-12)  # noqa: E731
    return {"value": float(ratio(np.ones((1, len(above))))[0]), "ci": interval(ratio, len(above))}


def geometric_ratio(top: list[float], bottom: list[float]) -> dict:
    """{value, ci} of the geometric mean of the prompts' ratios; lengths of 0 count as 1."""
    logs = np.log(np.maximum(top, 1)) - np.log(np.maximum(bottom, 1))
    found = mean(list(logs))
    return {"value": float(np.exp(found["value"])), "ci": [float(x) for x in np.exp(found["ci"])]}


def length_controlled(worth: np.ndarray, length_a: np.ndarray, length_b: np.ndarray) -> tuple[float | None, list[float] | None]:
    """(rate at equal lengths, its interval). worth: 1, 0.5 or 0 for each prompt; lengths in characters. (None, None) if one
    side is longer in more than 19 of 20 prompts: equal lengths would then be an extrapolation."""
    difference = np.asarray(length_a, dtype=np.float64) - length_b
    if max((difference > 0).mean(), (difference < 0).mean()) > 0.95:
        return None, None
    if np.ptp(worth) == 0:  # length explains nothing
        return float(worth[0]), mean_interval(worth)
    x = np.tanh(difference / (difference.std() or 1.0))
    rate = lambda weights: 1 / (1 + np.exp(-fit(worth, x, weights)[0]))  # noqa: E731
    value, plain = float(rate(np.ones((1, len(x))))[0]), float(np.mean(worth))
    # Resampling shows too little spread where nearly every prompt has the same winner; the plain rate's interval does not.
    (low, high), (plain_low, plain_high) = interval(rate, len(x)), mean_interval(worth)
    return value, [max(0.0, min(low, value - (plain - plain_low))), min(1.0, max(high, value + (plain_high - plain)))]


def fit(worth: np.ndarray, x: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(theta, gamma), each (R,), of R weighted logistic regressions at once, by Newton's method. weights: (R, n)."""
    theta, gamma = np.zeros((2, len(weights)))
    ridge = RIDGE * weights.sum(1)
    for _ in range(25):
        p = 1 / (1 + np.exp(-(theta[:, None] + gamma[:, None] * x)))  # (R, n)
        miss, slope = weights * (worth - p), weights * p * (1 - p)
        g0, g1 = miss.sum(1) - ridge * theta, miss @ x - ridge * gamma
        h00, h01, h11 = slope.sum(1) + ridge, slope @ x, slope @ x**2 + ridge
        det = h00 * h11 - h01**2
        step0, step1 = (h11 * g0 - h01 * g1) / det, (h00 * g1 - h01 * g0) / det
        theta, gamma = theta + np.clip(step0, -2, 2), gamma + np.clip(step1, -2, 2)
        if max(np.abs(step0).max(), np.abs(step1).max()) < 1e-8:
            break
    return theta, gamma


def summarise(worth: list[float], length_a: list[int], length_b: list[int]) -> dict:
    """What judge reports of the prompts' worths: A's win rate, its difference to B's, a ratio."""
    values, n = np.array(worth, dtype=np.float64), len(worth)
    controlled, controlled_ci = length_controlled(values, np.array(length_a), np.array(length_b))
    rate, ci = float(values.mean()), mean_interval(values)
    return {
        "n": n,
        "win": float((values == 1).mean()), "tie": float((values == 0.5).mean()), "loss": float((values == 0).mean()),
        "win_rate": rate, "ci": ci, "sign_p": stats.sign_test(2 * values - 1),
        "difference": 2 * rate - 1, "difference_ci": [2 * x - 1 for x in ci],  # win - loss
        "ratio": rate / (1 - rate) if rate < 1 else None,
        "length_controlled": controlled, "length_controlled_ci": controlled_ci,
    }  # fmt: skip
