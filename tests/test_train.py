"""train.py as a user runs it: ranks, kills, resumption, what it leaves behind."""

import json
import math
import signal
import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import ROOT, command, read_losses, rows_of, run_train
from nanomed import plot


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """A whole run on one process; its folder."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = run_train(tiny.flags(out))
    assert done.returncode == 0, done.stderr
    return out


def test_it_learns_and_leaves_what_it_says(tiny, undisturbed):
    losses = read_losses(undisturbed)
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 1
    assert {p.name for p in undisturbed.iterdir()} == {
        "config.json", "run.json", "metrics.jsonl", "checkpoints", "curves.svg", "hf", "source"}  # fmt: skip
    assert sorted(p.name for p in (undisturbed / "checkpoints").iterdir()) == ["step-00000015", "step-00000020"]
    rows = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "tokens", "loss", "grad_norm", "lr", "tok_s", "mfu", "data_wait", "memory_gb"} <= rows[1].keys()
    assert [r["step"] for r in rows if "val_med_bpb" in r] == [0, 10, 20]
    assert rows[-1]["val_med_bpb"] < rows[0]["val_med_bpb"]
    assert (undisturbed / "curves.svg").read_text().startswith("<?xml")
    assert plot.plot_curves(undisturbed).exists()


def test_the_export_is_what_transformers_loads(tiny, undisturbed):
    model = AutoModelForCausalLM.from_pretrained(undisturbed / "hf", dtype="auto")
    assert model.dtype == torch.bfloat16  # the source's
    tokenizer = AutoTokenizer.from_pretrained(undisturbed / "hf")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny.model).chat_template
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (undisturbed / "hf" / name).read_bytes() == (tiny.model / name).read_bytes()
    before = AutoModelForCausalLM.from_pretrained(tiny.model).state_dict()
    assert all((before[k] != v.float()).any() for k, v in model.state_dict().items())  # trained, all of it


def test_validation_equals_transformers_document_by_document(tiny, undisturbed):
    """Bits per byte at step 0: Σ NLL over every token but each document's first, by another road."""
    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    nll, n_labels = 0.0, 0
    for text in tiny.texts:
        ids = torch.tensor([[*tokenizer(text, add_special_tokens=False).input_ids, 0]])
        nll += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        n_labels += ids.shape[1] - 1
    row = json.loads((undisturbed / "metrics.jsonl").read_text().splitlines()[0])
    # Windows of 32 tokens cut documents, which costs context: so compare with windows that hold them whole.
    assert row["val_med_loss"] == pytest.approx(nll / n_labels, rel=0.02)
    whole = run_train(tiny.flags(undisturbed.parent / "whole", seq_len=4096, batch_tokens=4096, micro_batch=1, steps=3))
    assert whole.returncode == 0, whole.stderr
    row = json.loads((undisturbed.parent / "whole" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["val_med_loss"] == pytest.approx(nll / n_labels, rel=1e-5)
    n_bytes = sum(len(t.encode()) for t in tiny.texts)
    assert row["val_med_bpb"] == pytest.approx(nll / n_bytes / math.log(2), rel=1e-5)


@pytest.mark.parametrize(("nproc", "flags"), [(2, {}), (3, {}), (4, {"replicas": 2, "recompute": "selective", "micro_batch": 1})])
def test_more_ranks_same_losses(nproc, flags, tiny, undisturbed, tmp_path):
    """Unequal labels on the ranks, three ranks that do not divide four micro-batches, HSDP: the same run."""
    done = run_train(tiny.flags(tmp_path / "run", **flags), nproc)
    assert done.returncode == 0, done.stderr
    assert read_losses(tmp_path / "run") == pytest.approx(read_losses(undisturbed), rel=1e-5)
    one = AutoModelForCausalLM.from_pretrained(undisturbed / "hf").state_dict()
    many = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf").state_dict()
    for name, weight in one.items():
        torch.testing.assert_close(many[name], weight, rtol=0.02, atol=1e-3, msg=name)


def kill_at_step_15(flags, folder) -> None:
    """A run that is killed when metrics.jsonl shows step 15. Step 10's checkpoint was begun, so step 5's is whole."""
    script = folder / "dies.py"
    script.write_text(KILL.format(root=str(ROOT)))
    killed = run_train(["step", *flags], script=script)
    assert killed.returncode == -signal.SIGKILL, killed.stderr


def test_kill_and_resume_is_bit_identical(tiny, undisturbed, tmp_path):
    out = tmp_path / "run"
    kill_at_step_15(tiny.flags(out), tmp_path)
    assert rows_of(out)[-1]["step"] == 15
    assert not (out / "hf").exists()
    resumed = run_train(tiny.flags(out))
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stderr
    assert read_losses(out) == read_losses(undisturbed)  # bit for bit
    same = (out / "hf" / "model.safetensors").read_bytes() == (undisturbed / "hf" / "model.safetensors").read_bytes()
    assert same


def test_resume_on_another_number_of_ranks(tiny, undisturbed, tmp_path):
    out = tmp_path / "run"
    kill_at_step_15(tiny.flags(out), tmp_path)
    resumed = run_train(tiny.flags(out), nproc=2)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stderr
    assert read_losses(out) == pytest.approx(read_losses(undisturbed), rel=1e-5)


# A train.py that kills itself at a chosen moment: after step 15, or inside step 10's checkpoint.
KILL = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch.distributed.checkpoint.filesystem as filesystem
import nanomed.checkpoint as checkpoint, train
def dies_before(module, name, when):
    real = getattr(module, name)
    def wrapper(*args, **kwargs):
        if when(*args): os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(module, name, wrapper)
moment = sys.argv.pop(1)
if moment == "step":      # its row is written, its checkpoint not yet begun
    dies_before(checkpoint.Checkpointer, "save", lambda self, step: step == 15)
if moment == "data":      # nothing of the tensors is on disk yet
    dies_before(filesystem.FileSystemWriter, "write_data", lambda self, *_: "00000010" in str(self.path))
if moment == "metadata":  # all tensors are, their index is not
    dies_before(filesystem.FileSystemWriter, "finish", lambda self, *_: "00000010" in str(self.path))
if moment == "done":      # everything is, but DONE
    dies_before(checkpoint, "write_durably", lambda path, _: str(path).endswith("00000010/DONE"))
if moment == "prune":     # step 10 is DONE, the removal of step 5 has begun
    dies_before(checkpoint.shutil, "rmtree", lambda path, **_: str(path).endswith("00000005") and path.exists())
train.main()
"""


@pytest.mark.parametrize(("moment", "resumes_from"), [("data", 5), ("metadata", 5), ("done", 5), ("prune", 10)])
def test_kill_while_a_checkpoint_is_written(moment, resumes_from, tiny, undisturbed, tmp_path):
    out, script = tmp_path / "run", tmp_path / "dies.py"
    script.write_text(KILL.format(root=str(ROOT)))
    flags = tiny.flags(out, keep=1 if moment == "prune" else 2)
    killed = run_train([moment, *flags], script=script)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = run_train(flags)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming from {out}/checkpoints/step-{resumes_from:08}" in resumed.stderr
    assert read_losses(out) == read_losses(undisturbed)


def test_a_finished_run_says_so(tiny, undisturbed):
    before = (undisturbed / "metrics.jsonl").read_bytes()
    again = run_train(tiny.flags(undisturbed))
    assert again.returncode == 0
    assert "finished" in again.stderr
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


def test_epochs_drop_only_the_last_incomplete_step(tiny, tmp_path):
    done = run_train(tiny.flags(tmp_path / "run", steps="None", epochs=1, warmup_steps=0))
    assert done.returncode == 0, done.stderr
    n_tokens = json.loads((tiny.train / "manifest.json").read_text())["n_tokens"]
    assert len(read_losses(tmp_path / "run")) == n_tokens // 256
    assert f"the last {n_tokens % 256} tokens fill no step and are dropped" in done.stderr


def test_show_prints_the_text_of_a_step(tiny, undisturbed):
    show = subprocess.run(command(1, [])[:1] + ["-m", "nanomed.batches", "show", "--run", undisturbed, "--step", "3"],
                          capture_output=True, text=True)  # fmt: skip
    assert show.returncode == 0, show.stderr
    assert "Blut" in show.stdout
    assert "window 16" in show.stdout
