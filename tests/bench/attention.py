"""Attention over packed documents on a GPU, flash-attn-4 beside torch's own: microseconds, and how far they are apart.

    python tests/bench/attention.py [--out runs/gpu/attention.json]

4,096 tokens in seven documents, as a window of the corpus has them; heads of 128, Qwen2.5-7B's and Mistral-7B's, all tokens
before it or the last 256 of them.
"""

import argparse
import datetime
import json
from pathlib import Path

import torch

from nanomed import attention
from nanomed.kernels import timing
from nanomed.versions import versions

LENGTHS = [1500, 37, 800, 210, 64, 1, 1484]
CASES = [(28, 4, None), (32, 8, None), (28, 4, 256)]  # query heads, key heads, window


def run(q, k, v, dy, borders, window: int | None) -> tuple[list[torch.Tensor], float, float]:
    """(y, dq, dk, dv), and the microseconds of forward and backward."""
    rest = borders, max(LENGTHS), (window or 0) - 1
    forward = lambda: attention._flash_forward(q, k, v, *rest)  # noqa: E731
    y, lse = forward()
    backward = lambda: attention._flash_backward(dy, q, k, v, y, lse, *rest)  # noqa: E731
    times = (timing.quantiles_ms(work, graph=False)[1] * 1e3 for work in (forward, backward))
    return [y, *backward()], *times


def main() -> None:
    """Both in turn, case by case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu/attention.json"))
    args = parser.parse_args()
    if not torch.cuda.is_available() or attention.flash_attn_4 is None:
        raise SystemExit("error: needs a Hopper or Blackwell GPU and the package flash-attn-4")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found = versions("flash-attn-4") | {"torch": torch.__version__}
    result = {"gpu": torch.cuda.get_device_name(), "versions": found, "date": datetime.date.today().isoformat(), "rows": []}
    flash_attn_4 = attention.flash_attn_4
    borders = torch.tensor([0, *LENGTHS], device="cuda").cumsum(0).to(torch.int32)
    for n_heads, n_kv, window in CASES:
        torch.manual_seed(0)
        q, k, v, dy = (torch.randn(sum(LENGTHS), h, 128, device="cuda").bfloat16() for h in (n_heads, n_kv, n_kv, n_heads))
        row, values = {"heads": [n_heads, n_kv], "window": window}, {}
        for name, module in (("torch", None), ("flash-attn-4", flash_attn_4)):
            attention.flash_attn_4 = module
            values[name], *row[name] = run(q, k, v, dy, borders, window)
        row["relative_difference"] = {
            what: ((ours.float() - other.float()).norm() / other.float().norm()).item()
            for what, other, ours in zip(("y", "dq", "dk", "dv"), *values.values(), strict=True)
        }
        result["rows"].append(row)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(row)
    print(args.out)


if __name__ == "__main__":
    main()
