"""sample.py's bad inputs, a full disk and the command line: one line, and no sample that looks whole."""

import random
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import sample as script
from crawl import make, write
from nanomed import InputError
from sample import sample


def cut(path: Path, share: float = 0.7) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def damaged(path: Path) -> Path:
    """A byte in the middle of the last third flipped."""
    raw = bytearray(path.read_bytes())
    for i in range(len(raw) // 2, len(raw) // 2 + 40):
        raw[i] ^= 0xFF
    path.write_bytes(raw)
    return path


def binary_parquet(path: Path, texts: list[bytes]) -> Path:
    """A string column whose bytes are not UTF-8."""
    array = pa.Array.from_buffers(pa.string(), len(texts), pa.array(texts, pa.binary()).buffers())
    pq.write_table(pa.table({"id": [str(i) for i in range(len(texts))], "text": array}), path)
    return path


many = make(3000)
random.Random(0).shuffle(many)
BAD = {
    "no such file": lambda d: (d / "none.parquet", "no such input"),
    "empty folder": lambda d: ((d / "empty").mkdir() or d / "empty", "no such input"),
    "other kind": lambda d: (write(d / "a.csv", many), "unknown file type"),
    "cut gz": lambda d: (cut(write(d / "a.jsonl.gz", many)), "a.jsonl.gz: unreadable after line"),
    "cut zst": lambda d: (cut(write(d / "a.jsonl.zst", many)), "a.jsonl.zst: unreadable after line"),
    "cut parquet": lambda d: (cut(write(d / "a.parquet", many)), "a.parquet: not a whole Parquet file"),
    "damaged parquet": lambda d: (damaged(write(d / "a.parquet", many, 1000)), "a.parquet: unreadable after row"),
    "cut jsonl": lambda d: (cut(write(d / "a.jsonl", many)), "a.jsonl: line"),
    "no bytes": lambda d: ((d / "a.parquet").touch() or d / "a.parquet", "not a whole Parquet file"),
    "missing id": lambda d: (write(d / "a.jsonl", [*many, {"text": "a"}]), "line 3001: no 'id', it has text"),
    "missing id column": lambda d: (
        write(d / "a.parquet", [{"text": "a"}]),
        "no 'id', it has text; name another with --id-key",
    ),
    "null id": lambda d: (write(d / "a.parquet", [*many, {"id": None}]), "row 3001: 'id' is null"),
    "missing text": lambda d: (write(d / "a.jsonl", [{"id": str(i)} for i in range(99)]), "no 'text', it has id"),
    "null text": lambda d: (write(d / "a.jsonl", [{"id": str(i), "text": None} for i in range(99)]), "'text' is null"),
    "a number as text": lambda d: (write(d / "a.jsonl", [{"id": i, "text": i} for i in range(99)]), "of type int"),
    "a list": lambda d: ((d / "a.jsonl").write_text("[1]\n") and d / "a.jsonl", "line 1: a JSON list"),
    "duplicate ids": lambda d: (write(d / "a.jsonl", make(60) + make(60)), "have the same id"),
    "not UTF-8": lambda d: (
        (d / "a.jsonl").write_bytes(b'{"id": "\xff"}\n') and d / "a.jsonl",
        "line 1: not valid UTF-8",
    ),
    "half a surrogate": lambda d: (
        (d / "a.jsonl").write_text('{"id": "\\ud800"}\n') and d / "a.jsonl",
        "line 1: not valid",
    ),
    "Parquet not UTF-8": lambda d: (binary_parquet(d / "a.parquet", [b"\xff\xfe"] * 99), "not UTF-8"),
    "too few": lambda d: (write(d / "a.jsonl", make(5)), "5 documents in 1 files, fewer than --n 20"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_input_is_named(tmp_path, name):
    path, expected = BAD[name](tmp_path)
    with pytest.raises(InputError) as error:
        sample([path], tmp_path / "s.parquet", 20)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "s.parquet").exists()


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_wrong_keys_are_named_before_anything_is_read(tmp_path, monkeypatch, ending):
    path = write(tmp_path / f"a{ending}", [{"nr": str(i), "inhalt": "a", "meta": [1]} for i in range(50)])
    monkeypatch.setattr(script, "draw_lots", lambda *_: pytest.fail("a file was read"))
    for keys, message in (
        (("id", "inhalt"), "no 'id', it has nr, inhalt, meta; name another with --id-key"),
        (("nr", "text"), "no 'text', it has nr, inhalt, meta; name another with --text-key"),
    ):
        with pytest.raises(InputError, match=message):
            sample([path], tmp_path / "s.parquet", 10, keys=keys)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    monkeypatch.undo()
    assert sample([path], tmp_path / "s.parquet", 10, keys=("nr", "inhalt")) == 50


def test_an_error_does_not_hinder_the_corrected_command(tmp_path):
    """What cannot be drawn leaves nothing; what was read before another error is for the same command alone."""
    path, out, partial = write(tmp_path / "a.jsonl", make(50)), tmp_path / "s.parquet", "s.parquet.partial.sqlite"
    with pytest.raises(InputError, match="fewer than --n 60"):
        sample([path], out, 60)
    assert not list(tmp_path.glob(f"{partial}*"))
    (tmp_path / "b.jsonl").write_text("x")
    for _ in range(2):
        with pytest.raises(InputError, match=r"b\.jsonl: line 1"):
            sample([tmp_path], out, 10, workers=1)
        assert [found.name for found in tmp_path.glob(f"{partial}*")] == [partial]
    assert sample([path], out, 10) == 50
    assert not list(tmp_path.glob(f"{partial}*"))


def test_an_input_comes_once(tmp_path):
    path = write(tmp_path / "a.jsonl", make(50))
    with pytest.raises(InputError, match="given twice"):
        sample([path, tmp_path], tmp_path / "s.parquet", 10)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", make(50))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("documents.os.fsync", full)
    with pytest.raises(InputError, match=r"s\.parquet: cannot be written: No space left"):
        sample([tmp_path / "a.jsonl"], tmp_path / "s.parquet", 10)
    assert not (tmp_path / "s.parquet").exists()
    assert not list(tmp_path.glob("*.tmp"))
    monkeypatch.undo()
    sample([tmp_path / "a.jsonl"], tmp_path / "s.parquet", 10)


def test_the_command_line(tmp_path, monkeypatch, capsys):
    write(tmp_path / "a.jsonl", make(50))
    run = lambda *flags: monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, flags)]) or script.main()  # noqa: E731
    run(tmp_path / "a.jsonl", "--n", 10, "--out", tmp_path / "s.parquet")
    assert "10 of 50 documents" in capsys.readouterr().out
    with pytest.raises(InputError, match="--n is 0"):
        run(tmp_path / "a.jsonl", "--n", 0, "--out", tmp_path / "t.parquet")
