"""A multiple-choice question as JSON: {"id", "question", "options": [text, ...], "answer": place from 0}; further keys are free.

lm-eval meets a damaged question with a stack trace or, worse, with a number: an answer outside the options is never right,
an empty option is easily avoided. So files are checked whole before the first token is scored.
"""

from pathlib import Path

from nanomed import InputError
from nanomed.files import read_jsonl

FIELDS = {"id": str, "question": str, "options": list, "answer": int}


def read_questions(path: Path) -> list[dict]:
    """Every question of a JSONL file. InputError naming the first line that is none, and what is wrong with it."""
    questions, ids = [], set()
    for number, question in read_jsonl(path):
        wrong = fault(question)
        if wrong is None and question["id"] in ids:
            wrong = f"id {question['id']!r} stands there twice"
        if wrong:
            raise InputError(f"{path}: line {number}: {wrong}")
        ids.add(question["id"])
        questions.append(question)
    if not questions:
        raise InputError(f"{path}: holds no questions")
    return questions


def fault(question: object) -> str | None:
    """What keeps this from being a question with options, or None."""
    if not isinstance(question, dict):
        return "is no JSON object"
    for field, kind in FIELDS.items():
        if field not in question:
            return f"{field} is missing; expected {', '.join(FIELDS)}"
        if not isinstance(question[field], kind) or isinstance(question[field], bool):
            return f"{field} is {question[field]!r}, expected {kind.__name__}"
    options = question["options"]
    if not question["question"].strip():
        return "question is empty"
    if len(options) < 2:
        return f"has {len(options)} options, expected at least 2"
    for i, option in enumerate(options):
        if not isinstance(option, str) or not option.strip():
            return f"option {i} is empty"
    if len(set(options)) < len(options):
        return "two options are the same"
    if not 0 <= question["answer"] < len(options):
        return f"answer {question['answer']} is none of its options, which count from 0 to {len(options) - 1}"
    return None
