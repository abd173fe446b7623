"""Tasks, and those of ours prepared for a run.

A task of ours is a YAML file that includes data/tasks/letters.yaml and names local JSONL files. lm-eval reads it too, but on a
damaged question it fails with a stack trace or, worse, gives a number. So its questions are checked first, and lm-eval gets a
configuration of this run's own: absolute paths, the shots written out, the cue as given. It is kept in the run's folder, and
`lm-eval run --include_path` on it repeats exactly these prompts with any other model class.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from nanomed import InputError
from nanomed.evaluation.questions import read_questions

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "data" / "tasks"
CUES = ("Antwort:", "Answer:")
FILES = ("dataset_kwargs", "fewshot_split", "fewshot_config")  # of a task of ours, what `prepared` writes anew


@dataclass(frozen=True)
class Task:
    """A leaf: one set of questions."""

    name: str
    config: dict  # what defines it, JSON-able
    test: tuple[Path, ...] | None  # files of questions; None: lm-eval alone reads them
    dev: tuple[Path, ...] | None  # files of questions with answers for shots

    @property
    def files(self) -> list[Path]:
        """The local files that its score depends on."""
        if self.test is None:
            return list(local_files(self.config.get("dataset_kwargs")))
        return [*self.test, *(self.dev or ())]

    @property
    def source(self) -> str:
        """Where its questions are."""
        return ", ".join(map(str, self.test)) if self.test else "lm-eval"


@dataclass(frozen=True)
class Group:
    """Tasks and groups under one name."""

    name: str
    children: tuple
    by_size: bool  # mean over questions; else over children

    def tasks(self) -> list[Task]:
        """The leaves, in order."""
        return [t for c in self.children for t in (c.tasks() if isinstance(c, Group) else [c])]


def local_files(value) -> Iterator[Path]:
    """The existing files that a part of a configuration names."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from local_files(item)
    elif isinstance(value, str) and len(value) < 1000 and Path(value).is_file():
        yield Path(value).resolve()


def locate(name: str) -> Path:
    """A path in a YAML file: as it is, else relative to the clone's root."""
    for path in (Path(name), ROOT / name):
        if path.is_file():
            return path.resolve()
    source = next((s for s in ("global_mmlu", "mmmlu", "mmlux", "bioinstructqa", "medqa") if f"_{s}" in Path(name).name), None)
    hint = f"; make it with: python eval.py convert {source.replace('_', '-')} SRC" if source else ""
    raise InputError(f"{name}: no such file{hint}")


def eval_split(config: dict) -> str | None:
    """The split that lm-eval scores."""
    return config.get("test_split") or config.get("validation_split")


def as_list(value) -> list:
    """One or several, as YAML may have it."""
    return [] if value is None else value if isinstance(value, list) else [value]


def shots_of(task: Task, n_shots: int, seed: int) -> list[dict]:
    """The first n_shots of the dev questions: seed 0 in order, others shuffled. The same before every question."""
    if not n_shots:
        return []
    if task.dev is None:
        raise InputError(f"{task.name}: has no fewshot_split, hence no shots; use --shots 0")
    pool = [question for path in task.dev for question in read_questions(path)]
    if len(pool) < n_shots:
        raise InputError(f"{task.dev[0]}: has {len(pool)} questions, --shots {n_shots} asks for more")
    if seed:
        random.Random(seed).shuffle(pool)
    return pool[:n_shots]


def prepared(task: Task, n_shots: int, seed: int, cue: str) -> dict:
    """The self-contained configuration of one seed. InputError if a question or the task does not allow it."""
    letters = task.config.get("doc_to_choice")
    for path in task.test:
        for question in read_questions(path):
            if isinstance(letters, list) and len(letters) != len(question["options"]):
                raise InputError(
                    f"{path}: {question['id']} has {len(question['options'])} options, {task.name} asks for {len(letters)}"
                )
    config = {key: value for key, value in task.config.items() if key not in FILES}
    files = [str(path) for path in task.test]
    config["dataset_kwargs"] = {"data_files": {eval_split(config): files[0] if len(files) == 1 else files}}
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
