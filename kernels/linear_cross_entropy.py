"""The last linear layer and its cross-entropy in one, in chunks of tokens: the logits never exist as a whole.

    loss = scale · Σ_i [ lse(W h_i) − (W h_i)[y_i] + z_loss · lse² ]        over the tokens i whose target is not IGNORED
    dX = G W,  dW = Gᵀ X,  G = ∂loss/∂logits as in cross_entropy.py

`chunk` tokens at a time go through the matrix product, the softmax and both gradient products, all in the forward pass,
because the gradient needs nothing from later layers but one scalar. What stays is dX (N, D) and dW (V, D); backward
multiplies them by that scalar. The products are cuBLAS's; the one kernel of our own is cross_entropy's, in place.

dW is accumulated in float32 across chunks: a bf16 accumulator loses 1 % after 64 of them. Each chunk reads and writes
all of it, 8·V·D bytes, so chunks must be large: with fewer than about 1,100 tokens (the FLOP an H100 does in the time of
a byte, times four) that traffic costs more time than the product, and 256 would double the whole. Where one chunk holds all
tokens there is nothing to accumulate, and dW comes in the weight's dtype straight from its product.

Cost: 6·N·D·V FLOP, as without chunks, 6·N·V bytes of cross-entropy, and dW's traffic as far as it is not hidden under
its product; rounding dW to bf16, where the weight is, moves 10·V·D bytes more. Floor, without dW's: at 8,192 tokens of
Qwen2.5-7B (3,584, 152,064) on an H100 with 800 TFLOP/s and 3.0 TB/s 33.5 + 2.5 ms. Memory beside the inputs:
2·chunk·V + 4·V·D + 2·N·D bytes, 3.5 GB with chunks of 4,096, where autograd's float32 logits take 15 GB; 2·V·D more where
the weight is float32 and the products are bf16, as much less where one chunk holds all tokens.
"""

import torch
from torch import Tensor

from .common import check
from .cross_entropy import IGNORED, TORCH, TRITON, Way, use_once

__all__ = ["IGNORED", "linear_cross_entropy", "linear_cross_entropy_torch"]


def linear_cross_entropy(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D), of hidden's dtype or of a wider one: products run in hidden's, dW comes in weight's
    targets: Tensor,  # (N,) int64, each in [0, V) or IGNORED; never checked here: that would wait for the device
    scale: Tensor,  # () float32 on hidden's device, usually 1 / (valid tokens of the whole step)
    z_loss: float = 0.0,
    chunk: int = 4096,
) -> Tensor:  # () float32
    """scale · Σ cross-entropy in nats over the targets that are not IGNORED; 0 with zero gradients where all are."""
    check("linear_cross_entropy: hidden", hidden, (targets.shape[0], weight.shape[-1]))
    check("linear_cross_entropy: weight", weight, (weight.shape[0], hidden.shape[1]))
    check("linear_cross_entropy: targets", targets, (hidden.shape[0],), torch.int64)
    check("linear_cross_entropy: scale", scale, ())
    return _apply(hidden, weight, targets, scale, z_loss, chunk, TRITON)


def linear_cross_entropy_torch(
    hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, z_loss: float = 0.0, chunk: int = 4096
) -> Tensor:
    """As linear_cross_entropy, on any device."""
    return _apply(hidden, weight, targets, scale, z_loss, chunk, TORCH)


def _apply(hidden, weight, targets, scale, z_loss: float, chunk: int, way: Way) -> Tensor:
    with_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(hidden, weight, targets, scale, z_loss, chunk, with_grad, way)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, scale, z_loss, chunk, with_grad, way: Way):
        w = weight.to(hidden.dtype)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = hidden.new_zeros((), dtype=wide)
        dx = torch.empty_like(hidden) if with_grad else hidden
        at_once = len(hidden) <= chunk and weight.dtype == hidden.dtype  # then dW's one product rounds it once
        dw = hidden.new_empty(weight.shape, dtype=weight.dtype if at_once else wide) if with_grad else None
        chunks = zip(hidden.split(chunk), targets.split(chunk), dx.split(chunk), strict=True)
        for i, (h, y, d) in enumerate(chunks):
            chunk_loss, g = way.loss_and_grad(h @ w.T, y, scale, z_loss, with_grad)
            loss += chunk_loss
            if with_grad:
                torch.mm(g, w, out=d)
                _add_matmul(dw, g.T, h, first=i == 0)
            del g  # before the next chunk's logits are made, or there are two of them
        if dw is not None and not len(hidden):
            dw.zero_()
        if with_grad:
            ctx.save_for_backward(dx, _rounded(dw, weight.dtype))
            ctx.way, ctx.used = way, False
        return loss * scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        dx, dw = use_once(ctx, "linear_cross_entropy")
        ctx.way.scale_(dx, dloss)
        ctx.way.scale_(dw, dloss)
        return dx, dw, *(None,) * 6


def _add_matmul(acc: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """acc += a @ b with acc in float32, whatever a's dtype; first: acc = a @ b, which saves zeroing and reading it.

    In one call where the device can: on CUDA, from torch 2.11 on.
    """
    if first and a.dtype == acc.dtype:
        torch.mm(a, b, out=acc)
    elif acc.is_cuda and a.dtype != acc.dtype:
        if first:
            torch.mm(a, b, out_dtype=acc.dtype, out=acc)
        else:
            torch.addmm(acc, a, b, out_dtype=acc.dtype, out=acc)
    elif first:
        acc.copy_(a @ b)
    else:
        acc += a @ b


def _rounded(dw: Tensor, dtype: torch.dtype) -> Tensor:
    """dw (V, D) float32 in a narrower dtype, inside its own memory: a copy would stand beside it at the very peak.

    Slab by slab from the front, so that what is overwritten has been read: row i moves from byte 4·D·i to 2·D·i.
    The price: until the gradient is freed it holds the memory of the float32 one.
    """
    if dw.element_size() <= dtype.itemsize:
        return dw.to(dtype)
    narrow = dw.view(dtype).view(-1)[: dw.numel()].view(dw.shape)
    for start in range(0, len(dw), 4096):
        narrow[start : start + 4096] = dw[start : start + 4096].to(dtype)
    return narrow
