"""Cross-entropy of logits, with the gradient made in the same launch and written over them.

    m = max_j x_j,  s = Σ_j exp(x_j − m),  lse = m + log s
    loss_i = lse − x_y + z_loss · lse²                                            0 where target y_i is IGNORED
    ∂/∂x_j = scale · (p_j · (1 + 2 · z_loss · lse) − [j = y]),  p_j = exp(x_j − m) / s

At V = 152,064 the logits of 8,192 tokens take 2.5 GB in bf16; autograd over F.cross_entropy keeps several float32
copies of them. Here the gradient takes the logits' own place, and beside it there is one float32 a row.

A row is a program. Pass 1 reads it and keeps a running maximum and sum (Milakov and Gimelshein 2018, arXiv 1805.02867);
pass 2 reads it again and writes the gradient. Pass 2 goes backwards: what pass 1 read last is likely still in the cache.
The gradient is formed in float32 and rounded once: p − 1 cancels in bf16, at p = 0.99 already with an error of 17 %.

Bytes an element in bf16: 6 (read, read, write), and the floor at 8,192 × 152,064 (Qwen2.5-7B) on an H100 that copies
3.0 TB/s: 2.5 ms. Where the second reading hits the cache, 4.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import accumulator, check, check_rows_apart, jit, next_power_of_2, on_device_of, tl, triton, warps_for

IGNORED = -100  # the target of a token without a label, as in F.cross_entropy
MAX_BLOCK = 8192  # 16 warps, 57 registers: two programs fit a multiprocessor, so one computes while the other waits
SCALE_BLOCK = 4096  # columns


@jit
def _rows(
    x_ptr, x_stride, target_ptr, loss_ptr, scale_ptr, V, z_loss,
    GRAD: tl.constexpr, IGNORED: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    target = tl.load(target_ptr + row)
    cols = tl.arange(0, BLOCK)
    n_blocks = tl.cdiv(V, BLOCK)
    if target == IGNORED:
        tl.store(loss_ptr + row, tl.cast(0.0, ACC))
        if GRAD:  # the zeros must be stored: the logits are still there
            for i in range(n_blocks):
                zeros = tl.zeros((BLOCK,), x_ptr.dtype.element_ty)
                tl.store(x_ptr + i * BLOCK + cols, zeros, mask=i * BLOCK + cols < V)
        return

    # A target outside the vocabulary reads nothing and makes the loss NaN; the loader is where such are found.
    x_target = tl.load(x_ptr + target, mask=(target >= 0) & (target < V), other=float("nan")).to(ACC)
    maximum = tl.cast(float("-inf"), ACC)
    total = tl.cast(0.0, ACC)
    for i in tl.range(n_blocks, num_stages=3):  # the next two blocks load during this one
        x = tl.load(x_ptr + i * BLOCK + cols, mask=i * BLOCK + cols < V, other=float("-inf")).to(ACC)
        new = tl.maximum(maximum, tl.max(x, axis=0))
        shift = tl.where(new == float("-inf"), 0.0, new)  # so far nothing but -inf: -inf - -inf would be NaN
        total = total * tl.exp(maximum - shift) + tl.sum(tl.exp(x - shift), axis=0)
        maximum = new
    log_total = tl.log(total)
    lse = maximum + log_total
    z = tl.cast(z_loss, ACC)
    tl.store(loss_ptr + row, (maximum - x_target) + log_total + z * lse * lse)  # this order: maximum may be large

    if GRAD:
        tl.debug_barrier()  # no thread writes before all have read x_target
        scale = tl.load(scale_ptr).to(ACC)
        of_p = scale * (1 + 2 * z * lse) / total
        for i in tl.range(n_blocks, num_stages=3):
            at = (n_blocks - 1 - i) * BLOCK + cols
            x = tl.load(x_ptr + at, mask=at < V, other=float("-inf")).to(ACC)
            grad = tl.exp(x - maximum) * of_p - tl.where(at == target, scale, 0.0)
            tl.store(x_ptr + at, grad.to(x_ptr.dtype.element_ty), mask=at < V)


@jit
def _scale(x_ptr, x_stride, D, factor_ptr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    factor = tl.load(factor_ptr).to(ACC)
    if factor == 1:  # nearly always: then this launch touches no other memory, and the host need not know
        return
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_stride + cols, mask=cols < D, other=0.0).to(ACC)
    tl.store(x_ptr + row * x_stride + cols, (x * factor).to(x_ptr.dtype.element_ty), mask=cols < D)


def cross_entropy(logits: Tensor, targets: Tensor, scale: Tensor, z_loss: float = 0.0) -> Tensor:  # () float32
    """scale · Σ loss in nats; 0 with zero gradients where all targets are IGNORED. Consumes the logits.

    logits (N, V): where they need a gradient, it is written over them in the forward pass, and they are logits no more.
    (So a gradient from above other than 1 rounds them a second time.)
    targets (N,) int64, each in [0, V) or IGNORED: not checked here, which would wait for the device.
    scale () float32 on the logits' device, usually 1 / (valid tokens of the whole step).
    """
    check("cross_entropy: logits", logits, (targets.shape[0], logits.shape[-1]))
    check("cross_entropy: targets", targets, (targets.shape[0],), torch.int64)
    check("cross_entropy: scale", scale, ())
    if logits.requires_grad and torch.is_grad_enabled():
        check_rows_apart("cross_entropy: logits", logits)
    return _CrossEntropy.apply(logits, targets, scale, z_loss, torch.is_grad_enabled(), TRITON)


@torch.library.custom_op("nanomed::cross_entropy_", mutates_args={"logits"})
def _cross_entropy_(logits: Tensor, targets: Tensor, scale: Tensor, z_loss: float, with_grad: bool) -> Tensor:
    """The loss of every row, unscaled, float32 (N,). with_grad: the logits become scale times its gradient."""
    n, v = logits.shape
    losses = logits.new_empty(n, dtype=torch.promote_types(logits.dtype, torch.float32))
    block = min(MAX_BLOCK, next_power_of_2(v))
    if n:
        with on_device_of(logits):
            _rows[(n,)](
                logits, logits.stride(0), targets, losses, scale, v, z_loss,
                GRAD=with_grad, IGNORED=IGNORED, BLOCK=block, ACC=accumulator(logits.dtype), num_warps=warps_for(block),
            )  # fmt: skip
    return losses


@_cross_entropy_.register_fake
def _(logits, targets, scale, z_loss, with_grad):
    return logits.new_empty(logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32))


@torch.library.custom_op("nanomed::scale_", mutates_args={"x"})
def _scale_(x: Tensor, factor: Tensor) -> None:
    """x (N, D) *= factor, () on its device, without a single access where factor is 1. Rows may lie apart."""
    if x.numel():
        with on_device_of(x):
            _scale[(len(x), triton.cdiv(x.shape[1], SCALE_BLOCK))](
                x, x.stride(0), x.shape[1], factor,
                BLOCK=SCALE_BLOCK, ACC=accumulator(x.dtype), num_warps=warps_for(SCALE_BLOCK),
            )  # fmt: skip


@_scale_.register_fake
def _(x, factor):
    return None


def _loss_and_grad(logits: Tensor, targets: Tensor, scale: Tensor, z_loss: float, with_grad: bool):
    return _cross_entropy_(logits, targets, scale, z_loss, with_grad).sum(), logits


class Way(NamedTuple):
    """How to compute: `TRITON` or `TORCH`."""

    loss_and_grad: Callable  # (logits, targets, scale, z_loss, with_grad) -> unscaled loss (), gradient
    scale_: Callable  # (x, factor) -> None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, scale, z_loss, grad_enabled, way):
        with_grad = grad_enabled and ctx.needs_input_grad[0]
        loss, grad = way.loss_and_grad(logits, targets, scale, z_loss, with_grad)
        if with_grad:
            ctx.save_for_backward(grad.detach())  # as logits it has a history, which a second derivative would follow
        ctx.way, ctx.used = way, False
        return loss * scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        (grad,) = use_once(ctx, "cross_entropy")
        ctx.way.scale_(grad, dloss)
        return grad, None, None, None, None, None


def use_once(ctx, name: str) -> tuple[Tensor, ...]:
    """The saved gradients. RuntimeError the second time: the first scaled them in place and handed them out."""
    if ctx.used:
        raise RuntimeError(f"{name}: a second backward; its gradients were handed out by the first")
    ctx.used = True
    return ctx.saved_tensors


# --- the torch twin ------------------------------------------------------------------------------------------------


def cross_entropy_torch(logits: Tensor, targets: Tensor, scale: Tensor, z_loss: float = 0.0) -> Tensor:
    """As cross_entropy, on any device; leaves the logits as they are, for N·V numbers more."""
    return _CrossEntropy.apply(logits, targets, scale, z_loss, torch.is_grad_enabled(), TORCH)


def _loss_and_grad_torch(logits: Tensor, targets: Tensor, scale: Tensor, z_loss: float, with_grad: bool):
    wide = torch.promote_types(logits.dtype, torch.float32)
    logp = F.log_softmax(logits, dim=-1, dtype=wide)
    loss = F.nll_loss(logp, targets, ignore_index=IGNORED, reduction="sum")
    valid = targets != IGNORED
    of_p = None
    if z_loss:
        lse = torch.logsumexp(logits.to(wide), dim=-1)
        loss = loss + z_loss * (lse * lse * valid).sum()
        of_p = 1 + 2 * z_loss * lse
    return loss, _logits_grad(logp, targets, valid, scale, of_p).to(logits.dtype) if with_grad else logits


def _logits_grad(logp: Tensor, targets: Tensor, valid: Tensor, scale: Tensor, of_p: Tensor | None) -> Tensor:
    """scale · (softmax · of_p − onehot), formed in float32, zero rows where not valid; reuses logp."""
    grad = logp.exp_()
    if of_p is not None:
        grad.mul_(of_p.unsqueeze(1))
    grad.scatter_add_(1, targets.clamp(min=0).unsqueeze(1), -valid.to(grad.dtype).unsqueeze(1))
    return grad.mul_((valid * scale).unsqueeze(1))


TRITON = Way(_loss_and_grad, _scale_)
TORCH = Way(_loss_and_grad_torch, Tensor.mul_)
