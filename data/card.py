"""Card: what clean.py says about the corpus it built: report.md for its maker, README.md, in the hub's format, for its users.

Every figure comes from report.json; what is not known is stated as unknown.
"""

from pathlib import Path

FUNNEL = {
    "documents": "documents swept",
    "empty": "empty",
    "below_threshold": "below the threshold",
    "contaminated": "contain a question of an evaluation set",
    "duplicate_texts": "text seen before",
    "duplicate_ids": "identifier seen before",
    "kept": "**kept**",
}
RULE = """A document is dropped if it shares 13 consecutive words with a question, or 8 that cover half of it, or contains
a question of fewer than 8 words followed by all its options. {by_options:,} records have so short a question: documents that
contain it without its options are kept. {too_short:,} records have fewer than 8 words with their options, or no options,
and cannot be detected."""
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
         (10**8, "10M<n<100M"))  # fmt: skip

CARD = """---
license: odc-by
language:
- {language}
task_categories:
- text-generation
source_datasets:
- {source}
size_categories:
- {size}
configs:
- config_name: default
  data_files: corpus/*.parquet
---

# Domain corpus from {source}

{kept:,} documents, {text_bytes:,} bytes of text (UTF-8), chosen by a classifier from the {documents:,} documents of
{source} that were swept. Columns: {columns}.

## How the documents were chosen

A document is included if the classifier scores it at {threshold:.4f} or above. {quality}

| classifier | |
|---|---|
| base model | {base_model} |
| identity (sha256 of weights, configuration, tokenizer) | `{classifier_sha256}` |
| annotation prompt (sha256) | `{prompt_sha256}` |

{funnel}

## Decontamination

{eval_sets}

## Personal data

Counted by pattern, not removed; the source has replaced e-mail addresses and public IP addresses. Names, and what
people write about their health in forums, remain. A document can be removed by its `id` or `url`.

{personal}

## Origin of the documents

{dumps}

## Licence

ODC-By 1.0, as the source; the texts themselves are subject to the terms of their websites and Common Crawl's terms of use.
Attribute {source}.
"""


def table(head: tuple[str, ...], rows: list[tuple]) -> str:
    """A Markdown table; integers with thousands separators."""
    lines = [head, tuple("---" for _ in head), *rows]
    shown = lambda cell: f"{cell:,}" if isinstance(cell, int) else str(cell)  # noqa: E731
    return "\n".join("| " + " | ".join(map(shown, line)) + " |" for line in lines)


def sections(report: dict) -> dict[str, str]:
    """The report's tables, as Markdown."""
    counts = report["counts"]
    sets = [(name, s["records"], s["dropped"], s["listed"]) for name, s in report["eval_sets"].items()]
    personal = [(name, found["documents"], found["occurrences"]) for name, found in report["personal"].items()]
    short = RULE.format(**report["eval_records"])
    head = ("set", "records", "hits that dropped a document", "weaker hits, listed")
    return {
        "funnel": table(("documents", "number"), [(text, counts[key]) for key, text in FUNNEL.items()]),
        "eval_sets": f"{table(head, sets)}\n\n{short}"
        if sets
        else "No evaluation set was given: this corpus is not decontaminated.",
        "personal": table(("pattern", "documents", "occurrences"), personal),
        "dumps": table(("dump", "documents"), sorted(report["dumps"].items())),
    }


def quality(report: dict) -> str:
    """Precision and recall at the threshold, with intervals, or that they are not known."""
    if report.get("precision", [None])[0] is None:  # also: no held-out document reached the threshold
        return "Precision and recall at this threshold were not measured."
    shown = ("{} {:.3f} (95 %: {:.3f} to {:.3f})".format(name, *report[name]) for name in ("precision", "recall"))
    return f"On held-out documents, against the annotator's labels: {', '.join(shown)}."


def write_report(out: Path, report: dict) -> None:
    """OUT/report.md: the tables, for the maker of the corpus."""
    parts = sections(report)
    body = f"# What was kept\n\n{parts['funnel']}\n\n{quality(report)}\n\n# Evaluation sets\n\n{parts['eval_sets']}\n\n"
    body += "Every hit is in decontamination.jsonl.\n\n"
    body += f"# Personal data in what was kept\n\n{parts['personal']}\n\n# Dumps\n\n{parts['dumps']}\n"
    (out / "report.md").write_text(body, "utf-8")


def write_card(out: Path, report: dict) -> None:
    """OUT/README.md: the data card."""
    counts = report["counts"]
    values = {key: report.get(key, "unknown") for key in ("base_model", "prompt_sha256", "classifier_sha256")}
    values |= {key: report[key] for key in ("source", "language", "threshold", "text_bytes")}
    values["columns"] = ", ".join(f"`{name}`" for name in report["columns"])
    size = next((name for limit, name in SIZES if counts["kept"] < limit), "100M<n<1B")
    card = CARD.format(**values, **sections(report), quality=quality(report), size=size, kept=counts["kept"],
                       documents=counts["documents"])  # fmt: skip
    (out / "README.md").write_text(card, "utf-8")
