"""Prompts from files, and their rendering by a model's own chat template.

Templates are rendered by transformers' own function, in jinja's sandbox: models were trained with its white space and with
what it offers templates (dates, tools as JSON). Importing it costs a second, so it is imported where it is used.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer

from nanomed import InputError, first_line
from nanomed.files import read_json, read_jsonl
from nanomed.model_files import TEMPLATES
from nanomed.tokenizer import token_content, tokenizer_config


def read_prompts(path: Path) -> dict[str, list[dict]]:
    """id → messages, in the file's order: lines {"prompt": text} or {"messages": [...]}; without an id, the line's number.

    InputError for a line without a prompt, messages that do not end with the user's (a template would show the model the
    answer), or a duplicate id.
    """
    prompts: dict[str, list[dict]] = {}
    for number, record in read_jsonl(path):
        messages = record.get("messages") or [{"role": "user", "content": record.get("prompt")}]
        if not is_conversation(messages) or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
            raise InputError(f'{path}: line {number} is neither {{"prompt": text}} nor {{"messages": [..., the user\'s]}}')
        name = str(record.get("id", number))
        if name in prompts:
            raise InputError(f"{path}: line {number}: duplicate id {name!r}; answers are kept by id, so change one")
        prompts[name] = messages
    if not prompts:
        raise InputError(f"{path}: has no prompts")
    return prompts


def fill(template: str, texts: dict[str, str]) -> str:
    """The template with {name} replaced by each text, and {nonce} by a number for the marks around them.

    The nonce is a hash of template and texts: the same for the same texts, so that a cache finds the answer, and unknown to
    whoever wrote one of the texts, which therefore cannot contain a mark. Inserted texts are not searched for fields.
    """
    parts = json.dumps([template, *sorted(texts.items())])
    values = texts | {"nonce": hashlib.sha256(parts.encode()).hexdigest()[:16]}
    fields = "|".join(map(re.escape, values))
    return re.sub(rf"\{{({fields})\}}", lambda match: values[match[1]], template)


def is_conversation(messages: object) -> bool:
    """Whether this is a non-empty list of {"role": text, "content": text}."""
    return bool(messages) and isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )  # fmt: skip


def chat_templates(folder: Path) -> dict[str, str]:
    """Name → text of the model's chat templates: "default", and "tool_use" where it has one. InputError if it has no default.

    Read as transformers reads them: files come before tokenizer_config.json, whose templates count only where there are no
    files; chat_template.json is a processor's, and not read.
    """
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / TEMPLATES).glob("*.jinja"))}
    found = {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()}
    if not found:
        template = tokenizer_config(folder).get("chat_template")
        if isinstance(template, list):  # [{"name": "default", "template": ...}, {"name": "tool_use", ...}]
            found = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        else:
            found = {"default": template}
    found = {name: text for name, text in found.items() if isinstance(name, str) and isinstance(text, str) and text}
    if "default" not in found:
        raise InputError(f"{folder}: has no chat template; give an instruct model, or a merge with one")
    return found


def chat_template(folder: Path) -> str:
    """The model's chat template, of several the default one. InputError if it has none."""
    return chat_templates(folder)["default"]


def special_tokens(folder: Path) -> dict[str, str]:
    """The model's special tokens by the names that its template knows them by: bos_token, eos_token, ..."""
    config = tokenizer_config(folder)
    names = {key: token_content(config, key) for key in config if key.endswith("_token")}
    return {key: token for key, token in names.items() if isinstance(token, str)}


def template_renderer(folder: Path, templates: dict[str, str] | None = None, **settings) -> Callable[..., str]:
    """The function (messages, tools=None, **more settings) → text by the model's template.

    The template may name the settings and the model's special tokens. With tools it is the model's template "tool_use", if
    it has one. templates: those of `chat_templates`, if they are to be changed. The function raises ValueError for
    messages that the template rejects. InputError if there is no template, or no transformers.
    """
    templates = templates or chat_templates(folder)
    try:
        from transformers.utils.chat_template_utils import render_jinja_template
    except ImportError:
        raise InputError("chat templates need transformers and jinja2: pip install transformers jinja2") from None
    settings |= special_tokens(folder)

    def render(messages: list[dict], tools: list[dict] | None = None, **more) -> str:
        template = templates.get("tool_use", templates["default"]) if tools else templates["default"]
        try:
            [[text], _] = render_jinja_template([messages], tools=tools, chat_template=template, **settings | more)
        except Exception as error:  # jinja's own, and whatever a template's raise_exception says
            raise ValueError(f"the chat template refuses it: {first_line(error)}") from None
        return text

    return render


def prompt_renderer(folder: Path) -> Callable[[list[dict]], str]:
    """template_renderer for a prompt: up to the assistant's turn, thinking (Qwen3) switched off."""
    return template_renderer(folder, add_generation_prompt=True, enable_thinking=False)


def render(folder: Path, messages: list[dict]) -> str:
    """One conversation by prompt_renderer; InputError if the template rejects it."""
    try:
        return prompt_renderer(folder)(messages)
    except ValueError as error:
        raise InputError(f"{folder}: {error}") from None


def end_tokens(folder: Path) -> set[int]:
    """Ids that end an answer: every eos_token_id of generation_config.json and config.json, and the tokenizer's eos_token.

    The three may differ: an instruct model's config.json often names the token that ends documents, and its tokenizer the one
    that ends turns.
    """
    ids: set[int | None] = set()
    for path in (folder / "generation_config.json", folder / "config.json"):
        found = read_json(path).get("eos_token_id") if path.is_file() else None
        ids |= set(found) if isinstance(found, list) else {found}
    token, file = token_content(tokenizer_config(folder), "eos_token"), folder / "tokenizer.json"
    if token and file.is_file():
        ids.add(Tokenizer.from_file(str(file)).token_to_id(token))
    return {i for i in ids if i is not None}
