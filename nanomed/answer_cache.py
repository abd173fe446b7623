"""Answers of an endpoint on disk, in an SQLite file keyed by the hash of the request."""

import hashlib
import json
import sqlite3
from dataclasses import asdict, dataclass
from pathlib import Path

from nanomed import InputError


@dataclass(frozen=True)
class Answer:
    """What came back. An answer without words is "", its reason in finish_reason ("length", "content_filter", or
    "answers 400 (...)" where the endpoint refused the request)."""

    text: str
    finish_reason: str
    model: str  # as the endpoint names it
    prompt_tokens: int
    completion_tokens: int


class Cache:
    """Answers on disk by the hash of their request. One process at a time; InputError otherwise, or if it is no cache."""

    def __init__(self, path: Path):
        self.path = path
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
        """Has no run kept an answer yet?"""
        return self._db.execute("SELECT 1 FROM answers").fetchone() is None

    def get(self, request: str) -> Answer | None:
        """The answer to the request with this hash, if it is there."""
        row = self._db.execute("SELECT answer FROM answers WHERE request = ?", (request,)).fetchone()
        return Answer(**json.loads(row[0])) if row else None

    def put(self, request: str, answer: Answer) -> None:
        """Keep an answer; committed on return. InputError if the disk is full."""
        try:
            self._db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (request, json.dumps(asdict(answer))))
        except sqlite3.Error as error:
            raise InputError(f"{self.path}: an answer cannot be kept ({error}); make room and run again") from None

    def close(self) -> None:
        """Let the next process in."""
        self._db.close()


def request_hash(body: dict) -> str:
    """SHA-256 of the body's canonical JSON."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
