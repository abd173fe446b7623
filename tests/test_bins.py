"""The token format: what is written is read back, and what is damaged is refused."""

import hashlib
import json
import os
import shutil

import numpy as np
import pytest

from nanomed import InputError
from nanomed.bins import Bins, ShardWriter, settings_of, verify, write_manifest


def write_set(folder, documents: list[list[list[int]]], vocab_size=300, separator=0, bos=None):
    """documents[shard][document] → a finished set, without going through text."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, docs in enumerate(documents):
        writer = ShardWriter(folder, index, settings_of(vocab_size, separator, bos, "abc"), "test")
        lengths = [len(doc) for doc in docs]
        writer.write(np.array([i for doc in docs for i in doc], np.int64), np.array(lengths), 10 * len(docs))
        writer.commit({})
    write_manifest(folder)
    return folder


DOCUMENTS = [[[5, 6, 7], [8], [9, 10]], [[11], [12, 13, 14, 15]]]


# ---- the files ----


def test_layout_is_the_documented_one(tmp_path):
    folder = write_set(tmp_path / "a", DOCUMENTS)
    assert sorted(os.listdir(folder)) == sorted(
        ["manifest.json"] + [f"shard-0000{i}.{suffix}" for i in (0, 1) for suffix in ("bin", "idx", "json")]
    )
    assert np.fromfile(folder / "shard-00000.bin", "<u2").tolist() == [5, 6, 7, 0, 8, 0, 9, 10, 0]
    assert np.fromfile(folder / "shard-00000.idx", "<u8").tolist() == [0, 4, 6, 9]
    record = json.loads((folder / "shard-00001.json").read_text())
    assert (record["format"], record["version"], record["dtype"]) == ("nanomed-bins", 1, "u2")
    assert (record["n_docs"], record["n_tokens"], record["n_bytes"]) == (2, 7, 20)
    assert record["sha256_bin"] == hashlib.sha256((folder / "shard-00001.bin").read_bytes()).hexdigest()
    assert record["sha256_idx"] == hashlib.sha256((folder / "shard-00001.idx").read_bytes()).hexdigest()


def test_bos_begins_each_document(tmp_path):
    folder = write_set(tmp_path / "a", [[[5], [], [6, 7]]], bos=1)
    assert np.fromfile(folder / "shard-00000.bin", "<u2").tolist() == [1, 5, 0, 1, 0, 1, 6, 7, 0]
    assert verify(folder).bos == 1


def test_reading_is_global_over_shards(tmp_path):
    bins = Bins(write_set(tmp_path / "a", [*DOCUMENTS, [], [[20, 21]]]))
    assert (bins.n_docs, bins.n_tokens, bins.n_bytes, bins.vocab_size, bins.separator) == (6, 19, 60, 300, 0)
    assert bins.lengths.tolist() == [4, 2, 3, 2, 5, 3]
    assert bins.lengths.dtype == np.int64
    whole = [bins.tokens(doc, 0, bins.lengths[doc]).tolist() for doc in range(bins.n_docs)]
    assert whole == [[5, 6, 7, 0], [8, 0], [9, 10, 0], [11, 0], [12, 13, 14, 15, 0], [20, 21, 0]]
    assert bins.tokens(4, 1, 3).tolist() == [13, 14]
    assert bins.tokens(4, 1, 3).base is not None  # a view of the map, no copy
    for doc, start, stop in ((6, 0, 1), (-1, 0, 1), (0, 0, 5), (0, 3, 2), (0, -1, 2)):
        with pytest.raises(IndexError):
            bins.tokens(doc, start, stop)
    with pytest.raises(IndexError):
        Bins(write_set(tmp_path / "b", [[[5]]])).tokens(-1, 0, 1)


def test_token_type_follows_from_the_vocabulary(tmp_path):
    small = Bins(write_set(tmp_path / "small", [[[65_535]]], vocab_size=65_536))
    large = Bins(write_set(tmp_path / "large", [[[65_536]]], vocab_size=65_537, separator=65_535))
    assert small.tokens(0, 0, 2).dtype == np.dtype("<u2")
    assert small.tokens(0, 0, 2).tolist() == [65_535, 0]
    assert large.tokens(0, 0, 2).dtype == np.dtype("<u4")
    assert large.tokens(0, 0, 2).tolist() == [65_536, 65_535]


@pytest.mark.parametrize("bad", [300, 65_536 + 5, -1])
def test_an_id_outside_the_vocabulary_is_refused(tmp_path, bad):
    with pytest.raises(InputError, match="vocabulary of 300"):
        write_set(tmp_path, [[[5, bad]]])


def test_lengths_that_are_not_those_of_the_tokens_are_refused(tmp_path):
    writer = ShardWriter(tmp_path, 0, settings_of(300, 0, None, "abc"), "test")
    with pytest.raises(ValueError, match="lengths sum to 1, but there are 2 tokens"):
        writer.write(np.array([5, 6]), np.array([1]), n_bytes=2)


def test_a_separator_inside_a_document_is_refused(tmp_path):
    with pytest.raises(InputError, match="separator 0 inside"):
        write_set(tmp_path, [[[5, 0, 6]]])


def test_in_conversations_it_may_end_turns_and_is_counted(tmp_path):
    writer = ShardWriter(tmp_path, 0, settings_of(300, 0, None, "abc"), "test", turns=True)
    writer.write(np.array([5, 0, 6, 7]), np.array([3, 1]), n_bytes=4)
    writer.commit({"name": "test"})
    write_manifest(tmp_path)
    assert [verify(tmp_path).tokens(i, 0, n).tolist() for i, n in enumerate((4, 2))] == [[5, 0, 6, 0], [7, 0]]
    edit_json(tmp_path / "shard-00000.json", n_separators=2)
    with pytest.raises(InputError, match="number of separators is 3, expected 2"):
        verify(tmp_path)


def test_fingerprint_is_of_the_data_only(tmp_path):
    a, b = (Bins(write_set(tmp_path / name, DOCUMENTS)) for name in "ab")
    other = Bins(write_set(tmp_path / "c", [DOCUMENTS[0], [[11], [12, 13, 14, 16]]]))
    boundaries = Bins(write_set(tmp_path / "d", [DOCUMENTS[0], [[11, 12], [13, 14, 15]]]))
    assert a.fingerprint == b.fingerprint
    assert len({a.fingerprint, other.fingerprint, boundaries.fingerprint}) == 3


# ---- damage ----


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def forge(folder, tokens: list[int]):
    """Other tokens in shard 0 with checksums that agree: only the contents can give it away."""
    data = np.array(tokens, "<u2").tobytes()
    (folder / "shard-00000.bin").write_bytes(data)
    edit_json(folder / "shard-00000.json", sha256_bin=hashlib.sha256(data).hexdigest())
    (folder / "manifest.json").unlink()
    write_manifest(folder)


def flip(path, at=0):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


DAMAGE_SEEN_AT_OPENING = {
    "truncated bin": (lambda f: truncate(f / "shard-00001.bin"), r"shard-00001.bin: size in bytes is 13, expected 14"),
    "truncated idx": (lambda f: truncate(f / "shard-00000.idx"), r"shard-00000.idx: size in bytes is 31, expected 32"),
    "removed bin": (lambda f: (f / "shard-00000.bin").unlink(), r"shard-00000.bin: size in bytes is missing"),
    "removed shard": (
        lambda f: [p.unlink() for p in f.glob("shard-00001.*")],
        r"number of shards listed is 2, expected 1",
    ),
    "removed first": (lambda f: [p.unlink() for p in f.glob("shard-00000.*")], r"prepare"),
    "wrong total": (
        lambda f: edit_json(f / "manifest.json", n_tokens=17),
        r"manifest.json: n_tokens is 17, expected 16",
    ),
    "wrong count": (
        lambda f: edit_json(f / "shard-00000.json", n_tokens=10),
        r"shard-00000.bin: size in bytes is 18, exp",
    ),
    "wrong bytes": (lambda f: edit_json(f / "shard-00000.json", n_bytes=31), r"entry of shard-00000"),
    "other sum": (lambda f: edit_json(f / "shard-00000.json", sha256_bin="0"), r"entry of shard-00000"),
    "other tokenizer": (
        lambda f: edit_json(f / "shard-00001.json", tokenizer_sha256="x"),
        r"tokenizer_sha256 is x, exp",
    ),
    "other dtype": (lambda f: edit_json(f / "shard-00000.json", dtype="u4"), r"dtype is u4, expected u2"),
    "other version": (lambda f: edit_json(f / "manifest.json", version=2), r"manifest.json: version is 2, expected 1"),
    "other format": (lambda f: edit_json(f / "shard-00000.json", format="x"), r"shard-00000.json: format is x"),
    "missing key": (
        lambda f: (f / "manifest.json").write_text('{"format": "nanomed-bins", "version": 1}'),
        r"missing keys",
    ),
    "not JSON": (lambda f: (f / "manifest.json").write_text("{"), r"manifest.json: cannot be read as JSON"),
    "no object": (
        lambda f: (f / "manifest.json").write_text("[]"),
        r"manifest.json: holds a JSON list, expected an obj",
    ),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"an unfinished set of bins"),
    "offsets fall": (lambda f: np.array([0, 6, 4, 9], "<u8").tofile(f / "shard-00000.idx"), r"shard-00000.idx: rising"),
    "offsets shift": (lambda f: np.array([1, 4, 6, 9], "<u8").tofile(f / "shard-00000.idx"), r"first and last offset"),
}
DAMAGE_SEEN_BY_VERIFY = {
    "flipped bit": (lambda f: flip(f / "shard-00001.bin"), r"shard-00001.bin: sha256 is"),
    "flipped idx": (
        lambda f: np.array([0, 4, 7, 9], "<u8").tofile(f / "shard-00000.idx"),
        r"separator at every end|sha256",
    ),
    "id too high": (lambda f: forge(f, [5, 6, 7, 0, 300, 0, 9, 10, 0]), r"every id < 300 is False"),
    "no separator": (lambda f: forge(f, [5, 6, 7, 0, 8, 1, 9, 10, 0]), r"number of separators is 2, expected 3"),
    "one too many": (lambda f: forge(f, [5, 0, 7, 0, 8, 0, 9, 10, 0]), r"number of separators is 4, expected 3"),
    "misplaced": (lambda f: forge(f, [5, 6, 0, 7, 8, 0, 9, 10, 0]), r"a separator at every end is False"),
    "stray shard": (lambda f: shutil.copy(f / "shard-00000.bin", f / "shard-00002.bin"), r"'shard-00002.bin'"),
    "stray tmp": (lambda f: (f / "shard-00002.idx.tmp").touch(), r"'shard-00002.idx.tmp'"),
}


@pytest.mark.parametrize("name", DAMAGE_SEEN_AT_OPENING)
def test_opening_refuses(tmp_path, name):
    damage, message = DAMAGE_SEEN_AT_OPENING[name]
    folder = write_set(tmp_path / "a", DOCUMENTS)
    assert Bins(folder).n_docs == 5
    damage(folder)
    with pytest.raises(InputError, match=message) as error:
        Bins(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", DAMAGE_SEEN_BY_VERIFY)
def test_verify_refuses(tmp_path, name):
    damage, message = DAMAGE_SEEN_BY_VERIFY[name]
    folder = write_set(tmp_path / "a", DOCUMENTS)
    assert verify(folder).n_docs == 5
    damage(folder)
    with pytest.raises(InputError, match=message) as error:
        verify(folder)
    assert "\n" not in str(error.value)


def test_verify_refuses_a_document_without_its_bos(tmp_path):
    folder = write_set(tmp_path / "a", [[[5], [6]]], bos=1)
    forge(folder, [1, 5, 0, 2, 6, 0])
    with pytest.raises(InputError, match="BOS at every start is False"):
        verify(folder)


def test_verify_reports_its_way_and_looks_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("nanomed.bins.CHUNK", 3)  # shorter than some documents
    folder, seen = write_set(tmp_path / "a", DOCUMENTS), []
    verify(folder, progress=seen.append)
    assert sum(seen) == 16 * 2
    assert len(seen) == 6
