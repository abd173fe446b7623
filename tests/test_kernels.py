"""What must hold for every kernel, asked of all of them: gradients, precision, shapes, memory, torch.compile, errors.

The real kernels run here, in Triton's interpreter where there is no GPU. What only one of them does stands in the file
of its name.
"""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from kernel_cases import CASES, DEVICE, above_of, angles, outputs_and_gradients, relative_error, targets_for
from nanomed.kernels.cross_entropy import _cross_entropy_, _scale_, cross_entropy
from nanomed.kernels.linear_cross_entropy import linear_cross_entropy
from nanomed.kernels.norm_rope import _norm_rope, _norm_rope_backward, norm_rope
from nanomed.kernels.rms_norm import _add_rms_norm, _rms_norm, _rms_norm_backward, add_rms_norm, rms_norm
from nanomed.kernels.rope import _rope, rope
from nanomed.kernels.swiglu import _swiglu, _swiglu_backward, swiglu

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


@pytest.mark.parametrize("case", CASES[:5], ids=str)
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


# --- torch's machinery ---------------------------------------------------------------------------------------------


def registered_ops() -> dict:
    """Every op the kernels register, with arguments for it; strided rows, and tensors that want gradients where it has any."""
    x, y = (torch.randn(4, 6, device=DEVICE) for _ in range(2))
    apart, w = torch.randn(4, 9, device=DEVICE)[:, :6], torch.randn(6, device=DEVICE)
    rstd = torch.rand(4, device=DEVICE)
    q, k = torch.randn(4, 3, 8, device=DEVICE), torch.randn(4, 2, 8, device=DEVICE)
    q_apart, w8 = torch.randn(4, 3, 11, device=DEVICE)[..., :8], torch.randn(8, device=DEVICE)
    rest = 1e-5, *angles(4, 4, q.dtype)
    one = torch.tensor(0.5, device=DEVICE)
    wants = lambda *tensors: [t.clone().requires_grad_() for t in tensors]  # noqa: E731
    return {
        _rms_norm: [(*wants(x, w), 1e-5), (apart, w, 1e-5)],
        _add_rms_norm: [(*wants(x, y, w), 1e-5), (apart, y, w, 1e-5)],
        _rms_norm_backward: [(y, x, x, w, rstd), (y, None, apart, w.bfloat16(), rstd)],
        _swiglu: [wants(x, y), (apart, y)],
        _swiglu_backward: [(x, y, apart)],
        _rope: [(*wants(q, k), *angles(4, 4, q.dtype), False), (q, k, *angles(4, 4, q.dtype), True)],
        _norm_rope: [(*wants(q, k, w8, w8), *rest), (q_apart, k, w8, w8, *rest)],
        _norm_rope_backward: [(q, q_apart, w8.bfloat16(), *rest)],
        _cross_entropy_: [(x, targets_for(4, 6), one, 0.0, True), (apart, targets_for(4, 6), one, 0.1, False)],
        _scale_: [(x, one), (apart, one)],
    }


@pytest.mark.parametrize("op", registered_ops(), ids=lambda op: op._qualname.split("::")[1])
def test_opcheck(op):
    """torch's own examination: schema, fake implementation, autograd registration, tracing with dynamic shapes."""
    for args in registered_ops()[op]:
        torch.library.opcheck(op, args)


def test_every_registered_op_is_examined():
    """Found in the sources, so that a new op cannot be forgotten."""
    from conftest import ROOT

    sources = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    names = set(re.findall(r'custom_op\("([^"]+)"', sources))
    assert names == {op._qualname for op in registered_ops()}


@each_kernel
def test_compiles_as_one_graph(case):
    tensors = case.inputs(5, 12)
    compiled = torch.compile(case.ours, fullgraph=True, backend="aot_eager")
    for x, y in zip(*(outputs_and_gradients(f, tensors) for f in (compiled, case.ours)), strict=True):
        torch.testing.assert_close(x, y)
    torch._dynamo.reset()


def test_compiles_with_inductor():
    """All of them in one function, through the real compiler."""

    def step(x, residual, w, q, k, cos, sin, weight):
        y, s = add_rms_norm(x, residual, w, 1e-5)
        q, k = rope(*norm_rope(q, k, w, s[0], 1e-5, cos, sin), cos, sin)
        h = swiglu(rms_norm(s, w, 1e-5), y) + (q.sum() + k.sum())
        return linear_cross_entropy(h, weight, targets_for(4, 10), torch.tensor(0.5, device=DEVICE), 0.0, 3)

    x, residual = torch.randn(4, 8, device=DEVICE), torch.randn(4, 8, device=DEVICE)
    q, k = torch.randn(4, 3, 8, device=DEVICE), torch.randn(4, 2, 8, device=DEVICE)
    tensors = [x, residual, torch.randn(8, device=DEVICE), q, k]
    rest = [*angles(4, 4, q.dtype)]
    weight = torch.randn(10, 8, device=DEVICE)
    results = [
        outputs_and_gradients(lambda *t, f=f: f(*t[:5], *rest, t[5]), [*tensors, weight])
        for f in (step, torch.compile(step, fullgraph=True))
    ]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CASES if c.name != "rope"], ids=str)
def test_a_second_derivative_is_refused(case):
    """None is written, and a wrong one would be silent. (RoPE is linear, and has a right one.)"""
    leaves = [x.detach().requires_grad_() for x in case.inputs(3, 4)]
    outputs = case.ours(*leaves)
    first = outputs[0] if isinstance(outputs, tuple) else outputs
    grads = torch.autograd.grad(first.sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"[Nn]o autograd formula|not have an autograd|does not require grad"):
        sum(g.sum() for g in grads).backward()


def x_(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


SCALE, TARGETS = torch.ones((), device=DEVICE), torch.zeros(4, dtype=torch.int64, device=DEVICE)
QK, TABLES = (x_(4, 3, 8), x_(4, 2, 8)), (x_(4, 1, 4), x_(4, 1, 4))
BAD = [
    ("x", lambda: rms_norm(x_(4, 6), x_(5), 1e-5), ValueError, "shape (4, 6), expected (4, 5)"),
    ("x", lambda: rms_norm(x_(6, 4).T, x_(6), 1e-5), ValueError, "stride 4 in its last dimension"),
    ("x", lambda: rms_norm(x_(4, 6, dtype=torch.int64), x_(6), 1e-5), TypeError, "torch.int64, expected a floating"),
    ("residual", lambda: add_rms_norm(x_(4, 6), x_(4, 6).half(), x_(6), 1e-5), TypeError, "torch.float16, expected torch.float32"),
    ("residual", lambda: add_rms_norm(x_(4, 6), x_(3, 6), x_(6), 1e-5), ValueError, "shape (3, 6)"),
    ("up", lambda: swiglu(x_(4, 6), x_(4, 7)), ValueError, "shape (4, 7), expected (4, 6)"),
    ("gate", lambda: swiglu(x_(2, 4, 6), x_(2, 4, 6)), ValueError, "shape (2, 4, 6), expected (2, 6)"),
    ("k", lambda: rope(x_(4, 3, 8), x_(4, 2, 6), x_(4, 1, 4), x_(4, 1, 4)), ValueError, "shape (4, 2, 6)"),
    ("cos", lambda: rope(x_(4, 3, 8), x_(4, 2, 8), x_(4, 1, 8), x_(4, 1, 4)), ValueError, "shape (4, 1, 8)"),
    ("sin", lambda: rope(x_(4, 3, 8), x_(4, 2, 8), x_(4, 1, 4), x_(4, 1, 4).half()), TypeError, "torch.float16"),
    ("q_weight", lambda: norm_rope(*QK, x_(6), x_(8), 1e-5, *TABLES), ValueError, "shape (6,), expected (8,)"),
    ("k_weight", lambda: norm_rope(*QK, x_(8), x_(8).half(), 1e-5, *TABLES), TypeError, "torch.float16"),
    ("cos", lambda: norm_rope(*QK, x_(8), x_(8), 1e-5, x_(3, 1, 4), TABLES[1]), ValueError, "shape (3, 1, 4)"),
    ("targets", lambda: cross_entropy(x_(4, 6), TARGETS.int(), SCALE), TypeError, "torch.int32, expected torch.int64"),
    ("logits", lambda: cross_entropy(x_(5, 6), TARGETS, SCALE), ValueError, "shape (5, 6), expected (4, 6)"),
    ("scale", lambda: cross_entropy(x_(4, 6), TARGETS, x_(1)), ValueError, "shape (1,), expected ()"),
    ("hidden", lambda: linear_cross_entropy(x_(4, 5), x_(9, 6), TARGETS, SCALE), ValueError, "shape (4, 5), expected (4, 6)"),
    ("weight", lambda: linear_cross_entropy(x_(4, 6), x_(6, 9).T, TARGETS, SCALE), ValueError, "stride 9"),
]  # fmt: skip


@pytest.mark.parametrize(("argument", "call", "error", "message"), BAD)
def test_bad_arguments_are_named(argument, call, error, message):
    with pytest.raises(error, match=rf"{argument} (is|has) .*{re.escape(message)}"):
        call()


def test_a_dtensor_is_refused(tmp_path):
    """FSDP's sharded parameter where the gathered one belongs: torch would run it, on a part."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        weight = distribute_tensor(torch.zeros(9, 6), init_device_mesh("cpu", (1,)))
        for call in (
            lambda: rms_norm(x_(4, 6), weight[0], 1e-5),
            lambda: linear_cross_entropy(x_(4, 6), weight, TARGETS, SCALE),
        ):
            with pytest.raises(TypeError, match="is a DTensor; call the kernel inside a module that FSDP has gathered"):
                call()
    finally:
        torch.distributed.destroy_process_group()
