"""Writing a merge: OUT whole or not at all, with BASE's config, tokenizer and chat template beside the weights.

Everything is written to a staging folder beside OUT (nanomed/files.py) and renamed last, so OUT appears at once, and not at
all after a kill. Nothing is synced: that would take longer than the merge itself, and a power cut within half a minute
costs a merge that can be repeated.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from nanomed import InputError, shards
from nanomed.files import staging
from nanomed.merging import checks, report
from nanomed.merging.mergekit_yaml import DTYPES, Recipe
from nanomed.merging.schedule import Rule, evaluate
from nanomed.merging.slerp import Stats, factors
from nanomed.merging.source import Checkpoint
from nanomed.merging.stream import Streamer, groups
from nanomed.merging.verify import slerp_factors, verify
from nanomed.model_files import copy_carried

N_THREADS = min(8, os.cpu_count() or 1)
N_SAMPLED = 16


def write_merges(base: Checkpoint, cpt: Checkpoint, out: Path, wanted: dict[str, list[Rule]], dtypes: dict, check: bool) -> None:
    """SLERP of BASE and CPT by every one of the schedules, each in its subfolder of OUT ("" is OUT itself)."""
    inputs, known = [base, cpt], report.known_stats(out, base, cpt)
    if known:
        print(f"sums of every tensor taken from {known[1]}", file=sys.stderr)
    ts = [evaluate(rules, base.tensors, "--t") for rules in wanted.values()]
    weights = lambda name, s: [list(factors(s, t[name])) for t in ts]  # noqa: E731
    shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
    with merged(inputs, out, list(wanted), dtypes, weights, known and known[0]) as (folders, stats):
        stats = {name: stats.get(name, Stats(0, 0, 0)) for name in base.tensors}  # empty tensors have none
        warn(report.warnings(report.rows(stats, ts[0], shapes), f"CPT {cpt.name}"))
        for folder, rules, t in zip(folders, wanted.values(), ts, strict=True):
            report.write_report(folder, base, cpt, rules, report.rows(stats, t, shapes))
            if check:
                verified(inputs, folder, lambda name, cos, t=t: slerp_factors(t[name], cos), needs_cos=True)
    print(report.change_table(report.rows(stats, ts[0], shapes)))


def write_linear(path: Path, models: list[Checkpoint], out: Path, recipe: Recipe, dtypes: dict, check: bool) -> None:
    """Σ wᵢ xᵢ, by default divided by Σ wᵢ, of any number of models. path: the configuration, which goes along."""
    base = models[0]
    columns = [evaluate(rules, base.tensors, str(path), "weight") for rules in recipe.rules]
    weights = {name: [column[name] for column in columns] for name in base.tensors}
    if recipe.normalize:
        if zero := [name for name, row in weights.items() if sum(row) == 0]:
            raise InputError(f"{path}: the weights of {zero[0]} sum to 0; set normalize: false, or other weights")
        weights = {name: [w / sum(row) for w in row] for name, row in weights.items()}
    for other in models[1:]:
        warn(report.warnings(sampled_rows(base, other), f"model {other.name}"))
    with merged(models, out, [""], dtypes, lambda name, _: [weights[name]], {}) as ([folder], _):
        shutil.copyfile(path, folder / "mergekit_config.yml")
        card = report.linear_card(models, path.read_text(encoding="utf-8"))
        (folder / "README.md").write_text(card, encoding="utf-8")
        if check:
            verified(models, folder, lambda name, _: [weights[name]], needs_cos=False)


@contextmanager
def merged(
    inputs: list[Checkpoint], out: Path, names: list[str], dtypes: dict[str, str], weights: Callable, known: dict | None
) -> Iterator[tuple[list[Path], dict[str, Stats]]]:
    """Folders with the merged models, one for each of the subfolders `names` of OUT, and the sums of every tensor; they
    become OUT where the block ends well. weights, known: as Streamer.merge takes them."""
    tensors = inputs[0].tensors
    plan = shards.plan({name: (dtypes[name], t.shape) for name, t in tensors.items()}, shards.SHARD_BYTES)
    checks.check_out(out, len(names) * sum(map(shards.total_bytes, plan.values())))
    with staging(out) as tmp:
        folders = [tmp / name for name in names]
        for folder in folders:
            create(folder, inputs[0], plan, dtypes)
        with (
            progress(inputs, 2 if known is None else 1) as bar,
            Streamer(inputs, plan, folders, N_THREADS, bar.update) as streamer,
        ):
            stats = streamer.merge(weights, known)
        yield folders, stats
    print(f"merged: {', '.join(str(out / name) for name in names)}")


def create(folder: Path, base: Checkpoint, plan: dict, dtypes: dict[str, str]) -> None:
    """A checkpoint's folder without the tensors' data: BASE's config, tokenizer and chat template, headers, index."""
    folder.mkdir(exist_ok=True)
    copy_carried(base.folder, folder)
    name_dtype(folder / "config.json", base.config(), set(dtypes.values()))
    for file, tensors in plan.items():
        shards.write_header(folder / file, tensors)
    shards.write_index(folder, plan)


def name_dtype(path: Path, config: dict, dtypes: set[str]) -> None:
    """Rewrite config.json if all weights have another dtype than it names: dtype="auto" loads the named one."""
    if len(dtypes) > 1:
        return
    name = next(name for name, dtype in DTYPES.items() if dtype in dtypes)
    if wrong := {key: name for key in ("dtype", "torch_dtype") if config.get(key) not in (None, name)}:
        path.write_text(json.dumps(config | wrong, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def progress(inputs: list[Checkpoint], passes: int, what: str = "merge") -> tqdm:
    """A progress bar over the inputs' bytes."""
    n_bytes = sum(t.n_bytes for c in inputs for t in c.tensors.values())
    return tqdm(desc=what, total=passes * n_bytes, unit="B", unit_scale=True, delay=1)


def verified(inputs: list[Checkpoint], folder: Path, weights, needs_cos: bool) -> None:
    """Check the result and print --verify's line."""
    with progress(inputs, 1, "verify") as bar:
        ulp, norm = verify(inputs, folder, weights, needs_cos, N_THREADS, bar.update)
    print(f"verified: {len(inputs[0].tensors)} tensors; largest error {ulp:.3f} units in the last place (16 bits), "
          f"{norm:.1e} of the norm (float32)")  # fmt: skip


def warn(lines: list[str]) -> None:
    """Warnings to stderr."""
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)


def stats_of(base: Checkpoint, other: Checkpoint, names: list[str] | None = None) -> dict[str, Stats]:
    """The sums of every tensor, or of the named ones; nothing is written."""
    inputs, names = [base, other], list(base.tensors) if names is None else names
    with progress(inputs, 1, "read") as bar, Streamer(inputs, {}, [], N_THREADS, bar.update) as streamer:
        return {name: s for group in groups(inputs, names) for name, s in streamer.stats(group).items()}


def sampled_rows(base: Checkpoint, other: Checkpoint) -> list[dict]:
    """Report rows of N_SAMPLED matrices: a linear merge needs no sums, and reading everything twice would double its time."""
    matrices = [name for name, tensor in base.tensors.items() if len(tensor.shape) > 1]
    stats = stats_of(base, other, matrices[:: max(1, len(matrices) // N_SAMPLED)])
    return report.rows(stats, dict.fromkeys(stats, 0.0), {name: base.tensors[name].shape for name in stats})
