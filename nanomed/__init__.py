"""nanomed: turn an open instruct model into a domain specialist.

The way of the data is the order of the files: bins → batches → model → train.py → hf. See the README's map.
"""

import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterable

__version__ = "0.1.0"

# OpenMP's threads spin while they wait. Beside other work that costs a training step 15 to 30 times, and idle it gains nothing.
# Read when torch is loaded, so commands import nanomed before it; inherited by worker processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class InputError(Exception):
    """What ends a command for a reason that its user can do something about: a wrong input, a full disk, a run that diverges.

    Its message is one line: what was found, where, what was expected, what to do. `run_script` prints it as `error: ...`;
    anything else that is raised is a bug of ours and keeps its traceback.
    """


def first_line(error: BaseException, longest: int = 200) -> str:
    """What an error of a library says, short enough for a message of ours; its type where it says nothing.

    A long line ends after a whole sentence, or where its first one is too long after a whole word.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = lines[0]
    if len(lines) > 1 and re.match(r"\d{3} \w+ Error", line):  # the hub's: what is wrong stands below the HTTP status
        line = " ".join(lines[1:])
    if len(line) <= longest:
        return line
    sentences = line[: longest + 1].rpartition(". ")[0]
    if len(sentences) > 15:  # "Error." alone says nothing
        return sentences + "."
    return (line[: longest - 4].rpartition(" ")[0] or line[: longest - 4]) + " ..."


def did_you_mean(wanted: str, names: Iterable[str]) -> str:
    """`; did you mean X?` for the name closest to a misspelt one, to be put into an error; empty where none is close."""
    close = difflib.get_close_matches(wanted, list(names), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def is_explained(error: Exception) -> bool:
    """Whether the error's own message is all that a user needs: an InputError, a full disk, an OSError that names a file."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, InputError) or full or (isinstance(error, OSError) and error.filename is not None)


def run_script(main: Callable[[], None], interrupted: str = "run the same command again to go on") -> None:
    """A command from start to end: what `is_explained` is one line and exit status 1, Ctrl-C one line and 130."""
    try:
        main()
        sys.stdout.flush()  # now, where what goes wrong can be told
    except BrokenPipeError:  # whoever read the output, `head` say, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains as it leaves
        sys.exit(141)
    except (InputError, OSError) as error:
        if not is_explained(error):
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(f"interrupted; {interrupted}", file=sys.stderr)
        sys.exit(130)
