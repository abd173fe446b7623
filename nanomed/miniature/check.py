"""Two losses of the continued run, measured in another way: are packing and labels right?

`loss` is train.py's own, at its last evaluation. Here the same windows of the same validation text go through the same
model, but the labels are read from the documents, not from the batch: `packed` in whole windows, `alone` every piece of
a document by itself. Labels that are off by one make `packed` differ from `loss`, documents that see their neighbours
make `alone` differ from `packed`.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open

from nanomed import hf, weights
from nanomed.batches import pack_documents
from nanomed.config import RECIPES
from nanomed.model import Decoder
from nanomed.stream import Stream, open_sources


@torch.no_grad()
def losses(out: Path) -> dict[str, float]:
    """{loss, packed, alone} in nats per token of the continued model on held-out medicine."""
    config = hf.model_config(out / "continued" / "hf")
    model = Decoder(config, RECIPES["miniature"].dtype)
    weights.load_weights(model, hf.check_weights(model, out / "continued" / "hf"))
    stream = Stream(open_sources([str(out / "bins" / "val-med")]), None, config.vocab_size)
    total, seq_len, sums = stream.start_of(1), RECIPES["miniature"].seq_len, {"packed": 0.0, "alone": 0.0}
    for start in range(0, total, seq_len):
        read = [(stream.read(d, a, b + 1).astype(np.int64), b - a)
                for d, a, b in stream.pieces(start, min(start + seq_len, total))]  # fmt: skip
        sums["packed"] += nll(model, read)
        sums["alone"] += sum(nll(model, [piece]) for piece in read)
    rows = [json.loads(line) for line in (out / "continued" / "metrics.jsonl").read_text().splitlines()]
    found = {key: value / (total - len(stream.lengths)) for key, value in sums.items()}
    return {"loss": [row["val_med_loss"] for row in rows if "val_med_loss" in row][-1]} | found


def nll(model: Decoder, pieces: list[tuple[np.ndarray, int]]) -> float:
    """Σ -log p of every token of the pieces but each document's first. A piece: (its tokens and the next, its length)."""
    hidden = model.hidden(pack_documents([tokens[:n].tolist() for tokens, n in pieces])).split([n for _, n in pieces])
    rows = torch.cat([h[: len(tokens) - 1] for h, (tokens, _) in zip(hidden, pieces, strict=True)])
    labels = torch.from_numpy(np.concatenate([tokens[1:] for tokens, _ in pieces]))
    return F.cross_entropy(model.logits(rows).float(), labels, reduction="sum").item()


def way_gone(out: Path, name: str) -> float:
    """|merged - base| / |continued - base| over all weights: t, if the merge is right."""
    files = [out / "base" / "hf", out / "merged" / name, out / "continued" / "hf"]
    total = np.zeros(2)
    base, merged, continued = (hf.find_weights(folder) for folder in files)
    for key in base:
        b, m, c = (safe_open(of[key], "np").get_tensor(key) for of in (base, merged, continued))
        total += (np.square(m - b, dtype=np.float64).sum(), np.square(c - b, dtype=np.float64).sum())
    return float(np.sqrt(total[0] / total[1]))
