"""Questions in disguise are found, equal texts in disguise are duplicates, and both code paths form the same words."""

import html
import json
import random
import re
import unicodedata
from html.entities import codepoint2name

import pytest
from hypothesis import given
from hypothesis import strategies as st

import normalising
from conftest import ROOT, assert_linear
from decontaminate import find_hits, read_questions
from keeping import text_hash
from normalising import is_blank, words_of

EXAM = ROOT / "data/tasks/medizin_de.jsonl"
RECORDS = [json.loads(line) for line in EXAM.read_text("utf-8").splitlines()]
TRANSCRIBED = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "ß": "ss", "Ä": "Ae", "Ö": "Oe", "Ü": "Ue"})


def insert(between: str, after: int = 3):
    """Put a string into every word that is long enough."""
    return lambda text: re.sub(rf"([^\W\d_]{{{after}}})(?=[^\W\d_]{{2}})", lambda found: found[0] + between, text)


def wrap(before: str, after: str):
    """Put strings around every word."""
    return lambda text: re.sub(r"\w+", lambda found: before + found[0] + after, text)


def replace_letters(spell):
    """Spell every character beyond ASCII."""
    return lambda text: "".join(spell(c) if ord(c) > 127 else c for c in text)


# Copies of a text that must count as equal: decontamination and exact deduplication see the same words.
EQUAL = {
    "upper case": str.upper,
    "decomposed (NFD)": lambda text: unicodedata.normalize("NFD", text),
    "soft hyphens": insert("\u00ad"),
    "soft hyphens at line ends": insert("\u00ad\n"),
    "zero-width spaces": insert("\u200b"),
    "zero-width joiners": insert("\u200d"),
    "word joiners": insert("\u2060"),
    "byte order marks": insert("\ufeff"),
    "variation selectors": insert("\ufe0f"),
    "hyphens at line ends": insert("-\n", 4),
    "hyphens at indented line ends": insert("-\r\n    ", 4),
    "hyphens at former line ends": insert("- ", 4),
    "upper case, hyphens at line ends": lambda text: insert("-\n", 4)(text.upper()),
    "U+2010 at line ends": insert("\u2010\n", 4),
    "ae, oe, ue, ss": lambda text: text.translate(TRANSCRIBED),
    "no diacritics": lambda text: re.sub("[\u0300-\u036f]", "", unicodedata.normalize("NFD", text)),
    "ligatures": lambda text: text.replace("fi", "ﬁ").replace("fl", "ﬂ"),
    "full-width letters": lambda text: "".join(chr(ord(c) + 0xFEE0) if 33 <= ord(c) < 127 else c for c in text),
    "named entities": replace_letters(lambda c: f"&{codepoint2name[ord(c)]};" if ord(c) in codepoint2name else c),
    "decimal entities": replace_letters(lambda c: f"&#{ord(c)};"),
    "hexadecimal entities": replace_letters(lambda c: f"&#x{ord(c):x};"),
    "entities of entities": replace_letters(lambda c: f"&amp;#{ord(c)};"),
    "entities of soft hyphens": insert("&shy;"),
    "_words_": wrap("_", "_"),
    "**words**": wrap("**", "**"),
    "<b>words</b>": wrap('<b class="x">', "</b>"),
    "reference marks": wrap("", "[12]"),
    "tags inside words": insert("<wbr/>"),
    "no-break spaces": lambda text: text.replace(" ", "\xa0"),
    "line breaks": lambda text: text.replace(" ", "\n\n"),
}
# What broken encodings leave is looked for in evaluation sets only.
GARBLED = {
    "characters beyond ASCII deleted": lambda text: text.encode("ascii", "ignore").decode(),
    "characters beyond ASCII replaced": lambda text: text.encode("ascii", "replace").decode(),
    "UTF-8 read as cp1252": lambda text: text.encode().decode("cp1252", "replace"),
}


@pytest.fixture(name="questions", scope="module")
def fixture_questions():
    return read_questions([EXAM])


def page(record: dict, order: list[int], options_first: bool = False) -> str:
    options = "\n".join(f"{letter}) {record['options'][i]}" for letter, i in zip("ABCD", order, strict=True))
    question = record["question"]
    return f"Übung. {options}\n{question}" if options_first else f"Übung. {question}\n{options}\nLösung siehe unten"


def n_found(questions, make) -> int:
    """How many of the exam's questions are dropped from their own pages."""
    hits = [find_hits(make(record), questions) for record in RECORDS]
    return sum(any(hit["drop"] and hit["record"] == i for hit in found) for i, found in enumerate(hits))


@pytest.mark.parametrize("name", EQUAL | GARBLED)
def test_a_question_in_disguise_is_found(questions, name):
    disguise = (EQUAL | GARBLED)[name]
    assert n_found(questions, lambda record: disguise(page(record, [0, 1, 2, 3]))) == len(RECORDS) == 68


@pytest.mark.parametrize("options_first", [False, True])
def test_a_question_is_found_whatever_the_order_of_its_options(questions, options_first):
    rng = random.Random(0)
    assert n_found(questions, lambda record: page(record, rng.sample(range(4), 4), options_first)) == 68


def test_each_question_is_reported_once(questions):
    """The spellings of a question are one question."""
    for i, record in enumerate(RECORDS):
        assert [hit["record"] for hit in find_hits(page(record, [0, 1, 2, 3]), questions) if hit["drop"]] == [i]


@pytest.mark.parametrize("name", EQUAL)
def test_a_text_in_disguise_is_a_duplicate(name):
    for record in RECORDS:
        text = page(record, [0, 1, 2, 3])
        assert hash_of(EQUAL[name](text)) == hash_of(text)


def hash_of(text: str) -> str:
    return text_hash(text, words_of(text))


def test_other_texts_are_no_duplicates():
    texts = ["5 mg", "50 mg", "5 µg", "1,5 mg", "15 mg", "Der Patient", "Dem Patienten", "!", "?", "!?", "😀", "", "𝄞"]
    assert len({hash_of(text) for text in texts}) == len(texts)
    assert hash_of(" !\n?") == hash_of("!?")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Vor- und Nachteile, ein- bis zweimal", "vor und nachteile ein bis zweimal"),
        ("Herz-\nKreislauf, Vitamin-D-Mangel", "herz kreislauf vitamin d mangel"),
        ("R&D, A & B; 5 < 6 und 7 > 3", "r d a b 5 6 und 7 3"),
        ("[die Leber](https://example.org/leber) ist", "die leber ist"),
        ("<td>Blut</td><td>Herz</td>", "blut herz"),
        ("10²\u00a0µm naïve Œuvre", "102 μm naive œuvre"),
    ],
)
def test_words(text, words):
    assert words_of(text) == words.split()


COMMON = "abeuosxAEUOSßäöüÄÖÜ09 -\n_.&<>" + normalising._PUNCTUATION


@given(st.text(st.sampled_from(COMMON), max_size=30))
def test_the_fast_path_forms_the_words_of_the_general_one(text):
    assert normalising._UNCOMMON.search(text) is None
    assert normalising._fast_words(text) == normalising._general_words(text)


@given(st.text(max_size=30))
def test_words_are_letters_and_digits_in_one_case(text):
    for word in words_of(text):
        assert word
        assert word == word.casefold()
        assert "_" not in word
        assert not any(unicodedata.category(c) in ("Cf", "Mn", "Me") for c in word)


@given(st.text(st.characters(codec="utf-8"), max_size=30))
def test_decoding_entities_changes_no_words(text):
    plain = re.sub("[&<>\\[\\]]", "", text)
    assert words_of(html.escape(plain)) == words_of(plain)


@pytest.mark.parametrize("text", ["", " \n", "\u200b", "\u200b\u00ad\ufeff \u2060", "\0\x07", "\u2800\u3164", "\u034f"])
def test_a_text_that_shows_nothing_is_blank(text):
    assert is_blank(text)
    assert not is_blank(f"{text}.{text}")


LONG = ["<", "<a ", "&", "&#", "[1", "](", "-", "- ", "-\n", "a-", "\u00ad", "\u200b", "\u0301", "a\u0323\u0301", "A-\n", " "]


@pytest.mark.parametrize("piece", LONG)
def test_words_are_formed_in_linear_time(piece):

    def work(n: int) -> None:
        for text in (piece * n, "a" + piece * n + "b"):
            words_of(text)
            is_blank(text)

    assert_linear(work, 20_000 // len(piece))
