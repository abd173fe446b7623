"""Sources: which files the inputs of a command are, and what identifies them in the bins made of them."""

import glob
import os
import sys
from pathlib import Path

from tqdm import tqdm

from conversations import template_sha256
from encoding import Job
from nanomed import InputError
from nanomed.files import sha256
from reading import SUFFIXES, check_size, suggestion


def find_inputs(names: list[Path]) -> list[Path]:
    """The files that are meant, in the order given: a file, all files in a folder and below it, those of a wildcard.

    Wildcards are those of a shell: *, ?, [abc], and ** for any number of folders. InputError for what does not exist, has no
    text of a known type, or is given twice.
    """
    found = [path for name in names for path in expand(Path(name))]
    if not found:
        raise InputError("0 inputs, expected one or more")
    seen = set()
    for path in found:
        place = os.path.realpath(path)
        if place in seen:
            raise InputError(f"{path}: given twice, expected each input once")
        seen.add(place)
    return found


def expand(name: Path) -> list[Path]:
    """The files behind one argument."""
    if name.is_dir():
        return files_below(name)
    if not name.exists() and glob.has_magic(str(name)):
        if not (matches := sorted(glob.glob(str(name), recursive=True))):
            raise InputError(f"{name}: no file matches; expected files of {', '.join(SUFFIXES)}")
        return [path for match in matches for path in expand(Path(match))]
    if not name.exists():
        raise InputError(f"{name}: cannot be read: no such file{suggestion(name)}")
    if not name.name.endswith(SUFFIXES):
        raise InputError(f"{name}: unknown file type, expected {', '.join(SUFFIXES)}")
    return [name]


def files_below(folder: Path) -> list[Path]:
    """All texts in a folder and the folders below it, sorted; says which files are left out, if any."""
    if (folder / "manifest.json").is_file() and (folder / "shard-00000.bin").is_file():
        raise InputError(f"{folder}: holds token bins, which prepare.py writes; expected the texts they are made of")
    found, others, seen = [], [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        for file in files:
            path = Path(place, file)
            hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
            (others if hidden or not file.endswith(SUFFIXES) else found).append(path)
    if not found:
        raise InputError(f"{folder}: a folder without files of {', '.join(SUFFIXES)}; give the texts")
    if others:
        names = ", ".join(sorted(str(path.relative_to(folder)) for path in others)[:5])
        more = ", ..." if len(others) > 5 else ""
        print(f"{folder}: {len(found):,} files are read, {len(others):,} others are not: {names}{more}", file=sys.stderr)
    return sorted(found)


def describe_inputs(inputs: list[Path], job: Job, slice_bytes: int) -> list[dict]:
    """What identifies each input and how it is cut, as it goes into the JSON of its shards; hashed under a bar."""
    about = {"hold_out": job.hold_out, "held_out": job.held_out, "messages_key" if job.messages else "text_key": job.key}
    if job.messages:
        about["chat_template_sha256"] = template_sha256(Path(job.tokenizer).parent)
    if job.normal_forms:
        about["normal_forms"] = list(job.normal_forms)
    n_bytes = sum(path.stat().st_size for path in inputs)
    with tqdm(total=n_bytes, unit="B", unit_scale=True, desc="hash", disable=None) as bar:
        return [describe_input(path, bar.update) | about | {"slice_bytes": slice_bytes} for path in inputs]


def describe_input(path: Path, progress) -> dict:
    """What identifies a file: name, size, sha256. InputError if it cannot be read."""
    try:
        digest, size = sha256(path, progress), path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}; expected a file") from None
    check_size(path)  # of all inputs, before the first is written
    return {"name": path.name, "size": size, "sha256": digest}


def list_names(names: list[str], n_most: int = 5) -> str:
    """Some names, the rest as their number."""
    more = f", ... ({len(names):,} in all)" if len(names) > n_most else ""
    return ", ".join(names[:n_most]) + more
