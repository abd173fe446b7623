"""RoPE: queries and keys turned by their token's angles, in Hugging Face's half-split layout.

    (a, b) = halves of a head's vector        y = (a · cos − b · sin,  b · cos + a · sin)

A rotation's inverse is the rotation by the opposite angle, so backward is forward with −sin, and nothing but cos and sin
is kept for it. Computed in float32: with large bases, low precision drifts at long range.
"""

import torch
from torch import Tensor


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q (N, H, d) and k (N, K, d) turned; cos and sin (N, 1, d/2) float32, or wider."""
    return _RoPE.apply(q, k, cos, sin)


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(q, cos, sin), _rotate(k, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        return _rotate(dq, cos, -sin), _rotate(dk, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    y_a, y_b = y.chunk(2, dim=-1)
    y_a.copy_((a * cos).addcmul_(b, sin, value=-1))  # wide, since cos is
    y_b.copy_((b * cos).addcmul_(a, sin))
    return y
