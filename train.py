"""Continue the pre-training of a Hugging Face checkpoint on packed token bins: the whole story, top to bottom.

    torchrun train.py                                   the built-in corpus, on whatever this machine has
    torchrun --nproc-per-node 8 train.py --recipe qwen2.5-7b --data bins/finemed-de --val med=bins/val-med

Stopped by anything at all, the same command resumes from its newest whole checkpoint, on as many ranks as there are.
On SIGTERM, Ctrl-C or SIGUSR1 it saves one first.
"""

import gc
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import nanomed  # isort: skip  # noqa: F401  before torch: sets OMP_WAIT_POLICY
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from nanomed import InputError, batches, guard, hf, is_explained, optim, parallel, runs, weights
from nanomed.batches import Batch, Shape
from nanomed.checkpoint import Checkpointer, whole
from nanomed.config import Config, parse
from nanomed.files import read_json
from nanomed.guard import Guard, Stopped, StopSignal
from nanomed.identity import RanksDisagree, check_ranks_agree, data_identity, model_identity
from nanomed.inputs import Inputs, open_inputs
from nanomed.kernels.providers import kernels
from nanomed.metrics import Metrics, print_start
from nanomed.model import Decoder
from nanomed.model_files import keep_source, kept_record
from nanomed.parallel import World, print0
from nanomed.plot import plot_curves
from nanomed.stream import Stream

SHARED_FOLDER_S = 60.0


def train(config: Config, world: World) -> None:
    """One run, from the command line's config to RUN/hf. InputError where it cannot be; then nothing was trained."""
    out, inputs = Path(config.out), open_inputs(config, world)
    identity = data_identity(inputs.stream, inputs.vals)
    identity["model"] = model_identity(inputs.source, inputs.model_config)
    check_ranks_agree(config, identity, inputs.n_steps, world)
    runs.check_run(out, config, identity)
    if runs.is_finished(out):
        return print0(f"{out}: this run is finished; its model is in {out / 'hf'}")
    with torch.device("meta"):  # described on no device; then cut over the ranks, then filled
        model = Decoder(inputs.model_config, config.dtype, kernels(config.kernels))
    files = hf.check_weights(model, inputs.source)
    dtypes = weights.source_dtypes(model, inputs.source)  # one that cannot be written would show after the training
    with claim_folder(out, config, identity, world):
        if world.first() and not (kept_record(out / "source") and whole(out / "checkpoints")):
            names = {name: weights.DTYPE_NAMES[dtype] for name, dtype in dtypes.items() if dtype}
            keep_source(inputs.source, out / "source", identity["model"]["weights"], names)
        world.barrier()
        run(config, world, inputs, model, files)


def run(config: Config, world: World, inputs: Inputs, model: Decoder, files: dict[str, Path]) -> None:
    """The training itself, from the newest checkpoint, the weights in files or random ones to RUN/hf."""
    source, model_config, stream, vals, shape, n_steps = inputs
    out, windows = Path(config.out), config.step_windows
    mesh = parallel.parallelize(model, config, world)
    model.to_empty(device="cpu" if config.offload else world.device)
    optimizer, watch = optim.make_adamw(model, config), Guard(world.device)
    checkpoints = Checkpointer(out / "checkpoints", config.keep, model, optimizer, watch, world)
    step = first_step = checkpoints.resume()
    if step == 0 and files:
        weights.load_weights(model, files)
    elif step == 0 and kept_record(source):
        raise InputError(f"{out / 'checkpoints'}: none can be read, and {source} holds no weights; give --init the model")
    elif step == 0:
        print0(f"{source} has no weights: starting from random ones")
        weights.random_weights(model, model_config.initializer_range, config.seed)
    world.barrier()  # reading takes the ranks unequally long, and the first step's collectives wait minutes only

    print_start(config, world, model, stream, vals, n_steps)
    metrics = Metrics(out, config, world, model, stream, step, n_steps)
    loader = batches.prefetch(stream, shape, range(step, n_steps), windows, world.rank, world.size)
    n_micro = batches.n_micro_batches(shape, windows, world.size)
    with closing(StopSignal(world)) as stop, closing(metrics), loader, parallel.no_garbage_collection():
        try:
            # Step 0 is also the smoke test: what is wrong with data or weights shows before a step is spent.
            if not metrics.validated and any(due(step, n_steps, config.eval_every)):
                metrics.validation(step, validate(model, vals, shape, world, stop))
            metrics.restart_clock()
            while step < n_steps:
                # So no random state needs saving. HSDP's replicas of a shard must round it alike.
                torch.manual_seed(config.seed + step * world.size + world.rank % (world.size // config.replicas))
                n_labels = batches.n_labels(stream, config.seq_len, step, windows)
                loss, sum_squared_lens = forward_backward(model, loader, n_micro, n_labels, world, stop)
                grad_norm = optim.clip(model, optimizer, config.clip_norm).to(world.device)  # offloaded, it is on the CPU
                lr = optim.lr_at(step, n_steps, config)
                optim.set_lr(optimizer, lr)
                verdict = watch.judge(loss, grad_norm)
                guard.step_unless(verdict.skip, optimizer)
                optimizer.zero_grad()
                step += 1
                metrics.add(step, lr, loss, grad_norm, verdict, sum_squared_lens)
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
            checkpoints.save_and_wait(step)
            return print0(f"stopped by {signal} after step {step}; the same command resumes from there")
        except InputError:
            checkpoints.wait()  # or leaving would cut the one being written short, perhaps the newest sound one
            raise
    checkpoints.wait()
    finish(model, out, world)


def finish(model: Decoder, out: Path, world: World) -> None:
    """Plot curves.svg, then export to hf/, whose presence marks the run as finished."""
    if world.first():
        print0(f"curves: {plot_curves(out)}")
    weights.export(model, out / "source", out / "hf", world)
    print0(f"model:  {out / 'hf'}")


def due(step: int, n_steps: int, *intervals: int) -> list[bool]:
    """What happens every so many steps: does it after this one? After the last, everything does."""
    return [step == n_steps or step % every == 0 for every in intervals]


@contextmanager
def claim_folder(out: Path, config: Config, identity: dict, world: World) -> Iterator[None]:
    """Hold the run folder, created once every rank has found its input complete.

    Raises InputError if some rank does not see the same folder after SHARED_FOLDER_S: NFS may cache a failed lookup that long.
    """
    world.barrier()
    held = runs.create_run(out, config, identity, world.device, world.size) if world.first() else None
    try:
        run_id = [read_json(out / "run.json")["id"] if world.first() else None]
        dist.broadcast_object_list(run_id, src=0, group=world.slow)
        deadline = time.monotonic() + SHARED_FOLDER_S
        while not ((out / "run.json").exists() and read_json(out / "run.json").get("id") == run_id[0]):
            if time.monotonic() > deadline:
                raise InputError(f"--out {out}: not the same folder on all machines; checkpoints need one that all of them see")
            time.sleep(1)
        yield
    finally:
        if held is not None:
            os.close(held)


def forward_backward(
    model: Decoder, micro_batches: Iterator[Batch], n_micro: int, n_labels: int, world: World, stop: StopSignal
) -> tuple[Tensor, int]:
    """Forward and backward of a step's micro-batches; the step's loss, () on the device, and this rank's Σ len².

    The loss is the mean over the labelled tokens of all ranks and micro-batches together: a mean of means would weigh a
    token by the company it is in.
    """
    scale = torch.full((), 1 / max(1, n_labels), device=world.device)
    loss, sum_squared_lens = torch.zeros((), device=world.device), 0
    for micro in range(n_micro):
        stop.poll()
        parallel.all_reduce_gradients(model, micro == n_micro - 1)
        batch = next(micro_batches)
        micro_loss = model(batch.to(world.device), scale)
        micro_loss.backward()
        loss += micro_loss.detach()
        sum_squared_lens += batch.sum_squared_lens
    loss = loss.double()
    dist.all_reduce(loss)
    return loss, sum_squared_lens


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
        if not math.isfinite(nll.item()):  # the same on every rank
            raise InputError(f"validation set {name}: its loss is not finite; the model's weights hold NaN or infinity")
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
        if not is_explained(error):
            raise
        # print would put it behind the progress bar; in one piece, so that ranks do not mix theirs
        if not isinstance(error, RanksDisagree) or dist.get_rank() == 0:
            tqdm.write(f"error: {error}\n", file=sys.stderr, end="")
        else:
            time.sleep(1)  # torchrun ends all ranks when one exits: let the one that prints be the first
        leave(1)
    except KeyboardInterrupt:
        print0("stopped; the same command resumes from the newest whole checkpoint")
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
