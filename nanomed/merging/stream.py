"""Streaming the weights: read in chunks, weighted, rounded once, written in place, by several threads.

A chunk is 262,144 elements of one tensor. Each thread owns a lane, a few buffers of that size (5 MB): memory grows
neither with the model nor with its largest tensor. Inputs are widened from their own
precision to float32, and the result is rounded to its dtype once, to nearest even. numpy has no bfloat16, but a bfloat16
is the upper half of a float32: widening is a shift, rounding an add and a shift. numpy releases the interpreter lock
inside each operation, so threads do run in parallel. Chunks are summed in order: the result's bytes do not depend on the
number of threads.

A group of tensors (0.5 GB) is summed first and then merged, while it is in the page cache: the disk is read once, however
many outputs there are. With known sums the first pass is skipped.
"""

import math
import os
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from nanomed import InputError
from nanomed.merging.slerp import Stats
from nanomed.merging.source import Checkpoint, Tensor
from nanomed.shards import ITEM_BYTES, header

CHUNK = 1 << 18  # elements
GROUP_BYTES = 512 * 10**6
LARGEST = {"F32": math.inf, "BF16": (2 - 2.0**-8) * 2.0**127, "F16": 65520.0}  # from here on a value rounds to infinity
ROW = 1024  # elements summed in float32; rows are summed in float64
Weights = list[list[float]]  # [output][input]: what the inputs are multiplied by


class Lane:
    """The buffers of one thread."""

    def __init__(self, n_inputs: int):
        self.raw = np.empty(CHUNK, np.uint16)
        self.inputs = [np.empty(CHUNK, np.float32) for _ in range(n_inputs)]
        self.sum, self.spare = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)


# --- one chunk -----------------------------------------------------------------------------------------------------


def read(files: dict[Path, int], tensor: Tensor, start: int, stop: int, raw: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Elements [start, stop) of the flattened tensor as float32, (stop - start,), in `out`. raw: (CHUNK,) uint16."""
    at, first = 0, 0  # elements filled; element of the tensor at which the part begins
    for part in tensor.parts:
        a, b = max(start, first), min(stop, first + part.n)
        if a < b:
            offset, n = part.offset + (a - first) * ITEM_BYTES[tensor.dtype], b - a
            view = out[at : at + n]
            target = view if tensor.dtype == "F32" else raw[:n]
            read_fully(files[part.path], target, offset, part.path)
            if tensor.dtype == "BF16":
                bits = view.view(np.uint32)
                np.copyto(bits, target)
                np.left_shift(bits, 16, out=bits)
            elif tensor.dtype == "F16":
                np.copyto(view, target.view(np.float16))
            at += n
        first += part.n
    return out[:at]


def read_fully(file: int, buffer: np.ndarray, offset: int, path: Path) -> None:
    """Fill the buffer from this byte of the file on."""
    view = memoryview(buffer).cast("B")
    while view:
        n = os.preadv(file, [view], offset)
        if n == 0:
            raise InputError(f"{path}: ends at byte {offset:,}, too early; was it changed in the meantime?")
        view, offset = view[n:], offset + n


def write_fully(file: int, array: np.ndarray, offset: int) -> None:
    """The array's bytes at this byte of the file."""
    view = memoryview(array).cast("B")
    while view:
        n = os.pwrite(file, view, offset)
        view, offset = view[n:], offset + n


def narrow(x: np.ndarray, dtype: str, spare: np.ndarray, out: np.ndarray) -> np.ndarray:
    """float32 (n,) → its bytes in dtype, rounded to nearest even. spare: (CHUNK,) float32, out: (CHUNK,) uint16."""
    if dtype == "F32":
        return x
    if dtype == "F16":
        half = out[: x.size].view(np.float16)
        np.copyto(half, x, casting="same_kind")
        return half
    bits, rounded = x.view(np.uint32), spare[: x.size].view(np.uint32)
    np.right_shift(bits, 16, out=rounded)
    np.bitwise_and(rounded, 1, out=rounded)  # a tie goes to the even one
    np.add(rounded, 0x7FFF, out=rounded)
    np.add(rounded, bits, out=rounded)
    np.right_shift(rounded, 16, out=rounded)
    np.copyto(out[: x.size], rounded, casting="unsafe")
    return out[: x.size]


def weigh(xs: list[np.ndarray], weights: list[float], out: np.ndarray, spare: np.ndarray) -> np.ndarray:
    """Σ wᵢ xᵢ in float32, (n,), in `out`; an input of weight 0 is left out."""
    terms = [(x, np.float32(w)) for x, w in zip(xs, weights, strict=True) if w != 0] or [(xs[0], np.float32(0))]
    n = xs[0].size
    total, term = out[:n], spare[:n]
    np.multiply(terms[0][0], terms[0][1], out=total)
    for x, w in terms[1:]:
        np.multiply(x, w, out=term)
        np.add(total, term, out=total)
    return total


def sums(a: np.ndarray, b: np.ndarray, difference: np.ndarray) -> np.ndarray:
    """(Σa², Σb², Σ(b-a)²) of a chunk, (3,) float64."""
    d = np.subtract(b, a, out=difference[: a.size])
    return np.array([_sum_of_squares(x) for x in (a, b, d)])


def _sum_of_squares(x: np.ndarray) -> float:
    """Rows of 1,024 in float32, the rest in float64. (einsum, not BLAS, whose own threads would compete with ours.)"""
    rows = x[: x.size // ROW * ROW].reshape(-1, ROW)
    tail = x[rows.size :].astype(np.float64)
    return float(np.einsum("ij,ij->i", rows, rows).sum(dtype=np.float64) + (tail * tail).sum())


# --- all of them ---------------------------------------------------------------------------------------------------


class Streamer:
    """Open files and lanes for merging `inputs` into `folders`, all with the files of `plan` (nanomed.shards)."""

    def __init__(self, inputs: list[Checkpoint], plan: dict, folders: list[Path], n_threads: int, progress: Callable):
        """progress(n_bytes) is called from the main thread as input bytes have been read."""
        self.inputs, self.folders, self.n_threads, self.progress = inputs, folders, n_threads, progress
        self.entries = {name: (file, len(header(tensors)), entry)
                        for file, tensors in plan.items() for name, entry in tensors.items()}  # fmt: skip
        self.files: dict[Path, int] = {}
        self._closing = ExitStack()

    def __enter__(self) -> "Streamer":
        read = {part.path for c in self.inputs for tensor in c.tensors.values() for part in tensor.parts}
        written = {folder / file for folder in self.folders for file, _, _ in self.entries.values()}
        for path, mode in [*((p, os.O_RDONLY) for p in read), *((p, os.O_WRONLY) for p in written)]:
            self.files[path] = os.open(path, mode)
            self._closing.callback(os.close, self.files[path])
        self.lanes: queue.SimpleQueue = queue.SimpleQueue()
        for _ in range(self.n_threads):
            self.lanes.put(Lane(len(self.inputs)))
        self.pool = ThreadPoolExecutor(self.n_threads)
        self._closing.callback(self.pool.shutdown, wait=True, cancel_futures=True)
        return self

    def __exit__(self, *exception) -> None:
        self._closing.close()

    def merge(self, factors: Callable[[str, Stats | None], Weights], known: dict[str, Stats] | None) -> dict[str, Stats]:
        """Write all outputs; the sums of every tensor (known ones are not computed again; {}: none are needed)."""
        stats = dict(known or {})
        for names in groups(self.inputs, self.entries):
            if known is None:
                stats |= self.stats(names)
            jobs = [(name, start, factors(name, stats.get(name)))
                    for name in names for start in range(0, self.inputs[0].tensors[name].n, CHUNK)]  # fmt: skip
            for n_bytes in self.pool.map(self._merge_chunk, *zip(*jobs, strict=True)):
                self.progress(n_bytes)
        return stats

    def stats(self, names: list[str]) -> dict[str, Stats]:
        """The sums of these tensors over the first two inputs. InputError naming one that is not finite."""
        jobs = [(name, start) for name in names for start in range(0, self.inputs[0].tensors[name].n, CHUNK)]
        found = {name: np.zeros(3) for name in names}
        for (name, _), (chunk, n_bytes) in zip(jobs, self.pool.map(self._sum_chunk, *zip(*jobs, strict=True)), strict=True):
            found[name] += chunk
            self.progress(n_bytes)
        return {name: Stats(*map(float, total)) for name, total in found.items()}

    def _load(self, lane: Lane, name: str, start: int) -> tuple[list[np.ndarray], int]:
        """The inputs' chunks as float32, and the bytes read."""
        tensors = [c.tensors[name] for c in self.inputs]
        stop = min(start + CHUNK, tensors[0].n)
        xs = [read(self.files, tensor, start, stop, lane.raw, buffer)
              for tensor, buffer in zip(tensors, lane.inputs, strict=True)]  # fmt: skip
        return xs, sum((stop - start) * ITEM_BYTES[tensor.dtype] for tensor in tensors)

    def _sum_chunk(self, name: str, start: int) -> tuple[np.ndarray, int]:
        lane = self.lanes.get()
        try:
            (a, b), n_bytes = self._load(lane, name, start)
            with np.errstate(over="ignore", invalid="ignore"):
                found = sums(a, b, lane.sum)
            if not np.isfinite(found).all():
                self._finite(name, [a, b])
                found = sums(a.astype(np.float64), b.astype(np.float64), np.empty(a.size))  # squares beyond float32
            return found, n_bytes
        finally:
            self.lanes.put(lane)

    def _finite(self, name: str, xs: list[np.ndarray]) -> None:
        for checkpoint, x in zip(self.inputs, xs, strict=True):
            if not np.isfinite(x).all():
                what = "NaN" if np.isnan(x).any() else "infinity"
                raise InputError(f"{checkpoint.name}: tensor {name} holds {what}; a merge would spread it, so nothing was written")

    def _merge_chunk(self, name: str, start: int, weights: Weights) -> int:
        lane = self.lanes.get()
        try:
            xs, n_bytes = self._load(lane, name, start)
            file, base, entry = self.entries[name]
            offset = base + entry["data_offsets"][0] + start * ITEM_BYTES[entry["dtype"]]
            for folder, row in zip(self.folders, weights, strict=True):
                with np.errstate(over="ignore", invalid="ignore"):  # checked next
                    total = weigh(xs, row, lane.sum, lane.spare)
                lowest, highest = float(total.min()), float(total.max())  # NaN where there is one
                if not (-LARGEST[entry["dtype"]] < lowest and highest < LARGEST[entry["dtype"]]):
                    self._finite(name, xs)
                    raise InputError(f"tensor {name}: a merged value of {max(-lowest, highest):.3g} is beyond "
                                     f"{entry['dtype']}; take another dtype, or a t nearer to [0, 1]")  # fmt: skip
                result = narrow(total, entry["dtype"], lane.spare, lane.raw)
                write_fully(self.files[folder / file], result, offset)
            return n_bytes
        finally:
            self.lanes.put(lane)


def groups(inputs: list[Checkpoint], names) -> Iterator[list[str]]:
    """The non-empty tensors, in order, in groups of about GROUP_BYTES of input."""
    group, size = [], 0
    for name in names:
        if inputs[0].tensors[name].n == 0:
            continue
        group.append(name)
        size += sum(c.tensors[name].n_bytes for c in inputs)
        if size > GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
