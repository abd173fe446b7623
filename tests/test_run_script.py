"""nanomed.run_script: how a command ends, whatever stops it."""

import os
import subprocess
import sys

import pytest

from conftest import ROOT

CASES = {  # what main raises → (exit status, what stderr must hold)
    "InputError('bins/a: is missing')": (1, "error: bins/a: is missing\n"),
    "OSError(errno.ENOSPC, 'No space left on device')": (1, "error: [Errno 28] No space left on device\n"),
    "FileNotFoundError(2, 'No such file', 'a.txt')": (1, "error: [Errno 2] No such file: 'a.txt'\n"),
    "KeyboardInterrupt()": (130, "interrupted; nothing was written\n"),
    "BrokenPipeError(32, 'Broken pipe')": (141, ""),
}


def run(error: str) -> tuple[int, str]:
    code = f"""import errno
from nanomed import InputError, run_script
def main():
    print("a line")
    raise {error}
run_script(main, "nothing was written")"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize("error", CASES)
def test_what_a_user_can_mend_is_one_line(error):
    assert run(error) == CASES[error]


@pytest.mark.parametrize("error", ["OSError('of a library')", "ConnectionResetError(104, 'reset')", "ValueError('a bug')"])
def test_what_is_a_bug_of_ours_keeps_its_traceback(error):
    status, stderr = run(error)
    assert status == 1
    assert stderr.startswith("Traceback")


def test_a_reader_that_has_enough_is_no_error():
    """The output is short: it is written as the process ends."""
    code = "from nanomed import run_script; run_script(lambda: print('a line'))"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
