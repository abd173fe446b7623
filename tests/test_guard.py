"""Steps that must not be made: which ones, and that they leave no trace."""

import copy
import math
import statistics
import time

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

import train
from conftest import rows_of
from nanomed import InputError, batches, checkpoint, guard, optim
from nanomed.batches import documents
from nanomed.checkpoint import whole
from nanomed.config import Config
from nanomed.guard import LEAST, MAX_SKIPS, MIN_STEPS, SIGMAS, WINDOW, Guard
from nanomed.stream import Stream, open_sources

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
    """Neither parameters nor moments nor the step count, whatever the gradients hold; the next step is made as ever."""
    model = nn.Linear(5, 3)
    optimizer = optimizers(model)[name]
    before, states = copy.deepcopy(model.state_dict()), None
    for bad in (False, True, False):
        for p in model.parameters():
            p.grad = torch.full_like(p, math.nan if bad else 0.5)
        guard.step_unless(torch.tensor(bad), optimizer)
        after = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
        if bad:
            torch.testing.assert_close(after, (before, states), rtol=0, atol=0)
        else:
            assert not torch.equal(after[0]["weight"], before["weight"])
        before, states = after
    assert {int(s["step"]) for s in states.values()} == {2}


def poison(monkeypatch, bad: dict[int, float], tiny) -> None:
    """Multiply the loss, and so all gradients, of these steps (from 1) by a number."""
    real, calls = train.forward_backward, [0]

    def forward_backward(model, loader, *rest):
        calls[0] += 1
        loss, len2 = real(model, loader, *rest)
        factor = bad.get(calls[0], 1.0)
        for p in model.parameters():
            p.grad.mul_(factor)
        return loss * factor, len2

    monkeypatch.setattr(train, "forward_backward", forward_backward)


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
    assert all(rows[s]["loss"] == expected[s]["loss"] and rows[s]["lr"] == expected[s]["lr"] for s in rows if s not in bad)
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
    """With exit status 1 and one line; checkpoints of before the trouble stay, the one still being written too."""
    seal = checkpoint.Checkpointer._seal
    monkeypatch.setattr(checkpoint.Checkpointer, "_seal", lambda *args: time.sleep(0.5) or seal(*args))
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
    assert "error: step 10: the model is not finite and was not saved; the newest sound checkpoint is step-00000005" in (
        capsys.readouterr().err
    )
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000005"]
    monkeypatch.undo()
