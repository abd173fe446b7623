"""A worker of the sweep: damage that would pass for empty texts, tasks that must fail, GPUs that must not be shared."""

import hashlib
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import scoring
import sweep as script
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
        script.finish(step, files, 0.5)


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
