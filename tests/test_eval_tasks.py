"""Tasks and their questions: lm-eval gives the same numbers, those shipped are sound, a damaged one stops the run."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerFast

from conftest import ROOT
from knowledge_world import QUESTIONS, fixture_world, flags, run, write_jsonl, write_task  # noqa: F401
from nanomed.evaluation import accuracy, knowledge, loading, tasks
from nanomed.evaluation.loading import load_decoder
from nanomed.evaluation.questions import read_questions
from nanomed.evaluation.scorer import DecoderLM


def test_lm_eval_gives_the_same_from_the_same_files(world, tmp_path, monkeypatch):
    """The shipped YAML from the clone's root, and the run's own of a second seed, both through lm-eval's hf model."""
    monkeypatch.chdir(ROOT)
    folder = world / "a"
    ours = DecoderLM(load_decoder(folder, torch.float32, torch.device("cpu")), folder, 512)
    peer = HFLM(pretrained=str(folder), tokenizer=PreTrainedTokenizerFast.from_pretrained(folder), dtype="float32",
                batch_size=4, max_length=512, device="cpu")  # fmt: skip
    run(monkeypatch, *flags(world, tmp_path / "out", "a"), "--seeds", 2)
    own = tmp_path / "out" / "tasks" / "seed-1"
    for path, names, shots in (
        (ROOT / "data" / "tasks", ["medizin_de", "medizin_de_text"], 1),
        (own, ["one", "two"], None),
    ):
        sides = [
            simple_evaluate(lm, tasks=names, num_fewshot=shots, bootstrap_iters=0, limit=8,
                            task_manager=TaskManager(include_path=path, include_defaults=False))
            for lm in (ours, peer)
        ]  # fmt: skip
        for name in names:
            mine, theirs = (side["samples"][name] for side in sides)
            assert [s["arguments"] for s in mine] == [s["arguments"] for s in theirs]
            for a, b in zip(mine, theirs, strict=True):
                assert [p for p, _ in a["filtered_resps"]] == pytest.approx([p for p, _ in b["filtered_resps"]], abs=1e-4)
            metric = "acc_norm" if name in ("two", "medizin_de_text") else "acc"
            assert sides[0]["results"][name][f"{metric},none"] == sides[1]["results"][name][f"{metric},none"]
    lines = knowledge.read_samples(tmp_path / "out" / "samples" / "a" / "one.jsonl")
    prompts = {s["doc"]["id"]: s["arguments"][0][0] for s in sides[0]["samples"]["one"]}
    assert all(x["prompt"] == prompts[x["id"]] for x in lines if x["seed"] == 1 and x["id"] in prompts)
    assert {x["prompt"] for x in lines if x["seed"] == 0}.isdisjoint(x["prompt"] for x in lines if x["seed"] == 1)


def test_shipped_questions_are_sound():
    test, dev = (read_questions(tasks.FOLDER / f"medizin_de{end}.jsonl") for end in ("", ".dev"))
    assert len(test) >= 60
    assert len(dev) >= 5
    assert not {q["question"] for q in test} & {q["question"] for q in dev}
    for questions in (test, dev):
        counts = [sum(q["answer"] == i for q in questions) for i in range(4)]
        assert max(counts) - min(counts) <= 1  # no letter pays
        assert all(len(q["options"]) == 4 for q in questions)


def test_the_paper_s_average_is_of_two_exams():
    """With the questions of convert in place, german_medical weighs MMLU and MedQA alike, and MMLU's questions alike."""
    leaf = lambda name: tasks.Task(name, {}, None, None)  # noqa: E731
    mmlu = tasks.Group("mmlu", (leaf("x"), leaf("y")), True)
    group = tasks.Group("german_medical", (mmlu, leaf("medqa")), False)
    values = {"x": [1.0] * 30, "y": [0.0] * 10, "medqa": [0.0] * 100}
    found = accuracy.group_entry(group, {k: torch.tensor(v).numpy() for k, v in values.items()})
    assert found["macro"] == pytest.approx((0.75 + 0) / 2)
    assert found["micro"] == pytest.approx(30 / 140)
    shipped = yaml.safe_load((tasks.FOLDER / "german_medical.yaml").read_text())
    assert shipped["task"] == ["mmlu_de_mmlux", "medqa_de_bioinstructqa"]
    assert not shipped["aggregate_metric_list"][0]["weight_by_size"]


FAULTS = {
    "answer is missing": lambda q: q.pop("answer"),
    "answer 4 is not one of its options": lambda q: q.update(answer=4),
    "answer -1 is not one of its options": lambda q: q.update(answer=-1),
    "answer is 'A', expected int": lambda q: q.update(answer="A"),
    "option 1 is empty": lambda q: q["options"].__setitem__(1, " "),
    "two options are the same": lambda q: q["options"].__setitem__(1, "ja"),
    "question is empty": lambda q: q.update(question=" "),
    "duplicate id 'q0'": lambda q: q.update(id="q0"),
    "has 5 options, one asks for 4": lambda q: q["options"].append("doch"),
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_damaged_question_stops_the_run_before_the_model_is_loaded(message, world, tmp_path, monkeypatch):
    (tmp_path / "tasks").mkdir()
    questions = json.loads(json.dumps(QUESTIONS))
    FAULTS[message](questions[3])
    write_task(tmp_path / "tasks", "one", write_jsonl(tmp_path / "one.jsonl", questions), world / "dev.jsonl")
    monkeypatch.setattr(loading, "load_decoder", lambda *_: pytest.fail("loaded"))
    argv = [world / "a", "--task-path", tmp_path / "tasks", "--tasks", "one", "--out", tmp_path / "out"]
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *argv)
    text = stop.value.code
    assert text.startswith(f"error: {tmp_path / 'one.jsonl'}: ")
    assert message in text
    assert "\n" not in text
    assert "line 4" in text or "q3" in text


@pytest.mark.parametrize("split", ["test", "validation"])
@pytest.mark.parametrize("shape", ["files of a split", "a file", "files"])
def test_a_task_of_ours_may_name_its_files_in_any_way(split, shape, world, tmp_path, monkeypatch):
    """And its questions are still checked."""
    halves = [write_jsonl(tmp_path / f"{n}.jsonl", QUESTIONS[start : start + 6]) for n, start in (("x", 0), ("y", 6))]
    files = [str(path) for path in (halves[:1] if shape == "a file" else halves)]
    data = {split: files, "dev": str(world / "dev.jsonl")}
    more = {f"{split}_split": split} if split == "test" else {"test_split": None, "validation_split": split}
    if shape != "files of a split":
        data, more = files if shape == "files" else files[0], {"test_split": "train", "fewshot_split": None}
    (tmp_path / "tasks").mkdir()
    write_task(
        tmp_path / "tasks", "own", world / "one.jsonl", world / "dev.jsonl", **more | {"dataset_kwargs": {"data_files": data}}
    )
    n_shots = 2 if shape == "files of a split" else 0
    argv = [world / "a", "--task-path", tmp_path / "tasks", "--tasks", "own", "--shots", n_shots]
    run(monkeypatch, *argv, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert found["models"][0]["tasks"][0]["n"] == 6 * len(files)
    written = yaml.safe_load((tmp_path / "out/tasks/seed-0/own.yaml").read_text())
    assert len(written.get("fewshot_config", {}).get("samples", ())) == n_shots
    write_jsonl(halves[len(files) - 1], [QUESTIONS[0] | {"answer": 4}])
    with pytest.raises(SystemExit, match=r"answer 4 is not one of its options"):
        run(monkeypatch, *argv, "--out", tmp_path / "again")
    write_task(tmp_path / "tasks", "own", world / "one.jsonl", world / "dev.jsonl", test_split="Test")
    with pytest.raises(SystemExit, match=r"own\.yaml: data_files has no 'Test', which test_split names"):
        run(monkeypatch, *argv, "--out", tmp_path / "again")


def test_a_task_of_another_layout_is_lm_eval_s_alone(world, tmp_path, monkeypatch):
    rows = [{"goal": q["question"], "sol": q["options"][:2], "label": q["answer"] % 2} for q in QUESTIONS]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "goals.parquet")
    config = {"task": "goals", "dataset_path": "parquet", "test_split": "test", "output_type": "multiple_choice",
              "dataset_kwargs": {"data_files": {"test": str(tmp_path / "goals.parquet")}}, "doc_to_text": "{{goal}}",
              "doc_to_choice": "{{sol}}", "doc_to_target": "label", "fewshot_split": "test",
              "filter_list": [{"name": name, "filter": [{"function": "take_first"}]} for name in "ab"]}  # fmt: skip
    (tmp_path / "goals.yaml").write_text(yaml.safe_dump(config))
    argv = ("--tasks", "goals", "--task-path", tmp_path, "--shots", 1)
    run(monkeypatch, world / "a", *argv, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert found["models"][0]["tasks"][0]["n"] == len(QUESTIONS)
    assert f"--include_path {tmp_path} --tasks goals" in found["lm_eval"][0]
    (tmp_path / "goals.parquet").write_text("no parquet")
    with pytest.raises(SystemExit, match=r"^error: goals: lm-eval cannot load it .*Parquet magic bytes not found"):
        run(monkeypatch, world / "a", *argv, "--out", tmp_path / "damaged")
    (tmp_path / "goals.parquet").unlink()
    with pytest.raises(SystemExit, match=r"^error: goals: lm-eval cannot load it .*goals\.parquet"):
        run(monkeypatch, world / "a", *argv, "--out", tmp_path / "none")
