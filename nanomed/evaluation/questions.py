"""A multiple-choice question as JSON: {"id", "question", "options": [text, ...], "answer": place from 0}; further keys are free.

On a damaged question lm-eval fails with a stack trace or, worse, gives a number: an answer outside the options is never
right, an empty option is easily avoided. So whole files are checked before the first token is scored.
"""

from pathlib import Path

from nanomed import InputError
from nanomed.files import read_jsonl

FIELDS = {"id": str, "question": str, "options": list, "answer": int}


def read_questions(path: Path) -> list[dict]:
    """The questions of a JSONL file. InputError naming the first bad line, and what is wrong with it."""
    questions, ids = [], set()
    for number, question in read_jsonl(path):
        wrong = fault(question)
        if wrong is None and question["id"] in ids:
            wrong = f"duplicate id {question['id']!r}"
        if wrong:
            raise InputError(f"{path}: line {number}: {wrong}")
        ids.add(question["id"])
        questions.append(question)
    if not questions:
        raise InputError(f"{path}: has no questions")
    return questions


def fault(question: object) -> str | None:
    """What is wrong with the question, or None."""
    if not isinstance(question, dict):
        return "is not a JSON object"
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
        return f"answer {question['answer']} is not one of its options, which are numbered from 0 to {len(options) - 1}"
    return None
