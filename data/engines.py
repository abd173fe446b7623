"""Engines: texts to token ids, by gigatoken or by `tokenizers`, and the same ids from both.

`tokenizers` is the reference. gigatoken is about ten times as fast on byte-level BPE, but young, so it is used only
where it earns it, and four guards stand between it and the bins:

1. It refuses what it does not know (Unigram, WordPiece): then the reference encodes.
2. `prove` compares both on documents of this very input and on text that spells every added token, before it starts.
3. A document of every batch is encoded by both; a difference ends the run and names the row.
4. Characters younger than Unicode 14 (this Python's tables say which) are in other classes for the two engines, whose
   tables are of different age. The few documents that hold one are encoded by the reference.

Neither takes text that spells a special token for that token: `tokenizers` has a switch, gigatoken gets a
tokenizer.json without them.

Costs: guards 3 and 4 take about a tenth of gigatoken's time. gigatoken 0.10 remembers every word it has seen and forgets
none, so a new one is made whenever the process has grown by MAX_GROWTH.
"""

import functools
import json
import sys
import unicodedata
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from nanomed import InputError

Encode = Callable[[list[str]], list[np.ndarray]]  # texts → uint32 ids of each, without BOS and separator
MAX_GROWTH = 100 << 20  # bytes of memory
SAMPLE_DOCS, SAMPLE_CHARS = 64, 20_000


def engine_version(name: str) -> str:
    """What goes into a shard's record, "gigatoken 0.10.0" say."""
    return f"{name} {version(name)}"


def load_spec(path: Path, protected: tuple[int | None, ...] = ()) -> dict:
    """tokenizer.json without what must not touch a corpus; the ids `protected` count as special.

    As saved, truncation would cut documents silently, and dropout would make other bins each time.
    """
    spec = json.loads(path.read_text("utf-8"))
    spec["truncation"] = spec["padding"] = None
    if "dropout" in spec["model"]:
        spec["model"]["dropout"] = None
    for token in spec.get("added_tokens") or []:
        token["special"] = token["special"] or token["id"] in protected
    return spec


def reference_engine(spec: dict) -> Encode:
    """`tokenizers`, special tokens taken as the ordinary characters they are spelled with."""
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.encode_special_tokens = True  # "do encode their spelling"
    return lambda texts: [
        np.array(code.ids, np.uint32) for code in tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ]


def fast_engine(spec: dict, reference: Encode) -> Encode:
    """gigatoken, with the reference for documents of young characters; ValueError where it refuses the tokenizer."""
    import gigatoken

    plain = spec | {"added_tokens": [token for token in spec.get("added_tokens") or [] if not token["special"]]}
    source = json.dumps(plain)
    tokenizer = gigatoken.Tokenizer.from_json(source)
    limit = resident_bytes() + MAX_GROWTH

    def encode(texts: list[str]) -> list[np.ndarray]:
        nonlocal tokenizer, limit
        if resident_bytes() > limit:
            tokenizer = None  # before the next one is made
            tokenizer = gigatoken.Tokenizer.from_json(source)
            limit = resident_bytes() + MAX_GROWTH
        ids = [tokenizer.encode(text) for text in texts]
        for i in young(texts):
            [ids[i]] = reference([texts[i]])
        return ids

    return encode


def young(texts: list[str]) -> list[int]:
    """Which of the texts hold a character that Unicode 14 does not know."""
    codes = np.frombuffer("".join(texts).encode("utf-16-le"), "<u2")
    if not _suspects()[codes].any():
        return []
    return [i for i, text in enumerate(texts) if any(unicodedata.category(char) == "Cn" for char in set(text))]


@functools.cache
def _suspects() -> np.ndarray:
    """bool (65536,): UTF-16 units that are unassigned, or half of a character beyond them (an emoji, say)."""
    return np.array([unicodedata.category(chr(code)) in ("Cn", "Cs") for code in range(1 << 16)])


def resident_bytes() -> int:
    """Memory of this process; 0 where there is no /proc (macOS): there gigatoken's memory is not bounded."""
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def disagreement(encode: Encode, reference: Encode, texts: list[str]) -> int | None:
    """Index of the first text that two engines encode differently, or None."""
    pairs = zip(encode(texts), reference(texts), strict=True)
    return next((i for i, (ids, expected) in enumerate(pairs) if not np.array_equal(ids, expected)), None)


def prove(spec: dict, texts: list[str]) -> str | None:
    """Why gigatoken must not encode this input with this tokenizer; None if it may.

    texts: documents of the input. They and text with every added token are compared with the reference.
    """
    if find_spec("gigatoken") is None:
        return "not installed: pip install -e '.[fast]' is about ten times as fast"
    reference = reference_engine(spec)
    try:
        encode = fast_engine(spec, reference)
    except Exception as error:  # it raises whatever its Rust side raises
        return f"it refuses this tokenizer: {(str(error) or type(error).__name__).splitlines()[0]}"
    tokens = [token["content"] for token in spec.get("added_tokens") or []]
    probes = [f"a{token}b {token} {token}\n{token}{token} Ende" for token in tokens]
    texts = [text[:SAMPLE_CHARS] for text in texts[:SAMPLE_DOCS]] + probes
    index = disagreement(encode, reference, texts)
    return None if index is None else f"other ids than tokenizers for {texts[index][:60]!r}"


def choose_engine(engine: str, spec: dict, texts: list[str]) -> tuple[str, str]:
    """The engine to use, and why not the fast one ("" if it is used).

    engine: "auto" takes gigatoken where `prove` finds nothing against it; "gigatoken" insists on it (InputError if
    there is something against it); "tokenizers".
    """
    if engine == "tokenizers":
        return engine, ""
    reason = prove(spec, texts)
    if reason and engine == "gigatoken":
        raise InputError(f"--engine gigatoken: {reason}; use --engine auto")
    return ("tokenizers", f"gigatoken is not used, {reason}") if reason else ("gigatoken", "")
