"""SwiGLU: the gated activation of the feed-forward layer.

    y = silu(gate) · up,  silu(z) = z · σ(z)
    dup = dy · silu(gate)        dgate = dy · up · σ(gate) · (1 + gate · (1 − σ(gate)))

Autograd would keep silu(gate) beside gate and up; recomputing it costs less than the memory it takes: N·F elements a
layer, the largest activation there is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:  # (N, F), (N, F) -> (N, F)
    """silu(gate) · up."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)
