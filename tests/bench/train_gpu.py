"""Full-parameter training of 7B models on one GPU, beside transformers + Liger on the same weights: tokens/s, MFU, memory.

    python tests/bench/train_gpu.py                            Qwen2.5-7B and Mistral-7B, 20 steps a side
    python tests/bench/train_gpu.py --device cpu --models tiny --steps 4 --states fp32       a dry run, anywhere

Random weights, drawn alike for both sides; bf16 weights and 8-bit AdamW states (ours: nanomed.lowbit's; the peer's: torchao's
AdamW8bit, stochastic rounding on both sides); windows of 4,096 tokens packed from documents of 700 on average (a mean of
5.1 B tokens over 7.3 M documents). The peer is `AutoModelForCausalLM` with Liger's kernels, given position_ids that begin anew
at every document; its attention is flash-attn-4 or flash-attn where that is installed, else the same algorithm in torch
(`varlen_attn`, registered with transformers' AttentionInterface): both sides then spend alike on it.

Each side of each model runs in a process of its own and reports after every step; OUT is rewritten each time, so that a run which
is cut off still counts. A side that cannot run (not installed, out of memory) is named with the reason.
"""

import argparse
import json
import multiprocessing as mp
import os
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from train_gpu_sides import MODELS, SIDES, shape_of, window

WARM_UP = 3  # steps that are not counted: compilation, the allocator's first blocks


class Step(NamedTuple):
    """What a side reports of a step."""

    seconds: float
    loss: float
    len2: int  # Σ of the documents' squared lengths
    peak_allocated: int  # bytes, since the process began
    peak_reserved: int
    graphs: int  # compiled since the process began


class Queued(NamedTuple):
    """A step that the device may still be busy with."""

    loss: torch.Tensor  # in the CPU's memory, once `done`
    done: torch.cuda.Event | float  # when it was through: on the CPU by time.perf_counter
    len2: int
    graphs: int


def run_side(side: str, name: str, args, pipe) -> None:
    """In a process of its own: after every step a Step, or the reason why there is none.

    A step is waited for when the next one is queued, so that the device need not wait for the host. (train.py waits every ten.)
    """
    try:
        c = shape_of(name)
        made = SIDES[side](c, args)
        queued, last = None, now(args.device)
        for step in range(args.steps):
            following = queue_step(step, c, made, args)
            if queued:
                last = report(queued, last, pipe)
            queued = following
        report(queued, last, pipe)
        if args.profile:
            activity = torch.profiler.ProfilerActivity  # of the CPU none: an op's time is its kernels', listed once more
            with torch.profiler.profile(activities=[getattr(activity, args.device.upper())], acc_events=True) as profiler:
                queue_step(args.steps, c, made, args)
                if args.device == "cuda":
                    torch.cuda.synchronize()
            pipe.send(kernels(profiler, f"self_{'device' if args.device == 'cuda' else 'cpu'}_time_total"))
    except Exception as error:  # out of memory or a missing package is a result, too
        pipe.send(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")


def queue_step(step: int, c, made, args) -> Queued:
    """Forward and backward over the step's windows, and the update."""
    _, optimizer, loss_of, clip = made
    windows = [window(args.seq_len, c.vocab_size, step * 1000 + i) for i in range(args.windows)]
    n_labels = sum(int((labels != -100).sum()) for *_, labels in windows)
    scale, total = torch.full((), 1 / n_labels, device=args.device), torch.zeros((), device=args.device)
    for one in windows:
        loss = loss_of(*one, scale)
        loss.backward()
        total += loss.detach()
    clip()
    optimizer.step()
    optimizer.zero_grad()
    len2 = int(sum((lengths.astype(np.int64) ** 2).sum() for lengths, *_ in windows))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return Queued(total.to("cpu", non_blocking=True), now(args.device), len2, graphs)


def report(queued: Queued, last: torch.cuda.Event | float, pipe) -> torch.cuda.Event | float:
    """Wait for a step and send what is known of it; `last`: when the one before was through. Returns when this one was."""
    peaks = (0, 0)
    if isinstance(queued.done, torch.cuda.Event):
        queued.done.synchronize()
        peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        seconds = last.elapsed_time(queued.done) / 1e3
    else:
        seconds = queued.done - last
    pipe.send(Step(seconds, queued.loss.item(), queued.len2, *peaks, queued.graphs))
    return queued.done


def now(device: str) -> torch.cuda.Event | float:
    """The moment at which what has been queued is through, by the device's own clock."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def kernels(profiler, clock: str) -> list[dict]:
    """What the device spent its time on, the 40 dearest first; clock: the profiler's name for that time, in µs."""
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, clock))
    return [{"kernel": e.key[:90], "ms": round(getattr(e, clock) / 1e3, 2), "calls": e.count} for e in events[:40]]


def summary(name: str, steps: list[Step], args) -> dict:
    """Of the steps so far: medians after the warm-up, MFU by nanomed.metrics' formula, the highest memory."""
    from nanomed.devices import bf16_peak
    from nanomed.metrics import attention_flops, flops_per_token
    from nanomed.model import Decoder

    with torch.device("meta"):
        model = Decoder(shape_of(name))
    n = args.seq_len * args.windows
    peak = bf16_peak(torch.cuda.get_device_name()) if args.device == "cuda" else None
    counted = steps[WARM_UP:] or steps[-1:]
    flop_s = [(flops_per_token(model) * n + attention_flops(model) * step.len2) / step.seconds for step in counted]
    step_s = statistics.median(step.seconds for step in counted)
    return {
        "steps": len(steps),
        "first_step_s": steps[0].seconds,
        "step_s": step_s,
        "tok_s": n / step_s,
        "mfu": statistics.median(flop_s) / peak if peak else None,
        "peak_allocated_gb": steps[-1].peak_allocated / 1e9,
        "peak_reserved_gb": steps[-1].peak_reserved / 1e9,
        "compiled_after_step_2": steps[-1].graphs - steps[min(1, len(steps) - 1)].graphs,
        "losses": [step.loss for step in steps],
        "seconds": [step.seconds for step in steps],
    }


def write(path: Path, result: dict) -> None:
    """The file with this JSON, or the one that was there."""
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(tmp, path)


def measure(side: str, name: str, args, result: dict) -> None:
    """Run one side of one model and keep its row in result, and result on disk, up to date."""
    row = {"model": name, "side": side}
    result["rows"].append(row)
    context = mp.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=run_side, args=(side, name, args, theirs), daemon=True)
    process.start()
    theirs.close()
    steps = []
    for i in tqdm(range(args.steps + args.profile), f"{name}, {side}"):
        try:
            answer = mine.recv()
        except EOFError:
            process.join()
            answer = f"the process ended with status {process.exitcode}"
        if i == args.steps:
            row["not_profiled" if isinstance(answer, str) else "kernels_of_a_step"] = answer
        elif isinstance(answer, str):
            row["absent"] = answer
        else:
            steps.append(answer)
            row |= summary(name, steps, args)
        write(args.out, result)
        if "absent" in row:
            break
    process.join()


def versions() -> dict:
    """Of every package that matters; None where it is not installed."""
    found = {"torch": torch.__version__}
    for package in ("triton", "transformers", "liger-kernel", "torchao", "flash-attn", "flash-attn-4"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def main() -> None:
    """Both sides of every model, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["qwen2.5-7b", "mistral-7b"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["ours", "transformers + liger"])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=4, help="forward and backward passes of a step (default: 4)")
    parser.add_argument("--states", choices=["int8", "fp32"], default="int8", help="fp32: float32 weights as well")
    parser.add_argument("--recompute", choices=["none", "selective", "full"], default="none")
    parser.add_argument("--profile", action="store_true", help="a step more, under torch's profiler: its kernels")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu/train.json"))
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: no GPU here; --device cpu --models tiny --states fp32 is a dry run")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu (a dry run: its figures mean nothing)"
    result = {"device": device, "versions": versions(), "settings": settings, "finished": False, "rows": []}
    for name in args.models:
        for side in args.sides:
            measure(side, name, args, result)
    write(args.out, result | {"finished": True})
    for row in result["rows"]:
        said = row.get("absent") or "{tok_s:,.0f} tok/s, peak {peak_allocated_gb:.1f} GB".format(**row)
        mfu = f", MFU {row['mfu']:.1%}" if row.get("mfu") else ""
        print(f"{row['model']:12} {row['side']:22} {said}{mfu}")
    print(args.out)


if __name__ == "__main__":
    main()
