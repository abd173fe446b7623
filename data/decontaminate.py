"""Decontaminate: does a document contain a question of an evaluation set?

Two tiers over words (as normalising.py forms them): 13 consecutive words in common are a hit, as in
GPT-3's and Llama's reports; so are runs of 8 that cover at least half of a question, since German multiple-choice stems
are often shorter than 13 words. A weaker match, 8 consecutive words of a longer question, is listed and the document
kept: legal and clinical phrases of that length are common property.

A stem of fewer than 8 words is a hit where all its options stand close to it, before or after, in any order and with any
letters before them. Alone it is listed at best: "Welche Aussage ist richtig?" or "Wo liegt die Hypophyse?" is on pages
that never saw the exam. What has fewer than 8 words with its options cannot be detected, and is counted.

A question with umlauts or other letters beyond ASCII is also looked for as broken encodings leave it (`GARBLED`).

Why it is fast: only words of the evaluation sets can be part of a hit, so a document's words are looked up one by one
(a dictionary), and numpy hashes the n-grams where 8 known words follow each other. Hashes only propose; the words
decide. Costs: about 20 MB/s of text per core; memory 100 bytes per word of the evaluation sets, up
to four times that for text full of umlauts.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path

import numpy as np

from documents import json_records, parquet_batches
from nanomed import InputError
from normalising import words_of

LONG, SHORT, COVERAGE = 13, 8, 0.5
LEAST = 3  # words of a stem that is looked for beside its options
FACTORS = np.array([pow(6364136223846793005, power, 1 << 64) for power in range(SHORT)], np.uint64)
BEYOND_ASCII = re.compile(r"[^\W\d_\x00-\x7f]")
GARBLED = (  # what broken encodings make of letters beyond ASCII
    lambda text: BEYOND_ASCII.sub("", text),
    lambda text: BEYOND_ASCII.sub("?", text),
    lambda text: text.encode("utf-8", "replace").decode("cp1252", "replace"),
)
# Keys, in lower case, of the sets that `eval.py convert` reads and writes, of prompts, and of the hub's usual layouts.
STEM = re.compile(r"question(_translated)?|stem|prompt|messages|query|problem|passage|contexts?|ctx|text")
OPTION = re.compile(r"options(_translated)?|choices|endings|option_?[a-j\d]|op[a-e]|[a-j]")
BESIDE = ("label", "key", "role", "type")  # keys beside an option's or a message's text, which hold none


@dataclass
class Questions:
    """The n-grams of evaluation sets: 8 words, or a whole stem that is shorter."""

    # [q]: (set, record from 0, which string of the record, words); a string has an entry for each spelling
    texts: list[tuple[str, int, int, list[str]]] = field(default_factory=list)
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
            parts = [*parts_of(record)]
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


def add_record(questions: Questions, name: str, number: int, parts: list[tuple[str, str]]) -> None:
    """Index a record. Its strings of 8 words or more are questions of their own (stem, passage, long options).

    parts: (role, string), as of `parts_of`.
    """
    words = [words_of(string) for _, string in parts]
    lengths = [len(string) for string in words]
    long = [part for part, length in enumerate(lengths) if length >= SHORT]
    options = [part for part, (role, _) in enumerate(parts) if role == "option" and words[part]]
    stem = max((part for part, (role, _) in enumerate(parts) if role == "stem"), key=lengths.__getitem__)
    n_words = lengths[stem] + sum(lengths[part] for part in options)
    is_short = bool(options) and LEAST <= lengths[stem] < SHORT <= n_words
    spellings = [words]
    for garble in GARBLED:
        spelled = [words_of(garble(string)) for _, string in parts]
        if spelled not in spellings:
            spellings.append(spelled)
    for spelled in spellings:
        for part in long:
            if len(spelled[part]) >= SHORT:
                add_text(questions, name, number, part, spelled[part])
        if is_short and spelled[stem]:
            questions.options[len(questions.texts)] = [" ".join(spelled[part]) for part in options if spelled[part]]
            add_text(questions, name, number, stem, spelled[stem])
    questions.by_options += is_short and not long
    questions.too_short += not is_short and not long


def add_text(questions: Questions, name: str, number: int, part: int, words: list[str]) -> None:
    """Index the n-grams of one spelling of a record's string."""
    ids = tuple(questions.vocabulary.setdefault(word, len(questions.vocabulary) + 1) for word in words)
    n = min(SHORT, len(ids))
    for place in range(len(ids) - n + 1):
        questions.places[ids[place : place + n]].append((len(questions.texts), place))
    questions.texts.append((name, number, part, words))


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
    return find_hits_in_words(words_of(text), questions)


def find_hits_in_words(words: list[str], questions: Questions) -> list[dict]:
    """`find_hits` in the words of a text."""
    ids = np.fromiter(map(questions.vocabulary.get, words, repeat(0)), np.uint64, len(words))
    matches = defaultdict(list)  # question → [(place in the question, place in the text)]
    known = np.cumsum(np.append(0, ids != 0))  # before each word
    for n, hashes in questions.hashes.items():
        for start in proposed(ids, known, n, hashes):
            for question, place in questions.places.get(tuple(ids[start : start + n].tolist()), ()):
                matches[question].append((place, start))
    hits: dict[tuple[str, int, int], dict] = {}
    for question, places in matches.items():
        name, record, part, stem = questions.texts[question]
        options = questions.options.get(question)
        found = describe_short(stem, options, places, words) if options else describe(stem, places)
        best = hits.get((name, record, part))  # of the spellings of one string
        if found and (best is None or (found["drop"], found["coverage"]) > (best["drop"], best["coverage"])):
            hits[name, record, part] = {"set": name, "record": record} | found
    return [*hits.values()]


def proposed(ids: np.ndarray, known: np.ndarray, n: int, hashes: np.ndarray) -> list[int]:
    """Where n known words in a row have the hash of an n-gram."""
    starts = np.flatnonzero(known[n:] - known[:-n] == n)
    if starts.size == 0:
        return []
    grams = (ids[starts[:, None] + np.arange(n)] * FACTORS[:n]).sum(1)
    nearest = hashes[np.minimum(np.searchsorted(hashes, grams), hashes.size - 1)]  # np.isin would sort both anew
    return starts[nearest == grams].tolist()


def describe_short(stem: list[str], options: list[str], places: list[tuple[int, int]], words: list[str]) -> dict | None:
    """One hit of a stem of fewer than 8 words; None where it stands alone and is too short to be listed."""
    n_words = sum(option.count(" ") + 1 for option in options)
    reach = n_words + SHORT * len(options)  # a letter and a remark may stand beside each option
    starts = {start - place for place, start in places}
    beside = any(has_all_options(options, words, start, start + len(stem), reach) for start in starts)
    if not beside and len(stem) < SHORT / 2:
        return None
    coverage = 1.0 if beside else round(len(stem) / (len(stem) + n_words), 4)
    return {"words": len(stem), "coverage": coverage, "match": " ".join(stem), "drop": beside}


def has_all_options(options: list[str], words: list[str], start: int, stop: int, reach: int) -> bool:
    """Whether all options occur in the `reach` words before or after the stem, which is words[start:stop]."""
    before, after = words[max(0, start - reach) : start], words[stop : stop + reach]
    nearby = f" {' '.join(before)} | {' '.join(after)} "
    return all(f" {option} " in nearby for option in options)


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
