"""Decontaminate: does a document contain a question of an evaluation set?

Two tiers over words (letters and digits, lower case, accents composed): 13 consecutive words in common are a hit, as in
GPT-3's and Llama's reports; so are runs of 8 that cover at least half of a question, since German multiple-choice stems
are often shorter than 13 words. A weaker match, 8 consecutive words of a longer question, is listed and the document
kept: legal and clinical phrases of that length are common property.

A stem of fewer than 8 words is a hit where all its options follow it closely, in any order and with any letters before
them. Alone it is listed at best: "Welche Aussage ist richtig?" or "Wo liegt die Hypophyse?" is on pages that never saw
the exam. What has fewer than 8 words with its options cannot be detected, and is counted.

Why it is fast: only words of the evaluation sets can be part of a hit, so a document's words are looked up one by one
(a dictionary), and numpy hashes the n-grams where 8 known words follow each other. Hashes only propose; the words
decide. Costs: 10 to 20 MB/s of text per core; memory 100 bytes per word of the evaluation sets.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from documents import json_records, parquet_batches
from nanomed import InputError

LONG, SHORT, COVERAGE = 13, 8, 0.5
LEAST = 3  # words of a stem that is looked for beside its options
WORD = re.compile(r"\w+")
FACTORS = np.array([pow(6364136223846793005, power, 1 << 64) for power in range(SHORT)], np.uint64)
# Keys, in lower case, of the sets that `eval.py convert` reads and writes, of prompts, and of the hub's usual layouts.
STEM = re.compile(r"question(_translated)?|stem|prompt|messages|query|problem|passage|contexts?|ctx|text")
OPTION = re.compile(r"options(_translated)?|choices|endings|option_?[a-j\d]|op[a-e]|[a-j]")
BESIDE = ("label", "key", "role", "type")  # keys beside an option's or a message's text, which hold none


def words_of(text: str) -> list[str]:
    """The words of a text as they are compared."""
    return WORD.findall(unicodedata.normalize("NFC", text).lower())


@dataclass
class Questions:
    """The n-grams of evaluation sets: 8 words, or a whole stem that is shorter."""

    texts: list[tuple[str, int, list[str]]] = field(default_factory=list)  # [q]: (set, record from 0, words)
    options: dict[int, list[str]] = field(default_factory=dict)  # q → what must follow, for short stems
    vocabulary: dict[str, int] = field(default_factory=dict)
    places: dict[tuple[int, ...], list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    hashes: dict[int, np.ndarray] = field(default_factory=dict)  # by the number of words
    n_records: dict[str, int] = field(default_factory=dict)
    by_options: int = 0  # records that are detected only with their options
    too_short: int = 0  # records that cannot be detected


def read_questions(paths: list[Path]) -> Questions:
    """Index the evaluation sets. A set is named after its file, or by its path if two files share a name."""
    questions, paths = Questions(), list(dict.fromkeys(paths))
    names = [path.name for path in paths]
    for path in paths:
        name, n_records = path.name if names.count(path.name) == 1 else str(path), 0
        for record in read_records(path):
            parts = [(role, words_of(string)) for role, string in parts_of(record)]
            if not any(role == "stem" for role, _ in parts):
                what = f"record {n_records + 1} has no question, it has {', '.join([*record][:12])}"
                raise InputError(f"{path}: {what}; expected it as question, stem, prompt, passage, ...: rename the key")
            add_record(questions, name, n_records, parts)
            n_records += 1
        if not n_records:
            raise InputError(f"{path}: no records; expected an evaluation set")
        questions.n_records[name] = n_records
    for n in {len(gram) for gram in questions.places}:
        grams = np.array([gram for gram in questions.places if len(gram) == n], np.uint64)
        questions.hashes[n] = np.unique((grams * FACTORS[:n]).sum(1))
    return questions


def add_record(questions: Questions, name: str, number: int, parts: list[tuple[str, list[str]]]) -> None:
    """Index a record. Its strings of 8 words or more are questions of their own (stem, passage, long options)."""
    stems, options = ([words for role, words in parts if words and role == wanted] for wanted in ("stem", "option"))
    long = [words for words in (*stems, *options) if len(words) >= SHORT]
    for words in long:
        add_text(questions, name, number, words)
    stem, n_words = max(stems, key=len, default=[]), sum(map(len, options))
    if options and LEAST <= len(stem) < SHORT <= len(stem) + n_words:
        questions.options[len(questions.texts)] = [" ".join(words) for words in options]
        add_text(questions, name, number, stem)
        questions.by_options += not long
    elif not long:
        questions.too_short += 1


def add_text(questions: Questions, name: str, number: int, words: list[str]) -> None:
    """Index the n-grams of some words."""
    ids = tuple(questions.vocabulary.setdefault(word, len(questions.vocabulary) + 1) for word in words)
    n = min(SHORT, len(ids))
    for place in range(len(ids) - n + 1):
        questions.places[ids[place : place + n]].append((len(questions.texts), place))
    questions.texts.append((name, number, words))


def read_records(path: Path) -> Iterator[dict]:
    """The records of an evaluation set; InputError names the file, and the line of .jsonl."""
    if path.suffix != ".parquet":
        yield from (record for _, record in json_records(path))
        return
    for batch in parquet_batches(path, 256):
        yield from batch.to_pylist()


def parts_of(value, role: str | None = None) -> Iterator[tuple[str, str]]:
    """("stem" or "option", string) of all question text in a record; other keys, an id or a licence, are none."""
    if isinstance(value, dict):
        for key, item in value.items():
            name = key.lower()
            inside = role if name not in BESIDE else None
            yield from parts_of(item, "option" if OPTION.fullmatch(name) else
                                inside or ("stem" if STEM.fullmatch(name) else None))  # fmt: skip
    elif isinstance(value, list):
        for item in value:
            yield from parts_of(item, role)
    elif role and value is not None:
        yield role, str(value)  # an option may be a number


def find_hits(text: str, questions: Questions) -> list[dict]:
    """The questions that a text contains, each once: set, record, the longest run in common, coverage, drop."""
    words = words_of(text)
    ids = np.fromiter((questions.vocabulary.get(word, 0) for word in words), np.uint64)
    matches = defaultdict(list)  # question → [(place in the question, place in the text)]
    known = np.cumsum(np.append(0, ids != 0))  # before each word
    for n, hashes in questions.hashes.items():
        for start in proposed(ids, known, n, hashes):
            for question, place in questions.places.get(tuple(ids[start : start + n].tolist()), ()):
                matches[question].append((place, start))
    hits = []
    for question, places in matches.items():
        name, record, stem = questions.texts[question]
        options = questions.options.get(question)
        found = describe_short(stem, options, places, words) if options else describe(stem, places)
        if found:
            hits.append({"set": name, "record": record} | found)
    return hits


def proposed(ids: np.ndarray, known: np.ndarray, n: int, hashes: np.ndarray) -> list[int]:
    """Where n known words in a row have the hash of an n-gram."""
    starts = np.flatnonzero(known[n:] - known[:-n] == n)
    grams = ids[starts[:, None] + np.arange(n)]
    return starts[np.isin((grams * FACTORS[:n]).sum(1), hashes)].tolist()


def describe_short(stem: list[str], options: list[str], places: list[tuple[int, int]], words: list[str]) -> dict | None:
    """One hit of a stem of fewer than 8 words; None where it stands alone and is too short to be listed."""
    n_words = sum(option.count(" ") + 1 for option in options)
    reach = n_words + SHORT * len(options)  # a letter and a remark may stand beside each option
    follows = (f" {' '.join(words[start + len(stem) :][:reach])} " for _, start in places)
    beside = any(all(f" {option} " in after for option in options) for after in follows)
    if not beside and len(stem) < SHORT / 2:
        return None
    coverage = 1.0 if beside else round(len(stem) / (len(stem) + n_words), 4)
    return {"words": len(stem), "coverage": coverage, "match": " ".join(stem), "drop": beside}


def describe(words: list[str], places: list[tuple[int, int]]) -> dict:
    """One hit from the places of its 8-grams."""
    covered = {place + i for place, _ in places for i in range(SHORT)}
    length, begin = longest_run(places)
    coverage = len(covered) / len(words)
    return {
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
