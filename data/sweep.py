"""Sweep: documents × classifier → a score for every document.

    python data/sweep.py hf://datasets/HuggingFaceFW/fineweb-2/data/deu_Latn/train --classifier clf --out sweep
    python data/sweep.py ... --executor slurm --workers 64 --slurm-partition gpu --gpus-per-task 1

Every document gets its score, and clean.py filters: another threshold needs no second sweep. Each input file is one task
of datatrove's executors: `local` (this machine, one worker per GPU), `slurm` or `ray`. It writes SWEEP/scores/NAME.parquet
(id, file, row from 0, score; null for an empty text), whole or not at all, with the configuration's hash in it: after an
interruption the same command scores what is missing. datatrove's own markers are not relied on: they
know neither the classifier nor whether the list of files has changed.

Costs: see scoring.py for what makes it fast, data/README.md for the 428 million documents.
"""

import argparse
import importlib.metadata
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from documents import read_about, remove_orphans
from finding import read_record
from nanomed import InputError, run_script
from nanomed.files import write_json
from orphans import end_forks_with_parent
from outputs import claimed_folder
from scoring import Scoring, classifier_identity, find_inputs, is_committed, score_path

FINISHED = "sweep.json"


def read_classifier(folder: Path) -> dict:
    """threshold.json of a classifier's folder; InputError where it lacks what the sweep needs."""
    about = read_record(folder / "threshold.json", "data/classify.py")
    for key, kind in (("threshold", (int, float)), ("max_chars", int), ("max_tokens", int)):
        if not isinstance(about.get(key), kind):
            raise InputError(f"{folder / 'threshold.json'}: {key} is {about.get(key)!r}, expected a number")
    return about


def plan(inputs: list[str], classifier: Path, out: Path, args: argparse.Namespace) -> tuple[Scoring, list[Path]]:
    """The step that every task runs, and the inputs; InputError if scores of another configuration lie in `out`."""
    files, about = find_inputs(inputs, out), read_classifier(classifier)
    identity = {"classifier_sha256": classifier_identity(classifier)}
    identity |= {key: about[key] for key in ("max_chars", "max_tokens")}
    identity |= {"dtype": args.dtype, "text_key": args.text_key, "id_key": args.id_key}
    identity = json.dumps(identity)
    for path in files:
        is_committed(path, out, identity)
    threads = args.threads or max(1, (os.cpu_count() or 1) // args.workers)
    return Scoring(str(classifier), identity, about["max_chars"], about["max_tokens"], args.dtype, args.batch_tokens,
                   tuple(map(str, files)), str(out), args.text_key, args.id_key, threads,
                   raises=args.executor != "local"), files  # fmt: skip


def make_executor(step: Scoring, args: argparse.Namespace):
    """datatrove's executor for the step, one task per file."""
    try:
        from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
        from loguru import logger
    except ImportError:
        raise InputError("the sweep needs more packages: pip install -e '.[data]'") from None
    logger.remove()  # its log goes to files: on the terminal it would write over the progress bar
    tasks = len(step.files)
    # skip_completed: by our own files of scores, in the step
    common = dict(pipeline=[step], tasks=tasks, workers=args.workers, skip_completed=False,
                  logging_dir=str(Path(step.out) / "logs"))  # fmt: skip
    cluster = dict(cpus_per_task=step.threads, gpus_per_task=args.gpus_per_task, mem_per_cpu_gb=args.mem_per_cpu_gb)
    here = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (here, str(Path(here).parent), os.environ.get("PYTHONPATH"))))
    if args.executor == "local":
        end_forks_with_parent()
        return LocalPipelineExecutor(**common, start_method="spawn")
    if args.executor == "slurm":
        if not args.slurm_partition:
            raise InputError("--executor slurm needs --slurm-partition NAME")
        path = f"export PYTHONPATH={os.environ['PYTHONPATH']}"
        return SlurmPipelineExecutor(**common, **cluster, time=args.slurm_time, partition=args.slurm_partition,
                                     job_name="sweep", venv_path=f"{sys.prefix}/bin/activate", env_command=path)  # fmt: skip
    try:
        import ray
    except ImportError:
        raise InputError("--executor ray needs ray: pip install -e '.[ray]'") from None
    ray.init(ignore_reinit_error=True, logging_level="error", log_to_driver=False,
             runtime_env={"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}})  # fmt: skip
    return RayPipelineExecutor(**common, **cluster)


@contextmanager
def progress_bar(step: Scoring) -> Iterator[None]:
    """Documents scored so far, from the notes that tasks leave, on whichever machine they run.

    What datatrove and others print to stderr meanwhile goes to SWEEP/logs/console.log: it would break the bar. InputError
    where a worker of the local executor was killed, for which its pool would wait for ever.
    """
    folder, done, terminal = Path(step.out, "progress"), threading.Event(), os.dup(2)
    for note in folder.glob("*"):
        note.unlink()
    workers, killed = {}, []

    def watch() -> None:
        with os.fdopen(terminal, "w") as file, tqdm(unit=" documents", desc="sweep", file=file, disable=None) as bar:
            last = False
            while not last:
                last = done.wait(1)
                workers.update((child.pid, child) for child in multiprocess.active_children())
                killed.extend(child.exitcode for child in workers.values() if (child.exitcode or 0) < 0)
                if killed and not last:
                    signal.raise_signal(signal.SIGINT)
                    last = True
                counts = [note.read_text() for note in folder.glob("*")]
                bar.set_postfix_str(f"{len(counts)} of {len(step.files)} files begun", refresh=False)
                bar.update(sum(int(count or 0) for count in counts) - bar.n)

    Path(step.out, "logs").mkdir(parents=True, exist_ok=True)
    import multiprocess  # datatrove's, a fork of multiprocessing

    thread, stderr = threading.Thread(target=watch, daemon=True), os.dup(2)
    with Path(step.out, "logs", "console.log").open("ab") as log:
        os.dup2(log.fileno(), 2)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if not killed:
            raise
        what = f"a worker was killed (signal {-killed[0]}), probably out of memory"
        raise InputError(f"{what}; run again with fewer --workers (finished files are kept)") from None
    finally:
        done.set()
        thread.join()
        os.dup2(stderr, 2)
        os.close(stderr)


def finish(step: Scoring, files: list[Path], about: dict) -> dict:
    """The totals, written to SWEEP/sweep.json last; InputError names the first input that has no scores."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    out, threshold, computed_in = Path(step.out), about["threshold"], Counter()
    totals = {"documents": 0, "empty": 0, "at_or_above_threshold": 0}
    for path in files:
        target, note = score_path(path, out), out / "errors" / f"{path.name}.txt"
        if not is_committed(path, out, step.identity):  # again: a sweep of another configuration may have run meanwhile
            missing = f"{path}: its scores are missing; see {out / 'logs'}, then run the same command again"
            raise InputError(note.read_text("utf-8").strip() if note.exists() else missing)
        computed_in[read_about(target).get("computed_in", "unknown")] += 1
        scores = pq.read_table(target, columns=["score"])["score"]
        totals["documents"] += len(scores)
        totals["empty"] += scores.null_count
        totals["at_or_above_threshold"] += pc.sum(pc.greater_equal(scores, threshold)).as_py() or 0
    names = {path.name: score_path(path, out).name for path in files}
    record = json.loads(step.identity) | totals | {"threshold": threshold, "files": names, "computed_in": computed_in}
    warn_of_precisions(computed_in, about.get("computed_in"))
    record["versions"] = {name: importlib.metadata.version(name) for name in ("datatrove", "transformers", "torch")}
    write_json(out / FINISHED, record)
    return totals


def warn_of_precisions(computed_in: Counter, chosen_in: str | None) -> None:
    """Say so where scores were computed in several precisions, or in another one than those the threshold was chosen from."""
    kinds = {name for name in (*computed_in, chosen_in) if name not in (None, "unknown")}
    if len(kinds) > 1:
        shown = ", ".join(f"{n} files in {name}" for name, n in sorted(computed_in.items()))
        print(f"warning: the threshold was chosen from scores in {chosen_in or 'an unknown precision'}, these are of {shown}: "
              "documents near it may fall on the other side; --dtype sets one precision", file=sys.stderr)  # fmt: skip


def sweep(inputs: list[str], classifier: Path, out: Path, args: argparse.Namespace) -> None:
    """Score `inputs` into `out`; run again after an interruption, it scores what is missing."""
    step, files = plan(inputs, classifier, out, args)
    first = next(out.glob("scores/*.parquet"), None)
    is_ours = first is not None and "classifier_sha256" in read_about(first)  # of a version that left no mark
    with claimed_folder(out, ("scores", "progress", "errors", "logs", FINISHED), "data/sweep.py", is_ours):
        score_missing(step, files, read_classifier(classifier), args)


def score_missing(step: Scoring, files: list[Path], about: dict, args: argparse.Namespace) -> None:
    """Run the executor if there is anything to do; the totals."""
    started, out = time.perf_counter(), Path(step.out)
    missing = [path for path in files if not score_path(path, out).exists()]
    if missing:
        step = replace(step, files=tuple(map(str, missing)))  # a task each
        executor = make_executor(step, args)
        if args.executor == "slurm":
            executor.run()
            print(f"{len(missing)} tasks submitted to Slurm; run the same command again when they have finished")
            return
        try:
            with progress_bar(step):
                executor.run()
        finally:
            for path in missing:
                remove_orphans(score_path(path, out))  # of workers that were ended
    totals = finish(step, files, about)
    share = totals["at_or_above_threshold"] / max(1, totals["documents"])
    print(f"{out}: {totals['documents']:,} documents, {totals['empty']:,} of them empty, {len(files)} files; "
          f"{totals['at_or_above_threshold']:,} ({share:.2%}) at or above the threshold")  # fmt: skip
    if missing:
        print(f"{time.perf_counter() - started:.1f} s for {len(missing)} files")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Score every document with a classifier. An interrupted run resumes.",
        epilog="example: python data/sweep.py fineweb/*.parquet --classifier clf --out sweep",
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="files, folders or hf:// URLs of .parquet or .jsonl[.gz|.zst]")
    add("--classifier", required=True, type=Path, metavar="CLF", help="the folder that data/classify.py wrote")
    add("--out", required=True, type=Path, metavar="SWEEP", help="where the scores go")
    add("--executor", choices=("local", "slurm", "ray"), default="local", help="where it runs (default: %(default)s)")
    add("--workers", type=int, metavar="N", help="concurrent tasks (default: one per GPU, or 1)")
    add("--threads", type=int, metavar="N", help="CPU threads per worker (default: its share of this machine's)")
    add(
        "--batch-tokens",
        type=int,
        default=0,
        metavar="N",
        help="tokens per batch (default: 65,536 on a GPU, else 4,096)",
    )
    add(
        "--dtype",
        choices=("auto", "bf16", "fp16", "fp32"),
        default="auto",
        help="auto, as in classify.py: bf16 on a GPU, fp16 on one without bf16, fp32 on the CPU",
    )
    add("--text-key", default="text", metavar="KEY", help="column of the text (default: %(default)s)")
    add("--id-key", default="id", metavar="KEY", help="column of the identifier (default: %(default)s)")
    add("--gpus-per-task", type=int, default=0, metavar="N", help="requested from slurm or ray (default: %(default)s)")
    add("--mem-per-cpu-gb", type=int, default=4, metavar="N", help="requested from slurm or ray (default: %(default)s)")
    add("--slurm-partition", metavar="NAME", help="partition to run in")
    add("--slurm-time", default="24:00:00", metavar="H:M:S", help="time limit per task (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.workers is None:
        import torch

        args.workers = max(1, torch.cuda.device_count())
    for name in ("workers", "threads"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} is {value}, expected 1 or more")
    return args


def main() -> None:
    """Bad input ends it with one line and exit status 1."""
    args = parse_arguments()
    sweep(args.inputs, args.classifier, args.out, args)


if __name__ == "__main__":
    run_script(main)
