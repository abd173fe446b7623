"""merge.py on a run's folder: the weights of its newest checkpoint, else its export, else one line."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from conftest import run_train
from merge_pairs import assert_close, fixture_pair_and_out, run, tensors_of  # noqa: F401
from nanomed import InputError
from nanomed.checkpoint import whole
from nanomed.merging import checks, stream
from nanomed.merging.source import open_checkpoint


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A run of two ranks: weights cut by rows into two files."""
    out = tmp_path_factory.mktemp("run") / "run"
    done = run_train(tiny.flags(out, steps=4, checkpoint_every=2, eval_every=100, compile=None, **{"lr": 1e-3}), nproc=2)
    assert done.returncode == 0, done.stderr
    return out


def masters(run_folder: Path) -> dict[str, torch.Tensor]:
    """The float32 weights of the newest checkpoint, through torch's own reader."""
    metadata = dcp.FileSystemReader(whole(run_folder / "checkpoints")[-1][1]).read_metadata().state_dict_metadata
    state = {key: torch.empty(entry.size) for key, entry in metadata.items() if key.startswith("model.")}
    dcp.load(state, checkpoint_id=whole(run_folder / "checkpoints")[-1][1], no_dist=True)
    return {key.removeprefix("model."): value for key, value in state.items()}


def test_a_run_folder_gives_its_float32_weights(trained, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stream, "CHUNK", 700)  # chunks that cross from one rank's rows to the other's
    run(monkeypatch, tiny.model, trained, tmp_path / "out", "--t", "0.5", "--dtype", "float32", "--verify")
    assert "verified" in capsys.readouterr().out
    base, cpt, out = tensors_of(tiny.model), masters(trained), tensors_of(tmp_path / "out")
    assert out.keys() == cpt.keys()
    assert any((v != v.bfloat16().float()).any() for v in cpt.values())
    for name, found in out.items():
        assert_close(found, base[name], cpt[name], 0.5, name)
    assert "step 4" in (tmp_path / "out" / "merge_report.md").read_text()


def test_the_report_names_the_precision_of_the_run(tiny, trained, tmp_path, monkeypatch):
    flags = dict(steps=4, checkpoint_every=4, eval_every=100, compile=None, precision="pure-bf16")
    done = run_train(tiny.flags(tmp_path / "run", **flags))
    assert done.returncode == 0, done.stderr
    for folder, precision in ((tmp_path / "run", "bfloat16 weights of step 4"), (trained, "float32 weights of step 4")):
        assert open_checkpoint(str(folder), "CPT").kind == precision
    run(monkeypatch, tiny.model, tmp_path / "run", tmp_path / "out")
    told = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert told["cpt"]["kind"] == "bfloat16 weights of step 4"
    assert "bfloat16 weights of step 4" in (tmp_path / "out" / "README.md").read_text()


def test_a_run_without_checkpoints_gives_its_export_and_an_empty_one_is_refused(trained, tiny, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    shutil.rmtree(copy / "checkpoints")
    run(monkeypatch, tiny.model, copy, tmp_path / "out", "--t", "1")
    expected, found = tensors_of(trained / "hf"), tensors_of(tmp_path / "out")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    shutil.rmtree(copy / "hf")
    with pytest.raises(InputError, match="no complete checkpoint"):
        open_checkpoint(str(copy), "CPT")


@pytest.mark.parametrize("what", ["cut", "missing", "metadata"])
def test_a_broken_checkpoint_is_named(what, trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    newest = whole(copy / "checkpoints")[-1][1]
    victim = newest / ".metadata" if what == "metadata" else sorted(newest.glob("*.distcp"))[0]
    if what == "missing":
        victim.unlink()
    else:
        os.truncate(victim, victim.stat().st_size // 8)  # the weights come before the optimiser's moments
    with pytest.raises(InputError, match=victim.name if what != "metadata" else r"\.metadata") as error:
        open_checkpoint(str(copy), "CPT")
    assert "\n" not in str(error.value)


def test_a_run_that_has_not_exported_is_no_base_and_no_run_is_mergekits(pair_and_out, tmp_path, monkeypatch):
    base, cpt, out = pair_and_out
    unexported = dataclasses.replace(open_checkpoint(str(base), "BASE"), folder=None)
    with pytest.raises(InputError, match="has not exported"):
        checks.check_base(unexported)
    (cpt / "run.json").write_text("{}")
    shutil.copytree(cpt, cpt / "hf")
    with pytest.raises(SystemExit, match=r"run folder, which mergekit does not read; give its export, .*hf"):
        run(monkeypatch, base, cpt, out, "--emit-mergekit", tmp_path / "c.yml")
    assert not (tmp_path / "c.yml").exists()


def test_a_run_folder_that_is_none(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no complete checkpoint"):
        open_checkpoint(str(tmp_path), "CPT")
