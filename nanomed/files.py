"""Files that are there whole or not at all, JSON read with errors that name the file, and folders with one writer.

Written as NAME.tmp, synced, renamed, and the folder synced: a kill or a power cut at any moment leaves the old file or
the new one. What is left of an interrupted NAME.tmp is overwritten by the next try.
"""

import contextlib
import difflib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from nanomed import InputError


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write bytes to that becomes `path` where the block ends well; where it does not, `path` is untouched."""
    tmp = path.with_name(path.name + ".tmp")
    with tmp.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(tmp, path)
    sync(path.parent)


def write_durably(path: Path, text: str) -> None:
    """The file with this text in UTF-8, whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))  # a file's name may hold what is no UTF-8; in JSON an escape


def write_json(path: Path, value: dict) -> None:
    """The file with this JSON object, whole or not at all. ValueError for NaN and infinity, which JSON has not."""
    write_durably(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict:
    """The file's JSON object; InputError if it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); expected a JSON object") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value


def read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    """(number of the line from 1, object) of every line that is not blank. InputError naming the line that is none."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: a text may hold U+2028
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start})") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}: line {number} is not JSON ({error})") from None
            if not isinstance(record, dict):
                raise InputError(f"{path}: line {number} is not a JSON object")
            yield number, record


def similar_path(path: str | Path) -> str:
    """For an error about a path that does not exist: "; did you mean X?" with a path like it that does, else
    ""."""
    found = Path()
    for part in Path(path).parts:
        if not (found / part).exists():
            names = os.listdir(found) if found.is_dir() and os.access(found, os.R_OK) else []
            close = difflib.get_close_matches(part, names, n=1)
            if not close:
                return ""
            part = close[0]
        found = found / part
    return f"; did you mean {found}?"


def sha256(path: Path, progress: Callable[[int], object] = lambda n_bytes: None) -> str:
    """Of the file's bytes; progress is called with the number of bytes of every piece."""
    return sha256_of([path], progress)


def sha256_of(paths: Iterable[Path], progress: Callable[[int], object] = lambda n_bytes: None) -> str:
    """Of the bytes of all files, one behind the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
                progress(len(chunk))
    return digest.hexdigest()


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
