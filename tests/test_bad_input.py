"""Wrong flags, bins and models end before the first step in one line that says what and where."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import write_bins
from nanomed.bins import Bins
from refusals import fixture_refused, hash_of  # noqa: F401

# --- the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"recipe": "gpt-5"}, ["--recipe gpt-5", "qwen2.5-7b"]),
        ({"recipe": "qwen2.5-7"}, ["--recipe qwen2.5-7", "did you mean qwen2.5-7b?"]),
        ({"recipe": None, "init": None}, ["--init", "no model to start from"]),
        ({"batch_tokens": 250}, ["--batch-tokens 250", "--seq-len 32", "--micro-batch 2"]),
        ({"seq_len": 0}, ["--seq-len 0"]),
        ({"seq_len": 8192, "batch_tokens": 8192, "micro_batch": 1}, ["--seq-len 8192", "made for 4096"]),
        ({"steps": 0}, ["--steps 0"]),
        ({"lr": -1.0}, ["--lr -1.0"]),
        ({"lr": "nan"}, ["--lr nan"]),
        ({"lr": "inf"}, ["--lr inf"]),
        ({"clip_norm": 0}, ["--clip-norm 0", "inf does not clip"]),
        ({"beta2": 1.0}, ["--beta2 1.0", "below 1"]),
        ({"beta1": -0.1}, ["--beta1 -0.1"]),
        ({"eps": 0}, ["--eps 0"]),
        ({"weight_decay": -1}, ["--weight-decay -1"]),
        ({"seed": -1}, ["--seed -1"]),
        ({"keep": 0}, ["--keep 0"]),
        ({"warmup_steps": 20}, ["--warmup-steps 20", "20 steps"]),
        ({"replicas": 2}, ["--replicas 2", "1 processes"]),
        ({"val": "bins/val"}, ["--val bins/val", "NAME=BINS"]),
        ({"val": "two words=bins/val"}, ["--val two words=bins/val", "NAME=BINS"]),
        ({"val": "med=bins/val@0.1"}, ["--val med=bins/val@0.1", "no share"]),
        ({"val": "med=nowhere"}, ["nowhere: no such folder"]),
        ({"data": "nowhere"}, ["nowhere: no such folder"]),
        ({"data": "nowhere@much"}, ["--data nowhere@much", "share"]),
        ({"data": "nowhere@inf"}, ["--data nowhere@inf", "share"]),
        ({"init": "./nowhere"}, ["--init ./nowhere", "neither a local folder nor a hub id"]),
        ({"init": "nobody/nowhere"}, ["--init nobody/nowhere", "no such local folder", "hub"]),
    ],
    ids=str,
)
def test_flags(changes, named, tiny, tmp_path, refused):
    refused(tiny.flags(tmp_path / "run", **changes), *named)


def test_one_name_for_two_validation_sets(tiny, tmp_path, refused):
    refused([*tiny.flags(tmp_path / "run"), "--val", f"med={tiny.train}"], f"--val med={tiny.train}", "once")


def test_no_data_at_all(tiny, tmp_path, refused):
    refused(tiny.flags(tmp_path / "run", recipe="qwen2.5-7b", data=None), "--data", "data/prepare.py")


# --- bins ----------------------------------------------------------------------------------------------------------


def change_records(folder: Path, **fields) -> None:
    """Change fields in the shard's JSON and the manifest alike."""
    for path in (folder / "shard-00000.json", folder / "manifest.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def cut(path: Path, n_bytes: int) -> None:
    """Take bytes off the end of a file, as a broken download does."""
    data = path.read_bytes()
    path.write_bytes(data[:-n_bytes])


BROKEN_BINS = {
    "missing shard": (lambda f: (f / "shard-00000.bin").unlink(), ["shard-00000.bin", "missing"]),
    "missing index": (lambda f: (f / "shard-00000.idx").unlink(), ["shard-00000.idx", "missing"]),
    "unfinished set": (lambda f: (f / "manifest.json").unlink(), ["unfinished", "the same data/prepare.py command"]),
    "truncated shard": (lambda f: cut(f / "shard-00000.bin", 2), ["shard-00000.bin", "size in bytes"]),
    "truncated index": (lambda f: cut(f / "shard-00000.idx", 8), ["shard-00000.idx", "size in bytes"]),
    "wrong dtype": (lambda f: change_records(f, dtype="u4"), ["shard-00000.json", "dtype", "u4", "u2"]),
    "unknown dtype": (lambda f: change_records(f, dtype="f4"), ["shard-00000.json", "dtype", "f4", "u2"]),
    "wrong version": (lambda f: change_records(f, version=2), ["version", "2", "expected 1"]),
    "not bins": (lambda f: change_records(f, format="webdataset"), ["format", "webdataset", "nanomed-bins"]),
}


@pytest.mark.parametrize("which", ["train", "val"])
@pytest.mark.parametrize("name", BROKEN_BINS)
def test_broken_bins(name, which, tiny, tmp_path, refused):
    breaks, named = BROKEN_BINS[name]
    bins = shutil.copytree(getattr(tiny, which), tmp_path / "bins")
    breaks(bins)
    refused(tiny.flags(tmp_path / "run", **flag_for(which, bins)), bins, *named)


def flag_for(which: str, bins: Path) -> dict[str, str]:
    return {"data": str(bins)} if which == "train" else {"val": f"med={bins}"}


@pytest.mark.parametrize("which", ["train", "val"])
def test_bins_of_another_tokenizer(which, tiny, tmp_path, refused):
    bins = write_bins(tmp_path / "bins", [[1, 2, 3]] * 999, 320, tokenizer_sha256="5" * 64)
    refused(tiny.flags(tmp_path / "run", **flag_for(which, bins)), bins, "tokenizer", tiny.model)


@pytest.mark.parametrize("which", ["train", "val"])
def test_bins_of_a_larger_vocabulary(which, tiny, tmp_path, refused):
    bins = write_bins(tmp_path / "bins", [[1, 2, 3]] * 999, 385, tokenizer_sha256=hash_of(tiny))
    refused(tiny.flags(tmp_path / "run", **flag_for(which, bins)), bins, "385", "384")


@pytest.mark.parametrize("which", ["train", "val"])
def test_a_token_that_the_model_lacks(which, tiny, tmp_path, refused):
    """Damage that only reading shows: found in the batch before it reaches the model; no step is written down."""
    bins, out = shutil.copytree(getattr(tiny, which), tmp_path / "bins"), tmp_path / "run"
    tokens = np.memmap(bins / "shard-00000.bin", "<u2", "r+")
    tokens[Bins(bins).lengths.cumsum() - 2] = 5000  # of every document: so in the first batch too
    tokens.flush()
    written = {"config.json", "run.json", "metrics.jsonl"}
    written |= {f"source/{path.name}" for path in (*tiny.model.iterdir(), Path("tensors.json"))}
    refused(tiny.flags(out, **flag_for(which, bins)), bins, "document", "token id 5000", "384", keeps=written)
    assert {p.name for p in out.iterdir()} <= written | {"checkpoints", "source"}
    assert "loss" not in " ".join((out / "metrics.jsonl").read_text().replace("val_med_loss", "").split())


@pytest.mark.parametrize("which", ["train", "val"])
def test_what_is_no_set_of_bins_is_named_with_what_was_meant(which, tiny, tmp_path, refused):
    """A text file, a misspelt path, the folder above: three mistakes, three hints."""
    shutil.copytree(tiny.train, tmp_path / "bins" / "notes")
    (tmp_path / "notes.jsonl").write_text("{}")
    notes = tmp_path / "bins" / "notes"
    out = tmp_path / "run"
    refused(tiny.flags(out, **flag_for(which, tmp_path / "notes.jsonl")), "notes.jsonl: is a file", "data/prepare.py")
    refused(tiny.flags(out, **flag_for(which, tmp_path / "bins" / "note")), f"did you mean {notes}?")
    refused(tiny.flags(out, **flag_for(which, tmp_path / "bins")), "holds no bins", f"did you mean {notes}?")


@pytest.mark.parametrize("which", ["train", "val"])
def test_an_empty_set(which, tiny, tmp_path, refused):
    bins = write_bins(tmp_path / "bins", [], 320, tokenizer_sha256=hash_of(tiny))
    refused(tiny.flags(tmp_path / "run", **flag_for(which, bins)), bins, "no documents")


def test_fewer_tokens_than_a_step_needs(tiny, tmp_path, refused):
    bins = write_bins(tmp_path / "bins", [[1, 2, 3]] * 63, 320, tokenizer_sha256=hash_of(tiny))
    flags = tiny.flags(tmp_path / "run", data=bins, steps="None", epochs=1, warmup_steps=0)
    refused(flags, "--data", "252 tokens", "256")


def test_a_share_of_no_document(tiny, tmp_path, refused):
    refused(tiny.flags(tmp_path / "run", data=f"{tiny.train}@0.001"), "@0.001", "so small a share")


# --- the model -----------------------------------------------------------------------------------------------------


def change_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def name_in_index(folder: Path, file: str) -> None:
    """An index that finds all tensors but the last in the file that is there."""
    weight_map = dict.fromkeys(sorted(load_file(folder / "model.safetensors")), "model.safetensors")
    weight_map["model.norm.weight"] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
YARN = {"type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
BROKEN_MODELS = {
    "model type": (lambda f: change_config(f, model_type="gemma2"), ["config.json", "model_type", "gemma2", "llama"]),
    "rope scaling": (lambda f: change_config(f, rope_scaling=YARN), ["config.json", "rope_scaling", "yarn"]),
    "rope parameters": (lambda f: change_config(f, rope_parameters=LLAMA3), ["config.json", "rope_par", "llama3"]),
    "unknown field": (lambda f: change_config(f, logit_scale=2.0), ["config.json", "logit_scale = 2.0"]),
    "no JSON": (lambda f: cut(f / "config.json", 10), ["config.json", "JSON"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json"]),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer.json"]),
    "missing tensor": (lambda f: change_tensors(f, lambda t: t.pop(UP)), [UP, "missing"]),
    "extra tensor": (lambda f: change_tensors(f, lambda t: t.update(extra=torch.ones(2))), ["extra", "no place"]),
    "shape": (lambda f: change_tensors(f, lambda t: t.update({UP: t[UP].T.contiguous()})), [UP, "[32, 64]", "[64, 32]"]),
    "dtype": (lambda f: change_tensors(f, lambda t: t.update({UP: t[UP].to(torch.int8)})), [UP, "I8", "BF16"]),
    "file of the index": (lambda f: name_in_index(f, "model-2.safetensors"), ["model-2.safetensors", "missing"]),
    "tensor of the index": (lambda f: change_tensors(f, lambda t: (name_in_index(f, "model.safetensors"), t.pop(NORM))),
                            ["model.safetensors", NORM, "missing"]),
    "index": (lambda f: (f / "model.safetensors.index.json").write_text("{"), ["model.safetensors.index.json", "JSON"]),
    "empty index": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), ["index.json", "weight_map"]),
    "dtype without weights": (lambda f: (change_config(f, dtype="float64"), (f / "model.safetensors").unlink()),
                              ["config.json", "dtype float64", "bfloat16"]),
    "truncated": (lambda f: cut(f / "model.safetensors", 100), ["model.safetensors", "whole"]),
    "truncated header": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 4), ["model.safetensors", "whole"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_MODELS)
def test_broken_models(name, tiny, tmp_path, refused):
    breaks, named = BROKEN_MODELS[name]
    model = shutil.copytree(tiny.model, tmp_path / "model")
    breaks(model)
    refused(tiny.flags(tmp_path / "run", init=model), model, *named)
