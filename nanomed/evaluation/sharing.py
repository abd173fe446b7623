"""Which questions have a common beginning? Found from their tokens, for any task and any kind of shots.

Sorted by tokens, neighbours share most. A group ends where two neighbours share less than half of what one of them shares
with its other neighbour: so the shots of every task are found among several tasks, and if nothing is shared, as without
shots, all questions are one group without a prefix.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from nanomed.evaluation.inference import PREFIX_CHUNK, Row

SHARED = 32  # tokens that questions must share for a separate pass to pay off


@dataclass
class Question:
    """A context and what is scored after it."""

    context: list[int]
    continuations: list[list[int]]
    wanted: list[list[int]]  # per continuation, the numbers of the requests that ask for it

    def row(self, n_prefix: int) -> Row:
        """Without the first n_prefix tokens, which are already computed; a continuation's last token is never fed."""
        return Row(self.context[n_prefix:], [c[:-1] for c in self.continuations])


def groups(questions: list[Question]) -> Iterator[list[Question]]:
    """The questions, grouped by a long common beginning."""
    rest = sorted(questions, key=lambda q: q.context)
    alike = [n if (n := common(a.context, b.context)) >= SHARED else 0 for a, b in pairwise(rest)]
    group: list[Question] = []
    for i, question in enumerate(rest):
        group.append(question)
        here = alike[i] if i < len(alike) else 0
        around = max([*alike[max(0, i - 1) : i], *alike[i + 1 : i + 2]], default=0)
        if i == len(rest) - 1 or here < around / 2:
            yield from _without_long(group)
            group = []


def _without_long(group: list[Question]) -> Iterator[list[Question]]:
    """Questions too long for one pass, each alone, and the rest of the group."""
    n = shared(group)
    short = [q for q in group if len(q.context) - n <= PREFIX_CHUNK]
    yield from ([q] for q in group if len(q.context) - n > PREFIX_CHUNK)
    if short:
        yield short


def shared(group: list[Question]) -> int:
    """How many tokens all contexts of a sorted group begin with, one token being left to each; 0 if that does not pay off."""
    n = common(group[0].context, group[-1].context)
    n = min(n, min(len(q.context) for q in group) - 1)
    return n if n >= SHARED else 0


def common(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
