"""prepare.py again, and after an interruption: half a set is never taken for whole, nothing is made twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizers import normalizers

import prepare as script
from bpe import byte_level
from conftest import ROOT
from nanomed import InputError
from nanomed.bins import Bins, verify
from prepare import prepare
from texts import contents, fixture_corpus, fixture_small_batches, fixture_tok, text_of, write_jsonl  # noqa: F401


def test_a_second_run_has_nothing_to_do(tmp_path, tok, corpus, capsys):
    first = prepare(corpus, tok, tmp_path / "a")
    assert "540 documents" in capsys.readouterr().out
    stamps = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    assert prepare(corpus, tok, tmp_path / "a").fingerprint == first.fingerprint
    assert "already prepared" in capsys.readouterr().out
    assert stamps == {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}


def test_inputs_without_text_do_not_stand_in_the_way(tmp_path, tok, corpus):
    empty, bad, out = tmp_path / "empty.jsonl", tmp_path / "bad.jsonl", tmp_path / "a"
    empty.write_text('{"text": ""}\n')
    bad.write_text('{"inhalt": "a"}\n')
    for inputs, message in (
        ([empty], r"empty\.jsonl: no text in any of the documents"),
        ([bad], r"bad\.jsonl: line 1: no key 'text'"),
        ([empty, bad], r"bad\.jsonl: line 1: no key 'text'"),
    ):
        with pytest.raises(InputError, match=message):
            prepare(inputs, tok, out)
        if inputs == [empty]:
            assert not out.exists()
    assert verify(prepare(corpus, tok, out).folder).n_docs == 540


def test_a_finished_set_of_an_earlier_version_is_finished(tmp_path, corpus):
    """Its shards do not say in which form their bytes were counted; an unfinished one would mix both ways."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    bins = prepare(corpus, tmp_path, tmp_path / "a")
    for path in bins.folder.glob("shard-*.json"):
        record = json.loads(path.read_text())
        assert record["source"].pop("normal_forms") == ["NFC"]
        path.write_text(json.dumps(record))
    assert prepare(corpus, tmp_path, tmp_path / "a").fingerprint == bins.fingerprint
    (bins.folder / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"bytes counted in the normal forms None, this command has .*NFC"):
        prepare(corpus, tmp_path, tmp_path / "a")


def test_where_all_shards_are_there_nothing_is_said_of_an_engine(tmp_path, tok, corpus, capsys):
    (prepare(corpus, tok, tmp_path / "a").folder / "manifest.json").unlink()
    assert "MB/s" in capsys.readouterr().out
    prepare(corpus, tok, tmp_path / "a")
    assert "MB/s" not in capsys.readouterr().out


class PowerCut(BaseException):
    pass


def test_an_interruption_at_any_step_loses_nothing(tmp_path, tok, corpus, small_batches, monkeypatch):
    """Stop before each rename in turn; the next run must give the same bytes, and the half set must be refused."""
    expected = prepare(corpus, tok, tmp_path / "whole", slice_bytes=20_000)
    replace, n_cuts = os.replace, 3 * len(expected.shards) + 1
    for cut in range(n_cuts):
        folder, n_calls = tmp_path / str(cut), iter(range(n_cuts))

        def failing(source, target, cut=cut, n_calls=n_calls):
            if next(n_calls) == cut:
                raise PowerCut
            replace(source, target)

        monkeypatch.setattr(os, "replace", failing)
        with pytest.raises(PowerCut):
            prepare(corpus, tok, folder, slice_bytes=20_000)
        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(InputError, match=r"an unfinished set of bins|no such folder|holds no bins"):
            Bins(folder)
        committed = [(path, path.stat().st_mtime_ns) for path in folder.glob("shard-*.json")]
        assert len(committed) == cut // 3
        prepare(corpus, tok, folder, slice_bytes=20_000)
        assert contents(folder) == contents(expected.folder)
        assert all(path.stat().st_mtime_ns == stamp for path, stamp in committed)  # kept, not made again
        assert verify(folder).fingerprint == expected.fingerprint


def test_leftovers_go_and_other_files_stay(tmp_path, tok, corpus):
    (tmp_path / "a").mkdir()
    for name in ("shard-00007.idx.tmp", "shard-00007.bin", "manifest.json.tmp", "notes.txt"):
        (tmp_path / "a" / name).touch()
    verify(prepare(corpus, tok, tmp_path / "a").folder)
    assert {path.name for path in (tmp_path / "a").iterdir() if not path.name.startswith("shard-0000")} == {
        "manifest.json",
        "notes.txt",
    }
    assert not (tmp_path / "a/shard-00007.bin").exists()


def alive(pid: int) -> bool:
    """Not gone and no zombie."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


# Goes no further once a file is there, so that the kill comes at that moment on any machine.
KILLED = """
import os, time
from prepare import *
from nanomed.bins import ShardWriter
def held(real):
    def method(self, *args, **kwargs):
        real(self, *args, **kwargs)
        while os.path.exists({moment!r}):
            time.sleep(1)
    return method
ShardWriter.__init__, ShardWriter.commit = held(ShardWriter.__init__), held(ShardWriter.commit)
prepare({arguments})
"""


@pytest.mark.parametrize("moment", ["shard-00000.bin.tmp", "shard-00000.json", "shard-00002.json"])
def test_kill_9(tmp_path, tok, moment):
    path = write_jsonl(tmp_path / "a.jsonl", [text_of(i, 400) for i in range(4000)])
    arguments = f"[{str(path)!r}], {str(tok)!r}, {str(tmp_path / 'a')!r}, workers=2, slice_bytes=700_000"
    code = KILLED.format(moment=str(tmp_path / "a" / moment), arguments=arguments)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT / "data")
    while not (tmp_path / "a" / moment).exists():
        assert process.poll() is None
        time.sleep(0.005)
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it was not through
    while any(alive(int(pid)) for pid in found.split()):  # workers do not outlive it
        time.sleep(0.02)
    with pytest.raises(InputError, match=r"an unfinished set of bins|no such folder|holds no bins"):
        Bins(tmp_path / "a")
    prepare([path], tok, tmp_path / "a", slice_bytes=700_000)
    expected = prepare([path], tok, tmp_path / "whole", slice_bytes=700_000)
    assert contents(tmp_path / "a") == contents(tmp_path / "whole")
    assert verify(tmp_path / "a").fingerprint == expected.fingerprint


def test_two_runs_cannot_write_to_one_folder(tmp_path, tok, corpus):
    (tmp_path / "a").mkdir()
    descriptor = script.lock(tmp_path / "a")
    with pytest.raises(InputError, match="another run is writing here"):
        prepare(corpus, tok, tmp_path / "a")
    os.close(descriptor)
    prepare(corpus, tok, tmp_path / "a")


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_made_otherwise_is_refused(tmp_path, tok, corpus, finished):
    first = prepare(corpus, tok, tmp_path / "a", slice_bytes=20_000)
    if not finished:
        (first.folder / "manifest.json").unlink()
    byte_level(50).save(str(tmp_path / "tokenizer.json"))
    changed = tmp_path / corpus[0].name
    changed.write_text(corpus[0].read_text("utf-8").replace("Der", "Die", 1), "utf-8")
    cases = [
        (corpus, tmp_path, {}, r"vocabulary has a size of 319, this command has .* 309"),
        (corpus, tok, {"eos": "<|im_end|>"}, r"separator \(--eos\) of id 316, this command has .* 318"),
        (corpus, tok, {"text_key": "id"}, r"a: was prepared with --text-key text, this command has --text-key id; give the same"),
        (corpus, tok, {"slice_bytes": 30_000}, r"slice_bytes 20000, this command has slice_bytes 30000"),
        ([changed, corpus[1]], tok, {}, r"one.jsonl .* as input 1, this command has one.jsonl .* as input 1"),
        (corpus[::-1], tok, {}, r"one.jsonl .* as input 1, this command has two.jsonl .* as input 1"),
        (corpus[:1], tok, {}, r"holds two.jsonl as input 2, this command has 1 inputs"),
    ]
    if finished:
        third = write_jsonl(tmp_path / "three.jsonl", ["neu"])
        cases.append(([*corpus, third], tok, {}, r"is finished, without three.jsonl"))
    for inputs, tokenizer, options, message in cases:
        with pytest.raises(InputError, match=message):
            prepare(inputs, tokenizer, tmp_path / "a", **{"slice_bytes": 20_000} | options)
    assert verify(prepare(corpus, tok, tmp_path / "a", slice_bytes=20_000).folder).fingerprint == first.fingerprint


def test_a_kill_while_empty_shards_are_removed_leaves_none_behind(tmp_path, tok, monkeypatch):
    blank = [write_jsonl(tmp_path / f"{name}.jsonl", [" "]) for name in "ab"]
    good, unlink, left = write_jsonl(tmp_path / "good.jsonl", ["Der Patient"]), Path.unlink, [3]

    def cut(self, *args, **kwargs):
        if self.name.startswith("shard"):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        return unlink(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", cut)
        with pytest.raises(KeyboardInterrupt):
            prepare(blank, tok, tmp_path / "bins")
    bins = prepare([good], tok, tmp_path / "bins")
    assert [shard["source"]["name"] for shard in bins.shards] == ["good.jsonl"]
