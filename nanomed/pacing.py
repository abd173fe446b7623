"""Pacing: one pause and one limit of requests in flight for all requests to an endpoint.

Additive increase, multiplicative decrease (AIMD), as in TCP: a sign of overload halves the limit, and every `limit` answers
raise it by one. Requests that were already in flight when the limit was halved do not halve it again. A rate limit also
pauses all requests, for as long as the server asks, or for 1, 2, 4, ... seconds.
"""

import asyncio
import contextlib
import time


class Pace:
    """When the next request may be sent."""

    def __init__(self, concurrency: int, stop: asyncio.Event):
        """concurrency: most requests in flight. stop: set when the run has failed; nothing waits from then on."""
        self.limit = float(concurrency)
        self.n_in_flight = self.n_answered = 0
        self.n_overloads = 0  # in a row, without an answer between them
        self._concurrency, self._stop, self._changed = concurrency, stop, asyncio.Event()
        self._last_answer = time.monotonic()
        self._halved_at = self._resume_at = 0.0

    async def enter(self) -> float:
        """Wait until one more request may be sent; returns the time of sending. Call `leave` after it."""
        while not self._stop.is_set():
            pause_s = self._resume_at - time.monotonic()
            if pause_s > 0:
                await self.sleep(pause_s)
            elif self.n_in_flight < int(self.limit):
                break
            else:
                self._changed.clear()
                await self._changed.wait()
        self.n_in_flight += 1
        return time.monotonic()

    def leave(self) -> None:
        """A request has come back, with an answer or without."""
        self.n_in_flight -= 1
        self._changed.set()

    def answered(self) -> None:
        """Count an answer and raise the limit."""
        self.n_answered += 1
        self.n_overloads = 0
        self._last_answer = time.monotonic()
        self.limit = min(self.limit + 1 / self.limit, float(self._concurrency))
        self._changed.set()

    def overloaded(self, sent_at: float, pause_s: float = 0.0) -> None:
        """Halve the limit, once for all requests that were in flight, and send nothing for pause_s seconds."""
        now = time.monotonic()
        if sent_at >= self._halved_at:
            self.limit = max(1.0, self.limit / 2)
            self.n_overloads += 1
            self._halved_at = now
        self._resume_at = max(self._resume_at, now + pause_s)

    def seconds_without_answer(self) -> float:
        """Seconds since the last answer, or since the start."""
        return time.monotonic() - self._last_answer

    def pause_left(self) -> float:
        """Seconds until requests are sent again."""
        return max(0.0, self._resume_at - time.monotonic())

    async def sleep(self, seconds: float) -> None:
        """Sleep; ends early when the run has failed."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)

    def stop(self) -> None:
        """End all waiting: the run has failed."""
        self._stop.set()
        self._changed.set()
