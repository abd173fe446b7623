"""Keeping: the first stage of clean.py, one input at a time: which documents belong to the domain, and are clean?

A document is kept if its score reaches the threshold and it contains no question of an evaluation set. What is kept
goes to OUT/kept/NAME.parquet with hashes of text and id, by which the second stage finds duplicates;
OUT/kept/NAME.json, written last, holds the counts and every hit, and says that the input is done.
"""

import functools
import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from decontaminate import Questions, find_hits_in_words, read_questions
from documents import EXTRA, parquet_batches, read_documents, write_parquet
from nanomed import InputError
from nanomed.files import read_json, write_json
from normalising import is_blank, words_of
from scoring import score_path

CORPUS = {"id": "string", "text": "string", "url": "string", "dump": "string", "date": "string", "score": "float32"}
KEPT = CORPUS | {"text_hash": "string", "id_hash": "string"}


@dataclass(frozen=True)
class Job:
    """What a worker needs to know."""

    scores: str
    out: str
    threshold: float
    eval_sets: tuple[str, ...]
    text_key: str
    id_key: str
    identity: str  # of everything above that decides what is kept
    kept_columns: tuple[tuple[str, object], ...] = ()  # (name, Arrow type) of more columns; None before the inputs are read


def part_of(path: Path, out: Path, folder: str) -> Path:
    """Where a stage writes what it makes of an input."""
    return out / folder / score_path(path, out).name


def keep_file(job: Job, path: Path) -> dict:
    """Stage 1 of one input, in a worker: its counts and hits, which OUT/kept/NAME.json holds (the commit point)."""
    target = part_of(path, Path(job.out), "kept")
    record = {"identity": job.identity, "input": path.name, "size": path.stat().st_size}
    if target.with_suffix(".json").exists():
        found = read_json(target.with_suffix(".json"))
        for key, expected in record.items():
            if found.get(key) != expected:
                what = f"{key} was {found.get(key)}, now it is {expected}"
                raise InputError(f"{target}: from another run: {what}; choose another --out, or delete it")
        return found
    record |= {"counts": Counter(), "hits": []}
    write_parquet(target, kept_documents(job, path, record), KEPT | dict(job.kept_columns), {})
    try:
        write_json(target.with_suffix(".json"), record)
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error.strerror}; free space, then run again") from None
    return record


def kept_documents(job: Job, path: Path, record: dict) -> Iterator[dict]:
    """The documents that stage 1 keeps, counted in `record` as they pass."""
    questions, counts = load_questions(job.eval_sets), record["counts"]
    for row, (document, score) in enumerate(scored_documents(job, path)):
        counts["documents"] += 1
        text = document[job.text_key]
        is_empty = score is None or is_blank(text)
        if is_empty or score < job.threshold:
            counts["empty" if is_empty else "below_threshold"] += 1
            continue
        words = words_of(text)
        hits = find_hits_in_words(words, questions)
        record["hits"] += [{"id": document[job.id_key], "file": path.name, "row": row} | hit for hit in hits]
        if any(hit["drop"] for hit in hits):
            counts["contaminated"] += 1
            continue
        kept = {"id": document[job.id_key], "text": text, "score": score}
        kept |= {key: document[key] for key in (*EXTRA, *dict(job.kept_columns))}
        yield kept | {"text_hash": text_hash(text, words), "id_hash": hash_of(kept["id"])}


def scores_of(path: Path, job: Job) -> Path:
    """The scores of an input; InputError where there are none."""
    source = score_path(path, Path(job.scores))
    if not source.exists():
        raise InputError(f"{source}: missing, expected the scores of {path}; run data/sweep.py on it")
    return source


def scored_documents(job: Job, path: Path) -> Iterator[tuple[dict, float | None]]:
    """Documents beside their scores; InputError if the scores are not those of this file's documents."""
    source = scores_of(path, job)
    documents = read_documents(path, (job.id_key, job.text_key), (*EXTRA, *dict(job.kept_columns)))
    row = 0
    for batch in parquet_batches(source, 1024, ["id", "score"]):
        for identifier, score in zip(batch["id"].to_pylist(), batch["score"].to_pylist(), strict=True):
            document = next(documents, None)
            found = document and document[job.id_key]
            if found != identifier:
                what = f"document {row + 1} has the id {found!r}, its score is for {identifier!r}"
                raise InputError(f"{path}: {what}; sweep this file again")
            if score is not None and math.isnan(score):
                raise InputError(f"{source}: the score of {identifier!r} is not a number; delete it and sweep again")
            yield document, score
            row += 1
    if next(documents, None):
        raise InputError(f"{path}: has more than the {row} documents that {source} has scores for; sweep it again")


@functools.cache
def load_questions(paths: tuple[str, ...]) -> Questions:
    """The evaluation sets, read once per process."""
    return read_questions([Path(path) for path in paths])


def text_hash(text: str, words: list[str]) -> str:
    """The hash that equal texts share: of the words, or of the characters that are not white space where there are no words."""
    return hash_of(" ".join(words) if words else "".join(text.split()))


def hash_of(text: str) -> str:
    """128 bits, as hexadecimal digits: among 10 million texts, two different ones share it with p < 1e-24."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
