"""Resuming: what an earlier run of prepare.py left in its folder, and how far it got.

The JSON of a shard is its commit point (nanomed/bins.py). What lies there without one is removed, and so are shards none of
which holds a document; what was committed must be what this run would write, or the run ends with one line.
"""

import re
from pathlib import Path

from nanomed import InputError, bins


def committed_part(out: Path, settings: dict, sources: list[dict]) -> tuple[int, int, int]:
    """How far an earlier run got: (shards, inputs that are done, rows of the next that are done).

    InputError if a shard there was made with another tokenizer, other settings or other inputs.
    """
    done, row, shards = 0, 0, bins.committed_shards(out)
    for index, shard in enumerate(shards):
        source = sources[done] if done < len(sources) else {"name": "no further input"}
        for key, expected in (settings | source | {"first_row": row}).items():
            found = shard[key] if key in settings else shard["source"].get(key)
            if found != expected:
                path, hint = out / f"{bins.shard_name(index)}.json", f"choose another --out, or delete {out}"
                raise InputError(f"{path}: {key} is {found}, expected {expected}; {hint}")
        source = shard["source"]
        done, row = (done + 1, 0) if source["last"] else (done, row + source["n_rows"])
    if (out / "manifest.json").exists() and done < len(sources):
        raise InputError(f"{out}: is finished, without {sources[done]['name']}; choose another --out, or delete it")
    return len(shards), done, row


def remove_leftovers(out: Path) -> None:
    """Remove what an interrupted run left uncommitted, *.tmp and .bin or .idx without their JSON; and shards without documents.

    Those are of inputs that hold no text: there is nothing to lose, and they would refuse the right inputs.
    """
    for path in out.glob("*"):
        own = re.fullmatch(r"(shard-\d{5}\.(bin|idx|json)|manifest\.json)((\.[0-9a-f]{8})?\.tmp)?", path.name)
        if own and (path.suffix == ".tmp" or not path.with_suffix(".json").exists()):
            path.unlink()
    shards = bins.committed_shards(out)
    if not any(shard["n_docs"] for shard in shards):
        for index in reversed(range(len(shards))):  # a kill in between leaves the first ones, which are in order
            for suffix in ("json", "bin", "idx"):
                (out / f"{bins.shard_name(index)}.{suffix}").unlink()
