"""Prepare: text → token bins (format: nanomed/bins.py). Run it once per corpus and tokenizer; training only reads bins.

    python data/prepare.py corpus.jsonl more.parquet --tokenizer Qwen/Qwen2.5-7B-Instruct --out bins/medical
    python data/prepare.py ... --hold-out 0.01 --out bins/medical
    python data/prepare.py ... --hold-out 0.01 --part held-out --out bins/val

One process reads the inputs in order and cuts them into batches of 1 MiB of raw rows; workers parse and encode them;
the first process takes the results back in order, cuts shards and writes. So order and slices cannot depend on the
number of workers, and a process holds a few batches however large the input is. (One process per input would be as fast
only with at least as many inputs as cores.)

A shard is a slice of one input: it ends with the document that brings it to 256 MiB of text. Inputs are hashed first
(one more read, at disk speed), so a second run knows what the committed shards contain: it resumes after them, or stops
with one line if tokenizer, settings or inputs differ. Each input has a shard, if only an empty one.

Texts without anything to read (white space, zero-width and control characters) are skipped and counted, blank
lines of .jsonl skipped. Whatever else is not text is an error that names file and line (row, for Parquet;
from 1): better to know of damage than to train on it. A run that fails removes what it has not committed, and
the folders it made, if empty.

Costs: the first process can read and write about 190 MB/s, enough for 70 workers; see encoding.py for theirs.
"""

import argparse
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from encoding import Encoded, Job, encode_file, find_tokenizer, worker_pool
from engines import Unproven, engine_version, load_tokenizer
from nanomed import InputError, bins, run_script
from nanomed.files import lock, read_json
from nanomed.prompts import chat_template
from nanomed.tokenizer import bos_id, normal_forms, separator_id, tokenizer_config, tokenizer_sha256
from reading import SUFFIXES
from resuming import committed_part, remove_leftovers, remove_traces, side
from sources import describe_inputs, find_inputs, list_names

SLICE_BYTES = 256 << 20  # text of a shard


def take(batch: Encoded, room: int) -> tuple[Encoded, Encoded]:
    """Split a batch after the document that brings it to `room` bytes of text (after the last, if none does)."""
    n_docs = min(int(np.searchsorted(np.cumsum(batch.n_bytes), room)) + 1, batch.rows.size)
    n_tokens = int(batch.lengths[:n_docs].sum())
    head = {"ids": batch.ids[:n_tokens]} | {key: getattr(batch, key)[:n_docs] for key in ("lengths", "n_bytes", "rows")}
    tail = {"ids": batch.ids[n_tokens:]} | {key: getattr(batch, key)[n_docs:] for key in ("lengths", "n_bytes", "rows")}
    return replace(batch, **head), replace(batch, **tail)


def write_file(
    encoded: Iterator[Encoded],
    shard_writer: Callable[[int], bins.ShardWriter],
    source: dict,
    index: int,
    row: int,
    progress: Callable[[int], None],
) -> int:
    """Write the rest of an input, from `row` on, as shards `index`, `index` + 1, ...; returns the index after them."""
    writer, empty, end = shard_writer(index), [], row
    for batch in encoded:
        end, empty = batch.end_row, empty + batch.empty
        while batch.rows.size:
            if writer.n_bytes >= source["slice_bytes"]:  # cut before a document, not after one: no shard is left empty
                cut = int(batch.rows[0])
                writer.commit(source | slice_of(row, cut, empty) | {"last": False})
                index, row, empty = index + 1, cut, [number for number in empty if number >= cut]
                writer = shard_writer(index)
            head, batch = take(batch, source["slice_bytes"] - writer.n_bytes)
            writer.write(head.ids, head.lengths, head.n_bytes.sum())
        progress(batch.position)
    writer.commit(source | slice_of(row, end, empty) | {"last": True})
    return index + 1


def slice_of(row: int, end: int, empty: list[int]) -> dict:
    """Rows [row, end) of an input."""
    return {"first_row": row, "n_rows": end - row, "n_empty": sum(number < end for number in empty)}


# ---- the whole ----


@dataclass(frozen=True)
class Run:
    """What stays the same from the first shard to the manifest."""

    inputs: list[Path]
    sources: list[dict]  # what `describe_input` says of each
    settings: dict  # of the bins
    out: Path
    pool: ProcessPoolExecutor | None
    workers: int


def prepare(
    inputs: list[Path],
    tokenizer_dir: str | Path,
    out: Path,
    text_key: str | None = None,
    workers: int = 1,
    eos: str | None = None,
    bos: str = "auto",
    slice_bytes: int = SLICE_BYTES,
    engine: str = "auto",
    messages_key: str | None = None,
    hold_out: float | None = None,
    held_out: float | None = None,
) -> bins.Bins:
    """Tokenise `inputs`, in this order, into bins in the folder `out`; returns them opened.

    tokenizer_dir: a folder, a tokenizer.json or a hub id. text_key: key or column of the text ("text"); messages_key: instead,
    that of chat messages, which the tokenizer's template turns into text. workers: processes that encode; with 1 it is this
    one. eos, bos: see `separator_id`, `bos_id`. slice_bytes: text of a shard. engine: see `write_all`. hold_out, held_out:
    see `is_wanted`; at most one of them. Run again after an interruption, it keeps the committed shards. InputError if
    anything is wrong with what it was given.
    """
    inputs, out = find_inputs(inputs), Path(out)
    if workers < 1:
        raise InputError(f"--workers is {workers}, expected 1 or more")
    share = hold_out if held_out is None else held_out
    if share is not None and not 0 < share < 1:
        raise InputError(f"--hold-out is {share}, expected a share between 0 and 1, such as 0.02")
    if hold_out and held_out:
        raise InputError("hold_out and held_out exclude each other; give one")
    if text_key and messages_key:
        raise InputError("--text-key and --messages-key exclude each other; give one")
    path = find_tokenizer(tokenizer_dir)
    with worker_pool(workers, path) as pool:
        job, settings = plan(path, text_key or "text", messages_key, eos, bos)
        job = replace(job, hold_out=hold_out, held_out=held_out)
        run = Run(inputs, describe_inputs(inputs, job, slice_bytes), settings, out, pool, workers)
        return write_bins(run, job, engine)


def write_bins(run: Run, job: Job, engine: str) -> bins.Bins:
    """Write what the folder lacks, under its lock; returns the bins opened. Where it fails, only whole shards stay."""
    out = run.out
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be made: {error.strerror}; choose another --out") from None
    descriptor = lock(out)
    try:
        remove_leftovers(out)
        place = committed_part(out, run.settings, run.sources)
        if (out / "manifest.json").exists():
            done = bins.Bins(out)
            print(f"{out}: already prepared, {done.n_docs:,} documents, {done.n_tokens:,} tokens")
            return done
        write_all(run, job, place, engine)
        finish(out, run.inputs, job)
        return bins.Bins(out)
    except OSError as error:
        remove_traces(out, made)
        hint = "free space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "put that right"
        raise InputError(f"{out}: cannot be written: {error.strerror or error}; {hint}, then run again") from None
    except (Exception, KeyboardInterrupt):
        remove_traces(out, made)
        raise
    finally:
        os.close(descriptor)


def plan(path: Path, text_key: str, messages_key: str | None, eos: str | None, bos: str) -> tuple[Job, dict]:
    """What the workers and the shards need to know about the tokenizer; the engine is not chosen yet."""
    tokenizer, config = load_tokenizer(path), tokenizer_config(path.parent)
    identity, separator = tokenizer_sha256(path), separator_id(tokenizer, config, eos)
    if messages_key:
        chat_template(path.parent)
        if bos == "yes":
            raise InputError("--bos yes: with --messages-key the chat template says where BOS goes; omit --bos")
    begin = None if messages_key else bos_id(tokenizer, config, bos)
    job = Job(str(path), identity, separator, begin, messages_key or text_key, bool(messages_key), "tokenizers",
              normal_forms=normal_forms(read_json(path)))  # fmt: skip
    n_ids = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())  # a vocabulary may have holes: do not count
    return job, bins.settings_of(n_ids, separator, begin, identity)


def write_all(run: Run, job: Job, place: tuple[int, int, int], engine: str) -> None:
    """All shards from `place` on: (index of the shard, inputs that are done, rows of the next that are done).

    engine "auto": gigatoken, or `tokenizers` if gigatoken proves unusable before a document is committed.
    """
    if job.messages and engine == "gigatoken":
        raise InputError("--engine gigatoken: chat records need tokenizers; use --engine auto")
    if place[1] == len(run.inputs):
        return
    wanted, engine = engine, "tokenizers" if job.messages or engine == "tokenizers" else "gigatoken"
    try:
        return write_inputs(run, replace(job, engine=engine), place)
    except Unproven as error:
        if wanted == "gigatoken":
            raise InputError(f"--engine gigatoken: {error}; use --engine auto") from None
        if any(shard["n_docs"] for shard in bins.committed_shards(run.out)[place[0] :]):
            raise InputError(f"gigatoken: {error}; delete {run.out}, use --engine tokenizers") from None
        print(f"gigatoken is not used: {error}", file=sys.stderr)
    write_inputs(run, replace(job, engine="tokenizers"), place)


def write_inputs(run: Run, job: Job, place: tuple[int, int, int]) -> None:
    """`write_all` with the job's engine; Unproven if that is gigatoken and must not be."""
    (index, n_done, row), started = place, time.perf_counter()
    n_before = sum(shard["n_bytes"] for shard in bins.committed_shards(run.out))
    engine = engine_version(job.engine)
    try:
        with tqdm(total=sum(source["size"] for source in run.sources), unit="B", unit_scale=True, disable=None) as bar:
            before = sum(source["size"] for source in run.sources[:n_done])
            for i in range(n_done, len(run.inputs)):
                encoded = encode_file(job, run.inputs[i], row, run.pool, run.workers)
                progress = lambda position, before=before: bar.update(before + position - bar.n)  # noqa: E731
                shard_writer = lambda index: bins.ShardWriter(run.out, index, run.settings, engine, job.messages)  # noqa: E731
                index = write_file(encoded, shard_writer, run.sources[i], index, row, progress)
                row, before = 0, before + run.sources[i]["size"]
    except BrokenProcessPool:
        raise InputError("a worker died, probably out of memory; run again with fewer --workers (it resumes)") from None
    n_bytes = sum(shard["n_bytes"] for shard in bins.committed_shards(run.out)) - n_before
    if n_bytes:
        print(f"{n_bytes / 1e6 / (time.perf_counter() - started):.1f} MB/s with {engine}, workers: {run.workers}")


def finish(out: Path, inputs: list[Path], job: Job) -> None:
    """The manifest, and the closing line: documents, tokens, bytes."""
    shards = bins.committed_shards(out)
    if not any(shard["n_docs"] for shard in shards):
        remove_leftovers(out)
        what = "no text in any of the documents; nothing to write"
        if (job.hold_out or job.held_out) and any(s["source"]["n_rows"] > s["source"]["n_empty"] for s in shards):
            what = f"{side(job.hold_out, job.held_out)} leaves no documents; give another share"
        raise InputError(f"{list_names([str(path) for path in inputs])}: {what}")
    bins.write_manifest(out)
    done = bins.Bins(out)
    sizes = f"{done.n_docs:,} documents, {done.n_tokens:,} tokens, {done.n_bytes:,} bytes of text"
    print(f"{done.folder}: {sizes}, {done.n_bytes / done.n_tokens:.2f} bytes/token")
    if n_empty := sum(shard["source"]["n_empty"] for shard in done.shards):
        print(f"{n_empty:,} empty documents skipped")


def main() -> None:
    """The command line; bad input ends it with one line and exit status 1."""
    parser = argparse.ArgumentParser(
        description="Turn text into token bins for train.py. An interrupted run resumes.",
        epilog="example: python data/prepare.py corpus.jsonl --tokenizer Qwen/Qwen2.5-7B-Instruct --out bins/medical",
    )
    add = parser.add_argument
    inputs_help = f"texts: {', '.join(SUFFIXES)}; kept in this order; a folder means all of them in and below it"
    add("inputs", nargs="+", type=Path, metavar="FILE", help=inputs_help)
    tokenizer_help = "tokenizer of the model to train: folder, tokenizer.json or hub id"
    add("--tokenizer", required=True, metavar="MODEL", help=tokenizer_help)
    add("--out", required=True, type=Path, metavar="FOLDER", help="where the bins go")
    add("--text-key", metavar="KEY", help="key or column that holds the text (default: text)")
    add("--messages-key", metavar="KEY", help="instead: key or column of chat messages, for the model's chat template")
    add("--eos", metavar="TOKEN", help="token that ends documents (default: <|endoftext|>, <|end_of_text|> or the eos)")
    bos_help = "begin documents with BOS? auto: if the tokenizer itself does, so that training looks like inference"
    add("--bos", choices=("auto", "yes", "no"), default="auto", help=bos_help)
    hold_out_help = "set this share of the documents aside for validation; a hash of the text decides which"
    add("--hold-out", type=float, metavar="SHARE", help=hold_out_help)
    part_help = "with --hold-out: what goes into these bins, the documents to train on or those set aside (default: train)"
    add("--part", choices=("train", "held-out"), help=part_help)
    add("--held-out", type=float, metavar="SHARE", help=argparse.SUPPRESS)  # the old spelling of --part held-out
    workers_help = "processes that encode; the bins do not depend on it (default: the CPUs, %(default)s)"
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help=workers_help)
    engine_help = "auto: gigatoken if it is installed and gives the ids of tokenizers (default: %(default)s)"
    add("--engine", choices=("auto", "gigatoken", "tokenizers"), default="auto", help=engine_help)
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # --workers says how many cores
    options = {name: value for name, value in vars(args).items() if name not in ("inputs", "tokenizer", "out", "part")}
    if args.hold_out is not None and args.held_out is not None:
        raise InputError("--hold-out and --held-out exclude each other; give --hold-out SHARE --part held-out")
    if args.part and args.hold_out is None:
        raise InputError(f"--part {args.part} needs the share that is set aside: --hold-out SHARE")
    if args.part == "held-out":
        options |= {"hold_out": None, "held_out": args.hold_out}
    prepare(args.inputs, args.tokenizer, args.out, **options)


if __name__ == "__main__":
    run_script(main)
