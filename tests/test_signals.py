"""A signal at any time ends the run with a checkpoint, and the same command goes on from it."""

import signal
import time

import pytest
import torch.distributed as dist

import train
from conftest import read_losses, rows_of, send
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
    world, codes = parallel.start(Config()), []
    monkeypatch.setattr(guard.os, "_exit", codes.append)
    stop = StopSignal(world)
    try:
        stop.poll()
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        with pytest.raises(Stopped, match="SIGTERM"):
            stop.poll()
        assert codes == []
        time.sleep(1.1)
        send(signal.SIGINT)
        assert codes == [128 + signal.SIGINT]
    finally:
        stop.close()
        dist.destroy_process_group()
