"""RMSNorm of every head, then RoPE, in one pass: what Qwen3 does to its queries and keys before attention.

    r = 1 / sqrt(mean(x²) + eps)        x̂ = x · r        y = RoPE(x̂ · w)
    g = RoPE⁻¹(dy)        dx = r · (g · w − x̂ · mean(g · w · x̂))        dw = Σ_tokens,heads g · x̂

All query heads share a weight, and all key heads (arXiv 2505.09388). In float32, rounded once at the end. As two
operations, kernels/rms_norm.py would get rows of 128 numbers, of which a program would want thousands, and they would move
8 bytes an element forward and 10 back.

A program is a token with all its heads, as in kernels/rope.py. Backward, queries and keys apart, a few programs a
multiprocessor walk over many tokens each and keep their part of dw in registers, head by head; the parts are summed at the
end. Nothing is kept but the inputs: the norm of a head that is in registers costs less than a number more in memory.

Bytes an element in bf16: forward 4 (x → y), backward 6 (dy, x → dx). The floor at 8,192 tokens of 32 + 8 heads of 128
(Qwen3-8B) on an H100 that copies 3.0 TB/s: 56 µs and 84 µs.
"""

import torch
from torch import Tensor

from .common import accumulator, check, check_width, jit, n_programs, next_power_of_2, on_device_of, tl, walkable
from .rms_norm import rms_norm_torch
from .rope import angles, check_heads, halves, padded_width, put, rope_torch

MAX_WIDTH = 8192  # elements of all heads of a token; twice as many spill in the backward pass


@jit
def _weight(w_ptr, half, HALF: tl.constexpr, ACC: tl.constexpr):
    """The halves of a weight, (1, HALF)."""
    cols = tl.arange(0, HALF)[None, :]
    a = tl.load(w_ptr + cols, mask=cols < half, other=0.0).to(ACC)
    return a, tl.load(w_ptr + half + cols, mask=cols < half, other=0.0).to(ACC)


@jit
def _normed(x_ptr, head_stride, n_heads, half, eps, HEADS: tl.constexpr, HALF: tl.constexpr, ACC: tl.constexpr):
    """The halves of x̂ of all heads of a token, (HEADS, HALF), and r, (HEADS, 1)."""
    a, b = halves(x_ptr, head_stride, n_heads, half, HEADS, HALF, ACC)
    r = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / (2 * half) + tl.cast(eps, ACC))[:, None]
    return a * r, b * r, r


@jit
def _turn(x_ptr, head_stride, w_ptr, y_ptr, cos, sin, n_heads, half, eps, HEADS: tl.constexpr, HALF: tl.constexpr):
    w_a, w_b = _weight(w_ptr, half, HALF, cos.dtype)
    a, b, _ = _normed(x_ptr, head_stride, n_heads, half, eps, HEADS, HALF, cos.dtype)
    a, b = a * w_a, b * w_b
    put(y_ptr, a * cos - b * sin, b * cos + a * sin, n_heads, half, HEADS, HALF)


@jit
def _forward(
    q_ptr, q_stride, q_head_stride, k_ptr, k_stride, k_head_stride, q_w_ptr, k_w_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    q_heads, k_heads, half, eps,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    cos, sin = angles(cos_ptr, sin_ptr, token, half, HALF, ACC)
    q_ptr, q_out_ptr = q_ptr + token * q_stride, q_out_ptr + token * q_heads * (2 * half)
    k_ptr, k_out_ptr = k_ptr + token * k_stride, k_out_ptr + token * k_heads * (2 * half)
    _turn(q_ptr, q_head_stride, q_w_ptr, q_out_ptr, cos, sin, q_heads, half, eps, Q_HEADS, HALF)
    _turn(k_ptr, k_head_stride, k_w_ptr, k_out_ptr, cos, sin, k_heads, half, eps, K_HEADS, HALF)


@jit
def _backward(
    dy_ptr, dy_stride, dy_head_stride, x_ptr, x_stride, head_stride, w_ptr, cos_ptr, sin_ptr, dx_ptr, dw_ptr,
    N, n_heads, half, eps, HEADS: tl.constexpr, HALF: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    w_a, w_b = _weight(w_ptr, half, HALF, ACC)
    dw_a, dw_b = tl.zeros((HEADS, HALF), ACC), tl.zeros((HEADS, HALF), ACC)
    for i in tl.range(program, N, tl.num_programs(0), num_stages=2):  # the next token loads during this one
        token = tl.cast(i, tl.int64)
        cos, sin = angles(cos_ptr, sin_ptr, token, half, HALF, ACC)
        a, b, r = _normed(x_ptr + token * x_stride, head_stride, n_heads, half, eps, HEADS, HALF, ACC)
        c, d = halves(dy_ptr + token * dy_stride, dy_head_stride, n_heads, half, HEADS, HALF, ACC)
        c, d = c * cos + d * sin, d * cos - c * sin
        dw_a += c * a
        dw_b += d * b
        c, d = c * w_a, d * w_b
        mean = (tl.sum(c * a + d * b, axis=1) / (2 * half))[:, None]
        dx = dx_ptr + token * n_heads * (2 * half)
        put(dx, r * (c - a * mean), r * (d - b * mean), n_heads, half, HEADS, HALF)
    dw_ptr += program * (2 * half)
    put(dw_ptr, tl.sum(dw_a, axis=0)[None, :], tl.sum(dw_b, axis=0)[None, :], 1, half, 1, HALF)


def norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """q (N, H, d) and k (N, K, d), every head normed and turned; weights (d,); cos and sin (N, 1, d/2) float32, or wider.

    The weights, of one dtype, may be wider than q (float32 masters); their gradients come in their own dtype.
    """
    check_heads("norm_rope", q, k, cos, sin)
    for name, x in (("q", q), ("k", k)):
        check_width(f"norm_rope: {name}", padded_width(x), MAX_WIDTH)
    check("norm_rope: q_weight", q_weight, q.shape[2:])
    check("norm_rope: k_weight", k_weight, q.shape[2:], q_weight.dtype)
    return _norm_rope(q, k, q_weight, k_weight, eps, cos, sin)


def warps_for(heads: int, half: int) -> int:
    """Warps of a program: 16 numbers of a half a thread, two loads of 128 bits."""
    return min(16, max(1, heads * half // 512))


@torch.library.custom_op("nanomed::norm_rope", mutates_args=())
def _norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    (n, q_heads, d), k_heads = q.shape, k.shape[1]
    heads, half = next_power_of_2(q_heads), next_power_of_2(d // 2)
    if n:
        with on_device_of(q):
            _forward[(n,)](
                q, *q.stride()[:2], k, *k.stride()[:2], q_weight, k_weight, cos, sin, q_out, k_out,
                q_heads, k_heads, d // 2, eps,
                Q_HEADS=heads, K_HEADS=next_power_of_2(k_heads), HALF=half, ACC=accumulator(q.dtype),
                num_warps=warps_for(heads, half),
            )  # fmt: skip
    return q_out, k_out


@torch.library.custom_op("nanomed::norm_rope_backward", mutates_args=())
def _norm_rope_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Of queries or of keys: together they would need all registers of a thread."""
    (n, n_heads, d), dy, dx = x.shape, walkable(dy), x.new_empty(x.shape)
    heads, half = next_power_of_2(n_heads), next_power_of_2(d // 2)
    warps = warps_for(heads, half)
    parts = cos.new_empty(min(n, n_programs(x, per_sm=max(1, 8 // warps))), d)  # 8 warps of 255 registers are resident
    if n:
        with on_device_of(x):
            _backward[(len(parts),)](
                dy, *dy.stride()[:2], x, *x.stride()[:2], weight, cos, sin, dx, parts, n, n_heads, d // 2, eps,
                HEADS=heads, HALF=half, ACC=accumulator(x.dtype), num_warps=warps,
            )  # fmt: skip
    return dx, parts.sum(dim=0).to(weight.dtype)


@_norm_rope.register_fake
def _(q, k, q_weight, k_weight, eps, cos, sin):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@_norm_rope_backward.register_fake
def _(dy, x, weight, eps, cos, sin):
    return x.new_empty(x.shape), torch.empty_like(weight)


def _save(ctx, inputs, output):
    *tensors, ctx.eps, cos, sin = inputs
    ctx.save_for_backward(*tensors, cos, sin)


def _gradient(ctx, dq, dk):
    q, k, q_weight, k_weight, *angles = ctx.saved_tensors
    dq, dq_weight = _norm_rope_backward(dq, q, q_weight, ctx.eps, *angles)
    dk, dk_weight = _norm_rope_backward(dk, k, k_weight, ctx.eps, *angles)
    return dq, dk, dq_weight, dk_weight, None, None, None


_norm_rope.register_autograd(_gradient, setup_context=_save)


# --- the torch twin ------------------------------------------------------------------------------------------------


def norm_rope_torch(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """As norm_rope, on any device, but in two passes."""
    q, k = (rms_norm_torch(x.flatten(0, 1), w, eps).view(x.shape) for x, w in ((q, q_weight), (k, k_weight)))
    return rope_torch(q, k, cos, sin)
