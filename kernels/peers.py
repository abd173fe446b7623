"""Who else can do it: every provider of every operation that bench.py puts side by side.

An operation is a function of the tensors that want a gradient: `inputs` makes them. `formula` is the plain definition,
which is also the eager peer, what torch.compile is given, and, in float64, what everybody's errors are measured against.
A provider that is not installed is a `str`: the reason.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import providers
from .cross_entropy import IGNORED, cross_entropy
from .roofline import Model

EPS = 1e-6


def inputs(op: str, m: Model, n: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Leaves of the operation's shapes for n tokens, of the spread that they have in a model."""
    generator = torch.Generator(device).manual_seed(0)
    randn = partial(torch.randn, generator=generator, dtype=dtype, device=device)
    d, f, v = m.hidden, m.intermediate, m.vocab
    shapes = {
        "rms_norm": [(n, d), (d,)],
        "add_rms_norm": [(n, d), (n, d), (d,)],
        "swiglu": [(n, f), (n, f)],
        "rope": [(n, m.q_heads, m.head_dim), (n, m.k_heads, m.head_dim)],
        "norm_rope": [(n, m.q_heads, m.head_dim), (n, m.k_heads, m.head_dim), (m.head_dim,), (m.head_dim,)],
        "cross_entropy": [(n, v)],
        "linear_cross_entropy": [(n, d), (v, d)],
    }[op]
    made = [randn(shape) for shape in shapes]
    if op == "linear_cross_entropy":
        made[1] *= 2 / d**0.5  # logits with a standard deviation of 2
    return [x.requires_grad_() for x in made]


def targets(n: int, vocab: int, device: str) -> Tensor:
    """(n,) random targets, every tenth IGNORED."""
    made = torch.randint(vocab, (n,), generator=torch.Generator(device).manual_seed(1), device=device)
    made[::10] = IGNORED
    return made


def angles(n: int, head_dim: int, device: str, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """cos and sin (n, 1, head_dim / 2) of positions 0 to n - 1, base 1e6 (Qwen2.5's)."""
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=dtype) / head_dim
    angle = torch.arange(n, device=device, dtype=dtype)[:, None] * 1e6**-exponent
    return angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)


# --- the plain definitions, as transformers writes them ------------------------------------------------------------


def _rms_norm(x, w):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def _add_rms_norm(x, residual, w):
    s = x + residual
    return _rms_norm(s, w), s


def _swiglu(gate, up):
    return F.silu(gate) * up


def _rope(q, k, cos, sin):
    def turn(x):
        a, b = x.chunk(2, dim=-1)
        turned = torch.cat((-b, a), dim=-1)
        return x * torch.cat((cos, cos), -1).to(x.dtype) + turned * torch.cat((sin, sin), -1).to(x.dtype)

    return turn(q), turn(k)


def _norm_rope(q, k, q_weight, k_weight, cos, sin):
    return _rope(_rms_norm(q, q_weight), _rms_norm(k, k_weight), cos, sin)


def _cross_entropy(logits, y, scale):
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, y, ignore_index=IGNORED, reduction="sum") * scale


def _linear_cross_entropy(hidden, weight, y, scale):
    return _cross_entropy(hidden @ weight.T, y, scale)


# --- everybody -----------------------------------------------------------------------------------------------------


def extras(op: str, m: Model, n: int, dtype: torch.dtype, device: str) -> tuple:
    """What the formula takes after the leaves: angles, or targets and scale."""
    wide = torch.promote_types(dtype, torch.float32)
    if "rope" in op:
        return angles(n, m.head_dim, device, wide)
    if "cross_entropy" in op:
        return targets(n, m.vocab, device), torch.tensor(1 / n, dtype=wide, device=device)
    return ()


def formula(op: str) -> Callable:
    """The definition: (leaves, extras) -> output or outputs."""
    return globals()[f"_{op}"]


def everybody(op: str) -> dict[str, Callable | str]:
    """Provider → function of (leaves, extras), or why there is none."""
    try:
        liger = providers.kernels("liger")
    except ValueError as error:
        liger = str(error)
    peers = {
        "ours": _signature(op, providers.TRITON),
        "eager": formula(op),
        "torch.compile": torch.compile(formula(op), dynamic=False),
        "torch": _torchs_own(op),
        "liger": liger if isinstance(liger, str) else _signature(op, liger),
    }
    if op == "linear_cross_entropy":
        if not isinstance(liger, str):  # as it comes: dW added up in bf16, logits in chunks of N·D elements
            as_it_comes = partial(liger.linear_cross_entropy, accumulate=None, chunk=1)
            peers |= {"liger default": as_it_comes, "liger chunk 2048": partial(liger.linear_cross_entropy, chunk=2048)}
        peers |= {f"ours chunk {c}": partial(providers.TRITON.linear_cross_entropy, chunk=c) for c in (2048, 8192)}
        peers["cut-cross-entropy"] = _cut_cross_entropy()
    peers["quack"] = _quack(op)
    return peers


def _signature(op: str, kernels: providers.Kernels) -> Callable:
    """A provider's function without its eps."""
    if op == "cross_entropy":
        if kernels is providers.TRITON:
            return cross_entropy
        from . import liger

        return liger.cross_entropy
    function = getattr(kernels, op)
    if op == "norm_rope":
        return lambda *tensors: function(*tensors[:4], EPS, *tensors[4:])
    return (lambda *tensors: function(*tensors, EPS)) if "norm" in op else function


def _torchs_own(op: str) -> Callable | str:
    """What torch.nn.functional itself has."""
    if op == "rms_norm":
        return lambda x, w: F.rms_norm(x, w.shape, w, EPS)
    if op == "add_rms_norm":
        return lambda x, r, w: (F.rms_norm(s := x + r, w.shape, w, EPS), s)
    if op == "linear_cross_entropy":
        if not hasattr(F, "linear_cross_entropy"):
            return f"torch {torch.__version__} has no F.linear_cross_entropy"
        # "balanced": dW accumulated in float32 as ours; its own choice on a GPU adds up in bf16
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=4096, acc_policy="balanced")
        settings = dict(reduction="sum", ignore_index=IGNORED, options=options)
        return lambda h, w, y, s: s * F.linear_cross_entropy(h, w, y, **settings)
    return "torch.nn.functional has none of its own"


def _quack(op: str) -> Callable | str:
    try:
        from quack.cross_entropy import cross_entropy as quack_cross_entropy
        from quack.linear_cross_entropy import chunked_linear_cross_entropy
        from quack.rmsnorm import rmsnorm
    except ImportError as error:
        return f"not installed ({error}); pip install quack-kernels"
    return {
        "rms_norm": lambda x, w: rmsnorm(x, w, eps=EPS),
        "add_rms_norm": lambda x, r, w: rmsnorm(x, w, residual=r, eps=EPS, prenorm=True),
        "cross_entropy": lambda x, y, s: s * quack_cross_entropy(x, y, reduction="sum", inplace_backward=True),
        "linear_cross_entropy": lambda h, w, y, s: s * chunked_linear_cross_entropy(h, w, y, reduction="sum"),
    }.get(op, "has none of this signature")


def _cut_cross_entropy() -> Callable | str:
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        return f"not installed ({error}); pip install cut-cross-entropy"
    # Without its gradient filter, which leaves small gradients out: for pre-training it should be off.
    return lambda h, w, y, s: s * linear_cross_entropy(h, w, y, reduction="sum", filter_eps=None)
