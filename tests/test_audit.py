"""The sheet is blind and half of either label; its figures are the strata's, and their intervals hold what they promise."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audit import audit, figures
from nanomed import InputError


def labels(folder: Path, n_medical: int = 40, n_other: int = 400, n_invalid: int = 5) -> Path:
    kinds = ["medical"] * n_medical + ["not_medical"] * n_other + ["invalid"] * n_invalid
    np.random.default_rng(0).shuffle(kinds)
    rows = [{"id": f"d{i}", "text": f'Text {i}; mit, Komma\nund "Zeile"', "label": kind} for i, kind in enumerate(kinds)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "labels.parquet")
    return folder / "labels.parquet"


def read(sheet: Path) -> list[dict]:
    with sheet.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def fill(sheet: Path, judge, delimiter: str = ",") -> None:
    rows = read(sheet)
    with sheet.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ("id", "human", "text"), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(row | {"human": judge(row)} for row in rows)


def truth(path: Path) -> dict[str, str]:
    return {row["id"]: row["label"] for row in pq.read_table(path).to_pylist()}


def test_the_sheet(tmp_path, capsys):
    path = labels(tmp_path)
    audit(path, 20)
    rows = read(tmp_path / "labels.audit.csv")
    kinds = [truth(path)[row["id"]] for row in rows]
    assert Counter(kinds) == {"medical": 10, "not_medical": 10}
    assert kinds != sorted(kinds)
    assert [*rows[0]] == ["id", "human", "text"]
    assert all(row["human"] == "" and row["text"].endswith('und "Zeile"') for row in rows)
    assert "fill the column `human`" in capsys.readouterr().out
    before = (tmp_path / "labels.audit.csv").read_bytes()
    (tmp_path / "labels.audit.csv").unlink()
    audit(path, 20)
    assert (tmp_path / "labels.audit.csv").read_bytes() == before


def test_where_a_label_is_rare_the_other_fills_the_sheet(tmp_path):
    path = labels(tmp_path, n_medical=3)
    audit(path, 20)
    assert Counter(truth(path)[row["id"]] for row in read(tmp_path / "labels.audit.csv"))["medical"] == 3


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_figures_of_a_filled_sheet(tmp_path, capsys, delimiter):
    path = labels(tmp_path)
    audit(path, 20)
    kinds, wrong = truth(path), iter([True])
    fill(
        tmp_path / "labels.audit.csv",
        lambda row: int(kinds[row["id"]] == "medical" and not next(wrong, False)),
        delimiter,
    )
    capsys.readouterr()
    audit(path, 20)
    shown = capsys.readouterr().out.splitlines()
    assert "20 documents judged, representing 440" in shown[0]
    assert shown[1].startswith("precision   90.0%  [")
    assert shown[2].startswith("recall     100.0%  [")
    assert shown[3].startswith("F1          94.7%  [")


def test_the_formula_against_counting_every_document():
    """Judged completely, the figures are those of the confusion matrix."""
    tp, fp, fn, tn = 30, 10, 20, 340
    sizes = {"medical": tp + fp, "not_medical": fn + tn}
    found = figures(sizes, {"medical": tp, "not_medical": fn}, sizes)
    assert found["precision"][0] == pytest.approx(tp / (tp + fp))
    assert found["recall"][0] == pytest.approx(tp / (tp + fn))
    assert found["F1"][0] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert all(low < value < high for value, low, high in found.values())


def test_no_miss_in_the_sheet_is_no_certainty():
    value, low, high = figures({"medical": 100, "not_medical": 10_000}, {"medical": 50, "not_medical": 0},
                               {"medical": 50, "not_medical": 50})["recall"]  # fmt: skip
    assert value == high == 1
    assert low < 0.5


def test_the_intervals_hold_the_truth_as_often_as_they_say():
    """300 sheets of 200 from a corpus with known F1: 95 % of the intervals hold it, less 3 standard deviations at most."""
    rng, p, q, sizes = np.random.default_rng(0), 0.9, 0.004, {"medical": 2000, "not_medical": 98_000}
    true = 2 * p * sizes["medical"] / (sizes["medical"] + p * sizes["medical"] + q * sizes["not_medical"])
    inside = 0
    for _ in range(300):
        hits = {"medical": rng.binomial(100, p), "not_medical": rng.binomial(100, q)}
        _, low, high = figures(sizes, hits, {"medical": 100, "not_medical": 100}, n_draws=2000)["F1"]
        inside += low <= true <= high
    assert inside / 300 >= 0.95 - 3 * (0.95 * 0.05 / 300) ** 0.5


def test_wrong_sheets_are_named(tmp_path):
    path, sheet = labels(tmp_path), tmp_path / "labels.audit.csv"
    with pytest.raises(InputError, match="too few labels for --audit 1000"):
        audit(path, 1000)
    audit(path, 20)
    with pytest.raises(InputError, match=r"20 of 20 rows are not judged yet, the first is row 2 \(''\)"):
        audit(path, 20)
    first = read(sheet)[0]["id"]
    fill(sheet, lambda row: "1" if row["id"] == first else "vielleicht")
    with pytest.raises(InputError, match=r"19 of 20 rows .* row 3 \('vielleicht'\); expected 1 or 0"):
        audit(path, 20)
    fill(sheet, lambda _: "1")
    with pytest.raises(InputError, match="has 20 rows, but --audit is 30"):
        audit(path, 30)
    sheet.write_text("id,human\n" + "".join(f"x{i},1\n" for i in range(20)))
    with pytest.raises(InputError, match="id 'x0' is not in"):
        audit(path, 20)
    sheet.write_text("nr,urteil\n" + "".join(f"x{i},1\n" for i in range(20)))
    with pytest.raises(InputError, match="has the columns nr, urteil, expected id, human"):
        audit(path, 20)
    sheet.write_bytes(b"id,human\n\xff\xfe,1\n")
    with pytest.raises(InputError, match="cannot be read as UTF-8 CSV"):
        audit(path, 1)
    only = {identity for identity, kind in truth(path).items() if kind == "medical"}
    sheet.write_text("id,human\n" + "".join(f"{identity},1\n" for identity in sorted(only)[:10]))
    with pytest.raises(InputError, match="no document labelled not_medical"):
        audit(path, 10)
