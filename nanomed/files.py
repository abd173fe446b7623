"""Files that are there whole or not at all, and folders that one run at a time writes to."""

import fcntl
import os
from pathlib import Path

from nanomed import InputError


def write_durably(path: Path, text: str) -> None:
    """The file with this text, or no file of this name: written aside, synced, renamed."""
    tmp = path.with_name(path.name + ".tmp")
    with tmp.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(tmp, path)


def sync(path: Path) -> None:
    """Let a file, or a folder's list of names, outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(out: Path) -> int:
    """Let no second run write here; the lock ends with the process, however it ends."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{out}: another run is writing here; wait for it, or choose another --out") from None
    except OSError:
        pass  # a file system without locks
    return descriptor
