"""Redaction: remove API keys and passwords from text that is shown or stored.

A server may repeat the key of a request in its error message, its answer or the model's name, as it is, encoded or cut.
Text of a server is redacted before it is shortened, so that no part of a key remains.

    redact = redactor(secrets_of(url, key))
    redact("Invalid key sk-abc123...")       # "Invalid key [redacted]"
"""

import base64
import json
import re
from collections.abc import Callable, Iterable
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit, urlunsplit

MASK = "[redacted]"
MIN_LENGTH = 4  # of a secret: a shorter one would be found inside words
PREFIX_LENGTH = 12  # this many first characters tell a cut or masked secret of at least 16
PLACEHOLDERS = {"none", "null", "empty", "dummy", "test", "token"}  # what people set where a server wants no key
SECRET_NAME = re.compile(r"(?:^|[_\-])(?:api_?key|key|secret|password|passwd|pwd|sig|signature|authorization|credentials?"
                         r"|(?:access|auth|api|id|bearer)_?token|token)$", re.IGNORECASE)  # fmt: skip
PATTERNS = (  # what is secret by its form, whatever its value
    (re.compile(r"(?<=://)[^/\s@\"']+(?=@)"), MASK),
    (re.compile(r"\b(Bearer|Basic)(\s+|%20|\+)[\w.~+/=%\-]{6,}", re.IGNORECASE), rf"\1\2{MASK}"),
    (re.compile(r"\bsk-[\w\-]{8,}"), MASK),
)


def redactor(secrets: Iterable[str]) -> Callable[[str], str]:
    """The function text → text without these secrets in any spelling, and without what looks like a credential."""
    found = {secret for secret in secrets if len(secret) >= MIN_LENGTH and secret.lower() not in PLACEHOLDERS}
    spelled = sorted({form for secret in found for form in _spellings(secret)}, key=len, reverse=True)
    exact = re.compile("|".join(map(_pattern, spelled))) if spelled else None

    def redact(text: str) -> str:
        text = exact.sub(MASK, text) if exact else text
        for pattern, replacement in PATTERNS:
            text = pattern.sub(replacement, text)
        return text

    return redact


def _spellings(secret: str) -> set[str]:
    """The secret as it is, escaped in JSON and Python, encoded for URLs, and in base64 at every position of a text."""
    forms = {secret, json.dumps(secret)[1:-1], repr(secret)[1:-1], quote(secret, safe=""), quote(secret), quote_plus(secret)}
    raw = secret.encode()
    for n_before in range(3):  # base64 encodes three bytes at a time: what stands before shifts the rest
        encoded = base64.b64encode(bytes(n_before) + raw).decode()
        inner = encoded[-(-n_before * 8 // 6) : (n_before + len(raw)) * 8 // 6]
        if len(inner) >= 6:
            forms |= {inner, inner.replace("+", "-").replace("/", "_")}
    return forms


def _pattern(form: str) -> str:
    """A regular expression for one spelling: with its base64 padding, cut short, or as a word of its own if it is short."""
    if len(form) >= PREFIX_LENGTH + 4 and not form[:PREFIX_LENGTH].isalpha():  # no beginning of a common word
        return re.escape(form[:PREFIX_LENGTH]) + r"(?:" + re.escape(form[PREFIX_LENGTH:]) + r"=*|[\w.~+/=*…\-]*)"
    return re.escape(form) if len(form) >= 8 else rf"(?<!\w){re.escape(form)}(?!\w)"


def secrets_of(url: str, key: str = "") -> set[str]:
    """The secrets in an endpoint's URL (user and password, values of the query), and the key."""
    parts, found = urlsplit(url), {key}
    if parts.username or parts.password:
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
        found |= {password or user, f"{user}:{password}", parts.password or parts.username or ""}
    found |= {value for name, value in parse_qsl(parts.query) if SECRET_NAME.search(name)}
    return found - {""}


def shown_url(url: str) -> str:
    """The URL without the secrets in it, for messages and files."""
    parts = urlsplit(url)
    host = f"{MASK}@{parts.netloc.rpartition('@')[2]}" if "@" in parts.netloc else parts.netloc
    values = [(name, MASK if SECRET_NAME.search(name) else value) for name, value in parse_qsl(parts.query, True)]
    query = "&".join(f"{name}={value}" for name, value in values)
    return urlunsplit((parts.scheme, host, parts.path, query, parts.fragment))


def secrets_in(value: object) -> set[str]:
    """The texts in a JSON value that its names call secret, such as {"api_key": TEXT}, at any depth."""
    if isinstance(value, list):
        return set().union(*map(secrets_in, value))
    found: set[str] = set()
    for name, item in value.items() if isinstance(value, dict) else ():
        if isinstance(item, str) and SECRET_NAME.search(name):
            found |= {item, item.partition(" ")[2] or item}  # "Bearer TOKEN": the token by itself too
        else:
            found |= secrets_in(item)
    return found


def masked(value: object) -> object:
    """A JSON value that may be written to a file: the texts that its names call secret are masked."""
    text = json.dumps(value)
    for secret in secrets_in(value):
        text = text.replace(json.dumps(secret)[1:-1], MASK)
    return json.loads(text)


def redacted_command(argv: list[str], key: str = "") -> list[str]:
    """A command line as it may be recorded: URLs without credentials, --body without the values of secret names."""
    secrets, shown = secrets_of("", key), []
    for argument in argv:
        text = argument.partition("=")[2] if argument.startswith("--") else argument
        if "://" in text:
            secrets |= secrets_of(text)
        elif text.lstrip().startswith("{"):
            secrets |= _secrets_of_json(text)
    redact = redactor(secrets)
    for argument in argv:
        name, equals, text = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        shown.append(name + equals + redact(shown_url(text) if re.match(r"\w+://", text) else text))
    return shown


def _secrets_of_json(text: str) -> set[str]:
    try:
        return secrets_in(json.loads(text))
    except ValueError:
        return set()
