"""Every kernel beside its formula in plain torch, in one shape, so that one test can ask the same of all of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanomed.kernels import cross_entropy, linear_cross_entropy, norm_rope, rms_norm, rope, swiglu
from nanomed.kernels.cross_entropy import IGNORED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU in Triton's interpreter
EPS, Z_LOSS, CHUNK, HEADS, KV_HEADS, WIDTH = 1e-5, 1e-3, 3, 3, 2, 8


def targets_for(n: int, v: int) -> Tensor:
    """(n,) targets in [0, v), every fourth of them IGNORED; the first and last id come early."""
    targets = torch.tensor([(i * 7919 + (v - 1) * (i % 2)) % v for i in range(n)], device=DEVICE, dtype=torch.int64)
    targets[2::4] = IGNORED
    return targets


def angles(n: int, half: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (n, 1, half) of positions 0, 10, 20, ...: float32, or float64 for float64."""
    wide = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(half, device=DEVICE, dtype=wide) / half
    angle = 10 * torch.arange(n, device=DEVICE, dtype=wide)[:, None] * 1e4**-exponent
    return angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)


def scale_for(x: Tensor) -> Tensor:
    """A scale that is no power of two, () float32 or wider."""
    return torch.tensor(0.3, device=DEVICE, dtype=torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class Case:
    """Functions of the same differentiable tensors: ours through Triton, our torch twin, and the formula by autograd."""

    name: str
    shapes: Callable[[int, int], tuple]  # (rows, columns) -> the tensors' shapes
    ours: Callable
    twin: Callable
    formula: Callable  # in the inputs' dtype, as anyone would write it

    def inputs(self, n: int, d: int, dtype=torch.float32, seed: int = 0) -> list[Tensor]:
        """Random tensors of the case's shapes, leaves that want a gradient."""
        generator = torch.Generator().manual_seed(seed)
        made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in self.shapes(n, d)]
        return [x.to(DEVICE, dtype).requires_grad_() for x in made]

    def __str__(self):
        return self.name


def _formula_rms(x, w):
    return F.rms_norm(x, (x.shape[-1],), w, EPS)


def _formula_add(x, residual, w):
    return _formula_rms(x + residual, w), x + residual


def _turned(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return x * torch.cat((cos, cos), -1).to(x.dtype) + torch.cat((-b, a), -1) * torch.cat((sin, sin), -1).to(x.dtype)


def _formula_rope(q, k):
    tables = angles(len(q), q.shape[-1] // 2, q.dtype)
    return _turned(q, *tables), _turned(k, *tables)


def _rope(function):
    return lambda q, k: function(q, k, *angles(len(q), q.shape[-1] // 2, q.dtype))


def _formula_norm_rope(q, k, q_weight, k_weight):
    return _formula_rope(*(F.rms_norm(x, w.shape, w, EPS) for x, w in ((q, q_weight), (k, k_weight))))


def _norm_rope(function):
    return lambda q, *rest: function(q, *rest, EPS, *angles(len(q), q.shape[-1] // 2, q.dtype))


def _formula_ce(logits):
    targets = targets_for(*logits.shape)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    lse = torch.logsumexp(logits, -1)
    z = (Z_LOSS * lse**2 * (targets != IGNORED)).sum()
    return (F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") + z) * scale_for(logits)


def _ce(function):  # ours consumes its logits, so it gets a copy
    return lambda logits: function(logits * 1, targets_for(*logits.shape), scale_for(logits), Z_LOSS)


def _formula_lce(hidden, weight):
    return _formula_ce(hidden @ weight.T)


def _lce(function):
    return lambda hidden, weight: function(hidden, weight, targets_for(len(hidden), len(weight)), scale_for(hidden), Z_LOSS, CHUNK)


CASES = [
    Case(
        "rms_norm",
        lambda n, d: ((n, d), (d,)),
        lambda x, w: rms_norm.rms_norm(x, w, EPS),
        lambda x, w: rms_norm.rms_norm_torch(x, w, EPS),
        _formula_rms,
    ),
    Case(
        "add_rms_norm",
        lambda n, d: ((n, d), (n, d), (d,)),
        lambda x, r, w: rms_norm.add_rms_norm(x, r, w, EPS),
        lambda x, r, w: rms_norm.add_rms_norm_torch(x, r, w, EPS),
        _formula_add,
    ),
    Case(
        "swiglu",
        lambda n, d: ((n, d), (n, d)),
        swiglu.swiglu,
        swiglu.swiglu_torch,
        lambda gate, up: F.silu(gate) * up,
    ),
    Case(
        "rope",
        lambda n, d: ((n, HEADS, 2 * d), (n, KV_HEADS, 2 * d)),
        _rope(rope.rope),
        _rope(rope.rope_torch),
        _formula_rope,
    ),
    Case(
        "norm_rope",
        lambda n, d: ((n, HEADS, 2 * d), (n, KV_HEADS, 2 * d), (2 * d,), (2 * d,)),
        _norm_rope(norm_rope.norm_rope),
        _norm_rope(norm_rope.norm_rope_torch),
        _formula_norm_rope,
    ),
    Case(
        "cross_entropy",
        lambda n, d: ((n, d),),
        _ce(cross_entropy.cross_entropy),
        _ce(cross_entropy.cross_entropy_torch),
        _formula_ce,
    ),
    Case(
        "linear_cross_entropy",
        lambda n, d: ((n, WIDTH), (d, WIDTH)),
        _lce(linear_cross_entropy.linear_cross_entropy),
        _lce(linear_cross_entropy.linear_cross_entropy_torch),
        _formula_lce,
    ),
]


def above_of(y: Tensor, seed: int, at_a_loss: float = -0.7) -> Tensor:
    """The gradient that arrives at an output."""
    if y.ndim == 0:
        return torch.full_like(y, at_a_loss)
    made = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(y.device, y.dtype)


def outputs_and_gradients(function: Callable, tensors: list[Tensor], at_a_loss: float = -0.7) -> list[Tensor]:
    """The function's outputs and its inputs' gradients; from above come random ones, or at_a_loss where the output is one."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    above = [above_of(y, i, at_a_loss) for i, y in enumerate(outputs)]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, leaves, above))


def relative_error(x: Tensor, right: Tensor) -> float:
    """‖x − right‖ / ‖right‖ in float64; the plain norm where right is zero."""
    difference, norm = (x.double() - right.double()).norm(), right.double().norm()
    return (difference / norm if norm else difference).item()
