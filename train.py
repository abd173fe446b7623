"""Continue the pre-training of a Hugging Face checkpoint on packed token bins: the whole story, top to bottom.

    torchrun train.py                                   the built-in corpus, on whatever this machine has
    torchrun --nproc-per-node 8 train.py --recipe qwen2.5-7b --data bins/finemed-de --val med=bins/val-med

Stopped by anything at all, the same command goes on from its newest whole checkpoint, on as many ranks as there are.
On SIGTERM, Ctrl-C or SIGUSR1 it saves one first.
"""

import errno
import gc
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from nanomed import InputError, batches, guard, hf, optim, parallel, runs, weights
from nanomed.batches import Batch, Shape
from nanomed.bins import tokenizer_sha256
from nanomed.checkpoint import Checkpointer
from nanomed.config import MINIATURE, Config, parse
from nanomed.guard import Guard, Stopped, StopSignal
from nanomed.hf import ModelConfig
from nanomed.kernels.providers import kernels
from nanomed.metrics import Metrics, print_start
from nanomed.model import Decoder
from nanomed.parallel import World, print0
from nanomed.plot import plot_curves
from nanomed.stream import Stream, open_sources


def train(config: Config, world: World) -> None:
    """One run, from the command line's config to RUN/hf. InputError where it cannot be; then nothing was trained."""
    out, windows = Path(config.out), config.batch_tokens // config.seq_len  # of one step
    source, model_config, stream, vals, shape, n_steps = open_inputs(config, world)
    identity = runs.data_identity(stream, vals)
    runs.check_run(out, config, identity)
    if runs.is_finished(out):
        return print0(f"{out}: this run is finished; its model is in {out / 'hf'}")

    # --- the model: described on no device, cut over the ranks, then filled
    with torch.device("meta"):
        model = Decoder(model_config, config.dtype, kernels(config.kernels))
    has_weights = weights.check_weights(model, source)
    claim_folder(out, config, identity, world)
    mesh = parallel.parallelize(model, config, world)
    model.to_empty(device="cpu" if config.offload else world.device)
    optimizer, watch = optim.make_adamw(model, config), Guard(world.device)
    checkpoints = Checkpointer(out / "checkpoints", config.keep, model, optimizer, watch, world)
    step = first_step = checkpoints.resume()
    if step == 0 and has_weights:
        weights.load_weights(model, source)
    elif step == 0:
        print0(f"{source} has no weights: starting from random ones")
        weights.random_weights(model, model_config.initializer_range, config.seed)
    world.barrier()  # reading takes the ranks unequally long, and the first step's collectives wait minutes only

    # --- the loop
    print_start(config, world, model, stream, vals, n_steps)
    metrics = Metrics(out, config, world, model, stream, step, n_steps)
    loader = batches.prefetch(stream, shape, range(step, n_steps), windows, world.rank, world.size)
    n_micro = -(-windows // (config.micro_batch * world.size))
    stop = StopSignal(world)
    parallel.collect_by_hand(True)
    try:
        # Step 0 is also the smoke test: what is wrong with data or weights shows before a step is spent.
        if not metrics.validated and any(due(step, n_steps, config.eval_every)):
            metrics.validation(step, validate(model, vals, shape, world, stop))
        metrics.restart_clock()
        while step < n_steps:
            # So no random state needs saving. HSDP's replicas of a shard must round it alike.
            torch.manual_seed(config.seed + step * world.size + world.rank % (world.size // config.replicas))
            n_labels = batches.n_labels(stream, config.seq_len, step, windows)
            loss, len2 = add_gradients(model, loader, n_micro, n_labels, world, stop)
            grad_norm = optim.clip(model, optimizer, config.clip_norm).to(world.device)  # offloaded, it is on the CPU
            lr = optim.lr_at(step, n_steps, config)
            optim.set_lr(optimizer, lr)
            verdict = watch.judge(loss, grad_norm)
            guard.step(optimizer, verdict[0])
            optimizer.zero_grad()
            step += 1
            metrics.add(step, lr, loss, grad_norm, verdict, len2)
            checkpoints.poll()
            evaluate, save, log = due(step, n_steps, config.eval_every, config.checkpoint_every, config.log_every)
            if evaluate or save or log:
                metrics.flush(loader.wait_s)
                watch.check(step)
                gc.collect()
                if evaluate:
                    metrics.validation(step, validate(model, vals, shape, world, stop))
                if save:
                    checkpoints.save(step)
                metrics.restart_clock()
            if step == first_step + 1 and mesh is not None and world.device.type == "cuda":
                parallel.shorten_timeouts(mesh)
    except Stopped as signal:  # between two micro-batches: the step they belong to will be made again
        metrics.flush(loader.wait_s)
        parallel.reshard(model)
        checkpoints.ensure(step)
        return print0(f"stopped by {signal} after step {step}; the same command goes on from there")
    except InputError:
        checkpoints.wait()  # or the one being written, perhaps the newest sound one, would never be marked whole
        raise
    finally:
        loader.close()
        metrics.close()
        stop.close()
        parallel.collect_by_hand(False)

    checkpoints.wait()
    finish(model, source, out, world)


def finish(model: Decoder, source: Path, out: Path, world: World) -> None:
    """What comes out: the curves, and last the model, by whose folder a run counts as finished."""
    if world.first():
        print0(f"curves: {plot_curves(out)}")
    weights.export(model, source, out / "hf", world)
    print0(f"model:  {out / 'hf'}")


def open_inputs(config: Config, world: World) -> tuple[Path, ModelConfig, Stream, dict[str, Stream], Shape, int]:
    """What goes in: folder and config of the model, training and validation sets, shape of the batches, number of steps."""
    source = get_source(config, world)
    model_config = hf.model_config(source)
    if config.seq_len > (model_config.max_position_embeddings or config.seq_len):
        raise InputError(f"--seq-len {config.seq_len}: the model was made for {model_config.max_position_embeddings}")
    stream, vals = open_data(config, source, model_config.vocab_size)
    n_steps = count_steps(config, stream)
    return source, model_config, stream, vals, Shape(config.seq_len, config.micro_batch), n_steps


def due(step: int, n_steps: int, *everies: int) -> list[bool]:
    """What happens every so many steps: does it after this one? After the last, everything does."""
    return [step == n_steps or step % every == 0 for every in everies]


def claim_folder(out: Path, config: Config, identity: dict, world: World) -> None:
    """Make the run folder once every rank has found its input whole. InputError where a rank does not see it then."""
    world.barrier()
    if world.first():
        runs.create_run(out, config, identity, world.device)
    world.barrier()
    if not (out / "run.json").exists():
        raise InputError(f"--out {out}: not the same folder on all machines; checkpoints need one that all of them see")


def add_gradients(
    model: Decoder, micro_batches: Iterator[Batch], n_micro: int, n_labels: int, world: World, stop: StopSignal
) -> tuple[Tensor, int]:
    """Forward and backward of a step's micro-batches; the step's loss, () on the device, and this rank's Σ len².

    The loss is the mean over the labelled tokens of all ranks and micro-batches together: a mean of means would weigh a
    token by the company it is in.
    """
    scale = torch.full((), 1 / max(1, n_labels), device=world.device)
    loss, len2 = torch.zeros((), device=world.device), 0
    for micro in range(n_micro):
        stop.poll()
        parallel.all_reduce_gradients(model, micro == n_micro - 1)
        batch = next(micro_batches)
        micro_loss = model(batch.to(world.device), scale)
        micro_loss.backward()
        loss += micro_loss.detach()
        len2 += batch.sum_squared_lens
    loss = loss.double()
    dist.all_reduce(loss)
    return loss, len2


def get_source(config: Config, world: World) -> Path:
    """The folder of the model to start from, downloaded or made: by the first process of all, then by one a machine."""
    for my_turn in (world.first(), world.local_rank == 0):
        if my_turn and config.init == str(MINIATURE / "model") and not MINIATURE.exists():
            script = Path(__file__).resolve().parent / "data" / "miniature.py"
            if subprocess.run([sys.executable, script, "--out", MINIATURE]).returncode:
                raise InputError(f"{MINIATURE}: the built-in corpus could not be made, see above")
        if my_turn:
            hf.fetch(config.init)
        world.barrier()
    return hf.fetch(config.init)


def open_data(config: Config, source: Path, vocab_size: int) -> tuple[Stream, dict[str, Stream]]:
    """The training stream and the validation sets by name; their tokens must be the model's tokens."""
    stream = Stream(open_sources(config.data), config.seed, vocab_size)
    vals = {}
    for spec in config.val:
        name, _, folder = spec.rpartition("=")
        if not name.isidentifier() or name in vals or "@" in folder:
            raise InputError(
                f"--val {spec}: must be NAME=BINS, each name once, of letters, digits and _; no share after @"
            )
        vals[name] = Stream(open_sources([folder]), None, vocab_size)
    tokenizer = source / "tokenizer.json"
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
            f"--data: {n_tokens:,} tokens in {config.epochs} epochs are fewer than one step of {config.batch_tokens:,}"
        )
    if config.warmup_steps >= n_steps:
        raise InputError(f"--warmup-steps {config.warmup_steps}: the run has only {n_steps} steps")
    return n_steps


@torch.no_grad()
def validate(model: Decoder, vals: dict[str, Stream], shape: Shape, world: World, stop: StopSignal) -> dict[str, float]:
    """Mean loss in nats a token and bits per byte of every validation set, read whole.

    Bits per byte = Σ NLL over every token but each document's first / (ln 2 · bytes of the texts): unlike the loss it
    compares models with different tokenizers.
    """
    results = {}
    for name, stream in vals.items():
        nll = torch.zeros((), dtype=torch.float64, device=world.device)
        one = torch.ones((), device=world.device)
        rounds = batches.val_batches(stream, shape, world.rank, world.size)
        total = batches.val_rounds(stream, shape, world.size)
        for batch in tqdm(rounds, f"val {name}", total, leave=False, delay=3, disable=not world.first()):
            stop.poll()
            nll += model(batch.to(world.device), one)
        dist.all_reduce(nll)
        results[f"val_{name}_loss"] = nll.item() / max(1, stream.start_of(1) - len(stream.lengths))
        results[f"val_{name}_bpb"] = nll.item() / (math.log(2) * stream.bins[0].n_bytes)
    parallel.reshard(model)
    return results


def main() -> None:
    """Train; an input that cannot be is one line and exit status 1."""
    try:
        config = parse(sys.argv[1:])
        world = parallel.start(config)
        train(config, world)
    except (InputError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise  # any other than a full disk is a bug of ours
        # print would put it behind the progress bar; in one piece, so that ranks do not mix theirs
        tqdm.write(f"error: {error}\n", file=sys.stderr, end="")
        leave(1)
    except KeyboardInterrupt:
        print0("stopped; the same command goes on from the newest whole checkpoint")
        leave(130)
    dist.destroy_process_group()


def leave(status: int) -> None:
    """Exit at once where other ranks may be waiting for this one: torchrun then ends them, a polite farewell would hang."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        sys.stderr.flush()
        os._exit(status)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)


if __name__ == "__main__":
    main()
