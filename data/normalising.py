"""Text normalisation for matching: texts that a reader would call the same give the same words.

Decontamination and exact deduplication share it. In this order: HTML entities are decoded, tags and reference marks
("[1]") removed; words that were hyphenated at line ends are joined; invisible characters (Unicode category Cf: soft
hyphens, zero-width spaces, ...) are removed; compatibility forms are unified (NFKD: ligatures, full-width letters); case
is folded; diacritics are removed; ä and ae become a, ö and oe become o, ü and ue become u, ß becomes ss. A word is a run
of letters and digits: punctuation, Markdown and underscores separate words. Distinct words may become equal (schon,
schön); runs of 8 of them hardly do.

Speed: most German text has only ASCII, umlauts and common punctuation, for which a few passes of C code suffice
(`_fast_words`); other text takes the general path (`_general_words`). Both give the same words where both apply.
"""

import functools
import html
import re
import unicodedata

_FILLERS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and symbols that are drawn as nothing

VERSION = 2  # of these rules: clean.py does not continue a run that was made with others

_ENTITY = re.compile(r"&#?\w")
# Tags inside a word, such as <b>, leave no gap; all others, such as <br> and </td>, separate words.
_INLINE_TAG = re.compile(r"</?(?:a|abbr|b|big|em|font|i|mark|s|small|span|strong|sub|sup|u|wbr)(?:\s[^<>]*)?/?>", re.I)
_TAG = re.compile(r"</?[a-z][a-z0-9]*(?:\s[^<>]*)?/?>", re.I)
_LINK_TARGET = re.compile(r"\]\([^()\s]*\)")  # of a Markdown link, which stands between the words of a sentence
_REFERENCE = re.compile(r"\[\d{1,3}(?:[,–-] ?\d{1,3})*\]")  # as on Wikipedia's pages

_AFTER = r"(?!(?:und|oder|bzw|sowie|bis)\b)"  # "Vor- und Nachteile"
_LINE_HYPHEN = re.compile(rf"-(?<=[^\W\d_]-)\s+{_AFTER}(?=[a-zäöüß])|-(?<=[A-ZÄÖÜ]-)[ \t]*\r?\n\s*(?=[A-ZÄÖÜ]{{2}})")
_SOFT_HYPHEN = re.compile("\u00ad\\s*")

_PUNCTUATION = "„“”‚‘’‹›«»–—−…•·°§€±×÷≤≥→©®†‡¬\xa0"  # has no letters in any compatibility form
_UNCOMMON = re.compile(f"[^\\x00-\\x7fäöüÄÖÜß{_PUNCTUATION}]")
_ASCII_WORDS = bytes(ord(chr(i).lower()) if chr(i).isalnum() and i < 128 else 32 for i in range(256))
_WORD = re.compile(r"[^\W_]+")


def words_of(text: str) -> list[str]:
    """The words of a text in the form in which they are compared."""
    text = _join_hyphenated(_remove_markup(text))
    return _general_words(text) if _UNCOMMON.search(text) else _fast_words(text)


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: only white space, control and invisible characters."""
    return not any(_is_visible(character) for character in text.lstrip())


@functools.cache
def _is_visible(character: str) -> bool:
    """Whether a character is drawn by itself."""
    invisible = character.isspace() or character in _FILLERS or unicodedata.category(character) in ("Cf", "Cc")
    return not invisible and not _is_ignored(character)


@functools.cache
def _is_ignored(character: str) -> bool:
    """Whether matching ignores a character: format characters, diacritics and variation selectors."""
    return unicodedata.category(character) in ("Cf", "Mn", "Me")


def _remove_markup(text: str) -> str:
    """The text with HTML entities decoded, and without HTML tags, targets of Markdown links and reference marks."""
    for _ in range(2):  # "&amp;auml;" was escaped twice
        if "&" in text and _ENTITY.search(text):
            text = html.unescape(text)
    if "<" in text:
        text = _TAG.sub("\n", _INLINE_TAG.sub("", text))
    if "](" in text:
        text = _LINK_TARGET.sub("]", text)
    return _REFERENCE.sub("", text)


def _join_hyphenated(text: str) -> str:
    """The text with words joined that a line end, or what an extraction made of it, has cut."""
    if "\u00ad" in text:
        text = _SOFT_HYPHEN.sub("", text)
    text = text.replace("\u2010", "-").replace("\u2011", "-")
    return _LINE_HYPHEN.sub("", text)


def _fast_words(text: str) -> list[str]:
    """`words_of` where `_UNCOMMON` finds nothing: after the umlauts only ASCII matters, and bytes are fast."""
    if not text.isascii():
        for pair, base in (("Ää", "a"), ("Öö", "o"), ("Üü", "u")):
            text = text.replace(pair[0], base).replace(pair[1], base)
        text = text.replace("ß", "ss")
    text = text.encode("ascii", "replace").translate(_ASCII_WORDS).decode("ascii")
    return _fold_digraphs(text).split()


def _general_words(text: str) -> list[str]:
    """`words_of` for any text."""
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    for character in filter(_is_ignored, set(text)):  # few, and `replace` is faster than a regular expression
        text = text.replace(character, "")
    return _WORD.findall(_fold_digraphs(text))


def _fold_digraphs(text: str) -> str:
    """Lower-case text with ae, oe, ue as a, o, u."""
    return text.replace("ae", "a").replace("oe", "o").replace("ue", "u")
