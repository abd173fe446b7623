"""Error rates of the detector of language mixing, on labelled German answers.

    python tests/bench/language.py [--show]

language_answers.tsv has a category, a label (german or mixed) and an answer on each line. The detector's rules were written
and changed with the odd lines (tuning) alone; the even ones are the test. A false positive is an answer labelled german in
which mixing is found, a miss one labelled mixed in which none is. Both are counted with composed (NFC) and decomposed (NFD)
umlauts. Results go to tests/bench/results/language.json. `--show` prints the wrongly judged answers of the tuning half.
"""

import argparse
import json
import sys
import unicodedata
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from nanomed.evaluation import language  # noqa: E402
from nanomed.evaluation.stats import wilson  # noqa: E402

ANSWERS = ROOT / "tests" / "bench" / "language_answers.tsv"


def read_answers() -> list[tuple[str, str, bool, str]]:
    """(half, category, whether it is labelled mixed, answer) of every line."""
    rows = []
    for number, line in enumerate(ANSWERS.read_text(encoding="utf-8").splitlines(), 1):
        category, label, text = line.split("\t")
        rows.append(("tuning" if number % 2 else "test", category, label == "mixed", text.replace("\\n", "\n")))
    return rows


def is_mixed(text: str) -> bool:
    """Whether the detector finds English in the answer."""
    found = language.examine(text)
    return found.mixed or found.wholly_english


def rate(n_wrong: int, n: int) -> dict:
    """Share of wrong answers with its 95 % interval."""
    return {"wrong": n_wrong, "n": n, "rate": n_wrong / n, "ci": list(wilson(n_wrong / n, n))}


def measure(form: str, half: str, show: bool = False) -> dict:
    """False positives and misses on one half, in one Unicode form, in total and by category."""
    n, wrong = Counter(), Counter()
    for part, category, mixed, text in read_answers():
        if part != half:
            continue
        names = ("misses" if mixed else "false positives", category)
        n.update(names)
        if is_mixed(unicodedata.normalize(form, text)) != mixed:
            wrong.update(names)
            if show:
                print(f"{form} {names[0]}, {category}: {text!r}")
    return {name: rate(wrong[name], n[name]) for name in n}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Error rates of the detector of language mixing; see the docstring.")
    parser.add_argument("--show", action="store_true", help="print the wrongly judged answers of the tuning half")
    args = parser.parse_args()
    results = {}
    for half in ("tuning", "test"):
        for form in ("NFC", "NFD"):
            results[f"{half} {form}"] = found = measure(form, half, args.show and half == "tuning" and form == "NFC")
            for name in ("false positives", "misses"):
                r = found[name]
                low, high = (100 * x for x in r["ci"])
                print(f"{half} {form} {name:<16}{r['wrong']:>3} of {r['n']:<4}{100 * r['rate']:5.1f} % [{low:.1f}, {high:.1f}]")
    (ROOT / "tests/bench/results/language.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
