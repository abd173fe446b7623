"""What only the cross-entropy kernel promises: its place in memory, its extremes, its symmetries."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_cases import DEVICE, targets_for
from nanomed.kernels import cross_entropy as module
from nanomed.kernels.cross_entropy import IGNORED, cross_entropy, cross_entropy_torch

ONE = torch.tensor(1.0, device=DEVICE)


def random_logits(n: int, v: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, v, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def loss_and_grad(logits, targets, scale=ONE, z_loss=0.0, function=cross_entropy):
    """(loss, gradient) of a copy of the logits."""
    leaf = logits.clone().requires_grad_()
    loss = function(leaf * 1, targets, scale, z_loss)
    loss.backward()
    return loss.detach(), leaf.grad


def assert_exact(logits, targets, scale=ONE, z_loss=0.0, rtol=2e-6):
    """Loss and gradient against float64 of the torch twin."""
    right = loss_and_grad(logits.double(), targets, scale.double(), z_loss, cross_entropy_torch)
    for x, y in zip(loss_and_grad(logits, targets, scale, z_loss), right, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=rtol, atol=rtol * y.abs().max().item())


def test_the_gradient_takes_the_place_of_the_logits():
    """No second N x V buffer: the gradient that comes back is the logits' memory, and rows are walked by their stride."""
    wide = torch.full((4, 10), 5.0, device=DEVICE)
    wide[:, :7] = random_logits(4, 7)
    logits, targets = wide[:, :7].requires_grad_(), targets_for(4, 7)
    right = loss_and_grad(logits.detach(), targets)[1]
    loss = cross_entropy(logits, targets, ONE)
    assert torch.equal(wide[:, :7].detach(), right)
    assert (wide[:, 7:] == 5).all()  # between the rows nothing is touched
    (grad,) = torch.autograd.grad(loss, logits, torch.tensor(-0.7, device=DEVICE))
    assert grad.data_ptr() == wide.data_ptr()
    torch.testing.assert_close(grad, right * -0.7)
    assert (wide[:, 7:] == 5).all()


def test_without_a_gradient_the_logits_stay():
    logits, targets = random_logits(4, 9), targets_for(4, 9)
    before = logits.clone()
    loss = cross_entropy(logits, targets, ONE)
    with torch.no_grad():
        assert torch.equal(cross_entropy(logits.requires_grad_(), targets, ONE), loss)
    assert torch.equal(logits, before)


def test_logits_that_an_earlier_operation_needs_are_refused():
    """tanh keeps its output for backward; overwritten it would give a wrong gradient, so torch must notice."""
    leaf = random_logits(3, 5).requires_grad_()
    loss = cross_entropy(leaf.tanh(), targets_for(3, 5), ONE)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_backward_is_refused():
    loss = cross_entropy(random_logits(3, 5).requires_grad_() * 1, targets_for(3, 5), ONE)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward"):
        loss.backward()


@pytest.mark.parametrize("v", [module.MAX_BLOCK - 1, module.MAX_BLOCK, module.MAX_BLOCK + 1, 2 * module.MAX_BLOCK + 5])
def test_vocabularies_around_a_block(v):
    logits = random_logits(4, v)
    targets = torch.tensor([0, v - 1, v // 2, IGNORED], device=DEVICE)
    assert_exact(logits, targets, ONE / 3, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_ignored_is_zero_with_zero_gradients(dtype):
    """torch gives NaN here. The zeros have to be written: the buffer holds logits, which may be infinite."""
    logits = random_logits(3, 20).to(dtype)
    logits[0, 0] = float("inf")
    loss, grad = loss_and_grad(logits, torch.full((3,), IGNORED, device=DEVICE), z_loss=0.1)
    assert loss == 0
    assert not grad.any()


@pytest.mark.parametrize("value", [0.0, 1e4, -1e4])
def test_equal_and_large_logits(value):
    """All the same, or far from zero: the loss is log V, and nothing overflows."""
    logits = torch.full((2, 30), value, device=DEVICE)
    targets = torch.tensor([0, 29], device=DEVICE)
    assert_exact(logits, targets)
    assert loss_and_grad(logits, targets)[0].item() == pytest.approx(2 * torch.tensor(30.0).log().item(), rel=1e-6)


def test_a_spread_of_20_000():
    """Winner 1e4, loser -1e4: the loss of a loser is 20,000, its gradient -1; the winner's is 0, without NaN."""
    logits = torch.full((2, 5), -1e4, device=DEVICE)
    logits[:, 2] = 1e4
    loss, grad = loss_and_grad(logits, torch.tensor([2, 0], device=DEVICE))
    assert loss == 2e4
    assert torch.equal(grad[0], torch.zeros(5, device=DEVICE))
    assert torch.equal(grad[1], torch.tensor([-1.0, 0, 1, 0, 0], device=DEVICE))


def test_a_certain_prediction_keeps_its_digits():
    """p → 1: p − 1 formed in bf16 would be 0 or off by half; formed in float32 it is right to bf16's last place."""
    logits = torch.zeros(1, 64, device=DEVICE)
    logits[0, 3] = 11.0  # p = 0.99895
    logits, targets = logits.bfloat16(), torch.tensor([3], device=DEVICE)
    grad = loss_and_grad(logits, targets)[1][0, 3].item()
    right = loss_and_grad(logits.double(), targets, ONE.double(), 0.0, cross_entropy_torch)[1][0, 3].item()
    assert right == pytest.approx(-1.05e-3, rel=0.01)
    assert grad == pytest.approx(right, rel=2**-8)


def test_columns_of_minus_infinity():
    """Padding of a vocabulary, a whole first block of it too: probability and gradient 0, not NaN."""
    v = module.MAX_BLOCK + 100
    logits = random_logits(2, v)
    logits[:, : module.MAX_BLOCK + 3] = float("-inf")
    targets = torch.tensor([v - 1, v - 2], device=DEVICE)
    loss, grad = loss_and_grad(logits, targets, z_loss=1e-3)
    part = loss_and_grad(logits[:, -97:].contiguous(), targets - (v - 97), z_loss=1e-3)
    torch.testing.assert_close(loss, part[0])
    torch.testing.assert_close(grad[:, -97:], part[1])
    assert not grad[:, :-97].any()


@pytest.mark.parametrize("target", [-1, 7, 10**9])
def test_a_target_outside_the_vocabulary_is_a_nan_and_reads_nothing(target):
    """The loader is where such are found; here the loss must not be a plausible number out of foreign memory."""
    loss, _ = loss_and_grad(random_logits(2, 7), torch.tensor([1, target], device=DEVICE))
    assert loss.isnan()


def test_a_nan_stays_in_its_row():
    logits, targets = random_logits(4, 40), torch.tensor([3, 4, 5, 6], device=DEVICE)
    clean = loss_and_grad(logits, targets)[1]
    logits[2, 7] = float("nan")
    loss, grad = loss_and_grad(logits, targets)
    assert loss.isnan()
    assert grad[2].isnan().all()
    assert torch.equal(grad[[0, 1, 3]], clean[[0, 1, 3]])


@settings(max_examples=25, deadline=None)
@given(v=st.integers(1, 300), c=st.floats(-50, 50), scale=st.floats(1e-3, 5), z_loss=st.sampled_from([0.0, 1e-2]))
def test_symmetries(v, c, scale, z_loss):
    """A constant added to a row changes nothing (without z-loss); each gradient row sums to its z-loss term; tokens may
    stand in any order; the scale scales."""
    logits, targets = random_logits(5, v, seed=v), targets_for(5, v)
    loss, grad = loss_and_grad(logits, targets, z_loss=z_loss)
    if not z_loss:
        torch.testing.assert_close(loss_and_grad(logits + c, targets)[1], grad, rtol=1e-4, atol=2e-5)
    of_z = 2 * z_loss * torch.logsumexp(logits, 1) * (targets != IGNORED)
    torch.testing.assert_close(grad.sum(1), of_z, rtol=1e-4, atol=1e-5)
    order = torch.tensor([3, 0, 4, 1, 2], device=DEVICE)
    shuffled = loss_and_grad(logits[order], targets[order], z_loss=z_loss)
    torch.testing.assert_close(shuffled[0], loss)
    assert torch.equal(shuffled[1], grad[order])
    scaled = loss_and_grad(logits, targets, torch.tensor(scale, device=DEVICE), z_loss)
    torch.testing.assert_close(scaled[0], loss * scale)
    torch.testing.assert_close(scaled[1], grad * scale, rtol=1e-5, atol=1e-7)
