"""What the compiler makes of every kernel, for GPUs that need not be there: registers, spills, widths of memory access.

    python -m nanomed.kernels.registers            the table
    python -m nanomed.kernels.registers --json     the same for programs; a test holds it to tests/kernel_registers.json

A memory-bound kernel is slow for reasons that show in its machine code: values spilled to local memory, two-byte loads
where sixteen would do (a stride the compiler could not prove a multiple of 16), float64 arithmetic slipped in by a Python
float, so many registers that few programs fit a multiprocessor. Triton brings NVIDIA's assembler and disassembler along,
so this needs no GPU. Half a minute for all three models and three generations.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from . import adamw, cross_entropy, norm_rope, rms_norm, rope, swiglu
from .common import INTERPRETED, next_power_of_2, tl, triton, warps_for
from .roofline import MODELS, Model

GENERATIONS = {80: "A100", 90: "H100, H200", 100: "B200"}
# Here each stands for a pointer to such.
BF16, FP32, INT64, UINT8 = torch.bfloat16, torch.float32, torch.int64, torch.uint8


def launches(m: Model) -> Iterator[tuple]:
    """(name, kernel, positional arguments, constexprs, warps) of every launch in a step of the model, as the ops make it."""
    d, f, v, half = m.hidden, m.intermediate, m.vocab, m.head_dim // 2
    block, vocab_block = next_power_of_2(d), min(cross_entropy.MAX_BLOCK, next_power_of_2(v))
    for add in (False, True):
        name, norm = ("add_rms_norm" if add else "rms_norm"), dict(ADD=add, BLOCK=block, ACC=tl.float32)
        stages = dict(STAGES=rms_norm.stages_for(2 * block))
        r, stride, n = (BF16, d, 8192) if add else (None, 0, 8192)
        args = (BF16, d, r, stride, BF16, BF16, r, FP32, d, 1e-6)
        yield f"{name} forward", rms_norm._forward, args, norm, warps_for(block)
        args = (BF16, d, r, stride, BF16, d, BF16, FP32, BF16, FP32, n, d)
        yield f"{name} backward", rms_norm._backward, args, norm | stages, warps_for(block)
    tile = dict(BLOCK=swiglu.BLOCK, ACC=tl.float32)
    yield "swiglu forward", swiglu._forward, (BF16, f, BF16, f, BF16, f), tile, swiglu.WARPS
    yield "swiglu backward", swiglu._backward, (BF16, f, BF16, f, BF16, f, BF16, BF16, f), tile, swiglu.WARPS
    heads = dict(Q_HEADS=next_power_of_2(m.q_heads), K_HEADS=next_power_of_2(m.k_heads), HALF=next_power_of_2(half))
    q, k = (BF16, m.q_heads * m.head_dim, m.head_dim), (BF16, m.k_heads * m.head_dim, m.head_dim)
    args = (*q, *k, FP32, FP32, BF16, BF16, m.q_heads, m.k_heads, half)
    for name, inverse in (("rope forward", False), ("rope backward", True)):
        yield name, rope._rotate, args, dict(INVERSE=inverse, **heads, ACC=tl.float32), rope.WARPS
    heads, warps = heads | dict(ACC=tl.float32), norm_rope.warps_for(heads["Q_HEADS"], heads["HALF"])
    args = (*q, *k, BF16, BF16, FP32, FP32, BF16, BF16, m.q_heads, m.k_heads, half, 1e-6)
    yield "norm_rope forward", norm_rope._forward, args, heads, warps
    for x, n_heads in ((q, m.q_heads), (k, m.k_heads)):
        block = dict(HEADS=next_power_of_2(n_heads), HALF=heads["HALF"], ACC=tl.float32)
        args = (*x, *x, BF16, FP32, FP32, BF16, FP32, n, n_heads, half, 1e-6)
        yield "norm_rope backward", norm_rope._backward, args, block, norm_rope.warps_for(block["HEADS"], block["HALF"])
    for name, grad in (("cross_entropy loss only", False), ("cross_entropy", True)):
        const = dict(GRAD=grad, IGNORED=cross_entropy.IGNORED, BLOCK=vocab_block, ACC=tl.float32)
        args = (BF16, v, INT64, FP32, FP32, v, 0.0)
        yield name, cross_entropy._rows, args, const, warps_for(vocab_block)
    block = cross_entropy.SCALE_BLOCK
    yield "scale", cross_entropy._scale, (BF16, d, d, FP32), dict(BLOCK=block, ACC=tl.float32), warps_for(block)
    n, seed = 1 << 24, 12345
    yield "sum of gradients", adamw._add, (BF16, BF16, n, seed), dict(BLOCK=adamw.TILE), adamw.WARPS
    for name, mean, block in (("int8", UINT8, 256), ("bf16", BF16, adamw.TILE)):
        of_codes = [FP32] * 4 if mean is UINT8 else [None] * 4
        args = (BF16, BF16, mean, mean, *of_codes, *[FP32] * 4, n, block, seed, 1e-5, 0.1, 0.1, 0.05, 1e-8)
        const = dict(CODES=mean is UINT8, ROWS=adamw.TILE // block, COLS=block)
        yield f"adamw with {name} moments", adamw._step, args, const, adamw.WARPS


def largest_launches() -> Iterator[tuple]:
    """As launches: the widest rows that the ops accept, in the dtype that takes most room."""
    d, n = rms_norm.MAX_COLUMNS, 8192
    norm = dict(ADD=True, BLOCK=d, ACC=tl.float32)
    args = (FP32, d, FP32, d, FP32, FP32, FP32, FP32, d, 1e-6)
    yield "largest add_rms_norm forward", rms_norm._forward, args, norm, warps_for(d)
    args = (FP32, d, FP32, d, FP32, d, FP32, FP32, FP32, FP32, n, d)
    stages = dict(STAGES=rms_norm.stages_for(4 * d))
    yield "largest add_rms_norm backward", rms_norm._backward, args, norm | stages, warps_for(d)
    heads, half = rope.MAX_WIDTH // 128, 64
    x = (FP32, 2 * heads * half, 2 * half)
    blocks = dict(Q_HEADS=heads, K_HEADS=heads, HALF=half, ACC=tl.float32)
    args = (*x, *x, FP32, FP32, FP32, FP32, heads, heads, half)
    yield "largest rope", rope._rotate, args, dict(INVERSE=False) | blocks, rope.WARPS
    heads = norm_rope.MAX_WIDTH // 128
    x, warps = (FP32, 2 * heads * half, 2 * half), norm_rope.warps_for(heads, half)
    blocks = dict(Q_HEADS=heads, K_HEADS=heads, HALF=half, ACC=tl.float32)
    args = (*x, *x, FP32, FP32, FP32, FP32, FP32, FP32, heads, heads, half, 1e-6)
    yield "largest norm_rope forward", norm_rope._forward, args, blocks, warps
    block = dict(HEADS=heads, HALF=half, ACC=tl.float32)
    args = (*x, *x, FP32, FP32, FP32, FP32, FP32, n, heads, half, 1e-6)
    yield "largest norm_rope backward", norm_rope._backward, args, block, warps


def compile_for(kernel, args: tuple, constexprs: dict, warps: int, generation: int):
    """The kernel compiled as a launch with these arguments would compile it."""
    signature, constants, attributes = {}, dict(constexprs), {}
    pointers = {BF16: "*bf16", FP32: "*fp32", INT64: "*i64", UINT8: "*u8"}
    for i, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if value is None or value == 1:  # Triton makes constants of these
            constants[name] = value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = pointers.get(value) or ("i32" if value < 2**31 else "i64")
            if value in pointers or value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    target = triton.backends.compiler.GPUTarget("cuda", generation, 32)
    return triton.compile(source, target=target, options={"num_warps": warps, "enable_fp_fusion": True})


def measure(compiled) -> dict[str, int]:
    """Registers a thread, and counts of instructions in the machine code that should be many, or none."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tools / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    count = lambda pattern: len(re.findall(pattern, sass))  # noqa: E731
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": count(r"\b(?:STL|LDL)\b") + int(re.search(r"STACK:(\d+)", usage)[1]),
        "loads_128": count(r"\bLDG(?:STS)?\.[\w.]*128\b"),
        "stores_128": count(r"\bSTG\.[\w.]*128\b"),
        "narrow": count(r"\b(?:LDG|STG)\.[\w.]*[US](?:8|16)\b"),  # of one or two bytes
        "shared_narrow": count(r"\b(?:LDS|STS)\.[\w.]*[US](?:8|16)\b"),  # a layout changed number by number
        "float64": count(r"\bD(?:ADD|MUL|FMA|SETP|MNMX)\b"),
        "shared": compiled.metadata.shared,  # bytes
        "instructions": count(r"(?m)^\s+/\*[0-9a-f]{4,}\*/\s+(?!\s|NOP)"),
    }


def table(generations=tuple(GENERATIONS), models=tuple(MODELS)) -> dict[str, dict[str, int]]:
    """`measure` of every launch: {"rms_norm forward, 4096, sm_90": {...}}. Same launches of several models stand once."""
    jobs = {}
    for of_one in (*(launches(MODELS[model]) for model in models), largest_launches()):
        for name, kernel, args, constexprs, warps in of_one:
            sizes = ", ".join(
                str(v) for k, v in constexprs.items() if k in ("BLOCK", "Q_HEADS", "K_HEADS", "HEADS", "ROWS", "COLS")
            )
            for generation in generations:
                jobs[f"{name}, {sizes}, {warps} warps, sm_{generation}"] = (kernel, args, constexprs, warps, generation)
    return {name: measure(compile_for(*job)) for name, job in tqdm(jobs.items(), "compiling", leave=False, delay=3)}


def as_text(rows: dict[str, dict[str, int]]) -> str:
    """The table as Markdown."""
    columns = list(next(iter(rows.values())))
    lines = ["| kernel | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(str(row[c]) for c in columns) + " |" for name, row in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m nanomed.kernels.registers", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    if triton is None:
        sys.exit("error: Triton is not installed, which has the compiler; pip install triton (Linux)")
    if INTERPRETED:
        sys.exit("error: TRITON_INTERPRET is set; unset it, the interpreter does not compile")
    rows = table()
    print(json.dumps(rows, indent=1) if args.json else as_text(rows))
