"""Chat records, files of them and a model's folder whose template writes all they hold. No test itself."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from bpe import byte_level

# As Qwen's, but that a reasoning is written too.
QWEN = """{%- if tools %}<|im_start|>system
# Tools{% for tool in tools %}
{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}{%- for m in messages %}{%- if m.role in ['system', 'user', 'assistant', 'tool'] %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content | trim }}
{%- for call in m.tool_calls or [] %}
<tool_call>
{{ call.function | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endif %}{% endfor %}"""
# As a template without tools.
BARE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROPERTIES = {"drug": {"type": "string"}, "mg": {"type": "number", "default": 5}}
PARAMETERS = {"type": "object", "properties": PROPERTIES, "required": ["drug"]}
TOOLS = [{"type": "function", "function": {"name": "dose", "description": "Dosis", "parameters": PARAMETERS}}]
ASK, ANSWER = {"role": "user", "content": "Was?"}, {"role": "assistant", "content": "Das."}


def calling(arguments, **more) -> dict:
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "dose", "arguments": arguments}}]} | more


@pytest.fixture(name="model", scope="module")
def fixture_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    byte_level().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(QWEN)
    return folder


def write(path, records: list[dict]):
    """The records as JSON Lines, compressed or not, or as Parquet, with Arrow's union of their keys."""
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    if path.suffix == ".parquet":
        pq.write_table(table_of(records), path)
    else:
        compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
        path.write_bytes(compress(lines))
    return path


def table_of(records: list[dict]) -> pa.Table:
    """The records as a table, whose columns are the keys of all records."""
    keys = {key: None for record in records for key in record}
    return pa.Table.from_pylist([keys | record for record in records])
