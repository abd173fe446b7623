"""Attention by document against one dense masked reference, in every implementation that this machine has."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from nanomed import attention as module
from nanomed.attention import attention


def dense(q, k, v, cu_seqlens, window):
    """softmax over one (N, N) mask, in float64: (N, H, d), (N, K, d) twice, (docs + 1,) -> (N, H, d)."""
    n, n_heads = q.shape[:2]
    k, v = (x.repeat_interleave(n_heads // x.shape[1], dim=1) for x in (k, v))
    i = torch.arange(n, device=q.device)
    document = torch.searchsorted(cu_seqlens.long(), i, right=True)
    seen = (document[:, None] == document) & (i[:, None] >= i)
    if window is not None:
        seen &= i[:, None] - i < window
    q, k, v = q.double(), k.double(), v.double()
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


# (device, dtype, the implementation that must run or None where there is only one, tolerance)
CASES = [("cpu", torch.float64, None, 1e-12), ("cpu", torch.float32, None, 1e-5), ("cpu", torch.bfloat16, None, 4e-2)]
if torch.cuda.is_available():  # built here, so that a machine without a GPU has nothing to skip
    CASES += [("cuda", torch.bfloat16, name, 4e-2) for name in ["torch"] + ["flash_attn_4"] * (module.flash_attn_4 is not None)]
HEAD_DIM = {"cpu": 16, "cuda": 64}  # flash-attn-4 is not asked for less


@pytest.fixture(params=CASES, ids=lambda case: f"{case[2] or case[0]}-{str(case[1])[6:]}", scope="module")
def case(request):
    """(device, dtype, tolerance), with `attention` held to one implementation, on the CPU to its smallest tiles (32)."""
    device, dtype, name, tolerance = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TILE_SCORES", 1)
        if name == "torch":
            patch.setattr(module, "flash_attn_4", None)
        yield device, dtype, tolerance


def inputs(lengths, n_heads, n_kv, head_dim, device, dtype, seed=0):
    """q, k, v that want gradients, dy, and cu_seqlens; a length of 0 repeats an entry."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [n_heads, n_kv, n_kv, n_heads]
    q, k, v, dy = (torch.randn(sum(lengths), h, head_dim, generator=generator).to(device, dtype) for h in sizes)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    return [x.requires_grad_() for x in (q, k, v)], dy, cu_seqlens


def check(lengths, heads, window, case):
    device, dtype, tolerance = case
    qkv, dy, cu_seqlens = inputs(lengths, *heads, HEAD_DIM[device], device, dtype)
    y = attention(*qkv, cu_seqlens, torch.tensor([len(lengths), max(lengths)]), window)
    assert y.dtype == dtype
    expected = dense(*qkv, cu_seqlens, window)
    compare = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance, check_dtype=False)
    compare(y, expected)
    wanted = torch.autograd.grad(expected, qkv, dy.double())
    for got, want, name in zip(torch.autograd.grad(y, qkv, dy), wanted, "qkv", strict=True):
        compare(got, want, msg=lambda text, name=name: f"d{name}: {text}")


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 20), st.integers(30, 100)), min_size=1, max_size=6).filter(any),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 2), (4, 1)]),
    window=st.one_of(st.none(), st.integers(1, 110)),
)
def test_equals_the_dense_block_diagonal_mask(case, lengths, heads, window):
    """Values and gradients, for any borders, grouped heads and sliding windows."""
    check(lengths, heads, window, case)


@pytest.mark.parametrize("window", [None, 1, 2, 39, 40, 1000])
def test_the_corners(case, window):
    """One-token documents, repeated borders first, within and last, windows of 1 and beyond the longest document."""
    check([0, 1, 1, 0, 0, 40, 1, 0, 0], (4, 2), window, case)


@pytest.mark.parametrize("window", [None, 100, 256, 400])
def test_documents_of_several_tiles(case, window, monkeypatch):
    """The largest tiles (256): documents that end at their borders and one token beyond, windows that reach over them."""
    monkeypatch.setattr(module, "TILE_SCORES", 1 << 20)
    check([256, 257, 3, 600], (4, 2), window, case)


def test_a_window_of_one_sees_only_itself(case):
    device, dtype, tolerance = case
    (q, k, v), _, cu_seqlens = inputs([7, 3], 4, 4, HEAD_DIM[device], device, dtype)
    torch.testing.assert_close(attention(q, k, v, cu_seqlens, torch.tensor([2, 7]), 1), v, rtol=tolerance, atol=tolerance)


def test_documents_do_not_see_each_other(case):
    """The second document's output keeps its bits when the first one changes, and the other way round."""
    device, dtype, _ = case
    (q, k, v), _, cu_seqlens = inputs([9, 14], 4, 2, HEAD_DIM[device], device, dtype)
    extent = torch.tensor([2, 14])
    before = attention(q, k, v, cu_seqlens, extent)
    for changed, kept in ((slice(0, 9), slice(9, 23)), (slice(9, 23), slice(0, 9))):
        q2, k2, v2 = (x.detach().clone() for x in (q, k, v))
        for x in (q2, k2, v2):
            x[changed] += 1
        after = attention(q2, k2, v2, cu_seqlens, extent)
        assert torch.equal(before[kept], after[kept])
        assert not torch.equal(before[changed], after[changed])


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_custom_ops_keep_torch_s_rules(dtype, window):
    """Schema, fake tensors (what torch.compile sees), autograd registration."""
    qkv, dy, cu_seqlens = inputs([5, 0, 1, 6], 4, 2, 8, "cpu", dtype)
    torch.library.opcheck(torch.ops.nanomed.document_attention.default, (*qkv, cu_seqlens, window))
    with torch.no_grad():
        plain = [x.detach() for x in qkv]
        torch.library.opcheck(torch.ops.nanomed.document_attention_backward.default, (dy, *plain, cu_seqlens, window))


@pytest.mark.parametrize("window", [None, 2])
def test_gradcheck(window):
    qkv, _, cu_seqlens = inputs([3, 0, 1, 4], 2, 1, 4, "cpu", torch.float64)
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, cu_seqlens, torch.tensor([4, 4]), window), qkv)


@pytest.mark.parametrize("window", [None, 3])
def test_flash_attention_is_launched_for_the_documents_that_are_there(window, monkeypatch):
    """A stand-in for the GPU's kernel: no padding of cu_seqlens reaches it, and other borders are no other graph."""
    launches = []

    def forward(q, k, v, borders, longest, left):
        launches.append((borders.tolist(), longest, left))
        y = torch.ops.nanomed.document_attention(q, k, v, borders, left + 1)
        return y, torch.zeros(q.shape[1], len(q))

    def backward(dy, q, k, v, y, lse, borders, longest, left):
        launches.append((borders.tolist(), longest, left))
        return torch.ops.nanomed.document_attention_backward(dy, q, k, v, borders, left + 1)

    monkeypatch.setattr(module, "_flash_forward", forward)
    monkeypatch.setattr(module, "_flash_backward", backward)
    monkeypatch.setattr(module, "has_fused_kernels", lambda q: True)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(attention, fullgraph=True, dynamic=False, backend="aot_eager")
    for lengths in ([5, 7], [1, 9, 2]):
        qkv, dy, borders = inputs(lengths, 4, 2, 8, "cpu", torch.float32)
        extent = torch.tensor([len(lengths), max(lengths)])
        padded = torch.nn.functional.pad(borders, (0, 6 - len(borders)), value=12)
        expected = torch.ops.nanomed.document_attention(*qkv, borders, window or 0)
        y = compiled(*qkv, padded, extent, window)
        torch.testing.assert_close(y, expected)
        for got, want in zip(*(torch.autograd.grad(x, qkv, dy) for x in (y, expected)), strict=True):
            torch.testing.assert_close(got, want)
        assert launches[-2:] == [(borders.tolist(), max(lengths), (window or 0) - 1)] * 2
    assert counters["stats"]["unique_graphs"] == 1
    qkv, dy, borders = inputs([5, 7], 4, 2, 8, "cpu", torch.float32)
    rest = (borders, torch.tensor([2, 7]), window or 0)
    torch.library.opcheck(torch.ops.nanomed.packed_attention.default, (*qkv, *rest))
    plain, y = [x.detach() for x in qkv], torch.zeros(12, 4, 8)
    torch.library.opcheck(torch.ops.nanomed.packed_attention_backward.default, (dy, *plain, y, torch.zeros(4, 12), *rest))


@pytest.mark.parametrize("window", [None, 3])
def test_flash_attn_4_is_called_by_its_names(window, monkeypatch):
    """A stand-in with its functions' signatures; other sizes of heads than it is tuned for go to torch's."""

    class StandIn:
        @staticmethod
        def _flash_attn_fwd(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window_size_left,
                            window_size_right, return_lse):  # fmt: skip
            assert (max_seqlen_q, max_seqlen_k, causal, window_size_right, return_lse) == (7, 7, True, 0, True)
            assert cu_seqlens_q is cu_seqlens_k
            left = -1 if window_size_left is None else window_size_left
            y = torch.ops.nanomed.document_attention(q, k, v, cu_seqlens_q, left + 1)
            return y, torch.zeros(q.shape[1], len(q)), None, None, None

        @staticmethod
        def _flash_attn_bwd(q, k, v, out, dout, lse, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal,
                            window_size_left, window_size_right):  # fmt: skip
            assert (max_seqlen_q, max_seqlen_k, causal, window_size_right) == (7, 7, True, 0)
            assert lse.shape == (q.shape[1], len(q))
            left = -1 if window_size_left is None else window_size_left
            return torch.ops.nanomed.document_attention_backward(dout, q, k, v, cu_seqlens_k, left + 1)

    monkeypatch.setattr(module, "flash_attn_4", StandIn)
    monkeypatch.setattr(module, "has_fused_kernels", lambda q: True)
    qkv, dy, borders = inputs([5, 7], 4, 2, 64, "cpu", torch.bfloat16)
    y = attention(*qkv, borders, torch.tensor([2, 7]), window)
    expected = torch.ops.nanomed.document_attention(*qkv, borders, window or 0)
    torch.testing.assert_close(y, expected)
    for got, want in zip(*(torch.autograd.grad(x, qkv, dy) for x in (y, expected)), strict=True):
        torch.testing.assert_close(got, want)
    takes = module.takes_flash_attn_4
    assert takes(torch.bfloat16, 64)
    assert not takes(torch.bfloat16, 80)
    assert not takes(torch.float32, 64)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not takes(torch.bfloat16, 64)
