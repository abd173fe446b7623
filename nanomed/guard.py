"""What keeps a run of days alive: bad steps are skipped on the device, and signals end it with a checkpoint.

**Guard.** A step whose loss or gradient norm is not finite, or lies 6 standard deviations above the last 128 accepted
steps, changes nothing: fused AdamW gets the verdict as its `found_inf`, a number on the device, so the CPU never waits
for it. Its step count stays too; the learning rate, a function of the step's number, goes on. Loss and norm are already
sums over all ranks, so all decide alike. The window is part of every checkpoint: a resumed run decides as the
undisturbed one. Judging takes some twenty kernels on 256 numbers. (The rule is OLMo's SkipStepOptimizer's, but what was
skipped does not enter the window here: ten spikes in a row must not make the eleventh look normal. And a gradient norm
must be 4 times the mean as well: in small batches norms of 2 times are ordinary, 6 sigma or not, and clipping is enough.)

**StopSignal.** SIGTERM, SIGINT or SIGUSR1 on any rank: all ranks leave the loop before the same micro-batch, the step
in progress is dropped, the last whole one saved. They agree through the process group's key-value store, over the
CPU's network, one or two small messages a micro-batch; no device is waited for. The end of torchrun (kill -9, a machine
short of memory) counts as such a signal: its processes would go on unseen and hold the run folder. The store usually ends
with it; then the ranks agree by one reduction among themselves.
"""

import os
import signal
import socket
import sys
import threading
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from nanomed import InputError
from nanomed.parallel import START_TIMEOUT, World

WINDOW = 128  # accepted steps that a new one is compared with
MIN_STEPS = WINDOW // 2  # before so many nothing is called a spike
SIGMAS = 6.0
LEAST = (0.0, 4.0)  # nor is a loss or gradient norm below so many times the window's mean
MAX_SKIPS = 10  # consecutive ones; from then on every step is skipped, until the next log step ends the run


class Verdict(NamedTuple):
    """Of a step, on the device."""

    skip: Tensor  # () bool
    limits: Tensor  # (2,) float64, of loss and gradient norm; inf while there are none


class Guard:
    """Which steps must not touch the model. Its state is two tensors on the device."""

    def __init__(self, device: torch.device):
        self.window = torch.zeros(WINDOW, 2, dtype=torch.float64, device=device)  # a ring of (loss, gradient norm)
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)  # steps accepted, steps skipped in a row
        self._slots = torch.arange(WINDOW, device=device)
        self._least = torch.tensor(LEAST, dtype=torch.float64, device=device)

    def state(self) -> dict[str, Tensor]:
        """What belongs into a checkpoint; shares the live memory."""
        return {"window": self.window, "counts": self.counts}

    def judge(self, loss: Tensor, grad_norm: Tensor) -> Verdict:
        """Must the step be skipped? loss, grad_norm: (), the same on every rank. To be called once per step."""
        new = torch.stack([x.to(self.window.device, torch.float64) for x in (loss, grad_norm)])  # offloaded, the norm is elsewhere
        accepted, in_a_row = self.counts
        n = accepted.clamp(max=WINDOW)
        filled = (self._slots < n)[:, None]
        mean = (self.window * filled).sum(0) / n
        deviation = (((self.window - mean) * filled).square().sum(0) / (n - 1)).sqrt()
        limits = torch.maximum(mean + SIGMAS * deviation, self._least * mean)
        limits = torch.where(n >= MIN_STEPS, limits, torch.inf)
        skip = ~(new.isfinite() & (new <= limits)).all() | (in_a_row >= MAX_SKIPS)
        at = ((self._slots == accepted % WINDOW) & ~skip)[:, None]
        self.window.copy_(torch.where(at, new, self.window))
        self.counts.copy_(torch.stack((accepted + ~skip, (in_a_row + 1) * skip)))
        return Verdict(skip, limits)

    def check(self, step: int) -> None:
        """InputError if MAX_SKIPS steps in a row have been skipped. Waits for the device: only at log steps."""
        if self.counts[1].item() >= MAX_SKIPS:
            raise InputError(
                f"step {step}: {MAX_SKIPS} steps in a row were skipped, the run is stopped; metrics.jsonl says why, and "
                "which documents they read. Leave these out or lower --lr, in a new --out"
            )


def step_unless(skip: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """The optimiser's step, or nothing at all where skip, () bool on the device, says so.

    Fused AdamW decides on the device. An optimiser that knows no `found_inf` costs the one wait for skip.
    """
    if all(group.get("fused") for group in optimizer.param_groups):
        optimizer.found_inf = skip.float().to(optimizer.param_groups[0]["params"][0].device)
        optimizer.step()
    elif not skip.item():
        optimizer.step()


def reason(row: dict, limits: tuple[float, float]) -> str:
    """Why a step was skipped, from its row of metrics.jsonl and the limits of loss and gradient norm."""
    found = []
    rules = (f"{SIGMAS:g} sigma over", f"{SIGMAS:g} sigma over and {LEAST[1]:g} times")
    for key, name, limit, rule in zip(("loss", "grad_norm"), ("loss", "gradient norm"), limits, rules, strict=True):
        if row[key] is None:
            found.append(f"{name} is not finite")
        elif row[key] > limit:
            found.append(f"{name} {row[key]:.4g} is above {limit:.4g}, {rule} the last {WINDOW} steps")
    return " and ".join(found) or f"{MAX_SKIPS} steps in a row were skipped before it"


class Stopped(Exception):
    """Raised on all ranks at the same poll once one of them was told to stop; its text is the signal's name."""


class StopSignal:
    """SIGTERM, SIGINT and SIGUSR1 become one agreed end of all ranks. A second signal ends the process at once.

    Python runs a signal's handler only between its own instructions, and a rank may be deep inside a collective that
    will never return. So the bytes that signals leave in a socket are read by a thread, which can always end the
    process.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, world: World):
        self.world, self._asked, self._tick, self._stop_at = world, "", 0, None
        self._store = dist.PrefixStore("stop", dist.distributed_c10d._get_default_store())
        self._group = dist.new_group(backend="gloo", timeout=START_TIMEOUT) if world.size > 1 else None
        self._last_poll: tuple[int, Tensor, dist.Work] | None = None  # once the store is gone
        self._ours, theirs = socket.socketpair()
        self._theirs = theirs
        theirs.setblocking(False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in self.SIGNALS}
        self._wakeup_fd = signal.set_wakeup_fd(theirs.fileno())
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        """The first signal is noted; one more than a second later ends the process (torchrun may repeat Slurm's)."""
        first = 0.0
        while number := self._ours.recv(1):
            if number[0] not in self.SIGNALS:
                continue
            if not self._asked:
                first, self._asked = time.monotonic(), signal.Signals(number[0]).name
                if self.world.first():
                    tqdm.write(f"{self._asked}: saving, then stopping; once more stops at once", file=sys.stderr)
            elif time.monotonic() - first > 1:
                os._exit(128 + number[0])

    def poll(self) -> None:
        """Raise Stopped if the ranks have agreed to stop here. Every rank must call it equally often.

        Rank 0 decides, one poll ahead, and publishes how far it is; no other rank is more than one poll before it.
        """
        self._tick += 1
        if self.world.launcher not in (None, os.getppid()) and not self._asked:
            self._asked = "the end of torchrun"
        if self.world.size == 1:
            self._stop_at = self._tick if self._asked else None
        elif self._last_poll is None:
            try:
                self._agree_by_store()
            except (dist.DistError, RuntimeError):
                if not self._store_is_gone():
                    raise
                self._announce_tick()
        else:
            self._agree_without_store()
        if self._stop_at == self._tick:
            raise Stopped(self._asked)

    def _agree_by_store(self) -> None:
        """Rank 0 decides on the next poll; the others follow."""
        if self.world.first():
            if self._stop_at is None and (self._asked or self._store.check(["asked"])):
                self._asked = self._asked or self._store.get("asked").decode()
                self._stop_at = self._tick + 1
            self._store.set("clock", f"{self._tick} {self._stop_at or 0} {self._asked}")
        else:
            if self._asked and self._stop_at is None:
                self._store.set("asked", self._asked)
            self._follow()

    def _store_is_gone(self) -> bool:
        """Whether the store has ended, with the torchrun that served it (on the first machine)."""
        try:
            self._store.set(f"alive {self.world.rank}", "")
        except (dist.DistError, RuntimeError):
            self._asked = self._asked or "the end of torchrun"
            return True
        return False

    def _announce_tick(self) -> None:
        """Start the reduction of the poll at which each rank found the store gone. The ranks are at most one poll apart."""
        tick = torch.tensor(self._tick)
        self._stop_at = None
        self._last_poll = self._tick, tick, dist.all_reduce(tick, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def _agree_without_store(self) -> None:
        """Stop two polls after the last rank found the store gone.

        Waits for the reduction two polls after its start: by then every rank has passed the poll in between, since the steps'
        collectives need all of them, and so has started the reduction too.
        """
        started, tick, work = self._last_poll
        if self._tick == started + 2:
            work.wait()
            self._stop_at = int(tick) + 2

    def _follow(self) -> None:
        """Wait until rank 0 has decided on this poll, usually long ago."""
        deadline = time.monotonic() + START_TIMEOUT.total_seconds()  # the first polls may wait for a compilation
        while self._tick > 1:
            clock, stop_at, asked = self._store.get("clock").decode().split(" ")
            if int(clock) >= self._tick - 1:
                self._stop_at, self._asked = int(stop_at) or None, asked or self._asked
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"rank 0 has done nothing for {START_TIMEOUT.total_seconds():.0f} s")
            time.sleep(0.001)

    def close(self) -> None:
        """Give the signals back to whoever had them before."""
        signal.set_wakeup_fd(self._wakeup_fd)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._theirs.close()
