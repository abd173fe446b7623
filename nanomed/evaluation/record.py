"""The folder of an evaluation: what was measured and how, so that every number can be traced and a run resumed.

    run.json       written first, `finished: false`: the command line, every option, versions, git commit, sha256 of the data
    *.jsonl        raw samples, as they come
    results.json   written last and whole: what report reads
    run.json       again, `finished: true`

A folder belongs to one configuration and one state of its data: another is rejected, naming the field that differs. A
finished run is left as it is, an unfinished one resumed. No torch is imported here.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from nanomed import InputError
from nanomed.files import read_json, sha256, write_json
from nanomed.model_files import MODEL_PATTERNS, carried_files, find_weights
from nanomed.redaction import redacted_command
from nanomed.versions import git_commit, versions

LOCK = "lock.tmp"  # there while a run is being written, and after a kill
PACKAGES = ("torch", "lm_eval", "tokenizers", "transformers", "numpy")


def open_run(out: Path, kind: str, config: dict, data: list[Path]) -> bool:
    """Start or resume the run in the folder OUT; True if it is already finished.

    kind: "knowledge", "generate", "judge" or "failures". config: every option that affects the results, JSON-able.
    data: the files read, recorded with their sha256. InputError, and nothing written, if OUT holds something else or cannot
    be written.
    """
    wanted = {"kind": kind, "config": json.loads(json.dumps(config)), "data": {str(p): sha256(p) for p in data}}
    with writing(out):
        return _open(out, wanted)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Around what writes to OUT: an OSError becomes an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror}); choose another --out") from None


def _open(out: Path, wanted: dict) -> bool:
    path = out / "run.json"
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file, expected a folder or nothing; choose another")
    if path.exists():
        found = read_json(path)
        _check_same(out, found, wanted)
        if is_finished(out):
            return True
        _lock(out)
        return is_finished(out)  # another process may have finished it meanwhile
    if out.exists() and any(p.suffix != ".tmp" for p in out.iterdir()):
        raise InputError(f"--out {out}: the folder is not empty and not from an evaluation; choose another")
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "command": redacted_command(sys.argv, os.environ.get("OPENAI_API_KEY", "")),
        "git_commit": git_commit(),
        "versions": versions(*PACKAGES),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "finished": False,
    }
    _lock(out)
    write_json(path, wanted | about)
    return False


def is_finished(out: Path) -> bool:
    """Whether the run in OUT has its results."""
    return read_json(out / "run.json").get("finished") is True and (out / "results.json").exists()


def _lock(out: Path) -> None:
    """Keep other processes from writing to OUT, until this one ends or finish_run. InputError where one is writing already.

    POSIX's lock, which belongs to the process: the same process may open its run again.
    """
    descriptor = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)  # not closed: that would give up the lock
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise InputError(f"--out {out}: another process is writing this run; wait for it, or choose another --out") from None
    except OSError:
        pass  # a file system without locks


@contextmanager
def undone_on_failure(out: Path, existed: bool, results: Path | None = None) -> Iterator[None]:
    """Around the work of a run that open_run has begun in OUT: where it fails before its first result, OUT is as it was.

    existed: whether OUT was there before. results: the file of results, if it is not in OUT. An interruption leaves the folder,
    and so does a failure after the first result.
    """
    try:
        yield
    except Exception:
        own = (out / "run.json", out / LOCK)
        kept = [p for p in out.rglob("*") if p.is_file() and p not in own and out / "tasks" not in p.parents]
        begun = results is not None and results.exists() and results.stat().st_size
        if not kept and not begun:
            shutil.rmtree(out / "tasks", ignore_errors=True)
            for path in own:
                path.unlink(missing_ok=True)
            if results is not None:
                results.unlink(missing_ok=True)  # empty
            if not existed:
                shutil.rmtree(out)  # folders without files
        raise


def finish_run(out: Path, results: dict) -> None:
    """Write results.json, then mark the run in OUT as finished."""
    write_json(out / "results.json", results)
    write_json(out / "run.json", read_json(out / "run.json") | {"finished": True})
    (out / LOCK).unlink(missing_ok=True)


def fingerprint(folder: Path) -> str:
    """sha256 over config, tokenizer, chat template, and the size and 17 samples of every weights file: tells checkpoints
    apart in milliseconds, so that a run is not resumed with another model at the same path."""
    digest = hashlib.sha256()
    for name in carried_files(folder, MODEL_PATTERNS):
        digest.update(f"{name} {sha256(folder / name)}".encode())
    for path in sorted(set(find_weights(folder).values())):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for i in range(17):
                file.seek(max(0, size - 2**16) * i // 16)
                digest.update(file.read(2**16))
    return digest.hexdigest()


def _check_same(out: Path, found: dict, wanted: dict) -> None:
    """InputError naming the first difference between the folder's run and the wanted one."""
    if found.get("kind") != wanted["kind"]:
        raise InputError(f"--out {out}: holds a run of {found.get('kind')}, not {wanted['kind']}; choose another")
    for part, spell in (("config", _difference), ("data", _other_data)):
        old, new = found.get(part, {}), wanted[part]
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                what = spell(old.get(key), new.get(key), key)
                raise InputError(f"--out {out}: {what}; choose another --out or delete it")


def _difference(old, new, *path: str) -> str:
    """The first difference between two values of the configuration, in words. path: the keys that lead to them."""
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        key = next(key for key in sorted(old) if old[key] != new[key])
        return _difference(old[key], new[key], *path, key)
    if path[-1] == "fingerprint":  # of the 64 digits nobody reads one
        return "was made by another model" + (f" ({path[-2]})" if len(path) > 1 else "")
    was, now = (", ".join(x) if isinstance(x, dict) else json.dumps(x, ensure_ascii=False) for x in (old, new))
    return f"belongs to a run with {' '.join(path)} = {was}, this one {now}"


def _other_data(old: str | None, new: str | None, file: str) -> str:
    why = "has changed since" if old and new else "is not read by this one" if old else "was not read there"
    return f"belongs to a run on other data ({file} {why})"
