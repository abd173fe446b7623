"""nanomed: turn an open instruct model into a domain specialist.

The way of the data is the order of the files: bins → batches → model → train.py → hf. See the README's map.
"""

import errno
import sys
from collections.abc import Callable

__version__ = "0.1.0"


class InputError(Exception):
    """A wrong input. Its message is one line for the user: what was found, where, what was expected, what to do.

    Scripts catch it at the top, print `error: <message>` and exit with status 1; anything else that is raised is a
    bug of ours and keeps its traceback.
    """


def run_script(main: Callable[[], None], interrupted: str = "run the same command again to go on") -> None:
    """A script from start to end: a wrong input or a full disk is one line and status 1, Ctrl-C one line and 130."""
    try:
        main()
    except (InputError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise  # any other than a full disk is a bug of ours
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"interrupted; {interrupted}", file=sys.stderr)
        sys.exit(130)
