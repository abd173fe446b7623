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
from nanomed.merging.source import Checkpoint, tokenizer_of

# Fields of config.json that may differ: they do not change the maths, or are compared by meaning below.
# (vocab_size is compared by shape too.)
FREE = {"transformers_version", "torch_dtype", "dtype", "_name_or_path", "use_cache", "max_position_embeddings",
        "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "pretraining_tp", "attention_dropout",
        "layer_types", "max_window_layers", "sliding_window", "use_sliding_window",
        "rope_theta", "rope_parameters", "rope_scaling"}  # fmt: skip


def check_pair(base: Checkpoint, other: Checkpoint, role: str) -> list[str]:
    """InputError unless `other` (role: CPT, ...) can be merged with BASE; else warnings, one line each."""
    _check_architecture(base, other, role)
    _check_tensors(base, other, role)
    for file in ("tokenizer.json", "tokenizer.model"):
        if file in base.tokenizer and file in other.tokenizer:
            ours, theirs = base.tokenizer[file], other.tokenizer[file]
            if ours != theirs:
                raise InputError(
                    f"{role} {other.name}: its {file} differs from BASE's (sha256 {theirs[:12]}, BASE {ours[:12]}): "
                    "token ids mean different words; merge models with the same tokenizer"
                )
            return []
    ours, theirs = (" and ".join(model.tokenizer) or "no tokenizer" for model in (base, other))
    return [f"{role} {other.name} has {theirs}, BASE {base.name} {ours}: cannot be compared; assuming the same tokenizer"]


def _check_architecture(base: Checkpoint, other: Checkpoint, role: str) -> None:
    ours, theirs = base.config(), other.config()
    if not (ours and theirs):
        return  # a run that has not exported yet: only its tensors can be compared
    for config in (ours, theirs):  # a missing field means its default
        config["tie_word_embeddings"] = bool(config.get("tie_word_embeddings"))
        if not config.get("head_dim") and config.get("num_attention_heads"):
            config["head_dim"] = config.get("hidden_size", 0) // config["num_attention_heads"]
    for field in sorted(ours.keys() & theirs.keys() - FREE, key=lambda f: f != "model_type"):
        _expect(role, other, field, theirs[field], ours[field])
    ours, theirs = _rope(ours), _rope(theirs)
    for field in sorted(ours.keys() | theirs.keys()):
        _expect(role, other, field, theirs.get(field), ours.get(field))
    ours, theirs = _windows(base, other)
    _expect(role, other, "sliding_window (as it is in force)", theirs, ours)


def _windows(*checkpoints: Checkpoint) -> list[str]:
    """The sliding windows in force, as text: Qwen2 has four fields for them, in which different values can mean the same."""
    try:
        configs = [model_config(checkpoint.folder) for checkpoint in checkpoints]
    except InputError:  # a family that train.py does not know: compare the field itself
        raw = [checkpoint.config() for checkpoint in checkpoints]
        return [str(None if c.get("use_sliding_window") is False else c.get("sliding_window")) for c in raw]
    layers = [c.sliding_windows or (None,) * c.num_hidden_layers for c in configs]
    return [", ".join(f"{window} in {len([*run])} layers" for window, run in groupby(windows)) for windows in layers]


def _expect(role: str, other: Checkpoint, field: str, found, expected) -> None:
    if found != expected:
        raise InputError(
            f"{role} {other.name}: config.json has {field} {found}, BASE {expected}; "
            "only models of the same architecture can be merged"
        )


def _rope(config: dict) -> dict:
    """rope_theta and scaling from transformers 4's spelling or 5's; a missing field has its default."""
    found = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    found["rope_theta"] = config.get("rope_theta") or found.get("rope_theta")
    kind = found.pop("rope_type", None) or found.pop("type", None) or "default"
    return {key: value for key, value in found.items() if value is not None and key != "type"} | {"rope_type": kind}


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
