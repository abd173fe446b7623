"""What a run says about itself: metrics.jsonl, the progress bar, and model FLOPs.

metrics.jsonl is the source of truth, one JSON object a line: after every step its loss, gradient norm, learning rate,
speed and whether the guard skipped it (then a further line says why and names its documents); at every evaluation
`val_NAME_loss` and `val_NAME_bpb`. What is not finite is null. Values stay on the device until a log step fetches those
of all steps since the last in one go: reading a number off a GPU makes the CPU wait for it.

FLOPs count what the model needs, not what the hardware did: 6 · parameters in matrix products · tokens (lm_head
included, the embedding look-up not) + 6 · layers · heads · head_dim · Σ len² over the document pieces as they really
are (causal attention: half of 12). Recomputation is not counted. MFU is that rate over the datasheet's dense bf16
peak.
"""

import dataclasses
import json
import math
import os
import resource
import shlex
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from nanomed import batches
from nanomed.attention import takes_flash_attn_4
from nanomed.config import Config, has_bf16_hardware
from nanomed.devices import bf16_peak
from nanomed.files import read_json, write_durably
from nanomed.guard import Verdict, reason
from nanomed.model import Decoder
from nanomed.parallel import World, print0
from nanomed.stream import Stream


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Datasheet peak of the device in FLOP/s, None where unknown: no number is better than a wrong one."""
    if device.type != "cuda" or precision == "fp32":
        return None
    return bf16_peak(torch.cuda.get_device_name(device))


def flops_per_token(model: Decoder) -> int:
    """6 · parameters in matrix products. Call before sharding or after: global shapes are counted."""
    tied = model.config.tie_word_embeddings
    return 6 * sum(
        p.numel() for name, p in model.named_parameters() if p.ndim > 1 and (tied or name != "model.embed_tokens.weight")
    )


def attention_flops(model: Decoder) -> int:
    """To be multiplied by Σ len² over the document pieces."""
    c = model.config
    return 6 * c.num_hidden_layers * c.num_attention_heads * c.head_dim


def print_start(config: Config, world: World, model: Decoder, stream: Stream, vals: dict, n_steps: int) -> None:
    """What is about to happen, and the formula behind the figures of the progress bar."""
    n_params = sum(p.numel() for p in model.parameters())
    epoch, total = stream.start_of(1), n_steps * config.batch_tokens
    peak = peak_flops(world.device, config.precision)
    print0(f"model   {config.init}: {n_params / 1e6:,.1f} M parameters, {config.precision}")
    print0(f"data    {len(stream.lengths):,} documents, {epoch:,} tokens per epoch; validation: {', '.join(vals) or 'none'}")
    print0(f"run     {n_steps:,} steps x {config.batch_tokens:,} tokens = {total / epoch:.2f} epochs, windows of {config.seq_len}")
    if config.steps is None:
        print0(f"        the last {stream.start_of(config.epochs) - total:,} tokens fill no step and are dropped")
    how = f"{config.kernels} kernels{', flash-attn-4' * takes_flash_attn_4(config.dtype, model.config.head_dim)}"
    print0(f"device  {world.size} x {world.device.type}, {config.micro_batch} windows in a forward pass, {how}")
    print0(
        f"FLOPs   {flops_per_token(model):,} per token (6 x parameters in matrix products) + {attention_flops(model):,} x "
        f"squared document lengths{f'; MFU over {peak / 1e12:.0f} TFLOP/s (dense bf16)' if peak else ''}"
    )
    if config.precision != "fp32" and world.device.type == "cpu" and not has_bf16_hardware():
        print0("warning this CPU has no bf16 products and emulates them: --precision fp32 is tens of times as fast")


class Metrics:
    """Collects the steps of a run and writes them out; only rank 0 has a file and a bar."""

    def __init__(self, out: Path, config: Config, world: World, model: Decoder, stream: Stream | None, step: int, n_steps: int):
        self.config, self.world, self.path, self.run = config, world, out / "metrics.jsonl", out
        self.stream = stream  # to name a skipped step's documents
        self.per_token, self.per_len2 = flops_per_token(model), attention_flops(model)
        self.peak = peak_flops(world.device, config.precision)
        self._rows, self._values, self._len2 = [], [], 0
        self._start, self._wait_s = time.perf_counter(), 0.0
        self.bar = tqdm(total=n_steps, initial=step, unit="step", disable=not world.first(), dynamic_ncols=True)
        self._sinks = _sinks(out, config, step) if world.first() else []
        validated = [self._keep_until(step) if world.first() else None]
        dist.broadcast_object_list(validated, src=0, group=world.slow)
        self.validated: bool = validated[0]  # are the validation figures of this first step there already?

    def _keep_until(self, step: int) -> bool:
        """Cut metrics.jsonl back to the step from which the run goes on (0: anew); a torn last line goes too.

        Has that step been validated? Not if the run was stopped in the middle of it.
        """
        rows = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        rows = [r for r in rows if step and r["step"] <= step]
        write_durably(self.path, "".join(json.dumps(r) + "\n" for r in rows))
        return any(r["step"] == step and any(key.startswith("val_") for key in r) for r in rows)

    def add(self, step: int, lr: float, loss: Tensor, grad_norm: Tensor, verdict: Verdict, sum_squared_lens: int) -> None:
        """Note a finished step. loss, grad_norm () and the guard's verdict are those of all ranks and stay on the
        device; sum_squared_lens, over documents, is this rank's."""
        self._rows.append({"step": step, "tokens": step * self.config.batch_tokens, "lr": lr})
        self._values.append(torch.cat((torch.stack((loss.double(), grad_norm.double(), verdict.skip.double())), verdict.limits)))
        self._len2 += sum_squared_lens

    def flush(self, wait_s: float) -> None:
        """Write all steps noted since the last flush. wait_s: seconds in total that steps have waited for data."""
        if not self._rows:
            return
        all_len2 = torch.tensor(float(self._len2), dtype=torch.float64, device=self.world.device)
        dist.all_reduce(all_len2)
        values, len2 = torch.stack(self._values).tolist(), all_len2.item()
        seconds = time.perf_counter() - self._start
        tokens = len(self._rows) * self.config.batch_tokens
        flop_s = (self.per_token * tokens + self.per_len2 * len2) / seconds / self.world.size
        speed = {
            "tok_s": tokens / seconds,
            "mfu": flop_s / self.peak if self.peak else None,
            "data_wait": (wait_s - self._wait_s) / seconds,
            "memory_gb": _peak_memory_bytes(self.world.device) / 1e9,
        }
        skipped = []
        for row, (loss, grad_norm, skip, *limits) in zip(self._rows, values, strict=True):
            row |= {"loss": _or_none(loss), "grad_norm": _or_none(grad_norm), "skipped": bool(skip), **speed}
            if skip:
                skipped.append((row["step"], reason(row, limits)))
        self._write(self._rows)
        self._show(self._rows[-1], flop_s)
        for step, why in skipped if self.world.first() else ():
            self._explain(step, why)
        self.world.barrier()  # rank 0 has written: nobody must wait for its disk in a step, whose time-out is short
        self._rows, self._values, self._len2, self._wait_s = [], [], 0, wait_s

    def restart_clock(self) -> None:
        """Leave out of the speed, and of the bar's remaining time, what happened since the last step (evaluation, checkpoint)."""
        self._start = time.perf_counter()
        self.bar.unpause()

    def validation(self, step: int, results: dict[str, float]) -> None:
        """One line with all validation figures of a step, to the file and above the bar."""
        if results and self.world.first():
            finite = {key: _or_none(value) for key, value in results.items()}
            self._write([{"step": step, "tokens": step * self.config.batch_tokens, **finite}])
            shown = "  ".join(f"{k.removeprefix('val_')} {v:.4f}" for k, v in results.items())
            self.bar.write(f"step {step:>6}  {shown}", file=sys.stderr)
        self.world.barrier()

    def _explain(self, step: int, why: str) -> None:
        """Say above the bar that the guard skipped a step, and why; its documents go to the file in full."""
        documents = batches.documents(self.stream, self.config.seq_len, step - 1, self.config.step_windows)
        # To the file alone: TensorBoard takes numbers only, W&B no step that it has already seen.
        self._append([{"step": step, "tokens": step * self.config.batch_tokens, "why": why, "documents": documents}])
        some = "; ".join(
            f"{folder} {', '.join(map(str, numbers[:5]))}{f' and {len(numbers) - 5} more' if numbers[5:] else ''}"
            for folder, numbers in documents.items()
        )
        self.bar.write(
            f"step {step:>6}  skipped: {why}; its documents: {some}; their text: "
            f"python -m nanomed.batches show --run {shlex.quote(str(self.run))} --step {step}",
            file=sys.stderr,
        )

    def _write(self, rows: list[dict]) -> None:
        if not self.world.first():
            return
        self._append(rows)
        for row in rows:
            for sink in self._sinks:
                sink(row)

    def _append(self, rows: list[dict]) -> None:
        with self.path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())

    def _show(self, row: dict, flop_s: float) -> None:
        of_peak = "" if row["mfu"] is None else f"{flop_s / 1e12:.2f} TFLOP/s, mfu {row['mfu']:.1%}, "
        loss, norm = (math.nan if row[key] is None else row[key] for key in ("loss", "grad_norm"))
        self.bar.set_postfix_str(
            f"loss {loss:.4f}, norm {norm:.2f}, lr {row['lr']:.1e}, {row['tok_s']:,.0f} tok/s, "
            f"{of_peak}{row['memory_gb']:.1f} GB, data wait {row['data_wait']:.1%}",
            refresh=False,
        )
        self.bar.update(row["step"] - self.bar.n)

    def close(self) -> None:
        """Finish the bar."""
        self.bar.close()


def _or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _sinks(out: Path, config: Config, step: int) -> list:
    """TensorBoard and W&B as functions of a row, where they were asked for; step: the last that counts.

    Both get the flags as hyper-parameters. W&B's run is known by the random id in run.json, so that a new run in an old folder
    starts a new curve.
    """
    sinks, flags = [], dataclasses.asdict(config)
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        # What a killed run wrote beyond is not shown; before the first step that is all.
        writer = SummaryWriter(out / "tensorboard", purge_step=step + 1 if step else 0)
        writer.add_text("config", "\n".join(f"- {name}: {value}" for name, value in flags.items()), step)
        sinks.append(lambda row: [writer.add_scalar(k, v, row["step"]) for k, v in row.items() if v is not None])
    if config.wandb:
        import wandb

        run_id = read_json(out / "run.json")["id"]
        run = wandb.init(project=config.wandb, dir=out, name=out.name, id=run_id, resume="allow", config=flags)
        sinks.append(lambda row: run.log(row, step=row["step"]))
    return sinks
