"""eval.py knowledge: whole runs and their page, a run that goes on, a chat template, bad command lines."""

import json
import shutil
import sys

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer

import eval as command_line
from knowledge_world import QUESTIONS, fixture_world, flags, run, write_jsonl  # noqa: F401
from nanomed import InputError, run_script
from nanomed.evaluation import knowledge, record, scorer, scoring
from nanomed.evaluation.questions import fault
from nanomed.files import sha256
from nanomed.prompts import render


def test_a_run_of_two_models(world, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    argv = [*flags(world, out, "a", "b"), "--seeds", 2]
    run(monkeypatch, *argv)
    found = json.loads((out / "results.json").read_text())
    about = json.loads((out / "run.json").read_text())
    assert about["finished"]
    assert about["data"][str(world / "one.jsonl")] == sha256(world / "one.jsonl")
    first, second = found["models"]
    assert [e["task"] for e in first["tasks"]] == ["one", "two"]
    assert first["tasks"][0]["difference"] is None
    assert second["tasks"][0]["difference"]["to"] == "a"
    assert first["group"]["difference"] is None
    gain = second["group"]["macro"] - first["group"]["macro"]
    assert second["group"]["difference"]["delta"] == pytest.approx(gain)
    for model in found["models"]:
        for entry in model["tasks"]:
            lines = knowledge.read_samples(out / "samples" / model["name"] / f"{entry['task']}.jsonl")
            assert entry["accuracy"] == pytest.approx(sum(x["correct"] for x in lines) / len(lines))
            assert len(lines) == 2 * entry["n"]
            assert entry["chance"] == 0.25
            assert entry["letters"]["gold"] == [sum(x["gold"] == i for x in lines) for i in range(4)]
            assert all(x["correct"] == (x["chosen"] == x["gold"]) for x in lines)
            assert {s["seed"] for s in entry["seeds"]} == {0, 1}
        one, two = (e["accuracy"] for e in model["tasks"])
        assert model["group"]["macro"] == pytest.approx((one + two) / 2)
        assert model["group"]["micro"] == pytest.approx((12 * one + 6 * two) / 18)
        assert model["group"]["chance"] == 0.25
    assert (out / "accuracy.svg").stat().st_size > 1000
    shown = capsys.readouterr()
    assert "both, macro" in shown.out
    assert "chance" in shown.out.splitlines()[0]
    assert " 25.0% " in shown.out.splitlines()[1]
    assert "b: two, shots 2, seed 1" in shown.err.splitlines()
    assert "%|" not in shown.err  # lm-eval's bar, of what takes a moment
    before = (out / "results.json").stat().st_mtime_ns
    run(monkeypatch, *argv)
    assert "already finished" in capsys.readouterr().out
    assert (out / "results.json").stat().st_mtime_ns == before
    the_page_of(out, found, tmp_path, monkeypatch)


def the_page_of(out, found, tmp_path, monkeypatch):
    """The report of a run of knowledge: a row a task and model, the group, a picture; a folder named twice counts once."""
    (tmp_path / "link").symlink_to(out)
    (tmp_path / "answers.jsonl").write_text("")  # beside a run; RUN/* names it too
    argv = [out, tmp_path / "link", tmp_path / "answers.jsonl", "--out", tmp_path / "report"]
    monkeypatch.setattr(sys, "argv", ["eval.py", "report", *map(str, argv)])
    run_script(command_line.main)
    rows = [line.split(" | ") for line in (tmp_path / "report/report.md").read_text().splitlines() if line[:2] == "| "]
    named = [(row[0][2:], row[2]) for row in rows]
    wanted = [(task, model) for task in ("one", "two", "both, macro") for model in "ab"]
    assert [pair for pair in named if pair[1] in "ab"] == wanted
    for task, row in zip(found["models"][1]["tasks"], rows[3:7:2], strict=True):
        assert row[4].startswith(f"{100 * task['accuracy']:.1f} %")
        assert row[5].startswith(f"{100 * task['difference']['delta']:+.1f} [")
    page = (tmp_path / "report/report.html").read_text()
    assert page.count("<svg") == 1
    assert "2 shots:" in page
    assert "DeFineMed-Qwen2.5-7B" not in page
    for model in found["models"]:
        model["group"]["name"] = "german_medical"  # what the paper's models have answered
    (out / "results.json").write_text(json.dumps(found))
    run_script(command_line.main)
    assert "DeFineMed-Qwen2.5-7B" in (tmp_path / "report/report.html").read_text()


def test_a_run_goes_on_and_only_as_itself(world, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    original, calls = scoring.score, []

    def interrupted(lm, leaf, *rest):
        if calls:
            raise KeyboardInterrupt
        calls.append(leaf.task_name)
        return original(lm, leaf, *rest)

    monkeypatch.setattr(scoring, "score", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *flags(world, out, "a"))
    assert stop.value.code == 130
    assert not (out / "results.json").exists()
    assert sorted(p.name for p in (out / "samples" / "a").iterdir()) == ["one.jsonl"]

    again = []
    monkeypatch.setattr(scoring, "score", lambda lm, leaf, *rest: again.append(leaf.task_name) or original(lm, leaf, *rest))
    run(monkeypatch, *flags(world, out, "a"))
    assert again == ["two"]
    capsys.readouterr()
    with pytest.raises(SystemExit, match="belongs to a run with shots = 2, this one 1"):
        run(monkeypatch, *flags(world, out, "a", shots=1))
    with pytest.raises(SystemExit, match="belongs to a run with models = a, this one b;"):
        run(monkeypatch, *flags(world, out, "b"))
    with pytest.raises(SystemExit, match=r"out: was made by another model \(a\); choose another --out or delete it"):
        run(monkeypatch, f"a={world / 'b'}", *flags(world, out))


def test_bad_command_lines_end_in_one_line(world, tmp_path, monkeypatch):
    out = tmp_path / "out"
    used = tmp_path / "used"
    used.mkdir()
    (used / "letter.txt").write_text("")
    for argv, message in (
        (flags(world, out, "a", tasks="nix"), r"--tasks nix: no such task; .*medizin_de"),
        (flags(world, out, "a", tasks="both,one"), "one is named twice"),
        (flags(world, out, "a", shots=9), r"dev\.jsonl: has 5 questions, --shots 9"),
        (flags(world, out, "a", shots=-1), "--shots -1: expected a positive number"),
        (flags(world, out, "a", "a"), "the name 'a' is taken"),
        (flags(world, out, "nowhere"), "neither a local folder nor a hub id"),
        (flags(world, out, "a", tasks="german_medical"), "make it with: python eval.py convert mmlux SRC"),
        (flags(world, used, "a"), "not empty and not from an evaluation"),
        (flags(world, used / "letter.txt" / "out", "a"), r"cannot be written \(Not a directory\); choose another --out"),
        ([*flags(world, out, "a"), "--chat"], "has no chat template"),
    ):  # fmt: skip
        with pytest.raises(SystemExit, match=message) as stop:
            run(monkeypatch, *argv)
        assert stop.value.code.startswith("error: ")
        assert "\n" not in stop.value.code
        assert not out.exists()


TEMPLATE = "{% for m in messages %}<{{m.role}}>{{m.content}}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def chatty(model, folder, template):
    """The model with a chat template."""
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_through_a_chat_template(world, tmp_path, monkeypatch):
    folder = chatty(world / "a", tmp_path / "chatty", TEMPLATE)
    run(monkeypatch, folder, "--task-path", world / "tasks", "--tasks", "one", "--shots", 1, "--chat", "--cue", "Answer:",
        "--out", tmp_path / "out")  # fmt: skip
    line = knowledge.read_samples(tmp_path / "out" / "samples" / "chatty" / "one.jsonl")[0]
    assert line["prompt"].count("<user>Frage:") == 2
    assert line["prompt"].endswith("Answer:\n<assistant>")
    assert "Antwort" not in line["prompt"]
    assert line["options"] == ["A", "B", "C", "D"]
    assert "thinking" not in json.loads((tmp_path / "out" / "results.json").read_text())["lm_eval"][0]


def test_a_model_that_may_think_is_told_not_to_here_and_in_lm_eval(world, tmp_path, monkeypatch):
    """By the model that the printed command makes: the same prompts, the same log-probabilities."""
    empty = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    folder = chatty(world / "a", tmp_path / "thinker", TEMPLATE + empty)
    how = ("--tasks", "one", "--shots", 1, "--chat", "--out", tmp_path / "out")
    run(monkeypatch, folder, "--task-path", world / "tasks", *how)
    ours = knowledge.read_samples(tmp_path / "out" / "samples" / "thinker" / "one.jsonl")
    command = json.loads((tmp_path / "out" / "results.json").read_text())["lm_eval"][0].split()
    peer = HFLM.create_from_arg_string(command[command.index("--model_args") + 1], {"batch_size": 8, "device": "cpu"})
    assert all(line["prompt"].endswith("<assistant><think>\n\n</think>\n\n") for line in ours)
    requests = [Instance("loglikelihood", {}, (line["prompt"], o), 0) for line in ours for o in line["options"]]
    theirs = peer.loglikelihood(requests, disable_tqdm=True)
    assert [p for line in ours for p in line["log_p"]] == pytest.approx([p for p, _ in theirs], abs=1e-4)
    hello = [{"role": "user", "content": "Hallo"}]
    assert peer.apply_chat_template(hello) == render(folder, hello) == "<user>Hallo\n<assistant><think>\n\n</think>\n\n"


def test_a_path_may_hold_what_ends_a_name(world, tmp_path):
    for name in ("lr=1e-4", "merged"):
        (tmp_path / name).symlink_to(world / "a")
    for given, name, folder in (
        (f"{tmp_path}/lr=1e-4", "lr=1e-4", "lr=1e-4"),
        (f"mine={tmp_path}/lr=1e-4", "mine", "lr=1e-4"),
        (f"t=0.5={tmp_path}/merged", "t=0.5", "merged"),
    ):
        assert knowledge.named_models([given]) == {name: (tmp_path / folder).resolve()}
    with pytest.raises(InputError, match="MODEL no/such/model: neither"):
        knowledge.named_models(["a=no/such/model"])


def test_record_is_torn_by_nothing(tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", QUESTIONS)
    out = tmp_path / "run"
    with pytest.raises(InputError, match="is a file"):
        record.open_run(data, "judge", {"x": 1}, [data])
    assert not record.open_run(out, "judge", {"x": 1}, [data])
    assert not record.open_run(out, "judge", {"x": 1}, [data])  # goes on
    record.finish_run(out, {"n": 3})
    assert record.open_run(out, "judge", {"x": 1}, [data])
    with pytest.raises(InputError, match="x = 1, this one 2"):
        record.open_run(out, "judge", {"x": 2}, [data])
    with pytest.raises(InputError, match="holds a run of judge, not generate"):
        record.open_run(out, "generate", {"x": 1}, [data])
    write_jsonl(data, QUESTIONS[:3])
    with pytest.raises(InputError, match=r"on other data \(.*d\.jsonl has changed since\)"):
        record.open_run(out, "judge", {"x": 1}, [data])
    with pytest.raises(InputError, match=r"on other data \(.*d\.jsonl is not read by this one\)"):
        record.open_run(out, "judge", {"x": 1}, [])
    assert fault(QUESTIONS[0]) is None


def test_a_model_that_always_says_one_letter_is_named(world, tmp_path, monkeypatch, capsys):
    """Its accuracy is the letter's share of the right answers, and looks like one."""
    folder = shutil.copytree(world / "a", tmp_path / "stubborn")
    token = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(" D").ids[-1]
    monkeypatch.setattr(scorer, "scores", lambda model, states, targets: ((targets == token).float(), targets == token))
    run(monkeypatch, *flags(world, tmp_path / "out", tmp_path / "stubborn", tasks="one,two"))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(said) == 1  # two is scored by whole answers
    assert said[0].startswith("warning: stubborn: one: 100% of the answers are D; ")
    assert "medizin_de_text" in said[0]
    entry = json.loads((tmp_path / "out/results.json").read_text())["models"][0]["tasks"][0]
    assert entry["letters"]["chosen"] == [0, 0, 0, 12]
    assert entry["accuracy"] == 0.25
