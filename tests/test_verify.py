"""verify.py beside the text: bins that say something else than their inputs are found, and named to the line."""

import hashlib
import json
import subprocess
import sys

import pytest

from bpe import byte_level, with_bos
from conftest import ROOT
from nanomed import InputError
from nanomed.bins import write_manifest
from prepare import prepare
from texts import text_of, write_jsonl
from verify import compare_text, sources


@pytest.fixture(params=["plain", "bos"])
def made(request, tmp_path, monkeypatch):
    """(bins of two inputs in several shards, tokenizer.json, the inputs); some texts are empty, one line is blank."""
    monkeypatch.setattr(sys.modules["reading"], "BATCH_BYTES", 3_000)
    (byte_level() if request.param == "plain" else with_bos()).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    inputs = [write_jsonl(tmp_path / f"{name}.jsonl", [text_of(i + 1000 * n) if i % 40 else "" for i in range(150)])
              for n, name in enumerate("ab")]  # fmt: skip
    inputs[1].write_text(inputs[1].read_text("utf-8") + "\n", "utf-8")
    return prepare(inputs, tmp_path, tmp_path / "bins", slice_bytes=9_000), tmp_path / "tokenizer.json", inputs


def test_the_same_text_is_found_the_same(made):
    bins, tokenizer, inputs = made
    assert bins.n_docs == 292
    assert len(bins.shards) > 4
    assert [source["name"] for source in sources(bins)] == ["a.jsonl", "b.jsonl"]
    assert compare_text(bins, tokenizer, inputs, n_sample=10) == 10
    assert compare_text(bins, tokenizer, inputs, n_sample=10**6) == 292


def claim(bins, path, **changes) -> None:
    """Make the records say that the bins were made of this very file."""
    for index, shard in enumerate(bins.shards):
        if shard["source"]["name"] == path.name:
            shard["source"] |= {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            shard |= changes
            (bins.folder / f"shard-{index:05d}.json").write_text(json.dumps({"format": "nanomed-bins", "version": 1} | shard))
    write_manifest(bins.folder)


def test_a_text_that_says_something_else_is_named(made):
    bins, tokenizer, inputs = made
    lines = inputs[1].read_text("utf-8").split("\n")
    lines[100] = lines[100].replace(" ", "_").replace(":_", ": ").replace(",_", ", ")  # as many bytes
    inputs[1].write_text("\n".join(lines), "utf-8")
    with pytest.raises(InputError, match=r"b.jsonl: sha256 is .*, the bins were made of b.jsonl with"):
        compare_text(bins, tokenizer, inputs, n_sample=1)
    claim(bins, inputs[1])
    with pytest.raises(InputError, match=r"b.jsonl: line 101: encodes to different ids than document 243 of"):
        compare_text(bins, tokenizer, inputs, n_sample=10**6)


def test_counts_must_add_up(made):
    bins, tokenizer, inputs = made
    whole = inputs[0].read_text("utf-8")
    inputs[0].write_text(whole.rpartition("\n{")[0] + "\n", "utf-8")
    claim(bins, inputs[0])
    with pytest.raises(InputError, match=r"a.jsonl: n_docs is 145, the bins record 146"):
        compare_text(bins, tokenizer, inputs, n_sample=1)
    with pytest.raises(InputError, match=r"made of 2 inputs, a.jsonl, b.jsonl; 1 were given"):
        compare_text(bins, tokenizer, inputs[:1], n_sample=1)


def test_the_command_line(made):
    bins, tokenizer, inputs = made
    command = [
        sys.executable,
        ROOT / "data/verify.py",
        bins.folder,
        "--tokenizer",
        tokenizer,
        "--inputs",
        *inputs,
        "--deep",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "292 documents re-encoded from the text, with the same ids" in done.stdout
    inputs[0].unlink()
    bad = subprocess.run(command, capture_output=True, text=True)
    assert (bad.returncode, bad.stderr.count("\n")) == (1, 1)
    assert "a.jsonl: cannot be read" in bad.stderr
