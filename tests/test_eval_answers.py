"""generate, judge and failures: from prompts to verdicts, against a server with faults."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import eval as evaluate  # the script
from endpoint import completion, serving
from nanomed.evaluation import judge, language, verbosity, win_rate
from nanomed.evaluation.answers import Sample, read_prompts

ROOT = Path(__file__).resolve().parents[1]


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def answers(path: Path, texts: dict[str, str], model: str, finish_reason: str = "stop") -> Path:
    """A file as generate leaves it."""
    prompt = lambda name: [{"role": "user", "content": f"Frage {name}?"}]  # noqa: E731
    lines = [Sample(name, prompt(name), text, finish_reason, 3, model).line() for name, text in texts.items()]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def command(monkeypatch, capsys):
    """Run eval.py in this process; (exit status, what it printed)."""

    def run(*argv) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["eval.py", *map(str, argv)])
        try:
            evaluate.main()
            status = 0
        except SystemExit as end:
            if isinstance(end.code, str):
                return 1, end.code
            status = end.code or 0
        shown = capsys.readouterr()
        return status, shown.out + shown.err

    return run


def refused(command, *argv) -> str:
    """The one line with which the command refuses."""
    status, said = command(*argv)
    assert status == 1
    line = said.strip().splitlines()[-1]
    assert line.startswith("error: "), said
    return line


# --- generate ------------------------------------------------------------------------------------------------------


def test_answers_from_an_endpoint_survive_its_faults_and_are_paid_once(command, tmp_path):
    prompts = write(tmp_path / "p.jsonl", [{"id": f"p{i}", "prompt": f"Frage {i}?"} for i in range(4)])

    def behave(body, number):
        text = body["messages"][-1]["content"]
        if "1" in text and number == 1:
            return "cut"
        return completion(f"zu {text}", "length" if "2" in text else "stop")

    out = tmp_path / "a.jsonl"
    with serving(behave) as endpoint:
        arguments = ("generate", endpoint.url, "--model", "m", "--prompts", prompts, "--out", out)
        assert command(*arguments)[0] == 0
        assert len(endpoint.bodies) == 5
        assert all(b["temperature"] == 0 and b["max_tokens"] == 512 for b in endpoint.bodies)
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [r["id"] for r in rows] == ["p0", "p1", "p2", "p3"]
        assert [r["finish_reason"] for r in rows] == ["stop", "stop", "length", "stop"]
        assert rows[3]["answer"] == "zu Frage 3?"
        about = json.loads((tmp_path / "a.run/run.json").read_text())
        assert about["finished"]
        assert about["kind"] == "generate"
        assert "already finished" in command(*arguments)[1]
        out.unlink()
        assert command(*arguments)[0] == 0  # from the cache
        assert len(endpoint.bodies) == 5
        line = refused(command, *arguments, "--max-new-tokens", 9)
        assert "max_new_tokens = 512, this one 9" in line


def test_in_this_process_an_interruption_changes_no_byte(command, tmp_path, monkeypatch, tiny):
    """Batches after a kill are the batches of a run that never stopped, and equal one prompt at a time."""
    from nanomed.evaluation import generate

    model = tmp_path / "model"
    model.mkdir()
    for path in tiny.model.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "Das Herz " * (i + 1)} for i in range(5)])
    flags = ("--prompts", prompts, "--max-new-tokens", 6)
    assert command("generate", model, *flags, "--batch", 2, "--out", tmp_path / "whole.jsonl")[0] == 0
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert {json.loads(line)["finish_reason"] for line in whole.splitlines()} <= {"stop", "length"}

    real, calls = generate._read, []

    def dies(*args):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(generate, "_read", dies)
    assert command("generate", model, *flags, "--batch", 2, "--out", tmp_path / "a.jsonl")[0] == 130
    monkeypatch.setattr(generate, "_read", real)
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(b'{"id": "half')
    assert command("generate", model, *flags, "--batch", 2, "--out", tmp_path / "a.jsonl")[0] == 0
    assert (tmp_path / "a.jsonl").read_bytes() == whole
    assert command("generate", model, *flags, "--batch", 1, "--out", tmp_path / "one.jsonl")[0] == 0
    assert (tmp_path / "one.jsonl").read_bytes() == whole  # the padding on the left is not seen

    thinks = "{% if enable_thinking is not defined or enable_thinking %}{{ raise_exception('aloud') }}{% endif %}"
    settings["chat_template"] = thinks + settings["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    assert command("generate", model, *flags, "--batch", 2, "--out", tmp_path / "c.jsonl")[0] == 0

    settings.pop("chat_template")
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "has no chat template" in refused(command, "generate", model, *flags, "--out", tmp_path / "b.jsonl")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "?"}, "line 1 is neither"),
        ({"prompt": "  "}, "line 1 is neither"),
        ({"messages": [{"role": "user"}]}, "line 1 is neither"),
    ],
)
def test_prompts_that_are_none(record, message, command, tmp_path):
    path = write(tmp_path / "p.jsonl", [record])
    line = refused(command, "generate", "http://127.0.0.1:9/v1", "--model", "m", "--prompts", path, "--out", "x.jsonl")
    assert message in line


def test_the_prompts_of_the_project():
    prompts = read_prompts(ROOT / "data/tasks/prompts_de.jsonl")
    texts = [messages[-1]["content"] for messages in prompts.values()]
    assert len(texts) >= 80
    assert len(set(texts)) == len(texts)
    assert sum(language.examine(text).mixed for text in texts) == 2  # one to translate, one to correct


# --- judge ---------------------------------------------------------------------------------------------------------


def parts(body: dict) -> tuple[str, str]:
    """The two answers that the judge was shown."""
    text = body["messages"][0]["content"]
    return tuple(re.search(rf"<<<ANTWORT {i}\n(.*?)\nANTWORT {i}>>>", text, re.DOTALL)[1] for i in (1, 2))


def test_both_orders_ties_and_verdicts_that_cannot_be_read(command, tmp_path):
    """A wins q1; q2 goes to whoever stands first; q3 is a tie; q4 is read on the second try; q5 never."""
    names = ["q1", "q2", "q3", "q4", "q5"]
    a = answers(tmp_path / "a.jsonl", {n: f"{n} lang und gut" for n in names}, "model-a")
    b = answers(tmp_path / "b.jsonl", {n: f"{n} kurz" for n in names}, "model-b", "length")

    def behave(body, _):
        first, _second = parts(body)
        again = len(body["messages"]) > 1
        if first.startswith("q1"):
            return f"Begründung.\nURTEIL: {1 if 'gut' in first else 2}"
        if first.startswith("q2"):
            return "**URTEIL: 1**"
        if first.startswith("q3"):
            return "URTEIL: GLEICH"
        if first.startswith("q4") and again:
            return f"URTEIL: {2 if 'gut' in first else 1}"
        return "URTEIL: 1 oder URTEIL: 2?"

    with serving(behave) as endpoint:
        flags = ("--url", endpoint.url, "--judge", "richter", "--out", tmp_path / "run")
        status, said = command("judge", a, b, *flags)
        assert status == 0
        n_paid = len(endpoint.bodies)
        assert n_paid == 10 + 4 + 2  # q4 and q5 once more, q5 twice
        results = json.loads((tmp_path / "run/results.json").read_text())
        assert [point["worth"] for point in results["points"]] == [1.0, 0.5, 0.5, 0.0, 0.5]
        assert results["win"] == results["loss"] == 0.2
        assert results["win_rate"] == 0.5
        assert results["unreadable"] == 2
        assert results["consistency"] == 0.75  # of the four that could be read, q2 disagrees
        assert results["first_position_rate"] == pytest.approx(4 / 6)
        assert results["cut"] == {"a": 0, "b": 5}
        assert "5 of 5 answers of model-b are cut" in said
        assert "2 of 10 verdicts cannot be read" in said
        assert "at equal lengths   - (one side is nearly always the longer)" in said
        assert "0 of its 16 replies being cut at --max-tokens 256" in said
        games = [json.loads(line) for line in (tmp_path / "run/games.jsonl").read_text().splitlines()]
        assert [(g["id"], g["first"]) for g in games[:2]] == [("q1", "a"), ("q1", "b")]
        (tmp_path / "run/results.json").unlink()
        assert command("judge", a, b, *flags)[0] == 0
        assert len(endpoint.bodies) == n_paid  # every verdict came from the cache
        assert json.loads((tmp_path / "run/results.json").read_text()) == results

        prompt = tmp_path / "judge.toml"
        prompt.write_text((ROOT / "data/tasks/judge-de-v1.toml").read_text().replace("judge-de-v1", "judge-de-v2"))
        assert "prompt = " in refused(command, "judge", a, b, *flags, "--prompt", prompt)
    assert "family" not in said
    lines = list(judge.warnings([], "Qwen/Qwen2.5-7B", "other", "qwen3-32b"))
    assert len(lines) == 1
    assert "family" in lines[0]


def test_a_judge_that_fails_is_one_line_and_nothing_is_lost(command, tmp_path):
    a, b = (answers(tmp_path / f"{n}.jsonl", {"q": n}, n) for n in "ab")
    flags = ("--judge", "r", "--out", tmp_path / "run")
    with serving(lambda body, number: 401) as endpoint:
        assert "401" in refused(command, "judge", a, b, "--url", endpoint.url, *flags)
    assert not (tmp_path / "run/results.json").exists()
    with serving(lambda body, number: "URTEIL: GLEICH") as endpoint:
        assert command("judge", a, b, "--url", endpoint.url, *flags)[0] == 0


def test_a_judge_of_no_readable_verdict_gives_no_rate(command, tmp_path):
    a, b = (answers(tmp_path / f"{n}.jsonl", {"q": n, "r": n}, n) for n in "ab")
    with serving(lambda body, number: completion("<think>Erstens", "length")) as endpoint:
        said = refused(command, "judge", a, b, "--url", endpoint.url, "--judge", "r", "--out", tmp_path / "run")
    assert "no verdict that can be read, 12 of its 12 replies being cut at --max-tokens 256" in said
    assert not (tmp_path / "run/results.json").exists()
    games = [json.loads(line) for line in (tmp_path / "run/games.jsonl").read_text().splitlines()]
    assert [g["replies"] for g in games] == [["<think>Erstens"] * 3] * 4


def test_different_prompts_are_not_compared(command, tmp_path):
    a = answers(tmp_path / "a.jsonl", {"q1": "x", "q2": "y"}, "a")
    b = answers(tmp_path / "b.jsonl", {"q1": "x"}, "b")
    flags = ("--url", "http://127.0.0.1:9/v1", "--judge", "r")
    assert "prompt 'q2' is in" in refused(command, "judge", a, b, *flags)
    other = b.read_text().replace("Frage q1?", "Andere Frage?")
    b.write_text(other + answers(tmp_path / "c.jsonl", {"q2": "y"}, "b").read_text())
    assert "prompt 'q1' differs" in refused(command, "judge", a, b, *flags)
    assert "prompt 'q1' differs" in refused(command, "failures", a, "--ref", b)


@pytest.mark.parametrize(("old", "new"), [("{answer_2}", ""), ("again =", "wieder ="), ('version = "', "version = ")])
def test_a_prompt_that_is_none(old, new, command, tmp_path):
    text = (ROOT / "data/tasks/judge-de-v1.toml").read_text()
    path = tmp_path / "p.toml"
    path.write_text("".join(text.rsplit(old, 1)[0] + new + text.rsplit(old, 1)[1]))
    a, b = (answers(tmp_path / f"{n}.jsonl", {"q": n}, n) for n in "ab")
    refused(command, "judge", a, b, "--url", "http://127.0.0.1:9/v1", "--judge", "r", "--prompt", path)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [("URTEIL: 1", "1"), ("urteil: gleich.", "tie"), ("**URTEIL:** 2\n", "2"), ("URTEIL: 12", None), ("Antwort 1", None),
     ("URTEIL: 1\nURTEIL: 2", None), ("<think>URTEIL: 2</think>URTEIL: 1", "1"), ("", None)],
)  # fmt: skip
def test_a_verdict_is_read_strictly(reply, verdict):
    assert judge.parse(reply) == verdict


# --- win rates -----------------------------------------------------------------------------------------------------


def test_the_length_controlled_rate_takes_length_out():
    """Answers equal but for length, which the judge loves: raw 0.5 ± what length gives, controlled 0.5."""
    rng = np.random.default_rng(0)
    length_a, length_b = rng.integers(900, 1500, 2000), rng.integers(400, 1200, 2000)
    difference = length_a - length_b
    chance = 1 / (1 + np.exp(-2 * np.tanh(difference / difference.std())))
    worth = (rng.random(2000) < chance).astype(float)
    found = win_rate.summarise(worth, length_a, length_b)
    assert found["win_rate"] > 0.7
    assert found["length_controlled"] == pytest.approx(0.5, abs=0.06)
    low, high = found["length_controlled_ci"]
    assert low < 0.5 < high
    found = win_rate.summarise(worth, length_b + 1200, length_b)  # always longer: nothing was seen at equal lengths
    assert found["length_controlled"] is found["length_controlled_ci"] is None


def test_intervals_resample_prompts():
    worth = np.array([1.0] * 120 + [0.5] * 60 + [0.0] * 120)
    low, high = win_rate.mean_interval(worth)
    error = 1.96 * worth.std() / len(worth) ** 0.5
    assert (low, high) == pytest.approx((0.5 - error, 0.5 + error), abs=0.01)
    assert win_rate.mean_interval(np.ones(12)) == [pytest.approx(0.025 ** (1 / 12)), 1.0]
    ties = win_rate.summarise([0.5] * 12, list(range(12)), [5] * 12)
    half = (1 - 0.025 ** (1 / 12)) / 2  # as many prompts as may not be ties, all won or all lost
    assert ties["ci"] == ties["length_controlled_ci"] == [pytest.approx(0.5 - half), pytest.approx(0.5 + half)]
    assert win_rate.geometric_ratio([2, 8], [1, 2])["value"] == pytest.approx(8**0.5)


# --- failures ------------------------------------------------------------------------------------------------------


def test_mixing_is_found_and_german_is_left_alone():
    """On the half of the labelled sentences that nothing was tuned on."""
    found = {"german": [], "english": [], "mixed": []}
    for line in (ROOT / "tests/language_cases.tsv").read_text(encoding="utf-8").splitlines():
        part, kind, text = line.split("\t")
        if part == "test":
            found[kind].append(language.examine(text))
    assert [len(found[kind]) for kind in found] == [51, 20, 30]
    assert sum(x.mixed or x.wholly_english for x in found["german"]) <= 0.02 * 51
    assert sum(x.mixed for x in found["mixed"]) >= 0.95 * 30
    assert sum(x.wholly_english for x in found["english"]) >= 0.95 * 20


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Nehmen Sie 患者 das Mittel.", ("Chinese",)),
        ("Der α-Blocker wirkt bei 5 µg.", ()),
        ("Таблетки bitte täglich.", ("Cyrillic",)),
    ],
)
def test_other_scripts(text, expected):
    assert language.examine(text).scripts == expected


@pytest.mark.parametrize(
    ("answer", "field", "expected"),
    [
        ("Ruhe hilft.\nFrage: Und sonst?", "continued", True),
        ("Antwort: Ruhe hilft.", "continued", False),
        ("Ruhe.<|im_start|>user", "continued", True),
        ("Was hilft bei starkem Husten und Fieber? Ruhe.", "echo", True),
        ("Ruhe hilft bei starkem Husten.", "echo", False),
        ("   ", "empty", True),
        ("eins zwei drei vier " * 3, "repeated", 1 - 4 / 9),
        ("eins zwei drei", "repeated", 0.0),
    ],
)
def test_verbosity(answer, field, expected):
    prompt = [{"role": "user", "content": "Was hilft bei starkem Husten und Fieber?"}]
    found = verbosity.examine(Sample("q", prompt, answer, "stop", 1, "m"), verbosity.counter(None)[1])
    assert getattr(found, field) == pytest.approx(expected)


def test_failures_beside_a_reference(command, tmp_path):
    a = answers(
        tmp_path / "a.jsonl", {"q1": "Ruhe hilft hier sehr gut.", "q2": "You should rest for some days."}, "m-a"
    )
    b = answers(tmp_path / "b.jsonl", {"q1": "Ruhe.", "q2": "Viel trinken."}, "m-b", "length")
    status, said = command("failures", a, "--ref", b, "--out", tmp_path / "run")
    assert status == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["language"]["wholly_english"]["value"] == 0.5
    assert results["language"]["line_pass_rate"]["value"] == 0.5
    assert results["verbosity"]["no_end"]["value"] == 0
    assert results["of_ref"]["verbosity"]["no_end"]["value"] == 1
    assert results["verbosity"]["ratio_to_ref"]["value"] == pytest.approx((5 / 1 * 6 / 2) ** 0.5)
    assert "m-a against m-b, 2 answers, length in words" in said
    rows = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert rows[1]["wholly_english"]


# --- report --------------------------------------------------------------------------------------------------------


def test_the_page_has_every_run_and_holds_its_pictures(command, tmp_path):
    a = answers(tmp_path / "a.jsonl", {f"q{i}": "Ruhe hilft hier sehr gut." for i in range(4)}, "m-a")
    b = answers(tmp_path / "b.jsonl", {f"q{i}": "Ruhe." for i in range(4)}, "m-<b>")
    with serving(lambda body, _: f"URTEIL: {1 if 'gut' in parts(body)[0] else 2}") as endpoint:
        flags = ("--url", endpoint.url, "--judge", "richter", "--out", tmp_path / "judged")
        assert command("judge", a, b, *flags)[0] == 0
    assert command("failures", a, "--ref", b, "--out", tmp_path / "failures")[0] == 0
    results = json.loads((tmp_path / "judged/results.json").read_text())
    assert results["length_controlled"] == 1  # every prompt was won, whatever the lengths
    out = tmp_path / "report"
    assert command("report", tmp_path / "judged", tmp_path / "failures", "--out", out)[0] == 0
    page, markdown = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert "<svg" in page
    assert "m-<b>" not in page  # names are escaped
    assert "../judged/games.jsonl" in page
    for text in ("richter", "100.0 %", "line pass rate"):
        assert text in page
        assert text in markdown
    before = page
    assert command("report", tmp_path / "judged", tmp_path / "failures", "--out", out)[0] == 0
    assert (out / "report.html").read_text() == before  # the same runs, the same page


def test_a_page_of_no_run_is_refused(command, tmp_path):
    assert "has no run.json" in refused(command, "report", tmp_path, "--out", tmp_path / "r")
    (tmp_path / "run.json").write_text(json.dumps({"kind": "judge", "finished": False}))
    refused(command, "report", tmp_path, "--out", tmp_path / "r")
    assert not (tmp_path / "r").exists()
