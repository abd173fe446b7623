"""eval.py knowledge beside lm-eval's own `hf` model: few-shot multiple choice on the CPU.

    python tests/bench/eval.py MODEL [--rounds 3] [--task medizin_de] [--shots 3]

Both sides run the same task file through lm-eval's harness in float32, each in a process of its own, and take turns. Timed
from the start of the process: the first score, the end; and the peak of its memory. The hf side leaves lm-eval's own 14,000
tasks out, and runs at the best of three batch sizes, found first. Its command line, which reads the names of all those
tasks, is timed to its first score besides.
The log-probabilities of both are compared. Results go to tests/bench/results/.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from machine import cpu_name

START = time.perf_counter()
ROOT = Path(__file__).resolve().parents[2]
BATCH_SIZES = (1, 4, 16)


# --- one side, in its own process ----------------------------------------------------------------------------------


def watch_first_score(cls: type, method: str) -> list[float]:
    """Seconds from the start of the process to the end of the first call of cls.method."""
    seen, original = [], getattr(cls, method)

    def timed(*args, **kwargs):
        result = original(*args, **kwargs)
        seen.append(time.perf_counter() - START)
        return result

    setattr(cls, method, timed)
    return seen


def one_side(side: str, model: Path, task: str, shots: int, batch_size: int, limit: int | None) -> None:
    """Run the task once and print the measurements as JSON."""
    sys.path.insert(0, str(ROOT))
    if side == "command line":
        return peer_command_line(model, task, shots, batch_size)
    import torch

    if side == "ours":
        from nanomed.evaluation.loading import load_decoder
        from nanomed.evaluation.scorer import DecoderLM

        seen = watch_first_score(DecoderLM, "_score_batch")
        lm = DecoderLM(load_decoder(model, torch.float32, torch.device("cpu")), model, batch_size)
    else:
        from lm_eval.models.huggingface import HFLM

        seen = watch_first_score(HFLM, "_model_call")  # its log-softmax follows: a little in its favour
        lm = HFLM(pretrained=str(model), dtype="float32", batch_size=batch_size, device="cpu")
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    loaded = TaskManager(include_path=str(ROOT / "data" / "tasks"), include_defaults=False).load([task])
    loaded["tasks"][task].set_config("num_fewshot", shots)
    found = evaluate(lm, loaded, bootstrap_iters=0, limit=limit)
    samples = sorted(found["samples"][task], key=lambda s: s["doc_id"])
    print(json.dumps({
        "first_s": seen[0], "s": time.perf_counter() - START,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
        "log_p": [[float(p) for p, _ in s["filtered_resps"]] for s in samples],
    }))  # fmt: skip


def peer_command_line(model: Path, task: str, shots: int, batch_size: int) -> None:
    """`lm-eval run --model hf` on a few questions, for its first score alone."""
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.models.huggingface import HFLM

    seen = watch_first_score(HFLM, "_model_call")
    sys.argv = ["lm-eval", "run", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--device", "cpu",
                "--include_path", "data/tasks", "--tasks", task, "--num_fewshot", str(shots), "--batch_size", str(batch_size),
                "--limit", "16"]  # fmt: skip
    cli_evaluate()
    print(json.dumps({"first_s": seen[0], "s": time.perf_counter() - START}))


def measure(side: str, args: argparse.Namespace, batch_size: int, limit: int | None = None) -> dict:
    """one_side in a process of its own, whose seconds count from before Python starts."""
    command = [sys.executable, __file__, str(args.model), "--side", side, "--task", args.task, "--shots", str(args.shots),
               "--batch-size", str(batch_size), *(["--limit", str(limit)] if limit else [])]  # fmt: skip
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    wall = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    row = json.loads(done.stdout.splitlines()[-1])
    late = wall - row["s"]  # the interpreter's own start and end
    return row | {"s": wall, "first_s": row["first_s"] + late}


# --- the comparison ------------------------------------------------------------------------------------------------


def differences(ours: list, theirs: list) -> dict:
    """Largest difference of a log-probability, and the questions whose choice differs with the gap of their top two."""
    best = lambda row: row.index(max(row))  # noqa: E731
    changed = [
        {"question": i, "gap": max(t) - sorted(t)[-2]}
        for i, (o, t) in enumerate(zip(ours, theirs, strict=True))
        if best(o) != best(t)
    ]
    worst = max(abs(a - b) for o, t in zip(ours, theirs, strict=True) for a, b in zip(o, t, strict=True))
    return {"max_difference": worst, "other_choices": changed, "questions": len(ours)}


def main() -> None:
    """Run and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder with a small model, such as SmolLM2-135M-Instruct")
    parser.add_argument("--rounds", type=int, default=3, help="counted runs of each side (default 3)")
    parser.add_argument("--task", default="medizin_de")
    parser.add_argument("--shots", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=512, help="of our side (default: what eval.py uses)")
    parser.add_argument("--peer-batch", type=int, help="of the hf side, instead of trying three")
    parser.add_argument("--side", choices=("ours", "hf", "command line"), help=argparse.SUPPRESS)
    parser.add_argument("--batch-size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return one_side(args.side, args.model, args.task, args.shots, args.batch_size, args.limit)
    tried = {} if args.peer_batch else {b: measure("hf", args, b, limit=16)["s"] for b in BATCH_SIZES}
    peer_batch = args.peer_batch or min(tried, key=tried.get)
    rows: dict[str, list[dict]] = {"ours": [], "hf": []}
    for _ in range(args.rounds):
        rows["ours"].append(measure("ours", args, args.batch_tokens))
        rows["hf"].append(measure("hf", args, peer_batch))
    command_line = measure("command line", args, peer_batch)["first_s"]
    weights = differences(rows["ours"][0].pop("log_p"), rows["hf"][0].pop("log_p"))
    result = {
        side: {k: statistics.median(r[k] for r in found) for k in ("s", "first_s", "peak_mb")} for side, found in rows.items()
    }
    result["ratios_ours_over_hf"] = {
        k: statistics.median(o[k] / h[k] for o, h in zip(rows["ours"], rows["hf"], strict=True))
        for k in ("s", "first_s", "peak_mb")
    }
    result["hf"]["command_line_first_s"] = command_line
    result["ratios_ours_over_hf"]["first_s_over_command_line"] = result["ours"]["first_s"] / command_line
    packages = ("torch", "transformers", "lm_eval", "tokenizers", "datasets")
    record = {
        "device": cpu_name(), "cores": len(os.sched_getaffinity(0)), "threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": {p: version(p) for p in packages} | {"python": platform.python_version()},
        "model": args.model.name, "task": args.task, "shots": args.shots, "rounds": args.rounds,
        "hf_batch_size": peer_batch, "hf_batch_sizes_s_of_16_questions": tried, "our_batch_tokens": args.batch_tokens,
    }  # fmt: skip
    path = Path(__file__).parent / "results" / f"eval-{args.task}.json"
    path.write_text(json.dumps(record | result | weights, indent=1) + "\n")
    print(json.dumps(result | weights, indent=1), path, sep="\n")


if __name__ == "__main__":
    main()
