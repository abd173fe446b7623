"""clean.py twice into one folder, killed, or beside another run: OUT/corpus is one run's, whole, or not there."""

import datetime
import json
import operator
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import clean as script
from conftest import ROOT, assert_linear
from nanomed import InputError
from nanomed.files import lock
from personal import PATTERNS, count_personal
from test_clean import corpus, fixture_case, run_clean, write_scores  # noqa: F401
from test_sweep import make_classifier


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(".nanomed"))


def test_fewer_inputs_leave_nothing_of_the_others(case):
    folder, files, *_ = case
    run_clean(folder, files)
    assert names(folder / "out/corpus") == ["a.parquet", "b.parquet"]
    report = run_clean(folder, files[:1])
    assert names(folder / "out/corpus") == ["a.parquet"]
    assert report["counts"]["kept"] == len(corpus(folder / "out"))


@pytest.mark.parametrize("earlier", [False, True])
def test_a_run_that_ends_in_stage_2_leaves_no_corpus(case, monkeypatch, earlier):
    folder, files, *_ = case
    if earlier:
        run_clean(folder, files)
    write = script.write_parquet

    def failing(path, *rest):
        if path.name == "b.parquet":
            raise KeyboardInterrupt
        return write(path, *rest)

    monkeypatch.setattr(script, "write_parquet", failing)
    with pytest.raises(KeyboardInterrupt):
        run_clean(folder, files)
    assert names(folder / "out") == ["corpus.partial", "kept"]
    monkeypatch.undo()
    run_clean(folder, files)
    assert names(folder / "out/corpus") == ["a.parquet", "b.parquet"]
    assert not (folder / "out/corpus.partial").exists()


def test_a_refused_run_leaves_the_earlier_corpus(case):
    folder, files, *_ = case
    run_clean(folder, files)
    before = {path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="from another run"):
        run_clean(folder, files, "--threshold", "0.4")
    assert {path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()} == before


def test_two_runs_at_once_are_refused(case):
    folder, files, *_ = case
    (folder / "out").mkdir()
    descriptor = lock(folder / "out")
    with pytest.raises(InputError, match="out: another run is writing here"):
        run_clean(folder, files)
    os.close(descriptor)
    run_clean(folder, files)


def test_inputs_that_would_share_a_file_are_refused(case):
    """One by two names, and two of one name: the second's rows would be copies, and its file would replace the first's."""
    folder, files, *_ = case
    with pytest.raises(InputError, match=r"a\.parquet: given twice"):
        run_clean(folder, [*files, os.path.relpath(files[0])])
    (folder / "more").mkdir()
    shutil.copy(files[0], folder / "more")
    with pytest.raises(InputError, match=r"two inputs would share scores/a\.parquet; give each once, rename one"):
        run_clean(folder, [*files, folder / "more"])
    assert not (folder / "out").exists()


def test_scores_of_another_sweep_are_not_taken_for_those_of_the_kept(case):
    folder, files, *_ = case
    about = json.loads((folder / "sweep/sweep.json").read_text())
    run_clean(folder, files)
    (folder / "sweep/sweep.json").write_text(json.dumps(about | {"dtype": "fp32"}))
    with pytest.raises(InputError, match=r"kept/a.parquet: from another run: identity was"):
        run_clean(folder, files)


def test_a_damaged_file_of_scores_is_named(case):
    folder, files, *_ = case
    path = folder / "sweep/scores/a.parquet"
    raw = path.read_bytes()
    path.write_bytes(raw[:10] + b"\xff" * 30 + raw[40:])
    with pytest.raises(InputError, match=r"scores/a\.parquet: damaged: .*; delete it"):
        run_clean(folder, files)


def test_a_worker_that_dies_is_one_line(monkeypatch):
    monkeypatch.setattr(script, "keep_file", operator.call)  # os._exit(9), in a worker
    with pytest.raises(InputError, match=r"a worker died, probably out of memory; run again with fewer --workers"):
        list(script.keep_all(os._exit, [9, 9], 2))


BUSY = """
import operator
import clean
if __name__ == "__main__":
    clean.keep_file = operator.call  # exec(code), in a worker
    list(clean.keep_all(exec, ["import os, time; os.write(1, b'busy\\\\n'); time.sleep(10_000)"] * 4, 2))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_its_parent(tmp_path, number):
    """Workers hold the pipe, too: its end comes when all of them have ended. They write a line at once: it is not torn."""
    (tmp_path / "busy.py").write_text(BUSY)
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'data'}"}
    with subprocess.Popen(
        [sys.executable, tmp_path / "busy.py"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env
    ) as run:
        assert [run.stdout.readline() for _ in range(2)] == [b"busy\n"] * 2
        run.send_signal(number)
        assert run.stdout.read() == b""


def test_a_timestamp_as_date(tmp_path):
    rows = [{"id": str(i), "text": f"Text {i}", "date": datetime.datetime(2024, 3, 1)} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    write_scores([tmp_path / "a.parquet"], tmp_path / "sweep", [[0.9] * 3], make_classifier(tmp_path / "clf"))
    run_clean(tmp_path, [tmp_path / "a.parquet"])
    assert [row["date"] for row in corpus(tmp_path / "out")] == ["2024-03-01 00:00:00"] * 3


def test_the_card_says_what_was_not_kept_out_and_hits_stay_with_their_set(case):
    folder, files, *_ = case
    records = [
        {"question": "Wo liegt sie?", "options": ["links unten im Bauch", "rechts"]},
        {"question": "Was ist das?"},
    ]
    (folder / "short.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    run_clean(folder, files, "--eval", folder / "short.jsonl", folder / "eval.jsonl")
    card = " ".join((folder / "out/README.md").read_text("utf-8").split())
    assert "1 records have so short a question: documents that contain it without its options are kept." in card
    assert "1 records have fewer than 8 words with their options, or no options, and cannot be detected." in card
    assert "| short.jsonl | 2 | 0 | 0 | | eval.jsonl | 1 | 1 | 0 |" in card
    (folder / "eval.jsonl").rename(folder / "renamed.jsonl")
    with pytest.raises(InputError, match="from another run: identity was"):
        run_clean(folder, files, "--eval", folder / "short.jsonl", folder / "renamed.jsonl")


def test_a_score_that_is_not_a_number_is_refused(case):
    folder, files, *_ = case
    scores = folder / "sweep/scores/a.parquet"
    table = pq.read_table(scores)
    pq.write_table(table.set_column(3, "score", pa.array([float("nan")] * 10, pa.float32())), scores)
    with pytest.raises(InputError, match=r"scores/a.parquet: the score of '<0>' is not a number; delete it and sweep again"):
        run_clean(folder, files)


@pytest.mark.parametrize(("start", "repeated"), [("", "aaaa"), ("", "a.b-"), ("x@", "aaaa"), ("x@a.", "----")])
def test_personal_data_is_counted_in_linear_time(start, repeated):
    assert_linear(lambda n: count_personal(start + repeated * n, {name: Counter() for name in PATTERNS}), 5_000)
