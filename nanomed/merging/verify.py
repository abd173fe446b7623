"""Read a merged checkpoint back and compare every tensor with the formula, in float64 and computed another way.

The merge computes its angle from Σ(b-a)² in float32 rows; here it comes from the textbook, acos(a·b / |a||b|) in
float64, and the files are read through the safetensors library's own check. So a wrong offset, a torn write or an error in the
arithmetic shows. Within 1e-5 of the threshold between SLERP and LERP either is accepted.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from nanomed import InputError
from nanomed.merging.slerp import DOT_THRESHOLD, EPS
from nanomed.merging.source import Checkpoint, Tensor, safetensors_in
from nanomed.merging.stream import CHUNK, read_fully
from nanomed.shards import ITEM_BYTES

MANTISSA = {"BF16": 7, "F16": 10}  # bits behind the point
MAX_NORM = 1e-6  # of the error of a float32 tensor, relative
MAX_ULP = 1.0  # of the error of a bf16 or fp16 element, in units in the last place of the largest of terms and sum


def verify(
    inputs: list[Checkpoint],
    folder: Path,
    weights: Callable[[str, float | None], list[list[float]]],
    needs_cos: bool,
    n_threads: int,
    progress: Callable,
) -> tuple[float, float]:
    """The largest errors found: (units in the last place, relative norm). InputError at the first tensor that exceeds a limit.

    weights(name, cos): the expected factors of the inputs; several rows if more than one is accepted.
    """  # fmt: skip
    result = safetensors_in(folder, "result")
    if differing := sorted(result.keys() ^ inputs[0].tensors.keys()):
        raise InputError(f"{folder}: tensor {differing[0]} is missing or superfluous")
    with ExitStack() as stack, ThreadPoolExecutor(n_threads) as pool:
        tensors = [t for c in inputs for t in c.tensors.values()] + list(result.values())
        files = {path: stack.enter_context(path.open("rb")).fileno() for path in {p.path for t in tensors for p in t.parts}}

        def check(name: str) -> tuple[float, float]:
            found, sources = result[name], [c.tensors[name] for c in inputs]
            if found.shape != sources[0].shape:
                raise InputError(f"{folder}: tensor {name} has shape {found.shape}, expected {sources[0].shape}")
            cos = _cos(files, *sources) if needs_cos else None
            return min(_errors(files, found, sources, row) for row in weights(name, cos))

        worst = (0.0, 0.0)
        for name, (ulp, norm) in zip(result, pool.map(check, result), strict=True):
            if ulp > MAX_ULP or norm > MAX_NORM:
                raise InputError(
                    f"{folder}: tensor {name} is not what the formula gives (off by {ulp:.3g} units in the last place, "
                    f"{norm:.3g} of its norm)"
                )
            worst = max(worst[0], ulp), max(worst[1], norm)
            progress(sum(c.tensors[name].n_bytes for c in inputs))
    return worst


def slerp_factors(t: float, cos: float) -> list[list[float]]:
    """[BASE's, CPT's factor]; two rows where the threshold is too close to tell."""
    theta = math.acos(min(max(cos, -1.0), 1.0))
    rows = []
    if abs(cos) > DOT_THRESHOLD - 1e-5:
        rows.append([1 - t, t])
    if abs(cos) <= DOT_THRESHOLD + 1e-5:
        rows.append([math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)])
    return rows


def _chunks(files: dict, tensor: Tensor):
    """The tensor in float64, a chunk at a time."""
    kinds = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    for part in tensor.parts:
        for start in range(0, part.n, CHUNK):
            raw = np.empty(min(CHUNK, part.n - start), kinds[tensor.dtype])
            read_fully(files[part.path], raw, part.offset + start * ITEM_BYTES[tensor.dtype], part.path)
            yield ((raw.astype(np.uint32) << 16).view(np.float32) if tensor.dtype == "BF16" else raw).astype(np.float64)


def _together(files: dict, tensors: list[Tensor]):
    """Chunks of several tensors side by side, split alike even if one lies in several parts."""
    streams = [_chunks(files, tensor) for tensor in tensors]
    rest = [np.empty(0) for _ in streams]
    while True:
        rest = [r if r.size else next(s, r) for r, s in zip(rest, streams, strict=True)]
        n = min(r.size for r in rest)
        if n == 0:
            return
        yield [r[:n] for r in rest]
        rest = [r[n:] for r in rest]


def _cos(files: dict, a: Tensor, b: Tensor) -> float:
    aa = bb = ab = 0.0
    for x, y in _together(files, [a, b]):
        aa, bb, ab = aa + float(x @ x), bb + float(y @ y), ab + float(x @ y)
    return ab / math.sqrt(aa * bb) if min(aa, bb) > EPS**2 else 0.0


def _errors(files: dict, found: Tensor, sources: list[Tensor], weights: list[float]) -> tuple[float, float]:
    """(error in units in the last place; 0 for float32, error's norm / norm; 0 for 16 bits)."""
    ulp, error2, norm2 = 0.0, 0.0, 0.0
    for y, *xs in _together(files, [found, *sources]):
        terms = [w * x for x, w in zip(xs, weights, strict=True)]
        total = sum(terms)
        error = np.abs(y - total)
        if found.dtype == "F32":
            error2, norm2 = error2 + float(error @ error), norm2 + float(y @ y)
            continue
        larger = np.maximum.reduce([np.abs(term) for term in (total, *terms)])
        smallest = 2.0**-126 if found.dtype == "BF16" else 2.0**-14  # below it the steps no longer shrink
        exponent = np.frexp(np.maximum(larger, smallest))[1] - 1
        ulp = max(ulp, float((error / np.exp2(exponent - MANTISSA[found.dtype])).max(initial=0)))
        if not np.isfinite(error).all():
            return math.inf, math.inf
    return ulp, math.sqrt(error2 / norm2) if norm2 else math.sqrt(error2)
