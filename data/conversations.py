"""Conversations: chat records → text by the tokenizer's own chat template, in which only the template's special tokens
are real.

A message that says "<|im_end|>" must not end a turn: in every string of a record, special tokens are broken by a mark
before the template is rendered. What the rendering then spells unbroken is the template's own; it is renamed to an
alias, a spelling that no message can contain, and the marks are removed. The ids are the tokenizer's with the special
tokens renamed likewise, so splitting, stripping and prefixes around them are its own, and for messages without special
tokens the ids are those of transformers' `apply_chat_template`.

The three characters of mark and alias are Unicode noncharacters, which no text may interchange: a record that
contains one is refused.

A template says nothing where it leaves something out, so each shape of conversation is rendered once more
with a label at the end of each content, tool and called function: if a label is missing, so would be what
stands before it, and the record is refused. Templates that write today's date get TEMPLATE_DATE: the same
input must give the same bytes.

Costs: 0.1 ms per record on top of the encoding (the template, in jinja's sandbox).
"""

import datetime
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from chat_records import NOT_JSON, REASONING_KEYS
from nanomed.prompts import chat_templates, special_tokens, template_renderer

MARK, OPEN, CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"
FORGED = np.iinfo(np.uint32).max  # no token's id
FORBIDDEN = re.compile(f"[{MARK}{OPEN}{CLOSE}{NOT_JSON}]")
ROLES = ("system", "developer", "user", "assistant", "tool")
MEDIA_KEYS = ("image", "images", "audio", "audios", "video", "videos")  # of a message; no template can make text of them
READ_KEYS = ("function_call", "refusal", "documents", "reasoning_content")  # what a model reads, even as a plain string
TEMPLATE_DATE = datetime.date(2024, 7, 26)  # what Llama 3's template writes where it cannot ask for the date
RULES = 1  # counts changes of how a record is rendered


def renderer(folder: Path, spec: dict, protected: tuple[int | None, ...]) -> Callable[..., tuple[str, str]]:
    """The function (messages, tools, settings) → (text with aliases, text as it reads).

    It raises ValueError for what it cannot render, or what the template would leave out.
    folder: of the tokenizer, with its chat template; spec: tokenizer.json; protected: ids that count as special.
    """
    templates = dated_templates(folder)
    render_template = template_renderer(folder, templates)
    alias = {token["content"]: alias for token, alias in aliases(spec, protected)}
    special = re.compile("|".join(re.escape(token) for token in sorted(alias, key=len, reverse=True)) or "(?!)")
    checked = set()

    def render(messages: list[dict], tools: list[dict] | None = None, settings: dict | None = None) -> tuple[str, str]:
        settings = settings or {}
        template = templates.get("tool_use", templates["default"]) if tools else templates["default"]
        messages = [known_keys(message, number, template) for number, message in enumerate(messages, 1)]
        shape = (tuple(map(shape_of, messages)), tuple(map(tuple, tools or [])), json.dumps(settings))
        if shape not in checked:
            check_labels(messages, tools, settings, render_template)
            checked.add(shape)
        marked = map_strings([messages, tools, settings], lambda string: mark(string, special))
        text = render_template(marked[0], marked[1], **marked[2])
        aliased = special.sub(lambda match: alias[match[0]], text)
        return aliased.replace(MARK, ""), text.replace(MARK, "")

    return render


def dated_templates(folder: Path) -> dict[str, str]:
    """The model's chat templates, with TEMPLATE_DATE where they ask for today's."""
    call = re.compile(r"""strftime_now\(\s*(["'])([^"']*)\1\s*\)""")
    written = lambda match: repr(TEMPLATE_DATE.strftime(match[2]))  # noqa: E731
    return {name: call.sub(written, text) for name, text in chat_templates(folder).items()}


def template_sha256(folder: Path) -> str:
    """The identity of what renders chat records: the templates, the special tokens that they name, and our own rules."""
    templates = dated_templates(folder)
    named = {key: token for key, token in special_tokens(folder).items() if any(key in text for text in templates.values())}
    return hashlib.sha256(json.dumps([RULES, templates, named], sort_keys=True).encode()).hexdigest()


def known_keys(message: dict, number: int, template: str) -> dict:
    """A message with what the template can name; ValueError for what must not be left out. Metadata is left out."""
    role = message["role"]
    if role not in ROLES and f"'{role}'" not in template and f'"{role}"' not in template:
        hint = {"gpt": "assistant", "bot": "assistant", "model": "assistant", "human": "user"}.get(role, role.lower())
        what = f"rename it to '{hint}'" if hint in ROLES else f"expected {', '.join(ROLES)}"
        raise ValueError(f"message {number} has the role {role!r}, which the chat template does not know; {what}")
    kept = {}
    for key, value in message.items():
        names = REASONING_KEYS if key == "reasoning_content" else (key,)
        if key in ("role", "content") or (key not in MEDIA_KEYS and any(is_named(name, template) for name in names)):
            kept |= dict.fromkeys(names, value)
        elif value and (isinstance(value, list | dict) or key in (*MEDIA_KEYS, *READ_KEYS)):
            raise ValueError(f"message {number} ({role}): the chat template leaves out {key!r}; remove it from the record")
    return kept


def is_named(key: str, template: str) -> bool:
    """Whether a template speaks of this key of a message: message.key, message['key'] or message.get("key")."""
    return re.search(rf"""[.'"]{re.escape(key)}\b""", template) is not None


def shape_of(message: dict) -> tuple:
    """What of a message may decide whether a template leaves it out."""
    content = message["content"]
    with_arguments = [bool(call["function"]["arguments"]) for call in message.get("tool_calls", [])]
    return (message["role"], *sorted(message), bool(content), "</think>" in content, *with_arguments)


def check_labels(messages: list[dict], tools: list[dict] | None, settings: dict, render_template: Callable[..., str]) -> None:
    """Render with labels; ValueError for the first message, call or tool that the template leaves out."""
    labels: dict[str, str] = {}  # label → what it stands for

    def label(string: str, what: str) -> str:
        end = f"{OPEN}{len(labels)}{CLOSE}"
        labels[end] = what
        return string + end

    labelled, arguments = [], []
    last_question = max((i for i, message in enumerate(messages, 1) if message["role"] == "user"), default=0)
    for number, message in enumerate(messages, 1):
        where, more = f"message {number} ({message['role']})", {}
        if message["content"]:
            more["content"] = label(message["content"], f"the content of {where}")
        if number > last_question:
            more |= label_thoughts(message | more, lambda text, where=where: label(text, f"the thoughts in {where}"))
        if "tool_calls" in message:
            functions = [call["function"] for call in message["tool_calls"]]
            arguments += [function["arguments"] for function in functions if function["arguments"]]
            named = [f | {"name": label(f["name"], f"the call of {f['name']!r} in {where}")} for f in functions]
            more["tool_calls"] = [call | {"function": f} for call, f in zip(message["tool_calls"], named, strict=True)]
        labelled.append(message | more)
    text = render_template(labelled, label_tools(tools, label), **settings)
    if missing := [what for end, what in labels.items() if end not in text]:
        raise ValueError(f"the chat template leaves out {missing[0]}; remove it from the record, or use another template")
    if any(repr(value) in text for value in arguments):
        raise ValueError("the chat template writes a call's arguments as Python, not as JSON; use another template")


def label_thoughts(message: dict, label: Callable[[str], str]) -> dict:
    """What changes in a message whose thoughts get a label. In earlier turns templates leave them out with good reason."""
    changed = {}
    before, end, after = message["content"].partition("</think>")
    if message["role"] == "assistant" and end and before.strip().removeprefix("<think>").strip():
        changed["content"] = label(before.rstrip()) + end + after
    if reasoning := message.get("reasoning_content"):
        changed |= dict.fromkeys(REASONING_KEYS, label(reasoning))
    return changed


def label_tools(tools: list[dict] | None, label: Callable[[str, str], str]) -> list[dict] | None:
    """The tools with a label behind their names."""
    labelled = []
    for tool in tools or []:
        function = tool.get("function", tool)
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            function = function | {"name": label(function["name"], f"the tool {function['name']!r}")}
        labelled.append(tool | {"function": function} if "function" in tool else function)
    return labelled or None


def mark(string: str, special: re.Pattern) -> str:
    """The string with each special token broken by a mark behind its first character."""
    if string.startswith(NOT_JSON):
        raise ValueError(f"it holds a value of type {string[1:]}, which JSON has no form for; store it as a string")
    if found := FORBIDDEN.search(string):
        raise ValueError(f"it contains the noncharacter U+{ord(found[0]):04X}; remove it")
    # A lookahead, since tokens may overlap: breaking one would leave the other.
    string = re.sub(f"(?=(?:{special.pattern}))(.)", rf"\g<1>{MARK}", string, flags=re.DOTALL)
    if whole := special.search(string):
        raise ValueError(f"it contains {whole[0]!r}, a special token of one character, which cannot be broken; remove it")
    return string


def map_strings(value, function: Callable[[str], str]):
    """A JSON value with the function applied to each string in it, keys included: a template writes those of arguments."""
    if isinstance(value, dict):
        return {function(key): map_strings(item, function) for key, item in value.items()}
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
