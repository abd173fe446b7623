"""Verbosity: how long answers are, whether they end, and what they are padded with.

Lengths are counted in the same unit for all models, since tokens of different tokenizers cannot be compared: in words, or
in tokens of `--tokenizer`. "Continued turns" are the typical damage of continual pre-training without chats: the model
answers, then writes the user's next question too.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from nanomed import InputError, first_line
from nanomed.evaluation.answers import Sample, normalised

WORD = re.compile(r"\w+(?:[-'’]\w+)*")
TURN = re.compile(  # what a German answer does not contain: roles, and special tokens where a server leaves them in the text
    r"^[\s#*>\-]*(?:user|human|assistant|instruction)\**\s*:|"
    r"<[|｜][^|｜<>\s]{1,40}[|｜]>|<(?:start|end)_of_(?:turn|role)>|\[/?INST\]|</?s>",
    re.IGNORECASE | re.MULTILINE,
)
END = re.compile(  # tokens that end an answer, at its end
    r"(?:\s|<[|｜][^|｜<>\s]*(?:end|eot|eos|eom)[^|｜<>\s]*[|｜]>|</s>|<end_of_turn>)+\Z", re.IGNORECASE
)
ROLE = re.compile(r"^(?:#+ *|\*\*)?(?:(frage|anfrage|nutzer|benutzer)|antwort|assistent)\**\s*:", re.IGNORECASE | re.MULTILINE)
ECHO_WORDS = 12  # this many consecutive words of the prompt make an echo
N_GRAM = 4


@dataclass(frozen=True)
class Verbosity:
    """One answer's length, and how it wastes it."""

    length: int  # in the common unit
    ended: bool  # not cut off
    repeated: float  # share of repeated 4-grams of words
    continued: bool  # invents a further turn of the conversation
    echo: bool  # begins by repeating the prompt
    empty: bool


def counter(tokenizer: str | None) -> tuple[str, Callable[[str], int], list[Path]]:
    """(name of the unit, length of a text in it, files it depends on). tokenizer: a folder with a tokenizer.json, or that file;
    None: words. InputError if it cannot be read."""
    if tokenizer is None:
        return "words", lambda text: len(WORD.findall(normalised(text))), []
    from tokenizers import Tokenizer

    path = Path(tokenizer)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"--tokenizer {tokenizer}: has no tokenizer.json; give a model's folder or that file")
    try:
        encode = Tokenizer.from_file(str(path)).encode
    except Exception as error:  # the package raises plain Exception
        raise InputError(f"{path}: cannot be read as a tokenizer ({first_line(error)})") from None
    return f"tokens of {tokenizer}", lambda text: len(encode(text, add_special_tokens=False).ids), [path]


def examine(sample: Sample, length: Callable[[str], int]) -> Verbosity:
    """One answer. Lengths in tokens are those of the text as it was written."""
    said, question = normalised(sample.answer), normalised(sample.question)
    words = [word.lower() for word in WORD.findall(said)]
    return Verbosity(
        length=length(sample.answer),
        ended=sample.finish_reason != "length",
        repeated=repeated_share(words),
        continued=sample.turn_tokens > 0 or continues(said),
        echo=echoes(words, [word.lower() for word in WORD.findall(question)]),
        empty=not END.sub("", said),
    )


def repeated_share(words: list[str]) -> float:
    """1 - distinct / all 4-grams; 0 where there are fewer than two."""
    grams = Counter(tuple(words[i : i + N_GRAM]) for i in range(len(words) - N_GRAM + 1))
    return 1 - len(grams) / grams.total() if grams.total() > 1 else 0.0


def continues(answer: str) -> bool:
    """Whether a turn begins after the answer's first words. A label at its very start ("Antwort: ...") does not count.

    German labels occur in good answers too: a letter's "Patientin:", "**Antwort:** B" at the end, an anamnesis as a list of
    "Frage:". So a user's label counts if an assistant's comes next, or if it is the only label and begins the last line: a
    user's turn ends with the token that ends answers."""
    answer = END.sub("", answer)
    behind = lambda match: bool(answer[: match.start()].strip())  # noqa: E731
    if any(map(behind, TURN.finditer(answer))):
        return True
    roles = [match for match in ROLE.finditer(answer) if behind(match)]
    if len(roles) == 1:
        return roles[0][1] is not None and "\n" not in answer[roles[0].end() :].strip()
    return any(user[1] and not then[1] for user, then in pairwise(roles))


def echoes(words: list[str], prompt: list[str]) -> bool:
    """Whether the prompt contains the answer's first ECHO_WORDS words (of a shorter prompt: as many as it has, at least 5)."""
    n = min(ECHO_WORDS, len(prompt))
    if n < 5 or len(words) < n:
        return False
    return any(prompt[i : i + n] == words[:n] for i in range(len(prompt) - n + 1))
