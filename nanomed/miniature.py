"""The paper in miniature: from a crawl to a merged specialist and its report, on a laptop, by the project's own scripts.

    python -m nanomed.miniature --out runs/miniature-paper          full size: time not yet measured
    python -m nanomed.miniature --out runs/miniature-fast --fast    too small to learn much: for tests

world       data/miniature_paper.py: what there is to read, and the examination
base        train.py on general prose and instructions: a small model that answers in the form it is asked for
corpus      classify → sweep → clean → prepare: the medical part of a crawl, without copies and leaked questions
continued   train.py on that corpus, both validation sets watched
merged      merge.py --sweep: the continued model taken back towards the base, by several t
knowledge   eval.py knowledge on all of them; answers: eval.py generate; compared: eval.py judge and failures
report      report.md, report.html: the paper's figure in miniature, and what was expected (miniature_report.py)

Every stage is the command that a user would type (OUT/stages has them all), so this is also the one test that
fails when any stage stops doing its part: miniature_results.py says what must hold, and what was measured.
The judge is a stand-in (miniature_judge.py), for a laptop has no 70B model. Seeds are fixed.

A killed run goes on with the same command: a finished stage is skipped, an unfinished one is repeated by scripts that
go on themselves. It runs from a clone: data/ and the scripts are not in the wheel.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from nanomed import InputError
from nanomed.evaluation.record import read_jsonl, write_json
from nanomed.hf import read_json

ROOT = Path(__file__).resolve().parents[1]
KIB = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # everything is local


@dataclass(frozen=True)
class Recipe:
    """What may be turned; the rest is fixed by data/miniature_paper.py."""

    base_steps: int
    base_lr: float
    cpt_steps: int
    cpt_lr: float
    replay: tuple[str, ...]  # sets that the base was trained on, and how much of them goes on being read
    batch_tokens: int
    classify_epochs: int
    ts: tuple[float, ...]  # of the merge sweep


FULL = Recipe(base_steps=800, base_lr=2e-3, cpt_steps=420, cpt_lr=8e-4, replay=("prose@0.2", "chats@0.07"),
              batch_tokens=1024, classify_epochs=4, ts=(0.3, 0.5, 0.7, 0.8, 0.9))  # fmt: skip
FAST = Recipe(base_steps=240, base_lr=3e-3, cpt_steps=100, cpt_lr=2e-3, replay=("prose@0.2", "chats@0.05"),
              batch_tokens=1024, classify_epochs=8, ts=(0.5,))  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """Commands that belong together. `seconds`: about how long they take, for the bar alone."""

    name: str
    seconds: float
    commands: Callable[[], list[list[str]]]  # called when the stage begins: some need what earlier stages measured
    scratch: tuple[str, ...] = ()  # folders that a killed script leaves half-made and then refuses to find
    whole: tuple[str, ...] = ()  # folders that are there whole or not at all, and that their script refuses to find


def name_of(t: float) -> str:
    """The name of a merge, as merge.py --sweep gives it to its folder."""
    return f"t-{t:.12g}"


def plan(out: Path, recipe: Recipe, fast: bool, seed: int, judge_url: Callable[[], str]) -> list[Stage]:
    """All stages, in order. Paths are relative to the working directory, as a user would write them."""
    world, bins = out / "world", out / "bins"
    models = {"base": out / "base", "continued": out / "continued"}
    models |= {name_of(t): out / "merged" / name_of(t) for t in recipe.ts}

    def prepare(source: str | Path, name: str, *flags: str) -> list[str]:
        flags = ("--tokenizer", f"{world}/model", "--out", f"{bins}/{name}", "--workers", "1", *flags)
        return ["data/prepare.py", str(source), *flags]

    def train(name: str, init: str | Path, data: list[str], steps: int, lr: float) -> list[str]:
        sets = [x for d in data for x in ("--data", f"{bins}/{d}")]
        sets += [x for v in ("med", "general") for x in ("--val", f"{v}={bins}/val-{v}")]
        return ["train.py", "--recipe", "miniature", "--init", str(init), *sets, "--out", str(models[name]),
                "--steps", str(steps), "--lr", str(lr), "--batch-tokens", str(recipe.batch_tokens), "--micro-batch", "4",
                "--warmup-steps", str(min(50, steps // 10)), "--eval-every", str(-(-steps // 4)),
                "--checkpoint-every", str(-(-steps // 4)), "--seed", str(seed)]  # fmt: skip

    def answers(name: str) -> str:
        return f"{out}/answers/{name}.jsonl"

    def comparisons() -> list[list[str]]:
        from nanomed.miniature_results import best_merge

        best, url, commands = name_of(best_merge(out, recipe.ts)), judge_url(), []
        for a, b in (("continued", "base"), (best, "base"), (best, "continued")):
            commands.append(["eval.py", "judge", answers(a), answers(b), "--url", url, "--judge", "stand-in",
                             "--out", f"{out}/eval/judge-{a}-{b}"])  # fmt: skip
        for name in ("continued", best):
            commands.append(["eval.py", "failures", answers(name), "--ref", answers("base"),
                             "--out", f"{out}/eval/failures-{name}"])  # fmt: skip
        return commands

    mode = ["--fast"] if fast else []
    classifier = ["--classifier", f"{out}/clf"]
    sizes = ["--epochs", str(recipe.classify_epochs), "--lr", "2e-3", "--batch-size", "16", "--max-tokens", "64"]
    parts = [str(world / "crawl" / f"part-{i}.parquet") for i in (0, 1)]
    return [
        Stage("world", 15, lambda: [["data/miniature_paper.py", "--out", str(world), "--seed", str(seed), *mode]],
              whole=("world",)),
        Stage("base", 200, lambda: [
            *(prepare(world / f"{name}.jsonl", name) for name in ("prose", "val-med", "val-general")),
            prepare(world / "chats.jsonl", "chats", "--messages-key", "messages"),
            train("base", world / "model", ["prose", "chats"], recipe.base_steps, recipe.base_lr),
        ]),
        Stage("corpus", 60, lambda: [
            ["data/classify.py", f"{world}/labels.parquet", "--model", f"{world}/encoder", *sizes, "--out", f"{out}/clf"],
            ["data/sweep.py", *parts, *classifier, "--out", f"{out}/sweep"],
            ["data/clean.py", *parts, "--scores", f"{out}/sweep", *classifier, "--eval", f"{world}/exam/medizin.jsonl",
             "--source", "built-in", "--workers", "1", "--out", f"{out}/corpus"],
            ["data/prepare.py", *(f"{out}/corpus/corpus/part-{i}.parquet" for i in (0, 1)), "--tokenizer", f"{world}/model",
             "--out", f"{bins}/med", "--workers", "1"],
        ], whole=("clf",)),
        Stage("continued", 200, lambda: [
            train("continued", out / "base" / "hf", ["med", *recipe.replay], recipe.cpt_steps, recipe.cpt_lr),
        ]),
        Stage("merged", 5, lambda: [["merge.py", str(models["base"] / "hf"), str(models["continued"] / "hf"), f"{out}/merged",
                                     "--sweep", ",".join(map(str, recipe.ts))]], ("merged",)),
        Stage("knowledge", 80, lambda: [["eval.py", "knowledge", *(f"{name}={path}" for name, path in models.items()),
                                         "--tasks", "miniature_medizin", "--task-path", f"{world}/exam", "--shots", "0",
                                         "--out", f"{out}/eval/knowledge"]]),
        Stage("answers", 90, lambda: [["eval.py", "generate", str(path), "--model", name, "--prompts", f"{world}/prompts.jsonl",
                                       "--max-new-tokens", "32", "--batch", "60", "--out", answers(name)]
                                      for name, path in models.items()]),
        Stage("compared", 25, comparisons),
    ]  # fmt: skip


# --- running it ----------------------------------------------------------------------------------------------------


def run_stage(stage: Stage, out: Path, bar: tqdm) -> None:
    """Run the commands one after the other; the bar moves with the clock, and never past the stage's share."""
    log, begun, start = out / "logs" / f"{stage.name}.log", time.perf_counter(), bar.n
    for name in stage.scratch:  # of a run that was killed
        shutil.rmtree(out / name, ignore_errors=True)
    commands = stage.commands()
    with log.open("a", encoding="utf-8") as file:
        for command in commands:
            if any(
                command[command.index("--out") + 1] == str(out / name) and (out / name).exists() for name in stage.whole
            ):
                continue
            file.write(f"$ python {' '.join(command)}\n")
            file.flush()
            process = subprocess.Popen([sys.executable, str(ROOT / command[0]), *command[1:]], stdout=file,
                                       stderr=subprocess.STDOUT, env=os.environ | QUIET)  # fmt: skip
            try:
                while process.poll() is None:
                    time.sleep(0.1)
                    bar.n = start + min(stage.seconds, time.perf_counter() - begun)
                    bar.refresh()
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
            if process.returncode:
                raise InputError(f"{stage.name}: {command[0]} failed: {last_line(log)}; all of it is in {log}")
    bar.n = start + stage.seconds
    done = {"seconds": time.perf_counter() - begun, "commands": [["python", *command] for command in commands]}
    write_json(out / "stages" / f"{stage.name}.json", done)


def last_line(log: Path) -> str:
    """What a script said last, of a progress bar only its last state."""
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").strip().splitlines()
    return lines[-1] if lines else "no output"


def claim(out: Path, recipe: Recipe, fast: bool, seed: int) -> None:
    """Make OUT, or find it to be of the same run; InputError where it is something else."""
    for needed in ("train.py", "merge.py", "eval.py", "data/miniature_paper.py"):
        if not (ROOT / needed).exists():
            raise InputError(f"{ROOT / needed}: not there; the miniature runs from a clone of the repository")
    about, path = json.loads(json.dumps({"fast": fast, "seed": seed, "recipe": asdict(recipe)})), out / "miniature.json"
    if path.exists():
        if (found := read_json(path)) != about:
            key = next(key for key in about if found.get(key) != about[key])
            raise InputError(f"--out {out}: made with {key} = {found.get(key)}, not {about[key]}; choose another --out")
        return
    if out.exists() and any(out.iterdir()):
        raise InputError(f"--out {out}: is not empty and not a miniature; choose another")
    for name in ("logs", "stages", "eval", "answers", "bins"):
        (out / name).mkdir(parents=True, exist_ok=True)
    write_json(path, about)


def run(out: Path, fast: bool, seed: int) -> bool:
    """All stages that are not done yet, and the report; whether every expectation held."""
    from nanomed import miniature_judge, miniature_report, miniature_results

    recipe, begun = FAST if fast else FULL, time.perf_counter()
    claim(out, recipe, fast, seed)
    with ExitStack() as stack:

        def judge_url() -> str:
            asked = {record["prompt"]: record for _, record in read_jsonl(out / "world" / "prompts.jsonl")}
            return stack.enter_context(miniature_judge.serving(asked))

        stages = plan(out, recipe, fast, seed, judge_url)
        with tqdm(total=sum(s.seconds for s in stages), unit="s", bar_format="{desc:<12}{percentage:3.0f}%|{bar}| {elapsed}",
                  disable=None) as bar:  # fmt: skip
            for stage in stages:
                bar.set_description_str(stage.name)
                if (out / "stages" / f"{stage.name}.json").exists():
                    bar.update(stage.seconds)
                else:
                    run_stage(stage, out, bar)
    results = miniature_results.measure(out, recipe.ts, [stage.name for stage in stages])
    results |= {"fast": fast, "peak_gb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * KIB / 1e9}
    expected = miniature_results.expectations(results, fast)
    results["expectations"] = [asdict(e) for e in expected]
    write_json(out / "results.json", results)
    miniature_report.write(out, results)
    print(miniature_report.table(results["expectations"]))
    print(f"{out / 'report.html'}: {time.perf_counter() - begun:.0f} s, largest process {results['peak_gb']:.1f} GB")
    return all(e.holds for e in expected)


def main() -> None:
    """The command line. Exit status 1 where something could not run, 2 where an expectation failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/miniature-paper"), help="folder of the run (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the texts and of both trainings (default 0)")
    parser.add_argument(
        "--fast", action="store_true", help="a world of a few facts: shows the order, not the distances"
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the script that is running ends too
    try:
        if not run(args.out, args.fast, args.seed):
            sys.exit(2)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
