"""The chunked linear cross-entropy against F.cross_entropy over whole logits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomed.kernels import linear_cross_entropy as module
from nanomed.kernels.common import triton
from nanomed.kernels.linear_cross_entropy import IGNORED

V, D = 23, 12
WAYS = [module.linear_cross_entropy_torch] + [module.linear_cross_entropy] * (triton is not None)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module", params=WAYS, ids=lambda f: f.__name__)
def linear_cross_entropy(request):
    """The function itself and its torch twin."""
    return request.param


def inputs(n, vocab=V, d=D, ignored=(), seed=0):
    """hidden (n, d), weight (vocab, d), targets (n,) with IGNORED at the given rows."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(n, d, generator=generator), torch.randn(vocab, d, generator=generator)
    targets = torch.randint(0, vocab, (n,), generator=generator)
    targets[list(ignored)] = IGNORED
    return hidden.to(DEVICE), weight.to(DEVICE), targets.to(DEVICE)


def eager(hidden, weight, targets, scale):
    """The same loss from whole logits."""
    return F.cross_entropy((hidden @ weight.T).float(), targets, ignore_index=IGNORED, reduction="sum") * scale


def exact(hidden, weight, targets, scale):
    """The same in float64, from the values as they stand in the inputs' dtype."""
    logits = hidden.double() @ weight.double().T
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") * scale.double()


def with_grads(loss_of, hidden, weight, targets, scale, upstream=1.0):
    """(loss, dX, dW) of loss_of; upstream: the gradient that arrives at the loss."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = loss_of(hidden, weight, targets, scale)
    (loss * upstream).backward()
    return loss.detach(), hidden.grad, weight.grad


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    chunk=st.integers(1, 50),
    scale=st.floats(1e-4, 3.0),
    upstream=st.sampled_from([1.0, -0.25, 7.0]),
    data=st.data(),
)
def test_equals_cross_entropy(linear_cross_entropy, n, chunk, scale, upstream, data):
    """Any N, chunks that do not divide it, some targets ignored, any scale and any gradient from above."""
    ignored = data.draw(st.sets(st.integers(0, n - 1)))
    args = (*inputs(n, ignored=ignored), torch.tensor(scale, device=DEVICE))
    got = with_grads(lambda *a: linear_cross_entropy(*a, chunk=chunk), *args, upstream)
    wanted = with_grads(exact, *args, upstream)
    for name, x, y in zip(("loss", "dX", "dW"), got, wanted, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(
            x.double(),
            y.double(),
            rtol=1e-5,
            atol=1e-5 * max(1.0, scale * abs(upstream)),
            msg=lambda m, name=name: f"{name}: {m}",
        )
    assert not got[1][list(ignored)].any()  # exactly 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_ignored_is_zero_with_zero_gradients(linear_cross_entropy, dtype):
    """The empty batches of the last ranks, where the ranks do not divide a step."""
    hidden, weight, targets = inputs(7, ignored=range(7))
    for chunk in (3, 100):
        args = (hidden.to(dtype), weight, targets, torch.tensor(1.0, device=DEVICE))
        got = with_grads(lambda *a, c=chunk: linear_cross_entropy(*a, chunk=c), *args)
        for x in got:
            assert not x.any()


def test_huge_logits_stay_finite(linear_cross_entropy):
    hidden, weight, targets = inputs(9)
    args = (hidden * 1e3, weight * 1e3, targets, torch.tensor(0.1, device=DEVICE))
    loss, dx, dw = with_grads(linear_cross_entropy, *args)
    assert loss > 0
    assert all(x.isfinite().all() for x in (loss, dx, dw))


def test_no_grad_gives_the_same_loss_and_keeps_nothing(linear_cross_entropy):
    args = (*inputs(30, ignored=[4]), torch.tensor(0.3, device=DEVICE))
    loss = with_grads(linear_cross_entropy, *args)[0]
    hidden, weight = (x.clone().requires_grad_() for x in args[:2])
    with torch.no_grad():
        alone = linear_cross_entropy(hidden, weight, *args[2:], chunk=7)
    assert not alone.requires_grad
    assert alone.item() == pytest.approx(loss.item(), rel=1e-6)


def test_a_second_backward_is_refused(linear_cross_entropy):
    """The gradients are made once, in the forward pass; scaled in place they would be wrong the second time."""
    hidden, weight, targets = inputs(5)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, targets, torch.tensor(1.0, device=DEVICE))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


@pytest.mark.parametrize("chunk", [1, 16, 100, 1000])
def test_chunk_size_does_not_change_the_result(linear_cross_entropy, chunk):
    args = (*inputs(100, ignored=range(0, 100, 7)), torch.tensor(0.01, device=DEVICE))
    for x, y in zip(
        with_grads(lambda *a: linear_cross_entropy(*a, chunk=chunk), *args),
        with_grads(lambda *a: linear_cross_entropy(*a, chunk=33), *args),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [8, 64, 1024])
def test_bf16_is_no_worse_than_eager_bf16(linear_cross_entropy, chunk):
    """Against float64 of the same bf16 values: the error may be eager's own plus a little, at any number of chunks.

    A little, because dW's partial products are rounded once each on the CPU; a bf16 accumulator would be 1 % off.
    """
    hidden, weight, targets = inputs(512, vocab=200, d=64, ignored=range(0, 512, 5))
    args = ((hidden * 0.3).bfloat16(), (weight * 0.3).bfloat16(), targets, torch.tensor(1 / 400, device=DEVICE))
    wanted = with_grads(exact, *(x.double() for x in args[:2]), *args[2:])
    for name, ours, theirs, right in zip(
        ("loss", "dX", "dW"),
        with_grads(lambda *a: linear_cross_entropy(*a, chunk=chunk), *args),
        with_grads(eager, *args),
        wanted,
        strict=True,
    ):
        ours, theirs = ((x.double() - right).norm() / right.norm() for x in (ours, theirs))
        assert ours <= theirs + 1e-3, (name, ours, theirs)


def test_fp32_weight_under_bf16_hidden_gets_an_fp32_gradient(linear_cross_entropy):
    """The master weight's gradient is accumulated in float32 and never rounded to bf16 as a whole."""
    hidden, weight, targets = inputs(256, vocab=100, d=32)
    args = (hidden.bfloat16(), weight, targets, torch.tensor(1 / 256, device=DEVICE))
    _, dx, dw = with_grads(lambda *a: linear_cross_entropy(*a, chunk=16), *args)
    assert (dx.dtype, dw.dtype) == (torch.bfloat16, torch.float32)
    assert (dw != dw.bfloat16().float()).any()  # finer than bf16
    right = with_grads(exact, hidden.bfloat16().double(), weight.bfloat16().double(), targets, args[3])[2]
    assert (dw - right).norm() / right.norm() < 0.01


def test_the_logits_never_exist_whole(linear_cross_entropy):
    """No tensor of the forward and backward pass is as large as N x V."""
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            nonlocal largest
            out = op(*args, **(kwargs or {}))
            sizes = [x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
            largest = max([largest, *sizes])
            return out

    args = (*inputs(400, vocab=300, d=8), torch.tensor(1.0, device=DEVICE))
    with Largest():
        with_grads(lambda *a: linear_cross_entropy(*a, chunk=50), *args)
    assert 50 * 300 <= largest < 400 * 300 / 2


def test_dw_is_rounded_inside_its_own_memory():
    """More rows than a slab, so that slabs overwrite what others held: the bits of a cast, and no second buffer."""
    dw = torch.randn(9001, 6, device=DEVICE)
    right, bytes_before = dw.bfloat16(), dw.untyped_storage().nbytes()
    rounded = module._rounded(dw, torch.bfloat16)
    assert torch.equal(rounded, right)
    assert rounded.is_contiguous()
    assert (rounded.data_ptr(), rounded.untyped_storage().nbytes()) == (dw.data_ptr(), bytes_before)
