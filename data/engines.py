"""Engines: texts to token ids, by gigatoken or by `tokenizers`, and the same ids from both.

`tokenizers` is the reference. gigatoken is about ten times as fast on byte-level BPE, but young, so four guards stand
between it and the bins:

1. It refuses what it does not know (Unigram, WordPiece): then the reference encodes.
2. Before anything is written, the first documents of this very input, and text that spells every added token, are
   compared with the reference.
3. So is a document of every later batch; a difference ends the run and names the row.
4. Characters younger than Unicode 14 (this Python's tables say which) are classified differently by the two engines,
   whose tables differ in age. The few documents that hold one are encoded by the reference.

Neither takes text that spells a special token for that token: `tokenizers` has a switch, gigatoken gets a
tokenizer.json without them.

Costs: guards 3 and 4 take about a tenth of gigatoken's time. gigatoken 0.10 caches every word it has seen and evicts
none, so a new one is made whenever the process has grown by MAX_GROWTH.
"""

import contextlib
import functools
import json
import re
import sys
import unicodedata
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, Tokenizer

from nanomed import InputError, first_line

Encode = Callable[[list[str]], list[np.ndarray]]  # texts → uint32 ids of each, without BOS and separator
MAX_GROWTH = 128 << 20  # bytes of memory
FIRST_DOCS, LATER_DOCS, PROBE_CHARS = 32, 1, 5_000  # compared per batch, and their greatest length


class Unproven(Exception):
    """gigatoken must not encode this input; the message says why."""


def engine_version(name: str) -> str:
    """What goes into a shard's record, "gigatoken 0.10.0" say; Unproven where gigatoken is missing."""
    if name == "gigatoken" and find_spec(name) is None:
        raise Unproven("it is not installed; pip install -e '.[fast]' is about ten times as fast")
    return f"{name} {version(name)}"


@functools.lru_cache(maxsize=1)
def load_tokenizer(path: Path) -> Tokenizer:
    """The Tokenizer of a tokenizer.json, one for the process since loading takes a second; InputError if refused."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # it raises bare Exception
        raise InputError(f"{path}: refused by tokenizers {tokenizers.__version__}: {error}") from None


def reference_engine(path: Path, protected: tuple[int | None, ...]) -> Encode:
    """`tokenizers`, special tokens and the ids `protected` taken as the ordinary characters they are spelled with.

    It sets the switches of `load_tokenizer`'s object, which others may share: they change no id of ordinary text.
    """
    tokenizer = load_tokenizer(path)
    added = tokenizer.get_added_tokens_decoder()
    to_protect = [added[i] for i in protected if i in added and not added[i].special]
    if to_protect:  # that does change ids: an object of our own
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.add_special_tokens([AddedToken(t.content, special=True, normalized=t.normalized) for t in to_protect])
    # As saved, truncation would cut documents silently, and dropout would make other bins each time.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if hasattr(tokenizer.model, "dropout"):
        tokenizer.model.dropout = None
    tokenizer.encode_special_tokens = True  # "do encode their spelling"
    return lambda texts: [np.array(code.ids, np.uint32) for code in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def fast_engine(path: Path, protected: tuple[int | None, ...], reference: Callable[[], Encode]) -> Encode:
    """gigatoken, with the reference for documents of young characters; Unproven where it refuses the tokenizer."""
    source = without_special(path.read_text("utf-8"), protected)
    tokenizer, limit = load_gigatoken(source), resident_bytes() + MAX_GROWTH

    def encode(texts: list[str]) -> list[np.ndarray]:
        nonlocal tokenizer, limit
        if resident_bytes() > limit:
            tokenizer = None  # freed before the next one is made
            load_gigatoken.cache_clear()
            tokenizer, limit = load_gigatoken(source), max(limit, resident_bytes() + MAX_GROWTH // 2)
        ids = [tokenizer.encode(text) for text in texts]
        for i in young(texts):
            [ids[i]] = reference()([texts[i]])
        return ids

    return encode


@functools.lru_cache(maxsize=1)  # so that `warm_up` is of use
def load_gigatoken(source: str):
    """gigatoken's Tokenizer from the text of a tokenizer.json; Unproven where it is missing or refuses it."""
    engine_version("gigatoken")
    import gigatoken

    try:
        return gigatoken.Tokenizer.from_json(source)
    except Exception as error:  # whatever its Rust side raises
        raise Unproven(f"it refuses the tokenizer: {first_line(error)}") from None


def warm_up(path: Path) -> None:
    """Load in a worker what `fast_engine` will most likely need, while the first process still reads the tokenizer."""
    with contextlib.suppress(Unproven, OSError, ValueError):  # reported when it matters
        load_gigatoken(without_special(path.read_text("utf-8"), ()))


def added_tokens(source: str) -> tuple[list[dict], int, int]:
    """The added tokens in the text of a tokenizer.json, and where their list begins and ends; ([], 0, 0) if none.

    Only that list is parsed: the rest is megabytes of vocabulary.
    """
    key, place = '"added_tokens":', -1
    while (place := source.find(key, place + 1)) >= 0:
        start = re.compile(r"\s*").match(source, place + len(key)).end()
        tokens, end = json.JSONDecoder().raw_decode(source, start)
        if isinstance(tokens, list):  # and not the vocabulary's entry for a word that reads so
            return tokens, start, end
    return [], 0, 0


def without_special(source: str, protected: tuple[int | None, ...]) -> str:
    """The text of a tokenizer.json without special tokens and those whose ids are `protected`."""
    tokens, start, end = added_tokens(source)
    kept = [token for token in tokens if not (token["special"] or token["id"] in protected)]
    return f"{source[:start]}{json.dumps(kept)}{source[end:]}" if end else source


def probes(path: Path) -> list[str]:
    """Texts that spell every added token of tokenizer.json, special or not, for the comparison."""
    names = [token["content"] for token in added_tokens(path.read_text("utf-8"))[0]]
    return [f"a{name}b {name} {name}\n{name}{name} Ende" for name in names]


def young(texts: list[str]) -> list[int]:
    """Which of the texts hold a character that Unicode 14 does not know."""
    units = np.frombuffer("".join(texts).encode("utf-16-le"), "<u2")
    if not _suspects()[units[units >= 0x800]].any():  # below, Unicode 14 to 17 are the same
        return []
    is_young = lambda char: char >= "\u0800" and unicodedata.category(char) == "Cn"  # noqa: E731
    return [i for i, text in enumerate(texts) if any(map(is_young, set(text)))]


@functools.cache
def _suspects() -> np.ndarray:
    """bool (65536,): UTF-16 units that are unassigned, or half of a character beyond them (such as an emoji)."""
    return np.array([unicodedata.category(chr(code)) in ("Cn", "Cs") for code in range(1 << 16)])


def resident_bytes() -> int:
    """Memory of this process; 0 where there is no /proc (macOS): there gigatoken's memory is not bounded."""
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
