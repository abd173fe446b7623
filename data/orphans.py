"""Processes of the sweep end when it does, kill -9 included: a worker would keep its GPU, and all keep the terminal."""

import functools
import os
import threading
import time


@functools.cache
def end_with_parent() -> None:
    """In a worker that datatrove's local executor has started: end when the sweep does."""
    import multiprocess  # datatrove's, a fork of multiprocessing

    if multiprocess.parent_process():
        watch(os.getppid())


@functools.cache
def end_forks_with_parent() -> None:
    """In the sweep: processes that are forked from it, such as datatrove's manager, end when it does."""
    os.register_at_fork(after_in_child=lambda: watch(os.getppid()))


def watch(parent: int) -> None:
    """End this process when its parent is another one: the one that started it has ended."""

    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
