"""Personal data: how much of what looks like it is in a text? Counted for the report, never removed or printed.

The patterns are those of German medical pages. They are neither complete nor exact: a number that reads like a
telephone number counts as one. FineWeb2 has replaced e-mail addresses by example.com's and public IP addresses; names,
the most common personal data of all, no pattern finds.
"""

import re
from collections import Counter

PERSONAL = {
    # From the @ on: a search for what stands before it takes quadratic time in a long run of letters.
    "e-mail": r"@(?<=[\w.+-]@)(?!example\.)[\w-]+\.[\w.-]*\w",
    "e-mail, FineWeb's placeholder": r"@(?<=[\w.+-]@)example\.\w+",
    "IPv4": r"\b(?:25[0-5]|2[0-4]\d|1?\d?\d)(?:\.(?:25[0-5]|2[0-4]\d|1?\d?\d)){3}\b",
    "telephone": r"(?<![\w.,-])(?<!\d )(?:\+49|0049|0)[ /-]?\(?0?\)?[1-9]\d{1,4}\)?[ /-]{0,3}\d{2,4}(?:[ /-]?\d{2,4}){1,3}\b",
    "IBAN": r"\bDE\d{2}(?: ?\d{4}){4} ?\d{2}\b",
    "insurance number (KVNR)": r"\b[A-Z]\d{9}\b",
}
PATTERNS = {name: re.compile(pattern) for name, pattern in PERSONAL.items()}


def count_personal(text: str, personal: dict[str, Counter]) -> None:
    """Add what looks like personal data in a text to the counts: documents, and occurrences."""
    for name, pattern in PATTERNS.items():
        if n_found := sum(1 for _ in pattern.finditer(text)):
            personal[name] += Counter(documents=1, occurrences=n_found)
