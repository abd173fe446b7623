"""Search t: one number, then attention and MLP separately over depth, with the merged model in memory.

    python merge.py tune BASE CPT OUT --domain bins/val-med --general bins/val-general --chat prompts.jsonl

A trial sets the weights of one resident model and measures three losses (nanomed.merging.losses). First a global t: five
values, then around the best of them; then a compass search over the knots of a gradient for attention, of one for the MLP
and a t for everything else: each coordinate is moved up and down by a step, what lowers the score is kept, and when
nothing does the step is halved. The search is small on purpose: the held-out sets are small, and many parameters would
overfit them. The result is measured on the other half of the sets, beside BASE, CPT and the best global t.

Memory: BASE and CPT in their own precision and one model to merge into.
"""

import argparse
import dataclasses
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml
from tqdm import tqdm

from nanomed import InputError
from nanomed.config import has_bf16_hardware
from nanomed.figures import canvas, save
from nanomed.files import staging
from nanomed.hf import check_weights, model_config
from nanomed.merging import checks, report
from nanomed.merging.losses import Chat, Text
from nanomed.merging.schedule import Rule, evaluate, spell
from nanomed.merging.slerp import Stats, factors
from nanomed.merging.source import Checkpoint, open_checkpoint
from nanomed.merging.stream import read_fully
from nanomed.merging.write import stats_of, warn
from nanomed.model import Decoder
from nanomed.weights import DTYPES

LOSSES = ("domain", "general", "chat")
SMALLEST_STEP = 1 / 16
Point = tuple[float, ...]  # knots of attention, knots of MLP, t of the rest


@dataclasses.dataclass(frozen=True)
class Trial:
    """A schedule and its losses, in bits per byte."""

    point: Point
    domain: float
    general: float
    chat: float

    def score(self, weights: Point) -> float:
        """The weighted sum of the three."""
        return sum(w * getattr(self, loss) for w, loss in zip(weights, LOSSES, strict=True))

    def is_uniform(self) -> bool:
        """Whether there is one t everywhere."""
        return len(set(self.point)) == 1


def rules_of(point: Point) -> list[Rule]:
    """The schedule as rules: a plain number where all are equal."""
    if len(set(point)) == 1:
        return [Rule("", point[:1])]
    n_knots = len(point) // 2
    return [Rule("self_attn", point[:n_knots]), Rule("mlp", point[n_knots:-1]), Rule("", point[-1:])]


# --- the search ----------------------------------------------------------------------------------------------------


def search(measure: Callable[[Point], Trial], n_knots: int, budget: int, weights: Point) -> list[Trial]:
    """At most `budget` trials, in order; the best of them is the answer."""
    trials: dict[Point, Trial] = {}

    def score(point: Point) -> float:
        if point not in trials and len(trials) < budget:
            trials[point] = measure(point)
        return trials[point].score(weights) if point in trials else float("inf")

    n = 2 * n_knots + 1
    best = min(((t,) * n for t in (0.0, 0.25, 0.5, 0.75, 1.0)), key=score)
    best = min((best, *(moved(best, range(n), d) for d in (-0.125, 0.125))), key=score)
    step = 0.25
    while step >= SMALLEST_STEP and len(trials) < budget:
        before = best
        for i in range(n):
            best = min((best, moved(best, [i], step), moved(best, [i], -step)), key=score)
        step = step if best != before else step / 2
    return list(trials.values())


def moved(point: Point, coordinates, by: float) -> Point:
    """The point with some coordinates moved, within [0, 1]."""
    return tuple(min(1.0, max(0.0, t + by)) if i in coordinates else t for i, t in enumerate(point))


# --- the merged model ----------------------------------------------------------------------------------------------


class Resident:
    """BASE, CPT and a model to merge them into, all in memory. InputError if BASE's tensors are not those of its config.json."""

    def __init__(self, base: Checkpoint, cpt: Checkpoint, device: torch.device):
        low = has_bf16_hardware()  # of the GPU where there is one
        with torch.device("meta"):
            self.model = Decoder(model_config(base.folder), torch.bfloat16 if low else torch.float32)
        check_weights(self.model, base.folder)
        self.model.to_empty(device=device)
        if device.type == "cuda":
            self.model.bfloat16()
        self.pairs = {
            name: (load(base, name).to(device), load(cpt, name).to(device)) for name in tqdm(base.tensors, "load", delay=2)
        }
        self.stats = stats_of(base, cpt)

    @torch.no_grad()
    def set(self, rules: list[Rule]) -> None:
        """The model's weights as merge.py would write them: maths in float32, rounded to BASE's dtype."""
        ts = evaluate(rules, self.pairs, "tune")
        for name, param in self.model.named_parameters():
            a, b = self.pairs[name]
            of_base, of_cpt = factors(self.stats.get(name, Stats(0, 0, 0)), ts[name])
            param.copy_((a.float() * of_base).add_(b.float(), alpha=of_cpt).to(a.dtype))


def load(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A tensor whole, in its own dtype."""
    source = checkpoint.tensors[name]
    tensor = torch.empty(source.shape, dtype=DTYPES[source.dtype])
    raw, at = tensor.view(-1).view(torch.uint8).numpy(), 0
    for part in source.parts:
        with part.path.open("rb") as file:
            n = part.n * tensor.element_size()
            read_fully(file.fileno(), raw[at : at + n], part.offset, part.path)
            at += n
    return tensor


# --- command line --------------------------------------------------------------------------------------------------


def tune(args: argparse.Namespace) -> None:
    """Search, check, write OUT/t.yaml, trials.json, pareto.svg."""
    base, cpt = open_checkpoint(args.base, "BASE"), open_checkpoint(args.cpt, "CPT")
    warn(checks.check_pair(base, cpt, "CPT"))
    if "tokenizer.json" not in base.tokenizer:
        raise InputError(f"BASE {base.name}: has no tokenizer.json; tune needs it")
    checks.check_base(base)
    checks.check_out(args.out, 0)
    with staging(args.out) as tmp:  # before the search: it takes hours, and another command may want the same OUT
        table = search_and_write(args, base, cpt, tmp)
    command = shlex.join(["python", "merge.py", base.name, cpt.name, "MERGED", "--t-file", str(args.out / "t.yaml")])
    print(f"{table}\nthen: {command}")


@torch.no_grad()
def search_and_write(args: argparse.Namespace, base: Checkpoint, cpt: Checkpoint, folder: Path) -> str:
    """Search and check t, write the three files to the folder; the table of the check."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = model_config(base.folder)
    seq_len = min(args.seq_len, config.max_position_embeddings or args.seq_len)
    of_all = (config.vocab_size, base.tokenizer["tokenizer.json"], seq_len, args.set_tokens)
    text = {flag: Text(getattr(args, flag), *of_all, f"--{flag}") for flag in ("domain", "general")}
    resident = Resident(base, cpt, device)
    shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
    warn(report.warnings(report.rows(resident.stats, dict.fromkeys(resident.stats, 0.0), shapes), f"CPT {cpt.name}"))
    resident.set([Rule("", (0.0,))])
    chat = Chat(args.chat, base.folder, resident.model, device)

    def measure(point: Point, half: str = "search") -> Trial:
        resident.set(rules_of(point))
        found = [t.bits_per_byte(resident.model, half, device) for t in text.values()]
        return Trial(point, *found, chat.kl(resident.model, half))

    with tqdm(total=args.budget, desc="search", unit="trial") as bar:
        trials = search(lambda p: (measure(p), bar.update())[0], args.knots, args.budget, args.weights)
    best = min(trials, key=lambda trial: trial.score(args.weights))
    uniform = min((trial for trial in trials if trial.is_uniform()), key=lambda trial: trial.score(args.weights))
    n = len(best.point)
    rows = {"BASE": (0.0,) * n, "CPT": (1.0,) * n, f"t = {uniform.point[0]:g}": uniform.point, "chosen": best.point}
    checked = {name: measure(point, "check") for name, point in rows.items()}
    table = check_table(checked, args.weights)
    comment = "".join(f"# {line}\n" for line in table.splitlines())
    content = yaml.safe_dump({"t": spell(rules_of(best.point))}, sort_keys=False, default_flow_style=None)
    (folder / "t.yaml").write_text(f"{comment}{content}")
    record = {"base": base.name, "cpt": cpt.name, "weights": args.weights, "trials": list(map(dataclasses.asdict, trials)),
              "checked": {name: dataclasses.asdict(trial) for name, trial in checked.items()}}  # fmt: skip
    (folder / "trials.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(folder / "pareto.svg", trials, best)
    return table


def check_table(checked: dict[str, Trial], weights: Point) -> str:
    """The final table, in bits per byte, on text and prompts that the search has not seen."""
    lines = [f"{'on the other half':18}{'domain':>9}{'general':>9}{'chat KL':>9}{'score':>9}   bits per byte"]
    for name, t in checked.items():
        lines.append(f"{name:18}{t.domain:9.4f}{t.general:9.4f}{t.chat:9.4f}{t.score(weights):9.4f}")
    return "\n".join(lines)


def front(points: np.ndarray) -> np.ndarray:  # (n, 2) -> (m,) indices, from the left
    """The points that no other beats in both coordinates."""
    kept, lowest = [], np.inf
    for i in np.lexsort((points[:, 1], points[:, 0])):
        if points[i, 1] < lowest:
            kept.append(i)
            lowest = points[i, 1]
    return np.array(kept)


def plot(path: Path, trials: list[Trial], best: Trial) -> None:
    """What the domain costs elsewhere: every trial, the line of global t, the Pareto front, the choice."""
    figure, both = canvas(11, 4.2, columns=2)
    names = {"general": "general text, bits per byte", "chat": "chat: KL to BASE, bits per byte"}
    for axes, (loss, label) in zip(both, names.items(), strict=True):
        points = np.array([[t.domain, getattr(t, loss)] for t in trials])
        axes.scatter(*points.T, s=12, color="0.7", label="trials")
        axes.plot(*points[front(points)].T, color="tab:green", lw=1, label="Pareto front", zorder=1)
        line = sorted((t for t in trials if t.is_uniform()), key=lambda t: t.point)
        axes.plot(
            [t.domain for t in line],
            [getattr(t, loss) for t in line],
            "o--",
            ms=4,
            lw=1,
            color="tab:blue",
            label="one t for all",
        )
        for t in line:
            axes.annotate(
                f"{t.point[0]:g}",
                (t.domain, getattr(t, loss)),
                (4, 4),
                textcoords="offset points",
                size=8,
                color="tab:blue",
            )
        axes.plot(best.domain, getattr(best, loss), "*", ms=13, color="tab:red", label="chosen")
        axes.set(xlabel="domain, bits per byte", ylabel=label)
        axes.legend(frameon=False)
    save(figure, path)


def main(argv: list[str]) -> None:
    """Command line of `merge.py tune`."""
    parser = argparse.ArgumentParser(
        prog="merge.py tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("base", metavar="BASE", help="instruct model: folder or hub id")
    add("cpt", metavar="CPT", help="the same after continual pre-training: folder, hub id or run folder of train.py")
    add("out", metavar="OUT", type=Path, help="folder for t.yaml, trials.json and pareto.svg")
    add("--domain", required=True, metavar="BINS", help="held-out bins of the domain (from data/prepare.py)")
    add("--general", required=True, metavar="BINS", help="held-out bins of other text")
    add(
        "--chat",
        required=True,
        type=Path,
        metavar="JSONL",
        help='prompts: {"prompt": text} or {"messages": [...]} per line',
    )
    add("--budget", type=int, default=40, help="trials of the search (default %(default)s)")
    add("--knots", type=int, default=3, help="knots over depth of attention's and MLP's gradient (default %(default)s)")
    add(
        "--set-tokens",
        type=int,
        default=65536,
        help="of each set, half to search with and half to check with (default %(default)s)",
    )
    add("--seq-len", type=int, default=1024, help="tokens in a window (default %(default)s)")
    add("--weights", type=weights, default=(1.0, 1.0, 1.0), metavar="D,G,C",
        help="weights of domain, general and chat in the score (default 1,1,1)")  # fmt: skip
    args = parser.parse_args(argv)
    for flag, least in (("budget", 5), ("knots", 1), ("seq_len", 2), ("set_tokens", 4)):
        if getattr(args, flag) < least:
            parser.error(f"--{flag.replace('_', '-')} must be at least {least}")
    tune(args)


def weights(text: str) -> Point:
    """D,G,C → three numbers."""
    values = tuple(float(part) for part in text.split(","))
    if len(values) != 3 or not all(0 <= v < float("inf") for v in values) or not any(values):
        raise argparse.ArgumentTypeError(f"{text!r} is not three numbers, none negative and not all 0")
    return values
