"""Verify: are these bins whole, and do they say what the text says?

    python data/verify.py bins/medical
    python data/verify.py bins/medical --tokenizer Qwen/Qwen2.5-7B-Instruct --inputs corpus.jsonl more.parquet [--deep]

Always: every byte of the bins once: checksums, ids, one separator at the end of each document and none inside (in
conversations: as many as were written), BOS, totals. With --tokenizer: were they made with it? And two documents, to
look at. With --inputs too: are they the files the bins were made of, do documents and bytes add up, and does a sample of
the documents (--deep: every one) give the same ids with `tokenizers`, whichever engine made them? Stops at the first
problem with one line and exit status 1.

Costs: a second per 1.3 GB of bins (sha256 is the limit); the sample one read of the inputs, 100 to 200 MB/s of text;
--deep what encoding costs, 2 to 3 MB/s per core.
"""

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

from conversations import template_sha256
from encoding import Job, describe_row, find_tokenizer, load_engine, parse_rows, strip_separator
from engines import load_tokenizer
from nanomed import InputError, run_script
from nanomed.bins import Bins, verify
from nanomed.files import sha256
from nanomed.tokenizer import tokenizer_sha256
from reading import read_batches
from sources import find_inputs, list_names

SAMPLE = 1000  # documents


def table(bins: Bins) -> str:
    """Two columns: what, how much."""
    rows = {
        "shards": f"{len(bins.shards):,}",
        "documents": f"{bins.n_docs:,}",
        "tokens": f"{bins.n_tokens:,}",
        "bytes/token": f"{bins.n_bytes / bins.n_tokens:.3f}",
        "dtype": f"{bins.shards[0]['dtype']}, vocabulary {bins.vocab_size:,}",
        "separator": f"{bins.separator}, BOS {bins.bos}",
        "engine": ", ".join(sorted({shard["engine"] for shard in bins.shards})),
        "tokenizer": bins.tokenizer_sha256,
        "fingerprint": bins.fingerprint,
    }
    return "\n".join(f"{name:12} {value}" for name, value in rows.items())


def check_tokenizer(bins: Bins, model: str) -> Path:
    """The tokenizer.json of a model; InputError if the bins are another tokenizer's."""
    path = find_tokenizer(model)
    found = tokenizer_sha256(path)
    if found != bins.tokenizer_sha256:
        what = f"identity {found}, but {bins.folder} was made with {bins.tokenizer_sha256}"
        raise InputError(f"{path}: {what}; give that tokenizer, or prepare again with this one")
    return path


def show_documents(bins: Bins, path: Path, n_chars: int = 200) -> None:
    """Print how the first and the middle document begin."""
    tokenizer = load_tokenizer(path)
    for doc in sorted({0, bins.n_docs // 2}):
        ids = bins.tokens(doc, 0, min(int(bins.lengths[doc]), 4 * n_chars)).tolist()
        print(f"\ndocument {doc}: {tokenizer.decode(ids, skip_special_tokens=False)[:n_chars]!r}")


def sources(bins: Bins) -> list[dict]:
    """The inputs the bins were made of, in order, as the shards record them, with their number of documents and bytes."""
    found: list[dict] = []
    for shard in bins.shards:
        source = shard["source"]
        if source["first_row"] == 0:
            found.append(source | {"n_docs": 0, "n_bytes": 0})
        found[-1]["n_docs"] += shard["n_docs"]
        found[-1]["n_bytes"] += shard["n_bytes"]
    return found


def check_input(path: Path, source: dict) -> None:
    """InputError if this is not the file that the bins record."""
    try:
        found = sha256(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; expected {source['name']}") from None
    if found != source["sha256"]:
        what = f"sha256 is {found}, the bins were made of {source['name']} with {source['sha256']}"
        raise InputError(f"{path}: {what}; give the same files in the same order, or prepare again")


def compare_text(bins: Bins, tokenizer: Path, inputs: list[Path], n_sample: int, seed: int = 0) -> int:
    """Compare documents of the inputs with the bins; how many were. InputError names the first that differs."""
    expected = sources(bins)
    if len(inputs) != len(expected):
        names = list_names([source["name"] for source in expected])
        raise InputError(f"{bins.folder}: made of {len(expected)} inputs, {names}; {len(inputs)} were given")
    rng = np.random.default_rng(seed)
    chosen = np.zeros(bins.n_docs, bool)
    chosen[rng.choice(bins.n_docs, min(n_sample, bins.n_docs), replace=False)] = True
    doc = 0
    with tqdm(total=sum(source["size"] for source in expected), unit="B", unit_scale=True, desc="compare", disable=None) as bar:
        for path, source in zip(inputs, expected, strict=True):
            check_input(path, source)
            before = bar.n
            for position in compare_input(bins, tokenizer, path, source, chosen, doc):
                bar.update(before + position - bar.n)
            doc += source["n_docs"]
    return int(chosen.sum())


def compare_input(bins: Bins, tokenizer: Path, path: Path, source: dict, chosen: np.ndarray, start: int):
    """Compare one input, whose first document is `start`; yields the bytes of it read so far."""
    messages = "messages_key" in source
    if messages and source.get("chat_template_sha256") not in (None, template_sha256(tokenizer.parent)):
        raise InputError(f"{tokenizer.parent}: its chat template is not the one that {bins.folder} was made with; prepare again")
    key = source["messages_key" if messages else "text_key"]
    job = Job(str(tokenizer), bins.tokenizer_sha256, bins.separator, bins.bos, key, messages, "tokenizers",
              source.get("hold_out"), source.get("held_out"), tuple(source.get("normal_forms", ())))  # fmt: skip
    n_front, n_bytes, doc = 0 if bins.bos is None else 1, 0, start
    for first_row, rows, position in read_batches(path, key, nested=messages):
        parsed = parse_rows(job, path, first_row, rows)
        n_bytes += sum(parsed.n_bytes)
        picked = [i for i in range(len(parsed.texts)) if doc + i < bins.n_docs and chosen[doc + i]]
        for i, ids in zip(picked, load_engine(job)([parsed.texts[i] for i in picked]), strict=True):
            found = bins.tokens(doc + i, n_front, int(bins.lengths[doc + i]) - 1)
            if not np.array_equal(strip_separator(ids, bins.separator) if messages else ids, found):
                where = describe_row(path, parsed.rows[i])
                raise InputError(f"{where}: encodes to different ids than document {doc + i} of {bins.folder}; prepare again")
        doc += len(parsed.texts)
        yield position
    for what, found in (("n_docs", doc - start), ("n_bytes", n_bytes)):
        if found != source[what]:
            raise InputError(f"{path}: {what} is {found}, the bins record {source[what]}; prepare again")


def main() -> None:
    """The command line; bad input ends it with one line and exit status 1."""
    parser = argparse.ArgumentParser(description="Check token bins byte by byte; exit status 1 at the first problem.")
    parser.add_argument("bins", type=Path, help="the folder that data/prepare.py wrote")
    parser.add_argument("--tokenizer", metavar="MODEL", help="also check that they were made with it, and show two documents")
    parser.add_argument(
        "--inputs",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="also compare with the text: the same files or folders in the same order",
    )
    parser.add_argument("--deep", action="store_true", help=f"compare every document, not a sample of {SAMPLE}")
    args = parser.parse_args()
    if (args.inputs or args.deep) and not (args.inputs and args.tokenizer):
        parser.error("comparing with the text needs --tokenizer and --inputs")
    inputs = find_inputs(args.inputs) if args.inputs else []
    n_bytes = sum(path.stat().st_size for path in args.bins.glob("shard-*.bin"))
    with tqdm(total=n_bytes, unit="B", unit_scale=True, desc="verify", disable=None) as bar:
        bins = verify(args.bins, deep=True, progress=bar.update)
    print(table(bins))
    if args.tokenizer:
        path = check_tokenizer(bins, args.tokenizer)
        if inputs:
            n_compared = compare_text(bins, path, inputs, bins.n_docs if args.deep else SAMPLE)
            print(f"{'compared':12} {n_compared:,} documents re-encoded from the text, with the same ids")
        show_documents(bins, path)
    print(f"{args.bins}: whole")


if __name__ == "__main__":
    run_script(main)
