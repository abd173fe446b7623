"""Stochastic rounding, low-precision AdamW against torchao's and torch's, its memory."""

import copy
import dataclasses
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchao.optim import AdamW8bit

from nanomed import lowbit, optim, parallel
from nanomed.config import Config
from nanomed.kernels import adamw
from nanomed.kernels.adamw import draw_seed, noise, round_stochastically
from nanomed.lowbit import block_size
from test_parallel import PLAIN

LEAN = dataclasses.replace(PLAIN, precision="pure-bf16", optimizer_states="int8")


def to_nearest(x: torch.Tensor, _seed: torch.Tensor) -> torch.Tensor:
    """In the place of round_stochastically."""
    return x.bfloat16()


# --- rounding ------------------------------------------------------------------------------------------------------


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_rounding_gives_a_neighbour_and_keeps_what_bf16_holds(value):
    """Every result is one of the two bf16 numbers around x; a number that bf16 has never changes."""
    x = torch.full((64,), value)
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    low, exact = bits >> 16, bits & 0xFFFF == 0
    found = {b & 0xFFFF for b in round_stochastically(x, draw_seed()).view(torch.int16).tolist()}
    assert found <= ({low} if exact else {low, low + 1})


def test_rounding_is_right_on_average():
    """x lies 3/8 of the way from 1 to bf16's next number: up in 37.5 % of 200,000 draws, sd 0.11 %."""
    x = torch.full((200_000,), 1 + 2**-7 * 0.375)
    assert (round_stochastically(x, draw_seed()) > 1).float().mean().item() == pytest.approx(0.375, abs=0.006)
    assert (round_stochastically(-x, draw_seed()) < -1).float().mean().item() == pytest.approx(0.375, abs=0.006)


def test_rounding_keeps_what_is_not_finite():
    """Also a NaN of all ones, which the carry would turn into -0."""
    nan = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert round_stochastically(nan, draw_seed()).isnan().all()
    inf = torch.tensor([torch.inf, -torch.inf])
    assert torch.equal(round_stochastically(inf, draw_seed()).float(), inf)


def test_noise_is_noise():
    """Every bit is fair, whatever the other bits, the neighbour's and another seed's are; all 2^16 values come."""
    x, seeds = torch.empty(1 << 20), [draw_seed() for _ in range(2)]
    one, other = (noise(x, seed) for seed in seeds)
    assert torch.equal(one, noise(x.view(1024, 1024), seeds[0]).view(-1))
    assert 0 <= one.min() <= one.max() < 1 << 16
    counts = torch.bincount(one, minlength=1 << 16).double()
    chi2 = ((counts - 16) ** 2 / 16).sum().item()  # 65,535 degrees of freedom: standard deviation 362
    assert abs(chi2 - 65535) < 6 * 362
    bits = [[(values >> i) & 1 for i in range(16)] for values in (one[:-1], one[1:], other[:-1])]
    for i, a in enumerate(bits[0]):
        for b in [*bits[0][:i], *bits[1], *bits[2]]:
            assert (a ^ b).double().mean().item() == pytest.approx(0.5, abs=6 * 0.5 / 1024)


@pytest.mark.parametrize(("row", "block"), [(3584, 256), (18944, 256), (5120, 256), (576, 192), (32, 32), (31, None)])
def test_blocks_divide_rows(row, block):
    assert block_size(row) == block


# --- the step ------------------------------------------------------------------------------------------------------


def pair(dtype: torch.dtype, states: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Two matrices (rows of 256) and a vector, and their optimiser."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(256, 64), nn.Linear(512, 32, bias=False)).to(dtype)
    known = Config(compile=False, lr=1e-2, weight_decay=0.1, optimizer_states=states)
    return model, optim.make_adamw(model, known)


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for i, p in enumerate(model.parameters()):
        p.grad = torch.randn(p.shape, generator=generator).mul_(0.1**i).to(p.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_int8_moment_equals_torchaos(dtype, monkeypatch):
    """Codes and scales of five steps, to the bit; torchao in eager mode and rounding to nearest. (Its second moment is another.)"""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(adamw, "round_stochastically", to_nearest)
    (model, optimizer), (reference, _) = pair(dtype, "int8"), pair(dtype, "int8")
    groups = [{"params": [p for p in reference.parameters() if p.ndim > 1], "weight_decay": 0.1}]
    theirs = AdamW8bit(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for step in range(5):
        for m in (model, reference):
            set_gradients(m, step)
        optimizer.step()
        theirs.step()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        if p.ndim == 1:  # too short for torchao to quantise; ours keeps it in float32
            continue
        assert torch.equal(optimizer.state[p]["exp_avg"].view(-1), theirs.state[q]["exp_avg"].codes.view(-1))
        assert torch.equal(optimizer.state[p]["exp_avg_scale"].view(-1), theirs.state[q]["exp_avg"].scale)
        assert optimizer.state[p]["exp_avg"].any()


@pytest.mark.parametrize("outlier", [1.0, 100.0, 3e3, 1e4])
def test_int8_updates_stay_sane_beside_a_column_of_outliers(outlier):
    """Codes of v rounded small values to 0: the next update was thousands of lr. float32's largest is 1.8 lr here."""
    found = {}
    for states in ("fp32", "int8"):
        p = nn.Parameter(torch.zeros(64, 256))
        optimizer = lowbit.LowbitAdamW([{"params": [p], "weight_decay": 0.0}], 1.0, (0.9, 0.95), 1e-12, states, "eager")
        generator, largest = torch.Generator().manual_seed(0), 0.0
        for _ in range(24):
            p.grad = 1e-4 * torch.randn(64, 256, generator=generator) * torch.randn(64, 256, generator=generator).exp()
            p.grad[:, 7] *= outlier
            before = p.detach().clone()
            optimizer.step()
            largest = max(largest, (p - before).abs().max().item())
        found[states] = largest, (p - before).square().mean().sqrt().item()
    assert found["int8"][0] < 2.5 * found["fp32"][0]
    assert found["int8"][1] == pytest.approx(found["fp32"][1], rel=0.1)


def test_wide_moments_equal_torchs_adamw():
    """float32 throughout: the arithmetic is torch's."""
    model, _ = pair(torch.float32, "fp32")
    reference, theirs = pair(torch.float32, "fp32")
    groups = [{"params": [*model.parameters()], "weight_decay": 0.1}]
    ours = lowbit.LowbitAdamW(groups, 1e-2, (0.9, 0.95), 1e-8, "fp32", "eager")
    theirs.param_groups[1]["weight_decay"] = 0.1
    for step in range(5):
        for m in (model, reference):
            set_gradients(m, step)
        ours.step()
        theirs.step()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_compiled_equals_eager():
    """int8 moments of float32 weights draw nothing at random: the same codes up to a rounding at a border."""
    if not parallel.can_compile(torch.device("cpu")):
        pytest.fail("these tests need a C++ compiler")
    found = []
    for backend in ("eager", "compiled"):
        model = nn.Linear(256, 64, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.linspace(-0.1, 0.1, 64 * 256).view(64, 256))
        groups = [{"params": [model.weight], "weight_decay": 0.1}]
        optimizer = lowbit.LowbitAdamW(groups, 1e-2, (0.9, 0.95), 1e-8, "int8", backend)
        for step in range(3):
            set_gradients(model, step)
            optimizer.step()
        found.append((model.weight.detach(), optimizer.state[model.weight]["exp_avg_sqrt_scale"]))
    for eager, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("states", ["bf16", "int8"])
def test_small_updates_arrive_only_with_stochastic_rounding(states, monkeypatch):
    """Updates of 1e-5 on bf16 weights of 0.1, whose neighbours are 4.9e-4 apart."""
    moved = {}
    for name, rounding in (("stochastic", round_stochastically), ("nearest", to_nearest)):
        monkeypatch.setattr(adamw, "round_stochastically", rounding)
        p = nn.Parameter(torch.full((64, 256), 0.1, dtype=torch.bfloat16))
        start = p.float().mean().item()
        optimizer = lowbit.LowbitAdamW([{"params": [p], "weight_decay": 0.0}], 1e-5, (0.9, 0.95), 1e-8, states, "eager")
        for _ in range(20):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved[name] = start - p.float().mean().item()
    assert moved["nearest"] == 0
    assert moved["stochastic"] == pytest.approx(20 * 1e-5, rel=0.15)


@pytest.mark.parametrize("states", ["bf16", "int8"])
def test_a_skipped_step_changes_nothing(states):
    """found_inf of 1 with a NaN gradient: weights, moments and count stay; of 0: as without."""
    (model, optimizer), (other, plain) = pair(torch.float32, states), pair(torch.float32, states)
    for seed, bad in ((0, False), (1, True), (2, False)):
        set_gradients(model, seed)
        if bad:
            for p in model.parameters():
                p.grad.fill_(torch.nan)
        optimizer.found_inf = torch.tensor(float(bad))
        optimizer.step()
        if not bad:
            set_gradients(other, seed)
            plain.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(v, plain.state[q][k]) for k, v in optimizer.state[p].items())
        assert optimizer.state[p]["step"] == 2


def test_many_bf16_gradients_add_up(monkeypatch):
    """600 micro-batches of gradient 1: autograd's own bf16 sum stops at 256."""
    sums = {}
    for name, rounding in (("stochastic", round_stochastically), ("nearest", to_nearest)):
        monkeypatch.setattr(adamw, "round_stochastically", rounding)
        model = nn.Linear(64, 64, bias=False).bfloat16()
        optim.make_adamw(model, dataclasses.replace(LEAN))
        for _ in range(600):
            model.weight.sum().backward()
        lowbit.take_sums(model)
        sums[name] = model.weight.grad.float().mean().item()
    assert sums["nearest"] == 256
    assert sums["stochastic"] == pytest.approx(600, rel=0.01)


def test_float32_gradients_are_added_as_they_are():
    """The sum of bf16 ones is rounded; theirs must not be."""
    model = nn.Linear(64, 64)
    plain = copy.deepcopy(model)
    optim.make_adamw(model, Config(compile=False, optimizer_states="bf16"))
    for x in torch.randn(3, 7, 64):
        for each in (model, plain):
            each(x).square().sum().backward()
    lowbit.take_sums(model)
    assert torch.equal(model.weight.grad, plain.weight.grad)


def test_the_norm_of_bf16_gradients_is_exact_to_float32():
    model = nn.Linear(64, 64, bias=False).bfloat16()
    model.weight.grad = torch.randn(64, 64).bfloat16()
    expected = model.weight.grad.double().norm().float()
    norm = optim.clip(model, optim.make_adamw(model, LEAN), 1e6)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "states", "expected"),
    [("bf16", "fp32", 16), ("bf16", "bf16", 12), ("bf16", "int8", 10 + 8 / 256),
     ("pure-bf16", "fp32", 12), ("pure-bf16", "bf16", 8), ("pure-bf16", "int8", 6 + 8 / 256)],
)  # fmt: skip
def test_bytes_a_parameter(precision, states, expected):
    """Of all tensors that live from step to step, the module docstring's table; vectors keep float32 moments."""
    known = Config(precision=precision, optimizer_states=states, compile=False)
    model = nn.Linear(256, 512, bias=False).to(known.param_dtype)
    optimizer = optim.make_adamw(model, known)
    set_gradients(model, 0)
    optimizer.step()
    p = model.weight
    n_bytes = p.nbytes + p.grad.nbytes + sum(v.nbytes for k, v in optimizer.state[p].items() if k != "step")
    assert n_bytes / p.numel() == expected
