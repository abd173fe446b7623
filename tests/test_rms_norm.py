"""What only the norms promise."""

import torch
import torch.nn.functional as F

from kernel_cases import DEVICE, EPS
from nanomed.kernels.rms_norm import add_rms_norm, rms_norm


def test_bit_for_bit_torchs_own_in_bf16():
    """F.rms_norm, too, multiplies in float32 and rounds once; transformers rounds twice and differs in a quarter of all."""
    x, w = torch.randn(20, 300, device=DEVICE).bfloat16(), torch.randn(300, device=DEVICE).bfloat16()
    ours, theirs = rms_norm(x, w, EPS), F.rms_norm(x, (300,), w, EPS)
    assert (ours != theirs).float().mean() < 0.002  # a sum in another order now and then crosses a rounding border
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=0)


def test_fused_is_unfused():
    """add_rms_norm gives the very bits of the addition followed by rms_norm: it norms the rounded sum."""
    x, r, w = (torch.randn(9, 70, device=DEVICE).bfloat16() for _ in range(3))
    y, s = add_rms_norm(x, r, w[0], EPS)
    assert torch.equal(s, x + r)
    assert torch.equal(y, rms_norm(x + r, w[0], EPS))


def test_a_scaled_row_has_the_same_norm():
    x, w = torch.randn(4, 50, device=DEVICE), torch.randn(50, device=DEVICE)
    torch.testing.assert_close(rms_norm(x * 1000, w, 0.0), rms_norm(x, w, 0.0))


def test_rows_of_zeros_and_of_the_largest_numbers():
    """Zeros stay zeros with a finite gradient; bf16's largest squared overflows float32 to a zero row, as F.rms_norm."""
    x = torch.zeros(2, 40, device=DEVICE, dtype=torch.bfloat16)
    x[1] = torch.finfo(torch.bfloat16).max
    w = torch.ones(40, device=DEVICE, dtype=torch.bfloat16)
    leaf = x.clone().requires_grad_()
    y = rms_norm(leaf, w, EPS)
    assert torch.equal(y, F.rms_norm(x, (40,), w, EPS))
    (grad,) = torch.autograd.grad(y.float().sum(), leaf)
    assert grad[0].isfinite().all()


def test_only_the_sum_used():
    """The residual stream may be read without the norm: then its gradient alone comes back."""
    x, r, w = (torch.randn(3, 8, device=DEVICE, requires_grad=True) for _ in range(3))
    _, s = add_rms_norm(x, r, w[0], EPS)
    for grad in torch.autograd.grad(s.sum(), (x, r)):
        assert torch.equal(grad, torch.ones_like(grad))


def test_a_wider_weight_gets_its_gradient_in_its_own_dtype():
    """float32 masters under bf16 activations, as on one GPU without FSDP."""
    x = torch.randn(6, 16, device=DEVICE).bfloat16()
    w = torch.randn(16, device=DEVICE, requires_grad=True)
    y = rms_norm(x, w, EPS)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert w.grad.dtype == torch.float32
