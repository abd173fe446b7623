"""Which files an argument means: folders to any depth, wildcards, remote ones too; what is left out is said."""

import json
import subprocess
import sys

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import ROOT
from documents import check_keys, read_documents
from finding import find_files, read_record
from nanomed import InputError

NAMES = ["a.jsonl", "b1.jsonl", "b2.jsonl", "x/c.parquet", "x/y/d.jsonl.gz", "x/y/e[1].jsonl.zst"]


@pytest.fixture(name="folder", params=["local", "memory"])
def fixture_folder(request, tmp_path):
    """The address of a folder with NAMES, and the file system."""
    if request.param == "memory":
        root, fs = f"memory://{tmp_path.name}", fsspec.filesystem("memory")
    else:
        root, fs = str(tmp_path / "crawl"), fsspec.filesystem("file")
    for name in NAMES:
        write(fs, f"{root}/{name}")
    return root, fs


def write(fs, path: str) -> None:
    fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    with fs.open(path, "w") as file:
        file.write("{}\n")


def found(root: str, *inputs: str) -> list[str]:
    """The files that are found, by their paths in the folder."""
    return [str(path).split(f"{root.removeprefix('memory://')}/")[1] for path in find_files([*inputs])]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("", NAMES),
        ("/x", NAMES[3:]),
        ("/b?.jsonl", NAMES[1:3]),
        ("/b[13].jsonl", NAMES[1:2]),
        ("/[!b]*.jsonl", NAMES[:1]),
        ("/*.jsonl", NAMES[:3]),
        ("/x/*", NAMES[3:]),  # a folder that a wildcard matches is read, too
        ("/**", NAMES),
        ("/**/*.jsonl.*", NAMES[4:]),
        ("/x/?/d.*", NAMES[4:5]),
    ],
)
def test_what_an_argument_means(folder, pattern, names):
    root, _ = folder
    assert found(root, f"{root}{pattern}") == names


def test_what_a_folder_holds_besides_is_said(folder, capsys):
    root, fs = folder
    for name in ("README.md", "x/y/z.csv", "x/.git/f.jsonl", "x/.g.jsonl"):
        write(fs, f"{root}/{name}")
    assert found(root, root) == NAMES
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("crawl: 6 files are read, 4 others are not: README.md, x/.g.jsonl, x/.git/f.jsonl, x/y/z.csv") or (
        root.startswith("memory") and ": 6 files are read, 4 others are not: README.md" in line
    )


def test_a_file_whose_name_looks_like_a_pattern(tmp_path):
    for name in ("a[1].jsonl", "a1.jsonl", "b?.jsonl"):
        (tmp_path / name).touch()
    assert [path.name for path in find_files([tmp_path / "a[1].jsonl", tmp_path / "b?.jsonl"])] == ["a[1].jsonl", "b?.jsonl"]


def test_links_are_followed_and_end(tmp_path):
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.jsonl").touch()
    (tmp_path / "in/sub/other").symlink_to(tmp_path / "other")
    (tmp_path / "in/sub/back").symlink_to(tmp_path / "in")
    assert [str(path.relative_to(tmp_path)) for path in find_files([tmp_path / "in"])] == ["in/sub/other/a.jsonl"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("crawl/a.json", r"crawl/a\.json: no such input; did you mean .*crawl/a\.jsonl\?; expected files, folders"),
        ("crwal/a.jsonl", r"did you mean .*crawl/a\.jsonl\?"),
        ("crawl/z*", r"crawl/z\*: no such input, no file matches"),
        ("bins", r"bins: no such input in it: a folder that data/prepare\.py has made, without files of \.jsonl"),
        ("notes.txt", r"notes\.txt: unknown file type, expected \.jsonl"),
    ],
)
def test_what_is_no_input(tmp_path, argument, message):
    for name in ("crawl/a.jsonl", "bins/manifest.json", "notes.txt"):
        write(fsspec.filesystem("file"), str(tmp_path / name))
    with pytest.raises(InputError, match=message) as error:
        find_files([tmp_path / argument])
    assert "\n" not in str(error.value)


def test_a_file_is_given_once(tmp_path):
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(InputError, match=r"a\.jsonl: given twice"):
        find_files([tmp_path, tmp_path / "?.jsonl"])


def test_the_record_of_a_folder(tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/sweep.json").write_text("{}")
    (tmp_path / "file").touch()
    for folder, message in (
        ("sweep", r"threshold\.json: no such file; .*sweep is a folder of data/sweep\.py; expected a folder of data/classify\.py"),
        ("swep", r"swep/threshold\.json: no such file; did you mean .*sweep\?; expected a folder"),
        ("file", r"file: a file, expected a folder of data/classify\.py"),
    ):
        with pytest.raises(InputError, match=message):
            read_record(tmp_path / folder / "threshold.json", "data/classify.py")
    assert read_record(tmp_path / "sweep/sweep.json", "data/sweep.py") == {}


def test_a_line_that_is_no_json_has_one_number(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": "1"}\n{"id": }\n')
    with pytest.raises(InputError, match=r"a\.jsonl: line 2: not valid JSON: Expecting value at column 8$"):
        list(read_documents(tmp_path / "a.jsonl", ("id",)))


def test_two_columns_of_one_name(tmp_path):
    table = pa.table([pa.array(["1"]), pa.array(["a"]), pa.array(["b"])], names=["id", "text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    for read in (
        lambda: check_keys(tmp_path / "a.parquet", {"id": "--id-key", "text": "--text-key"}),
        lambda: list(read_documents(tmp_path / "a.parquet", ("id", "text"))),
        lambda: list(read_documents(tmp_path / "a.parquet", ("id",), ("text",))),
    ):
        with pytest.raises(InputError, match=r"a\.parquet: 2 columns are named 'text', expected one; rename the others"):
            read()
    assert [row["id"] for row in read_documents(tmp_path / "a.parquet", ("id",))] == ["1"]


SCRIPTS = ["sample", "classify", "threshold", "sweep", "clean"]
EXTRAS = "pyarrow openai transformers datatrove upath lm_eval ray torchao triton mergekit gigatoken zstandard"
BARE = f"""
import os, runpy, sys
class Missing:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in {EXTRAS.split()}:
            raise ImportError(name)
sys.meta_path.insert(0, Missing())
sys.path.insert(0, os.path.dirname(sys.argv[1]))
sys.argv = [sys.argv[1], "--help"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_needs_no_extras_and_does_nothing(tmp_path, name):
    command = [sys.executable, "-c", BARE, str(ROOT / f"data/{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {name}.py")
    assert not done.stderr
    assert not list(tmp_path.iterdir())


def test_texts_of_invisible_characters_are_empty(tmp_path):
    from scoring import Scoring, read_windows
    from test_sweep import make_classifier

    clf = make_classifier(tmp_path / "clf")
    texts = ["\u200b", "\ufeff\u00ad \n", "", "Blut", "\u200bBlut"]
    task = Scoring(str(clf), json.dumps({}), 240, 40)
    [(_, tokens)] = read_windows(task, ((str(i), text) for i, text in enumerate(texts)))
    assert [bool(ids) for ids in tokens] == [False, False, False, True, True]
