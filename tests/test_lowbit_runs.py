"""Lean runs go on bit for bit, alone and on two ranks; float8's wiring; what this machine cannot do is refused."""

import dataclasses
import json
import shutil
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

import train
from conftest import read_losses
from nanomed import InputError, checkpoint, config, lowbit, optim, parallel
from nanomed.checkpoint import Checkpointer
from nanomed.config import Config
from nanomed.guard import Guard
from nanomed.weights import local
from test_lowbit import LEAN
from test_parallel import ALONE, PLAIN, batch, build, spawn

# --- whole runs and checkpoints ------------------------------------------------------------------------------------


def run_in_process(monkeypatch, flags: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    train.main()


@pytest.mark.parametrize("states", ["bf16", "int8"])
def test_a_lean_run_resumes_bit_identically(states, tiny, tmp_path, monkeypatch):
    """Six steps at once, and again from step 3's checkpoint; two micro-batches a step, rounded stochastically."""
    flags = dict(precision="pure-bf16", optimizer_states=states, steps=6, batch_tokens=128, checkpoint_every=3,
                 eval_every=100, val=None, compile=None)  # fmt: skip
    for out in ("whole", "parts"):
        run_in_process(monkeypatch, [*tiny.flags(tmp_path / out, **flags), "--no-compile"])
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert read_losses(parts) == read_losses(whole)
    for name in ("checkpoints/step-00000006", "hf"):
        shutil.rmtree(parts / name)
    rows = [json.loads(line) for line in (parts / "metrics.jsonl").read_text().splitlines()]
    run_in_process(monkeypatch, [*tiny.flags(parts, **flags), "--no-compile"])
    again = [json.loads(line) for line in (parts / "metrics.jsonl").read_text().splitlines()]
    assert [r.get("loss") for r in again] == [r.get("loss") for r in rows]
    assert len({r["loss"] for r in rows if "loss" in r}) == 6
    assert (parts / "hf/model.safetensors").read_bytes() == (whole / "hf/model.safetensors").read_bytes()


def steps(config_: Config, world: parallel.World, folder, n_steps: int, resume: bool) -> dict:
    """n_steps on this world, from the checkpoint in folder if asked, saved there at the end; weights and moments whole."""
    model = build(config_, world)
    optimizer = optim.make_adamw(model, config_)
    checkpoints = Checkpointer(folder, 2, model, optimizer, Guard(world.device), world)
    first = checkpoints.resume() if resume else 0
    for step in range(first, n_steps):
        torch.manual_seed(step)
        data = [batch(5, 20, 7), batch(4, 28)]
        torch.manual_seed(step * world.size + world.rank)
        for one in data[world.rank :: world.size]:
            model(one, torch.tensor(1 / 60)).backward()
        optim.clip(model, optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    checkpoints.save(n_steps)
    checkpoints.wait()
    whole = lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t.detach().clone()  # noqa: E731
    named = dict(model.named_parameters())
    found = {name: whole(p) for name, p in named.items()}
    return found | {f"{name} {k}": whole(v) for name, p in named.items() for k, v in optimizer.state[p].items()}


def _two_ranks(rank, folder):
    world = parallel.start(LEAN)
    results = [steps(LEAN, world, folder / "a", 6, False), steps(LEAN, world, folder / "b", 3, False)]
    results += [steps(LEAN, world, folder / "b", 6, True)]
    offloaded = dataclasses.replace(LEAN, offload=True)
    results += [steps(offloaded, world, folder / "c", 6, False)]
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


def test_two_ranks_resume_bit_identically_and_one_rank_takes_over(tmp_path):
    """int8 moments and bf16 weights of two ranks: same bits after a restart, and re-cut for one rank nothing is lost."""
    spawn(_two_ranks, tmp_path)
    six, three, resumed, offloaded = torch.load(tmp_path / "results.pt")
    assert any(v.dtype == torch.uint8 and v.any() for v in six.values())
    assert any(not torch.equal(v, three[k]) for k, v in six.items())
    for name, value in six.items():
        assert torch.equal(resumed[name], value), name
        assert torch.equal(offloaded[name], value), name
    world = parallel.start(LEAN)
    try:
        alone = steps(LEAN, dataclasses.replace(world, device=ALONE.device), tmp_path / "a", 6, True)  # loads, 0 steps
    finally:
        dist.destroy_process_group()
    for name, value in six.items():
        assert torch.equal(alone[name], value), name


def test_an_uneven_share_may_be_empty():
    """A rank may own no row of a small matrix."""
    p = nn.Parameter(torch.zeros(0, 64, dtype=torch.bfloat16))
    optimizer = lowbit.LowbitAdamW([{"params": [p], "weight_decay": 0.0}], 1e-5, (0.9, 0.95), 1e-8, "int8", "eager")
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert local(optimizer.state[p]["exp_avg"]).numel() == 0


# --- float8 --------------------------------------------------------------------------------------------------------


def test_float8_keeps_names_and_nearly_the_loss():
    """Emulated on the CPU: the blocks' linears are torchao's, lm_head is not, names and weights are the same."""
    data, low = batch(5, 20, 7), dataclasses.replace(PLAIN, precision="bf16")
    model, reference = build(low), build(low)
    names = dict(model.named_parameters())
    parallel.to_float8(model.model.layers, emulate=True)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in names.items()}
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Float8Linear"
    assert type(model.lm_head).__name__ == "Head"
    loss, expected = model(data, torch.tensor(1 / 32)), reference(data, torch.tensor(1 / 32))
    assert 0 < abs(loss - expected) / expected < 0.05
    loss.backward()
    assert all(p.grad.isfinite().all() for p in names.values())


# --- bad input -----------------------------------------------------------------------------------------------------


def refused(**fields) -> str:
    with pytest.raises(InputError) as error:
        config.check_machine(config.validated(dataclasses.replace(Config(data=("bins",), kernels="torch"), **fields)))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("flag", "fields"),
    [("--optimizer-states int8", {"optimizer_states": "int8"}), ("--float8", {"float8": True})],
)
def test_without_torchao(flag, fields, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setattr(config.importlib.util, "find_spec", lambda name: None)
    assert refused(**fields).startswith(f"{flag}: torchao is not installed; pip install")


def test_float8_on_a_cpu_and_on_an_old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--float8: needs a GPU" in refused(float8=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert "NVIDIA A100 has 8.0" in refused(float8=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert "--precision" in refused(float8=True, precision="fp32")
    assert "multiple of 16" in refused(float8=True, seq_len=8, batch_tokens=8)


def test_a_checkpoint_with_the_older_8_bit_moments_is_refused(tiny, tmp_path, run, monkeypatch, capsys):
    """It kept codes of v, which lost small values; read as codes of sqrt(v), every step would be wrong."""
    out, flags = tmp_path / "run", dict(optimizer_states="int8", steps=8, checkpoint_every=2, val=None)
    assert run(tiny.flags(out, **flags))
    shutil.rmtree(out / "hf")  # as if it had not finished
    capsys.readouterr()
    monkeypatch.setattr(checkpoint, "FORMER_SCALE", "exp_avg_sqrt_scale")  # so that today's counts as the older format
    assert not run(tiny.flags(out, **flags))
    assert "has 8-bit moments of an older format" in capsys.readouterr().err
