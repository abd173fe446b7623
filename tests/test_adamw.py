"""The optimiser's kernels against their torch twins: the same noise, the same codes, and no number touched beyond the last."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchao.optim.quant_utils import create_dynamic_map, quantize_8bit_with_qmap

from kernel_cases import DEVICE
from nanomed.kernels import adamw
from nanomed.kernels.adamw import TILE, adamw_, adamw_torch_, add_rounded_, add_rounded_torch_, draw_seed
from nanomed.kernels.common import jit, tl


def behind(x: torch.Tensor) -> torch.Tensor:
    """x on the device, before two tiles of 42s: a store without its mask lands there."""
    buffer = torch.full((x.numel() + 2 * TILE,), 42, dtype=x.dtype, device=DEVICE)
    buffer[: x.numel()] = x.flatten().to(DEVICE)
    return buffer[: x.numel()].view(x.shape)


def untouched(x: torch.Tensor) -> bool:
    """Are the 42s behind it still there?"""
    return bool((x.new_empty(0).set_(x.untyped_storage())[x.numel() :] == 42).all())


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**31 - 1))
def test_sums_have_the_bits_of_the_twin(n, seed):
    """Any size, any seed; infinities and NaN too."""
    generator = torch.Generator().manual_seed(seed)
    total, grad = (torch.randn(n, generator=generator).bfloat16() for _ in range(2))
    total[0] = float("inf")
    grad[n // 2 :: 97] = float("nan")
    ours, twin, seed = behind(total), behind(total), torch.tensor(seed, dtype=torch.int32)
    add_rounded_(ours, grad.to(DEVICE), seed)
    add_rounded_torch_(twin, grad.to(DEVICE), seed)
    torch.testing.assert_close(ours, twin, rtol=0, atol=0, equal_nan=True)
    assert untouched(ours)


@jit
def _rounded_of(x_ptr, y_ptr, seed, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, adamw._rounded(tl.load(x_ptr + at), at, seed))


def test_what_is_not_finite_stays():
    """A GPU's NaN is all ones: the carry of the noise would make -0 of it."""
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7F800000, -0x800000, 0x7F7FFFFF, 0, 1], dtype=torch.int32)
    x = bits.view(torch.float32).to(DEVICE)
    y = torch.empty_like(x)
    for seed in range(20):
        _rounded_of[(1,)](x, y, seed, BLOCK=8)
        assert y[:3].isnan().all()
        assert torch.equal(y[3:5], x[3:5])
        assert torch.equal(y.bfloat16().float()[3:], y[3:])


def test_nothing_to_do_is_nothing_done():
    empty = torch.empty(0, dtype=torch.bfloat16, device=DEVICE)
    add_rounded_(empty, empty, draw_seed())


@jit
def _codes_of(x_ptr, code_ptr, N, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < N, other=0.0)
    tl.store(code_ptr + at, adamw._codes(x, SIGNED), mask=at < N)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_of_torchaos_map(signed):
    """Every number of the map is its own code; between two, all but within rounding of the middle go to the nearer."""
    qmap = torch.tensor(create_dynamic_map(signed=signed))
    magnitudes = torch.cat((torch.logspace(-8, 0, 20_000), torch.linspace(0, 1, 20_000)))
    middles = (qmap[1:] + qmap[:-1]) / 2
    x = torch.cat((qmap, magnitudes, -magnitudes if signed else magnitudes, middles * (1 + 1e-5), middles * (1 - 1e-5)))
    x = x.clamp(-1.0 if signed else 0.0, 1.0)
    codes = torch.empty(len(x), dtype=torch.uint8, device=DEVICE)
    _codes_of[(-(-len(x) // 1024),)](x.to(DEVICE), codes, len(x), SIGNED=signed, BLOCK=1024)
    codes, theirs = codes.cpu().int(), quantize_8bit_with_qmap(x, qmap).int()
    assert codes[:256].tolist() == list(range(256))
    if not signed:  # torchao rounds to 0 what is nearer to it; ours keeps 0 for 0 alone
        theirs[(theirs == 0) & (x > 0)] = 1
    differ = codes != theirs
    distance = (qmap[codes] - x).abs() - (qmap[theirs] - x).abs()
    assert differ.float().mean() < 1e-3
    assert (distance[differ] <= 1e-6 * x[differ].abs()).all()


def states(dtype: torch.dtype, moments: str, rows: int, block: int):
    """(p, grad, exp_avg, exp_avg_sq, scales), each in front of canaries."""
    generator = torch.Generator().manual_seed(0)
    shape = (rows, block) if moments == "int8" else (rows * block,)
    p, grad = (behind(torch.randn(shape, generator=generator).to(dtype)) for _ in range(2))
    of_moment = torch.uint8 if moments == "int8" else torch.bfloat16 if moments == "bf16" else torch.float32
    m, v = (behind(torch.zeros(shape, dtype=of_moment)) for _ in range(2))
    return p, grad, m, v, [behind(torch.zeros(rows)) if moments == "int8" else None for _ in range(2)]


def three_steps(update, tensors, moments: str, skipped: int | None) -> None:
    """Steps 1 to 3 with gradients that change, divided by 2; the one that is to be skipped meets a NaN."""
    p, grad, m, v, scales = tensors
    maps = [torch.tensor(create_dynamic_map(signed=s), device=DEVICE) for s in (True, False)]
    numbers = [torch.tensor(x) for x in (1e-2, 0.1)]
    grad_scale = torch.tensor(2.0, device=DEVICE)
    for step in range(1, 4):
        g = grad * step + 0.01
        if step == skipped:
            g[..., 3] = float("nan")
        corrections = [torch.tensor(1 - beta**step, device=DEVICE) for beta in (0.9, 0.95)]
        skip = torch.tensor(float(step == skipped), device=DEVICE) if skipped else None
        seed = torch.tensor(12345 * step, dtype=torch.int32)
        used = maps if moments == "int8" else [None, None]
        update(p, g, m, v, scales, used, *numbers, corrections, skip, grad_scale, seed, 0.9, 0.95, 1e-8)


@pytest.mark.parametrize("skipped", [None, 2])
@pytest.mark.parametrize(("rows", "block"), [(5, 256), (9, 192), (3, 32), (1, 100)])
@pytest.mark.parametrize("moments", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_are_those_of_the_twin(dtype, moments, rows, block, skipped):
    """Weights, moments and scales, sizes off the tile, one program and several, with and without a skipped step."""
    ours, twin = states(dtype, moments, rows, block), states(dtype, moments, rows, block)
    before = ours[0].clone()
    three_steps(adamw_, ours, moments, skipped)
    three_steps(adamw_torch_, twin, moments, skipped)
    for x, y in zip([*ours[:4], *ours[4]], [*twin[:4], *twin[4]], strict=True):
        if x is None:
            continue
        assert untouched(x)
        if x.dtype == torch.uint8:
            assert ((x.int() - y.int()).abs() <= 1).all()
            assert (x != y).sum() <= max(2, 0.01 * x.numel())
        else:  # bf16: what is rounded may differ in its last bit, and then falls to the other side
            rel = 2**-7 if x.dtype == torch.bfloat16 else 1e-5
            # A code that fell to its other neighbour has moved the steps after it, by less than a hundredth of lr.
            torch.testing.assert_close(x, y, rtol=rel, atol=1e-4 if moments == "int8" else 1e-6)
            assert (~torch.isclose(x, y, rtol=rel, atol=1e-6)).float().mean() <= 0.01
            assert (x != y).float().mean() < 0.02 or x.dtype == torch.float32
    assert not torch.equal(ours[0], before)


def test_a_skipped_step_touches_nothing():
    tensors = states(torch.bfloat16, "int8", 3, 256)
    three_steps(adamw_, tensors, "int8", None)
    before = [x.clone() for x in (*tensors[:4], *tensors[4])]
    maps = [torch.tensor(create_dynamic_map(signed=s), device=DEVICE) for s in (True, False)]
    one, nan = torch.ones((), device=DEVICE), torch.full_like(tensors[1], float("nan"))
    numbers = [torch.tensor(x) for x in (1e-2, 0.1)]
    p, _, m, v, scales = tensors
    adamw_(p, nan, m, v, scales, maps, *numbers, [one, one], one, None, draw_seed(), 0.9, 0.95, 1e-8)
    assert all(torch.equal(x, y) for x, y in zip((*tensors[:4], *tensors[4]), before, strict=True))
