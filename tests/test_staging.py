"""Atomic files and staging folders: complete or absent, one writer at a time, and nothing removed that is not
ours."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from nanomed import InputError, files

PROGRAM = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\nfrom nanomed import files\n"
HOLD = """
with files.staging(Path(sys.argv[1])) as tmp:
    (tmp / "half").write_text("half")
    (tmp / "below").mkdir()
    print("ready", flush=True)
    sys.stdin.read()
    (tmp / "half").write_text("first")
"""
HOLD_FILE = """
with files.whole_file(Path(sys.argv[1])) as file:
    file.write(b"first")
    print("ready", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def other_process(program: str, path):
    """Another process in the middle of writing `path`."""
    process = subprocess.Popen([sys.executable, "-c", PROGRAM + program, str(path)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_second_writer_of_a_folder_is_refused(tmp_path):
    out = tmp_path / "out"
    with other_process(HOLD, out) as first:
        with pytest.raises(InputError, match="out: another process is writing it"), files.staging(out):
            pytest.fail("two writers")
        first.communicate("")
    assert (out / "half").read_text() == "first"
    assert names(out) == ["below", "half"]
    with pytest.raises(InputError, match="out: exists already"), files.staging(out):
        pytest.fail("overwritten")


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path):
    out, users = tmp_path / "out", tmp_path / "out.tmp"
    users.mkdir()
    (users / "notes.txt").write_text("a user's")
    with other_process(HOLD, out):
        pass
    assert not out.exists()
    with files.staging(out) as tmp:
        (tmp / "whole").write_text("second")
    assert names(out) == ["whole"]
    assert names(tmp_path) == ["out", "out.tmp"]
    assert names(users) == ["notes.txt"]


def test_a_folder_that_only_has_our_name_is_refused(tmp_path):
    tmp = files.staging_path(tmp_path / "out")
    tmp.mkdir()
    (tmp / "notes.txt").write_text("a user's")
    with pytest.raises(InputError, match="is not this command's; move it away"), files.staging(tmp_path / "out"):
        pytest.fail("taken")
    assert names(tmp) == ["notes.txt"]


@pytest.mark.parametrize("error", [InputError, KeyboardInterrupt])
def test_a_failed_writer_leaves_nothing(error, tmp_path):
    def fail(writing) -> None:
        with writing as made:
            if isinstance(made, Path):
                (made / "half").write_text("half")
            else:
                made.write(b"half")
            raise error

    for writing in (files.staging(tmp_path / "out"), files.staging(tmp_path / "new" / "parents" / "out"),
                    files.whole_file(tmp_path / "file")):  # fmt: skip
        with pytest.raises(error):
            fail(writing)
    assert not names(tmp_path)


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="has appeared meanwhile"), files.staging(out):
        out.mkdir()
    assert names(tmp_path) == ["out"]


def test_two_writers_of_a_file_share_nothing(tmp_path):
    path = tmp_path / "report.json"
    path.with_name("report.json.tmp").write_text("a user's")
    with other_process(HOLD_FILE, path) as first:
        files.write_durably(path, "second")
        assert path.read_text() == "second"
        first.communicate("")
    assert path.read_text() == "first"
    assert names(tmp_path) == ["report.json", "report.json.tmp"]


def test_the_temporary_file_of_a_killed_writer_is_removed(tmp_path):
    path = tmp_path / "report.json"
    with other_process(HOLD_FILE, path):
        pass
    assert len(names(tmp_path)) == 1
    path.with_name("report.json.tmp").write_text("a user's")
    files.write_durably(path, "second")
    assert names(tmp_path) == ["report.json", "report.json.tmp"]
