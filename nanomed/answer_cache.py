"""Answers of an endpoint, and the SQLite file that keeps them by the hash of their request."""

import json
import sqlite3
from dataclasses import asdict, dataclass
from pathlib import Path

from nanomed import InputError


@dataclass(frozen=True)
class Answer:
    """One answer. Without words its text is "" and finish_reason says why: "length", "content_filter", or "answers 400 (...)"
    where the endpoint refused the request."""

    text: str
    finish_reason: str
    model: str  # as the endpoint names it
    prompt_tokens: int
    completion_tokens: int
    thoughts: str = ""  # beginning of what a reasoning model thought, where the server reports it apart from the text

    @property
    def is_failure(self) -> bool:
        """Whether this stands for a request that the endpoint refused or failed to answer."""
        return not self.text and self.finish_reason.startswith(("answers ", "no answer", "no connection"))


class Cache:
    """Answers on disk by the hash of their request, for one process at a time.

    InputError if another process uses the file, or if it is no cache.
    """

    def __init__(self, path: Path):
        self.path, self._is_new = path, not path.exists()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, isolation_level=None, timeout=1)
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode = WAL")  # a commit is an append; whole after any kill
            self._db.execute("CREATE TABLE IF NOT EXISTS answers (request TEXT PRIMARY KEY, answer TEXT NOT NULL)")
            self._db.execute("BEGIN IMMEDIATE")  # takes the lock now, not at the first answer
            self._db.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            locked = "locked" in str(error)
            hint = "another run is using it; wait for it" if locked else "give another path, or delete it"
            raise InputError(f"{path}: cannot be used as the cache of answers ({error}); {hint}") from None

    def is_empty(self) -> bool:
        """Whether no run has kept an answer yet."""
        return self._db.execute("SELECT 1 FROM answers").fetchone() is None

    def get(self, request: str) -> Answer | None:
        """The answer to the request with this hash, if it is there."""
        row = self._db.execute("SELECT answer FROM answers WHERE request = ?", (request,)).fetchone()
        return Answer(**json.loads(row[0])) if row else None

    def put(self, request: str, answer: Answer) -> None:
        """Store an answer; it is on disk on return. InputError if the disk is full."""
        try:
            self._db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (request, json.dumps(asdict(answer))))
        except sqlite3.Error as error:
            raise InputError(f"{self.path}: an answer cannot be kept ({error}); make room and run again") from None

    def close(self) -> None:
        """Release the file. One that this run created and that has no answer is removed."""
        unused = self._is_new and self.is_empty()
        self._db.close()
        if unused:
            for name in (self.path.name, f"{self.path.name}-wal", f"{self.path.name}-shm"):
                self.path.with_name(name).unlink(missing_ok=True)
