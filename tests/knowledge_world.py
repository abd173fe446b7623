"""Two models, two tasks of a dozen questions, and eval.py knowledge in this process. No test itself."""

import json
import sys

import pytest
import torch
import yaml
from transformers import LlamaConfig

import eval as command_line
from conftest import ROOT, SENTENCES, save_reference
from nanomed import run_script
from test_eval_scorer import TINY, write_tokenizer

QUESTIONS = [
    {"id": f"q{i}", "question": SENTENCES[i % 6], "options": ["ja", "nein", "nie", "immer"], "answer": i % 4} for i in range(12)
]


def write_jsonl(path, lines):
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def write_task(folder, name, test, dev, include="letters.yaml", **more):
    config = {"include": str(ROOT / "data" / "tasks" / include), "task": name,
              "dataset_kwargs": {"data_files": {"test": str(test), "dev": str(dev)}}}  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config | more), encoding="utf-8")


@pytest.fixture(name="world", scope="module")
def fixture_world(tmp_path_factory):
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
    run_script(command_line.main)


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
