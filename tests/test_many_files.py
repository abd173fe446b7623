"""Any number of inputs and shards: where few descriptors are allowed, bins are written, verified and trained on."""

import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest

from conftest import ROOT
from nanomed import bins as module
from nanomed.bins import Bins, ShardWriter, settings_of, verify, write_manifest
from nanomed.stream import Stream
from texts import fixture_tok, text_of  # noqa: F401

N_FILES, N_DESCRIPTORS = 300, 64


def few_descriptors():
    resource.setrlimit(resource.RLIMIT_NOFILE, (N_DESCRIPTORS, N_DESCRIPTORS))


def run(*command: str) -> str:
    """The output of a command that may have few files open."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT, preexec_fn=few_descriptors
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("workers", [1, 2])
def test_more_inputs_than_descriptors(tmp_path, tok, workers):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(N_FILES):
        (texts / f"{i}.jsonl").write_text(json.dumps({"text": text_of(i)}) + "\n")
    out = tmp_path / "bins"
    run("data/prepare.py", texts, "--tokenizer", tok, "--out", out, "--workers", workers)
    assert "300 documents re-encoded" in run("data/verify.py", out, "--tokenizer", tok, "--inputs", texts, "--deep")


def test_more_shards_than_descriptors_in_training(tmp_path, tiny):
    """Two sets of them, and the tokens are those of one shard."""
    source = Bins(tiny.train)
    for name in ("many", "more"):
        folder = tmp_path / name
        folder.mkdir()
        for i in range(N_FILES):
            writer = ShardWriter(folder, i, settings_of(source.vocab_size, 0, None, source.tokenizer_sha256), "test")
            writer.write(source.tokens(i, 0, int(source.lengths[i]) - 1), np.array([source.lengths[i] - 1]), n_bytes=10)
            writer.commit({"name": "test"})
        write_manifest(folder)
    flags = tiny.flags(tmp_path / "run", data=tmp_path / "many", val=None, steps=3, warmup_steps=1)
    run("train.py", *flags, "--data", tmp_path / "more", "--val", f"a={tmp_path / 'many'}", "--val", f"b={tmp_path / 'more'}")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["val_a_bpb"] == rows[-1]["val_b_bpb"]


def test_maps_are_closed_and_opened_again(tmp_path, monkeypatch):
    """The tokens of every document, in any order, with fewer maps than shards; a set that was replaced is read anew."""
    module._map.cache_clear()
    monkeypatch.setattr(module, "_map", module.functools.lru_cache(maxsize=2)(module._map.__wrapped__))
    documents = np.random.default_rng(0).integers(1, 99, (20, 5))
    for shift in (0, 1):
        for i, document in enumerate(documents):
            writer = ShardWriter(tmp_path, i, settings_of(100, 0, None, "0" * 64), "test")
            writer.write((document + shift) % 100, np.array([5]), n_bytes=5)
            writer.commit({})
        write_manifest(tmp_path)
        bins = verify(tmp_path)
        before = len(os.listdir("/dev/fd"))
        for doc in np.random.default_rng(1).permutation(20).tolist():
            assert bins.tokens(doc, 0, 5).tolist() == ((documents[doc] + shift) % 100).tolist()
            assert len(os.listdir("/dev/fd")) <= before + 2
        assert len(Stream([(bins, 1.0)], 0, 100).lengths) == 20
