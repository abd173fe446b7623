"""Checkpoints that are whole or not there: written beside the training, marked DONE last, the newest K kept.

`save` copies weights and AdamW's means to the CPU (the only time training waits), and threads of torch's distributed
checkpoint write every rank's own rows to disk. When all ranks have finished and synced, rank 0 writes DONE. Only a
folder with DONE counts; older ones are removed only after it. So a kill at any moment costs the steps since the newest
DONE and nothing else. The rows are re-cut on loading: any number of ranks may go on.

A checkpoint holds no data position beyond the step (nanomed.batches: the data is a function of it), no schedule
(nanomed.optim: so is the learning rate) and no random state: train.py seeds every step from (seed, step).
"""

import json
import os
import shutil
import threading
from concurrent.futures import Future
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from nanomed import InputError
from nanomed.parallel import SLOW_TIMEOUT, World, print0


def write_durably(path: Path, text: str) -> None:
    """The file with this text, or no file of this name: written aside, synced, renamed."""
    tmp = path.with_name(path.name + ".tmp")
    with tmp.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(tmp, path)


def whole(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints in FOLDER that carry DONE, oldest first."""
    found = [(int(p.name.removeprefix("step-")), p) for p in folder.glob("step-*") if (p / "DONE").exists()]
    return sorted(found)


class Checkpointer:
    """The checkpoints of one run and the state that goes into them."""

    def __init__(self, folder: Path, keep: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, world: World):
        self.folder, self.keep, self.world = folder, keep, world
        self.model, self.optimizer = model, optimizer
        # Its own group: the writing threads must not mix their messages with the training's.
        self._group = dist.new_group(backend="gloo", timeout=SLOW_TIMEOUT)
        self._pending: tuple[Path, Future] | None = None

    def _state(self) -> dict:
        """Everything that is saved, by parameter name; tensors share the live memory."""
        params = dict(self.model.named_parameters())
        state = {"model": {name: p.data for name, p in params.items()}}
        for name, p in params.items():
            for key, value in self.optimizer.state[p].items():
                state.setdefault(key, {})[name] = value
        return state

    def resume(self) -> int:
        """Load the newest whole checkpoint into model and optimiser. Its step, 0 where there is none."""
        newest = [whole(self.folder)[-1:] if self.world.first() else None]
        dist.broadcast_object_list(
            newest, src=0, group=self._group
        )  # one view of a folder that machines may see unequally
        if not newest[0]:
            return 0
        step, path = newest[0][0]
        try:
            dcp.load(self._state(), checkpoint_id=path, process_group=self._group)
        except (CheckpointException, OSError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{path}: cannot be read ({_reason(error)}); remove the folder to go on from the checkpoint before"
            ) from error
        print0(f"resuming from {path}")
        return step

    def save(self, step: int) -> None:
        """Start writing step's checkpoint; training may go on at once. Waits first for one still being written."""
        self.wait()
        path = self.folder / f"step-{step:08}"
        if self.world.first():
            shutil.rmtree(path, ignore_errors=True)  # a broken attempt of this step
            path.mkdir(parents=True)
            write_durably(path / "state.json", json.dumps({"step": step}))
        dist.barrier(group=self._group)
        self._pending = path, dcp.async_save(self._state(), checkpoint_id=path, process_group=self._group)

    def poll(self) -> None:
        """Mark the checkpoint in flight DONE if it has become whole. InputError if it could not be written."""
        if self._pending and self._pending[1].done():
            self.wait()

    def wait(self) -> None:
        """Block until no checkpoint is in flight; then as poll."""
        if not self._pending:
            return
        (path, future), self._pending = self._pending, None
        try:
            future.result()
            if self.world.first():
                write_durably(path / "DONE", "")
        except (CheckpointException, OSError, RuntimeError) as error:
            free_gb = shutil.disk_usage(self.folder).free / 1e9  # on a full disk torch may only say "unexpected pos"
            if self.world.first():
                shutil.rmtree(path, ignore_errors=True)
            raise InputError(
                f"{path}: the checkpoint could not be written ({_reason(error)}; {free_gb:.1f} GB free); earlier ones are "
                "intact, the same command goes on from the newest"
            ) from error
        if self.world.first():
            self._prune()

    def _prune(self) -> None:
        keep = {path for _, path in whole(self.folder)[-self.keep :]}
        for path in self.folder.glob("step-*"):
            if path not in keep:
                (path / "DONE").unlink(
                    missing_ok=True
                )  # first, so that a kill half-way leaves nothing that looks whole
                # In a thread: removing 100 GB takes a while, and the other ranks already wait in the next step.
                threading.Thread(target=shutil.rmtree, args=(path,), kwargs={"ignore_errors": True}).start()


def _reason(error: Exception) -> str:
    """The first cause in one line: torch wraps the ranks' own errors."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__
    return f"{type(error).__name__}: {error}".splitlines()[0]
