"""Every request is answered once and paid for once, and the cache that sees to it."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_requests import _quick, body, collect, echo, requests  # noqa: F401
from conftest import ROOT
from endpoint import completion, serving
from nanomed import InputError, chat
from nanomed.chat import Cache, ask, request_hash


def test_every_request_gets_its_own_answer(tmp_path):
    with serving(echo) as endpoint:
        got = collect(endpoint, tmp_path / "cache", requests(50), concurrency=8)
    assert got == {i: f"to text {i}" for i in range(50)}
    assert sorted(endpoint.paid()) == sorted(f"text {i}" for i in range(50))


def test_answers_carry_model_reason_and_tokens(tmp_path):
    with serving(lambda *_: completion("JA", "length")) as endpoint:
        ((_, answer),) = ask(requests(1), endpoint.url, tmp_path / "cache")
    assert answer == chat.Answer("JA", "length", "tiny", 10, 2)


def test_answers_come_in_order_of_completion(tmp_path):
    slow = lambda request, _: ("after", 0.3, "slow") if "text 0" in request["messages"][0]["content"] else "quick"  # noqa: E731
    with serving(slow) as endpoint:
        order = [key for key, _ in ask(requests(5), endpoint.url, tmp_path / "cache", concurrency=5)]
    assert order[-1] == 0
    assert sorted(order) == list(range(5))


def test_no_more_in_flight_than_asked_for(tmp_path):
    with serving(lambda *_: ("after", 0.02, "JA")) as endpoint:
        collect(endpoint, tmp_path / "cache", requests(20), concurrency=3)
    assert endpoint.most == 3


def test_requests_are_taken_as_there_is_room(tmp_path):
    """Else 260,000 prompts would be in memory at once."""
    taken = []
    lazy = ((key, taken.append(key) or request) for key, request in requests(100))
    with serving(echo) as endpoint:
        answers = ask(lazy, endpoint.url, tmp_path / "cache", concurrency=4)
        next(answers)
        assert len(taken) <= 8
        answers.close()


# ---- paid for once ----


def test_a_second_run_pays_nothing(tmp_path):
    with serving(echo) as endpoint:
        first = collect(endpoint, tmp_path / "cache", requests(10))
        second = collect(endpoint, tmp_path / "cache", requests(12))
    assert len(endpoint.bodies) == 12
    assert first.items() < second.items()


def test_another_url_is_the_same_model_and_another_body_is_another_request(tmp_path):
    with serving(echo) as one:
        collect(one, tmp_path / "cache", requests(3))
    changed = [(0, body("text 0") | {"temperature": 1}), (1, body("text 1") | {"model": "other"}), (2, body("text 2"))]
    with serving(echo) as two:
        collect(two, tmp_path / "cache", changed)
    assert sorted(two.paid()) == ["text 0", "text 1"]  # in any order: they are asked at once


@pytest.mark.parametrize("concurrency", [1, 8])
def test_a_body_that_comes_twice_is_asked_once(tmp_path, concurrency):
    asked = [(key, body(f"text {key % 3}")) for key in range(12)]
    with serving(lambda request, n: ("after", 0.02, echo(request, n))) as endpoint:
        got = collect(endpoint, tmp_path / "cache", asked, concurrency=concurrency)
    assert got == {key: f"to text {key % 3}" for key in range(12)}
    assert len(endpoint.bodies) == 3


def test_what_is_in_flight_when_another_fails_is_kept(tmp_path):
    def behave(request, number):
        return 401 if request["messages"][0]["content"] == "text 0" else ("after", 0.3, echo(request, number))

    with serving(behave) as endpoint:
        with pytest.raises(InputError, match="401"):
            collect(endpoint, tmp_path / "cache", requests(4))
        collect(endpoint, tmp_path / "cache", requests(3, first=1))
        assert len(endpoint.bodies) == 4


RUN = """
import sys
from pathlib import Path
from nanomed.chat import ask
requests = [(i, {"model": "tiny", "messages": [{"role": "user", "content": f"text {i}"}]}) for i in range(200)]
for key, answer in ask(requests, sys.argv[1], Path(sys.argv[2]), concurrency=4):
    print(key, answer.text, flush=True)
"""


def test_kill_9_pays_only_for_what_was_in_flight(tmp_path):
    command = [sys.executable, "-c", RUN]
    killed = threading.Event()

    def behave(request, number):
        if len(endpoint.bodies) > 100:  # so that it is not through before it is killed
            killed.wait()
        return echo(request, number)

    with serving(behave) as endpoint:
        run = subprocess.Popen([*command, endpoint.url, tmp_path / "cache"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        seen = [run.stdout.readline() for _ in range(40)]
        os.kill(run.pid, signal.SIGKILL)
        seen += run.stdout.read().splitlines()
        run.wait()
        killed.set()
        assert 40 <= len(seen) < 200
        done = subprocess.run([*command, endpoint.url, tmp_path / "cache"], cwd=ROOT, capture_output=True, text=True)
    assert sorted(done.stdout.splitlines()) == sorted(f"{i} to text {i}" for i in range(200))
    assert 200 <= len(endpoint.bodies) <= 200 + 4


@given(st.dictionaries(st.text(), st.one_of(st.integers(), st.text(), st.lists(st.text())), min_size=2))
@settings(max_examples=50, deadline=None)
def test_the_hash_knows_the_content_and_not_the_order(request_body):
    backwards = dict(reversed(request_body.items()))
    assert request_hash(backwards) == request_hash(request_body)
    assert request_hash(request_body | {"n": "other"}) != request_hash(request_body | {"n": 1})


# ---- the cache ----


def test_two_runs_cannot_share_a_cache(tmp_path):
    with serving(echo) as endpoint:
        first = ask(requests(5), endpoint.url, tmp_path / "cache")
        next(first)
        with pytest.raises(InputError, match="another run is using it"):
            collect(endpoint, tmp_path / "cache", requests(1))
        first.close()
        collect(endpoint, tmp_path / "cache", requests(1))


def test_a_file_that_is_no_cache_is_refused_and_kept(tmp_path):
    (tmp_path / "cache").write_text("notes " * 100)
    with serving(echo) as endpoint, pytest.raises(InputError, match=r"cache.*delete it"):
        collect(endpoint, tmp_path / "cache", requests(1))
    assert (tmp_path / "cache").read_text() == "notes " * 100
    assert endpoint.bodies == []


def test_a_full_disk_is_one_line(tmp_path):
    cache = Cache(tmp_path / "cache")
    cache._db.execute("PRAGMA max_page_count = 3")
    with pytest.raises(InputError, match="make room"):
        cache.put("request", chat.Answer("x" * 50_000, "stop", "tiny", 1, 1))
    assert cache.get("request") is None
    cache.close()


def test_the_cache_is_plain_sqlite(tmp_path):
    with serving(echo) as endpoint:
        collect(endpoint, tmp_path / "cache", requests(1))
    rows = sqlite3.connect(tmp_path / "cache").execute("SELECT request, answer FROM answers").fetchall()
    assert [request for request, _ in rows] == [request_hash(body("text 0"))]
    assert json.loads(rows[0][1])["text"] == "to text 0"


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://x/v1", ""])
def test_a_url_is_a_url(tmp_path, url):
    with pytest.raises(InputError, match="expected one such as http"):
        list(ask(requests(1), url, tmp_path / "cache"))
