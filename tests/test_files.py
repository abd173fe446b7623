"""A power cut: what has its final name must be on the disk."""

import os
import shutil
from pathlib import Path

from documents import write_parquet
from nanomed.files import write_durably
from test_bins import DOCUMENTS, write_set


def watch(monkeypatch) -> list[str]:
    """Let os.replace fail for what was not synced since it was last written; the names given, as they come."""
    synced, names, fsync, replace = {}, [], os.fsync, os.replace

    def noting(descriptor):
        stat = os.fstat(descriptor)
        synced[stat.st_ino] = stat.st_size, stat.st_mtime_ns
        fsync(descriptor)

    def checking(source, target):
        for path in (Path(source), *Path(source).rglob("*")):
            stat = path.stat()
            assert synced.get(stat.st_ino) == (stat.st_size, stat.st_mtime_ns), path
        replace(source, target)
        names.append(Path(target).name)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(os, "replace", checking)
    return names


def test_a_file_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    names = watch(monkeypatch)
    write_set(tmp_path / "bins", DOCUMENTS[:1])
    assert names == ["shard-00000.bin", "shard-00000.idx", "shard-00000.json", "manifest.json"]
    write_parquet(tmp_path / "a.parquet", [{"id": "1"}], {"id": "string"}, {})
    write_durably(tmp_path / "a.json", "{}")
    assert names[4:] == ["a.parquet", "a.json"]


def test_so_is_all_that_a_run_leaves(tiny, run, tmp_path, monkeypatch):
    names = watch(monkeypatch)
    assert run(tiny.flags(tmp_path / "run"))
    assert {"config.json", "run.json", "metrics.jsonl", "DONE", "hf"} <= set(names)


def test_a_run_killed_between_its_first_two_files_goes_on(tiny, run, undisturbed, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(undisturbed / "config.json", tmp_path / "run")
    assert run(tiny.flags(tmp_path / "run", steps=20))
