"""RoPE: queries and keys turned by their token's angles, in Hugging Face's half-split layout.

    (a, b) = halves of a head's vector        y = (a · cos − b · sin,  b · cos + a · sin)

A rotation's inverse is the rotation by the opposite angle, so backward is forward with −sin: the same kernel with a
flag, and nothing but cos and sin is kept for it. Computed in float32: with large bases, low precision drifts at long range.

A program is a token with all its query and key heads, so that its angles are read once. Two loads a head, one for
each half, since what turns together lies half a head apart.

Bytes an element of q and k in bf16: 4, forward and backward. The floor at 8,192 tokens of 28 + 4 heads of 128
(Qwen2.5-7B) on an H100 that copies 3.0 TB/s: 45 µs each.
"""

import torch
from torch import Tensor

from .common import accumulator, check, check_width, jit, next_power_of_2, on_device_of, tl, walkable

WARPS = 4
MAX_WIDTH = 16384  # elements of all heads of a token; twice as many spill


@jit
def halves(x_ptr, head_stride, n_heads, half, HEADS: tl.constexpr, HALF: tl.constexpr, ACC: tl.constexpr):
    """Both halves of all heads of one token, (HEADS, HALF) each; x_ptr is its own."""
    heads = tl.arange(0, HEADS)[:, None].to(tl.int64)  # they may lie further apart than tokens
    cols = tl.arange(0, HALF)[None, :]
    mask = (heads < n_heads) & (cols < half)
    x = x_ptr + heads * head_stride + cols
    return tl.load(x, mask=mask, other=0.0).to(ACC), tl.load(x + half, mask=mask, other=0.0).to(ACC)


@jit
def put(y_ptr, a, b, n_heads, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    """The reverse; y is contiguous."""
    heads, cols = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    mask = (heads < n_heads) & (cols < half)
    y = y_ptr + heads * (2 * half) + cols
    tl.store(y, a.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y + half, b.to(y_ptr.dtype.element_ty), mask=mask)


@jit
def angles(cos_ptr, sin_ptr, token, half, HALF: tl.constexpr, ACC: tl.constexpr):
    """cos and sin of a token, (1, HALF) each."""
    cols = tl.arange(0, HALF)[None, :]
    cos = tl.load(cos_ptr + token * half + cols, mask=cols < half, other=0.0).to(ACC)
    return cos, tl.load(sin_ptr + token * half + cols, mask=cols < half, other=0.0).to(ACC)


@jit
def _turn(x_ptr, head_stride, y_ptr, cos, sin, n_heads, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    a, b = halves(x_ptr, head_stride, n_heads, half, HEADS, HALF, cos.dtype)
    put(y_ptr, a * cos - b * sin, b * cos + a * sin, n_heads, half, HEADS, HALF)


@jit
def _rotate(
    q_ptr, q_stride, q_head_stride, k_ptr, k_stride, k_head_stride, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    q_heads, k_heads, half,
    INVERSE: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    cos, sin = angles(cos_ptr, sin_ptr, token, half, HALF, ACC)
    if INVERSE:
        sin = -sin
    q_out = q_out_ptr + token * q_heads * (2 * half)
    k_out = k_out_ptr + token * k_heads * (2 * half)
    _turn(q_ptr + token * q_stride, q_head_stride, q_out, cos, sin, q_heads, half, Q_HEADS, HALF)
    _turn(k_ptr + token * k_stride, k_head_stride, k_out, cos, sin, k_heads, half, K_HEADS, HALF)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q (N, H, d) and k (N, K, d) turned; cos and sin (N, 1, d/2) float32, or wider."""
    check_heads("rope", q, k, cos, sin)
    for name, x in (("q", q), ("k", k)):
        check_width(f"rope: {name}", padded_width(x), MAX_WIDTH)
    return _rope(q, k, cos, sin, False)


def padded_width(x: Tensor) -> int:
    """Elements of a token (H, d) as a program holds them: both sizes rounded up to powers of two."""
    return next_power_of_2(x.shape[1]) * next_power_of_2(x.shape[2])


def check_heads(what: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """TypeError or ValueError unless these are queries, keys and angles of the same tokens."""
    n, _, d = q.shape
    check(f"{what}: q", q, q.shape)
    check(f"{what}: k", k, (n, k.shape[1], d), q.dtype)
    wide = torch.promote_types(q.dtype, torch.float32)
    for name, table in (("cos", cos), ("sin", sin)):
        check(f"{what}: {name}", table, (n, 1, d // 2), wide)
        if not table.is_contiguous() or d % 2:
            raise ValueError(f"{what}: {name} must be contiguous, and head_dim {d} even")


@torch.library.custom_op("nanomed::rope", mutates_args=())
def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    q, k = walkable(q), walkable(k)
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    (n, q_heads, d), k_heads = q.shape, k.shape[1]
    blocks = dict(Q_HEADS=next_power_of_2(q_heads), K_HEADS=next_power_of_2(k_heads), HALF=next_power_of_2(d // 2))
    if n:
        with on_device_of(q):
            _rotate[(n,)](
                q, q.stride(0), q.stride(1), k, k.stride(0), k.stride(1), cos, sin, q_out, k_out, q_heads, k_heads, d // 2,
                INVERSE=inverse, **blocks, ACC=accumulator(q.dtype), num_warps=WARPS,
            )  # fmt: skip
    return q_out, k_out


@_rope.register_fake
def _(q, k, cos, sin, inverse):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[2:4])
    ctx.inverse = inputs[4]


def _gradient(ctx, dq, dk):
    return *_rope(dq, dk, *ctx.saved_tensors, not ctx.inverse), None, None, None


_rope.register_autograd(_gradient, setup_context=_save)  # linear in q and k, so this is its own second derivative too


# --- the torch twin ------------------------------------------------------------------------------------------------


def rope_torch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As rope, on any device."""
    return _RoPE.apply(q, k, cos, sin)


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate_torch(q, cos, sin), _rotate_torch(k, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        return _rotate_torch(dq, cos, -sin), _rotate_torch(dk, cos, -sin), None, None


def _rotate_torch(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    y_a, y_b = y.chunk(2, dim=-1)
    y_a.copy_((a * cos).addcmul_(b, sin, value=-1))  # wide, since cos is
    y_b.copy_((b * cos).addcmul_(a, sin))
    return y
