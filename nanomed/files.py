"""Atomic files, staging folders, JSON read with errors that name the file, and folders with one writer.

A file is written as NAME.<8 hex digits>.tmp, synced, renamed, and the folder synced: a kill or a power cut at
any moment leaves the old file or the new one, and two processes that write the same file never share a
temporary one.

A folder is written as .NAME.nanomed.tmp, which one process creates and locks, and renamed when it is
complete.

Temporary files and folders are removed when writing fails. What a killed process left is removed by the next
one that writes the same name, and only if it has our mark and no process holds its lock. Nothing else is ever
removed.
"""

import contextlib
import difflib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from nanomed import InputError

MARK = ".nanomed-staging"  # the file in a staging folder that says who made it, and holds the lock


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write bytes to that becomes `path` where the block ends well; where it does not, `path` is
    untouched."""
    remove_orphans(path)
    tmp, file = _open_temporary(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(tmp, path)  # still locked: unlocked, another process would take it for an orphan
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    sync(path.parent)


def _open_temporary(path: Path) -> tuple[Path, BinaryIO]:
    """A new locked temporary file for `path`, open for writing; and its name."""
    while True:
        tmp = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
        file = tmp.open("xb")
        try_lock(file.fileno())
        if tmp.exists():  # else another process took it for an orphan before it was locked
            return tmp, file
        file.close()


def remove_orphans(path: Path) -> None:
    """Remove the temporary files of `path` that killed processes left: named as whole_file names them, and
    locked by nobody."""
    pattern = re.compile(re.escape(path.name) + r"\.[0-9a-f]{8}\.tmp")
    for name in filter(pattern.fullmatch, os.listdir(path.parent)):
        orphan = path.with_name(name)
        with contextlib.suppress(OSError), orphan.open("r+b") as file:  # removed meanwhile, or another user's
            if try_lock(file.fileno()):
                orphan.unlink()


def try_lock(descriptor: int) -> bool:
    """Lock the file until the descriptor is closed; False if another process holds it, or the file system has
    no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


# --- staging folders -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def staging(out: Path, flag: str = "OUT", durable: bool = False) -> Iterator[Path]:
    """A new folder beside `out` that becomes `out` where the block ends well, and is removed where it does
    not.

    InputError if `out` exists, or if another process is writing it. flag: what the command line calls `out`,
    for the errors. durable: sync everything first, so that `out` outlives a power cut; that takes as long as
    writing it to the disk.
    """
    exists = InputError(f"{flag} {out}: exists already; choose another or remove it")
    if os.path.lexists(out):
        raise exists
    tmp = staging_path(out)
    with new_folder(out.parent), _locked_mark(tmp, f"{flag} {out}") as mark:
        try:
            if os.path.lexists(out):  # finished by another process while this one waited for the folder
                raise exists
            _remove_contents(tmp, mark)
            yield tmp
            mark.unlink()
            if durable:
                for path in (*tmp.rglob("*"), tmp):
                    sync(path)
            if os.path.lexists(out):  # an empty folder would be replaced
                raise InputError(f"{flag} {out}: has appeared meanwhile, so nothing was written; choose another")
            os.replace(tmp, out)
        except BaseException:
            shutil.rmtree(tmp, ignore_errors=True)
            raise
    if durable:
        sync(out.parent)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Make the folder and its parents; where the block fails, remove those that were made and are empty."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):  # not empty: somebody else writes there too
                path.rmdir()
        raise


def staging_path(out: Path) -> Path:
    """Where `staging` collects what becomes `out`."""
    return out.with_name(f".{out.name}.nanomed.tmp")


@contextlib.contextmanager
def _locked_mark(tmp: Path, what: str) -> Iterator[Path]:
    """Create the staging folder with its mark, or take over that of a killed process; locked by this process.

    InputError if the folder is not ours, or another process has it. The lock is on a file in the folder,
    because NFS locks only what is open for writing. what: the output, for the errors.
    """
    mark, in_use = tmp / MARK, f"{what}: another process is writing it; wait for it, or choose another"
    try:
        tmp.mkdir()
        is_new = True
    except FileExistsError:
        is_new = False
        if not mark.is_file() and (not tmp.is_dir() or any(tmp.iterdir())):
            raise InputError(f"{what}: needs {tmp}, which exists and is not this command's; move it away") from None
    with mark.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError):
                raise InputError(in_use) from None
            if not is_new:  # a file system without locks
                raise InputError(f"{what}: {tmp} is in use or left over; remove it if no other process writes it") from None
        if not (mark.exists() and os.path.samestat(mark.stat(), os.fstat(file.fileno()))):
            raise InputError(in_use)  # the other process has finished between the two lines above
        yield mark


def _remove_contents(tmp: Path, mark: Path) -> None:
    """Empty a staging folder, but for its mark: a killed process may have left files there."""
    for path in tmp.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != mark:
            path.unlink()


# --- text and JSON -------------------------------------------------------------------------------------------------


def write_durably(path: Path, text: str) -> None:
    """The file with this text in UTF-8, whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))  # a file's name may hold what is no UTF-8; in JSON an escape


def write_json(path: Path, value: dict) -> None:
    """The file with this JSON object, whole or not at all. ValueError for NaN and infinity, which JSON has
    not."""
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
    """(number of the line from 1, object) of every line that is not blank. InputError naming the line that is
    none."""
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
            except json.JSONDecodeError as error:
                raise InputError(f"{path}: line {number} is not JSON ({error.msg} at column {error.colno})") from None
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
