"""German noun phrases that decline themselves: what lets one table cell fit into every sentence of a template.

A cell writes a phrase once, in a small notation, and a template asks for the form it needs:

    cell       "ein~ trocken~ Husten:m + Fieber:n"     ~ takes an ending; the letter after the colon is the gender
    template   "Typisch {symptom:ist|sind} {symptom:nom}."       Typisch sind ein trockener Husten und Fieber.
               "Man erkennt sie an {symptom:dat}."               Man erkennt sie an einem trockenen Husten und Fieber.

`d~`, `ein~` and `dies~` are the articles. `Infarkt|s:m` carries a suffix: the genitive of m and n (des Infarkts), the
dative of p (`Gelenke|n:p`, den Gelenken), every case but the nominative of a weak noun (`Elefant|en:m`, dem Elefanten).
Genders are m, f, n and p for the plural; ` + ` joins parts that decline each for itself. The specs a template may use
are in `Phrase.__format__`.

Why not a language model or a grammar library: endings of German noun phrases are three small tables, and with them
every sentence of the corpus is right by construction.
"""

import re
from dataclasses import dataclass
from functools import cache

CASES = ("nom", "acc", "dat", "gen")
# One row per case, in the order m f n p.
DEFINITE = {"nom": "der die das die", "acc": "den die das die", "dat": "dem der dem den", "gen": "des der des der"}
INDEFINITE = {
    "nom": "ein eine ein -",
    "acc": "einen eine ein -",
    "dat": "einem einer einem -",
    "gen": "eines einer eines -",
}
DEMONSTRATIVE = {"nom": "er e es e", "acc": "en e es e", "dat": "em er em en", "gen": "es er es er"}  # dies~
WEAK = {"nom": "e e e en", "acc": "en e e en", "dat": "en en en en", "gen": "en en en en"}  # after der, dieser
MIXED = {"nom": "er e es e", "acc": "en e es e", "dat": "en en en en", "gen": "en en en en"}  # after ein, eine
STRONG = {"nom": "er e es e", "acc": "en e es e", "dat": "em er em en", "gen": "en er en er"}  # without an article
PRONOUNS = {"m": "er", "f": "sie", "n": "es", "p": "sie"}

SPECS = {  # the spec a template writes -> (case, article)
    **{case: (case, None) for case in CASES},
    **dict(zip(("der", "den", "dem", "des"), ((case, "d~") for case in CASES), strict=True)),
    **dict(zip(("ein", "einen", "einem", "eines"), ((case, "ein~") for case in CASES), strict=True)),
}
CONTRACTIONS = {"in dem": "im", "an dem": "am", "von dem": "vom", "bei dem": "beim", "zu dem": "zum", "zu der": "zur"}
CONTRACTION = re.compile(r"\b(?:" + "|".join(CONTRACTIONS) + r")\b", re.IGNORECASE)


def ending(table: dict[str, str], case: str, gender: str) -> str:
    """The entry of a declension table for a case and a gender (m, f, n) or plural (p)."""
    return table[case].split()["mfnp".index(gender)]


@dataclass(frozen=True)
class Part:
    """One noun with what stands around it: `ein~ trocken~ Husten`, and its gender."""

    words: str
    gender: str

    @cache  # noqa: B019  (parts are few, and each form is asked for a hundred times)
    def declined(self, case: str, article: str | None = None) -> str:
        """The words in a case; `article` (`d~`, `ein~`) replaces the one that is written, but never `dies~`."""
        words = self.words.split()
        if article is not None and words[0] != "dies~":
            words = [article, *words[words[0] in ("d~", "ein~") :]]
        if words[0] == "ein~" and self.gender == "p":  # German has no plural of ein
            words = words[1:]
        endings = {"d~": WEAK, "dies~": WEAK, "ein~": MIXED}.get(words[0], STRONG)
        return " ".join(self._word(word, case, endings) for word in words)

    def _word(self, word: str, case: str, endings: dict[str, str]) -> str:
        if word == "d~":
            return ending(DEFINITE, case, self.gender)
        if word == "ein~":
            return ending(INDEFINITE, case, self.gender)
        if "~" in word:
            return word.replace("~", ending(DEMONSTRATIVE if word == "dies~" else endings, case, self.gender))
        stem, bar, suffix = word.partition("|")
        comma = "," * suffix.endswith(",")
        return stem + self._suffix(suffix.rstrip(","), case) + comma if bar else word

    def _suffix(self, suffix: str, case: str) -> str:
        if self.gender == "m" and suffix in ("n", "en"):  # weak noun: der Elefant, den Elefanten
            return "" if case == "nom" else suffix
        if suffix == "ens":  # das Herz, dem Herzen, des Herzens
            return {"dat": "en", "gen": "ens"}.get(case, "")
        return suffix if case == ("dat" if self.gender == "p" else "gen") else ""


class Phrase:
    """A table cell: one or more parts joined by commas and `und`. See the module's docstring for the notation."""

    def __init__(self, cell: str):
        """Parse `cell`; a ValueError says what is wrong with it."""
        parts = [re.fullmatch(r"(\S+(?: \S+)*):([mfnp])", part) for part in cell.split(" + ")]
        if not all(parts):
            raise ValueError(f"{cell!r} is not a phrase: expected words:g with g one of m f n p, parts joined by ' + '")
        self.cell = cell
        self.parts = [Part(*part.groups()) for part in parts]

    @property
    def plural(self) -> bool:
        """Whether a verb whose subject this is stands in the plural."""
        return len(self.parts) > 1 or self.parts[0].gender == "p"

    @property
    def pronoun(self) -> str:
        """The pronoun that takes the phrase up again: er, sie or es."""
        return "sie" if self.plural else PRONOUNS[self.parts[0].gender]

    def declined(self, case: str = "nom", article: str | None = None) -> str:
        """The phrase in a case: nom, acc, dat or gen; `article` as in `Part.declined`."""
        *head, last = [part.declined(case, article) for part in self.parts]
        return f"{', '.join(head)} und {last}" if head else last

    def __format__(self, spec: str) -> str:
        """`nom acc dat gen` as written; `der den dem des` and `ein einen einem eines` with that article.

        A capital (`Der`) capitalises the result; `ist|sind` is no form of the phrase but the verb that agrees with it.
        """
        if "|" in spec:
            singular, _, plural = spec.partition("|")
            return plural if self.plural else singular
        case, article = SPECS[spec.lower() or "nom"]
        text = self.declined(case, article)
        return text[0].upper() + text[1:] if spec[:1].isupper() else text

    def __str__(self) -> str:
        return self.declined()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Phrase) and self.cell == other.cell

    def __hash__(self) -> int:
        return hash(self.cell)


def contract(text: str) -> str:
    """Melt preposition and article: `in dem Herzen` becomes `im Herzen`. Relative clauses say welchem instead."""

    def melt(match: re.Match) -> str:
        found = match[0]
        melted = CONTRACTIONS[found.lower()]
        return melted.capitalize() if found[0].isupper() else melted

    return CONTRACTION.sub(melt, text)
