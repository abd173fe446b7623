"""Labels → a classifier: learns what can be learnt, goes on where it was killed, and refuses what it cannot use."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForSequenceClassification

import sweep
from classify import classify, part_of, read_labels, start
from conftest import ROOT
from documents import write_parquet
from encoder import Settings, batches, schedule
from nanomed import InputError
from scoring import score_file, score_path
from test_sweep import MAX_TOKENS, make_classifier, text_of

KNOBS = dict(epochs=2, lr=5e-3, batch_size=16, max_tokens=MAX_TOKENS, seed=0)
COLUMNS = dict.fromkeys(("id", "text", "label", "model", "prompt_sha256"), "string")


@pytest.fixture(name="base", scope="module")
def fixture_base(tmp_path_factory):
    """An encoder to start from; its head is thrown away."""
    folder = make_classifier(tmp_path_factory.mktemp("base"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "model_max_length": MAX_TOKENS}))  # fmt: skip
    return folder


def rows_of(n: int = 240) -> list[dict]:
    """Documents whose label is whether they begin with a disease: a rule that an encoder can see."""
    rows = []
    for i in range(n):
        medical = i % 2 == 0
        text = ("Blutdruck Ramipril Patient " * 3 if medical else "Amt Auskunft und " * 3) + text_of(i, 8) + f" {i}"
        label = "medical" if medical else "not_medical"
        rows.append({"id": f"d{i}", "text": text, "label": label, "model": "m", "prompt_sha256": "0" * 64})
    return rows


def write(path, rows):
    write_parquet(path, rows, COLUMNS, {})
    return path


def test_learns_a_rule_and_leaves_an_ordinary_checkpoint(base, tmp_path):
    labels = write(tmp_path / "labels.parquet", [*rows_of(), {**rows_of(1)[0], "id": "x", "label": "invalid"}])
    result = classify(labels, tmp_path / "clf", str(base), 0.9, **KNOBS)
    assert result["precision"][0] >= 0.9
    assert result["recall"][0] >= 0.9
    assert result["counts"] == {"medical": 120, "not_medical": 120, "invalid": 1}
    assert (result["annotator"], result["prompt_sha256"], result["max_chars"]) == ("m", "0" * 64, 6 * MAX_TOKENS)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "clf")
    assert model.config.id2label == {0: "not_medical", 1: "medical"}
    held_out = pq.read_table(tmp_path / "clf" / "held_out.parquet").to_pylist()
    by_id = {row["id"]: row["text"] for row in rows_of()}
    assert {row["part"] for row in held_out} == {"choose", "report"}
    assert all(part_of(by_id[row["id"]]) == row["part"] for row in held_out)
    assert not list(tmp_path.glob(".clf.partial"))


def test_the_threshold_is_chosen_from_the_scores_that_a_sweep_gives(base, tmp_path):
    """Bit for bit: of the same texts in the same order, with the settings that sweep.py reads from the folder."""
    long = {**rows_of(2)[1], "id": "long", "text": "Amt und Auskunft " * 102}
    assert part_of(long["text"]) != "train"
    empty = {**long, "id": "empty", "text": " \n" * 50}
    rows = [row | {"text": text_of(i)} for i, row in enumerate(rows_of(400))]  # nothing to learn, hence many scores
    labels = write(tmp_path / "labels.parquet", [*rows, long, empty])
    result = classify(labels, tmp_path / "clf", str(base), 0.1, **KNOBS | {"epochs": 1, "lr": 1e-5})
    assert result["counts"] == {"medical": 200, "not_medical": 201, "invalid": 1}  # a sweep gives " " no score
    held_out = pq.read_table(tmp_path / "clf" / "held_out.parquet").to_pylist()
    texts = {row["id"]: row["text"] for row in (*rows, long)}
    path = write(tmp_path / "texts.parquet", [{"id": row["id"], "text": texts[row["id"]]} for row in held_out])
    args = sweep.parse_arguments([str(path), "--classifier", str(tmp_path / "clf"), "--out", str(tmp_path / "sweep")])
    step, _ = sweep.plan(args.inputs, args.classifier, args.out, args)
    score_file(step, path)
    swept = pq.read_table(score_path(path, tmp_path / "sweep")).to_pylist()
    assert [(row["id"], row["score"]) for row in swept] == [(row["id"], row["score"]) for row in held_out]
    assert len({row["score"] for row in held_out}) > 40


# data/classify.py that kills itself at the end of the second epoch, before that is saved.
DIES = """
import os, runpy, signal, sys
sys.argv.pop(0)
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import encoder
real = encoder.save_epoch
def save_epoch(partial, epoch, *rest):
    if epoch == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    real(partial, epoch, *rest)
encoder.save_epoch = save_epoch
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_killed_it_goes_on_after_the_last_whole_epoch_with_the_same_bits(base, tmp_path):
    labels = write(tmp_path / "labels.parquet", rows_of(200))
    flags = ["--model", base, "--target-precision", "0.5", "--epochs", "3", "--lr", "5e-3", "--max-tokens", MAX_TOKENS]
    command = [sys.executable, ROOT / "data" / "classify.py", labels, *flags, "--out"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = lambda out: subprocess.run(list(map(str, [*command, out])), env=env, capture_output=True, text=True)  # noqa: E731
    whole = run(tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    dies = [sys.executable, "-c", DIES, *command[1:], tmp_path / "cut"]
    killed = subprocess.run(list(map(str, dies)), env=env, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / ".cut.partial" / "epoch.pt").exists()
    assert not (tmp_path / "cut").exists()
    resumed = run(tmp_path / "cut")
    assert resumed.returncode == 0, resumed.stderr
    assert "epoch 1 of 3" not in resumed.stderr
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == two
    other = subprocess.run(list(map(str, [*command, tmp_path / "cut"])), env=env, capture_output=True, text=True)
    assert other.stderr.startswith(f"error: {tmp_path / 'cut'}: exists; choose another --out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "maybe"}, "row 3: label is 'maybe', expected medical, not_medical or invalid"),
        ({"id": "d0"}, "row 3: duplicate id 'd0'"),
        ({"model": "another"}, "labels of 2 models or prompts"),
    ],
)
def test_bad_labels_are_one_line(tmp_path, change, message):
    rows = rows_of(100)
    rows[2] |= change
    with pytest.raises(InputError, match=message):
        read_labels(write(tmp_path / "labels.parquet", rows), 100)


def test_a_part_of_one_label_is_refused(tmp_path):
    rows = [row for row in rows_of(100) if row["label"] == "medical"]
    with pytest.raises(InputError, match="medical and 0 other documents, expected some of both; annotate more"):
        read_labels(write(tmp_path / "labels.parquet", rows), 100)


def test_what_cannot_be_an_encoder_is_refused(base, tmp_path):
    labels = write(tmp_path / "labels.parquet", rows_of(100))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="cannot be loaded as an encoder"):
        classify(labels, tmp_path / "clf", str(tmp_path / "empty"), 0.9, **KNOBS)
    with pytest.raises(InputError, match=f"--max-tokens 999: .* takes {MAX_TOKENS} at most"):
        classify(labels, tmp_path / "clf", str(base), 0.9, **(KNOBS | {"max_tokens": 999}))
    assert not (tmp_path / "clf").exists()


def test_a_precision_that_cannot_be_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(InputError, match="--target-precision is 95, expected above 0 and at most 1"):
        classify(tmp_path / "none.parquet", tmp_path / "clf", "none", 95, **KNOBS)


def test_settings_are_there_whole_and_damage_is_one_line(tmp_path):
    settings = Settings("a", "b", max_chars=1, **KNOBS)
    (tmp_path / "p").mkdir()
    start(tmp_path / "p", settings)
    start(tmp_path / "p", settings)
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["settings.json"]
    (tmp_path / "p/settings.json").write_text("")
    with pytest.raises(InputError, match=r"p/settings\.json: cannot be read as JSON"):
        start(tmp_path / "p", settings)


def test_every_document_is_in_one_batch_and_neighbours_are_of_one_length():
    lengths = np.random.default_rng(0).integers(1, 100, 1000)
    cut = batches(lengths, 16, np.random.default_rng(1))
    assert sorted(np.concatenate(cut)) == list(range(1000))
    padding = sum(lengths[rows].max() * rows.size for rows in cut) / lengths.sum()
    assert padding < 1.1


def test_the_schedule_rises_and_falls():
    values = [schedule(step, 100) for step in range(100)]
    assert values[5] == max(values) == 1.0
    assert values[0] == pytest.approx(1 / 6)
    assert values[-1] == pytest.approx(1 / 94)
