"""convert, on files in the layouts that the sources publish."""

import csv
import json
import subprocess
import sys
import zipfile
from argparse import Namespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from conftest import ROOT
from nanomed import InputError
from nanomed.evaluation import convert
from nanomed.evaluation.convert import SUBJECTS
from nanomed.evaluation.knowledge import read_samples, write_samples
from nanomed.evaluation.questions import read_questions

OPTIONS = ["die Leber", "die Milz", "das Herz", "die Niere"]


def rows(n: int, subjects=SUBJECTS):
    """(subject, number, question, place of the answer) of every question."""
    return [(s, i, f"Frage {i} zu {s}?", i % 4) for s in (*subjects, "astronomy") for i in range(n)]


def write_lines(path, objects):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(o, ensure_ascii=False) + "\n" for o in objects), encoding="utf-8")


def mmlux(folder):
    for split, n in (("test", 8), ("dev", 5)):
        for name in (*SUBJECTS, "astronomy"):
            mine = [(i, q, a) for s, i, q, a in rows(n) if s == name]
            lines = [{"question": q, "choices": OPTIONS, "answer": a, "id": f"{name}/{split}/{i}"} for i, q, a in mine]
            write_lines(folder / f"hendrycks_{name}_DE_{split}.jsonl", lines)
    other = {"question": "?", "choices": OPTIONS, "answer": 0, "id": "anatomy/test/0"}
    write_lines(folder / "hendrycks_anatomy_FR_test.jsonl", [other])
    write_lines(folder / "hendrycks_anatomy_DE_validation.jsonl", [other])


def mmmlu(folder):
    (folder / "test").mkdir(parents=True)
    with (folder / "test" / "mmlu_DE-DE.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["", "Question", "A", "B", "C", "D", "Answer", "Subject"])
        writer.writerows([k, q, *OPTIONS, "ABCD"[a], s] for k, (s, _, q, a) in enumerate(rows(8)))


def global_mmlu(folder):
    (folder / "de").mkdir(parents=True)
    for split, n in (("test", 8), ("dev", 5)):
        table = [{"sample_id": f"{s}/{split}/{i}", "subject": s, "question": q, "answer": "ABCD"[a],
                  **{f"option_{x}": o for x, o in zip("abcd", OPTIONS, strict=True)}} for s, i, q, a in rows(n)]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(table), folder / "de" / f"{split}-00000-of-00001.parquet")


def bioinstructqa(folder):
    folder.mkdir()
    options = dict(zip("ABCD", OPTIONS, strict=True))
    table = [
        {"identifier": f"id-{i}", "corpus_name": corpus, "question": "no", "question_translated": q,
         "options_translated": options, "correct_answer_letter": "ABCD"[a]}
        for corpus in ("MedQA", "PubMedQA", "MedQA-5_options", *(f"MMLU_{s}" for s in SUBJECTS), "MMLU_astronomy")
        for _, i, q, a in rows(8, ("",))[:8]
    ]  # fmt: skip
    with zipfile.ZipFile(folder / "data.zip", "w") as archive:
        archive.writestr("langs_processed/German-full.json", json.dumps(table))


def medqa(folder):
    for split, n in (("test", 8), ("train", 9)):
        write_lines(folder / f"phrases_no_exclude_{split}.jsonl", (
            {"question": q, "answer": OPTIONS[a], "options": dict(zip("ABCD", OPTIONS, strict=True)), "meta_info": "step1",
             "answer_idx": "ABCD"[a]} for _, _, q, a in rows(n, ("",))[:n]))  # fmt: skip


WRITERS = {"mmlux": mmlux, "mmmlu": mmmlu, "global-mmlu": global_mmlu, "bioinstructqa": bioinstructqa, "medqa": medqa}


@pytest.mark.parametrize("source", WRITERS)
def test_every_source(source, tmp_path):
    WRITERS[source](tmp_path / "published")
    args = Namespace(source=source, src=str(tmp_path / "published"), out=tmp_path / "out")
    convert.run(args)
    names = [name for exam in convert.SOURCES[source].exams for name in convert.task_names(source, exam)]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        f"{n}{end}" for n in names for end in (".jsonl", ".dev.jsonl")
    )
    taken = 5 if source in ("mmmlu", "bioinstructqa") else 0  # no dev questions there
    for name in names:
        test = read_questions(tmp_path / "out" / f"{name}.jsonl")
        dev = read_questions(tmp_path / "out" / f"{name}.dev.jsonl")
        assert [q["answer"] for q in test] == [i % 4 for i in range(taken, 8)]
        assert [q["answer"] for q in dev] == [i % 4 for i in range(5)]
        assert all(q["options"] == OPTIONS and q["question"].startswith("Frage") for q in test + dev)
        if taken:
            assert not {q["id"] for q in test} & {q["id"] for q in dev}
    convert.run(args)  # the same again is no error


def test_every_published_set_has_its_task():
    files = {p.read_text(encoding="utf-8") for p in (ROOT / "data" / "tasks").rglob("*.yaml")}
    for name, source in convert.SOURCES.items():
        for task in [task for exam in source.exams for task in convert.task_names(name, exam)]:
            assert any(f"task: {task}\n" in text and f"questions/{task}.dev.jsonl" in text for text in files), task
    for group in ("german_medical", "german_medical_bioinstructqa"):  # the second: one translation for both halves
        config = yaml.safe_load((ROOT / "data" / "tasks" / f"{group}.yaml").read_text(encoding="utf-8"))
        assert [name.partition("_de")[0] for name in config["task"]] == ["mmlu", "medqa"]
        assert not config["aggregate_metric_list"][0]["weight_by_size"]
    assert all(name.endswith("bioinstructqa") for name in config["task"])


@pytest.mark.parametrize("ending", ["", "_test.csv_de-DE.csv", "_test-de-DE.csv", "_test-sw-KE.csv", "_test"])
def test_mmmlu_spells_its_subjects_in_many_ways(ending, tmp_path):
    mmmlu(tmp_path / "m")
    path = tmp_path / "m" / "test" / "mmlu_DE-DE.csv"
    lines = [line + ending if line and line.split(",")[-1] in SUBJECTS else line for line in path.read_text().split("\n")]
    path.write_text("\n".join(lines))
    convert.run(Namespace(source="mmmlu", src=str(tmp_path / "m"), out=tmp_path / "out"))
    assert len(list((tmp_path / "out").iterdir())) == 2 * len(SUBJECTS)


@pytest.mark.parametrize(("source", "inner"), [("global-mmlu", "de"), ("mmmlu", "test"), ("global-mmlu", "")])
def test_the_inner_folder_is_a_source_too(source, inner, tmp_path, monkeypatch):
    WRITERS[source](tmp_path / "m")
    monkeypatch.chdir(tmp_path / "m" / inner)
    for number, src in enumerate((tmp_path / "m" / inner, f"{tmp_path}/m/{inner}/", ".")):
        convert.run(Namespace(source=source, src=str(src), out=tmp_path / f"out-{number}"))
        assert len(list((tmp_path / f"out-{number}").iterdir())) == 2 * len(SUBJECTS)


def test_of_bioinstructqa_medqa_is_enough_but_not_half_of_mmlu(tmp_path):
    bioinstructqa(tmp_path / "m")
    with zipfile.ZipFile(tmp_path / "m" / "data.zip") as archive:
        table = json.loads(archive.read("langs_processed/German-full.json"))
    path, args = tmp_path / "German-full.json", Namespace(source="bioinstructqa", src=str(tmp_path / "German-full.json"))
    path.write_text(json.dumps([row for row in table if "MMLU" not in row["corpus_name"]]))
    convert.run(Namespace(**vars(args), out=tmp_path / "medqa"))
    assert len(list((tmp_path / "medqa").iterdir())) == 2
    path.write_text(json.dumps([row for row in table if row["corpus_name"] != "MMLU_anatomy"]))
    with pytest.raises(InputError, match="holds no questions of mmlu_de_bioinstructqa_anatomy"):
        convert.run(Namespace(**vars(args), out=tmp_path / "half"))
    assert not (tmp_path / "half").exists()


def test_bad_sources_end_in_one_line(tmp_path):
    medqa(tmp_path / "m")
    path = tmp_path / "m" / "phrases_no_exclude_test.jsonl"
    text = path.read_text(encoding="utf-8")

    def run(source="medqa", src=tmp_path / "m"):
        convert.run(Namespace(source=source, src=str(src), out=tmp_path / "out"))

    faults = {
        "1 of 8 questions are damaged, .* option 0 is empty": ('"A": "die Leber"', '"A": " "'),
        "answer -1 is not one of its options": ('"answer_idx": "A"', '"answer_idx": "E"'),
        "KeyError: 'options'": ('"options"', '"choices"'), "not as published": ("{", ""),
    }  # fmt: skip
    for message, (old, new) in faults.items():
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
        with pytest.raises(InputError, match=message) as error:
            run()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    path.write_text(text, encoding="utf-8")
    run()
    path.write_text(text.replace("Frage 7", "Frage acht"), encoding="utf-8")
    with pytest.raises(InputError, match="exists already with other questions"):
        run()
    with pytest.raises(InputError, match="not as published"):
        run("mmlux", path)
    with pytest.raises(InputError, match=r"has none of \*mmlu_DE-DE.csv"):
        run("mmmlu")


def test_nothing_is_written_beside_the_questions_of_another_source(tmp_path):
    mmlux(tmp_path / "m")
    out = tmp_path / "out"
    write_lines(out / "mmlu_de_mmlux_college_medicine.jsonl", [{"id": "another"}])
    before = {path: path.read_text() for path in out.iterdir()}
    with pytest.raises(InputError, match=r"college_medicine\.jsonl: exists already with other questions"):
        convert.run(Namespace(source="mmlux", src=str(tmp_path / "m"), out=out))
    assert {path: path.read_text() for path in out.iterdir()} == before


def test_a_question_that_translation_broke_is_left_out_and_named(tmp_path, capsys):
    mmlux(tmp_path / "m")
    path = tmp_path / "m" / "hendrycks_anatomy_DE_test.jsonl"
    lines = [{"question": f"{i}?", "choices": OPTIONS, "answer": 0, "id": f"anatomy/test/{i}"} for i in range(40)]
    lines[7] |= {"choices": [OPTIONS[1], *OPTIONS[1:]]}
    lines[8] |= {"choices": OPTIONS[:3]}
    write_lines(path, lines)
    convert.run(Namespace(source="mmlux", src=str(tmp_path / "m"), out=tmp_path / "out"))
    said = capsys.readouterr().err
    assert "left out anatomy/test/7: two options are the same" in said
    assert "left out anatomy/test/8: has 3 options, expected 4" in said
    found = read_questions(tmp_path / "out" / "mmlu_de_mmlux_anatomy.jsonl")
    assert [q["question"] for q in found] == [f"{i}?" for i in range(40) if i not in (7, 8)]


def test_the_command_line(tmp_path):
    command = [sys.executable, "eval.py", "convert", "medqa", str(tmp_path / "nowhere"), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}/nowhere: no such file or folder")
    assert len(done.stderr.splitlines()) == 1


def test_a_text_may_hold_any_character_that_is_no_line_feed(tmp_path):
    """U+2028, U+0085 and a form feed end a line for str.splitlines, not in JSONL; questions from PDFs have them."""
    question = {"id": "q", "question": "Erste\u2028Zeile\x85?", "options": ["ja\u2029", "nein\f"], "answer": 0}
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(question, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert read_questions(path) == [question]
    write_samples(path, [question, question])
    assert read_samples(path) == [question, question]


def test_a_failed_command_leaves_nothing(tmp_path, monkeypatch):
    """A disk that is full after three files: half of the tasks would look like all of them. What was there before stays."""
    mmlux(tmp_path / "src")
    write_one, written = convert.write_durably, []

    def full(path, text):
        if len(written) == 3:
            raise OSError(28, "No space left on device", str(path))
        written.append(path)
        write_one(path, text)

    args = Namespace(source="mmlux", src=str(tmp_path / "src"), out=tmp_path / "new" / "questions")
    with monkeypatch.context() as patch:
        patch.setattr(convert, "write_durably", full)
        with pytest.raises(OSError, match="No space left"):
            convert.run(args)
    assert not (tmp_path / "new").exists()
    convert.run(args)
    before = {path: path.read_bytes() for path in args.out.iterdir()}
    sorted(before)[0].unlink()
    written.clear()
    with monkeypatch.context() as patch:
        patch.setattr(convert, "write_durably", full)
        with pytest.raises(OSError, match="No space left"):
            convert.run(args)
    assert {path: path.read_bytes() for path in args.out.iterdir()}.items() < before.items()
    assert len([*args.out.iterdir()]) == len(before) - 1
