"""SwiGLU: the gated activation of the feed-forward layer.

    y = silu(gate) · up,  silu(z) = z · σ(z)
    dup = dy · silu(gate)        dgate = dy · up · σ(gate) · (1 + gate · (1 − σ(gate)))

Autograd would keep silu(gate) beside gate and up; recomputing it costs less than the memory it takes: N·F elements a
layer, the largest activation there is.

A program is a tile of 1,024 columns of one row. (A program per row would need a block of 32,768 for F = 18,944, two
fifths of it masked off.)

Bytes an element in bf16, and the floor at 8,192 × 18,944 (Qwen2.5-7B) on an H100 that copies 3.0 TB/s:
    forward 6 (gate, up → y)  310 µs        backward 10 (dy, gate, up → dgate, dup)  517 µs
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import accumulator, check, jit, on_device_of, tl, walkable

BLOCK, WARPS = 1024, 4  # 8 elements a thread: one 128-bit load of bf16 from each input


@jit
def _forward(gate_ptr, gate_stride, up_ptr, up_stride, y_ptr, F, BLOCK: tl.constexpr, ACC: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < F
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(ACC)
    up = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0).to(ACC)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * F + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@jit
def _backward(
    dy_ptr, dy_stride, gate_ptr, gate_stride, up_ptr, up_stride, dgate_ptr, dup_ptr, F,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < F
    dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(ACC)
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(ACC)
    up = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0).to(ACC)
    sigma = tl.sigmoid(gate)
    dup = dy * gate * sigma
    dgate = dy * up * sigma * (1 + gate * (1 - sigma))
    tl.store(dup_ptr + row * F + cols, dup.to(dup_ptr.dtype.element_ty), mask=mask)
    tl.store(dgate_ptr + row * F + cols, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:  # (N, F), (N, F) -> (N, F)
    """silu(gate) · up. The two may be halves of one wider tensor: rows may lie any stride apart."""
    check("swiglu: gate", gate, (gate.shape[0], gate.shape[-1]))
    check("swiglu: up", up, gate.shape, gate.dtype)
    return _swiglu(gate, up)


def _grid(x: Tensor) -> tuple[int, int]:
    return x.shape[0], -(-x.shape[1] // BLOCK)  # rows first: a grid's second side ends at 65,535


@torch.library.custom_op("nanomed::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    y = gate.new_empty(gate.shape)
    if y.numel():
        with on_device_of(gate):
            _forward[_grid(gate)](
                gate, gate.stride(0), up, up.stride(0), y, gate.shape[1],
                BLOCK=BLOCK, ACC=accumulator(gate.dtype), num_warps=WARPS,
            )  # fmt: skip
    return y


@torch.library.custom_op("nanomed::swiglu_backward", mutates_args=())
def _swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dy, dgate, dup = walkable(dy), gate.new_empty(gate.shape), up.new_empty(up.shape)
    if dy.numel():
        with on_device_of(gate):
            _backward[_grid(gate)](
                dy, dy.stride(0), gate, gate.stride(0), up, up.stride(0), dgate, dup, gate.shape[1],
                BLOCK=BLOCK, ACC=accumulator(gate.dtype), num_warps=WARPS,
            )  # fmt: skip
    return dgate, dup


@_swiglu.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


@_swiglu_backward.register_fake
def _(dy, gate, up):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


_swiglu.register_autograd(lambda ctx, dy: _swiglu_backward(dy, *ctx.saved_tensors), setup_context=_save)


# --- the torch twin ------------------------------------------------------------------------------------------------


def swiglu_torch(gate: Tensor, up: Tensor) -> Tensor:
    """As swiglu, on any device."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up  # mul_ would be compiled to wrong gradients by torch 2.11, pytorch #180642

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)
