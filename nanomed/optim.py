"""AdamW with its means made beforehand, clipping that never waits for the device, and the schedule as a pure function.

The paper's recipe: AdamW, linear warm-up, linear decay to zero. The learning rate is computed from the step number,
so a checkpoint needs no scheduler. AdamW's running means are made before the first step instead of in it: their
memory shows at once, they can be bf16 (fused AdamW then runs its mixed-precision kernel), and a checkpoint has
something to load into.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from nanomed.config import Config


def make_adamw(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """Fused AdamW over all parameters, without decay on norms and biases (everything one-dimensional)."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    dtype = torch.bfloat16 if config.optimizer_states == "bf16" else torch.float32
    for p in params:
        optimizer.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": torch.zeros_like(p, dtype=dtype),
            "exp_avg_sq": torch.zeros_like(p, dtype=dtype),
        }
    if dtype != torch.float32 and params[0].device.type == "cpu":  # whose fused kernel knows no mixed precisions
        optimizer.register_step_pre_hook(lambda *_: _cast_means(optimizer, torch.float32))
        optimizer.register_step_post_hook(lambda *_: _cast_means(optimizer, dtype))
    return optimizer


def _cast_means(optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> None:
    for state in optimizer.state.values():
        state |= {key: state[key].to(dtype) for key in ("exp_avg", "exp_avg_sq")}


def lr_at(step: int, n_steps: int, config: Config) -> float:
    """Learning rate of a step, counted from 0: linear up to lr in warmup_steps, then linear to 0 after the last."""
    warm = (step + 1) / max(1, config.warmup_steps)
    return config.lr * min(warm, (n_steps - step) / max(1, n_steps - config.warmup_steps), 1.0)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients down to a global 2-norm of max_norm. Returns the norm before, () float32 on the device."""
    params = [p for p in model.parameters() if p.grad is not None]
    norm = get_total_norm([p.grad for p in params])
    if isinstance(norm, DTensor):  # each rank has summed its own rows only
        norm = norm.full_tensor()
    clip_grads_with_norm_(params, max_norm, norm)
    return norm
