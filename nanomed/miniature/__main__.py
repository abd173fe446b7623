"""The paper in miniature: from a crawl to a merged specialist and its report, on a laptop, by the project's own scripts.

    python -m nanomed.miniature --out runs/miniature-paper          sixteen minutes and 0.7 GB on two CPU cores
    python -m nanomed.miniature --out runs/miniature-fast --fast    three on one: shows the order, for tests

world       data/miniature_paper.py: the texts, and the examination
base        train.py on general prose and instructions: a small model that answers in the form it is asked for
corpus      classify → sweep → clean → prepare: the medical part of a crawl, without copies and leaked questions
continued   train.py on that corpus, with both validation sets
merged      merge.py --sweep: the continued model interpolated back towards the base, by several t
knowledge   eval.py knowledge on all of them; answers: eval.py generate; compared: eval.py judge and failures
report      report.md, report.html: the paper's figure in miniature, and the expectations (report.py)

Every stage is the command that a user would type (OUT/stages has them all), so this is also an end-to-end test: results.py
says what must hold, and what was measured. The judge is a stand-in (judge.py), since a laptop has no 70B model. Seeds are
fixed.

The same command resumes a killed run: finished stages are skipped, an unfinished one is repeated by scripts that resume
themselves. It runs from a clone: data/ and the scripts are not in the wheel.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from nanomed import InputError, run_script
from nanomed.files import lock, read_json, read_jsonl, write_json
from nanomed.miniature import judge, report
from nanomed.miniature import results as outcome
from nanomed.miniature.stages import FAST, FULL, Recipe, Stage, plan

ROOT = Path(__file__).resolve().parents[2]
KIB = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # everything is local


def run_stage(stage: Stage, out: Path, bar: tqdm) -> None:
    """Run the commands one after the other; the bar moves with time, up to the stage's share."""
    log, begun, start = out / "logs" / f"{stage.name}.log", time.perf_counter(), bar.n
    commands = stage.commands()
    with log.open("a", encoding="utf-8") as file:
        for command in commands:
            if any(output_of(command) == str(out / name) and (out / name).exists() for name in stage.whole):
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
    done["peak_gb"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * KIB / 1e9  # of the largest script so far
    write_json(out / "stages" / f"{stage.name}.json", done)


def output_of(command: list[str]) -> str:
    """The folder or file that a command writes: --out, or OUT of merge.py BASE CPT OUT."""
    return command[command.index("--out") + 1] if "--out" in command else command[3]


def last_line(log: Path) -> str:
    """The last line of output; of a progress bar its last state."""
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").strip().splitlines()
    return lines[-1] if lines else "no output"


def claim(out: Path, recipe: Recipe, fast: bool, seed: int) -> None:
    """Create OUT, or check that it belongs to the same run; InputError if not."""
    for needed in ("train.py", "merge.py", "eval.py", "data/miniature_paper.py"):
        if not (ROOT / needed).exists():
            raise InputError(f"{ROOT / needed}: no such file; the miniature runs from a clone of the repository")
    about, path = json.loads(json.dumps({"fast": fast, "seed": seed, "recipe": asdict(recipe)})), out / "miniature.json"
    if path.exists():
        if (found := read_json(path)) != about:
            key = next(key for key in about if found.get(key) != about[key])
            raise InputError(f"--out {out}: made with {key} = {found.get(key)}, not {about[key]}; choose another --out")
        return
    if out.exists() and any(out.iterdir()):
        raise InputError(f"--out {out}: is not empty and not a run of the miniature; choose another")
    for name in ("logs", "stages", "eval", "answers", "bins"):
        (out / name).mkdir(parents=True, exist_ok=True)
    write_json(path, about)


def run(out: Path, fast: bool, seed: int) -> bool:
    """Run all stages that are not done yet, and write the report; whether every expectation held."""
    recipe, begun = FAST if fast else FULL, time.perf_counter()
    claim(out, recipe, fast, seed)
    with ExitStack() as stack:
        stack.callback(os.close, lock(out))

        def judge_url() -> str:
            asked = {record["prompt"]: record for _, record in read_jsonl(out / "world" / "prompts.jsonl")}
            return stack.enter_context(judge.serving(asked))

        stages = plan(out, recipe, fast, seed, judge_url)
        with tqdm(total=sum(s.seconds for s in stages), unit="s", bar_format="{desc:<12}{percentage:3.0f}%|{bar}| {elapsed}",
                  disable=None) as bar:  # fmt: skip
            for stage in stages:
                bar.set_description_str(stage.name)
                done = out / "stages" / f"{stage.name}.json"
                if done.exists():
                    bar.update(stage.seconds)
                    what = "finished by an earlier run"
                else:
                    run_stage(stage, out, bar)
                    what = f"{read_json(done)['seconds']:.0f} s"
                bar.write(f"{stage.name}: {what}")  # clears the bar, if there is one
                sys.stdout.flush()  # into a file, too, lines go as they come
    results = outcome.measure(out, recipe.ts, [stage.name for stage in stages])
    results["fast"] = fast
    expected = outcome.expectations(results, fast)
    results["expectations"] = [asdict(e) for e in expected]
    write_json(out / "results.json", results)
    report.write(out, results)
    print(report.table(results["expectations"]))
    print(f"{out / 'report.html'}: {time.perf_counter() - begun:.0f} s, largest process {results['peak_gb']:.1f} GB")
    return all(e.holds for e in expected)


def main() -> None:
    """The command line. Exit status 1 if something could not run, 2 if an expectation failed."""
    parser = argparse.ArgumentParser(
        "python -m nanomed.miniature", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/miniature-paper"), help="folder of the run (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the texts and of both trainings (default 0)")
    parser.add_argument("--fast", action="store_true", help="a world of a few facts: shows the order, not the distances")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the script that is running ends too
    if not run(args.out, args.fast, args.seed):
        sys.exit(2)


if __name__ == "__main__":
    run_script(main)
