"""Damaged checkpoints."""

import json
import os
import shutil
import sys
import threading
import time

import pytest
from torch.distributed.checkpoint import FileSystemWriter

from conftest import read_losses
from nanomed import InputError, checkpoint, guard
from nanomed.checkpoint import whole


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a bit of the weights": lambda folder: flip(next(folder.glob("*.distcp"))),
    "half a file": lambda folder: os.truncate(next(folder.glob("*.distcp")), 20_000),
    "no index": lambda folder: (folder / ".metadata").unlink(),
    "DONE": lambda folder: (folder / "DONE").write_text("{"),
    "an empty DONE": lambda folder: (folder / "DONE").write_text(""),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(how, tiny, run, undisturbed, tmp_path, capsys):
    """Said in one line; it counts no longer, so that it rotates no sound one out; and the run ends as if nothing had been."""
    out = shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(out / "hf")
    older, newest = (path for _, path in whole(out / "checkpoints"))
    DAMAGE[how](newest)
    assert run(tiny.flags(out, keep=1, checkpoint_every=18))
    stderr = capsys.readouterr().err
    assert len([line for line in stderr.splitlines() if f"{newest}: cannot be read (" in line]) == 1
    assert f"resuming from {older}" in stderr
    assert read_losses(out) == read_losses(undisturbed)
    assert (out / "hf" / "model.safetensors").read_bytes() == (undisturbed / "hf" / "model.safetensors").read_bytes()
    assert [step for step, _ in whole(out / "checkpoints")] == [20]


def test_done_vouches_for_every_file_that_is_read(undisturbed):
    for _, path in whole(undisturbed / "checkpoints"):
        names = {file.name for file in path.iterdir()}
        assert json.loads((path / "DONE").read_text()).keys() == names - {"DONE"}


def test_no_sound_checkpoint_at_all(tiny, run, undisturbed, tmp_path, capsys):
    """Not the beginning of a new run in its place."""
    out = shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(out / "hf")
    for _, path in whole(out / "checkpoints"):
        flip(next(path.glob("*.distcp")))
    metrics = (out / "metrics.jsonl").read_text()
    assert not run(tiny.flags(out))
    assert f"error: {out}/checkpoints: none of its 2 checkpoints can be read" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_text() == metrics
    assert len(whole(out / "checkpoints")) == 2


def test_copies_beside_the_checkpoints_are_left_alone(tiny, run, undisturbed, tmp_path):
    """Somebody's step-00000020-good is neither read as a checkpoint nor removed as one."""
    out = shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(out / "hf")
    (_, newest), folder = whole(out / "checkpoints")[-1], out / "checkpoints"
    shutil.copytree(newest, folder / f"{newest.name}-good")
    (folder / "step-best").mkdir()
    shutil.rmtree(newest)
    assert run(tiny.flags(out, keep=1))
    assert {p.name for p in folder.iterdir()} == {newest.name, f"{newest.name}-good", "step-best"}


def test_done_is_written_while_the_training_waits_for_a_rank_that_has_failed(tiny, run, tmp_path, monkeypatch):
    """By the thread that has hashed the files: this one may never come back from its collective."""
    monkeypatch.setattr(checkpoint.Checkpointer, "poll", lambda self: None)
    found, folder = [], tmp_path / "run" / "checkpoints"

    def stuck(self, step):
        while not whole(folder):
            time.sleep(0.05)
        found.extend(step for step, _ in whole(folder))
        raise InputError("a rank has failed")

    monkeypatch.setattr(guard.Guard, "check", lambda self, step: stuck(self, step) if step == 8 else None)
    assert not run(tiny.flags(tmp_path / "run", log_every=8))
    assert found == [5]


def test_a_write_that_failed_is_told_before_the_next_one_begins(tiny, run, tmp_path, monkeypatch, capsys):
    def full(self, path, written):
        written.result()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.Checkpointer, "poll", lambda self: None)  # it was not done yet
    monkeypatch.setattr(checkpoint.Checkpointer, "_seal", full)
    assert not run(tiny.flags(tmp_path / "run"))
    assert "step-00000005: the checkpoint could not be written" in capsys.readouterr().err


def test_no_step_waits_for_the_removal_of_a_checkpoint(tiny, run, tmp_path, monkeypatch, capsys):
    """On a slow disk the other ranks would run into a step's time-out. A removal that fails costs no checkpoint."""
    threads = []

    def fails(self):
        threads.append(threading.current_thread())
        raise PermissionError(13, "Permission denied", "DONE")

    monkeypatch.setattr(checkpoint.Checkpointer, "_prune", fails)
    assert run(tiny.flags(tmp_path / "run", keep=1))
    assert threads
    assert threading.main_thread() not in threads
    warning = "an old checkpoint could not be removed ([Errno 13] Permission denied: 'DONE')"
    assert warning in capsys.readouterr().err
    assert [step for step, _ in whole(tmp_path / "run" / "checkpoints")] == [5, 10, 15, 20]


def test_the_oldest_goes_as_soon_as_the_newest_is_whole(tiny, run, tmp_path, monkeypatch):
    """And not when the next one is begun: there may be room for no more."""
    seen, poll = set(), checkpoint.Checkpointer.poll

    def patient(self):
        if self._pending:
            self._pending[1].result()
        poll(self)
        seen.add(len(whole(self.folder)))

    monkeypatch.setattr(checkpoint.Checkpointer, "poll", patient)
    assert run(tiny.flags(tmp_path / "run", keep=1))
    assert seen == {0, 1}


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of single threads")
def test_what_writes_gives_way_to_the_training(tiny, run, tmp_path, monkeypatch):
    """The thread that hashes, and torch's own that writes; not this one."""
    seen = set()

    def noting(what, function):
        return lambda *args: seen.add((what, os.getpriority(os.PRIO_PROCESS, 0))) or function(*args)

    monkeypatch.setattr(checkpoint, "sha256", noting("hash", checkpoint.sha256))
    monkeypatch.setattr(FileSystemWriter, "write_data", noting("write", FileSystemWriter.write_data))
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    assert run(tiny.flags(tmp_path / "run"))
    assert seen == {("hash", 19), ("write", 19)}
    assert os.getpriority(os.PRIO_PROCESS, 0) == mine
