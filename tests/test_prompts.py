"""nanomed/prompts.py: what real models' templates use is there, as transformers renders it; what cannot be is one line."""

import itertools
import json

import pytest
from transformers import PreTrainedTokenizerFast

from bpe import byte_level
from nanomed import InputError
from nanomed.prompts import chat_template, read_prompts, render

MISTRAL_SMALL = """{%- set today = strftime_now("%Y-%m-%d") %}{{ bos_token }}[DATE]{{ today }}
{%- for m in messages %}
    {%- if loop.index > 3 %}{% break %}{% endif %}
    {{- m.role | tojson }}:{{ m.content | tojson }}{{ eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}{{ unk_token }}"""  # a date, JSON, a break, a token that is not there


def test_a_template_with_dates_and_json_is_rendered_as_transformers_does(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    names = {"bos_token": {"content": "<|endoftext|>"}, "eos_token": "<|im_end|>", "unk_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names | {"eos_token": "<|im_start|>"}))
    (tmp_path / "chat_template.jinja").write_text(MISTRAL_SMALL)
    messages = [{"role": "user", "content": f"Größe {i}?\n"} for i in range(5)]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<|endoftext|>", eos_token="<|im_end|>",
        chat_template=MISTRAL_SMALL,
    )  # fmt: skip
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert expected.startswith("<|endoftext|>[DATE]20")
    assert expected.count("Größe") == 3
    assert render(tmp_path, messages) == expected


FILES = ["chat_template.jinja", "additional_chat_templates/tool_use.jinja", "additional_chat_templates/default.jinja",
         "chat_template.json"]  # fmt: skip
IN_CONFIG = [None, "config", [{"name": "default", "template": "config"}, {"name": "tool_use", "template": "config, tools"}],
             [{"name": "tool_use", "template": "config, tools"}]]  # fmt: skip


@pytest.mark.parametrize("in_config", IN_CONFIG, ids=str)
@pytest.mark.parametrize("files", [combination for n in range(5) for combination in itertools.combinations(FILES, n)], ids=str)
def test_of_several_templates_the_one_that_transformers_takes(files, in_config, tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": in_config}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({key: value for key, value in config.items() if value}))
    (tmp_path / "additional_chat_templates").mkdir()
    for file in files:
        (tmp_path / file).write_text(f"file {file}" if file.endswith("jinja") else json.dumps({"chat_template": "processor"}))
    try:
        expected = PreTrainedTokenizerFast.from_pretrained(tmp_path).get_chat_template()
    except ValueError:  # several, and none of them the default
        expected = None
    try:
        found = chat_template(tmp_path)
    except InputError:
        found = None
    assert found == expected


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"prompt": "a"}\nb', "line 2 is not JSON"),
        ('["a"]', "line 1 is not a JSON object"),
        ('{"prompt": " "}', "line 1 is neither"),
        ('{"prompt": ["a"]}', "line 1 is neither"),
        ('{"messages": [{"role": "user"}]}', "line 1 is neither"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            "line 1 is neither .* user's",
        ),
        ('{"id": 1, "prompt": "a"}\n{"id": "1", "prompt": "b"}', "line 2: duplicate id '1'"),
        ("\n", "has no prompts"),
        (None, "cannot be read"),
    ],
)
def test_no_prompts(tmp_path, text, named):
    if text is not None:
        (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(InputError, match=named) as error:
        read_prompts(tmp_path / "p.jsonl")
    assert str(error.value).count("p.jsonl") == 1
    assert "\n" not in str(error.value)
