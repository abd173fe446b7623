"""The identity of a run: everything that decides its losses, compared between ranks and on every resume.

Two machines may see different files under the same path, and a folder may be edited between a kill and a resume. Neither
shows in the loss at once, so both are refused here, by name:

    check_ranks_agree   before a run folder is made: every rank's flags, data, model, software against rank 0's
    first_difference    on resume: the data and the model against those that run.json records

Paths are not part of the identity: contents are. A data set is known by the fingerprint in its manifest; a model by its parsed
config.json, and by the names, shapes, dtypes and a few bytes of every tensor.
"""

import dataclasses
import hashlib
import json
import os
import socket
from pathlib import Path

import torch.distributed as dist

from nanomed import InputError
from nanomed.config import Config
from nanomed.hf import ModelConfig
from nanomed.model_files import find_weights, kept_record
from nanomed.parallel import World
from nanomed.shards import read_header
from nanomed.stream import Stream
from nanomed.versions import git_commit, versions

PACKAGES = ("torch", "numpy", "triton", "torchao", "liger-kernel", "flash-attn-4", "safetensors", "tokenizers")
ENVIRONMENT = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TRITON_INTERPRET", "CUBLAS_WORKSPACE_CONFIG")
PATHS = ("init", "data", "val", "out")  # compared by what they hold
RANK_0_ONLY = ("tensorboard", "wandb")
SAMPLE_BYTES = 64


class RanksDisagree(InputError):
    """Raised on every rank with the same message, so that one of them prints it."""


def data_identity(train: Stream, vals: dict[str, Stream]) -> dict:
    """The data sets by content: fingerprints and shares of the training sets, fingerprints of the validation sets."""
    return {
        "data": [[bins.fingerprint, share] for bins, share in train.sources],
        "val": {name: stream.bins[0].fingerprint for name, stream in vals.items()},
        "tokenizer_sha256": train.bins[0].tokenizer_sha256,
    }


def model_identity(source: Path, config: ModelConfig) -> dict:
    """The model by content: its parsed config.json as JSON, and weights_fingerprint, which a RUN/source has in writing."""
    record = kept_record(source)
    weights = record["weights"] if record else weights_fingerprint(source)
    return {"config": json.loads(json.dumps(dataclasses.asdict(config))), "weights": weights}


def weights_fingerprint(folder: Path) -> str | None:
    """SHA-256 over the name, dtype, shape, and first, middle and last bytes of every tensor; None without weights.

    Independent of how the tensors are cut into files. Costs three small reads per tensor: milliseconds for a 7B model.
    """
    files = find_weights(folder)
    if not files:
        return None
    digest = hashlib.sha256()
    headers = {path: read_header(path) for path in set(files.values())}
    for name in sorted(files):
        tensors, base = headers[files[name]]
        if name not in tensors:  # a tied embedding that is stored as lm_head.weight; that tensor is counted by its own name
            continue
        entry = tensors[name]
        digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
        start, end = (base + offset for offset in entry["data_offsets"])
        with files[name].open("rb") as file:
            for at in (start, (start + end) // 2, max(start, end - SAMPLE_BYTES)):
                file.seek(at)
                digest.update(file.read(min(SAMPLE_BYTES, end - at)))
    return digest.hexdigest()


def hub_revision(source: Path) -> str | None:
    """The commit that a folder of the hub's cache holds; None for any other folder."""
    return source.name if source.parent.name == "snapshots" else None


# --- ranks ---------------------------------------------------------------------------------------------------------


def check_ranks_agree(config: Config, identity: dict, n_steps: int, world: World) -> None:
    """RanksDisagree, on all ranks, naming the first rank and field that differ from rank 0's.

    Must be called before the first collective whose shape or number depends on a flag: ranks that disagree would hang there.
    """
    if world.size == 1:
        return
    mine = {"host": socket.gethostname(), "facts": rank_facts(config, identity, n_steps)}
    everyone: list[dict] = [{}] * world.size
    dist.all_gather_object(everyone, mine, group=world.slow)
    expected = everyone[0]["facts"]
    for rank, other in enumerate(everyone):
        for name in sorted(expected.keys() | other["facts"].keys()):
            wanted, found = expected.get(name), other["facts"].get(name)
            if found != wanted:
                raise RanksDisagree(
                    f"rank {rank} on {other['host']}: {name} is {_short(found)}, rank 0 on {everyone[0]['host']} has "
                    f"{_short(wanted)}; all ranks need the same flags, files and software"
                )


def rank_facts(config: Config, identity: dict, n_steps: int) -> dict[str, object]:
    """What must be equal on all ranks, under the names that the error uses."""
    skipped = PATHS + RANK_0_ONLY
    flags = {f"--{k.replace('_', '-')}": v for k, v in dataclasses.asdict(config).items() if k not in skipped}
    data = {f"the data set {i} of --data": entry for i, entry in enumerate(identity["data"])}
    vals = {f"the data set of --val {name}": digest for name, digest in identity["val"].items()}
    model = {f"{name} in the model's config.json": value for name, value in identity["model"]["config"].items()}
    software = {f"the version of {name}": value for name, value in versions(*PACKAGES).items()}
    environment = {f"the environment variable {name}": os.environ.get(name) for name in ENVIRONMENT}
    return {
        **flags,
        **data,
        **vals,
        **model,
        **software,
        **environment,
        "the order of the --val sets": list(identity["val"]),
        "the model's weights": identity["model"]["weights"],
        "the model's tokenizer.json": identity["tokenizer_sha256"],
        "the number of steps": n_steps,
        "the git commit": git_commit(),
    }


def _short(value: object) -> str:
    """A value for an error message; a hash is cut."""
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    if isinstance(value, list) and value and isinstance(value[0], str) and len(value[0]) == 64:
        return f"{value[0][:12]}@{value[1]:g}"
    return "missing" if value is None else str(value)


# --- resuming ------------------------------------------------------------------------------------------------------


def first_difference(old: dict, new: dict) -> str | None:
    """What of the data or the model has changed since the run began, in words; None where nothing has.

    old: the identity in run.json; a part that an older version did not record is not compared.
    """
    for key in ("data", "tokenizer_sha256"):
        if key in old and old[key] != new[key]:
            return f"the run began on other data ({key} differs); a run cannot change its data"
    for name, digest in old.get("val", {}).items():
        if new["val"].get(name, digest) != digest:  # its curve would show two sets
            return f"--val {name} was another set when the run began; give the new one another name"
    if "model" not in old:
        return None
    for name, value in old["model"]["config"].items():
        found = new["model"]["config"].get(name)
        if found != value:
            return f"the run began with {name} = {value} in the model's config.json, --init has {found} now; restore it"
    if new["model"]["weights"] != old["model"]["weights"]:
        return "the run began with other weights than --init holds now; restore them, or start a new run"
    return None
