"""Atomic, asynchronous checkpoints: written beside the training, marked DONE last, the newest K kept.

`save` copies weights and AdamW's moments to the CPU (training waits for that, and for a checkpoint still being written), and
threads of torch's distributed checkpoint, of the lowest priority, write every rank's own rows to disk. When all ranks have
finished and synced, such a thread of rank 0 writes DONE, whatever may have become of the training. Only a folder with DONE
counts; older ones are removed only after it. So a kill at any moment costs the steps since the newest DONE and nothing else.
The rows are cut anew on loading: any number of ranks may resume.

DONE lists the SHA-256 of every file, which each rank takes of its own ones, beside the training (a second for 1 to 2
GB): torch would load a flipped bit without a word. A checkpoint that is damaged is passed over for the one before. A
model with a NaN in it is not saved, and what is not saved rotates nothing out.

A checkpoint holds no data position beyond the step (nanomed.batches: the data is a function of it), no schedule
(nanomed.optim: so is the learning rate) and no random state: train.py seeds every step from (seed, step). It does hold
the guard's window: which steps are skipped depends on it.
"""

import json
import math
import os
import re
import shutil
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from nanomed import InputError, first_line
from nanomed.files import sha256, write_durably
from nanomed.guard import Guard
from nanomed.lowbit import FORMER_SCALE
from nanomed.parallel import IO_TIMEOUT, World, print0
from nanomed.weights import local


def whole(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints in FOLDER that carry DONE, oldest first."""
    return sorted((int(p.name.removeprefix("step-")), p) for p in _ours(folder) if (p / "DONE").exists())


def _ours(folder: Path) -> list[Path]:
    """What a Checkpointer has made there: a copy that somebody put beside it, step-00000100-good, is theirs."""
    return [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name)]


class Checkpointer:
    """The checkpoints of one run and the state that goes into them."""

    def __init__(
        self,
        folder: Path,
        keep: int,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        guard: Guard,
        world: World,
    ):
        self.folder, self.keep, self.world = folder, keep, world
        self.model, self.optimizer, self.guard = model, optimizer, guard
        self.step = 0  # of the newest that was loaded or begun
        # Its own group: the writing threads must not mix their messages with the training's.
        self._group = dist.new_group(backend="gloo", timeout=IO_TIMEOUT)
        self._pending: tuple[Path, Future] | None = None
        self._sealer = ThreadPoolExecutor(1, initializer=_give_way)

    def _state(self) -> dict:
        """Everything that is saved, by parameter name; tensors share the live memory."""
        params = dict(self.model.named_parameters())
        state = {"model": {name: p.data for name, p in params.items()}, "guard": self.guard.state()}
        for name, p in params.items():
            for key, value in self.optimizer.state[p].items():
                state.setdefault(key, {})[name] = value
        return state

    def resume(self) -> int:
        """Load the newest checkpoint that is whole and sound into model, optimiser and guard. Its step, 0 if none exists.

        InputError where there are some and none can be read: starting over would throw the run away.
        """
        found = [whole(self.folder) if self.world.first() else None]
        # One view of a folder that machines may see unequally.
        dist.broadcast_object_list(found, src=0, group=self._group)
        damaged = []
        for step, path in reversed(found[0]):
            reason = self._agreed(self._verify, path) or self._agreed(self._load, path)
            if reason is None:
                if self.world.first():
                    for bad in damaged:  # no longer counted among the newest K, nor ever tried again
                        (bad / "DONE").unlink(missing_ok=True)
                print0(f"resuming from {path}")
                self.step = step
                return step
            print0(f"{path}: cannot be read ({reason}); trying the checkpoint before")
            damaged.append(path)
        if damaged:
            raise InputError(
                f"{self.folder}: none of its {len(damaged)} checkpoints can be read ({reason}); remove it to start over"
            )
        return 0

    def _agreed(self, attempt, path: Path) -> str | None:
        """attempt(path) on all ranks; the first rank's reason why it failed, the same everywhere, None if on none."""
        reason = None
        try:
            attempt(path)
        except (CheckpointException, OSError, ValueError, RuntimeError) as error:
            reason = _reason(error)
        reasons = [None] * self.world.size
        dist.all_gather_object(reasons, reason, group=self._group)
        return next(filter(None, reasons), None)

    def _verify(self, path: Path) -> None:
        """ValueError if a file is not the one that was written; each rank looks at its share of them."""
        if not (text := (path / "DONE").read_text()):
            raise ValueError("its DONE is empty")
        digests = json.loads(text)
        for name in sorted(digests)[self.world.rank :: self.world.size]:
            if sha256(path / name) != digests[name]:
                raise ValueError(f"{name} is not what was written")

    def _load(self, path: Path) -> None:
        names = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        if any(name.startswith(f"{FORMER_SCALE}.") for name in names):
            raise InputError(
                f"{path}: has 8-bit moments of an older format (codes of exp_avg_sq, now of its square root), which lost small "
                "values; finish the run with the version that began it, or start a new one from its model"
            )
        dcp.load(self._state(), checkpoint_id=path, process_group=self._group)

    def save(self, step: int) -> None:
        """Start writing step's checkpoint; training may go on at once. Waits first for one still being written.

        InputError if the model holds a NaN or an infinity: nothing is written then, nothing removed.
        """
        self.wait()
        path = self.folder / f"step-{step:08}"
        if not self._is_finite():
            newest = [p.name for _, p in whole(self.folder)[-1:]]
            raise InputError(
                f"step {step}: the model is not finite and was not saved; the newest sound checkpoint is "
                f"{newest[0] if newest else 'none'}, the same command resumes from it"
            )
        if self.world.first():
            shutil.rmtree(path, ignore_errors=True)  # a broken attempt of this step
            path.mkdir(parents=True)
        dist.barrier(group=self._group)
        # From that thread, for the one that torch writes in inherits its low priority. Here the copying is waited for.
        writer = Writer(path)
        begin = partial(dcp.async_save, self._state(), storage_writer=writer, process_group=self._group)
        written = self._sealer.submit(begin).result()
        self._pending = path, self._sealer.submit(self._seal, path, written)
        self.step = step

    def _is_finite(self) -> bool:
        """Are all weights numbers, on every rank? A maximum norm is NaN if one of them is, and needs no memory."""
        rows = [local(p) for p in self.model.parameters()]
        worst = torch.stack([torch.linalg.vector_norm(r, math.inf) for r in rows if r.numel()]).isfinite()
        sound = worst.all().cpu().int()
        dist.all_reduce(sound, dist.ReduceOp.MIN, group=self._group)
        return bool(sound)

    def _seal(self, path: Path, written: Future) -> None:
        """Once every rank has written, write DONE with every file's SHA-256, then remove the oldest checkpoint.

        In the sealing thread, since rank 0 must not wait for the disk in a step: the others' time-out is short.
        """
        written.result()
        mine = [*path.glob(f"__{self.world.rank}_*"), *([path / ".metadata"] if self.world.first() else [])]
        everyone = [None] * self.world.size
        dist.all_gather_object(everyone, {file.name: sha256(file) for file in mine}, group=self._group)
        digests = {name: digest for files in everyone for name, digest in files.items()}
        if self.world.first():
            write_durably(path / "DONE", json.dumps(digests, indent=1))
            try:
                self._prune()
            except OSError as error:  # the new checkpoint is complete all the same
                print0(f"warning {self.folder}: an old checkpoint could not be removed ({first_line(error)})")

    def poll(self) -> None:
        """Note that the checkpoint in flight has become whole. InputError if it could not be written."""
        if self._pending and self._pending[1].done():
            self.wait()

    def wait(self) -> None:
        """Block until no checkpoint is in flight; then as poll."""
        if not self._pending:
            return
        (path, future), self._pending = self._pending, None
        try:
            future.result()
        except (CheckpointException, OSError, RuntimeError) as error:
            free_gb = shutil.disk_usage(self.folder).free / 1e9  # on a full disk torch may only say "unexpected pos"
            if self.world.first():
                shutil.rmtree(path, ignore_errors=True)
            raise InputError(
                f"{path}: the checkpoint could not be written ({_reason(error)}; {free_gb:.1f} GB free); earlier ones are "
                "intact, the same command resumes from the newest"
            ) from error

    def save_and_wait(self, step: int) -> None:
        """Block until the checkpoint of step is on disk, which is saved now if it was not before."""
        if step > self.step:
            self.save(step)
        self.wait()

    def _prune(self) -> None:
        keep = {path for _, path in whole(self.folder)[-self.keep :]}
        for path in _ours(self.folder):
            if path not in keep:
                (path / "DONE").unlink(missing_ok=True)  # first, so that a kill half-way leaves nothing that looks whole
                # In a thread: removing 100 GB takes a while, and the other ranks already wait in the next step.
                threading.Thread(target=shutil.rmtree, args=(path,), kwargs={"ignore_errors": True}).start()


class Writer(dcp.FileSystemWriter):
    """torch's, whose writing thread would create a context on GPU 0, on every rank: a thread begins there."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def write_data(self, plan, planner) -> Future:
        """As torch's."""
        if self._device is not None:
            torch.cuda.set_device(self._device)
        return super().write_data(plan, planner)


def _give_way() -> None:
    """Of this thread and those it starts: the training's come first where cores are short.

    Only Linux has a priority for every thread; elsewhere it would slow the training too.
    """
    if sys.platform == "linux":
        os.nice(19)


def _reason(error: Exception) -> str:
    """The first cause in one line: torch wraps the ranks' own errors."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__
    return f"{type(error).__name__}: {first_line(error)}"
