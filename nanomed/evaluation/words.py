"""The word lists of data/tasks/words/."""

from functools import cache
from pathlib import Path

WORDS = Path(__file__).resolve().parents[2] / "data" / "tasks" / "words"


@cache
def word_list(name: str) -> frozenset[str]:
    """The words of NAME.txt, as they are written."""
    lines = (WORDS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return frozenset(word for line in lines if not line.startswith("#") for word in line.split())
