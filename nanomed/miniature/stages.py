"""The stages of the miniature as the commands that a user would type: the paper on one page.

A stage is a list of command lines of the project's own scripts; OUT/stages/*.json has those that were run. The two
recipes below, FULL and FAST, are what may be changed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Recipe:
    """What may be turned; the rest is fixed by data/miniature_paper.py."""

    base_steps: int
    base_lr: float
    cpt_steps: int
    cpt_lr: float
    replay: tuple[str, ...]  # sets that the base was trained on, and how much of each is mixed in
    batch_tokens: int
    classify_epochs: int
    ts: tuple[float, ...]  # of the merge sweep


# How FULL was found: knowledge and following of the continued model; base has 29 % and 78 % (exact answers, those to general
# questions included) or, from 500 steps on, 97 % (as in the report, where such questions count by their form alone).
# - Nothing replayed, 280 steps at 5e-4: 46 % and 9 %; at t = 0.5 37 % and 74 %. Weights move by a fifth to a third of their
#   norm, where those of a 7B move by a few per cent: no t recovers both.
# - 20 % of the prose replayed, 300 steps at 8e-4: 52 % and 4 %, general text hardly forgotten. Prose protects prose only.
# - The same and 3 % of the chats, 400 steps: 63 % and 50 %; 6 %, 450 steps at 7e-4: 63 % and 64 %; 10 %, 400 steps: 61 % and 72 %.
# - 6 %, 500 steps at 8e-4, two seeds: 67 % and 84 %, 61 % and 82 %; the better merge keeps 86 % and 91 %, 85 % and 86 %: on
#   the edge of what is expected. FULL: 70 % and 89 %, and a merge keeps 90 % and 92 %: what is learnt better survives merging.
# - 8 %: only 4 to 6 points of following are lost, too few to show a recovery.
# - No gain: batches of 4,096 tokens (110 steps at 1.2e-3, 3 % of the chats: 47 % and 65 %), embeddings left at t = 0, other t
#   for attention and MLP, 80 new diseases of nine facts instead of 40 of five (nothing replayed: 36 % and 0 %).
FULL = Recipe(base_steps=800, base_lr=2e-3, cpt_steps=800, cpt_lr=6e-4, replay=("prose@0.2", "chats@0.06"),
              batch_tokens=1024, classify_epochs=4, ts=(0.5, 0.7, 0.8, 0.9, 0.95))  # fmt: skip
FAST = Recipe(base_steps=240, base_lr=3e-3, cpt_steps=200, cpt_lr=2e-3, replay=("prose@0.2", "chats@0.05"),
              batch_tokens=1024, classify_epochs=8, ts=(0.6,))  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """Commands that belong together. `seconds`: about how long they take, for the bar alone."""

    name: str
    seconds: float
    commands: Callable[[], list[list[str]]]  # called when the stage begins: some need what earlier stages measured
    whole: tuple[str, ...] = ()  # folders that are there whole or not at all, and that their script refuses to find


def name_of(t: float) -> str:
    """The name of a merge, as merge.py --sweep gives it to its folder."""
    return f"t-{t:.12g}"


def plan(out: Path, recipe: Recipe, fast: bool, seed: int, judge_url: Callable[[], str]) -> list[Stage]:
    """All stages, in order. Paths are relative to the working directory, as a user would write them."""
    world, bins = out / "world", out / "bins"
    models = {"base": out / "base", "continued": out / "continued"}
    models |= {name_of(t): out / "merged" / name_of(t) for t in recipe.ts}

    def prepare(source: str | Path, name: str, *flags: str) -> list[str]:
        flags = ("--tokenizer", f"{world}/model", "--out", f"{bins}/{name}", "--workers", "1", *flags)
        return ["data/prepare.py", str(source), *flags]

    def train(name: str, init: str | Path, data: list[str], steps: int, lr: float) -> list[str]:
        sets = [x for d in data for x in ("--data", f"{bins}/{d}")]
        sets += [x for v in ("med", "general") for x in ("--val", f"{v}={bins}/val-{v}")]
        return ["train.py", "--recipe", "miniature", "--init", str(init), *sets, "--out", str(models[name]),
                "--steps", str(steps), "--lr", str(lr), "--batch-tokens", str(recipe.batch_tokens), "--micro-batch", "4",
                "--warmup-steps", str(min(50, steps // 10)), "--eval-every", str(-(-steps // 4)),
                "--checkpoint-every", str(-(-steps // 4)), "--seed", str(seed)]  # fmt: skip

    def answers(name: str) -> str:
        return f"{out}/answers/{name}.jsonl"

    def comparisons() -> list[list[str]]:
        from nanomed.miniature import results

        best, url, commands = name_of(results.best_merge(results.models(out, recipe.ts), recipe.ts)), judge_url(), []
        for a, b in (("continued", "base"), (best, "base"), (best, "continued")):
            commands.append(["eval.py", "judge", answers(a), answers(b), "--url", url, "--judge", "stand-in",
                             "--out", f"{out}/eval/judge-{a}-{b}"])  # fmt: skip
        for name in ("continued", best):
            commands.append(["eval.py", "failures", answers(name), "--ref", answers("base"),
                             "--out", f"{out}/eval/failures-{name}"])  # fmt: skip
        return commands

    mode = ["--fast"] if fast else []
    classifier = ["--classifier", f"{out}/clf"]
    sizes = ["--epochs", str(recipe.classify_epochs), "--lr", "2e-3", "--batch-size", "16", "--max-tokens", "64"]
    parts = [str(world / "crawl" / f"part-{i}.parquet") for i in (0, 1)]
    return [
        Stage("world", 15, lambda: [["data/miniature_paper.py", "--out", str(world), "--seed", str(seed), *mode]],
              whole=("world",)),
        Stage("base", 200, lambda: [
            *(prepare(world / f"{name}.jsonl", name) for name in ("prose", "val-med", "val-general")),
            prepare(world / "chats.jsonl", "chats", "--messages-key", "messages"),
            train("base", world / "model", ["prose", "chats"], recipe.base_steps, recipe.base_lr),
        ]),
        Stage("corpus", 60, lambda: [
            ["data/classify.py", f"{world}/labels.parquet", "--model", f"{world}/encoder", *sizes, "--out", f"{out}/clf"],
            ["data/sweep.py", *parts, *classifier, "--out", f"{out}/sweep"],
            ["data/clean.py", *parts, "--scores", f"{out}/sweep", *classifier, "--eval", f"{world}/exam/medizin.jsonl",
             "--source", "built-in", "--workers", "1", "--out", f"{out}/corpus"],
            ["data/prepare.py", *(f"{out}/corpus/corpus/part-{i}.parquet" for i in (0, 1)), "--tokenizer", f"{world}/model",
             "--out", f"{bins}/med", "--workers", "1"],
        ], whole=("clf",)),
        Stage("continued", 200, lambda: [
            train("continued", out / "base" / "hf", ["med", *recipe.replay], recipe.cpt_steps, recipe.cpt_lr),
        ]),
        Stage("merged", 5, lambda: [["merge.py", str(models["base"] / "hf"), str(models["continued"] / "hf"), f"{out}/merged",
                                     "--sweep", ",".join(map(str, recipe.ts))]], whole=("merged",)),
        Stage("knowledge", 80, lambda: [["eval.py", "knowledge", *(f"{name}={path}" for name, path in models.items()),
                                         "--tasks", "miniature_medizin", "--task-path", f"{world}/exam", "--shots", "0",
                                         "--out", f"{out}/eval/knowledge"]]),
        Stage("answers", 90, lambda: [["eval.py", "generate", str(path), "--model", name, "--prompts", f"{world}/prompts.jsonl",
                                       "--max-new-tokens", "32", "--batch", "60", "--out", answers(name)]
                                      for name, path in models.items()]),
        Stage("compared", 25, comparisons),
    ]  # fmt: skip
