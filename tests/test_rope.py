"""What only RoPE promises: it is a rotation."""

import torch

from kernel_cases import DEVICE, angles
from nanomed.kernels.rope import _rope, rope


def test_the_inverse_undoes_it():
    """Backward is the rotation by the opposite angle: forward and backward together change nothing."""
    q, k = torch.randn(5, 3, 16, device=DEVICE), torch.randn(5, 2, 16, device=DEVICE)
    tables = angles(5, 8, torch.float32)
    turned = rope(q, k, *tables)
    for x, y in zip((q, k), _rope(*turned, *tables, True), strict=True):
        torch.testing.assert_close(x, y)
    leaf = q.clone().requires_grad_()
    (back,) = torch.autograd.grad(rope(leaf, k, *tables)[0], leaf, turned[0])
    torch.testing.assert_close(back, q)


def test_lengths_stay():
    q, k = torch.randn(4, 3, 10, device=DEVICE), torch.randn(4, 1, 10, device=DEVICE)
    for x, y in zip((q, k), rope(q, k, *angles(4, 5, torch.float32)), strict=True):
        torch.testing.assert_close(x.norm(dim=-1), y.norm(dim=-1))


def test_the_score_of_two_tokens_depends_on_their_distance_only():
    """Rotary embedding's very purpose: q at position m, k at n, the product is a function of m - n."""
    q, k = torch.randn(1, 1, 8, device=DEVICE).repeat(6, 1, 1), torch.randn(1, 1, 8, device=DEVICE).repeat(6, 1, 1)
    q, k = rope(q, k, *angles(6, 4, torch.float32))
    scores = q[:, 0] @ k[:, 0].T
    for distance in range(-5, 6):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)


def test_it_has_its_second_derivative():
    """It is linear in q and k, and its backward is itself: so is the backward of that."""
    q = torch.randn(2, 1, 4, device=DEVICE, dtype=torch.float64, requires_grad=True)
    k, tables = torch.zeros(2, 1, 4, device=DEVICE, dtype=torch.float64), angles(2, 2, torch.float64)
    assert torch.autograd.gradgradcheck(lambda q: rope(q, k, *tables)[0] ** 2, (q,))
