"""Encoder: a transformer that says of a text whether it is of class 1. Load it, tokenise, batch, score, train.

The pieces that classify.py puts together. Texts are capped in characters before the tokenizer, which would otherwise
read all of a long document only to throw most of it away. Batches hold documents of like length, so that little is
padding: sorted outright for scoring, sorted within random windows for training. bf16 on a GPU, softmax in fp32.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from nanomed import InputError
from nanomed.files import whole_file

LABELS = ("not_medical", "medical")  # in the order of their class numbers
WINDOW = 50  # batches that are sorted by length together


@dataclass(frozen=True)
class Settings:
    """What decides the trained weights."""

    labels_sha256: str  # of ids, texts and labels
    base_model: str
    epochs: int
    lr: float
    batch_size: int  # documents
    max_tokens: int
    max_chars: int
    seed: int


def load_base(name: str, seed: int):
    """(tokenizer, model with a fresh head of two classes); InputError for what transformers cannot load so."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(seed)  # the head
    classes = {"num_labels": 2, "id2label": dict(enumerate(LABELS)), "label2id": {x: i for i, x in enumerate(LABELS)}}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(name, dtype=torch.float32, **classes)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--model {name}: cannot be loaded as an encoder: {reason}") from None
    if tokenizer.pad_token_id is None:
        raise InputError(f"--model {name}: its tokenizer has no padding token; choose an encoder, such as XLM-RoBERTa")
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return tokenizer, model.to(device)


def encode(tokenizer, texts: list[str], max_chars: int, max_tokens: int, name: str) -> list[np.ndarray]:
    """Token ids of every text, capped in characters first and in tokens then; int32 (n_tokens,) each."""
    encoded = []
    with tqdm(total=len(texts), desc=f"tokenise {name}", unit="doc", disable=None) as bar:
        for start in range(0, len(texts), 256):
            chunk = [text[:max_chars] for text in texts[start : start + 256]]
            ids = tokenizer(chunk, truncation=True, max_length=max_tokens, return_attention_mask=False)["input_ids"]
            encoded += [np.array(row, np.int32) for row in ids]
            bar.update(len(chunk))
    return encoded


def batches(lengths: np.ndarray, batch_size: int, rng: np.random.Generator | None) -> list[np.ndarray]:
    """Rows of each batch, of like length. Without rng: the longest first; with it: in random order, shuffled anew.

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
    with tqdm(total=len(tokens), desc=f"score {name}", unit="doc", disable=None) as bar:
        for rows in batches(np.array([row.size for row in tokens]), batch_size, None):
            scores[rows] = logits(model, [tokens[i] for i in rows], pad_id).softmax(-1)[:, 1].cpu().numpy()
            bar.update(rows.size)
    return scores


# ---- training ----


def learn(
    model: nn.Module, tokens: list[np.ndarray], labels: np.ndarray, s: Settings, partial: Path, pad_id: int
) -> None:
    """Train in place: AdamW, the schedule below, gradients clipped at 1; goes on after the last whole epoch in `partial`.

    tokens: (n_tokens,) each; labels: int64 (N,), 0 or 1.
    """
    lengths, targets = np.array([row.size for row in tokens]), torch.from_numpy(labels)
    n_batches = -(-len(tokens) // s.batch_size)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=s.lr)
    first = load_epoch(partial, model, optimizer)
    with tqdm(total=s.epochs * n_batches, initial=first * n_batches, desc="train", unit="batch", disable=None) as bar:
        for epoch in range(first, s.epochs):
            torch.manual_seed(s.seed * 1000 + epoch)  # dropout: the same whether or not the run was interrupted
            model.train()
            losses = []
            for rows in batches(lengths, s.batch_size, np.random.default_rng((s.seed, epoch))):
                for group in optimizer.param_groups:
                    group["lr"] = s.lr * schedule(epoch * n_batches + len(losses), s.epochs * n_batches)
                out = logits(model, [tokens[i] for i in rows], pad_id)
                loss = nn.functional.cross_entropy(out, targets[rows].to(out.device))
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
                bar.update()
            save_epoch(partial, epoch + 1, model, optimizer)
            bar.write(f"epoch {epoch + 1} of {s.epochs}: loss {torch.stack(losses).mean():.4f}", file=sys.stderr)


def schedule(step: int, n_steps: int) -> float:
    """The share of the peak learning rate at a step: up over the first 6 %, then linearly down to 0."""
    warm_up = max(1, round(0.06 * n_steps))
    return min((step + 1) / warm_up, (n_steps - step) / max(1, n_steps - warm_up))


def save_epoch(partial: Path, epoch: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write PARTIAL/epoch.pt, whole or not at all."""
    with whole_file(partial / "epoch.pt") as file:
        torch.save({"epoch": epoch, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)


def load_epoch(partial: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """How many epochs are done; their weights and states go into model and optimizer."""
    if not (partial / "epoch.pt").exists():
        return 0
    state = torch.load(partial / "epoch.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["epoch"]
