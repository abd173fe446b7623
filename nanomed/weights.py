"""Weights in and out of safetensors, a rank's own rows at a time.

In: every rank reads its rows of every tensor straight from the shards. Out: every rank writes its rows straight into
files whose headers are known beforehand. No rank ever holds the whole model, nothing is gathered, and no tensor is
renamed, since the decoder's names are Hugging Face's. (torch's HuggingFaceStorageWriter writes everything twice and
needs a consolidation; a safetensors file is 8 bytes of length, a JSON header and the raw tensors, so a range of rows
is one seek and one write.) All ranks must see the same file system, as they must for checkpoints.
"""

import os
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from nanomed import InputError, shards
from nanomed.files import read_json, staging, staging_path
from nanomed.model_files import EMBEDDING, HEAD, copy_carried, find_weights, kept_record, stored_name
from nanomed.parallel import World

EXPORT_SHARD_BYTES = shards.SHARD_BYTES
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


# --- weights in ----------------------------------------------------------------------------------------------------


def my_rows(param: Tensor) -> tuple[int, int]:
    """The rows [start, stop) of the whole tensor that this rank holds: FSDP2 cuts dimension 0 as torch.chunk does."""
    if not isinstance(param, DTensor):
        return 0, param.shape[0]
    dim = param.placements.index(Shard(0))
    size = -(-param.shape[0] // param.device_mesh.size(dim))
    start = min(param.device_mesh.get_local_rank(dim) * size, param.shape[0])
    return start, min(start + size, param.shape[0])


def local(param: Tensor) -> Tensor:
    """This rank's part of a parameter as a plain tensor that shares its memory."""
    return param.to_local() if isinstance(param, DTensor) else param.data


@torch.no_grad()
def load_weights(model: nn.Module, files: dict[str, Path]) -> None:
    """Fill the (possibly sharded) model from check_weights' files; every rank reads its own rows only."""
    handles = {file: shards.open_safetensors(file) for file in set(files.values())}
    for name, param in model.named_parameters():
        start, stop = my_rows(param)
        if start < stop:
            handle = handles[files[name]]
            local(param).copy_(handle.get_slice(stored_name(name, handle.keys()))[start:stop])


@torch.no_grad()
def random_weights(model: nn.Module, std: float, seed: int) -> None:
    """Fill the (possibly sharded) model: matrices normal, norms 1, biases 0; the same values for any number of ranks."""
    for i, (name, param) in enumerate(model.named_parameters()):
        start, stop = my_rows(param)
        if param.ndim == 1:
            local(param).fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            generator = torch.Generator().manual_seed(seed * 100_003 + i)
            local(param).copy_(torch.empty(param.shape).normal_(0.0, std, generator=generator)[start:stop])


# --- weights out ---------------------------------------------------------------------------------------------------


def export(model: nn.Module, source: Path, out: Path, world: World) -> None:
    """Write the model as OUT: safetensors of the source's dtypes and at most 5 GB each, and the source's other files.

    Called by all ranks. Everything is written in a staging folder beside OUT, made durable and renamed last.
    """
    plan = _export_plan(model, source_dtypes(model, source))
    if not world.first():
        world.barrier()
        _write_rows(staging_path(out), plan, model)
        return world.barrier()
    with staging(out, "the model's folder", durable=True) as tmp:
        copy_carried(source, tmp)
        for file, tensors in plan.items():
            shards.write_header(tmp / file, tensors)
        shards.write_index(tmp, plan)
        world.barrier()
        _write_rows(tmp, plan, model)
        world.barrier()


def source_dtypes(model: nn.Module, source: Path) -> dict[str, torch.dtype]:
    """Dtype of every tensor in the source checkpoint, or as a RUN/source records it; config.json's where it has no weights."""
    if record := kept_record(source):
        return {name: DTYPES[dtype] for name, dtype in record["dtypes"].items()}
    files = find_weights(source)
    if not files:
        raw = read_json(source / "config.json")
        named = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
        if (dtype := getattr(torch, named, None)) not in DTYPE_NAMES:
            raise InputError(f"{source / 'config.json'}: dtype {named}, expected one of {', '.join(map(str, DTYPE_NAMES))}")
        return dict.fromkeys(dict(model.named_parameters()), dtype)
    handles = {file: shards.open_safetensors(file) for file in set(files.values())}
    dtypes = {name: DTYPES[handles[file].get_slice(name).get_dtype()] for name, file in files.items()}
    return {EMBEDDING: dtypes.get(HEAD)} | dtypes  # where only a tied head is stored


def _export_plan(model: nn.Module, dtypes: dict) -> dict[str, dict[str, dict]]:
    """File name → tensor name → its entry in that file's header."""
    tensors = {name: (DTYPE_NAMES[dtypes[name]], list(param.shape)) for name, param in model.named_parameters()}
    return shards.plan(tensors, EXPORT_SHARD_BYTES)


def _write_rows(folder: Path, plan: dict[str, dict[str, dict]], model: nn.Module) -> None:
    """Write this rank's rows of every tensor to the files of the plan. Of HSDP's replicas only the first writes."""
    params = dict(model.named_parameters())
    for name, tensors in plan.items():
        base = len(shards.header(tensors))
        # Write-only: a file opened for reading too lets NFS fetch whole pages and write back what another rank changed.
        with os.fdopen(os.open(folder / name, os.O_WRONLY), "wb") as file:
            for tensor, entry in tensors.items():
                _write_tensor(file, params[tensor], entry, base)
            file.flush()
            os.fsync(file.fileno())


def _write_tensor(file: BinaryIO, param: Tensor, entry: dict, base: int) -> None:
    """Write this rank's rows of one tensor. base: the byte of the file that the entry's offsets count from."""
    start, stop = my_rows(param)
    if start == stop or (isinstance(param, DTensor) and param.device_mesh.ndim > 1 and param.device_mesh.get_local_rank(0)):
        return
    rows = local(param).detach().to(DTYPES[entry["dtype"]]).cpu().contiguous()
    row_bytes = rows.element_size() * rows[0].numel()
    file.seek(base + entry["data_offsets"][0] + start * row_bytes)
    file.write(rows.view(torch.uint8).numpy())
