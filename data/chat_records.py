"""Chat records: the canonical form of a conversation, so that a record is the same whatever file it comes from.

JSON and Arrow write one record in different ways. Arrow gives every struct of a column the union of the keys,
with null where a record has no such key; it has one order of the keys for all records; and beside a fraction
it turns whole numbers into floats. So keys that are null are dropped, keys are sorted (KEY_ORDER first, then
by the alphabet), and floats without a fraction become integers. Datasets write tool calls in several ways,
too: they become what transformers' templates expect, `{"type": "function", "function": {"name": ...,
"arguments": {...}}}`, the arguments as an object.

What no template could be given is refused with a ValueError that names the place in the record.
"""

import json
import unicodedata
from dataclasses import dataclass

# As in OpenAI's and transformers' own examples, since templates write tools and calls as JSON in this order.
KEY_ORDER = ("id", "type", "function", "name", "description", "parameters", "arguments", "properties", "required")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # transformers takes them as one
TEXT_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")  # what the messages say
NOT_JSON = "\ufdd3"  # a noncharacter that reading.py puts before the type of a Parquet value that JSON has no form for
TOOLS, SETTINGS = "tools", "chat_template_kwargs"  # keys of a record, beside its messages
REFUSED = ("functions", "function_call", "documents", "system", "system_prompt", "image", "images", "audio", "audios",
           "video", "videos")  # fmt: skip
RENDER_ARGUMENTS = ("messages", "conversations", "tools", "documents", "chat_template", "add_generation_prompt",
                    "continue_final_message", "return_assistant_tokens_mask")  # fmt: skip


@dataclass(frozen=True)
class Conversation:
    """A chat record in its canonical form: what is rendered."""

    messages: list[dict]
    tools: list[dict] | None
    settings: dict  # of the template, from the record's chat_template_kwargs

    def text(self) -> str:
        """The messages as JSON, in NFC: equal for equal conversations, whatever else the record holds."""
        messages = [{key: message[key] for key in message if key in TEXT_KEYS} for message in self.messages]
        spelled = unicodedata.normalize("NFC", json.dumps(messages, ensure_ascii=False))
        return json.dumps(json.loads(spelled), sort_keys=True)


def columns_of(key: str) -> tuple[str, ...]:
    """The keys of a record that matter, where `key` holds the messages."""
    return (key, TOOLS, SETTINGS, *REFUSED)


def read_conversation(record: dict, key: str) -> Conversation:
    """The conversation in a record, with its messages under `key`. ValueError: what is wrong, and where."""
    for name in REFUSED:
        if record.get(name):
            raise ValueError(f"{name!r} beside the messages would not be trained; move it into the messages, or remove it")
    messages = [read_message(message, f"message {number}") for number, message in enumerate(record[key], 1)]
    roles = [message["role"] for message in messages]
    if messages and "assistant" not in roles:
        found = ", ".join(map(repr, dict.fromkeys(roles)))
        raise ValueError(f"no turn of the assistant, only of {found}; expected a message with the role 'assistant'")
    tools = decode(record.get(TOOLS), TOOLS) or None
    if tools is not None:
        if not isinstance(tools, list):
            raise ValueError(f"{TOOLS!r} is of type {type(tools).__name__}, expected a list of objects")
        tools = [read_object(tool, f"tool {number}") for number, tool in enumerate(tools, 1)]
    settings = read_object(record.get(SETTINGS) or {}, SETTINGS)
    if reserved := [name for name in settings if name in RENDER_ARGUMENTS]:
        raise ValueError(f"{SETTINGS!r} sets {reserved[0]!r}, which is not the template's; remove it")
    return Conversation(messages, tools, settings)


def read_message(message: object, where: str) -> dict:
    """A message in its canonical form: a role, a text, and what else it holds."""
    if not isinstance(message, dict):
        raise ValueError(f"{where} is of type {type(message).__name__}, expected an object with role and content")
    message = canonical(message)
    role = message.get("role")
    if not isinstance(role, str) or not role.strip():
        hint = "; rename from to role, value to content, human to user, gpt to assistant" if "from" in message else ""
        raise ValueError(f"{where} has no role, it has {', '.join(map(repr, message)) or 'nothing'}{hint}")
    calls = decode(message.pop("tool_calls", None), f"{where}: tool_calls")
    if calls:
        if role != "assistant" or not isinstance(calls, list):
            raise ValueError(f"{where} ({role}): tool_calls must be a list, in a message of the assistant")
        message["tool_calls"] = [read_call(call, f"{where}, call {number}") for number, call in enumerate(calls, 1)]
    for name in REASONING_KEYS:
        if name in message:
            message.setdefault("reasoning_content", message.pop(name))
    content = message.get("content")
    if content is None or content == []:
        if not calls:
            raise ValueError(f"{where} ({role}) has no content; expected a string")
        content = ""  # of a turn that only calls tools
    return message | {"content": flatten(content, f"{where} ({role})")}


def flatten(content: object, where: str) -> str:
    """A content as one string: itself, or the texts of its parts one behind the other."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{where}: content is of type {type(content).__name__}, expected a string")
    texts = []
    for number, part in enumerate(content, 1):
        if isinstance(part, dict) and part.get("type", "text") == "text":
            part = part.get("text")
        if not isinstance(part, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"{where}: part {number} of the content is {kind!r}, expected text only")
        texts.append(part)
    return "".join(texts)


def read_call(call: object, where: str) -> dict:
    """A tool call in its canonical form, also where its name and arguments are not under `function`."""
    call = read_object(call, where)
    if "function" not in call:
        function = {key: value for key, value in call.items() if key not in ("id", "type")}
        call = {key: value for key, value in call.items() if key not in function} | {"function": function}
    function = call["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f"{where} names no function; expected {{'function': {{'name': ..., 'arguments': ...}}}}")
    arguments = read_object(function.get("arguments") or {}, f"{where}: arguments")
    return canonical({"type": "function"} | call | {"function": function | {"arguments": arguments}})


def read_object(value: object, where: str) -> dict:
    """An object, or the JSON of one, in its canonical form."""
    value = decode(value, where)
    if value is None:  # a blank string
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{where}: of type {type(value).__name__}, expected an object")
    return canonical(value)


def decode(value: object, where: str) -> object:
    """The value of a string that holds JSON; a value that is no string as it is. None for a blank string."""
    while isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            raise ValueError(f"{where}: a string that is not valid JSON ({reason}), expected JSON") from None
    return value


def canonical(value: object) -> object:
    """A JSON value without keys that are null, its keys in one order, whole numbers as integers."""
    if isinstance(value, dict):
        kept = {key: canonical(item) for key, item in value.items() if item is not None}
        return {key: kept[key] for key in sorted(kept, key=key_rank)}
    if isinstance(value, list):
        return [canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def key_rank(key: str) -> tuple[int, str]:
    """Where a key stands in its object."""
    return (KEY_ORDER.index(key) if key in KEY_ORDER else len(KEY_ORDER), key)
