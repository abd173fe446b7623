"""What does a model know? Accuracy on multiple-choice questions, with intervals, for one model or several side by side.

    python eval.py knowledge MODEL ... --tasks medizin_de --shots 3

lm-eval is the harness, with a model class of ours (scorer.py: the same log-probabilities, several times as fast): a task that
says right or wrong of every question runs here if it runs there. Each further model is compared with the first, question by
question. The questions of `medizin_de` come with the project;
`eval.py convert` makes those of `german_medical` from the published files.

The folder of a run: run.json, results.json, accuracy.svg, samples/MODEL/TASK.jsonl (every prompt, log-probability and
choice), tasks/seed-S/TASK.yaml (what `lm-eval run --include_path` needs to repeat it). An interrupted run resumes after its
last complete samples file.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nanomed import InputError
from nanomed.evaluation import accuracy, figure, record, tasks
from nanomed.evaluation.tasks import Task
from nanomed.files import read_jsonl, write_durably
from nanomed.hf import fetch, find_weights
from nanomed.prompts import chat_template, render

DTYPES = ("float32", "bfloat16")
ONE_LETTER = 0.9  # share of the questions answered with one letter from which on a warning says so


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    add = parser.add_argument
    add(
        "models",
        nargs="+",
        metavar="[NAME=]MODEL",
        help="folder, hub id or run folder of train.py; the first is the reference",
    )
    add("--tasks", default="medizin_de", metavar="T,T,...", help="tasks, groups, patterns, YAML files (default medizin_de)")
    add(
        "--shots",
        type=int,
        default=3,
        metavar="N",
        help="questions with their answers before every question (default 3)",
    )
    add(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="selections of shots: the first is the order on disk, further ones are shuffled",
    )
    add("--cue", choices=tasks.CUES, default=tasks.CUES[0], help="text before the answer (default Antwort:)")
    add(
        "--chat",
        action="store_true",
        help="use the model's chat template, with shots as turns of a conversation and thinking switched off",
    )
    add("--limit", type=int, metavar="N", help="only the first N questions of every task, for a test run")
    add(
        "--task-path",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="more tasks: lm-eval YAML files on JSONL",
    )
    add("--include-defaults", action="store_true", help="lm-eval's own tasks too; finding them takes 9 seconds")
    add("--dtype", choices=DTYPES, help="of weights and products (default: bfloat16 on a GPU that has it, else float32)")
    add(
        "--batch-tokens",
        type=int,
        metavar="N",
        help="tokens of the largest pass (default: 512 on a CPU, 16,384 on a GPU)",
    )
    add("--out", type=Path, metavar="DIR", help="folder of the run (default runs/eval/knowledge-MODEL)")


def run(args: argparse.Namespace) -> None:
    """Score every model on every task without samples, then compare."""
    import torch

    from nanomed.config import has_bf16_hardware
    from nanomed.evaluation import finding, loading, scorer, scoring  # of the extra: --help does without

    check_numbers(args)
    scoring.quieten()
    models = named_models(args.models)
    out = args.out or Path("runs/eval") / f"knowledge-{next(iter(models))}"
    finder = finding.Finder([*([tasks.FOLDER] if tasks.FOLDER.is_dir() else []), *args.task_path], args.include_defaults)
    names = finder.names(args.tasks.split(","))
    seeds = list(range(args.seeds if args.shots else 1))
    ours = finder.ours(names)
    own = {seed: {n: tasks.prepared(t, args.shots, seed, args.cue) for n, t in ours.items()} for seed in seeds}
    loaded = {seed: finder.load(names, own[seed], args.shots, seed) for seed in seeds}
    tops = loaded[0][1]
    group = finding.group_of(tops, ours)
    if foreign := [task.name for task in group.tasks() if task.test is None and args.cue != tasks.CUES[0]]:
        raise InputError(f"--cue {args.cue}: the prompt of {foreign[0]} is its own; leave --cue out")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" and has_bf16_hardware() else "float32")
    config = {
        "models": {name: {"path": str(path), "fingerprint": record.fingerprint(path)} for name, path in models.items()},
        "tasks": {t.name: {k: v for k, v in t.config.items() if not (t.test and k == "dataset_kwargs")} for t in group.tasks()},
        "shots": args.shots, "seeds": seeds, "cue": args.cue, "chat": args.chat, "limit": args.limit, "dtype": dtype,
    }  # fmt: skip
    for path in models.values() if args.chat else ():
        render(path, [{"role": "user", "content": "Frage"}])  # fail first if a model has no template
    existed = out.exists()
    if record.open_run(out, "knowledge", config, [path for task in group.tasks() for path in task.files]):
        print(f"{out}: already finished; the results are in {out / 'results.json'}")
        return
    batch_tokens = args.batch_tokens or (16_384 if device.type == "cuda" else 512)
    with record.undone_on_failure(out, existed):
        for seed in seeds:
            for yaml in own[seed].values():
                tasks.write_task(yaml, out / "tasks" / f"seed-{seed}")
        for name, path in models.items():
            missing = [task for task in group.tasks() if not samples_path(out, name, task).exists()]
            lm = (
                scorer.DecoderLM(loading.load_decoder(path, getattr(torch, dtype), device), path, batch_tokens) if missing else None
            )
            for task in missing:
                lines = [x for seed in seeds for x in scoring.score(lm, loaded[seed][0][task.name], seed, args, name)]
                write_samples(samples_path(out, name, task), lines)
            del lm  # before the next one is loaded
    results = accuracy.results(group, models, seeds, args, lambda name, task: read_samples(samples_path(out, name, task)))
    requests = finder.requests(tops, ours, out / "tasks" / "seed-0")
    results["lm_eval"] = [c for path in models.values() for c in commands(path, args, dtype, requests, ours)]
    (out / "accuracy.svg").write_text(figure.draw(results), encoding="utf-8")
    record.finish_run(out, results)
    for warning in one_letter(results):
        print(f"warning: {warning}", file=sys.stderr)
    print(accuracy.table(results), f"{out}: results.json, accuracy.svg, samples/", "the same by lm-eval:", sep="\n")
    print(*results["lm_eval"], sep="\n")


def check_numbers(args: argparse.Namespace) -> None:
    """InputError for a number that cannot be."""
    for name in ("shots", "seeds", "limit", "batch_tokens"):
        if (value := getattr(args, name)) is not None and value < (name != "shots"):
            raise InputError(f"--{name.replace('_', '-')} {value}: expected a positive number")


def one_letter(results: dict) -> Iterator[str]:
    """A warning for every model and task where nearly all answers are one letter: the model does not read the options."""
    for model in results["models"]:
        for entry in model["tasks"]:
            if not entry["by_letter"] or not entry["letters"] or entry["n"] < 8:
                continue
            chosen, gold = (np.array(entry["letters"][key]) / sum(entry["letters"][key]) for key in ("chosen", "gold"))
            place = int(chosen.argmax())
            if chosen[place] >= ONE_LETTER > gold[place]:
                yield (
                    f"{model['name']}: {entry['task']}: {chosen[place]:.0%} of the answers are {'ABCDEFGHIJ'[place]}; a small "
                    "model does not know what a letter stands for: score whole answers (as --tasks medizin_de_text does)"
                )


# --- models --------------------------------------------------------------------------------------------------------


def named_models(given: list[str]) -> dict[str, Path]:
    """Name → folder of the checkpoint, in order."""
    found: dict[str, Path] = {}
    for text in given:
        cuts = [("", text), *((text[:at], text[at + 1 :]) for at, char in enumerate(text) if char == "=")]
        # A "=" that is part of a folder's path (lr=1e-4) cuts nothing; where there is no folder, the last one ends the name.
        name, model = next((cut for cut in cuts if Path(cut[1]).is_dir()), cuts[-1])
        folder = fetch(model, "MODEL")
        if not find_weights(folder):
            raise InputError(f"MODEL {model}: has no weights (model.safetensors)")
        parts = [part for part in Path(model).parts if part != "hf"]
        name = name or (parts[-1] if parts else "model")
        if name in found or "/" in name:
            raise InputError(f"MODEL {text}: the name {name!r} is taken or has a slash; give another as NAME=MODEL")
        found[name] = folder.resolve()
    return found


# --- samples -------------------------------------------------------------------------------------------------------


def samples_path(out: Path, name: str, task: Task) -> Path:
    """The file of a model's samples on a task."""
    return out / "samples" / name / f"{task.name}.jsonl"


def write_samples(path: Path, lines: list[dict]) -> None:
    """The whole file or none: if it exists, the task is done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_samples(path: Path) -> list[dict]:
    """The lines of write_samples."""
    return [line for _, line in read_jsonl(path)]


def commands(path: Path, args: argparse.Namespace, dtype: str, requests: dict[Path | None, list[str]], ours: dict) -> list[str]:
    """The lm-eval command lines that reproduce the first seed. requests: folder to include → names of its tasks."""
    model = {"pretrained": str(path), "dtype": dtype}
    if args.chat and "enable_thinking" in chat_template(path):  # on by default, which lm-eval leaves to the template
        model["enable_thinking"] = False
    plain = ",".join(f"{key}={value}" for key, value in model.items())
    model_args = json.dumps(model) if set(str(path)) & set(",'\"[](){}") else plain
    found = []
    for folder, names in requests.items():
        words = ["lm-eval", "run", "--model", "hf", "--model_args", model_args]
        words += ["--include_path", str(folder)] if folder else []
        words += ["--tasks", ",".join(names), "--batch_size", "8", "--seed", "0"]
        words += [] if set(names) <= set(ours) else ["--num_fewshot", str(args.shots)]
        words += ["--apply_chat_template", "--fewshot_as_multiturn"] if args.chat else []
        words += ["--limit", str(args.limit)] if args.limit else []
        found.append(shlex.join(words))
    return found
