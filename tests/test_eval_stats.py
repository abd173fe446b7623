"""Intervals and tests against their definitions, and by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanomed.evaluation import accuracy, stats
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
def test_mcnemar_is_the_binomial_test(pairs):
    a, b = (np.array(side) for side in zip(*pairs, strict=True))
    n, k = int((a != b).sum()), int((a & ~b).sum())
    p = [math.comb(n, i) / 2**n for i in range(n + 1)]
    assert stats.mcnemar(a, b) == pytest.approx(min(1.0, 2 * min(sum(p[: k + 1]), sum(p[k:]))))
    assert stats.mcnemar(a, b) == stats.mcnemar(b, a)


def test_paired_bootstrap_uses_the_pairs():
    """Two models that are right on the same questions: their difference is surer than their accuracies are."""
    rng = np.random.default_rng(0)
    a = rng.random(400) < 0.6
    b = a.copy()
    b[:8] = ~b[:8]
    delta, (low, high) = stats.paired_bootstrap(b, a)
    assert delta == pytest.approx(b.mean() - a.mean())
    assert low < delta < high
    assert high - low < 0.04  # unpaired it would be 0.14
    delta, (low, high) = stats.paired_bootstrap(a, a)  # alike on 400: yet they may differ on 1 in 100
    assert (delta, low, high) == (0, pytest.approx(-high), pytest.approx(1 - 0.025 ** (1 / 400)))
    unseen = 1 - 0.025 ** (1 / 20)  # right on all 20 that the other got wrong: yet the next may be another case
    assert stats.paired_bootstrap(np.ones(20), np.zeros(20)) == (1, (pytest.approx(1 - 2 * unseen), 1))
    delta, (low, high) = stats.paired_bootstrap(np.full(20, 0.5), np.ones(20))
    assert (delta, low, high) == (-0.5, pytest.approx(-0.5 - unseen / 2), pytest.approx(-0.5 + 1.5 * unseen))


def test_questions_are_told_apart_by_their_place():
    """Not by their ids, which in a foreign data set may repeat; seeds of a question are one value."""
    values = {0: [1, 0, 1], 1: [1, 1, 1]}
    samples = [{"id": "same", "seed": seed, "correct": bool(x)} for seed, row in values.items() for x in row]
    assert accuracy.per_question(samples).tolist() == [1, 0.5, 1]
    assert accuracy.per_question(samples[:3]).tolist() == [1, 0, 1]


def test_bootstrap_covers():
    rng, truth = np.random.default_rng(1), 0.1
    hits = 0
    for _ in range(200):
        hard = rng.random(100)
        a, b = (hard < 0.5 + truth).astype(float), (hard < 0.5).astype(float)
        low, high = stats.paired_bootstrap(a, b)[1]
        hits += low <= truth <= high
    assert 180 <= hits <= 199


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
    bound = 1 - 0.025 ** (1 / 20)
    assert found["ci"] == (pytest.approx(-found["ci"][1]), pytest.approx(found["ci"][1]))
    assert bound / 2 < found["ci"][1] < bound
    other = right | {"z": np.array([0.0, 1.0] * 10)}  # one task with spread hides no other's
    alone = stats.paired_bootstrap(other["z"], right["z"])[1][0] / 2
    assert accuracy.group_difference(GROUP, other, right)["ci"][0] < alone


def test_a_group_s_interval_covers():
    rng, hits = np.random.default_rng(2), [0, 0]
    truth, sizes = {"x": 0.6, "y": 0.9, "z": 0.3}, {"x": 30, "y": 12, "z": 40}
    macro = accuracy.value(GROUP, truth, sizes)
    for _ in range(300):
        hard = {name: rng.random(n) for name, n in sizes.items()}
        a, b = ({name: (h < truth[name] - d).astype(float) for name, h in hard.items()} for d in (0, 0.1))
        low, high = accuracy.group_entry(GROUP, a)["ci"]
        hits[0] += low <= macro <= high
        low, high = accuracy.group_difference(GROUP, b, a)["ci"]
        hits[1] += low <= -0.1 <= high
    assert 0.93 * 300 <= min(hits) <= max(hits) <= 0.985 * 300, hits


def test_calibration_error():
    confidence = np.array([0.95] * 10 + [0.55] * 10)
    right = np.array([True] * 9 + [False] + [True] * 2 + [False] * 8)
    assert stats.calibration_error(confidence, right) == pytest.approx((0.05 + 0.35) / 2)
    assert [n for _, _, n in stats.reliability(confidence, right)] == [10, 10]
    assert stats.calibration_error(np.array([1.0, 1.0]), np.array([True, True])) == 0
