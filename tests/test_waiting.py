"""The CPU never waits for the device between log steps, nothing compiles anew; and what needs two ranks."""

import dataclasses
import math
import signal
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import train
from conftest import ROOT, read_losses, run_train, send
from nanomed import guard, optim, parallel, plan
from nanomed.checkpoint import whole
from nanomed.config import parse
from nanomed.guard import Guard, StopSignal
from nanomed.metrics import Metrics
from test_parallel import PLAIN, batch, build, spawn

CPU = torch.device("cpu")


class Syncs(TorchDispatchMode):
    """Counts in this thread the operations that hand a number of the device to Python, by the part of the run they fall into."""

    def __init__(self):
        super().__init__()
        self.part, self.count = "start", {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten._local_scalar_dense.default:
            self.count[self.part] = self.count.get(self.part, 0) + 1
        return op(*args, **(kwargs or {}))


def test_no_host_sync_between_log_steps(tiny, run, tmp_path, monkeypatch):
    """Clipping, the guard, the schedule, metrics, a finished checkpoint: none reads a number off the device."""
    with Syncs() as syncs:
        real_flush, real_restart = Metrics.flush, Metrics.restart_clock

        def flush(self, wait_s):
            syncs.part = "pause"
            real_flush(self, wait_s)

        def restart_clock(self):
            real_restart(self)
            syncs.part = "run"

        monkeypatch.setattr(Metrics, "flush", flush)
        monkeypatch.setattr(Metrics, "restart_clock", restart_clock)
        assert run(tiny.flags(tmp_path / "run", log_every=10, checkpoint_every=10))
    assert syncs.count["pause"] > 0  # so the counting works
    assert "run" not in syncs.count


def test_nothing_is_compiled_after_the_second_step(tiny, run, tmp_path, monkeypatch):
    """Through evaluations and checkpoints, with document borders that change every step."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend="aot_eager", **options))
    torch._dynamo.reset()
    counters.clear()
    graphs = {}
    real_add = Metrics.add
    monkeypatch.setattr(
        Metrics, "add",
        lambda self, step, *rest: (real_add(self, step, *rest), graphs.update({step: counters["stats"]["unique_graphs"]})),
    )  # fmt: skip
    assert run([*tiny.flags(tmp_path / "run", eval_every=7), "--compile"])
    assert graphs[2] >= 1
    assert set(list(graphs.values())[1:]) == {graphs[2]}
    assert counters["stats"]["unique_graphs"] == graphs[2]


# --- two ranks -----------------------------------------------------------------------------------------------------


def _noted(calls: list, real, tensor, *args, **kwargs):
    calls.append(tensor.numel())
    return real(tensor, *args, **kwargs)


def _two_ranks(rank, steps, tiny_flags, folder):
    """Everything that needs two ranks, in one go: processes are dear."""
    world, found = parallel.start(PLAIN), {}
    # FSDP's parameters are DTensors: rank 1 alone meets a NaN, both skip.
    model = build(PLAIN, world)
    optimizer, watch = optim.make_adamw(model, PLAIN), Guard(CPU)
    stop = StopSignal(world)
    with Syncs() as syncs:
        for i in range(3):
            micro = [steps[2 * i + rank]]
            before = [p.to_local().clone() for p in model.parameters()]
            loss, _ = train.forward_backward(model, iter(micro), 1, 2, world, stop)
            if (rank, i) == (1, 1):
                next(model.parameters()).grad.to_local()[0] = math.nan
            norm = optim.clip(model, optimizer, 1.0)
            verdict = watch.judge(loss, norm)
            guard.step_unless(verdict.skip, optimizer)
            optimizer.zero_grad()
            same = [torch.equal(a, p.to_local()) for a, p in zip(before, model.parameters(), strict=True)]
            found[f"step {i}"] = (verdict[0].clone(), same)
    found["syncs"], found["counts"] = dict(syncs.count), watch.counts
    stop.close()
    # HSDP: three micro-batches, one sum across the replicas per group of parameters; the same gradients.
    for name, config in (("plain", PLAIN), ("replicas", dataclasses.replace(PLAIN, replicas=2))):
        model, stop = build(config, world), StopSignal(world)
        calls = []
        _fsdp_collectives.dist.all_reduce = partial(_noted, calls, dist.all_reduce)
        train.forward_backward(model, iter(steps[rank::2]), 3, 6, world, stop)
        dist.all_reduce = dist.all_reduce.args[1]
        stop.close()
        grads = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
        found[name] = (len([n for n in calls if n > 1]), grads)
    # Prefetching: a block is gathered before the one in front of it has computed.
    order, unshard = [], _fsdp_param_group.FSDPParamGroup.unshard
    _fsdp_param_group.FSDPParamGroup.unshard = lambda self, *a: (
        order.append(("gather", self._module_fqn)),
        unshard(self, *a),
    )[1]
    model = build(PLAIN, world)
    for i, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda *_, i=i: order.append(("computed", f"model.layers.{i}")))
    with torch.no_grad():
        model(steps[rank], torch.tensor(1.0))
    found["order"] = order
    torch.save(found, folder / f"{rank}.pt")
    # train.py: rank 1 alone gets a signal, in its eighth step.
    real, calls = parallel.all_reduce_gradients, [0]

    def all_reduce_gradients(*args):
        calls[0] += 1
        if rank == 1 and calls[0] == 2 * 7 + 1:
            send(signal.SIGUSR1)
        return real(*args)

    parallel.all_reduce_gradients = all_reduce_gradients
    train.train(parse(tiny_flags), world)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tiny, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("ranks")
    steps = [batch(5, 20, 7), batch(4, 4, 4, 4, 4, 4, 4, 4)] * 3
    spawn(_two_ranks, steps, tiny.flags(folder / "run", log_every=20, checkpoint_every=20), folder)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_a_nan_on_one_rank_skips_the_step_on_both(two_ranks):
    for found in two_ranks[1]:
        assert [bool(found[f"step {i}"][0]) for i in range(3)] == [False, True, False]
        assert [all(found[f"step {i}"][1]) for i in range(3)] == [False, True, False]
        assert found["counts"].tolist() == [2, 0]


def test_no_host_sync_on_two_ranks(two_ranks):
    for found in two_ranks[1]:
        assert found["syncs"] == {}


def test_replicas_sum_once_a_step(two_ranks):
    for found in two_ranks[1]:
        assert found["plain"][0] == 0
        assert found["replicas"][0] == 3 + 2  # blocks; embedding, norm with head
        for name, grad in found["plain"][1].items():
            torch.testing.assert_close(found["replicas"][1][name], grad, rtol=1e-5, atol=1e-7, msg=name)


def test_the_next_block_is_gathered_before_this_one_has_computed(two_ranks):
    order = two_ranks[1][0]["order"]
    for i in range(2):
        assert order.index(("gather", f"model.layers.{i + 1}")) < order.index(("computed", f"model.layers.{i}"))


def test_a_signal_to_one_rank_stops_both_at_the_same_step(two_ranks, tiny, run, undisturbed, capsys):
    """Within two steps; both left with exit status 0, or spawn had raised. One rank goes on, to the same end."""
    (saved,) = whole(two_ranks[0] / "run" / "checkpoints")
    assert saved[0] in (7, 8, 9)
    assert run(tiny.flags(two_ranks[0] / "run"))
    assert read_losses(two_ranks[0] / "run") == pytest.approx(read_losses(undisturbed), rel=1e-5)


# --- two groups of two ranks ---------------------------------------------------------------------------------------


def _partial_bytes(model) -> int:
    """Bytes in which FSDP keeps a group's sums until they cross the groups."""
    groups = [module._get_fsdp_state()._fsdp_param_group for module in model.modules() if isinstance(module, FSDPModule)]
    outputs = [group._partial_reduce_output for group in groups if group is not None]
    return sum(output.numel() * output.element_size() for output in outputs if output is not None)


def _two_groups(rank, steps, folder):
    """HSDP: the gradient norm when the groups' sums differ in their last bits, and what is kept between micro-batches."""
    world, found = parallel.start(dataclasses.replace(PLAIN, replicas=2)), {}
    for precision in ("fp32", "pure-bf16"):
        config = dataclasses.replace(PLAIN, replicas=2, precision=precision, optimizer_states="fp32")
        model = build(config, world)
        parallel.all_reduce_gradients(model, False)
        model(steps[rank], torch.tensor(1.0)).backward()
        found[precision] = (_partial_bytes(model), sum(p.to_local().numel() for p in model.parameters()))
        parallel.all_reduce_gradients(model, True)
        model(steps[rank], torch.tensor(1.0)).backward()
        real = DTensor.full_tensor
        DTensor.full_tensor = lambda self, real=real: real(self) * (1 + 1e-6 * self.device_mesh.get_local_rank(0))
        found[f"{precision} norm"] = optim.clip(model, optim.make_adamw(model, config), 1.0).item()
        DTensor.full_tensor = real
    dist.destroy_process_group()
    torch.save(found, folder / f"{rank}.pt")


def test_all_replicas_decide_on_one_norm_and_the_planner_counts_their_sums(tmp_path):
    steps = [batch(5, 20, 7), batch(4, 4, 4, 4, 4, 4, 4, 4)] * 2
    spawn(_two_groups, steps, tmp_path, n_ranks=4)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(4)]
    config = dataclasses.replace(PLAIN, replicas=2, seq_len=8, micro_batch=1, batch_tokens=64)
    model = plan.MODELS["Qwen/Qwen2.5-7B-Instruct"]
    job = plan.Job(config, model, *plan.devices.find("h100"), n_gpus=4, mfu=0.5, price=3.0, n_tokens=1e9)
    n_params = plan.parameters(job.model)[0]
    for precision, regime in (("fp32", plan.REGIMES[0]), ("pure-bf16", plan.REGIMES[3])):
        assert len({f[f"{precision} norm"] for f in found}) == 1
        planned_bytes_a_parameter = plan.held(job, regime)["gradients"] / (n_params / job.shards)
        for n_bytes, n_local in (f[precision] for f in found):
            assert n_bytes == pytest.approx(planned_bytes_a_parameter * n_local, rel=0.1)  # FSDP pads odd sizes


# --- slow files ----------------------------------------------------------------------------------------------------

# train.py whose rank 0 takes a second for a write to metrics.jsonl; rank 1 fails if it begins a step meanwhile:
# it would wait for rank 0 with the short time-out of steps.
SLOW_DISK = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
import train
writing = Path({writing!r})
real_append, real_step = train.Metrics._append, train.forward_backward
def append(self, rows):
    writing.touch()
    time.sleep(1)
    real_append(self, rows)
    writing.unlink()
def step(*args):
    assert os.environ["RANK"] == "0" or not writing.exists()
    return real_step(*args)
train.Metrics._append, train.forward_backward = append, step
train.main()
"""


def test_a_slow_disk_is_not_waited_for_in_a_step(tiny, tmp_path):
    script = tmp_path / "slow_disk.py"
    script.write_text(SLOW_DISK.format(root=str(ROOT), writing=str(tmp_path / "writing")))
    done = run_train(tiny.flags(tmp_path / "run", steps=6, log_every=3, checkpoint_every=6, eval_every=6), nproc=2, script=script)
    assert done.returncode == 0, done.stderr
