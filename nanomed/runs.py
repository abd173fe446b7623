"""The run folder: what belongs to it, and whether this command may go on in it.

    config.json     every knob, as given
    run.json        what else decides the result, or tells it: data and tokenizer hashes, versions, git commit, device
    metrics.jsonl   checkpoints/   curves.svg   hf/ (written last: a run with hf/ is finished)

A run goes on only with the config and the data it began with; a field that moves its losses by rounding at most may
change.
"""

import dataclasses
import json
import platform
from pathlib import Path

import torch

from nanomed import InputError
from nanomed.config import FREE_FIELDS, Config
from nanomed.files import lock, read_json, write_durably
from nanomed.stream import Stream
from nanomed.versions import git_commit, versions


def data_identity(train: Stream, vals: dict[str, Stream]) -> dict:
    """What of the data decides the losses: the sets' contents and shares, wherever they lie."""
    return {
        "data": [[bins.fingerprint, share] for bins, share in train.sources],
        "val": {name: stream.bins[0].fingerprint for name, stream in vals.items()},
        "tokenizer_sha256": train.bins[0].tokenizer_sha256,
    }


def is_finished(out: Path) -> bool:
    """Has the run in this folder reached its end and exported its model?"""
    return (out / "hf" / "config.json").exists()


def gives_way(out: Path) -> bool:
    """Is this the folder of a run that has made no step? Another may take its place, stopped because a flag was wrong, say."""
    if not ("identity" in _read(out / "run.json") and "recipe" in _read(out / "config.json")) or is_finished(out):
        return False  # an evaluation's folder, a model's, or none
    rows = out / "metrics.jsonl"
    return not (any((out / "checkpoints").glob("step-*/DONE")) or (rows.exists() and '"loss"' in rows.read_text()))


def check_run(out: Path, config: Config, identity: dict) -> None:
    """InputError if OUT belongs to something else than a run of this config on this data; nothing is written."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file, expected a folder or nothing; choose another")
    if not out.exists() or all(p.suffix == ".tmp" for p in out.iterdir()):
        return
    about = _read(out / "run.json")
    if "identity" not in about and (about or {p.name for p in out.iterdir()} - {"config.json"}):
        raise InputError(f"--out {out}: the folder is not empty and not a run's; choose another")
    if gives_way(out):
        return
    for field, old in _read(out / "config.json").items():
        new = json.loads(json.dumps(dataclasses.asdict(config))).get(field)
        if field not in FREE_FIELDS and old != new:
            raise InputError(
                f"--out {out}: belongs to a run with --{field.replace('_', '-')} {old}, this one has {new}; "
                "choose another --out, delete this one, or give the same flags"
            )
    for key, old in about.get("identity", {}).items():
        if key in ("data", "tokenizer_sha256") and old != json.loads(json.dumps(identity))[key]:
            raise InputError(f"--out {out}: the run began on other data ({key} differs); a run cannot change its data")
    for name, old in about.get("identity", {}).get("val", {}).items():  # its curve would be of two sets
        if identity["val"].get(name, old) != old:
            raise InputError(f"--out {out}: --val {name} was another set when the run began; give the new one another name")


def create_run(out: Path, config: Config, identity: dict, device: torch.device) -> int:
    """Write config.json and run.json of a new run; one that resumes only adds its new validation sets. The folder's lock.

    InputError where another process holds it, or where nothing can be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        held = lock(out)
        check_run(out, config, identity)  # again: another run may have written here meanwhile
        if not (out / "run.json").exists() or gives_way(out):
            _describe(out, config, identity, device)
        else:
            about = _read(out / "run.json")
            about["identity"]["val"] = identity["val"] | about["identity"].get("val", {})
            write_durably(out / "run.json", json.dumps(about, indent=1))
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror}); choose another") from None
    return held


def _describe(out: Path, config: Config, identity: dict, device: torch.device) -> None:
    run = {
        "identity": identity,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "versions": versions("numpy", "triton", "torchao", "liger-kernel", "flash-attn-4")
        | {"torch": torch.__version__},  # with its CUDA
        "git_commit": git_commit(),
    }
    write_durably(out / "config.json", json.dumps(dataclasses.asdict(config), indent=1))
    write_durably(out / "run.json", json.dumps(run, indent=1))


def _read(path: Path) -> dict:
    return read_json(path) if path.exists() else {}
