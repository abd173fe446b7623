"""Prompts in, answers out: the JSONL files that generate writes and judge and failures read.

    prompts     {"prompt": text} or {"messages": [...]}, and maybe an "id" (else the number of the line)
    answers     {id, prompt: messages, answer, finish_reason, completion_tokens, model}

finish_reason is "stop" where the model ended its answer, "length" where it was cut off. No torch is imported here.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from nanomed import InputError
from nanomed.evaluation.record import read_jsonl


@dataclass(frozen=True)
class Sample:
    """One answer to one prompt."""

    id: str
    prompt: list[dict]  # [{"role", "content"}]
    answer: str
    finish_reason: str
    completion_tokens: int  # of the model's own tokenizer, the end token included
    model: str

    @property
    def question(self) -> str:
        """What the user said, all turns."""
        return "\n\n".join(m["content"] for m in self.prompt if m["role"] == "user")

    def line(self) -> str:
        """The line of the JSONL file."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


def read_prompts(path: Path) -> dict[str, list[dict]]:
    """id → messages, in the file's order. InputError for a line without a prompt, or an id that comes twice."""
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


def read_answers(path: Path) -> dict[str, Sample]:
    """id → sample, in the file's order. InputError naming line and field where one is missing or of another type."""
    samples: dict[str, Sample] = {}
    kinds = {"answer": str, "finish_reason": str, "completion_tokens": int, "model": str}
    for number, record in read_jsonl(path):
        where = f"{path}: line {number}"
        if "id" not in record or not is_conversation(record.get("prompt")):
            raise InputError(f"{where} has no id or no prompt (messages); expected a file of eval.py generate")
        for field, kind in kinds.items():
            if not isinstance(record.get(field), kind):
                raise InputError(f"{where}: {field} is {record.get(field)!r}, expected {kind.__name__}")
        sample = Sample(str(record["id"]), record["prompt"], *(record[field] for field in kinds))
        if sample.id in samples:
            raise InputError(f"{where}: id {sample.id!r} comes twice")
        samples[sample.id] = sample
    if not samples:
        raise InputError(f"{path}: has no answers")
    return samples


def read_pair(a: Path, b: Path) -> list[tuple[Sample, Sample]]:
    """The answers of both files to the same prompts, in A's order. InputError where one has a prompt the other lacks."""
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
    """The one model that gave the answers; InputError where there are several."""
    names = sorted({sample.model for sample in samples})
    if len(names) > 1:
        raise InputError(f"{path}: has answers of {names[0]} and of {names[1]}; one file, one model")
    return names[0]
