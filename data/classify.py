"""Classify: labels → a small classifier that can read 428 million documents.

    python data/classify.py labels.parquet --out clf

An encoder (XLM-RoBERTa by default, any of transformers' with a sequence-classification head) learns the annotator's
labels; threshold.py then chooses the score from which a document is kept. The folder is an ordinary transformers
checkpoint, with threshold.json, two pictures and the held-out scores beside it. Those come from scoring.py, as in the
sweep: a threshold holds only for scores of the same arithmetic.

Which part a document belongs to (80 % train, 10 % choose, 10 % report) follows from a hash of its text: adding documents
moves none, and two copies of a text are never on both sides. The class balance stays the sample's: precision depends
on it. `invalid` labels and empty texts are left out, and counted.

Texts are capped at 6 characters per token before the tokenizer, which would otherwise read all of a long document only to
throw most of it away; German takes about 4.5. Costs: estimates for 260 k documents are in data/README.md. A killed
run resumes after the last whole epoch, and on the CPU ends with the same bits.
"""

import argparse
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from documents import read_documents, write_parquet
from encoder import LABELS, Settings, encode, learn, load_base
from finding import check_file
from nanomed import InputError, run_script
from nanomed.files import read_json, write_json
from normalising import is_blank
from outputs import claimed_folder
from scoring import Scoring, classifier_identity, dtype_of, score_documents
from threshold import check_target, set_threshold, summary

PARTS = {"train": 0.8, "choose": 0.9, "report": 1.0}  # upper ends of the hash's ranges
CHARS_PER_TOKEN = 6


# ---- labels ----


def part_of(text: str) -> str:
    """train, choose or report: by the text's hash, uniform."""
    position = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
    return next(part for part, end in PARTS.items() if position < end)


def read_labels(path: Path, max_chars: int) -> tuple[dict[str, list[dict]], dict]:
    """part → documents {id, text, label}, the text's first characters and no invalid ones; and what is known about the labels.

    InputError for an unknown label, a duplicate id, or a part that has only one of the two labels.
    """
    parts: dict[str, list[dict]] = {part: [] for part in PARTS}
    seen, counts, digest, origin = set(), Counter(), hashlib.sha256(), Counter()
    for number, row in enumerate(read_documents(path, ("id", "text", "label"), ("model", "prompt_sha256")), 1):
        if row["label"] not in (*LABELS, "invalid"):
            what = f"label is {row['label']!r}, expected medical, not_medical or invalid"
            raise InputError(f"{path}: row {number}: {what}; make the file with data/annotate.py")
        if row["id"] in seen:
            raise InputError(f"{path}: row {number}: duplicate id {row['id']!r}; remove one")
        seen.add(row["id"])
        text = row["text"][:max_chars]
        label = "invalid" if is_blank(text) else row["label"]  # no text, no score
        counts[label] += 1
        origin[row["model"], row["prompt_sha256"]] += 1
        digest.update(json.dumps([row["id"], row["text"], row["label"]]).encode())
        if label != "invalid":
            parts[part_of(row["text"])].append({"id": row["id"], "text": text, "label": label})
    if len(origin) > 1:
        raise InputError(f"{path}: labels of {len(origin)} models or prompts, expected those of one; split the file")
    for part, rows in parts.items():
        found = Counter(row["label"] for row in rows)
        if min(found[label] for label in LABELS) == 0:
            what = f"part {part!r} has {found['medical']} medical and {found['not_medical']} other documents"
            raise InputError(f"{path}: {what}, expected some of both; annotate more documents")
    ((model, prompt),) = origin
    about = {"labels_sha256": digest.hexdigest(), "counts": dict(counts), "annotator": model, "prompt_sha256": prompt}
    return parts, about


# ---- the whole ----


def start(partial: Path, settings: Settings) -> None:
    """Record the settings in PARTIAL, or check them there; InputError if it was made with others."""
    path, mine = partial / "settings.json", asdict(settings)
    if path.exists():
        found = read_json(path)
        if differs := [key for key in mine if found.get(key) != mine[key]]:
            key = differs[0]
            what = f"{key} was {found.get(key)}, now it is {mine[key]}"
            raise InputError(f"{partial}: of an interrupted run in which {what}; delete that folder to start over")
    write_json(path, mine)


def score_held_out(task: Scoring, parts: dict[str, list[dict]], path: Path) -> list[dict]:
    """The documents of `choose` and `report` with their scores: those that a sweep with this classifier would give them."""
    rows = [row | {"part": part} for part in ("choose", "report") for row in parts[part]]
    scores = []
    with tqdm(total=len(rows), desc="score", unit="doc", disable=None) as bar:
        for window in score_documents(task, ((row["id"], row["text"]) for row in rows), path):
            scores += [score for _, score in window]
            bar.update(len(window))
    return [row | {"score": score} for row, score in zip(rows, scores, strict=True)]


def classify(path: Path, out: Path, model_name: str, target_precision: float, **knobs) -> dict:
    """Train on the labels of `path` and leave the classifier in `out`; returns the content of threshold.json.

    knobs: epochs, lr, batch_size, max_tokens, seed (see Settings). InputError if anything is wrong with what was given.
    """
    check_absent(out)
    check_target(target_precision)  # now, not when it is trained
    check_file(path, "the labels that data/annotate.py writes")
    max_chars = CHARS_PER_TOKEN * knobs["max_tokens"]
    parts, about = read_labels(path, max_chars)
    settings = Settings(about["labels_sha256"], model_name, max_chars=max_chars, **knobs)
    tokenizer, model = load_base(model_name, settings.seed)
    if settings.max_tokens > tokenizer.model_max_length:
        raise InputError(f"--max-tokens {settings.max_tokens}: {model_name} takes {tokenizer.model_max_length} at most")
    partial = out.with_name(f".{out.name}.partial")
    names = [path.name for path in partial.glob("*")]  # all of it: the folder is removed at the end
    is_ours = (partial / "settings.json").exists()
    with claimed_folder(partial, names, "data/classify.py", is_ours):
        check_absent(out)  # a run that has just ended may have made it
        start(partial, settings)
        train(parts, about, partial, tokenizer, model, settings)
        result = finish(path, parts, about, partial / "clf", target_precision, model, settings)
        check_absent(out)
        (partial / "clf").rename(out)
        shutil.rmtree(partial)
    return result


def check_absent(out: Path) -> None:
    """InputError if the folder to make exists."""
    if os.path.lexists(out):
        raise InputError(f"{out}: exists; choose another --out, or delete it (another threshold: data/threshold.py)")


def train(parts: dict, about: dict, partial: Path, tokenizer, model, settings: Settings) -> None:
    """Train on the part `train`, and save to PARTIAL/clf."""
    tokens = encode(tokenizer, [row["text"] for row in parts["train"]], settings.max_tokens)
    started = time.perf_counter()
    labels = np.array([LABELS.index(row["label"]) for row in parts["train"]], np.int64)
    learn(model, tokens, labels, settings, partial, tokenizer.pad_token_id)
    print(f"trained in {time.perf_counter() - started:,.0f} s on {len(parts['train']):,} documents, {about['counts']}")
    model.save_pretrained(partial / "clf")
    tokenizer.save_pretrained(partial / "clf")


def finish(path: Path, parts: dict, about: dict, folder: Path, target_precision: float, model, settings: Settings) -> dict:
    """Score the held-out parts, choose the threshold, and write both to the classifier's folder."""
    task = Scoring(str(folder), classifier_identity(folder), settings.max_chars, settings.max_tokens)
    rows = score_held_out(task, parts, path)
    columns = {"id": "string", "part": "string", "label": "string", "score": "float32"}
    write_parquet(folder / "held_out.parquet", rows, columns, about)
    more = {"base_revision": getattr(model.config, "_commit_hash", None), "computed_in": dtype_of(task)}
    return set_threshold(folder, target_precision, asdict(settings) | about | more)


def main() -> None:
    """The command line; bad input ends it with one line and exit status 1."""
    parser = argparse.ArgumentParser(
        description="Train a classifier on labels and choose its threshold. An interrupted run resumes.",
        epilog="example: python data/classify.py labels.parquet --out clf",
    )
    add = parser.add_argument
    add("labels", type=Path, metavar="LABELS", help="labels.parquet of data/annotate.py")
    add("--out", type=Path, required=True, metavar="CLF", help="folder to make")
    add("--model", default="FacebookAI/xlm-roberta-base", help="encoder to start from: a folder or hub id (%(default)s)")
    add("--target-precision", type=float, default=0.95, metavar="P", help="precision to reach (default: %(default)s)")
    add("--epochs", type=int, default=3, help="passes over the training part (default: %(default)s)")
    add("--lr", type=float, default=2e-5, help="peak learning rate (default: %(default)s)")
    add("--batch-size", type=int, default=32, help="documents per step (default: %(default)s)")
    add("--max-tokens", type=int, default=512, help="tokens read of a document, from its start (default: %(default)s)")
    add("--seed", type=int, default=0, help="for head, order and dropout (default: %(default)s)")
    args = parser.parse_args()
    for name in ("epochs", "lr", "batch_size", "max_tokens"):
        if not getattr(args, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected more than 0")
    knobs = {name: getattr(args, name) for name in ("epochs", "lr", "batch_size", "max_tokens", "seed")}
    result = classify(args.labels, args.out, args.model, args.target_precision, **knobs)
    print(f"{args.out}: {summary(result)}")


if __name__ == "__main__":
    run_script(main, "run the same command again to resume after the last whole epoch")
