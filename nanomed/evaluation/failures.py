"""Failures: mixed languages and verbosity, counted over the answers of a model, and of a reference beside it.

    python eval.py failures a.jsonl --ref b.jsonl

    language     line pass rate: share of answers in which every line of five words and more is German. As in the Language
                 Confusion Benchmark (Marchisio et al. 2024, arXiv 2406.20052), with word lists instead of its fastText
                 model, which takes "Diagnose: Diabetes mellitus Typ 2." for another language; English function words per
                 100 words; answers with a mixed sentence; wholly English answers; other scripts (Qwen's Chinese)
    verbosity    length, and its ratio to the reference's as the geometric mean over prompts; answers without an end;
                 repeated 4-grams; turns continued by the model itself; echoes of the prompt; empty answers

A model's <think>...</think> blocks are not part of its answer. Every figure has a 95 % interval: Wilson's if it is a
share of answers, else from resampling prompts. OUT/samples.jsonl lists what was found in each answer.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from nanomed.evaluation import language, verbosity
from nanomed.evaluation.answers import Sample, model_name, read_answers, read_pair, thoughts_left_out
from nanomed.evaluation.record import finish_run, open_run
from nanomed.evaluation.win_rate import geometric_ratio, mean, ratio_of_sums, share
from nanomed.files import sha256_of, write_durably

LABELS = {
    "line_pass_rate": "line pass rate", "english_per_100": "English function words per 100 words",
    "mixed": "answers that mix", "wholly_english": "wholly English answers", "other_scripts": "answers with other scripts",
    "length": "length", "ratio_to_ref": "length, ratio to the reference", "no_end": "answers without an end",
    "repeated_4grams": "repeated 4-grams", "continued_turns": "turns continued by itself", "prompt_echo": "echoes of the prompt",
    "empty": "empty answers",
}  # fmt: skip
PLAIN = ("english_per_100", "length", "ratio_to_ref")  # figures that are not shares


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("a", type=Path, metavar="A.jsonl", help="answers of eval.py generate")
    add("--ref", type=Path, metavar="B.jsonl", help="answers of another model to the same prompts")
    add("--tokenizer", metavar="FOLDER", help="count lengths in tokens of this tokenizer.json (default: in words)")
    add("--out", type=Path, help="folder of the run (default: runs/eval/failures-A)")


def run(args: argparse.Namespace) -> None:
    """The command; InputError for whatever cannot be done."""
    unit, length, files = verbosity.counter(args.tokenizer)
    if args.ref:
        pairs = read_pair(args.a, args.ref)
        sides = {"a": [a for a, _ in pairs], "ref": [b for _, b in pairs]}
    else:
        sides = {"a": list(read_answers(args.a).values())}
    names = {side: model_name(samples, args.a if side == "a" else args.ref) for side, samples in sides.items()}
    for line in (line for samples in sides.values() for line in thoughts_left_out(samples)):
        print(f"warning: {line}", file=sys.stderr)
    out = args.out or Path("runs/eval") / f"failures-{args.a.stem}"
    config = {"tokenizer": args.tokenizer, "word_lists": sha256_of(sorted(language.WORDS.glob("*.txt")))}
    if open_run(out, "failures", config, [args.a, *([args.ref] if args.ref else []), *files]):
        print(f"{out}: already finished")
        return print_results(json.loads((out / "results.json").read_text(encoding="utf-8")))
    found = {side: [(s, language.examine(s.answer), verbosity.examine(s, length)) for s in samples]
             for side, samples in sides.items()}  # fmt: skip
    figures = {side: summarise(rows) for side, rows in found.items()}
    if args.ref:
        lengths = [[v.length for _, _, v in found[side]] for side in ("a", "ref")]
        ratio = geometric_ratio(*lengths) if any(map(any, lengths)) else None  # of nothing to nothing there is none
        figures["a"]["verbosity"]["ratio_to_ref"] = ratio
    results = {"a": names["a"], "ref": names.get("ref"), "n": len(sides["a"]), "unit": unit, **figures["a"]}
    results |= {"of_ref": figures.get("ref"), "samples": "samples.jsonl"}
    write_durably(out / "samples.jsonl", "".join(sample_line(side, *row) for side, rows in found.items() for row in rows))
    finish_run(out, results)
    print_results(results)
    print(f"{out}: samples.jsonl lists what was found in each answer")


def summarise(rows: list[tuple[Sample, language.Language, verbosity.Verbosity]]) -> dict:
    """{"language": figures, "verbosity": figures} of a model's answers; a figure is {value, ci}, or None."""
    spoken, sized = [x for _, x, _ in rows], [x for _, _, x in rows]
    judged = [x.line_pass for x in spoken if x.line_pass is not None]
    per_100 = ratio_of_sums([100 * x.english_function for x in spoken], [x.words for x in spoken])
    return {
        "language": {
            "line_pass_rate": share(judged) if judged else None,
            "english_per_100": per_100,
            "mixed": share([x.mixed for x in spoken]),
            "wholly_english": share([x.wholly_english for x in spoken]),
            "other_scripts": share([bool(x.scripts) for x in spoken]),
        },
        "verbosity": {
            "length": mean([x.length for x in sized]),
            "no_end": share([not x.ended for x in sized]),
            "repeated_4grams": mean([x.repeated for x in sized]),
            "continued_turns": share([x.continued for x in sized]),
            "prompt_echo": share([x.echo for x in sized]),
            "empty": share([x.empty for x in sized]),
        },
    }


def sample_line(side: str, sample: Sample, spoken: language.Language, sized: verbosity.Verbosity) -> str:
    """One answer's line of samples.jsonl."""
    about = {"side": side, "id": sample.id, "answer": sample.answer} | asdict(spoken) | asdict(sized)
    return json.dumps(about, ensure_ascii=False) + "\n"


def spell(name: str, figure: dict | None) -> str:
    """A figure with its interval, as people write it; without one if no resample differs, since that shows nothing."""
    if figure is None:
        return "–"
    scale, unit = (1, "") if name in PLAIN else (100, " %")
    low, high = figure["ci"]
    digits = 2 if name == "ratio_to_ref" else 1
    spread = f" [{scale * low:.{digits}f}, {scale * high:.{digits}f}]" if low < high else ""
    return f"{scale * figure['value']:.{digits}f}{unit}{spread}"


def print_results(r: dict) -> None:
    """One line per figure, the reference's beside it."""
    print(f"{r['a']}{' against ' + r['ref'] if r['ref'] else ''}, {r['n']} answers, length in {r['unit']}")
    for part in ("language", "verbosity"):
        for name, figure in r[part].items():
            other = spell(name, r["of_ref"][part].get(name)) if r["of_ref"] else ""
            print(f"  {LABELS[name]:<38}{spell(name, figure):<26}{other}")
