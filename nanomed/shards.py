"""Safetensors files by hand: which tensor lies in which file, at which byte. Nothing here needs torch.

A safetensors file is 8 bytes of length, a JSON header and the raw tensors, so a file whose header is known can be made
at its final length first and filled in any order, by any number of processes or threads (weights.py, merging/), and
a range of a tensor is one seek and one read.
"""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from nanomed import InputError

ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}  # the dtypes that weights come in
SHARD_BYTES = 5 * 10**9  # at most, unless one tensor alone is larger


def plan(tensors: dict[str, tuple[str, list[int]]], shard_bytes: int) -> dict[str, dict[str, dict]]:
    """Name → (dtype, shape) of all tensors, in order, to file name → tensor name → its entry in that file's header."""
    files, size = [{}], 0
    for name, (dtype, shape) in tensors.items():
        n_bytes = ITEM_BYTES[dtype] * n_elements(shape)
        if files[-1] and size + n_bytes > shard_bytes:
            files.append({})
            size = 0
        files[-1][name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [size, size + n_bytes]}
        size += n_bytes
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{i:05}-of-{len(files):05}.safetensors": inside for i, inside in enumerate(files, 1)}


def n_elements(shape: list[int]) -> int:
    """Product of the dimensions; 1 for a scalar."""
    n = 1
    for dim in shape:
        n *= dim
    return n


def header(tensors: dict[str, dict]) -> bytes:
    """The first bytes of a file with these entries: the data begins where they end."""
    text = json.dumps({"__metadata__": {"format": "pt"}, **tensors}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def total_bytes(tensors: dict[str, dict]) -> int:
    """Bytes of all tensors of one file."""
    return max(entry["data_offsets"][1] for entry in tensors.values())


def write_header(path: Path, tensors: dict[str, dict]) -> None:
    """A file of its final length with the header in place and holes for the tensors."""
    first = header(tensors)
    with path.open("wb") as file:
        file.write(first)
        file.truncate(len(first) + total_bytes(tensors))


def write_index(folder: Path, files: dict[str, dict[str, dict]]) -> None:
    """model.safetensors.index.json, where there is more than one file."""
    if len(files) > 1:
        weight_map = {name: file for file, tensors in files.items() for name in tensors}
        index = {
            "metadata": {"total_size": sum(map(total_bytes, files.values()))},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def read_header(path: Path) -> tuple[dict[str, dict], int]:
    """Tensor name → its entry {dtype, shape, data_offsets}, and the byte of the file that the offsets count from.

    InputError where the file is missing, cut short or its offsets are not in order (the safetensors library checks).
    """
    open_safetensors(path, "np")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        tensors = json.loads(file.read(length))
    tensors.pop("__metadata__", None)
    return tensors, 8 + length


def open_safetensors(path: Path, framework: str = "pt"):
    """A safetensors file opened lazily, or InputError where it is missing or cut short. "np" does without torch."""
    try:
        return safe_open(path, framework=framework)
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing, though the index names it; fetch the checkpoint again") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); fetch it again") from error


def same_tensor(a: tuple[Path, str], b: tuple[Path, str]) -> bool:
    """Whether two tensors, each a file and a name in it, are equal: dtype, shape and every bit; 1 MB at a time."""
    entries, starts = [], []
    for path, name in (a, b):
        tensors, base = read_header(path)
        entries.append((tensors[name]["dtype"], tensors[name]["shape"]))
        starts.append(base + tensors[name]["data_offsets"][0])
    if entries[0] != entries[1]:
        return False
    dtype, shape = entries[0]
    n_bytes = ITEM_BYTES[dtype] * n_elements(shape)
    with a[0].open("rb") as left, b[0].open("rb") as right:
        left.seek(starts[0])
        right.seek(starts[1])
        sizes = (min(2**20, n_bytes - at) for at in range(0, n_bytes, 2**20))
        return all(left.read(size) == right.read(size) for size in sizes)


def has_entries(path: Path, tensors: dict[str, dict], names: list[str]) -> None:
    """InputError where the index promises a tensor that the file does not hold."""
    if missing := sorted(set(names) - tensors.keys()):
        raise InputError(f"{path}: tensor {missing[0]} is missing, though the index names it; fetch the checkpoint again")
