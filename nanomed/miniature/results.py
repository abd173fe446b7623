"""The results of a miniature's stages as numbers, and what must hold of them.

`measure` reads files only: the results.json of the evaluations, the metrics of the runs, the reports of the corpus.
`expectations` is a list of (name, what must hold, what was measured, does it hold): a stage that stops doing its part
fails one of them by name (tests/bench/miniature_broken.py breaks four of them on purpose).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanomed.evaluation.stats import compare, wilson
from nanomed.files import read_json, read_jsonl
from nanomed.miniature.judge import follows, points
from nanomed.miniature.stages import name_of

TASK = "miniature_medizin"


def answered_correctly(out: Path, name: str) -> np.ndarray:
    """(n,) bool: which questions of the exam a model answered correctly, in the order of the exam."""
    samples = read_jsonl(out / "eval" / "knowledge" / "samples" / name / f"{TASK}.jsonl")
    return np.array([sample["correct"] for _, sample in samples])


def read_answers(out: Path, name: str) -> tuple[dict[str, dict], dict[str, dict]]:
    """The prompts, and the model's answers, by id."""
    asked = {record["id"]: record for _, record in read_jsonl(out / "world" / "prompts.jsonl")}
    return asked, {a["id"]: a for _, a in read_jsonl(out / "answers" / f"{name}.jsonl")}


def followed(asked: dict[str, dict], answers: dict[str, dict]) -> np.ndarray:
    """(n,) bool: which of the instructions are followed exactly, in the order of the prompts."""
    return np.array([follows(a, answers[i]["answer"]) for i, a in asked.items() if a["kind"] == "following"])


def scores(correct: np.ndarray, exact: np.ndarray) -> dict:
    """Accuracy on questions and share of instructions followed exactly, each with its 95 % interval (Wilson).

    correct: (n,) bool, one per question; exact: (m,) bool, one per instruction.
    """
    accuracy, following = float(correct.mean()), float(exact.mean())
    return {"accuracy": accuracy, "ci": wilson(accuracy, len(correct)), "n": len(correct),
            "following": following, "following_ci": wilson(following, len(exact))}  # fmt: skip


def model_row(out: Path, name: str, t: float) -> dict:
    """Everything measured of one model.

    The top level covers all questions and instructions. `choose` and `report` cover one half each (every other one): t is
    chosen on the first and reported on the second, so that the reported numbers are not selected for.
    """
    correct, (asked, answers) = answered_correctly(out, name), read_answers(out, name)
    exact = followed(asked, answers)
    medical = [i for i, record in asked.items() if record["kind"] == "medical"]
    return {
        "t": t,
        **scores(correct, exact),
        "medical": sum(points(asked[i], answers[i]["answer"]) == 2 for i in medical) / len(medical),
        "cut": sum(a["finish_reason"] == "length" for a in answers.values()) / len(answers),
        "choose": scores(correct[0::2], exact[0::2]),
        "report": scores(correct[1::2], exact[1::2]),
    }


def models(out: Path, ts: tuple[float, ...]) -> dict[str, dict]:
    """model_row of base, every merge, and the continued model, in this order."""
    names = {"base": 0.0, **{name_of(t): t for t in ts}, "continued": 1.0}
    return {name: model_row(out, name, t) for name, t in names.items()}


def kept(found: dict[str, dict], name: str, half: str = "report") -> tuple[float, float]:
    """The shares of the continued model's gain in knowledge and of the base's instruction following that a model keeps."""
    base, top, model = (found[name][half] for name in ("base", "continued", name))
    gain = top["accuracy"] - base["accuracy"]
    knowledge = (model["accuracy"] - base["accuracy"]) / gain if gain > 0 else 0.0
    following = model["following"] / base["following"] if base["following"] else 0.0
    return knowledge, following


def best_merge(found: dict[str, dict], ts: tuple[float, ...]) -> float:
    """The t that follows instructions best among those that keep 70 % of the gain, on the `choose` half.

    The t that keeps most of the gain where none keeps 70 % of it.
    """
    shares = {t: kept(found, name_of(t), "choose") for t in ts}
    enough = [t for t in ts if shares[t][0] >= 0.7]
    if not enough:
        return max(ts, key=lambda t: shares[t][0])
    return max(enough, key=lambda t: (shares[t][1], shares[t][0]))


def won_back(out: Path, best: str) -> dict:
    """The difference in instructions followed, best merge minus continued, on the `report` half, with its paired interval."""
    merged, continued = (followed(*read_answers(out, name))[1::2] for name in (best, "continued"))
    share, ci, _ = compare(np.asarray(merged, float) - continued)
    return {"share": share, "ci": ci}


def corpus(out: Path) -> dict:
    """What the crawl contained and what was kept, by the ground truth that no stage has seen."""
    import pyarrow.parquet as pq

    truth = read_json(out / "world" / "truth.json")["crawl"]
    ids = [i for p in sorted((out / "corpus" / "corpus").glob("*.parquet")) for i in pq.read_table(p)["id"].to_pylist()]
    counts, held = read_json(out / "corpus" / "report.json")["counts"], set(ids)
    bodies = {i.split("-", 1)[1] for i in ids if i.startswith(("med-", "copy-"))}
    of = lambda kind: len(held & set(truth[kind]))  # noqa: E731
    return {
        "documents": counts["documents"], "kept": len(ids), "leaks": len(truth["leak"]), "leaks_kept": of("leak"),
        "contaminated": counts.get("contaminated", 0), "copies": len(truth["copy"]),
        "twice": of("medical") + of("copy") - len(bodies), "duplicates_dropped": counts.get("duplicate_texts", 0),
        "precision": 1 - of("general") / max(1, len(ids)),
        "recall": len(bodies) / len(truth["medical"]),
    }  # fmt: skip


def meter(out: Path) -> dict[str, list[float]]:
    """Bits per byte of both validation sets at every evaluation of the continued run."""
    rows = [row for _, row in read_jsonl(out / "continued" / "metrics.jsonl") if "val_med_bpb" in row]
    return {"step": [row["step"] for row in rows]} | {name: [row[f"val_{name}_bpb"] for row in rows] for name in ("med", "general")}


def measure(out: Path, ts: tuple[float, ...], stages: list[str]) -> dict:
    """Everything the report says. stages: their names, in order."""
    from nanomed.miniature import check as checks  # torch

    judged = [read_json(path) for path in sorted((out / "eval").glob("judge-*/results.json"))]
    judged = [{key: value for key, value in j.items() if key != "points"} for j in judged]  # every prompt: the folder has it
    failures = [read_json(path) for path in sorted((out / "eval").glob("failures-*/results.json"))]
    check = checks.losses(out) | {"way": {name_of(t): checks.way_gone(out, name_of(t)) for t in ts}}
    done, found = {stage: read_json(out / "stages" / f"{stage}.json") for stage in stages}, models(out, ts)
    base, continued = (followed(*read_answers(out, name)) for name in ("base", "continued"))
    forgotten, ci, _ = compare(np.asarray(base, float) - continued)
    best = name_of(best_merge(found, ts))
    return {"models": found, "best": best, "won_back": won_back(out, best), "corpus": corpus(out), "meter": meter(out),
            "forgotten": {"share": forgotten, "ci": ci},
            "judged": judged, "failures": failures, "check": check,
            "seconds": {stage: about["seconds"] for stage, about in done.items()},
            "peak_gb": max(about.get("peak_gb", 0.0) for about in done.values())}  # fmt: skip


@dataclass(frozen=True)
class Expectation:
    """What must hold, and whether it does."""

    name: str
    wanted: str
    measured: str
    holds: bool


def expectations(r: dict, fast: bool) -> list[Expectation]:
    """All of them. A fast run is too small for the distances: of the models it checks the order only."""
    m, c, best, check, lost = r["models"], r["corpus"], r["best"], r["check"], r["forgotten"]
    base, top, merged = m["base"], m["continued"], m[best]
    gain, share, back = top["accuracy"] - base["accuracy"], kept(m, best), r["won_back"]
    medical, general = (r["meter"][name] for name in ("med", "general"))
    off = lambda a, b: abs(check[a] / check[b] - 1)  # noqa: E731
    always = [
        ("leaked questions are gone", "none in the corpus, 90 % of them dropped as such",
         f"{c['leaks_kept']} of {c['leaks']} in it, {c['contaminated']} dropped",
         c["leaks_kept"] == 0 and c["contaminated"] >= 0.9 * c["leaks"]),
        ("copies are gone", "no text twice, 80 % of the copies dropped",
         f"{c['twice']} twice, {c['duplicates_dropped']} of {c['copies']} dropped",
         c["twice"] == 0 and c["duplicates_dropped"] >= 0.8 * c["copies"]),
        ("the corpus is medical", "95 % of it, and 80 % of what there was",
         f"{percent(c['precision'])}, {percent(c['recall'])}", c["precision"] >= 0.95 and c["recall"] >= 0.8),
        ("the loss is of the next token", "train.py's figure, with labels read from the documents, within 0.5 %",
         f"{check['loss']:.4f}, {check['packed']:.4f}", off("loss", "packed") < 0.005),
        ("documents do not see each other", "the loss in packed windows is that of each piece alone, within 0.5 %",
         f"{check['packed']:.4f}, {check['alone']:.4f}", off("packed", "alone") < 0.005),
        ("t goes from base to continued", "a merge has gone the share t of the way, within 0.06 (an arc is longer than its chord)",
         ", ".join(f"{name}: {way:.2f}" for name, way in check["way"].items()),
         all(abs(way - m[name]["t"]) < 0.06 for name, way in check["way"].items())),
        ("continued forgets general text", "bits per byte rise, at least at first",
         f"{general[0]:.2f} to {max(general):.2f}, {general[-1]:.2f} at the end", max(general) > general[0]),
    ]  # fmt: skip
    order = [
        ("the domain is learnt", "bits per byte of held-out medicine fall", f"{medical[0]:.2f} to {medical[-1]:.2f}",
         medical[-1] < medical[0]),
        ("continued knows more", "than base", f"{100 * gain:+.0f} points", gain > 0),
        ("the best merge is between", "knowledge of base ≤ merge, following of continued ≤ merge",
         f"{best}: {percent(merged['accuracy'])}, {percent(merged['following'])}",
         merged["accuracy"] >= base["accuracy"] and merged["following"] >= top["following"]),
    ]  # fmt: skip
    distances = [
        ("base guesses", "within 8 points of 25 %", percent(base["accuracy"]), abs(base["accuracy"] - 0.25) <= 0.08),
        ("base follows", "90 % or more", percent(base["following"]), base["following"] >= 0.9),
        ("continued knows far more", "30 points or more above base", f"{100 * gain:+.0f} points", gain >= 0.3),
        ("continued forgets to follow", "5 points or more below base, the paired interval beyond 0",
         f"{percent(base['following'])} to {percent(top['following'])}, by {100 * lost['share']:.1f} "
         f"[{100 * lost['ci'][0]:.1f}, {100 * lost['ci'][1]:.1f}] points", lost["share"] >= 0.05 and lost["ci"][0] > 0),
        ("the merge keeps the gain", "60 % or more of it, on the half that t was not chosen on",
         f"{best}: {percent(share[0])}", share[0] >= 0.6),
        ("the merge follows better", "than continued, the paired interval beyond 0, on the same half",
         f"{best}: {percent(merged['report']['following'])} instead of {percent(top['report']['following'])}, "
         f"{signed(back['share'])} [{signed(back['ci'][0])}, {signed(back['ci'][1])}] points", back["ci"][0] > 0),
    ]  # fmt: skip
    return [Expectation(*pair) for pair in always + order + ([] if fast else distances)]


def percent(x: float) -> str:
    """A share as people read it."""
    return f"{100 * x:.0f} %"


def signed(x: float) -> str:
    """A difference of two shares in points, with its sign."""
    return f"{100 * x:+.1f}"
