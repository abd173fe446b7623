"""The run folder: what belongs to it, and whether this command may go on in it.

    config.json     every flag, as the run began
    run.json        a random id, the identity (nanomed.identity), device, versions, git commit; the same again for every resume
    source/         what export needs of the model the run began with: config, tokenizer, templates, dtypes
    metrics.jsonl   checkpoints/   curves.svg   hf/ (written last: a run with hf/ is finished)

A run goes on only with the flags, the data and the model that it began with. A flag that moves its losses by rounding at
most may change; what changed is recorded.
"""

import dataclasses
import hashlib
import json
import platform
import secrets
from datetime import UTC, datetime
from pathlib import Path

import torch

from nanomed import InputError
from nanomed.checkpoint import whole
from nanomed.config import FREE_FIELDS, Config
from nanomed.files import lock, read_json, write_durably
from nanomed.identity import PACKAGES, first_difference
from nanomed.versions import git_commit, versions


def is_finished(out: Path) -> bool:
    """Has the run in this folder reached its end and exported its model?"""
    return (out / "hf" / "config.json").exists()


def gives_way(out: Path) -> bool:
    """Is this the folder of a run that has made no step? Another may take its place, stopped because a flag was wrong, say."""
    if not ("identity" in _read(out / "run.json") and "recipe" in _read(out / "config.json")) or is_finished(out):
        return False  # an evaluation's folder, a model's, or none
    rows = out / "metrics.jsonl"
    return not (whole(out / "checkpoints") or (rows.exists() and '"loss"' in rows.read_text()))


def check_run(out: Path, config: Config, identity: dict) -> None:
    """InputError if OUT belongs to something else than a run of this config on this data; nothing is written."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file, expected a folder or nothing; choose another")
    if not out.exists() or all(p.suffix == ".tmp" for p in out.iterdir()):
        return
    about = _read(out / "run.json")
    if "identity" not in about and (about or {p.name for p in out.iterdir()} - {"config.json"}):
        raise InputError(f"--out {out}: the folder is not empty and not a run's; choose another")
    if (out / "hf").exists() and not is_finished(out):
        raise InputError(f"--out {out}: {out / 'hf'} exists and is no model; move it away, or the model could not be written")
    if gives_way(out):
        return
    recorded, given = about.get("identity", {}), _flags(config)
    free = FREE_FIELDS | ({"init"} if "model" in recorded else set())  # a model is known by its content, not its path
    for field, old in _read(out / "config.json").items():
        if field not in free and old != given.get(field):
            raise InputError(
                f"--out {out}: belongs to a run with --{field.replace('_', '-')} {old}, this one has {given.get(field)}; "
                "choose another --out, delete this one, or give the same flags"
            )
    if difference := first_difference(recorded, json.loads(json.dumps(identity))):
        raise InputError(f"--out {out}: {difference}")


def create_run(out: Path, config: Config, identity: dict, device: torch.device, n_ranks: int = 1) -> int:
    """Write config.json and run.json of a new run, or add this resume to run.json. Returns the descriptor of the folder's lock.

    InputError where another process holds it, or where nothing can be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        held = lock(out)
        check_run(out, config, identity)  # again: another run may have written here meanwhile
        if not (out / "run.json").exists() or gives_way(out):
            write_durably(out / "config.json", json.dumps(_flags(config), indent=1))
            about = {"id": secrets.token_hex(6), "identity": identity} | _circumstances(device, n_ranks) | {"resumes": []}
        else:
            about = _with_resume(out, config, identity, device, n_ranks)
        write_durably(out / "run.json", json.dumps(about, indent=1))
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror}); choose another") from None
    return held


def _with_resume(out: Path, config: Config, identity: dict, device: torch.device, n_ranks: int) -> dict:
    """run.json of a run that goes on: new validation sets, and an entry in `resumes` with what differs from the beginning."""
    about, flags = _read(out / "run.json"), _flags(config)
    about.setdefault("id", hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:12])  # as older versions computed it
    about["identity"]["val"] = identity["val"] | about["identity"].get("val", {})
    began = _read(out / "config.json")
    complete = whole(out / "checkpoints")
    resume = {
        "step": complete[-1][0] if complete else 0,
        "changed_flags": {field: value for field, value in flags.items() if began.get(field) != value},
    }
    about["resumes"] = [*about.get("resumes", []), resume | _circumstances(device, n_ranks)]
    return about


def _flags(config: Config) -> dict:
    """The config as JSON holds it: tuples as lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _circumstances(device: torch.device, n_ranks: int) -> dict:
    """When, where and with what software a process group started."""
    on_gpu = device.type == "cuda"
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or "cpu",
        "n_ranks": n_ranks,
        "versions": versions(*PACKAGES) | {"torch": torch.__version__},  # with its CUDA
        "git_commit": git_commit(),
    }


def _read(path: Path) -> dict:
    return read_json(path) if path.exists() else {}
