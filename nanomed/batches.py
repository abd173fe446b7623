"""From bins to packed batches: a pure function of (seed, step), so that a run's whole data state is one integer.

The epochs, each permuted by (seed, epoch), follow one another as one endless stream of documents. Window w is its tokens
[w·L, (w+1)·L); the label of a window's last token is the stream's next one. So no token is lost, nothing is padded, each
epoch packs the documents anew, and step s takes the windows [s·G, (s+1)·G) whatever the number of ranks. Resuming, on
as many ranks as are left, is arithmetic; nothing is replayed or skipped.

What it costs: for the 7.3 M documents of FineMed-de about a second an epoch to sort and 16 bytes a document; then a few
microseconds a document piece, in a thread beside the training.

    python -m nanomed.batches show --run runs/x --step 1234      prints the text of the very batch of that step
"""

import dataclasses
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from nanomed import InputError
from nanomed.bins import Bins
from nanomed.kernels.linear_cross_entropy import IGNORED


@dataclass(frozen=True)
class Batch:
    """The packed tokens of one forward pass: N = windows · L."""

    tokens: Tensor  # (N,) int64
    labels: Tensor  # (N,) int64: the next token, IGNORED where it belongs to another document
    positions: Tensor  # (N,) int64, from 0 in each document piece
    cu_seqlens: Tensor  # (pieces + 1,) int32 borders of the pieces; one length for the whole run, the last entry repeats
    max_seqlen: int  # one value for the whole run
    sum_squared_lens: int  # Σ len² over the pieces: the work of attention

    def to(self, device: torch.device) -> "Batch":
        """The same batch on the device; asynchronous where its memory is pinned."""
        moved = {
            f.name: v.to(device, non_blocking=True)
            for f in dataclasses.fields(self)
            if isinstance(v := getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def pinned(self) -> "Batch":
        """The same batch in page-locked memory, from which a GPU copies on its own."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Batch(**{k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in fields.items()})


@dataclass(frozen=True)
class Epoch:
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
        self._first_token = [0]  # stream position of every epoch's start, as far as known

    def _docs(self, epoch: int) -> np.ndarray:
        """Document numbers of an epoch, unsorted: of `bins@0.1` the epoch-th tenth of one fixed permutation, in turn."""
        docs = []
        for i, (bins, share) in enumerate(self.sources):
            taken = np.arange(round(epoch * share * bins.n_docs), round((epoch + 1) * share * bins.n_docs)) % bins.n_docs
            docs.append(self.first_doc[i] + (taken if share == 1 else _permutation(bins.n_docs, self.seed, 1 + i)[taken]))
        return np.concatenate(docs)

    def _epoch(self, epoch: int) -> Epoch:
        docs = self._docs(epoch)
        if self.seed is not None:
            docs = docs[_permutation(len(docs), self.seed, 0, epoch)]
        borders = np.concatenate(([0], np.cumsum(self.lengths[docs]))) + self.start_of(epoch)
        return Epoch(docs, borders)

    def start_of(self, epoch: int) -> int:
        """Stream position of the epoch's first token: the number of tokens in all epochs before it."""
        while len(self._first_token) <= epoch:
            self._first_token.append(
                self._first_token[-1] + int(self.lengths[self._docs(len(self._first_token) - 1)].sum())
            )
        return self._first_token[epoch]

    def epoch_at(self, position: int) -> int:
        """The epoch whose tokens the stream position falls into."""
        epoch = 0
        while self.start_of(epoch + 1) <= position:
            epoch += 1
        return epoch

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

    def read(self, doc: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a document, fewer at its end, in the dtype on disk. InputError if the model lacks one."""
        source = int(np.searchsorted(self.first_doc, doc, "right")) - 1
        stop = min(stop, int(self.lengths[doc]))
        tokens = self.bins[source].tokens(doc - int(self.first_doc[source]), start, stop)
        if (largest := tokens.max()) >= self.vocab_size:  # on a GPU it would read foreign memory, or wait for an assert
            raise InputError(
                f"{self.bins[source].folder}: document {doc - self.first_doc[source]} has token id {largest}, the model's "
                f"vocabulary {self.vocab_size} entries; check the bins with data/verify.py"
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
        if not share > 0:
            raise InputError(f"--data {spec}: what follows @ must be a number above 0, the share of documents an epoch")
        bins = Bins(folder)
        if bins.n_docs == 0:
            raise InputError(f"{folder}: holds no documents")
        sources.append((bins, share))
    return sources


def _permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of range(n) from integers. numpy promises its raw bits for ever, its own permutation() not."""
    return np.argsort(np.random.PCG64(key).random_raw(n), kind="stable")


# --- windows → batches ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What is the same for every batch of a run, so that nothing ever recompiles."""

    seq_len: int  # L, tokens in a window
    micro_batch: int  # windows in a batch
    max_pieces: int  # no batch has more document pieces; cu_seqlens has one entry more


def max_pieces(stream: Stream, seq_len: int, micro_batch: int, n_windows: int) -> int:
    """The largest number of document pieces in any batch of the first n_windows windows, from the index alone.

    The worst case, a piece a token, would launch millions of empty attention blocks; the truth costs one pass over the borders.
    """
    pieces = np.ones(-(-n_windows // micro_batch) * micro_batch, dtype=np.int32)
    for number in range(stream.epoch_at(n_windows * seq_len - 1) + 1):
        borders = stream.epoch(number).borders[:-1]
        inside = borders[(borders % seq_len != 0) & (borders < n_windows * seq_len)]
        np.add.at(pieces, inside // seq_len, 1)
    return int(pieces.reshape(-1, micro_batch).sum(axis=1).max())


def pack(stream: Stream, window: int, shape: Shape, stop: int) -> Batch:
    """The batch of the windows [window, window + shape.micro_batch); stream positions from `stop` on are padding."""
    n = shape.micro_batch * shape.seq_len
    tokens, positions = np.zeros(n, np.int64), np.zeros(n, np.int64)
    labels, lengths = np.full(n, IGNORED, np.int64), []
    at = 0
    for w in range(window, window + shape.micro_batch):
        start, end = w * shape.seq_len, min((w + 1) * shape.seq_len, stop)
        for doc, a, b in stream.pieces(start, end) if start < end else ():
            text = stream.read(doc, a, b + 1)  # one more: the last label; at the document's end there is none
            tokens[at : at + b - a] = text[: b - a]
            labels[at : at + len(text) - 1] = text[1:]
            lengths.append(b - a)
            at += b - a
        if end < start + shape.seq_len:
            lengths.append(start + shape.seq_len - max(start, end))
            at += lengths[-1]
    lengths = np.array(lengths)
    borders = np.cumsum(lengths)
    positions[:] = np.arange(n) - np.repeat(borders - lengths, lengths)
    cu_seqlens = np.full(shape.max_pieces + 1, n, np.int32)
    cu_seqlens[0], cu_seqlens[1 : len(borders) + 1] = 0, borders
    return Batch(*map(torch.from_numpy, (tokens, labels, positions, cu_seqlens)), shape.seq_len, int((lengths**2).sum()))


def train_batches(stream: Stream, shape: Shape, step: int, windows: int, rank: int, world: int) -> Iterator[Batch]:
    """One rank's batches of a step of `windows` windows, in order; on every rank the same number.

    Micro-batches go round the ranks in turn. Where they do not divide, the last ranks get empty batches: a run goes on
    on seven GPUs after it has lost the eighth.
    """
    first, stop = step * windows, (step + 1) * windows
    for micro in range(rank, -(-windows // (shape.micro_batch * world)) * world, world):
        yield pack(stream, first + micro * shape.micro_batch, shape, stop * shape.seq_len)


def n_labels(stream: Stream, seq_len: int, step: int, windows: int) -> int:
    """Labelled tokens of a whole step on all ranks, from the index: the loss's denominator, without a collective."""
    start, stop = step * windows * seq_len, (step + 1) * windows * seq_len
    return stop - start - stream.ends(start, stop)


def val_batches(stream: Stream, shape: Shape, rank: int, world: int) -> Iterator[Batch]:
    """A whole set once, in the order on disk, the last window padded; the same number of batches on every rank."""
    n_tokens = stream.start_of(1)
    windows_a_round = shape.micro_batch * world
    for r in range(-(-n_tokens // (shape.seq_len * windows_a_round))):
        yield pack(stream, r * windows_a_round + rank * shape.micro_batch, shape, n_tokens)


class Prefetch:
    """Runs an iterator in a thread, a few items ahead, and counts how long the consumer had to wait for it."""

    def __init__(self, items: Iterable, depth: int = 4):
        self.wait_s = 0.0
        self._queue, self._stop = queue.Queue(depth), threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(iter(items),), daemon=True)
        self._thread.start()

    def _fill(self, items: Iterator) -> None:
        try:
            for item in items:
                self._put((item, None))
                if self._stop.is_set():
                    return
            self._put((None, StopIteration()))
        except BaseException as error:  # raised again where the item was wanted
            self._put((None, error))

    def _put(self, entry: tuple) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(entry, timeout=0.1)
            except queue.Full:
                pass

    def __iter__(self) -> "Prefetch":
        return self

    def __next__(self):
        start = time.perf_counter()
        item, error = self._queue.get()
        self.wait_s += time.perf_counter() - start
        if error is not None:
            raise error
        return item

    def close(self) -> None:
        """End the thread; what it has prepared is dropped."""
        self._stop.set()
        self._thread.join()
