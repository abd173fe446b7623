"""Report: evaluation runs on one page, as Markdown and as HTML with the pictures inside.

    python eval.py report runs/eval/* merged.jsonl --out report

Takes folders of knowledge, judge and failures, and generate's files of answers. Shows accuracy, that of german_medical beside
the paper's numbers, win rates, failures, all of them against t for models with a merge_report.json, and length against win.
Tables link to the raw samples; commits and versions are at the end. A model that knowledge has examined has the name that
it was given there on all of the page. Of several runs, one that is not finished is left out with a warning.
"""

import argparse
import html
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from nanomed import InputError
from nanomed.evaluation import figure, pictures
from nanomed.evaluation.failures import LABELS, spell
from nanomed.evaluation.naming import namer, place, short
from nanomed.evaluation.record import writing
from nanomed.files import read_json, write_durably

KINDS = ("knowledge", "generate", "judge", "failures")
Namer = Callable[[str], str]
P_NOTE = ("Intervals: 95 %; p: McNemar's exact test on the same questions; with several seeds of shots, the exact sign test of "
          "the questions' mean differences.")  # fmt: skip
PAPER_NOTE = ("The paper's averages of MMLU-de (medical) and MedQA-de are of other models and questions: for orientation, "
              "not for comparison.")  # fmt: skip
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0;font-size:13px}td,th{border-bottom:1px solid #ddd;padding:4px 10px;text-align:left}
th{border-bottom:2px solid #888}figure{margin:1em 0}svg{max-width:100%;height:auto}h2{margin-top:2em}a{color:#2f6f9f}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folders of the other commands, answers of generate (A.jsonl)")
    add("--out", type=Path, default=Path("report"), help="folder of report.md and report.html (default: %(default)s)")
    add("--title", default="Evaluation", help="of the page")


def run(args: argparse.Namespace) -> None:
    """The command; InputError if there is no finished run."""
    if args.out.is_file():
        raise InputError(f"--out {args.out}: is a file, expected a folder")
    runs = read_runs(args.runs)
    called, sections = namer(runs), []
    for kind, section in (("knowledge", knowledge), ("judge", judge), ("failures", failures), ("generate", generated)):
        if of_kind := [r for r in runs if r["kind"] == kind]:
            sections += section(of_kind, args.out, called)
    sections += over_t(runs, called) + [provenance(runs, args.out)]
    drawn = {block[1]: block[2] for _, blocks in sections for block in blocks if block[0] == "picture"}
    with writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
        for name, content in drawn.items():
            write_durably(args.out / f"{name}.svg", content)
        for name, text in (("report.md", markdown(args.title, sections)), ("report.html", page(args.title, sections))):
            write_durably(args.out / name, text)
    print(f"{args.out / 'report.html'}: runs: {len(runs)}, pictures: {len(drawn)}; also report.md")


def read_runs(paths: list[Path]) -> list[dict]:
    """Every run once. Of several, one that cannot be shown is left out with a warning; InputError if none is left."""
    paths = list({folder_of(path).resolve(): path for path in paths}.values())
    runs = []
    for path in paths:
        try:
            runs.append(read_run(path))
        except InputError as error:
            if len(paths) == 1:
                raise
            print(f"warning: left out: {error}", file=sys.stderr)
    if not runs:
        raise InputError(f"none of the {len(paths)} paths is a finished run; the warnings say why")
    return runs


def folder_of(path: Path) -> Path:
    """The run's folder: of a file of answers A.jsonl, A.run/ beside it."""
    return path.with_suffix(".run") if path.is_file() else path


def read_run(given: Path) -> dict:
    """run.json of the folder, with "results" and "path". InputError if it is not a finished evaluation."""
    path = folder_of(given)
    if not (path / "run.json").is_file():
        lacks = "run.json" if path == given else f"{path.name} beside it"
        raise InputError(f"{given}: has no {lacks}; expected a folder written by eval.py, or answers of eval.py generate")
    about = read_json(path / "run.json")
    if about.get("kind") not in KINDS:
        raise InputError(f"{path}: is a run of {about.get('kind')!r}; {', '.join(KINDS)} are reported")
    if not about.get("finished") or not (path / "results.json").is_file():
        raise InputError(f"{path}: is not finished; run its command again to resume")
    return about | {"results": read_json(path / "results.json"), "path": path}


# --- sections: (title, [("text", t) | ("table", header, rows) | ("picture", name, svg)]) -----------------------------


def knowledge(runs: list[dict], out: Path, _: Namer) -> list[tuple]:
    """Accuracy of every model on every task: a picture per run, and one table."""
    rows, drawn, notes = [], [], [P_NOTE]
    for number, about in enumerate(runs, 1):
        models, path, shots = about["results"]["models"], about["path"], str(about["config"]["shots"])
        paper = (models[0]["group"] or {}).get("name") in figure.PAPER_GROUPS
        notes += [PAPER_NOTE] if paper and PAPER_NOTE not in notes else []
        drawn += [("text", f"{path.name}, {n_shots(shots)}:")]
        drawn += [("picture", f"accuracy-{number}", figure.draw(about["results"], paper))]
        for same in zip(*(model["tasks"] for model in models), strict=True):  # a task, by every model
            for model, task in zip(models, same, strict=True):
                questions = link(task["n"], path / "samples" / model["name"] / f"{task['task']}.jsonl", out)
                rows.append([task["task"], str(task["shots"]), model["name"], questions, *compared(task["accuracy"], task)])
        for model in models:
            if group := model["group"]:
                rows.append([f"{group['name']}, macro", shots, model["name"], "", *compared(group["macro"], group)])
    header = ["task", "shots", "model", "questions", "accuracy", "to the first model, points"]
    return [("Knowledge", [*drawn, ("table", header, rows), ("text", " ".join(notes))])]


def compared(value: float, entry: dict) -> tuple[str, str]:
    """An accuracy with its interval, and its difference to the first model."""
    if not (gap := entry["difference"]):
        return rate(value, entry["ci"]), "–"
    delta, low, high = (100 * x for x in (gap["delta"], *gap["ci"]))
    p = f", p = {gap['mcnemar_p']:.2g}" if "mcnemar_p" in gap else ""
    return rate(value, entry["ci"]), f"{delta:+.1f} [{low:+.1f}, {high:+.1f}]{p}"


def judge(runs: list[dict], out: Path, called: Namer) -> list[tuple]:
    """Win rates, the judge's behaviour, and length against win."""
    rows, blocks, doubts = [], [], []
    for number, about in enumerate(runs, 1):
        r = about["results"]
        label = f"{called(r['a'])} against {called(r['b'])}"
        p = f", p = {r['sign_p']:.2g}" if "sign_p" in r else ""  # of the exact sign test
        share = lambda value: "–" if value is None else f"{100 * value:.0f} %"  # noqa: E731
        rows.append([label, short(r["judge"]), link(r["n"], about["path"] / r.get("samples", "games.jsonl"), out),
                     " / ".join(share(r[key]) for key in ("win", "tie", "loss")), rate(r["win_rate"], r["ci"]) + p,
                     "–" if r["length_controlled"] is None else rate(r["length_controlled"], r["length_controlled_ci"]),
                     share(r["consistency"]),
                     share(r["first_position_rate"]), f"{r['unreadable']}"])  # fmt: skip
        doubts += [("text", f"{label}: {line}.") for line in r.get("warnings", ())]
        if r.get("points"):
            blocks.append(("picture", f"length-{number}", pictures.length_and_win(label, r["points"], r["length_controlled"])))
    header = ["comparison", "judge", "prompts", "win / tie / loss", "win rate", "at equal lengths", "orders agree",
              "first position wins", "unreadable"]  # fmt: skip
    bars = pictures.win_rates([(row[0], about["results"]) for row, about in zip(rows, runs, strict=True)])
    return [("Win rates", [("picture", "win-rates", bars), ("table", header, rows), *doubts]), ("Length against win", blocks)]


def failures(runs: list[dict], out: Path, called: Namer) -> list[tuple]:
    """One column per model, references before what was compared with them; one line per figure."""
    columns: dict[str, dict] = {}
    for about in runs:
        r, n = about["results"], link(about["results"]["n"], about["path"] / "samples.jsonl", out)
        if r["ref"]:
            columns.setdefault(called(r["ref"]), {"n": n, **r["of_ref"]["language"], **r["of_ref"]["verbosity"]})
        name = called(r["a"])
        name = f"{name} ({about['path'].name})" if name in columns else name
        columns[name] = {"n": n, **r["language"], **r["verbosity"]}
    names = [name for name in LABELS if any(name in column for column in columns.values())]
    rows = [["answers", *(column["n"] for column in columns.values())]]
    rows += [[LABELS[name], *(spell(name, column.get(name)) for column in columns.values())] for name in names]
    units = ", ".join(sorted({about["results"]["unit"] for about in runs}))
    return [
        (
            "Failures",
            [("table", ["", *columns], rows), ("text", f"Lengths in {units}. Intervals: 95 %, over prompts.")],
        )
    ]


def generated(runs: list[dict], out: Path, called: Namer) -> list[tuple]:
    """The answers themselves, linked."""
    rows = [[called(r["results"]["model"]), link(r["results"]["n"], r["path"].parent / r["results"]["answers"], out),
             r["config"]["where"], str(r["results"]["cut"]), f"{r['config']['max_new_tokens']}"] for r in runs]  # fmt: skip
    return [("Answers", [("table", ["model", "answers", "where", "cut", "tokens at most"], rows)])]


def over_t(runs: list[dict], called: Namer) -> list[tuple]:
    """Accuracy, win rate and mixing over the share t of the continued model: a curve per figure, and per pair of merged models
    if there are several, of at least two different t."""
    found: dict[str, dict[str, dict]] = {}  # curve → path of the model → {value, ci}
    for about in runs:
        r, config = about["results"], about["config"]
        if about["kind"] == "knowledge":
            how = [n_shots(config["shots"]), *(["chat"] if config["chat"] else []), config["cue"]]
            how += [f"first {config['limit']}"] if config["limit"] else []
            for model in r["models"]:
                for task in model["tasks"]:
                    label = ", ".join([f"accuracy, {task['task']}", *how])
                    found.setdefault(label, {})[model["path"]] = {"value": task["accuracy"], "ci": task["ci"]}
        elif about["kind"] == "judge":
            label = f"win rate against {called(r['b'])}, by {short(r['judge'])}, {r['prompt']}"
            found.setdefault(label, {})[r["a"]] = {"value": r["win_rate"], "ci": r["ci"]}
        elif about["kind"] == "failures":
            found.setdefault("answers that mix languages", {})[r["a"]] = r["language"]["mixed"]
            if r.get("of_ref"):
                found["answers that mix languages"].setdefault(r["ref"], r["of_ref"]["language"]["mixed"])
    pairs, curves = shares_of({path for models in found.values() for path in models}), {}
    names = [short(cpt) for _, cpt in pairs]
    for label, models in found.items():
        for (base, cpt), shares in pairs.items():
            name = short(cpt) if names.count(short(cpt)) == 1 else f"{base} to {cpt}"
            points = [(shares[place(path)], figure) for path, figure in models.items() if place(path) in shares]
            if len({t for t, _ in points}) > 1:
                curves[label if len(pairs) == 1 else f"{label}, {name}"] = points
    return [("Against t", [("picture", "against-t", pictures.against_t(curves))])] if curves else []


def shares_of(models: set[str]) -> dict[tuple[str, str], dict[str, float]]:
    """(BASE, CPT) → t of every model of that pair, itself at 0 and 1, from the merge_report.json of merges with a single t. All
    models by their `place`: one may be BASE of a pair and a merge of another."""
    pairs: dict[tuple[str, str], dict[str, float]] = {}
    for name in sorted(models):
        path = Path(name) / "merge_report.json"
        if path.is_file() and isinstance((record := read_json(path)).get("t"), int | float):
            ends = place(record["base"]["name"]), place(record["cpt"]["name"])
            pairs.setdefault(ends, {ends[0]: 0.0, ends[1]: 1.0})[place(name)] = record["t"]
    return pairs


def provenance(runs: list[dict], out: Path) -> tuple:
    """Where every number comes from."""
    rows = []
    for r in runs:
        versions = ", ".join(f"{name} {version}" for name, version in r["versions"].items())
        commit, begun = (r.get("git_commit") or "–")[:12], r["created"][:16].replace("T", " ")
        rows.append([link(str(r["path"]), r["path"] / "run.json", out), r["kind"], commit, begun, versions])
    return ("Runs", [("table", ["run", "kind", "commit", "begun, UTC", "versions"], rows)])


# --- words ---------------------------------------------------------------------------------------------------------


def rate(value: float, ci: list[float]) -> str:
    """A share and its interval in per cent."""
    return f"{100 * value:.1f} % [{100 * ci[0]:.1f}, {100 * ci[1]:.1f}]"


def n_shots(n: int | str) -> str:
    """The number in words of the page."""
    return f"{n} shot{'' if int(n) == 1 else 's'}"


def link(text: object, path: Path, out: Path) -> str:
    """A Markdown link from the report's folder."""
    target = os.path.relpath(path, out).replace(" ", "%20").replace(")", "%29")
    return f"[{text}]({target})"


def markdown(title: str, sections: list[tuple]) -> str:
    """The page as Markdown; pictures are files beside it."""
    lines = [f"# {title}", ""]
    for heading, blocks in sections:
        lines += [f"## {heading}", ""]
        for block in blocks:
            if block[0] == "table":
                cells = [block[1], ["---"] * len(block[1]), *block[2]]
                lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
            else:
                lines += [f"![{heading}]({block[1]}.svg)" if block[0] == "picture" else block[1]]
            lines.append("")
    return "\n".join(lines)


def page(title: str, sections: list[tuple]) -> str:
    """The page as one HTML file."""
    parts = []
    for heading, blocks in sections:
        parts.append(f"<h2>{html.escape(heading)}</h2>")
        for block in blocks:
            if block[0] == "table":
                rows = [f"<tr>{''.join(f'<{tag}>{inline(cell)}</{tag}>' for cell in row)}</tr>"
                        for tag, row in [("th", block[1]), *(("td", row) for row in block[2])]]  # fmt: skip
                parts.append(f"<table>{''.join(rows)}</table>")
            else:
                is_picture = block[0] == "picture"
                parts.append(f"<figure>{own_ids(block[1], block[2])}</figure>" if is_picture else f"<p>{inline(block[1])}</p>")
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f"{head}\n<h1>{html.escape(title)}</h1>\n" + "\n".join(parts) + "\n"


def own_ids(name: str, content: str) -> str:
    """The SVG with its ids prefixed: several of them share one page."""
    return re.sub(r'(\bid="|href="#|url\(#)', lambda match: f"{match[1]}{name}-", content)


def inline(text: str) -> str:
    """Escaped, with its Markdown links as links."""
    return re.sub(r"\[([^\]]*)\]\(([^)]*)\)", r'<a href="\2">\1</a>', html.escape(text))
