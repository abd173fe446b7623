"""What a run says about itself: metrics.jsonl, the progress bar, and model FLOPs.

metrics.jsonl is the source of truth, one JSON object a line: after every step its loss, gradient norm, learning rate
and speed; at every evaluation `val_NAME_loss` and `val_NAME_bpb`. Values stay on the device until a log step fetches
those of all steps since the last in one go: reading a number off a GPU makes the CPU wait for it.

FLOPs count what the model needs, not what the hardware did: 6 · parameters in matrix products · tokens (lm_head
included, the embedding look-up not) + 6 · layers · heads · head_dim · Σ len² over the document pieces as they really
are (causal attention: half of 12). Recomputation is not counted. MFU is that rate over the datasheet's dense bf16
peak.
"""

import json
import os
import re
import resource
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from nanomed.checkpoint import write_durably
from nanomed.config import Config
from nanomed.model import Decoder
from nanomed.parallel import World

# Dense bf16 tensor-core peaks in FLOP/s, from the vendors' datasheets, by the name the driver gives the device.
BF16_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "MI300X": 1307e12,
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Datasheet peak of the device in FLOP/s, None where unknown: no number is better than a wrong one."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    if "Laptop" in name or "MIG" in name:
        return None
    return next((peak for key, peak in BF16_PEAKS.items() if re.search(rf"\b{key}\b", name)), None)


def flops_per_token(model: Decoder) -> int:
    """6 · parameters in matrix products. Call before sharding or after: global shapes are counted."""
    tied = model.config.tie_word_embeddings
    return 6 * sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.ndim > 1 and (tied or name != "model.embed_tokens.weight")
    )


def attention_flops(model: Decoder) -> int:
    """To be multiplied by Σ len² over the document pieces."""
    c = model.config
    return 6 * c.num_hidden_layers * c.num_attention_heads * c.head_dim


class Metrics:
    """Collects the steps of a run and writes them out; only rank 0 has a file and a bar."""

    def __init__(self, out: Path, config: Config, world: World, model: Decoder, step: int, n_steps: int):
        self.config, self.world, self.path = config, world, out / "metrics.jsonl"
        self.per_token, self.per_len2 = flops_per_token(model), attention_flops(model)
        self.peak = peak_flops(world.device, config.precision)
        self._rows, self._values, self._len2 = [], [], 0
        self._start, self._wait_s = time.perf_counter(), 0.0
        self.bar = tqdm(total=n_steps, initial=step, unit="step", disable=not world.first(), dynamic_ncols=True)
        self._sinks = _sinks(out, config) if world.first() else []
        if world.first():
            self._keep_until(step)

    def _keep_until(self, step: int) -> None:
        """Cut metrics.jsonl back to the step from which the run goes on (0: anew); a torn last line goes too."""
        rows = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        write_durably(self.path, "".join(json.dumps(r) + "\n" for r in rows if step and r["step"] <= step))

    def add(self, step: int, lr: float, loss: Tensor, grad_norm: Tensor, len2: int) -> None:
        """Note a finished step. loss () is this rank's part of the sum and stays on its device; len2 its Σ len²."""
        self._rows.append({"step": step, "tokens": step * self.config.batch_tokens, "lr": lr})
        self._values += [loss, grad_norm / self.world.size]
        self._len2 += len2

    def flush(self, wait_s: float) -> None:
        """Write all steps noted since the last flush. wait_s: seconds in total that steps have waited for data."""
        if not self._rows:
            return
        values = torch.stack(
            [v.double() for v in self._values] + [torch.tensor(float(self._len2)).double().to(self.world.device)]
        )
        dist.all_reduce(values)
        *values, len2 = values.tolist()
        seconds = time.perf_counter() - self._start
        tokens = len(self._rows) * self.config.batch_tokens
        flop_s = (self.per_token * tokens + self.per_len2 * len2) / seconds / self.world.size
        speed = {
            "tok_s": tokens / seconds,
            "mfu": flop_s / self.peak if self.peak else None,
            "data_wait": (wait_s - self._wait_s) / seconds,
            "memory_gb": _peak_memory_bytes(self.world.device) / 1e9,
        }
        for row, loss, grad_norm in zip(self._rows, values[0::2], values[1::2], strict=True):
            row |= {"loss": loss, "grad_norm": grad_norm, **speed}
        self._write(self._rows)
        self._show(self._rows[-1], flop_s)
        self._rows, self._values, self._len2, self._wait_s = [], [], 0, wait_s

    def restart_clock(self) -> None:
        """Leave out of the speed whatever happened since the last step (evaluation, checkpoint)."""
        self._start = time.perf_counter()

    def validation(self, step: int, results: dict[str, float]) -> None:
        """One line with all validation figures of a step, to the file and above the bar."""
        if results and self.world.first():
            self._write([{"step": step, "tokens": step * self.config.batch_tokens, **results}])
            shown = "  ".join(f"{k.removeprefix('val_')} {v:.4f}" for k, v in results.items())
            self.bar.write(f"step {step:>6}  {shown}", file=sys.stderr)

    def _write(self, rows: list[dict]) -> None:
        if not self.world.first():
            return
        with self.path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        for row in rows:
            for sink in self._sinks:
                sink(row)

    def _show(self, row: dict, flop_s: float) -> None:
        mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}"
        self.bar.set_postfix_str(
            f"loss {row['loss']:.4f}, norm {row['grad_norm']:.2f}, lr {row['lr']:.1e}, {row['tok_s']:,.0f} tok/s, "
            f"{flop_s / 1e12:.2f} TFLOP/s, mfu {mfu}, {row['memory_gb']:.1f} GB, data wait {row['data_wait']:.1%}",
            refresh=False,
        )
        self.bar.update(row["step"] - self.bar.n)

    def close(self) -> None:
        """Finish the bar."""
        self.bar.close()


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _sinks(out: Path, config: Config) -> list:
    """TensorBoard and W&B as functions of a row, where they were asked for."""
    sinks = []
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(out / "tensorboard")
        sinks.append(lambda row: [writer.add_scalar(k, v, row["step"]) for k, v in row.items() if v is not None])
    if config.wandb:
        import wandb

        run = wandb.init(project=config.wandb, dir=out, id=out.name, resume="allow")
        sinks.append(lambda row: run.log(row, step=row["step"]))
    return sinks
