# ruff: noqa: E501
"""Break the kernels on purpose, one way at a time, and see a test go red: `python tests/mutations.py` (some minutes).

A test suite is worth what it catches. Each mutation is a bug that some project has shipped; the clone is copied to a
temporary folder, the line is changed there, and the kernels' tests must fail. Exit status 1 if one survives.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
INT64 = "row = tl.program_id(0).to(tl.int64)"
MUTATIONS = [  # (what, file, old, new): old must stand in the file, tests/test_packaging.py sees to it
    ("row numbers in int32", "rms_norm", INT64, "row = tl.program_id(0)"),
    ("row numbers in int32", "rms_norm", "row = tl.cast(i, tl.int64)", "row = i"),
    ("row numbers in int32", "swiglu", INT64, "row = tl.program_id(0)"),
    ("row numbers in int32", "cross_entropy", INT64, "row = tl.program_id(0)"),
    ("row numbers in int32", "rope", "token = tl.program_id(0).to(tl.int64)", "token = tl.program_id(0)"),
    ("no mask at a store", "rms_norm", "(s * rstd * w).to(y_ptr.dtype.element_ty), mask=mask", "(s * rstd * w).to(y_ptr.dtype.element_ty)"),
    ("no mask at a store", "swiglu", "y.to(y_ptr.dtype.element_ty), mask=mask", "y.to(y_ptr.dtype.element_ty)"),
    ("no mask at a store", "cross_entropy", "grad.to(x_ptr.dtype.element_ty), mask=at < V", "grad.to(x_ptr.dtype.element_ty)"),
    ("masked columns count", "cross_entropy", "mask=i * BLOCK + cols < V, other=float(\"-inf\")", "mask=i * BLOCK + cols < V, other=0.0"),
    ("dW accumulated in bf16", "linear_cross_entropy", "dtype=weight.dtype if at_once else wide)", "dtype=weight.dtype)"),
    ("ignored rows keep their logits", "cross_entropy", "if GRAD:  # the zeros", "if False:  # the zeros"),
    ("target subtracted after rounding", "cross_entropy", "grad = tl.exp(x - maximum) * of_p - tl.where(at == target, scale, 0.0)", "grad = (tl.exp(x - maximum) * of_p).to(x_ptr.dtype.element_ty).to(ACC) - tl.where(at == target, scale, 0.0)"),
    ("the all -inf block", "cross_entropy", "tl.where(new == float(\"-inf\"), 0.0, new)", "new"),
    ("the wrong way round", "rope", "sin = -sin", "sin = sin"),
    ("forward the wrong way round", "rope", "a * cos - b * sin", "a * cos + b * sin"),
    ("row numbers in int32", "norm_rope", "token = tl.cast(i, tl.int64)", "token = i"),
    ("row numbers in int32", "norm_rope", "token = tl.program_id(0).to(tl.int64)", "token = tl.program_id(0)"),
    ("keys' weight of the queries", "norm_rope", "_turn(k_ptr, k_head_stride, k_w_ptr", "_turn(k_ptr, k_head_stride, q_w_ptr"),
    ("the mean of a half", "norm_rope", "axis=1) / (2 * half) + tl.cast", "axis=1) / half + tl.cast"),
    ("backward turned forward", "norm_rope", "c * cos + d * sin, d * cos - c * sin", "c * cos - d * sin, d * cos + c * sin"),
    ("dw before the turn", "norm_rope", "dw_b += d * b", "dw_b += c * b"),
    ("dW parts of the first programs only", "norm_rope", "dw_ptr += program * (2 * half)", "dw_ptr += 0"),
    ("no mask at a store", "rope", "tl.store(y + half, b.to(y_ptr.dtype.element_ty), mask=mask)", "tl.store(y + half, b.to(y_ptr.dtype.element_ty))"),
    ("the residual's gradient forgotten", "rms_norm", "if ADD:\n            dx +=", "if False:\n            dx +="),
    ("norm of the unrounded sum", "rms_norm", "s = rounded.to(ACC)", "s = s + residual"),
    ("dW parts of the first programs only", "rms_norm", "tl.store(dw_ptr + program * D", "tl.store(dw_ptr + 0 * D"),
    ("sigmoid's own slope forgotten", "swiglu", "(1 + gate * (1 - sigma))", "1"),
    ("a second slab over the first", "linear_cross_entropy", "for start in range(0, len(dw), 4096):", "for start in reversed(range(0, len(dw), 4096)):"),
    ("no mask at a store", "cross_entropy", "(x * factor).to(x_ptr.dtype.element_ty), mask=cols < D", "(x * factor).to(x_ptr.dtype.element_ty)"),
    ("rows packed that lie apart", "cross_entropy", "tl.store(x_ptr + row * x_stride + cols, (x * factor)", "tl.store(x_ptr + row * D + cols, (x * factor)"),
    ("no mask at a store", "rms_norm", "dx.to(dx_ptr.dtype.element_ty), mask=mask", "dx.to(dx_ptr.dtype.element_ty)"),
    ("no mask at a store", "adamw", "_rounded(x, at, seed).to(total_ptr.dtype.element_ty), mask=at < N", "_rounded(x, at, seed).to(total_ptr.dtype.element_ty)"),
    ("no mask at a store", "adamw", "tl.store(p_ptr + at, x.to(p_ptr.dtype.element_ty), mask=mask)", "tl.store(p_ptr + at, x.to(p_ptr.dtype.element_ty))"),
    ("rounded to nearest", "adamw", "        x = _rounded(x, at, seed)", "        x = x"),
    ("the same noise in every row", "adamw", "x = _rounded(x, at, seed)", "x = _rounded(x, at % 256, seed)"),
    ("infinities rounded", "adamw", "(bits & 0x7F800000) == 0x7F800000", "bits == 0x7F800001"),
    ("the first of a decade, though the last before is nearer", "adamw", "tl.where(at < 0.2, 0.0, 1.0)", "1.0"),
    ("-1 as 1", "adamw", "code = 127 + tl.where(x < 0, -code, tl.where(top, 128.0, code))", "code = 127 + tl.where(x < 0, -1.0, 1.0) * tl.where(top, 128.0, code)"),
    ("skipped steps made", "adamw", "if tl.load(skip_ptr) != 0:", "if tl.load(skip_ptr) == 2:"),
    ("gradients not divided", "adamw", "g *= 1 / tl.load(grad_scale_ptr)", "g *= 1.0"),
    ("the other moment's scale", "adamw", "_keep(tl.where(mask, kept, 0.0), v_ptr, v_scale_ptr", "_keep(tl.where(mask, kept, 0.0), v_ptr, m_scale_ptr"),
    ("codes of v read as its root", "adamw", "        v *= v", "        v = v"),
    ("small second moments rounded to 0", "adamw", "tl.where(a > 0, tl.maximum(code, 1.0), 0.0)", "tl.where(a > 1e-6, tl.maximum(code, 1.0), 0.0)"),
    ("scaled twice", "cross_entropy", "if factor == 1:", "if factor != 1:"),
]  # fmt: skip
TESTS = ["kernels", "kernel_ops", "rms_norm", "rope", "cross_entropy", "linear_cross_entropy", "adamw"]


def survives(file: str, old: str, new: str) -> bool:
    """Do the kernels' tests pass although kernels/FILE.py has `new` for `old`? With old = new: do they pass at all?"""
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        ignored = shutil.ignore_patterns(".git", "bins", "runs", "__pycache__")
        shutil.copytree(ROOT, clone, symlinks=True, ignore=ignored)
        path = clone / "kernels" / f"{file}.py"
        path.write_text(path.read_text().replace(old, new))
        tests = [test for name in TESTS if (test := clone / "tests" / f"test_{name}.py").exists()]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider", *tests]
        status = subprocess.run(command, cwd=clone, env=os.environ | {"CI": "1"}, capture_output=True).returncode
        if status > 1:  # 1: a test failed, below 0: it wrote or read foreign memory; anything else is no test's doing
            sys.exit(f"error: pytest ended with status {status} for kernels/{file}.py: {new!r}")
        return status == 0


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    if not survives("rope", "sin", "sin"):
        sys.exit("error: the tests fail before any mutation")
    survivors = 0
    for what, file, old, new in tqdm(MUTATIONS, "mutations"):
        alive = survives(file, old, new)
        survivors += alive
        tqdm.write(f"{'SURVIVED' if alive else 'caught  '} {file}: {what}")
    sys.exit(survivors > 0)
