"""What memory and matrix units allow: the least time of every kernel at the shapes of the paper's three models.

    floor = bytes moved / copy bandwidth + FLOP in matrix products / GEMM rate

A kernel whose bytes are read and written once, at the speed of a plain copy, cannot be made faster; a result in per
cent of the floor says how much is left. bench.py measures both rates on the GPU at hand, since data sheets promise more
than any kernel gets; without a GPU it predicts with GUESSED, and says so.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """The sizes that kernels see."""

    name: str
    hidden: int  # D
    intermediate: int  # F
    vocab: int  # V
    q_heads: int  # H
    k_heads: int  # K
    head_dim: int


MODELS = {
    model.name: model
    for model in (
        Model("qwen2.5-7b", 3584, 18944, 152064, 28, 4, 128),
        Model("mistral-7b", 4096, 14336, 32768, 32, 8, 128),
        Model("mistral-small-24b", 5120, 32768, 131072, 32, 8, 128),
    )
}

OPS = ("rms_norm", "add_rms_norm", "swiglu", "rope", "norm_rope", "cross_entropy", "linear_cross_entropy")


@dataclass(frozen=True)
class Device:
    """Two rates: bytes a second that a large copy moves (read + written), and FLOP a second of a large bf16 product."""

    name: str
    copy: float
    gemm: float


# Plausible for large sizes, not measured by us: the data sheets' 3.35 and 4.8 TB/s less a tenth, 990 TFLOP/s less a fifth.
GUESSED = {"h100": Device("H100 SXM", 3.0e12, 8.0e14), "h200": Device("H200 SXM", 4.3e12, 8.0e14)}


def traffic(op: str, m: Model, n: int) -> dict[str, tuple[int, int]]:
    """(bytes, FLOP in matrix products) of an op on n tokens in bf16, for its `forward`, `backward` and `both`.

    The losses make their gradient in the forward pass; for them there is `both` only. Row-sized extras (rstd, losses,
    targets), weights of D and RoPE's angles are left out: less than 1 %, the angles 3 %.
    """
    heads = (m.q_heads + m.k_heads) * m.head_dim
    elements = {
        "rms_norm": m.hidden,
        "add_rms_norm": m.hidden,
        "swiglu": m.intermediate,
        "rope": heads,
        "norm_rope": heads,
    }
    a_number = {"rms_norm": (4, 6), "add_rms_norm": (8, 8), "swiglu": (6, 10), "rope": (4, 4), "norm_rope": (4, 6)}
    if op in elements:
        forward, backward = (b * n * elements[op] for b in a_number[op])
        return {"forward": (forward, 0), "backward": (backward, 0), "both": (forward + backward, 0)}
    flop = 6 * n * m.hidden * m.vocab if op == "linear_cross_entropy" else 0
    return {"both": (6 * n * m.vocab, flop)}


def floor_s(cost: tuple[int, int], device: Device) -> float:
    """Seconds that the device needs at the least for (bytes, FLOP), one after the other."""
    moved, flop = cost
    return moved / device.copy + flop / device.gemm
