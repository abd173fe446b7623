"""The folder of an evaluation: one process writes it."""

import subprocess
import sys

import pytest

from conftest import ROOT
from nanomed import InputError
from nanomed.evaluation.record import finish_run, open_run

OPEN = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from nanomed.evaluation.record import open_run
open_run(Path(sys.argv[1]), "generate", {{}}, [])
print("ready", flush=True)
sys.stdin.read()
"""


def test_the_second_process_is_refused_and_a_killed_one_is_followed(tmp_path):
    out = tmp_path / "a.run"
    command = [sys.executable, "-c", OPEN, str(out)]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "ready\n"
    with pytest.raises(InputError, match=r"a\.run: another process is writing this run"):
        open_run(out, "generate", {}, [])
    first.kill()
    first.communicate()
    assert not open_run(out, "generate", {}, [])
    assert not open_run(out, "generate", {}, [])  # in one process: not for itself
    finish_run(out, {"n": 1})
    assert sorted(path.name for path in out.iterdir()) == ["results.json", "run.json"]
    assert open_run(out, "generate", {}, [])
