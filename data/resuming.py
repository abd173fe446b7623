"""Resuming: what an earlier run of prepare.py left in its folder, and how far it got.

The JSON of a shard is its commit point (nanomed/bins.py). What lies there without one is removed, and so are shards none of
which holds a document; what was committed must be what this run would write, or the run ends with one line.
"""

import contextlib
import re
from pathlib import Path

from nanomed import InputError, bins

OTHERWISE = "give the same, choose another --out"
WORDS = {
    "dtype": "tokens of type",
    "vocab_size": "a tokenizer whose vocabulary has a size of",
    "tokenizer_sha256": "a tokenizer with sha256",
    "separator": "a separator (--eos) of id",
    "bos": "a BOS (--bos) of id",
    "chat_template_sha256": "a chat template with sha256",
    "normal_forms": "bytes counted in the normal forms",
}


def committed_part(out: Path, settings: dict, sources: list[dict]) -> tuple[int, int, int]:
    """How far an earlier run got: (shards, inputs that are done, rows of the next that are done).

    InputError if a shard there was made with another tokenizer, other settings or other inputs.
    """
    done, row, shards = 0, 0, bins.committed_shards(out)
    finished = (out / "manifest.json").exists()
    for shard in shards:
        if done == len(sources):
            what = f"holds {shard['source']['name']} as input {done + 1}, this command has {done} inputs"
            raise InputError(f"{out}: {what}; {OTHERWISE}, or delete it")
        expected, found = settings | sources[done] | {"first_row": row}, shard | shard["source"]
        for key in expected:
            # Sets of earlier versions do not record it. One that is finished gets no more shards, so nothing is mixed.
            if key == "normal_forms" and finished and key not in found:
                continue
            if found.get(key) != expected[key]:
                there, here = (spell(record, key, done + 1) for record in (found, expected))
                raise InputError(f"{out}: was prepared with {there}, this command has {here}; {OTHERWISE}, or delete it")
        source = shard["source"]
        done, row = (done + 1, 0) if source["last"] else (done, row + source["n_rows"])
    if finished and done < len(sources):
        raise InputError(f"{out}: is finished, without {sources[done]['name']}; {OTHERWISE}, or delete it")
    return len(shards), done, row


def spell(record: dict, key: str, number: int) -> str:
    """A setting in the words of the command line. number: of the input, from 1."""
    value = record.get(key)
    if key in ("hold_out", "held_out"):
        return side(record.get("hold_out"), record.get("held_out"))
    if key in ("text_key", "messages_key"):
        return f"--messages-key {record['messages_key']}" if "messages_key" in record else f"--text-key {record.get('text_key')}"
    if key in ("name", "size", "sha256"):
        return f"{record.get('name')} ({record.get('size')} bytes, sha256 {record.get('sha256')}) as input {number}"
    return f"{WORDS.get(key, key)} {value}"


def side(hold_out: float | None, held_out: float | None) -> str:
    """Which documents of the inputs, by the flags that name them."""
    if held_out is not None:
        return f"--hold-out {held_out} --part held-out"
    return "no --hold-out" if hold_out is None else f"--hold-out {hold_out}"


def remove_leftovers(out: Path) -> None:
    """Remove what an interrupted run left uncommitted, *.tmp and .bin or .idx without their JSON; and shards without documents.

    Those are of inputs that hold no text: there is nothing to lose, and they would refuse the right inputs.
    """
    for path in out.glob("*"):
        own = re.fullmatch(r"(shard-\d{5,}\.(bin|idx|json)|manifest\.json)((\.[0-9a-f]{8})?\.tmp)?", path.name)
        if own and (path.suffix == ".tmp" or not path.with_suffix(".json").exists()):
            path.unlink()
    shards = bins.committed_shards(out)
    if not any(shard["n_docs"] for shard in shards):
        for index in reversed(range(len(shards))):  # a kill in between leaves the first ones, which are in order
            for suffix in ("json", "bin", "idx"):
                (out / f"{bins.shard_name(index)}.{suffix}").unlink()


def remove_traces(out: Path, made: list[Path]) -> None:
    """After a run that failed: remove what it left unfinished, and of the folders that it `made` those that are empty."""
    with contextlib.suppress(OSError, InputError):  # the error that is on its way says more
        remove_leftovers(out)
        for folder in made:
            folder.rmdir()
