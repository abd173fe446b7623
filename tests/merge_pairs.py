"""Pairs of models to merge, the formula in float64, and merge.py in this process. No test itself."""

import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, Qwen2Config

import merge
from conftest import save_reference
from nanomed import hf, run_script
from nanomed.merging.slerp import DOT_THRESHOLD

SHAPE = dict(vocab_size=384, hidden_size=32, intermediate_size=56, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, bos_token_id=0, eos_token_id=0)  # fmt: skip
CONFIGS = {"untied": LlamaConfig(**SHAPE), "tied": Qwen2Config(**SHAPE, tie_word_embeddings=True)}
BITS = {torch.bfloat16: 7, torch.float16: 10}


def make_pair(folder: Path, tokenizer: Path, kind: str = "untied", dtype=torch.bfloat16, **saving) -> tuple[Path, Path]:
    """BASE and CPT with BASE's tokenizer; layer i differs by 1, 2, 8 or 30 %, the last norm is zero in both."""
    base, cpt = folder / "base", folder / "cpt"
    model = save_reference(CONFIGS[kind], base, dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.save_pretrained(base, **saving)
        for name, p in model.named_parameters():
            change = (0.01, 0.02, 0.08, 0.3)[int(name.split(".")[2])] if ".layers." in name else 0.005
            noise = torch.randn(p.shape, generator=generator) * p.float().norm() / p.numel() ** 0.5
            p.add_((change * noise).to(p.dtype))
        model.save_pretrained(cpt, **saving)
    for path in (base, cpt):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tokenizer / file, path / file)
    return base, cpt


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors that the folder's index, or its one file, names."""
    return {name: load_file(file)[name] for name, file in hf.find_weights(folder).items()}


def reference(a: torch.Tensor, b: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The two terms of SLERP in float64, as mergekit's page has it, and the cosine."""
    a, b = a.double().flatten(), b.double().flatten()
    cos = float(a @ b / (a.norm() * b.norm())) if min(a.norm(), b.norm()) > 1e-8 else 0.0
    if abs(cos) > DOT_THRESHOLD:
        return (1 - t) * a, t * b, cos
    theta = math.acos(cos)
    return math.sin((1 - t) * theta) / math.sin(theta) * a, math.sin(t * theta) / math.sin(theta) * b, cos


def assert_close(found: torch.Tensor, a: torch.Tensor, b: torch.Tensor, t: float, name: str = "") -> str:
    """At most one unit in the last place of the larger term (16 bits), 1e-6 of the norm (float32); the branch."""
    x, y, cos = reference(a, b, t)
    error = (found.double().flatten() - (x + y)).abs()
    if found.dtype == torch.float32:
        assert error.norm() <= 1e-6 * (x + y).norm(), name
    else:
        larger = torch.maximum(torch.maximum(x.abs(), y.abs()), (x + y).abs()).clamp_min(torch.finfo(found.dtype).tiny)
        assert (error <= torch.exp2(larger.log2().floor() - BITS[found.dtype])).all(), name
        assert error.norm() <= 2.0 ** -BITS[found.dtype] * (x + y).norm(), name  # a systematic shift would show here
    return "lerp" if abs(cos) > DOT_THRESHOLD else "slerp"


def run(monkeypatch, *flags) -> None:
    """merge.py in this process."""
    monkeypatch.setattr(sys, "argv", ["merge.py", *map(str, flags)])
    run_script(merge.main)


def files_of(folder: Path) -> dict[str, bytes]:
    """Contents of every file below, by path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(name="pair")
def fixture_pair(tmp_path, tiny):
    return make_pair(tmp_path, tiny.model)


@pytest.fixture(name="pair_and_out")
def fixture_pair_and_out(tmp_path, tiny):
    return *make_pair(tmp_path, tiny.model), tmp_path / "out"


@pytest.fixture(name="refused")
def fixture_refused(tmp_path, tiny, monkeypatch):
    """Damage a pair with a function of (BASE, CPT), run merge.py with flags; its one line. Nothing may be left behind."""

    def attempt(damage, *named: str, flags=("--t", "0.5"), kind="untied") -> str:
        base, cpt = make_pair(tmp_path / "pair", tiny.model, kind)
        damage(base, cpt)
        before = files_of(tmp_path)
        with pytest.raises(SystemExit) as exit_:
            run(monkeypatch, base, cpt, tmp_path / "out", *flags)
        line = str(exit_.value.code)
        assert line.startswith("error: ")
        assert "\n" not in line
        assert not [what for what in named if what not in line], line
        assert files_of(tmp_path) == before
        assert not [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")]
        return line

    return attempt
