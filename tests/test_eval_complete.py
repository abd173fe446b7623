"""complete: a model continues a text, as transformers' generate does, without transformers."""

import argparse
import json
import shutil
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from conftest import ROOT, save_reference
from eval_command import fixture_command, refused  # noqa: F401
from nanomed.evaluation import complete
from nanomed.evaluation.complete import pieces, sampled
from test_eval_scorer import CONFIGS, TINY, write_tokenizer

TEXT = "Das Herz"


@pytest.fixture(name="model", scope="module", params=["no BOS", "BOS"])
def fixture_model(request, tmp_path_factory):
    """The folder of a random model; BOS: its tokenizer puts one before a text, as Mistral's does."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    save_reference(CONFIGS["mistral"], folder)
    write_tokenizer(folder, bos=request.param == "BOS")
    return folder


def generated(folder, n_tokens: int) -> tuple[list[int], list[int]]:
    """Tokens of the text, and those that transformers puts after it."""
    ids = PreTrainedTokenizerFast.from_pretrained(folder)(TEXT, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    n, found = ids["input_ids"].shape[1], model.generate(**ids, max_new_tokens=n_tokens, do_sample=False)[0].tolist()
    return found[:n], found[n:]


def spelled(folder, before: list[int], after: list[int]) -> str:
    """What complete prints of these tokens."""
    return TEXT + "".join(pieces(Tokenizer.from_file(str(folder / "tokenizer.json")), before, iter(after))) + "\n"


def test_greedy_is_what_transformers_generates(command, model, capsys):
    before, after = generated(model, 40)
    assert len({*after}) > 5
    capsys.readouterr()  # transformers' progress bars
    assert command("complete", model, TEXT, "--max-new-tokens", 40) == (0, spelled(model, before, after))
    assert command("complete", model, TEXT, "--max-new-tokens", 7)[1] == spelled(model, before, after[:7])


@pytest.mark.parametrize("named", [True, False])
def test_a_model_that_ends_the_text_says_no_more(named, command, tmp_path, model, capsys):
    """Whether its configuration names the end, or it is the token that ends documents."""
    folder = shutil.copytree(model, tmp_path / "model")
    before, after = generated(model, 40)
    at = next(i for i in range(3, 40) if after[i] not in after[:i])
    if named:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, after[at]]}))
    else:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.add_special_tokens(["<|endoftext|>"])
        tokenizer.save(str(folder / "tokenizer.json"))
        changed = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        rows = changed.lm_head.weight.data
        rows[tokenizer.token_to_id("<|endoftext|>")] = 2 * rows[after[at]]  # twice its logit, so likelier in its place
        changed.save_pretrained(folder)
    capsys.readouterr()
    assert command("complete", folder, TEXT, "--max-new-tokens", 40)[1] == spelled(model, before, after[:at])


def test_a_seed_gives_the_same_sample(command, model):
    say = lambda *flags: command("complete", model, TEXT, "--max-new-tokens", 30, *flags)[1]  # noqa: E731
    first = say("--temperature", 1, "--seed", 7)
    assert first == say("--temperature", 1, "--seed", 7)
    assert first != say("--temperature", 1, "--seed", 8)
    assert first != say()
    assert say("--temperature", 1e-4) == say()  # nearly no noise: greedy


def test_characters_come_whole(model):
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    text = " Größe € 😀"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert len(ids) > len(text)
    found = list(pieces(tokenizer, [], iter(ids)))
    assert len(found) > 3
    assert "".join(found) == text
    assert "".join(pieces(tokenizer, [], iter(ids[:-1]))) == text[:-1]


def test_a_run_folder_stands_for_its_export(command, tmp_path, model):
    run = tmp_path / "run"
    shutil.copytree(model, run / "hf")
    for name in ("run.json", "config.json"):
        (run / name).write_text("{}")
    assert command("complete", run, TEXT) == command("complete", model, TEXT)


def test_neither_transformers_nor_lm_eval_is_needed(model):
    """In a process in which every package of the extra `eval` is missing."""
    code = ("import runpy, sys; sys.modules.update(dict.fromkeys(('transformers', 'lm_eval', 'datasets', 'openai')));"
            "runpy.run_path('eval.py', run_name='__main__')")  # fmt: skip
    command = [sys.executable, "-c", code, "complete", model, TEXT, "--max-new-tokens", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(TEXT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-new-tokens", 0), "--max-new-tokens 0: expected 1 or more"),
        (("--temperature", -1), "--temperature -1.0: expected 0 or more"),
        (("--temperature", "nan"), "--temperature nan: expected 0 or more"),
        (("--max-new-tokens", 511), "tokens, and with --max-new-tokens 511 exceeds the model's context of 512"),
        ("", "TEXT is empty"),
        ("\udcff", "TEXT is not UTF-8"),
        ("no model", "neither a local folder nor a hub id"),
        ("no weights", "has no weights"),
        ("no tokenizer", "has no tokenizer.json"),
        ("a damaged tokenizer", "cannot be read as a tokenizer"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments, message, command, tmp_path):
    folder = tmp_path / "model"
    if arguments != "no model":
        save_reference(LlamaConfig(**TINY), folder)
        write_tokenizer(folder, bos=False)
    if arguments == "no weights":
        (folder / "model.safetensors").unlink()
    if arguments == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    if arguments == "a damaged tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    if isinstance(arguments, tuple):
        line = refused(command, "complete", folder, TEXT, *arguments)
    else:
        line = refused(command, "complete", folder, arguments)
    assert message in line


def test_byte_tokens_may_change_what_was_said():
    """As Llama 2's: the newline is a byte too, and a character that is cut off takes it along. What came out stays."""
    vocabulary = {"a": 0, "<0x0A>": 1, "<0xF0>": 2, "<0x9F>": 3, "<unk>": 4}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    assert "".join(pieces(tokenizer, [0], iter([1, 2, 3, 0]))).endswith("a")
    assert "".join(pieces(tokenizer, [0], iter([0, 1, 0]))) == "a\na"


def test_a_temperature_below_float32_is_greedy():
    logits = torch.tensor([0.0, 3.0, 2.9])
    assert [sampled(t, 0)(logits) for t in (1e-30, 1e-50, 5e-324)] == [1, 1, 1]


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_a_gpu_without_bf16_computes_in_fp32(capability, dtype, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    for name in ("fetch", "load_tokenizer", "tokenizer_config", "encode"):
        monkeypatch.setattr(complete, name, lambda *_: tmp_path)
    monkeypatch.setattr(complete, "load_decoder", lambda folder, dtype, device: asked.append(dtype) or sys.exit())
    args = argparse.Namespace(model="m", text="t", max_new_tokens=1, temperature=0, seed=0)
    with pytest.raises(SystemExit):
        complete.run(args)
    assert asked == [dtype]
