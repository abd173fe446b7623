"""Prepare: text → token bins (format: nanomed/bins.py). Run it once per corpus and tokenizer; training only reads bins.

    python data/prepare.py corpus.jsonl more.parquet --tokenizer Qwen/Qwen2.5-7B-Instruct --out bins/medical

One process reads the inputs in order and cuts them into batches of 1 MiB of raw rows; workers parse and encode them;
the first process takes the results back in order, cuts shards and writes. So order and slices cannot depend on the
number of workers, and a process holds a few batches however large the input is. (A process per input would be as fast
only with at least as many inputs as cores.) Workers are spawned: a fork would copy the held locks of the tokenizer's
threads.

A shard is a slice of one input: it ends with the document that brings it to 256 MiB of text. Inputs are hashed first
(one more reading, at disk speed), so a second run knows what the committed shards hold: it goes on behind them, or
stops with one line if tokenizer, settings or inputs differ. Each input has a shard, if only an empty one.

Text that spells a special token, "<|endoftext|>" say, is encoded as the ordinary characters it is; else a web page
could end a document or open a chat turn. Added tokens that are not special (Qwen's <tool_call>, runs of spaces) do
become their ids, as in any use of the tokenizer; the separator and BOS never do, special or not.

Empty texts are skipped and counted, blank lines of .jsonl skipped. Whatever else is not text is an error that names
file and line (row, for Parquet; from 1): better to know of damage than to train on it.

Costs: a worker encodes 2 to 2.5 MB/s of German and takes 80 to 300 MB (vocabulary, one batch or one
long document); the first process can read and write about 190 MB/s, enough for 70 workers.
"""

import argparse
import fcntl
import functools
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Tokenizer
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a clone, installed or not
from nanomed import InputError, bins

SLICE_BYTES = 256 << 20  # text of a shard
BATCH_BYTES = 1 << 20  # raw rows of a batch
ENGINE = f"tokenizers {tokenizers.__version__}"
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


@dataclass(frozen=True)
class Job:
    """What a worker needs to know; small, since it goes with every batch."""

    tokenizer: str  # path of tokenizer.json
    tokenizer_sha256: str
    separator: int
    bos: int | None
    text_key: str


@dataclass
class Encoded:
    """A batch after encoding: D documents of T tokens, without BOS and separator."""

    ids: np.ndarray  # uint32 (T,)
    lengths: np.ndarray  # int64 (D,), tokens
    n_bytes: np.ndarray  # int64 (D,), UTF-8
    rows: np.ndarray  # int64 (D,), row of the input that a document is, from 0
    empty: list[int]  # rows whose text is ""
    end_row: int  # row after the batch
    position: int  # bytes of the input read so far


# ---- the tokenizer ----


def find_tokenizer(model: str | Path) -> tuple[Path, dict]:
    """tokenizer.json of a folder, that file itself, or of a hub id; and the configuration beside it.

    From the hub only the tokenizer's three files come. The configuration is tokenizer_config.json over
    special_tokens_map.json, {} where neither is. InputError if there is no tokenizer.json.
    """
    path = Path(model)
    if not path.exists() and re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(model)):
        from huggingface_hub import snapshot_download  # slow to import

        names = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
        try:
            path = Path(snapshot_download(str(model), allow_patterns=names))
        except (OSError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"{model}: no such folder, and not to be had from the hub: {reason}") from None
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a folder with tokenizer.json, that file or a hub id")
    config: dict = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path.parent / name).is_file():
            config |= {key: value for key, value in bins.read_json(path.parent / name).items() if value is not None}
    return path, config


def load_tokenizer(path: Path) -> Tokenizer:
    """A Tokenizer from tokenizer.json; InputError if the library refuses it."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # it raises bare Exception
        raise InputError(f"{path}: refused by tokenizers {tokenizers.__version__}: {error}") from None


@functools.lru_cache(maxsize=1)  # loading takes a second; a worker does it once
def load_engine(job: Job) -> Callable[[list[str]], list[list[int]]]:
    """The function that encodes texts to ids. This is the seam for another engine, which must give the same ids."""
    spec = json.loads(Path(job.tokenizer).read_text("utf-8"))
    # As saved, truncation would cut documents silently, and dropout would make other bins each time.
    spec["truncation"] = spec["padding"] = None
    if "dropout" in spec["model"]:
        spec["model"]["dropout"] = None
    for token in spec.get("added_tokens") or []:
        token["special"] = token["special"] or token["id"] in (job.separator, job.bos)
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.encode_special_tokens = True  # "do encode their spelling", that is: as ordinary text
    return lambda texts: [code.ids for code in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


# ---- reading ----


def read_rows(path: Path, text_key: str) -> Iterator[tuple[bytes | None, int]]:
    """Raw rows and the input's bytes read so far: a line of JSON, or the UTF-8 of a Parquet text (None for null)."""
    with path.open("rb") as raw:
        if path.suffix == ".parquet":
            yield from read_parquet(path, text_key)
            return
        lines: io.BufferedIOBase = raw
        if path.suffix == ".gz":
            lines = gzip.GzipFile(fileobj=raw)
        elif path.suffix == ".zst":  # by pyarrow: zstandard's own reader takes a truncated file for a whole one
            lines = io.BufferedReader(pyarrow().CompressedInputStream(pyarrow().PythonFile(raw), "zstd"), 1 << 20)
        for line in lines:
            yield line, raw.tell()


def read_parquet(path: Path, text_key: str) -> Iterator[tuple[bytes | None, int]]:
    pa = pyarrow()
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, buffer_size=1 << 20) as file:  # buffered: else a whole column chunk is in memory
        names = file.schema_arrow.names
        if text_key not in names:
            raise InputError(f"{path}: no column {text_key!r}, it has {', '.join(names)}; name one with --text-key")
        kind = file.schema_arrow.field(text_key).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise InputError(f"{path}: column {text_key!r} is {kind}, expected string; name another with --text-key")
        n_read, n_rows, size = 0, file.metadata.num_rows, path.stat().st_size
        for batch in file.iter_batches(batch_size=256, columns=[text_key], use_threads=False):
            for text in batch.column(0).cast(pa.large_string()).cast(pa.large_binary()).to_pylist():
                n_read += 1
                yield text, size * n_read // n_rows


def pyarrow():
    try:
        import pyarrow
    except ImportError:
        raise InputError("reading .zst and .parquet needs pyarrow: pip install 'nanomed[data]'") from None
    return pyarrow


def read_batches(path: Path, text_key: str, first_row: int) -> Iterator[tuple[int, list[bytes | None], int]]:
    """(row of the first, raw rows, bytes of the input read so far), about BATCH_BYTES each, from `first_row` on."""
    rows, size, n_read, position = [], 0, 0, 0
    try:
        for row, position in read_rows(path, text_key):
            n_read += 1
            if n_read <= first_row:
                continue
            rows.append(row)
            size += len(row or b"")
            if size >= BATCH_BYTES:
                yield n_read - len(rows), rows, position
                rows, size = [], 0
    except (EOFError, OSError, zlib.error, ValueError) as error:  # pyarrow's are OSErrors and ValueErrors
        where = f"after row {n_read}" if path.suffix == ".parquet" else f"after line {n_read}"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: unreadable {where}, truncated or damaged: {reason}; fetch it again") from None
    if rows:
        yield n_read - len(rows), rows, position


# ---- encoding ----


def parse_row(row: bytes | None, text_key: str, is_json: bool) -> str | None:
    """The text of a raw row, None for a blank line; ValueError says what is wrong with it."""
    if not is_json:
        if row is None:
            raise ValueError(f"{text_key!r} is null, expected a string")
        return row.decode("utf-8")
    line = row.decode("utf-8")
    if not line.strip():
        return None
    try:
        record = json.loads(line)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, expected an object with the key {text_key!r}")
    if text_key not in record:
        raise ValueError(
            f"no key {text_key!r}, it has {', '.join(map(repr, [*record][:12]))}; name one with --text-key"
        )
    text = record[text_key]
    if not isinstance(text, str):
        raise ValueError(f"{text_key!r} is of type {type(text).__name__}, expected a string")
    return text


def encode_rows(job: Job, path: Path, first_row: int, rows: list[bytes | None], position: int) -> Encoded:
    """Parse and encode a batch, in a worker; InputError names file and line of the first bad row."""
    is_json = path.suffix != ".parquet"
    where = f"{path}: {'line' if is_json else 'row'}"
    texts, n_bytes, places, empty = [], [], [], []
    for number, row in enumerate(rows, first_row):
        try:
            text = parse_row(row, job.text_key, is_json)
            size = len(text.encode("utf-8")) if text else 0  # fails for half a surrogate pair, which JSON can spell
        except UnicodeError as error:
            raise InputError(f"{where} {number + 1}: not valid UTF-8: {error}; expected UTF-8 text") from None
        except json.JSONDecodeError as error:
            raise InputError(f"{where} {number + 1}: not valid JSON: {error}; expected one object a line") from None
        except ValueError as error:
            raise InputError(f"{where} {number + 1}: {error}") from None
        if text:
            texts.append(text)
            n_bytes.append(size)
            places.append(number)
        elif text == "":
            empty.append(number)
    ids = [np.array(code, np.uint32) for code in load_engine(job)(texts)]
    for code, number in zip(ids, places, strict=True):
        if (code == job.separator).any():  # a word-level vocabulary can do that, or a Unigram one
            what = (
                f"its text encodes to the separator's id {job.separator}; remove it, or choose another with --eos TOKEN"
            )
            raise InputError(f"{where} {number + 1}: {what}")
    lengths = np.array([code.size for code in ids], np.int64)
    flat = np.concatenate(ids) if ids else np.empty(0, np.uint32)
    end_row = first_row + len(rows)
    return Encoded(flat, lengths, np.array(n_bytes, np.int64), np.array(places, np.int64), empty, end_row, position)


def start_worker() -> None:
    """In a fresh process: one thread, Ctrl-C left to the parent, and no life after it (kill -9 included)."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def encode_file(
    job: Job, path: Path, first_row: int, pool: ProcessPoolExecutor | None, workers: int
) -> Iterator[Encoded]:
    """The batches of a file, encoded, in order; two per worker are under way."""
    waiting: deque = deque()
    for batch in read_batches(path, job.text_key, first_row):
        if pool is None:
            yield encode_rows(job, path, *batch)
            continue
        waiting.append(pool.submit(encode_rows, job, path, *batch))
        if len(waiting) > 2 * workers:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


# ---- shards ----


def take(batch: Encoded, room: int) -> tuple[Encoded, Encoded]:
    """Split a batch behind the document that brings it to `room` bytes of text (behind the last, if none does)."""
    n_docs = min(int(np.searchsorted(np.cumsum(batch.n_bytes), room)) + 1, batch.rows.size)
    n_tokens = int(batch.lengths[:n_docs].sum())
    head = {"ids": batch.ids[:n_tokens]} | {key: getattr(batch, key)[:n_docs] for key in ("lengths", "n_bytes", "rows")}
    tail = {"ids": batch.ids[n_tokens:]} | {key: getattr(batch, key)[n_docs:] for key in ("lengths", "n_bytes", "rows")}
    return replace(batch, **head), replace(batch, **tail)


def write_file(
    encoded: Iterator[Encoded], out: Path, settings: dict, source: dict, index: int, row: int, progress
) -> int:
    """Write the rest of an input, from `row` on, as shards `index`, `index` + 1, ...; returns the index after them."""
    writer, empty, end = bins.ShardWriter(out, index, settings, ENGINE), [], row
    for batch in encoded:
        end, empty = batch.end_row, empty + batch.empty
        while batch.rows.size:
            if writer.n_bytes >= source["slice_bytes"]:  # cut before a document, not after one: no shard is left empty
                cut = int(batch.rows[0])
                writer.commit(source | slice_of(row, cut, empty) | {"last": False})
                index, row, empty = index + 1, cut, [number for number in empty if number >= cut]
                writer = bins.ShardWriter(out, index, settings, ENGINE)
            head, batch = take(batch, source["slice_bytes"] - writer.n_bytes)
            writer.write(head.ids, head.lengths, head.n_bytes.sum())
        progress(batch.position)
    writer.commit(source | slice_of(row, end, empty) | {"last": True})
    return index + 1


def slice_of(row: int, end: int, empty: list[int]) -> dict:
    """Rows [row, end) of an input."""
    return {"first_row": row, "n_rows": end - row, "n_empty": sum(number < end for number in empty)}


def describe_input(path: Path, job: Job, slice_bytes: int, progress) -> dict:
    """What identifies an input and how it is cut, as it goes into each shard's JSON."""
    if not path.name.endswith(SUFFIXES):
        raise InputError(f"{path}: unknown kind of file, expected {', '.join(SUFFIXES)}")
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
                progress(len(chunk))
            size = file.tell()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}; expected a file") from None
    if size == 0 and path.suffix in (".gz", ".zst"):
        raise InputError(f"{path}: has 0 bytes, which no compressed file has; fetch it again")
    source = {"name": path.name, "size": size, "sha256": digest.hexdigest()}
    return source | {"text_key": job.text_key, "slice_bytes": slice_bytes}


def committed_part(out: Path, settings: dict, sources: list[dict]) -> tuple[int, int, int]:
    """How far an earlier run came: (shards, inputs that are done, rows of the next that are done).

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
    """Remove what an interrupted run left uncommitted: *.tmp, and .bin or .idx without their JSON."""
    for path in out.glob("*"):
        own = re.fullmatch(r"(shard-\d{5}\.(bin|idx|json)|manifest\.json)(\.tmp)?", path.name)
        if own and (path.suffix == ".tmp" or not path.with_suffix(".json").exists()):
            path.unlink()


def lock(out: Path) -> int:
    """Let no second run write here; the lock ends with the process, however it ends."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{out}: another run is writing here; wait for it, or choose another --out") from None
    except OSError:
        pass  # a file system without locks
    return descriptor


# ---- the whole ----


def prepare(
    inputs: list[Path],
    tokenizer_dir: str | Path,
    out: Path,
    text_key: str = "text",
    workers: int = 1,
    eos: str | None = None,
    bos: str = "auto",
    slice_bytes: int = SLICE_BYTES,
) -> bins.Bins:
    """Tokenise `inputs`, in this order, into bins in the folder `out`; returns them opened.

    tokenizer_dir: a folder, a tokenizer.json or a hub id. text_key: key or column of the text. workers: processes that
    encode; with 1 it is this one. eos, bos: see `separator_id`, `bos_id`. slice_bytes: text of a shard. Run again after
    an interruption, it keeps the committed shards. InputError if anything is wrong with what it was given.
    """
    inputs, out = [Path(path) for path in inputs], Path(out)
    if not inputs or len({path.resolve() for path in inputs}) < len(inputs):
        raise InputError(f"{len(inputs)} inputs, expected one or more, each once")
    if workers < 1:
        raise InputError(f"--workers is {workers}, expected 1 or more")
    path, config = find_tokenizer(tokenizer_dir)
    tokenizer = load_tokenizer(path)
    identity, separator = bins.tokenizer_sha256(path), bins.separator_id(tokenizer, config, eos)
    job = Job(str(path), identity, separator, bins.bos_id(tokenizer, config, bos), text_key)
    n_ids = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())  # a vocabulary may have holes: do not count
    settings = bins.settings_of(n_ids, job.separator, job.bos, identity)
    n_bytes = sum(path.stat().st_size for path in inputs if path.is_file())
    with tqdm(total=n_bytes, unit="B", unit_scale=True, desc="hash", disable=None) as bar:
        sources = [describe_input(path, job, slice_bytes, bar.update) for path in inputs]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be made: {error.strerror}; choose another --out") from None
    descriptor = lock(out)
    try:
        write_all(inputs, sources, job, settings, out, workers)
    finally:
        os.close(descriptor)
    return bins.Bins(out)


def write_all(inputs: list[Path], sources: list[dict], job: Job, settings: dict, out: Path, workers: int) -> None:
    """Everything from the first shard that is not there yet to the manifest."""
    remove_leftovers(out)
    index, n_done, row = committed_part(out, settings, sources)
    if (out / "manifest.json").exists():
        print(f"{out}: already prepared, {bins.Bins(out).n_docs:,} documents, {bins.Bins(out).n_tokens:,} tokens")
        return
    pool, started, n_before = None, time.perf_counter(), sum(shard["n_bytes"] for shard in bins.committed_shards(out))
    if workers > 1 and n_done < len(inputs):
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker)
    try:
        with tqdm(total=sum(source["size"] for source in sources), unit="B", unit_scale=True, disable=None) as bar:
            for i in range(n_done, len(inputs)):
                before = sum(source["size"] for source in sources[:i])
                encoded = encode_file(job, inputs[i], row, pool, workers)
                progress = lambda position, before=before: bar.update(before + position - bar.n)  # noqa: E731
                index = write_file(encoded, out, settings, sources[i], index, row, progress)
                row = 0
    except BrokenProcessPool:
        raise InputError(
            "a worker died, likely for want of memory; run again (it goes on) with fewer --workers"
        ) from None
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    if not any(shard["n_docs"] for shard in bins.committed_shards(out)):
        raise InputError(f"{', '.join(map(str, inputs))}: no text in any of the documents; nothing to write")
    bins.write_manifest(out)
    summarise(bins.Bins(out), time.perf_counter() - started, n_before)


def summarise(done: bins.Bins, seconds: float, n_before: int) -> None:
    rate = (done.n_bytes - n_before) / 1e6 / seconds
    n_empty = sum(shard["source"]["n_empty"] for shard in done.shards)
    sizes = f"{done.n_docs:,} documents, {done.n_tokens:,} tokens, {done.n_bytes:,} bytes of text"
    print(f"{done.folder}: {sizes}, {done.n_bytes / done.n_tokens:.2f} bytes/token, {rate:.1f} MB/s in this run")
    if n_empty:
        print(f"{n_empty:,} empty documents skipped")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Turn text into token bins for train.py. Run again after an interruption: it goes on.",
        epilog="example: python data/prepare.py corpus.jsonl --tokenizer Qwen/Qwen2.5-7B-Instruct --out bins/medical",
    )
    add = parser.add_argument
    add("inputs", nargs="+", type=Path, metavar="FILE", help=f"texts: {', '.join(SUFFIXES)}; kept in this order")
    add(
        "--tokenizer",
        required=True,
        metavar="MODEL",
        help="of the model to train: its folder, tokenizer.json or hub id",
    )
    add("--out", required=True, type=Path, metavar="FOLDER", help="where the bins go")
    add("--text-key", default="text", metavar="KEY", help="key or column that holds the text (default: %(default)s)")
    add("--eos", metavar="TOKEN", help="token that ends each document (default: <|endoftext|> if there, else the eos)")
    bos_help = "begin documents with BOS? auto: if the tokenizer itself does, so that training looks like inference"
    add("--bos", choices=("auto", "yes", "no"), default="auto", help=bos_help)
    workers_help = "processes that encode; the bins do not depend on it (default: the CPUs, %(default)s)"
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help=workers_help)
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # --workers says how many cores
    prepare(args.inputs, args.tokenizer, args.out, args.text_key, args.workers, args.eos, args.bos)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
