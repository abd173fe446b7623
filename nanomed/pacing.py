"""One pace for all requests to an endpoint: a common pause after a rate limit, and fewer requests in flight.

Additive increase, multiplicative decrease, as TCP does it: a rate limit halves the number of requests that may be in flight
and pauses all of them for as long as the server asks; every answer adds a little, up to what the user allowed. Requests that
would each wait for themselves would all come back at once, and be refused at once.
"""

import asyncio
import time

POLL_S = 0.02


class Pace:
    """How many requests may be in flight now, and from when on."""

    def __init__(self, most: int, stop: asyncio.Event):
        """most: requests in flight at best. stop: set when the run has failed; nobody waits then."""
        self.most, self.limit, self.in_flight = most, float(most), 0
        self.n_answered, self._last_answer, self._resume_at = 0, time.monotonic(), 0.0
        self._stop = stop

    async def enter(self) -> None:
        """Wait until one more request may be sent. Every call must be followed by one of `leave`."""
        while not self._stop.is_set() and (self.in_flight >= int(self.limit) or time.monotonic() < self._resume_at):
            await asyncio.sleep(POLL_S)
        self.in_flight += 1

    def leave(self) -> None:
        """The request has come back, whatever came of it."""
        self.in_flight -= 1

    def answered(self) -> None:
        """Note an answer: a little faster from now on."""
        self.n_answered += 1
        self._last_answer = time.monotonic()
        self.limit = min(float(self.most), self.limit + 1 / self.limit)

    def limited(self, wait_s: float) -> None:
        """Note a rate limit: nobody sends for wait_s seconds. Those that come back meanwhile belong to the same one."""
        now = time.monotonic()
        if now >= self._resume_at:
            self.limit = max(1.0, self.limit / 2)
        self._resume_at = max(self._resume_at, now + wait_s)

    def seconds_without_answer(self) -> float:
        """Seconds since the last answer, or since the beginning."""
        return time.monotonic() - self._last_answer
