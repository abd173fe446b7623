"""AdamW in one pass over memory: weights rounded stochastically, moments in 8 bits; and the sum of two bf16 gradients.

    g = grad / grad_scale        m ← m + (1 − β1) (g − m)        v ← v + (1 − β2) (g² − v)
    p ← p − lr · decay · p − lr · (m / (1 − β1^t)) / (sqrt(v) / sqrt(1 − β2^t) + eps)

All in float32, each result rounded once (arXiv 1711.05101). What that takes apart is in nanomed.lowbit's docstring; here is
why it is a kernel: torch.compile's version reads the same bytes and took 3 to 11 times as long as they need on an H100
(PyTorch 2.11, 7.6 B parameters: 122 ms with Philox's noise, 433 ms with ours, where the traffic is 25 ms), for reasons that
change with its heuristics.

Noise. 16 random bits an element are a hash of its number and a seed: a dozen integer operations, where Philox takes ten
rounds for 128 bits of which one would use 16.

8 bits (Dettmers et al., 2021, arXiv 2110.02861). A block of up to 256 numbers shares a scale, its largest magnitude. Of the
256 codes each means a number in [-1, 1]: 7 decades, the i-th cut into 2^i equal pieces whose middles the codes are, mirrored
for negative numbers; where there are none, twice as many pieces; then 0 and 1. What is kept of v is sqrt(v), which the step
computes anyway: its codes reach 14 decades of v below the block's largest, where codes of v itself end at 7, and what is
rounded to 0 makes the next update huge. For the same reason no v > 0 gets the code 0. (A column of gradients 3,000 times the
others': updates of 13,586 lr with codes of v, 1.5 lr with these.) So a number's code needs no search in the
table, which costs eight dependent loads: its decade is three comparisons, its piece in it a multiplication. Still it is
arithmetic that bounds the step, not memory: 1,090 instructions for 256 numbers on an H100 are 35 ms for 7.6 B parameters, and
the traffic is 25; measured: 40 alone, 45 in a training step.

Bytes a parameter with bf16 weights: 10 with codes (p, grad, m, v → p, m, v), 14 with bf16 moments; the sum 6.
"""

import torch
from torch import Tensor

from .common import jit, next_power_of_2, on_device_of, tl, triton

TILE, WARPS = 1024, 4  # numbers of a program: 8 a thread, one 128-bit load of bf16


@jit
def _rounded(x, at, seed):
    """float32 x with the lower half of its bits rounded away, up or down: a number bf16 has. `round_stochastically`."""
    h = at.to(tl.uint32) + tl.cast(seed, tl.uint32)
    h = (h ^ (h >> 16)) * tl.cast(0x7FEB352D, tl.uint32)
    h = (h ^ (h >> 15)) * tl.cast(0x846CA68B, tl.uint32)
    bits = x.to(tl.uint32, bitcast=True)
    up = (bits + ((h ^ (h >> 16)) & 0xFFFF)) & tl.cast(0xFFFF0000, tl.uint32)
    return tl.where((bits & 0x7F800000) == 0x7F800000, x, up.to(tl.float32, bitcast=True))  # not finite: as it is


@jit(do_not_specialize=["seed"])  # else every sixteenth, the multiples of 16, would be another kernel
def _add(total_ptr, grad_ptr, N, seed, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(total_ptr + at, mask=at < N, other=0.0).to(tl.float32)
    x += tl.load(grad_ptr + at, mask=at < N, other=0.0).to(tl.float32)
    tl.store(total_ptr + at, _rounded(x, at, seed).to(total_ptr.dtype.element_ty), mask=at < N)


@jit
def _codes(x, SIGNED: tl.constexpr):
    """The codes of x in [-1, 1], or in [0, 1] where it is not SIGNED: the nearest numbers of the map, but 0 for 0 only there."""
    first: tl.constexpr = 1 if SIGNED else 2  # pieces of the first decade, [1e-7, 1e-6]
    a = tl.abs(x)
    in_first = a  # moved down to the first decade, by 4, 2 and 1 of them
    pieces = tl.zeros_like(a) + first
    for i in tl.static_range(2, -1, -1):
        above = in_first >= 10.0 ** (2**i - 7)
        in_first *= tl.where(above, 10.0 ** -(2**i), 1.0)
        pieces *= tl.where(above, 2.0 ** (2**i), 1.0)
    at = (in_first * (1e6 / 0.9) - 1 / 9) * pieces  # a decade begins at its ninth
    code = pieces - first + tl.minimum(tl.maximum(tl.floor(at), 0.0), pieces - 1)
    code += tl.where(at < 0.2, 0.0, 1.0)  # below a fifth of a piece the last middle of the decade before is nearer
    top = a >= 1 - 0.225 / (first * 64)
    if SIGNED:
        code = tl.where(a < 0.5e-6 * (0.1 + 0.45 / first), 0.0, tl.maximum(code, 1.0))
        code = 127 + tl.where(x < 0, -code, tl.where(top, 128.0, code))  # -1 has no code of its own
    else:
        code = tl.where(top, 255.0, tl.where(a > 0, tl.maximum(code, 1.0), 0.0))
    return code.to(tl.int32).to(tl.uint8)


@jit
def _moment(moment_ptr, scale_ptr, map_ptr, at, row, mask, of_row, CODES: tl.constexpr):
    """A tile of a moment in float32."""
    moment = tl.load(moment_ptr + at, mask=mask, other=0)
    if CODES:
        # Not tl.load(map_ptr + codes): its layout, a number a thread, would become that of the whole step.
        numbers = tl.gather(tl.load(map_ptr + tl.arange(0, 256)), moment.to(tl.int32).reshape(moment.numel), 0)
        return numbers.reshape(moment.shape) * tl.load(scale_ptr + row, mask=of_row, other=0.0)[:, None]
    return moment.to(tl.float32)


@jit
def _keep(moment, moment_ptr, scale_ptr, at, row, mask, of_row, CODES: tl.constexpr, SIGNED: tl.constexpr):
    """The reverse; masked elements are 0."""
    if CODES:
        scale = tl.maximum(tl.max(tl.abs(moment), axis=1), 1e-12)
        tl.store(scale_ptr + row, scale, mask=of_row)
        tl.store(moment_ptr + at, _codes(moment * (1 / scale)[:, None], SIGNED), mask=mask)
    else:
        tl.store(moment_ptr + at, moment.to(moment_ptr.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["seed"])
def _step(
    p_ptr, grad_ptr, m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, m_map_ptr, v_map_ptr, m_correction_ptr, v_correction_ptr,
    skip_ptr, grad_scale_ptr, N, block, seed, lr, decay, toward_m, toward_v, eps,
    CODES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    if skip_ptr is not None:  # noqa: SIM102  Triton does not stop at the first half of an `and`
        if tl.load(skip_ptr) != 0:
            return
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)[None, :]
    at = row[:, None] * block + cols
    mask, of_row = (cols < block) & (at < N), row * block < N
    g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if grad_scale_ptr is not None:
        g *= 1 / tl.load(grad_scale_ptr)
    m = _moment(m_ptr, m_scale_ptr, m_map_ptr, at, row, mask, of_row, CODES)
    v = _moment(v_ptr, v_scale_ptr, v_map_ptr, at, row, mask, of_row, CODES)
    if CODES:  # of sqrt(v)
        v *= v
    m += tl.cast(toward_m, tl.float32) * (g - m)
    v += tl.cast(toward_v, tl.float32) * (g * g - v)
    lr = tl.cast(lr, tl.float32)
    x = tl.load(p_ptr + at, mask=mask, other=0.0).to(tl.float32)
    x -= lr * tl.cast(decay, tl.float32) * x
    root = tl.sqrt(v)
    divisor = root * (1 / tl.sqrt(tl.load(v_correction_ptr))) + tl.cast(eps, tl.float32)
    x -= (lr / tl.load(m_correction_ptr)) * m / divisor  # one division a number, the others one a program
    if p_ptr.dtype.element_ty == tl.bfloat16:
        x = _rounded(x, at, seed)
    tl.store(p_ptr + at, x.to(p_ptr.dtype.element_ty), mask=mask)
    _keep(tl.where(mask, m, 0.0), m_ptr, m_scale_ptr, at, row, mask, of_row, CODES, SIGNED=True)
    kept = root if CODES else v
    _keep(tl.where(mask, kept, 0.0), v_ptr, v_scale_ptr, at, row, mask, of_row, CODES, SIGNED=False)


def add_rounded_(total: Tensor, grad: Tensor, seed: Tensor) -> None:
    """total += grad, both bf16 of one size and contiguous, rounded stochastically. seed: of `draw_seed`."""
    n = total.numel()
    check_packed(total=total, grad=grad)
    if n:
        with on_device_of(total):
            _add[(triton.cdiv(n, TILE),)](total, grad, n, seed.item(), BLOCK=TILE, num_warps=WARPS)


def adamw_(
    p: Tensor,  # float32 or bf16, flat or (blocks, block), contiguous as all of them
    grad: Tensor,  # as p
    exp_avg: Tensor,  # p's shape: float32, bf16, or uint8 codes
    exp_avg_sq: Tensor,  # the same; codes are of its square root
    scales: list[Tensor | None],  # (blocks,) float32 of both moments, where they are codes
    maps: list[Tensor | None],  # (256,) float32: what the codes mean, torchao's
    lr: Tensor,  # () float32 on the CPU, like decay
    decay: Tensor,
    corrections: tuple[Tensor, Tensor],  # () float32 on the device: 1 - beta^step of both moments
    skip: Tensor | None,  # () float32 on the device: if it is not 0, nothing changes
    grad_scale: Tensor | None,  # () float32 on the device: the gradient is divided by it
    seed: Tensor,  # () int32 on the CPU, of `draw_seed`
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """AdamW in place. Codes are those of the twin but where a number lies within rounding of the middle of two."""
    n, codes = p.numel(), scales[0] is not None
    check_packed(p=p, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    block = p.shape[1] if codes else TILE
    cols = next_power_of_2(block)
    rows = max(1, TILE // cols)
    if n:
        with on_device_of(p):
            _step[(triton.cdiv(n, rows * block),)](
                p, grad, exp_avg, exp_avg_sq, *scales, *maps, *corrections, skip, grad_scale, n, block, seed.item(),
                lr.item(), decay.item(), 1 - beta1, 1 - beta2, eps,
                CODES=codes, ROWS=rows, COLS=cols, num_warps=WARPS,
            )  # fmt: skip


def check_packed(**tensors: Tensor) -> None:
    """ValueError, naming the first tensor whose elements are not side by side in memory: the kernels count through them."""
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous (strides {tensor.stride()}); call .contiguous()")


def draw_seed() -> Tensor:
    """() int32, not negative, from torch's generator of the CPU, and there: it travels as a kernel's argument."""
    return torch.randint(1 << 31, (), dtype=torch.int32)


# --- the torch twins -----------------------------------------------------------------------------------------------


def round_stochastically(x: Tensor, seed: Tensor) -> Tensor:
    """float32 → bf16, up or down at random so that the mean is x. Infinities and NaN stay.

    A bf16 number is the upper half of a float32. Adding 16 random bits to the lower half carries into the upper one
    with probability lower half / 2^16.
    """
    rounded = ((x.view(torch.int32) + noise(x, seed)) & -(1 << 16)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).bfloat16()


def noise(x: Tensor, seed: Tensor) -> Tensor:
    """16 random bits for each of x's elements, int32 in [0, 2^16): C. Wellons' hash lowbias32 (2018) of number + seed."""
    bits = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape) + seed
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * 0x7FEB352D
    bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * (0x846CA68B - (1 << 32))
    return (bits ^ (bits >> 16)) & 0xFFFF


def add_rounded_torch_(total: Tensor, grad: Tensor, seed: Tensor) -> None:
    """As add_rounded_, the same bits, on any device."""
    total.copy_(round_stochastically(total.float() + grad.float(), seed))


def adamw_torch_(
    p, grad, exp_avg, exp_avg_sq, scales, maps, lr, decay, corrections, skip, grad_scale, seed, beta1, beta2, eps
) -> None:
    """As adamw_, on any device; made to be compiled, in eager mode it needs float32 temporaries."""
    g = grad.float() if grad_scale is None else grad.float() / grad_scale
    m = _dequantized(exp_avg, scales[0], maps[0]).lerp(g, 1 - beta1)
    v = _dequantized(exp_avg_sq, scales[1], maps[1])
    v = (v if scales[1] is None else v.square()).lerp(g.square(), 1 - beta2)
    root = v.sqrt()
    x = p.float()
    x = x - lr * decay * x
    x = x - lr * (m / corrections[0]) / (root / corrections[1].sqrt() + eps)
    new = [(p, round_stochastically(x, seed) if p.dtype == torch.bfloat16 else x)]
    if scales[0] is None:
        new += [(exp_avg, m.to(exp_avg.dtype)), (exp_avg_sq, v.to(exp_avg_sq.dtype))]
    else:
        codes, scale = _quantized(m, maps[0])
        new += [(exp_avg, codes), (scales[0], scale)]
        codes, scale = _quantized(root, maps[1])
        codes = torch.where(root > 0, codes.clamp(min=1), codes)  # rounded to 0, it would make the next update huge
        new += [(exp_avg_sq, codes), (scales[1], scale)]
    for old, value in new:
        old.copy_(value if skip is None else torch.where(skip != 0, old, value))


def _dequantized(moment: Tensor, scale: Tensor | None, qmap: Tensor | None) -> Tensor:
    if scale is None:
        return moment.float()
    from torchao.optim.quant_utils import dequant_with_qmap

    return dequant_with_qmap(moment, qmap, scale)


def _quantized(moment: Tensor, qmap: Tensor) -> tuple[Tensor, Tensor]:  # (B, block) -> codes (B, block), scales (B,)
    from torchao.optim.quant_utils import quantize_8bit_with_qmap, scale_tensor

    unit, scale = scale_tensor(moment, moment.shape[1])
    return quantize_8bit_with_qmap(unit, qmap), scale
