"""Inputs of a run, checked before anything is written: the model's folder, the data, the number of steps.

The tokens of the bins must be the model's: they are compared by the hash of tokenizer.json. The first process of all
downloads, or makes the built-in corpus, then one process a machine; the others wait.
"""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from nanomed import InputError, hf
from nanomed.batches import Shape
from nanomed.checkpoint import whole
from nanomed.config import MINIATURE, Config
from nanomed.hf import ModelConfig
from nanomed.model_files import kept_record
from nanomed.parallel import World, print0
from nanomed.stream import Stream, open_sources
from nanomed.tokenizer import tokenizer_sha256


class Inputs(NamedTuple):
    """What goes into a run."""

    source: Path  # folder of the model
    model_config: ModelConfig
    stream: Stream
    vals: dict[str, Stream]
    shape: Shape
    n_steps: int


def open_inputs(config: Config, world: World) -> Inputs:
    """Find, open and check all of it; InputError naming the first thing that cannot be."""
    source = get_source(config, world)
    model_config = hf.model_config(source)
    if config.seq_len > (model_config.max_position_embeddings or config.seq_len):
        most = model_config.max_position_embeddings
        raise InputError(f"--seq-len {config.seq_len}: the model was made for {most}; give --seq-len {most} or less")
    stream, vals = open_data(config, source, model_config.vocab_size)
    n_steps = count_steps(config, stream)
    return Inputs(source, model_config, stream, vals, Shape(config.seq_len, config.micro_batch), n_steps)


def get_source(config: Config, world: World) -> Path:
    """The folder of the model to start from, downloaded or made: by the first process of all, then by one per machine."""
    for my_turn in (world.first(), world.local_rank == 0):
        if my_turn and config.init == str(MINIATURE / "model") and not MINIATURE.exists():
            script = Path(__file__).resolve().parents[1] / "data" / "miniature.py"
            if subprocess.run([sys.executable, script, "--out", MINIATURE]).returncode:
                raise InputError(f"{MINIATURE}: the built-in corpus could not be made, see above")
        if my_turn:
            find_source(config)
        world.barrier()
    return find_source(config)


def find_source(config: Config) -> Path:
    """The folder of --init; RUN/source where that is gone and the run's own checkpoints have the weights."""
    kept = Path(config.out) / "source"
    can_do_without = kept_record(kept) is not None and bool(whole(kept.parent / "checkpoints"))
    try:
        source = hf.fetch(config.init)
    except InputError as error:
        if not can_do_without:
            raise
        print0(f"{error}; going on with {kept}")
        return kept
    if kept_record(source) and not (can_do_without and source.resolve() == kept.resolve()):
        raise InputError(f"--init {config.init}: holds no weights, only what its run needs to go on; give a model's folder")
    return source


def open_data(config: Config, source: Path, vocab_size: int) -> tuple[Stream, dict[str, Stream]]:
    """The training stream and the validation sets by name; their tokens must be the model's tokens."""
    stream = Stream(open_sources(config.data), config.seed, vocab_size)
    vals = {}
    for spec in config.val:
        name, _, folder = spec.rpartition("=")
        if not name.isidentifier() or name in vals or "@" in folder or not folder:
            raise InputError(f"--val {spec}: must be NAME=BINS, each name once, of letters, digits and _; no share after @")
        vals[name] = Stream(open_sources([folder]), None, vocab_size)
    tokenizer = source / "tokenizer.json"
    if not tokenizer.is_file():
        raise InputError(f"--init {source}: has no tokenizer.json to compare with the bins'; put the model's own there")
    expected = tokenizer_sha256(tokenizer)
    for bins in [*stream.bins, *(b for v in vals.values() for b in v.bins)]:
        if bins.tokenizer_sha256 != expected:
            raise InputError(
                f"{bins.folder}: was made with another tokenizer than {tokenizer}; prepare it with --tokenizer {source}"
            )
        if bins.vocab_size > vocab_size:
            raise InputError(f"{bins.folder}: its vocabulary has {bins.vocab_size} entries, the model's {vocab_size}")
    return stream, vals


def count_steps(config: Config, stream: Stream) -> int:
    """Steps of the run: --steps, or as many whole ones as --epochs hold."""
    if stream.start_of(1) == 0:
        raise InputError(f"--data {' '.join(config.data)}: so small a share holds no document in the first epoch")
    n_tokens = stream.start_of(config.epochs)
    n_steps = config.steps or n_tokens // config.batch_tokens
    if n_steps == 0:
        raise InputError(
            f"--data: {n_tokens:,} tokens in {config.epochs} epochs are fewer than one step of --batch-tokens "
            f"{config.batch_tokens:,}; give a smaller one, or more --epochs"
        )
    if config.warmup_steps >= n_steps:
        raise InputError(
            f"--warmup-steps {config.warmup_steps}: the run has only {n_steps} steps; give fewer, or a smaller --batch-tokens "
            f"than {config.batch_tokens:,}"
        )
    return n_steps
