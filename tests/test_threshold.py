"""The threshold: chosen on one part, measured on another, with intervals that hold."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import threshold
from card import quality
from documents import write_parquet
from nanomed import InputError
from nanomed.files import read_json
from threshold import choose, curve, measure, set_threshold, share_of, summary

SCORES = np.array([0.9, 0.8, 0.8, 0.6, 0.4, 0.2])
LABELS = np.array([1, 1, 0, 1, 0, 0])


def test_wilson_is_the_published_one():
    """Newcombe 1998 (Statistics in Medicine 17, 857), table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for hits, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert share_of(hits, n) == pytest.approx([hits / n, low, high], abs=5e-5)


def test_the_curve_counts_equal_scores_together():
    thresholds, precisions, recalls = curve(SCORES, LABELS)
    assert thresholds == pytest.approx([0.85, 0.7, 0.5, 0.3, 0.1])
    assert precisions == pytest.approx([1, 2 / 3, 3 / 4, 3 / 5, 3 / 6])
    assert recalls == pytest.approx([1 / 3, 2 / 3, 1, 1, 1])


@pytest.mark.parametrize(("target", "threshold"), [(1.0, 0.85), (0.76, 0.85), (0.75, 0.5), (0.1, 0.5)])
def test_the_threshold_keeps_all_it_can_and_nothing_for_nothing(target, threshold):
    assert choose(SCORES, LABELS, target) == pytest.approx(threshold)


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=60), st.floats(0.01, 1))
def test_no_other_threshold_does_better(rows, target):
    """Against trying them all: the target is reached, none that reaches it keeps more of the medical documents, and of
    those that keep as many none is more precise."""
    scores, labels = np.array([s / 20 for s, _ in rows]), np.array([int(y) for _, y in rows])
    if not labels.any():
        return
    share = lambda t: (labels[scores >= t].mean(), labels[scores >= t].sum())  # noqa: E731
    reached = [share(t)[1] for t in np.unique(scores) if share(t)[0] >= target]
    if not reached:
        with pytest.raises(InputError, match="no threshold reaches precision"):
            choose(scores, labels, target)
        return
    threshold = choose(scores, labels, target)
    assert share(threshold)[0] >= target
    assert share(threshold)[1] == max(reached)
    assert share(threshold)[0] == max(share(t)[0] for t in np.unique(scores) if share(t)[1] == max(reached))


def test_measured_on_the_other_part(tmp_path):
    """Precision and recall come from `report`, which had no say; the file comes last, the pictures are there."""
    rows = [{"id": f"c{i}", "part": "choose", "label": ("not_medical", "medical")[y], "score": s}
            for i, (s, y) in enumerate(zip(SCORES.tolist(), LABELS.tolist(), strict=True))]  # fmt: skip
    report = [(0.9, 1), (0.55, 0), (0.52, 1), (0.3, 1), (0.1, 0)]
    rows += [{"id": f"r{i}", "part": "report", "label": ("not_medical", "medical")[y], "score": s}
             for i, (s, y) in enumerate(report)]  # fmt: skip
    write_parquet(
        tmp_path / "held_out.parquet",
        rows,
        {"id": "string", "part": "string", "label": "string", "score": "float32"},
        {},
    )
    result = set_threshold(tmp_path, 0.75, {"base_model": "x"})
    assert result == json.loads((tmp_path / "threshold.json").read_text())
    assert result["threshold"] == pytest.approx(0.5)
    assert (result["precision"][0], result["recall"][0]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert (result["n_report"], result["n_report_kept"], result["base_model"]) == (5, 3, "x")
    assert result["precision"] == pytest.approx(share_of(2, 3))
    for picture in ("precision_recall.svg", "scores.svg"):
        assert "threshold 0.500" in (tmp_path / picture).read_text()
    with pytest.raises(InputError, match=r"target-precision is 1\.5"):
        set_threshold(tmp_path, 1.5, {})


def test_nothing_kept_is_not_a_precision_of_zero(tmp_path, monkeypatch, capsys):
    """Nor NaN, which JSON has not: it is null, in the files, the figures and the data card's words."""
    found = measure(np.array([0.1, 0.2]), np.array([1, 0]), 0.5)
    assert (found["precision"], found["recall"][0]) == ([None, 0.0, 1.0], 0)
    rows = [{"id": f"{part}{i}", "part": part, "label": label, "score": score}
            for part, scores in (("choose", (0.9, 0.2)), ("report", (0.4, 0.1)))
            for i, (label, score) in enumerate(zip(("medical", "not_medical"), scores, strict=True))]  # fmt: skip
    columns = {"id": "string", "part": "string", "label": "string", "score": "float32"}
    write_parquet(tmp_path / "held_out.parquet", rows, columns, {})
    assert summary(set_threshold(tmp_path, 0.9, {})).startswith("threshold 0.5500: precision unknown [0.000, 1.000], recall")
    monkeypatch.setattr("sys.argv", ["threshold.py", str(tmp_path), "--target-precision", "0.9"])
    threshold.main()
    assert "precision unknown" in capsys.readouterr().out
    assert '"precision": [\n  null,\n  0.0,' in (tmp_path / "threshold.json").read_text()
    assert quality(read_json(tmp_path / "threshold.json")) == "Precision and recall at this threshold were not measured."
