"""What an asynchronous checkpoint costs the training beside it: steps while one is being written, and steps without.

    python tests/bench/checkpoint.py NAME --recipe smollm2-135m --init MODEL --data BINS --seq-len 256 ...

One run of train.py, in this process, that saves a checkpoint now and then. Steps are timed from the first micro-batch
to the optimiser's end: `beside` those that begin while a checkpoint is being written, `alone` the others. `save` is the
pause for which training stops while weights and moments are copied, `write` the time from there until the checkpoint is
on disk and hashed. The classes alternate throughout the run, so that a machine that slows down slows all.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from machine import cpu_name

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
RESULTS = Path(__file__).parent / "results"
SKIP = 2  # first steps, in which memory is still being found


def watch() -> tuple[dict[str, list[float]], list[float]]:
    """Put a clock around train.py's steps and checkpoints: seconds by class, and the peak memory (GB) after each save."""
    import train
    from nanomed.checkpoint import Checkpointer

    seconds, peaks_gb = {"alone": [], "beside": [], "save": [], "write": []}, []
    writing, n_steps, began = [], [0], [0.0]  # writing: the futures of the checkpoints that were begun
    forward_backward, step, save = train.forward_backward, train.guard.step_unless, Checkpointer.save

    def timed_gradients(*args):
        began[:] = [time.perf_counter()]
        n_steps[0] += 1
        n_steps[1:] = ["beside" if any(not future.done() for future in writing) else "alone"]
        return forward_backward(*args)

    def timed_step(*args):
        step(*args)
        if n_steps[0] > SKIP:
            seconds[n_steps[1]].append(time.perf_counter() - began[0])

    def timed_save(self, step):
        self.wait()  # for the one before: not part of the pause
        start = time.perf_counter()
        save(self, step)
        seconds["save"].append(time.perf_counter() - start)
        self._pending[1].add_done_callback(lambda _: seconds["write"].append(time.perf_counter() - start))
        writing.append(self._pending[1])
        peaks_gb.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)

    train.forward_backward, train.guard.step_unless, Checkpointer.save = timed_gradients, timed_step, timed_save
    return seconds, peaks_gb


def disk_gb_s(folder: str, gb: float = 1.0) -> float:
    """Sequential writing with fsync."""
    chunk, began = os.urandom(1 << 26), time.perf_counter()
    with open(Path(folder) / "disk", "wb") as file:
        for _ in range(int(gb * 1e9) >> 26):
            file.write(chunk)
        os.fsync(file.fileno())
    return gb / (time.perf_counter() - began)


def main() -> None:
    """Run, print, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--work", help="folder for the run; default: a temporary one")
    args, flags = parser.parse_known_args()
    import train

    seconds, peaks_gb = watch()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        sys.argv = ["train.py", *flags, "--out", f"{folder}/run"]
        train.main()
        newest = max((Path(folder) / "run" / "checkpoints").glob("step-*"))
        size_gb = sum(file.stat().st_size for file in newest.iterdir()) / 1e9
        disk = disk_gb_s(folder)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    report = {
        "device": cpu_name(), "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()}, "flags": flags,
        "checkpoint_gb": size_gb, "disk_gb_s": disk, "median_s": medians,
        "percent_slower_beside": 100 * (medians["beside"] / medians["alone"] - 1),
        "peak_gb_after_each_save": peaks_gb, "seconds": seconds,
    }  # fmt: skip
    for key in ("median_s", "percent_slower_beside", "checkpoint_gb", "disk_gb_s"):
        print(key, report[key])
    path = RESULTS / f"checkpoint-{args.name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
