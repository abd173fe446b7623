"""Three providers of the same functions: they agree alone, in a whole decoder, and in training on several processes."""

import os
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, batch_of, command, read_losses
from kernel_cases import CASES, DEVICE, EPS, angles, outputs_and_gradients, scale_for, targets_for
from nanomed.hf import ModelConfig
from nanomed.kernels import providers
from nanomed.kernels.providers import TORCH, TRITON
from nanomed.model import Decoder

INTERPRETED = not torch.cuda.is_available()


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_decoder_is_the_same_with_either(qk_norm):
    """Loss and every gradient of a small Qwen: biases, grouped heads, untied, two documents."""
    config = ModelConfig(40, 24, 32, 2, 3, 1, 8, 1e-6, 1e4, False, qkv_bias=True, qk_norm=qk_norm)
    results = []
    for kernels in (TORCH, TRITON):
        torch.manual_seed(0)
        model = Decoder(config, kernels=kernels).to(DEVICE)
        documents = [torch.randint(0, 40, (n,)) for n in (5, 6)]
        loss = model(batch_of(documents).to(torch.device(DEVICE)), torch.tensor(1 / 9, device=DEVICE))
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks need two GPUs, or none")
def test_training_with_our_kernels_on_two_ranks_is_training_with_the_twins_on_one(tiny, tmp_path):
    """FSDP gathers what the kernels see: the losses are those of one process without FSDP and without Triton."""
    flags = dict(steps=2, seq_len=16, batch_tokens=32, micro_batch=1, eval_every=1000, val=None, warmup_steps=1)
    runs = {"kernels": (2, "triton"), "twins": (1, "torch")}
    losses = {}
    for name, (nproc, kernels) in runs.items():
        out = tmp_path / name
        argv = command(nproc, [*tiny.flags(out, **flags), "--kernels", kernels, "--no-compile"])
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(argv, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        assert f"{kernels} kernels" in done.stderr
        losses[name] = read_losses(out)
    assert losses["kernels"] == pytest.approx(losses["twins"], rel=1e-5)


@pytest.mark.skipif(not INTERPRETED, reason="with a GPU they run")
@pytest.mark.parametrize("name", ["triton", "liger"])
def test_without_a_gpu_they_are_refused_by_name(tiny, tmp_path, name):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    argv = [sys.executable, str(ROOT / "train.py"), *tiny.flags(tmp_path / "run"), "--kernels", name]
    done = subprocess.run(argv, capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert done.stderr == f"error: --kernels {name}: needs a GPU; the CPU has the same functions under the name torch\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not INTERPRETED, reason="with a GPU they run")
def test_called_on_the_cpu_without_the_interpreter_they_say_what_to_use():
    code = (
        "import torch; from nanomed.kernels.rms_norm import rms_norm; from nanomed.kernels.providers import default;"
        "assert default() == 'torch'; rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5)"
    )
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert "ValueError: rms_norm: x is on the CPU" in done.stderr
    assert "use the function that ends in _torch" in done.stderr


# --- Liger-Kernel --------------------------------------------------------------------------------------------------


@pytest.fixture
def liger(monkeypatch):
    """Liger's functions. In the interpreter they need two stand-ins, for Python floats and for libdevice's rsqrt."""
    if INTERPRETED:
        from liger_kernel.ops import fused_add_rms_norm, rms_norm

        import interpreter

        monkeypatch.setattr(interpreter.interpreter, "_implicit_cvt", interpreter.convert_floats_too)
        for module in (rms_norm, fused_add_rms_norm):
            monkeypatch.setattr(module, "rsqrt", interpreter.rsqrt)
    return providers.kernels("liger")


def test_liger_agrees(liger):
    """float32, all six functions and their gradients: the signatures mean the same."""
    by_name = {case.name: case for case in CASES}
    functions = {
        "rms_norm": lambda x, w: liger.rms_norm(x, w, EPS),
        "add_rms_norm": lambda x, r, w: liger.add_rms_norm(x, r, w, EPS),
        "swiglu": lambda gate, up: liger.swiglu(gate * 1, up * 1),
        "rope": lambda q, k: liger.rope(q * 1, k * 1, *angles(len(q), q.shape[-1] // 2, q.dtype)),
        "norm_rope": lambda q, k, *w: liger.norm_rope(q, k, *w, EPS, *angles(len(q), q.shape[-1] // 2, q.dtype)),
        "linear_cross_entropy": lambda h, w: liger.linear_cross_entropy(h, w, targets_for(len(h), len(w)), scale_for(h), 1e-3, 3),
    }
    for name, function in functions.items():
        tensors = by_name[name].inputs(5, 24)
        theirs = outputs_and_gradients(function, tensors)
        for x, y in zip(outputs_and_gradients(by_name[name].ours, tensors), theirs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
