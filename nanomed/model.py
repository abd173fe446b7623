"""The decoder: Llama, Mistral, Qwen2 and Qwen3 in one, under Hugging Face's parameter names.

They differ in so little (biases, tied embeddings, a sliding window, norms of queries and keys, a stretched RoPE) that one
module with a few switches is all of them. Names, shapes and the half-split RoPE layout are Hugging Face's own: importing
and exporting a checkpoint is a copy, and there is no permutation to get wrong.

All tensors are packed: N tokens of many documents in one row, no batch dimension, no padding. Letters in comments:
N tokens, D hidden size, H query heads, K key/value heads, F intermediate size, V vocabulary.

Parameters stay in float32 (the optimiser's masters). FSDP hands them to the forward pass in bf16; without FSDP, on one
process, `Linear` casts them where they are used. Either way the matrix products run in the dtype of the hidden states.

What is neither a matrix product nor attention comes from `Kernels`: Triton's on a GPU, their torch twins on the CPU.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomed.attention import attention
from nanomed.batches import Batch
from nanomed.hf import ModelConfig
from nanomed.kernels.providers import TORCH, Kernels

GPU_CHUNK, CPU_CHUNK = 4096, 512  # tokens of the loss at a time: a CPU's cache is small, its allocator slow above 32 MB


class Linear(nn.Linear):
    """x Wᵀ + b in x's dtype: the cast is a no-op where FSDP has already gathered W in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Embedding(nn.Embedding):
    """nn.Embedding that draws no numbers on the meta device: torch would import torch.compile whole for it, a second."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class RMSNorm(nn.Module):
    """kernels.rms_norm with its weight."""

    def __init__(self, size: int, eps: float, kernels: Kernels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.kernels = eps, kernels

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of the sum, sum) in one pass over memory."""
        return self.kernels.add_rms_norm(x, residual, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query self-attention with RoPE, causal within each document: (N, D) -> (N, D)."""

    def __init__(self, c: ModelConfig, layer: int, kernels: Kernels):
        super().__init__()
        q_size, kv_size = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, q_size, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, kv_size, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, kv_size, bias=c.qkv_bias)
        self.o_proj = Linear(q_size, c.hidden_size, bias=c.o_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(c.head_dim, c.rms_norm_eps, kernels) for _ in range(2))
        self.qk_norm, self.head_dim = c.qk_norm, c.head_dim
        self.window = c.sliding_windows[layer] if c.sliding_windows else None
        self.kernels = kernels

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (N, H, head_dim) and keys (N, K, head_dim), both after RoPE, and values (N, K, head_dim)."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            weights = self.q_norm.weight, self.k_norm.weight
            q, k = self.kernels.norm_rope(q, k, *weights, self.q_norm.eps, cos, sin)
        else:
            q, k = self.kernels.rope(q, k, cos, sin)
        return q, k, v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, extent: Tensor) -> Tensor:
        q, k, v = self.project(x, cos, sin)
        y = attention(q, k, v, cu_seqlens, extent, self.window)
        return self.o_proj(y.flatten(-2))


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x)): (N, D) -> (N, F) twice -> (N, D)."""

    def __init__(self, c: ModelConfig, kernels: Kernels):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.kernels.swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """One decoder layer: attention, then the MLP, each behind its norm and added to the residual stream (N, D)."""

    def __init__(self, c: ModelConfig, layer: int, kernels: Kernels):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, kernels)
        self.self_attn = Attention(c, layer, kernels)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, kernels)
        self.mlp = MLP(c, kernels)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, extent: Tensor) -> Tensor:
        y = self.self_attn(self.input_layernorm(x), cos, sin, cu_seqlens, extent)
        y, x = self.post_attention_layernorm.add(y, x)
        return x + self.mlp(y)


class Head(Linear):
    """lm_head with the loss inside its forward: FSDP holds the weight whole there, and logits never exist whole."""

    def __init__(self, c: ModelConfig, kernels: Kernels):
        super().__init__(c.hidden_size, c.vocab_size, bias=False)
        self.kernels = kernels

    def forward(self, x: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
        chunk = GPU_CHUNK if x.is_cuda else CPU_CHUNK
        return self.kernels.linear_cross_entropy(x, self.weight, targets, scale, chunk=chunk)


class Trunk(nn.Module):
    """`model.*` of a checkpoint: embedding, blocks, final norm."""

    def __init__(self, c: ModelConfig, kernels: Kernels):
        super().__init__()
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, layer, kernels) for layer in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, kernels)


def rope_frequencies(c: ModelConfig, device: torch.device) -> Tensor:  # (head_dim / 2,) float32
    """The angle, in radians, by which each pair of a head's numbers turns from one token to the next: theta^(-2i / head_dim).

    Llama 3.1 (arXiv 2407.21783) slows down by `factor` what turns fewer than low_freq_factor times in the context it was first
    trained on, leaves what turns more than high_freq_factor times, and has a ramp between.
    """
    frequency = c.rope_theta ** -(torch.arange(0, c.head_dim, 2, device=device) / c.head_dim)
    if (s := c.rope_scaling) is None:
        return frequency
    turns = frequency * s.original_max_position_embeddings / (2 * math.pi)
    kept = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / s.factor)


class Decoder(nn.Module):
    """A causal language model whose forward pass is its loss."""

    def __init__(self, c: ModelConfig, dtype: torch.dtype = torch.float32, kernels: Kernels = TORCH):
        """dtype: of the hidden states and matrix products; parameters are made in torch's default dtype."""
        super().__init__()
        self.config, self.dtype = c, dtype
        self.model = Trunk(c, kernels)
        self.lm_head = Head(c, kernels)
        self._tie()

    def _tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def to_empty(self, **kwargs) -> "Decoder":
        """As nn.Module's, which gives every module tensors of its own and so would cut tied weights apart."""
        super().to_empty(**kwargs)
        self._tie()
        return self

    def rope_tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:  # (N,) -> (N, 1, head_dim / 2) twice
        """cos and sin of every token's angles, float32; computed once a forward pass and shared by all layers."""
        angle = positions[:, None] * rope_frequencies(self.config, positions.device)
        return angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)

    def hidden(self, batch: Batch) -> Tensor:  # (N, D)
        """The trunk: final hidden states of the batch's tokens, after the last norm."""
        x = self.model.embed_tokens(batch.tokens).to(self.dtype)
        cos, sin = self.rope_tables(batch.positions)
        for block in self.model.layers:
            x = block(x, cos, sin, batch.cu_seqlens, batch.extent)
        return self.model.norm(x)

    def logits(self, hidden: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:  # (N, D) -> (rows, V)
        """lm_head on the chosen rows only; needs an unsharded model."""
        return F.linear(hidden[rows], self.lm_head.weight.to(hidden.dtype))

    def forward(self, batch: Batch, scale: Tensor) -> Tensor:  # () float32 -> () float32
        """scale · Σ of the negative log-likelihood, in nats, over the batch's labelled tokens."""
        return self.lm_head(self.hidden(batch), batch.labels, scale)
