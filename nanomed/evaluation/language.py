"""Language mixing in German answers, by two small word lists instead of a model.

Language identification by character n-grams misses English inside a German sentence, and stumbles over Latin ("Ulcus
cruris venosum links"). Words catch both: one English word that is neither German nor a loan of German medicine makes a
German sentence mixed. The lists are in data/tasks/words/; tests/language_cases.tsv has 202 labelled sentences, half of them
to tune on and half to test on.

Not counted: code, URLs, text in quotation marks, words in capitals (WHO, IT), hyphenated words (Point-of-Care-Test),
the loans of english_loans.txt (watch and wait), what an abbreviation stands for (chronic obstructive pulmonary disease beside
COPD), and titles of journals, guidelines and studies (New England Journal of Medicine). Text is compared in Unicode's composed
form (NFC). Costs some 50 µs a sentence.
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path

WORDS = Path(__file__).resolve().parents[2] / "data" / "tasks" / "words"
WORD = re.compile(r"[^\W\d_]++(?:['’\-][^\W\d_]++)*+(?!-)")  # not the first half of "Be- oder Verarbeitung"
SKIPPED = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+|„[^“”\"\n]{1,300}[“”\"]|\"[^\"\n]{1,300}\"|»[^«\n]{1,300}«", re.DOTALL
)
ABBREVIATION = r"[A-ZÄÖÜ][A-ZÄÖÜ0-9a-z]{0,2}[A-ZÄÖÜ0-9]{1,6}"
# COPD (chronic obstructive pulmonary disease); (COPD, chronic obstructive pulmonary disease), (COPD: ..., engl. ...)
EXPANDED = re.compile(rf"\b({ABBREVIATION})(?:-\w+)?\s*[(,:–-]\s*((?:engl(?:isch)?\.?:?\s*)?[A-Za-z][^()\n]{{5,90}}?)(?=\))")
SPELLED = re.compile(rf"((?:[A-Za-z][\w'’-]*[ \u00a0]){{1,7}}[A-Za-z][\w'’-]*)\s*\(({ABBREVIATION})[),;]")
LABEL = re.compile(r"^engl(?:isch)?\.?:?\s*|^(?:auf Englisch|von englisch):?\s*", re.IGNORECASE)
SMALL = frozenset("of and the in for with to a an on by or".split())  # words that an abbreviation may leave out
TITLE = re.compile(r"\b(?:The )?[A-Z][\w’'-]*(?:[ \u00a0](?:of|the|and|in|for|on|to|with|[A-Z][\w’'-]*)){1,12}")
TITLE_WORDS = frozenset("Journal Lancet Guideline Guidelines Trial Study Review Annals Archives Statement Manual Handbook".split())
SENTENCE_END = re.compile(r"(?<=[.!?:;])\s+(?=[\w„\"])|\n+")
LINE_WORDS = 5  # a shorter line is not judged, as in the Language Confusion Benchmark
SCRIPTS = {
    "Chinese": r"\u3400-\u9fff\uf900-\ufaff", "Japanese": r"\u3040-\u30ff", "Korean": r"\u1100-\u11ff\uac00-\ud7af",
    "Cyrillic": r"\u0400-\u052f", "Arabic": r"\u0600-\u06ff\u0750-\u077f", "Devanagari": r"\u0900-\u097f",
    "Thai": r"\u0e00-\u0e7f", "Hebrew": r"\u0590-\u05ff",
}  # fmt: skip
FOREIGN = re.compile(f"[{''.join(SCRIPTS.values())}]")  # without Greek: α-Blocker, µ, Ω


@cache
def word_list(name: str) -> frozenset[str]:
    """The words of data/tasks/words/NAME.txt, in lower case."""
    lines = (WORDS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return frozenset(word for line in lines if not line.startswith("#") for word in line.split())


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
    shown = loans().sub(" ", without_titles(without_expansions(SKIPPED.sub(" ", text))))
    return shown if WORD.search(shown) or FOREIGN.search(shown) else loans().sub(" ", text)


def without_expansions(text: str) -> str:
    """The text without the words that an abbreviation beside them stands for."""
    text = EXPANDED.sub(lambda m: m[0].replace(m[2], " ") if stands_for(m[1], LABEL.sub("", m[2]).split()) else m[0], text)

    def shorter(match: re.Match) -> str:
        words = match[1].split()
        for n in range(2, len(words) + 1):  # the words just before the bracket, as few as will do
            if stands_for(match[2], words[-n:]):
                return " ".join(words[:-n]) + match[0][len(match[1]) :]
        return match[0]

    return SPELLED.sub(shorter, text)


def stands_for(abbreviation: str, words: list[str]) -> bool:
    """Whether the words spell the abbreviation: each gives its first letter and perhaps some inside, small words need not."""
    letters = "".join(letter for letter in abbreviation.lower() if letter.isalpha())
    parts = [part.lower() for word in words for part in re.split(r"[-/]", word.strip(".,;:")) if part]

    def spelled(at: int, index: int) -> bool:
        """Whether the parts from index on spell the letters from at on."""
        if index == len(parts):
            return at == len(letters)
        part = parts[index]
        if part in SMALL and spelled(at, index + 1):
            return True
        if at == len(letters) or part[0] != letters[at]:
            return False
        place = 0  # of the first letter; more may follow inside, as the E of GERD in gastroesophageal
        while place >= 0:
            at += 1
            if spelled(at, index + 1):
                return True
            place = part.find(letters[at], place + 1) if at < len(letters) else -1
        return False

    return len(letters) > 1 and spelled(0, 0)


def without_titles(text: str) -> str:
    """The text without titles of English journals, guidelines and studies."""

    def shorter(match: re.Match) -> str:
        words = match[0].split()
        return " " if TITLE_WORDS & set(words) and any(word in SMALL or word in TITLE_WORDS for word in words) else match[0]

    return TITLE.sub(shorter, text)


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
    text = visible(unicodedata.normalize("NFC", answer))
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
