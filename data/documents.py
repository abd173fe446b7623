"""Documents: whole records from local files or the hub, several columns at once, and Parquet written whole or not at all.

reading.py reads one column as fast as it can, for prepare.py; here a stage reads a few (`id`, `text`, `label`, ...) by
name. A path (finding.py) may be local or any URL that fsspec knows (`hf://datasets/HuggingFaceFW/fineweb-2/...`): the hub
is streamed by range requests, so that columns that are not needed are not fetched.

Memory: 256 rows at a time. Whatever is not a whole document is an InputError that names file and row (line, for JSONL).
"""

import glob
import json
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from finding import is_local
from nanomed import InputError, first_line
from reading import pyarrow, read_batches

BATCH_ROWS = 256
EXTRA = ("url", "dump", "date")  # kept where an input has them, so that a document can be traced and taken down


def open_parquet(path: Path):
    """A pyarrow ParquetFile, local or remote; InputError where there is none, or it is not one (truncation is found here)."""
    import pyarrow.parquet as pq

    try:
        # pre_buffer fetches ahead, in few requests, and keeps what was read until its row group is done: for the hub alone
        return pq.ParquetFile(path if is_local(path) else path.open("rb"), buffer_size=1 << 20, pre_buffer=not is_local(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected a Parquet file") from None
    except (OSError, ValueError) as error:  # pyarrow's are of both kinds
        raise InputError(f"{path}: not a whole Parquet file: {first_line(error)}; fetch it again") from None


def parquet_batches(path: Path, n: int, columns: list[str] | None = None) -> Iterator:
    """pyarrow RecordBatches of up to n rows; InputError where there is no such file, or it is damaged."""
    with open_parquet(path) as file:
        try:
            yield from file.iter_batches(batch_size=n, columns=columns, use_threads=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: damaged: {first_line(error)}; delete it, and fetch or make it again") from None


def read_documents(path: Path, needed: tuple[str, ...], extra: tuple[str, ...] = ()) -> Iterator[dict]:
    """The documents of a file, in order: {column: value}; `needed` ones are strings, `extra` ones what is there or None.

    A number as an id is taken as its digits. InputError names file and row (from 1) of what is missing or null.
    """
    return (document for _, document in read_numbered(path, needed, extra))


def read_numbered(
    path: Path, needed: tuple[str, ...], extra: tuple[str, ...] = (), only: np.ndarray | None = None
) -> Iterator[tuple[int, dict]]:
    """(row, document) as in read_documents; rows (lines, for JSONL) count from 1. only: ascending rows to read, or all.

    With `only`, row groups of a Parquet file that hold none of these rows are not read; other lines are not parsed.
    """
    unit = "row" if path.name.endswith(".parquet") else "line"
    records = _parquet_records(path, needed, extra, only) if unit == "row" else json_records(path, only)
    for number, record in records:
        document = {}
        for key in (*needed, *extra):
            value = record.get(key)
            if isinstance(value, int) and key in needed and key != "text" and not isinstance(value, bool):
                value = str(value)
            if key in needed and not isinstance(value, str):
                raise InputError(f"{path}: {unit} {number}: {_what(record, key)}; expected a string")
            document[key] = value
        yield number, document


def check_keys(path: Path, options: dict[str, str]) -> None:
    """InputError where the first document of a file lacks a key. options: key → the option that names another.

    Of a Parquet file the names of the columns are read, and no document.
    """
    if path.name.endswith(".parquet"):
        with open_parquet(path) as file:
            check_columns(path, file.schema_arrow.names, tuple(options))
            where, first = path, dict.fromkeys(file.schema_arrow.names, "")
    else:
        number, first = next(json_records(path), (0, options))  # an empty file lacks none
        where = f"{path}: line {number}"
    for key, option in options.items():
        if key not in first or isinstance(first[key], dict | list):
            raise InputError(f"{where}: {_what(first, key)}; name another with {option}")


def check_columns(path: Path, names: list[str], wanted: tuple[str, ...]) -> None:
    """InputError where two columns of a Parquet file share a name that is wanted: which one was meant?"""
    if twice := [key for key in wanted if names.count(key) > 1]:
        what = f"{names.count(twice[0])} columns are named {twice[0]!r}"
        raise InputError(f"{path}: {what}, expected one; rename the others")


def _what(record: dict, key: str) -> str:
    """What is wrong with a record that has no string under the key."""
    if key not in record:
        return f"no {key!r}, it has {', '.join([*record][:12])}"
    return f"{key!r} is null" if record[key] is None else f"{key!r} is of type {type(record[key]).__name__}"


def json_records(path: Path, only: np.ndarray | None = None) -> Iterator[tuple[int, dict]]:
    """(line number, object) of every line that is wanted and not blank; InputError names the first that is no object."""
    wanted = None if only is None else set(only.tolist())
    for first, rows, _ in read_batches(path, "", 0):
        for number, row in enumerate(rows, first + 1):
            if (wanted is not None and number not in wanted) or not row.strip():
                continue
            try:
                record = json.loads(row.decode())  # of bytes it would take surrogates
                if b"\\ud" in row or b"\\uD" in row:
                    json.dumps(record, ensure_ascii=False).encode()  # JSON can spell half a surrogate pair
            except (ValueError, RecursionError) as error:
                what = "UTF-8" if isinstance(error, UnicodeError) else "JSON"
                why = first_line(error)
                if isinstance(error, json.JSONDecodeError):  # which counts lines, too: there is one
                    why = f"{error.msg} at column {error.colno}"
                raise InputError(f"{path}: line {number}: not valid {what}: {why}") from None
            if not isinstance(record, dict):
                raise InputError(f"{path}: line {number}: a JSON {type(record).__name__}, expected an object")
            yield number, record


def _parquet_records(
    path: Path, needed: tuple[str, ...], extra: tuple[str, ...], only: np.ndarray | None
) -> Iterator[tuple[int, dict]]:
    """(row number, record) of every row that is wanted, with the columns that are asked for and there."""
    with open_parquet(path) as file:
        names = file.schema_arrow.names
        if missing := [key for key in needed if key not in names]:
            raise InputError(f"{path}: no column {missing[0]!r}, it has {', '.join(names)}")
        check_columns(path, names, (*needed, *extra))
        columns, end = [key for key in (*needed, *extra) if key in names], 0
        for group in range(file.num_row_groups):
            number, end = end, end + file.metadata.row_group(group).num_rows
            inside = None if only is None else only[np.searchsorted(only, number + 1) : np.searchsorted(only, end + 1)]
            if inside is not None and inside.size == 0:
                continue
            wanted = None if inside is None else set(inside.tolist())
            try:
                for batch in file.iter_batches(BATCH_ROWS, [group], columns, use_threads=False):
                    for record in batch.to_pylist():
                        number += 1
                        if wanted is None or number in wanted:
                            yield number, record
            except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
                what = f"unreadable after row {number}, damaged or not UTF-8: {first_line(error)}"
                raise InputError(f"{path}: {what}; fetch it again") from None


def write_parquet(path: Path, documents: Iterable[dict], columns: dict, about: dict) -> int:
    """Write documents, as they come, to a Parquet file that is there whole or not at all; returns their number.

    columns: name → Arrow type, or its name ("string", "float32", ...); what is no string in a column of "string", such as a
    date, becomes one. about: goes into the file's metadata under `nanomed`, as JSON.
    """
    pa = pyarrow()
    import pyarrow.parquet as pq

    schema = pa.schema({name: pa.type_for_alias(kind) if isinstance(kind, str) else kind for name, kind in columns.items()})
    schema = schema.with_metadata({"nanomed": json.dumps(about, ensure_ascii=False)})
    spelled = lambda value, kind: str(value) if isinstance(kind, str) and kind == "string" and value is not None else value  # noqa: E731
    n_written, rows = 0, []
    tmp = path.with_name(f"{temporary_prefix(path)}{os.getpid()}.tmp")  # another process may write the same file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_orphans(path)
        with tmp.open("wb") as file:
            with pq.ParquetWriter(file, schema, compression="zstd") as writer:
                for document in documents:
                    rows.append({name: spelled(document.get(name), kind) for name, kind in columns.items()})
                    if len(rows) == 1000:
                        writer.write_table(pa.Table.from_pylist(rows, schema))
                        n_written, rows = n_written + len(rows), []
                if rows:
                    writer.write_table(pa.Table.from_pylist(rows, schema))
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or first_line(error)}") from None
    finally:
        tmp.unlink(missing_ok=True)
    return n_written + len(rows)


def temporary_prefix(path: Path) -> str:
    """How the names of the files begin that this machine's processes write before they are renamed to `path`."""
    return f"{path.name}.{socket.gethostname()}."


def remove_orphans(path: Path) -> None:
    """Remove the temporary files of `path` whose process, which ran on this machine, has ended."""
    prefix = temporary_prefix(path)
    for orphan in path.parent.glob(f"{glob.escape(prefix)}*.tmp"):
        pid = orphan.name.removeprefix(prefix).removesuffix(".tmp")
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            orphan.unlink(missing_ok=True)
        except (PermissionError, ValueError):
            pass  # alive and another user's; or of another machine, whose name begins like ours


def read_about(path: Path) -> dict:
    """What `write_parquet` noted in the file; {} if another tool wrote it."""
    with open_parquet(path) as file:
        return json.loads((file.schema_arrow.metadata or {}).get(b"nanomed", b"{}"))
