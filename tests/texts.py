"""Texts of a few words, files of them, and what prepare.py needs beside them. No test itself."""

import json
import random
import sys
from pathlib import Path

import pytest

from bpe import byte_level

WORDS = ["Der", "Patient", "erhält", "täglich", "5", "mg", "Ramipril", ",", "die", "ß", "€", "😀", "\n", "\t"]


def text_of(seed: int, n_words: int = 60) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, n_words)))


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)), "utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


@pytest.fixture(name="tok", scope="module")
def fixture_tok(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tok")
    byte_level().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(name="corpus", scope="module")
def fixture_corpus(tmp_path_factory):
    """Two inputs, some texts empty, one blank line."""
    folder = tmp_path_factory.mktemp("corpus")
    first = write_jsonl(folder / "one.jsonl", [text_of(i) if i % 50 else "" for i in range(400)])
    second = write_jsonl(folder / "two.jsonl", [text_of(1000 + i) for i in range(150)])
    second.write_text(second.read_text("utf-8") + "\n", "utf-8")
    return [first, second]


@pytest.fixture(name="small_batches")
def fixture_small_batches(monkeypatch):
    monkeypatch.setattr(sys.modules["reading"], "BATCH_BYTES", 3_000)
