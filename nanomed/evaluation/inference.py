"""The decoder at inference: keys and values are computed once, and many continuations share those of one prefix.

Few-shot prompts begin with the same text, and the options of a question share the question. So a row here is a tree: a
question (branch 0) and after it the options (branches 1, 2, ...), each of which sees the prefix, the question and itself,
at the positions it would have on its own. One pass scores them all.

Matrix products run over the real tokens only, packed; attention alone is padded to (rows, longest row), with an exact
mask: padding is never seen. A row's results do not depend on the rows beside it, up to rounding.
"""

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nanomed import InputError
from nanomed.model import Decoder

KV = list[tuple[Tensor, Tensor]]  # of every layer: keys and values, (P, K, head_dim) each, of a prefix of P tokens
PREFIX_CHUNK = 1024  # tokens of a prefix computed at a time: bounds the mask at 1,024 x its length


@dataclass(frozen=True)
class Row:
    """A question and what may follow it."""

    trunk: list[int]  # tokens after the prefix; at least one
    branches: list[list[int]]  # tokens of every continuation that are fed to the model (all but its last)

    @property
    def n_tokens(self) -> int:
        """Tokens of the row, all branches together."""
        return len(self.trunk) + sum(map(len, self.branches))


@dataclass(frozen=True)
class Packed:
    """R rows of at most L tokens, N in all, after a prefix of P."""

    tokens: Tensor  # (N,) int64
    positions: Tensor  # (N,) int64
    slots: Tensor  # (N,) int64: place of token i in the padded (R · L)
    n_rows: int
    length: int  # L
    mask: Tensor  # (R, L, P + L) bool: which keys a query sees without a sliding window
    position: Tensor  # (R, P + L) int32, of prefix and row

    def windowed(self, window: int | None) -> Tensor:  # (R, 1, L, P + L) bool
        """The mask under a sliding window."""
        if window is None:
            return self.mask[:, None]
        query = self.position[:, -self.length :, None]
        return (self.mask & (self.position[:, None] > query - window))[:, None]


def pack(rows: list[Row], n_prefix: int, device: torch.device) -> Packed:
    """Lay the rows out behind a prefix of n_prefix tokens."""
    n_rows, length = len(rows), max(row.n_tokens for row in rows)
    tokens, at = [], []
    position = torch.zeros(n_rows, n_prefix + length, dtype=torch.int32)
    position[:, :n_prefix] = torch.arange(n_prefix)
    branch = torch.full((n_rows, n_prefix + length), -1, dtype=torch.int32)  # -1: padding, which nothing sees
    branch[:, :n_prefix] = 0
    for r, row in enumerate(rows):
        column, start = n_prefix, n_prefix
        for b, part in enumerate([row.trunk, *row.branches]):
            stop = column + len(part)
            position[r, column:stop] = torch.arange(start, start + len(part))
            branch[r, column:stop] = b
            column = stop
            start = n_prefix + len(row.trunk)
            tokens += part
        at.append(torch.arange(row.n_tokens) + r * length)
    position, branch, slots = position.to(device), branch.to(device), torch.cat(at).to(device)
    mask = (branch[:, None] == 0) | (branch[:, None] == branch[:, n_prefix:, None])
    mask &= (position[:, None] <= position[:, n_prefix:, None]) & (branch[:, None] >= 0)
    own = torch.arange(length, device=device)
    mask[:, own, n_prefix + own] = True  # padding sees itself: a softmax over nothing is NaN
    positions = position[:, n_prefix:].flatten()[slots].long()
    return Packed(torch.tensor(tokens, device=device), positions, slots, n_rows, length, mask, position)


def hidden(model: Decoder, packed: Packed, prefix: KV) -> tuple[Tensor, KV]:  # (N, D), and the tokens' own keys, values
    """Final hidden states of the rows' tokens behind the prefix ([] if there is none); needs an unsharded model."""
    x = model.model.embed_tokens(packed.tokens).to(model.dtype)
    cos, sin = model.rope_tables(packed.positions)
    masks, own = {}, []
    for i, block in enumerate(model.model.layers):
        attn = block.self_attn
        q, *kv = attn.project(block.input_layernorm(x), cos, sin)
        own.append(tuple(kv))
        if attn.window not in masks:
            masks[attn.window] = packed.windowed(attn.window)
        y = _attend(q, *own[-1], prefix[i] if prefix else None, packed, masks[attn.window])
        y, x = block.post_attention_layernorm.add(attn.o_proj(y.flatten(-2)), x)
        x = x + block.mlp(y)
    return model.model.norm(x), own


def _attend(q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor] | None, packed: Packed, mask: Tensor) -> Tensor:
    """(N, H, d), (N, K, d) twice -> (N, H, d): attention over the prefix and the own row, padded and unpadded again."""
    groups = q.shape[1] // k.shape[1]
    q = _pad(q, packed).transpose(1, 2)
    k, v = (_pad(x, packed) for x in (k, v))
    if prefix is not None:
        k, v = (torch.cat((old.expand(packed.n_rows, -1, -1, -1), x), 1) for old, x in zip(prefix, (k, v), strict=True))
    k, v = (x.transpose(1, 2).repeat_interleave(groups, 1) for x in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return y.transpose(1, 2).flatten(0, 1)[packed.slots]


def _pad(x: Tensor, packed: Packed) -> Tensor:  # (N, heads, d) -> (R, L, heads, d)
    if len(x) == packed.n_rows * packed.length:
        return x.unflatten(0, (packed.n_rows, packed.length))
    return (
        x.new_zeros(packed.n_rows * packed.length, *x.shape[1:])
        .index_copy_(0, packed.slots, x)
        .unflatten(0, (packed.n_rows, packed.length))
    )


def extend(model: Decoder, prefix: KV, n_prefix: int, tokens: list[int]) -> tuple[Tensor, KV]:  # (n, D)
    """Hidden states of the tokens that follow the prefix, and the prefix extended by them; in chunks, to bound memory."""
    device, states = model.lm_head.weight.device, []
    for start in range(0, len(tokens), PREFIX_CHUNK):
        chunk = tokens[start : start + PREFIX_CHUNK]
        x, own = hidden(model, pack([Row(chunk, [])], n_prefix, device), prefix)
        prefix = [tuple(map(torch.cat, zip(*kv, strict=True))) for kv in zip(prefix, own, strict=True)] if prefix else own
        n_prefix += len(chunk)
        states.append(x)
    return torch.cat(states), prefix


def scores(model: Decoder, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:  # (M, D), (M,) -> (M,) twice
    """Log-probability, float32, of every target after its state, and whether it is the likeliest token.

    At most 64 MB of logits exist at a time, and if lm_head has another dtype, a cast of 2,048 of its rows.
    """
    found, head = [], model.lm_head.weight
    cast = states.new_empty(2048, head.shape[1])
    for x, y in zip(*(t.split(max(1, 2**24 // len(head))) for t in (states, targets)), strict=True):
        logits = x.new_empty(len(head), len(x))  # vocabulary first: a part of it is contiguous
        for rows, out in zip(head.split(2048), logits.split(2048), strict=True):
            torch.mm(rows if rows.dtype == x.dtype else cast[: len(rows)].copy_(rows), x.T, out=out)
        logits = logits.float()
        found.append((logits.gather(0, y[None])[0] - logits.logsumexp(0), logits.argmax(0) == y))
    return tuple(map(torch.cat, zip(*found, strict=True)))


def check_finite(values: Tensor, name: Path | str) -> None:
    """InputError if a score of the model is NaN or infinite: nothing computed from it means anything. name: of the model."""
    if not bool(values.isfinite().all()):
        raise InputError(
            f"{name}: the model's scores are not finite; its weights hold NaN or infinity, or its numbers exceed what their "
            "dtype can represent; evaluate an earlier checkpoint, or another dtype"
        )


def greedy(logits: Tensor) -> int:  # (V,)
    """The likeliest token."""
    return int(logits.argmax())


@torch.inference_mode()
def continuation(
    model: Decoder,
    folder: Path,
    tokens: list[int],
    n_tokens: int,
    ends: Container[int],
    choose: Callable[[Tensor], int],
) -> Iterator[int]:
    """At most n_tokens that follow the given ones, each as it is chosen from its float32 logits (V,); up to an end token.

    folder: where the model was loaded from. InputError if its logits are not finite.
    """
    prefix: KV = []
    n_prefix, new = 0, tokens
    for _ in range(n_tokens):
        states, prefix = extend(model, prefix, n_prefix, new)
        n_prefix += len(new)
        logits = model.logits(states[-1:])[0].float()
        check_finite(logits, folder)
        token = choose(logits)
        if token in ends:
            return
        yield token
        new = [token]
