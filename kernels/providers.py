"""The six functions of a decoder, from one provider: `triton` (this folder's kernels), `torch` (their twins), `liger`.

All have the same signatures and meaning, so that a model takes any of them and a benchmark compares like with like.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import common, linear_cross_entropy, norm_rope, rms_norm, rope, swiglu


@dataclass(frozen=True)
class Kernels:
    """One provider's functions; each documented in the file of its name."""

    rms_norm: Callable
    add_rms_norm: Callable
    swiglu: Callable
    rope: Callable
    norm_rope: Callable
    linear_cross_entropy: Callable


TRITON = Kernels(
    rms_norm.rms_norm,
    rms_norm.add_rms_norm,
    swiglu.swiglu,
    rope.rope,
    norm_rope.norm_rope,
    linear_cross_entropy.linear_cross_entropy,
)
TORCH = Kernels(
    rms_norm.rms_norm_torch,
    rms_norm.add_rms_norm_torch,
    swiglu.swiglu_torch,
    rope.rope_torch,
    norm_rope.norm_rope_torch,
    linear_cross_entropy.linear_cross_entropy_torch,
)


def default() -> str:
    """`triton` where it can run, else `torch`."""
    return "triton" if common.triton is not None and torch.cuda.is_available() else "torch"


def kernels(name: str) -> Kernels:
    """The provider of that name. ValueError where it cannot run here, and why."""
    if name == "torch":
        return TORCH
    if common.triton is None:
        raise ValueError("Triton is not installed; it comes with PyTorch's CUDA builds on Linux")
    if not torch.cuda.is_available() and not common.INTERPRETED:
        raise ValueError("needs a GPU; the CPU has the same functions under the name torch")
    if name == "triton":
        return TRITON
    try:
        from . import liger
    except ImportError as error:
        raise ValueError(f"cannot be imported ({error}); pip install 'liger-kernel>=0.8.5'") from None
    return Kernels(liger.rms_norm, liger.add_rms_norm, liger.swiglu, liger.rope, liger.norm_rope, liger.linear_cross_entropy)
