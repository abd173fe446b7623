"""prepare.py's bad inputs: every one is named in one line, to the line where it has lines."""

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from bpe import byte_level
from nanomed import InputError
from nanomed.bins import verify
from prepare import prepare
from texts import fixture_corpus, fixture_small_batches, fixture_tok, text_of  # noqa: F401


def good(n: int = 300) -> bytes:
    return b"".join(json.dumps({"text": text_of(i)}).encode() + b"\n" for i in range(n))


def parquet_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def not_utf8() -> pa.Array:
    """A string column that is not valid UTF-8, as some writers make it."""
    binary = pa.array([b"gut", b"\xff\xfe"])
    return pa.Array.from_buffers(pa.string(), 2, binary.buffers())


BAD = {
    "missing key": (
        "a.jsonl",
        b'{"text": "a"}\n{"id": 1, "inhalt": "b"}\n',
        r"line 2: no key 'text', it has 'id', 'inhalt'",
    ),
    "null": ("a.jsonl", b'{"text": null}\n', r"line 1: 'text' is of type NoneType, expected a string"),
    "number": ("a.jsonl", b'{"text": "a"}\n\n{"text": 3}\n', r"line 3: 'text' is of type int, expected a string"),
    "list": ("a.jsonl", b'["text"]\n', r"line 1: a JSON list, expected an object"),
    "invalid JSON": ("a.jsonl", good(5) + b'{"text": "a"\n', r"line 6: not valid JSON"),
    "deep JSON": ("a.jsonl", b"[" * 200_000 + b"\n", r"line 1: JSON nested too deeply"),
    "cut last line": ("a.jsonl", good(5)[:-4], r"line 5: not valid JSON"),
    "invalid UTF-8": ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"line 2: not valid UTF-8"),
    "half a pair": ("a.jsonl", b'{"text": "\\ud800"}\n', r"line 1: not valid UTF-8"),
    "UTF-16": ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), r"line 1: not valid UTF-8"),
    "cut gz": ("a.jsonl.gz", gzip.compress(good())[:-900], r"unreadable after line \d+, truncated or damaged"),
    "cut gz tail": ("a.jsonl.gz", gzip.compress(good())[:-3], r"unreadable after line 300, truncated or damaged"),
    "no gz": ("a.jsonl.gz", good(), r"unreadable after line 0.*[Nn]ot a gzipped file"),
    "empty gz": ("a.jsonl.gz", b"", r"has 0 bytes"),
    "cut zst": ("a.jsonl.zst", zstandard.compress(good())[:-900], r"unreadable after line \d+, truncated or damaged"),
    "cut zst tail": (
        "a.jsonl.zst",
        zstandard.compress(good())[:-1],
        r"unreadable after line \d+, truncated or damaged",
    ),
    "no zst": ("a.jsonl.zst", good(), r"unreadable after line 0"),
    "empty zst": ("a.jsonl.zst", b"", r"has 0 bytes"),
    "cut parquet": ("a.parquet", parquet_bytes(pa.table({"text": ["a"] * 99}))[:-50], r"unreadable after row 0"),
    "empty parquet": ("a.parquet", b"", r"unreadable after row 0"),
    "other column": ("a.parquet", parquet_bytes(pa.table({"id": [1], "t": ["a"]})), r"no column 'text', it has id, t"),
    "two columns": (
        "a.parquet",
        parquet_bytes(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"])),
        r"has 2 columns named 'text', expected one",
    ),
    "number column": ("a.parquet", parquet_bytes(pa.table({"text": [1]})), r"column 'text' is int64, expected string"),
    "null row": (
        "a.parquet",
        parquet_bytes(pa.table({"text": ["a", None]})),
        r"row 2: 'text' is null, expected a string",
    ),
    "bad row": ("a.parquet", parquet_bytes(pa.table({"text": not_utf8()})), r"row 2: not valid UTF-8"),
    "extension": ("a.csv", b"text\na\n", r"unknown file type, expected .jsonl"),
    "no text at all": ("a.jsonl", b'{"text": ""}\n\n', r"no text in any of the documents"),
    "empty file": ("a.jsonl", b"", r"no text in any of the documents"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_input_is_named(tmp_path, tok, name):
    file, data, message = BAD[name]
    (tmp_path / file).write_bytes(data)
    with pytest.raises(InputError, match=message) as error:
        prepare([tmp_path / file], tok, tmp_path / "bins")
    assert str(tmp_path / file) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "bins").exists()


def test_a_worker_reports_the_first_bad_line_too(tmp_path, tok, small_batches):
    lines = good(200).splitlines()
    lines[120] = lines[150] = b"{"
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(InputError, match=r"a.jsonl: line 121: not valid JSON"):
        prepare([tmp_path / "a.jsonl"], tok, tmp_path / "bins", workers=2)


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(tmp_path, tok, corpus, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match=r"bins: cannot be written: No space left on device; free space") as error:
            prepare(corpus, tok, tmp_path / "bins")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "bins").exists()
    verify(prepare(corpus, tok, tmp_path / "bins").folder)


def test_other_wrong_arguments(tmp_path, tok, corpus):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    (tmp_path / "file").touch()
    byte_level(special=()).save(str(tmp_path / "bare.json"))
    for inputs, tokenizer, out, message in (
        ([tmp_path / "missing.jsonl"], tok, "a", "missing.jsonl: cannot be read: no such file"),
        ([tmp_path / "folder.jsonl"], tok, "a", "folder.jsonl: a folder without files of .jsonl"),
        ([], tok, "a", "0 inputs, expected one or more"),
        ([corpus[0], corpus[0]], tok, "a", "one.jsonl: given twice, expected each input once"),
        (corpus, tmp_path / "nowhere", "a", "nowhere: no such file; expected a folder"),
        (corpus, tmp_path, "a", "tokenizer.json: no such file"),
        (corpus, "nobody/nothing", "a", "nobody/nothing: no such folder, and the hub does not provide it"),
        (corpus, tmp_path / "broken", "a", "broken/tokenizer.json: refused by tokenizers"),
        (corpus, tmp_path / "bare.json", "a", "no <|endoftext|>, no <|end_of_text|>, no eos_token".replace("|", r"\|")),
        (corpus, tok, "file", "file: cannot be made"),
    ):
        with pytest.raises(InputError, match=message) as error:
            prepare(inputs, tokenizer, tmp_path / out)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="--text-key and --messages-key exclude each other; give one"):
        prepare(corpus, tok, tmp_path / "a", text_key="text", messages_key="messages")
