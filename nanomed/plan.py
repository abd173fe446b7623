"""Before a GPU is booked: what a run needs of its memory, how long it will take, what that costs, and which flags to take.

    python -m nanomed.plan --recipe qwen2.5-7b --gpus 1 --gpu h100
    python -m nanomed.plan --recipe mistral-small-24b --gpus 8 --gpu h200 --price 3.5 --micro-batch 2
    python -m nanomed.plan --recipe mistral-7b --init runs/x/hf --data bins/finemed-de --gpus 4     another model, your own bins

No GPU and no network: the model's shape comes from nanomed.shapes or a folder's config.json, the rest is arithmetic, its
formulas in the docstrings. It takes train.py's flags and shows every regime of precision side by side.

What is checked, and what is assumed. Everything but the last row of the memory table is held, within 10 %, to bytes counted
while the real training step runs on tensors that have a shape and no memory (tests/test_plan.py): one process and
FSDP, each recompute mode. Assumptions: the context, the allocator's slack, and the share of the peak (--mfu) that speed is
computed from. On one H100 two peaks were measured, within 1 % of the sum without context and slack, and 54 to 56 % MFU
(tests/bench/README.md); several GPUs have no such check.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from nanomed import InputError, devices, hf, run_script
from nanomed.config import Config, parse_without_data
from nanomed.devices import Gpu
from nanomed.footprint import REGIMES, Regime, activation_bytes, kept_cast_bytes, parameters, transient_bytes
from nanomed.hf import ModelConfig
from nanomed.metrics import attention_flops, flops_per_token
from nanomed.model import Decoder
from nanomed.shapes import MODELS
from nanomed.stream import open_sources

CORPUS_TOKENS = 5.1e9  # the paper's, one epoch
SPARE_BYTES = 5e9  # that should stay free
CONTEXT_BYTES, SLACK = 1.0e9, 0.05  # assumed: CUDA and its libraries; the allocator's gaps, of what comes and goes
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Job:
    """What is to be planned: a model, its run, and the GPUs for it."""

    config: Config
    model: ModelConfig
    gpu_name: str
    gpu: Gpu
    n_gpus: int
    mfu: float  # assumed, where nothing is computed twice
    price: float  # dollars for an hour of one GPU
    n_tokens: float  # of the whole run

    @property
    def n(self) -> int:
        """Tokens of a forward pass."""
        return self.config.seq_len * self.config.micro_batch

    @property
    def rounds(self) -> int:
        """Forward passes of a GPU in an optimiser step."""
        return -(-self.config.batch_tokens // (self.n * self.n_gpus))

    @property
    def shards(self) -> int:
        """GPUs that share one copy of weights, gradients and states."""
        return self.n_gpus // self.config.replicas

    @property
    def fsdp_shards(self) -> int:
        """1 only where FSDP is not used; with --offload one GPU uses it too, and gathers blocks as one of several does."""
        return max(2, self.shards) if self.config.offload else self.shards


# --- memory --------------------------------------------------------------------------------------------------------


def held(job: Job, regime: Regime) -> dict[str, float]:
    """Persistent bytes per GPU: weights, gradients, optimizer states (in the CPU's memory with --offload).

    With replicas (HSDP), FSDP keeps the sums of a group's micro-batches in float32 until the step's last one crosses the groups.
    """
    n_params = parameters(job.model)[0] / job.shards
    gradients = 4 if job.config.replicas > 1 and job.rounds > 1 else regime.gradients
    sizes = {"weights": regime.weights, "gradients": gradients, "optimiser states": regime.states}
    return {part: size * n_params for part, size in sizes.items()}


def on_cpu(job: Job, regime: Regime) -> float:
    """Bytes a GPU in the machine's memory: the copy that a checkpoint is written from, and what --offload keeps there."""
    parts = held(job, regime)
    return parts["weights"] + parts["optimiser states"] + (sum(parts.values()) if job.config.offload else 0)


def memory(job: Job, regime: Regime, recompute: str) -> dict[str, float]:
    """Bytes on each GPU by part; their sum is the peak.

    It stands in the second forward and backward pass of a step or a later one, when the gradients of the first are there;
    where a step has one pass only the sum is an upper bound. With --offload a block's weights pass through in their own
    precision as well: what it takes is a formula not yet held to a measurement.
    """
    c, shards = job.model, job.fsdp_shards
    on_gpu = {part: 0.0 if job.config.offload else size for part, size in held(job, regime).items()}
    passing = {
        "activations": activation_bytes(c, job.n, recompute) + kept_cast_bytes(c, regime, shards, recompute),
        "moment": max(transient_bytes(c, job.n, regime, shards, recompute).values())
        + (regime.weights * parameters(c)[1] / job.shards if job.config.offload else 0),
    }
    return on_gpu | passing | {"context and slack": CONTEXT_BYTES + SLACK * sum(passing.values())}


def peak(job: Job, regime: Regime, recompute: str) -> float:
    """Bytes on each GPU at the worst moment."""
    return sum(memory(job, regime, recompute).values())


# --- time and money ------------------------------------------------------------------------------------------------


def tokens_per_second(job: Job, recompute: str) -> float:
    """Of all GPUs together: mfu · peak / FLOP a token, the formula of nanomed.metrics with documents as long as windows.

    Shorter documents cost less attention (a window of 4,096 is 6 % of a 7B's FLOP). `full` computes every block twice
    forward, so a third more: the MFU is 3/4. GPUs that find no window left in a step's last round wait.
    """
    with torch.device("meta"):
        model = Decoder(job.model)
    flop = flops_per_token(model) + attention_flops(model) * job.config.seq_len
    mfu = job.mfu * (0.75 if recompute == "full" else 1)
    busy = job.config.batch_tokens / (job.rounds * job.n * job.n_gpus)
    return mfu * job.gpu.bf16_flops * job.n_gpus * busy / flop


def advice(job: Job) -> str:
    """The most exact regime that leaves 5 GB free, with the least recomputation it allows; or how many GPUs it takes.

    Where that is to compute every block twice, the first that need not as well.
    """
    limit = job.gpu.memory_bytes - SPARE_BYTES
    choices = [(regime, mode, peak(job, regime, mode)) for regime in REGIMES for mode in RECOMPUTE]
    fitting = [(f"{regime.flags} --recompute {mode}", mode, n) for regime, mode, n in choices if n <= limit]
    if fitting:
        flags, mode, needed = fitting[0]
        line = f"{flags}: {needed / 1e9:.1f} of {job.gpu.memory_bytes / 1e9:.1f} GB, "
        line += f"the most exact that leaves {SPARE_BYTES / 1e9:.0f} GB free"
        faster = [f"; a third faster: {flags}, {n / 1e9:.1f} GB" for flags, other, n in fitting if other != "full"]
        return line + faster[0] if mode == "full" and faster else line
    for n_gpus in (2, 4, 8, 16, 32, 64, 128):
        more = replace(job, n_gpus=n_gpus, config=replace(job.config, replicas=1))
        if n_gpus > job.n_gpus and peak(more, REGIMES[-1], "full") <= limit:
            return (
                f"does not fit {job.n_gpus}; the leanest regime with --recompute full fits {n_gpus} {job.gpu_name}"
                + offload_advice(job, limit)
            )
    return f"fits no number of {job.gpu_name}: a forward pass of {job.n:,} tokens is too large; lower --micro-batch"


def offload_advice(job: Job, limit: float) -> str:
    """The other way: the CPU's memory, if it is enough that weights and states lie there."""
    offloaded = replace(job, config=replace(job.config, offload=True))
    if job.config.offload or peak(offloaded, REGIMES[0], "full") > limit:
        return ""
    n_bytes = on_cpu(offloaded, REGIMES[0]) * job.n_gpus
    return f", or --offload --recompute full, slow, these {job.n_gpus} and {n_bytes / 1e9:.0f} GB of the CPUs' memory"


# --- what people see -----------------------------------------------------------------------------------------------


def report(job: Job) -> str:
    """The whole answer as text: memory, time and money, advice."""
    config, gpu_gb = job.config, job.gpu.memory_bytes / 1e9
    rounds = "one pass" if job.rounds == 1 else f"{job.rounds} passes"
    lines = [
        f"{config.init}: {parameters(job.model)[0] / 1e9:.2f} B parameters on {job.n_gpus} x {job.gpu_name} of {gpu_gb:.1f} GB",
        f"a step: {config.batch_tokens:,} tokens, {rounds} of {job.n:,} on each GPU; one copy of the weights on {job.shards}",
        "",
        *memory_table(job),
        "",
        f"{'assumed: ' + format(job.mfu, '.0%') + ' of the peak':34}{'tok/s':>14}{'hours':>14}{'dollars':>14}",
    ]
    for recompute in RECOMPUTE:
        tok_s = tokens_per_second(job, recompute)
        hours = job.n_tokens / tok_s / 3600
        lines.append(f"{'--recompute ' + recompute:34}{tok_s:14,.0f}{hours:14,.1f}{hours * job.n_gpus * job.price:14,.0f}")
    if config.offload:
        lines.append("without the time that --offload's traffic over the bus takes: not yet measured")
    lines += [
        f"for {job.n_tokens / 1e9:.2f} B tokens at {job.price:g} dollars for a GPU hour",
        "",
        f"advice: {advice(job)}",
    ]
    return "\n".join(lines)


def memory_table(job: Job) -> list[str]:
    """A column a regime; rows that depend on recomputation once for each mode."""

    def row(label: str, of) -> str:
        return f"{label:34}" + "".join(f"{of(regime) / 1e9:14.1f}" for regime in REGIMES)

    def modes(label: str, of) -> list[str]:
        return [row(f"{label}, {mode}", partial(of, mode)) for mode in RECOMPUTE]

    def moment(name: str, mode: str, regime: Regime) -> int:
        return transient_bytes(job.model, job.n, regime, job.fsdp_shards, mode)[name]

    lines = [f"{'GB on each GPU':34}" + "".join(f"{regime.name:>14}" for regime in REGIMES)]
    for part in ("weights", "gradients", "optimiser states"):
        lines.append(row(part, lambda regime, part=part: memory(job, regime, "none")[part]))
    lines += modes("activations", lambda mode, regime: memory(job, regime, mode)["activations"])
    lines.append("of these the largest:")
    lines.append(row("  loss, logits in chunks", partial(moment, "loss", "none")))
    if job.fsdp_shards > 1:
        lines.append(row("  head's gradient summed", partial(moment, "head's sum", "none")))
    lines += modes("  a block's backward", partial(moment, "block backward"))
    lines += modes("context and slack (assumed)", lambda mode, regime: memory(job, regime, mode)["context and slack"])
    for mode in RECOMPUTE:
        totals = [peak(job, regime, mode) for regime in REGIMES]
        marks = ["" if t <= job.gpu.memory_bytes - SPARE_BYTES else "!" for t in totals]
        cells = [f"{t / 1e9:.1f}{mark}" for t, mark in zip(totals, marks, strict=True)]
        lines.append(f"{'peak, --recompute ' + mode:34}" + "".join(f"{c:>14}" for c in cells))
    lines.append(row("CPU memory for it, at a checkpoint", partial(on_cpu, job)))
    return lines + [f"(!: leaves less than {SPARE_BYTES / 1e9:.0f} of {job.gpu.memory_bytes / 1e9:.1f} GB free)"]


# --- the command line ----------------------------------------------------------------------------------------------


def parse(argv: list[str]) -> Job:
    """The planner's own flags, then train.py's. InputError naming the first that cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m nanomed.plan",
        description=__doc__.splitlines()[0],
        epilog="Every flag of train.py is taken too: --recipe, --init, --seq-len, --micro-batch, --replicas, ...",
        allow_abbrev=False,
    )
    parser.add_argument("--gpu", default="h100", help=f"one of {', '.join(devices.GPUS)} (default: h100)")
    parser.add_argument("--gpus", type=int, default=1, help="how many, over all machines (default: 1)")
    parser.add_argument("--mfu", type=float, default=0.5, help="share of the GPU's peak, assumed (default: 0.5)")
    parser.add_argument("--price", type=float, default=3.0, help="dollars for a GPU hour, assumed (default: 3)")
    parser.add_argument("--epoch-tokens", type=float, help="tokens of one epoch (default: those of --data, else the paper's 5.1e9)")
    args, rest = parser.parse_known_args(argv)
    config = parse_without_data(rest)
    name, gpu = devices.find(args.gpu)
    if args.gpus < 1:
        raise InputError(f"--gpus {args.gpus}: must be at least 1")
    if args.gpus % config.replicas:
        raise InputError(f"--replicas {config.replicas}: does not divide --gpus {args.gpus}")
    for flag in ("mfu", "price", "epoch_tokens"):
        if (value := getattr(args, flag)) is not None and not value > 0:
            raise InputError(f"--{flag.replace('_', '-')} {value:g}: must be more than 0")
    if args.mfu > 1:
        raise InputError(f"--mfu {args.mfu:g}: is a share of the peak, 0.5 for 50 %")
    tokens = args.epoch_tokens or sum(b.n_tokens * share for b, share in open_sources(config.data)) or CORPUS_TOKENS
    tokens = config.steps * config.batch_tokens if config.steps else tokens * config.epochs
    model = model_of(config.init)
    if config.seq_len > (model.max_position_embeddings or config.seq_len):
        raise InputError(f"--seq-len {config.seq_len}: the model was made for {model.max_position_embeddings}")
    return Job(config, model, name, gpu, args.gpus, args.mfu, args.price, tokens)


def model_of(init: str) -> ModelConfig:
    """The shape of a known model or of a local folder's; the hub is not asked."""
    if init in MODELS:
        return MODELS[init]
    if not Path(init).is_dir():
        raise InputError(f"--init {init}: no such folder, and not one of {', '.join(MODELS)}; give one with a config.json")
    return hf.model_config(hf.exported(Path(init)))


def main() -> None:
    """Print the plan."""
    print(report(parse(sys.argv[1:])))


if __name__ == "__main__":
    run_script(main)
