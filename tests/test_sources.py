"""Which files are meant: folders are read whole, wildcards are a shell's, and what is not there is named."""

import os
import subprocess
import sys
import unicodedata

import pytest
from tokenizers import normalizers

from bpe import byte_level
from conftest import ROOT
from nanomed import InputError
from prepare import prepare
from sources import find_inputs
from texts import contents, fixture_corpus, fixture_tok, text_of, write_jsonl  # noqa: F401
from verify import compare_text


@pytest.fixture
def tree(tmp_path):
    """A folder of texts in folders, one of them behind a link, another behind a link that leads back."""
    for name in ("b.jsonl", "a/1.jsonl", "a/deep/er/2.jsonl", "c[1].jsonl"):
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / "texts" / name, [text_of(len(name))])
    (tmp_path / "elsewhere").mkdir()
    write_jsonl(tmp_path / "elsewhere/3.jsonl", ["drei"])
    os.symlink(tmp_path / "elsewhere", tmp_path / "texts/linked")
    os.symlink(tmp_path / "texts", tmp_path / "elsewhere/back")
    return tmp_path / "texts"


ALL = ["a/1.jsonl", "a/deep/er/2.jsonl", "b.jsonl", "c[1].jsonl", "linked/3.jsonl"]


def names(tree, *inputs: str) -> list[str]:
    return [str(path.relative_to(tree)) for path in find_inputs([tree / name for name in inputs])]


def test_a_folder_is_read_whole(tree, tok, capsys):
    assert names(tree, "") == ALL
    assert capsys.readouterr().err == ""
    inputs = [tree / name for name in ALL]
    expected = prepare(inputs, tok, tree.parent / "by-name")
    found = prepare([tree], tok, tree.parent / "by-folder")
    assert contents(found.folder) == contents(expected.folder)
    assert compare_text(found, tok / "tokenizer.json", find_inputs([tree]), n_sample=10) == 5


def test_what_a_folder_holds_besides_texts_is_said(tree, capsys):
    for name in ("README.md", "a/list.csv", ".cache/x.jsonl"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).touch()
    assert names(tree, "") == ALL
    assert capsys.readouterr().err == f"{tree}: 5 files are read, 3 others are not: .cache/x.jsonl, README.md, a/list.csv\n"


def test_wildcards(tree):
    assert names(tree, "*.jsonl") == ["b.jsonl", "c[1].jsonl"]
    assert names(tree, "?.jsonl") == ["b.jsonl"]
    assert names(tree, "[abc].jsonl") == ["b.jsonl"]
    assert names(tree, "a/**/*.jsonl") == ["a/1.jsonl", "a/deep/er/2.jsonl"]
    assert names(tree, "[a]") == ["a/1.jsonl", "a/deep/er/2.jsonl"]  # a folder
    assert names(tree, "c[1].jsonl") == ["c[1].jsonl"]  # a file that is called so
    assert names(tree, "b.jsonl", "a") == ["b.jsonl", "a/1.jsonl", "a/deep/er/2.jsonl"]  # in the order given


def test_what_is_not_there_is_named(tree, tok, tmp_path):
    bins = prepare([tree / "b.jsonl"], tok, tmp_path / "bins").folder
    (tree / "empty").mkdir()
    (tree / "notes.txt").touch()
    for name, message in (
        ("x*.jsonl", r"x\*\.jsonl: no file matches; expected files of \.jsonl"),
        ("d.jsonl", r"d\.jsonl: cannot be read: no such file; did you mean .*texts/b\.jsonl\?"),
        ("a/depe/er/2.jsonl", r"no such file; did you mean .*a/deep/er/2\.jsonl\?"),
        ("quite/another.jsonl", r"another\.jsonl: cannot be read: no such file$"),
        ("empty", r"empty: a folder without files of \.jsonl"),
        ("notes.txt", r"notes\.txt: unknown file type, expected \.jsonl"),
        (bins, r"bins: holds token bins, which prepare\.py writes; expected the texts"),
        ("linked/back/b.jsonl", r"b\.jsonl: given twice"),
    ):
        with pytest.raises(InputError, match=message) as error:
            find_inputs([tree / "b.jsonl", tree / name])
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"tokeniser\.json: no such file; did you mean .*tokenizer\.json\?"):
        prepare([tree / "b.jsonl"], tok / "tokeniser.json", tmp_path / "other")


# ---- bytes are counted as the tokenizer sees the text ----


@pytest.mark.parametrize("form", ["NFC", "NFD", None])
def test_bits_per_byte_do_not_depend_on_how_umlauts_are_spelled(tmp_path, form):
    tokenizer = byte_level()
    if form:
        tokenizer.normalizer = normalizers.Sequence([getattr(normalizers, form)()])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = [f"Übelkeit für {i} Ärzte" for i in range(9)]
    sets = {}
    for spelling in ("NFC", "NFD"):
        spelled = [unicodedata.normalize(spelling, text) for text in texts]
        path = write_jsonl(tmp_path / f"{spelling}.jsonl", spelled)
        sets[spelling] = prepare([path], tmp_path, tmp_path / spelling)
        seen = [unicodedata.normalize(form or spelling, text) for text in texts]
        assert sets[spelling].n_bytes == sum(len(text.encode()) for text in seen)
        assert compare_text(sets[spelling], tmp_path / "tokenizer.json", [path], n_sample=9) == 9
    assert (sets["NFC"].fingerprint == sets["NFD"].fingerprint) == bool(form)


# ---- failed commands ----


def test_a_failed_command_leaves_nothing_unfinished(tmp_path, tok, corpus, monkeypatch):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "gut"}\n{"text": \n')
    out = tmp_path / "made/by/it"
    with pytest.raises(InputError, match=r"bad\.jsonl: line 2: not valid JSON: Expecting value at column 11; expected"):
        prepare([bad], tok, out)
    assert not (tmp_path / "made").exists()
    with pytest.raises(InputError, match="line 2"):
        prepare([corpus[0], bad], tok, out)
    assert sorted(path.name for path in out.iterdir()) == ["shard-00000.bin", "shard-00000.idx", "shard-00000.json"]
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="line 2"):
        prepare([bad], tok, tmp_path / "mine")
    assert (tmp_path / "mine").exists()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare([corpus[1]], tok, tmp_path / "interrupted")
    assert not (tmp_path / "interrupted").exists()


def test_another_error_than_a_full_disk_is_not_called_one(tmp_path, tok, corpus, monkeypatch):
    def denied(*_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "fsync", denied)
    with pytest.raises(InputError, match="Too many open files; put that right, then run again"):
        prepare(corpus, tok, tmp_path / "bins")


@pytest.mark.parametrize("script", ["prepare", "verify"])
def test_help_needs_no_extra(script):
    extras = ("pyarrow", "transformers", "openai", "datatrove", "upath", "gigatoken")
    code = f"""import runpy, sys; sys.modules |= dict.fromkeys({extras})
sys.path[0] = 'data'; sys.argv = ['data/{script}.py', '--help']; runpy.run_path(sys.argv[0], run_name='__main__')"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {script}.py")
