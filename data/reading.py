"""Reading: the rows of .jsonl, .jsonl.gz, .jsonl.zst and .parquet files, raw and in order, and the text in a row.

Raw rows are cheap to read (about 1 GB/s) and parsing them is not: so one process reads and many parse. Whatever is
not whole text is an error that names file and line (row, for Parquet; from 1): better to know of damage than to train
on it.
"""

import codecs
import difflib
import gzip
import io
import json
import os
import unicodedata
import zlib
from collections.abc import Iterator
from pathlib import Path

from chat_records import NOT_JSON, columns_of
from nanomed import InputError, first_line

BATCH_BYTES = 1 << 20  # raw rows of a batch
# Characters without a form of their own that are no format characters: joiners, Hangul fillers, variation selectors.
FILLERS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0")
FILLERS |= frozenset(map(chr, range(0xFE00, 0xFE10)))
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


def read_rows(path: Path, key: str, nested: bool = False) -> Iterator[tuple[bytes | None, int]]:
    """Raw rows and the input's bytes read so far: a line of JSON, or the UTF-8 of a Parquet text (None for null).

    nested: the column holds lists (chat messages), and each row of Parquet comes as a line of JSON, with `columns_of(key)`.
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


def suggestion(path: Path) -> str:
    """The end of a message about a path that does not exist: a name like it that does; "" where there is none."""
    missing = next((part for part in (*reversed(path.parents), path) if not part.exists()), path)
    try:
        names = os.listdir(missing.parent)
    except OSError:
        return ""
    close = difflib.get_close_matches(missing.name, names, n=1)
    return f"; did you mean {missing.parent / close[0] / path.relative_to(missing)}?" if close else ""


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
        check_column(path, file.schema_arrow, key, nested)
        columns = [name for name in columns_of(key) if name in names] if nested else [key]
        if twice := [name for name in columns if names.count(name) > 1]:
            raise InputError(f"{path}: has {names.count(twice[0])} columns named {twice[0]!r}, expected one; rename the others")
        n_read, n_rows, size = 0, file.metadata.num_rows, path.stat().st_size
        for batch in file.iter_batches(batch_size=256, columns=columns, use_threads=False):
            if nested:
                records = batch.to_pylist(maps_as_pydicts="strict")
                rows = [json.dumps(record, default=spell).encode() for record in records]
            else:
                rows = batch.column(0).cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
            for row in rows:
                n_read += 1
                yield row, size * n_read // n_rows


def check_column(path: Path, schema, key: str, nested: bool) -> None:
    """InputError where a Parquet file has no such column, or one of another type."""
    pa = pyarrow()
    flag, expected = ("--messages-key", "list of messages") if nested else ("--text-key", "string")
    if key not in schema.names:
        raise InputError(f"{path}: no column {key!r}, it has {', '.join(schema.names)}; name one with {flag}")
    kind = schema.field(schema.names.index(key)).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    kinds = ("list", "large_list", "fixed_size_list") if nested else ("string", "large_string", "string_view")
    if not any(getattr(pa.types, f"is_{name}")(kind) for name in kinds):
        raise InputError(f"{path}: column {key!r} is {kind}, expected {expected}; name another with {flag}")


def spell(value: object) -> str:
    """A value that JSON has no form for, such as a timestamp, as a string that conversations.py refuses to render."""
    return NOT_JSON + type(value).__name__


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
    except (EOFError, OSError, zlib.error, ValueError, KeyError) as error:  # pyarrow's are OSErrors, ValueErrors or KeyErrors
        where = f"after row {n_read}" if path.suffix == ".parquet" else f"after line {n_read}"
        what = f"unreadable {where}, truncated or damaged: {first_line(error)}"
        raise InputError(f"{path}: {what}; fetch it again") from None
    if rows:
        yield n_read - len(rows), rows, position


def parse_row(row: bytes | None, key: str, is_json: bool) -> str | None:
    """The text in a raw row; None for a blank line. ValueError: what is wrong."""
    if not is_json:
        if row is None:
            raise ValueError(f"{key!r} is null, expected a string")
        return row.decode("utf-8")
    record = parse_record(row, key)
    return None if record is None else record[key]


def parse_record(row: bytes, key: str, kind: type = str) -> dict | None:
    """The object in a line of JSON, which has a value of this kind under the key; None for a blank line."""
    line = row.decode("utf-8")
    if not line.strip():
        return None
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {json_fault(error)}; expected one object per line") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, expected an object with the key {key!r}")
    if key not in record:
        flag = "--text-key" if kind is str else "--messages-key"
        raise ValueError(f"no key {key!r}, it has {', '.join(map(repr, [*record][:12]))}; name one with {flag}")
    if not isinstance(record[key], kind):
        expected = "a string" if kind is str else "a list of messages"
        raise ValueError(f"{key!r} is of type {type(record[key]).__name__}, expected {expected}")
    return record


def json_fault(error: json.JSONDecodeError) -> str:
    """What is wrong with one line of JSON, without the number of a line, which would always be 1."""
    return f"{error.msg} at column {error.pos + 1}"


def is_blank(text: str) -> bool:
    """Whether there is nothing to read in a text: white space, control and format characters, fillers."""
    return all(char.isspace() or char in FILLERS or unicodedata.category(char) in ("Cc", "Cf") for char in text)
