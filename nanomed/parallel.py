"""Many processes, one model: the process group, and activation checkpointing → torch.compile → fully_shard.

The order matters: recomputation must lie inside the compiled region, and FSDP's all-gathers outside of it. Each of the
three wraps a block's forward *function* or hooks its module, never its place in the tree: parameter names stay Hugging
Face's throughout.

FSDP2 shards every parameter by rows over all ranks. A block is gathered in bf16 just before it runs and freed after;
its gradient is summed in float32 to the ranks that own the rows. Per rank: 16 bytes · parameters / ranks for weights,
gradients and AdamW's moments (nanomed.lowbit: down to 6), and two gathered blocks; --offload keeps the former in the
CPU's memory and steps there, at the price of moving every weight over the bus in each pass. While one block computes,
the next one is gathered: forward we name it, so that the request leaves before this block's kernels are queued;
backward FSDP knows it, the order reversed. With replicas (HSDP) a step's micro-batches sum within their group only; the
last one's sum crosses the groups. One process alone goes without FSDP: there is nothing to shard and its copies cost
time.
"""

import contextlib
import dataclasses
import gc
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nanomed import InputError
from nanomed.config import Config
from nanomed.model import Decoder

START_TIMEOUT, STEP_TIMEOUT = timedelta(seconds=300), timedelta(seconds=100)  # of collectives before and after the first step
# Waits for downloads, checkpoints and exports, however slow the network or the disk. A rank that dies closes its connections,
# which ends the wait at once; the time-out only ends a file system that hangs for good.
IO_TIMEOUT = timedelta(hours=24)


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    local_rank: int  # on this machine
    size: int
    device: torch.device
    slow: dist.ProcessGroup  # gloo, IO_TIMEOUT: for waits in which one rank downloads or writes
    launcher: int | None = None  # process id of the torchrun that started this process; None without torchrun

    def first(self) -> bool:
        """Is this the process that prints and writes?"""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks, patiently."""
        dist.barrier(group=self.slow)


def start(config: Config) -> World:
    """Join the process group that torchrun describes, or be a group of one without it."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    # Asked first of all: once torchrun has ended, another process is the parent.
    launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
    on_gpu = torch.cuda.is_available()
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise InputError(f"--nproc-per-node: process {local_rank} finds only {torch.cuda.device_count()} GPUs")
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    # Asynchronous checkpoints talk over gloo beside NCCL's traffic.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=START_TIMEOUT, **alone)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    slow = dist.new_group(backend="gloo", timeout=IO_TIMEOUT)
    world = World(dist.get_rank(), local_rank, dist.get_world_size(), device, slow, launcher)
    if world.size % config.replicas:
        raise InputError(f"--replicas {config.replicas}: does not divide the {world.size} processes")
    return world


def print0(*text) -> None:
    """Print once, not once a rank."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*text, file=sys.stderr, flush=True)


def parallelize(model: Decoder, config: Config, world: World) -> DeviceMesh | None:
    """Recompute, compile and shard the decoder's blocks as the config says. On the meta device, before weights exist."""
    model.to(config.param_dtype)
    blocks = model.model.layers
    if config.float8:
        to_float8(blocks)
    for block in blocks:
        if config.recompute != "none":
            context = {"context_fn": _selective_contexts} if config.recompute == "selective" else {}
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **context)
    if config.compile and can_compile(world.device):
        print0("torch.compile makes the first step slow; --no-compile does without")
        for block in blocks:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
    if world.size == 1 and not config.offload:
        return None
    mesh = _mesh(world, config.replicas)
    policy = MixedPrecisionPolicy(param_dtype=config.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    where = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if config.offload else OffloadPolicy()
    shard = partial(fully_shard, mesh=mesh, mp_policy=policy, offload_policy=where)
    for block in blocks:
        shard(block)
    if not model.config.tie_word_embeddings:  # tied weights cannot be in two groups: they stay in the root's
        shard(model.model.embed_tokens)
        # Backward starts with these two: freeing them after forward would only gather them again at once.
        shard([model.model.norm, model.lm_head], reshard_after_forward=False)
    shard(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # the loss is already divided by the tokens of all ranks: sum, do not average
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    stack = [*([] if model.config.tie_word_embeddings else [model.model.embed_tokens]), *blocks]
    for module, following in pairwise(stack):
        module.set_modules_to_forward_prefetch([following])
    return mesh


def all_reduce_gradients(model: Decoder, now: bool) -> None:
    """HSDP: shall the next backward sum gradients across the replicas? Only a step's last one must."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(now)


def _mesh(world: World, replicas: int) -> DeviceMesh:
    if replicas == 1:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    shape = (replicas, world.size // replicas)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def reshard(model: Decoder) -> None:
    """Free what a forward pass without a backward has left gathered (norm, head, root).

    Until then the model's parameters are the whole tensors, which neither the optimiser nor a checkpoint knows.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """No garbage collection but where gc.collect() is called: a pause of one rank's own choosing stalls all others.

    What has been made before stays, and is not looked at again.
    """
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def shorten_timeouts(mesh: DeviceMesh) -> None:
    """After the first step (start-up and compilation are slow): from now on a dead rank shows within 100 seconds."""
    for group in {dist.group.WORLD, *mesh.get_all_groups()}:
        dist.distributed_c10d._set_pg_timeout(STEP_TIMEOUT, group)


def to_float8(blocks: nn.Module, emulate: bool = False) -> None:
    """Let torchao's Float8Linear take the place of the blocks' linears: names and weights stay, products are float8.

    Scaled by row, torchao's more exact recipe; lm_head stays as it is. emulate: on any device, to test with.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    recipe = dataclasses.replace(Float8LinearConfig.from_recipe_name("rowwise"), emulate=emulate)
    fits = lambda module, _name: all(size % 16 == 0 for size in module.weight.shape)  # noqa: E731  float8 units take no other
    convert_to_float8_training(blocks, config=recipe, module_filter_fn=fits)


def can_compile(device: torch.device) -> bool:
    """Is there the compiler that torch.compile needs for this device? Says so where there is none."""
    compilers = [os.environ.get("CXX"), "g++", "clang++"] if device.type == "cpu" else [os.environ.get("CC"), "gcc", "clang"]
    if any(shutil.which(c) for c in compilers if c):
        return True
    print0(f"no {'C++' if device.type == 'cpu' else 'C'} compiler found: running without torch.compile")
    return False


def _saved_ops() -> set:
    """The operations whose outputs selective recomputation keeps: matrix products and attention, by far the dearest."""
    ops = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten._scaled_mm.default}
    return ops | {torch.ops.nanomed.document_attention.default, torch.ops.nanomed.packed_attention.default}


def _selective_contexts():
    saved = _saved_ops()

    def policy(_context, op, *_args, **_kwargs):
        return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
