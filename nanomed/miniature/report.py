"""The miniature's page: report.md, report.html (self-contained) and figure.svg, from results.json alone.

The figure is the paper's question in one picture: knowledge of the domain and following of instructions, for the base
model, the merges by t, and the continued model; beside it what forgetting costs in bits per byte.
"""

import html
from itertools import pairwise
from pathlib import Path

from nanomed.evaluation.figure import PAPER
from nanomed.figures import canvas, svg

NOTES = """The paper (arXiv 2604.19394) continues 7B and 24B instruct models on 7.3 million medical web documents and merges
them back by SLERP: the domain's accuracy rises, instruction following suffers in between, and the merge recovers it.

What carries over, and the table of expectations says whether it did: continuing on plain text teaches facts and degrades
the form of answers; a merge keeps most of the facts and restores most of the form; leaks and copies must be removed first.

What does not: every percentage, the learning rate and t, and how much is forgotten. A model of 2.6 million parameters that
is to learn two hundred facts in minutes moves by a fifth to a third of its weights' norm. Without a share of the base's
own prose and chats in between it forgets to answer at all, and no t brings that back (nanomed/miniature/stages.py has the
trials). A 7B moves by a few per cent at most, and the paper is not known to replay anything.

The base has read half of the diseases, since an instruct model knows the language of medicine; it is continued on the other half
and asked about that. The judge is a stand-in that compares facts and form.

The best t is chosen on one half of the questions and instructions; the table "Headline" reports the other half."""


def draw(results: dict) -> str:
    """The figure's <svg>."""
    figure, (left, right) = canvas(11, 4.2, columns=2)
    models = results["models"]
    ts = [m["t"] for m in models.values()]
    known = [100 * m["accuracy"] for m in models.values()]
    low, high = ([100 * abs(m["ci"][i] - m["accuracy"]) for m in models.values()] for i in (0, 1))
    left.errorbar(ts, known, [low, high], marker="o", capsize=3, label="medical knowledge (95 % interval)")
    left.plot(ts, [100 * m["following"] for m in models.values()], marker="s", label="instructions followed exactly")
    left.plot(ts, [100 * m["medical"] for m in models.values()], marker="^", lw=1, label="medical answer in form")
    left.axhline(25, color="0.7", lw=1, ls=":")
    left.text(0.25, 24, "chance", va="top", color="0.4", fontsize=8)
    best = models[results["best"]]["t"]
    left.axvline(best, color="0.85", lw=6, zorder=0)
    names, lines = ["base" if t == 0 else "continued" if t == 1 else f"{t:g}" for t in ts], [0]
    for a, b in pairwise(ts):  # a label without room beside the previous one goes a line lower
        lines.append(lines[-1] + 1 if b - a < (0.2 if b == 1 else 0.07) else 0)
    left.set_xticks(ts, ["\n" * line + name for line, name in zip(lines, names, strict=True)])
    left.set(title="Merged at t", xlabel=f"t (best: {best:g})", ylabel="%", ylim=(0, 103))
    meter = results["meter"]
    for name, label in (("med", "medicine, held out"), ("general", "general text")):
        right.plot(meter["step"], meter[name], marker="o", label=label)
    right.set(title="Forgetting meter of the continued run", xlabel="step", ylabel="bits per byte", ylim=(0, None))
    for axes, free in ((left, (0.02, 0.62)), (right, "center right")):  # "best" ignores error bars
        axes.legend(frameon=False, fontsize=9, loc=free)
    return svg(figure)


def rows(results: dict) -> dict[str, list[list[str]]]:
    """The page's tables: title → rows, the first of them the header."""
    share = lambda x: f"{100 * x:.1f} %"  # noqa: E731
    spell = lambda f: f"{f['value']:.2f} [{f['ci'][0]:.2f}, {f['ci'][1]:.2f}]"  # noqa: E731
    models = [["model", "t", "medical knowledge", "95 % interval", "instructions followed", "medical answer in form"]]
    for name, m in results["models"].items():
        models.append([name, f"{m['t']:g}", share(m["accuracy"]), " to ".join(map(share, m["ci"]))])
        models[-1] += [share(m["following"]), share(m["medical"])]
    judged = [["A", "B", "win", "tie", "loss", "win rate of A", "95 % interval"]]
    judged += [[j["a"], j["b"], *(share(j[key]) for key in ("win", "tie", "loss", "win_rate")), " to ".join(map(share, j["ci"]))]
               for j in results["judged"]]  # fmt: skip
    failures = [["model", "answers without an end", "length, ratio to base", "repeated 4-grams"]]
    failures += [[f["a"], *(spell(f["verbosity"][key]) for key in ("no_end", "ratio_to_ref", "repeated_4grams"))]
                 for f in results["failures"]]  # fmt: skip
    interval = lambda ci: " to ".join(share(x) for x in ci)  # noqa: E731
    headline = [["model", "medical knowledge", "95 % interval", "instructions followed", "95 % interval"]]
    for name in ("base", "continued", results["best"]):
        half = results["models"][name]["report"]
        headline.append(
            [name, share(half["accuracy"]), interval(half["ci"]), share(half["following"]), interval(half["following_ci"])]
        )
    c = results["corpus"]
    corpus = [["crawl", "kept", "of it medical", "of the medical kept", "leaks in it", "dropped as leaks", "as copies"]]
    corpus.append([f"{c['documents']:,}", f"{c['kept']:,}", share(c["precision"]), share(c["recall"])])
    corpus[-1] += [f"{c['leaks_kept']} of {c['leaks']}", str(c["contaminated"])]
    corpus[-1] += [f"{c['duplicates_dropped']} of {c['copies']}"]
    seconds = [["stage", *results["seconds"], "all"]]
    seconds += [["s", *(f"{s:.0f}" for s in results["seconds"].values()), f"{sum(results['seconds'].values()):.0f}"]]
    expected = [["expected", "what must hold", "measured", ""]]
    expected += [[e["name"], e["wanted"], e["measured"], "holds" if e["holds"] else "FAILED"] for e in results["expectations"]]
    gain = lambda a, b: f"{b - a:+.1f} points"  # noqa: E731
    base, best = (100 * results["models"][name]["report"]["accuracy"] for name in ("base", results["best"]))
    paper = [
        ["", "before", "after", "gain"],
        ["ours: base, best merge", f"{base:.1f} %", f"{best:.1f} %", gain(base, best)],
    ]
    for a, b in (
        ("Mistral-7B-Instruct", "DeFineMed-Mistral-7B-SLERP"),
        ("Qwen2.5-7B-Instruct", "DeFineMed-Qwen2.5-7B"),
    ):
        paper.append([f"the paper: {a}, {b}", f"{PAPER[a]:.1f} %", f"{PAPER[b]:.1f} %", gain(PAPER[a], PAPER[b])])
    return {
        "Headline: t chosen on one half, reported on the other": headline,
        "Models, all questions and instructions": models,
        "Beside the paper: other medical questions with four options": paper,
        "Corpus": corpus,
        "Compared by the stand-in judge": judged,
        "Failure modes": failures,
        "Expectations": expected,
        "Time": seconds,
    }


def markdown(table: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def as_html(table: list[list[str]]) -> str:
    """A table in HTML."""
    row = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"  # noqa: E731
    return "<table>" + row(table[0], "th") + "".join(row(r, "td") for r in table[1:]) + "</table>"


def table(expectations: list[dict]) -> str:
    """The expectations for a terminal, one per line."""
    width = max(len(e["name"]) for e in expectations)
    return "\n".join(f"{'ok    ' if e['holds'] else 'FAILED'}  {e['name']:<{width}}  {e['measured']}  (expected: {e['wanted']})"
                     for e in expectations)  # fmt: skip


def write(out: Path, results: dict) -> None:
    """figure.svg, report.md and report.html in OUT."""
    picture, tables = draw(results), rows(results)
    title = "The paper in miniature" + (" (fast: too small to learn much)" if results["fast"] else "")
    (out / "figure.svg").write_text(picture, encoding="utf-8")
    sections = "\n\n".join(f"## {name}\n\n{markdown(t)}" for name, t in tables.items())
    (out / "report.md").write_text(f"# {title}\n\n![](figure.svg)\n\n{NOTES}\n\n{sections}\n", encoding="utf-8")
    body = "".join(f"<h2>{name}</h2>{as_html(t)}" for name, t in tables.items())
    notes = "".join(f"<p>{html.escape(part)}</p>" for part in NOTES.split("\n\n"))
    style = ("body{font:15px/1.5 sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
             "td,th{padding:.25em .8em;border-bottom:1px solid #ddd;text-align:left}svg{max-width:100%;height:auto}")  # fmt: skip
    head = f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{style}</style><h1>{title}</h1>"
    page = head + picture + notes + body
    (out / "report.html").write_text(page + "\n", encoding="utf-8")
