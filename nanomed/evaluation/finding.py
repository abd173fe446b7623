"""Tasks and groups, found and loaded by lm-eval: whatever runs there runs here.

Only those of ours (nanomed.evaluation.tasks) are read here before: their questions are checked, and lm-eval gets their prepared
configuration in the place of their YAML file.
"""

import dataclasses
import difflib
import inspect
import json
import random
from collections.abc import Iterator
from pathlib import Path

import lm_eval.api.group
import numpy as np
import torch
import yaml
from lm_eval.api.samplers import FirstNSampler
from lm_eval.tasks import TaskManager

from nanomed import InputError, first_line
from nanomed.evaluation.tasks import FOLDER, Group, Task, as_list, eval_split, locate

PACKAGE = Path(lm_eval.__file__).resolve().parent
LAYOUT = FOLDER / "letters.yaml"  # what a task of ours includes


class Finder:
    """lm-eval's index of the tasks in the folders, and with defaults of its own 14,000, which takes 9 seconds."""

    def __init__(self, folders: list[Path], defaults: bool):
        for folder in folders:
            if not folder.is_dir():
                raise InputError(f"--task-path {folder}: no such folder")
        self.folders = folders
        self.manager = TaskManager(include_path=list(folders), include_defaults=defaults)
        self.index = self.manager.task_index
        self.defaults = defaults

    def names(self, wanted: list[str]) -> list[str]:
        """The wanted names of tasks, groups and tags; a pattern stands for all that match it, a YAML file for its task.

        InputError for what is not there, with the names that come nearest.
        """
        return list(dict.fromkeys(name for text in wanted for name in self._named(text)))

    def _named(self, text: str) -> list[str]:
        path = Path(text)
        if path.suffix == ".yaml" and path.is_file():
            self.index |= TaskManager(include_path=path.parent, include_defaults=False).task_index
            return [name for name, entry in self.index.items() if entry.yaml_path == path.resolve()]
        if found := [text] if text in self.index else self.manager.match_tasks([text]):
            return found
        near = difflib.get_close_matches(text, self.index, n=3, cutoff=0.6)
        ours = sorted(name for name, entry in self.index.items() if entry.yaml_path and FOLDER in entry.yaml_path.parents)
        ours = [name for name in ours if not name.startswith("mmlu_de_") or name.count("_") <= 3]  # no subjects of MMLU
        said = f"did you mean {' or '.join(near)}?" if near else f"ours are {', '.join(ours)}"
        more = "" if self.defaults else "; --include-defaults adds lm-eval's own"
        raise InputError(f"--tasks {text}: no such task; {said}{more}")

    def ours(self, names: list[str]) -> dict[str, Task]:
        """Of the tasks that the names stand for, those of ours. InputError where one has no files or damaged questions."""
        found = {name: self._ours(name) for name in dict.fromkeys(self._below(names, set()))}
        return {name: task for name, task in found.items() if task}

    def _below(self, names: list, seen: set[str]) -> Iterator[str]:
        """Every registered task below these names or inline groups."""
        for item in names:
            if isinstance(item, dict):  # a group within a group, or a task with settings of its own
                members = item.get("group") if item.get("group") in self.index else item.get("task")
                yield from self._below(members if isinstance(members, list) else [members], seen)
            elif item in self.index and item not in seen:
                seen.add(item)
                entry = self.index[item]
                members = (entry.cfg or {}).get("task")
                if isinstance(members, list):
                    yield from self._below(members, seen)
                elif entry.yaml_path is None:
                    yield from self._below(sorted(entry.tags), seen)
                else:
                    yield item

    def _ours(self, name: str) -> Task | None:
        """The task, if it is one of ours."""
        entry = self.index[name]
        if PACKAGE in entry.yaml_path.parents or LAYOUT not in (sources := yaml_files(entry.yaml_path)):
            return None
        config, data = entry.cfg, (entry.cfg.get("dataset_kwargs") or {}).get("data_files")
        if data is None:
            return None
        data = data if isinstance(data, dict) else {"train": data}
        test, dev = (data.get(split) for split in (eval_split(config), config.get("fewshot_split")))
        if config.get("dataset_path") != "json" or any("!function" in path.read_text(encoding="utf-8") for path in sources):
            return None
        if test is None:
            key = "test_split" if config.get("test_split") else "validation_split"
            raise InputError(f"{entry.yaml_path}: data_files has no {eval_split(config)!r}, which {key} names")
        if not test or not all("://" not in file and "*" not in file for file in [*as_list(test), *as_list(dev)]):
            return None
        return Task(name, config, *(tuple(map(locate, as_list(files))) or None for files in (test, dev)))

    # --- loading ---------------------------------------------------------------------------------------------------

    def load(self, names: list[str], ours: dict[str, dict], n_shots: int, seed: int) -> tuple[dict, list]:
        """(lm-eval's task by name, what each of the names stands for: its tasks and groups).

        ours: the prepared configuration of every task of ours. InputError where lm-eval cannot load one.
        """
        for name, config in ours.items():
            self.index[name] = dataclasses.replace(self.index[name], yaml_path=None, cfg=config)
        random.seed(seed)  # a task may shuffle its options as it is loaded; `lm-eval run --seed` sets these three
        np.random.seed(seed)
        torch.manual_seed(seed)
        leaves, tops = {}, []
        for name in names:
            try:
                loaded = self.manager.load([name])
            except InputError:
                raise
            except Exception as error:  # a task is code: a missing package, file or network, a damaged file, or a bug of its own
                # What datasets says of a damaged file stands in the cause.
                what = "; ".join(f"{type(e).__name__}: {first_line(e)}" for e in (error, error.__cause__) if e)
                raise InputError(f"{name}: lm-eval cannot load it ({what})") from error
            root = loaded["groups"].get(name) if self.index[name].yaml_path else None
            tops.append((name, [root] if root is not None else list(loaded["tasks"].values())))
            for leaf_name, leaf in loaded["tasks"].items():
                if leaf_name in leaves:
                    raise InputError(f"--tasks: {leaf_name} is named twice")
                leaves[leaf_name] = leaf
                if leaf_name not in ours:
                    set_shots(leaf, n_shots, seed)
        if not leaves:
            raise InputError(f"--tasks {','.join(names)}: has no tasks")
        return leaves, tops

    # --- for lm-eval's own command ---------------------------------------------------------------------------------

    def requests(self, tops: list, ours: dict[str, Task], prepared: Path) -> dict[Path | None, list[str]]:
        """Folder that `lm-eval run` must include (None: none) → names to ask for there. prepared: the folder of those of ours."""
        found: dict[Path | None, list[str]] = {}
        for name, items in tops:
            leaves = [leaf.name for item in items for leaf in leaves_of(_node(item, ours))]
            own = [leaf for leaf in leaves if leaf in ours]
            found.setdefault(prepared, []).extend(own)
            others = [leaf for leaf in leaves if leaf not in ours] if own else [name]
            for other in others:
                found.setdefault(self._folder(other), []).append(other)
        return {folder: names for folder, names in found.items() if names}

    def _folder(self, name: str) -> Path | None:
        """Where the task's YAML file is: one of the folders given, or for a file named by itself its own."""
        entry = self.index[name]
        if entry.yaml_path is None:  # a tag: where its first task is
            return self._folder(min(entry.tags))
        if PACKAGE in entry.yaml_path.parents:
            return None
        given = [folder for folder in self.folders if folder.resolve() in entry.yaml_path.resolve().parents]
        return given[0] if given else entry.yaml_path.parent


def leaves_of(node: Task | Group) -> list[Task]:
    """The tasks below it, or itself."""
    return node.tasks() if isinstance(node, Group) else [node]


def group_of(tops: list, ours: dict[str, Task]) -> Group:
    """What was asked for as one group: the one named, or one without a name. tops: of Finder.load."""
    found = []
    for name, items in tops:
        nodes = [_node(item, ours) for item in items]
        is_itself = len(nodes) == 1 and nodes[0].name == name
        found.append(nodes[0] if is_itself else Group(name, tuple(nodes), False))  # else a tag
    return found[0] if len(found) == 1 and isinstance(found[0], Group) else Group("", tuple(found), False)


def _node(item, ours: dict[str, Task]) -> Task | Group:
    """lm-eval's task or group as one of this module."""
    if isinstance(item, lm_eval.api.group.Group):
        by_size = all(metric.weight_by_size for metric in item.aggregate_metric_list or ())
        return Group(item.name, tuple(_node(child, ours) for child in item), by_size)
    return ours.get(item.task_name) or Task(item.task_name, as_json(item.dump_config()), None, None)


def set_shots(leaf, n_shots: int, seed: int) -> None:
    """Shots of a task that is lm-eval's alone: a 0 in its YAML is the task's own rule; a first_n sampler draws from a pool in
    the order on disk, which further seeds shuffle."""
    if leaf.get_config("num_fewshot") != 0:
        leaf.set_config("num_fewshot", n_shots)
    sampler = getattr(leaf, "sampler", None)
    if seed and type(sampler) is FirstNSampler:
        pool = list(sampler.df)
        random.Random(seed).shuffle(pool)
        sampler.replace_df(pool)


def yaml_files(path: Path | None) -> list[Path]:
    """A YAML file and all that it includes, resolved."""
    found: list[Path] = []
    todo = [path] if path else []
    while todo:
        here = todo.pop().resolve()
        if here not in found and here.is_file():
            found.append(here)
            names = yaml.load(here.read_text(encoding="utf-8"), Loader=Tolerant).get("include")
            todo += [here.parent / name for name in as_list(names)]
    return found


class Tolerant(yaml.SafeLoader):
    """Reads lm-eval's YAML without importing what it names."""


Tolerant.add_multi_constructor("!", lambda loader, suffix, node: None)


def as_json(config: dict) -> dict:
    """The configuration with functions as their source code and without where it was read from."""
    plain = json.loads(json.dumps(config, default=_spelled))
    plain.pop("metadata", None)
    return plain


def _spelled(value: object) -> str:
    """A function's source code; of anything else its type."""
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return type(value).__name__
