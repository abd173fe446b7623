"""What a library's error becomes in one of ours: one line, whole sentences or words, and the part that matters."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanomed import first_line

HUB = (
    "404 Client Error. (Request ID: Root=1-6650c0de-0123456789abcdef;0123-4567)\n\nRepository Not Found for url: "
    "https://huggingface.co/api/models/Qwen/Qwen2.5-7B-Instrct.\nPlease make sure you specified the correct `repo_id` and "
    "`repo_type`.\nIf you are trying to access a private or gated repo, make sure you are authenticated. For more details, "
    "see https://huggingface.co/docs/huggingface_hub/authentication"
)
OFFLINE = (
    "An error happened while trying to locate the file on the Hub and we cannot find the requested files in the local "
    "cache. Please check your connection and try again or make sure your Internet connection is on."
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HUB, "Repository Not Found for url: https://huggingface.co/api/models/Qwen/Qwen2.5-7B-Instrct. Please make sure you "
              "specified the correct `repo_id` and `repo_type`."),
        (OFFLINE, OFFLINE.partition(". ")[0] + "."),
        ("502 Server Error: Bad Gateway", "502 Server Error: Bad Gateway"),
        ("damaged\n  at line 3 of thrift.cc", "damaged"),
        ("", "OSError"),
        ("\n \nx", "x"),
        ("a" * 300, "a" * 196 + " ..."),
        ("Error. " + "word " * 100, "Error. " + ("word " * 100)[:189].rpartition(" ")[0] + " ..."),
    ],
)  # fmt: skip
def test_what_is_said(text, expected):
    assert first_line(OSError(text)) == expected


@given(st.text(max_size=600))
def test_one_line_of_limited_length(text):
    line = first_line(OSError(text))
    assert len(line) <= 200
    assert len(line.splitlines()) == 1
