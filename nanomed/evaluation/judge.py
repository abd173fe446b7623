"""Judge: whose answers are better, A's or B's, by a model as judge.

    python eval.py judge a.jsonl b.jsonl --url http://localhost:8000/v1 --judge NAME

The judge sees the whole conversation and both answers, without <think> blocks. Every prompt is played twice, with A's and
with B's answer first, since judges favour a position. A wins a prompt that it wins in both orders; verdicts that disagree
are a tie. An unreadable verdict is asked for again in the same conversation, twice; after that it is no decision, and the
results say how many. The prompt is a versioned file (data/tasks/judge-de-v2.toml); it tells the judge that German is
expected, so language mixing counts here too: `failures` measures it separately.

Reported beside the win rate and its interval: the rate at equal lengths, how often both orders agree, how often the first
position wins. There is a warning where the orders mostly disagree, where nearly all verdicts are ties, and where the judge is
of a model's own family, which judges favour. The marks around the answers carry a number that no answer can contain.

OUT/games.jsonl holds every game with the judge's replies; thanks to OUT/answers.sqlite each is paid for once
(nanomed/chat.py). Costs two requests per prompt, each with both answers.
"""

import argparse
import hashlib
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from nanomed import InputError
from nanomed.chat import BODY_HELP, Answer, ask, parse_body, with_extra
from nanomed.evaluation.answers import Sample, model_name, read_pair, thoughts_left_out
from nanomed.evaluation.generate import check_positive
from nanomed.evaluation.record import finish_run, open_run, undone_on_failure
from nanomed.evaluation.win_rate import summarise
from nanomed.files import write_durably
from nanomed.prompts import fill
from nanomed.redaction import masked
from nanomed.thoughts import without_thoughts
from nanomed.validity import Validity

PROMPT = Path(__file__).resolve().parents[2] / "data" / "tasks" / "judge-de-v2.toml"
UNREADABLE = 0.1  # share of verdicts above which there is a warning
LOW_AGREEMENT = 0.6  # share of prompts with one verdict in both orders, below which there is a warning: by chance 0.5
MANY_TIES = 0.9  # share of verdicts that are ties, above which there is a warning
LEAST_GAMES = 4  # for these two warnings
N_AGAIN = 2  # times that an unreadable verdict is asked for again
# A line of its own, maybe after a word (Mein URTEIL), with brackets before or after the verdict: both quote the prompt.
BRACKETS = r"(?:\([^()\n]*\)\W*)?"
VERDICT = re.compile(rf"^\W*(?:\w+\W+)?URTEIL\W*{BRACKETS}(1|2|GLEICH)\W*?{BRACKETS}$", re.IGNORECASE | re.MULTILINE)
FAMILIES = {  # part of the name, in lower case → family
    "mistral": "Mistral", "mixtral": "Mistral", "ministral": "Mistral", "magistral": "Mistral", "qwen": "Qwen",
    "qwq": "Qwen", "llama": "Llama", "meditron": "Llama", "gemma": "Google", "gemini": "Google", "gpt": "OpenAI",
    "claude": "Anthropic", "deepseek": "DeepSeek", "phi-": "Phi", "smollm": "SmolLM", "teuken": "Teuken",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("a", type=Path, metavar="A.jsonl", help="answers of eval.py generate")
    add("b", type=Path, metavar="B.jsonl", help="answers to the same prompts by the model to compare with")
    add(
        "--url",
        required=True,
        help="the judge's OpenAI-compatible endpoint, with its /v1; the key comes from OPENAI_API_KEY",
    )
    add("--judge", required=True, metavar="NAME", help="the judge's model name there")
    add(
        "--prompt",
        type=Path,
        default=PROMPT,
        metavar="TOML",
        help="the judge's prompt (default: data/tasks/judge-de-v2.toml)",
    )
    add("--out", type=Path, help="folder of the run (default: runs/eval/judge-A-B)")
    add("--max-tokens", type=int, default=256, metavar="N", help="of a verdict with its reasons (default: %(default)s)")
    add("--body", metavar="JSON", help=BODY_HELP)
    add("--concurrency", type=int, default=64, metavar="N", help="requests in flight (default: %(default)s)")
    add("--timeout", type=float, default=120, metavar="S", help="seconds for one try (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """The command; InputError for whatever cannot be done."""
    check_positive(args, "max_tokens", "concurrency", "timeout")
    prompt = read_prompt(args.prompt)
    pairs = read_pair(args.a, args.b)
    a, b = (model_name([pair[i] for pair in pairs], path) for i, path in enumerate((args.a, args.b)))
    for line in warnings(pairs, a, b, args.judge):
        print(f"warning: {line}", file=sys.stderr)
    out = args.out or Path("runs/eval") / f"judge-{args.a.stem}-{args.b.stem}"
    extra = parse_body(args.body)
    config = {"judge": args.judge, "prompt": f"{prompt.version} ({prompt.sha256[:12]})", "max_tokens": args.max_tokens}
    config["body"] = masked(extra) if extra else None
    existed = out.exists()
    if open_run(out, "judge", config, [args.a, args.b]):
        print(f"{out}: already finished")
        return print_results(json.loads((out / "results.json").read_text(encoding="utf-8")))
    settings = with_extra({"model": args.judge, "temperature": 0, "max_tokens": args.max_tokens}, extra)
    how = {"concurrency": args.concurrency, "timeout_s": args.timeout}
    with undone_on_failure(out, existed):
        games = play(pairs, prompt, settings, args.url, out / "answers.sqlite", how)
    worth = [decide(first["winner"], second["winner"]) for first, second in zip(games[::2], games[1::2], strict=True)]
    write_games(out / "games.jsonl", games)
    behaviour = orders(games)
    if behaviour["unreadable"] == len(games):
        raise InputError(f"the judge {args.judge} gave no readable verdict, {cut_replies(behaviour, args)}; its replies "
                         f"are in {out / 'games.jsonl'}; use a stronger judge, and another --out")  # fmt: skip
    results = {"a": a, "b": b, "judge": args.judge, "prompt": prompt.version}
    lengths = [[len(pair[i].answer) for pair in pairs] for i in (0, 1)]
    results |= summarise(worth, *lengths) | behaviour
    results["points"] = [{"id": pair[0].id, "worth": w, "length_a": la, "length_b": lb}
                         for pair, w, la, lb in zip(pairs, worth, *lengths, strict=True)]  # fmt: skip
    results |= {"cut": {key: sum(pair[i].finish_reason == "length" for pair in pairs) for i, key in enumerate("ab")},
                "samples": "games.jsonl"}  # fmt: skip
    results["warnings"] = list(doubts(behaviour, cut_replies(behaviour, args)))
    finish_run(out, results)
    print_results(results)
    print(f"{out}: every verdict is in games.jsonl")


def doubts(behaviour: dict, cut: str) -> Iterator[str]:
    """Why the rates say little about the answers, by the judge's behaviour."""
    n_games, agreement, first = behaviour["games"], behaviour["consistency"], behaviour["first_position_rate"]
    if behaviour["unreadable"] > n_games * UNREADABLE:
        yield (f"{behaviour['unreadable']} of {n_games} verdicts are unreadable and count as no decision, {cut}: "
               "these rates say little")  # fmt: skip
    if n_games >= LEAST_GAMES and agreement is not None and agreement < LOW_AGREEMENT:
        position = f"; the first position wins {first:.0%} of the decided games" if first is not None else ""
        yield (f"the judge's verdicts agree in both orders for only {agreement:.0%} of the prompts{position}: they follow the "
               "position more than the answers, and these rates say little; use another judge")  # fmt: skip
    if n_games >= LEAST_GAMES and behaviour["ties"] > MANY_TIES * (n_games - behaviour["unreadable"]):
        yield (f"the judge calls {behaviour['ties']} of {n_games} games a tie: it does not tell the answers apart; "
               "use another judge")  # fmt: skip


def cut_replies(behaviour: dict, args: argparse.Namespace) -> str:
    """The most common reason for unreadable verdicts."""
    n_replies = behaviour["games"] + behaviour["asked_again"]
    return f"{behaviour['replies_cut']} of its {n_replies} replies being cut at --max-tokens {args.max_tokens}"


# --- the prompt ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """What the judge is told."""

    version: str
    template: str
    again: str
    sha256: str  # of the file

    def messages(self, question: str, answer_1: str, answer_2: str) -> list[dict]:
        """The conversation that asks for a verdict. Inserted texts are never searched for fields."""
        texts = {"question": question.strip(), "answer_1": answer_1.strip(), "answer_2": answer_2.strip()}
        return [{"role": "user", "content": fill(self.template, texts)}]


def read_prompt(path: Path) -> Prompt:
    """The prompt of a TOML file. InputError if it is not TOML, a text is missing, or a field does not occur exactly once."""
    raw = path.read_bytes()
    try:
        spec = tomllib.loads(raw.decode())
    except ValueError as error:
        raise InputError(f"{path}: cannot be read as TOML ({error}); expected a file such as {PROMPT}") from None
    for key in ("version", "prompt", "again"):
        if not isinstance(spec.get(key), str) or not spec[key].strip():
            raise InputError(f"{path}: has no text {key!r}; {PROMPT} shows what a judge's prompt needs")
    for field in ("{question}", "{answer_1}", "{answer_2}"):
        if (n := spec["prompt"].count(field)) != 1:
            raise InputError(f"{path}: {field} occurs {n} times in its prompt, expected once")
    if "{nonce}" not in spec["prompt"]:
        print(f"warning: {path}: has no {{nonce}} in the marks around the answers, so an answer can imitate them", file=sys.stderr)
    texts = (spec[key].strip() for key in ("version", "prompt", "again"))
    return Prompt(*texts, hashlib.sha256(raw).hexdigest())


def parse(reply: str, cut: bool = False) -> str | None:
    """ "1", "2" or "tie": the verdict in the judge's reply; None if there is none, or two that differ. Thoughts do not
    count; in a reply that was cut the verdict must be the last line."""
    said = without_thoughts(reply).strip()
    found = {verdict.upper() for verdict in VERDICT.findall(said)}
    if len(found) != 1 or (cut and not VERDICT.match(said.rpartition("\n")[2])):
        return None
    (verdict,) = found
    return "tie" if verdict == "GLEICH" else verdict


# --- the games -----------------------------------------------------------------------------------------------------


def play(pairs: list[tuple[Sample, Sample]], prompt: Prompt, settings: dict, url: str, cache: Path, how: dict) -> list[dict]:
    """Both games of every prompt, in order. Unreadable verdicts are asked for again, all in one round."""
    games = [{"id": a.id, "first": first, "messages": prompt.messages(a.conversation, *texts), "replies": [], "cut": 0}
             for a, b in pairs
             for first, texts in (("a", (a.answer, b.answer)), ("b", (b.answer, a.answer)))]  # fmt: skip
    todo = list(range(len(games)))
    for attempt in range(1 + N_AGAIN):
        requests = ((i, settings | {"messages": conversation(games[i], prompt)}) for i in todo)
        desc = f"judge, asked again ({attempt})" if attempt else "judge"
        answers: dict[int, Answer] = {}
        validity = Validity("an answer after the thoughts", "--max-tokens")
        with closing(ask(requests, url, cache, len(todo), desc=desc, **how)) as asked:
            for i, reply in asked:
                answers[i] = reply
                validity.add(reply, bool(without_thoughts(reply.text).strip()))  # others may be readable when asked again
        validity.report_failures()
        for i in todo:
            cut = answers[i].finish_reason == "length"
            games[i]["replies"].append(answers[i].text)
            games[i]["cut"] += cut
            games[i]["winner"] = winner(games[i]["first"], parse(answers[i].text, cut))
        todo = [i for i in todo if games[i]["winner"] is None]
        if not todo:
            break
    return games


def winner(first: str, verdict: str | None) -> str | None:
    """ "a", "b" or "tie"; None without a verdict. first: whose answer was shown first."""
    return {"1": first, "2": {"a": "b", "b": "a"}[first], "tie": "tie", None: None}[verdict]


def conversation(game: dict, prompt: Prompt) -> list[dict]:
    """The game's messages with the unreadable replies, each followed by the request for a verdict."""
    turns = [[{"role": "assistant", "content": reply or "(leer)"}, {"role": "user", "content": prompt.again}]
             for reply in game["replies"]]  # fmt: skip
    return game["messages"] + [message for turn in turns for message in turn]


def decide(first: str | None, second: str | None) -> float:
    """A's score for a prompt from the winners of its two games: 1 or 0 if they agree on one, else a tie."""
    return {"a": 1.0, "b": 0.0}.get(first, 0.5) if first == second else 0.5


def orders(games: list[dict]) -> dict:
    """The judge's behaviour: how often both orders agree and the first position wins, among readable verdicts."""
    both = [(x["winner"], y["winner"]) for x, y in zip(games[::2], games[1::2], strict=True)]
    read = [pair for pair in both if None not in pair]
    decided = [game for game in games if game["winner"] in ("a", "b")]
    return {
        "consistency": sum(x == y for x, y in read) / len(read) if read else None,
        "first_position_rate": sum(g["winner"] == g["first"] for g in decided) / len(decided) if decided else None,
        "unreadable": sum(game["winner"] is None for game in games), "games": len(games),
        "ties": sum(game["winner"] == "tie" for game in games),
        "asked_again": sum(len(game["replies"]) - 1 for game in games), "replies_cut": sum(game["cut"] for game in games),
    }  # fmt: skip


def write_games(path: Path, games: list[dict]) -> None:
    """One line per game: id, first, winner, replies and messages."""
    keys = ("id", "first", "winner", "replies", "messages")
    lines = [json.dumps({key: game[key] for key in keys}, ensure_ascii=False) + "\n" for game in games]
    write_durably(path, "".join(lines))


# --- words ---------------------------------------------------------------------------------------------------------


def family(name: str) -> str | None:
    """The model's family, as far as its name tells."""
    return next((maker for part, maker in FAMILIES.items() if part in name.lower()), None)


def warnings(pairs: list[tuple[Sample, Sample]], a: str, b: str, judge: str) -> Iterator[str]:
    """What makes the comparison doubtful."""
    for name in dict.fromkeys((a, b)):
        if name == judge or (family(judge) and family(name) == family(judge)):
            yield f"the judge {judge} is of the same family as {name}, and judges favour their own; use another judge"
    for name, i in ((a, 0), (b, 1)):
        yield from thoughts_left_out([pair[i] for pair in pairs])
        if cut := sum(pair[i].finish_reason == "length" for pair in pairs):
            yield f"{cut} of {len(pairs)} answers of {name} were cut at max_new_tokens, and are judged as they are"


def print_results(r: dict) -> None:
    """Rates, their difference, and the ratio last."""
    show = lambda value, ci: "-" if value is None else f"{value:.1%} [{ci[0]:.1%}, {ci[1]:.1%}]"  # noqa: E731
    print(f"{r['a']} against {r['b']}, {r['n']} prompts, judged by {r['judge']} in both orders")
    print(f"  win {r['win']:.1%}, tie {r['tie']:.1%}, loss {r['loss']:.1%}")
    print(f"  win rate           {show(r['win_rate'], r['ci'])}")
    why = " (one side is nearly always the longer)" if r["length_controlled"] is None else ""
    print(f"  at equal lengths   {show(r['length_controlled'], r['length_controlled_ci'])}{why}")
    low, high = (100 * x for x in r["difference_ci"])
    print(f"  win - loss         {100 * r['difference']:+.1f} points [{low:+.1f}, {high:+.1f}]")
    print(f"  ratio              {r['ratio']:.2f}" if r["ratio"] is not None else "  ratio              B won nothing")
    rate = lambda value: "none" if value is None else f"{value:.1%}"  # noqa: E731
    print(f"  both orders agree  {rate(r['consistency'])}; the first position wins {rate(r['first_position_rate'])}; "
          f"{r['unreadable']} of {r['games']} verdicts unreadable")  # fmt: skip
    for line in r.get("warnings", ()):
        print(f"warning: {line}", file=sys.stderr)
