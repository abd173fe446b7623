"""Parquet that is there whole or not at all, whoever else writes it; and values that other tools left in a column."""

import datetime
import os
import socket
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import ROOT
from crawl import make, write
from documents import read_documents, write_parquet
from nanomed import InputError
from sample import sample

OTHER = """
from pathlib import Path
from documents import write_parquet
write_parquet(Path({path!r}), ({{"id": f"other {{i}}"}} for i in range(5_000)), {{"id": "string"}}, {{}})
"""


def ids(path) -> list[str]:
    return pq.read_table(path)["id"].to_pylist()


def test_two_processes_may_write_the_same_file(tmp_path):
    path = tmp_path / "a.parquet"

    def documents():
        for i in range(5_000):
            if i == 2_500:  # the other one begins, ends and renames while this one is at it
                code = OTHER.format(path=str(path))
                subprocess.run([sys.executable, "-c", code], cwd=ROOT / "data", check=True,
                               env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
                assert ids(path) == [f"other {i}" for i in range(5_000)]
            yield {"id": str(i)}

    assert write_parquet(path, documents(), {"id": "string"}, {}) == 5_000
    assert ids(path) == [str(i) for i in range(5_000)]
    assert [*tmp_path.iterdir()] == [path]


def test_only_what_dead_processes_of_this_machine_left_is_removed(tmp_path):
    host, process = socket.gethostname(), subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    dead = tmp_path / f"a.parquet.{host}.{process.pid}.tmp"
    alive, elsewhere, other = (
        tmp_path / name
        for name in (
            f"a.parquet.{host}.1.tmp",
            f"a.parquet.{host}.net.{process.pid}.tmp",
            f"b.parquet.{host}.{process.pid}.tmp",
        )
    )
    for path in (dead, alive, elsewhere, other):
        path.touch()
    write_parquet(tmp_path / "a.parquet", [{"id": "1"}], {"id": "string"}, {})
    assert {*tmp_path.iterdir()} == {tmp_path / "a.parquet", alive, elsewhere, other}


def test_dates_are_spelled_out(tmp_path):
    when = datetime.datetime(2024, 3, 1, 12)
    rows = [{"date": when}, {"date": when.date()}, {"date": 20240101}, {"date": None}, {"date": "gestern"}]
    write_parquet(tmp_path / "a.parquet", rows, {"date": "string"}, {})
    found = [row["date"] for row in read_documents(tmp_path / "a.parquet", (), ("date",))]
    assert found == ["2024-03-01 12:00:00", "2024-03-01", "20240101", None, "gestern"]


def test_a_sample_of_documents_whose_date_is_a_number(tmp_path):
    documents = [document | {"date": 20240101} for document in make(20)]
    sample([write(tmp_path / "a.jsonl", documents)], tmp_path / "s.parquet", 10)
    assert pq.read_table(tmp_path / "s.parquet")["date"].to_pylist() == ["20240101"] * 10


def test_a_surrogate_in_utf_8_is_named_in_the_first_pass(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"id": "1", "text": "a"}\n{"id": "2", "text": "\xed\xa0\xbd"}\n')
    with pytest.raises(InputError, match=r"a.jsonl: line 2: not valid UTF-8"):
        sample([tmp_path / "a.jsonl"], tmp_path / "s.parquet", 1)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"id": "1", "text": "a"}\n{"id": "2", "text": "\xef\xbb\xbfb"}\n')
    assert [row["text"] for row in read_documents(tmp_path / "a.jsonl", ("text",))] == ["a", "\ufeffb"]


def test_columns_of_views(tmp_path):
    pq.write_table(pa.table({"text": pa.array(["a", "ß" * 30], pa.string_view())}), tmp_path / "a.parquet")
    assert [row["text"] for row in read_documents(tmp_path / "a.parquet", ("text",))] == ["a", "ß" * 30]
