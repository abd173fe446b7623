"""Work ahead in a thread: while one item is used, the next ones are made."""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator


class Prefetch:
    """An iterator run in a thread, `depth` items ahead; `wait_s` counts the seconds its consumer had to wait.

    What is raised there is raised again where the item was wanted. A context: on leaving, the thread ends and what it has
    prepared is dropped.
    """

    def __init__(self, items: Iterable, depth: int = 4, setup: Callable[[], object] = lambda: None):
        """setup: called in the thread before all else."""
        self.wait_s = 0.0
        self._queue, self._stop, self._end = queue.Queue(depth), threading.Event(), None
        self._thread = threading.Thread(target=self._fill, args=(iter(items), setup), daemon=True)
        self._thread.start()

    def _fill(self, items: Iterator, setup: Callable) -> None:
        try:
            setup()
            for item in items:
                self._put((item, None))
                if self._stop.is_set():
                    return
            self._put((None, StopIteration()))
        except BaseException as error:
            self._put((None, error))

    def _put(self, entry: tuple) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(entry, timeout=0.1)
            except queue.Full:
                pass

    def __iter__(self) -> "Prefetch":
        return self

    def __next__(self):
        if self._end is None:
            start = time.perf_counter()
            item, self._end = self._queue.get()
            self.wait_s += time.perf_counter() - start
        if self._end is not None:
            raise self._end
        return item

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_error) -> None:
        self._stop.set()
        self._thread.join()
