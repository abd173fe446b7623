"""Does the win rate's 95 % interval cover the truth 95 times in a hundred? Simulated judgements, seeded.

    python tests/bench/win_rate.py [--simulations 4000] [--prompts 300]

A prompt has its own chance of being won, drawn from a beta distribution, and both of its games, A first and B first, are
drawn from it, in half of the prompts by one draw: games of a prompt are alike. Two verdicts that disagree are
a tie. Counted is how often the interval of nanomed.evaluation.win_rate (resampling prompts) holds the expected rate; and,
to show why, how often the interval does that resamples games as if they were independent. Results go to
tests/bench/results/win-rate.json.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from nanomed.evaluation import win_rate  # noqa: E402

ALIKE = 0.5  # share of prompts whose second game repeats the first one's verdict


def simulate(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(worth of each prompt (n,), worth of each game (2n,)) of one comparison."""
    chance = rng.beta(1.2, 1.8, n)
    first = rng.random(n) < chance
    second = np.where(rng.random(n) < ALIKE, first, rng.random(n) < chance)
    return (first + second.astype(float)) / 2, np.concatenate([first, second]).astype(float)


def main() -> None:
    """Simulate, count, write."""
    parser = argparse.ArgumentParser(description="Coverage of the win rate's interval; see the docstring.")
    parser.add_argument("--simulations", type=int, default=4000, help="(default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=300, help="of one comparison (default: %(default)s)")
    args = parser.parse_args()
    rng, truth = np.random.default_rng(0), 1.2 / 3.0
    inside = {"prompts": 0, "games": 0}
    for _ in range(args.simulations):
        for what, values in zip(inside, simulate(rng, args.prompts), strict=True):
            low, high = win_rate.mean_interval(values)
            inside[what] += low <= truth <= high
    result = {"simulations": args.simulations, "prompts": args.prompts}
    result |= {f"coverage_resampling_{what}": count / args.simulations for what, count in inside.items()}
    (ROOT / "tests/bench/results/win-rate.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
