"""generate: from prompts to answers, at a server with faults and in this process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from endpoint import completion, serving
from eval_command import fixture_command, refused, write  # noqa: F401
from nanomed.evaluation import language
from nanomed.prompts import read_prompts


def test_answers_from_an_endpoint_survive_its_faults_and_are_paid_once(command, tmp_path):
    prompts = write(tmp_path / "p.jsonl", [{"id": f"p{i}", "prompt": f"Frage {i}?"} for i in range(4)])

    def behave(body, number):
        text = body["messages"][-1]["content"]
        if "1" in text and number == 1:
            return "cut"
        return completion(f"zu {text}", "length" if "2" in text else "stop")

    out = tmp_path / "a.jsonl"
    with serving(behave) as endpoint:
        arguments = ("generate", endpoint.url, "--model", "m", "--prompts", prompts, "--out", out)
        assert command(*arguments)[0] == 0
        assert len(endpoint.bodies) == 5
        assert all(b["temperature"] == 0 and b["max_tokens"] == 512 for b in endpoint.bodies)
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [r["id"] for r in rows] == ["p0", "p1", "p2", "p3"]
        assert [r["finish_reason"] for r in rows] == ["stop", "stop", "length", "stop"]
        assert rows[3]["answer"] == "zu Frage 3?"
        about = json.loads((tmp_path / "a.run/run.json").read_text())
        assert about["finished"]
        assert about["kind"] == "generate"
        assert "already finished" in command(*arguments)[1]
        out.unlink()
        assert command(*arguments)[0] == 0  # from the cache
        assert len(endpoint.bodies) == 5
        line = refused(command, *arguments, "--max-new-tokens", 9)
        assert "max_new_tokens = 512, this one 9" in line


def test_a_model_that_only_thinks_ends_the_run(command, tmp_path):
    """At a server that reports thoughts apart from the text. With few prompts at their end, with many after the first hundred."""
    thinking = completion(None, "length")
    thinking["choices"][0]["message"]["reasoning_content"] = "Okay, the user asks"
    for n in (20, 300):
        prompts = write(tmp_path / "p.jsonl", [{"prompt": f"Frage {i}?"} for i in range(n)])
        with serving(lambda *_: thinking) as endpoint:
            flags = ("--model", "m", "--prompts", prompts, "--out", tmp_path / f"{n}.jsonl")
            line = refused(command, "generate", endpoint.url, *flags)
            assert len(endpoint.bodies) <= 100 + 2 * 64
        assert "answers are not text after the thoughts, for example 'Okay, the user asks'" in line
        assert '{"chat_template_kwargs": {"enable_thinking": false}}' in line
        assert not (tmp_path / f"{n}.jsonl").exists()


def test_body_of_generate(command, tmp_path, tiny):
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "Frage?"}])
    flags = ("--model", "m", "--prompts", prompts, "--out", tmp_path / "a.jsonl")
    with serving(lambda *_: "Ja.") as endpoint:
        body = '{"max_tokens": null, "max_completion_tokens": 9, "chat_template_kwargs": {"enable_thinking": false}}'
        assert command("generate", endpoint.url, *flags, "--body", body)[0] == 0
        (sent,) = endpoint.bodies
        assert "a run with body = max_tokens, max" in refused(command, "generate", endpoint.url, *flags)
        assert "already finished" in command("generate", endpoint.url, *flags, "--body", body)[1]
    assert sent["max_completion_tokens"] == 9
    assert sent["chat_template_kwargs"] == {"enable_thinking": False}
    assert "max_tokens" not in sent
    line = refused(command, "generate", tiny.model, "--prompts", prompts, "--out", tmp_path / "b.jsonl", "--body", "{}")
    assert "--body: changes what is sent to a URL" in line


def test_an_address_without_http_is_named(command):
    line = refused(command, "generate", "localhost:8000/v1", "--model", "m", "--out", "x.jsonl")
    assert line.endswith("did you mean http://localhost:8000/v1?")


WITHOUT_EXTRAS = """
import runpy, sys
for name in ("openai", "pyarrow", "transformers", "lm_eval", "datatrove", "triton", "scipy", "sklearn"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.path[0] if "/" not in sys.argv[0] else sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("arguments", [["data/annotate.py"], *(["eval.py", name] for name in ("generate", "judge", "failures"))])
def test_help_needs_no_extra_and_leaves_nothing(arguments, tmp_path):
    script, *rest = arguments
    command = [sys.executable, "-c", WITHOUT_EXTRAS, str(ROOT / script), *rest, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {Path(script).name}")
    assert list(tmp_path.iterdir()) == []


TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def chat_model(folder, source) -> Path:
    """A copy of the model with a chat template."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    set_template(folder, TEMPLATE)
    return folder


def set_template(folder, template: str | None) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))


def test_another_model_at_the_same_path_is_another_run(command, tmp_path, tiny):
    """Neither finished by the first one's answers, nor gone on with."""
    model = chat_model(tmp_path / "model", tiny.model)
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "Das Herz"}])
    arguments = ("generate", model, "--prompts", prompts, "--max-new-tokens", 2, "--out", tmp_path / "a.jsonl")
    assert command(*arguments)[0] == 0
    assert "already finished" in command(*arguments)[1]
    set_template(model, TEMPLATE.replace("assistant", "Arzt"))
    line = refused(command, *arguments)
    assert line.endswith("a.run: was made by another model; choose another --out or delete it")
    set_template(model, TEMPLATE)
    assert "already finished" in command(*arguments)[1]
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "was made by another model" in refused(command, *arguments)


def test_in_this_process_an_interruption_changes_no_byte(command, tmp_path, monkeypatch, tiny):
    """Batches after a kill are the batches of a run that never stopped, and equal one prompt at a time."""
    from nanomed.evaluation import generate

    model = chat_model(tmp_path / "model", tiny.model)
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "Das Herz " * (i + 1)} for i in range(5)])
    flags = ("--prompts", prompts, "--max-new-tokens", 6)
    assert command("generate", model, *flags, "--batch", 2, "--out", tmp_path / "whole.jsonl")[0] == 0
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert {json.loads(line)["finish_reason"] for line in whole.splitlines()} <= {"stop", "length"}

    real, calls = generate._read, []

    def dies(*args):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(generate, "_read", dies)
    assert command("generate", model, *flags, "--batch", 2, "--out", tmp_path / "a.jsonl")[0] == 130
    monkeypatch.setattr(generate, "_read", real)
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(b'{"id": "half')
    assert command("generate", model, *flags, "--batch", 2, "--out", tmp_path / "a.jsonl")[0] == 0
    assert (tmp_path / "a.jsonl").read_bytes() == whole
    assert command("generate", model, *flags, "--batch", 1, "--out", tmp_path / "one.jsonl")[0] == 0
    assert (tmp_path / "one.jsonl").read_bytes() == whole  # the padding on the left is not seen

    thinks = "{% if enable_thinking is not defined or enable_thinking %}{{ raise_exception('aloud') }}{% endif %}"
    set_template(model, thinks + TEMPLATE)
    assert command("generate", model, *flags, "--batch", 2, "--out", tmp_path / "c.jsonl")[0] == 0

    set_template(model, "{{ raise_exception('no such role') }}")
    line = refused(command, "generate", model, *flags, "--out", tmp_path / "d.jsonl")
    assert line.endswith("prompt '1': the chat template refuses it: no such role")
    set_template(model, None)
    assert "has no chat template" in refused(command, "generate", model, *flags, "--out", tmp_path / "b.jsonl")


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"text": "?"}], "line 1 is neither"),
        ([{"prompt": "  "}], "line 1 is neither"),
        ([{"messages": [{"role": "user"}]}], "line 1 is neither"),
        ([{"id": 2, "prompt": "?"}, {"prompt": "??"}], "id '2'"),
        ([], "has no prompts"),
    ],
)
def test_prompts_that_are_none(records, message, command, tmp_path):
    path = write(tmp_path / "p.jsonl", records)
    line = refused(command, "generate", "http://127.0.0.1:9/v1", "--model", "m", "--prompts", path, "--out", "x.jsonl")
    assert message in line


def test_the_prompts_of_the_project():
    prompts = read_prompts(ROOT / "data/tasks/prompts_de.jsonl")
    texts = [messages[-1]["content"] for messages in prompts.values()]
    assert len(texts) >= 80
    assert len(set(texts)) == len(texts)
    assert sum(language.examine(text).mixed for text in texts) == 2  # one to translate, one to correct


def test_turns_written_with_special_tokens_are_counted():
    """They are removed from the text. The token that ends the answer, and those before its first words, are no turns."""
    from transformers import PreTrainedTokenizerFast

    from nanomed.evaluation.generate import _read

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=chat_tokenizer())
    start, end, eos = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"))
    word = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    read = lambda ids: _read(tokenizer, ids, [eos], {start, end})  # noqa: E731
    plain = [*word("Ruhe."), eos, eos]
    assert read(plain) == ("Ruhe.", "stop", len(plain) - 1, 0)
    assert read([*word("Ruhe."), end, eos])[3] == 0
    assert read([start, *word("assistant Ruhe."), eos])[3] == 0
    text, reason, _, n_turns = read([*word("Ruhe."), end, *word("\n"), start, *word("user\nUnd dann?")])
    assert (text, reason, n_turns) == ("Ruhe.\nuser\nUnd dann?", "length", 2)


def chat_tokenizer():
    """A byte-level tokenizer with chat tokens."""
    from bpe import byte_level

    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    return tokenizer


def test_a_model_that_goes_on_with_the_users_turn(command, tmp_path, tiny, monkeypatch):
    """From generate to failures: the file says so, though its text has no special token."""
    from nanomed.evaluation import generate

    model = chat_model(tmp_path / "model", tiny.model)
    set_template(model, "{% for m in messages %}<|endoftext|>{{ m.role }}: {{ m.content }}{% endfor %}<|endoftext|>assistant:")
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "Das Herz"}])
    real = generate._read

    def continued(tok, ids, ends, turns):
        assert turns == {0}  # of the template, from the prompts
        said = tok("Ruhe.", add_special_tokens=False)["input_ids"]
        return real(tok, [*said, 0, *said], [], turns)

    monkeypatch.setattr(generate, "_read", continued)
    assert command("generate", model, "--prompts", prompts, "--max-new-tokens", 2, "--out", tmp_path / "a.jsonl")[0] == 0
    record = json.loads((tmp_path / "a.jsonl").read_text())
    assert (record["answer"], record["turn_tokens"]) == ("Ruhe.Ruhe.", 1)
    assert command("failures", tmp_path / "a.jsonl", "--out", tmp_path / "run")[0] == 0
    assert json.loads((tmp_path / "run/results.json").read_text())["verbosity"]["continued_turns"]["value"] == 1
