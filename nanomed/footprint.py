"""Bytes of a training step: what it holds, what it keeps for the backward pass, and what it needs for an instant at its worst.

Closed formulas over a model's shape, for nanomed.plan. tests/test_plan.py holds them to the bytes of the real step.
"""

import functools
from dataclasses import dataclass, replace

import torch

from nanomed.hf import ModelConfig
from nanomed.model import GPU_CHUNK, Decoder


@dataclass(frozen=True)
class Regime:
    """A choice of precisions: bytes a parameter on the GPU."""

    name: str
    flags: str  # of train.py
    weights: int
    gradients: int
    states: float


REGIMES = (  # from the most exact to the leanest
    Regime("fp32", "--optimizer-states fp32", 4, 4, 8),
    Regime("bf16 states", "--optimizer-states bf16", 4, 4, 4),
    Regime("bf16", "--precision pure-bf16 --optimizer-states bf16", 2, 2, 4),
    Regime("bf16 + int8", "--precision pure-bf16 --optimizer-states int8", 2, 2, 2 + 8 / 256),  # a scale for 256 numbers
)


def activation_bytes(c: ModelConfig, n: int, recompute: str) -> int:
    """What the forward pass keeps for the backward, in bytes, without the loss; n tokens of bf16.

    A block keeps (D hidden, Q and K all query and key heads, F intermediate; numbers a token):
        none        4 D (input, sum, two norms) + 2 Q + 2 K (attention's inputs and result) + 3 F (gate, up, product)
                    and in float32 two norms' 1 / rms (attention's log-sum-exp, 4 Q / head_dim on a GPU, is left out);
                    where queries and keys are normed, these before it as well: Q + K
        selective   D (input) + results of the products: 2 D + Q + 2 K + 2 F, and of attention: Q
        full        D (input)
    Beside the blocks: the last norm's input, RoPE's angles (4 head_dim bytes), tokens, labels, positions
    and borders (28).
    """
    q, k = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    block = {
        "none": 2 * (4 * c.hidden_size + (2 + c.qk_norm) * (q + k) + 3 * c.intermediate_size) + 8,
        "selective": 2 * (3 * c.hidden_size + 2 * q + 2 * k + 2 * c.intermediate_size),
        "full": 2 * c.hidden_size,
    }[recompute]
    return n * (c.num_hidden_layers * block + 2 * c.hidden_size + 4 * c.head_dim + 32)


def kept_cast_bytes(c: ModelConfig, regime: Regime, shards: int, recompute: str) -> int:
    """One GPU, float32 weights, nothing recomputed: autograd keeps the bf16 casts of the blocks' matrices as well."""
    if shards > 1 or regime.weights == 2 or recompute != "none":
        return 0
    return 2 * c.num_hidden_layers * parameters(c)[1]


def transient_bytes(c: ModelConfig, n: int, regime: Regime, shards: int, recompute: str) -> dict[str, int]:
    """Bytes needed for a moment beyond weights, gradients, states and activations; the peak is in the largest.

    With H = V D parameters in lm_head, B in a block, and n tokens in bf16:
        loss            a chunk's logits, dW (4 H in float32; 2 H where one chunk holds all tokens and the weight it sees is
                        bf16), hidden states and their gradient (2 · 2 n D), and lm_head in bf16 (2 H) unless it is there;
                        FSDP: the buffer too that it was gathered in (2 H)
        head's sum      FSDP only: dW, and the float32 buffer in which the GPUs sum it (4 H); a block gathered ahead (2 B)
        block backward  what is recomputed, and 2 n F more (SwiGLU's three gradients less the product no longer needed);
                        FSDP: two blocks gathered, gradients (5 B), the head's buffer still there (4 H); one GPU: casts (2 B)
    """
    d, v, block = c.hidden_size, c.vocab_size, parameters(c)[1]
    one = replace(c, num_hidden_layers=1)
    again = activation_bytes(one, n, "none") - activation_bytes(one, n, recompute)
    alone = shards == 1
    in_bf16 = alone and regime.weights == 2
    dw = (2 if n <= GPU_CHUNK and (in_bf16 or not alone) else 4) * v * d
    return {
        "loss": 2 * min(n, GPU_CHUNK) * v + dw + 4 * n * d + (0 if in_bf16 else 2 * v * d if alone else 4 * v * d),
        "head's sum": 0 if alone else dw + 4 * v * d + 2 * block,
        "block backward": again + 4 * n * c.intermediate_size + (0 if in_bf16 else 2 * block if alone else 4 * v * d + 5 * block),
    }


@functools.cache
def parameters(c: ModelConfig) -> tuple[int, int]:
    """(all, of one block)."""
    with torch.device("meta"):
        model = Decoder(c)
    return tuple(sum(p.numel() for p in m.parameters()) for m in (model, model.model.layers[0]))
