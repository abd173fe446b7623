"""No key and no password reaches the terminal or a file, whatever the server repeats and however it is spelled."""

import base64
import json
import sys
import urllib.parse
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import annotate
from chat_requests import _quick  # noqa: F401
from endpoint import completion, serving
from eval_command import answers, fixture_command, write  # noqa: F401
from nanomed import InputError, run_script
from nanomed.chat import ask
from nanomed.redaction import MASK, masked, redacted_command, redactor, secrets_of, shown_url

KEY, PASSWORD, QUERY, FIELD = "sk-proj-Zq7/mV+93xkA==tail", "gehe!m-3ä7", "q-4711-abcdef", "body-secret-99"
BODY = json.dumps({"api_key": FIELD, "temperature": None})


def spellings(secret: str) -> list[str]:
    """What a server may make of a secret."""
    encode = lambda text: base64.b64encode(text.encode()).decode()  # noqa: E731
    forms = [secret, urllib.parse.quote(secret, safe=""), urllib.parse.quote_plus(secret), json.dumps(secret), repr(secret)]
    return [*forms, encode(secret), encode(f"Bearer {secret}"), encode(f"arzt:{secret}"), encode(f"x:{secret}:y"), secret + "x"]


SECRETS = (KEY, PASSWORD, QUERY, FIELD)
LEAKS = [form for secret in SECRETS for form in spellings(secret)]
ECHO = " ".join(LEAKS) + f" Authorization: Bearer {KEY} https://arzt:{PASSWORD}@host/ cut: {KEY[:15]}"


def read_all(folder: Path) -> str:
    """The content of every file, of Parquet also its columns."""
    texts = [path.read_bytes().decode("latin-1") for path in folder.rglob("*") if path.is_file()]
    texts += [path.read_bytes().decode("utf-8", "replace") for path in folder.rglob("*") if path.is_file()]
    texts += [str(pq.read_table(path).to_pylist()) for path in folder.rglob("*.parquet")]
    texts += [str(pq.read_schema(path).metadata) for path in folder.rglob("*.parquet")]
    return "".join(texts)


def behaviour(status: int):
    """An endpoint that repeats what it was sent: in errors of this status, or in answers."""

    def behave(request, number):
        if "0" in request["messages"][0]["content"]:
            return completion(ECHO) | {"model": ECHO} if status == 200 else (status, {"error": {"message": ECHO, "code": ECHO}})
        return "JA URTEIL: GLEICH"

    return behave


@pytest.mark.parametrize("status", [200, 400, 401, 403, 404, 429, 500])
@pytest.mark.parametrize("kind", ["annotate", "generate", "judge"])
def test_no_secret_in_any_file_or_output(kind, status, tmp_path, monkeypatch, capsys, command):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    quoted = urllib.parse.quote(PASSWORD, safe="")
    with serving(behaviour(status)) as endpoint:
        url = endpoint.url.replace("http://", f"http://arzt:{quoted}@") + f"?api_key={QUERY}&version=2"
        if kind == "annotate":
            sample = tmp_path / "sample.parquet"
            pq.write_table(_table(), sample)
            flags = [sample, "--url", url, "--model", "m", "--out", tmp_path / "labels.parquet", "--body", BODY]
            said = _annotate(monkeypatch, flags)
        elif kind == "generate":
            prompts = write(tmp_path / "p.jsonl", [{"prompt": f"Frage {i}?"} for i in range(2)])
            said = command("generate", url, "--model", "m", "--prompts", prompts, "--out", tmp_path / "a.jsonl", "--body", BODY)[1]
        else:
            a, b = (answers(tmp_path / f"{n}.jsonl", {"q0": "Ruhe", "q1": "Tee"}, n) for n in "ab")
            said = command("judge", a, b, f"--url={url}", "--judge", "r", "--out", tmp_path / "run", "--body", BODY)[1]
    assert endpoint.bodies[0]["api_key"] == FIELD
    assert endpoint.headers[0]["authorization"].startswith("Basic")
    everything = said + "".join(capsys.readouterr()) + read_all(tmp_path)
    for secret in SECRETS:
        assert [form for form in spellings(secret) if form in everything] == []
    assert MASK in everything


def _table():
    import pyarrow as pa

    return pa.table({"id": ["a", "b"], "text": ["Fieber 0", "Fieber 1"]})


def _annotate(monkeypatch, flags) -> str:
    monkeypatch.setattr(sys, "argv", ["annotate.py", *map(str, flags)])
    try:
        run_script(annotate.main)
    except SystemExit as end:
        return str(end.code)
    return ""


@pytest.mark.parametrize("key", ["sk-abc\nd", "sk-äbc"])
def test_a_key_that_no_header_can_hold_is_not_shown(tmp_path, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with serving(lambda *_: "JA") as endpoint, pytest.raises(InputError, match="OPENAI_API_KEY has characters") as error:
        list(ask([(0, {"model": "m", "messages": []})], endpoint.url, tmp_path / "cache"))
    assert "sk-" not in str(error.value)


def test_a_key_with_white_space_around_it_is_sent_without(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", " sk-abcdef123\n")
    with serving(lambda *_: "JA") as endpoint:
        list(ask([(0, {"model": "m", "messages": []})], endpoint.url, tmp_path / "cache"))
    assert endpoint.headers[0]["authorization"] == "Bearer sk-abcdef123"


@given(
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=8, max_size=40), st.text(max_size=30), st.text(max_size=30)
)
@settings(max_examples=200, deadline=None)
def test_a_secret_is_found_in_any_text(secret, before, after):
    redact = redactor([secret])
    for form in (secret, base64.b64encode(f"x{secret}".encode()).decode(), urllib.parse.quote(secret, safe="")):
        assert form not in redact(before + form + after) or form in MASK


@pytest.mark.parametrize("key", ["", "none", "EMPTY", "dummy"])
def test_words_are_left_alone(key):
    """What is set where a server wants no key is no secret; nor is the beginning of a password that is a word."""
    text = "none EMPTY dummy: Die medizinische Versorgung, Basic Life Support, Token, task-oriented, http://host/v1"
    assert redactor(secrets_of("http://host:80/v1", key))(text) == text
    assert redactor(["medizinischedaten2024"])("medizinische Daten") == "medizinische Daten"


def test_urls_bodies_and_command_lines_are_shown_without_secrets():
    assert shown_url("https://u:p@h:8/v1?key=abc&v=1") == f"https://{MASK}@h:8/v1?key={MASK}&v=1"
    assert shown_url("http://[::1]:8000/v1") == "http://[::1]:8000/v1"
    assert masked({"max_tokens": None, "auth": [{"X-Api-Key": "abc"}], "token": "def", "n_keys": "ghi"}) == {
        "max_tokens": None, "auth": [{"X-Api-Key": MASK}], "token": MASK, "n_keys": "ghi"}  # fmt: skip
    argv = ["eval.py", "--url=http://u:pass@h/v1", "--body", '{"api_key": "abcd"}', "--note", "key sk-1234567890", "a.jsonl"]
    shown = redacted_command(argv, "sk-1234567890")
    assert shown == [
        "eval.py",
        f"--url=http://{MASK}@h/v1",
        "--body",
        f'{{"api_key": "{MASK}"}}',
        "--note",
        f"key {MASK}",
        "a.jsonl",
    ]
