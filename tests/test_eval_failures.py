"""failures: how answers go wrong."""

import json
import shutil
import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bpe import with_bos
from conftest import ROOT
from eval_command import answers, fixture_command, refused, write  # noqa: F401
from nanomed import InputError
from nanomed.evaluation import language, verbosity
from nanomed.evaluation.answers import Sample, read_answers
from nanomed.thoughts import without_thoughts


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
def test_both_error_rates_on_labelled_answers(form, monkeypatch):
    """Abbreviations, titles and quotations beside mixing of all kinds; on the half that no rule was made with."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "bench")
    from language import measure

    found = measure(form, "test")
    assert (found["false positives"]["n"], found["misses"]["n"]) == (55, 49)
    assert found["false positives"]["rate"] <= 0.05
    assert found["misses"]["rate"] <= 0.05


EXPANSIONS = {
    "SIRS": "systemic inflammatory response syndrome", "COPD": "Chronic Obstructive Pulmonary Disease", "GERD":
    "gastroesophageal reflux disease", "HFrEF": "heart failure with reduced ejection fraction", "NSAIDs":
    "non-steroidal anti-inflammatory drugs", "MS": "multiple sclerosis", "POTS": "postural orthostatic tachycardia syndrome",
    "mRNA": "messenger RNA", "PEEP": "positive end-expiratory pressure", "STEMI": "ST-elevation myocardial infarction",
}  # fmt: skip


@pytest.mark.parametrize(
    "frame",
    ["Die {0} ({1}) ist häufig.", "Die {1} ({0}) ist häufig.", "Die {0}, engl. {1}, ist häufig.",
     "Bei {0} (von engl. {1}) hilft Ruhe.",
     "{0} = {1}, eine häufige Krankheit.", "- **{0}** – {1}: häufig im Alter", "{0} steht für {1} und ist häufig."],
)  # fmt: skip
@pytest.mark.parametrize("short", EXPANSIONS)
def test_what_an_abbreviation_stands_for_is_no_mixing(short, frame):
    assert not language.examine(frame.format(short, EXPANSIONS[short])).mixed
    said = frame.format(short, EXPANSIONS[short]) + " Bei Fieber you should call a doctor, sagt der Arzt."
    assert language.examine(said).mixed


@pytest.mark.parametrize(
    ("short", "words"),
    [("COPD", "caused by smoking in most people"), ("CT", "which shows the bleeding"), ("MS", "and the many symptoms"),
     ("IST", "is still taken daily"), ("HIV", "has an infection of the blood")],
)  # fmt: skip
def test_other_words_beside_an_abbreviation_are_mixing(short, words):
    assert language.examine(f"Die {short} ({words}) ist häufig.").mixed


@pytest.mark.parametrize(
    "text",
    ["AB " * 5000, "A of " * 5000, "ABCD (a a a a a a a b) " * 500, "Smith A. " * 3000, "(engl. " * 3000,
     "*A" * 5000, "CT computed " * 2000],
)  # fmt: skip
def test_a_text_that_repeats_itself_is_read_in_time(text):
    """A model that repeats itself must not stop the evaluation."""
    started = time.perf_counter()
    language.examine(text)
    assert time.perf_counter() - started < 10  # milliseconds; quadratic it would be minutes


WORDS = st.sampled_from("Fieber Müdigkeit für können the treatment Übelkeit größere weiß Ärzte should Blut über patient".split())


@given(st.lists(WORDS, min_size=1, max_size=30))
@settings(max_examples=100, deadline=None)
def test_the_form_of_umlauts_changes_nothing(words):
    """Nor do soft hyphens and zero-width spaces inside words."""
    text = " ".join(words)
    found = [
        (
            language.examine(said),
            verbosity.examine(Sample("q", [{"role": "user", "content": text}], said, "stop", 1, "m"), len_words),
        )
        for said in (text, unicodedata.normalize("NFD", text), text.replace("e", "e\u00ad"), text.replace("t", "\u200bt"))
    ]
    assert found == [found[0]] * 4


def len_words(text: str) -> int:
    return verbosity.counter(None)[1](text)


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
        ("Ruhe.<|im_end|>", "continued", False),
        ("Ruhe.</s>\n<|endoftext|>", "continued", False),
        ("Ruhe.</s>", "empty", False),
        ("<|im_end|>", "empty", True),
        ("Ruhe.<|im_end|>\n<|im_start|>user\nUnd dann?", "continued", True),
        ("Ruhe.<end_of_turn>\n<start_of_turn>user\nUnd dann?", "continued", True),
        ("Ruhe.<｜end▁of▁sentence｜><｜User｜>Und dann?", "continued", True),
        ("Ruhe.<|turn_token|>nutzer", "continued", True),
        ("Ruhe. [INST] Und dann? [/INST]", "continued", True),
        ("Bei Werten < 3 oder |x| > 5 hilft Ruhe.", "continued", False),
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
        ([RECORD, RECORD | {"id": "r", "turn_tokens": "2"}], "line 2: turn_tokens is '2', expected int"),
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
    for place in (tmp_path, path):
        unit, length, files = verbosity.counter(str(place))
        assert unit == f"tokens of {place}"
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


@pytest.mark.parametrize(
    "text",
    ["<thinking>The patient</thinking>Ruhe.", "[THINK]The patient[/THINK]\nRuhe.", "<THINK>a</THINK> Ruhe.",
     "The patient</think>Ruhe.",
     "<|channel|>analysis<|message|>The<|end|><|start|>assistant<|channel|>final<|message|>Ruhe."],
)  # fmt: skip
def test_thoughts_in_the_marks_of_several_models(text):
    assert without_thoughts(text) == "Ruhe."
    assert without_thoughts(text.replace("Ruhe.", "")) == ""


@pytest.mark.parametrize(
    "text", ["<think>The", "[THINK]The", "<reasoning>The", "a</think>b<think>", "<|channel|>analysis<|message|>The"]
)
def test_thoughts_without_an_end_are_no_answer(text):
    assert without_thoughts(text) == ""
