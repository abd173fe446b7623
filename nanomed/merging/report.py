"""What a merge did: merge_report.json and .md, a picture of change and t over depth, and a model card.

The JSON also holds every tensor's sums and the identity of the input files: a later merge of the same pair into a
neighbouring folder reuses them and reads the inputs once instead of twice. None of these files has a date, a time or an
output path: the same merge gives the same bytes.
"""

import json
import math
import statistics
from pathlib import Path

import yaml

import nanomed
from nanomed.figures import canvas, save
from nanomed.merging.schedule import Rule, layer_of, spell
from nanomed.merging.slerp import Stats
from nanomed.merging.source import Checkpoint

UNRELATED = 0.5  # cosine of two matrices: independent ones have about 0, after a change of 30 % it is 0.96
PARTS = ("attention", "mlp", "norm", "other")  # other: embeddings, head, and what is in no layer


def rows(stats: dict[str, Stats], ts: dict[str, float], shapes: dict[str, tuple]) -> list[dict]:
    """One record per tensor: what was found, what was done. Infinite changes (of a zero tensor) are null in JSON."""
    return [{"tensor": name, "shape": list(shapes[name]), "layer": layer_of(name), "t": ts[name], "cos": s.cos,
             "degrees": s.degrees, "relative_change": s.relative_change if s.relative_change < math.inf else None,
             "branch": s.branch, "sums": [s.base, s.cpt, s.change]}
            for name, s in stats.items()]  # fmt: skip


def part_of(name: str) -> str:
    """Attention, mlp or norm of a layer; other."""
    if layer_of(name) is None:
        return "other"
    return "attention" if "attn" in name and "norm" not in name else "mlp" if "mlp" in name else "norm"


def write_report(folder: Path, base: Checkpoint, cpt: Checkpoint, rules: list[Rule], table: list[dict]) -> None:
    """All four files into the folder of a merged model."""
    record = {
        "nanomed": nanomed.__version__, "method": "slerp", "t": spell(rules),
        "base": {"name": base.name, "kind": base.kind, "files": base.identity()},
        "cpt": {"name": cpt.name, "kind": cpt.kind, "files": cpt.identity()},
        "tensors": table,
    }  # fmt: skip
    (folder / "merge_report.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "merge_report.md").write_text(
        f"# Merge report\n\n{summary(base, cpt, rules, table)}\n{tensor_table(table)}", encoding="utf-8"
    )
    plot(folder / "merge_report.svg", table)
    (folder / "README.md").write_text(model_card(base, cpt, rules, table), encoding="utf-8")


def known_stats(out: Path, base: Checkpoint, cpt: Checkpoint) -> tuple[dict[str, Stats], Path] | None:
    """Every tensor's sums from a report beside OUT on these very files, if there is one; and its path."""
    for path in sorted({*out.parent.glob("*/merge_report.json"), *out.parent.glob("*/*/merge_report.json")}):
        try:
            record = json.loads(path.read_text())
            if [record["base"]["files"], record["cpt"]["files"]] == [base.identity(), cpt.identity()]:
                return {row["tensor"]: Stats(*row["sums"]) for row in record["tensors"]}, path
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not ours, or half-written
    return None


# --- words ---------------------------------------------------------------------------------------------------------


def summary(base: Checkpoint, cpt: Checkpoint, rules: list[Rule], table: list[dict]) -> str:
    """A paragraph and a table per part: did it matter, and where."""
    branches = {branch: sum(row["branch"] == branch for row in table) for branch in ("lerp", "slerp", "zero")}
    lines = [
        f"SLERP of `{base.name}` (t = 0, {base.kind}) and `{cpt.name}` (t = 1, {cpt.kind}).", "",
        f"{len(table)} tensors: {branches['lerp']} nearly parallel (|cos| > 0.9995, a change below about 3.2 %), where SLERP "
        f"is linear interpolation; {branches['slerp']} on the arc; {branches['zero']} zero in both.", "",
        "```yaml", yaml.safe_dump({"t": spell(rules)}, sort_keys=False, default_flow_style=None).rstrip(), "```", "",
    ]  # fmt: skip
    return "\n".join(lines) + "\n" + change_table(table)


def total_change(table: list[dict]) -> float:
    """|b-a| / |a| over all the tensors together."""
    base, change = (math.fsum(row["sums"][i] for row in table) for i in (0, 2))
    return math.sqrt(change / base) if base else 0.0


def warnings(table: list[dict], other: str) -> list[str]:
    """One line where the two models are the same, or have nothing in common. other: names the second, "CPT x"."""
    if not any(row["sums"][2] for row in table):
        return [f"{other} holds the same weights as BASE: so does every merge of the two"]
    matrices = [row for row in table if len(row["shape"]) > 1 and row["branch"] != "zero"]
    strange = [row for row in matrices if row["cos"] < UNRELATED]
    if not strange:
        return []
    return [
        f"{other}: {len(strange)} of {len(matrices)} matrices have nothing in common with BASE's (cosine below {UNRELATED}; "
        f"the first is {strange[0]['tensor']}; change of the whole {total_change(table):.1%}): was it trained from BASE?"
    ]


def change_table(table: list[dict]) -> str:
    """How far CPT moved from BASE, for every part of the model, and t there."""
    lines = ["| part | tensors | change | least | most | on the arc | t |", "|---|---|---|---|---|---|---|"]
    for part in (*PARTS, "all"):
        inside = [row for row in table if part in (part_of(row["tensor"]), "all")]
        changes = [row["relative_change"] for row in inside if row["relative_change"] is not None]
        if not changes:
            continue
        low, high = min(row["t"] for row in inside), max(row["t"] for row in inside)
        lines.append(
            f"| {part} | {len(inside)} | {total_change(inside):.3%} | {min(changes):.3%} | {max(changes):.3%} "
            f"| {sum(row['branch'] == 'slerp' for row in inside)} | {low:g}{f' to {high:g}' if high != low else ''} |"
        )
    return "\n".join(lines) + "\n"


def block_table(table: list[dict]) -> str:
    """How far CPT moved from BASE, per block and module: what --stats-only prints."""
    lines = ["layer   attention       mlp      norm     other"]
    for layer in sorted({row["layer"] for row in table}, key=lambda n: (n is None, n)):
        inside = [row for row in table if row["layer"] == layer]
        cells = [[row for row in inside if part_of(row["tensor"]) == part] for part in PARTS]
        lines.append(
            f"{'-' if layer is None else layer:>5}" + "".join(f"{total_change(c):10.3%}" if c else f"{'':10}" for c in cells)
        )
    return "\n".join(lines)


def tensor_table(table: list[dict]) -> str:
    """A line per tensor."""
    lines = ["\n| tensor | t | cos | angle | change | branch |", "|---|---|---|---|---|---|"]
    for row in table:
        change = "from zero" if row["relative_change"] is None else f"{row['relative_change']:.4%}"
        lines.append(
            f"| {row['tensor']} | {row['t']:.4g} | {row['cos']:.7f} | {row['degrees']:.3f}° | {change} | {row['branch']} |"
        )
    return "\n".join(lines) + "\n"


def model_card(base: Checkpoint, cpt: Checkpoint, rules: list[Rule], table: list[dict]) -> str:
    """README.md of the merged model, with the metadata that the Hugging Face hub reads."""
    return (
        f"{_front_matter([base, cpt], 'slerp')}{summary(base, cpt, rules, table)}\n"
        "![Change and t over depth](merge_report.svg)\n\n"
        "Config, tokenizer and chat template are the first model's, and its licence's terms apply; every tensor is in "
        "[merge_report.md](merge_report.md). Made with nanomed's merge.py.\n"
    )


def linear_card(models: list[Checkpoint], config: str) -> str:
    """README.md of a linear merge. config: mergekit's configuration, as given."""
    names = ", ".join(f"`{c.name}` ({c.kind})" for c in models)
    return (
        f"{_front_matter(models, 'linear')}Weighted sum of {names}.\n\n```yaml\n{config.rstrip()}\n```\n\n"
        "Config, tokenizer and chat template are the first model's, and its licence's terms apply. "
        "Made with nanomed's merge.py.\n"
    )


def _front_matter(models: list[Checkpoint], method: str) -> str:
    """The hub's metadata, and the title."""
    # Hub ids, without their revision; local paths mean nothing elsewhere.
    sources = [c.name.partition("@")[0] for c in models if not Path(c.name).exists()]
    front = {"library_name": "transformers", "tags": ["merge", method, "nanomed"]}
    if sources:
        front |= {"base_model": sources, "base_model_relation": "merge"}
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {' + '.join(Path(c.name).name for c in models)}\n\n"


# --- picture -------------------------------------------------------------------------------------------------------


def plot(path: Path, table: list[dict]) -> None:
    """Left: how far each module moved, over depth. Right: the t it was merged with."""
    from matplotlib.ticker import MaxNLocator

    figure, (left, right) = canvas(11, 4, columns=2)
    for part, style in zip(("attention", "mlp", "norm"), ("o-", "s-", "^:"), strict=True):
        layers: dict[int, list[dict]] = {}
        for row in table:
            if row["layer"] is not None and part_of(row["tensor"]) == part:
                layers.setdefault(row["layer"], []).append(row)
        x = sorted(layers)
        left.plot(x, [100 * total_change(layers[i]) for i in x], style, ms=3, lw=1, label=part)
        right.plot(x, [statistics.mean(row["t"] for row in layers[i]) for i in x], style, ms=3, lw=1, label=part)
    for row in table:
        if row["layer"] is None and row["relative_change"] is not None and len(row["shape"]) > 1:
            left.axhline(100 * row["relative_change"], color="0.6", lw=0.8, ls="--", zorder=0)
            name, place = row["tensor"].removesuffix(".weight").split(".")[-1], left.get_yaxis_transform()
            left.text(0.99, 100 * row["relative_change"], name, color="0.5", size=8, ha="right", va="bottom", transform=place)
    left.set(title="How far CPT moved from BASE", xlabel="layer", ylabel="|CPT - BASE| / |BASE|, %", ylim=(0, None))
    right.set(title="t: how much of that was taken", xlabel="layer", ylabel="t (0 = BASE, 1 = CPT)")
    ts = [row["t"] for row in table]
    right.set_ylim(min(0, *ts) - 0.05, max(1, *ts) + 0.05)
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # no layer 0.5
        axes.legend(frameon=False)
    save(figure, path)
