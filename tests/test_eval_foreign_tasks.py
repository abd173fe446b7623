"""Tasks that are not of our layout: whatever lm-eval runs, runs, and the printed command gives the same prompts and scores."""

import json
import shlex
import sys
from functools import partialmethod
from pathlib import Path

import pytest
import yaml
from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks import TaskManager

from conftest import ROOT
from eval_command import fixture_command, refused  # noqa: F401
from knowledge_world import QUESTIONS, fixture_world, run, write_jsonl  # noqa: F401
from nanomed.evaluation import finding, tasks
from nanomed.evaluation.knowledge import read_samples

ROWS = [{"frage": q["question"], "wahl": q["options"], "loesung": q["answer"]} for q in QUESTIONS]
PLAIN = {
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "doc_to_text": "{{frage}}\nAntwort:",
    "doc_to_choice": "{{wahl}}",
    "doc_to_target": "loesung",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
CODE = """
from lm_eval.api.task import ConfigurableTask


def to_text(doc):
    return doc["frage"].upper() + " Antwort:"


def backwards(docs):
    return docs.select(range(len(docs) - 1, -1, -1))


class Own(ConfigurableTask):
    def __init__(self, config):
        super().__init__(config={key: value for key, value in config.items() if key != "class"})
"""


@pytest.fixture(name="folder")
def fixture_folder(tmp_path):
    """Tasks of a user's own, in a folder whose name has a space."""
    folder = tmp_path / "my tasks"
    folder.mkdir()
    one, two = (str(write_jsonl(folder / f"{name}.jsonl", rows)) for name, rows in (("one", ROWS[:7]), ("two", ROWS[7:])))
    (folder / "utils.py").write_text(CODE)

    def add(name: str, splits: dict, data, text: str = "", **more) -> None:
        config = PLAIN | {"task": name, "dataset_kwargs": {"data_files": data}} | splits | more
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config) + text)

    test = {"test_split": "test"}
    add("validation", {"validation_split": "validation"}, {"validation": one})
    add("files", test, {"test": [one, two]})
    add("pattern", test, {"test": str(folder / "*.jsonl")})
    add("train", {"test_split": "train"}, one)
    add("drawn", {**test, "fewshot_split": "dev"}, {"test": one, "dev": two})
    add("first", {**test, "fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"}}, {"test": one, "dev": two})
    add("function", test, {"test": one}, "doc_to_text: !function utils.to_text\nprocess_docs: !function utils.backwards\n")
    add("class", test, {"test": one}, "class: !function utils.Own\n")
    add("mutual", test, {"test": one}, metric_list=[{"metric": m, "aggregation": "mean"} for m in ("acc_mutual_info", "acc")])
    add("tagged-a", test, {"test": one}, tag="both-tagged")
    add("tagged-b", test, {"test": two}, tag="both-tagged")
    inline = PLAIN | test | {"task": "leaf", "dataset_kwargs": {"data_files": {"test": one}}}
    group = {"group": "outer", "task": [{"group": "inner", "task": ["files", {"task": "first", "num_fewshot": 1}]}, inline]}
    (folder / "outer.yaml").write_text(yaml.safe_dump(group))
    (folder / "pair.yaml").write_text(yaml.safe_dump({"group": "pair", "task": ["validation", "files"]}))
    return folder


def samples_of(out: Path) -> dict[str, list[dict]]:
    """Task → samples of our run."""
    return {path.stem: read_samples(path) for path in sorted(out.glob("samples/*/*.jsonl"))}


KINDS = ["validation", "files", "pattern", "train", "drawn", "first", "function", "class", "mutual", "both-tagged", "outer", "pair"]


@pytest.mark.parametrize("name", [*KINDS, "drawn,function,first", "tagged-*"])
def test_the_printed_command_gives_the_same(name, folder, world, tmp_path, monkeypatch):
    """Prompts, shots and scores, through lm-eval's own command line and its hf model."""
    out = tmp_path / "out"
    run(monkeypatch, world / "a", "--task-path", folder, "--tasks", name, "--shots", 2, "--out", out)
    found = json.loads((out / "results.json").read_text())
    [command] = found["lm_eval"]
    monkeypatch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))  # 9 s less
    words = [*shlex.split(command), "--device", "cpu", "--log_samples", "--output_path", str(tmp_path / "theirs")]
    monkeypatch.setattr(sys, "argv", words)
    cli_evaluate()
    ours = samples_of(out)
    theirs = {p.name.removeprefix("samples_").rsplit("_", 1)[0]: read_samples(p) for p in tmp_path.glob("theirs/*/samples_*")}
    assert ours.keys() == {task["task"] for task in found["models"][0]["tasks"]}
    assert len(ours) == len(theirs)
    for task, lines in ours.items():
        peers = theirs[task] if task in theirs else next(v for k, v in theirs.items() if k.endswith(task.rpartition("::")[2]))
        assert len(lines) == len(peers)
        for mine, peer in zip(lines, sorted(peers, key=lambda x: x["doc_id"]), strict=True):
            arguments = peer["arguments"]
            arguments = [arguments[f"gen_args_{i}"] for i in range(len(arguments))]
            assert mine["prompt"] == arguments[0]["arg_0"]
            assert mine["options"] == [a["arg_1"] for a in arguments][: len(mine["options"])]
            assert mine["log_p"] == pytest.approx([float(r[0]) for r in peer["filtered_resps"]][: len(mine["options"])], abs=1e-4)
            assert mine["correct"] == peer[mine["metric"]]


def test_every_kind_of_seed_draws_other_shots(folder, world, tmp_path, monkeypatch):
    run(
        monkeypatch,
        world / "a",
        "--task-path",
        folder,
        "--tasks",
        "drawn,first",
        "--shots",
        2,
        "--seeds",
        2,
        "--out",
        tmp_path / "out",
    )
    for lines in samples_of(tmp_path / "out").values():
        prompts = [{line["prompt"] for line in lines if line["seed"] == seed} for seed in (0, 1)]
        assert prompts[0] != prompts[1]


def test_a_task_without_shots_by_its_own_rule_says_so(folder, world, tmp_path, monkeypatch, capsys):
    path = folder / "first.yaml"
    path.write_text(path.read_text() + "num_fewshot: 0\n")
    how = ("--tasks", "first,drawn", "--shots", 2, "--out", tmp_path / "out")
    run(monkeypatch, world / "a", "--task-path", folder, *how)
    entries = json.loads((tmp_path / "out/results.json").read_text())["models"][0]["tasks"]
    assert [entry["shots"] for entry in entries] == [0, 2]
    assert "a: first, shots 0, seed 0" in capsys.readouterr().err


def test_mutual_information_counts_an_option_once(folder, world, tmp_path, monkeypatch):
    rows = [row | {"wahl": row["wahl"][:2], "loesung": row["loesung"] % 2} for row in ROWS[:6]]
    write_jsonl(folder / "one.jsonl", rows)
    run(monkeypatch, world / "a", "--task-path", folder, "--tasks", "mutual", "--shots", 0, "--out", tmp_path / "out")
    [entry] = json.loads((tmp_path / "out/results.json").read_text())["models"][0]["tasks"]
    assert (entry["metric"], entry["chance"]) == ("acc_mutual_info", 0.5)
    for line in samples_of(tmp_path / "out")["mutual"]:
        assert len(line["options"]) == len(line["log_p"]) == 2
        assert line["correct"] == (line["chosen"] == line["gold"])


def test_the_first_metric_that_says_right_or_wrong_is_taken(folder, world, tmp_path, monkeypatch, command):
    lm = {"output_type": "loglikelihood", "doc_to_choice": None, "doc_to_target": "{{wahl[loesung]}}"}
    path, metrics = folder / "validation.yaml", [{"metric": m, "aggregation": "mean"} for m in ("perplexity", "acc")]
    config = yaml.safe_load(path.read_text())
    argv = (world / "a", "--task-path", folder, "--tasks", "validation", "--shots", 0)
    path.write_text(yaml.safe_dump(config | lm | {"metric_list": metrics}))
    run(monkeypatch, *argv, "--out", tmp_path / "out")
    [entry] = json.loads((tmp_path / "out/results.json").read_text())["models"][0]["tasks"]
    assert (entry["metric"], entry["chance"]) == ("acc", None)
    path.write_text(yaml.safe_dump(config | lm | {"metric_list": metrics[:1]}))
    assert "none of its metrics (perplexity) is 0 or 1" in refused(command, "knowledge", *argv, "--out", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_what_a_task_does_wrong_is_one_line(folder, world, tmp_path, command):
    argv = ("knowledge", world / "a", "--task-path", folder, "--out", tmp_path / "out", "--shots", 1)
    (folder / "utils.py").write_text(CODE.replace('doc["frage"]', 'doc["Frage"]'))
    assert "function: lm-eval cannot load it (KeyError: 'Frage')" in refused(command, *argv, "--tasks", "function")
    (folder / "utils.py").write_text("import nix_und_nirgends\n")
    assert "function: lm-eval cannot load it" in refused(command, *argv, "--tasks", "function")
    assert "first: lm-eval cannot score it" in refused(command, *argv[:-1], 9, "--tasks", "first")  # of five
    assert "--cue Answer:: the prompt of first is its own" in refused(command, *argv, "--tasks", "first", "--cue", "Answer:")
    assert not (tmp_path / "out").exists()


def test_a_yaml_file_may_be_named_itself(folder, world, tmp_path, monkeypatch):
    run(monkeypatch, world / "a", "--tasks", folder / "pair.yaml", "--shots", 0, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert found["models"][0]["group"]["name"] == "pair"
    assert f"--include_path '{folder}' --tasks pair" in found["lm_eval"][0]


def test_a_changed_task_is_another_run(folder, world, tmp_path, monkeypatch, command):
    argv = (world / "a", "--task-path", folder, "--tasks", "function", "--shots", 0, "--out", tmp_path / "out")
    run(monkeypatch, *argv)
    assert "already finished" in command("knowledge", *argv)[1]
    (folder / "utils.py").write_text(CODE.replace("upper", "lower"))
    assert "belongs to a run with tasks function doc_to_text" in refused(command, "knowledge", *argv)


@pytest.mark.parametrize(("wrong", "near"), [("medizin", "medizin_de"), ("medizin-de", "medizin_de"), ("oute", "outer")])
def test_did_you_mean(wrong, near, folder, world, tmp_path, command):
    argv = ("knowledge", world / "a", "--task-path", folder, "--out", tmp_path / "out")
    line = refused(command, *argv, "--tasks", wrong)
    assert f"--tasks {wrong}: no such task; did you mean {near}" in line
    assert len(line) < 250


def test_every_name_of_lm_eval_s_own_is_understood():
    """Groups in groups, tags, tasks with settings of their own, classes: which of ours are below is found for all 14,000."""
    finder = finding.Finder([ROOT / "data" / "tasks"], True)
    assert len(finder.index) > 14_000
    for name in [n for n, entry in finder.index.items() if entry.yaml_path and tasks.FOLDER in entry.yaml_path.parents]:
        del finder.index[name]  # those whose questions are not here
    assert finder.ours(list(finder.index)) == {}
