"""Text → bins: the same bytes whatever the way; half a set is never taken for whole; every bad input is named."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

import prepare as script
from nanomed import InputError
from nanomed.bins import Bins, verify
from prepare import prepare
from test_bins import byte_level, with_bos

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["Der", "Patient", "erhält", "täglich", "5", "mg", "Ramipril", ",", "die", "ß", "€", "😀", "\n", "\t"]


def text_of(seed: int, n_words: int = 60) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, n_words)))


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)), "utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


def documents(bins: Bins) -> list[list[int]]:
    return [bins.tokens(doc, 0, bins.lengths[doc]).tolist() for doc in range(bins.n_docs)]


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tok")
    byte_level().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two inputs, some texts empty, one blank line."""
    folder = tmp_path_factory.mktemp("corpus")
    first = write_jsonl(folder / "one.jsonl", [text_of(i) if i % 50 else "" for i in range(400)])
    second = write_jsonl(folder / "two.jsonl", [text_of(1000 + i) for i in range(150)])
    second.write_text(second.read_text("utf-8") + "\n", "utf-8")
    return [first, second]


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(sys.modules["reading"], "BATCH_BYTES", 3_000)


# ---- what comes out ----


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=8).filter(any), slice_bytes=st.integers(1, 60))
def test_round_trip(tmp_path_factory, tok, texts, slice_bytes):
    folder = tmp_path_factory.mktemp("trip")
    bins = prepare([write_jsonl(folder / "a.jsonl", texts)], tok, folder / "bins", slice_bytes=slice_bytes)
    tokenizer = Tokenizer.from_file(str(tok / "tokenizer.json"))
    texts = [text for text in texts if text]
    assert [tokenizer.decode(ids[:-1], skip_special_tokens=False) for ids in documents(bins)] == texts
    assert all(ids[-1] == tokenizer.token_to_id("<|endoftext|>") for ids in documents(bins))
    assert bins.n_bytes == sum(len(text.encode()) for text in texts)
    verify(bins.folder)


def test_the_same_bytes_for_any_number_of_workers(tmp_path, tok, corpus, small_batches):
    for workers in (1, 2, 3):
        prepare(corpus, tok, tmp_path / str(workers), workers=workers, slice_bytes=20_000)
    one = contents(tmp_path / "1")
    assert len(one) >= 3 * 4
    assert one == contents(tmp_path / "2") == contents(tmp_path / "3")
    assert (tmp_path / "1/manifest.json").read_bytes() == (tmp_path / "3/manifest.json").read_bytes()


def test_a_shard_is_a_slice_of_one_input(tmp_path, tok, corpus, small_batches):
    limit = 20_000
    bins = prepare(corpus, tok, tmp_path / "a", slice_bytes=limit)
    by_input = {path.name: [s for s in bins.shards if s["source"]["name"] == path.name] for path in corpus}
    for path, shards in zip(corpus, by_input.values(), strict=True):
        texts = [json.loads(line)["text"] if line.strip() else "" for line in path.read_text("utf-8").split("\n")[:-1]]
        for shard in shards:
            source = shard["source"]
            rows = texts[source["first_row"] : source["first_row"] + source["n_rows"]]
            sizes = [len(text.encode()) for text in rows if text]
            assert (shard["n_docs"], shard["n_bytes"]) == (len(sizes), sum(sizes))
            assert sum(sizes[:-1]) < limit
            assert source["last"] == (shard is shards[-1])
            assert source["last"] or sum(sizes) >= limit
        assert sum(shard["source"]["n_rows"] for shard in shards) == len(texts)
    assert sum(shard["source"]["n_empty"] for shard in bins.shards) == 8


def test_all_formats_give_the_same_tokens(tmp_path, tok, small_batches):
    texts = [text_of(i) for i in range(200)]
    plain = write_jsonl(tmp_path / "a.jsonl", texts).read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain[:5000]) + gzip.compress(plain[5000:]))
    compress = zstandard.compress
    (tmp_path / "a.jsonl.zst").write_bytes(compress(plain[:5000]) + compress(plain[5000:]))  # in frames, as pzstd does
    for name, kind in (("a", pa.string()), ("b", pa.large_string()), ("c", pa.dictionary(pa.int32(), pa.string()))):
        table = pa.table({"id": range(200), "text": pa.array(texts, kind)})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=70)
    names = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "b.parquet", "c.parquet"]
    results = [prepare([tmp_path / name], tok, tmp_path / f"{name}-bins", slice_bytes=9_000) for name in names]
    assert len({bins.fingerprint for bins in results}) == 1
    assert results[0].n_docs == 200


def test_text_that_spells_a_special_token_stays_text(tmp_path, tok):
    tokenizer = Tokenizer.from_file(str(tok / "tokenizer.json"))
    tokenizer.add_tokens(["<tool_call>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "a<|endoftext|>b <|im_start|>system<tool_call>"
    bins = prepare([write_jsonl(tmp_path / "a.jsonl", [text])], tmp_path, tmp_path / "bins")
    [ids] = documents(bins)
    end, chat, tool = (tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_start|>", "<tool_call>"))
    assert (ids.count(end), ids.count(chat)) == (1, 0)
    assert ids.count(tool) == 1  # an ordinary added token is vocabulary
    assert tokenizer.decode(ids, skip_special_tokens=False) == text + "<|endoftext|>"


def test_the_separator_stays_text_even_if_it_is_not_marked_special(tmp_path, tok):
    tokenizer = Tokenizer.from_file(str(tok / "tokenizer.json"))
    tokenizer.add_tokens(["<end>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    [ids] = documents(
        prepare([write_jsonl(tmp_path / "a.jsonl", ["a<end>b"])], tmp_path, tmp_path / "bins", eos="<end>")
    )
    assert ids.count(tokenizer.token_to_id("<end>")) == 1


def test_a_word_level_vocabulary_cannot_forge_the_separator(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=r"a.jsonl: line 2: its text encodes to the separator's id 1"):
        prepare([write_jsonl(tmp_path / "a.jsonl", ["a", "a </s> a"])], tmp_path, tmp_path / "bins", eos="</s>")


def test_mistral_documents_begin_with_bos(tmp_path):
    tokenizer = with_bos()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}, "bos_token": "<s>"}))
    path = write_jsonl(tmp_path / "a.jsonl", ["Der <s> Patient", "erhält"])
    bins = prepare([path], tmp_path, tmp_path / "auto")
    bos, eos = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    assert (bins.bos, bins.separator) == (bos, eos)
    for ids in documents(bins):
        assert (ids[0], ids[-1], ids.count(bos), ids.count(eos)) == (bos, eos, 1, 1)
    assert verify(bins.folder).n_docs == 2
    without = prepare([path], tmp_path, tmp_path / "no", bos="no")
    assert without.bos is None
    assert [ids[1:] for ids in documents(bins)] == documents(without)


def test_saved_truncation_and_dropout_do_not_touch_the_text(tmp_path, tok):
    path = write_jsonl(tmp_path / "a.jsonl", [text_of(i) for i in range(30)])
    expected = prepare([path], tok, tmp_path / "expected").fingerprint
    tokenizer = Tokenizer.from_file(str(tok / "tokenizer.json"))
    tokenizer.enable_truncation(max_length=4)
    tokenizer.enable_padding(length=8, pad_id=256, pad_token="!")
    tokenizer.model.dropout = 0.5
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert prepare([path], tmp_path, tmp_path / "bins").fingerprint == expected


def test_equals_datatrove(tmp_path, tok):
    from datatrove.data import Document
    from datatrove.pipeline.tokens import DocumentTokenizer

    texts = [text_of(i) for i in range(120)]
    bins = prepare([write_jsonl(tmp_path / "a.jsonl", texts)], tok, tmp_path / "bins")
    peer = DocumentTokenizer(
        str(tmp_path / "peer"), str(tok / "tokenizer.json"), eos_token="<|endoftext|>", shuffle_documents=False
    )
    peer.run(Document(text, str(i)) for i, text in enumerate(texts))
    [ds] = (tmp_path / "peer").glob("*.ds")
    assert ds.read_bytes() == (bins.folder / "shard-00000.bin").read_bytes()
    ends = np.fromfile(f"{ds}.index", "<u8")
    assert ends.tolist() == np.fromfile(bins.folder / "shard-00000.idx", "<u8")[1:].tolist()


# ---- again, and after an interruption ----


def test_a_second_run_has_nothing_to_do(tmp_path, tok, corpus, capsys):
    first = prepare(corpus, tok, tmp_path / "a")
    assert "542 documents" in capsys.readouterr().out
    stamps = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    assert prepare(corpus, tok, tmp_path / "a").fingerprint == first.fingerprint
    assert "already prepared" in capsys.readouterr().out
    assert stamps == {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}


class PowerCut(BaseException):
    pass


def test_an_interruption_at_any_step_loses_nothing(tmp_path, tok, corpus, small_batches, monkeypatch):
    """Stop before each rename in turn; the next run must give the same bytes, and the half set must be refused."""
    expected = prepare(corpus, tok, tmp_path / "whole", slice_bytes=20_000)
    replace, n_cuts = os.replace, 3 * len(expected.shards) + 1
    for cut in range(n_cuts):
        folder, n_calls = tmp_path / str(cut), iter(range(n_cuts))

        def failing(source, target, cut=cut, n_calls=n_calls):
            if next(n_calls) == cut:
                raise PowerCut
            replace(source, target)

        monkeypatch.setattr(os, "replace", failing)
        with pytest.raises(PowerCut):
            prepare(corpus, tok, folder, slice_bytes=20_000)
        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(InputError, match="expected a finished set"):
            Bins(folder)
        committed = [(path, path.stat().st_mtime_ns) for path in folder.glob("shard-*.json")]
        assert len(committed) == cut // 3
        prepare(corpus, tok, folder, slice_bytes=20_000)
        assert contents(folder) == contents(expected.folder)
        assert all(path.stat().st_mtime_ns == stamp for path, stamp in committed)  # kept, not made again
        assert verify(folder).fingerprint == expected.fingerprint


def test_leftovers_go_and_other_files_stay(tmp_path, tok, corpus):
    (tmp_path / "a").mkdir()
    for name in ("shard-00007.idx.tmp", "shard-00007.bin", "manifest.json.tmp", "notes.txt"):
        (tmp_path / "a" / name).touch()
    verify(prepare(corpus, tok, tmp_path / "a").folder)
    assert {path.name for path in (tmp_path / "a").iterdir() if not path.name.startswith("shard-0000")} == {
        "manifest.json",
        "notes.txt",
    }
    assert not (tmp_path / "a/shard-00007.bin").exists()


def alive(pid: int) -> bool:
    """Not gone and no zombie."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


@pytest.mark.parametrize("moment", ["shard-00000.bin.tmp", "shard-00000.json", "shard-00002.json"])
def test_kill_9(tmp_path, tok, moment):
    path = write_jsonl(tmp_path / "a.jsonl", [text_of(i, 400) for i in range(4000)])
    arguments = f"[{str(path)!r}], {str(tok)!r}, {str(tmp_path / 'a')!r}, workers=2, slice_bytes=700_000"
    process = subprocess.Popen(
        [sys.executable, "-c", f"from prepare import *; prepare({arguments})"], cwd=ROOT / "data"
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "a" / moment).exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it was not through
    while any(alive(int(pid)) for pid in found.split()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(alive(int(pid)) for pid in found.split())  # workers do not outlive it
    with pytest.raises(InputError, match="expected a finished set"):
        Bins(tmp_path / "a")
    prepare([path], tok, tmp_path / "a", slice_bytes=700_000)
    expected = prepare([path], tok, tmp_path / "whole", slice_bytes=700_000)
    assert contents(tmp_path / "a") == contents(tmp_path / "whole")
    assert verify(tmp_path / "a").fingerprint == expected.fingerprint


def test_two_runs_cannot_write_to_one_folder(tmp_path, tok, corpus):
    (tmp_path / "a").mkdir()
    descriptor = script.lock(tmp_path / "a")
    with pytest.raises(InputError, match="another run is writing here"):
        prepare(corpus, tok, tmp_path / "a")
    os.close(descriptor)
    prepare(corpus, tok, tmp_path / "a")


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_made_otherwise_is_refused(tmp_path, tok, corpus, finished):
    first = prepare(corpus, tok, tmp_path / "a", slice_bytes=20_000)
    if not finished:
        (first.folder / "manifest.json").unlink()
    byte_level(50).save(str(tmp_path / "tokenizer.json"))
    changed = tmp_path / corpus[0].name
    changed.write_text(corpus[0].read_text("utf-8").replace("Der", "Die", 1), "utf-8")
    cases = [
        (corpus, tmp_path, {}, r"shard-00000.json: vocab_size is 319, expected 309"),
        (corpus, tok, {"eos": "<|im_end|>"}, r"shard-00000.json: separator is 316, expected 318"),
        (corpus, tok, {"text_key": "id"}, r"shard-00000.json: text_key is text, expected id"),
        (corpus, tok, {"slice_bytes": 30_000}, r"slice_bytes is 20000, expected 30000"),
        ([changed, corpus[1]], tok, {}, r"shard-00000.json: sha256 is"),
        (corpus[::-1], tok, {}, r"shard-00000.json: name is one.jsonl, expected two.jsonl"),
        (corpus[:1], tok, {}, r"name is two.jsonl, expected no further input"),
    ]
    if finished:
        third = write_jsonl(tmp_path / "three.jsonl", ["neu"])
        cases.append(([*corpus, third], tok, {}, r"is finished, without three.jsonl"))
    for inputs, tokenizer, options, message in cases:
        with pytest.raises(InputError, match=message):
            prepare(inputs, tokenizer, tmp_path / "a", **{"slice_bytes": 20_000} | options)
    assert verify(prepare(corpus, tok, tmp_path / "a", slice_bytes=20_000).folder).fingerprint == first.fingerprint


# ---- what is refused ----


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
    "number column": ("a.parquet", parquet_bytes(pa.table({"text": [1]})), r"column 'text' is int64, expected string"),
    "null row": (
        "a.parquet",
        parquet_bytes(pa.table({"text": ["a", None]})),
        r"row 2: 'text' is null, expected a string",
    ),
    "bad row": ("a.parquet", parquet_bytes(pa.table({"text": not_utf8()})), r"row 2: not valid UTF-8"),
    "extension": ("a.csv", b"text\na\n", r"unknown kind of file, expected .jsonl"),
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
    with pytest.raises(InputError, match="expected a finished set"):
        Bins(tmp_path / "bins")


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
    with pytest.raises(InputError, match="expected a finished set"):
        Bins(tmp_path / "bins")
    verify(prepare(corpus, tok, tmp_path / "bins").folder)


def test_other_wrong_arguments(tmp_path, tok, corpus):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    (tmp_path / "file").touch()
    byte_level(special=()).save(str(tmp_path / "bare.json"))
    for inputs, tokenizer, out, message in (
        ([tmp_path / "missing.jsonl"], tok, "a", "missing.jsonl: cannot be read: No such file"),
        ([tmp_path / "folder.jsonl"], tok, "a", "folder.jsonl: cannot be read: Is a directory"),
        ([], tok, "a", "0 inputs, expected one or more"),
        ([corpus[0], corpus[0]], tok, "a", "each once"),
        (corpus, tmp_path / "nowhere", "a", "nowhere: no such file; expected a folder"),
        (corpus, tmp_path, "a", "tokenizer.json: no such file"),
        (corpus, "nobody/nothing", "a", "nobody/nothing: no such folder, and not to be had from the hub"),
        (corpus, tmp_path / "broken", "a", "broken/tokenizer.json: refused by tokenizers"),
        (corpus, tmp_path / "bare.json", "a", "no <|endoftext|> and no eos_token".replace("|", r"\|")),
        (corpus, tok, "file", "file: cannot be made"),
    ):
        with pytest.raises(InputError, match=message) as error:
            prepare(inputs, tokenizer, tmp_path / out)
        assert "\n" not in str(error.value)


# ---- the command lines ----


def run(name: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "data" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=120)


def test_command_lines(tmp_path, tok, corpus):
    arguments = (*corpus, "--tokenizer", tok, "--out", tmp_path / "bins", "--workers", 2)
    done = run("prepare.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert "542 documents" in done.stdout
    assert "8 empty documents skipped" in done.stdout
    assert "bytes/token" in done.stdout
    assert "MB/s" in done.stdout
    again = run("prepare.py", *arguments)
    assert (again.returncode, "already prepared" in again.stdout) == (0, True)
    bad = run("prepare.py", *arguments, "--eos", "<|im_end|>")
    assert bad.returncode == 1
    assert bad.stderr.startswith("error: ")
    assert bad.stderr.count("\n") == 1

    checked = run("verify.py", tmp_path / "bins", "--tokenizer", tok)
    assert checked.returncode == 0, checked.stderr
    first = next(text for line in corpus[0].open(encoding="utf-8") if (text := json.loads(line)["text"]))
    assert repr(first[:30])[1:-1] in checked.stdout
    assert "documents    542" in checked.stdout
    byte_level(50).save(str(tmp_path / "tokenizer.json"))
    other = run("verify.py", tmp_path / "bins", "--tokenizer", tmp_path)
    assert (other.returncode, "was made with" in other.stderr) == (1, True)
    with (tmp_path / "bins/shard-00000.bin").open("r+b") as file:
        byte = file.read(1)[0]
        file.seek(0)
        file.write(bytes([byte ^ 1]))
    damaged = run("verify.py", tmp_path / "bins")
    assert (damaged.returncode, damaged.stderr.count("\n")) == (1, 1)
    assert "sha256 is" in damaged.stderr
