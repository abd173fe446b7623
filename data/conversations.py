"""Conversations: chat records → text by the tokenizer's own chat template, in which only the template's special tokens
are real.

A message that says "<|im_end|>" must not end a turn: in every string of a record, special tokens are broken by a mark
before the template is rendered. What the rendering then spells unbroken is the template's own; it is renamed to an
alias, a spelling that no message can contain, and the marks are removed. The ids are the tokenizer's with the special
tokens renamed likewise, so splitting, stripping and prefixes around them are its own, and for messages without special
tokens the ids are those of transformers' `apply_chat_template`.

The three characters of mark and alias are Unicode noncharacters, which no text may interchange: a record that contains
one is refused. Costs: 0.1 ms per record on top of the encoding (the template, in jinja's sandbox).
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from nanomed.prompts import template_renderer

MARK, OPEN, CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"
FORGED = np.iinfo(np.uint32).max  # no token's id
FORBIDDEN = re.compile(f"[{MARK}{OPEN}{CLOSE}]")


def renderer(folder: Path, spec: dict, protected: tuple[int | None, ...]) -> Callable[[list], tuple[str, str]]:
    """The function messages → (text with aliases, text as it reads). It raises ValueError for what it cannot render.

    folder: of the tokenizer, with its chat template; spec: tokenizer.json; protected: ids that count as special.
    """
    render_template = template_renderer(folder)
    alias = {token["content"]: alias for token, alias in aliases(spec, protected)}
    special = re.compile("|".join(re.escape(token) for token in sorted(alias, key=len, reverse=True)) or "(?!)")

    def render(messages: list) -> tuple[str, str]:
        text = render_template(map_strings(messages, lambda s: mark(s, special)))
        aliased = special.sub(lambda match: alias[match[0]], text)
        return aliased.replace(MARK, ""), text.replace(MARK, "")

    return render


def mark(string: str, special: re.Pattern) -> str:
    """The string with each special token broken by a mark behind its first character."""
    if found := FORBIDDEN.search(string):
        raise ValueError(f"it contains the noncharacter U+{ord(found[0]):04X}; remove it")
    # A lookahead, since tokens may overlap: breaking one would leave the other.
    string = re.sub(f"(?=(?:{special.pattern}))(.)", rf"\g<1>{MARK}", string, flags=re.DOTALL)
    if whole := special.search(string):
        raise ValueError(f"it contains {whole[0]!r}, a special token of one character, which cannot be broken; remove it")
    return string


def map_strings(value, function: Callable[[str], str]):
    """A JSON value with the function applied to each string in it, keys excepted."""
    if isinstance(value, dict):
        return {key: map_strings(item, function) for key, item in value.items()}
    if isinstance(value, list):
        return [map_strings(item, function) for item in value]
    return function(value) if isinstance(value, str) else value


def aliases(spec: dict, protected: tuple[int | None, ...]) -> list[tuple[dict, str]]:
    """The special tokens of tokenizer.json, each with its alias."""
    return [(token, f"{OPEN}{token['id']}{CLOSE}") for token in spec.get("added_tokens") or []
            if token["special"] or token["id"] in protected]  # fmt: skip


def conversation_engine(spec: dict, protected: tuple[int | None, ...]) -> Callable[[list[str]], list[np.ndarray]]:
    """The function texts with aliases → uint32 ids of each; FORGED where a text without alias gets a special id."""
    renamed = {token["id"]: {"content": alias, "special": True} for token, alias in aliases(spec, protected)}
    tokens = [token | renamed.get(token["id"], {}) for token in spec.get("added_tokens") or []]
    # The post-processor names tokens too, and is not used: the template says where BOS goes.
    changed = {"added_tokens": tokens, "post_processor": None, "truncation": None, "padding": None}
    if "dropout" in spec["model"]:
        changed["model"] = spec["model"] | {"dropout": None}
    tokenizer = Tokenizer.from_str(json.dumps(spec | changed))
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    original = np.arange(1 + max(vocabulary.values()), dtype=np.uint32)  # a new spelling may have got a new id
    for token in tokens:
        original[vocabulary[token["content"]]] = token["id"]
    ordinary = tokenizer.get_vocab(with_added_tokens=False)  # a word or a Unigram may be a special token
    original[[token["id"] for token, _ in aliases(spec, protected) if token["content"] in ordinary]] = FORGED
    encode = tokenizer.encode_batch_fast
    return lambda texts: [original[np.array(code.ids, np.uint32)] for code in encode(texts, add_special_tokens=False)]
