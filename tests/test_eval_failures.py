"""failures: how answers go wrong."""

import json
import shutil
import unicodedata

import pytest

from bpe import with_bos
from conftest import ROOT
from eval_command import answers, fixture_command, refused, write  # noqa: F401
from nanomed import InputError
from nanomed.evaluation import language, verbosity
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


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_abbreviations_and_titles_are_no_mixing(form):
    """A second labelled set: abbreviations spelled out, titles of journals and studies, and sentences that do mix."""
    found = {"german": [], "mixed": []}
    for line in (ROOT / "tests/language_answers.tsv").read_text(encoding="utf-8").splitlines():
        kind, text = line.split("\t")
        found[kind].append(language.examine(unicodedata.normalize(form, text)))
    assert [len(found[kind]) for kind in found] == [70, 42]
    assert sum(x.mixed or x.wholly_english for x in found["german"]) <= 0.02 * 70
    assert sum(x.mixed or x.wholly_english for x in found["mixed"]) >= 0.95 * 42


@pytest.mark.parametrize(
    ("abbreviation", "words", "expected"),
    [
        ("GERD", "gastroesophageal reflux disease", True),
        ("HFpEF", "heart failure with preserved ejection fraction", True),
        ("ROSC", "return of spontaneous circulation", True),
        ("ROSC", "return of the patient", False),
        ("SIRS", "a serious condition", False),
        ("DNA", "do not delay", False),
    ],
)
def test_initials_tell_what_an_abbreviation_stands_for(abbreviation, words, expected):
    assert language.stands_for(abbreviation, words.split()) == expected


def test_turns_written_with_special_tokens_count(tmp_path):
    """They are not in the answer's text: generate counts them before it removes them."""
    sample = Sample("1", [{"role": "user", "content": "Was hilft?"}], "Ruhe.user Und nun?", "length", 9, "m", turn_tokens=2)
    (tmp_path / "a.jsonl").write_text(sample.line())
    read = read_answers(tmp_path / "a.jsonl")["1"]
    assert read.turn_tokens == 2
    assert verbosity.examine(read, len).continued


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


def test_an_echo_is_of_what_the_user_said():
    rule, asked = "Antworten Sie immer kurz und klar.", "Was hilft bei starkem Husten und Fieber?"
    prompt = [{"role": "system", "content": rule}, {"role": "user", "content": asked}]
    found = [verbosity.examine(Sample("q", prompt, text, "stop", 1, "m"), len).echo for text in (rule, asked)]
    assert found == [False, True]


def test_failures_beside_a_reference(command, tmp_path):
    a = answers(tmp_path / "a.jsonl", {"q1": "Ruhe hilft hier sehr gut.", "q2": "You should rest for some days."}, "m-a")
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


def test_nothing_is_not_as_long_as_nothing(command, tmp_path):
    a, b = (answers(tmp_path / f"{name}.jsonl", {"q1": "", "q2": " "}, f"m-{name}") for name in "ab")
    status, said = command("failures", a, "--ref", b, "--out", tmp_path / "run")
    assert status == 0
    assert json.loads((tmp_path / "run/results.json").read_text())["verbosity"]["ratio_to_ref"] is None
    assert "  length, ratio to the reference        –  " in said


RECORD = {"id": "q", "prompt": [{"role": "user", "content": "?"}], "answer": "Ja.", "finish_reason": "stop",
          "completion_tokens": 2, "model": "m"}  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([RECORD | {"prompt": "?"}], "line 1 has no id or no prompt"),
        ([{key: RECORD[key] for key in RECORD if key != "id"}], "line 1 has no id or no prompt"),
        ([RECORD, RECORD | {"id": "r", "completion_tokens": "2"}], "line 2: completion_tokens is '2', expected int"),
        ([RECORD, RECORD], "id 'q'"),
        ([RECORD, RECORD | {"id": "r", "model": "n"}], "has answers of m and of n"),
        ([], "has no answers"),
        ([RECORD, [RECORD]], "line 2 is not a JSON object"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_answers_that_are_none(lines, message, command, tmp_path):
    line = refused(command, "failures", write(tmp_path / "a.jsonl", lines), "--out", tmp_path / "run")
    assert message in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("content", "message"), [(b"\n{", "line 2 is not JSON"), (b"\xff", "is not UTF-8")])
def test_a_file_of_no_lines_of_json(content, message, command, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(content)
    assert message in refused(command, "failures", tmp_path / "a.jsonl", "--out", tmp_path / "run")


def test_a_finished_run_is_shown_and_left_as_it_is(command, tmp_path, monkeypatch):
    flags = (answers(tmp_path / "a.jsonl", {"q": "Ruhe."}, "m"), "--out", tmp_path / "run")
    first = command("failures", *flags)[1]
    monkeypatch.setattr(verbosity, "examine", lambda *_: pytest.fail("examined again"))
    status, again = command("failures", *flags)
    assert status == 0
    assert "already finished" in again
    assert set(again.splitlines()[1:]) <= set(first.splitlines())


def test_a_run_belongs_to_its_word_lists_and_tokenizer(command, tmp_path, monkeypatch):
    words, tokenizer = tmp_path / "words", tmp_path / "tokenizer.json"
    shutil.copytree(language.WORDS, words)
    monkeypatch.setattr(language, "WORDS", words)
    with_bos().save(str(tokenizer))
    flags = (answers(tmp_path / "a.jsonl", {"q": "aa"}, "m"), "--tokenizer", tokenizer, "--out", tmp_path / "run")
    assert command("failures", *flags)[0] == 0
    for path, named in ((words / "english_words.txt", "word_lists"), (tokenizer, f"{tokenizer} has changed since")):
        before = path.read_text()
        path.write_text(before + "\n")
        assert named in refused(command, "failures", *flags)
        path.write_text(before)


def test_lengths_in_tokens_are_those_of_the_text_alone(tmp_path):
    """Without the BOS that the tokenizer would put before it."""
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        verbosity.counter(str(tmp_path))
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(InputError, match="cannot be read as a tokenizer"):
        verbosity.counter(str(tmp_path))
    with_bos().save(str(path))
    for given in (tmp_path, path):
        unit, length, files = verbosity.counter(str(given))
        assert unit == f"tokens of {given}"
        assert files == [path]
        assert (length(""), length("a"), length("a a")) == (0, 1, 3)


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
