"""nanomed/prefetch.py: the items in their order, the thread's error where it was wanted, an end that is one."""

import threading
from types import SimpleNamespace

import pytest

from nanomed import InputError, prefetch
from nanomed.prefetch import Prefetch


def test_items_and_errors_pass():
    def items():
        yield from range(20)
        raise InputError("the twentieth")

    with Prefetch(items()) as ahead:
        assert [next(ahead) for _ in range(20)] == list(range(20))
        for _ in range(2):
            with pytest.raises(InputError, match="twentieth"):
                next(ahead)


def test_waits_are_counted(monkeypatch):
    """On a clock that goes on only while an item is waited for."""
    now, readings, waiting = [0.0], [], threading.Semaphore(0)

    def clock():
        readings.append(now[0])
        if len(readings) % 2:  # before the wait; after it the clock is read again
            waiting.release()
        return readings[-1]

    def items():
        for i in range(3):
            waiting.acquire()
            now[0] += 0.25
            yield i

    monkeypatch.setattr(prefetch, "time", SimpleNamespace(perf_counter=clock))
    with Prefetch(items()) as slow:
        assert [next(slow) for _ in range(3)] == [0, 1, 2]
        assert slow.wait_s == 0.75


def test_the_end_stays_the_end():
    with Prefetch("ab", depth=1) as ahead:
        assert list(ahead) == ["a", "b"]
        assert list(ahead) == []


def test_leaving_ends_the_thread_of_an_endless_iterator():
    with Prefetch(iter(int, 1)) as endless:
        next(endless)
    assert not endless._thread.is_alive()


def test_no_more_than_depth_items_are_made_ahead():
    made, asked = [], threading.Event()

    def items():
        for i in range(9):
            made.append(i)
            if i == 3:  # one is used, two wait, the next is made and cannot be put
                asked.set()
            yield i

    with Prefetch(items(), depth=2) as ahead:
        next(ahead)
        assert asked.wait(10)
        assert len(made) == 4


def test_the_setup_runs_in_the_thread_before_all_else():
    where = []
    with Prefetch((where[0] for _ in range(1)), setup=lambda: where.append(threading.current_thread())) as ahead:
        assert next(ahead) is not threading.current_thread()
