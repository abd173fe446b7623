"""Small requests to a model, and what comes back for all of them. No test itself."""

import pytest

from nanomed import chat
from nanomed.chat import ask


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Waits between tries of milliseconds, and no key from the environment."""
    monkeypatch.setattr(chat, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(chat, "LONGEST_WAIT_S", 0.1)
    monkeypatch.setattr(chat, "PATIENCE_S", 0.0)  # the run ends after `tries`, or LEAST_TRIES


@pytest.fixture(name="patient")
def fixture_patient(monkeypatch):
    """The run does not end for lack of answers."""
    monkeypatch.setattr(chat, "PATIENCE_S", 60.0)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def body(text: str) -> dict:
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 8}


def requests(n: int, first: int = 0) -> list[tuple[int, dict]]:
    return [(i, body(f"text {i}")) for i in range(first, first + n)]


def echo(request: dict, number: int) -> str:
    return "to " + request["messages"][-1]["content"]


def collect(endpoint, cache, asked, **how) -> dict:
    answers = list(ask(asked, endpoint.url, cache, len(asked), **how))
    assert len(answers) == len(asked)
    return {key: answer.text for key, answer in answers}
