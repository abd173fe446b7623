"""report: the page that shows every evaluation."""

import json
from pathlib import Path

from endpoint import completion, serving
from eval_command import answers, fixture_command, parts, refused, write  # noqa: F401
from nanomed.evaluation import pictures, report


def test_the_page_has_every_run_and_holds_its_pictures(command, tmp_path):
    a = answers(tmp_path / "a.jsonl", {f"q{i}": "Ruhe hilft hier sehr gut." for i in range(4)}, "m-a")
    b = answers(tmp_path / "b.jsonl", {f"q{i}": "Ruhe." for i in range(4)}, "m-<b>")
    with serving(lambda body, _: f"URTEIL: {1 if 'gut' in parts(body)[0] else 2}") as endpoint:
        flags = ("--url", endpoint.url, "--judge", "richter", "--out", tmp_path / "judged")
        assert command("judge", a, b, *flags)[0] == 0
    assert command("failures", a, "--ref", b, "--out", tmp_path / "failures")[0] == 0
    results = json.loads((tmp_path / "judged/results.json").read_text())
    assert results["length_controlled"] is None  # every prompt was won, and A is the longer in all
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
    for i, change in enumerate(({}, {"chat": True}, {"limit": 5}, {"cue": "Answer:"}, {"shots": 1})):
        task = {"task": "q", "accuracy": i / 10, "ci": [0, 1]} | about | change
        found = [{"path": path, "tasks": [task]} for path in models]
        runs.append({"kind": "knowledge", "config": about | change, "results": {"models": found}})
    for i, (name, prompt) in enumerate((("j1", "v1"), ("j2", "v1"), ("j1", "v2"))):
        for path in models:
            found = {"a": path, "b": "other", "judge": name, "prompt": prompt, "win_rate": 0.5 + i / 10, "ci": [0, 1]}
            runs.append({"kind": "judge", "config": {}, "results": found})
    curves = {}
    monkeypatch.setattr(pictures, "against_t", lambda found: curves.update(found) or "")
    report.over_t(runs, report.short)
    values = [{figure["value"] for _, figure in points} for points in curves.values()]
    assert values == [{0.0}, {0.1}, {0.2}, {0.3}, {0.4}, {0.5}, {0.6}, {0.7}]
    assert [[t for t, _ in points] for points in curves.values()] == [[0.0, 0.5]] * 8
    assert "win rate against other, by j2, v1" in curves
    assert "accuracy, q, 3 shots, chat, Antwort:" in curves
    assert "accuracy, q, 1 shot, Antwort:" in curves


def merged(folder, t: float, base: str, cpt: str) -> str:
    """A merge's folder, as far as the report looks into it."""
    folder.mkdir()
    (folder / "merge_report.json").write_text(json.dumps({"t": t, "base": {"name": base}, "cpt": {"name": cpt}}))
    return str(folder)


def test_merges_of_different_pairs_are_curves_of_their_own(tmp_path, monkeypatch):
    """BASE given as a hub id and examined in the hub's cache; a merge that is BASE of another; two CPTs of the same name."""
    cached = str(tmp_path / "hub/models--Qwen--Q-7B/snapshots/0a1b")
    one = merged(tmp_path / "one", 0.25, "Qwen/Q-7B", str(tmp_path / "cpt"))
    two = merged(tmp_path / "two", 0.5, one, str(tmp_path / "more"))
    three = merged(tmp_path / "three", 0.75, cached, str(tmp_path / "other" / "more"))
    accuracy = dict(zip((cached, one, two, three), (0.1, 0.2, 0.3, 0.4), strict=True))
    tasks = {path: [{"task": "q", "accuracy": value, "ci": [0, 1]}] for path, value in accuracy.items()}
    models = [{"path": path, "tasks": tasks[path]} for path in accuracy]
    config = {"shots": 0, "chat": False, "limit": None, "cue": "Antwort:"}
    curves = {}
    monkeypatch.setattr(pictures, "against_t", lambda found: curves.update(found) or "")
    report.over_t([{"kind": "knowledge", "config": config, "results": {"models": models}}], report.short)
    label = "accuracy, q, 0 shots, Antwort:, "
    hub = str(Path("Qwen/Q-7B").resolve())
    assert {name: [(t, figure["value"]) for t, figure in points] for name, points in curves.items()} == {
        f"{label}cpt": [(0, 0.1), (0.25, 0.2)],
        f"{label}{one} to {tmp_path / 'more'}": [(0, 0.2), (0.5, 0.3)],
        f"{label}{hub} to {tmp_path / 'other' / 'more'}": [(0, 0.1), (0.75, 0.4)],
    }


def test_a_curve_is_drawn_only_where_equal_lengths_were_seen():
    points = [{"length_a": 9 + i, "length_b": 5, "worth": float(i % 2)} for i in range(8)]
    assert pictures.length_and_win("a", points, 0.5).count(pictures.RED) == 1
    assert pictures.RED not in pictures.length_and_win("a", points, None)


def test_a_run_that_did_not_finish_is_left_out(command, tmp_path):
    a = answers(tmp_path / "a.jsonl", {"q": "Ruhe hilft."}, "m-a")
    assert command("failures", a, "--out", tmp_path / "whole")[0] == 0
    (tmp_path / "judged").mkdir()
    (tmp_path / "judged" / "run.json").write_text(json.dumps({"kind": "judge", "finished": False}))
    status, said = command("report", tmp_path / "judged", a, tmp_path / "whole", "--out", tmp_path / "r")
    assert status == 0
    warnings = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert [line.split(": ")[1:] for line in warnings] == [
        ["left out", str(tmp_path / "judged"), "is not finished; run its command again to resume"],
        [
            "left out",
            str(a),
            "has no a.run beside it; expected a folder written by eval.py, or answers of eval.py generate",
        ],
    ]
    assert "m-a" in (tmp_path / "r/report.html").read_text()
    line = refused(command, "report", tmp_path / "judged", a, "--out", tmp_path / "none")
    assert "none of the 2 paths is a finished run" in line
    assert "cannot be written (" in refused(command, "report", tmp_path / "whole", "--out", a / "r")


def test_a_model_has_one_name_on_the_page(tmp_path):
    """Knowledge's, by the path, or by the fingerprint where generate was given a name of its own or a hub id."""
    models = {"base": {"path": "/hub/snapshots/abc", "fingerprint": "f0"},
              "merged": {"path": str(tmp_path / "runs/x/hf"), "fingerprint": "f1"}}  # fmt: skip
    (tmp_path / "a.run").mkdir()
    beside = {"kind": "generate", "config": {"model": "Qwen/Qwen2.5", "fingerprint": "f0"}}
    (tmp_path / "a.run" / "run.json").write_text(json.dumps(beside))
    called = report.namer([
        {"kind": "knowledge", "config": {"models": models}, "data": {}},
        {"kind": "generate", "config": {"model": "mine", "fingerprint": "f1"}, "data": {}},
        {"kind": "failures", "config": {"tokenizer": None}, "data": {str(tmp_path / "a.jsonl"): "0"}},
    ])  # fmt: skip
    names = [str(tmp_path / "runs/x"), "mine", "Qwen/Qwen2.5", "some/other", "of/another/base", "merged"]
    assert [called(name) for name in names] == ["merged", "merged", "base", "other", "of/another/base", "merged"]


def test_answers_are_shown_by_their_file(command, tmp_path):
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "Frage?"}])
    with serving(lambda body, _: completion("Ruhe.")) as endpoint:
        made = ("generate", endpoint.url, "--model", "m-a", "--prompts", prompts, "--out", tmp_path / "a.jsonl")
        assert command(*made)[0] == 0
    for runs in ([tmp_path / "a.jsonl"], [tmp_path / "a.jsonl", tmp_path / "a.run"]):
        status, said = command("report", *runs, "--out", tmp_path / "r")
        assert (status, "runs: 1," in said) == (0, True)
    assert "| m-a | [1](../a.jsonl) | endpoint |" in (tmp_path / "r/report.md").read_text()


def test_a_page_of_no_run_is_refused(command, tmp_path):
    assert "has no run.json" in refused(command, "report", tmp_path, "--out", tmp_path / "r")
    (tmp_path / "run.json").write_text(json.dumps({"kind": "judge", "finished": False}))
    refused(command, "report", tmp_path, "--out", tmp_path / "r")
    assert not (tmp_path / "r").exists()
