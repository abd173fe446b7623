"""--keep-columns: a crawl's own columns reach the sample and the corpus with their values and types."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crawl import make, write
from documents import EXTRA
from nanomed import InputError
from sample import sample
from test_clean import corpus, fixture_case, run_clean  # noqa: F401

EXTRAS = {
    "minhash_cluster_size": pa.int64(),
    "language_score": pa.float64(),
    "top_langs": pa.string(),
    "langs": pa.list_(pa.struct({"lang": pa.string(), "p": pa.float32()})),
    "clean": pa.bool_(),
}


def value_of(i: int) -> dict:
    langs = [{"lang": "deu", "p": 0.5}, {"lang": None, "p": i}][: i % 3]
    return {"minhash_cluster_size": i or None, "language_score": i / 7, "top_langs": json.dumps({"deu": i}), "langs": langs,
            "clean": i % 2 == 0}  # fmt: skip


def add_columns(path, names=EXTRAS, first: int = 0):
    """Give the documents of a Parquet file the columns."""
    table = pq.read_table(path)
    for name in names:
        values = [value_of(first + i)[name] for i in range(len(table))]
        table = table.append_column(name, pa.array(values, EXTRAS[name]))
    pq.write_table(table, path)


def expected(i: int) -> dict:
    """What comes back from columns of these types."""
    return {name: pa.array([value], EXTRAS[name]).to_pylist()[0] for name, value in value_of(i).items()}


@pytest.mark.parametrize("kinds", [("parquet",), ("jsonl",), ("parquet", "jsonl.gz")])
def test_a_sample_keeps_the_columns(tmp_path, kinds):
    documents = [{k: v for k, v in document.items() if k != "language_score"} | value_of(i) for i, document in enumerate(make(60))]
    for part, kind in enumerate(kinds):
        path = write(tmp_path / f"{part}.{kind}", documents[part :: len(kinds)])
        if kind == "parquet":
            table = pq.read_table(path)
            pq.write_table(table.cast(pa.schema({n: EXTRAS.get(n, pa.string()) for n in table.schema.names})), path)
    sample([tmp_path], tmp_path / "s.parquet", 40, keep=["url", *EXTRAS])
    table = pq.read_table(tmp_path / "s.parquet")
    assert table.schema.names == ["id", "text", *EXTRA, *EXTRAS]
    if kinds == ("parquet",):
        assert {name: table.schema.field(name).type for name in EXTRAS} == EXTRAS
    for row in table.to_pylist():
        i = int(row["id"][5:-1])
        assert {name: row[name] for name in EXTRAS} == expected(i)
    with pytest.raises(InputError, match=r"s\.parquet: exists, made with another keep_columns"):
        sample([tmp_path / f"{part}.{kind}" for part, kind in enumerate(kinds)], tmp_path / "s.parquet", 40)


def test_a_sample_of_other_columns_does_not_resume(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", make(60))
    monkeypatch.setattr("sample.write_parquet", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sample([path], tmp_path / "s.parquet", 10, keep=["language_score"])
    monkeypatch.undo()
    with pytest.raises(InputError, match="of an interrupted run with another keep_columns; delete it to start over"):
        sample([path], tmp_path / "s.parquet", 10)


def test_the_corpus_keeps_the_columns(case):
    folder, files, _, stays = case
    add_columns(files[0])
    add_columns(files[1], ["minhash_cluster_size"], 10)  # the other file lacks the rest
    flags = ("--eval", folder / "eval.jsonl", "--keep-columns", *EXTRAS, "date")
    run_clean(folder, files, *flags)
    rows = corpus(folder / "out")
    assert [*rows[0]] == ["id", "text", *EXTRA, "score", *EXTRAS]
    for i, row in zip(stays, rows, strict=True):
        full = expected(i)
        assert {name: row[name] for name in EXTRAS} == {
            n: full[n] if i < 10 or n == "minhash_cluster_size" else None for n in EXTRAS
        }
    schemas = [pq.read_schema(path) for path in sorted(folder.glob("out/corpus/*.parquet"))]
    assert schemas[0].remove_metadata() == schemas[1].remove_metadata()
    assert {name: schemas[0].field(name).type for name in EXTRAS} == EXTRAS
    assert "`score`, `minhash_cluster_size`, `language_score`, `top_langs`" in (folder / "out/README.md").read_text("utf-8")
    with pytest.raises(InputError, match="from another run"):
        run_clean(folder, files)


def test_types_of_several_files_are_made_one(tmp_path):
    for name, values in (("a", [1, 2]), ("b", [0.5, None]), ("c", [None, None])):
        documents = [document | {"n": value} for document, value in zip(make(2), values, strict=True)]
        write(tmp_path / f"{name}.jsonl", [document | {"id": f"{name}{i}"} for i, document in enumerate(documents)])
    sample([tmp_path], tmp_path / "s.parquet", 6, keep=["n"])
    table = pq.read_table(tmp_path / "s.parquet")
    assert table.schema.field("n").type == pa.float64()
    assert sorted(x for x in table["n"].to_pylist() if x is not None) == [0.5, 1.0, 2.0]


def test_what_cannot_be_kept(tmp_path, case):
    folder, files, *_ = case
    path = write(tmp_path / "x.parquet", make(20))
    strings = write(tmp_path / "y.jsonl", [document | {"language_score": "hoch"} for document in make(20)])
    mixed = write(tmp_path / "z.jsonl", [{"id": str(i), "text": "a", "n": i if i else "null"} for i in range(20)])
    times = pa.table({"id": ["1"], "text": ["a"], "n": pa.array([1], pa.timestamp("us"))})
    pq.write_table(times, tmp_path / "t.parquet")
    for inputs, name, message in (
        ([path], "langauge_score", r"--keep-columns langauge_score: no input has such a column, they have id, .*did you mean lang"),
        ([path, strings], "language_score", r"y\.jsonl: column 'language_score' is string, in other files double; expected one"),
        ([mixed], "n", r"z\.jsonl: line 1 or one of the next 20: 'n' has values of different types"),
        ([tmp_path / "t.parquet"], "n", r"t\.parquet: column 'n' is timestamp\[us\], expected numbers, strings"),
    ):
        with pytest.raises(InputError, match=message) as error:
            sample(inputs, tmp_path / "s.parquet", 1, keep=[name])
        assert "\n" not in str(error.value)
        assert not list(tmp_path.glob("s.parquet*"))
    for name, message in (
        ("score", r"--keep-columns score: a column of this name is written with other content"),
        ("urll", r"--keep-columns urll: no input has such a column, .*did you mean url\?"),
    ):
        with pytest.raises(InputError, match=message):
            run_clean(folder, files, "--keep-columns", name)
        assert not (folder / "out").exists()
