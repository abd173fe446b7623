"""From samples to numbers: accuracy, interval, letters, calibration, and the difference to the first model.

A question's value is the share of shot seeds in which it was answered correctly; intervals and tests are over questions.
With one seed the test of a difference is McNemar's exact one, with several its generalisation to such shares.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nanomed import InputError
from nanomed.evaluation import stats
from nanomed.evaluation.tasks import Group, Task

Samples = list[dict]


def results(
    group: Group,
    models: dict[str, Path],
    seeds: list[int],
    args: argparse.Namespace,
    samples: Callable[[str, Task], Samples],
) -> dict:
    """What results.json holds: every model's tasks and group."""
    found, first, first_values = [], None, {}
    for name, path in models.items():
        values, entries = {}, []
        for task in group.tasks():
            own = samples(name, task)
            values[task.name] = per_question(own)
            reference = (first, samples(first, task)) if first else None
            entries.append(task_entry(task, own, seeds, args, reference))
        average = None
        if group.name:  # an average of tasks named one by one means nothing
            difference = {"to": first} | group_difference(group, values, first_values) if first else None
            chances, sizes = ({entry["task"]: entry[key] for entry in entries} for key in ("chance", "n"))
            chance = None if None in chances.values() else _macro(group, chances, sizes)
            average = group_entry(group, values) | {"chance": chance, "difference": difference}
        if first is None:
            first, first_values = name, values
        found.append({"name": name, "path": str(path), "tasks": entries, "group": average})
    return {"models": found, "samples": "samples/<name>/<task>.jsonl"}


def per_question(samples: Samples) -> np.ndarray:
    """(n,) The value of every question, in order. Samples are seed after seed, the same questions in each; not found by their
    ids, which in a foreign data set may repeat."""
    n_seeds = len({sample["seed"] for sample in samples})
    if len(samples) % n_seeds:
        raise InputError("the samples of a task are not the same questions for every seed; delete the run's samples/ and repeat it")
    return np.reshape([sample["correct"] for sample in samples], (n_seeds, -1)).mean(0)


def task_entry(task: Task, own: Samples, seeds: list[int], args: argparse.Namespace, reference) -> dict:
    """One model's numbers on one task. reference: (name, samples) of the first model; None for the first itself."""
    values = per_question(own)
    accuracy, difference = float(values.mean()), None
    if reference:
        delta, interval, p = stats.compare(values - per_question(reference[1]))
        difference = {"to": reference[0], "delta": delta, "ci": interval, "mcnemar_p": p}
    per_seed = [{"seed": s, "accuracy": float(np.mean([x["correct"] for x in own if x["seed"] == s]))} for s in seeds]
    confidence = confidences(own)
    return {
        "task": task.name, "source": task.source, "n": len(values), "metric": own[0]["metric"], "accuracy": accuracy,
        "ci": stats.score_interval(values, 0, 1), "chance": chance_of(own),
        "shots": args.shots if task.test else task.config.get("num_fewshot", args.shots), "seeds": per_seed,
        "cue": args.cue, "chat": args.chat,
        "letters": letters(own), "by_letter": by_letter(own), "cut": sum(x["cut"] for x in own),
        "ece": None if confidence is None else stats.calibration_error(*confidence),
        "reliability": None if confidence is None else [list(bin_) for bin_ in stats.reliability(*confidence)],
        "difference": difference,
    }  # fmt: skip


def chance_of(samples: Samples) -> float | None:
    """The accuracy of blind guessing: right options / options, its mean over questions; None where there are no options."""
    if "options" not in samples[0]:
        return None
    return float(np.mean([len(set(s.get("golds", [0]))) / len(s["options"]) for s in samples]))


def by_letter(samples: Samples) -> bool:
    """Whether the options scored are letters, the text that they stand for being in the prompt."""
    return "options" in samples[0] and all(len(option.strip()) == 1 for option in samples[0]["options"])


def letters(samples: Samples) -> dict | None:
    """How often each place is right and how often it is chosen: shows a preference for a letter."""
    if not all("gold" in s for s in samples):  # no options, or several that are right
        return None
    n = max(len(s["options"]) for s in samples)
    return {key: [sum(s[key] == i for s in samples) for i in range(n)] for key in ("gold", "chosen")}


def confidences(samples: Samples) -> tuple[np.ndarray, np.ndarray] | None:
    """(probability of the chosen option among the options, right?) of every sample; None if scores are not probabilities."""
    if "log_p" not in samples[0] or samples[0]["metric"] != "acc":
        return None
    odds = [np.exp(np.array(s["log_p"]) - max(s["log_p"])) for s in samples]
    return np.array([o.max() / o.sum() for o in odds]), np.array([s["correct"] for s in samples])


# --- groups --------------------------------------------------------------------------------------------------------


def value(node: Group | Task, means: dict, sizes: dict):
    """A node's number: a task's mean; of a group the mean over its children or over all its questions."""
    if isinstance(node, Task):
        return means[node.name]
    if node.by_size:
        leaves = node.tasks()
        return sum(means[t.name] * sizes[t.name] for t in leaves) / sum(sizes[t.name] for t in leaves)
    return sum(value(child, means, sizes) for child in node.children) / len(node.children)


def _macro(group: Group, means: dict, sizes: dict):
    return value(Group(group.name, group.children, False), means, sizes)


def group_entry(group: Group, values: dict[str, np.ndarray]) -> dict:
    """macro: mean over the group's children, as the paper's average; micro: over all questions. ci: of macro."""
    sizes = {name: len(v) for name, v in values.items()}
    means = {name: float(v.mean()) for name, v in values.items()}
    micro = value(Group(group.name, group.children, True), means, sizes)
    ci = macro_interval(group, means, {name: stats.score_interval(v, 0, 1) for name, v in values.items()}, sizes)
    return {"name": group.name, "macro": _macro(group, means, sizes), "micro": micro, "ci": ci,
            "children": [c.name for c in group.children]}  # fmt: skip


def group_difference(group: Group, values: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> dict:
    """Difference of macro to the first model's, questions paired."""
    sizes = {name: len(v) for name, v in values.items()}
    differences = {name: np.asarray(v) - reference[name] for name, v in values.items()}
    means = {name: float(d.mean()) for name, d in differences.items()}
    intervals = {name: stats.score_interval(d, -1, 1) for name, d in differences.items()}
    return {"delta": _macro(group, means, sizes), "ci": macro_interval(group, means, intervals, sizes)}


def macro_interval(group: Group, means: dict, intervals: dict, sizes: dict) -> tuple[float, float]:
    """95 % interval of macro; it combines the tasks' intervals, whose errors are independent: each side is the root of the sum
    of their squares (MOVER, Zou and Donner 2008). So a task without any spread, as between two models that answer alike,
    still contributes its own interval."""
    weights = {name: _macro(group, {**dict.fromkeys(means, 0.0), name: 1.0}, sizes) for name in means}
    low, high = (math.hypot(*(weights[n] * (intervals[n][i] - means[n]) for n in means)) for i in (0, 1))
    middle = _macro(group, means, sizes)
    return middle - low, middle + high


# --- the console ---------------------------------------------------------------------------------------------------


def table(found: dict) -> str:
    """Accuracy in per cent with its 95 % interval, that of guessing, and the difference to the first model."""
    lines = [f"{'model':20} {'task':32} {'n':>5} {'accuracy, 95 % interval':>25} {'chance':>7}   "
             "difference to the first, exact p"]  # fmt: skip
    for model in found["models"]:
        for entry in model["tasks"]:
            low, high = entry["ci"]
            text = f"{entry['accuracy']:6.1%}  [{low:5.1%}, {high:5.1%}]"
            spread = [s["accuracy"] for s in entry["seeds"]]
            more = f"  seeds {min(spread):.1%} to {max(spread):.1%}" if len(spread) > 1 else ""
            start = f"{model['name'][:20]:20} {entry['task'][:32]:32} {entry['n']:5}"
            lines.append(f"{start} {text:>25} {_percent(entry['chance'])}   {_signed(entry)}{more}")
        if group := model["group"]:
            low, high = group["ci"]
            text = f"{group['macro']:6.1%}  [{low:5.1%}, {high:5.1%}]"
            start = f"{model['name'][:20]:20} {group['name'] + ', macro':32} {'':5}"
            lines.append(f"{start} {text:>25} {_percent(group['chance'])}   {_signed(group)}")
    return "\n".join(lines)


def _percent(chance: float | None) -> str:
    return f"{'-':>7}" if chance is None else f"{chance:7.1%}"


def _signed(entry: dict) -> str:
    if not (difference := entry["difference"]):
        return "-"
    low, high = difference["ci"]
    p = f", p = {difference['mcnemar_p']:.3g}" if "mcnemar_p" in difference else ""
    return f"{100 * difference['delta']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] points{p}"
