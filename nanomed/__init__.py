"""nanomed: turn an open instruct model into a domain specialist.

The way of the data is the order of the files: bins → batches → model → train.py → hf. See the README's map.
"""

__version__ = "0.1.0"


class InputError(Exception):
    """A wrong input. Its message is one line for the user: what was found, where, what was expected, what to do.

    Scripts catch it at the top, print `error: <message>` and exit with status 1; anything else that is raised is a
    bug of ours and keeps its traceback.
    """
