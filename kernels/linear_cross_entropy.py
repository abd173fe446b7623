"""The last linear layer and its cross-entropy in one, in chunks of tokens: the logits never exist as a whole.

    loss = scale · Σ_i [ logsumexp(W h_i) − (W h_i)[y_i] ]        over the tokens i whose target y_i is not IGNORED
    ∂loss/∂logits_ij = scale · (softmax(W h_i)_j − [j = y_i])

At V = 152,064 the logits of 8,192 tokens take 2.5 GB in bf16 and 5 GB in fp32, several times over with their
gradient: more than anything else in a step. Here `chunk` tokens at a time go through the matrix product, the softmax
and both gradient products, all in the forward pass, because the gradient needs nothing from later layers but one
scalar. What stays is dX (N, D) and dW (V, D); backward multiplies them by that scalar.

Cost: 6·N·D·V FLOP, as without chunks; memory dX + dW + about 6 bytes · chunk · V. Each chunk reads and writes dW
once, so small chunks lose time; dW is accumulated in float32 across chunks, since a bf16 accumulator loses 1 % after
64 of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the target of a token without a label, as in F.cross_entropy


def linear_cross_entropy(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D), of hidden's dtype or of a wider one: products run in hidden's, dW comes in weight's
    targets: Tensor,  # (N,) int64, each in [0, V) or IGNORED; never checked here: that would wait for the device
    scale: Tensor,  # () float32 on hidden's device, usually 1 / (valid tokens of the whole step)
    chunk: int = 2048,
) -> Tensor:  # () float32
    """scale · Σ cross-entropy in nats over the targets that are not IGNORED; 0 with zero gradients where all are."""
    return _LinearCrossEntropy.apply(hidden, weight, targets, scale, chunk, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, scale, chunk, with_grad):
        w = weight.to(hidden.dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        dx = torch.empty_like(hidden) if with_grad else None
        dw = torch.zeros(weight.shape, dtype=torch.float32, device=hidden.device) if with_grad else None
        for h, y, d in zip(
            hidden.split(chunk),
            targets.split(chunk),
            dx.split(chunk) if with_grad else targets.split(chunk),
            strict=True,
        ):
            logp = F.log_softmax(h @ w.T, dim=-1, dtype=torch.float32)
            loss += F.nll_loss(logp, y, ignore_index=IGNORED, reduction="sum")
            if with_grad:
                g = _logits_grad(logp, y, scale).to(h.dtype)
                torch.mm(g, w, out=d)
                _add_matmul(dw, g.T, h)
        if with_grad:
            ctx.save_for_backward(dx, dw.to(weight.dtype))
            ctx.used = False
        return loss * scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        if ctx.used:
            raise RuntimeError("linear_cross_entropy: a second backward; its gradients were handed out by the first")
        ctx.used = True
        dx, dw = ctx.saved_tensors
        return dx.mul_(dloss), dw.mul_(dloss), None, None, None, None


def _logits_grad(logp: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    """scale · (softmax − onehot), formed in float32 (p − 1 cancels in bf16), zero rows where IGNORED; reuses logp."""
    valid = targets != IGNORED
    grad = logp.exp_()
    grad.scatter_add_(1, targets.clamp(min=0).unsqueeze(1), -valid.to(grad.dtype).unsqueeze(1))
    return grad.mul_((valid * scale).unsqueeze(1))


def _add_matmul(acc: Tensor, a: Tensor, b: Tensor) -> None:
    """acc += a @ b with acc in float32, whatever a's dtype; in one call where the device can (CUDA)."""
    if acc.is_cuda and a.dtype != acc.dtype:
        torch.addmm(acc, a, b, out_dtype=torch.float32, out=acc)
    else:
        acc += a @ b
