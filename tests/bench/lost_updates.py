"""What rounding to nearest does to an Adam update of a real model's bf16 weights: how many of them move at all?

    python tests/bench/lost_updates.py MODEL [--lr 1e-5 2e-5 1e-4]

An update of Adam is about as large as the learning rate. Every weight of the checkpoint gets one of exactly that size, up
and down, and is rounded to bf16: the share that stays where it was, and the share of the update that arrives on average.
Rounded stochastically all of it arrives on average (tests/test_lowbit.py). No training, so no noise: exact figures.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
RESULTS = Path(__file__).parent / "results"


def shares(files: list[Path], lr: float) -> dict[str, float]:
    """Of all weights in the safetensors files."""
    from nanomed.shards import open_safetensors

    n, unmoved, arrived = 0, 0, 0.0
    for path in files:
        with open_safetensors(path) as file:
            for name in tqdm(file.keys(), f"lr {lr:g}", leave=False):
                weights = file.get_tensor(name).bfloat16().float()
                for update in (lr, -lr):
                    moved = (weights + update).bfloat16().float() - weights
                    n += weights.numel()
                    unmoved += int((moved == 0).sum())
                    arrived += float((moved / update).sum(dtype=torch.float64))
    return {"lr": lr, "unmoved": unmoved / n, "arrived": arrived / n}


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder with *.safetensors")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-5, 2e-5, 1e-4])
    args = parser.parse_args()
    files = sorted(args.model.glob("*.safetensors"))
    if not files:
        sys.exit(f"error: {args.model}: no *.safetensors there")
    rows = [shares(files, lr) for lr in args.lr]
    for row in rows:
        print(f"lr {row['lr']:g}: {row['unmoved']:.1%} of the weights do not move, {row['arrived']:.1%} of the update arrives")
    (RESULTS / f"lost-updates-{args.model.name}.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
