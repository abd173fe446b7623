"""Responses of an OpenAI-compatible endpoint: the answer in a completion, and what an error means."""

import email.utils
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from nanomed import InputError
from nanomed.answer_cache import Answer

RATE_LIMITS = (429, 503, 529)
OVERLOADS = (408, 502, 504, *RATE_LIMITS)
PASSING = (408, 409, 425, 429)  # and 5xx
OF_ALL = (401, 402, 404, 405, 407, 410)  # errors that every other request would get too; other 4xx are refusals
NO_QUOTA = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "account_deactivated")
N_THOUGHTS = 200  # characters of thoughts to keep


class Refused(InputError):
    """The endpoint does not answer this request. answer: what is recorded. is_cached: whether another try would be in vain."""

    def __init__(self, line: str, answer: Answer, is_cached: bool):
        super().__init__(line)
        self.answer, self.is_cached, self.at = answer, is_cached, time.monotonic()


@dataclass(frozen=True)
class Failure:
    """Why one try failed."""

    reason: str
    kind: str  # "of all", "refused", "rate limit", "overload", "passing"
    wait_s: float | None = None  # as the server asks


def failure_of(status: int, said: str, code: str, wait_s: float | None) -> Failure:
    """The failure that an HTTP status means. code: the error's own, such as insufficient_quota."""
    reason = f"answers {status} ({said[:200]})"
    if status in OF_ALL or status < 400 or code in NO_QUOTA:
        return Failure(reason, "of all")
    if status in OVERLOADS:
        return Failure(reason, "rate limit" if status in RATE_LIMITS or wait_s else "overload", wait_s)
    return Failure(reason, "passing" if status in PASSING or status >= 500 else "refused", wait_s)


def body_hint(reason: str) -> str:
    """How to send what the server asks for, if it names a field that --body can change."""
    if "max_completion_tokens" in reason:
        return """; try --body '{"max_tokens": null, "max_completion_tokens": N}'"""
    if "temperature" in reason:
        return """; try --body '{"temperature": null}'"""
    return ""


def read_completion(completion, redact: Callable[[str], str]) -> Answer:
    """The first choice of a completion, which the package builds without checking; ValueError if it is none."""
    try:
        choice, usage = completion.choices[0], completion.usage
        message = choice.message
        text = message.content
    except (AttributeError, TypeError, IndexError):
        raise ValueError(f"no choices in {redact(str(completion))[:80]!r}") from None
    thoughts = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None) or ""
    if isinstance(text, list) and all(isinstance(part, dict) for part in text):  # parts: thoughts and text (Mistral)
        thoughts = thoughts or str([part for part in text if part.get("type") != "text"])
        text = "".join(str(part.get("text") or "") for part in text if part.get("type") == "text")
    if not isinstance(text, str | None):
        raise ValueError(f"content is of type {type(text).__name__}")
    n_tokens = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    n_tokens = [n if isinstance(n, int) else 0 for n in n_tokens]
    said = (redact(str(part)) for part in (text or "", choice.finish_reason, completion.model))
    return Answer(*said, *n_tokens, thoughts=redact(str(thoughts))[:N_THOUGHTS])


def nobody_listens(url: str) -> bool:
    """Whether the URL is on this machine and refuses connections. Of others, behind a proxy say, it cannot be known."""
    parts = urlsplit(url)
    if parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        return False
    try:
        socket.create_connection((parts.hostname, parts.port or {"https": 443}.get(parts.scheme, 80)), timeout=2).close()
    except ConnectionRefusedError:
        return True
    except (OSError, ValueError):
        pass
    return False


def retry_after(headers) -> float | None:
    """Seconds that the server asks to wait: Retry-After as a number or a date, or retry-after-ms; None if it asks for none."""
    for name, per_second in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            return max(0.0, float(headers[name]) / per_second) or None
        except (KeyError, ValueError):
            pass
    try:
        at = email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp()
    except (KeyError, ValueError):
        return None
    return at - time.time() if at > time.time() else None
