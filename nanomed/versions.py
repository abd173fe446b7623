"""With what software a result was made, for the files that record it."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import nanomed


def versions(*packages: str) -> dict[str, str]:
    """nanomed's, Python's and those of the packages that are installed."""
    found = {"nanomed": nanomed.__version__, "python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of the clone that runs, with "-dirty" where it was changed; None where it is no clone."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        here = Path(nanomed.__file__).parent
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
