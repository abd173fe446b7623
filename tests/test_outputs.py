"""Two commands into one folder, a folder that holds something else, a worker that is killed: one line, and nothing lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import classify as classify_script
import clean as clean_script
import sample as sample_script
from conftest import ROOT
from crawl import make, write
from nanomed import InputError
from nanomed.files import lock
from test_classify import KNOBS, fixture_base, rows_of  # noqa: F401
from test_classify import write as write_labels
from test_clean import corpus, fixture_case, run_clean  # noqa: F401
from test_sweep import ENV, make_classifier, sweep, text_of, write_documents


@pytest.fixture(name="labels", scope="module")
def fixture_labels(tmp_path_factory):
    return write_labels(tmp_path_factory.mktemp("labels") / "labels.parquet", rows_of())


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(name="clf", scope="module")
def fixture_clf(tmp_path_factory):
    return make_classifier(tmp_path_factory.mktemp("clf"))


@pytest.mark.parametrize("name", [*clean_script.REPORTS, "corpus/a.parquet", "kept/a.parquet", "corpus.partial/x"])
def test_clean_replaces_nothing_that_it_has_not_made(case, name):
    folder, files, *_ = case
    (folder / "out" / name).parent.mkdir(parents=True)
    (folder / "out" / name).write_text("mine")
    (folder / "out/notes.txt").write_text("mine")
    before = contents(folder / "out")
    with pytest.raises(InputError, match=r"out/[a-z.A-Z]+: exists, and data/clean\.py has not made it; choose another --out"):
        run_clean(folder, files)
    assert contents(folder / "out") == before


def test_clean_leaves_other_files_alone(case):
    folder, files, *_ = case
    (folder / "out").mkdir()
    (folder / "out/notes.txt").write_text("mine")
    for _ in range(2):
        run_clean(folder, files)
    assert (folder / "out/notes.txt").read_text() == "mine"


def test_a_threshold_that_keeps_nothing_does_not_hinder_another(case):
    folder, files, *_ = case
    for _ in range(2):
        with pytest.raises(InputError, match="no document was kept; the threshold is 2"):
            run_clean(folder, files, "--threshold", "2")
        assert not (folder / "out").exists()
    assert run_clean(folder, files)["counts"]["kept"]


def test_a_refused_clean_leaves_no_folder(case):
    folder, files, *_ = case
    (folder / "bad.jsonl").write_text("{")
    other = write_documents(folder / "c.parquet", ["a"])
    for arguments in ((files, "--eval", folder / "bad.jsonl"), ([*files, other],)):
        with pytest.raises(InputError):
            run_clean(folder, *arguments)
        assert not (folder / "out").exists()


@pytest.mark.parametrize("name", ["progress/a.parquet", "logs/console.log", "scores/x.txt", "sweep.json/x", "errors/x"])
def test_sweep_replaces_nothing_that_it_has_not_made(tmp_path, clf, name):
    documents = write_documents(tmp_path / "a.parquet", ["Blut"])
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("mine")
    if name.startswith("sweep.json"):
        name = "sweep.json"
    with pytest.raises(InputError, match=r"exists, and data/sweep\.py has not made it"):
        sweep(documents, "--classifier", clf, "--out", tmp_path / "out", "--workers", 1)


def test_classify_removes_nothing_that_it_has_not_made(tmp_path, labels, base):
    partial = tmp_path / ".clf.partial"
    partial.mkdir()
    (partial / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"\.clf\.partial/notes\.txt: exists, and data/classify\.py has not made it"):
        classify_script.classify(labels, tmp_path / "clf", str(base), 0.5, **KNOBS)
    assert (partial / "notes.txt").read_text() == "mine"


def test_two_commands_at_once_are_refused(tmp_path, clf, labels, base):
    """clean.py: in test_clean_again.py."""
    documents = write_documents(tmp_path / "a.parquet", ["Blut"])
    for folder, command in (
        (tmp_path / "sweep", lambda: sweep(documents, "--classifier", clf, "--out", tmp_path / "sweep", "--workers", 1)),
        (
            tmp_path / ".clf.partial",
            lambda: classify_script.classify(labels, tmp_path / "clf", str(base), 0.5, **KNOBS),
        ),
    ):
        folder.mkdir()
        descriptor = lock(folder)
        with pytest.raises(InputError, match="another run is writing here"):
            command()
        os.close(descriptor)
        assert not list(folder.iterdir())


def test_two_samples_at_once_are_refused(tmp_path):
    path, out = write(tmp_path / "a.jsonl", make(50)), tmp_path / "s.parquet"
    draw = sample_script.Draw(tmp_path / "s.parquet.partial.sqlite", {}, 10)
    with pytest.raises(InputError, match=r"sqlite: .*another run is using it"):
        sample_script.sample([path], out, 10)
    draw.close(failed=True)
    sample_script.sample([path], out, 10)
    assert pq.read_metadata(out).num_rows == 10


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder.parquet", r"folder\.parquet: exists, and is a folder; choose another --out"),
        ("other.parquet", r"other\.parquet: exists, and is no whole file of data/sample\.py; choose another"),
        ("table.parquet", r"table\.parquet: exists, and is no whole file of data/sample\.py"),
        ("s.jsonl", r"--out .*s\.jsonl: expected a name that ends with \.parquet"),
    ],
)
def test_sample_replaces_nothing_that_it_has_not_made(tmp_path, name, message):
    path = write(tmp_path / "a.jsonl", make(50))
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "other.parquet").write_text("mine")
    write(tmp_path / "table.parquet", make(3))
    before = contents(tmp_path)
    with pytest.raises(InputError, match=message):
        sample_script.sample([path], tmp_path / name, 10)
    assert contents(tmp_path) == before


SLOW = """
import os, sys, time
sys.path[:0] = {path!r}
import {module}, {hooked}
real = {hooked}.{name}
def slow(*args, **kwargs):
    open(f"{meeting}/{{os.getpid()}}", "w").close()
    while not os.path.exists("{meeting}/go"):
        time.sleep(0.05)
    return real(*args, **kwargs)
{hooked}.{name} = slow
from nanomed import run_script
sys.argv = ["{module}.py", *{arguments!r}]
run_script({module}.main)
"""


def slowly(meeting: Path, module: str, hooked: str, name: str, *arguments) -> str:
    """A command in which one function leaves its process id in the folder `meeting` and waits for `go` there."""
    meeting.mkdir()
    path = [str(ROOT / "data"), str(ROOT)]
    return SLOW.format(meeting=meeting, path=path, module=module, hooked=hooked, name=name, arguments=[*map(str, arguments)])


def at_once(meeting: Path, code: str) -> list[tuple[int, str]]:
    """(exit status, stderr) of two processes; none goes on before both wait in `meeting`, or one has ended."""
    processes = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=ENV) for _ in range(2)]
    while len([*meeting.iterdir()]) < 2 and all(process.poll() is None for process in processes):
        time.sleep(0.05)
    (meeting / "go").touch()
    return [(process.communicate()[1], process.returncode)[::-1] for process in processes]


def test_two_processes_that_clean_into_one_folder(case):
    folder, files, *_ = case
    arguments = (*files, "--scores", folder / "sweep", "--classifier", folder / "clf", "--out", folder / "out", "--workers", 1)
    meeting = folder / "meeting"
    ends = at_once(meeting, slowly(meeting, "clean", "clean", "choose_first", *arguments))
    assert sorted(status for status, _ in ends) == [0, 1], ends
    [refused] = [stderr for status, stderr in ends if status]
    assert refused.splitlines()[-1].startswith("error: ")
    assert "another run is writing here" in refused
    assert len(corpus(folder / "out")) == 15


def test_a_killed_worker_of_the_sweep_ends_it(tmp_path, clf):
    """datatrove's pool would wait for it for ever."""
    process, [victim, *_] = start_sweep(tmp_path, clf)
    os.kill(victim, signal.SIGKILL)
    _, stderr = process.communicate()
    assert process.returncode == 1, stderr
    assert "Traceback" not in stderr
    assert "error: a worker was killed (signal 9), probably out of memory" in stderr
    assert not (tmp_path / "out/sweep.json").exists()
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_no_worker_of_the_sweep_outlives_it(tmp_path, clf):
    """It would keep its GPU, and the next run would find none."""
    process, workers = start_sweep(tmp_path, clf)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        time.sleep(0.1)


def start_sweep(folder: Path, clf: Path) -> tuple[subprocess.Popen, list[int]]:
    """A sweep with two workers that takes a while, and the workers once they score."""
    texts = [text_of(i) for i in range(20_000)]
    files = [write_documents(folder / f"{name}.jsonl", texts) for name in "abc"]
    command = [sys.executable, ROOT / "data/sweep.py", *files, "--classifier", clf, "--out", folder / "out"]
    command = [*map(str, command), "--workers", "2", "--threads", "1", "--batch-tokens", "512"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENV, cwd="/")
    notes = folder / "out/progress"
    while len([*notes.glob("*.jsonl")]) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    return process, workers_of(process.pid)


def workers_of(pid: int) -> list[int]:
    """The pool's workers among the children of a process, which are those that have loaded torch."""
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in children if "libtorch" in Path(f"/proc/{child}/maps").read_text()]
