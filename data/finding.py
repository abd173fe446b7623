"""Finding: which files the arguments of a command mean, and errors for paths that are not what a command expects."""

import glob
import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from nanomed import InputError, first_line
from nanomed.files import read_json, similar_path
from reading import SUFFIXES

MADE_BY = {  # a file in a folder → the command that makes such folders
    "threshold.json": "data/classify.py",
    "sweep.json": "data/sweep.py",
    "report.json": "data/clean.py",
    "manifest.json": "data/prepare.py",
    "run.json": "train.py",
}


def find_files(inputs: list[str]) -> list[Path]:
    """The files that are meant, local or remote (UPath), sorted: a file, all in a folder and below it, those of a wildcard.

    Wildcards are those of a shell: *, ?, [abc], and ** for any number of folders. Files of other types in a folder, and
    hidden ones, are not read, and counted on stderr. InputError for what does not exist, holds nothing readable, or is
    given twice.
    """
    found: list[Path] = []
    for name in map(str, inputs):
        try:
            found += expand(name)
        except (OSError, ValueError, NotImplementedError) as error:  # fsspec's are of all kinds
            raise InputError(f"{name}: cannot be listed: {first_line(error)}; expected a file or URL") from None
    if twice := first_twice(os.path.abspath(path) if is_local(path) else str(path) for path in found):
        raise InputError(f"{twice}: given twice, expected each input once")
    return sorted(found, key=str)


def first_twice(names: Iterable[str]) -> str | None:
    """The first name that is there more than once."""
    return next((name for name, n in Counter(names).items() if n > 1), None)


def is_local(path: Path) -> bool:
    """Whether a path, which may be a UPath, is in the local file system."""
    return isinstance(path, os.PathLike)


def expand(name: str) -> list[Path]:
    """The files behind one argument."""
    try:
        from upath import UPath
    except ImportError:
        raise InputError("the corpus scripts need more packages: pip install -e '.[data]'") from None
    path, expected = UPath(name), f"expected files, folders or URLs of {', '.join(SUFFIXES)}"
    if has_wildcard(path, name):
        matches = local_matches(name) if is_local(path) else remote_matches(name)
        if not matches:
            raise InputError(f"{name}: no such input, no file matches; {expected}")
        return list(dict.fromkeys(file for match in matches for file in files_of(match)))
    if not path.exists():
        raise InputError(f"{name}: no such input{similar_path(name) if is_local(path) else ''}; {expected}")
    return files_of(path)


def has_wildcard(path: Path, name: str) -> bool:
    """Whether the argument is a pattern: `path` is none, whatever its name, if there is such a file."""
    magic = "*" if name.startswith(("http://", "https://")) else "*?["  # ? begins a query there
    return any(character in name for character in magic) and not (is_local(path) and path.exists())


def local_matches(name: str) -> list[Path]:
    """What a wildcard matches in the local file system."""
    from upath import UPath

    return [UPath(match) for match in sorted(glob.glob(name, recursive=True))]


def remote_matches(name: str) -> list[Path]:
    """What a wildcard matches behind a URL."""
    from upath import UPath

    first = min(name.index(character) for character in "*?[" if character in name)
    folder, slash, _ = name[:first].rpartition("/")
    return [*UPath(folder).glob(name.removeprefix(folder + slash))]


def files_of(path: Path) -> list[Path]:
    """A file itself, or the files in a folder and below it; InputError where none can be read."""
    if not path.is_dir():
        if not path.name.endswith(SUFFIXES):
            raise InputError(f"{path}: unknown file type, expected {', '.join(SUFFIXES)}")
        return [path]
    names = local_names(path) if is_local(path) else remote_names(path)
    hidden = {name for name in names if any(part.startswith(".") for part in name.split("/"))}
    read = sorted(name for name in names if name.endswith(SUFFIXES) and name not in hidden)
    if not read:
        maker = next((script for mark, script in MADE_BY.items() if mark in names), None)
        what = f"a folder that {maker} has made" if maker else "a folder"
        raise InputError(f"{path}: no such input in it: {what}, without files of {', '.join(SUFFIXES)}")
    if others := sorted(set(names) - set(read)):
        shown = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        print(f"{path}: {len(read):,} files are read, {len(others):,} others are not: {shown}", file=sys.stderr)
    return [path.joinpath(name) for name in read]


def local_names(folder: Path) -> list[str]:
    """The files in a local folder and below it, by their paths in it; links are followed, each folder once."""
    names, seen = [], set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=raise_error):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        names += [os.path.relpath(os.path.join(place, file), folder) for file in files]
    return names


def raise_error(error: OSError) -> None:
    """For os.walk, which else leaves out folders that it cannot list."""
    raise error


def remote_names(folder: Path) -> list[str]:
    """The same of a folder behind a URL, in one listing."""
    names = folder.fs.find(folder.path)
    base = folder.path.rstrip("/") + "/"
    if outside := [name for name in names if not name.startswith(base)]:
        raise InputError(f"{folder}: is listed as {outside[0]}; name the files with a wildcard, such as {folder}/**")
    return [name.removeprefix(base) for name in names]


def check_file(path: Path, maker: str) -> None:
    """InputError unless the path is a file whose type can be read. maker: what it should be, for the message."""
    if not path.exists():
        raise InputError(f"{path}: cannot be read: no such file{similar_path(path)}; expected {maker}")
    if path.is_dir():
        raise InputError(f"{path}: cannot be read: a folder; expected {maker}")
    if not path.name.endswith(SUFFIXES):
        raise InputError(f"{path}: unknown file type, expected {maker}, as {', '.join(SUFFIXES)}")


def read_record(path: Path, script: str) -> dict:
    """The JSON object that a script leaves in its folder; InputError says what the folder is where it is not there."""
    if path.is_file():
        return read_json(path)
    folder = path.parent
    if not folder.exists():
        found = f"no such file{similar_path(folder)}"
    elif not folder.is_dir():
        raise InputError(f"{folder}: a file, expected a folder of {script}")
    else:
        others = (made_by for name, made_by in MADE_BY.items() if made_by != script and (folder / name).is_file())
        maker = next(others, None)
        found = f"no such file; {folder} is a folder of {maker}" if maker else "no such file"
    raise InputError(f"{path}: {found}; expected a folder of {script}")
