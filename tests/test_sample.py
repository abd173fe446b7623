"""Exactly N documents, the same ones whatever the order, sharding and workers; and a kill costs nothing."""

import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sample as script
from conftest import ROOT
from crawl import make, write
from documents import read_about
from nanomed import InputError
from sample import lot, sample


def ids(path: Path) -> list[str]:
    return pq.read_table(path)["id"].to_pylist()


def obvious(documents: list[dict], n: int, seed: int = 0) -> list[dict]:
    """The definition."""
    columns = ("id", "text", "url", "dump", "date")
    chosen = sorted(documents, key=lambda document: lot(document["id"], seed))[:n]
    return [{key: document[key] for key in columns} for document in chosen]


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 5), st.integers(1, 4), st.randoms())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_same_sample_for_any_order_sharding_and_workers(tmp_path_factory, n_documents, n, n_files, workers, rng):
    n = min(n, n_documents)
    documents = make(n_documents)
    folder = tmp_path_factory.mktemp("in")
    expected = obvious(documents, n)
    rng.shuffle(documents)
    endings = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")
    for i in range(min(n_files, n_documents)):
        write(folder / f"{i}{endings[i % 4]}", documents[i::n_files], row_group_size=rng.randint(1, 20))
    out = folder / "out" / "sample.parquet"
    assert sample([folder], out, n, workers=workers) == n_documents
    assert pq.read_table(out).to_pylist() == expected
    assert [path.name for path in out.parent.iterdir()] == ["sample.parquet"]


def test_the_file_is_the_same_byte_for_byte_for_any_number_of_workers(tmp_path):
    documents = make(5000)
    for i in range(10):
        write(tmp_path / f"{i}.parquet", documents[i::10], row_group_size=100)
    made = []
    for workers in (1, 2, 5):
        sample([tmp_path / "*.parquet"], tmp_path / f"out{workers}" / "s.parquet", 300, workers=workers)
        made.append((tmp_path / f"out{workers}" / "s.parquet").read_bytes())
    assert made[0] == made[1] == made[2]


def test_a_file_keeps_few_candidates_and_the_sample_is_the_same(tmp_path, monkeypatch):
    """However long the file is: lots that cannot be drawn are dropped as it is read, and which are drawn does not change."""
    documents = [{"id": str(i), "text": str(i), "url": None, "dump": None, "date": None} for i in range(40_000)]
    path, sizes, plain = write(tmp_path / "a.jsonl", documents), [], script.Draw.keep_lots
    monkeypatch.setattr(script.Draw, "keep_lots", lambda self, *rest: sizes.append(len(rest[1])) or plain(self, *rest))
    for n in (1, 7, 6_000):
        assert sample([path], tmp_path / f"{n}.parquet", n) == 40_000
        assert pq.read_table(tmp_path / f"{n}.parquet").to_pylist() == obvious(documents, n)
        assert sizes.pop() <= 2 * n + 10_000


def test_of_equal_lots_the_first_rows_are_drawn(tmp_path, monkeypatch):
    """Where one may stay and one may not, the first file's and the first row's does, for any number of workers."""
    monkeypatch.setattr(script, "lot", lambda identity, seed: 5 if int(identity) % 3 else 5 + int(identity))
    for name, first in (("a", 1), ("b", 12_004)):
        write(tmp_path / f"{name}.jsonl", [{"id": str(i), "text": "x"} for i in range(first, first + 12_003)])
    for workers in (1, 2):
        sample([tmp_path / "*.jsonl"], tmp_path / f"{workers}.parquet", 1, workers=workers)
        assert ids(tmp_path / f"{workers}.parquet") == ["1"]


def test_a_smaller_sample_is_the_beginning_of_a_larger_one_and_a_seed_another(tmp_path):
    write(tmp_path / "a.jsonl", make(200))
    for name, n, seed in (("large", 100, 0), ("small", 20, 0), ("other", 20, 1)):
        sample([tmp_path / "a.jsonl"], tmp_path / f"{name}.parquet", n, seed)
    large, small, other = (ids(tmp_path / f"{name}.parquet") for name in ("large", "small", "other"))
    assert large[:20] == small
    assert len(set(small) & set(other)) < 10


def test_the_draw_is_uniform():
    """Of 20 documents 5 are drawn under 4,000 seeds: each 1,000 times, give or take five standard deviations."""
    counts = Counter()
    for seed in range(4000):
        counts.update(sorted((f"<urn:{i}>" for i in range(20)), key=lambda identity: lot(identity, seed))[:5])
    assert len(counts) == 20
    assert all(abs(count - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5 for count in counts.values())


def test_what_is_kept_of_a_document(tmp_path):
    """Numbers as ids, other names of the keys, missing columns, texts that are empty or strange."""
    texts = ["", "ß€😀\u0000\n", "x" * 5_000_000]
    rows = [{"nr": i, "body": text} for i, text in enumerate(texts)]
    write(tmp_path / "a.jsonl", rows)
    sample([tmp_path / "a.jsonl"], tmp_path / "s.parquet", 3, keys=("nr", "body"))
    found = pq.read_table(tmp_path / "s.parquet").to_pylist()
    assert {row["id"]: row["text"] for row in found} == {str(i): text for i, text in enumerate(texts)}
    assert all(row["url"] is row["dump"] is row["date"] is None for row in found)
    assert read_about(tmp_path / "s.parquet")["n_documents"] == 3


def test_only_row_groups_with_a_chosen_row_are_read(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", make(10_000), row_group_size=10)
    columns_read = Counter()
    plain = pq.ParquetFile.iter_batches

    def counting(self, batch_size, groups, columns, **how):
        columns_read[tuple(columns)] += 1
        return plain(self, batch_size, groups, columns, **how)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counting)
    sample([tmp_path / "a.parquet"], tmp_path / "s.parquet", 10)
    assert columns_read[("id",)] == 1000
    assert columns_read[("id", "text", "url", "dump", "date")] == 10


def test_remote_files_are_streamed(tmp_path):
    """fsspec's file system in memory stands in for the hub's: both are reached by URL, and neither is on the disk."""
    import fsspec

    memory = fsspec.filesystem("memory")
    documents = make(100)
    for name in ("a.parquet", "b.jsonl.gz"):
        part = documents[:60] if name == "a.parquet" else documents[60:]
        memory.pipe(f"/crawl/de/{name}", write(tmp_path / name, part).read_bytes())
    for inputs in (["memory://crawl/de"], ["memory://crawl/de/*.jsonl.gz", "memory://crawl/de/a.parquet"]):
        sample(inputs, tmp_path / "s.parquet", 30)
        assert pq.read_table(tmp_path / "s.parquet").to_pylist() == obvious(documents, 30)
        (tmp_path / "s.parquet").unlink()
    memory.rm("/crawl", recursive=True)


# ---- interruptions ----


def test_an_interruption_anywhere_loses_nothing(tmp_path, monkeypatch):
    documents = make(2000)
    for i in range(4):
        write(tmp_path / f"{i}.parquet", documents[i::4], row_group_size=50)
    inputs, out = [tmp_path / "*.parquet"], tmp_path / "out" / "s.parquet"
    plain = script.Draw._execute
    for stop_at in range(1, 40, 3):
        calls = 0

        def dying(self, sql, rows=None, stop_at=stop_at):
            nonlocal calls
            calls += 1
            if calls >= stop_at:
                raise KeyboardInterrupt
            return plain(self, sql, rows)

        monkeypatch.setattr(script.Draw, "_execute", dying)
        try:
            sample(inputs, out, 700, workers=1)
        except KeyboardInterrupt:
            assert not out.exists()
            monkeypatch.setattr(script.Draw, "_execute", plain)
            sample(inputs, out, 700, workers=2)
        assert pq.read_table(out).to_pylist() == obvious(documents, 700)
        out.unlink()


def test_files_that_are_done_are_not_read_again(tmp_path, monkeypatch):
    documents = make(400)
    for i in range(4):
        write(tmp_path / f"{i}.jsonl", documents[i::4])
    bad = tmp_path / "3.jsonl"
    good = bad.read_text()
    bad.write_text("x" * len(good))
    out = tmp_path / "s.parquet"
    with pytest.raises(InputError, match=r"3\.jsonl: line 1"):
        sample([tmp_path / "*.jsonl"], out, 50, workers=1)
    bad.write_text(good)
    read = []
    plain = script.draw_lots
    monkeypatch.setattr(
        script, "draw_lots", lambda draw, file, path, *rest: read.append(path.name) or plain(draw, file, path, *rest)
    )
    sample([tmp_path / "*.jsonl"], out, 50, workers=1)
    assert read == ["3.jsonl"]
    assert pq.read_table(out).to_pylist() == obvious(documents, 50)


# data/sample.py that kills itself at the nth call of a method of Draw.
DIES = """
import os, signal, sys
sys.path[:0] = {path!r}
import sample
real, calls = sample.Draw.{name}, []
def dies(self, *args):
    calls.append(args)
    if len(calls) == {nth}:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, *args)
sample.Draw.{name} = dies
sys.argv = {arguments!r}
sample.main()
"""


def test_kill_9(tmp_path):
    documents = make(60_000)
    for i in range(6):
        write(tmp_path / f"{i}.parquet", documents[i::6], row_group_size=500)
    out = tmp_path / "s.parquet"
    command = [
        sys.executable,
        ROOT / "data/sample.py",
        *tmp_path.glob("*.parquet"),
        "--n",
        "20000",
        "--out",
        out,
        "--workers",
        "2",
    ]
    partial = tmp_path / "s.parquet.partial.sqlite"
    for name, nth in (("keep_lots", 3), ("keep_documents", 20)):  # in the first pass, in the second
        code = DIES.format(name=name, nth=nth, arguments=[*map(str, command[1:])], path=[str(ROOT / "data"), str(ROOT)])
        killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert partial.exists()
        assert not out.exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "20,000 of 60,000 documents" in done.stdout
    assert pq.read_table(out).to_pylist() == obvious(documents, 20_000)
    assert not partial.exists()
    assert not list(tmp_path.glob("*.tmp"))


def test_a_second_run_has_nothing_to_do_and_another_is_refused(tmp_path):
    write(tmp_path / "a.jsonl", make(50))
    sample([tmp_path / "a.jsonl"], tmp_path / "s.parquet", 10)
    made = (tmp_path / "s.parquet").read_bytes()
    assert sample([tmp_path / "a.jsonl"], tmp_path / "s.parquet", 10) == 50
    with pytest.raises(InputError, match="made with another seed"):
        sample([tmp_path / "a.jsonl"], tmp_path / "s.parquet", 10, seed=1)
    assert (tmp_path / "s.parquet").read_bytes() == made


def test_an_interrupted_run_with_other_settings_is_not_gone_on_with(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", make(50))
    monkeypatch.setattr(script, "check", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sample([tmp_path / "a.jsonl"], tmp_path / "s.parquet", 20)
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"interrupted run with another n; delete"):
        sample([tmp_path / "a.jsonl"], tmp_path / "s.parquet", 10)
