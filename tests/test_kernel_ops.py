"""The kernels as operations of torch: its own examination, torch.compile, and arguments that are refused by name."""

import re

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from conftest import ROOT
from kernel_cases import CASES, DEVICE, angles, outputs_and_gradients, targets_for
from nanomed.kernels import adamw
from nanomed.kernels.cross_entropy import _cross_entropy_, _scale_, cross_entropy
from nanomed.kernels.linear_cross_entropy import linear_cross_entropy
from nanomed.kernels.norm_rope import _norm_rope, _norm_rope_backward, norm_rope
from nanomed.kernels.rms_norm import _add_rms_norm, _rms_norm, _rms_norm_backward, add_rms_norm, rms_norm
from nanomed.kernels.rope import _rope, rope
from nanomed.kernels.swiglu import _swiglu, _swiglu_backward, swiglu


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
    sources = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    names = set(re.findall(r'custom_op\("([^"]+)"', sources))
    assert names == {op._qualname for op in registered_ops()}


@pytest.mark.parametrize("case", CASES, ids=str)
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


def test_rows_that_share_memory_are_refused_where_they_would_be_written():
    """x.expand(N, V) has one row in memory: every gradient would land on it."""
    logits = torch.randn(1, 64, device=DEVICE, requires_grad=True).expand(4, 64)
    targets, scale = torch.zeros(4, dtype=torch.int64, device=DEVICE), torch.ones((), device=DEVICE)
    with pytest.raises(ValueError, match=r"cross_entropy: logits has rows that share memory \(stride 0\)"):
        cross_entropy(logits, targets, scale)
    overlapping = torch.randn(256, device=DEVICE).as_strided((4, 64), (32, 1)).requires_grad_()
    with pytest.raises(ValueError, match="rows that share memory"):
        cross_entropy(overlapping, targets, scale)
    with torch.no_grad():  # nothing is written
        assert cross_entropy(logits, targets, scale).isfinite()


def test_moments_that_are_not_contiguous_are_refused():
    x = torch.zeros(8, 8, device=DEVICE, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="total is not contiguous"):
        adamw.add_rounded_(x.T, x, adamw.draw_seed())
    with pytest.raises(ValueError, match="grad is not contiguous"):
        adamw.add_rounded_(x, x[:1].expand(8, 8), adamw.draw_seed())


def test_rows_wider_than_a_program_are_refused_by_name():
    """They spilled, or did not launch. tests/test_registers.py compiles the widest that are accepted."""
    wide, weight = torch.zeros(2, 8193, device=DEVICE), torch.zeros(8193, device=DEVICE)
    with pytest.raises(ValueError, match=r"rms_norm: x has 8,193 elements in a row, at most 8,192 fit"):
        rms_norm(wide, weight, 1e-6)
    with pytest.raises(ValueError, match="add_rms_norm: x has 8,193"):
        add_rms_norm(wide, wide, weight, 1e-6)
    q, k = torch.zeros(2, 65, 128, device=DEVICE), torch.zeros(2, 1, 128, device=DEVICE)
    angle = torch.zeros(2, 1, 64, device=DEVICE)
    with pytest.raises(ValueError, match="norm_rope: q has 16,384"):
        norm_rope(q, k, weight[:128], weight[:128], 1e-6, angle, angle)
    with pytest.raises(ValueError, match="rope: k has 32,768"):
        rope(k, torch.zeros(2, 129, 128, device=DEVICE), angle, angle)
