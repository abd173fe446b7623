"""Encoder: a transformer that learns to say whether a text is of class 1. Load it, tokenise, batch, train.

The pieces that classify.py puts together; scores come from scoring.py, as in the sweep. Batches hold documents of similar
length, so that little is padding: sorted within random windows. On a GPU with autocast to bf16, or to fp16, with the loss
scaled, where the GPU has no bf16.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from nanomed import InputError, first_line
from nanomed.files import whole_file
from scoring import claim_device, half_precision

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
        raise InputError(f"--model {name}: cannot be loaded as an encoder: {first_line(error)}") from None
    if tokenizer.pad_token_id is None:
        raise InputError(f"--model {name}: its tokenizer has no padding token; choose an encoder, such as XLM-RoBERTa")
    if not tokenizer.is_fast:
        raise InputError(f"--model {name}: its tokenizer has no tokenizer.json, which scoring needs; choose another")
    device = claim_device()  # of the scorer, later: no GPU that a sweep works on
    if device.type == "cpu" and torch.backends.mps.is_available():
        device = torch.device("mps")
    return tokenizer, model.to(device)


def encode(tokenizer, texts: list[str], max_tokens: int) -> list[np.ndarray]:
    """Token ids of every text, its first max_tokens; int32 (n_tokens,) each."""
    encoded = []
    with tqdm(total=len(texts), desc="tokenise", unit="doc", disable=None) as bar:
        for start in range(0, len(texts), 256):
            chunk = texts[start : start + 256]
            ids = tokenizer(chunk, truncation=True, max_length=max_tokens, return_attention_mask=False)["input_ids"]
            encoded += [np.array(row, np.int32) for row in ids]
            bar.update(len(chunk))
    return encoded


def batches(lengths: np.ndarray, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Rows of each batch, of similar length, in random order.

    Rows are shuffled first and then sorted within windows: which documents share a batch changes every epoch.
    """
    order, size = rng.permutation(lengths.size), WINDOW * batch_size
    windows = [order[i : i + size] for i in range(0, order.size, size)]
    windows = [window[np.argsort(-lengths[window], kind="stable")] for window in windows]
    cut = [window[i : i + batch_size] for window in windows for i in range(0, window.size, batch_size)]
    return [cut[i] for i in rng.permutation(len(cut))]


def logits(model: nn.Module, rows: list[np.ndarray], pad_id: int) -> Tensor:  # (B, 2) fp32
    """A batch through the model, in half precision on a GPU."""
    longest = max(row.size for row in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), longest), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : row.size] = torch.from_numpy(row)
        mask[i, : row.size] = 1
    device = next(model.parameters()).device
    dtype = torch.float16 if needs_scaling(device) else torch.bfloat16
    with torch.autocast(device.type, dtype, enabled=device.type == "cuda"):
        return model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float()


def needs_scaling(device: torch.device) -> bool:
    """Whether training is in fp16, whose small gradients are 0 unless the loss is scaled."""
    return device.type == "cuda" and half_precision(device) == "fp16"


def learn(model: nn.Module, tokens: list[np.ndarray], labels: np.ndarray, s: Settings, partial: Path, pad_id: int) -> None:
    """Train in place: AdamW, the schedule below, gradients clipped at 1; resumes after the last whole epoch in `partial`.

    tokens: (n_tokens,) each; labels: int64 (N,), 0 or 1.
    """
    lengths, targets = np.array([row.size for row in tokens]), torch.from_numpy(labels)
    n_batches = -(-len(tokens) // s.batch_size)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=s.lr)
    scaler = torch.amp.GradScaler(enabled=needs_scaling(next(model.parameters()).device))  # does nothing if not enabled
    first = load_epoch(partial, model, optimizer, scaler)
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
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                losses.append(loss.detach())
                bar.update()
            save_epoch(partial, epoch + 1, model, optimizer, scaler)
            bar.write(f"epoch {epoch + 1} of {s.epochs}: loss {torch.stack(losses).mean():.4f}", file=sys.stderr)


def schedule(step: int, n_steps: int) -> float:
    """The fraction of the peak learning rate at a step: linear warm-up over the first 6 %, then linear decay to 0."""
    warm_up = max(1, round(0.06 * n_steps))
    return min((step + 1) / warm_up, (n_steps - step) / max(1, n_steps - warm_up))


def save_epoch(partial: Path, epoch: int, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """Write PARTIAL/epoch.pt, whole or not at all."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    with whole_file(partial / "epoch.pt") as file:
        torch.save({"epoch": epoch} | state, file)


def load_epoch(partial: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> int:
    """How many epochs are done; their weights and states go into model, optimizer and scaler."""
    if not (partial / "epoch.pt").exists():
        return 0
    state = torch.load(partial / "epoch.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if scaler.is_enabled() and state.get("scaler"):
        scaler.load_state_dict(state["scaler"])
    return state["epoch"]
