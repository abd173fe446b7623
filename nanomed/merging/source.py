"""Where a checkpoint's tensors lie on disk: a Hugging Face folder, or a run folder of train.py.

Either way a tensor becomes a list of parts, each a path, a byte offset and a number of elements, and is never in memory as
a whole. Of a run folder the newest complete checkpoint is read, in the precision of the training (float32, or bfloat16 with
--precision pure-bf16): a bf16 export would lose part of a small change. torch's distributed checkpoint stores every rank's
rows as a torch.save of their own inside one file; that is an uncompressed zip, so the rows' raw bytes can be read in place.
Its index is a pickle of torch's own classes: a run folder needs torch (0.2 GB), safetensors do not.
"""

import hashlib
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

from nanomed import InputError, hf
from nanomed.files import read_json
from nanomed.hf import check_copied_head, fetch
from nanomed.merging.architecture import is_tied
from nanomed.model_files import EMBEDDING, HEAD, check_one_place, find_weights
from nanomed.shards import ITEM_BYTES, has_entries, n_elements, read_header
from nanomed.tokenizer import tokenizer_sha256


@dataclass(frozen=True)
class Part:
    """Consecutive elements of a flattened tensor."""

    path: Path
    offset: int  # bytes
    n: int  # elements


@dataclass(frozen=True)
class Tensor:
    """A tensor on disk."""

    dtype: str  # as safetensors spells it: F32, BF16, F16
    shape: tuple[int, ...]
    parts: tuple[Part, ...]  # in order; together all elements

    @property
    def n(self) -> int:
        """Number of elements."""
        return n_elements(self.shape)

    @property
    def n_bytes(self) -> int:
        """Bytes on disk."""
        return self.n * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: nothing of its weights is in memory."""

    name: str  # as the user gave it
    folder: Path | None  # with config.json and tokenizer; None: a run that has not exported yet
    tensors: dict[str, Tensor]
    tokenizer: dict[str, str]  # file name → sha256 of what turns text into ids; empty if there is none
    kind: str  # for the report

    def config(self) -> dict:
        """Contents of config.json; empty if there is none."""
        config = read_json(self.folder / "config.json") if self.folder else {}
        if not isinstance(config, dict):
            raise InputError(f"{self.folder / 'config.json'}: is not a JSON object; fetch the checkpoint again")
        return config

    def identity(self) -> list:
        """Paths, sizes and times of the files that hold the weights: equal means unchanged."""
        paths = sorted({part.path.resolve() for tensor in self.tensors.values() for part in tensor.parts})
        return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in paths]


def open_checkpoint(name: str, role: str) -> Checkpoint:
    """A folder, a hub id or train.py's run folder. role: BASE or CPT, for errors. InputError if it cannot be opened."""
    if (Path(name) / "run.json").is_file():
        return _open_run(Path(name), name, role)
    folder = fetch(name, role)
    return _of_folder(name, folder, role, "safetensors")


def _of_folder(name: str, folder: Path, role: str, kind: str) -> Checkpoint:
    """A Hugging Face folder, without what some hub files hold beside the parameters: old Llamas' RoPE frequencies, and small
    Qwen3s' copy of the embedding as a tied head. InputError if the head is not a copy: which of the two is meant cannot be
    known. A tied head that is stored alone is the embedding."""
    tensors = {n: t for n, t in safetensors_in(folder, role).items() if not n.endswith(".rotary_emb.inv_freq")}
    checkpoint = Checkpoint(name, folder, tensors, tokenizer_of(folder), kind)
    if is_tied(checkpoint.config()) and HEAD in tensors:
        head = tensors.pop(HEAD)
        if EMBEDDING in tensors:
            check_copied_head(folder, find_weights(folder))
        else:
            tensors[EMBEDDING] = head
    return checkpoint


def tokenizer_of(folder: Path) -> dict[str, str]:
    """Identities of the tokenizer files in the folder."""
    found = {}
    if (path := folder / "tokenizer.json").is_file():
        found[path.name] = tokenizer_sha256(path)
    if (path := folder / "tokenizer.model").is_file():
        found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def safetensors_in(folder: Path, role: str) -> dict[str, Tensor]:
    """All tensors that the folder's index, or its one file, names, in file order. role: for errors."""
    where = find_weights(folder)
    if not where:
        raise InputError(f"{role} {folder}: has neither model.safetensors nor an index of shards; only safetensors are read")
    tensors, headers = {}, {path: read_header(path) for path in sorted(set(where.values()))}
    for path, (entries, start) in headers.items():
        names = [name for name, file in where.items() if file == path]
        has_entries(path, entries, names)
        for name in names:
            dtype, shape = entries[name]["dtype"], tuple(entries[name]["shape"])
            if dtype not in ITEM_BYTES:
                raise InputError(f"{path}: tensor {name} has dtype {dtype}; {', '.join(ITEM_BYTES)} are merged")
            part = Part(path, start + entries[name]["data_offsets"][0], n_elements(shape))
            tensors[name] = Tensor(dtype, shape, (part,))
    check_one_place(where, {path: entries.keys() for path, (entries, _) in headers.items()})
    return dict(sorted(tensors.items(), key=lambda item: (item[1].parts[0].path, item[1].parts[0].offset)))


# --- a run folder of train.py --------------------------------------------------------------------------------------


def _open_run(run: Path, name: str, role: str) -> Checkpoint:
    """The newest complete checkpoint of a run; its export if there is none."""
    from nanomed.checkpoint import whole  # needs torch

    steps = whole(run / "checkpoints")
    exported = run / "hf" if (run / "hf" / "config.json").is_file() else None
    if not steps and not exported:
        raise InputError(f"{role} {name}: the run has no complete checkpoint and no hf/ yet; let train.py reach one")
    if not steps:
        return _of_folder(name, exported, role, "safetensors of hf/")
    step, path = steps[-1]
    kept = run / "source"  # what the run began with; a run of an older version has only the path of --init
    init = kept if kept.is_dir() else hf.exported(Path(read_json(run / "config.json").get("init", "")), role)
    folder = exported or (init if (init / "config.json").is_file() else None)
    identity = read_json(run / "run.json").get("identity", {})
    tokenizer = {"tokenizer.json": identity["tokenizer_sha256"]} if "tokenizer_sha256" in identity else {}
    tensors = _distributed(path)
    spelled = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    precision = " and ".join(sorted({spelled[tensor.dtype] for tensor in tensors.values()}))
    return Checkpoint(name, folder, tensors, tokenizer, f"{precision} weights of step {step}")


def _distributed(path: Path) -> dict[str, Tensor]:
    """The model's tensors in a checkpoint that nanomed.checkpoint wrote, whatever the number of ranks."""
    from torch.distributed.checkpoint import FileSystemReader

    from nanomed.weights import DTYPE_NAMES

    try:
        metadata = FileSystemReader(path).read_metadata()
    except Exception as error:  # a pickle cut short raises anything
        raise InputError(f"{path}: its .metadata cannot be read ({error}); remove the folder to use the previous one") from None
    files = {(index.fqn, tuple(index.offset or ())): info for index, info in metadata.storage_data.items()}
    tensors = {}
    for key, entry in metadata.state_dict_metadata.items():
        if not key.startswith("model."):
            continue  # the optimiser's moments
        dtype, parts = DTYPE_NAMES[entry.properties.dtype], []
        for chunk in sorted(entry.chunks, key=lambda c: tuple(c.offsets)):
            if any(chunk.offsets[1:]) or chunk.sizes[1:] != entry.size[1:]:
                raise InputError(f"{path}: {key} is split along another dimension than rows; expected a checkpoint of train.py")
            n = n_elements(chunk.sizes)
            if n:
                info = files[key, tuple(chunk.offsets)]
                parts.append(
                    Part(
                        path / info.relative_path,
                        _raw_offset(path / info.relative_path, info, n * ITEM_BYTES[dtype]),
                        n,
                    )
                )
        tensors[key.removeprefix("model.")] = Tensor(dtype, tuple(entry.size), tuple(parts))
    return tensors


class _Window(io.RawIOBase):
    """A range of a file as a file of its own, for zipfile."""

    def __init__(self, file, offset: int, length: int):
        super().__init__()
        self.file, self.offset, self.length, self.at = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, to: int, whence: int = io.SEEK_SET) -> int:
        self.at = to + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence]
        return self.at

    def readinto(self, buffer) -> int:
        n = max(0, min(len(buffer), self.length - self.at))
        self.file.seek(self.offset + self.at)
        n = self.file.readinto(memoryview(buffer)[:n])
        self.at += n
        return n


def _raw_offset(path: Path, info, n_bytes: int) -> int:
    """The byte of the file where the plain bytes of a torch.save begin. info: torch's record of offset and length."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(_Window(file, info.offset, info.length)) as archive:
            entry = next(e for e in archive.infolist() if e.filename.endswith("/data/0"))
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != n_bytes:
                raise InputError(f"{path}: holds a tensor of {entry.file_size} bytes, expected {n_bytes} uncompressed")
            file.seek(info.offset + entry.header_offset + 26)  # the local header's own lengths of name and extra field
            lengths = file.read(4)
    except (OSError, zipfile.BadZipFile, StopIteration) as error:
        raise InputError(f"{path}: missing or cut short ({error}); remove the checkpoint to use the previous one") from None
    n_name, n_extra = int.from_bytes(lengths[:2], "little"), int.from_bytes(lengths[2:], "little")
    return info.offset + entry.header_offset + 30 + n_name + n_extra
