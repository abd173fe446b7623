"""AdamW's groups and states, clipping, and the schedule."""

import copy
import dataclasses
from itertools import pairwise

import pytest
import torch
from torch import nn

from nanomed import optim
from nanomed.config import Config


def small() -> nn.Module:
    return nn.Sequential(nn.Embedding(10, 6), nn.RMSNorm(6), nn.Linear(6, 4), nn.Linear(4, 3, bias=False))


def with_gradients(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    return model


def test_schedule_by_hand():
    """Ten steps, warm-up of four: a quarter more each step up to the peak, then down; the last step still learns."""
    config = Config(lr=1.2, warmup_steps=4)
    expected = [0.3, 0.6, 0.9, 1.2, 1.2, 1.0, 0.8, 0.6, 0.4, 0.2]
    assert [optim.lr_at(s, 10, config) for s in range(10)] == pytest.approx(expected)
    assert optim.lr_at(10, 10, config) == 0  # the step after the last


def test_schedule_without_warmup_begins_at_the_peak():
    assert [optim.lr_at(s, 4, Config(lr=1.0, warmup_steps=0)) for s in range(4)] == pytest.approx([1, 0.75, 0.5, 0.25])


def test_the_papers_schedule():
    """500 steps up, then straight down to 0: the peak is reached at the end of warm-up and nowhere exceeded."""
    config = Config(lr=1e-5, warmup_steps=500)
    lrs = [optim.lr_at(s, 5000, config) for s in range(5000)]
    assert max(lrs) == lrs[499] == 1e-5
    assert all(lr > 0 for lr in lrs)
    down = [a - b for a, b in pairwise(lrs[500:])]
    assert down == pytest.approx([1e-5 / 4500] * len(down))


def test_set_lr_reaches_all_groups():
    optimizer = optim.make_adamw(small(), Config())
    optim.set_lr(optimizer, 0.125)
    assert [g["lr"] for g in optimizer.param_groups] == [0.125, 0.125]


def test_no_decay_on_norms_and_biases():
    """With a gradient of zero only decay moves a parameter."""
    model = small()
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer = optim.make_adamw(model, Config(lr=0.1, weight_decay=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 1.0 if name in ("1.weight", "2.bias") else 1 - 0.1 * 0.5
        torch.testing.assert_close(p.data, before[name].data * factor, msg=name)


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_states_are_there_before_the_first_step_in_their_dtype(name, dtype):
    """So that a checkpoint has something to load into; and the first step keeps them and their dtype."""
    model = with_gradients(small())
    optimizer = optim.make_adamw(model, Config(optimizer_states=name))
    before = {p: optimizer.state[p]["exp_avg"] for p in model.parameters()}
    optimizer.step()
    for p in model.parameters():
        state = optimizer.state[p]
        assert state["step"] == 1
        assert state["exp_avg"] is before[p] or name == "bf16"  # which the CPU's kernel knows not: widened for the step
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == dtype
        assert state["exp_avg"].any()
        assert p.dtype == torch.float32


def test_steps_equal_torchs_plain_adamw():
    """Fused, with states made beforehand: the same as torch's own loop; with bf16 states nearly."""
    config = Config(lr=1e-2, weight_decay=0.1, beta1=0.8, beta2=0.9, eps=1e-6)
    start = small()
    reference = copy.deepcopy(start)
    plain = torch.optim.AdamW(
        [
            {"params": [p for p in reference.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in reference.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=1e-2, betas=(0.8, 0.9), eps=1e-6, foreach=False, fused=False,
    )  # fmt: skip
    ours = {"fp32": copy.deepcopy(start), "bf16": copy.deepcopy(start)}
    optimizers = {k: optim.make_adamw(m, Config(**vars(config) | {"optimizer_states": k})) for k, m in ours.items()}
    for _ in range(5):
        with_gradients(reference)
        plain.step()
        for k, model in ours.items():
            with_gradients(model)
            optimizers[k].step()
    for k, tolerance in (("fp32", 1e-6), ("bf16", 1e-3)):
        for p, q in zip(ours[k].parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=tolerance)


@pytest.mark.parametrize("states", ["fp32", "bf16"])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clip_equals_torchs(max_norm, states):
    """Also where the norm is below the limit and nothing is scaled."""
    model = with_gradients(small())
    reference = with_gradients(copy.deepcopy(model))
    config = Config(lr=1e-2, eps=1e-2, weight_decay=0.0, compile=False)  # eps: without, AdamW would hide the scale
    ours = optim.make_adamw(model, dataclasses.replace(config, optimizer_states=states))
    theirs = optim.make_adamw(reference, config)
    expected = nn.utils.clip_grad_norm_(reference.parameters(), max_norm)
    assert torch.equal(optim.clip(model, ours, max_norm), expected)
    ours.step()
    theirs.step()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-7 if states == "fp32" else 1e-3 * config.lr)
