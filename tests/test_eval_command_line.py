"""eval.py's command lines: help without the extra, printed commands that can be pasted, and runs that fail."""

import json
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from lm_eval._cli import HarnessCLI

import eval as command_line
from knowledge_world import fixture_world, flags, run  # noqa: F401
from nanomed import InputError, first_line
from nanomed.evaluation import convert, knowledge, scoring


def test_the_printed_command_may_be_pasted(world, tmp_path, monkeypatch):
    """Paths with spaces, quotes and commas stay one word, and lm-eval reads the same path from it."""
    folder = tmp_path / "it's my, model"
    folder.symlink_to(world / "a")
    out = tmp_path / "a run"
    run(monkeypatch, f"mine={folder}", "--task-path", world / "tasks", "--tasks", "one", "--shots", 0, "--out", out)
    [command] = json.loads((out / "results.json").read_text())["lm_eval"]
    words = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert words[words.index("--include_path") + 1] == str(out / "tasks" / "seed-0")
    parser = HarnessCLI()
    monkeypatch.setattr(sys, "argv", words)
    read = parser.parse_args()
    assert Path(read.model_args["pretrained"]) == (world / "a").resolve()
    assert commands_of(folder, tmp_path)["pretrained"] == str(folder)


def commands_of(folder, tmp_path) -> dict:
    """The model that lm-eval understands from the command for this folder."""
    args = Namespace(chat=False, shots=0, limit=None)
    [command] = knowledge.commands(folder, args, "float32", {tmp_path: ["one"]}, {"one": None})
    sys.argv = shlex.split(command)
    return HarnessCLI().parse_args().model_args


def test_a_run_that_fails_leaves_nothing(world, tmp_path, monkeypatch):
    folder = shutil.copytree(world / "a", tmp_path / "broken")
    (folder / "tokenizer.json").unlink()
    out = tmp_path / "out"
    for made_before in (False, True):
        if made_before:
            out.mkdir()
        with pytest.raises(SystemExit, match="has no tokenizer"):
            run(monkeypatch, *flags(world, out, tmp_path / "broken"))
        assert out.exists() == made_before
        assert not made_before or not list(out.iterdir())
    monkeypatch.setattr(scoring, "score", lambda lm, leaf, *rest: (_ for _ in ()).throw(InputError(leaf.task_name)))
    run_one = [*flags(world, out, "a", tasks="one"), "--limit", 3]
    with pytest.raises(SystemExit, match="error: one"):
        run(monkeypatch, *run_one)
    assert not list(out.iterdir())
    monkeypatch.undo()
    run(monkeypatch, *run_one)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match="belongs to a run with"):
        run(monkeypatch, *run_one[:-1], 2)  # of another's folder nothing is removed
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", command_line.COMMANDS)
def test_help_needs_no_extra(name):
    """In a process in which every package of the extra `eval` is missing; and what does need one says so in one line."""
    missing = ("transformers", "lm_eval", "datasets", "openai", "pyarrow")
    code = (f"import runpy, sys; sys.modules.update(dict.fromkeys({missing}));"
            "runpy.run_path('eval.py', run_name='__main__')")  # fmt: skip
    show = lambda *argv: subprocess.run(  # noqa: E731
        [sys.executable, "-c", code, name, *argv], cwd=command_line.__file__.rpartition("/")[0], capture_output=True, text=True
    )
    done = show("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"usage: eval.py {name}" in done.stdout
    if name == "knowledge":
        done = show("model")
        assert done.returncode == 1
        assert done.stderr == "error: knowledge needs the package lm_eval; pip install -e '.[eval]'\n"


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("", "OSError"),
        ("kurz\nund mehr", "kurz"),
        ("An error happened. " + "wort " * 60, "An error happened."),
        ("wort " * 60, "wort " * 38 + "wort ..."),
    ],
)
def test_what_a_library_says_is_not_cut_in_a_sentence(said, kept):
    assert first_line(OSError(said)) == kept
    assert len(first_line(OSError(said))) <= 200


def test_a_hub_error_keeps_its_sentence(tmp_path, monkeypatch):
    """Of what the hub's client says without a network, the first sentence; the second does not fit."""
    import huggingface_hub

    said = ("An error happened while trying to locate the files on the Hub and we cannot find the appropriate snapshot folder for "
            "the specified revision on the local disk. Please check your internet connection and try again.")  # fmt: skip

    def offline(*_, **__):
        raise OSError(said)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match=r"on the local disk\.$"):
        convert.run(Namespace(source="medqa", src="owner/name", out=tmp_path))
