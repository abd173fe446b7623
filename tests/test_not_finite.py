"""A model with a NaN in it has no score: every command that would make one ends in one line that says so."""

import math
import shutil

import pytest
from safetensors.torch import load_file, save_file

from conftest import run_train
from eval_command import fixture_command, refused, write  # noqa: F401
from knowledge_world import fixture_world  # noqa: F401
from nanomed import InputError
from nanomed.merging import losses
from nanomed.tokenizer import tokenizer_sha256
from test_eval_generate import chat_model
from test_merge_tune import CPU, chat_pair, decoder  # noqa: F401


def damage(folder, name: str, value: float) -> None:
    """One number of one tensor becomes the value."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[5] = value
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture(name="broken", params=[("model.layers.0.mlp.down_proj.weight", math.nan), ("lm_head.weight", math.inf)])
def fixture_broken(request, world, tmp_path):
    folder = shutil.copytree(world / "a", tmp_path / "broken")
    damage(folder, *request.param)
    return folder


def test_knowledge(broken, world, tmp_path, command):
    for task in ("one", "two"):
        out = tmp_path / task
        how = ("--task-path", world / "tasks", "--tasks", task, "--shots", 1, "--out", out)
        line = refused(command, "knowledge", broken, *how)
        assert f"{broken}: " in line
        assert "not finite" in line
        assert not (out / "results.json").exists()
        assert not list(out.glob("samples/**/*.jsonl"))


@pytest.mark.parametrize("how", [(), ("--temperature", 0.8)])
def test_complete(broken, command, how):
    assert "not finite" in refused(command, "complete", broken, "Das Herz", *how)


def test_generate(broken, tmp_path, command):
    folder = chat_model(tmp_path / "chat", broken)
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "Was pumpt das Herz?"}])
    line = refused(command, "generate", folder, "--prompts", prompts, "--max-new-tokens", 2, "--out", tmp_path / "a.jsonl")
    assert f"MODEL {folder}" in line
    assert "not finite" in line
    assert not list(tmp_path.glob("a.*"))  # neither an empty file nor the record of a run that has no result


def test_tune(chat_pair, tiny):  # noqa: F811
    """A NaN in BASE or CPT is refused before, by the tensor's name; here the merged model overflows."""
    base, _, prompts = chat_pair
    model, digest = decoder(base), tokenizer_sha256(base / "tokenizer.json")
    text = losses.Text(str(tiny.val), 384, digest, 16, 600, "--domain")
    chat = losses.Chat(prompts, base, model, CPU)
    model.model.norm.weight[0] = math.inf
    with pytest.raises(InputError, match="not finite"):
        text.bits_per_byte(model, "search", CPU)
    with pytest.raises(InputError, match="not finite"):
        chat.kl(model, "search")


def test_validation(tiny, tmp_path):
    """Before a step is spent on it."""
    folder = shutil.copytree(tiny.model, tmp_path / "model")
    damage(folder, "model.norm.weight", math.nan)
    done = run_train([*tiny.flags(tmp_path / "run"), "--init", str(folder)])
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("error: validation set med: ")
    assert "not finite" in lines[-1]
    assert "Traceback" not in done.stderr
