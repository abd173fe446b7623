"""Documents → scores: those of one document at a time, in the file's order, whole or not there, of one configuration."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForSequenceClassification, XLMRobertaConfig, XLMRobertaForSequenceClassification

import scoring
import sweep as script
from nanomed import InputError
from scoring import Scoring, cut_batches, score_path

ROOT = Path(__file__).resolve().parents[1]
WORDS = "Der Patient erhält täglich fünf Milligramm Ramipril gegen hohen Blutdruck und das Amt gibt Auskunft".split()
MAX_TOKENS, MAX_CHARS = 40, 240
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def text_of(seed: int, n_words: int = 60) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, n_words)))


def make_classifier(folder: Path, seed: int = 0) -> Path:
    """A random XLM-RoBERTa of 20 thousand parameters, a Unigram tokenizer, threshold.json: as classify.py leaves them."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([text_of(i) for i in range(200)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    config = XLMRobertaConfig(vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                              intermediate_size=64, max_position_embeddings=MAX_TOKENS + 2, num_labels=2,
                              type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2)  # fmt: skip
    torch.manual_seed(seed)
    model = XLMRobertaForSequenceClassification(config)
    for name, param in model.named_parameters():
        if not name.endswith("LayerNorm.weight"):
            torch.nn.init.normal_(param, 0.0, 0.5)  # large: the scores must depend on the text
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    threshold = {"threshold": 0.5, "max_chars": MAX_CHARS, "max_tokens": MAX_TOKENS,
                 "precision": [0.95, 0.93, 0.97], "recall": [0.8, 0.76, 0.84], "target_precision": 0.95,
                 "prompt_sha256": "0" * 64, "base_model": "test"}  # fmt: skip
    (folder / "threshold.json").write_text(json.dumps(threshold))
    return folder


def write_documents(path: Path, texts: list[str], first: int = 0) -> Path:
    rows = [{"id": f"<{first + i}>", "text": text, "url": f"https://example.org/{i}", "dump": "CC-MAIN-2024-10",
             "date": "2024-03-01"} for i, text in enumerate(texts)]  # fmt: skip
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=70)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="module")
def clf(tmp_path_factory):
    return make_classifier(tmp_path_factory.mktemp("clf"))


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Two files, Parquet and JSONL; one text empty, one blank, one far over the cap."""
    folder = tmp_path_factory.mktemp("documents")
    texts = [text_of(i) for i in range(150)]
    texts[7], texts[8], texts[9] = "", " \n", text_of(9) + " Blutdruck" * 5000
    write_documents(folder / "a.parquet", texts)
    write_documents(folder / "b.jsonl", [text_of(1000 + i) for i in range(60)], first=150)
    return folder


def run(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "data/sweep.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", **options)


def step_for(clf: Path, files: list[Path], out: Path, **changes) -> Scoring:
    values = dict(files=tuple(map(str, files)), out=str(out), classifier=str(clf), identity='{"a": 1}',
                  max_chars=MAX_CHARS, max_tokens=MAX_TOKENS, text_key="text", id_key="id", dtype="auto",
                  batch_tokens=256, threads=1)  # fmt: skip
    return Scoring(**values | changes)


def one_at_a_time(clf: Path, texts: list[str]) -> list[float | None]:
    """The obvious way: transformers, one text, no padding."""
    tokenizer = Tokenizer.from_file(str(clf / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_TOKENS)
    model = AutoModelForSequenceClassification.from_pretrained(clf).eval()
    scores = []
    for text in texts:
        if not text.strip():
            scores.append(None)
            continue
        with torch.inference_mode():
            logits = model(torch.tensor([tokenizer.encode(text[:MAX_CHARS]).ids])).logits
        scores.append(logits.softmax(-1)[0, 1].item())
    return scores


def test_scores_are_those_of_one_document_at_a_time(tmp_path, clf, documents, monkeypatch):
    monkeypatch.setattr(scoring, "WINDOW", 64)
    path = documents / "a.parquet"
    step_for(clf, [path], tmp_path)(None, 0, 1)
    table = pq.read_table(score_path(path, tmp_path)).to_pylist()
    source = pq.read_table(path).to_pylist()
    assert [row["id"] for row in table] == [row["id"] for row in source]
    assert [row["row"] for row in table] == list(range(150))
    assert {row["file"] for row in table} == {"a.parquet"}
    expected = one_at_a_time(clf, [row["text"] for row in source])
    assert [row["score"] is None for row in table] == [score is None for score in expected]
    found, expected = (np.array([s for s in scores if s is not None]) for scores in ([r["score"] for r in table], expected))
    assert np.abs(found - expected).max() < 1e-5
    assert expected.max() - expected.min() > 0.2  # they do differ


def test_bf16_stays_close_and_the_head_is_fp32(tmp_path, clf, documents):
    path = documents / "b.jsonl"
    scores = {}
    for dtype in ("fp32", "bf16"):
        step_for(clf, [path], tmp_path / dtype, dtype=dtype)(None, 0, 1)
        scores[dtype] = pq.read_table(score_path(path, tmp_path / dtype))["score"].to_numpy()
    difference = np.abs(scores["fp32"] - scores["bf16"])
    assert 0 < difference.max() < 0.1
    rounded = torch.from_numpy(scores["bf16"].copy()).bfloat16().float().numpy()
    assert (rounded != scores["bf16"]).any()  # softmax was not rounded to bf16


@given(lengths=st.lists(st.integers(0, 50), max_size=60), budget=st.integers(1, 200))
def test_batches_hold_every_document_once_within_the_budget(lengths, budget):
    lengths = np.array(lengths, np.int64)
    batches = list(cut_batches(lengths, budget))
    together = np.concatenate(batches) if batches else np.empty(0, int)
    assert sorted(together) == np.flatnonzero(lengths).tolist()
    assert (np.diff(lengths[together]) <= 0).all()
    for batch in batches:
        assert batch.size == 1 or lengths[batch].max() * batch.size <= budget


def sweep(*arguments) -> None:
    """The script in this process: importing torch and datatrove takes longer than the tests."""
    args = script.parse_arguments([str(argument) for argument in arguments])
    script.sweep(args.inputs, args.classifier, args.out, args)


def test_the_command_line(tmp_path, clf, documents, capsys):
    """Two workers; a corrupt file is one line, and what the others made is kept."""
    out, broken = tmp_path / "out", write_documents(tmp_path / "c.parquet", [text_of(i) for i in range(300)])
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2] + b"\0" * 500 + whole[len(whole) // 2 + 500 :])  # the tail is whole
    arguments = (documents, broken, "--classifier", clf, "--out", out, "--threads", 1)
    bad = run(*arguments, "--workers", 2)
    assert (bad.returncode, bad.stderr.count("\n")) == (1, 1), bad.stderr
    assert "c.parquet: unreadable after row" in bad.stderr
    assert not (out / "sweep.json").exists()
    assert {path.name for path in (out / "scores").iterdir()} == {"a.parquet", "b.parquet"}
    broken.write_bytes(whole)
    sweep(*arguments, "--workers", 1)
    assert "510 documents, 2 of them empty, 3 files" in capsys.readouterr().out
    assert json.loads((out / "sweep.json").read_text())["documents"] == 510


def test_again_scores_only_what_is_missing(tmp_path, clf, documents, capsys, monkeypatch):
    arguments = (documents, "--classifier", clf, "--out", tmp_path / "out", "--workers", 1, "--threads", 1)
    sweep(*arguments)
    tasks: list = []
    a, b = (tmp_path / f"out/scores/{name}.parquet" for name in "ab")
    stamp, whole = a.stat().st_mtime_ns, b.read_bytes()
    b.unlink()
    make = script.make_executor
    monkeypatch.setattr(script, "make_executor", lambda step, args: tasks.append(step.files) or make(step, args))
    sweep(*arguments)
    assert tasks == [(str(documents / "b.jsonl"),)]  # on Slurm each is a job
    assert (a.stat().st_mtime_ns, b.read_bytes()) == (stamp, whole)
    assert "for 1 files" in capsys.readouterr().out
    sweep(*arguments)
    assert "for 1 files" not in capsys.readouterr().out


def test_scores_of_another_configuration_are_refused(tmp_path, clf, documents):
    out = tmp_path / "out"
    copy = write_documents(tmp_path / "b.jsonl", [text_of(i) for i in range(20)])
    sweep(copy, "--classifier", clf, "--out", out, "--workers", 1)
    other = make_classifier(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match=r"b.parquet: made with another configuration: classifier_sha256 was"):
        sweep(copy, "--classifier", other, "--out", out)
    with pytest.raises(InputError, match=r"dtype was auto, now it is bf16"):
        sweep(copy, "--classifier", clf, "--out", out, "--dtype", "bf16")
    write_documents(copy, [text_of(i) for i in range(21)])
    with pytest.raises(InputError, match=r"size was \d+, now it is \d+"):
        sweep(copy, "--classifier", clf, "--out", out)


# Kills itself after two of its windows.
DIES = """
import itertools, os, signal
import scoring
from scoring import Scoring
scoring.WINDOW, real = 500, scoring.score_documents
def dies(*args):
    yield from itertools.islice(real(*args), 2)
    os.kill(os.getpid(), signal.SIGKILL)
scoring.score_documents = dies
{step!r}(None, 0, 1)
"""


def test_kill_9_leaves_no_half_file_of_scores(tmp_path, clf):
    path = write_documents(tmp_path / "long.jsonl", [text_of(i) for i in range(8_000)])
    step = step_for(clf, [path], tmp_path / "out", batch_tokens=4096)
    killed = subprocess.run([sys.executable, "-c", DIES.format(step=step)], cwd=ROOT / "data", env=ENV)
    assert killed.returncode == -signal.SIGKILL
    target = score_path(path, tmp_path / "out")
    assert [path.suffix for path in target.parent.iterdir()] == [".tmp"]
    assert not target.exists()
    step(None, 0, 1)
    assert len(pq.read_table(target)) == 8_000
    assert [path.name for path in target.parent.iterdir()] == ["long.parquet"]


def test_a_full_disk_is_one_line(tmp_path, clf, documents, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    step_for(clf, [documents / "b.jsonl"], tmp_path)(None, 0, 1)
    assert "b.parquet: cannot be written: No space left" in (tmp_path / "errors/b.jsonl.txt").read_text()
    assert not list((tmp_path / "scores").iterdir())


BAD = {
    "missing id": ("a.jsonl", b'{"text": "a"}\n', r"a.jsonl: line 1: no 'id', it has text"),
    "missing text": ("a.jsonl", b'{"id": "1", "inhalt": "a"}\n', r"a.jsonl: line 1: no 'text', it has id, inhalt"),
    "null": ("a.jsonl", b'{"id": "1", "text": null}\n', r"a.jsonl: line 1: 'text' is null"),
    "not UTF-8": ("a.jsonl", b'{"id": "1", "text": "\xff"}\n', r"a.jsonl: line 1: not valid UTF-8"),
    "cut gz": ("a.jsonl.gz", gzip.compress(b'{"id": "1", "text": "a"}\n' * 99)[:-9], r"unreadable after line \d+"),
    "cut parquet": ("a.parquet", b"PAR1abc", r"a.parquet: not a whole Parquet file"),
    "other kind": ("a.csv", b"id,text\n", r"no such input"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_input_is_one_line(tmp_path, clf, name):
    file, data, message = BAD[name]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / file).write_bytes(data)
    with pytest.raises(InputError, match=message) as error:
        sweep(tmp_path / "in", "--classifier", clf, "--out", tmp_path / "out", "--workers", 1)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("scores/*"))
    assert not (tmp_path / "out/sweep.json").exists()


def test_other_wrong_arguments(tmp_path, clf):
    path = write_documents(tmp_path / "a.jsonl", ["a"])
    write_documents(tmp_path / "a.parquet", ["a"])
    (tmp_path / "clf").mkdir()
    for inputs, classifier, message in (
        ([path, tmp_path / "a.parquet"], clf, r"two inputs would share scores/a.parquet"),
        ([tmp_path / "missing.parquet"], clf, r"missing.parquet: no such input"),
        ([path], tmp_path / "clf", r"clf/threshold.json: no such file; expected a folder of data/classify.py"),
    ):
        with pytest.raises(InputError, match=message):
            sweep(*inputs, "--classifier", classifier, "--out", tmp_path / "out")
    (tmp_path / "clf/threshold.json").write_text('{"threshold": 0.5, "max_chars": 9}')
    with pytest.raises(InputError, match=r"threshold.json: max_tokens is None, expected a number"):
        sweep(path, "--classifier", tmp_path / "clf", "--out", tmp_path / "out")
