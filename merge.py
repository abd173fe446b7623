"""Merge a continually pre-trained model with the instruct model it came from, layer by layer.

    python merge.py BASE CPT OUT --t 0.5                             one model
    python merge.py BASE CPT OUT --sweep 0,0.25,0.5,0.75,1           several, reading the inputs once: OUT/t-0.25, ...
    python merge.py BASE CPT --stats-only                            how far CPT moved from BASE, nothing written
    python merge.py OUT --mergekit-yaml config.yml                   a mergekit configuration
    python merge.py tune BASE CPT OUT --domain BINS ...              search t (python merge.py tune --help)

Continual pre-training degrades instruction following; interpolating back towards the instruct model restores it, at some
cost in the domain. t is the share of CPT: 0 is BASE, 1 is CPT. Both are local folders or hub ids (owner/name, or
owner/name@revision); CPT may be a run folder of train.py (then the weights of its newest checkpoint are merged, in the
precision of the training). Memory does not grow with the model.
"""

import argparse
import sys
from pathlib import Path

from nanomed import InputError, run_script
from nanomed.files import staging, write_durably
from nanomed.merging import checks, mergekit_yaml, report
from nanomed.merging.mergekit_yaml import DTYPES
from nanomed.merging.schedule import PRESETS, Rule, evaluate, read_rules
from nanomed.merging.source import Checkpoint, open_checkpoint
from nanomed.merging.write import stats_of, warn, write_linear, write_merges
from nanomed.model_files import ALL_PATTERNS, LEGAL_PATTERNS, copy_carried


def merge_pair(args: argparse.Namespace) -> None:
    """The plain command line: SLERP of BASE and CPT with one t or schedule, or with several t."""
    base, cpt = open_checkpoint(args.base, "BASE"), open_checkpoint(args.cpt, "CPT")
    warn(checks.check_pair(base, cpt, "CPT"))
    if args.stats_only:
        return print_stats(base, cpt)
    checks.check_base(base)
    wanted = schedules(args)
    for rules in wanted.values():
        evaluate(rules, base.tensors, args.t_file or "--t")  # finds a tensor without t
    warn_outside(wanted)
    dtypes = {name: DTYPES[args.dtype] if args.dtype else tensor.dtype for name, tensor in base.tensors.items()}
    if args.emit_mergekit:
        dtype = max(set(dtypes.values()), key=list(dtypes.values()).count)
        configuration = mergekit_yaml.spell_config(base, cpt, next(iter(wanted.values())), dtype)
        if args.emit_mergekit.exists() and args.emit_mergekit.read_text(encoding="utf-8") != configuration:
            raise InputError(f"--emit-mergekit {args.emit_mergekit}: exists already with other content; choose another")
    if args.out:
        write_merges(base, cpt, args.out, wanted, dtypes, args.verify)
    if args.emit_mergekit:  # last: a merge that fails leaves nothing
        write_durably(args.emit_mergekit, configuration)


def schedules(args: argparse.Namespace) -> dict[str, list[Rule]]:
    """Subfolder of OUT ("" is OUT itself) → rules for t."""
    if args.sweep:
        values = [number(text, "--sweep") for text in args.sweep.split(",")]
        return {f"t-{t:.12g}": read_rules(t, "--sweep") for t in values}
    if args.t_file:
        return {"": read_t_file(args.t_file)}
    return {"": read_rules(args.t if args.t is not None else PRESETS[args.preset or "uniform"], "--t")}


def read_t_file(path: Path) -> list[Rule]:
    """The rules of a t.yaml, whose one key is t."""
    content = mergekit_yaml.read_yaml(path, f"--t-file {path}")
    if not isinstance(content, dict) or content.keys() != {"t"}:
        raise InputError(f"--t-file {path}: expected one key, t: a number, a list of numbers, or filters with values")
    return read_rules(content["t"], f"--t-file {path}")


def number(text: str, flag: str) -> float:
    """A finite number, or InputError naming the flag."""
    try:
        value = float(text)
        if abs(value) < float("inf"):
            return value
    except ValueError:
        pass
    raise InputError(f"{flag}: {text!r} is not a number")


def warn_outside(wanted: dict[str, list[Rule]]) -> None:
    """A t outside [0, 1] is allowed, with a warning."""
    values = {v for rules in wanted.values() for rule in rules for v in rule.values}
    if outside := sorted(v for v in values if not 0 <= v <= 1):
        warn([f"t = {outside[0]:g} lies outside [0, 1]: that extrapolates beyond the two models"])


def print_stats(base: Checkpoint, cpt: Checkpoint) -> None:
    """--stats-only: how far CPT moved, per block and module."""
    stats = stats_of(base, cpt)
    table = report.rows(stats, dict.fromkeys(stats, 0.0), {name: t.shape for name, t in base.tensors.items()})
    warn(report.warnings(table, f"CPT {cpt.name}"))
    n_arc = sum(row["branch"] == "slerp" for row in table)
    print("change: |CPT - BASE| / |BASE|\n" + report.block_table(table))
    print(f"all {report.total_change(table):.3%}; {n_arc} of {len(table)} tensors moved far enough for SLERP not to be LERP")


# --- mergekit's configurations -------------------------------------------------------------------------------------


def merge_yaml(path: Path, out: Path, check: bool) -> None:
    """--mergekit-yaml: slerp and linear run here, mergekit does the rest."""
    recipe = mergekit_yaml.read_config(path)
    if isinstance(recipe, str):
        return run_mergekit(path, out, recipe, check)
    models = [open_checkpoint(name, "model") for name in recipe.models]
    base = models[0]
    for other in models[1:]:
        warn(checks.check_pair(base, other, "model"))
    n_layers = base.config().get("num_hidden_layers")
    if recipe.n_layers not in (None, n_layers):
        return run_mergekit(path, out, f"a layer_range of {recipe.n_layers} of {n_layers} layers", check)
    checks.check_base(base)
    dtypes = {name: recipe.dtype or tensor.dtype for name, tensor in base.tensors.items()}
    if recipe.method == "slerp":
        evaluate(recipe.rules[0], base.tensors, str(path))
        warn_outside({"": recipe.rules[0]})
        return write_merges(base, models[1], out, {"": recipe.rules[0]}, dtypes, check)
    write_linear(path, models, out, recipe, dtypes, check)


def run_mergekit(path: Path, out: Path, why: str, check: bool) -> None:
    """Let mergekit do the whole merge, in a staging folder as ours."""
    if check:
        raise InputError(f"--verify: {path} has {why}, which mergekit itself runs; only slerp and linear can be verified")
    names = mergekit_yaml.models_of(path)
    checks.check_out(out, 0)
    base = Path(names[0]) if names and Path(names[0]).is_dir() else None
    if base:  # mergekit would write a tokenizer of its own making
        checks.check_base(open_checkpoint(names[0], "model"))
    print(f"{why}: calling mergekit", file=sys.stderr)
    with staging(out) as tmp:
        mergekit_yaml.call_mergekit(path, tmp)
        if base:  # mergekit copies the commonest files only
            copy_carried(base, tmp, LEGAL_PATTERNS if mergekit_yaml.has_own_tokenizer(path) else ALL_PATTERNS)
    print(f"merged: {out}")


# --- command line --------------------------------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, except tune's."""
    parser = argparse.ArgumentParser(
        prog="merge.py",
        usage="merge.py [options] BASE CPT OUT | BASE CPT --stats-only | OUT --mergekit-yaml FILE",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("paths", nargs="+", metavar="BASE CPT OUT", help="with --mergekit-yaml only OUT, with --stats-only no OUT")
    add("--t", type=float, help="share of CPT for every tensor (default 0.5)")
    add("--preset", choices=PRESETS, help="uniform: 0.5; gradient: BioMistral-7B-SLERP's, mergekit's stock example")
    add(
        "--t-file",
        type=Path,
        metavar="T.YAML",
        help="t by filter and gradient, spelled as mergekit does; tune writes one",
    )
    add("--sweep", metavar="T,T,...", help="several t at once, each merge in its folder OUT/t-T")
    add("--dtype", choices=DTYPES, help="of the result (default: BASE's own, tensor by tensor)")
    add("--verify", action="store_true", help="read the result back and check every tensor against the formula")
    add("--stats-only", action="store_true", help="print how far CPT moved, per block and module; write nothing")
    add(
        "--emit-mergekit",
        type=Path,
        metavar="FILE",
        help="write the equivalent mergekit configuration; OUT is optional then",
    )
    add(
        "--mergekit-yaml",
        type=Path,
        metavar="FILE",
        help="run a mergekit configuration: slerp and linear here, everything else by mergekit",
    )
    args = parser.parse_args(argv)
    given = [f"--{f.replace('_', '-')}" for f in ("t", "preset", "t_file", "sweep") if getattr(args, f) is not None]
    if len(given) > 1:
        parser.error(f"{' and '.join(given)} exclude each other")
    if args.mergekit_yaml:
        if given or args.dtype or args.stats_only or args.emit_mergekit:
            parser.error("--mergekit-yaml defines the whole merge; only --verify may be added")
        if len(args.paths) != 1:
            parser.error("--mergekit-yaml takes one path, OUT")
        return args
    n_paths = {2} if args.stats_only else {2, 3} if args.emit_mergekit else {3}
    if len(args.paths) not in n_paths:
        parser.error("expected BASE CPT and OUT" if 3 in n_paths else "expected BASE CPT")
    if args.emit_mergekit and args.sweep:
        parser.error("--emit-mergekit writes one configuration, --sweep makes several merges")
    args.base, args.cpt, out = [*args.paths, None][:3]
    args.out = Path(out) if out else None
    return args


def main() -> None:
    """The command line."""
    if sys.argv[1:2] == ["tune"]:
        from nanomed.merging import tune  # needs torch

        return tune.main(sys.argv[2:])
    args = parse(sys.argv[1:])
    if args.mergekit_yaml:
        return merge_yaml(args.mergekit_yaml, Path(args.paths[0]), args.verify)
    merge_pair(args)


if __name__ == "__main__":
    run_script(main, "nothing was written")
