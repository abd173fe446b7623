"""eval.py run in this process, and files of prompts and answers for it."""

import json
import re
from pathlib import Path

import pytest

import eval as evaluate  # the script
from nanomed import run_script
from nanomed.evaluation.answers import Sample


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def answers(path: Path, texts: dict[str, str], model: str, finish_reason: str = "stop") -> Path:
    """A file as generate leaves it."""
    prompt = lambda name: [{"role": "user", "content": f"Frage {name}?"}]  # noqa: E731
    lines = [Sample(name, prompt(name), text, finish_reason, 3, model).line() for name, text in texts.items()]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(name="command")
def fixture_command(monkeypatch, capsys):
    """Run eval.py in this process; (exit status, what it printed). It gives an endpoint up after few tries."""
    monkeypatch.setattr("nanomed.chat.PATIENCE_S", 0.0)
    monkeypatch.setattr("nanomed.chat.FIRST_WAIT_S", 0.01)

    def run(*argv) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["eval.py", *map(str, argv)])
        try:
            run_script(evaluate.main)
            status = 0
        except SystemExit as end:
            if isinstance(end.code, str):
                return 1, end.code
            status = end.code or 0
        shown = capsys.readouterr()
        return status, shown.out + shown.err

    return run


def parts(body: dict) -> tuple[str, str]:
    """The two answers that a judge was shown."""
    text = body["messages"][0]["content"]
    return tuple(re.search(rf"<<<ANTWORT {i} \w+\n(.*?)\nANTWORT {i} \w+>>>", text, re.DOTALL)[1] for i in (1, 2))


def refused(command, *argv) -> str:
    """The one line with which the command refuses."""
    status, said = command(*argv)
    assert status == 1
    line = said.strip().splitlines()[-1]
    assert line.startswith("error: "), said
    return line
