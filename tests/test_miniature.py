"""The miniature: its questions and instructions, the stand-in judge, what must hold, and a whole fast run."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

import miniature_exam as exam
import miniature_paper as paper
from nanomed import InputError
from nanomed.miniature import __main__ as miniature
from nanomed.miniature import judge
from nanomed.miniature.judge import follows, has_form, points, verdict
from nanomed.miniature.results import best_merge, expectations, kept
from nanomed.miniature.stages import FAST, Stage

ROOT = Path(__file__).resolve().parents[1]


# --- the examination -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table():
    return paper.halves(paper.tables("med", paper.FULL)[0])[1]


def test_questions_cannot_be_guessed_without_reading(table):
    found = exam.questions(0, table, 150)
    assert len({q["id"] for q in found}) == len(found) == 150
    rows = {str(row["name"]): row for row in table.rows}
    for q in found:
        right = q["options"][q["answer"]]
        assert right.lower() == str(rows[q["name"]][q["column"]]).lower()
        assert len(set(q["options"])) == 4
        assert all(len(option.split()) <= exam.MAX_WORDS for option in q["options"])
        assert not exam.stems(q["name"]) & exam.stems(right)
        assert len(q["question"].split()) >= 8  # fewer words could not be kept out of a corpus
    places = [q["answer"] for q in found]
    assert all(22 <= places.count(i) <= 56 for i in range(4))
    shortest = sum(min(q["options"], key=len) == q["options"][q["answer"]] for q in found) / len(found)
    assert shortest < 0.4, "the shortest option is right too often"


def test_questions_are_phrased_otherwise_than_the_corpus(table):
    templates = {t.text for section in table.templates.values() for t in section}
    assert not templates & set(exam.ASKED.values())


def test_no_disease_is_on_both_sides():
    known, new = paper.halves(paper.tables("med", paper.FULL)[0])
    assert not {str(r["name"]) for r in known.rows} & {str(r["name"]) for r in new.rows}


def test_instructions_have_one_right_answer_and_its_form():
    tables = paper.tables("general", paper.FAST)
    found = list(exam.instructions(0, tables, 300))
    assert len({prompt for prompt, _ in found}) == 300
    assert all(has_form(prompt, answer) for prompt, answer in found)
    assert all(follows({"prompt": prompt, "right": answer}, answer) for prompt, answer in found)
    taken = frozenset(prompt for prompt, _ in found[:100])
    assert not taken & {prompt for prompt, _ in exam.instructions(0, tables, 200, taboo=taken)}


# --- the stand-in judge --------------------------------------------------------------------------------------------

ASKED = {"prompt": "Welches Fachgebiet? Antworte mit Sternen.", "fact": "Neurologie", "right": "* Neurologie *"}
COPY = {"prompt": "Wiederhole: Löwe. Antworte als Liste.", "right": "- Löwe\n- Löwe"}


@pytest.mark.parametrize(
    ("answer", "expected"), [("* Neurologie *", 2), ("Neurologie", 1), ("* Chirurgie *", 1), ("Chirurgie", 0), ("", 0)]
)
def test_points_are_for_the_fact_and_for_the_form(answer, expected):
    assert points(ASKED, answer) == expected


def test_a_copy_is_exact_or_worth_nothing():
    assert (points(COPY, "- Löwe\n- Löwe"), points(COPY, "- Löwe\n- Bär"), points(COPY, "Löwe")) == (2, 0, 0)


def test_the_verdict_is_read_from_the_prompt_that_judge_sends():
    from nanomed.evaluation.judge import PROMPT, parse, read_prompt

    prompt, key = read_prompt(PROMPT), {ASKED["prompt"]: ASKED}
    says = lambda one, two: parse(verdict(key, prompt.messages(ASKED["prompt"], one, two)[0]["content"]))  # noqa: E731
    assert says("* Neurologie *", "Neurologie") == "1"
    assert says("Chirurgie", "* Chirurgie *") == "2"
    assert says("* Chirurgie *", "Neurologie") == "tie"
    assert says("", "") == "tie"
    assert parse(verdict({}, prompt.messages("?", "a", "b")[0]["content"])) is None


def test_the_endpoint_answers_as_one():
    content = "<<<ANFRAGE 7\n{}\nANFRAGE 7>>>\n<<<ANTWORT 1 7\n* Neurologie *\nANTWORT 1 7>>>\n<<<ANTWORT 2 7\n\nANTWORT 2 7>>>"
    body = {"model": "stand-in", "messages": [{"role": "user", "content": content.format(ASKED["prompt"])}]}
    with judge.serving({ASKED["prompt"]: ASKED}) as url:
        data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/chat/completions", data, kind)
        with urllib.request.urlopen(request) as reply:
            assert json.load(reply)["choices"][0]["message"]["content"].endswith("URTEIL: 1")


# --- what must hold ------------------------------------------------------------------------------------------------


def results() -> dict:
    """Of a run in which everything holds."""

    def row(t: float, accuracy: float, following: float) -> dict:
        both = {"accuracy": accuracy, "following": following}
        return {"t": t, **both, "choose": dict(both), "report": dict(both)}

    models = {"base": row(0, 0.25, 0.96), "t-0.6": row(0.6, 0.55, 0.95), "continued": row(1, 0.65, 0.3)}
    corpus = {"leaks": 60, "leaks_kept": 0, "contaminated": 60, "copies": 100, "twice": 0, "duplicates_dropped": 95,
              "precision": 0.99, "recall": 0.97}  # fmt: skip
    check = {"loss": 1.0, "packed": 1.001, "alone": 0.999, "way": {"t-0.6": 0.6}}
    return {"models": models, "best": "t-0.6", "corpus": corpus, "check": check,
            "forgotten": {"share": 0.66, "ci": (0.59, 0.73)}, "won_back": {"share": 0.65, "ci": (0.58, 0.72)},
            "meter": {"med": [1.2, 0.5], "general": [0.4, 0.6]}}  # fmt: skip


BROKEN = {
    "leaked questions are gone": lambda r: r["corpus"].update(leaks_kept=1),
    "copies are gone": lambda r: r["corpus"].update(twice=1),
    "the corpus is medical": lambda r: r["corpus"].update(precision=0.6),
    "the loss is of the next token": lambda r: r["check"].update(loss=2.0),
    "documents do not see each other": lambda r: r["check"].update(alone=1.05),
    "t goes from base to continued": lambda r: r["check"].update(way={"t-0.6": 0.4}),
    "continued forgets general text": lambda r: r["meter"].update(general=[0.4, 0.3]),
    "the domain is learnt": lambda r: r["meter"].update(med=[1.2, 1.3]),
    "base guesses": lambda r: r["models"]["base"].update(accuracy=0.4),
    "base follows": lambda r: r["models"]["base"].update(following=0.5),
    "continued knows far more": lambda r: r["models"]["continued"].update(accuracy=0.5),
    "continued forgets to follow": lambda r: r["forgotten"].update(ci=(-0.01, 0.12)),
    "the merge keeps the gain": lambda r: r["models"]["t-0.6"]["report"].update(accuracy=0.4),
    "the merge follows better": lambda r: r["won_back"].update(share=0.0, ci=(0.0, 0.0)),  # no merge at all
}


def test_every_expectation_holds_of_good_results():
    for fast in (False, True):
        assert all(e.holds for e in expectations(results(), fast))


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named(name):
    broken = results()
    BROKEN[name](broken)
    assert name in {e.name for e in expectations(broken, False) if not e.holds}


def test_the_best_merge_keeps_most_of_both():
    found = results()["models"]
    assert kept(found, "t-0.6") == pytest.approx((0.75, 0.95 / 0.96))


def test_t_is_chosen_on_one_half_and_reported_on_the_other():
    """The best follower of those that keep 70 % of the gain on the first half, whatever the second half says."""
    found = results()["models"]
    found["t-0.9"] = {"t": 0.9, "choose": {"accuracy": 0.64, "following": 0.8}, "report": {"accuracy": 0.65, "following": 1.0}}
    found["t-0.3"] = {"t": 0.3, "choose": {"accuracy": 0.35, "following": 0.96}, "report": {"accuracy": 0.65, "following": 1.0}}
    assert best_merge(found, (0.3, 0.6, 0.9)) == 0.6
    assert best_merge(found, (0.3,)) == 0.3
    assert kept(found, "t-0.9") == pytest.approx((1.0, 1.0 / 0.96))


# --- the run -------------------------------------------------------------------------------------------------------


def test_a_folder_of_another_run_is_refused(tmp_path):
    miniature.claim(tmp_path / "run", FAST, True, 0)
    miniature.claim(tmp_path / "run", FAST, True, 0)
    with pytest.raises(InputError, match="made with seed = 0, not 1"):
        miniature.claim(tmp_path / "run", FAST, True, 1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(InputError, match="not empty and not a run of the miniature"):
        miniature.claim(tmp_path / "mine", FAST, True, 0)


def test_a_failing_stage_is_one_line_with_its_reason(tmp_path):
    miniature.claim(tmp_path, FAST, True, 0)
    stage = Stage("corpus", 1, lambda: [["data/sweep.py", "missing.parquet", "--classifier", "clf", "--out", "o"]])
    with pytest.raises(InputError, match=r"corpus: data/sweep.py failed: error: missing.parquet: no such input"):
        miniature.run_stage(stage, tmp_path, miniature.tqdm(total=1, disable=True))
    assert not (tmp_path / "stages" / "corpus.json").exists()


def test_a_stage_notes_how_large_its_scripts_were(tmp_path):
    """A run that only reports has no children to ask."""
    miniature.claim(tmp_path, FAST, True, 0)
    miniature.run_stage(Stage("corpus", 1, lambda: [["data/personal.py"]]), tmp_path, miniature.tqdm(total=1, disable=True))
    assert json.loads((tmp_path / "stages" / "corpus.json").read_text())["peak_gb"] > 0.005


def test_lines_come_as_stages_end_and_the_help_names_the_command(tmp_path, monkeypatch):
    """Into a file, too, where Python would keep them until the end."""
    done = subprocess.run([sys.executable, "-m", "nanomed.miniature", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("usage: python -m nanomed.miniature [-h]")
    shown = tmp_path / "stdout"
    seen = []

    def stage(name):
        return Stage(name, 1, lambda: seen.append(shown.read_text()) or [])

    monkeypatch.setattr(miniature, "plan", lambda *_: [stage("one"), stage("two"), stage("three")])
    monkeypatch.setattr(miniature.outcome, "measure", lambda *_: (_ for _ in ()).throw(InputError("end")))
    with shown.open("w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        with pytest.raises(InputError, match="end"):
            miniature.run(tmp_path / "run", True, 0)
    assert seen == ["", "one: 0 s\n", "one: 0 s\ntwo: 0 s\n"]


@pytest.mark.timeout(900)  # three minutes alone on two cores; here every core has a worker's test already
def test_a_fast_run_shows_the_order_and_goes_on_where_it_was_killed(tmp_path):
    """Every stage by its own script: continued above base, a merge between, no leak; killed once on the way."""
    out, env = tmp_path / "run", os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "nanomed.miniature", "--fast", "--out", str(out)]
    with subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE) as first:
        while not (out / "stages" / "base.json").exists():
            assert first.poll() is None, first.stderr.read().decode()
            time.sleep(0.1)
        first.send_signal(signal.SIGTERM)
        assert first.wait() == 130
    whole = (out / "stages" / "base.json").read_bytes()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((out / "results.json").read_text())
    assert whole == (out / "stages" / "base.json").read_bytes()  # not run again
    assert results["models"]["continued"]["accuracy"] > results["models"]["base"]["accuracy"]
    assert results["corpus"]["leaks"] > 0 == results["corpus"]["leaks_kept"]
    stages = [json.loads(path.read_text()) for path in (out / "stages").iterdir()]
    assert results["peak_gb"] == max(stage["peak_gb"] for stage in stages)
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert "stand-in" in page
