"""What must hold for every kernel, asked of all of them: gradients, precision, shapes, memory, torch.compile, errors.

The real kernels run here, in Triton's interpreter where there is no GPU. What only one of them does stands in the file
of its name.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_cases import CASES, DEVICE, above_of, outputs_and_gradients, relative_error
from nanomed.kernels.cross_entropy import _cross_entropy_

each_kernel = pytest.mark.parametrize("case", CASES, ids=str)
ROWWISE = CASES[:5]  # whose outputs are rows; the losses are sums over them


# --- right ---------------------------------------------------------------------------------------------------------


@each_kernel
def test_gradients_are_the_slopes(case):
    """Central differences in float64 through the kernel itself, against its own gradients; no formula is trusted."""
    tensors = case.inputs(3, 2, torch.float64)
    analytic = outputs_and_gradients(case.ours, tensors)
    n_outputs = len(analytic) - len(tensors)

    def weighted(*changed):  # one number: the outputs against the same gradients from above
        outputs = case.ours(*changed)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return sum((y * above_of(y, i)).sum() for i, y in enumerate(outputs))

    with torch.no_grad():
        for x, grad in zip(tensors, analytic[n_outputs:], strict=True):
            for i in range(x.numel()):
                before = x.view(-1)[i].item()
                values = []
                for step in (1e-6, -1e-6):
                    x.view(-1)[i] = before + step
                    values.append(weighted(*tensors).item())
                x.view(-1)[i] = before
                assert grad.reshape(-1)[i].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6, abs=1e-8)


@each_kernel
@settings(max_examples=12, deadline=None)
@given(n=st.integers(1, 9), d=st.one_of(st.integers(1, 70), st.integers(71, 700)), seed=st.integers(0, 99))
def test_equals_the_formula_at_any_size(case, n, d, seed):
    """float32, sizes off the powers of two, one row, one column: ours and the twin against float64."""
    tensors = case.inputs(n, d, seed=seed)
    right = outputs_and_gradients(case.formula, [x.double() for x in tensors])
    for function in (case.ours, case.twin):
        for x, exact in zip(outputs_and_gradients(function, tensors), right, strict=True):
            assert x.shape == exact.shape
            assert x.dtype == torch.float32
            torch.testing.assert_close(x.double(), exact, rtol=1e-5, atol=1e-5 * max(1.0, exact.abs().max().item()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_kernel
def test_low_precision_is_no_worse_than_eager(case, dtype):
    """Against float64 of the same rounded inputs: the error is at most eager torch's own, plus a little.

    The gradient that arrives at a loss is 1, as in training: any other one rounds its gradients twice.
    """
    tensors = case.inputs(16, 200, dtype)
    right = outputs_and_gradients(case.formula, [x.double() for x in tensors], at_a_loss=1.0)
    ours, eager = (outputs_and_gradients(f, tensors, at_a_loss=1.0) for f in (case.ours, case.formula))
    # On the CPU each chunk's part of dW is rounded once more.
    little = 1e-3 if case.name == "linear_cross_entropy" else 1e-4
    for i, (x, y, exact) in enumerate(zip(ours, eager, right, strict=True)):
        assert relative_error(x, exact) <= relative_error(y, exact) * 1.02 + little, (i, case.name)


@each_kernel
def test_the_same_bits_every_time(case):
    tensors = case.inputs(9, 130, torch.bfloat16)
    first, second = (outputs_and_gradients(case.ours, tensors) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@each_kernel
def test_no_rows(case):
    """An empty batch has empty outputs, a zero loss, and weights without a gradient."""
    tensors = case.inputs(0, 5)
    for x in outputs_and_gradients(case.ours, tensors):
        assert not x.any()


# --- memory --------------------------------------------------------------------------------------------------------


@each_kernel
def test_rows_may_lie_apart(case):
    """Inputs cut out of wider tensors, and gradients from above of any layout, give what contiguous ones give."""
    tensors = case.inputs(5, 33)
    apart = []
    for x in tensors:
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), 77.0, device=DEVICE)
        wide[..., : x.shape[-1]] = x.detach()
        apart.append(wide[..., : x.shape[-1]])
    for x, y in zip(*(outputs_and_gradients(case.ours, t) for t in (tensors, apart)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)  # matrix products choose their order by the layout
    leaves = [x.detach().requires_grad_() for x in tensors]
    outputs = case.ours(*leaves)
    first = outputs[0] if isinstance(outputs, tuple) else outputs
    ones = torch.autograd.grad(first, leaves, torch.ones(()).to(DEVICE).expand(first.shape), retain_graph=False)
    outputs = case.ours(*leaves)
    first = outputs[0] if isinstance(outputs, tuple) else outputs
    whole = torch.autograd.grad(first, leaves, torch.ones(first.shape, device=DEVICE))
    assert all(torch.equal(x, y) for x, y in zip(ones, whole, strict=True))


@each_kernel
def test_nothing_is_written_past_an_output(case, monkeypatch):
    """Every buffer that a kernel writes gets 64 canaries behind it; all of them live."""
    buffers, new_empty = [], torch.Tensor.new_empty

    def with_canaries(self, *size, **kwargs):
        shape = torch.Size(size[0]) if len(size) == 1 and not isinstance(size[0], int) else torch.Size(size)
        buffer = new_empty(self, shape.numel() + 64, **kwargs).fill_(42.0)
        buffers.append(buffer)
        return buffer[: shape.numel()].view(shape)

    tensors = case.inputs(5, 37)
    monkeypatch.setattr(torch.Tensor, "new_empty", with_canaries)
    outputs_and_gradients(case.ours, tensors)
    monkeypatch.undo()
    assert buffers
    assert all((buffer[-64:] == 42.0).all() for buffer in buffers)


def far_apart(n: int, shape: tuple, dtype=torch.float16) -> torch.Tensor:
    """(n, *shape) zeros in rows 2^30 + 16 elements apart: the third begins past 2^31. Only touched pages take memory."""
    stride, row = 2**30 + 16, torch.Size(shape).numel()
    inner = torch.empty(shape).stride()
    rows = torch.empty((n - 1) * stride + row, dtype=dtype, device=DEVICE).as_strided((n, *shape), (stride, *inner))
    return rows.zero_()


@pytest.mark.parametrize("case", CASES[:6], ids=str)
def test_offsets_past_2_to_the_31(case):
    """16,384 tokens of 152,064 logits lie past what int32 can count; here three rows in 4 GB of address space."""
    tensors = case.inputs(3, 20, torch.float16)
    if case.name == "cross_entropy":  # in place, on the rows themselves: kernel_cases would copy them
        logits = far_apart(3, (20,))
        logits.copy_(tensors[0].detach())
        near = tensors[0].detach().clone()
        scale, targets = torch.tensor(0.3, device=DEVICE), torch.tensor([3, 19, 0], device=DEVICE)
        losses = [_cross_entropy_(x, targets, scale, 0.0, True) for x in (near, logits)]
        assert torch.equal(*losses)
        assert torch.equal(near, logits)
        return
    far = [far_apart(3, x.shape[1:]) if len(x) == 3 else torch.empty_like(x) for x in tensors]
    for x, y in zip(far, tensors, strict=True):
        x.copy_(y.detach())
    for x, y in zip(*(outputs_and_gradients(case.ours, t) for t in (tensors, far)), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("case", ROWWISE, ids=str)
def test_a_nan_stays_in_its_row(case):
    """A broken token must not spread: all other rows, gradients too, keep their bits."""
    tensors = case.inputs(5, 20)
    clean = outputs_and_gradients(case.ours, tensors)
    with torch.no_grad():
        tensors[0][1] = float("nan")
    for x, y in zip(outputs_and_gradients(case.ours, tensors), clean, strict=True):
        if len(x) == 5:  # rows, not dw
            others = [0, 2, 3, 4]
            assert torch.equal(x[others], y[others])
