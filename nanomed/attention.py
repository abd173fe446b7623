"""Causal attention that never crosses a document: packed tokens in, packed tokens out.

A window holds the ends, wholes and beginnings of many documents. One dense mask over it would be right and slow: L²
scores where Σ len² suffice (documents of 200 tokens in windows of 2,048: a tenth), and torch's fused kernels refuse
arbitrary masks. All three ways below take the documents' borders instead (`cu_seqlens`, the convention of
flash-attn):

- flash-attn, where that package is installed (its Hopper build is the fastest);
- torch's own `varlen_attn`, the same algorithm inside torch, on any recent NVIDIA GPU;
- on the CPU, one call of torch's flash kernel per document. It hides in a custom op: torch.compile then sees one opaque
  node of fixed shape, whatever the borders are, and does not recompile.

Entries of `cu_seqlens` may repeat (empty documents): its length is constant in a run, so that nothing recompiles.
"""

import inspect
from itertools import pairwise

import torch
from torch import Tensor

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None
try:
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.13 must be told of grouped heads; earlier releases take them as they come.
    _VARLEN_GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
except ImportError:
    varlen_attn = None


def attention(
    q: Tensor,  # (N, H, head_dim)
    k: Tensor,  # (N, K, head_dim), H a multiple of K
    v: Tensor,  # (N, K, head_dim)
    cu_seqlens: Tensor,  # (docs + 1,) int32: document i is tokens [cu_seqlens[i], cu_seqlens[i + 1])
    max_seqlen: int,  # no document is longer
    window: int | None = None,  # a token sees itself and the window - 1 tokens before it; None: all before it
) -> Tensor:  # (N, H, head_dim)
    """softmax(q kᵀ / sqrt(head_dim)) v, causal within each document. float32 needs the CPU, bfloat16 runs anywhere."""
    if q.device.type != "cuda":
        return torch.ops.nanomed.document_sdpa(q, k, v, cu_seqlens, window or 0)[0]
    left = -1 if window is None else window - 1
    if flash_attn_varlen_func is not None:
        return flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True, window_size=(left, 0)
        )
    gqa = _VARLEN_GQA if q.shape[1] != k.shape[1] else {}
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(left, 0), **gqa)


# --- the CPU's way -------------------------------------------------------------------------------------------------


def _documents(cu_seqlens: Tensor):
    return [(a, b) for a, b in pairwise(cu_seqlens.tolist()) if b > a]


def _heads_first(x: Tensor) -> Tensor:  # (n, H, d) -> (1, H, n, d), a view
    return x.transpose(0, 1).unsqueeze(0)


def _band(n: int, window: int, like: Tensor) -> Tensor | None:
    """Additive mask (n, n) of a causal sliding window; None where plain causal attention is the same."""
    if not window or n <= window:
        return None
    i = torch.arange(n)
    seen = (i[:, None] >= i) & (i[:, None] - i < window)
    return torch.zeros(n, n, dtype=like.dtype).masked_fill_(~seen, float("-inf"))


@torch.library.custom_op("nanomed::document_sdpa", mutates_args=(), device_types="cpu")
def _document_sdpa(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:2], dtype=torch.float32 if q.dtype == torch.bfloat16 else q.dtype)
    for a, b in _documents(cu_seqlens):
        mask = _band(b - a, window, q)
        o, s = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(_heads_first(x[a:b]) for x in (q, k, v)), 0.0, mask is None, attn_mask=mask
        )
        _heads_first(out[a:b]).copy_(o)
        _heads_first(lse[a:b].unsqueeze(-1)).copy_(s.unsqueeze(-1))
    return out, lse


@_document_sdpa.register_fake
def _(q, k, v, cu_seqlens, window):
    lse_dtype = torch.float32 if q.dtype == torch.bfloat16 else q.dtype
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=lse_dtype)


@torch.library.custom_op("nanomed::document_sdpa_backward", mutates_args=(), device_types="cpu")
def _document_sdpa_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    for a, b in _documents(cu_seqlens):
        mask = _band(b - a, window, q)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(_heads_first(x[a:b]) for x in (dout, q, k, v, out)),
            _heads_first(lse[a:b].unsqueeze(-1)).squeeze(-1),
            0.0,
            mask is None,
            attn_mask=mask,
        )
        for dx, grad in zip((dq, dk, dv), grads, strict=True):
            _heads_first(dx[a:b]).copy_(grad)
    return dq, dk, dv


@_document_sdpa_backward.register_fake
def _(dout, q, k, v, out, lse, cu_seqlens, window):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, cu_seqlens, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _backward(ctx, dout, _):
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    grads = torch.ops.nanomed.document_sdpa_backward(dout, q, k, v, out, lse, cu_seqlens, ctx.window)
    return *grads, None, None


_document_sdpa.register_autograd(_backward, setup_context=_save)
