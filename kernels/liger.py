"""Liger-Kernel's functions behind the signatures of ours, so that whole training steps can be compared.

pip install liger-kernel (github.com/linkedin/Liger-Kernel, BSD-2); written against 0.8.5. As their users get them, with
two settings of its own that only help: RMSNorm multiplies by its weight in float32 as ours does ("gemma" without the
offset), and dW of the loss is accumulated in float32. Its loss waits for the device once, to count the targets.
"""

import torch
from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
from liger_kernel.ops.rms_norm import LigerRMSNormFunction
from liger_kernel.ops.rope import LigerRopeFunction
from liger_kernel.ops.swiglu import LigerSiLUMulFunction
from torch import Tensor

from .cross_entropy import IGNORED


def rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """As kernels.rms_norm. Not in place: dy may be the residual stream's gradient as well."""
    return LigerRMSNormFunction.apply(x, w, eps, 0.0, "gemma", False)


def add_rms_norm(x: Tensor, residual: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As kernels.add_rms_norm."""
    return LigerFusedAddRMSNormFunction.apply(x, residual, w, eps, 0.0, "gemma", False)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As kernels.swiglu; its backward writes the gradients over gate and up."""
    return LigerSiLUMulFunction.apply(gate, up)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As kernels.rope; works in place where q and k are contiguous. Theirs are (batch, heads, tokens, head_dim)."""
    q, k = (x.transpose(0, 1).unsqueeze(0) for x in (q, k))
    cos, sin = (table.squeeze(1).unsqueeze(0) for table in (cos, sin))
    q, k = LigerRopeFunction.apply(q, k, cos, sin, None, 1, q.shape[-1])
    return q.squeeze(0).transpose(0, 1), k.squeeze(0).transpose(0, 1)


def norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """As kernels.norm_rope, in two passes."""
    q, k = (rms_norm(x.flatten(0, 1), w, eps).view(x.shape) for x, w in ((q, q_weight), (k, k_weight)))
    return rope(q, k, cos, sin)


def cross_entropy(logits: Tensor, targets: Tensor, scale: Tensor, z_loss: float = 0.0) -> Tensor:
    """As kernels.cross_entropy; in place, too."""
    loss, *_ = LigerCrossEntropyFunction.apply(logits, targets, None, IGNORED, z_loss, 0.0, "sum")
    return loss * scale


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor,
    z_loss: float = 0.0,
    chunk: int = 4096,
    accumulate: torch.dtype | None = torch.float32,
) -> Tensor:
    """As kernels.linear_cross_entropy. Its chunks are set by a multiple of N·D elements, here the one nearest to `chunk`.

    accumulate: dtype of dW between chunks; None is its default, the weight's own.
    """
    n, d = hidden.shape
    budget = max(1, round(chunk * weight.shape[0] / (n * d)))
    loss, *_ = LigerFusedLinearCrossEntropyFunction.apply(
        hidden, weight.to(hidden.dtype), targets, None, None, IGNORED, z_loss, 0.0, "sum", None, False, accumulate,
        False, False, False, None, None, budget,
    )  # fmt: skip
    return loss * scale
