"""Samples of one model on one task: lm-eval builds the prompts and scores the answers, this module keeps what is needed."""

import argparse
import logging
import sys
import traceback
from functools import partial

import datasets
import lm_eval.api.task
import numpy as np
from lm_eval.evaluator import evaluate  # simple_evaluate also lists every installed package, 1.3 s a call
from tqdm import tqdm

from nanomed import InputError, first_line
from nanomed.evaluation import scorer
from nanomed.evaluation.scorer import DecoderLM

PER = {  # metric → what a choice's log-probability is divided by
    "acc_norm": len,
    "acc_bytes": lambda choice: len(choice.encode()),
}


def quieten() -> None:
    """lm-eval and datasets log every step; here a progress bar shows what takes long, and says of what."""
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = partial(tqdm, desc="prompts", delay=2, leave=False)  # its own has no name
    for name in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def score(lm: DecoderLM, leaf, seed: int, args: argparse.Namespace, name: str) -> list[dict]:
    """One line per question of lm-eval's task `leaf`, by the model called `name`. InputError where lm-eval cannot score it."""
    task = leaf.task_name
    print(f"{name}: {task}, shots {leaf.get_config('num_fewshot')}, seed {seed}", file=sys.stderr)
    leaf.set_fewshot_seed(seed)
    try:
        found = evaluate(
            lm,
            {"tasks": {task: leaf}, "groups": {}},
            limit=args.limit,
            bootstrap_iters=0,
            apply_chat_template=args.chat,
            fewshot_as_multiturn=args.chat,
        )
    except InputError:
        raise
    except Exception as error:  # a task is code, and may do anything
        if any(frame.filename == scorer.__file__ for frame in traceback.extract_tb(error.__traceback__)):
            raise  # a bug of ours
        raise InputError(f"{task}: lm-eval cannot score it ({type(error).__name__}: {first_line(error)})") from error
    samples = found["samples"][task]  # every question once for each of the task's filters: the first one counts
    samples = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    metric = metric_of(leaf, samples)
    lines = [sample_line(lm, leaf, sample, metric, seed) for sample in samples]
    if lm.cut:
        text = f"warning: {name}: {task}: {len(lm.cut)} prompts did not fit the context and lost their beginning"
        print(text, file=sys.stderr)
        lm.cut.clear()
    if wrong := sum(not 0 <= line["gold"] < len(line["options"]) for line in lines if "gold" in line):
        text = f"warning: {task}: of {len(lines)} questions {wrong} have a right answer that is none of their options"
        print(text, file=sys.stderr)
    return lines


def metric_of(leaf, samples: list[dict]) -> str:
    """The first of the task's metrics that says right or wrong of every question."""
    named = [entry["metric"] for entry in leaf.get_config("metric_list") or () if isinstance(entry["metric"], str)]
    metrics = [m for m in dict.fromkeys([*named, *samples[0]["metrics"]]) if m in samples[0]]
    for metric in metrics:
        if all(isinstance(s[metric], int | float | np.number | np.bool_) and s[metric] in (0, 1) for s in samples):
            return metric
    raise InputError(
        f"{leaf.task_name}: none of its metrics ({', '.join(metrics)}) is 0 or 1 for every question; run it with lm-eval itself"
    )


def sample_line(lm: DecoderLM, leaf, sample: dict, metric: str, seed: int) -> dict:
    """What is kept of lm-eval's sample."""
    doc, prompt = sample["doc"], sample["arguments"][0][0]
    line = {"id": doc.get("id", sample["doc_id"]) if isinstance(doc, dict) else sample["doc_id"], "seed": seed,
            "correct": bool(sample[metric]), "metric": metric}  # fmt: skip
    if leaf.OUTPUT_TYPE == "multiple_choice":
        line |= choice(leaf, sample, metric)
    else:
        line["answer"] = sample["filtered_resps"][0]
    return line | {"cut": prompt.rstrip() in lm.cut, "prompt": prompt}


def choice(leaf, sample: dict, metric: str) -> dict:
    """Options, their log-probabilities, which was chosen by this metric, and which is right."""
    choices = leaf.doc_to_choice(sample["doc"])
    log_p = [float(answer[0]) for answer in sample["filtered_resps"]]
    options = [arguments[1] for arguments in sample["arguments"]]
    log_p, alone = log_p[: len(choices)], log_p[len(choices) :]  # alone: of the options without the question, if asked for
    if metric == "acc_mutual_info":
        scores = [p - q for p, q in zip(log_p, alone, strict=True)]
    else:
        scores = [p / PER[metric](c) if metric in PER else p for p, c in zip(log_p, choices, strict=True)]
    target = leaf.doc_to_text(sample["doc"]) if getattr(leaf, "multiple_input", 0) else sample["target"]
    gold = choices.index(target) if isinstance(target, str) and target in choices else target
    line = {"chosen": scores.index(max(scores)), "log_p": log_p, "options": options[: len(choices)]}
    return line | ({"gold": gold} if isinstance(gold, int) else {"golds": gold} if isinstance(gold, list) else {"gold": -1})
