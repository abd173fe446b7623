"""Every wrong input ends before the first step in one line that says what and where, and leaves nothing that looks whole."""

import errno
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint.filesystem as filesystem
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import train
from conftest import ROOT, read_losses, run_train, write_bins
from nanomed.bins import Bins
from nanomed.checkpoint import whole


@pytest.fixture
def refused(monkeypatch, capsys):
    """Run train.py's main with flags that it must refuse; its one line. The flag out must be among them."""

    def run(flags: list[str], *named: str, keeps=()) -> str:
        out = Path(flags[flags.index("--out") + 1])
        before = contents(out)
        monkeypatch.setattr(sys, "argv", ["train.py", *flags])
        with pytest.raises(SystemExit) as exit_:
            train.main()
        assert exit_.value.code == 1
        line = only_error(capsys.readouterr().err)
        for what in named:
            assert str(what) in line
        assert contents(out, but=keeps) == before
        return line

    return run


def only_error(stderr: str) -> str:
    """The one line that a user gets, on a line of its own, and no traceback."""
    assert "Traceback" not in stderr, stderr
    shown = stderr.replace("\x1b[A", "\n")  # tqdm moves the cursor up
    lines = [line for line in shown.splitlines() if "error:" in line.lower()]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: "), lines[0]
    return lines[0]


def contents(folder: Path, but=()) -> dict[str, bytes]:
    """Every file below the folder, by its path in it; nothing where it does not exist."""
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    return {name: p.read_bytes() for name, p in files.items() if name not in but}


def trained(monkeypatch, flags: list[str]) -> None:
    """A run in this process that goes well."""
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    train.main()


# --- the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"recipe": "gpt-5"}, ["--recipe gpt-5", "qwen2.5-7b"]),
        ({"batch_tokens": 250}, ["--batch-tokens 250", "--seq-len 32", "--micro-batch 2"]),
        ({"seq_len": 0}, ["--seq-len 0"]),
        ({"steps": 0}, ["--steps 0"]),
        ({"lr": 0.0}, ["--lr 0.0"]),
        ({"lr": "nan"}, ["--lr nan"]),
        ({"keep": 0}, ["--keep 0"]),
        ({"warmup_steps": 20}, ["--warmup-steps 20", "20 steps"]),
        ({"replicas": 2}, ["--replicas 2", "1 processes"]),
        ({"val": "bins/val"}, ["--val bins/val", "NAME=BINS"]),
        ({"val": "two words=bins/val"}, ["--val two words=bins/val", "NAME=BINS"]),
        ({"val": "med=bins/val@0.1"}, ["--val med=bins/val@0.1", "no share"]),
        ({"val": "med=nowhere"}, ["nowhere/manifest.json"]),
        ({"data": "nowhere"}, ["nowhere/manifest.json"]),
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
    "unfinished set": (lambda f: (f / "manifest.json").unlink(), ["manifest.json", "missing"]),
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


def hash_of(tiny) -> str:
    return Bins(tiny.train).tokenizer_sha256


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
    refused(tiny.flags(out, **flag_for(which, bins)), bins, "document", "token id 5000", "384", keeps=written)
    assert {p.name for p in out.iterdir()} <= written | {"checkpoints"}
    assert "loss" not in " ".join((out / "metrics.jsonl").read_text().replace("val_med_loss", "").split())


@pytest.mark.parametrize("which", ["train", "val"])
def test_an_empty_set(which, tiny, tmp_path, refused):
    bins = write_bins(tmp_path / "bins", [], 320, tokenizer_sha256=hash_of(tiny))
    refused(tiny.flags(tmp_path / "run", **flag_for(which, bins)), bins, "no documents")


def test_fewer_tokens_than_a_step_needs(tiny, tmp_path, refused):
    bins = write_bins(tmp_path / "bins", [[1, 2, 3]] * 63, 320, tokenizer_sha256=hash_of(tiny))
    flags = tiny.flags(tmp_path / "run", data=bins, steps="None", epochs=1, warmup_steps=0)
    refused(flags, "--data", "252 tokens", "256")


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
    "truncated": (lambda f: cut(f / "model.safetensors", 100), ["model.safetensors", "whole"]),
    "truncated header": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 4), ["model.safetensors", "whole"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_MODELS)
def test_broken_models(name, tiny, tmp_path, refused):
    breaks, named = BROKEN_MODELS[name]
    model = shutil.copytree(tiny.model, tmp_path / "model")
    breaks(model)
    refused(tiny.flags(tmp_path / "run", init=model), model, *named)


# --- a folder that belongs to something else -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run's folder after its end."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        trained(patch, tiny.flags(out))
    return out


@pytest.mark.parametrize(
    ("field", "value"), [("lr", 5e-3), ("seed", 1), ("seq_len", 64), ("precision", "bf16"), ("steps", 30)]
)
def test_the_folder_of_another_run(field, value, tiny, finished, refused):
    """The field is named with both values, and the run stays as it is, byte for byte."""
    old = json.loads((finished / "config.json").read_text())[field]
    refused(tiny.flags(finished, **{field: value}), finished, f"--{field.replace('_', '-')} {old}", value)


def test_the_folder_of_a_run_on_other_data(tiny, finished, tmp_path, refused):
    bins = write_bins(tmp_path / "bins", [[1, 2, 3]] * 9999, 320, tokenizer_sha256=hash_of(tiny))
    refused(tiny.flags(finished, data=bins), finished, "other data")
    refused(tiny.flags(finished, data=f"{tiny.train}@0.5"), finished, "other data")


def test_the_same_data_elsewhere_is_the_same_run(tiny, finished, tmp_path, monkeypatch, capsys):
    moved = shutil.copytree(tiny.train, tmp_path / "moved")
    trained(monkeypatch, tiny.flags(finished, data=moved, keep=7))
    assert "this run is finished" in capsys.readouterr().err


def test_a_folder_that_is_no_runs(tiny, tmp_path, refused):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter-1.tex").write_text("It was a dark and stormy night")
    refused(tiny.flags(tmp_path / "thesis"), f"--out {tmp_path / 'thesis'}", "not a run's")


def test_a_file_in_place_of_the_folder(tiny, tmp_path, refused):
    (tmp_path / "thesis.tex").write_text("It was a dark and stormy night")
    refused(tiny.flags(tmp_path / "thesis.tex"), f"--out {tmp_path / 'thesis.tex'}")
    assert (tmp_path / "thesis.tex").read_text() == "It was a dark and stormy night"


# --- a full disk ---------------------------------------------------------------------------------------------------

# A train.py whose disk is full at the checkpoint of step 10.
FULL_DISK = """
import resource, sys
sys.path.insert(0, {root!r})
import torch.distributed.checkpoint.filesystem as filesystem
import train
real, how = filesystem.FileSystemWriter.write_data, sys.argv.pop(1)
def write_data(self, *args):
    if "00000010" in str(self.path):
        if how == "no space": raise OSError({enospc}, "No space left on device")
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))  # writes fail half-way, for real
    return real(self, *args)
filesystem.FileSystemWriter.write_data = write_data
train.main()
"""


@pytest.mark.parametrize("how", ["no space", "file too large"])
def test_a_full_disk_at_a_checkpoint(how, tiny, finished, tmp_path, monkeypatch):
    """The run ends at that save; the checkpoint before is whole, and from it the run goes on as if nothing had been."""
    out, script = tmp_path / "run", tmp_path / "full_disk.py"
    script.write_text(FULL_DISK.format(root=str(ROOT), enospc=errno.ENOSPC))
    done = run_train([how, *tiny.flags(out)], script=script)
    assert done.returncode == 1, done.stderr
    line = only_error(done.stderr)
    for named in (
        out / "checkpoints" / "step-00000010",
        "could not be written",
        "No space" if how == "no space" else "",
    ):
        assert str(named) in line
    assert not (out / "hf").exists()
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000005"]
    assert whole(out / "checkpoints")
    trained(monkeypatch, tiny.flags(out))
    assert read_losses(out) == read_losses(finished)
    assert contents(out / "hf") == contents(finished / "hf")
    AutoModelForCausalLM.from_pretrained(out / "hf")


def test_a_full_disk_at_the_last_checkpoint(tiny, finished, tmp_path, monkeypatch, refused):
    """Nothing is exported then: the run has not reached its end."""
    out, real = tmp_path / "run", filesystem.FileSystemWriter.write_data

    def write_data(self, *args):
        if "00000020" in str(self.path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(filesystem.FileSystemWriter, "write_data", write_data)
        patch.setattr(sys, "argv", ["train.py", *tiny.flags(out)])
        with pytest.raises(SystemExit):
            train.main()
    assert not (out / "hf").exists()
    assert [step for step, _ in whole(out / "checkpoints")] == [10, 15]
    trained(monkeypatch, tiny.flags(out))
    assert read_losses(out) == read_losses(finished)
