"""failures: how answers go wrong; and the page that shows every evaluation."""

import json

import pytest

from conftest import ROOT
from endpoint import serving
from eval_command import answers, fixture_command, parts, refused  # noqa: F401
from nanomed.evaluation import language, pictures, report, verbosity
from nanomed.evaluation.answers import Sample, read_answers


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
        ("Ruhe hilft.\n\n**Frage:** Und sonst?\nAntwort: Tee.\nFrage: Und dann?\nAntwort: Ruhe", "continued", True),
        ("Ruhe hilft.\nNutzer: Danke!\nAssistent: Gern.", "continued", True),
        ("Ruhe hilft.\nUser: And now?", "continued", True),
        ("Antwort: Ruhe hilft.", "continued", False),
        ("Frage: Was hilft?\nAntwort: Ruhe hilft.", "continued", False),
        ("Sehr geehrte Kollegen,\n\nPatientin: Frau M., 54 Jahre\n\n**Antwort:** B", "continued", False),
        ("B ist richtig, denn A wirkt nicht.\n\n**Antwort:** B", "continued", False),
        ("Zur Anamnese:\n- Frage: Seit wann?\n- Frage: Wie oft?", "continued", False),
        ("Zur Anamnese:\nFrage: Seit wann?\nFrage: Wie oft?", "continued", False),
        ("Zur Anamnese:\n\nFrage: Seit wann?\nDas grenzt die Ursachen ein.", "continued", False),
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


def test_what_is_thought_aloud_is_not_counted(command, tmp_path):
    """An English thought before a German answer mixes nothing; one without an end is no answer; the file keeps both."""
    texts = {"q1": "<think>The patient should rest for some days.</think>\n\nRuhe hilft hier sehr gut.",
             "q2": "The template opened this.</think>Ruhe hilft hier sehr gut.", "q3": "<think>The patient should rest",
             "q4": "Ruhe hilft hier sehr gut."}  # fmt: skip
    path = answers(tmp_path / "a.jsonl", texts, "m-a")
    status, said = command("failures", path, "--out", tmp_path / "run")
    assert status == 0
    assert "3 of 4 answers of m-a have a <think> block, which is removed; 1 of them have nothing after it" in said
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["language"]["mixed"]["value"] == results["language"]["wholly_english"]["value"] == 0
    assert results["verbosity"]["empty"]["value"] == 0.25
    assert results["verbosity"]["length"]["value"] == 3.75
    found = read_answers(path)
    assert [sample.answer for sample in found.values()] == [*["Ruhe hilft hier sehr gut."] * 2, "", texts["q4"]]
    assert json.loads(path.read_text().splitlines()[0])["answer"] == texts["q1"]
    assert "thought" not in json.loads(found["q1"].line())


# --- report ---------------------------------------------------------------------------------------------------------


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


def test_runs_made_otherwise_are_curves_of_their_own(tmp_path, monkeypatch):
    """With and without chat, cut short, of another cue, by another judge or prompt: no point of one is in another's curve."""
    models = [str(tmp_path / name) for name in ("base", "merged")]
    (tmp_path / "merged").mkdir()
    report_of = {"t": 0.5, "base": {"name": models[0]}, "cpt": {"name": str(tmp_path / "cpt")}}
    (tmp_path / "merged" / "merge_report.json").write_text(json.dumps(report_of))
    about = {"shots": 3, "chat": False, "limit": None, "cue": "Antwort:"}
    runs = []
    for i, change in enumerate(({}, {"chat": True}, {"limit": 5}, {"cue": "Answer:"}, {"shots": 0})):
        task = {"task": "q", "accuracy": i / 10, "ci": [0, 1]} | about | change
        found = [{"path": path, "tasks": [task]} for path in models]
        runs.append({"kind": "knowledge", "config": about | change, "results": {"models": found}})
    for i, (name, prompt) in enumerate((("j1", "v1"), ("j2", "v1"), ("j1", "v2"))):
        for path in models:
            found = {"a": path, "b": "other", "judge": name, "prompt": prompt, "win_rate": 0.5 + i / 10, "ci": [0, 1]}
            runs.append({"kind": "judge", "config": {}, "results": found})
    curves = {}
    monkeypatch.setattr(pictures, "against_t", lambda found: curves.update(found) or "")
    report.over_t(runs)
    values = [{figure["value"] for _, figure in points} for points in curves.values()]
    assert values == [{0.0}, {0.1}, {0.2}, {0.3}, {0.4}, {0.5}, {0.6}, {0.7}]
    assert [[t for t, _ in points] for points in curves.values()] == [[0.0, 0.5]] * 8
    assert "win rate against other, by j2, v1" in curves
    assert "accuracy, q, 3 shots, chat, Antwort:" in curves


def test_a_page_of_no_run_is_refused(command, tmp_path):
    assert "has no run.json" in refused(command, "report", tmp_path, "--out", tmp_path / "r")
    (tmp_path / "run.json").write_text(json.dumps({"kind": "judge", "finished": False}))
    refused(command, "report", tmp_path, "--out", tmp_path / "r")
    assert not (tmp_path / "r").exists()
