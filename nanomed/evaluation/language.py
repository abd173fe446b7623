"""Language mixing in German answers, by two small word lists instead of a model.

Language identification by character n-grams misses English inside a German sentence, and stumbles over Latin ("Ulcus
cruris venosum links"). Words catch both: one English word that is neither German nor a loan of German medicine makes a
German sentence mixed. The lists are in data/tasks/words/; tests/language_cases.tsv has 202 labelled sentences, half of them
to tune on and half to test on.

Not counted: code, URLs, text in quotation marks, words in capitals (WHO, IT), hyphenated words (Point-of-Care-Test),
the loans of english_loans.txt (watch and wait), and names (nanomed/evaluation/names.py): what an abbreviation stands for,
cited titles, journals and societies. Error rates on labelled answers: tests/bench/language.py.
"""

import re
from dataclasses import dataclass
from functools import cache

from nanomed.evaluation.answers import normalised
from nanomed.evaluation.names import without_names
from nanomed.evaluation.words import WORDS, word_list

WORD = re.compile(r"[^\W\d_]++(?:['’\-][^\W\d_]++)*+(?!-)")  # not the first half of "Be- oder Verarbeitung"
SKIPPED = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+|„[^“”\"\n]{1,300}[“”\"]|\"[^\"\n]{1,300}\"|“[^“”\n]{1,300}”"
    r"|»[^«\n]{1,300}«|«[^»\n]{1,300}»|‚[^‘’\n]{1,300}[‘’]|›[^‹\n]{1,300}‹",
    re.DOTALL,
)
SENTENCE_END = re.compile(r"(?<=[.!?:;])\s+(?=[\w„\"])|\n+")
LINE_WORDS = 5  # a shorter line is not judged, as in the Language Confusion Benchmark
SCRIPTS = {
    "Chinese": r"\u3400-\u9fff\uf900-\ufaff", "Japanese": r"\u3040-\u30ff", "Korean": r"\u1100-\u11ff\uac00-\ud7af",
    "Cyrillic": r"\u0400-\u052f", "Arabic": r"\u0600-\u06ff\u0750-\u077f", "Devanagari": r"\u0900-\u097f",
    "Thai": r"\u0e00-\u0e7f", "Hebrew": r"\u0590-\u05ff",
}  # fmt: skip
FOREIGN = re.compile(f"[{''.join(SCRIPTS.values())}]")  # without Greek: α-Blocker, µ, Ω


@cache
def loans() -> re.Pattern:
    """The phrases of english_loans.txt, with spaces or hyphens, in any case."""
    lines = (WORDS / "english_loans.txt").read_text(encoding="utf-8").splitlines()
    phrases = (re.escape(line.strip()).replace(r"\ ", r"[\s\-]") for line in lines if line.strip() and line[0] != "#")
    return re.compile(rf"\b(?:{'|'.join(phrases)})\b", re.IGNORECASE)


@dataclass(frozen=True)
class Counts:
    """Words of a piece of text."""

    words: int
    english: int  # English and not German
    english_function: int  # of them, function words
    german: int  # German function words, and words with an umlaut or ß
    foreign: int  # characters of other scripts

    @property
    def kind(self) -> str:
        """german, english, mixed, or other (another script)."""
        if self.foreign:
            return "other"
        if not self.english:
            return "german"
        return "mixed" if self.german else "english"


def count(text: str) -> Counts:
    """Counts of a sentence or line, after `visible`."""
    words = [w for w in WORD.findall(text) if not (len(w) > 1 and w.isupper())]
    lower = [w.lower().replace("’", "'") for w in words]
    function = sum(w in word_list("english_function_words") for w in lower)
    english = function + sum(w in word_list("english_words") for w in lower)
    english += sum(w in word_list("english_words_lower") for w in words)
    german = sum(w in word_list("german_function_words") or re.search("[äöüß]", w) is not None for w in lower)
    return Counts(len(words), english, function, german, len(FOREIGN.findall(text)))


def visible(text: str) -> str:
    """The text without what does not count. A text that is nothing but a quotation stays as it is."""
    shown = loans().sub(" ", without_names(SKIPPED.sub(" ", text)))
    return shown if WORD.search(shown) or FOREIGN.search(shown) else loans().sub(" ", text)


def sentences(text: str) -> list[str]:
    """Pieces between full stops, colons and line ends."""
    return [piece for piece in SENTENCE_END.split(text) if piece and piece.strip()]


def is_german_line(line: str) -> bool:
    """Whether a line is mostly German: no other script, and no more English words than German function words."""
    found = count(line)
    return not found.foreign and (found.english == 0 or found.german > found.english)


@dataclass(frozen=True)
class Language:
    """What an answer is written in."""

    words: int
    english_function: int
    line_pass: bool | None  # every line of five words or more is German; None without such a line
    mixed: bool  # at least one sentence is mixed
    wholly_english: bool
    scripts: tuple[str, ...]  # other scripts in it


def examine(answer: str) -> Language:
    """One answer."""
    text = visible(normalised(answer))
    counts = [count(sentence) for sentence in sentences(text)]
    lines = [x for x in text.splitlines() if max(len(x.split()), len(FOREIGN.findall(x))) >= LINE_WORDS]
    kinds = [c.kind for c in counts if c.words]
    german = any(c.german for c in counts)
    return Language(
        words=sum(c.words for c in counts),
        english_function=sum(c.english_function for c in counts),
        line_pass=all(map(is_german_line, lines)) if lines else None,
        mixed="mixed" in kinds or ("english" in kinds and german),
        wholly_english="english" in kinds and not german,
        scripts=tuple(name for name, span in SCRIPTS.items() if re.search(f"[{span}]", text)),
    )
