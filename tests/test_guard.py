"""Steps that must not be made, signals, damaged checkpoints; and that none of it makes the CPU wait for the device."""

import copy
import dataclasses
import gc
import json
import math
import os
import shutil
import signal
import statistics
import sys
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param_group
from torch.utils._python_dispatch import TorchDispatchMode

import train
from conftest import read_losses
from nanomed import InputError, batches, checkpoint, guard, optim, parallel
from nanomed.batches import documents
from nanomed.checkpoint import whole
from nanomed.config import Config, parse
from nanomed.guard import LEAST, MAX_SKIPS, MIN_STEPS, SIGMAS, WINDOW, Guard, Stopped, StopSignal
from nanomed.metrics import Metrics
from nanomed.stream import Stream, open_sources
from test_parallel import PLAIN, batch, build, spawn

CPU = torch.device("cpu")

# --- judging -------------------------------------------------------------------------------------------------------


def judged(watch: Guard, steps) -> list[bool]:
    return [bool(watch.judge(torch.tensor(loss), torch.tensor(norm))[0]) for loss, norm in steps]


def slow_verdicts(steps) -> list[bool]:
    """The rule in the obvious way, with a list for the window."""
    accepted, in_a_row, verdicts = [], 0, []
    for step in steps:
        step = tuple(float(torch.tensor(x)) for x in step)
        skip = in_a_row >= MAX_SKIPS or not all(map(math.isfinite, step))
        if len(accepted) >= MIN_STEPS:
            for x, seen, least in zip(step, zip(*accepted[-WINDOW:], strict=True), LEAST, strict=True):
                mean = statistics.fmean(seen)
                skip |= x > max(mean + SIGMAS * statistics.stdev(seen), least * mean)
        in_a_row = in_a_row + 1 if skip else 0
        accepted += [] if skip else [step]
        verdicts.append(skip)
    return verdicts


ordinary = st.tuples(st.floats(2, 4, width=32), st.floats(0.125, 1, width=32))
odd = st.tuples(*[st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 3.0, 30.0, 3e20])] * 2)


@hypothesis_settings(max_examples=20, deadline=None)
@given(st.lists(ordinary, min_size=70, max_size=90), st.lists(st.one_of(ordinary, odd), min_size=60, max_size=90))
def test_verdicts_equal_the_slow_rules(calm, wild):
    assert judged(Guard(CPU), calm + wild) == slow_verdicts(calm + wild)


def noise(n: int, seed: int = 0) -> list[tuple[float, float]]:
    generator = torch.Generator().manual_seed(seed)
    return [(3 + 0.1 * a, 1 + 0.1 * b) for a, b in torch.randn(n, 2, generator=generator).tolist()]


def test_what_is_a_spike():
    """6 sigma is 0.6 here, and the norm must quadruple; upwards only; and only once there is something to compare with."""
    watch = Guard(CPU)
    assert judged(watch, noise(MIN_STEPS - 1)) == [False] * (MIN_STEPS - 1)
    assert judged(Guard(CPU), [*noise(MIN_STEPS - 1), (99.0, 1.0)])[-1:] == [False]
    assert judged(watch, noise(99, seed=1)) == [False] * 99
    assert judged(watch, [(3.9, 1.0), (3.0, 4.2), (0.1, 0.1), (3.3, 3.8), (math.nan, 1.0), (3.0, math.inf)]) == [
        True, True, False, False, True, True]  # fmt: skip


def test_after_too_many_in_a_row_nothing_is_accepted_and_the_run_ends():
    """Whenever the next log step comes, the model is the one before the trouble."""
    watch = Guard(CPU)
    judged(watch, noise(100))
    judged(watch, [(math.nan, 1.0)] * (MAX_SKIPS - 1))
    assert judged(watch, noise(1)) == [False]
    watch.check(1)
    assert judged(watch, [(math.nan, 1.0)] * MAX_SKIPS + noise(5)) == [True] * (MAX_SKIPS + 5)
    with pytest.raises(InputError, match="step 7: 10 steps in a row were skipped"):
        watch.check(7)


def test_the_reason_names_the_value_and_its_limit():
    assert guard.reason({"loss": None, "grad_norm": 2.0}, (5.0, 3.0)) == "loss is not finite"
    both = guard.reason({"loss": 6.0, "grad_norm": None}, (5.0, 3.0))
    assert both == "loss 6 is above 5, 6 sigma over the last 128 steps and gradient norm is not finite"
    assert guard.reason({"loss": 2.0, "grad_norm": 2.0}, (5.0, 3.0)) == "10 steps in a row were skipped before it"


# --- skipping ------------------------------------------------------------------------------------------------------


def optimizers(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """Fused with both precisions of states, and one that knows no found_inf."""
    plain = torch.optim.AdamW(model.parameters(), foreach=False)
    return {"plain": plain} | {s: optim.make_adamw(model, Config(optimizer_states=s)) for s in ("fp32", "bf16")}


@pytest.mark.parametrize("name", ["fp32", "bf16", "plain"])
def test_a_skipped_step_changes_no_bit(name):
    """Neither parameters nor means nor the step count, whatever the gradients hold; the next step is made as ever."""
    model = nn.Linear(5, 3)
    optimizer = optimizers(model)[name]
    before, states = copy.deepcopy(model.state_dict()), None
    for bad in (False, True, False):
        for p in model.parameters():
            p.grad = torch.full_like(p, math.nan if bad else 0.5)
        guard.step(optimizer, torch.tensor(bad))
        after = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
        if bad:
            torch.testing.assert_close(after, (before, states), rtol=0, atol=0)
        else:
            assert not torch.equal(after[0]["weight"], before["weight"])
        before, states = after
    assert {int(s["step"]) for s in states.values()} == {2}


@pytest.fixture
def run(monkeypatch):
    """train.py's main in this process; False if it ended with exit status 1."""

    def run(flags: list[str]) -> bool:
        monkeypatch.setattr(sys, "argv", ["train.py", *flags])
        status = 0
        try:
            train.main()
        except SystemExit as exit_:
            status = exit_.code
        assert gc.isenabled()
        assert status in (0, 1)
        return status == 0

    return run


def rows_of(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def poison(monkeypatch, bad: dict[int, float], tiny) -> None:
    """Multiply the loss, and so all gradients, of these steps (from 1) by a number."""
    real, calls = train.add_gradients, [0]

    def add_gradients(model, loader, *rest):
        calls[0] += 1
        loss, len2 = real(model, loader, *rest)
        factor = bad.get(calls[0], 1.0)
        for p in model.parameters():
            p.grad.mul_(factor)
        return loss * factor, len2

    monkeypatch.setattr(train, "add_gradients", add_gradients)


def test_bad_steps_are_skipped_named_and_leave_no_trace(tiny, run, tmp_path, monkeypatch, capsys):
    """NaN, infinity and a spike: the run equals one that is told which steps to leave out, to the last bit."""
    flags = dict(steps=85, epochs=None, eval_every=40, checkpoint_every=40, lr=1e-3)
    bad = {5: math.nan, 6: math.inf, 75: 100.0}
    with monkeypatch.context() as patch:
        poison(patch, bad, tiny)
        assert run(tiny.flags(tmp_path / "run", **flags))
    stderr = capsys.readouterr().err
    with monkeypatch.context() as patch:
        real = Guard.judge
        asked = iter(range(1, 999))

        def judge(self, loss, norm):
            assert not real(copy.deepcopy(self), loss, norm)[0]
            return real(self, loss * math.nan if next(asked) in bad else loss, norm)

        patch.setattr(Guard, "judge", judge)
        assert run(tiny.flags(tmp_path / "reference", **flags))
    rows = {r["step"]: r for r in rows_of(tmp_path / "run") if "loss" in r}
    expected = {r["step"]: r for r in rows_of(tmp_path / "reference") if "loss" in r}
    assert [s for s, r in rows.items() if r["skipped"]] == list(bad)
    assert rows[5]["loss"] is rows[6]["grad_norm"] is None
    assert rows[75]["loss"] == 100 * expected[75]["loss"]
    assert all(
        rows[s]["loss"] == expected[s]["loss"] and rows[s]["lr"] == expected[s]["lr"] for s in rows if s not in bad
    )
    hf = [tmp_path / name / "hf" / "model.safetensors" for name in ("run", "reference")]
    assert hf[0].read_bytes() == hf[1].read_bytes()
    # the log: why, and which documents
    whys = {r["step"]: r for r in rows_of(tmp_path / "run") if "why" in r}
    assert whys[5]["why"] == "loss is not finite and gradient norm is not finite"
    assert "6 sigma" in whys[75]["why"]
    for step in bad:
        (numbers,) = whys[step]["documents"].values()
        assert numbers == sorted(set(numbers))
        batches.show(tmp_path / "run", step)
        origins = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--- ")]
        shown = {int(line.split(" document ")[1].split(",")[0]) for line in origins}
        assert shown == set(numbers)
        assert f"step {step:>6}  skipped: {whys[step]['why']}; its documents: {tiny.train} {numbers[0]}" in stderr


def test_documents_of_several_sets(tiny):
    stream = Stream(open_sources([str(tiny.train), f"{tiny.val}@0.5"]), 0, 384)
    named = documents(stream, 32, 2, 40)
    found = {doc for doc, *_ in stream.pieces(2 * 40 * 32, 3 * 40 * 32)}
    assert set(named) == {str(tiny.train), str(tiny.val)}
    assert {(i, d) for i, s in enumerate((tiny.train, tiny.val)) for d in named[str(s)]} == {
        (int(doc >= 380), doc - 380 * (doc >= 380)) for doc in found}  # fmt: skip


def test_too_many_in_a_row_end_the_run(tiny, run, tmp_path, monkeypatch, capsys):
    """With exit status 1 and one line; checkpoints of before the trouble stay, and hold its model."""
    poison(monkeypatch, dict.fromkeys(range(8, 99), math.nan), tiny)
    assert not run(tiny.flags(tmp_path / "run", keep=5, log_every=6))
    assert "error: step 18: 10 steps in a row were skipped" in capsys.readouterr().err
    assert [step for step, _ in whole(tmp_path / "run" / "checkpoints")] == [5, 10, 15]
    assert not (tmp_path / "run" / "hf").exists()


def test_a_model_that_is_not_finite_is_never_saved(tiny, run, tmp_path, monkeypatch, capsys):
    """Nor does its checkpoint rotate out the last sound one."""
    real = checkpoint.Checkpointer.save

    def save(self, step):
        if step == 10:
            next(self.model.parameters()).data[-1, -1] = math.inf
        real(self, step)

    monkeypatch.setattr(checkpoint.Checkpointer, "save", save)
    assert not run(tiny.flags(tmp_path / "run", keep=1))
    assert (
        "error: step 10: the model is not finite and was not saved; the newest sound checkpoint is step-00000005"
        in (capsys.readouterr().err)
    )
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000005"]
    monkeypatch.undo()


# --- signals -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """A whole run; its folder."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *tiny.flags(out)])
        train.main()
    return out


def send(number: int) -> None:
    """To this process; and time for the thread that notes it."""
    os.kill(os.getpid(), number)
    time.sleep(0.05)


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
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        send_during(patch, phase, number)
        assert run(tiny.flags(out))
    expected = PHASES[phase][3]
    assert f"stopped by {signal.Signals(number).name} after step {expected}; the same" in capsys.readouterr().err
    assert [step for step, _ in whole(out / "checkpoints")][-1:] == ([expected] if expected else [])
    assert not (out / "hf").exists()
    for original in StopSignal.SIGNALS:
        assert signal.getsignal(original) in (signal.SIG_DFL, signal.default_int_handler)
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


# --- damaged checkpoints -------------------------------------------------------------------------------------------


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a bit of the weights": lambda folder: flip(next(folder.glob("*.distcp"))),
    "half a file": lambda folder: os.truncate(next(folder.glob("*.distcp")), 20_000),
    "no index": lambda folder: (folder / ".metadata").unlink(),
    "DONE": lambda folder: (folder / "DONE").write_text("{"),
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


# --- waiting and compiling -----------------------------------------------------------------------------------------


class Syncs(TorchDispatchMode):
    """Counts in this thread the operations that hand a number of the device to Python, by the part of the run they fall into."""

    def __init__(self):
        super().__init__()
        self.part, self.count = "start", {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten._local_scalar_dense.default:
            self.count[self.part] = self.count.get(self.part, 0) + 1
        return op(*args, **(kwargs or {}))


def test_no_host_sync_between_log_steps(tiny, run, tmp_path, monkeypatch):
    """Clipping, the guard, the schedule, metrics, a finished checkpoint: none reads a number off the device."""
    with Syncs() as syncs:
        real_flush, real_restart = Metrics.flush, Metrics.restart_clock

        def flush(self, wait_s):
            syncs.part = "pause"
            real_flush(self, wait_s)

        def restart_clock(self):
            real_restart(self)
            syncs.part = "run"

        monkeypatch.setattr(Metrics, "flush", flush)
        monkeypatch.setattr(Metrics, "restart_clock", restart_clock)
        assert run(tiny.flags(tmp_path / "run", log_every=10, checkpoint_every=10))
    assert syncs.count["pause"] > 0  # so the counting works
    assert "run" not in syncs.count


def test_nothing_is_compiled_after_the_second_step(tiny, run, tmp_path, monkeypatch):
    """Through evaluations and checkpoints, with document borders that change every step."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend="aot_eager", **options))
    torch._dynamo.reset()
    counters.clear()
    graphs = {}
    real_add = Metrics.add
    monkeypatch.setattr(
        Metrics, "add",
        lambda self, step, *rest: (real_add(self, step, *rest), graphs.update({step: counters["stats"]["unique_graphs"]})),
    )  # fmt: skip
    assert run([*tiny.flags(tmp_path / "run", eval_every=7), "--compile"])
    assert graphs[2] >= 1
    assert set(list(graphs.values())[1:]) == {graphs[2]}
    assert counters["stats"]["unique_graphs"] == graphs[2]


# --- two ranks -----------------------------------------------------------------------------------------------------


def _noted(calls: list, real, tensor, *args, **kwargs):
    calls.append(tensor.numel())
    return real(tensor, *args, **kwargs)


def _two_ranks(rank, steps, tiny_flags, folder):
    """Everything that needs two ranks, in one go: processes are dear."""
    world, found = parallel.start(PLAIN), {}
    # FSDP's parameters are DTensors: rank 1 alone meets a NaN, both skip.
    model = build(PLAIN, world)
    optimizer, watch = optim.make_adamw(model, PLAIN), Guard(CPU)
    stop = StopSignal(world)
    with Syncs() as syncs:
        for i in range(3):
            micro = [steps[2 * i + rank]]
            before = [p.to_local().clone() for p in model.parameters()]
            loss, _ = train.add_gradients(model, iter(micro), 1, 2, world, stop)
            if (rank, i) == (1, 1):
                next(model.parameters()).grad.to_local()[0] = math.nan
            norm = optim.clip(model, 1.0)
            verdict = watch.judge(loss, norm)
            guard.step(optimizer, verdict[0])
            optimizer.zero_grad()
            same = [torch.equal(a, p.to_local()) for a, p in zip(before, model.parameters(), strict=True)]
            found[f"step {i}"] = (verdict[0].clone(), same)
    found["syncs"], found["counts"] = dict(syncs.count), watch.counts
    stop.close()
    # HSDP: three micro-batches, one sum across the replicas per group of parameters; the same gradients.
    for name, config in (("plain", PLAIN), ("replicas", dataclasses.replace(PLAIN, replicas=2))):
        model, stop = build(config, world), StopSignal(world)
        calls = []
        _fsdp_collectives.dist.all_reduce = partial(_noted, calls, dist.all_reduce)
        train.add_gradients(model, iter(steps[rank::2]), 3, 6, world, stop)
        dist.all_reduce = dist.all_reduce.args[1]
        stop.close()
        grads = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
        found[name] = (len([n for n in calls if n > 1]), grads)
    # Prefetching: a block is gathered before the one in front of it has computed.
    order, unshard = [], _fsdp_param_group.FSDPParamGroup.unshard
    _fsdp_param_group.FSDPParamGroup.unshard = lambda self, *a: (
        order.append(("gather", self._module_fqn)),
        unshard(self, *a),
    )[1]
    model = build(PLAIN, world)
    for i, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda *_, i=i: order.append(("computed", f"model.layers.{i}")))
    with torch.no_grad():
        model(steps[rank], torch.tensor(1.0))
    found["order"] = order
    torch.save(found, folder / f"{rank}.pt")
    # train.py: rank 1 alone gets a signal, in its eighth step.
    real, calls = parallel.all_reduce_gradients, [0]

    def all_reduce_gradients(*args):
        calls[0] += 1
        if rank == 1 and calls[0] == 2 * 7 + 1:
            send(signal.SIGUSR1)
        return real(*args)

    parallel.all_reduce_gradients = all_reduce_gradients
    train.train(parse(tiny_flags), world)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tiny, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("ranks")
    steps = [batch(5, 20, 7), batch(4, 4, 4, 4, 4, 4, 4, 4)] * 3
    spawn(_two_ranks, steps, tiny.flags(folder / "run", log_every=20, checkpoint_every=20), folder)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_a_nan_on_one_rank_skips_the_step_on_both(two_ranks):
    for found in two_ranks[1]:
        assert [bool(found[f"step {i}"][0]) for i in range(3)] == [False, True, False]
        assert [all(found[f"step {i}"][1]) for i in range(3)] == [False, True, False]
        assert found["counts"].tolist() == [2, 0]


def test_no_host_sync_on_two_ranks(two_ranks):
    for found in two_ranks[1]:
        assert found["syncs"] == {}


def test_replicas_sum_once_a_step(two_ranks):
    for found in two_ranks[1]:
        assert found["plain"][0] == 0
        assert found["replicas"][0] == 3 + 2  # blocks; embedding, norm with head
        for name, grad in found["plain"][1].items():
            torch.testing.assert_close(found["replicas"][1][name], grad, rtol=1e-5, atol=1e-7, msg=name)


def test_the_next_block_is_gathered_before_this_one_has_computed(two_ranks):
    order = two_ranks[1][0]["order"]
    for i in range(2):
        assert order.index(("gather", f"model.layers.{i + 1}")) < order.index(("computed", f"model.layers.{i}"))


def test_a_signal_to_one_rank_stops_both_at_the_same_step(two_ranks, tiny, run, undisturbed, capsys):
    """Within two steps; both left with exit status 0, or spawn had raised. One rank goes on, to the same end."""
    (saved,) = whole(two_ranks[0] / "run" / "checkpoints")
    assert saved[0] in (7, 8, 9)
    assert run(tiny.flags(two_ranks[0] / "run"))
    assert read_losses(two_ranks[0] / "run") == pytest.approx(read_losses(undisturbed), rel=1e-5)
