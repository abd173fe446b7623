"""Thoughts of reasoning models: what stands between <think> and </think>, or in another model's marks, is no answer."""

import re

TAGS = r"think|thinking|thought|thoughts|reasoning|seed:think"  # Qwen3, DeepSeek-R1, ..., Seed-OSS
PAIRS = (
    (re.compile(rf"<({TAGS})>.*?</\1>", re.DOTALL | re.IGNORECASE), rf"<(?:{TAGS})>", rf"</(?:{TAGS})>"),
    (re.compile(r"\[THINK\].*?\[/THINK\]", re.DOTALL), r"\[THINK\]", r"\[/THINK\]"),  # Magistral
    (re.compile(r"<\|channel\|>analysis.*?<\|channel\|>final<\|message\|>", re.DOTALL), r"<\|channel\|>analysis",
     r"<\|channel\|>final<\|message\|>"),  # gpt-oss
)  # fmt: skip


def without_thoughts(text: str) -> str:
    """The text after the thoughts; some templates open them themselves. "" if thoughts have no end: then there is no answer."""
    said = text
    for whole, opening, closing in PAIRS:
        said = whole.sub("", said)
        said = re.split(closing, said, flags=re.IGNORECASE)[-1]
        if re.search(opening, said, re.IGNORECASE):
            return ""
    return said if said == text else said.strip()
