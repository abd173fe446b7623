"""Verify: are these bins whole, and do they say what the text said?

    python data/verify.py bins/medical --tokenizer Qwen/Qwen2.5-7B-Instruct

Reads every byte once: checksums, ids, one separator at the end of each document and none inside, totals. Stops at the
first problem with one line and exit status 1. Costs a second per 1.3 GB (sha256 decides). With --tokenizer it also
compares the tokenizer's identity and shows how two documents begin, for the eye.
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from encoding import find_tokenizer
from engines import load_tokenizer
from nanomed import InputError
from nanomed.bins import Bins, tokenizer_sha256, verify


def table(bins: Bins) -> str:
    """Two columns: what, how much."""
    rows = {
        "shards": f"{len(bins.shards):,}",
        "documents": f"{bins.n_docs:,}",
        "tokens": f"{bins.n_tokens:,}",
        "bytes/token": f"{bins.n_bytes / bins.n_tokens:.3f}",
        "dtype": f"{bins.shards[0]['dtype']}, vocabulary {bins.vocab_size:,}",
        "separator": f"{bins.separator}, BOS {bins.bos}",
        "tokenizer": bins.tokenizer_sha256,
        "fingerprint": bins.fingerprint,
    }
    return "\n".join(f"{name:12} {value}" for name, value in rows.items())


def show_documents(bins: Bins, model: str, n_chars: int = 200) -> None:
    """Print how the first and the middle document begin; InputError if the bins are another tokenizer's."""
    path, _ = find_tokenizer(model)
    found = tokenizer_sha256(path)
    if found != bins.tokenizer_sha256:
        what = f"identity {found}, but {bins.folder} was made with {bins.tokenizer_sha256}"
        raise InputError(f"{path}: {what}; give that tokenizer, or prepare again with this one")
    tokenizer = load_tokenizer(path)
    for doc in sorted({0, bins.n_docs // 2}):
        ids = bins.tokens(doc, 0, min(int(bins.lengths[doc]), 4 * n_chars)).tolist()
        print(f"\ndocument {doc}: {tokenizer.decode(ids, skip_special_tokens=False)[:n_chars]!r}")


def main() -> None:
    """The command line; a wrong input is one line and exit status 1."""
    parser = argparse.ArgumentParser(description="Check token bins byte by byte; exit status 1 at the first problem.")
    parser.add_argument("bins", type=Path, help="the folder that data/prepare.py wrote")
    parser.add_argument("--tokenizer", metavar="MODEL", help="also check that it is this one, and show two documents")
    args = parser.parse_args()
    n_bytes = sum(path.stat().st_size for path in args.bins.glob("shard-*.bin"))
    with tqdm(total=n_bytes, unit="B", unit_scale=True, desc="verify", disable=None) as bar:
        bins = verify(args.bins, deep=True, progress=bar.update)
    print(table(bins))
    if args.tokenizer:
        show_documents(bins, args.tokenizer)
    print(f"{args.bins}: whole")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
