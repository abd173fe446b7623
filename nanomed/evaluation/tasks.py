"""Tasks: lm-eval's YAML files, found, checked and prepared.

A task of ours is a YAML file on JSONL files (`data/tasks`). lm-eval reads the same file, but on a damaged question it fails
with a stack trace or, worse, gives a number. So questions are checked here first, and lm-eval gets a YAML of this run's own:
absolute paths, the shots written out, the cue as given. It is kept in the run's folder, and `lm-eval run --include_path` on
it repeats exactly these prompts with any other model class.
"""

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml
from lm_eval.tasks import TaskManager

from nanomed import InputError
from nanomed.evaluation.questions import read_questions

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "data" / "tasks"
CUES = ("Antwort:", "Answer:")


@dataclass(frozen=True)
class Task:
    """A leaf: one set of questions."""

    name: str
    config: dict  # its YAML, includes merged; empty for a task of lm-eval's own
    test: Path | None  # questions; None: lm-eval loads them
    dev: Path | None  # questions with answers for shots

    @property
    def files(self) -> list[Path]:
        """The files that its score depends on."""
        return [path for path in (self.test, self.dev) if path]

    @property
    def source(self) -> str:
        """Where its questions are."""
        return str(self.test) if self.test else "lm-eval"


@dataclass(frozen=True)
class Group:
    """Tasks and groups under one name."""

    name: str
    children: tuple
    by_size: bool  # mean over questions; else over children

    def tasks(self) -> list[Task]:
        """The leaves, in order."""
        return [t for c in self.children for t in (c.tasks() if isinstance(c, Group) else [c])]


@cache
def manager(folders: tuple[Path, ...], defaults: bool) -> TaskManager:
    """lm-eval's index of the tasks in the folders, and with defaults of its own 14,000 (9 seconds, hence cached)."""
    return TaskManager(include_path=list(folders), include_defaults=defaults)


def find_tasks(names: list[str], folders: list[Path], defaults: bool) -> Group:
    """The wanted tasks and groups as one group: the one asked for, or one without a name.

    defaults: also lm-eval's own. InputError for an unknown name.
    """
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"--task-path {folder}: no such folder")
    index = manager(tuple(folders), defaults).task_index
    found = [_find(name, index) for name in names]
    group = found[0] if len(found) == 1 and isinstance(found[0], Group) else Group("", tuple(found), False)
    leaves = [task.name for task in group.tasks()]
    if twice := [name for name in leaves if leaves.count(name) > 1]:
        raise InputError(f"--tasks: {twice[0]} is named twice")
    return group


def _find(name: str, index: dict) -> Task | Group:
    if name not in index:
        ours = ", ".join(sorted(n for n, entry in index.items() if entry.yaml_path and FOLDER in entry.yaml_path.parents))
        raise InputError(f"--tasks {name}: no such task; --include-defaults adds lm-eval's own, and ours are {ours}")
    entry = index[name]
    config = entry.cfg or {}
    if "group" in config:
        members = [m if isinstance(m, str) else m.get("task", m.get("group")) for m in config["task"]]
        sized = all(metric.get("weight_by_size", True) for metric in config.get("aggregate_metric_list") or [])
        return Group(name, tuple(_find(m, index) for m in members), sized)
    if entry.tags and entry.yaml_path is None:
        return Group(name, tuple(_find(m, index) for m in sorted(entry.tags)), False)
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    if config.get("dataset_path") != "json" or not isinstance(files, dict):
        return Task(name, {}, None, None)
    test, dev = (files.get(config.get(split)) for split in ("test_split", "fewshot_split"))
    if test is None:
        raise InputError(f"{entry.yaml_path}: data_files has no {config.get('test_split')!r}, which test_split names")
    return Task(name, config, _locate(test), _locate(dev) if dev else None)


def _locate(name: str) -> Path:
    """A path in a YAML file: as it is, else relative to the clone's root."""
    for path in (Path(name), ROOT / name):
        if path.is_file():
            return path.resolve()
    source = next((s for s in ("global_mmlu", "mmmlu", "mmlux", "bioinstructqa", "medqa") if f"_{s}" in Path(name).name), None)
    hint = f"; make it with: python eval.py convert {source.replace('_', '-')} SRC" if source else ""
    raise InputError(f"{name}: no such file{hint}")


# --- the run's own YAML --------------------------------------------------------------------------------------------


def shots_of(task: Task, n_shots: int, seed: int) -> list[dict]:
    """The first n_shots of the dev questions: seed 0 in order, others shuffled. The same before every question."""
    if not n_shots:
        return []
    if task.dev is None:
        raise InputError(f"{task.name}: has no fewshot_split, hence no shots; use --shots 0")
    pool = read_questions(task.dev)
    if len(pool) < n_shots:
        raise InputError(f"{task.dev}: has {len(pool)} questions, --shots {n_shots} asks for more")
    if seed:
        random.Random(seed).shuffle(pool)
    return pool[:n_shots]


def prepared(task: Task, n_shots: int, seed: int, cue: str) -> dict:
    """The self-contained configuration of one seed. InputError if a question or the task does not allow it."""
    letters = task.config.get("doc_to_choice")
    for question in read_questions(task.test):
        if isinstance(letters, list) and len(letters) != len(question["options"]):
            raise InputError(
                f"{task.test}: {question['id']} has {len(question['options'])} options, {task.name} asks for {len(letters)}"
            )
    config = {key: value for key, value in task.config.items() if key not in ("fewshot_split", "fewshot_config")}
    config["dataset_kwargs"] = {"data_files": {config["test_split"]: str(task.test)}}
    config["num_fewshot"] = n_shots
    if shots := shots_of(task, n_shots, seed):
        config["fewshot_config"] = {"sampler": "first_n", "samples": shots}
    if cue != CUES[0]:
        if not config["doc_to_text"].endswith(CUES[0]):
            raise InputError(f"{task.name}: its prompt does not end in {CUES[0]!r}, so --cue cannot change it")
        config["doc_to_text"] = config["doc_to_text"].removesuffix(CUES[0]) + cue
    return config


def write_task(config: dict, folder: Path) -> None:
    """FOLDER/NAME.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config, allow_unicode=True, sort_keys=False)
    (folder / f"{config['task']}.yaml").write_text(text, encoding="utf-8")
