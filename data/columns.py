"""Columns that a user wants kept (`--keep-columns`): whether the inputs have them, and of which type they are."""

import difflib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from documents import json_records, open_parquet
from nanomed import InputError, first_line
from reading import pyarrow

FLAG = "--keep-columns"
PLAIN = "numbers, strings, booleans, and lists or structs of them"


def check_names(names: Iterable[str], kept_anyway: Iterable[str], own: Iterable[str]) -> list[str]:
    """The columns to keep besides those that are kept anyway. InputError for the name of one that the script writes."""
    for name in names:
        if name in own:
            raise InputError(f"{FLAG} {name}: a column of this name is written with other content; rename yours")
    return [name for name in dict.fromkeys(names) if name not in kept_anyway]


def types_of(files: list[Path], names: list[str]) -> dict:
    """name → Arrow type, the same for all files: an integer in one and a decimal fraction in another are both fractions.

    InputError for a name that no file has, types that do not go together, and values that are not plain. Of Parquet files
    the schema is read; JSONL has none, so it is read to its end.
    """
    if not names:
        return {}
    pa, found, seen = pyarrow(), {}, {}
    with ThreadPoolExecutor(8) as pool:  # footers of remote files: each is a request or two
        for path, schema in zip(files, pool.map(lambda path: schema_of(path, names), files), strict=True):
            seen.update(dict.fromkeys(schema.names))
            for name in names:
                if name in schema.names:
                    kind = plain_type(schema.field(name).type, f"{path}: column {name!r}")
                    what = f"{path}: column {name!r} is {kind}, in other files {found.get(name)}"
                    found[name] = merge(found.get(name, pa.null()), kind, what)
    for name in names:
        if name not in found:
            close = difflib.get_close_matches(name, seen, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise InputError(f"{FLAG} {name}: no input has such a column, they have {', '.join([*seen][:20])}{hint}")
    return {name: pa.string() if pa.types.is_null(kind) else kind for name, kind in found.items()}


def schema_of(path: Path, names: list[str]):
    """The Arrow schema of a file, of JSONL as far as `names` go and with null for others."""
    if not path.name.endswith(".parquet"):
        return infer_schema(path, names)
    with open_parquet(path) as file:
        schema = file.schema_arrow
    if twice := next((name for name in names if schema.names.count(name) > 1), None):
        raise InputError(f"{path}: {schema.names.count(twice)} columns are named {twice!r}, expected one; rename the others")
    return schema


def infer_schema(path: Path, names: list[str]):
    """The Arrow schema that the values of a JSONL file have."""
    pa, kinds = pyarrow(), {}
    for rows in chunks(json_records(path), 1000):
        for key in {key for _, record in rows for key in record}:
            kinds.setdefault(key, pa.null())
        for name in kinds.keys() & set(names):
            where = f"{path}: line {rows[0][0]} or one of the next {len(rows)}: {name!r}"
            try:
                kind = pa.array([record.get(name) for _, record in rows]).type  # infer_type takes a mixture
            except (pa.ArrowException, OverflowError, ValueError) as error:
                raise InputError(f"{where} has values of different types: {first_line(error)}") from None
            kinds[name] = merge(kinds[name], kind, f"{where} is {kind}, above {kinds[name]}")
    return pa.schema(kinds)


def chunks(rows: Iterable, n: int) -> Iterator[list]:
    """Lists of up to n rows."""
    chunk = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == n:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def merge(a, b, what: str):
    """The Arrow type that holds values of both. InputError, beginning with `what`, where there is none."""
    pa = pyarrow()
    try:
        schemas = [pa.schema({"x": kind}) for kind in (a, b)]
        return pa.unify_schemas(schemas, promote_options="permissive").field("x").type
    except pa.ArrowException:
        raise InputError(f"{what}; expected one type: leave the column out, or make them agree") from None


def plain_type(kind, what: str):
    """The type without dictionaries and views. InputError, beginning with `what`, where values are not plain."""
    pa = pyarrow()
    is_a = pa.types
    if is_a.is_dictionary(kind):
        return plain_type(kind.value_type, what)
    if is_a.is_string(kind) or is_a.is_large_string(kind) or kind == pa.string_view():
        return pa.large_string() if is_a.is_large_string(kind) else pa.string()
    if is_a.is_integer(kind) or is_a.is_float32(kind) or is_a.is_float64(kind) or is_a.is_boolean(kind) or is_a.is_null(kind):
        return kind
    if is_a.is_struct(kind):
        return pa.struct([(field.name, plain_type(field.type, what)) for field in kind])
    if is_a.is_list(kind) or is_a.is_large_list(kind):
        make = pa.list_ if is_a.is_list(kind) else pa.large_list
        return make(plain_type(kind.value_type, what))
    raise InputError(f"{what} is {kind}, expected {PLAIN}; leave it out of {FLAG}")
