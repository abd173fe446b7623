"""Prompts from files, and how a model wants to read them: through its own chat template.

Templates are rendered by transformers' own function, in jinja's sandbox: what it offers them (dates, tools as JSON) and
how it treats white space is what models were trained with. Importing it costs a second, so it is imported where it is used.
"""

from collections.abc import Callable
from pathlib import Path

from nanomed import InputError
from nanomed.files import read_json, read_jsonl
from nanomed.tokenizer import token_content, tokenizer_config


def read_prompts(path: Path) -> dict[str, list[dict]]:
    """id → messages, in the file's order: lines {"prompt": text} or {"messages": [...]}, the id else the line's number.

    InputError for a line without a prompt, or an id that comes twice.
    """
    prompts: dict[str, list[dict]] = {}
    for number, record in read_jsonl(path):
        messages = record.get("messages") or [{"role": "user", "content": record.get("prompt")}]
        if not is_conversation(messages) or not messages[-1]["content"].strip():
            raise InputError(f'{path}: line {number} is neither {{"prompt": text}} nor {{"messages": [...]}}')
        name = str(record.get("id", number))
        if name in prompts:
            raise InputError(f"{path}: line {number}: id {name!r} comes twice; answers are kept by id, so change one")
        prompts[name] = messages
    if not prompts:
        raise InputError(f"{path}: has no prompts")
    return prompts


def is_conversation(messages: object) -> bool:
    """Whether this is a list of {"role": text, "content": text} with something in it."""
    return bool(messages) and isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )  # fmt: skip


def chat_template(folder: Path) -> str:
    """The model's chat template; of several the default one. InputError where it has none."""
    file = folder / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.is_file() else tokenizer_config(folder).get("chat_template")
    if isinstance(template, list):  # [{"name": "default", "template": ...}, {"name": "tool_use", ...}]
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not isinstance(template, str) or not template:
        raise InputError(f"{folder}: has no chat template; give an instruct model, or one that was merged with one")
    return template


def template_renderer(folder: Path, **settings) -> Callable[[list[dict]], str]:
    """The function messages → text by the model's template, which may name the settings and the model's special tokens.

    It raises ValueError for messages that the template refuses. InputError where there is no template, or no transformers.
    """
    template, config = chat_template(folder), tokenizer_config(folder)
    try:
        from transformers.utils.chat_template_utils import render_jinja_template
    except ImportError:
        raise InputError("chat templates need transformers and jinja2: pip install transformers jinja2") from None
    names = {key: token_content(config, key) for key in config if key.endswith("_token")}
    settings |= {key: token for key, token in names.items() if isinstance(token, str)}

    def render(messages: list[dict]) -> str:
        try:
            [[text], _] = render_jinja_template([messages], chat_template=template, **settings)
        except Exception as error:  # jinja's own, and whatever a template's raise_exception says
            what = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"the chat template refuses it: {what}") from None
        return text

    return render


def render(folder: Path, messages: list[dict]) -> str:
    """The conversation up to where the assistant begins. A model that may think before it answers (Qwen3) is told not to."""
    try:
        return template_renderer(folder, add_generation_prompt=True, enable_thinking=False)(messages)
    except ValueError as error:
        raise InputError(f"{folder}: {error}") from None


def end_tokens(folder: Path) -> set[int]:
    """Ids that end an answer: eos_token_id of generation_config.json, else of config.json."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        found = read_json(path).get("eos_token_id") if path.exists() else None
        if found is not None:
            return set(found) if isinstance(found, list) else {found}
    return set()
