"""RMSNorm: every row divided by its root mean square, times a learnt weight.

    r = 1 / sqrt(mean(x²) + eps)        y = x · r · w
    x̂ = x · r,  g = dy · w              dx = r · (g − x̂ · mean(g · x̂))        dw = Σ_rows dy · x̂

All in float32 whatever x's dtype, rounded once at the end (as F.rms_norm does; transformers rounds x̂ first). Autograd
over the formula would keep three float32 copies of x for backward; this keeps x and one number a row.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:  # (N, D), (D,) -> (N, D) in x's dtype
    """RMSNorm over the last dimension. w may be wider than x (float32 masters); its gradient comes in its own dtype."""
    return _RMSNorm.apply(x, w, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, eps):
        wide = torch.promote_types(x.dtype, torch.float32)
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square_() / x.shape[-1]
        rstd = torch.rsqrt(mean_square + eps)
        ctx.save_for_backward(x, w, rstd)
        return (x * rstd).mul_(w).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, w, rstd = ctx.saved_tensors
        x_hat = x * rstd  # wide, since rstd is
        g = dy * w.to(rstd.dtype)
        dw = (dy * x_hat).sum(dim=0).to(w.dtype) if ctx.needs_input_grad[1] else None
        c = (g * x_hat).mean(dim=-1, keepdim=True)
        return g.addcmul_(x_hat, c, value=-1).mul_(rstd).to(x.dtype), dw, None
