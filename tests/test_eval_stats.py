"""Intervals and tests against their definitions, and by simulation."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nanomed.evaluation import accuracy, stats, win_rate
from nanomed.evaluation.tasks import Group, Task

bits = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40)


@given(st.integers(1, 500), st.data())
def test_wilson_solves_its_equation(n, data):
    """Its ends are where |p - q| = z sqrt(q (1 - q) / n)."""
    p = data.draw(st.integers(0, n)) / n
    low, high = stats.wilson(p, n)
    assert 0 <= low <= p + 1e-12
    assert p - 1e-12 <= high <= 1
    for q in (low, high):
        assert abs(p - q) == pytest.approx(stats.Z95 * math.sqrt(q * (1 - q) / n), abs=1e-6)


def test_wilson_covers():
    """95 of 100 intervals hold the truth, for a share where the textbook's p ± 1.96 s covers 88."""
    rng, n, truth = np.random.default_rng(0), 68, 0.05
    ends = [stats.wilson(k / n, n) for k in rng.binomial(n, truth, 4000)]
    assert 0.93 < np.mean([low <= truth <= high for low, high in ends]) < 0.98
    assert stats.wilson(0, 0) == (0, 1)


def test_bootstrap_draws_with_replacement():
    """Of a mean it gives the normal interval; a sample of n leaves out 1/e of them."""
    values = np.random.default_rng(0).random(3000)
    low, high = stats.bootstrap(lambda drawn: drawn @ values / 3000, 3000, 2000)  # 666 samples at a time
    error = stats.Z95 * values.std() / 3000**0.5
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.1 * error)
    assert stats.bootstrap(lambda drawn: drawn.sum(1), 3000, 2000) == (3000, 3000)
    assert stats.bootstrap(lambda drawn: (drawn > 0).mean(1), 3000, 2000) == pytest.approx((0.63, 0.63), abs=0.02)


@given(bits)
def test_the_sign_test_is_mcnemar_s_exact_test(pairs):
    a, b = (np.array(side, float) for side in zip(*pairs, strict=True))
    n, k = int((a != b).sum()), int((a > b).sum())
    p = [math.comb(n, i) / 2**n for i in range(n + 1)]
    assert stats.sign_test(a - b) == pytest.approx(min(1.0, 2 * min(sum(p[: k + 1]), sum(p[k:]))))
    assert stats.sign_test(a - b) == stats.sign_test(b - a)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9))
def test_the_sign_test_counts_all_signs(units):
    """Of the means of three seeds: how many of the 2^n choices of signs give a sum as far from 0?"""
    sums = [sum(s * u for s, u in zip(signs, units, strict=True)) for signs in product((1, -1), repeat=len(units))]
    expected = np.mean([abs(x) >= abs(sum(units)) for x in sums])
    assert stats.sign_test(np.array(units) / 3) == pytest.approx(expected)


@given(st.integers(1, 300), st.data())
def test_the_score_interval_of_right_and_wrong_is_wilson_s(n, data):
    k = data.draw(st.integers(0, n))
    found = stats.score_interval(np.repeat([1, 0], [k, n - k]), 0, 1)
    assert found == pytest.approx(stats.wilson(k / n, n), abs=1e-9)


def tango(b: int, c: int, n: int, mean: float) -> float:
    """The score statistic of a difference of paired shares, by the closed form (Tango 1998)."""
    x, y = -(b + c) + (2 * n - b + c) * mean, -c * mean * (1 - mean)
    q = (math.sqrt(x * x - 8 * n * y) - x) / (4 * n)
    return (b - c - n * mean) / math.sqrt(n * (2 * q + mean * (1 - mean)))


@given(st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(0, 200)).filter(lambda x: 0 < x[0] != x[1] > 0))
def test_the_score_interval_of_paired_differences_is_tango_s(counts):
    b, c, same = counts
    n = b + c + same
    low, high = stats.score_interval(np.repeat([1, -1, 0], [b, c, same]), -1, 1)
    assert -1 < low < (b - c) / n < high < 1
    assert tango(b, c, n, low) == pytest.approx(stats.Z95, rel=1e-5)
    assert tango(b, c, n, high) == pytest.approx(-stats.Z95, rel=1e-5)


seeds_of = st.integers(1, 3).flatmap(lambda s: st.tuples(st.just(s), st.lists(st.integers(-s, s), min_size=1, max_size=60)))


@given(seeds_of)
@example((1, [1] * 4 + [0] * 76))  # 4 better, none worse: p = 0.125
@example((1, [1] * 6 + [0] * 74))
@example((1, [1] * 5))
def test_interval_and_test_never_contradict(drawn):
    n_seeds, units = drawn
    difference = np.array(units) / n_seeds
    value, (low, high), p = stats.compare(difference)
    assert (p < 0.05) == (not low <= 0 <= high)
    assert -1 <= low <= value <= high <= 1
    assert low < high
    mirrored = stats.compare(-difference)
    assert mirrored[1] == pytest.approx((-high, -low), abs=1e-9)


@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 40))
def test_a_win_less_never_raises_the_interval(won, tied, lost):
    """12 of 12 won says more than 11 and a tie, which says more than 11 and a loss."""
    interval = lambda *counts: win_rate.mean_interval(np.repeat([1, 0.5, 0], counts))  # noqa: E731
    best, tie, loss = interval(won, tied, lost), interval(won - 1, tied + 1, lost), interval(won - 1, tied, lost + 1)
    for i in (0, 1):
        assert best[i] >= tie[i] - 1e-9
        assert tie[i] >= loss[i] - 1e-9


def test_a_tie_among_wins_narrows_no_rate():
    """Nor that at equal lengths, whose resamples all have the same winner."""
    lengths = np.arange(12) * 40 + 300, np.arange(12)[::-1] * 40 + 300
    all_won, one_tie = (win_rate.summarise(worth, *lengths) for worth in ([1.0] * 12, [1.0] * 11 + [0.5]))
    assert one_tie["ci"][0] < all_won["ci"][0] < 0.8
    assert one_tie["length_controlled_ci"][0] < 0.8
    assert all_won["sign_p"] == pytest.approx(2 / 2**12)


@pytest.mark.parametrize("n", [20, 200])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_difference_is_covered(n, share):
    """tests/bench/coverage.py has every size and share."""
    rng, inside = np.random.default_rng(0), []
    for _ in range(400):
        a, b = rng.uniform(share / 2, (1 + share) / 2, 2)
        only_a, only_b, same = rng.multinomial(n, (a * (1 - b), b * (1 - a), a * b + (1 - a) * (1 - b)))
        low, high = stats.compare(np.repeat([1, -1, 0], [only_a, only_b, same]))[1]
        inside.append(low <= a - b <= high)
    assert 0.925 < np.mean(inside) < 0.985


def test_a_comparison_uses_the_pairs():
    """Two models that are right on the same questions: their difference is surer than their accuracies are."""
    rng = np.random.default_rng(0)
    a = rng.random(400) < 0.6
    b = a.copy()
    b[:8] = ~b[:8]
    delta, (low, high), _ = stats.compare(b.astype(float) - a)
    assert delta == pytest.approx(b.mean() - a.mean())
    assert low < delta < high
    assert high - low < 0.04  # unpaired it would be 0.14
    delta, (low, high), p = stats.compare(np.zeros(400))  # alike on 400: yet they may differ on 1 in 100
    assert (delta, p) == (0, 1)
    assert high == pytest.approx(-low)
    assert 0.005 < high < 0.01


def test_questions_are_told_apart_by_their_place():
    """Not by their ids, which in a foreign data set may repeat; seeds of a question are one value."""
    values = {0: [1, 0, 1], 1: [1, 1, 1]}
    samples = [{"id": "same", "seed": seed, "correct": bool(x)} for seed, row in values.items() for x in row]
    assert accuracy.per_question(samples).tolist() == [1, 0.5, 1]
    assert accuracy.per_question(samples[:3]).tolist() == [1, 0, 1]


X, Y, Z = (Task(name, {}, None, None) for name in "xyz")
GROUP = Group("g", (Group("h", (X, Y), True), Z), False)


def test_a_group_without_spread_has_the_interval_of_its_tasks():
    """All right, or two models that answer alike: resampling shows no spread, but so few questions leave some."""
    right = {name: np.ones(n) for name, n in (("x", 20), ("y", 10), ("z", 20))}
    low, high = accuracy.group_entry(GROUP, right)["ci"]
    assert high == 1
    assert stats.wilson(1, 20)[0] < low < 0.97
    found = accuracy.group_difference(GROUP, right, right)
    assert found["delta"] == 0
    bound = stats.compare(np.zeros(20))[1][1]
    assert found["ci"] == (pytest.approx(-found["ci"][1]), pytest.approx(found["ci"][1]))
    assert bound / 2 < found["ci"][1] < bound
    other = right | {"z": np.array([0.0, 1.0] * 10)}  # one task with spread hides no other's
    alone = stats.compare(other["z"] - right["z"])[1][0] / 2
    assert accuracy.group_difference(GROUP, other, right)["ci"][0] < alone


def test_a_group_s_interval_covers():
    rng, hits = np.random.default_rng(2), [0, 0]
    truth, sizes = {"x": 0.6, "y": 0.9, "z": 0.3}, {"x": 30, "y": 12, "z": 40}
    macro = accuracy.value(GROUP, truth, sizes)
    for _ in range(120):
        hard = {name: rng.random(n) for name, n in sizes.items()}
        other = {name: np.where(rng.random(len(h)) < 0.5, h, rng.random(len(h))) for name, h in hard.items()}
        a = {name: (h < truth[name]).astype(float) for name, h in hard.items()}
        b = {name: (h < truth[name] - 0.1).astype(float) for name, h in other.items()}
        low, high = accuracy.group_entry(GROUP, a)["ci"]
        hits[0] += low <= macro <= high
        low, high = accuracy.group_difference(GROUP, b, a)["ci"]
        hits[1] += low <= -0.1 <= high
    assert 0.91 * 120 <= min(hits) <= max(hits) <= 0.99 * 120, hits


def test_calibration_error():
    confidence = np.array([0.95] * 10 + [0.55] * 10)
    right = np.array([True] * 9 + [False] + [True] * 2 + [False] * 8)
    assert stats.calibration_error(confidence, right) == pytest.approx((0.05 + 0.35) / 2)
    assert [n for _, _, n in stats.reliability(confidence, right)] == [10, 10]
    assert stats.calibration_error(np.array([1.0, 1.0]), np.array([True, True])) == 0
