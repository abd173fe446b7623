"""Does training in less memory lose anything? Loss curves of lean regimes against float32's, same data, same steps.

    python tests/bench/parity.py miniature                      the built-in corpus, recipe miniature
    python tests/bench/parity.py NAME --recipe smollm2-135m --init MODEL --data BINS --val med=BINS --lr 1e-5 2e-5 --steps 40 ...
    python tests/bench/parity.py --plot                         the picture of all results

Four regimes: `fp32`; `fp32, int8 states`; `lean` (bf16 weights and gradient sums, stochastic rounding, int8 states); and
`nearest`, the same with plain rounding: what a run that merely casts its model to bf16 does. That one is no flag of
train.py: here the rounding function is replaced. Each is a whole run of train.py in a process of its own, kept under
--work: a killed benchmark goes on. Where bf16 matrix products have no hardware, all arithmetic is float32 over the
regime's weights (`arithmetic` in the result): what differs is then storage and rounding alone.
"""

import argparse
import json
import multiprocessing as mp
import os
import platform
import sys
from pathlib import Path

import torch
from machine import cpu_name

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
RESULTS = Path(__file__).parent / "results"
REGIMES = {
    "fp32": ["--precision", "fp32"],
    "fp32, int8 states": ["--precision", "fp32", "--optimizer-states", "int8"],
    "lean": ["--precision", "pure-bf16", "--optimizer-states", "int8"],
    "nearest": ["--precision", "pure-bf16", "--optimizer-states", "int8"],
}
COLORS = dict(zip(REGIMES, ("0.6", "tab:green", "tab:blue", "tab:red"), strict=True))
LAST = 10  # the final training loss is the mean over so many steps


def run(regime: str, flags: list[str], arithmetic: str) -> None:
    """One run of train.py in this process, with the regime's rounding."""
    import train
    from nanomed.config import Config
    from nanomed.kernels import adamw

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    if regime == "nearest":
        adamw.round_stochastically = lambda x, _seed: x.bfloat16()
        adamw.adamw_, adamw.add_rounded_ = (
            adamw.adamw_torch_,
            adamw.add_rounded_torch_,
        )  # a GPU's kernels round by themselves
    if arithmetic == "fp32":
        Config.dtype = property(lambda _: torch.float32)
    sys.argv = ["train.py", *flags]
    train.main()


def curves(out: Path) -> dict:
    """Of a finished run: training loss of every step, validation losses by step, the two final figures."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    loss = [r["loss"] for r in rows if "loss" in r]
    names = sorted({k for r in rows for k in r if k.startswith("val_") and k.endswith("_loss")})
    val = {k: [[r["step"], r[k]] for r in rows if k in r] for k in names}
    return {
        "loss": loss,
        "val": val,
        "final": {"train": sum(loss[-LAST:]) / LAST} | {k: v[-1][1] for k, v in val.items()},
    }


def measure(name: str, regimes: list[str], lrs: list[float], flags: list[str], work: Path, arithmetic: str) -> list[dict]:
    """The regimes at all learning rates, one after the other; what is finished already is only read."""
    results, context = [], mp.get_context("spawn")
    for lr in lrs:
        for regime in regimes:
            out = work / f"{name}-{lr:g}-{regime.replace(', ', '-').replace(' ', '-')}"
            if not (out / "hf").exists():
                command = [*flags, *REGIMES[regime], "--lr", f"{lr:g}", "--out", str(out)]
                process = context.Process(target=run, args=(regime, command, arithmetic))
                process.start()
                process.join()
                if process.exitcode:
                    sys.exit(f"error: the run {out} ended with {process.exitcode}")
            results.append({"lr": lr, "regime": regime, **curves(out)})
            reference = next(r for r in results if r["lr"] == lr)["final"]
            worse = {k: 100 * (v / reference[k] - 1) for k, v in results[-1]["final"].items()}
            results[-1]["percent_above_fp32"] = worse
            print(f"{name} lr {lr:g} {regime:18} " + "  ".join(f"{k} {v:+.3f} %" for k, v in worse.items()), flush=True)
    return results


def plot() -> Path:
    """One panel a data set and learning rate: training loss minus fp32's, smoothed over LAST steps."""
    import matplotlib.pyplot as plt
    import numpy as np

    reports = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("parity-*.json"))]
    panels = [(r, lr) for r in reports for lr in sorted({x["lr"] for x in r["results"]})]
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "nanomed"})
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.8), layout="constrained", squeeze=False)
    for ax, (report, lr) in zip(axes[0], panels, strict=True):
        runs = {r["regime"]: np.array(r["loss"]) for r in report["results"] if r["lr"] == lr}
        for regime, loss in runs.items():
            gap = np.convolve(loss / runs["fp32"] - 1, np.ones(LAST) / LAST, "valid") * 100
            label = {"lean": "bf16, stochastic, int8 states", "nearest": "bf16, nearest, int8 states"}.get(regime, regime)
            ax.plot(np.arange(LAST, len(loss) + 1), gap, color=COLORS[regime], label=label, lw=1.4)
        ax.axhspan(-0.5, 0.5, color="0.93", zorder=0)
        ax.set(title=f"{report['name']}, learning rate {lr:g}", xlabel="step", ylabel="training loss, % above fp32's")
        ax.set_yscale("symlog", linthresh=0.5)
        ax.set_yticks([-0.5, 0, 0.5, 1, 2, 5, 10, 20, 50], ["−0.5", "0", "0.5", "1", "2", "5", "10", "20", "50"])
        lowest, highest = ax.get_ylim()
        ax.set_ylim(max(-1, min(lowest, -0.7)), max(highest, 0.7))
        ax.spines[["top", "right"]].set_visible(False)
    lines = {label: line for ax in axes[0] for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), frameon=False)
    path = RESULTS / "parity.svg"
    figure.savefig(path, metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"), dpi=110) if os.environ.get("PNG") else None
    return path


def main() -> None:
    """Run, write the JSON, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="miniature", help="of the result (default: miniature)")
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-3])
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=[*REGIMES], help="fp32 first")
    parser.add_argument("--work", type=Path, default=Path("runs/parity"))
    parser.add_argument("--bf16-arithmetic", action="store_true", help="also where bf16 products are emulated: slow")
    parser.add_argument("--plot", action="store_true")
    args, flags = parser.parse_known_args()
    if not args.plot:
        from nanomed.config import has_bf16_hardware

        arithmetic = "bf16" if has_bf16_hardware() or args.bf16_arithmetic else "fp32"
        results = measure(args.name, args.regimes, args.lr, flags, args.work, arithmetic)
        import torchao

        report = {"name": args.name, "device": cpu_name(), "arithmetic": arithmetic,
                  "versions": {"torch": torch.__version__, "torchao": torchao.__version__, "python": platform.python_version()},
                  "flags": flags, "results": results}  # fmt: skip
        (RESULTS / f"parity-{args.name}.json").write_text(json.dumps(report) + "\n")
    print(plot())


if __name__ == "__main__":
    main()
