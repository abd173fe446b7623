"""AdamW in less memory: bf16 weights whose updates are rounded stochastically, and moments in bf16 or 8 bits.

Bytes a parameter, gradients included (measured on tensors by tests/test_lowbit.py; what FSDP divides by the ranks):

    weights and gradients   moments fp32   bf16    int8
    fp32                        16        12     10.03
    bf16 (pure-bf16)            12         8      6.03        7.6 B parameters: 122 GB → 46 GB

Stochastic rounding. bf16 keeps 8 bits: between 0.0625 and 0.125 its numbers are 4.9e-4 apart, and an Adam update of
1e-5 rounded to nearest vanishes, always (98 % of SmolLM2-135M's weights are too large to be moved by it:
tests/bench/lost_updates.py). Rounded up with the probability of what is cut off, it arrives on average:
E[round(x)] = x. The same is done when micro-batches' gradients are summed: the 257th of equal ones would be lost.

8-bit moments are those of Dettmers et al., 2021 (arXiv 2110.02861) in torchao's map: blocks of up to 256 numbers
share a float32 scale, codes index a map that is finest near 0. The step around them is ours, not torchao's AdamW8bit,
because: it keeps codes of sqrt(v) instead of v (kernels/adamw.py says why), it skips a step on the device (`found_inf`, as
torch's fused AdamW does, no host sync), it works on a rank's own rows (AdamW8bit of torchao 0.18 stops at the first step on
bf16 DTensors), and blocks never cross a row, so that a checkpoint can be cut anew for any number of ranks. The first moment
is AdamW8bit's, bit by bit (a test); the kernel's codes are those of the torch reference, except by one within rounding of
the middle of two.

Cost: a kernel a parameter, kernels/adamw.py: each reads gradient, weight and moments and writes weight and moments, once: 14
bytes a parameter with bf16 moments, 10 with int8. On the CPU, --offload included, its torch twin: compiled, or without a
compiler in eager mode, slower and with float32 temporaries of one parameter's size. (A number of GPUs that is no power
of two may cut a gradient at an address that is no multiple of 16: then the kernel is compiled once more, with narrow loads.)
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from nanomed.kernels import adamw
from nanomed.weights import local

MAX_BLOCK, MIN_BLOCK = 256, 32  # numbers that share a scale; rows without such a divisor keep float32 moments


def block_size(row: int) -> int | None:
    """The largest divisor of the row length up to 256; None where that is below 32."""
    best = max(b for b in range(1, min(row, MAX_BLOCK) + 1) if row % b == 0)
    return best if best >= MIN_BLOCK else None


class LowbitAdamW(torch.optim.Optimizer):
    """AdamW over float32 or bf16 parameters, plain tensors or DTensors cut by rows; moments in fp32, bf16 or int8.

    State of a parameter, in its shape and placement: `step`, `exp_avg`, `exp_avg_sq`; for int8 (matrices only; vectors keep
    float32) `step`, the codes `exp_avg` and `exp_avg_sqrt`, and their scales, (rows, row / block). All are there before the
    first step and keep their memory.
    """

    def __init__(self, groups: list[dict], lr: float, betas: tuple, eps: float, moments: str, backend: str):
        """groups as torch's, each with its weight_decay; moments: fp32, bf16 or int8 (needs torchao).

        backend: triton, or the torch twins, `compiled` or `eager`.
        """
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, fused=True))  # as torch's: it obeys found_inf
        self._update, add = adamw.adamw_torch_, adamw.add_rounded_torch_
        if backend == "triton":
            self._update, add = adamw.adamw_, adamw.add_rounded_
        elif backend == "compiled":
            self._update, add = (torch.compile(twin, fullgraph=True) for twin in (self._update, add))
        params = [p for group in self.param_groups for p in group["params"]]
        device = params[0].device
        self._maps = [torch.tensor(m, device=device) for m in _maps()] if moments == "int8" else [None, None]
        self._step = torch.zeros((), device=device)  # one count, seen by every parameter's state
        for p in params:
            self.state[p] = {"step": self._step, **_zeros(p, moments)}
            if p.dtype == torch.bfloat16:
                p.register_post_accumulate_grad_hook(lambda p: _set_aside(p, add))

    @torch.no_grad()
    def step(self) -> None:
        """One update. Two () float32 tensors may be set on the optimiser beforehand, as on torch's fused AdamW.

        `found_inf`: if it is 1, nothing changes, the count included. `grad_scale`: gradients are divided by it.
        """
        found_inf, grad_scale = (getattr(self, name, None) for name in ("found_inf", "grad_scale"))
        skip = None if found_inf is None else found_inf.to(self._step.device)  # elsewhere if parameters are offloaded
        self._step += 1 if skip is None else 1 - skip
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            # Tensors, for a changing number would compile anew; on the CPU: they travel as a kernel's arguments.
            lr, decay = torch.tensor(group["lr"]), torch.tensor(group["weight_decay"])
            corrections = 1 - beta1**self._step, 1 - beta2**self._step
            for p in group["params"]:
                if p.grad is None or not (x := local(p)).numel():  # a rank may own no row of a small one
                    continue
                state = {key: local(value) for key, value in self.state[p].items()}
                keys = QUANTIZED if QUANTIZED[1] in state else MOMENTS
                scales = [state[f"{key}_scale"].view(-1) if keys is QUANTIZED else None for key in keys]
                shape = (-1,) if scales[0] is None else (len(scales[0]), -1)
                tensors = (t.view(shape) for t in (x, local(p.grad), *(state[key] for key in keys)))
                self._update(
                    *tensors, scales, self._maps, lr, decay, corrections, skip, grad_scale, adamw.draw_seed(),
                    beta1, beta2, group["eps"],
                )  # fmt: skip


MOMENTS = ("exp_avg", "exp_avg_sq")
QUANTIZED = ("exp_avg", "exp_avg_sqrt")  # an older format kept codes of exp_avg_sq: FORMER_SCALE tells its checkpoints
FORMER_SCALE = "exp_avg_sq_scale"


def _maps() -> tuple[list, list]:
    """What the 256 codes mean, in units of the block's scale: for exp_avg, and for exp_avg_sq, which is never < 0."""
    from torchao.optim.quant_utils import create_dynamic_map

    return create_dynamic_map(signed=True), create_dynamic_map(signed=False)


@torch.no_grad()
def _zeros(p: Tensor, moments: str) -> dict[str, Tensor]:
    block = block_size(p.shape[1]) if moments == "int8" and p.ndim == 2 else None
    dtype = torch.uint8 if block else torch.bfloat16 if moments == "bf16" else torch.float32
    zeros = {key: torch.zeros_like(p, dtype=dtype) for key in (QUANTIZED if block else MOMENTS)}
    if block:  # of codes; under a scale of 0 any code means 0
        zeros |= {f"{key}_scale": torch.zeros_like(p[:, ::block], dtype=torch.float32) for key in QUANTIZED}
    return zeros


# --- sums of bf16 gradients ----------------------------------------------------------------------------------------


def _set_aside(p: Tensor, add) -> None:
    """After a micro-batch's gradient of p: add it to the step's sum, which waits in p.grad_sum for `take_sums`.

    Autograd (and FSDP) would add to p.grad itself, rounding to nearest.
    """
    if (total := getattr(p, "grad_sum", None)) is None:
        # The loss' dW may lie in float32's memory. (FSDP's gradients are pieces of one buffer, and stay there.)
        larger = not isinstance(p.grad, DTensor) and p.grad.untyped_storage().nbytes() > p.grad.nbytes
        p.grad_sum = p.grad.clone() if larger else p.grad
    else:
        if p.grad.device.type == "cpu" and torch.cuda.is_available():  # offloaded; it may still be on its way
            torch.cuda.current_stream().synchronize()
        add(local(total).view(-1), local(p.grad).view(-1), adamw.draw_seed())
    p.grad = None


def take_sums(model: torch.nn.Module) -> None:
    """Put the gradients' sums, where they were set aside, into p.grad."""
    for p in model.parameters():
        if (total := getattr(p, "grad_sum", None)) is not None:
            p.grad, p.grad_sum = total, None
