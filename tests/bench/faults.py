"""A hundred random faults in one training run of two processes, and the losses of a run that never met one.

    python tests/bench/faults.py [--faults 100] [--seed 0] [--work runs/faults]

Signals to one rank or both in a step, an evaluation, a checkpoint being written; kill -9 of one rank at any of these;
a full disk; the newest checkpoint damaged after a kill -9; NaN on one rank; a spike. After each end the same command is
started again, until the run is finished. Then every loss must be bit-identical to the undisturbed run's, which is told
to leave out the steps of NaN and spikes, and so must the exported model.

The two ranks are forked from a process that has imported torch, so a restart costs a second, and are watched as
torchrun does: if one fails, the other gets SIGTERM, later SIGKILL. Faults come from patches in those processes; train.py
knows nothing of them. Every launch appends a line to WORK/launches.jsonl; the same command goes on after an
interruption. Results go to tests/bench/results/faults.json.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import socket
import statistics
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "data")]
os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402
from faults_ranks import N_RANKS, Fault, be_rank  # noqa: E402
from machine import cpu_name  # noqa: E402

from conftest import make_tiny  # noqa: E402
from nanomed.checkpoint import whole  # noqa: E402
from nanomed.versions import git_commit  # noqa: E402

PHASES = ("step", "evaluation", "checkpoint")
SHARES = {"signal": 35, "kill -9": 20, "NaN": 12, "spike": 11, "disk full": 11, "damaged checkpoint": 11}
FLAGS = dict(epochs=None, lr=3e-3, warmup_steps=20, keep=3, checkpoint_every=8, eval_every=12, log_every=4)


def draw(n: int, seed: int) -> tuple[list[Fault], int]:
    """The faults in the order of their steps, and the number of steps of the run."""
    rng, n_steps = random.Random(seed), 100 + 8 * n
    kinds = [kind for kind, share in SHARES.items() for _ in range(max(1, round(share * n / 100)))][:n]
    steps = rng.sample(range(90, n_steps - 5), len(kinds))
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    faults = [
        Fault(kind, step, PHASES[i % 3], rng.choice((-1, 0, 1)), int(rng.choice(signals)), rng.randrange(3))
        for i, (kind, step) in enumerate(zip(kinds, steps, strict=True))
    ]
    return sorted(faults, key=lambda fault: fault.step), n_steps


def launch(flags: list[str], log: Path, *injected) -> tuple[list[int], bool]:
    """Run the ranks to their end as torchrun would; exit codes (negative: a signal), and whether one had to be killed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    running, codes, forced, alarm = {}, {}, False, time.monotonic() + 900
    for rank in range(N_RANKS):
        if (pid := os.fork()) == 0:
            be_rank(rank, port, flags, log, *injected)
        running[pid] = rank
    warned = False
    while running:
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
        if any(codes.values()) and running and not warned:
            warned, alarm = True, time.monotonic() + 20
            for pid in running:
                os.kill(pid, signal.SIGTERM)
        if running and time.monotonic() > alarm:
            forced = True
            for pid in running:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[rank] for rank in range(N_RANKS)], forced


def losses(out: Path) -> dict[int, float | None]:
    """Loss of every step in metrics.jsonl; of a skipped one "skipped". A torn last line is left out."""
    found = {}
    for line in (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if "loss" in row:
            found[row["step"]] = "skipped" if row["skipped"] else row["loss"]
    return found


def damage(out: Path, how: int) -> str:
    """Damage the newest whole checkpoint in one of three ways; its name. It must not be the only one."""
    older = whole(out / "checkpoints")
    assert len(older) > 1
    path = older[-1][1]
    file = max(path.glob("*.distcp"), key=lambda p: p.stat().st_size)
    if how == 0:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif how == 1:
        os.truncate(file, file.stat().st_size // 2)
    else:
        (path / ".metadata").unlink()
    return path.name


def survived(fault: Fault | None, codes: list[int], forced: bool, met: int | None, out: Path) -> bool:
    """Did the processes end as they should? Whether the run is right afterwards, the losses tell."""
    if fault is None or met is None:
        return codes == [0, 0]
    if fault.kind == "signal":  # all at the same step, within two
        newest = [step for step, _ in whole(out / "checkpoints")][-1]
        return codes == [0, 0] and 0 <= newest - met <= 2
    return not forced and any(codes)


def disturb(args, faults: list[Fault], n_steps: int, tiny) -> tuple[list[dict], bool]:
    """Launch until the run is finished; a line for each launch, and whether the model equals the reference's."""
    out, journal = args.work / "run", args.work / "launches.jsonl"
    bad = {f.step + 1: f for f in faults if f.kind in ("NaN", "spike")}
    due = [f for f in faults if f.kind not in ("NaN", "spike")]
    flags = tiny.flags(out, steps=n_steps, **FLAGS)
    reference = args.work / "reference"
    if not (reference / "hf").exists():
        codes, _ = launch(tiny.flags(reference, steps=n_steps, **FLAGS), args.work / "reference.log",
                          bad, None, args.work / "fired", True)  # fmt: skip
        assert codes == [0, 0], (args.work / "reference.log").read_text()[-3000:]
    expected = losses(reference)
    lines = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    while not (out / "hf").exists():
        n_met = sum(line["met"] is not None for line in lines)
        fault = due[n_met] if n_met < len(due) else None
        fired = args.work / f"fired-{len(lines):03}"
        fired.unlink(missing_ok=True)
        start = time.monotonic()
        codes, forced = launch(flags, args.work / f"launch-{len(lines):03}.log", bad, fault, fired, False)
        met = int(fired.read_text().split()[0]) if fired.exists() else None
        found = losses(out)
        line = {"fault": asdict(fault) if fault else None, "met": met, "codes": codes, "forced": forced,
                "ended_well": survived(fault, codes, forced, met, out), "steps": len(found),
                "equal": all(expected[s] == loss for s, loss in found.items()),
                "seconds": time.monotonic() - start}  # fmt: skip
        if fault and fault.kind == "damaged checkpoint" and met is not None:
            line["damaged"] = damage(out, fault.how)
        lines.append(line)
        with journal.open("a") as file:
            file.write(json.dumps(line) + "\n")
        what = f"{fault.kind} in {fault.phase}" if fault and met is not None else "to the end"
        print(f"launch {len(lines):3}  {what:32} at step {met}  codes {codes}  {'equal' if line['equal'] else 'DIFFERENT'}"
              f"{'' if line['ended_well'] else '  ENDED BADLY'}  {line['seconds']:.1f} s", flush=True)  # fmt: skip
        assert met is not None or (out / "hf").exists(), f"see launch-{len(lines) - 1:03}.log"
    hf = [(folder / "hf" / "model.safetensors").read_bytes() for folder in (out, reference)]
    return lines, losses(out) == expected and hf[0] == hf[1]


def table(faults: list[Fault], lines: list[dict], same: bool, skipped: set[int]) -> dict[str, list[int]]:
    """Per kind of fault: how many were met, how many survived."""
    met, good = Counter(), Counter()
    for line, following in zip(lines, [*lines[1:], None], strict=True):
        if line["met"] is None:
            continue
        fault = line["fault"]
        kind = f"{fault['kind']} in {fault['phase']}" if fault["kind"] in ("signal", "kill -9") else fault["kind"]
        met[kind] += 1
        good[kind] += line["ended_well"] and following is not None and following["equal"]
    for fault in faults:
        if fault.kind in ("NaN", "spike"):
            met[fault.kind] += 1
            good[fault.kind] += same and fault.step + 1 in skipped
    return {kind: [good[kind], n] for kind, n in sorted(met.items())}


def main() -> None:
    """Run, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/faults"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    mine = {"faults": args.faults, "seed": args.seed, "commit": git_commit()}
    settings = args.work / "settings.json"
    if any(args.work.iterdir()) and (not settings.exists() or json.loads(settings.read_text()) != mine):
        raise SystemExit(f"error: {args.work}: was begun with other settings or another commit; remove it, or name another --work")
    settings.write_text(json.dumps(mine))
    shutil.rmtree(args.work / "tiny", ignore_errors=True)
    if (pid := os.fork()) == 0:  # not here: a process that has multiplied matrices must not be forked
        torch.manual_seed(0)
        make_tiny(args.work / "tiny")
        os._exit(0)
    os.waitpid(pid, 0)
    from conftest import Tiny

    tiny = Tiny(args.work / "tiny" / "model", args.work / "tiny" / "train", args.work / "tiny" / "val", [])
    faults, n_steps = draw(args.faults, args.seed)
    lines, same = disturb(args, faults, n_steps, tiny)
    skipped = {step for step, loss in losses(args.work / "run").items() if loss == "skipped"}
    result = table(faults, lines, same, skipped)
    print(f"\n{'fault':32} survived")
    for kind, (good, n) in result.items():
        print(f"{kind:32} {good} of {n}")
    total = [sum(column) for column in zip(*result.values(), strict=True)]
    print(f"{'all':32} {total[0]} of {total[1]}; {n_steps} losses and the model bit-identical: {same}")
    report = {
        "device": cpu_name(), "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "commit": mine["commit"], "ranks": N_RANKS, "backend": "gloo", "seed": args.seed, "steps": n_steps, "launches": len(lines),
        "median_seconds_a_launch": statistics.median(line["seconds"] for line in lines),
        "killed_after_20_s": sum(line["forced"] for line in lines),
        "skipped_steps": len(skipped), "bit_identical": same, "survived": total[0], "faults": total[1], "table": result,
    }  # fmt: skip
    path = Path(__file__).parent / "results" / ("faults.json" if args.faults == 100 else "faults-short.json")
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
