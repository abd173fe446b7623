"""What prepare.py takes although it is unusual: a byte order mark, Arrow's other kinds of string and list, timestamps."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from documents import read_documents
from nanomed import InputError
from prepare import prepare
from reading import read_batches
from texts import fixture_tok, text_of, write_jsonl  # noqa: F401

TEXTS = [text_of(i) for i in range(20)]


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_compressed_file_of_no_bytes_is_no_empty_text(tmp_path, ending):
    (tmp_path / f"a.jsonl.{ending}").touch()
    with pytest.raises(InputError, match=rf"a\.jsonl\.{ending}: has 0 bytes, which no compressed file has; fetch it again"):
        list(read_documents(tmp_path / f"a.jsonl.{ending}", ("id",)))


@pytest.mark.parametrize("group", [1_000, 17_000])
def test_memory_grows_neither_with_the_file_nor_with_row_groups(tmp_path, group):
    """Of 51 MB Arrow holds a few pages at a time; it held all of it."""
    texts = np.random.default_rng(0).bytes(17_000 * 1_500).hex()
    table = pa.table({"id": range(17_000), "text": [texts[i : i + 3_000] for i in range(0, len(texts), 3_000)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=group, compression="none", use_dictionary=False)
    for read in (lambda path: read_batches(path, "text"), lambda path: read_documents(path, ("id", "text"))):
        before = pa.total_allocated_bytes()
        peak = max(pa.total_allocated_bytes() for _ in read(tmp_path / "a.parquet"))
        assert peak - before < 20e6


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_a_file_that_is_not_there_is_not_called_damaged(tmp_path, ending):
    with pytest.raises(InputError, match=rf"nope\.{ending}: no such file; expected"):
        next(read_documents(tmp_path / f"nope.{ending}", ("id",)))


def test_a_byte_order_mark(tmp_path, tok):
    plain = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    marked = tmp_path / "b.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes())
    plain, marked = (prepare([path], tok, tmp_path / path.stem) for path in (plain, marked))
    assert marked.fingerprint == plain.fingerprint


@pytest.mark.parametrize("kind", [pa.string_view(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_every_kind_of_string(tmp_path, tok, kind):
    expected = prepare([write_jsonl(tmp_path / "a.jsonl", TEXTS)], tok, tmp_path / "expected").fingerprint
    pq.write_table(pa.table({"text": pa.array(TEXTS, kind)}), tmp_path / "a.parquet")
    assert prepare([tmp_path / "a.parquet"], tok, tmp_path / "bins").fingerprint == expected
