"""What would not be trained, or not as it is written, is refused with its line."""

import pytest

from chats import ANSWER, ASK, BARE, TOOLS, calling, fixture_model, write  # noqa: F401
from nanomed import InputError
from prepare import prepare

REFUSED = {
    "ShareGPT's keys": ({"messages": [{"from": "human", "value": "a"}]}, "message 1 has no role, it has 'from', 'value'; rename"),
    "ShareGPT's roles": ({"messages": [ASK, {"role": "gpt", "content": "a"}]}, "no turn of the assistant, only of 'user', 'gpt'"),
    "unknown role": ({"messages": [ANSWER, {"role": "gpt", "content": "a"}]},
                     "message 2 has the role 'gpt'.*rename it to 'assistant'"),
    "known role, not to the template": ({"messages": [ANSWER, {"role": "developer", "content": "a"}]},
                                        r"leaves out the content of message 2 \(developer\)"),
    "capital": ({"messages": [ANSWER, {"role": "User", "content": "a"}]}, "rename it to 'user'"),
    "no assistant": ({"messages": [ASK]}, "no turn of the assistant"),
    "null content": ({"messages": [ASK, {"role": "assistant", "content": None}]}, r"message 2 \(assistant\) has no content"),
    "no content": ({"messages": [{"role": "user"}, ANSWER]}, r"message 1 \(user\) has no content"),
    "number": ({"messages": [{"role": "user", "content": 5}, ANSWER]}, "content is of type int, expected a string"),
    "object": ({"messages": [{"role": "user", "content": {"text": "a"}}, ANSWER]}, "content is of type dict"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER]},
              "part 1 of the content is 'image_url', expected text only"),
    "images": ({"messages": [ASK | {"images": ["x"]}, ANSWER]}, "leaves out 'images'"),
    "audio": ({"messages": [ASK, ANSWER | {"audio": {"id": "x"}}]}, "leaves out 'audio'"),
    "image column": ({"messages": [ASK, ANSWER], "images": ["x"]}, "'images' beside the messages would not be trained"),
    "system column": ({"messages": [ASK, ANSWER], "system": "Du bist."}, "'system' beside the messages"),
    "function_call": ({"messages": [ASK, ANSWER | {"function_call": {"name": "f"}}]}, "leaves out 'function_call'"),
    "unknown object": ({"messages": [ASK, ANSWER | {"thoughts": ["x"]}]}, "leaves out 'thoughts'"),
    "string no message": ({"messages": ["a"]}, "message 1 is of type str"),
    "arguments": ({"messages": [ASK, calling("dose=5")]}, r"message 2, call 1: arguments: a string that is not valid JSON"),
    "argument list": ({"messages": [ASK, calling("[1]")]}, "message 2, call 1: arguments: of type list, expected an object"),
    "nameless": ({"messages": [ASK, {"role": "assistant", "tool_calls": [{"type": "function"}]}]}, "call 1 names no function"),
    "the user calls": ({"messages": [calling({}) | {"role": "user"}, ANSWER]},
                       "tool_calls must be a list, in a message of the assistant"),
    "tools": ({"messages": [ASK, ANSWER], "tools": {"a": 1}}, "'tools' is of type dict, expected a list"),
    "setting": ({"messages": [ASK, ANSWER], "chat_template_kwargs": {"messages": []}}, "sets 'messages', which is not"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_be_trained_is_refused_with_its_line(tmp_path, model, name):
    record, message = REFUSED[name]
    path = write(tmp_path / "a.jsonl", [{"messages": [ASK, ANSWER]}, record])
    with pytest.raises(InputError, match=rf"a.jsonl: line 2: .*{message}") as error:
        prepare([path], model, tmp_path / "bins", messages_key="messages")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "bins").exists()


LEFT_OUT = {
    "tools": (BARE, {"messages": [ASK, ANSWER], "tools": TOOLS}, "leaves out the tool 'dose'"),
    "calls": (BARE, {"messages": [ASK, calling({"mg": 5}, content="a")]}, "leaves out 'tool_calls'"),
    "reasoning": (BARE, {"messages": [ASK, ANSWER | {"reasoning": "hm"}]}, "leaves out 'reasoning_content'"),
    "Python": (BARE.replace("<|im_end|>", "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments }}{% endfor %}"),
               {"messages": [ASK, calling({"mg": 5})]}, "writes a call's arguments as Python"),
    "thoughts": (
        BARE.replace("m.content", "m.content.split('</think>')[-1]"),
        {"messages": [ASK, ANSWER | {"content": "<think>hm</think>Das."}]},
        r"leaves out the thoughts in message 2 \(assistant\)",
    ),
    "named, not written": (
        "{# m.reasoning_content #}" + BARE,
        {"messages": [ASK, ANSWER | {"reasoning": "hm"}]},
        r"leaves out the thoughts in message 2 \(assistant\)",
    ),
    "a role": ("{% for m in messages %}{% if m.role == 'user' or m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}",
               {"messages": [{"role": "tool", "content": "a"}, ANSWER]}, r"leaves out the content of message 1 \(tool\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_template_that_leaves_something_out_is_refused(tmp_path, model, name):
    template, record, message = LEFT_OUT[name]
    (tmp_path / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match=rf"line 1: .*{message}"):
        prepare([write(tmp_path / "a.jsonl", [record])], tmp_path, tmp_path / "bins", messages_key="messages")


def test_thoughts_of_earlier_turns_may_be_left_out(tmp_path, model):
    """Templates do so on purpose: the model never sees them again."""
    (tmp_path / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    last = "m.content if loop.last else m.content.split('</think>')[-1]"
    (tmp_path / "chat_template.jinja").write_text(BARE.replace("m.content", last))
    thinking = ANSWER | {"content": "<think>hm</think>Das."}
    bins = prepare(
        [write(tmp_path / "a.jsonl", [{"messages": [ASK, thinking, ASK, thinking]}])], tmp_path, tmp_path / "bins",
        messages_key="messages",
    )  # fmt: skip
    assert bins.n_bytes == len(
        "<|im_start|>user\nWas?<|im_end|>\n<|im_start|>assistant\nDas.<|im_end|>\n"
        "<|im_start|>user\nWas?<|im_end|>\n<|im_start|>assistant\n<think>hm</think>Das.<|im_end|>\n"
    )
