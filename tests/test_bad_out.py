"""An output folder that is something else's, a disk that is full: one line, and nothing that looks whole."""

import errno
import json
import os
import shutil
import sys

import pytest
import torch
import torch.distributed.checkpoint.filesystem as filesystem
from transformers import AutoModelForCausalLM

import train
from conftest import ROOT, read_losses, run_train, write_bins
from nanomed import InputError, runs
from nanomed.checkpoint import whole
from nanomed.config import Config
from nanomed.files import lock
from refusals import contents, fixture_refused, hash_of, only_error  # noqa: F401


def trained(monkeypatch, flags: list[str]) -> None:
    """A run in this process that goes well."""
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    train.main()


# --- a folder that belongs to something else -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run's folder after its end."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        trained(patch, tiny.flags(out))
    return out


@pytest.mark.parametrize(("field", "value"), [("lr", 5e-3), ("seed", 1), ("seq_len", 64), ("precision", "bf16"), ("steps", 30)])
def test_the_folder_of_another_run(field, value, tiny, finished, refused):
    """The field is named with both values, and the run stays as it is, byte for byte."""
    old = json.loads((finished / "config.json").read_text())[field]
    refused(tiny.flags(finished, **{field: value}), finished, f"--{field.replace('_', '-')} {old}", value)


def test_the_folder_of_a_run_on_other_data(tiny, finished, tmp_path, refused):
    bins = write_bins(tmp_path / "bins", [[1, 2, 3]] * 9999, 320, tokenizer_sha256=hash_of(tiny))
    refused(tiny.flags(finished, data=bins), finished, "other data")
    refused(tiny.flags(finished, data=f"{tiny.train}@0.5"), finished, "other data")


def test_the_name_of_another_validation_set(tiny, finished, refused, monkeypatch, capsys):
    """Its curve would be of two sets; a new name may come at any time."""
    refused(tiny.flags(finished, val=f"med={tiny.train}"), finished, "--val med", "another name")
    trained(monkeypatch, [*tiny.flags(finished), "--val", f"new={tiny.train}"])
    assert "this run is finished" in capsys.readouterr().err


def test_the_name_of_a_validation_set_that_came_later(tmp_path):
    identity = {"data": [], "tokenizer_sha256": "t", "val": {"med": "1"}}
    config, cpu = Config(), torch.device("cpu")
    os.close(runs.create_run(tmp_path, config, identity, cpu))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')  # so that it does not give way
    os.close(runs.create_run(tmp_path, config, identity | {"val": {"new": "2"}}, cpu))
    runs.check_run(tmp_path, config, identity | {"val": {"med": "1", "new": "2"}})
    with pytest.raises(InputError, match="--val new was another set"):
        runs.check_run(tmp_path, config, identity | {"val": {"new": "3"}})


def test_the_same_data_elsewhere_is_the_same_run(tiny, finished, tmp_path, monkeypatch, capsys):
    moved = shutil.copytree(tiny.train, tmp_path / "moved")
    trained(monkeypatch, tiny.flags(finished, data=moved, keep=7))
    assert "this run is finished" in capsys.readouterr().err


def test_a_run_that_made_no_step_gives_way_to_another(tiny, finished, tmp_path, monkeypatch):
    """Stopped in its first validation, say, because a flag was wrong."""
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(finished / "run.json", out)
    shutil.copy(finished / "config.json", out)
    first = next(line for line in (finished / "metrics.jsonl").read_text().splitlines() if '"val_' in line)
    (out / "metrics.jsonl").write_text(first + "\n")
    assert "lr" not in json.loads(first)
    trained(monkeypatch, tiny.flags(out, lr=5e-3))
    assert json.loads((out / "config.json").read_text())["lr"] == 5e-3
    assert (out / "hf" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"run.json": {"kind": "judge", "config": {}}, "results.json": {}}, "--out"),  # an evaluation's
        ({"config.json": {"model_type": "llama"}}, "--model-type llama"),  # a model's
    ],
)
def test_a_folder_of_something_else_does_not_give_way(files, named, tiny, tmp_path, refused):
    (tmp_path / "other").mkdir()
    for name, content in files.items():
        (tmp_path / "other" / name).write_text(json.dumps(content))
    refused(tiny.flags(tmp_path / "other"), named)


def test_a_finished_run_without_its_checkpoints_does_not_give_way(tiny, finished, tmp_path, refused):
    out = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "metrics.jsonl"))
    refused(tiny.flags(out, lr=5e-3), "--lr")


def test_the_folder_is_looked_at_again_once_it_is_locked(tiny, finished, tmp_path, refused, monkeypatch):
    """What another run has written between the first look and the lock counts."""
    real, out = runs.lock, tmp_path / "run"

    def lock_late(folder):
        shutil.copytree(finished, folder, dirs_exist_ok=True)
        return real(folder)

    monkeypatch.setattr(runs, "lock", lock_late)
    monkeypatch.setattr(sys, "argv", ["train.py", *tiny.flags(out, lr=5e-3)])
    with pytest.raises(SystemExit):
        train.main()
    assert json.loads((out / "config.json").read_text())["lr"] != 5e-3


def test_a_folder_that_another_run_writes_to(tiny, tmp_path, refused):
    """The same command typed twice, or put back into the queue while it still runs."""
    out = tmp_path / "run"
    out.mkdir()
    held = lock(out)
    assert "another run is writing here" in refused(tiny.flags(out), str(out))
    os.close(held)


def test_a_folder_that_cannot_be_made(tiny, refused):
    refused(tiny.flags("/proc/run"), "--out /proc/run: cannot be written")


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
