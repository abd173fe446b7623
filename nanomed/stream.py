"""The endless stream of documents: which token stands where, as a pure function of the seed.

The epochs, each permuted by (seed, epoch), follow one another without end. A position in this stream is one integer,
and it is the whole data state of a run: there is no iterator to save, nothing is replayed or skipped on resuming, and
it does not depend on the number of ranks.

Several data sets are permuted together. Of a set with a share, `bins/general@0.1`, each epoch takes the next tenth.

What it costs: for the 7.3 M documents of FineMed-de about a second an epoch to sort, and about 40 bytes a document, since
two epochs are kept; 80 while a third is sorted.
"""

import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from nanomed import InputError
from nanomed.bins import Bins


@dataclass(frozen=True)
class Epoch:
    """One pass over the data in its own order."""

    docs: np.ndarray  # (n,) int64 document numbers in reading order
    borders: np.ndarray  # (n + 1,) int64 stream positions: document i is [borders[i], borders[i + 1])


class Stream:
    """The endless stream of documents over one or several data sets."""

    def __init__(self, sources: list[tuple[Bins, float]], seed: int | None, vocab_size: int):
        """sources: (bins, share of its documents an epoch); seed None: the order on disk (validation)."""
        self.sources, self.seed, self.vocab_size = sources, seed, vocab_size
        self.bins = [bins for bins, _ in sources]
        self.first_doc = np.cumsum([0] + [bins.n_docs for bins in self.bins])
        self.lengths = np.concatenate([bins.lengths for bins in self.bins])
        self.epoch = lru_cache(maxsize=2)(self._epoch)
        self._tokens_of = lru_cache(maxsize=None)(self._count_tokens)

    def _docs(self, epoch: int) -> np.ndarray:
        """Document numbers of an epoch, unsorted; of `bins@0.1` the next tenth of one fixed permutation."""
        docs = []
        for i, (bins, share) in enumerate(self.sources):
            taken = np.arange(round(epoch * share * bins.n_docs), round((epoch + 1) * share * bins.n_docs)) % bins.n_docs
            docs.append(self.first_doc[i] + self._order(i)[taken])
        return np.concatenate(docs)

    def _epoch(self, epoch: int) -> Epoch:
        docs = self._docs(epoch)
        if self.seed is not None:
            docs = docs[_permutation(len(docs), self.seed, 0, epoch)]
        borders = np.concatenate(([0], np.cumsum(self.lengths[docs]))) + self.start_of(epoch)
        return Epoch(docs, borders)

    def start_of(self, epoch: int) -> int:
        """Stream position of the epoch's first token: the number of tokens in all epochs before it.

        A closed formula, whatever the epoch: the documents that a set has given so far are whole rounds through its fixed
        order and the beginning of one more.
        """
        total = 0
        for source, (bins, share) in enumerate(self.sources):
            rounds, rest = divmod(round(epoch * share * bins.n_docs), bins.n_docs)
            total += rounds * int(self._tokens_of(source)[-1]) + int(self._tokens_of(source)[rest])
        return total

    def _order(self, source: int) -> np.ndarray:
        """The fixed order in which the epochs take a set's documents, (n_docs,)."""
        bins, share = self.sources[source]
        return np.arange(bins.n_docs) if share == 1 else _permutation(bins.n_docs, self.seed, 1 + source)

    def _count_tokens(self, source: int) -> np.ndarray:
        """Tokens in the first 0, 1, 2, ... documents of a set's fixed order, int64 (n_docs + 1,)."""
        bins, share = self.sources[source]
        if share == 1:  # only whole rounds are asked for
            return np.array([0, bins.lengths.sum()])
        return np.concatenate(([0], np.cumsum(bins.lengths[self._order(source)])))

    def epoch_at(self, position: int) -> int:
        """The epoch whose tokens the stream position falls into, by bisection."""
        beyond = 1
        while self.start_of(beyond) <= position:
            beyond *= 2
        return bisect.bisect_right(range(beyond), position, key=self.start_of) - 1

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(document, first token, end token) of every piece in the stream positions [start, stop), in order."""
        for number in range(self.epoch_at(start), self.epoch_at(stop - 1) + 1):
            epoch = self.epoch(number)
            lo, hi = np.searchsorted(epoch.borders, (max(start, epoch.borders[0]), min(stop, epoch.borders[-1])), "right")
            for i in range(lo - 1, min(hi, len(epoch.docs))):
                a, b = max(start, epoch.borders[i]), min(stop, epoch.borders[i + 1])
                if a < b:
                    yield int(epoch.docs[i]), int(a - epoch.borders[i]), int(b - epoch.borders[i])

    def ends(self, start: int, stop: int) -> int:
        """How many documents have their last token in the stream positions [start, stop): that token has no label."""
        count = 0
        for number in range(self.epoch_at(start), self.epoch_at(stop - 1) + 1):
            lo, hi = np.searchsorted(self.epoch(number).borders[1:], (start, stop), "right")
            count += int(hi - lo)
        return count

    def origin(self, doc: int) -> tuple[Bins, int]:
        """The bins that a document of the stream comes from, and its number in them."""
        source = int(np.searchsorted(self.first_doc, doc, "right")) - 1
        return self.bins[source], int(doc - self.first_doc[source])

    def read(self, doc: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a document, fewer at its end, as on disk. InputError if the model has not one of them."""
        bins, number = self.origin(doc)
        tokens = bins.tokens(number, start, min(stop, int(self.lengths[doc])))
        if (largest := tokens.max()) >= self.vocab_size:  # on a GPU it would read foreign memory, or wait for an assert
            raise InputError(
                f"{bins.folder}: document {number} has token id {largest}, the model's vocabulary {self.vocab_size} entries; "
                "check the bins with data/verify.py"
            )
        return tokens


def open_sources(specs: Iterable[str]) -> list[tuple[Bins, float]]:
    """`bins/a`, `bins/b@0.1` → (Bins, share of its documents an epoch). InputError where one cannot be used."""
    sources = []
    for spec in specs:
        folder, _, share = spec.partition("@")
        try:
            share = float(share or 1)
        except ValueError:
            share = 0.0
        if not 0 < share < float("inf"):
            raise InputError(f"--data {spec}: what follows @ must be a number above 0, the share of documents an epoch")
        bins = Bins(folder)
        if bins.n_docs == 0:
            raise InputError(f"{folder}: holds no documents")
        sources.append((bins, share))
    return sources


def _permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of range(n) from integers. numpy promises its raw bits for ever, its own permutation() not."""
    return np.argsort(np.random.PCG64(key).random_raw(n), kind="stable")
