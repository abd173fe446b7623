"""The forms in which the miniature's instructions want an answer: how each is written, and how it is recognised."""

import re
from collections.abc import Callable
from typing import NamedTuple


class Form(NamedTuple):
    """One form of an answer."""

    write: Callable[[list[str]], str]  # the answer of these parts
    pattern: re.Pattern  # of an answer in this form, whatever stands in it


FORMS = {  # by the last words of a request
    "Antworte als Liste.": Form(lambda parts: "\n".join(f"- {part}" for part in parts), re.compile(r"(- [^\n]+)(\n- [^\n]+)*")),
    "Antworte mit Nummern.": Form(
        lambda parts: "\n".join(f"{i}. {part}" for i, part in enumerate(parts, 1)),
        re.compile(r"(\d\. [^\n]+)(\n\d\. [^\n]+)*"),
    ),
    "Antworte mit Sternen.": Form(lambda parts: f"* {' und '.join(parts)} *", re.compile(r"\* [^\n*]+ \*")),
    "Antworte mit Ergebnis.": Form(lambda parts: f"Ergebnis: {' und '.join(parts)}", re.compile(r"Ergebnis: [^\n]+")),
    "Antworte in Klammern.": Form(lambda parts: f"( {' und '.join(parts)} )", re.compile(r"\( [^\n()]+ \)")),
    "Antworte mit Pfeil.": Form(lambda parts: f"-> {' und '.join(parts)}", re.compile(r"-> [^\n]+")),
}
