"""Which questions begin alike? Found from their tokens, so that it works for any task and any kind of shots.

In the order of their tokens, neighbours share most. A border is where two neighbours share less than half of what one of
them shares with its other neighbour: the shots of every task are found among several, and where nothing is shared, as
without shots, all questions are one group without a prefix.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from nanomed.evaluation.inference import PREFIX_CHUNK, Row

SHARED = 32  # tokens that questions must share at least for a pass of its own to pay


@dataclass
class Question:
    """A context and what is scored after it."""

    context: list[int]
    continuations: list[list[int]]
    wanted: list[list[int]]  # per continuation, the numbers of the requests that ask for it

    def row(self, n_prefix: int) -> Row:
        """Without the first n_prefix tokens, which are computed already; a continuation's last token is never fed."""
        return Row(self.context[n_prefix:], [c[:-1] for c in self.continuations])


def groups(questions: list[Question]) -> Iterator[list[Question]]:
    """The questions, those with a long common beginning together."""
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
    """The group without questions too long for one pass, and each of those alone."""
    n = shared(group)
    short = [q for q in group if len(q.context) - n <= PREFIX_CHUNK]
    yield from ([q] for q in group if len(q.context) - n > PREFIX_CHUNK)
    if short:
        yield short


def shared(group: list[Question]) -> int:
    """Tokens that all contexts of a sorted group begin with; one token is left to each. 0 where it does not pay."""
    n = common(group[0].context, group[-1].context)
    n = min(n, min(len(q.context) for q in group) - 1)
    return n if n >= SHARED else 0


def common(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
