"""Break one part of the project at a time, and see which of the miniature's expectations fails.

    python tests/bench/miniature_broken.py          some minutes: five fast runs in copies of the clone

The clone is copied to a temporary folder and a line is changed there. The first run changes nothing, and must fail none.
Exit status 1 if a break goes unnoticed.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
BREAKS = [  # (what, file, old, new, the expectation that must fail)
    ("nothing", "train.py", "", "", None),
    ("documents unfiltered", "nanomed/miniature/stages.py", '"--source", "built-in"', '"--source", "built-in", "--threshold", "0"',
     "the corpus is medical"),
    ("t reversed", "nanomed/miniature/stages.py", 'str(models["base"] / "hf"), str(models["continued"] / "hf")',
     'str(models["continued"] / "hf"), str(models["base"] / "hf")', "t goes from base to continued"),
    ("labels shifted by one", "nanomed/batches.py", "= text[1:]", "= np.append(text[2:], text[-1])",
     "the loss is of the next token"),
    ("document mask off", "nanomed/attention.py", "in pairwise(cu_seqlens.tolist()):",
     "in ((int(cu_seqlens[0]), int(cu_seqlens[-1])),):", "documents do not see each other"),
]  # fmt: skip


def failed(what: str, file: str, old: str, new: str) -> list[str]:
    """Names of the expectations that fail in a copy of the clone whose FILE has `new` for `old`."""
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        shutil.copytree(ROOT, clone, symlinks=True, ignore=shutil.ignore_patterns(".git", "bins", "runs", "__pycache__"))
        path = clone / file
        text = path.read_text(encoding="utf-8")
        if old not in text:
            sys.exit(f"error: {file} has no {old!r}; bring this file up to date")
        path.write_text(text.replace(old, new) if old else text, encoding="utf-8")
        command = [sys.executable, "-m", "nanomed.miniature", "--fast", "--out", str(clone / "runs" / "broken")]
        done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
        results = clone / "runs" / "broken" / "results.json"
        if not results.exists():
            sys.exit(f"error: {what}: the run ended without results: {done.stderr.strip().splitlines()[-1]}")
        return [e["name"] for e in json.loads(results.read_text(encoding="utf-8"))["expectations"] if not e["holds"]]


def main() -> None:
    """All breaks; one line each."""
    unnoticed = 0
    for what, file, old, new, expected in tqdm(BREAKS, "breaks"):
        names = failed(what, file, old, new)
        right = expected in names if expected else not names
        unnoticed += not right
        tqdm.write(f"{'noticed  ' if right else 'UNNOTICED'} {what}: {', '.join(names) or 'nothing failed'}")
    sys.exit(unnoticed > 0)


if __name__ == "__main__":
    main()
