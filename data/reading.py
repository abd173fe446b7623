"""Reading: the rows of .jsonl, .jsonl.gz, .jsonl.zst and .parquet files, raw and in order, and the text in a row.

Raw rows are cheap to read (about 1 GB/s) and parsing them is not: so one process reads and many parse. Whatever is
not whole text is an error that names file and line (row, for Parquet; from 1): better to know of damage than to train
on it.
"""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from nanomed import InputError, first_line

BATCH_BYTES = 1 << 20  # raw rows of a batch
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


def read_rows(path: Path, key: str, nested: bool = False) -> Iterator[tuple[bytes | None, int]]:
    """Raw rows and the input's bytes read so far: a line of JSON, or the UTF-8 of a Parquet text (None for null).

    nested: the Parquet column holds lists (chat messages), and each comes as a line of JSON with this one key.
    """
    check_size(path)
    with path.open("rb") as raw:
        if path.suffix == ".parquet":
            yield from read_parquet(path, key, nested)
            return
        lines: io.BufferedIOBase = raw
        if path.suffix == ".gz":
            lines = gzip.GzipFile(fileobj=raw)
        elif path.suffix == ".zst":  # by pyarrow: zstandard's own reader takes a truncated file for a whole one
            lines = io.BufferedReader(pyarrow().CompressedInputStream(pyarrow().PythonFile(raw), "zstd"), 1 << 20)
        for number, line in enumerate(lines):
            yield line if number else line.removeprefix(codecs.BOM_UTF8), raw.tell()


def check_size(path: Path) -> None:
    """InputError for a compressed file of 0 bytes, a failed download, which gzip and zstd would read as an empty text."""
    if path.suffix in (".gz", ".zst") and path.stat().st_size == 0:
        raise InputError(f"{path}: has 0 bytes, which no compressed file has; fetch it again")


def read_parquet(path: Path, key: str, nested: bool) -> Iterator[tuple[bytes | None, int]]:
    """read_rows for Parquet: one column, 256 rows at a time, so that memory grows neither with row groups nor with the file."""
    pa = pyarrow()
    import pyarrow.parquet as pq

    # buffered: else a whole column chunk is in memory; pre_buffer, which is the default, would keep all that was read
    with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        names = file.schema_arrow.names
        flag, expected = ("--messages-key", "list of messages") if nested else ("--text-key", "string")
        if key not in names:
            raise InputError(f"{path}: no column {key!r}, it has {', '.join(names)}; name one with {flag}")
        kind = file.schema_arrow.field(key).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        kinds = ("list", "large_list") if nested else ("string", "large_string", "string_view")
        if not any(getattr(pa.types, f"is_{name}")(kind) for name in kinds):
            raise InputError(f"{path}: column {key!r} is {kind}, expected {expected}; name another with {flag}")
        n_read, n_rows, size = 0, file.metadata.num_rows, path.stat().st_size
        for batch in file.iter_batches(batch_size=256, columns=[key], use_threads=False):
            column = batch.column(0)
            if nested:
                rows = [json.dumps({key: messages}, default=spell).encode() for messages in column.to_pylist()]
            else:
                rows = column.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
            for row in rows:
                n_read += 1
                yield row, size * n_read // n_rows


def spell(value) -> str:
    """A value that JSON has no form for, such as a timestamp; ValueError for bytes, which are no text."""
    if isinstance(value, bytes):
        raise ValueError("bytes in the messages, expected strings")
    return str(value)


def pyarrow():
    """The package, imported where it is needed; InputError where it is not installed."""
    try:
        import pyarrow
    except ImportError:
        raise InputError("reading .zst and .parquet needs pyarrow: pip install -e '.[data]'") from None
    return pyarrow


def read_batches(path: Path, key: str, first_row: int = 0, nested: bool = False) -> Iterator[tuple[int, list[bytes | None], int]]:
    """(row of the first, raw rows, bytes of the input read so far), about BATCH_BYTES each, from `first_row` on."""
    rows, size, n_read, position = [], 0, 0, 0
    try:
        for row, position in read_rows(path, key, nested):
            n_read += 1
            if n_read <= first_row:
                continue
            rows.append(row)
            size += len(row or b"")
            if size >= BATCH_BYTES:
                yield n_read - len(rows), rows, position
                rows, size = [], 0
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected {', '.join(SUFFIXES)}") from None
    except (EOFError, OSError, zlib.error, ValueError) as error:  # pyarrow's are OSErrors and ValueErrors
        where = f"after row {n_read}" if path.suffix == ".parquet" else f"after line {n_read}"
        what = f"unreadable {where}, truncated or damaged: {first_line(error)}"
        raise InputError(f"{path}: {what}; fetch it again") from None
    if rows:
        yield n_read - len(rows), rows, position


def parse_row(row: bytes | None, key: str, is_json: bool, kind: type = str):
    """The value of a raw row, a string or a list as `kind` says; None for a blank line. ValueError: what is wrong."""
    if not is_json:
        if row is None:
            raise ValueError(f"{key!r} is null, expected a string")
        return row.decode("utf-8")
    line = row.decode("utf-8")
    if not line.strip():
        return None
    try:
        record = json.loads(line)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, expected an object with the key {key!r}")
    if key not in record:
        flag = "--text-key" if kind is str else "--messages-key"
        raise ValueError(f"no key {key!r}, it has {', '.join(map(repr, [*record][:12]))}; name one with {flag}")
    value = record[key]
    if not isinstance(value, kind):
        expected = "a string" if kind is str else "a list of messages"
        raise ValueError(f"{key!r} is of type {type(value).__name__}, expected {expected}")
    return value
