"""What merge.py leaves: a whole folder with its report or none, verified where asked; and in bounded memory."""

import json
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROOT
from merge_pairs import files_of, fixture_pair, run, tensors_of  # noqa: F401
from nanomed.merging import report, write


def test_what_lies_beside_the_weights(pair, tmp_path, monkeypatch):
    base, cpt = pair
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (base / "generation_config.json").write_text('{"temperature": 0.7}')
    (base / "LICENSE").write_text("Apache 2.0")
    (base / "NOTICE").write_text("Llama is licensed ...")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (base / "notes.txt").write_text("not part of a checkpoint")
    run(monkeypatch, base, cpt, tmp_path / "out", "--preset", "gradient")
    written = files_of(tmp_path / "out")
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "LICENSE",
        "NOTICE",
        "additional_chat_templates/tool_use.jinja",
    ):
        assert written[name] == (base / name).read_bytes()
    assert written.keys() - files_of(base).keys() == {
        "README.md",
        "merge_report.json",
        "merge_report.md",
        "merge_report.svg",
    }
    assert "notes.txt" not in written
    ElementTree.fromstring(written["merge_report.svg"])
    card = written["README.md"].decode()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "merge_report.svg" in card
    table = json.loads(written["merge_report.json"])["tensors"]
    assert len(table) == len(tensors_of(base))
    for row in table:
        assert f"| {row['tensor']} | {row['t']:.4g} |" in written["merge_report.md"].decode()
    assert {p.name for p in tmp_path.iterdir()} == {"base", "cpt", "out"}


def test_few_layers_have_whole_numbers(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "save", lambda figure, _: drawn.append(figure))
    row = {"shape": [2, 2], "t": 0.5, "relative_change": 0.1, "sums": [1.0, 1.0, 0.01]}
    report.plot(tmp_path, [row | {"tensor": f"model.layers.{i}.mlp.up_proj.weight", "layer": i} for i in (0, 1)])
    assert all(tick == int(tick) for axes in drawn[0].axes for tick in axes.get_xticks())


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def test_a_failure_leaves_nothing_and_a_kill_nothing_that_looks_whole(pair, tmp_path, monkeypatch):
    run(monkeypatch, *pair, tmp_path / "right" / "out", "--t", "0.4")
    with monkeypatch.context() as patch:
        patch.setattr(report, "plot", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run(monkeypatch, *pair, tmp_path / "a" / "out", "--t", "0.4")
    assert not (tmp_path / "a").exists()
    flags = [*map(str, pair), str(tmp_path / "a" / "out")]
    script = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import merge; from nanomed.merging import report; "
        f"report.plot = lambda *_: os.kill(os.getpid(), 9); sys.argv[1:] = {flags!r}; merge.main()"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == -9
    assert [p.name for p in (tmp_path / "a").iterdir()] == [".out.nanomed.tmp"]
    run(monkeypatch, *pair, tmp_path / "a" / "out", "--t", "0.4")
    assert files_of(tmp_path / "a" / "out") == files_of(tmp_path / "right" / "out")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["out"]


def test_the_second_of_two_merges_into_one_folder_is_refused(pair, tmp_path, monkeypatch):
    """In one line, before it reads the weights; the first is not disturbed, nor is a user's folder OUT.tmp."""
    out, users = tmp_path / "out", tmp_path / "out.tmp"
    users.mkdir()
    (users / "notes.txt").write_text("a user's")
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import merge; from nanomed.merging import report; "
        "report.plot = lambda *_: (print('ready', flush=True), sys.stdin.read()); "
        f"sys.argv[1:] = {[*map(str, pair), str(out)]!r}; merge.main()"
    )
    first = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "ready\n"
    for flags in (["--t", "0.9"], ["--sweep", "0.1,0.9"]):
        with pytest.raises(SystemExit) as exit_:
            run(monkeypatch, *pair, out, *flags)
        assert str(exit_.value.code) == f"error: OUT {out}: another process is writing it; wait for it, or choose another"
    first.communicate("")
    assert first.returncode == 0
    run(monkeypatch, *pair, tmp_path / "right", "--t", "0.5")
    assert files_of(out).items() >= {n: b for n, b in files_of(tmp_path / "right").items() if not n.endswith(".svg")}.items()
    assert [p.name for p in users.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("damage", ["bit", "swap", "tensor"])
def test_verify_finds_damage(damage, pair, tmp_path, monkeypatch, capsys):
    """A flipped bit, two tensors in each other's place, one left out."""
    whole_write = write.verify

    def damaged(inputs, folder, *rest):
        tensors = load_file(folder / "model.safetensors")
        victim, other = "model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"
        if damage == "bit":
            tensors[victim].view(torch.int16).view(-1)[7] ^= 1 << 3
        elif damage == "swap":
            tensors[victim], tensors[other] = tensors[other], tensors[victim]
        else:
            del tensors[victim]
        save_file(tensors, folder / "model.safetensors")
        return whole_write(inputs, folder, *rest)

    monkeypatch.setattr(write, "verify", damaged)
    with pytest.raises(SystemExit) as exit_:
        run(monkeypatch, *pair, tmp_path / "out", "--verify")
    assert "model.layers.1.mlp.up_proj.weight" in str(exit_.value.code)
    assert not (tmp_path / "out").exists()


# Linux counts the parent's size at the start into ru_maxrss; VmHWM is the process's own.
PEAK = """
import pathlib, resource
assert "torch" not in sys.modules
status = pathlib.Path("/proc/self/status")
if status.exists():
    print(int(status.read_text().split("VmHWM:")[1].split()[0]) / 1e3)
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""


def test_memory_does_not_grow_with_a_tensor_and_torch_stays_out(tmp_path, tiny):
    """Peak of the process for a pair with tensors of 4 MB and for one with a tensor of 200 MB."""
    peaks = []
    for rows in (10_000, 500_000):
        for name, scale in (("base", 1.0), ("cpt", 1.5)):
            folder = tmp_path / str(rows) / name
            folder.mkdir(parents=True)
            save_file(
                {"model.embed_tokens.weight": torch.full((rows, 200), scale, dtype=torch.bfloat16)},
                folder / "model.safetensors",
            )
            (folder / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
            shutil.copyfile(tiny.model / "tokenizer.json", folder / "tokenizer.json")
        flags = [str(tmp_path / str(rows) / name) for name in ("base", "cpt", "out")]
        script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import merge; sys.argv[1:] = {flags!r}; merge.main()\n{PEAK}"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(float(done.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 20, peaks  # MB
