"""Classify: labels → a small classifier that can read 428 million documents.

    python data/classify.py labels.parquet --out clf

An encoder (XLM-RoBERTa by default, any of transformers' with a sequence-classification head) learns the annotator's
labels; threshold.py then says from which score on a document is kept. The folder is an ordinary transformers
checkpoint, with threshold.json, two pictures and the held-out scores beside it. Score = softmax probability of class 1,
in fp32.

Which part a document belongs to (80 % train, 10 % choose, 10 % report) follows from a hash of its text: adding documents
moves none, and two copies of a text are never on both sides. The mix of classes stays the sample's own: precision
depends on it. `invalid` labels are left out, and counted.

Texts are capped at 6 characters a token before the tokenizer, which would otherwise read all of a long document only to
throw most of it away; German takes about 4.5. Costs: estimates for 260 k documents are in data/README.md. An epoch is
the unit of resuming: a killed run goes on after the last whole one, and on the CPU ends with the same bits.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from documents import read_documents, write_parquet
from nanomed import InputError
from threshold import set_threshold, summary

LABELS = ("not_medical", "medical")  # in the order of their class numbers
PARTS = {"train": 0.8, "choose": 0.9, "report": 1.0}  # upper ends of the hash's ranges
CHARS_PER_TOKEN = 6
WINDOW = 50  # batches that are sorted by length together


@dataclass(frozen=True)
class Settings:
    """What decides the trained weights; a run goes on only where another with the same left off."""

    labels_sha256: str  # of ids, texts and labels
    base_model: str
    epochs: int
    lr: float
    batch_size: int
    max_tokens: int
    max_chars: int
    seed: int


# ---- labels ----


def part_of(text: str) -> str:
    """train, choose or report: by the text's hash, uniform."""
    position = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
    return next(part for part, end in PARTS.items() if position < end)


def read_labels(path: Path) -> tuple[dict[str, list[dict]], dict]:
    """part → documents {id, text, label}, without the invalid ones; and what is known of the labels.

    InputError for an unknown label, an id that comes twice, or a part that has only one of the two labels.
    """
    parts: dict[str, list[dict]] = {part: [] for part in PARTS}
    seen, counts, digest, origin = set(), Counter(), hashlib.sha256(), Counter()
    for number, row in enumerate(read_documents(path, ("id", "text", "label"), ("model", "prompt_sha256")), 1):
        if row["label"] not in (*LABELS, "invalid"):
            what = f"label is {row['label']!r}, expected medical, not_medical or invalid"
            raise InputError(f"{path}: row {number}: {what}; make the file with data/annotate.py")
        if row["id"] in seen:
            raise InputError(f"{path}: row {number}: id {row['id']!r} comes twice; remove one")
        seen.add(row["id"])
        counts[row["label"]] += 1
        origin[row["model"], row["prompt_sha256"]] += 1
        digest.update(json.dumps([row["id"], row["text"], row["label"]]).encode())
        if row["label"] != "invalid":
            parts[part_of(row["text"])].append({key: row[key] for key in ("id", "text", "label")})
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


def encode(tokenizer, texts: list[str], settings: Settings, name: str) -> list[np.ndarray]:
    """Token ids of every text, capped in characters first and in tokens then; int32 (n_tokens,) each."""
    encoded = []
    for start in tqdm(range(0, len(texts), 256), desc=f"tokenise {name}", unit_scale=256, unit="doc", disable=None):
        chunk = [text[: settings.max_chars] for text in texts[start : start + 256]]
        ids = tokenizer(chunk, truncation=True, max_length=settings.max_tokens, return_attention_mask=False)
        encoded += [np.array(row, np.int32) for row in ids["input_ids"]]
    return encoded


# ---- batches and scores ----


def batches(lengths: np.ndarray, batch_size: int, rng: np.random.Generator | None) -> list[np.ndarray]:
    """Rows of each batch, of like length, so that little is padding. Without rng: by length; with it: in random order.

    Random, rows are shuffled first and then sorted within windows: a batch's company changes every epoch.
    """
    if rng is None:
        order = np.argsort(-lengths, kind="stable")
        return [order[i : i + batch_size] for i in range(0, order.size, batch_size)]
    order, size = rng.permutation(lengths.size), WINDOW * batch_size
    windows = [order[i : i + size] for i in range(0, order.size, size)]
    windows = [window[np.argsort(-lengths[window], kind="stable")] for window in windows]
    cut = [window[i : i + batch_size] for window in windows for i in range(0, window.size, batch_size)]
    return [cut[i] for i in rng.permutation(len(cut))]


def logits(model: nn.Module, rows: list[np.ndarray], pad_id: int) -> Tensor:  # (B, 2) fp32
    """A batch through the model, bf16 on a GPU."""
    longest = max(row.size for row in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), longest), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : row.size] = torch.from_numpy(row)
        mask[i, : row.size] = 1
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float()


@torch.inference_mode()
def score(model: nn.Module, tokens: list[np.ndarray], batch_size: int, pad_id: int, name: str) -> np.ndarray:
    """Probability of class 1 for every document, float32 (N,)."""
    model.eval()
    scores = np.empty(len(tokens), np.float32)
    lengths = np.array([row.size for row in tokens])
    with tqdm(total=len(tokens), desc=f"score {name}", unit="doc", disable=None) as bar:
        for rows in batches(lengths, batch_size, None):
            scores[rows] = logits(model, [tokens[i] for i in rows], pad_id).softmax(-1)[:, 1].cpu().numpy()
            bar.update(rows.size)
    return scores


# ---- training ----


def learn(
    model: nn.Module, tokens: list[np.ndarray], labels: np.ndarray, s: Settings, partial: Path, pad_id: int
) -> None:
    """Train in place, from the last whole epoch that `partial` holds: AdamW, 6 % warm-up, linear decay, clipped at 1."""
    lengths, targets = np.array([row.size for row in tokens]), torch.from_numpy(labels)
    n_batches = -(-len(tokens) // s.batch_size)
    n_steps = s.epochs * n_batches
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=s.lr)
    first = load_epoch(partial, model, optimizer)
    device = next(model.parameters()).device
    with tqdm(total=n_steps, initial=first * n_batches, desc="train", unit="batch", disable=None) as bar:
        for epoch in range(first, s.epochs):
            torch.manual_seed(s.seed * 1000 + epoch)  # dropout: the same whether or not the run was interrupted
            model.train()
            losses = []
            for rows in batches(lengths, s.batch_size, np.random.default_rng((s.seed, epoch))):
                for group in optimizer.param_groups:
                    group["lr"] = s.lr * schedule(bar.n, n_steps)
                out = logits(model, [tokens[i] for i in rows], pad_id)
                loss = nn.functional.cross_entropy(out, targets[rows].to(device))
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
                bar.update()
                if len(losses) % 20 == 0:
                    bar.set_postfix_str(f"epoch {epoch + 1}/{s.epochs}, loss {torch.stack(losses[-20:]).mean():.4f}")
            save_epoch(partial, epoch + 1, model, optimizer)
            tqdm.write(f"epoch {epoch + 1}: loss {torch.stack(losses).mean():.4f}", file=sys.stderr)


def schedule(step: int, n_steps: int) -> float:
    """The share of the peak learning rate at a step: up over the first 6 %, then linearly down to 0."""
    warm_up = max(1, round(0.06 * n_steps))
    return min((step + 1) / warm_up, (n_steps - step) / max(1, n_steps - warm_up))


def save_epoch(partial: Path, epoch: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write PARTIAL/epoch.pt, whole or not at all."""
    tmp = partial / "epoch.pt.tmp"
    with tmp.open("wb") as file:
        torch.save({"epoch": epoch, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(tmp, partial / "epoch.pt")


def load_epoch(partial: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """How many epochs are done; their weights and states go into model and optimizer."""
    if not (partial / "epoch.pt").exists():
        return 0
    state = torch.load(partial / "epoch.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["epoch"]


# ---- the whole ----


def load_base(name: str, seed: int):
    """(tokenizer, model with a fresh head of two classes); InputError for what transformers cannot load so."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(seed)  # the head
    classes = dict(num_labels=2, id2label=dict(enumerate(LABELS)), label2id={name: i for i, name in enumerate(LABELS)})
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(name, dtype=torch.float32, **classes)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--model {name}: cannot be loaded as an encoder: {reason}") from None
    if tokenizer.pad_token_id is None:
        raise InputError(f"--model {name}: its tokenizer has no padding token; choose an encoder, such as XLM-RoBERTa")
    return tokenizer, model


def device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def start(partial: Path, settings: Settings) -> None:
    """Make PARTIAL, or go on in it; InputError if it was made with other settings."""
    path, mine = partial / "settings.json", asdict(settings)
    if path.exists():
        found = json.loads(path.read_text("utf-8"))
        if differs := [key for key in mine if found.get(key) != mine[key]]:
            key = differs[0]
            what = f"{key} was {found.get(key)}, now it is {mine[key]}"
            raise InputError(f"{partial}: of an interrupted run in which {what}; delete that folder to begin anew")
    partial.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(mine, indent=2) + "\n", encoding="utf-8")


def classify(path: Path, out: Path, model_name: str, target_precision: float, **knobs) -> dict:
    """Train on the labels of `path` and leave the classifier in `out`; returns the content of threshold.json.

    knobs: epochs, lr, batch_size, max_tokens, seed (see Settings). InputError if anything is wrong with what was given.
    """
    if out.exists():
        raise InputError(
            f"{out}: exists; choose another --out, or delete it (or choose a threshold: data/threshold.py)"
        )
    parts, about = read_labels(path)
    max_chars = CHARS_PER_TOKEN * knobs["max_tokens"]
    settings = Settings(about["labels_sha256"], model_name, max_chars=max_chars, **knobs)
    tokenizer, model = load_base(model_name, settings.seed)
    if settings.max_tokens > tokenizer.model_max_length:
        raise InputError(f"--max-tokens {settings.max_tokens}: {model_name} takes {tokenizer.model_max_length} at most")
    partial = out.with_name(f".{out.name}.partial")
    start(partial, settings)
    model.to(device())
    tokens = {part: encode(tokenizer, [row["text"] for row in rows], settings, part) for part, rows in parts.items()}
    started = time.perf_counter()
    labels = np.array([LABELS.index(row["label"]) for row in parts["train"]], np.int64)
    learn(model, tokens["train"], labels, settings, partial, tokenizer.pad_token_id)
    print(f"trained in {time.perf_counter() - started:,.0f} s on {len(parts['train']):,} documents, {about['counts']}")
    folder = partial / "clf"
    write_model(folder, model, tokenizer)
    rows = []
    for part in ("choose", "report"):
        scores = score(model, tokens[part], settings.batch_size, tokenizer.pad_token_id, part)
        rows += [row | {"part": part, "score": float(s)} for row, s in zip(parts[part], scores, strict=True)]
    columns = {"id": "string", "part": "string", "label": "string", "score": "float32"}
    write_parquet(folder / "held_out.parquet", rows, columns, about)
    revision = getattr(model.config, "_commit_hash", None)
    result = set_threshold(folder, target_precision, asdict(settings) | about | {"base_revision": revision})
    folder.rename(out)
    shutil.rmtree(partial)
    return result


def write_model(folder: Path, model: nn.Module, tokenizer) -> None:
    """A transformers checkpoint."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """The command line; a wrong input is one line and exit status 1."""
    parser = argparse.ArgumentParser(
        description="Train a classifier on labels and choose its threshold. Run again after an interruption: it goes on.",
        epilog="example: python data/classify.py labels.parquet --out clf",
    )
    add = parser.add_argument
    add("labels", type=Path, metavar="LABELS", help="labels.parquet of data/annotate.py")
    add("--out", type=Path, required=True, metavar="CLF", help="folder to make")
    add(
        "--model", default="FacebookAI/xlm-roberta-base", help="encoder to start from: a folder or hub id (%(default)s)"
    )
    add(
        "--target-precision", type=float, default=0.95, metavar="P", help="of the documents kept (default: %(default)s)"
    )
    add("--epochs", type=int, default=3, help="times over the training part (default: %(default)s)")
    add("--lr", type=float, default=2e-5, help="peak learning rate (default: %(default)s)")
    add("--batch-size", type=int, default=32, help="documents a step (default: %(default)s)")
    add(
        "--max-tokens", type=int, default=512, help="of a document that are read, from its start (default: %(default)s)"
    )
    add("--seed", type=int, default=0, help="of head, order and dropout (default: %(default)s)")
    args = parser.parse_args()
    for name in ("epochs", "lr", "batch_size", "max_tokens"):
        if not getattr(args, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected more than 0")
    knobs = {name: getattr(args, name) for name in ("epochs", "lr", "batch_size", "max_tokens", "seed")}
    result = classify(args.labels, args.out, args.model, args.target_precision, **knobs)
    print(f"{args.out}: {summary(result)}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on after the last whole epoch", file=sys.stderr)
        sys.exit(130)
