"""AdamW with its moments made beforehand, clipping that never waits for the device, and the schedule as a pure function.

The paper's recipe: AdamW, linear warm-up, linear decay to zero. The learning rate is computed from the step number,
so a checkpoint needs no scheduler. AdamW's moments are made before the first step instead of in it: their
memory shows at once, and a checkpoint has something to load into. All in float32 it is torch's own fused AdamW;
anything less is nanomed.lowbit's.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nanomed import parallel
from nanomed.config import Config
from nanomed.kernels.common import INTERPRETED, triton
from nanomed.lowbit import LowbitAdamW, take_sums


def make_adamw(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW over all parameters, without decay on norms and biases (everything one-dimensional).

    It skips a step on the device if a () float32 tensor `found_inf` of 1 is set on it.
    """
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    shared = dict(lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)
    if config.optimizer_states != "fp32" or params[0].dtype != torch.float32:
        backend = "compiled" if config.compile and parallel.can_compile(params[0].device) else "eager"
        if triton is not None and (params[0].is_cuda or (config.kernels == "triton" and INTERPRETED)):
            backend = "triton"  # with --kernels torch and liger, too: what these compare is the model's step
        return LowbitAdamW(groups, **shared, moments=config.optimizer_states, backend=backend)
    optimizer = torch.optim.AdamW(groups, **shared, fused=True)
    for p in params:
        optimizer.state[p] = {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer


def lr_at(step: int, n_steps: int, config: Config) -> float:
    """Learning rate of a step, counted from 0: linear up to lr in warmup_steps, then linear to 0 after the last."""
    warm = (step + 1) / max(1, config.warmup_steps)
    return config.lr * min(warm, (n_steps - step) / max(1, n_steps - config.warmup_steps), 1.0)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip(model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """Have the next step scale all gradients down to a global 2-norm of max_norm. Returns the norm, () float32 on the device.

    The factor goes to the optimiser as its `grad_scale`, by which it divides what it reads: scaling the gradients here
    would read and write them all once more. (torch's AdamW writes them back divided; nobody reads them after a step.)
    """
    take_sums(model)
    params = [p for p in model.parameters() if p.grad is not None]
    # Each tensor's norm in float32: of bf16 gradients torch would give bf16 ones, 0.4 % off.
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in params]))
    if isinstance(norm, DTensor):  # each rank has summed its own rows only
        mesh = norm.device_mesh
        norm = norm.full_tensor()
        if mesh.ndim > 1:  # HSDP: the groups sum separately, perhaps in another order; all must decide alike
            dist.broadcast(norm, group=mesh.get_group(0), group_src=0)
    optimizer.grad_scale = (norm / max_norm).clamp(min=1)
    return norm
