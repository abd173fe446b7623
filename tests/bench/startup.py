"""How long until the first step has been made? From the start of the process, by part.

    python tests/bench/startup.py [NAME] [--runs 5] [train.py's flags]

A process of its own for each run, which makes two steps of train.py:

    imports     Python, torch and all of train.py's modules
    inputs      model's config, tokenizer, bins, shape of the batches
    model       described, its weights read or drawn; AdamW's moments; checkpoints looked for
    validation  of step 0, where there are sets
    first step  until the optimiser has made it: with --compile this holds the compilation
    second      for comparison
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
PARTS = ("imports", "inputs", "model", "validation", "first step", "second")


def one_run(flags: list[str]) -> None:
    """In the child: train.py with a clock at the places where one part ends and the next begins; prints seconds."""
    sys.path.insert(0, str(ROOT))
    started = float(sys.argv[2])
    import train

    now, seconds = [started], dict.fromkeys(PARTS, 0.0)

    def end(part: str) -> None:
        if not seconds[part]:
            seconds[part] = time.time() - now[0]
            now[0] = time.time()

    def ends(module, name: str, *parts: str) -> None:
        real, left = getattr(module, name), list(parts)

        def wrapper(*args, **kwargs):
            result = real(*args, **kwargs)
            if left:
                end(left.pop(0))
            return result

        setattr(module, name, wrapper)

    end("imports")
    ends(train, "open_inputs", "inputs")
    ends(train, "print_start", "model")
    ends(train, "validate", "validation")
    ends(train.guard, "step_unless", "first step", "second")
    sys.argv = ["train.py", *flags]
    train.main()
    print(json.dumps(seconds))


def main() -> None:
    """Run, print the medians, write them to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="miniature")
    parser.add_argument("--runs", type=int, default=5)
    args, flags = parser.parse_known_args()
    runs = []
    for _ in range(args.runs):
        with tempfile.TemporaryDirectory() as folder:
            mine = [*flags, "--steps", "2", "--warmup-steps", "1", "--out", f"{folder}/run"]
            command = [sys.executable, __file__, "--child", repr(time.time()), *mine]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: {done.stderr[-2000:]}")
        runs.append(json.loads(done.stdout))
    medians = {part: statistics.median(run[part] for run in runs) for part in PARTS}
    medians["to the first step's end"] = statistics.median(sum(run.values()) - run["second"] for run in runs)
    for part, seconds in medians.items():
        print(f"{part:24} {seconds:6.2f} s")
    import torch
    from machine import cpu_name

    path = RESULTS / f"startup-{args.name}.json"
    report = {"device": cpu_name(), "versions": {"torch": torch.__version__, "python": platform.python_version()},
              "threads": torch.get_num_threads(), "flags": flags, "median_s": medians, "runs_s": runs}  # fmt: skip
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    one_run(sys.argv[3:]) if sys.argv[1:2] == ["--child"] else main()
