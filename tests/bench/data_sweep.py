"""The sweep beside a padded loop, and a million documents through the CPU stages: the cases that data.py has no room for.

    python tests/bench/data_sweep.py sweep   [--documents 400]
    python tests/bench/data_sweep.py million [--documents 1000000]

sweep: data/sweep.py beside a loop over `datasets.map` in batches padded to their longest and not sorted, as FineWeb-Edu's
classifier was run, at several batch sizes, both in fp32 (in bf16 the sweep took 158 s on 2 cores of an AMD EPYC where
fp32 took 29 s); an XLM-RoBERTa of 6 layers and 384 dimensions with random weights. Scores are compared with those of one
document at a time. million: generated documents (see data.py) through sample.py, clean.py and prepare.py, with scores
that keep a fiftieth, as FineWeb2 has medical documents; seconds and largest process of each.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from data import ROOT, documents, medians, read_sources, run, save, train_tokenizer, write_jsonl

MAP_LOOP = """
import sys, torch, numpy as np
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
path, clf, out = sys.argv[1:4]
batch_size, threads, max_chars, dtype = int(sys.argv[4]), int(sys.argv[5]), int(sys.argv[6]), sys.argv[7]
torch.set_num_threads(threads)
tokenizer = PreTrainedTokenizerFast(tokenizer_file=clf + "/tokenizer.json", pad_token="<pad>")
model = AutoModelForSequenceClassification.from_pretrained(clf, dtype=getattr(torch, dtype)).eval()
def score(batch):
    texts = [text[:max_chars] for text in batch["text"]]
    inputs = tokenizer(texts, padding="longest", truncation=True, max_length=512, return_tensors="pt")
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return {"score": logits.float().softmax(-1)[:, 1].numpy()}
data = load_dataset("json", data_files=path, split="train", cache_dir=out + "-cache")
np.save(out + ".npy", np.array(data.map(score, batched=True, batch_size=batch_size)["score"]))
"""
THRESHOLD = {"threshold": 0.5, "max_chars": 6 * 512, "max_tokens": 512}


def make_classifier(folder: Path, texts: list[str], hidden_size: int = 384, n_layers: int = 6) -> Path:
    """A random XLM-RoBERTa with a Unigram tokenizer trained on the texts."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(vocab_size=16_000, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    ends = [("<s>", 0), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    torch.manual_seed(0)
    config = XLMRobertaConfig(vocab_size=tokenizer.get_vocab_size(), hidden_size=hidden_size, num_hidden_layers=n_layers,
                              num_attention_heads=hidden_size // 64, intermediate_size=4 * hidden_size, num_labels=2,
                              max_position_embeddings=514, type_vocab_size=1, pad_token_id=1)  # fmt: skip
    XLMRobertaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "threshold.json").write_text(json.dumps(THRESHOLD))
    return folder


def bench_sweep(args: argparse.Namespace, work: Path) -> None:
    """Documents a second, loading included, so many that loading counts little."""
    import pyarrow.parquet as pq

    sources = read_sources(args.text)
    n_bytes = write_jsonl(work / "a.jsonl", documents(sources, n_docs=args.documents))
    clf = make_classifier(work / "clf", sources[:200])
    (work / "peer.py").write_text(MAP_LOOP)

    def loop(out: Path, size: int, dtype: str, max_chars: int = 10**9) -> list:  # its own way has no cap in characters
        return [sys.executable, work / "peer.py", work / "a.jsonl", clf, out, size, args.threads, max_chars, dtype]

    def ours(out: Path, dtype: str) -> list:
        options = ["--classifier", clf, "--out", out, "--threads", args.threads, "--dtype", dtype]
        return [sys.executable, ROOT / "data/sweep.py", work / "a.jsonl", *options]

    sides = {"ours": lambda out: ours(out, "fp32")}
    sides |= {f"map_batch_{size}": lambda out, size=size: loop(out, size, "float32") for size in args.batches}
    runs: dict[str, list[dict]] = {side: [] for side in sides}
    for i in range(args.rounds):
        for side, command in sides.items():
            runs[side].append(run(command(work / f"{side}-{i}")))
            print(side, runs[side][-1], file=sys.stderr)
    run(loop(work / "one", 1, "float32", THRESHOLD["max_chars"]))
    found, one = pq.read_table(work / "ours-0/scores/a.parquet")["score"].to_numpy(), np.load(work / "one.npy")
    result = {side: medians(each) for side, each in runs.items()}
    for each in result.values():
        each["documents_s"] = round(args.documents / each["s"], 2)
    seconds = {side: each["s"] for side, each in result.items()}
    best = min(seconds[f"map_batch_{size}"] for size in args.batches)
    speed = {"fp32_against_batch_512": round(seconds["map_batch_512"] / seconds["ours"], 2),
             "fp32_against_its_best_batch": round(best / seconds["ours"], 2)}  # fmt: skip
    save("sweep", {"documents": args.documents, "mb": n_bytes / 1e6, "threads": args.threads, **result, "speed": speed,
                   "largest_difference_from_one_at_a_time": float(np.abs(found - one).max())})  # fmt: skip


def bench_million(args: argparse.Namespace, work: Path) -> None:
    """Sample, clean, prepare, verify; ten input files."""
    from documents import write_parquet
    from scoring import COLUMNS, classifier_identity

    sources, files, total = read_sources(args.text), [], 0
    rng = np.random.default_rng(0)
    clf = make_classifier(work / "clf", sources[:20], hidden_size=64, n_layers=1)
    for i in range(10):
        files.append(work / f"{i:03}.parquet")
        texts, n = documents(sources, n_docs=args.documents // 10, seed=i), args.documents // 10 * i
        rows = [{"id": f"<urn:{j}>", "text": text, "url": "https://example.org", "dump": "made", "date": "2026-01-01"}
                for j, text in enumerate(texts, n)]  # fmt: skip
        total += sum(len(row["text"].encode()) for row in rows)
        write_parquet(files[-1], rows, dict.fromkeys(rows[0], "string"), {})
        scores = ({"id": row["id"], "file": files[-1].name, "row": k, "score": score}
                  for k, (row, score) in enumerate(zip(rows, rng.random(len(rows)), strict=True)))  # fmt: skip
        write_parquet(work / "sweep/scores" / files[-1].name, scores, COLUMNS, {})
        print(f"{files[-1].name}: written", file=sys.stderr)
    (work / "sweep/sweep.json").write_text(json.dumps({"classifier_sha256": classifier_identity(clf)}))
    tokenizer = train_tokenizer(work / "tokenizer", sources, args.vocab)
    (work / "eval.jsonl").write_text("".join(json.dumps({"question": text[:200]}) + "\n" for text in sources[:1000]))
    script = lambda name: [sys.executable, ROOT / f"data/{name}.py"]  # noqa: E731
    stages = {
        "sample": [*script("sample"), *files, "--n", args.documents * 26 // 1000, "--out", work / "sample.parquet"],
        "clean": [*script("clean"), *files, "--scores", work / "sweep", "--classifier", clf, "--threshold", 0.98,
                  "--eval", work / "eval.jsonl", "--out", work / "corpus", "--workers", 2],
        "prepare the kept fiftieth": [*script("prepare"), *(work / "corpus/corpus" / path.name for path in files),
                                      "--tokenizer", tokenizer, "--out", work / "kept-bins", "--workers", 2],
        "prepare all": [*script("prepare"), *files, "--tokenizer", tokenizer, "--out", work / "bins", "--workers", 2],
        "verify all": [*script("verify"), work / "bins"],
    }  # fmt: skip
    result = {}
    for stage, command in stages.items():
        result[stage] = {key: round(value, 2) for key, value in run(command).items()}
        print(stage, result[stage], file=sys.stderr)
    save("million", {"documents": args.documents, "mb": total / 1e6, "stages": result})


CASES = {"sweep": bench_sweep, "million": bench_million}

if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "data")]
    parser = argparse.ArgumentParser(description="See the docstring.")
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--documents", type=int, default=400, help="(default: %(default)s)")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[512, 32], help="of the loop, 512 among them (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=2, help="of either side (default: %(default)s)")
    parser.add_argument("--vocab", type=int, default=32_000, help="of the tokenizer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--text", nargs="*", default=[], type=Path, help="JSONL files of real text to generate from")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        CASES[arguments.case](arguments, Path(folder))
