"""Annotate: an LLM behind an OpenAI-compatible URL says of every sampled document whether it is medical.

    vllm serve mistralai/Mixtral-8x7B-Instruct-v0.1 --tensor-parallel-size 2
    python data/annotate.py sample.parquet --url http://localhost:8000/v1 --model mistralai/Mixtral-8x7B-Instruct-v0.1 \\
        --out labels.parquet
    python data/annotate.py labels.parquet --audit 300     # writes a sheet for a physician; run again when it is filled

The prompt is a file with a version in its name that also defines the two answer words: another language or field is
another file (`--prompt`). Temperature 0, a few tokens of answer, the text capped; --body changes what is sent. Nothing is
guessed: what is not clearly one of the two words is labelled `invalid`, never "not medical", and its raw text is kept
beside it. Thoughts (<think>...</think>) are no part of an answer. If most of the first 100 answers are invalid, the run
ends.

Answers are cached in OUT.answers.sqlite as they come (nanomed/chat.py): a killed run resumes where it stopped and pays for
nothing twice. OUT is written at the end, in the sample's order, whole or not at all. Memory: a few hundred bytes per
document; texts are read twice instead of kept.
"""

import argparse
import hashlib
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from audit import audit
from documents import read_about, read_documents, write_parquet
from nanomed import InputError, run_script
from nanomed.chat import BODY_HELP, Answer, ask, parse_body, with_extra
from nanomed.evaluation.answers import normalised
from nanomed.prompts import fill
from nanomed.redaction import masked
from nanomed.thoughts import without_thoughts
from nanomed.validity import Validity

PROMPT = Path(__file__).resolve().parent / "prompts" / "medical-de-v2.toml"
COLUMNS = dict.fromkeys(("id", "text", "label", "answer", "finish_reason", "model", "prompt_sha256"), "string")


@dataclass(frozen=True)
class Prompt:
    """An annotation prompt: the template, with {text} in it, and the word for each label."""

    template: str
    medical: str
    not_medical: str
    sha256: str  # of the file

    def parse(self, answer: str) -> str:
        """medical, not_medical or invalid: the answer, without its thoughts, begins with one word, in any case, and does not
        contain the other."""
        answer = without_thoughts(answer)
        found = {label for label in ("medical", "not_medical") if _has_word(answer, getattr(self, label))}
        if len(found) == 1:
            (label,) = found
            if _has_word(answer, getattr(self, label), at_start=True):
                return label
        return "invalid"


def _has_word(answer: str, word: str, at_start: bool = False) -> bool:
    """Whether the answer contains the word by itself; at_start: begins with it, save for quotes, brackets and asterisks."""
    before = r"^[\s\"'„“«»*_`(\[]*" if at_start else r"(?<!\w)"
    return re.search(before + re.escape(normalised(word)) + r"(?!\w)", normalised(answer), re.IGNORECASE) is not None


def read_prompt(path: Path) -> Prompt:
    """A prompt file; InputError if a part is missing or the two words cannot be told apart."""
    try:
        raw = path.read_bytes()
        spec = tomllib.loads(raw.decode("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a prompt ({error}); expected TOML such as {PROMPT}") from None
    for key in ("prompt", "medical", "not_medical"):
        if not isinstance(spec.get(key), str) or not spec[key].strip():
            raise InputError(f"{path}: has no {key!r}; expected the text of the prompt and the two words of the answer")
    if spec["prompt"].count("{text}") != 1:
        raise InputError(f"{path}: contains {{text}} {spec['prompt'].count('{text}')} times, expected once")
    if "{nonce}" not in spec["prompt"]:
        print(f"warning: {path}: has no {{nonce}} in the marks around {{text}}, so a document can imitate them", file=sys.stderr)
    words = [spec["medical"].strip(), spec["not_medical"].strip()]
    if _has_word(words[0], words[1]) or _has_word(words[1], words[0]):
        raise InputError(f"{path}: one of the words {words[0]!r} and {words[1]!r} contains the other; choose two distinct ones")
    return Prompt(spec["prompt"].strip(), *words, hashlib.sha256(raw).hexdigest())


def read_sample(path: Path) -> Iterator[dict]:
    """Documents {id, text}; InputError for a duplicate id."""
    seen = set()
    for document in read_documents(path, ("id", "text")):
        if document["id"] in seen:
            raise InputError(f"{path}: duplicate id {document['id']!r}; labels are keyed by id, so remove one")
        seen.add(document["id"])
        yield document


def annotate(
    sample: Path,
    out: Path,
    url: str,
    model: str,
    prompt: Prompt,
    max_chars: int,
    max_tokens: int,
    extra: dict | None = None,
    **how,
) -> Counter:
    """Label every document of the sample into `out`; returns the count of each label.

    An empty text is `invalid` and not asked about. extra: fields of --body. how: concurrency, timeout_s, tries of
    nanomed.chat.ask. InputError if an input is wrong, most answers are invalid, or the endpoint fails; run again to resume.
    """
    settings = {"model": model, "prompt_sha256": prompt.sha256, "max_chars": max_chars, "max_tokens": max_tokens}
    settings["body"] = masked(extra) if extra else None
    n_documents, digest = 0, hashlib.sha256()
    for document in read_sample(sample):  # everything is checked before the first request is paid for
        n_documents += 1
        digest.update(repr((document["id"], document["text"])).encode())
    settings["sample_sha256"] = digest.hexdigest()
    if n_documents == 0:
        raise InputError(f"{sample}: has no documents")
    if out.exists():
        return _finished(out, settings)

    def requests() -> Iterator[tuple[int, dict]]:
        for number, document in enumerate(read_sample(sample)):
            if text := document["text"].strip():
                content = fill(prompt.template, {"text": text[:max_chars]})
                body = {"model": model, "messages": [{"role": "user", "content": content}]}
                yield number, with_extra(body | {"temperature": 0, "max_tokens": max_tokens}, extra or {})

    answers: dict[int, Answer] = {}
    cache = out.with_name(out.name + ".answers.sqlite")
    validity = Validity(f"{prompt.medical!r} or {prompt.not_medical!r}", "--max-tokens")
    with closing(ask(requests(), url, cache, n_documents, desc="annotate", **how)) as asked:
        for number, answer in asked:
            answers[number] = answer
            validity.add(answer, prompt.parse(answer.text) != "invalid")
    validity.end()

    counts: Counter = Counter()

    def labelled() -> Iterator[dict]:
        nothing = Answer("", "empty", model, 0, 0)
        for number, document in enumerate(read_sample(sample)):
            answer = answers.get(number, nothing)
            label = prompt.parse(answer.text)
            counts[label] += 1
            about = {"label": label, "answer": answer.text, "finish_reason": answer.finish_reason}
            yield document | about | {"model": model, "prompt_sha256": prompt.sha256}

    tokens = {name: sum(getattr(a, name) for a in answers.values()) for name in ("prompt_tokens", "completion_tokens")}
    write_parquet(out, labelled(), COLUMNS, settings | tokens)
    print(f"{tokens['prompt_tokens']:,} prompt tokens, {tokens['completion_tokens']:,} completion tokens")
    return counts


def _finished(out: Path, settings: dict) -> Counter:
    """The label counts of an existing file; InputError if it was made with other settings."""
    found = read_about(out)
    if differs := [key for key in settings if found.get(key) != settings[key]]:
        key = differs[0]
        what = f"was made with {key} {found.get(key)}, now it is {settings[key]}"
        raise InputError(f"{out}: {what}; choose another --out, or delete it")
    print(f"{out}: already annotated")
    return Counter(row["label"] for row in read_documents(out, ("label",)))


def main() -> None:
    """The command line; bad input ends it with one line and exit status 1."""
    parser = argparse.ArgumentParser(
        description="Label documents through an OpenAI-compatible endpoint. An interrupted run resumes and "
        "pays for nothing twice. An API key, if needed, is read from OPENAI_API_KEY.",
        epilog="example: python data/annotate.py sample.parquet --url http://localhost:8000/v1 "
        "--model mistralai/Mixtral-8x7B-Instruct-v0.1 --out labels.parquet",
    )
    add = parser.add_argument
    add("input", type=Path, metavar="FILE", help="sample.parquet of data/sample.py; with --audit: labels.parquet")
    add("--url", help="of the endpoint, including /v1")
    add("--model", help="name of the model, as the endpoint knows it")
    add("--out", type=Path, metavar="LABELS", help="labels.parquet to write")
    add("--prompt", type=Path, default=PROMPT, metavar="TOML", help="prompt file (default: data/prompts/%(default)s)"
        .replace("%(default)s", PROMPT.name))  # fmt: skip
    add("--max-chars", type=int, default=4000, metavar="N", help="characters of a text to show (default: %(default)s)")
    add("--max-tokens", type=int, default=8, metavar="N", help="tokens per answer (default: %(default)s)")
    add("--concurrency", type=int, default=64, metavar="N", help="requests in flight (default: %(default)s)")
    add("--timeout", type=float, default=120, metavar="S", help="seconds per attempt (default: %(default)s)")
    add("--body", metavar="JSON", help=BODY_HELP)
    add("--audit", type=int, metavar="N", help="write a sheet of N documents to label by hand; once filled in, print F1")
    args = parser.parse_args()
    for name in ("max_chars", "max_tokens", "concurrency", "timeout", "audit"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected more than 0")
    if args.audit:
        audit(args.input, args.audit)
        return
    if missing := [f"--{name}" for name in ("url", "model", "out") if getattr(args, name) is None]:
        raise InputError(f"{', '.join(missing)} is missing; see --help for an example")
    how = {"concurrency": args.concurrency, "timeout_s": args.timeout, "extra": parse_body(args.body)}
    prompt = read_prompt(args.prompt)
    counts = annotate(args.input, args.out, args.url, args.model, prompt, args.max_chars, args.max_tokens, **how)
    total = sum(counts.values())
    shares = (f"{counts[label]:,} {label} ({counts[label] / total:.1%})" for label in ("medical", "not_medical", "invalid"))
    print(f"{args.out}: {total:,} documents: {', '.join(shares)}")


if __name__ == "__main__":
    run_script(main)
