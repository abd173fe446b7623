"""eval.py knowledge: the same numbers as lm-eval on the same files, whole runs, and bad input."""

import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import LlamaConfig, PreTrainedTokenizerFast

import eval as command_line
from conftest import ROOT, SENTENCES, save_reference
from nanomed import InputError
from nanomed.evaluation import accuracy, knowledge, record, tasks
from nanomed.evaluation.questions import fault, read_questions
from nanomed.evaluation.scorer import DecoderLM, load_decoder
from test_eval_scorer import TINY, write_tokenizer

QUESTIONS = [
    {"id": f"q{i}", "question": SENTENCES[i % 6], "options": ["ja", "nein", "nie", "immer"], "answer": i % 4}
    for i in range(12)
]


def write_jsonl(path, lines):
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def write_task(folder, name, test, dev, include="letters.yaml", **more):
    config = {"include": str(ROOT / "data" / "tasks" / include), "task": name,
              "dataset_kwargs": {"data_files": {"test": str(test), "dev": str(dev)}}}  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config | more), encoding="utf-8")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with two random models a and b, and the tasks one and two, grouped as both."""
    folder = tmp_path_factory.mktemp("knowledge")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        save_reference(LlamaConfig(**TINY), folder / name)
        write_tokenizer(folder / name, bos=False)
    (folder / "tasks").mkdir()
    dev = write_jsonl(folder / "dev.jsonl", [q | {"id": f"d{i}"} for i, q in enumerate(QUESTIONS[:5])])
    write_task(folder / "tasks", "one", write_jsonl(folder / "one.jsonl", QUESTIONS), dev)
    write_task(folder / "tasks", "two", write_jsonl(folder / "two.jsonl", QUESTIONS[:6]), dev,
               doc_to_choice="options", metric_list=[{"metric": "acc_norm", "aggregation": "mean"}])  # fmt: skip
    (folder / "tasks" / "both.yaml").write_text("group: both\ntask: [one, two]\n")
    return folder


def run(monkeypatch, *argv) -> None:
    """eval.py knowledge, in this process."""
    monkeypatch.setattr(sys, "argv", ["eval.py", "knowledge", *map(str, argv)])
    command_line.main()


def flags(world, out, *models, tasks="both", shots=2):
    return [
        *(world / m for m in models),
        "--task-path",
        world / "tasks",
        "--tasks",
        tasks,
        "--shots",
        shots,
        "--out",
        out,
    ]


def test_a_run_of_two_models(world, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    argv = [*flags(world, out, "a", "b"), "--seeds", 2]
    run(monkeypatch, *argv)
    found = json.loads((out / "results.json").read_text())
    about = json.loads((out / "run.json").read_text())
    assert about["finished"]
    assert about["data"][str(world / "one.jsonl")] == record.sha256(world / "one.jsonl")
    first, second = found["models"]
    assert [e["task"] for e in first["tasks"]] == ["one", "two"]
    assert first["tasks"][0]["difference"] is None
    assert second["tasks"][0]["difference"]["to"] == "a"
    for model in found["models"]:
        for entry in model["tasks"]:
            lines = knowledge.read_samples(out / "samples" / model["name"] / f"{entry['task']}.jsonl")
            assert entry["accuracy"] == pytest.approx(sum(x["correct"] for x in lines) / len(lines))
            assert len(lines) == 2 * entry["n"]
            assert entry["letters"]["gold"] == [sum(x["gold"] == i for x in lines) for i in range(4)]
            assert all(x["correct"] == (x["chosen"] == x["gold"]) for x in lines)
            assert {s["seed"] for s in entry["seeds"]} == {0, 1}
        one, two = (e["accuracy"] for e in model["tasks"])
        assert model["group"]["macro"] == pytest.approx((one + two) / 2)
        assert model["group"]["micro"] == pytest.approx((12 * one + 6 * two) / 18)
    assert (out / "accuracy.svg").stat().st_size > 1000
    assert "both, macro" in capsys.readouterr().out
    before = (out / "results.json").stat().st_mtime_ns
    run(monkeypatch, *argv)
    assert "finished already" in capsys.readouterr().out
    assert (out / "results.json").stat().st_mtime_ns == before
    the_page_of(out, found, tmp_path, monkeypatch)


def the_page_of(out, found, tmp_path, monkeypatch):
    """The report of a run of knowledge: a row a task and model, the group, a picture; a folder named twice counts once."""
    (tmp_path / "link").symlink_to(out)
    (tmp_path / "answers.jsonl").write_text("")  # beside a run; RUN/* names it too
    argv = [out, tmp_path / "link", tmp_path / "answers.jsonl", "--out", tmp_path / "report"]
    monkeypatch.setattr(sys, "argv", ["eval.py", "report", *map(str, argv)])
    command_line.main()
    rows = [line.split(" | ") for line in (tmp_path / "report/report.md").read_text().splitlines() if line[:2] == "| "]
    named = [(row[0][2:], row[2]) for row in rows]
    wanted = [(task, model) for task in ("one", "two", "both, macro") for model in "ab"]
    assert [pair for pair in named if pair[1] in "ab"] == wanted
    for task, row in zip(found["models"][1]["tasks"], rows[3:7:2], strict=True):
        assert row[4].startswith(f"{100 * task['accuracy']:.1f} %")
        assert row[5].startswith(f"{100 * task['difference']['delta']:+.1f} [")
    page = (tmp_path / "report/report.html").read_text()
    assert page.count("<svg") == 1
    assert "DeFineMed-Qwen2.5-7B" in page


def test_a_run_goes_on_and_only_as_itself(world, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    original, calls = knowledge.score, []

    def interrupted(lm, task, *rest):
        if calls:
            raise KeyboardInterrupt
        calls.append(task.name)
        return original(lm, task, *rest)

    monkeypatch.setattr(knowledge, "score", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *flags(world, out, "a"))
    assert stop.value.code == 130
    assert not (out / "results.json").exists()
    assert sorted(p.name for p in (out / "samples" / "a").iterdir()) == ["one.jsonl"]

    again = []
    monkeypatch.setattr(
        knowledge, "score", lambda lm, task, *rest: again.append(task.name) or original(lm, task, *rest)
    )
    run(monkeypatch, *flags(world, out, "a"))
    assert again == ["two"]
    capsys.readouterr()
    with pytest.raises(SystemExit, match="belongs to a run with shots = 2, this one 1"):
        run(monkeypatch, *flags(world, out, "a", shots=1))
    with pytest.raises(SystemExit, match="belongs to a run with models"):
        run(monkeypatch, *flags(world, out, "b"))


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
                assert [p for p, _ in a["filtered_resps"]] == pytest.approx(
                    [p for p, _ in b["filtered_resps"]], abs=1e-4
                )
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
    "answer 4 is none of its options": lambda q: q.update(answer=4),
    "answer -1 is none of its options": lambda q: q.update(answer=-1),
    "answer is 'A', expected int": lambda q: q.update(answer="A"),
    "option 1 is empty": lambda q: q["options"].__setitem__(1, " "),
    "two options are the same": lambda q: q["options"].__setitem__(1, "ja"),
    "question is empty": lambda q: q.update(question=" "),
    "id 'q0' stands there twice": lambda q: q.update(id="q0"),
    "has 5 options, one asks for 4": lambda q: q["options"].append("doch"),
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_damaged_question_stops_the_run_before_the_model_is_loaded(message, world, tmp_path, monkeypatch):
    (tmp_path / "tasks").mkdir()
    questions = json.loads(json.dumps(QUESTIONS))
    FAULTS[message](questions[3])
    write_task(tmp_path / "tasks", "one", write_jsonl(tmp_path / "one.jsonl", questions), world / "dev.jsonl")
    monkeypatch.setattr(knowledge, "load_decoder", lambda *_: pytest.fail("loaded"))
    argv = [world / "a", "--task-path", tmp_path / "tasks", "--tasks", "one", "--out", tmp_path / "out"]
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *argv)
    text = stop.value.code
    assert text.startswith(f"error: {tmp_path / 'one.jsonl'}: ")
    assert message in text
    assert "\n" not in text
    assert "line 4" in text or "q3" in text


def test_bad_command_lines_end_in_one_line(world, tmp_path, monkeypatch):
    out = tmp_path / "out"
    used = tmp_path / "used"
    used.mkdir()
    (used / "letter.txt").write_text("")
    for argv, message in (
        (flags(world, out, "a", tasks="nix"), r"--tasks nix: no such task; .*medizin_de"),
        (flags(world, out, "a", tasks="both,one"), "one is named twice"),
        (flags(world, out, "a", shots=9), r"dev\.jsonl: has 5 questions, --shots 9"),
        (flags(world, out, "a", shots=-1), "--shots -1: expected a positive number"),
        (flags(world, out, "a", "a"), "the name 'a' is taken"),
        (flags(world, out, "nowhere"), "neither a local folder nor a hub id"),
        (flags(world, out, "a", tasks="german_medical"), "make it with: python eval.py convert mmlux SRC"),
        (flags(world, used, "a"), "not empty and not an evaluation's"),
        ([*flags(world, out, "a"), "--chat"], "has no chat template"),
    ):  # fmt: skip
        with pytest.raises(SystemExit, match=message) as stop:
            run(monkeypatch, *argv)
        assert stop.value.code.startswith("error: ")
        assert "\n" not in stop.value.code
        assert not out.exists()


def test_a_task_of_another_layout_is_lm_eval_s_alone(world, tmp_path, monkeypatch):
    rows = [{"goal": q["question"], "sol": q["options"][:2], "label": q["answer"] % 2} for q in QUESTIONS]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "goals.parquet")
    config = {"task": "goals", "dataset_path": "parquet", "test_split": "test", "output_type": "multiple_choice",
              "dataset_kwargs": {"data_files": {"test": str(tmp_path / "goals.parquet")}}, "doc_to_text": "{{goal}}",
              "doc_to_choice": "{{sol}}", "doc_to_target": "label", "fewshot_split": "test"}  # fmt: skip
    (tmp_path / "goals.yaml").write_text(yaml.safe_dump(config))
    argv = ("--tasks", "goals", "--task-path", tmp_path, "--shots", 1)
    run(monkeypatch, world / "a", *argv, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert found["models"][0]["tasks"][0]["n"] == len(QUESTIONS)
    assert f"--include_path {tmp_path} --tasks goals" in found["lm_eval"][0]
    (tmp_path / "goals.parquet").unlink()
    with pytest.raises(SystemExit, match=r"goals\.parquet"):
        run(monkeypatch, world / "a", *argv, "--out", tmp_path / "none")


def test_through_a_chat_template(world, tmp_path, monkeypatch):
    folder = tmp_path / "chatty"
    folder.mkdir()
    for path in (world / "a").iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{m.role}}>{{m.content}}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    run(monkeypatch, folder, "--task-path", world / "tasks", "--tasks", "one", "--shots", 1, "--chat", "--cue", "Answer:",
        "--out", tmp_path / "out")  # fmt: skip
    line = knowledge.read_samples(tmp_path / "out" / "samples" / "chatty" / "one.jsonl")[0]
    assert line["prompt"].count("<user>Frage:") == 2
    assert line["prompt"].endswith("Answer:\n<assistant>")
    assert "Antwort" not in line["prompt"]
    assert line["options"] == ["A", "B", "C", "D"]


def test_record_is_torn_by_nothing(tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", QUESTIONS)
    out = tmp_path / "run"
    assert not record.open_run(out, "judge", {"x": 1}, [data])
    assert not record.open_run(out, "judge", {"x": 1}, [data])  # goes on
    record.finish_run(out, {"n": 3})
    assert record.open_run(out, "judge", {"x": 1}, [data])
    with pytest.raises(InputError, match="x = 1, this one 2"):
        record.open_run(out, "judge", {"x": 2}, [data])
    with pytest.raises(InputError, match="holds a run of judge, not of generate"):
        record.open_run(out, "generate", {"x": 1}, [data])
    write_jsonl(data, QUESTIONS[:3])
    with pytest.raises(InputError, match=r"with data .*d\.jsonl"):
        record.open_run(out, "judge", {"x": 1}, [data])
    assert fault(QUESTIONS[0]) is None
