"""Decontaminate: does a document hold a question of an evaluation set?

Two tiers over words (letters and digits, lower case, accents composed): 13 words in a row in common is a hit, as in
GPT-3's and Llama's reports; so are 8 in a row where such runs cover at least half of a question, since German
multiple-choice stems are often shorter than 13 words. A weaker match, 8 words in a row of a longer question, is listed
and the document kept: legal and clinical phrases of that length are common property.

Why it is fast: only words of the evaluation sets can be part of a hit, so a document's words are looked up one by one
(a dictionary), and the n-grams are hashed by numpy where 8 known words stand in a row. Hashes only propose; the words
decide. Costs: 10 to 20 MB/s of text a core; memory 100 bytes a word of the evaluation sets.
"""

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from documents import open_parquet
from nanomed import InputError

LONG, SHORT, COVERAGE = 13, 8, 0.5
WORD = re.compile(r"\w+")
FACTORS = np.array([pow(6364136223846793005, power, 1 << 64) for power in range(SHORT)], np.uint64)


def words_of(text: str) -> list[str]:
    """The words of a text as they are compared."""
    return WORD.findall(unicodedata.normalize("NFC", text).lower())


@dataclass
class Questions:
    """The n-grams of evaluation sets. texts[q]: (set name, record from 0, words); too_short: records below 8 words."""

    texts: list[tuple[str, int, list[str]]] = field(default_factory=list)
    vocabulary: dict[str, int] = field(default_factory=dict)
    places: dict[tuple[int, ...], list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    hashes: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    n_records: dict[str, int] = field(default_factory=dict)
    too_short: int = 0


def read_questions(paths: list[Path]) -> Questions:
    """Index the evaluation sets: .jsonl or .parquet, every string of a record counts, whatever its key.

    A record's strings of 8 words or more are questions of their own (stem, context, long options); where none is that
    long, all its strings together are one.
    """
    questions = Questions()
    for path in paths:
        for number, record in enumerate(read_records(path)):
            questions.n_records[path.name] = number + 1
            parts = [words_of(string) for string in strings_of(record)]
            long = [words for words in parts if len(words) >= SHORT] or [[word for part in parts for word in part]]
            for words in long:
                if len(words) < SHORT:
                    questions.too_short += 1
                    continue
                ids = tuple(questions.vocabulary.setdefault(word, len(questions.vocabulary) + 1) for word in words)
                for place in range(len(ids) - SHORT + 1):
                    questions.places[ids[place : place + SHORT]].append((len(questions.texts), place))
                questions.texts.append((path.name, number, words))
        if not questions.n_records.get(path.name):
            raise InputError(f"{path}: no records; expected an evaluation set")
    grams = np.array(list(questions.places), np.uint64).reshape(-1, SHORT)
    questions.hashes = np.unique((grams * FACTORS).sum(1))
    return questions


def read_records(path: Path) -> Iterator[dict]:
    """The records of an evaluation set; InputError names file and line."""
    if path.suffix == ".parquet":
        with open_parquet(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
        return
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                number += 1
                if line.strip():
                    yield json.loads(line)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; expected .jsonl or .parquet") from None
    except ValueError as error:
        raise InputError(f"{path}: near line {number}: not valid JSON or UTF-8: {error}") from None


def strings_of(value) -> Iterator[str]:
    """Every string in a JSON value, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings_of(item)


def find_hits(text: str, questions: Questions) -> list[dict]:
    """The questions that a text holds, each once: set, record, the longest run in common, coverage, drop."""
    ids = np.fromiter((questions.vocabulary.get(word, 0) for word in words_of(text)), np.uint64)
    if ids.size < SHORT:
        return []
    windows = np.lib.stride_tricks.sliding_window_view(ids, SHORT)
    starts = np.flatnonzero((windows != 0).all(1))
    proposed = starts[np.isin((windows[starts] * FACTORS).sum(1), questions.hashes)]
    matches = defaultdict(list)  # question → [(place in the question, place in the text)]
    for start in proposed.tolist():
        for question, place in questions.places.get(tuple(windows[start].tolist()), ()):
            matches[question].append((place, start))
    return [describe(questions.texts[question], places) for question, places in matches.items()]


def describe(question: tuple[str, int, list[str]], places: list[tuple[int, int]]) -> dict:
    """One hit from the places of its 8-grams."""
    name, record, words = question
    covered = {place + i for place, _ in places for i in range(SHORT)}
    length, begin = longest_run(places)
    coverage = len(covered) / len(words)
    return {
        "set": name,
        "record": record,
        "words": length,
        "coverage": round(coverage, 4),
        "match": " ".join(words[begin : begin + length]),
        "drop": length >= LONG or coverage >= COVERAGE,
    }


def longest_run(places: list[tuple[int, int]]) -> tuple[int, int]:
    """(words, where in the question) of the longest run: 8-grams that follow each other in question and text alike."""
    best, runs = (0, 0), {}
    for place, start in sorted(places):
        begin = runs.get((place - 1, start - 1), place)
        runs[place, start] = begin
        best = max(best, (place - begin + SHORT, begin), key=lambda found: found[0])
    return best
