"""Redaction of secrets: keys and passwords that a URL holds or a server repeats must not reach a terminal or a file."""

import base64
import re
from urllib.parse import quote

PATTERNS = (
    (re.compile(r"(?<=://)[^/\s@\"']+(?=@)"), "***"),  # user:password@
    (re.compile(r"([?&](?:api[-_]?key|key|(?:access_)?token|sig(?:nature)?|code|password)=)[^&\s\"']+", re.IGNORECASE), r"\1***"),
    (re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{6,}", re.IGNORECASE), r"\1 ***"),
)
LEAST = 6  # characters; a shorter "secret" would take words out of texts


def redact(text: str, *secrets: str) -> str:
    """The text without these secrets (as they are, URL-encoded, in base64) and without what looks like one in a URL or header."""
    for secret in secrets:
        if len(secret) >= LEAST:
            for spelling in (secret, quote(secret, safe=""), base64.b64encode(secret.encode()).decode()):
                text = text.replace(spelling, "***")
    for pattern, replacement in PATTERNS:
        text = pattern.sub(replacement, text)
    return text
