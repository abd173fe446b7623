"""Causal attention that never crosses a document: packed tokens in, packed tokens out.

A window holds the ends, wholes and beginnings of many documents. One dense mask over it would be right and slow: L²
scores where Σ len² suffice (documents of 200 tokens in windows of 2,048: a tenth), and torch's fused kernels refuse
arbitrary masks. Here the documents' borders decide instead (`cu_seqlens`, the convention of flash-attn):

- on an NVIDIA GPU flash-attention: 4 on Hopper and Blackwell where the package flash-attn-4 is installed, else torch's own 2;
- on the CPU plain matrix products over tiles of up to 256 queries, document by document. torch's own CPU kernel is
  slower in bf16, where its tiles are small, and its gradients are less exact.

Both hide in a custom op: torch.compile sees one opaque node of fixed shapes, whatever the borders are, and does not
recompile. So `cu_seqlens` has one length for the whole run: its last entry repeats. flash-attention 2 launches a block for
every piece of every entry, empty or not; given the padding and the longest possible document, on an H100 that took half as
long again as the attention itself (windows of 4,096, 64 entries, 7 documents). So `extent` says, in the CPU's memory where
looking waits for nothing, how many pieces there are and how long the longest is.
"""

import importlib.metadata
import warnings
from itertools import pairwise

import torch
from torch import Tensor

_CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
flash_attn_4 = None
if (9, 0) <= _CAPABILITY < (12, 0):
    try:
        importlib.metadata.version("flash-attn-4")  # flash-attn 2 brings an older folder of the same name
        from flash_attn.cute import interface as flash_attn_4  # compiles for seconds at its first call

        warnings.filterwarnings("ignore", "Argument aux_data")  # its compiler's, about an argument that is not used
    except importlib.metadata.PackageNotFoundError:
        pass
    except (ImportError, OSError) as error:
        warnings.warn(f"flash-attn-4 is installed and cannot be imported ({error}): attention is torch's own", stacklevel=1)
TILE_SCORES = 1 << 20  # heads · queries · keys of a tile on the CPU, roughly: they stay in its cache


def attention(
    q: Tensor,  # (N, H, head_dim)
    k: Tensor,  # (N, K, head_dim), H a multiple of K
    v: Tensor,  # (N, K, head_dim)
    cu_seqlens: Tensor,  # (docs + 1,) int32: document i is tokens [cu_seqlens[i], cu_seqlens[i + 1])
    extent: Tensor,  # (2,) int64 on the CPU: documents before the last entry begins to repeat, tokens of the longest
    window: int | None = None,  # a token sees itself and the window - 1 tokens before it; None: all before it
) -> Tensor:  # (N, H, head_dim)
    """softmax(q kᵀ / sqrt(head_dim)) v, causal within each document. The GPU kernels know no float32: there it is slow."""
    if has_fused_kernels(q):
        return torch.ops.nanomed.packed_attention(q, k, v, cu_seqlens, extent, window or 0)[0]
    return torch.ops.nanomed.document_attention(q, k, v, cu_seqlens, window or 0)


def has_fused_kernels(q: Tensor) -> bool:
    """flash-attention needs bf16 or fp16 and an NVIDIA GPU from Ampere on."""
    return q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16) and _CAPABILITY >= (8, 0)


# --- the GPU's way -------------------------------------------------------------------------------------------------


@torch.library.custom_op("nanomed::packed_attention", mutates_args=())
def _packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, extent: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """(result, log Σ exp of every row's scores, float32 (H, N))."""
    return _flash_forward(q, k, v, *_launch(cu_seqlens, extent, window))


@torch.library.custom_op("nanomed::packed_attention_backward", mutates_args=())
def _packed_attention_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, cu_seqlens: Tensor, extent: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _flash_backward(dy, q, k, v, y, lse, *_launch(cu_seqlens, extent, window))


def _launch(cu_seqlens: Tensor, extent: Tensor, window: int) -> tuple[Tensor, int, int]:
    """Borders without padding, the longest document, and how many keys a query sees to its left (-1: all)."""
    n_docs, longest = extent.tolist()
    return cu_seqlens[: n_docs + 1], longest, window - 1


def takes_flash_attn_4(dtype: torch.dtype, head_dim: int) -> bool:
    """Is it there, and for such heads? Deterministic runs keep torch's, which is known to repeat its bits."""
    fits = dtype in (torch.bfloat16, torch.float16) and head_dim in (64, 96, 128)
    return flash_attn_4 is not None and fits and not torch.are_deterministic_algorithms_enabled()


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, left: int) -> tuple[Tensor, Tensor]:
    if takes_flash_attn_4(q.dtype, q.shape[-1]):
        return flash_attn_4._flash_attn_fwd(q, k, v, return_lse=True, **_flash_4_arguments(borders, longest, left))[:2]
    y, lse, *_ = torch.ops.aten._flash_attention_forward(  # what torch.nn.attention.varlen is made of
        q, k, v, borders, borders, longest, longest, 0.0, left < 0, False, window_size_left=left, window_size_right=0
    )
    return y, lse


def _flash_backward(dy, q, k, v, y, lse, borders: Tensor, longest: int, left: int) -> tuple[Tensor, Tensor, Tensor]:
    if takes_flash_attn_4(q.dtype, q.shape[-1]):
        return flash_attn_4._flash_attn_bwd(q, k, v, y, dy, lse, **_flash_4_arguments(borders, longest, left))[:3]
    no_dropout = q.new_empty(2, dtype=torch.uint64), q.new_empty(0)
    return torch.ops.aten._flash_attention_backward(
        dy, q, k, v, y, lse, borders, borders, longest, longest, 0.0, left < 0, *no_dropout,
        window_size_left=left, window_size_right=0,
    )  # fmt: skip


def _flash_4_arguments(borders: Tensor, longest: int, left: int) -> dict:
    """What both of its functions are told; left: as `_launch` has it."""
    return dict(
        cu_seqlens_q=borders, cu_seqlens_k=borders, max_seqlen_q=longest, max_seqlen_k=longest,
        causal=True, window_size_left=None if left < 0 else left, window_size_right=0,
    )  # fmt: skip


@_packed_attention.register_fake
def _(q, k, v, cu_seqlens, extent, window):
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@_packed_attention_backward.register_fake
def _(dy, q, k, v, y, lse, cu_seqlens, extent, window):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save_packed(ctx, inputs, output):
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.set_materialize_grads(False)


def _packed_backward(ctx, dy, _dlse):
    grads = torch.ops.nanomed.packed_attention_backward(dy, *ctx.saved_tensors, ctx.window)
    return *grads, None, None, None


_packed_attention.register_autograd(_packed_backward, setup_context=_save_packed)


# --- the CPU's way -------------------------------------------------------------------------------------------------


def _tiles(cu_seqlens: Tensor, n_heads: int, window: int):
    """(first row, end row, first key) of every tile of queries: it sees the keys [first key, end row) of its document."""
    borders = cu_seqlens.tolist()
    for start, stop in pairwise(borders):
        if start == borders[-1]:  # from here on it repeats
            return
        rows = min(256, max(32, TILE_SCORES // (n_heads * max(1, stop - start))))
        for a in range(start, stop, rows):
            yield a, min(a + rows, stop), max(start, a - window + 1) if window else start


def _grouped(x: Tensor, n_kv: int) -> Tensor:
    """(m, H, d) -> (K, H/K · m, d): the queries of one key/value head together."""
    m, n_heads, d = x.shape
    return x.reshape(m, n_kv, n_heads // n_kv, d).permute(1, 2, 0, 3).reshape(n_kv, -1, d)


def _ungroup(y: Tensor, x: Tensor) -> None:
    """The inverse: write y (K, H/K · m, d) into x (m, H, d)."""
    m, n_heads, d = x.shape
    x.view(m, len(y), n_heads // len(y), d).copy_(y.view(len(y), n_heads // len(y), m, d).permute(2, 0, 1, 3))


def _probabilities(q: Tensor, k: Tensor, a: int, lo: int, window: int) -> Tensor:
    """Softmax over the keys lo, lo + 1, ... of a tile of queries from row a: (K, g · m, d), (K, n, d) -> (K, g · m, n).

    Scores are formed in float32, since a rounded score is a wrong factor of exp; the probabilities are rounded to q's dtype.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.bmm(q.to(wide), k.to(wide).transpose(1, 2))
    keys = torch.arange(lo, lo + k.shape[1], device=k.device)
    rows = keys[a - lo :, None]
    by_row = scores.unflatten(1, (-1, len(rows)))
    by_row[..., a - lo :].masked_fill_(keys[a - lo :] > rows, float("-inf"))  # the future
    if window:
        by_row.masked_fill_(keys <= rows - window, float("-inf"))
    return torch.softmax(scores, dim=-1).to(q.dtype)


@torch.library.custom_op("nanomed::document_attention", mutates_args=())
def _document_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int) -> Tensor:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    k, v = k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()
    for a, b, lo in _tiles(cu_seqlens, q.shape[1], window):
        p = _probabilities(_grouped(q[a:b] * q.shape[-1] ** -0.5, len(k)), k[:, lo:b], a, lo, window)
        _ungroup(torch.bmm(p, v[:, lo:b]), out[a:b])
    return out


@_document_attention.register_fake
def _(q, k, v, cu_seqlens, window):
    return q.new_empty(q.shape)


@torch.library.custom_op("nanomed::document_attention_backward", mutates_args=())
def _document_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Recomputes the probabilities tile by tile: nothing of size n² is ever kept. dk and dv add up in float32."""
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    scale, wide = q.shape[-1] ** -0.5, torch.promote_types(q.dtype, torch.float32)
    k, v = k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()
    dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    for a, b, lo in _tiles(cu_seqlens, q.shape[1], window):
        q_tile, dout_tile = _grouped(q[a:b] * scale, len(k)), _grouped(dout[a:b], len(k))
        p = _probabilities(q_tile, k[:, lo:b], a, lo, window)
        dv[:, lo:b] += torch.bmm(p.transpose(1, 2), dout_tile)
        dp = torch.bmm(dout_tile, v[:, lo:b].transpose(1, 2))
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
        _ungroup(torch.bmm(ds, k[:, lo:b]).mul_(scale), dq[a:b])
        dk[:, lo:b] += torch.bmm(ds.transpose(1, 2), q_tile)
    return dq, dk.transpose(0, 1).to(k.dtype).contiguous(), dv.transpose(0, 1).to(v.dtype).contiguous()


@_document_attention_backward.register_fake
def _(dout, q, k, v, cu_seqlens, window):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dout):
    grads = torch.ops.nanomed.document_attention_backward(dout, *ctx.saved_tensors, ctx.window)
    return *grads, None, None


_document_attention.register_autograd(_backward, setup_context=_save)
