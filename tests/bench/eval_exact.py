"""Whose log-probabilities are right? eval.py's scorer and transformers, both in float32, against transformers in float64.

    python tests/bench/eval_exact.py MODEL [--questions 3]

The longest answers of medizin_de, 3 fixed shots, each scored whole: a sum over its tokens. Result: tests/bench/results/.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from machine import cpu_name
from transformers import AutoModelForCausalLM

from nanomed.evaluation.loading import load_decoder
from nanomed.evaluation.questions import read_questions
from nanomed.evaluation.scorer import DecoderLM

TASKS = Path(__file__).resolve().parents[2] / "data" / "tasks"


def prompts(n: int) -> list[tuple[str, str]]:
    """(context, answer) of every option of the n questions with the longest ones."""
    shots = read_questions(TASKS / "medizin_de.dev.jsonl")[:3]
    before = "".join(f"Frage: {q['question']}\nAntwort: {q['options'][q['answer']]}\n\n" for q in shots)
    chosen = sorted(read_questions(TASKS / "medizin_de.jsonl"), key=lambda q: -max(map(len, q["options"])))[:n]
    return [(f"{before}Frage: {q['question']}\nAntwort:", " " + option) for q in chosen for option in q["options"]]


@torch.inference_mode()
def transformers_log_p(folder: Path, dtype: torch.dtype, tokens: list[tuple[list[int], int]]) -> list[float]:
    """ln p of each (tokens, how many of them are the context): of those after the context."""
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), []
    for ids, n in tokens:
        logits = model(torch.tensor([ids[:-1]]), logits_to_keep=len(ids) - n).logits[0]
        found.append(float(logits.log_softmax(-1).gather(1, torch.tensor(ids[n:])[:, None]).double().sum()))
    return found


def main() -> None:
    """Run and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder with a small model, such as SmolLM2-135M-Instruct")
    parser.add_argument("--questions", type=int, default=3)
    args = parser.parse_args()
    pairs = prompts(args.questions)
    lm = DecoderLM(load_decoder(args.model, torch.float32, torch.device("cpu")), args.model, 512)
    ours = [p for p, _ in lm.loglikelihood([SimpleNamespace(args=pair) for pair in pairs])]
    ids = lm.encode([c for c, _ in pairs] + [c + then for c, then in pairs])
    tokens = [(ids[c + then], len(ids[c])) for c, then in pairs]
    theirs, exact = (transformers_log_p(args.model, dtype, tokens) for dtype in (torch.float32, torch.float64))
    worst = lambda found: max(abs(x - y) for x, y in zip(found, exact, strict=True))  # noqa: E731
    result = {"device": cpu_name(), "versions": {p: version(p) for p in ("torch", "transformers")}, "model": args.model.name,
              "answers": len(pairs), "longest_answer_tokens": max(len(t) - n for t, n in tokens),
              "max_error_ours": worst(ours), "max_error_transformers": worst(theirs)}  # fmt: skip
    (Path(__file__).parent / "results" / "eval-exact.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
