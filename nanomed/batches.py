"""From the stream to packed batches.

Window w is the stream's tokens [w·L, (w+1)·L); the label of its last token is the stream's next one. So no token is
lost, nothing is padded, and each epoch packs the documents anew. Step s takes the windows [s·G, (s+1)·G), whatever
the number of ranks: a run's whole data state is the number of its step.

Packing costs a few microseconds a document piece, in a thread beside the training.

    python -m nanomed.batches show --run runs/x --step 1234      prints the text of the very batch of that step
"""

import argparse
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from nanomed import InputError, hf, run_script
from nanomed.files import read_json
from nanomed.kernels.cross_entropy import IGNORED
from nanomed.prefetch import Prefetch
from nanomed.stream import Stream, open_sources


@dataclass(frozen=True)
class Batch:
    """The packed tokens of one forward pass: N = windows · L."""

    tokens: Tensor  # (N,) int64
    labels: Tensor  # (N,) int64: the next token, IGNORED where it belongs to another document
    positions: Tensor  # (N,) int64, from 0 in each document piece
    cu_seqlens: Tensor  # (N + 1,) int32 borders of the pieces; after the last piece N repeats, so that no shape varies
    extent: Tensor  # (2,) int64, always on the CPU: pieces, tokens of the longest
    sum_squared_lens: int  # Σ len² over the documents' pieces: the work of attention that the model needs

    def to(self, device: torch.device) -> "Batch":
        """The same batch on the device; asynchronous where its memory is pinned."""
        moved = {
            f.name: v.to(device, non_blocking=True)
            for f in dataclasses.fields(self)
            if f.name != "extent" and isinstance(v := getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def pinned(self) -> "Batch":
        """The same batch in page-locked memory, from which a GPU copies on its own."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Batch(**{k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in fields.items()})


@dataclass(frozen=True)
class Shape:
    """What is the same for every batch of a run, so that nothing ever recompiles."""

    seq_len: int  # L, tokens in a window
    micro_batch: int  # windows in a batch


def pack(stream: Stream, window: int, shape: Shape, stop: int) -> Batch:
    """The batch of the windows [window, window + shape.micro_batch); stream positions from `stop` on are padding."""
    n = shape.micro_batch * shape.seq_len
    tokens, positions = np.zeros(n, np.int64), np.zeros(n, np.int64)
    labels, lengths = np.full(n, IGNORED, np.int64), []
    at = work = 0
    for w in range(window, window + shape.micro_batch):
        start, end = w * shape.seq_len, min((w + 1) * shape.seq_len, stop)
        for doc, a, b in stream.pieces(start, end) if start < end else ():
            text = stream.read(doc, a, b + 1)  # one more: the last label; at the document's end there is none
            tokens[at : at + b - a] = text[: b - a]
            labels[at : at + len(text) - 1] = text[1:]
            lengths.append(b - a)
            at += b - a
            work += (b - a) ** 2
        if end < start + shape.seq_len:
            lengths.append(start + shape.seq_len - max(start, end))
            at += lengths[-1]
    lengths = np.array(lengths)
    borders = np.cumsum(lengths)
    positions[:] = np.arange(n) - np.repeat(borders - lengths, lengths)
    cu_seqlens = np.full(n + 1, n, np.int32)
    cu_seqlens[0], cu_seqlens[1 : len(borders) + 1] = 0, borders
    extent = np.array((len(lengths), lengths.max()))
    return Batch(*map(torch.from_numpy, (tokens, labels, positions, cu_seqlens, extent)), work)


def pack_documents(documents: list[list[int]]) -> Batch:
    """Token lists → one batch without labels."""
    lengths = np.array([len(d) for d in documents])
    borders = np.concatenate(([0], np.cumsum(lengths)))
    tokens = torch.from_numpy(np.concatenate(documents).astype(np.int64))
    positions = torch.from_numpy(np.arange(borders[-1]) - np.repeat(borders[:-1], lengths))
    cu_seqlens = torch.from_numpy(borders.astype(np.int32))
    extent = torch.tensor([len(lengths), lengths.max()])
    return Batch(tokens, torch.full_like(tokens, IGNORED), positions, cu_seqlens, extent, int((lengths**2).sum()))


def n_micro_batches(shape: Shape, windows: int, world: int) -> int:
    """Of every rank in a step of `windows` windows."""
    return -(-windows // (shape.micro_batch * world))


def train_batches(stream: Stream, shape: Shape, step: int, windows: int, rank: int, world: int) -> Iterator[Batch]:
    """One rank's batches of a step of `windows` windows, in order; on every rank the same number.

    Micro-batches go round the ranks in turn. Where they do not divide, the last ranks get empty batches: a run goes on
    on seven GPUs after it has lost the eighth.
    """
    first, stop = step * windows, (step + 1) * windows
    for micro in range(rank, n_micro_batches(shape, windows, world) * world, world):
        yield pack(stream, first + micro * shape.micro_batch, shape, stop * shape.seq_len)


def n_labels(stream: Stream, seq_len: int, step: int, windows: int) -> int:
    """Labelled tokens of a whole step on all ranks, from the index: the loss's denominator, without a collective."""
    start, stop = step * windows * seq_len, (step + 1) * windows * seq_len
    return stop - start - stream.ends(start, stop)


def documents(stream: Stream, seq_len: int, step: int, windows: int) -> dict[str, list[int]]:
    """Which documents have a part in a step: their numbers in the bins, by the bins' folder, in ascending order."""
    found = {doc for doc, _, _ in stream.pieces(step * windows * seq_len, (step + 1) * windows * seq_len)}
    numbers = {}
    for doc in sorted(found):
        bins, number = stream.origin(doc)
        numbers.setdefault(str(bins.folder), []).append(number)
    return numbers


def val_rounds(stream: Stream, shape: Shape, world: int) -> int:
    """Batches of every rank in one pass over a validation set; the last round is padded."""
    return -(-stream.start_of(1) // (shape.seq_len * shape.micro_batch * world))


def val_batches(stream: Stream, shape: Shape, rank: int, world: int) -> Iterator[Batch]:
    """One rank's batches of a whole set once, in the order on disk; on every rank the same number."""
    for i in range(val_rounds(stream, shape, world)):
        yield pack(stream, (i * world + rank) * shape.micro_batch, shape, stream.start_of(1))


def prefetch(stream: Stream, shape: Shape, steps: range, windows: int, rank: int, world: int) -> Prefetch:
    """One rank's batches of the steps, packed in a thread; in page-locked memory where there is a GPU to copy it."""
    made = (b for step in steps for b in train_batches(stream, shape, step, windows, rank, world))
    if not torch.cuda.is_available():
        return Prefetch(made)
    device = torch.cuda.current_device()  # every thread begins on GPU 0: pinning memory would make a context there
    return Prefetch((b.pinned() for b in made), setup=lambda: torch.cuda.set_device(device))


# --- which text made this step? ------------------------------------------------------------------------------------


def show(run: Path, step: int) -> None:
    """Print the windows of a run's step (counted from 1, as in metrics.jsonl), every document piece with its origin."""
    config = read_json(run / "config.json")
    if "recipe" not in config:
        raise InputError(f"--run {run}: not a run's folder; give the --out of train.py")
    length, windows = config["seq_len"], config["batch_tokens"] // config["seq_len"]
    stream = Stream(open_sources(config["data"]), config["seed"], vocab_size=2**32)
    kept = run / "source" / "tokenizer.json"  # of the run itself: --init may be gone, or edited
    path = kept if kept.is_file() else hf.fetch(config["init"]) / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    for w in range((step - 1) * windows, step * windows):
        print(f"=== step {step}, window {w}: tokens [{w * length:,}, {(w + 1) * length:,}) of the stream")
        for doc, a, b in stream.pieces(w * length, (w + 1) * length):
            bins, number = stream.origin(doc)
            print(f"--- {bins.folder} document {number}, tokens [{a:,}, {b:,}) of {stream.lengths[doc]:,}")
            print(tokenizer.decode(stream.read(doc, a, b).tolist(), skip_special_tokens=False))


def main() -> None:
    """Command line of `show`."""
    parser = argparse.ArgumentParser(prog="python -m nanomed.batches", description="Look into a run's batches.")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("show", help="print the text of the very batch of a step")
    command.add_argument("--run", type=Path, required=True, help="run folder, the --out of train.py")
    command.add_argument("--step", type=int, required=True, help="step as in metrics.jsonl, from 1")
    args = parser.parse_args()
    if args.step < 1:
        raise InputError(f"--step {args.step}: steps count from 1")
    show(args.run, args.step)


if __name__ == "__main__":
    run_script(main)
