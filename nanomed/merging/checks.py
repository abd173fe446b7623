"""Can these checkpoints be merged, and is there room? Whatever is wrong is found before a byte is written.

Models that differ in a tied head, RoPE or a tokenizer can often be merged without an error, and the result talks nonsense:
so each of these is checked.
"""

import os
import shutil
from itertools import groupby
from pathlib import Path

from nanomed import InputError
from nanomed.hf import model_config
from nanomed.merging.architecture import check_fields
from nanomed.merging.same_tokenizer import check_tokenizers
from nanomed.merging.source import Checkpoint, tokenizer_of


def check_pair(base: Checkpoint, other: Checkpoint, role: str) -> list[str]:
    """InputError unless `other` (role: CPT, ...) can be merged with BASE; else warnings, one line each."""
    warnings = _check_architecture(base, other, role)
    _check_tensors(base, other, role)
    return warnings + check_tokenizers(base, other, role)


def _check_architecture(base: Checkpoint, other: Checkpoint, role: str) -> list[str]:
    ours, theirs = base.config(), other.config()
    if not (ours and theirs):
        return []  # a run that has not exported yet: only its tensors can be compared
    where = f"{role} {other.name}"
    warnings = check_fields(ours, theirs, where, f"BASE {base.name}")
    ours, theirs = _windows(base, other)
    if ours != theirs:
        raise InputError(
            f"{where}: config.json has sliding_window (as it is in force) {theirs}, BASE {ours}; "
            "only models of the same architecture can be merged"
        )
    return warnings


def _windows(*checkpoints: Checkpoint) -> list[str]:
    """The sliding windows in force, as text: Qwen2 has four fields for them, in which different values can mean the same."""
    try:
        configs = [model_config(checkpoint.folder) for checkpoint in checkpoints]
    except InputError:  # a family that train.py does not know: compare the field itself
        raw = [checkpoint.config() for checkpoint in checkpoints]
        return [str(None if c.get("use_sliding_window") is False else c.get("sliding_window")) for c in raw]
    layers = [c.sliding_windows or (None,) * c.num_hidden_layers for c in configs]
    return [", ".join(f"{window} in {len([*run])} layers" for window, run in groupby(windows)) for windows in layers]


def _check_tensors(base: Checkpoint, other: Checkpoint, role: str) -> None:
    ours, theirs = base.tensors, other.tensors
    if ("lm_head.weight" in ours) != ("lm_head.weight" in theirs):
        with_it, without = (base, other) if "lm_head.weight" in ours else (other, base)
        raise InputError(
            f"{role} {other.name}: {with_it.name} has a lm_head.weight, {without.name} ties it to the embedding; "
            "merge two tied or two untied models"
        )
    if missing := sorted(ours.keys() - theirs.keys()):
        raise InputError(f"{role} {other.name}: tensor {missing[0]} is missing, BASE has it ({len(missing)} in all)")
    if extra := sorted(theirs.keys() - ours.keys()):
        raise InputError(f"{role} {other.name}: tensor {extra[0]} is not in BASE ({len(extra)} in all)")
    for name, tensor in ours.items():
        if tensor.shape != theirs[name].shape:
            raise InputError(f"{role} {other.name}: tensor {name} has shape {list(theirs[name].shape)}, BASE {list(tensor.shape)}")


def check_base(base: Checkpoint) -> None:
    """The result takes BASE's config and tokenizer: InputError if it has none."""
    if base.folder is None:
        raise InputError(
            f"BASE {base.name}: is a run that has not exported yet, so there is no config.json; give the model it started from"
        )
    if not tokenizer_of(base.folder):
        raise InputError(
            f"BASE {base.name}: has no tokenizer.json and no tokenizer.model; the merged model would have no tokenizer: "
            "copy BASE's own files there"
        )


def check_out(out: Path, n_bytes: int) -> None:
    """InputError if OUT exists, or the disk has no room for this many bytes of weights."""
    if out.exists():
        raise InputError(f"OUT {out}: exists already; choose another or remove it")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not os.access(parent, os.W_OK):
        raise InputError(f"OUT {out}: {parent} is not writable")
    free, needed = shutil.disk_usage(parent).free, n_bytes + 32 * 10**6  # tokenizer, report
    if free < needed:
        raise InputError(f"OUT {out}: needs {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free")
