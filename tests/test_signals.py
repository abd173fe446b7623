"""A signal at any time ends the run with a checkpoint, and the same command goes on from it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

import train
from conftest import ROOT, read_losses, rows_of, send
from nanomed import batches, checkpoint, guard, parallel
from nanomed.checkpoint import whole
from nanomed.config import Config
from nanomed.guard import Stopped, StopSignal
from nanomed.metrics import Metrics

PHASES = {  # what is patched to send the signal, at its n-th call; the step that must be saved then
    "step": (parallel, "all_reduce_gradients", 4 * 7 + 2, 7),
    "evaluation": (batches, "pack", 0, 10),
    "checkpoint": (checkpoint.Checkpointer, "save", 2, 10),
    "first step": (parallel, "all_reduce_gradients", 2, 0),
}


@pytest.mark.parametrize(
    ("number", "phase"),
    [
        (signal.SIGTERM, "step"),
        (signal.SIGINT, "evaluation"),
        (signal.SIGUSR1, "checkpoint"),
        (signal.SIGINT, "first step"),
    ],
)
def test_a_signal_saves_and_the_run_goes_on(number, phase, tiny, run, undisturbed, tmp_path, monkeypatch, capsys):
    out, handlers = tmp_path / "run", [signal.getsignal(s) for s in StopSignal.SIGNALS]
    with monkeypatch.context() as patch:
        send_during(patch, phase, number)
        assert run(tiny.flags(out))
    expected = PHASES[phase][3]
    assert f"stopped by {signal.Signals(number).name} after step {expected}; the same" in capsys.readouterr().err
    assert [step for step, _ in whole(out / "checkpoints")][-1:] == ([expected] if expected else [])
    assert not (out / "hf").exists()
    assert [signal.getsignal(s) for s in StopSignal.SIGNALS] == handlers
    assert run(tiny.flags(out))
    assert ("resuming from" in capsys.readouterr().err) == (expected > 0)
    assert read_losses(out) == read_losses(undisturbed)
    for key in ("val_med_loss", "val_med_bpb"):  # an evaluation that was cut short is made up for, none is there twice
        assert [(r["step"], r[key]) for r in rows_of(out) if key in r] == [
            (r["step"], r[key]) for r in rows_of(undisturbed) if key in r]  # fmt: skip


def send_during(patch, phase: str, number: int) -> None:
    """Have the signal come in the middle of the phase."""
    if phase == "evaluation":
        real_validate = train.validate

        def validate(*args):
            if whole_steps[0] == 10:
                send(number)
            return real_validate(*args)

        whole_steps, real_add = [0], Metrics.add

        def add(self, step, *rest):
            whole_steps[0] = step
            return real_add(self, step, *rest)

        patch.setattr(Metrics, "add", add)
        patch.setattr(train, "validate", validate)
        return
    owner, name, nth, _ = PHASES[phase]
    real, calls = getattr(owner, name), [0]

    def wrapper(*args, **kwargs):
        calls[0] += 1
        result = real(*args, **kwargs)
        if calls[0] == nth:
            send(number)
        return result

    patch.setattr(owner, name, wrapper)


def test_a_second_signal_ends_the_process_at_once(monkeypatch):
    """Even if the main thread is inside a call that never returns; but a repeated first one (torchrun's) does not."""
    world, codes, asked = parallel.start(Config()), [], []
    monkeypatch.setattr(guard.os, "_exit", codes.append)
    stop = StopSignal(world)

    def send_at(second: float, number: int) -> None:
        """Send the signal, and let the thread read this time when it notes it."""
        n_asked = len(asked)
        monkeypatch.setattr(guard, "time", SimpleNamespace(monotonic=lambda: asked.append(second) or second))
        os.kill(os.getpid(), number)
        while len(asked) == n_asked:
            time.sleep(0.001)

    try:
        stop.poll()
        send_at(7.0, signal.SIGTERM)
        send_at(7.9, signal.SIGTERM)
        with pytest.raises(Stopped, match="SIGTERM"):
            stop.poll()
        assert codes == []
        send_at(8.1, signal.SIGINT)
        while not codes:
            time.sleep(0.001)
        assert codes == [128 + signal.SIGINT]
    finally:
        stop.close()
        dist.destroy_process_group()


def children_of(pid: int) -> list[int]:
    """Processes that the process has started, on Linux."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that only waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("n_ranks", [1, 2])
def test_the_end_of_torchrun_ends_its_processes_with_a_checkpoint(n_ranks, tiny, tmp_path):
    """kill -9 of torchrun alone left them running, holding the run folder's lock."""
    out = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}"]
    flags = tiny.flags(out, steps=100_000, checkpoint_every=50_000, eval_every=50_000, val=None, log_every=1)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    log = tmp_path / "stderr.log"
    with log.open("w") as stderr:
        process = subprocess.Popen([*torchrun, str(ROOT / "train.py"), *flags], env=env, stderr=stderr)
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < 5:
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    ranks = [child for child in children_of(process.pid) if b"train.py" in Path(f"/proc/{child}/cmdline").read_bytes()]
    assert len(ranks) == n_ranks
    process.kill()
    process.wait()
    while any(map(is_alive, ranks)):
        time.sleep(0.05)
    [(step, _)] = whole(out / "checkpoints")
    said = log.read_text()
    assert f"stopped by the end of torchrun after step {step}" in said, said
    assert "Traceback" not in said


# train.py whose launcher ends while the weights are read.
LOSES_ITS_LAUNCHER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
import train
real, launcher = train.weights.load_weights, os.getppid()
def load_weights(*args):
    Path({marker!r}).touch()
    while os.getppid() == launcher:
        time.sleep(0.01)
    real(*args)
train.weights.load_weights = load_weights
train.main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_end_of_torchrun_before_the_first_step_is_noticed(tiny, tmp_path):
    """The process that is its parent afterwards must not be taken for torchrun."""
    out, marker, script, log = (tmp_path / name for name in ("run", "reading", "slow.py", "stderr.log"))
    script.write_text(LOSES_ITS_LAUNCHER.format(root=str(ROOT), marker=str(marker)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", str(script)]
    with log.open("w") as stderr:
        process = subprocess.Popen([*torchrun, *tiny.flags(out)], env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=stderr)
    while not marker.exists():
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    ranks = children_of(process.pid)
    process.kill()
    process.wait()
    while any(map(is_alive, ranks)):
        time.sleep(0.05)
    assert "stopped by the end of torchrun after step 0" in log.read_text()
    assert not (out / "hf").exists()
