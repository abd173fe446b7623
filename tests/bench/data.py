"""The corpus's stages beside their peers: same text, same processes, in turn.

    python tests/bench/data.py [--mb 40] [--rounds 5] [--text FILE.jsonl ...]     prepare.py and verify.py
    python tests/bench/data_sweep.py sweep | million

The text is generated: sentences of a real text (--text; without it the built-in corpus) in documents whose length is
log-normal as on the web (median 2 kB, mean 3.3 kB), and one word in a hundred made of two others, so that words go on
being new as they do in a real corpus. Every side is a process of its own, started anew: start-up and loading count.
Memory is the largest resident size of any one process of a side, looked at every 20 ms.

data/prepare.py with both engines runs beside datatrove's DocumentTokenizer (LocalPipelineExecutor, JSONL, a task and
a worker per input, no shuffling), two inputs, two processes; a byte-level BPE with Qwen2's pre-tokenizer is trained on
the text. Results go to tests/bench/results/.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from machine import cpu_name

ROOT = Path(__file__).resolve().parents[2]
DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
folder, tokenizer, out, n = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
if __name__ == "__main__":
    steps = [JsonlReader(folder, glob_pattern="*.jsonl"),
             DocumentTokenizer(out, tokenizer, eos_token="<|endoftext|>", shuffle_documents=False)]
    LocalPipelineExecutor(steps, tasks=n, workers=n, logging_dir=out + "-logs").run()
"""


# ---- text ----


def read_sources(paths: list[Path]) -> list[str]:
    """Real texts: of JSONL files, or of the built-in corpus."""
    if not paths:
        sys.path[:0] = [str(ROOT), str(ROOT / "data")]
        from miniature import documents as built_in

        return [text for texts in built_in(0).values() for text in texts]
    return [json.loads(line)["text"] for path in paths for line in path.open(encoding="utf-8")]


def documents(sources: list[str], n_bytes: float = math.inf, n_docs: float = math.inf, seed: int = 0) -> Iterator[str]:
    """Documents as the module's docstring says, until there are so many, or so many bytes of them."""
    rng, total, count = random.Random(seed), 0, 0
    sentences = [s for text in sources for s in re.split(r"(?<=[.;:!?])\s+", text) if len(s) > 20]
    words = sorted({word for text in sources for word in re.findall(r"[^\W\d_]{4,}", text)})
    while total < n_bytes and count < n_docs:
        size, parts, length = min(60_000, 100 + int(math.exp(rng.gauss(7.6, 1.0)))), [], 0
        while length < size:
            parts.append(rng.choice(sentences))
            length += len(parts[-1]) + 1
        tokens = " ".join(parts).split(" ")
        for _ in range(len(tokens) // 100):
            made = rng.choice(words)[: rng.randint(2, 7)] + rng.choice(words)[-rng.randint(2, 7) :].lower()
            tokens[rng.randrange(len(tokens))] = made
        text = " ".join(tokens)
        total, count = total + len(text.encode()), count + 1
        yield text


def write_jsonl(path: Path, texts: Iterator[str], first: int = 0) -> int:
    """Write documents with ids; bytes of text."""
    total = 0
    with path.open("w", encoding="utf-8") as file:
        for i, text in enumerate(texts, first):
            file.write(json.dumps({"id": f"<urn:{i}>", "text": text}, ensure_ascii=False) + "\n")
            total += len(text.encode())
    return total


def train_tokenizer(folder: Path, texts: list[str], vocab_size: int) -> Path:
    """A byte-level BPE with Qwen2's pre-tokenizer and special tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    sys.path[:0] = [str(ROOT), str(ROOT / "data")]
    from miniature import QWEN_SPLIT, SPECIAL

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


# ---- measuring ----


def run(command: list, **environment: str) -> dict:
    """Run a process tree to its end: seconds, and largest resident MB of any one of its processes."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} | environment
    start = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], env=env, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], largest_of_session(process.pid))

    thread = threading.Thread(target=watch)
    thread.start()
    output, _ = process.communicate()
    done.set()
    thread.join()
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{command} failed:\n{output}")
    return {"s": seconds, "peak_mb": peak[0] / 1e6}


def largest_of_session(session: int) -> int:
    """Bytes of the largest process of a session."""
    sizes = [0]
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session:
            sizes.append(int(fields[21]) * 4096)
    return max(sizes)


def save(name: str, result: dict) -> None:
    """Print, and write to tests/bench/results/data-NAME.json, with the device and the versions."""
    packages = ("datatrove", "tokenizers", "gigatoken", "torch", "transformers", "datasets", "pyarrow")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    about = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version(), "versions": versions}
    path = ROOT / f"tests/bench/results/data-{name}.json"
    path.write_text(json.dumps(about | result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def medians(runs: list[dict]) -> dict:
    """Median of every measure."""
    return {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]} | {"rounds": len(runs)}


# ---- the cases ----


def bench_prepare(args: argparse.Namespace, work: Path) -> None:
    """Two inputs of half the text each; the sides take turns."""
    sources = read_sources(args.text)
    (work / "in").mkdir()
    inputs = [work / "in" / f"{i}.jsonl" for i in range(2)]
    n_bytes = sum(write_jsonl(path, documents(sources, args.mb * 5e5, seed=i)) for i, path in enumerate(inputs))
    tokenizer = train_tokenizer(work / "tokenizer", sources, args.vocab)
    (work / "peer.py").write_text(DATATROVE)
    prepare = [sys.executable, ROOT / "data/prepare.py", *inputs, "--tokenizer", tokenizer, "--workers", 2]
    sides = {
        "gigatoken": [*prepare, "--engine", "gigatoken", "--out", work / "gigatoken"],
        "tokenizers": [*prepare, "--engine", "tokenizers", "--out", work / "tokenizers"],
        "datatrove": [sys.executable, work / "peer.py", work / "in", tokenizer / "tokenizer.json",
                      work / "datatrove", 2],
    }  # fmt: skip
    runs: dict[str, list[dict]] = {side: [] for side in args.sides}
    for _ in range(args.rounds):
        for side in runs:
            for folder in (work / side, work / f"{side}-logs"):
                shutil.rmtree(folder, ignore_errors=True)
            runs[side].append(run(sides[side]))
            print(side, runs[side][-1], file=sys.stderr)
    written = {side: [path.read_bytes() for path in sorted((work / side).glob(f"*{'.ds' if side == 'datatrove' else '.bin'}"))]
               for side in runs}  # fmt: skip
    result = {side: medians(found) for side, found in runs.items()}
    for found in result.values():
        found["mb_s"] = round(n_bytes / 1e6 / found["s"], 2)
    speed = {side: round(result["datatrove"]["s"] / result[side]["s"], 2) for side in result if side != "datatrove"}
    bins = next(work / side for side in result if side != "datatrove")
    found = medians([run([sys.executable, ROOT / "data/verify.py", bins]) for _ in range(3)])
    n_verified = sum(path.stat().st_size for path in bins.glob("shard-*"))
    result["verify"] = found | {"mb_of_bins": n_verified / 1e6, "mb_s": round(n_verified / 1e6 / found["s"], 1)}
    same = len({b"".join(parts) for parts in written.values()}) == 1
    save(f"prepare-{args.mb:g}mb", {"mb": n_bytes / 1e6, "vocab": args.vocab, "processes": 2, **result,
                                    "times_as_fast_as_datatrove": speed, "all_wrote_the_same_bytes": same})  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="The corpus's stages beside their peers; see the docstring.")
    parser.add_argument("--sides", nargs="+", default=["gigatoken", "tokenizers", "datatrove"], help="(default: all)")
    parser.add_argument("--mb", type=float, default=40, help="text, in MB (default: %(default)s)")
    parser.add_argument("--vocab", type=int, default=32_000, help="of the tokenizer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--text", nargs="*", default=[], type=Path, help="JSONL files of real text to generate from")
    return parser.parse_args()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        bench_prepare(parse_arguments(), Path(folder))
