"""What only a GPU can show; conftest.py leaves this file out where there is none, tests/bench/gpu.sh runs it."""

import dataclasses

import pytest
import torch

from conftest import batch_of, read_losses, run_train
from nanomed import optim, parallel, weights
from nanomed.config import Config
from nanomed.hf import Llama3Scaling, ModelConfig
from nanomed.kernels import timing
from nanomed.kernels.providers import TRITON, kernels
from nanomed.metrics import Metrics
from nanomed.model import Decoder
from nanomed.parallel import World

SHAPE = ModelConfig(512, 256, 512, 2, 4, 2, 64, 1e-6, 1e4, False, qkv_bias=True)
GPU = World(0, 0, 1, torch.device("cuda", 0), None)
CPU = World(0, 0, 1, torch.device("cpu"), None)


def three_steps(world: World, config: Config, shape: ModelConfig = SHAPE) -> list[tuple[float, float]]:
    """(loss, gradient norm) of three steps from the same weights on the same documents."""
    with torch.device("meta"):
        model = Decoder(shape, config.dtype, kernels(config.kernels))
    parallel.parallelize(model, config, world)
    model.to_empty(device=world.device)
    weights.random_weights(model, 0.1, 0)
    optimizer, results = optim.make_adamw(model, config), []
    torch.manual_seed(0)
    batch = batch_of([torch.randint(0, shape.vocab_size, (n,)) for n in (5, 200, 51)]).to(world.device)
    for _ in range(3):
        loss = model(batch, torch.full((), 1 / 253, device=world.device))
        loss.backward()
        norm = optim.clip(model, optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        results.append((loss.item(), norm.item()))
    return results


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_trains_as_the_cpu_does(compiled, recompute):
    base = Config(precision="fp32", kernels="torch", compile=False, lr=1e-3)
    expected = three_steps(CPU, base)
    low = dataclasses.replace(base, precision="bf16", kernels="triton", compile=compiled, recompute=recompute)
    for (loss, norm), (true_loss, true_norm) in zip(three_steps(GPU, low), expected, strict=True):
        assert loss == pytest.approx(true_loss, rel=0.01)
        assert norm == pytest.approx(true_norm, rel=0.05)


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_norms_of_queries_and_keys_and_stretched_rope(recompute):
    """Qwen3's and Llama 3.1's, which the shape above has not."""
    shape = dataclasses.replace(SHAPE, qk_norm=True, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 128))
    base = Config(precision="fp32", kernels="torch", compile=False, lr=1e-3)
    expected = three_steps(CPU, base, shape)
    low = dataclasses.replace(base, precision="bf16", kernels="triton", compile=True, recompute=recompute)
    for (loss, norm), (true_loss, true_norm) in zip(three_steps(GPU, low, shape), expected, strict=True):
        assert loss == pytest.approx(true_loss, rel=0.01)
        assert norm == pytest.approx(true_norm, rel=0.05)


@pytest.mark.parametrize(
    "change",
    [
        dict(optimizer_states="bf16"),
        dict(optimizer_states="int8"),
        dict(precision="pure-bf16", optimizer_states="int8"),
        dict(precision="pure-bf16", optimizer_states="int8", compile=False),
        dict(float8=True),
    ],
    ids=str,
)
def test_lean_training_is_training(change):
    """Compiled for the GPU: 8-bit states, stochastic rounding, float8 products, against float32 on the CPU.

    float8's gradients, 3 mantissa bits, go other ways: emulated, the loss is off by 0.03 %, then 2.2 %, then 6 to 9 %.
    """
    if change.get("float8") and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("float8 products need Hopper or newer")
    expected = three_steps(CPU, Config(precision="fp32", kernels="torch", compile=False, lr=1e-3))
    tolerances = (0.005, 0.05, 0.15) if change.get("float8") else (0.02, 0.02, 0.02)
    found = three_steps(GPU, Config(lr=1e-3, **change))
    for (loss, norm), (true_loss, true_norm), rel in zip(found, expected, tolerances, strict=True):
        assert loss == pytest.approx(true_loss, rel=rel)
        assert norm == pytest.approx(true_norm, rel=5 * rel)


@pytest.mark.parametrize("lean", [False, True])
def test_no_step_waits_for_the_gpu(lean, tiny, run, tmp_path, monkeypatch):
    """torch raises at every call that would wait for the device, from the second step on, between log steps."""
    steps, real_add, real_flush = [], Metrics.add, Metrics.flush

    def add(self, step, *rest):
        real_add(self, step, *rest)
        torch.cuda.set_sync_debug_mode("error")
        steps.append(step)

    def flush(self, wait_s):
        with pytest.raises(RuntimeError, match="synchroniz"):  # the watch works
            self._values[0].sum().item()
        torch.cuda.set_sync_debug_mode("default")
        real_flush(self, wait_s)

    monkeypatch.setattr(Metrics, "add", add)
    monkeypatch.setattr(Metrics, "flush", flush)
    precision = dict(precision="pure-bf16", optimizer_states="int8") if lean else dict(precision="bf16")
    assert run(tiny.flags(tmp_path / "run", steps=8, log_every=8, eval_every=8, checkpoint_every=8, **precision))
    assert steps == list(range(1, 9))


def test_resume_is_bit_identical_with_deterministic(tiny, tmp_path):
    flags = dict(precision="bf16", checkpoint_every=5, val=None)
    deterministic = ["--deterministic", "--no-compile"]
    whole = run_train(tiny.flags(tmp_path / "whole", steps=10, **flags) + deterministic)
    assert whole.returncode == 0, whole.stderr
    again = run_train(tiny.flags(tmp_path / "again", steps=10, **flags) + deterministic)
    assert again.returncode == 0, again.stderr
    assert read_losses(tmp_path / "again") == read_losses(tmp_path / "whole")


def test_a_forward_and_backward_can_be_captured_in_a_cuda_graph():
    """Nothing in the model waits for the device or looks at a value: capture raises where something does."""
    with torch.device("cuda"):
        model = Decoder(SHAPE, torch.bfloat16, TRITON)
    weights.random_weights(model, 0.1, 0)
    batch = batch_of([torch.randint(0, SHAPE.vocab_size, (n,)) for n in (5, 200, 51)]).to(GPU.device)
    scale = torch.full((), 1 / 253, device=GPU.device)

    def work() -> torch.Tensor:
        loss = model(batch, scale)
        loss.backward()
        return loss

    with timing.own_stream():
        for _ in range(3):
            expected = work().item()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            loss = work()
        graph.replay()
        torch.cuda.synchronize()
    assert loss.item() == pytest.approx(expected, rel=1e-3)
