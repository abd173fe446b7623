"""A worker of the sweep: damage that would pass for empty texts, tasks that must fail, GPUs that must not be shared."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import encoder
import scoring
import sweep as script
from documents import write_parquet
from nanomed import InputError
from nanomed.files import lock
from scoring import claim_device, score_path
from test_sweep import make_classifier, step_for, sweep, text_of, write_documents


@pytest.fixture(scope="module")
def clf(tmp_path_factory):
    return make_classifier(tmp_path_factory.mktemp("clf"))


def test_a_classifier_of_nan_is_refused(tmp_path):
    clf = make_classifier(tmp_path / "clf")
    weights = load_file(clf / "model.safetensors")
    weights["classifier.out_proj.bias"].fill_(float("nan"))
    save_file(weights, clf / "model.safetensors", {"format": "pt"})
    path = write_documents(tmp_path / "a.jsonl", ["", text_of(1)])
    with pytest.raises(InputError, match=r"a.jsonl: document 2, '<1>': the score is not a number; train .*clf again"):
        sweep(path, "--classifier", clf, "--out", tmp_path / "out", "--workers", 1)
    assert not list((tmp_path / "out/scores").iterdir())


def test_a_task_fails_where_the_others_go_on(tmp_path, clf):
    """Under Slurm and Ray it is the exit status that says so; at its end, so that its other files are scored."""
    good = write_documents(tmp_path / "good.jsonl", [text_of(1)])
    (tmp_path / "bad.jsonl").write_text('{"id": "1"}\n')
    files = [tmp_path / "bad.jsonl", good]
    with pytest.raises(InputError, match=r"bad.jsonl: line 1: no 'text'"):
        step_for(clf, files, tmp_path / "out", raises=True)(None, 0, 1)
    assert score_path(good, tmp_path / "out").exists()
    for executor, expected in (("local", False), ("slurm", True), ("ray", True)):
        args = script.parse_arguments([str(good), "--classifier", str(clf), "--out", "x", "--executor", executor])
        assert script.plan(args.inputs, clf, tmp_path / "plan", args)[0].raises == expected


def test_scores_of_another_configuration_made_meanwhile_are_not_counted(tmp_path, clf):
    path = write_documents(tmp_path / "a.jsonl", [text_of(1)])
    args = script.parse_arguments([str(path), "--classifier", str(clf), "--out", str(tmp_path / "out")])
    step, files = script.plan(args.inputs, clf, tmp_path / "out", args)
    step_for(clf, [path], tmp_path / "out", identity='{"classifier_sha256": "another"}')(None, 0, 1)
    with pytest.raises(InputError, match=r"a.parquet: made with another configuration: classifier_sha256 was another"):
        script.finish(step, files, {"threshold": 0.5})


def test_two_sweeps_at_once_are_refused(tmp_path, clf):
    path = write_documents(tmp_path / "a.jsonl", [text_of(1)])
    (tmp_path / "out").mkdir()
    descriptor = lock(tmp_path / "out")
    with pytest.raises(InputError, match="out: another run is writing here"):
        sweep(path, "--classifier", clf, "--out", tmp_path / "out", "--workers", 1)
    os.close(descriptor)


def test_a_gpu_is_claimed_by_its_uuid(tmp_path, monkeypatch):
    """Two jobs of a node, each of which sees its own card as number 0, and a third that sees both."""
    cards = []
    monkeypatch.setattr(scoring.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=cards[index]))
    claim = claim_device.__wrapped__  # without the process's memory
    cards[:] = ["one"]
    assert claim() == torch.device("cuda", 0)
    with pytest.raises(InputError, match="all 1 GPUs are in use by other workers"):
        claim()
    cards[:] = ["two"]
    assert claim() == torch.device("cuda", 0)
    cards[:] = ["one", "two", "three"]
    assert claim() == torch.device("cuda", 2)


def test_a_classifier_is_known_by_the_bytes_of_its_files(clf):
    """Of all, one behind the other: another way to hash would make every sweep so far another classifier's."""
    content = b"".join((clf / name).read_bytes() for name in ("config.json", "tokenizer.json", "model.safetensors"))
    assert scoring.classifier_identity(clf) == hashlib.sha256(content).hexdigest()


# ---- precision ----


@pytest.fixture(name="gpu")
def fixture_gpu(monkeypatch):
    """Pretend that there is a GPU of a compute capability."""
    monkeypatch.setattr(scoring, "claim_device", lambda: torch.device("cuda", 0))
    return lambda *capability: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 0), "fp16"), ((7, 5), "fp16"), ((6, 1), "fp16"), ((8, 0), "bf16"), ((8, 9), "bf16"), ((9, 0), "bf16"), ((12, 0), "bf16")],
)
def test_a_gpu_without_bf16_gets_fp16(clf, gpu, capability, dtype):
    gpu(*capability)
    task = step_for(clf, [], clf)
    assert scoring.dtype_of(task) == scoring.half_precision(torch.device("cuda")) == dtype
    assert encoder.needs_scaling(torch.device("cuda")) == (dtype == "fp16")
    for asked in ("bf16", "fp16", "fp32"):
        assert scoring.dtype_of(replace(task, dtype=asked)) == asked


def test_the_cpu_gets_fp32_whatever_the_gpu_beside_it(clf, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert scoring.dtype_of(step_for(clf, [], clf)) == "fp32"
    assert not encoder.needs_scaling(torch.device("cpu"))


def test_fp16_stays_close_and_the_head_is_fp32(tmp_path):
    clf = make_classifier(tmp_path / "clf")
    path = write_documents(tmp_path / "b.jsonl", [text_of(i) for i in range(50)])
    scores = {}
    for dtype in ("fp32", "fp16"):
        step_for(clf, [path], tmp_path / dtype, dtype=dtype)(None, 0, 1)
        scores[dtype] = pq.read_table(score_path(path, tmp_path / dtype))["score"].to_numpy()
    difference = np.abs(scores["fp32"] - scores["fp16"])
    assert 0 < difference.max() < 0.02
    assert (scores["fp16"].astype(np.float16) != scores["fp16"]).any()  # the head and the softmax were in fp32
    assert scoring.read_about(score_path(path, tmp_path / "fp16"))["computed_in"] == "fp16"


def test_training_with_a_scaled_loss_resumes(tmp_path):
    """The scaler on the CPU stands for the one that fp16 needs on a GPU."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(torch.ones(2)).sum()).backward()
    scaler.step(optimizer)
    scaler.update(512.0)
    encoder.save_epoch(tmp_path, 3, model, optimizer, scaler)
    fresh = torch.amp.GradScaler("cpu")
    assert encoder.load_epoch(tmp_path, model, optimizer, fresh) == 3
    assert fresh.get_scale() == 512.0
    assert encoder.load_epoch(tmp_path, model, optimizer, torch.amp.GradScaler("cpu", enabled=False)) == 3


def test_scores_of_several_precisions_are_noticed(tmp_path, clf, capsys):
    """A cluster of several kinds of GPU; a threshold that was chosen on another kind."""
    files = [write_documents(tmp_path / f"{name}.jsonl", [text_of(i) for i in range(20)]) for name in "ab"]
    about = json.loads((clf / "threshold.json").read_text()) | {"computed_in": "fp32"}
    mine = shutil.copytree(clf, tmp_path / "clf")
    (mine / "threshold.json").write_text(json.dumps(about))
    arguments = (*files, "--classifier", mine, "--out", tmp_path / "out", "--workers", 1)
    sweep(*arguments)
    assert "warning" not in capsys.readouterr().err
    args = script.parse_arguments([str(argument) for argument in arguments])
    step, _ = script.plan(args.inputs, mine, tmp_path / "out", args)
    score_path(files[0], tmp_path / "out").unlink()
    rows = [{"id": f"<{i}>", "file": "a.jsonl", "row": i, "score": 0.5} for i in range(20)]
    about = scoring.about_scores(files[0], step.identity) | {"computed_in": "bf16"}
    write_parquet(score_path(files[0], tmp_path / "out"), rows, scoring.COLUMNS, about)
    sweep(*arguments)
    [line] = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "chosen from scores in fp32, these are of 1 files in bf16, 1 files in fp32" in line
    assert json.loads((tmp_path / "out/sweep.json").read_text())["computed_in"] == {"bf16": 1, "fp32": 1}
