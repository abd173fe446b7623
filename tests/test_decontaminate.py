"""Does a document contain a question of an evaluation set: long ones by runs of words, short ones by their options."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT
from decontaminate import find_hits, read_questions
from nanomed import InputError
from normalising import words_of


def slow_hits(text: str, question: str) -> tuple[int, float]:
    """(longest common run of 8 words or more, coverage of the question by such runs), word by word."""
    a, b = words_of(text), words_of(question)
    longest, covered = 0, set()
    for i in range(len(a)):
        for j in range(len(b)):
            n = 0
            while i + n < len(a) and j + n < len(b) and a[i + n] == b[j + n]:
                n += 1
            if n >= 8:
                longest, covered = max(longest, n), covered | set(range(j, j + n))
    return longest, len(covered) / len(b)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_hits_are_those_of_the_slow_way(tmp_path_factory, data):
    word = st.sampled_from(["das", "Herz", "pumpt", "Blut", "Hz"])
    question = data.draw(st.lists(word, min_size=8, max_size=30))
    start = data.draw(st.integers(0, len(question)))
    text = [
        *data.draw(st.lists(word, max_size=20)),
        *question[start : start + 16],
        *data.draw(st.lists(word, max_size=9)),
    ]
    path = tmp_path_factory.mktemp("hits") / "eval.jsonl"
    path.write_text(json.dumps({"question": ", ".join(question)}), "utf-8")
    hits = find_hits(" ".join(text), read_questions([path]))
    longest, coverage = slow_hits(" ".join(text), " ".join(question))
    assert len(hits) == (longest > 0)
    if hits:
        assert (hits[0]["words"], hits[0]["coverage"]) == (longest, round(coverage, 4))
        assert hits[0]["drop"] == (longest >= 13 or coverage >= 0.5)


def indexed(folder, *records):
    """The questions of a set of these records."""
    (folder / "e.jsonl").write_text("\n".join(map(json.dumps, records)), "utf-8")
    return read_questions([folder / "e.jsonl"])


def test_a_weak_hit_is_listed_and_the_document_kept(tmp_path):
    long = " ".join(f"wort{i}" for i in range(40))
    [hit] = find_hits("x " + " ".join(long.split()[5:15]) + " y", indexed(tmp_path, {"question": long}))
    assert (hit["words"], hit["coverage"], hit["drop"]) == (10, 0.25, False)
    assert hit["match"] == " ".join(f"wort{i}" for i in range(5, 15))


def test_what_cannot_be_kept_out_is_counted(tmp_path):
    questions = indexed(
        tmp_path,
        {"question": "Was ist das?", "options": ["A", "B"]},  # five words in all
        {"prompt": "Was hilft gegen Husten?"},  # no options
        {"question": "Das ist:", "options": ["eine Leber", "eine Niere", "eine Lunge", "ein Herz"]},  # any page has it
        {"question": "Was ist das?", "options": ["eine Leber", "eine Niere", "ein Herz"]},
        {"question": "Was ist das?", "options": ["b " * 8, "c"]},  # an option is long enough of itself
        {"question": "a b c d e f g h", "options": ["i", "j"]},
    )
    assert (questions.too_short, questions.by_options, questions.n_records) == (3, 1, {"e.jsonl": 6})


# ---- short questions ----

STEM, OPTIONS = "Wo liegt die Hypophyse?", ["im Sinus maxillaris", "im Foramen magnum", "in der Sella", "in der Orbita"]


def drops(text: str, questions) -> list[bool]:
    return [hit["drop"] for hit in find_hits(text, questions)]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
@pytest.mark.parametrize("form", ["{o}", "{x}) {o}\n", "({x}) {o} (falsch) ", "- {o}\n"])
def test_a_short_question_is_found_with_its_options(tmp_path, order, form):
    questions = indexed(tmp_path, {"id": "1", "subject": "Anatomie", "question": STEM, "options": OPTIONS})
    options = " ".join(form.format(x="ABCD"[i], o=OPTIONS[at]) for i, at in enumerate(order))
    assert drops(f"Übung 7. {STEM}\n{options}\nLösung: C", questions) == [True]
    assert drops(f"{STEM} Davon später. {STEM} {options}", questions) == [True]
    assert drops(f"Zur Auswahl stehen: {options} {STEM}", questions) == [True]


def test_a_short_question_alone_is_listed_and_a_trivial_one_is_not(tmp_path):
    """FAQ pages, other exams with the same stem, texts that name the options somewhere."""
    fever = {"question": "Was ist Fieber?", "options": ["ein Symptom", "eine Krankheit", "ein Erreger", "ein Mittel"]}
    questions = indexed(tmp_path, {"question": STEM, "options": OPTIONS}, fever)
    far = " ".join(["Text"] * 60)
    for text in (
        f"{STEM} In der Sella turcica.",
        f"{STEM} {' '.join(OPTIONS[:3])}",
        f"{STEM} {far} {' '.join(OPTIONS)}",
        f"{' '.join(OPTIONS)} {far} {STEM}",
    ):
        [hit] = find_hits(text, questions)
        assert (hit["drop"], hit["words"], hit["coverage"]) == (False, 4, round(4 / 16, 4))
    assert not find_hits("Was ist Fieber? Fieber ist ein Symptom, keine Krankheit.", questions)
    assert not find_hits(" ".join(OPTIONS), questions)
    assert drops("Was ist Fieber? A ein Erreger B ein Mittel C ein Symptom D eine Krankheit", questions) == [True]


def test_the_clones_own_exam_is_kept_out_in_any_order():
    path = ROOT / "data/tasks/medizin_de.jsonl"
    questions = read_questions([path])
    assert (questions.by_options, questions.too_short) == (26, 0)
    for number, line in enumerate(path.read_text("utf-8").splitlines()):
        record = json.loads(line)
        options = "\n".join(f"{x}) {option}" for x, option in zip("ABCD", reversed(record["options"]), strict=True))
        hits = find_hits(f"Frage {number}: {record['question']}\n{options}\nAntwort: B", questions)
        assert [(hit["record"], hit["drop"]) for hit in hits] == [(number, True)]


# ---- what of a record is question text ----

LAYOUTS = {
    "ours": {"id": "1", "question": STEM, "options": OPTIONS, "answer": 2},
    "mmlu": {"question": STEM, "subject": "anatomy", "choices": OPTIONS, "answer": 2},
    "mmmlu": {"Question": STEM, **dict(zip("ABCD", OPTIONS, strict=True)), "Answer": "C", "Subject": "anatomy"},
    "global-mmlu": {"question": STEM, **{f"option_{x}": o for x, o in zip("abcd", OPTIONS, strict=True)}},
    "bioinstructqa": {"question_translated": STEM, "options_translated": dict(zip("ABCD", OPTIONS, strict=True))},
    "medmcqa": {"question": STEM, **{f"op{x}": o for x, o in zip("abcd", OPTIONS, strict=True)}, "exp": "siehe oben"},
    "medqa": {"question": STEM, "options": [{"key": x, "value": o} for x, o in zip("ABCD", OPTIONS, strict=True)]},
    "arc": {"question": {"stem": STEM, "choices": {"text": OPTIONS, "label": [*"ABCD"]}}},
    "chat": {"messages": [{"role": "user", "content": STEM}], "options": OPTIONS},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_usual_layouts_are_read(tmp_path, layout):
    questions = indexed(tmp_path, LAYOUTS[layout])
    assert drops(f"{STEM} {' '.join(reversed(OPTIONS))}", questions) == [True]


def test_parquet_is_read_too(tmp_path):
    pq.write_table(pa.Table.from_pylist([LAYOUTS["mmlu"]] * 300), tmp_path / "e.parquet")
    questions = read_questions([tmp_path / "e.parquet"])
    assert questions.n_records == {"e.parquet": 300}
    assert drops(f"{STEM} {' '.join(OPTIONS)}", questions)[0]
    raw = (tmp_path / "e.parquet").read_bytes()
    (tmp_path / "e.parquet").write_bytes(raw[:20] + b"\0" * 200 + raw[220:])
    with pytest.raises(InputError, match=r"e\.parquet: damaged: .*; delete it"):
        read_questions([tmp_path / "e.parquet"])
    (tmp_path / "e.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"e\.parquet: not a whole Parquet file"):
        read_questions([tmp_path / "e.parquet"])


def test_compressed_jsonl_is_read_too(tmp_path):
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(json.dumps(LAYOUTS["mmlu"]).encode()))
    assert read_questions([tmp_path / "e.jsonl.gz"]).n_records == {"e.jsonl.gz": 1}


def test_other_keys_are_no_question(tmp_path):
    licence = "Dieses Werk ist lizenziert unter einer Creative Commons Namensnennung 4.0 International Lizenz"
    questions = indexed(tmp_path, {"question": STEM, "options": OPTIONS, "licence": licence, "source": {"note": licence}})
    assert not find_hits(f"Ein Artikel. {licence}.", questions)
    with pytest.raises(InputError, match=r"e.jsonl: record 2 has no question, it has q, licence; expected it as question"):
        indexed(tmp_path, {"question": STEM}, {"q": STEM, "licence": licence})
    with pytest.raises(InputError, match=r"e.jsonl: line 1: a JSON list, expected an object"):
        indexed(tmp_path, [STEM])


def test_sets_whose_files_have_one_name_are_two(tmp_path):
    a, b, c = (tmp_path / name for name in ("a/test.jsonl", "b/test.jsonl", "c.jsonl"))
    for path, words in ((a, "eins"), (b, "zwei"), (c, "drei")):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"question": " ".join(f"{words}{i}" for i in range(9))}) + "\n", "utf-8")
    questions = read_questions([a, b, c, a])
    assert questions.n_records == {str(a): 1, str(b): 1, "c.jsonl": 1}
    [hit] = find_hits(" ".join(f"zwei{i}" for i in range(9)), questions)
    assert hit["set"] == str(b)
    b.write_text("")
    with pytest.raises(InputError, match=r"b/test.jsonl: no records"):
        read_questions([a, b])
