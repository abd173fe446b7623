"""Triton's interpreter, made exact for bf16: import it before any kernel runs.

The interpreter keeps bf16 values as 16-bit integers. It rounds float32 to them by cutting off, which a GPU does not, and
it adds, multiplies and compares them as integers: silently wrong. Here rounding is to nearest even, as on a GPU, and
arithmetic on bf16 is an error: kernels load, widen, compute, and round at the store.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

_convert, _binary, _unary = (
    interpreter._convert_float,
    interpreter.InterpreterBuilder.binary_op,
    interpreter.InterpreterBuilder.unary_op,
)


def _round_to_nearest_even(data, source, target, mode):
    if (source, target) != (tl.float32, tl.bfloat16):
        return _convert(data, source, target, mode)
    bits = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16).view(torch.int16)
    return bits.numpy().view(np.uint16).reshape(data.shape)


def _refuse_bf16(operands):
    if any(x.dtype.scalar == tl.bfloat16 for x in operands):
        raise TypeError("bf16 arithmetic in a kernel: widen with .to(ACC) first")


def _checked_binary(self, lhs, rhs, op):
    _refuse_bf16((lhs, rhs))
    return _binary(self, lhs, rhs, op)


def _checked_unary(self, arg, op):
    _refuse_bf16((arg,))
    return _unary(self, arg, op)


interpreter._convert_float = _round_to_nearest_even
interpreter.InterpreterBuilder.binary_op = _checked_binary
interpreter.InterpreterBuilder.unary_op = _checked_unary


# --- what Liger-Kernel's kernels need besides, to run in it --------------------------------------------------------

_implicit_cvt = interpreter._implicit_cvt


def convert_floats_too(x):
    """Python floats as float32 tensors: the interpreter leaves them as they are, and Liger calls .to on them."""
    if not isinstance(x, float):
        return _implicit_cvt(x)
    return tl.core.tensor(interpreter.TensorHandle(np.array([x], np.float32), tl.float32), tl.float32)


@triton.jit
def rsqrt(x):
    """For libdevice's, which the interpreter lacks."""
    return tl.math.rsqrt(x)
