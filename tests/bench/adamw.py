"""AdamW's step over one block of Qwen2.5-7B (233 M parameters) on a GPU, ours beside others: milliseconds, % of a copy's speed.

    python tests/bench/adamw.py [--out runs/gpu/adamw.json]

What a provider must read and write, at the speed of a large copy, is 100 %. Ours with 8-bit and with bf16 moments, as the Triton
kernel and as its torch twin through torch.compile; torchao's AdamW8bit with stochastic rounding; torch's fused AdamW, all in
float32. Then the sum of two bf16 gradients: ours, rounded stochastically, beside a plain addition.
"""

import argparse
import datetime
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from nanomed import first_line
from nanomed.kernels import adamw, timing
from nanomed.lowbit import LowbitAdamW
from nanomed.versions import versions

D, F, KV = 3584, 18944, 512
SHAPES = [(D, D), (KV, D), (KV, D), (D, D), (F, D), (F, D), (D, F)]
KNOWN = dict(lr=1e-5, betas=(0.9, 0.95), eps=1e-8)


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """The block's matrices, with gradients."""
    made = [torch.nn.Parameter(torch.randn(shape, device="cuda", dtype=dtype)) for shape in SHAPES]
    for p in made:
        p.grad = torch.randn_like(p) * 1e-3
    return made


def ours(moments: str, backend: str) -> Callable:
    """The step of our optimiser."""
    params = parameters(torch.bfloat16)
    return LowbitAdamW([{"params": params, "weight_decay": 0.1}], **KNOWN, moments=moments, backend=backend).step


def torchaos() -> Callable:
    """The step of torchao's 8-bit AdamW."""
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters(torch.bfloat16), **KNOWN, weight_decay=0.1, bf16_stochastic_round=True).step


def fused() -> Callable:
    """The step of torch's own, in float32."""
    return torch.optim.AdamW(parameters(torch.float32), **KNOWN, weight_decay=0.1, fused=True).step


def sums(add: Callable) -> Callable:
    """Adds to every matrix its gradient."""
    params = parameters(torch.bfloat16)
    return lambda: [add(p.data.view(-1), p.grad.view(-1)) for p in params]


def add_rounded(total: torch.Tensor, grad: torch.Tensor) -> None:
    """Ours, with a new seed."""
    adamw.add_rounded_(total, grad, adamw.draw_seed())


PROVIDERS = {  # (bytes per parameter, what makes the work); what torch.compile needs half a minute for stands last
    "AdamW int8, ours": (10, partial(ours, "int8", "triton")),
    "AdamW bf16 moments, ours": (14, partial(ours, "bf16", "triton")),
    "sum of gradients, ours": (6, partial(sums, add_rounded)),
    "sum of gradients, rounded to nearest": (6, partial(sums, torch.Tensor.add_)),
    "AdamW float32, torch's fused": (28, fused),
    "AdamW int8, torchao": (10, torchaos),
    "AdamW int8, our twin compiled": (10, partial(ours, "int8", "compiled")),
    "AdamW bf16 moments, our twin compiled": (14, partial(ours, "bf16", "compiled")),
}


def main() -> None:
    """Time all of them, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu/adamw.json"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: no GPU here, and nothing else to time")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    n_params, copy = sum(rows * columns for rows, columns in SHAPES), timing.copy_bytes_s()
    result = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "versions": versions("triton", "torchao"),
        "date": datetime.date.today().isoformat(),
    }
    result |= {"parameters": n_params, "copy_bytes_s": copy, "rows": []}
    for name, (n_bytes, make) in PROVIDERS.items():
        row = {"name": name, "bytes_a_parameter": n_bytes}
        result["rows"].append(row)
        try:
            row["ms"] = timing.quantiles_ms(make(), graph=False)
            row["of_copy"] = n_bytes * n_params / copy * 1e3 / row["ms"][1]
            print(f"{name:40} {row['ms'][1]:8.3f} ms {row['of_copy']:5.0%}")
        except Exception as error:  # a failure is a result: the others are still wanted
            row["absent"] = f"{type(error).__name__}: {first_line(error)}"
            print(f"{name:40} absent: {row['absent']}")
        torch.cuda.empty_cache()
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(args.out)


if __name__ == "__main__":
    main()
