"""Documents + scores → corpus: what stays and what goes is exactly known, counted, and the same for any interruption."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import clean as script
from card import write_card
from clean import first_of_equals
from documents import write_parquet
from nanomed import InputError
from normalising import words_of
from personal import PATTERNS, count_personal
from scoring import COLUMNS, classifier_identity, score_path
from test_sweep import make_classifier, text_of, write_documents

ROOT = Path(__file__).resolve().parents[1]
QUESTION = "Welches der folgenden Medikamente wird bei einem akuten Anfall von Angina pectoris als erstes Mittel gegeben"


def write_scores(files: list[Path], out: Path, scores: list[list[float | None]], clf: Path) -> Path:
    """The folder that sweep.py would leave."""
    for path, values in zip(files, scores, strict=True):
        source = pq.read_table(path).to_pylist()
        rows = [{"id": row["id"], "file": path.name, "row": i, "score": score}
                for i, (row, score) in enumerate(zip(source, values, strict=True))]  # fmt: skip
        write_parquet(score_path(path, out), rows, COLUMNS, {})
    (out / "sweep.json").write_text(json.dumps({"classifier_sha256": classifier_identity(clf)}))
    return out


@pytest.fixture(name="case")
def fixture_case(tmp_path):
    """Two files of ten documents: contaminated, doubled, below the threshold, empty; and what should stay."""
    clf = make_classifier(tmp_path / "clf")
    texts = [f"Dokument {i}: {text_of(i)} Schluss." for i in range(20)]
    texts[1] = f"Wie bekannt: {QUESTION.upper()}? Natürlich Nitroglycerin."
    texts[12] = "  " + texts[3].replace(" ", "\n\n", 4)  # the same but for white space
    texts[4], texts[14] = "Gro\u0308ße ist alles.", "Größe ist alles."
    scores = [0.9] * 20
    scores[2], scores[5], scores[6] = 0.4999, None, 0.5  # 0.5 is the threshold
    files = [
        write_documents(tmp_path / "a.parquet", texts[:10]),
        write_documents(tmp_path / "b.parquet", texts[10:], 10),
    ]
    table = pq.read_table(files[1])
    ids = table["id"].to_pylist()
    ids[7] = "<0>"  # another text with an id that is taken
    pq.write_table(table.set_column(0, "id", [ids]), files[1])
    write_scores(files, tmp_path / "sweep", [scores[:10], scores[10:]], clf)
    (tmp_path / "eval.jsonl").write_text(json.dumps({"question": QUESTION + "?", "options": ["ASS", "Nitro"]}) + "\n")
    stays = [i for i in range(20) if i not in (1, 2, 5, 12, 14, 17)]
    return tmp_path, files, texts, stays


def run_clean(folder: Path, files: list[Path], *more, workers: int = 1, out: str = "out") -> dict:
    arguments = [*files, "--scores", folder / "sweep", "--classifier", folder / "clf", "--out", folder / out, *more]
    args = script.parse_arguments([str(argument) for argument in (*arguments, "--workers", workers)])
    return script.clean(args.inputs, *script.plan(args), args.workers)


def corpus(folder: Path) -> list[dict]:
    return [row for path in sorted(folder.glob("corpus/*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_exactly_what_should_stay_stays(case):
    folder, files, texts, stays = case
    report = run_clean(folder, files, "--eval", folder / "eval.jsonl")
    rows = corpus(folder / "out")
    assert [row["text"] for row in rows] == [texts[i] for i in stays]
    assert [*rows[0]] == ["id", "text", "url", "dump", "date", "score"]
    assert rows[0]["url"] == "https://example.org/0"
    assert Counter(report["counts"]) == Counter(documents=20, empty=1, below_threshold=1, contaminated=1, duplicate_texts=2,
                                                duplicate_ids=1, kept=14)  # fmt: skip
    assert report["text_bytes"] == sum(len(texts[i].encode()) for i in stays)
    [hit] = map(json.loads, (folder / "out/decontamination.jsonl").read_text("utf-8").splitlines())
    assert (hit["id"], hit["file"], hit["row"], hit["set"], hit["record"]) == ("<1>", "a.parquet", 1, "eval.jsonl", 0)
    assert hit["drop"]
    assert hit["words"] == len(words_of(QUESTION))
    card = (folder / "out/README.md").read_text("utf-8")
    assert card.startswith("---\nlicense: odc-by\n")
    for part in (
        "14 documents",
        "precision 0.950 (95 %: 0.930 to 0.970)",
        "| eval.jsonl | 1 | 1 | 0 |",
        "CC-MAIN-2024-10",
    ):
        assert part in card
    assert json.loads((folder / "out/report.json").read_text("utf-8"))["counts"]["kept"] == 14


def test_a_text_of_invisible_characters_is_empty_whatever_its_score(case):
    folder, files, texts, _ = case
    write_documents(files[0], ["\u200b \ufeff", *texts[1:10]])
    assert run_clean(folder, files)["counts"]["empty"] == 2


def test_the_card_loads_as_yaml(case):
    yaml = pytest.importorskip("yaml")
    folder, files, *_ = case
    run_clean(folder, files)
    head = yaml.safe_load((folder / "out/README.md").read_text("utf-8").split("---")[1])
    assert head["license"] == "odc-by"
    assert head["configs"][0]["data_files"] == "corpus/*.parquet"
    assert head["size_categories"] == ["n<1K"]
    assert "not decontaminated" in (folder / "out/report.md").read_text("utf-8")


def test_workers_and_interruptions_change_nothing(case, monkeypatch):
    folder, files, *_ = case
    run_clean(folder, files, out="one")
    run_clean(folder, files, workers=2, out="two")
    replace, n_cuts = os.replace, 8
    for cut in range(n_cuts):
        n_calls = iter(range(99))

        def failing(source, target, cut=cut, n_calls=n_calls):
            if next(n_calls) == cut:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", failing)
        try:
            run_clean(folder, files, out="cut")
        except KeyboardInterrupt:
            assert not (folder / "cut/report.json").exists()
        monkeypatch.setattr(os, "replace", replace)
    run_clean(folder, files, out="cut")
    for name in (
        "corpus/a.parquet",
        "corpus/b.parquet",
        "report.json",
        "README.md",
        "report.md",
        "decontamination.jsonl",
    ):
        assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes(), name
        assert (folder / "one" / name).read_bytes() == (folder / "cut" / name).read_bytes(), name


def test_another_threshold_needs_another_folder_and_no_sweep(case):
    folder, files, *_ = case
    run_clean(folder, files)
    with pytest.raises(InputError, match=r"kept/a.parquet: from another run: identity was"):
        run_clean(folder, files, "--threshold", "0.4")
    report = run_clean(folder, files, "--threshold", "0.4", out="other")
    assert report["counts"]["below_threshold"] == 0
    assert "were not measured" in (folder / "other/README.md").read_text("utf-8")


def test_what_is_refused(case):
    folder, files, *_ = case
    bad = folder / "bad.jsonl"
    bad.write_text('{"question": "a"\n')
    cases = [
        (files, ("--eval", folder / "missing.jsonl"), r"missing.jsonl: cannot be read"),
        (files, ("--eval", bad), r"bad.jsonl: line 1: not valid JSON"),
        (files, ("--threshold", "2"), r"no document was kept; the threshold is 2"),
        ([*files, write_documents(folder / "c.parquet", ["a"])], (), r"c.parquet: missing, expected the scores of"),
    ]
    for i, (inputs, more, message) in enumerate(cases):
        with pytest.raises(InputError, match=message):
            run_clean(folder, inputs, *more, out=f"bad{i}")
        assert not (folder / f"bad{i}/report.json").exists()
    for flag, message in (
        ("--classifier", r"bins/threshold\.json: no such file; expected a folder of data/classify\.py"),
        ("--scores", r"bins/sweep\.json: no such file; expected a folder of data/sweep\.py"),
    ):
        with pytest.raises(InputError, match=message):
            run_clean(folder, files, flag, folder / "bins", out="folder")
    write_documents(files[0], ["ein anderer Text"] * 10, first=5)
    with pytest.raises(InputError, match=r"a.parquet: document 1 has the id '<5>', its score is for '<0>'"):
        run_clean(folder, files, out="changed")
    write_documents(files[0], ["zu viele"] * 11)
    with pytest.raises(InputError, match=r"a.parquet: has more than the 10 documents"):
        run_clean(folder, files, out="longer")
    make_classifier(folder / "clf", seed=1)
    with pytest.raises(InputError, match=r"sweep.json: classifier_sha256 is"):
        run_clean(folder, files, out="classifier")


def test_the_command_line(case):
    folder, files, *_ = case
    command = [
        sys.executable,
        ROOT / "data/clean.py",
        *files,
        "--scores",
        folder / "sweep",
        "--classifier",
        folder / "clf",
    ]
    done = subprocess.run([*command, "--out", folder / "out"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert "15 of 20 documents kept" in done.stdout
    bad = subprocess.run([*command, "--out", files[0]], capture_output=True, text=True, cwd="/")
    assert (bad.returncode, bad.stderr.count("\n")) == (1, 1)
    assert "cannot be made" in bad.stderr


# ---- the parts ----


@given(values=st.lists(st.sampled_from("abcdef"), max_size=40))
def test_first_of_equals(values):
    expected = [value not in values[:i] for i, value in enumerate(values)]
    assert first_of_equals(np.array(values, "S32")).tolist() == expected


PERSONAL = {
    "e-mail": ("an max.muster@klinik-x.de.", "an max@"),
    "e-mail, FineWeb's placeholder": ("an email@example.com", "an a@klinik.de"),
    "IPv4": ("von 192.168.0.1 aus", "Version 1.2.3 und 999.1.1.1"),
    "telephone": ("Tel. 0761 270-12345, +49 (0)761 27012345", "2024-03-01, 0,5 mg, 10.000 und §§ 12 bis 14"),
    "IBAN": ("DE89 3704 0044 0532 0130 00", "DE89 3704"),
    "insurance number (KVNR)": ("Nr. A123456780 liegt vor", "A12345678901"),
}


@pytest.mark.parametrize("name", PERSONAL)
def test_personal_data_is_counted(name):
    yes, no = PERSONAL[name]
    found = {key: Counter() for key in PATTERNS}
    count_personal(yes, found)
    assert found[name]["documents"] == 1
    assert {key for key, count in found.items() if count} == {name}
    before = dict(found[name])
    count_personal(no, found)
    assert dict(found[name]) == before


def small_report() -> dict:
    return {"counts": Counter(kept=5, documents=9), "text_bytes": 7, "columns": ["id"], "dumps": {}, "personal": {},
            "eval_sets": {}, "eval_records": {"by_options": 0, "too_short": 0}, "threshold": 0.5, "source": "a/b",
            "language": "de"}  # fmt: skip


def test_the_card_says_what_is_unknown(tmp_path):
    write_card(tmp_path, small_report())
    assert "| base model | unknown |" in (tmp_path / "README.md").read_text("utf-8")


@pytest.mark.parametrize(("kept", "size"), [(999, "n<1K"), (10**7, "10M<n<100M"), (10**8 - 1, "10M<n<100M"), (10**8, "100M<n<1B")])
def test_the_cards_size_class(tmp_path, kept, size):
    write_card(tmp_path, small_report() | {"counts": Counter(kept=kept)})
    assert f"size_categories:\n- {size}\n" in (tmp_path / "README.md").read_text("utf-8")
