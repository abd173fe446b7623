"""RMSNorm, alone or with the residual addition before it: every row divided by its root mean square, times a weight.

    s = x + residual (or x)
    r = 1 / sqrt(mean(s²) + eps)        y = s · r · w
    ŝ = s · r,  g = dy · w              ds_total = r · (g − ŝ · mean(g · ŝ)) + ds        dw = Σ_rows dy · ŝ

All in float32 whatever the dtype of x, rounded once at the end, as F.rms_norm does (transformers rounds ŝ first, which
is less exact: 2.3e-3 against 1.7e-3 relative in bf16). s is rounded before it is used, so that fused and unfused agree.
Autograd over the formula would keep two float32 copies of x for backward; this keeps s and r, one number a row.

Forward: a row is a program, held in registers between the sum and the product, so x is read once. Backward: a few
programs a multiprocessor walk over many rows each and keep their part of dw in registers; the parts, float32 [P, D],
are summed at the end: the same bits every time, which atomics would not give.

Bytes an element in bf16, and the floor at 8,192 × 3,584 (Qwen2.5-7B) on an H100 that copies 3.0 TB/s:
    rms_norm       forward 4 (x → y)                    39 µs      backward 6 (dy, x → dx)         59 µs
    add_rms_norm   forward 8 (x, residual → s, y)       78 µs      backward 8 (dy, ds, s → ds)     78 µs
Unfused, addition and norm move 10 bytes forward.
"""

import torch
from torch import Tensor

from .common import accumulator, check, check_width, jit, n_programs, next_power_of_2, on_device_of, tl, walkable, warps_for

MAX_COLUMNS = 8192  # of a row; twice as many spill in the backward pass, and in float32 pass an A100's shared memory


@jit
def _forward(
    x_ptr, x_stride, residual_ptr, residual_stride, w_ptr, y_ptr, s_ptr, rstd_ptr, D, eps,
    ADD: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    s = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(ACC)
    if ADD:
        residual = tl.load(residual_ptr + row * residual_stride + cols, mask=mask, other=0.0).to(ACC)
        rounded = (s + residual).to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + row * D + cols, rounded, mask=mask)
        s = rounded.to(ACC)
    rstd = tl.rsqrt(tl.sum(s * s, axis=0) / D + tl.cast(eps, ACC))
    tl.store(rstd_ptr + row, rstd)
    w = tl.load(w_ptr + cols, mask=mask, other=0.0).to(ACC)
    tl.store(y_ptr + row * D + cols, (s * rstd * w).to(y_ptr.dtype.element_ty), mask=mask)


@jit
def _backward(
    dy_ptr, dy_stride, ds_ptr, ds_stride, s_ptr, s_stride, w_ptr, rstd_ptr, dx_ptr, dw_ptr, N, D,
    ADD: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    w = tl.load(w_ptr + cols, mask=mask, other=0.0).to(ACC)
    dw = tl.zeros((BLOCK,), ACC)
    for i in tl.range(program, N, tl.num_programs(0), num_stages=STAGES):  # the next rows load during this one
        row = tl.cast(i, tl.int64)
        s = tl.load(s_ptr + row * s_stride + cols, mask=mask, other=0.0).to(ACC)
        dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(ACC)
        rstd = tl.load(rstd_ptr + row)
        s_hat = s * rstd
        g = dy * w
        dx = rstd * (g - s_hat * (tl.sum(g * s_hat, axis=0) / D))
        if ADD:
            dx += tl.load(ds_ptr + row * ds_stride + cols, mask=mask, other=0.0).to(ACC)
        tl.store(dx_ptr + row * D + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dw += dy * s_hat
    tl.store(dw_ptr + program * D + cols, dw, mask=mask)


def rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:  # (N, D), (D,) -> (N, D) in x's dtype
    """RMSNorm over the last dimension. w may be wider than x (float32 masters); its gradient comes in its own dtype."""
    check("rms_norm: x", x, (x.shape[0], w.shape[0]))
    check_width("rms_norm: x", w.shape[0], MAX_COLUMNS)
    check("rms_norm: w", w, (w.shape[0],))
    return _rms_norm(x, w, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, s): s = x + residual, y = rms_norm(s, w, eps). x and residual (N, D), of one dtype; w (D,)."""
    check("add_rms_norm: x", x, (x.shape[0], w.shape[0]))
    check_width("add_rms_norm: x", w.shape[0], MAX_COLUMNS)
    check("add_rms_norm: residual", residual, x.shape, x.dtype)
    check("add_rms_norm: w", w, (w.shape[0],))
    return _add_rms_norm(x, residual, w, eps)[:2]


def stages_for(row_bytes: int) -> int:
    """Rows in flight of a backward program: they wait in shared memory, of which a consumer's GPU has 99 KB a program."""
    return 3 if row_bytes <= 16384 else 2


def _launch_forward(x: Tensor, residual: Tensor | None, w: Tensor, eps: float) -> tuple[Tensor, Tensor | None, Tensor]:
    n, d = x.shape
    y = x.new_empty(n, d)
    s = x.new_empty(n, d) if residual is not None else None
    rstd = x.new_empty(n, dtype=torch.promote_types(x.dtype, torch.float32))
    block = next_power_of_2(d)
    if n:
        with on_device_of(x):
            _forward[(n,)](
                x, x.stride(0), residual, residual.stride(0) if s is not None else 0, w, y, s, rstd, d, eps,
                ADD=s is not None, BLOCK=block, ACC=accumulator(x.dtype), num_warps=warps_for(block),
            )  # fmt: skip
    return y, s, rstd


@torch.library.custom_op("nanomed::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, _, rstd = _launch_forward(x, None, w, eps)
    return y, rstd


@torch.library.custom_op("nanomed::add_rms_norm", mutates_args=())
def _add_rms_norm(x: Tensor, residual: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _launch_forward(x, residual, w, eps)


@torch.library.custom_op("nanomed::rms_norm_backward", mutates_args=())
def _rms_norm_backward(dy: Tensor, ds: Tensor | None, s: Tensor, w: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    n, d = s.shape
    dy, ds = walkable(dy), None if ds is None else walkable(ds)
    dx = s.new_empty(n, d)
    parts = rstd.new_empty(min(n, n_programs(s, per_sm=2)), d)
    block = next_power_of_2(d)
    if n:
        with on_device_of(s):
            _backward[(len(parts),)](
                dy, dy.stride(0), ds, 0 if ds is None else ds.stride(0), s, s.stride(0), w, rstd, dx, parts, n, d,
                ADD=ds is not None, BLOCK=block, STAGES=stages_for(block * s.element_size()), ACC=accumulator(s.dtype),
                num_warps=warps_for(block),
            )  # fmt: skip
    return dx, parts.sum(dim=0).to(w.dtype)


@_rms_norm.register_fake
def _(x, w, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


@_add_rms_norm.register_fake
def _(x, residual, w, eps):
    rstd = x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape), x.new_empty(x.shape), rstd


@_rms_norm_backward.register_fake
def _(dy, ds, s, w, rstd):
    return s.new_empty(s.shape), torch.empty_like(w)


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.set_materialize_grads(False)


def _save_add(ctx, inputs, output):
    ctx.save_for_backward(output[1], inputs[2], output[2])
    ctx.set_materialize_grads(False)


def _gradient_add(ctx, dy, ds, _drstd):
    s, w, rstd = ctx.saved_tensors
    dy = torch.zeros_like(s) if dy is None else dy  # only s was used further on
    dx, dw = _rms_norm_backward(dy, ds, s, w, rstd)
    return dx, dx, dw, None


def _gradient(ctx, dy, _drstd):
    dx, _, dw, _ = _gradient_add(ctx, dy, None, None)
    return dx, dw, None


_rms_norm.register_autograd(_gradient, setup_context=_save)
_add_rms_norm.register_autograd(_gradient_add, setup_context=_save_add)


# --- the torch twin ------------------------------------------------------------------------------------------------


def rms_norm_torch(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """As rms_norm, on any device."""
    return _RMSNorm.apply(x, w, eps)


def add_rms_norm_torch(x: Tensor, residual: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As add_rms_norm, on any device."""
    s = x + residual
    return _RMSNorm.apply(s, w, eps), s


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, eps):
        wide = torch.promote_types(x.dtype, torch.float32)
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square() / x.shape[-1]
        rstd = torch.rsqrt(mean_square + eps)
        ctx.save_for_backward(x, w, rstd)
        # No output under two names (mul_, an idle .to): torch 2.11's compiler gives it wrong gradients, pytorch #180642.
        y = x * rstd * w
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, w, rstd = ctx.saved_tensors
        x_hat = x * rstd  # wide, since rstd is
        g = dy * w.to(rstd.dtype)
        dw = (dy * x_hat).sum(dim=0).to(w.dtype) if ctx.needs_input_grad[1] else None
        c = (g * x_hat).mean(dim=-1, keepdim=True)
        return g.addcmul_(x_hat, c, value=-1).mul_(rstd).to(x.dtype), dw, None
