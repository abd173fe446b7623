"""Answers to prompts: the JSONL files that generate writes and judge and failures read.

    {id, prompt: messages, answer, finish_reason, completion_tokens, model, turn_tokens}

finish_reason is "stop" if the model ended its answer, "length" if it was cut off. The file holds what the model wrote
without its special tokens; turn_tokens counts those that begin a further turn of the conversation. Thoughts
(<think>...</think>) are removed when answers are read. No torch is imported here.
"""

import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from nanomed import InputError
from nanomed.files import read_jsonl
from nanomed.prompts import is_conversation
from nanomed.thoughts import without_thoughts

INVISIBLE = re.compile("[\u00ad\u200b-\u200d\u2060\ufeff]")  # soft hyphens, zero-width spaces: they split words
ROLES = {"system": "System", "user": "Nutzer", "assistant": "Assistent"}  # in the judge's language


@dataclass(frozen=True)
class Sample:
    """One answer to one prompt."""

    id: str
    prompt: list[dict]  # [{"role", "content"}]
    answer: str
    finish_reason: str
    completion_tokens: int  # in the model's own tokens, the end token included
    model: str
    turn_tokens: int = 0  # special tokens of the chat template with text after them
    thought: bool = False  # whether a <think> block was removed from the answer

    @property
    def question(self) -> str:
        """What the user said, in all turns."""
        return "\n\n".join(m["content"] for m in self.prompt if m["role"] == "user")

    @property
    def conversation(self) -> str:
        """The whole prompt as a judge reads it: a single user turn as it is, several each under its role."""
        if [m["role"] for m in self.prompt] == ["user"]:
            return self.question
        return "\n\n".join(f"[{ROLES.get(m['role'], m['role'])}]\n{m['content']}" for m in self.prompt)

    def line(self) -> str:
        """The line of the JSONL file."""
        return json.dumps({key: x for key, x in asdict(self).items() if key != "thought"}, ensure_ascii=False) + "\n"


def read_answers(path: Path) -> dict[str, Sample]:
    """id → sample, in the file's order. InputError naming the line and the field that is missing or of another type."""
    samples: dict[str, Sample] = {}
    kinds = {"answer": str, "finish_reason": str, "completion_tokens": int, "model": str}
    for number, record in read_jsonl(path):
        where = f"{path}: line {number}"
        if "id" not in record or not is_conversation(record.get("prompt")):
            raise InputError(f"{where} has no id or no prompt (messages); expected a file of eval.py generate")
        for field, kind in kinds.items():
            if not isinstance(record.get(field), kind):
                raise InputError(f"{where}: {field} is {record.get(field)!r}, expected {kind.__name__}")
        said = without_thoughts(record["answer"])
        about = (record[field] for field in kinds if field != "answer")
        turn_tokens = record.get("turn_tokens", 0)  # absent in older files
        if not isinstance(turn_tokens, int):
            raise InputError(f"{where}: turn_tokens is {turn_tokens!r}, expected int")
        thought = said != record["answer"]
        sample = Sample(str(record["id"]), record["prompt"], said, *about, turn_tokens=turn_tokens, thought=thought)
        if sample.id in samples:
            raise InputError(f"{where}: duplicate id {sample.id!r}")
        samples[sample.id] = sample
    if not samples:
        raise InputError(f"{path}: has no answers")
    return samples


def normalised(text: str) -> str:
    """The text as it is matched: composed characters (NFC), no invisible ones inside words."""
    return INVISIBLE.sub("", unicodedata.normalize("NFC", text))


def thoughts_left_out(samples: list[Sample]) -> Iterator[str]:
    """A line with the number of answers that had thoughts, if any."""
    if n := sum(sample.thought for sample in samples):
        without = sum(sample.thought and not sample.answer for sample in samples)
        yield (f"{n} of {len(samples)} answers of {samples[0].model} have a <think> block, which is removed; "
               f"{without} of them have nothing after it")  # fmt: skip


def read_pair(a: Path, b: Path) -> list[tuple[Sample, Sample]]:
    """The answers of both files to the same prompts, in A's order. InputError if one has a prompt that the other lacks."""
    left, right = read_answers(a), read_answers(b)
    alone = [(name, a, b) for name in left if name not in right] + [(name, b, a) for name in right if name not in left]
    if alone:
        name, has, lacks = alone[0]
        more = f" and {len(alone) - 1} more" if len(alone) > 1 else ""
        raise InputError(f"prompt {name!r}{more} is in {has} but not in {lacks}; compare answers to the same prompts")
    for name, sample in left.items():
        if sample.prompt != right[name].prompt:
            raise InputError(f"prompt {name!r} differs between {a} and {b}; compare answers to the same prompts")
    return [(sample, right[name]) for name, sample in left.items()]


def model_name(samples: list[Sample], path: Path) -> str:
    """The model that gave the answers; InputError if there are several."""
    names = sorted({sample.model for sample in samples})
    if len(names) > 1:
        raise InputError(f"{path}: has answers of {names[0]} and of {names[1]}; expected one model per file")
    return names[0]
