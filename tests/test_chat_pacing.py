"""A server that limits the rate: all requests wait together, none is lost, and the run ends only if nothing is answered."""

import asyncio
import time

import pytest

from chat_requests import _quick, collect, echo, fixture_patient, requests  # noqa: F401
from endpoint import serving
from nanomed import InputError, chat
from nanomed.pacing import Pace


class Limited:
    """Answers `rate` requests in every window of `window_s` seconds, all others with 429."""

    def __init__(self, rate: int, window_s: float, headers: dict):
        self.rate, self.window_s, self.headers = rate, window_s, headers
        self.window, self.n, self.n_refused = 0, 0, 0

    def __call__(self, request: dict, number: int):
        window = int(time.monotonic() / self.window_s)
        if window != self.window:
            self.window, self.n = window, 0
        self.n += 1
        if self.n > self.rate:
            self.n_refused += 1
            return 429, self.headers
        return echo(request, number)


@pytest.mark.parametrize("headers", [{"Retry_After": "0.1"}, {"retry_after_ms": "100"}, {}])
def test_a_rate_limit_loses_no_request(tmp_path, monkeypatch, patient, headers):
    """64 in flight, 10 answered in 0.1 s: tried one by one, requests would use up their tries."""
    monkeypatch.setattr(chat, "FIRST_WAIT_S", 0.05)
    limited = Limited(10, 0.1, headers)
    with serving(limited) as endpoint:
        got = collect(endpoint, tmp_path / "cache", requests(200), concurrency=64, tries=2)
    assert got == {i: f"to text {i}" for i in range(200)}
    assert limited.n_refused < 200


def test_all_requests_pause_together(tmp_path, patient):
    """From the first 429 until the pause is over no other request is sent."""
    times = []

    def behave(request, number):
        times.append(time.monotonic())
        return (429, {"Retry_After": "0.8"}) if len(times) == 1 else echo(request, number)

    with serving(behave) as endpoint:
        collect(endpoint, tmp_path / "cache", requests(20), concurrency=1)
    assert times[1] - times[0] >= 0.8


def test_a_request_that_alone_is_over_the_limit_is_one_failure(tmp_path, patient):
    """Larger than the tokens of a minute: 429 each time, while others are answered."""
    large = lambda request, n: 429 if request["messages"][0]["content"] == "text 0" else echo(request, n)  # noqa: E731
    with serving(large) as endpoint:
        got = collect(endpoint, tmp_path / "cache", requests(40), concurrency=2, tries=1)
    assert got == {i: f"to text {i}" if i else "" for i in range(40)}


def test_an_outage_is_waited_out(tmp_path, patient):
    started = time.monotonic()
    down = lambda request, n: 500 if time.monotonic() - started < 1.0 else echo(request, n)  # noqa: E731
    with serving(down) as endpoint:
        assert len(collect(endpoint, tmp_path / "cache", requests(30), concurrency=8, tries=2)) == 30


@pytest.mark.parametrize("status", [429, 500])
def test_without_any_answer_the_run_ends(tmp_path, monkeypatch, status):
    monkeypatch.setattr(chat, "PATIENCE_S", 0.5)
    with serving(lambda *_: status) as endpoint:
        started = time.monotonic()
        with pytest.raises(InputError, match=rf"answers {status} .*no answer for \d+ s; run again later"):
            collect(endpoint, tmp_path / "cache", requests(20), concurrency=4)
    assert time.monotonic() - started >= 0.5


def test_the_limit_halves_once_for_all_in_flight_and_grows_again():
    pace = Pace(64, asyncio.Event())
    sent_at = time.monotonic()
    for _ in range(64):
        pace.overloaded(sent_at)
    assert pace.limit == 32
    for _ in range(10):
        pace.overloaded(time.monotonic() + 1)
    assert pace.limit == 1
    for _ in range(5_000):
        pace.answered()
    assert pace.limit == 64


def test_the_time_of_a_retry_is_read_in_every_form():
    from email.utils import formatdate

    from nanomed.responses import retry_after

    assert retry_after({"retry-after": "2"}) == 2
    assert retry_after({"retry-after-ms": "1500", "retry-after": "2"}) == 1.5
    assert retry_after({"retry-after": formatdate(time.time() + 30, usegmt=True)}) == pytest.approx(30, abs=2)
    for nothing in ("0", "-1", "soon", formatdate(0), "nan"):
        assert not retry_after({"retry-after": nothing})
    assert retry_after({}) is None
