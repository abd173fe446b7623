"""Ranks that were started differently, and a model that changes between a kill and a resume."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT, command, read_losses, rows_of, run_train
from nanomed.hf import model_config
from nanomed.identity import first_difference, model_identity, weights_fingerprint
from refusals import contents, fixture_refused, only_error  # noqa: F401

# train.py, whose rank 1 gets other flags, written as NAME=VALUE in OTHER.
RANK_1_DIFFERS = """
import os, sys
sys.path.insert(0, {root!r})
import train
if os.environ["RANK"] == "1":
    for flag in os.environ["OTHER"].split(";"):
        name, value = flag.split("=", 1)
        sys.argv[sys.argv.index(name) + 1] = value
train.main()
"""


def copy_of(folder, to, **config):
    """A copy of a model's folder with other fields in its config.json."""
    shutil.copytree(folder, to)
    if config:
        change_config(to, **config)
    return to


def change_config(folder, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# --- ranks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["lr", "seed", "batch_tokens", "eval_every", "data", "val", "config.json", "weights"])
def test_ranks_that_were_started_differently_are_named(what, tiny, tmp_path):
    """Each of these trained a mixture, or hung, without a word."""
    other = {"lr": "--lr=0.5", "seed": "--seed=7", "batch_tokens": "--batch-tokens=512", "eval_every": "--eval-every=3"}
    named = {"lr": "--lr is 0.5", "seed": "--seed is 7", "batch_tokens": "--batch-tokens is 512", "eval_every": "--eval-every is 3",
             "data": "the data set 0 of --data", "val": "the data set of --val med", "config.json": "rms_norm_eps in the model's",
             "weights": "the model's weights"}  # fmt: skip
    if what == "data":
        other[what] = f"--data={tiny.val}"
    elif what == "val":
        other[what] = f"--val=med={tiny.train}"
    elif what == "config.json":
        other[what] = f"--init={copy_of(tiny.model, tmp_path / 'model', rms_norm_eps=1e-5)}"
    elif what == "weights":
        model = copy_of(tiny.model, tmp_path / "model")
        with (model / "model.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x01")
        other[what] = f"--init={model}"
    script = tmp_path / "differs.py"
    script.write_text(RANK_1_DIFFERS.format(root=str(ROOT)))
    env = os.environ | {"OMP_NUM_THREADS": "1", "OTHER": other[what]}
    run = command(2, tiny.flags(tmp_path / "run", steps=4, seed=0), script)
    done = subprocess.run(run, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "rank 1 on" in errors[0]
    assert named[what] in errors[0]
    assert not (tmp_path / "run").exists()


def test_the_same_files_under_other_paths_are_the_same_run(tiny, tmp_path):
    script = tmp_path / "differs.py"
    script.write_text(RANK_1_DIFFERS.format(root=str(ROOT)))
    other = [f"--init={copy_of(tiny.model, tmp_path / 'model')}", f"--data={shutil.copytree(tiny.train, tmp_path / 'train')}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "OTHER": ";".join(other)}
    run = command(2, tiny.flags(tmp_path / "run", steps=3), script)
    done = subprocess.run(run, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["n_ranks"] == 2


# --- resuming ------------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(tiny, tmp_path):
    """A run of 20 steps whose process ended after the checkpoint of step 10, and the model that it began with."""
    model, out = copy_of(tiny.model, tmp_path / "model"), tmp_path / "run"
    script = tmp_path / "stops.py"
    script.write_text(
        f"import sys, os; sys.path.insert(0, {str(ROOT)!r})\nimport train\nreal = train.optim.lr_at\n"
        "def lr_at(step, *args):\n    if step == 13: os._exit(9)\n    return real(step, *args)\n"
        "train.optim.lr_at = lr_at\ntrain.main()\n"
    )
    assert run_train(tiny.flags(out, init=model), script=script).returncode == 9
    return model, out


def test_an_edited_config_is_refused_by_name(tiny, stopped, refused):
    model, out = stopped
    change_config(model, rms_norm_eps=1e-3)
    line = refused(tiny.flags(out, init=model), "rms_norm_eps = 1e-06", "0.001", str(out))
    assert "--init" in line


def test_other_weights_are_refused(tiny, stopped, refused):
    model, out = stopped
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    refused(tiny.flags(out, init=model), "other weights")


@pytest.mark.parametrize("how", ["moved", "gone"])
def test_a_run_goes_on_without_the_folder_it_began_with(how, tiny, stopped, tmp_path, run, undisturbed):
    """The losses and the exported files are those of a run that was never stopped."""
    model, out = stopped
    model.rename(tmp_path / "moved")
    init = tmp_path / "moved" if how == "moved" else model
    assert run(tiny.flags(out, init=init))
    assert read_losses(out) == read_losses(undisturbed)
    assert contents(out / "hf") == contents(undisturbed / "hf")
    [resume] = json.loads((out / "run.json").read_text())["resumes"]
    assert resume["step"] in (5, 10)  # the later one was still being written, perhaps
    assert resume["changed_flags"] == ({"init": str(init)} if how == "moved" else {})


def test_every_resume_is_recorded(tiny, stopped, run):
    model, out = stopped
    began = json.loads((out / "run.json").read_text())
    assert run(tiny.flags(out, init=model, keep=7))
    about = json.loads((out / "run.json").read_text())
    assert about["id"] == began["id"]
    assert [resume["changed_flags"] for resume in about["resumes"]] == [{"keep": 7}]
    assert about["resumes"][0].keys() >= {"time", "device", "n_ranks", "versions", "git_commit"}


def test_a_runs_source_is_no_model_to_start_from(tiny, undisturbed, tmp_path, refused):
    refused(tiny.flags(tmp_path / "run", init=undisturbed / "source"), "holds no weights")


def test_a_run_of_an_older_version_is_compared_by_its_path(tiny, stopped, tmp_path, refused):
    """It did not record the model."""
    model, out = stopped
    about = json.loads((out / "run.json").read_text())
    del about["identity"]["model"]
    (out / "run.json").write_text(json.dumps(about))
    other = copy_of(tiny.model, tmp_path / "other")
    refused(tiny.flags(out, init=other), f"--init {model}", str(other))


def test_the_fingerprint_does_not_depend_on_the_files_that_hold_the_tensors(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    sharded = copy_of(tiny.model, tmp_path / "sharded")
    tensors = load_file(sharded / "model.safetensors")
    (sharded / "model.safetensors").unlink()
    names = sorted(tensors)
    for file, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: tensors[name] for name in part}, sharded / file)
    weight_map = {name: "ab"[i % 2] + ".safetensors" for i, name in enumerate(names)}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert weights_fingerprint(sharded) == weights_fingerprint(tiny.model)
    identity = {"data": [], "tokenizer_sha256": "", "val": {}, "model": model_identity(sharded, model_config(sharded))}
    assert first_difference(identity, identity) is None


# --- learning rate, recipes, loggers -------------------------------------------------------------------------------


def test_a_learning_rate_of_0_changes_no_weight(tiny, tmp_path, run):
    assert run(tiny.flags(tmp_path / "run", lr=0.0, steps=3))
    values = [row["val_med_loss"] for row in rows_of(tmp_path / "run") if "val_med_loss" in row]
    assert values[0] == values[-1]


def test_a_model_and_data_need_no_recipe(tiny, monkeypatch):
    from nanomed.config import Config, parse

    config = parse(["--init", str(tiny.model), "--data", str(tiny.train)])
    assert (config.recipe, config.lr, config.seq_len) == ("", Config().lr, Config().seq_len)
    assert config.out == "runs/model"
    assert parse([]).recipe == "miniature"


def test_wandb_gets_a_random_id_and_the_flags(tiny, tmp_path, monkeypatch):
    """A new run in an old folder must not continue the old curve."""
    import types

    calls = []
    fake = types.SimpleNamespace(init=lambda **given: calls.append(given) or types.SimpleNamespace(log=lambda *a, **k: None))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    from nanomed.config import Config
    from nanomed.metrics import _sinks

    for run_id in ("aaa", "bbb"):
        (tmp_path / "run.json").write_text(json.dumps({"id": run_id}))
        _sinks(tmp_path, Config(wandb="project", lr=0.25), 0)
    assert [call["id"] for call in calls] == ["aaa", "bbb"]
    assert calls[0]["config"]["lr"] == 0.25


def test_curves_without_validation_have_no_empty_panel(tmp_path):
    from nanomed.plot import plot_curves

    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {i}, "tokens": {i}, "loss": 1.0}}\n' for i in range(1, 9)))
    assert "Forgetting" not in plot_curves(tmp_path).read_text()
