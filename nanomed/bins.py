"""Bins: tokenised text on disk. Write it, read it, verify it.

A folder holds shards and, written last, a manifest (format `nanomed-bins`, version 1):

    shard-00000.bin    tokens, little-endian, u2 if vocab_size <= 65,536 else u4, no header: any tool can map it
    shard-00000.idx    u8[n_docs + 1]: where each document begins, in tokens, from 0; the last entry is n_tokens
    shard-00000.json   counts, checksums, tokenizer, separator, BOS, source
    manifest.json      totals, fingerprint, the list of shards; without it the set is not finished

A document is [BOS] tokens separator; BOS only where the tokenizer itself adds one. The separator is nowhere inside, but in
conversations it may end turns. No document crosses shards. Without BOS the .bin bytes are those of datatrove's `.ds`.

Why so: training reads at random places, and a memory map gives that with no decoding and no copy (RSS then
counts pages of the file cache, which the kernel takes back when it needs them). A map holds a file
descriptor, so only the MAX_MAPS shards that were read last are mapped, of all sets together: a set may have
any number of shards. Files are written as *.tmp, synced and renamed; the JSON is the commit point of a shard,
the manifest that of the set: a kill leaves a whole set or one that is refused.

n_bytes is counted in the Unicode form that the tokenizer gives a text (NFC, say), so that bits per byte do
not depend on how a file spells its umlauts; where a shard's source has no `normal_forms`, as the text was
read.

Costs: 2 or 4 bytes a token and 8 a document on disk; 16 a document in memory (117 MB for 7.3 M documents).
Where a set has more than MAX_MAPS shards, a document of a shard that is not mapped costs about 80
microseconds more.
"""

import bisect
import functools
import hashlib
import json
import os
import resource
from pathlib import Path

import numpy as np

from nanomed import InputError, did_you_mean
from nanomed.files import read_json, write_durably

shard_name = "shard-{:05d}".format
SETTINGS = ("dtype", "vocab_size", "separator", "bos", "tokenizer_sha256")  # the same in all shards of a set
CONTENT = ("n_docs", "n_tokens", "n_bytes", "sha256_bin", "sha256_idx")  # each shard's own; bytes: UTF-8, of the texts
MAX_DESCRIPTORS = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # below 0: without a limit
MAX_MAPS = max(8, min(MAX_DESCRIPTORS // 4, 4096)) if MAX_DESCRIPTORS >= 0 else 4096
CHUNK = 1 << 22  # tokens that verify looks at together: 8 or 16 MB


def settings_of(vocab_size: int, separator: int, bos: int | None, tokenizer_sha256: str) -> dict:
    """What all shards of a set share; the token type follows from the vocabulary."""
    dtype = "u2" if vocab_size <= 1 << 16 else "u4"
    return dict(zip(SETTINGS, (dtype, vocab_size, separator, bos, tokenizer_sha256), strict=True))


class ShardWriter:
    """Streams one shard to *.tmp files, `commit` makes it durable. turns: may the separator end turns in documents?"""

    def __init__(self, folder: Path, index: int, settings: dict, engine: str, turns: bool = False):
        self.base = f"{Path(folder) / shard_name(index)}"
        self.settings, self.engine, self.turns = settings, engine, turns
        self.n_docs = self.n_tokens = self.n_bytes = self.n_separators = 0
        self._files = [open(f"{self.base}.{suffix}.tmp", "wb") for suffix in ("bin", "idx")]  # noqa: SIM115
        self._sums = [hashlib.sha256(), hashlib.sha256()]
        self._append(1, np.zeros(1, "<u8"))

    def _append(self, which: int, array: np.ndarray) -> None:
        self._files[which].write(array)
        self._sums[which].update(array)

    def write(self, ids: np.ndarray, lengths: np.ndarray, n_bytes: int) -> None:
        """Append documents, which come without BOS and separator; InputError if an id does not fit or is the separator.

        ids: (T,) integers, document after document; lengths: (D,) tokens of each; n_bytes: UTF-8 bytes of their texts.
        """
        ids, lengths = np.asarray(ids), np.asarray(lengths, np.int64)
        vocab_size, separator, bos = (self.settings[key] for key in ("vocab_size", "separator", "bos"))
        if lengths.sum() != ids.size:
            raise ValueError(f"lengths sum to {lengths.sum()}, but there are {ids.size} tokens")
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:  # the cast below would wrap silently
            raise InputError(f"{self.base}.bin: ids {ids.min()} to {ids.max()} do not fit a vocabulary of {vocab_size}")
        if not self.turns and (ids == separator).any():
            raise InputError(f"{self.base}.bin: separator {separator} inside a document; name another with --eos")
        ids, ends = ids.astype(np.uint32), np.cumsum(lengths)
        if bos is None:
            framed, n_more = np.insert(ids, ends, separator), 1
        else:  # in pairs (begin, end); np.insert keeps the order of what goes to the same place
            places = np.stack([ends - lengths, ends], axis=1).ravel()
            framed, n_more = np.insert(ids, places, np.tile([bos, separator], lengths.size)), 2
        self._append(0, framed.astype("<" + self.settings["dtype"]))
        self._append(1, (self.n_tokens + np.cumsum(lengths + n_more)).astype("<u8"))
        self.n_docs, self.n_tokens = self.n_docs + lengths.size, self.n_tokens + framed.size
        self.n_bytes += int(n_bytes)
        self.n_separators += int(np.count_nonzero(framed == separator))

    def commit(self, source: dict) -> None:
        """Make the shard durable: sync, rename, the JSON last. source: what it was made from (kept as it is)."""
        for file, suffix in zip(self._files, ("bin", "idx"), strict=True):
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(file.name, f"{self.base}.{suffix}")
        content = (self.n_docs, self.n_tokens, self.n_bytes, *(digest.hexdigest() for digest in self._sums))
        about = {"n_separators": self.n_separators, "engine": self.engine, "source": source}
        _write_record(Path(f"{self.base}.json"), dict(zip(CONTENT, content, strict=True)) | self.settings | about)


def committed_shards(folder: Path) -> list[dict]:
    """The JSONs of shards 0, 1, ... as far as committed. InputError if one disagrees with its files or with shard 0."""
    shards: list[dict] = []
    while (path := Path(folder, f"{shard_name(len(shards))}.json")).exists():
        shard = _read_record(path, (*SETTINGS, *CONTENT, "source"))
        expected = shards[0] if shards else settings_of(*(shard[key] for key in SETTINGS[1:]))
        for key in SETTINGS:
            _expect(path, key, shard[key], expected[key])
        for suffix, size in ((".bin", shard["n_tokens"] * int(shard["dtype"][1])), (".idx", (shard["n_docs"] + 1) * 8)):
            file = path.with_suffix(suffix)
            _expect(file, "size in bytes", file.stat().st_size if file.exists() else "missing (no such file)", size)
        shards.append(shard)
    return shards


def write_manifest(folder: Path) -> None:
    """Finish a set: manifest.json from the shards' JSONs. InputError if there is no shard."""
    _write_record(Path(folder) / "manifest.json", _manifest(folder, committed_shards(folder)))


def _manifest(folder: Path, shards: list[dict]) -> dict:
    _expect(Path(folder), "number of shards above 0", bool(shards), True, "run data/prepare.py")
    sums = "\n".join(shard[key] for shard in shards for key in CONTENT[3:])
    manifest = {key: shards[0][key] for key in SETTINGS} | {key: sum(s[key] for s in shards) for key in CONTENT[:3]}
    manifest["fingerprint"] = hashlib.sha256(sums.encode()).hexdigest()
    return manifest | {"shards": [{key: shard[key] for key in CONTENT} for shard in shards]}


class Bins:
    """A finished set, opened for reading. Opening checks what is cheap (`verify` the rest); InputError if it is wrong.

    n_docs, n_tokens, n_bytes (UTF-8, of the texts), vocab_size, separator, bos (or None), tokenizer_sha256: as recorded
    fingerprint    sha256 over the shards' checksums: identifies the data, whatever the folder is called
    lengths        int64 (n_docs,): tokens of every document, BOS and separator included; shards: their JSON records
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        if not path.exists():
            raise InputError(_not_bins(self.folder))
        self.shards = committed_shards(self.folder)
        expected = _manifest(self.folder, self.shards)
        manifest = _read_record(path, tuple(expected))
        _expect(path, "number of shards listed", len(manifest["shards"]), len(self.shards))
        for i, shard in enumerate(expected["shards"]):
            _expect(path, f"the entry of {shard_name(i)}", manifest["shards"][i], shard)
        for key in expected:
            _expect(path, key, manifest[key], expected[key])
        self.n_docs, self.n_tokens, self.n_bytes = (expected[key] for key in CONTENT[:3])
        _, self.vocab_size, self.separator, self.bos, self.tokenizer_sha256 = (expected[key] for key in SETTINGS)
        self.fingerprint = expected["fingerprint"]
        offsets = [self.offsets(index) for index in range(len(self.shards))]
        self._first_doc = np.cumsum([0] + [shard["n_docs"] for shard in self.shards]).tolist()
        self._starts = np.concatenate([array[:-1] for array in offsets])  # of every document, in the tokens of its shard
        self.lengths = np.concatenate([np.diff(array) for array in offsets])

    def offsets(self, index: int) -> np.ndarray:
        """Where the documents of a shard begin, int64 (n_docs + 1,), read and checked."""
        shard, path = self.shards[index], self.folder / f"{shard_name(index)}.idx"
        offsets = np.fromfile(path, "<u8").astype(np.int64)
        _expect(path, "first and last offset", (int(offsets[0]), int(offsets[-1])), (0, shard["n_tokens"]))
        _expect(path, "rising", bool((np.diff(offsets) >= (1 if self.bos is None else 2)).all()), True)
        return offsets

    def tokens(self, doc: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of document `doc` (counted over all shards): a view of the memory map, u2 or u4."""
        if not (0 <= doc < self.n_docs and 0 <= start <= stop <= self.lengths[doc]):
            raise IndexError(f"no tokens [{start}, {stop}) in document {doc} of {self.n_docs}")
        index = bisect.bisect_right(self._first_doc, doc) - 1
        start_of_doc = int(self._starts[doc])
        return _map(self, index)[start_of_doc + start : start_of_doc + stop]


@functools.lru_cache(maxsize=MAX_MAPS)
def _map(bins: Bins, index: int) -> np.ndarray:
    """The tokens of a shard as a memory map, (n_tokens,); closed when others are needed and no view of it is left."""
    shard = bins.shards[index]
    if shard["n_tokens"] == 0:  # an empty file cannot be mapped
        return np.empty(0, "<" + shard["dtype"])
    path = bins.folder / f"{shard_name(index)}.bin"
    return np.asarray(np.memmap(path, "<" + shard["dtype"], "r"))  # asarray: slices of a plain array are made faster


def _not_bins(folder: Path) -> str:
    """What a path without manifest.json is, and what was probably meant, for an error."""
    if folder.is_file():
        return (
            f"{folder}: is a file, expected a folder of bins; make one with data/prepare.py {folder} --tokenizer MODEL --out BINS"
        )
    if not folder.is_dir():
        near = [str(path.parent) for path in folder.parent.glob("*/manifest.json")]
        return f"{folder}: no such folder{did_you_mean(str(folder), near)}; data/prepare.py makes bins"
    if any(folder.glob("shard-*")):
        return f"{folder}: an unfinished set of bins (no manifest.json); run the same data/prepare.py command again, it goes on"
    inside = sorted(str(path.parent) for path in folder.glob("*/manifest.json"))
    hint = f"; did you mean {' or '.join(inside[:3])}?" if inside else ""
    return f"{folder}: holds no bins (no manifest.json){hint}; data/prepare.py makes some"


def verify(folder: str | Path, deep: bool = True, progress=None) -> Bins:
    """Check a set and return it opened; InputError at the first problem. progress(n_bytes): as .bin files are read.

    deep=False: what opening checks, and no stray files. deep=True: every byte too (checksums, ids, separators, BOS).
    """
    bins = Bins(folder)
    own = {bins.folder / f"{shard_name(i)}.{end}" for i in range(len(bins.shards)) for end in ("bin", "idx", "json")}
    strays = sorted(path.name for path in {*bins.folder.glob("shard-*"), *bins.folder.glob("*.tmp")} - own)
    _expect(bins.folder, "list of files that do not belong to the set", strays, [], "remove them, or prepare again")
    for index in range(len(bins.shards) if deep else 0):
        _verify_shard(bins, index, progress)
    return bins


def _verify_shard(bins: Bins, index: int, progress) -> None:
    shard, tokens, offsets = bins.shards[index], _map(bins, index), bins.offsets(index)
    path = bins.folder / f"{shard_name(index)}.bin"
    n_separators, digest = 0, hashlib.sha256()
    for start in range(0, tokens.size, CHUNK):
        chunk = tokens[start : start + CHUNK]
        digest.update(chunk)
        n_separators += int(np.count_nonzero(chunk == bins.separator))
        _expect(path, f"every id < {bins.vocab_size}", int(chunk.max()) < bins.vocab_size, True)
        if progress:
            progress(chunk.nbytes)
    _expect(path, "number of separators", n_separators, shard.get("n_separators", shard["n_docs"]))
    _expect(path, "a separator at every end", bool((tokens[offsets[1:] - 1] == bins.separator).all()), True)
    _expect(path, "BOS at every start", bins.bos is None or bool((tokens[offsets[:-1]] == bins.bos).all()), True)
    _expect(path, "sha256", digest.hexdigest(), shard["sha256_bin"])
    _expect(path.with_suffix(".idx"), "sha256", hashlib.sha256(offsets.astype("<u8")).hexdigest(), shard["sha256_idx"])


def _read_record(path: Path, keys: tuple[str, ...]) -> dict:
    record = read_json(path)
    for key, expected in (("format", "nanomed-bins"), ("version", 1)):
        _expect(path, key, record.get(key), expected, "not bins, or another version's: prepare again")
    _expect(path, "missing keys", [key for key in keys if key not in record], [])
    return record


def _expect(path: Path, what: str, found, expected, hint: str = "damaged or mixed: delete and prepare again") -> None:
    if found != expected:
        raise InputError(f"{path}: {what} is {found}, expected {expected}; {hint}")


def _write_record(path: Path, value: dict) -> None:
    text = json.dumps({"format": "nanomed-bins", "version": 1} | value, indent=1)  # in ASCII: a file's name may be no text
    write_durably(path, text + "\n")
