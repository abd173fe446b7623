"""failures: how answers go wrong; and the page that shows every evaluation."""

import json

import pytest

from conftest import ROOT
from endpoint import serving
from eval_command import answers, fixture_command, parts, refused  # noqa: F401
from nanomed.evaluation import language, verbosity
from nanomed.evaluation.answers import Sample


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


def test_a_page_of_no_run_is_refused(command, tmp_path):
    assert "has no run.json" in refused(command, "report", tmp_path, "--out", tmp_path / "r")
    (tmp_path / "run.json").write_text(json.dumps({"kind": "judge", "finished": False}))
    refused(command, "report", tmp_path, "--out", tmp_path / "r")
    assert not (tmp_path / "r").exists()
