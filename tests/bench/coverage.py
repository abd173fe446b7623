"""Do the 95 % intervals hold the truth 95 times in a hundred? Simulated answers and judgements, seeded.

    python tests/bench/coverage.py [--simulations 3000]

Three intervals, each for 10 to 2,000 questions and shares from 0.02 to 0.98: the accuracy of one model, the difference of two
models on the same questions, and the win rate, where up to 40 % of the prompts are ties. In every simulation the true shares
are drawn anew, up to 0.5 around the named one on the logit scale: for one fixed share and few questions the coverage of any
interval jumps by several per cent, since counts are whole numbers. Two models answer half of the questions independently of
each other, the other half alike as far as their accuracies allow.

Beside them: the win rate's interval if the two games of a prompt were taken for two independent prompts.
Results go to tests/bench/results/coverage.json.
"""

import argparse
import json
import sys
from functools import cache
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from nanomed.evaluation import stats, win_rate  # noqa: E402

SIZES = (10, 20, 50, 100, 200, 500, 1000, 2000)
SHARES = (0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98)
RARE = 5  # expected number of the rarer outcome from which on a cell counts as "enough"


def near(rng: np.random.Generator, share: float) -> float:
    """A share up to 0.5 away on the logit scale."""
    return float(1 / (1 + np.exp(-(np.log(share / (1 - share)) + rng.uniform(-0.5, 0.5)))))


# Each: (rng, n, share) -> (is the truth inside?, probability of the rarer outcome).


def accuracy(rng: np.random.Generator, n: int, share: float) -> tuple[bool, float]:
    """The share of right answers of one model."""
    truth = near(rng, share)
    low, high = stats.wilson(rng.binomial(n, truth) / n, n)
    return low <= truth <= high, min(truth, 1 - truth)


def difference(rng: np.random.Generator, n: int, share: float) -> tuple[bool, float]:
    """The difference of two models' accuracies."""
    a, b = near(rng, share), near(rng, share)
    both = 0.5 * min(a, b) + 0.5 * a * b
    only_a, only_b, _ = rng.multinomial(n, (a - both, b - both, 1 - a - b + 2 * both)).tolist()
    low, high = interval_of_difference(only_a, only_b, n)
    return low <= a - b <= high, a + b - 2 * both


def wins(rng: np.random.Generator, n: int, share: float) -> tuple[bool, float]:
    """The win rate; share: of wins among the prompts that are no ties."""
    ties, win = rng.uniform(0, 0.4), near(rng, share)
    counts = rng.multinomial(n, ((1 - ties) * win, ties, (1 - ties) * (1 - win))).tolist()
    low, high = interval_of_wins(*counts)
    return low <= (1 - ties) * win + ties / 2 <= high, (1 - ties) * min(win, 1 - win)


@cache
def interval_of_difference(only_a: int, only_b: int, n: int) -> tuple[float, float]:
    """Of so many questions that only one of them got right."""
    return stats.compare(np.repeat([1, -1, 0], [only_a, only_b, n - only_a - only_b]))[1]


@cache
def interval_of_wins(won: int, tied: int, lost: int) -> list[float]:
    """Of so many prompts."""
    return win_rate.mean_interval(np.repeat([1, 0.5, 0], [won, tied, lost]))


def games(simulations: int) -> dict[str, float]:
    """Coverage with prompts and with games as the unit, of 300 prompts whose two games are alike."""
    rng, inside = np.random.default_rng(0), {"prompts": 0, "games": 0}
    for _ in range(simulations):
        chance = rng.beta(1.2, 1.8, 300)
        first = rng.random(300) < chance
        second = np.where(rng.random(300) < 0.5, first, rng.random(300) < chance)
        for what, values in (("prompts", (first + second.astype(float)) / 2), ("games", np.concatenate([first, second]))):
            low, high = interval_of_wins(*(int((values == worth).sum()) for worth in (1, 0.5, 0)))
            inside[what] += low <= 0.4 <= high
    return {what: count / simulations for what, count in inside.items()}


def main() -> None:
    """Simulate, count, write."""
    parser = argparse.ArgumentParser(description="Coverage of the evaluation's intervals; see the docstring.")
    parser.add_argument("--simulations", type=int, default=3000, help="of every cell (default: %(default)s)")
    args = parser.parse_args()
    cells = []
    for kind in (accuracy, difference, wins):
        rng = np.random.default_rng(0)
        for n in SIZES:
            for share in SHARES:
                found = [kind(rng, n, share) for _ in range(args.simulations)]
                inside, rarer = (float(np.mean(x)) for x in zip(*found, strict=True))
                cells.append({"of": kind.__name__, "n": n, "share": share, "coverage": inside, "rarer": n * rarer})
    for kind in (accuracy, difference, wins):
        for n in SIZES:
            here = [c for c in cells if c["of"] == kind.__name__ and c["n"] == n]
            enough = [c["coverage"] for c in here if c["rarer"] >= RARE] or [float("nan")]
            every = [c["coverage"] for c in here]
            print(f"{kind.__name__:12} n {n:5}  {min(every):.3f} to {max(every):.3f}, mean {np.mean(every):.3f};  "
                  f"rarer outcome at least {RARE} times: {min(enough):.3f} to {max(enough):.3f}")  # fmt: skip
    result = {"simulations": args.simulations, "cells": cells, "win_rate_by": games(args.simulations)}
    (ROOT / "tests/bench/results/coverage.json").write_text(json.dumps(result, indent=1) + "\n")
    print("win rate of 300 prompts, by", result["win_rate_by"])


if __name__ == "__main__":
    main()
