"""Every knob of a training run: one flat frozen dataclass, and recipes that fill it for the models of the paper.

A recipe is a base; each flag on the command line overrides one field of it. `parse` is all the command line there is.
The doc comment under a field is its `--help` text.

What the paper (arXiv 2604.19394) publishes of its training: AdamW, 500 warm-up steps, linear decay, 2 epochs,
packing. It publishes no learning rate, batch size or window: those of the recipes are ours, and marked so.
"""

import argparse
import dataclasses
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from nanomed import InputError, did_you_mean
from nanomed.kernels import providers

MINIATURE = Path("bins/miniature")  # data/miniature.py writes it, train.py calls that where it is missing


@dataclass(frozen=True)
class Config:
    """Continue the pre-training of a Hugging Face checkpoint on packed token bins."""

    recipe: str = ""
    """Defaults that single flags override: qwen2.5-7b, mistral-7b, mistral-small-24b, llama-3.1-8b, qwen3-8b, smollm2-135m
    or miniature. Without it: miniature, or general defaults where --init or --data is given."""

    # --- what goes in and out
    init: str = ""
    """Model to start from: a local folder or a hub id.
    A folder with config.json but no weights starts from random ones."""
    data: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Training bins (data/prepare.py makes them). Repeat the flag to mix sets.
    `bins/general@0.1` replays a tenth of it each epoch, another tenth in the next: the knob against forgetting.
    `@3` reads it three times an epoch."""
    val: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=BINS, a validation set, read whole at step 0, every --eval-every steps and at the end.
    Repeat the flag: a set of the target domain beside a general one is the forgetting meter."""
    out: str = ""
    """Run folder: metrics, checkpoints, curves.svg and at the end hf/, which transformers and vLLM load.
    The same command on the same folder resumes from its newest whole checkpoint. Default: runs/RECIPE, or runs/ and the name
    of the model."""

    # --- how long and how much at a time
    epochs: int = 2
    """Passes over the data; each is permuted and packed anew."""
    steps: int | None = None
    """Optimiser steps; overrides --epochs."""
    seq_len: int = 4096
    """Tokens in a window. Documents are packed without loss or padding, and never attend to one another."""
    batch_tokens: int = 1048576
    """Tokens of one optimiser step, over all GPUs and micro-batches; the same run for any number of GPUs."""
    micro_batch: int = 1
    """Windows in one forward pass. More fill a GPU better and take more memory; the result is the same."""

    # --- the optimiser
    lr: float = 1e-5
    """Peak learning rate. Continual pre-training wants a small one; large ones learn faster and forget more."""
    warmup_steps: int = 500
    """Linear warm-up from 0; then linear decay that would reach 0 one step after the last."""
    weight_decay: float = 0.1
    """AdamW's decoupled decay; norms and biases are spared."""
    beta1: float = 0.9
    """AdamW: decay of the gradient's running mean."""
    beta2: float = 0.95
    """AdamW: decay of the squared gradient's running mean."""
    eps: float = 1e-8
    """AdamW: added to the denominator."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    optimizer_states: Literal["fp32", "bf16", "int8"] = "fp32"
    """Precision of AdamW's two moments: bf16 saves 4 bytes a parameter, int8 (in blocks; torchao) 6."""
    seed: int = 0
    """Order of the documents, and random weights where there are none to load."""

    # --- the machine
    precision: Literal["fp32", "bf16", "pure-bf16"] = "bf16"
    """Of hidden states and matrix products; parameters, gradient sums and the loss are float32.
    `pure-bf16`: parameters and gradient sums are bf16 too, rounded stochastically, and save 4 bytes a parameter."""
    float8: bool = False
    """Matrix products of the blocks in float8, scaled by row (torchao; Hopper and newer)."""
    offload: bool = False
    """Parameters, gradients and optimiser in the CPU's memory, blocks on the GPU as they run: little GPU memory, slow."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation checkpointing: `selective` keeps only the outputs of matrix products and attention.
    `full` keeps only each block's input, for a third more arithmetic."""
    kernels: Literal["triton", "liger", "torch"] = providers.default()
    """Norms, RoPE, SwiGLU and the loss: this project's Triton kernels, Liger-Kernel's, or plain torch.
    Triton's and Liger's need a GPU."""
    compile: bool = True
    """torch.compile each block: slower to start, faster to run."""
    replicas: int = 1
    """HSDP: shard within groups of GPUs / REPLICAS, replicate across them. Sharding over all of them is 1."""
    deterministic: bool = False
    """Bit-identical repeats on GPUs too, at some cost in speed. (The CPU is deterministic as it is.)"""

    # --- what is kept and shown
    checkpoint_every: int = 500
    """Steps between checkpoints, which are written while training goes on."""
    keep: int = 2
    """Newest whole checkpoints to keep."""
    eval_every: int = 500
    """Steps between evaluations of the --val sets."""
    log_every: int = 10
    """Steps between lines of the progress bar; metrics.jsonl has every step. The device is waited for only then."""
    tensorboard: bool = False
    """Also write TensorBoard files to OUT/tensorboard."""
    wandb: str = ""
    """Also log to this Weights & Biases project."""

    @property
    def step_windows(self) -> int:
        """Windows of seq_len tokens in a step, over all ranks and micro-batches."""
        return self.batch_tokens // self.seq_len

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states and matrix products."""
        return torch.float32 if self.precision == "fp32" else torch.bfloat16

    @property
    def param_dtype(self) -> torch.dtype:
        """Of parameters and summed gradients."""
        return torch.bfloat16 if self.precision == "pure-bf16" else torch.float32


# These may change when a run goes on: they move its losses by rounding at most.
FREE_FIELDS = frozenset(
    [
        "out",
        "data",
        "val",
        "micro_batch",
        "recompute",
        "kernels",
        "compile",
        "offload",
        "replicas",
        "checkpoint_every",
        "keep",
        "eval_every",
        "log_every",
        "tensorboard",
        "wandb",
    ]
)  # data and val are held to the contents of the bins, not to their paths (runs.check_run)


def has_bf16_hardware() -> bool:
    """Does this machine multiply bf16 matrices in hardware? Elsewhere it is emulated, slowly."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= (8, 0)
    has = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 does not tell
    return has.get("avx512_bf16", False) or has.get("amx_bf16", False)


# lr, batch_tokens, seq_len: ours, the paper publishes none.
RECIPES = {
    "qwen2.5-7b": Config("qwen2.5-7b", init="Qwen/Qwen2.5-7B-Instruct", recompute="selective"),
    "mistral-7b": Config("mistral-7b", init="mistralai/Mistral-7B-Instruct-v0.3", recompute="selective"),
    "mistral-small-24b": Config("mistral-small-24b", init="mistralai/Mistral-Small-24B-Instruct-2501", recompute="full"),
    "llama-3.1-8b": Config("llama-3.1-8b", init="meta-llama/Llama-3.1-8B-Instruct", recompute="selective"),
    "qwen3-8b": Config("qwen3-8b", init="Qwen/Qwen3-8B", recompute="selective"),
    "smollm2-135m": Config(
        "smollm2-135m",
        init="HuggingFaceTB/SmolLM2-135M-Instruct",
        lr=1e-4,
        seq_len=2048,
        batch_tokens=65536,
        micro_batch=4,
        precision="bf16" if has_bf16_hardware() else "fp32",
    ),
    "miniature": Config(
        "miniature",
        init=str(MINIATURE / "model"),
        data=(str(MINIATURE / "med"), str(MINIATURE / "general@0.55")),
        val=(f"med={MINIATURE / 'val-med'}", f"general={MINIATURE / 'val-general'}"),
        steps=680,
        seq_len=256,
        batch_tokens=512,
        micro_batch=2,
        lr=3e-3,
        warmup_steps=50,
        precision="bf16" if has_bf16_hardware() else "fp32",
        compile=False,
        checkpoint_every=340,
        eval_every=340,
    ),
}


def parse(argv: list[str]) -> Config:
    """Command line → Config: the recipe first, then every flag over it. Exits with usage on an unknown flag."""
    config = parse_without_data(argv)
    if not config.data:
        raise InputError("--data: no training bins given; make some with data/prepare.py")
    check_machine(config)
    return config


def parse_without_data(argv: list[str]) -> Config:
    """As parse, for the planner: --data may be missing, and the machine be another."""
    base = find_recipe(argv)
    # An appending flag extends its default; a --data on the command line must replace the recipe's.
    config = tyro.cli(
        Config,
        default=dataclasses.replace(base, data=(), val=()),
        args=argv,
        prog="train.py",
    )
    if not config.init:
        raise InputError("--init: no model to start from given; name a folder, a hub id, or a --recipe")
    return validated(
        dataclasses.replace(
            config,
            data=config.data or base.data,
            val=config.val or (() if config.data else base.val),
            out=config.out or f"runs/{base.recipe or Path(config.init).resolve().name}",
        )
    )


def find_recipe(argv: list[str]) -> Config:
    """The recipe that the command line names. Without one, miniature, or the plain defaults where it names a model or data."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    first.add_argument("--init")
    first.add_argument("--data")
    given = first.parse_known_args(argv)[0]
    name = given.recipe
    if name is None:
        name = "" if given.init or given.data else "miniature"
    if name == "":
        return Config()
    if name not in RECIPES:
        raise InputError(f"--recipe {name}: no such recipe{did_you_mean(name, RECIPES)}; there are {', '.join(RECIPES)}")
    return RECIPES[name]


def validated(c: Config) -> Config:
    """The config itself, or InputError naming the first flag that cannot be."""
    counts = "seq_len batch_tokens micro_batch epochs log_every checkpoint_every eval_every keep replicas".split()
    for field in counts + ["steps"] * (c.steps is not None):
        if getattr(c, field) < 1:
            raise InputError(f"--{field.replace('_', '-')} {getattr(c, field)}: must be at least 1")
    if not 0 <= c.lr < math.inf or c.warmup_steps < 0:
        raise InputError(f"--lr {c.lr}, --warmup-steps {c.warmup_steps}: both must be 0 or more, and finite")
    for field, low, high in (("beta1", 0, 1), ("beta2", 0, 1), ("weight_decay", 0, math.inf), ("seed", 0, math.inf)):
        if not low <= getattr(c, field) < high:
            what = "0 or more" if high == math.inf else "from 0 to below 1"
            raise InputError(f"--{field.replace('_', '-')} {getattr(c, field)}: must be {what}")
    if not c.eps > 0:
        raise InputError(f"--eps {c.eps}: must be above 0")
    if not c.clip_norm > 0:
        raise InputError(f"--clip-norm {c.clip_norm}: must be above 0; inf does not clip")
    if c.batch_tokens % (c.seq_len * c.micro_batch):
        raise InputError(
            f"--batch-tokens {c.batch_tokens}: not a multiple of --seq-len {c.seq_len} x --micro-batch {c.micro_batch}"
        )
    if c.float8 and c.precision == "fp32":
        raise InputError("--float8: needs --precision bf16 or pure-bf16")
    if c.float8 and c.seq_len * c.micro_batch % 16:
        raise InputError(f"--float8: --seq-len {c.seq_len} x --micro-batch {c.micro_batch} must be a multiple of 16")
    return c


def check_machine(c: Config) -> None:
    """InputError naming the first flag that this machine cannot follow: no GPU for it, a package that is missing."""
    for package, wanted in (("tensorboard", c.tensorboard), ("wandb", c.wandb)):
        if wanted and importlib.util.find_spec(package) is None:
            raise InputError(f"--{package}: not installed; pip install -e '.[log]'")
    for flag, wanted in (("--optimizer-states int8", c.optimizer_states == "int8"), ("--float8", c.float8)):
        if wanted and importlib.util.find_spec("torchao") is None:
            raise InputError(f"{flag}: torchao is not installed; pip install -e '.[lowbit]'")
    if c.float8:
        _check_float8(c)
    try:
        providers.kernels(c.kernels)
    except ValueError as error:
        raise InputError(f"--kernels {c.kernels}: {error}") from None


def _check_float8(c: Config) -> None:
    """InputError where float8 products cannot run."""
    if not torch.cuda.is_available():
        raise InputError("--float8: needs a GPU, Hopper or newer; there is none here")
    if (found := torch.cuda.get_device_capability()) < (9, 0):
        name = torch.cuda.get_device_name()
        raise InputError(f"--float8: needs compute capability 9.0 (Hopper) or newer, {name} has {found[0]}.{found[1]}")
