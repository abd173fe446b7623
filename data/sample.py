"""Sample: exactly N documents of a crawl, the same ones for any order of files, sharding or number of workers.

    python data/sample.py hf://datasets/HuggingFaceFW/fineweb-2/data/deu_Latn/train --n 260000 --out sample.parquet

Every document draws a lot, a 63-bit hash of its id and the seed; the N lowest are the sample ("bottom-k"): a uniform
draw without replacement that no reader has to coordinate. The file is sorted by lot, so it is the same byte for byte,
and its first n documents are the sample of n.

First pass: ids only (of a Parquet file that column alone, some 2 % of its bytes). Second pass: the texts, from the row
groups that hold a chosen row. Threads are enough, since reading and decompressing release Python's lock.
Both passes are recorded in OUT.partial.sqlite as they go: a killed run resumes with the file it was reading, and so does
the same command after an error (the hub was away, the disk full); a corrected command begins anew. Memory, however large
the input is: 256 rows and 16 bytes per candidate, 2 N + 10,000 of them at most, per worker, then some hundred bytes per
document drawn.

A duplicate id is an error if it is drawn (its lot appears twice). Texts are taken as they are, empty ones too:
annotate.py labels those `invalid`.
"""

import argparse
import contextlib
import hashlib
import json
import sqlite3
import threading
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
from tqdm import tqdm

from columns import check_names, types_of
from documents import EXTRA, check_keys, read_documents, read_numbered, write_parquet
from finding import find_files
from nanomed import InputError, run_script
from normalising import is_blank
from outputs import read_made

NO_LIMIT = np.iinfo(np.int64).max
FAILED = 1  # user_version of a database whose run ended in an error


def lot(identity: str, seed: int) -> int:
    """63 uniform bits of (id, seed)."""
    digest = hashlib.blake2b(identity.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") >> 1


class Draw:
    """The state of a run: a database beside the output, and the lowest lots seen so far. Threads may share it."""

    def __init__(self, path: Path, settings: dict, n: int):
        self.path, self.n, self.limit = path, n, NO_LIMIT  # a lot above the limit cannot be among the n lowest
        self.lock, self.failed = threading.Lock(), threading.Event()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=1)
            self.db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self.db.execute("PRAGMA journal_mode = WAL")
            for table in (
                "settings (json TEXT)",
                "files (file INTEGER PRIMARY KEY, n_documents INTEGER)",  # whose lots are all in
                "lots (lot INTEGER, file INTEGER, row INTEGER)",
                "documents (lot INTEGER PRIMARY KEY, json TEXT)",
            ):
                self.db.execute(f"CREATE TABLE IF NOT EXISTS {table}")
            found = self.db.execute("SELECT json FROM settings").fetchone()
            [failed] = self.db.execute("PRAGMA user_version").fetchone()
            if failed and found and json.loads(found[0]) != settings:  # the corrected command
                found = self.clear()
            if not found:
                found = (json.dumps(settings),)
                self.db.execute("INSERT INTO settings VALUES (?)", found)
            self.db.execute("PRAGMA user_version = 0")
        except (sqlite3.Error, OSError) as error:
            hint = "another run is using it" if "locked" in str(error) else "choose another --out"
            raise InputError(f"{path}: cannot be opened ({error}); {hint}") from None
        if (was := json.loads(found[0])) != settings:
            key = next(key for key in settings | was if was.get(key) != settings.get(key))
            raise InputError(f"{path}: of an interrupted run with another {key}; delete it to start over")
        self.lowest = np.empty(0, np.int64)
        self._lower(np.array([x for (x,) in self.db.execute("SELECT lot FROM lots")], np.int64))

    def _lower(self, lots: np.ndarray) -> None:
        """Take further lots into account for the limit."""
        self.lowest = np.concatenate((self.lowest, lots))
        if self.lowest.size >= self.n:
            self.lowest = np.partition(self.lowest, self.n - 1)[: self.n]
            self.limit = int(self.lowest.max())

    def clear(self) -> None:
        """Forget what the run has found, all at once: lots of one seed under another's settings would be no sample."""
        self._execute("BEGIN")
        for table in ("files", "lots", "documents", "settings"):
            self._execute(f"DELETE FROM {table}")
        self._execute("COMMIT")

    def close(self, failed: bool) -> None:
        """End the run. failed: let another command begin anew; a database that no run could go on from is removed."""
        of_use = True
        with contextlib.suppress(sqlite3.Error):  # a full disk
            self.db.rollback()
            if failed:
                self.db.execute(f"PRAGMA user_version = {FAILED}")
                of_use = self.db.execute("SELECT EXISTS (SELECT * FROM files)").fetchone()[0]
        self.db.close()
        if not of_use:
            self.path.unlink()

    def todo(self, n_files: int) -> list[int]:
        """The files whose lots are not in."""
        done = {file for (file,) in self.db.execute("SELECT file FROM files")}
        return [file for file in range(n_files) if file not in done]

    def keep_lots(self, file: int, lots: np.ndarray, rows: np.ndarray, n_documents: int) -> None:
        """Record that a file is read, and its candidates, in one transaction."""
        with self.lock:
            self._execute("BEGIN")
            self._execute(
                "INSERT INTO lots VALUES (?, ?, ?)",
                ((x, file, r) for x, r in zip(lots.tolist(), rows.tolist(), strict=True)),
            )
            self._execute("INSERT INTO files VALUES (?, ?)", [(file, n_documents)])
            self._execute("COMMIT")
            self._lower(lots)

    def keep_documents(self, documents: list[tuple[int, str]]) -> None:
        """Some chosen documents, (lot, JSON)."""
        with self.lock:
            self._execute("BEGIN")
            self._execute("INSERT OR REPLACE INTO documents VALUES (?, ?)", documents)
            self._execute("COMMIT")

    def _execute(self, sql: str, rows: Iterable | None = None) -> None:
        try:
            self.db.execute(sql) if rows is None else self.db.executemany(sql, rows)
        except sqlite3.Error as error:
            raise InputError(f"{self.path}: cannot be written ({error}); free space and run again") from None

    def n_documents(self) -> int:
        """Documents of the files that are read."""
        return self.db.execute("SELECT coalesce(sum(n_documents), 0) FROM files").fetchone()[0]

    def chosen(self) -> np.ndarray:
        """(n, 3) of lot, file, row, the n lowest lots in ascending order."""
        return np.array(self.db.execute("SELECT * FROM lots ORDER BY lot, file, row LIMIT ?", (self.n,)).fetchall(), np.int64)

    def documents(self) -> Iterator[dict]:
        """The chosen documents by lot."""
        return (json.loads(text) for (text,) in self.db.execute("SELECT json FROM documents ORDER BY lot"))


def draw_lots(draw: Draw, file: int, path: Path, id_key: str, seed: int) -> int:
    """First pass over a file: keep the lots that may be among the n lowest; how many documents it has."""
    lots, rows, n_documents = array("q"), array("q"), 0
    for row, document in read_numbered(path, (id_key,)):
        n_documents += 1
        drawn = lot(document[id_key], seed)
        if drawn <= draw.limit:
            lots.append(drawn)
            rows.append(row)
            if len(lots) > 2 * draw.n + 10_000:  # one file may be the whole crawl
                lowest = np.argsort(lots, kind="stable")[: draw.n]  # of equal lots the first rows, as in `chosen`
                lots, rows = (array("q", np.array(column)[lowest].tobytes()) for column in (lots, rows))
        if n_documents % 256 == 0 and draw.failed.is_set():
            return n_documents
    draw.keep_lots(file, np.array(lots, np.int64), np.array(rows, np.int64), n_documents)
    return n_documents


def fetch_documents(draw: Draw, path: Path, keys: tuple[str, str], more: tuple[str, ...], lots: dict[int, int]) -> int:
    """Second pass over a file: its chosen documents. keys: of id and text. lots: row → lot, of those not yet there."""
    batch, id_key, text_key = [], *keys
    for row, found in read_numbered(path, keys, more, only=np.array(sorted(lots), np.int64)):
        document = {"id": found[id_key], "text": found[text_key]} | {key: found[key] for key in more}
        batch.append((lots[row], json.dumps(document, default=str)))  # a date may be a timestamp
        if len(batch) == 256:
            draw.keep_documents(batch)
            batch = []
            if draw.failed.is_set():
                return len(lots)
    draw.keep_documents(batch)
    return len(lots)


def each(draw: Draw, function, jobs: list[tuple], workers: int, total: int, **bar) -> None:
    """function(draw, *job) for every job in threads, under a bar of what it returns; the first error ends all."""
    with ThreadPoolExecutor(workers) as pool, tqdm(total=total, disable=None, **bar) as progress:
        waiting = {pool.submit(function, draw, *job) for job in jobs}
        try:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    progress.update(future.result())
        finally:
            if waiting:
                draw.failed.set()
            pool.shutdown(cancel_futures=True)


def sample(inputs: list[str], out: Path, n: int, seed: int = 0, keys: tuple[str, str] = ("id", "text"),
           workers: int = 8, keep: Iterable[str] = ()) -> int:  # fmt: skip
    """Write the sample of n documents of `inputs` to `out`; how many documents there were to choose from.

    inputs: files, folders, globs or URLs, in any order. keys: names of id and text. Columns of `out`: id, text, url, dump,
    date, as strings, and those of `keep`, with their types. InputError if there are fewer than n documents, or anything is
    wrong with one that is read.
    """
    files = find_files(inputs)
    settings = {
        "inputs": [[str(path), path.stat().st_size] for path in files],
        "n": n,
        "seed": seed,
        "keys": list(keys),
    }
    if keep := check_names(keep, ("id", "text", *EXTRA), ()):
        settings["keep_columns"] = keep
    if found := read_made(out, "data/sample.py"):
        if differs := [key for key in (*settings, "keep_columns") if found.get(key) != settings.get(key)]:
            raise InputError(f"{out}: exists, made with another {differs[0]}; choose another --out, or delete it")
        return found["n_documents"]
    check_keys(files[0], dict(zip(keys, ("--id-key", "--text-key"), strict=True)))
    kept_types = types_of(files, keep)
    draw, failed = Draw(out.with_name(out.name + ".partial.sqlite"), settings, n), False
    try:
        jobs = [(file, files[file], keys[0], seed) for file in draw.todo(len(files))]
        each(draw, draw_lots, jobs, workers, None, desc=f"ids of {len(files):,} files", unit="doc", unit_scale=True)
        n_documents, chosen = draw.n_documents(), draw.chosen()
        try:
            check(files, chosen, n, n_documents)
        except InputError:
            draw.clear()  # nothing that the same command could go on from
            raise
        there = {x for (x,) in draw.db.execute("SELECT lot FROM documents")}
        wanted: dict[int, dict[int, int]] = {}
        for x, file, row in chosen.tolist():
            if x not in there:
                wanted.setdefault(file, {})[row] = x
        jobs = [(files[file], keys, (*EXTRA, *keep), lots) for file, lots in sorted(wanted.items())]
        each(draw, fetch_documents, jobs, workers, n - len(there), desc="texts", unit="doc")
        columns = dict.fromkeys(("id", "text", *EXTRA), "string") | kept_types
        write_parquet(out, draw.documents(), columns, settings | {"n_documents": n_documents})
    except InputError:
        failed = True
        raise
    finally:
        draw.close(failed)
    draw.path.unlink()
    return n_documents


def check(files: list[Path], chosen: np.ndarray, n: int, n_documents: int) -> None:
    """InputError if there are too few documents, or one id twice among the chosen."""
    if n_documents < n:
        raise InputError(f"{n_documents:,} documents in {len(files)} files, fewer than --n {n:,}")
    twice = np.flatnonzero(np.diff(chosen[:, 0]) == 0)
    if twice.size:
        first, second = (f"{files[file]} row {row}" for _, file, row in chosen[twice[0] : twice[0] + 2].tolist())
        raise InputError(f"{first} and {second} have the same id; expected unique ids: remove one, or choose another --id-key")


def main() -> None:
    """The command line; bad input ends it with one line and exit status 1."""
    parser = argparse.ArgumentParser(
        description="Draw exactly N documents, the same ones for any order of the files. An interrupted run resumes.",
        epilog="example: python data/sample.py hf://datasets/HuggingFaceFW/fineweb-2/data/deu_Latn/train --n 260000 "
        "--out sample.parquet",
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="files, folders, globs or hf:// URLs of Parquet or JSONL[.gz|.zst]")
    add("--n", type=int, required=True, help="documents to draw (the paper: 260,000)")
    add("--out", type=Path, required=True, metavar="PARQUET", help="file to write")
    add("--seed", type=int, default=0, help="another seed draws other documents (default: %(default)s)")
    add("--id-key", default="id", metavar="KEY", help="key or column of the id (default: %(default)s)")
    add("--text-key", default="text", metavar="KEY", help="key or column of the text (default: %(default)s)")
    add("--keep-columns", nargs="+", default=[], metavar="KEY", help="more columns to keep (url, dump and date always are)")
    add(
        "--workers",
        type=int,
        default=8,
        help="files read at once; the sample does not depend on it (default: %(default)s)",
    )
    args = parser.parse_args()
    for name in ("n", "workers"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}, expected 1 or more")
    n_documents = sample(args.inputs, args.out, args.n, args.seed, (args.id_key, args.text_key), args.workers, args.keep_columns)
    print(f"{args.out}: {args.n:,} of {n_documents:,} documents, seed {args.seed}")
    counts, n_blank = [], 0
    for row in read_documents(args.out, ("text",)):
        counts.append(len(row["text"]))
        n_blank += is_blank(row["text"])
    print(f"characters: {np.median(counts):,.0f} in the median, {max(counts):,} in the longest; {n_blank:,} texts are empty")


if __name__ == "__main__":
    run_script(main)
