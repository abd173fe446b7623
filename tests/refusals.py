"""train.py refusing: its main in this process, the one line it ends with, what lies in the folder. No test itself."""

import sys
from pathlib import Path

import pytest

import train
from nanomed.bins import Bins


@pytest.fixture(name="refused")
def fixture_refused(monkeypatch, capsys):
    """Run train.py's main with flags that it must refuse; its one line. The flag out must be among them."""

    def run(flags: list[str], *named: str, keeps=()) -> str:
        out = Path(flags[flags.index("--out") + 1])
        before = contents(out)
        monkeypatch.setattr(sys, "argv", ["train.py", *flags])
        with pytest.raises(SystemExit) as exit_:
            train.main()
        assert exit_.value.code == 1
        line = only_error(capsys.readouterr().err)
        for what in named:
            assert str(what) in line
        assert contents(out, but=keeps) == before
        return line

    return run


def only_error(stderr: str) -> str:
    """The one line that a user gets, on a line of its own, and no traceback."""
    assert "Traceback" not in stderr, stderr
    shown = stderr.replace("\x1b[A", "\n")  # tqdm moves the cursor up
    lines = [line for line in shown.splitlines() if "error:" in line.lower()]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: "), lines[0]
    return lines[0]


def contents(folder: Path, but=()) -> dict[str, bytes]:
    """Every file below the folder, by its path in it; nothing where it does not exist."""
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    return {name: p.read_bytes() for name, p in files.items() if name not in but}


def hash_of(tiny) -> str:
    return Bins(tiny.train).tokenizer_sha256
