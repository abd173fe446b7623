"""What does a model know? Accuracy on multiple-choice questions, with intervals, for one model or several side by side.

    python eval.py knowledge MODEL ... --tasks medizin_de --shots 3

lm-eval is the harness, with a model class of ours (scorer.py: the same log-probabilities, several times as fast). Each
further model is compared with the first, question by question. The questions of `medizin_de` come with the project;
`eval.py convert` makes those of `german_medical` from the published files.

The folder of a run: run.json, results.json, accuracy.svg, samples/MODEL/TASK.jsonl (every prompt, log-probability and
choice), tasks/seed-S/TASK.yaml (what `lm-eval run --include_path` needs to repeat it). An interrupted run resumes after its
last complete samples file.
"""

import argparse
import json
import logging
import sys
from functools import partial
from pathlib import Path

import datasets
import lm_eval.api.task
import torch
from tqdm import tqdm

from nanomed import InputError, first_line
from nanomed.config import has_bf16_hardware
from nanomed.evaluation import accuracy, figure, record, tasks
from nanomed.evaluation.loading import load_decoder
from nanomed.evaluation.scorer import DecoderLM
from nanomed.evaluation.tasks import Task
from nanomed.files import read_jsonl, write_durably
from nanomed.hf import fetch, find_weights
from nanomed.prompts import chat_template, render

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    add = parser.add_argument
    add(
        "models",
        nargs="+",
        metavar="[NAME=]MODEL",
        help="folder, hub id or run folder of train.py; the first is the reference",
    )
    add("--tasks", default="medizin_de", metavar="T,T,...", help="tasks and groups of data/tasks (default medizin_de)")
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
    for name in ("shots", "seeds", "limit", "batch_tokens"):
        if (value := getattr(args, name)) is not None and value < (name != "shots"):
            raise InputError(f"--{name.replace('_', '-')} {value}: expected a positive number")
    quieten()
    models = named_models(args.models)
    out = args.out or Path("runs/eval") / f"knowledge-{next(iter(models))}"
    folders = [tasks.FOLDER] if tasks.FOLDER.is_dir() else []
    args.task_path = [*folders, *args.task_path]
    group = tasks.find_tasks(args.tasks.split(","), args.task_path, args.include_defaults)
    seeds = list(range(args.seeds if args.shots else 1))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" and has_bf16_hardware() else "float32")
    config = {
        "models": {name: {"path": str(path), "fingerprint": record.fingerprint(path)} for name, path in models.items()},
        "tasks": {task.name: {k: v for k, v in task.config.items() if k != "dataset_kwargs"} for task in group.tasks()},
        "shots": args.shots, "seeds": seeds, "cue": args.cue, "chat": args.chat, "limit": args.limit, "dtype": dtype,
    }  # fmt: skip
    own = [(seed, tasks.prepared(t, args.shots, seed, args.cue)) for t in group.tasks() if t.test for seed in seeds]
    for path in models.values() if args.chat else ():
        render(path, [{"role": "user", "content": "Frage"}])  # fail first if a model has no template
    if record.open_run(out, "knowledge", config, [path for task in group.tasks() for path in task.files]):
        print(f"{out}: already finished; the results are in {out / 'results.json'}")
        return
    for seed, yaml in own:
        tasks.write_task(yaml, out / "tasks" / f"seed-{seed}")
    batch_tokens = args.batch_tokens or (16_384 if device.type == "cuda" else 512)
    for name, path in models.items():
        missing = [task for task in group.tasks() if not samples_path(out, name, task).exists()]
        if missing:
            lm = DecoderLM(load_decoder(path, DTYPES[dtype], device), path, batch_tokens)
            for task in missing:
                write_samples(samples_path(out, name, task), score(lm, task, out, seeds, args, name))
            del lm  # before the next one is loaded
    results = accuracy.results(group, models, seeds, args, lambda name, task: read_samples(samples_path(out, name, task)))
    results["lm_eval"] = [command(path, out, args, dtype, group.tasks()) for path in models.values()]
    (out / "accuracy.svg").write_text(figure.draw(results), encoding="utf-8")
    record.finish_run(out, results)
    print(accuracy.table(results), f"{out}: results.json, accuracy.svg, samples/", "the same by lm-eval:", sep="\n")
    print(*results["lm_eval"], sep="\n")


def quieten() -> None:
    """lm-eval and datasets log every step; here a progress bar shows what takes long, and says of what."""
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = partial(tqdm, desc="prompts", delay=2, leave=False)  # its own has no name
    for name in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


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


def score(lm: DecoderLM, task: Task, out: Path, seeds: list[int], args: argparse.Namespace, name: str) -> list[dict]:
    """One line per question and seed, by the model called `name`. lm-eval builds the prompts and scores the answers."""
    from lm_eval.evaluator import evaluate  # simple_evaluate also lists every installed package, 1.3 s a call
    from lm_eval.tasks import TaskManager

    lines = []
    for seed in seeds:
        print(f"{name}: {task.name}, shots {args.shots}, seed {seed}", file=sys.stderr)
        if task.test:  # as this run has prepared it
            manager = TaskManager(include_path=out / "tasks" / f"seed-{seed}", include_defaults=False)
        else:
            manager = tasks.manager(tuple(args.task_path), args.include_defaults)
        try:
            loaded = manager.load([task.name])
        except (ImportError, KeyError, ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            # A missing package, file or network, a damaged file: what datasets says of the last stands in the cause.
            what = ": ".join(first_line(e) for e in (error, error.__cause__) if e)
            raise InputError(f"{task.name}: lm-eval cannot load it ({what})") from error
        (leaf,) = loaded["tasks"].values()
        if task.test is None and leaf.get_config("num_fewshot") != 0:  # ours have it in their YAML; a 0 there is the task's rule
            leaf.set_config("num_fewshot", args.shots)
        leaf.set_fewshot_seed(seed)
        found = evaluate(
            lm,
            loaded,
            limit=args.limit,
            bootstrap_iters=0,
            apply_chat_template=args.chat,
            fewshot_as_multiturn=args.chat,
        )
        samples = found["samples"][task.name]  # every question once for each of the task's filters: the first one counts
        lines += [sample_line(lm, task.name, s, seed) for s in samples if s["filter"] == samples[0]["filter"]]
    if lm.cut:
        print(
            f"warning: {name}: {task.name}: {len(lm.cut)} prompts did not fit the context and lost their beginning",
            file=sys.stderr,
        )
        lm.cut.clear()
    return lines


def sample_line(lm: DecoderLM, name: str, sample: dict, seed: int) -> dict:
    """What is kept of lm-eval's sample."""
    metric = sample["metrics"][0]
    if sample[metric] not in (0, 1):
        raise InputError(f"{name}: {metric} is not 0 or 1 for every question; run this task with lm-eval itself")
    doc, prompt = sample["doc"], sample["arguments"][0][0]
    line = {"id": doc.get("id", sample["doc_id"]) if isinstance(doc, dict) else sample["doc_id"], "seed": seed,
            "correct": bool(sample[metric]), "metric": metric}  # fmt: skip
    answers = sample["filtered_resps"]
    if len(answers) > 1 and isinstance(sample["target"], int) and isinstance(answers[0], (tuple, list)):
        options, log_p = [arguments[1] for arguments in sample["arguments"]], [float(answer[0]) for answer in answers]
        per = [len(option.strip()) for option in options] if metric == "acc_norm" else [1] * len(options)
        scores = [p / n for p, n in zip(log_p, per, strict=True)]
        line |= {"gold": sample["target"], "chosen": scores.index(max(scores)), "log_p": log_p, "options": options}
    else:
        line["answer"] = answers[0]
    return line | {"cut": prompt.rstrip() in lm.cut, "prompt": prompt}


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


def command(path: Path, out: Path, args: argparse.Namespace, dtype: str, wanted: list[Task]) -> str:
    """The lm-eval command line that reproduces the first seed."""
    names = ",".join(task.name for task in wanted)
    flags = f" --num_fewshot {args.shots}" if any(task.test is None for task in wanted) else ""
    flags += " --apply_chat_template --fewshot_as_multiturn" if args.chat else ""
    flags += f" --limit {args.limit}" if args.limit else ""
    thinks = args.chat and "enable_thinking" in chat_template(path)  # by default, which lm-eval leaves to the template
    answer = ",enable_thinking=False" if thinks else ""
    folder = out / "tasks" / "seed-0" if any(task.test for task in wanted) else args.task_path[-1]
    return (
        f"lm-eval run --model hf --model_args pretrained={path},dtype={dtype}{answer} --include_path {folder} "
        f"--tasks {names} --batch_size 8{flags}"
    )
