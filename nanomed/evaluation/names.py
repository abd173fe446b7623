"""English words that are no language mixing: what an abbreviation stands for, and cited titles and names.

An expansion is found by its initials: in "SIRS (systemic inflammatory response syndrome)" every word gives its first letter,
longer words may give further letters (gastroesophageal reflux disease: GERD), and small words may be left out. An
abbreviation of two letters must stand beside its expansion, a longer one anywhere in the text. A title is a run of
capitalised words with a word such as Journal, Society or Scale in it, or behind a word such as "Studie"; and a whole line
that is a bibliographic reference.
"""

import re

from nanomed.evaluation.words import word_list

ABBREVIATION = re.compile(r"(?<!\w)(?=[a-z0-9]*[A-ZÄÖÜ][a-z0-9]*[A-ZÄÖÜ])([A-Za-zÄÖÜ][A-Za-z0-9ÄÖÜ]{1,9}?)s?(?!\w)")
PART = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")  # of a word with hyphens
LABEL = r"(?:(?:von|aus dem|auf|im)\s+)?(?:engl\.|engl\b|englisch\b|[Ee]nglischen?\b)\s*(?:für)?:?\s*"
LABELLED = re.compile(rf"([(,;–]\s*{LABEL})[^(),;.\n]{{2,90}}")  # (engl. heart failure)
BESIDE = re.compile(  # between an abbreviation and its expansion
    rf"[\s(\[,:=–\-*_„“\"]*(?:steht für|bedeutet|heißt|bezeichnet)?\s*(?:{LABEL})?[\s:*_„“\"]*"
)
SMALL = frozenset("a an and at by for from in of on or the to with und oder".split())  # left out by abbreviations, small in titles
MOST = 50  # abbreviations of a text that are looked at
FARTHEST = 40  # characters between an abbreviation and an expansion beside it
LONG_WORD = 8  # letters of a word that may give more letters than its first
CONNECTED = re.compile(r"[\s\-/*_]{1,3}|,\s")
YEAR = r"(?:19|20)\d\d"
# From the start of the line to year;volume:pages, a DOI or a PMID; authors, year in brackets and title; authors and year.
REFERENCE = re.compile(
    rf"^[^\n]*?(?:\b{YEAR}\s?;\s?\d+\S*|\bdoi\s?:\s*\S+|\bdoi\.org/\S+|\bPMID\s?:?\s*\d+)"
    rf"|^[\s\-*•\d.\[\]]*[A-ZÄÖÜ][\w’'-]+(?:,? [A-Z]{{1,3}}\b| et al\.| (?:&|and|und) [A-ZÄÖÜ])"
    rf"[^\n]{{0,60}}?\({YEAR}\)[.:,] [^.\n]+\."
    rf"|^[\s\-*•\d.\[\]]*[A-ZÄÖÜ][\w’'-]+,? [A-Z]{{1,3}}\b[.,][^\n]*\b{YEAR}\b",
    re.MULTILINE,
)
CAPITAL = r"[A-ZÄÖÜ][\w’'&-]*"
TITLE = re.compile(
    rf"\b{CAPITAL}(?:[ \u00a0]{CAPITAL}|(?:[ \u00a0](?:{'|'.join(SMALL)}))+[ \u00a0]{CAPITAL}|,[ ]{CAPITAL}(?=[^.\n]*\band\b))+"
)
CUE = re.compile(  # what is named by the words behind it
    r"\b(?:Studie|Artikel|Arbeit|Originalarbeit|Publikation|Buch|Lehrbuch|Handbuch|Werk|Leitlinien?|Zeitschrift|Fachzeitschrift"
    r"|Fachblatt|Übersicht(?:sarbeit)?|Titel|Bericht|Programm|Register|Fragebogen|Skala|Fachgesellschaft|Gesellschaft|Behörde"
    r"|Kriterien|Klassifikation|Initiative|Kampagne|Stiftung|Institut)(?:en|s|n|es)?"
    r"(?:\s+(?:der|des|von|mit dem Titel))?\s*:?\s*[*_]{0,2}$"
)
ITALIC = re.compile(r"(?<![*_\w])([*_])(?=[A-Z])[^*_\n]{8,200}\1(?![*_\w])")  # a title in Markdown


def without_names(text: str) -> str:
    """The text without expansions of abbreviations, references, cited titles and names."""
    text = REFERENCE.sub(" ", text)
    text = ITALIC.sub(lambda match: " " if len(match[0].split()) > 2 else match[0], text)
    text = LABELLED.sub(r"\1", without_expansions(text))
    return TITLE.sub(lambda match: " " if _is_title(match[0], text[: match.start()]) else match[0], text)


def without_expansions(text: str) -> str:
    """The text without the words that its abbreviations stand for."""
    places: dict[str, list[tuple[int, int]]] = {}  # letters of an abbreviation → where it stands
    for match in ABBREVIATION.finditer(text):
        letters = "".join(filter(str.isalpha, match[1])).lower()
        if len(letters) > 1 and (letters in places or len(places) < MOST):
            places.setdefault(letters, []).append(match.span())
    parts = list(PART.finditer(text)) if places else []
    spans = set()
    for letters, found in places.items():
        is_doubtful = len(letters) == 2 or letters in word_list("german_function_words")  # IST, in capitals for emphasis
        for first, part in enumerate(parts):
            last = _last_part(letters, parts, first, text) if part[0][0].lower() == letters[0] else None
            if last is None or last == first:
                continue
            span = part.start(), parts[last].end()
            if not is_doubtful or any(_is_beside(text, place, span) for place in found):
                spans.add((span[0], _end_in_bracket(text, span[1])))
    kept, position = [], 0
    for start, end in sorted(spans):  # spans may overlap
        kept.append(text[position:start])
        position = max(position, end)
    return " ".join([*kept, text[position:]])


def _last_part(letters: str, parts: list[re.Match], first: int, text: str) -> int | None:
    """The index of the part with which the parts from `first` on have spelled all letters; None if they do not."""
    last, spelled = None, {0}  # spelled: numbers of letters that the parts so far may have spelled
    for at in range(first, min(len(parts), first + 2 * len(letters) + 2)):
        word, capitals = parts[at][0].lower(), parts[at][0].isupper()
        if at > first and not CONNECTED.fullmatch(text, parts[at - 1].end(), parts[at].start()):
            break
        further = set(spelled) if at > first and word in SMALL else set()
        for n_letters in spelled:
            place = 0 if word[0] == letters[n_letters] else -1
            while place >= 0:
                n_letters += 1
                further.add(n_letters)
                more = n_letters < len(letters) and (len(word) >= LONG_WORD or capitals)
                place = word.find(letters[n_letters], place + 1) if more else -1
        if len(letters) in further:
            last = at  # a later part may end them too: the P of PEEP is in end-expiratory and begins pressure
        spelled = further - {len(letters)}
    return last


def _is_beside(text: str, abbreviation: tuple[int, int], expansion: tuple[int, int]) -> bool:
    """Whether only a bracket, a colon or the like stands between the two."""
    (_, end), (start, _) = sorted((abbreviation, expansion))
    return end <= start <= end + FARTHEST and BESIDE.fullmatch(text, end, start) is not None


def _end_in_bracket(text: str, end: int) -> int:
    """The end of an expansion that goes on in capitals up to the bracket's end: International Classification of Functioning,
    Disability and Health (ICF)."""
    rest = re.compile(rf"(?:,? (?:(?:{'|'.join(SMALL)}) )*{CAPITAL})*(?=\s*[)(])").match(text, end)
    return rest.end() if rest else end


def _is_title(run: str, before: str) -> bool:
    """Whether a run of capitalised words is a title or a name."""
    words = re.findall(r"[\w’'&-]+", run)
    while words and words[0].lower() in word_list("german_function_words"):
        words.pop(0)
    capitals = [word for word in words if word not in SMALL]
    if len(capitals) < 2:
        return False
    if word_list("english_title_words") & set(capitals) or CUE.search(before[-60:]):
        return True
    return any(CUE.fullmatch(word) for word in words[:-2])  # a German noun is capitalised too: Die Studie Effects of Aspirin
