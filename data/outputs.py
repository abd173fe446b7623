"""Outputs: one command at a time writes into a folder, and nothing is replaced that it has not made."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from documents import read_about
from nanomed import InputError
from nanomed.files import lock


@contextlib.contextmanager
def claimed_folder(out: Path, names: Iterable[str], script: str, is_ours: bool = False) -> Iterator[None]:
    """Make OUT, or take over that of an earlier run, and lock it for the block.

    names: what the script may replace or remove in OUT. InputError if another run writes there, or if one of them exists
    that the script has not made. is_ours: the folder is known to be the script's, even without its mark.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be made: {error.strerror}; choose another --out") from None
    descriptor = lock(out)
    try:
        foreign = [name for name in names if os.path.lexists(out / name)]
        if foreign and not is_ours and not mark_of(out, script).exists():
            what = f"{out / foreign[0]}: exists, and {script} has not made it"
            raise InputError(f"{what}; choose another --out, or move it away")
        mark_of(out, script).touch()
        yield
    finally:
        os.close(descriptor)


def read_made(out: Path, script: str) -> dict | None:
    """What the script noted in the Parquet file that it has made; None if there is no such file.

    InputError if something else has the name, or if it is no name of a Parquet file: later stages go by the ending.
    """
    if out.suffix != ".parquet":
        raise InputError(f"--out {out}: expected a name that ends with .parquet")
    if not os.path.lexists(out):
        return None
    try:
        about = read_about(out)
    except InputError:
        about = None
    if not about:
        kind = "a folder" if out.is_dir() else f"no whole file of {script}"
        raise InputError(f"{out}: exists, and is {kind}; choose another --out, or move it away")
    return about


def mark_of(out: Path, script: str) -> Path:
    """The file that says whose folder it is."""
    return out / f".nanomed-{Path(script).stem}"


def release_empty(out: Path, script: str) -> None:
    """Remove OUT if it holds nothing but the mark."""
    with contextlib.suppress(OSError):
        if os.listdir(out) == [mark_of(out, script).name]:
            mark_of(out, script).unlink()
            out.rmdir()
