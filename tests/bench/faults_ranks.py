"""The ranks of faults.py: a process that becomes train.py, with patches that make one fault happen when its time has come."""

import errno
import os
import resource
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint.filesystem as filesystem

import train
from nanomed import parallel
from nanomed.checkpoint import Checkpointer
from nanomed.guard import Guard
from nanomed.metrics import Metrics
from nanomed.model import Decoder

N_RANKS = 2


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong, once the run has made `step` steps."""

    kind: str
    step: int
    phase: str
    rank: int  # that meets it; -1: all
    signal: int
    how: int  # which of the ways, where there are several


def patch(target, name: str, wrapper) -> None:
    """Replace target.name by a function that gets the real one first."""
    real = getattr(target, name)
    setattr(target, name, lambda *args, **kwargs: wrapper(real, *args, **kwargs))


def inject(rank: int, bad: dict[int, Fault], fault: Fault | None, fired: Path, reference: bool) -> None:
    """Patch this process so that the bad steps are bad, and the fault, if one is given, happens when its time has come."""
    now = {"step": 0, "done": False}

    def is_time(phase: str) -> bool:
        if not fault or fault.kind == "disk full":  # that happens in the next writing, whatever the phase
            return False
        return not now["done"] and fault.phase == phase and now["step"] >= fault.step

    def fire() -> None:
        now["done"] = True
        if fault.rank in (-1, rank):
            with fired.open("a") as file:
                file.write(f"{now['step']}\n")
        if fault.kind == "signal" and fault.rank in (-1, rank):
            os.kill(os.getpid(), fault.signal)
        if (fault.kind == "kill -9" and rank == max(0, fault.rank)) or fault.kind == "damaged checkpoint":
            fired.open("a").write(f"{now['step']}\n")
            os.kill(os.getpid(), signal.SIGKILL)

    def start(real, self, *args, **kwargs):
        real(self, *args, **kwargs)
        now["step"] = args[5]

    def add(real, self, step, *args):
        real(self, step, *args)
        now["step"] = step

    def forward(real, self, *args):
        if not torch.is_grad_enabled() and is_time("evaluation"):
            fire()
        loss = real(self, *args)
        found = bad.get(now["step"] + 1) if torch.is_grad_enabled() and not reference else None
        if found:
            loss = loss * (1000.0 if found.kind == "spike" else float("nan") if rank == max(0, found.rank) else 1.0)
        return loss

    def micro_step(real, *args):
        if is_time("step"):
            fire()
        return real(*args)

    def save(real, self, step):
        real(self, step)
        if is_time("checkpoint") and fault.kind == "signal":
            fire()

    def write_data(real, self, *args):
        if is_time("checkpoint") and fault.kind in ("kill -9", "damaged checkpoint"):
            fire()
        if fault and fault.kind == "disk full" and not now["done"] and now["step"] >= fault.step:
            fired.open("a").write(f"{now['step']}\n")
            if fault.how == 0 and rank == max(0, fault.rank):
                raise OSError(errno.ENOSPC, "No space left on device")
            if fault.how > 0:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        if fault and fault.phase == "checkpoint":
            time.sleep(0.1)  # long enough to be met by the signal
        return real(self, *args)

    def judge(real, self, loss, norm):
        return real(self, loss * float("nan") if reference and now["step"] + 1 in bad else loss, norm)

    patch(Metrics, "__init__", start)
    patch(Metrics, "add", add)
    patch(Decoder, "forward", forward)
    patch(parallel, "all_reduce_gradients", micro_step)
    patch(Checkpointer, "save", save)
    patch(filesystem.FileSystemWriter, "write_data", write_data)
    patch(Guard, "judge", judge)


def be_rank(rank: int, port: int, flags: list[str], log: Path, *injected) -> None:
    """Become a rank of train.py; never returns."""
    status, parent = 1, os.getppid()
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(N_RANKS),
                       "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}  # fmt: skip
        torch.set_num_threads(1)
        inject(rank, *injected)
        sys.argv = ["train.py", *flags]
        train.main()
        status = 0
    except SystemExit as exit_:
        status = exit_.code
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)


def end_with(parent: int) -> None:
    """End this process once its parent is gone: an interrupted bench must not leave a run behind that the next one meets."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)
