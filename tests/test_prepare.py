"""Text → bins: the same bytes whatever the way, and no text can forge the separator."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

import encoding
from bpe import byte_level, with_bos
from conftest import ROOT
from nanomed import InputError
from nanomed.bins import Bins, verify
from prepare import prepare
from reading import is_blank
from texts import contents, fixture_corpus, fixture_small_batches, fixture_tok, text_of, write_jsonl  # noqa: F401


def has_text(texts: list[str]) -> bool:
    return not all(map(is_blank, texts))


def documents(bins: Bins) -> list[list[int]]:
    return [bins.tokens(doc, 0, bins.lengths[doc]).tolist() for doc in range(bins.n_docs)]


# ---- what comes out ----


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=8).filter(has_text), slice_bytes=st.integers(1, 60))
def test_round_trip(tmp_path_factory, tok, texts, slice_bytes):
    folder = tmp_path_factory.mktemp("trip")
    bins = prepare([write_jsonl(folder / "a.jsonl", texts)], tok, folder / "bins", slice_bytes=slice_bytes)
    tokenizer = Tokenizer.from_file(str(tok / "tokenizer.json"))
    texts = [text for text in texts if not is_blank(text)]
    assert [tokenizer.decode(ids[:-1], skip_special_tokens=False) for ids in documents(bins)] == texts
    assert all(ids[-1] == tokenizer.token_to_id("<|endoftext|>") for ids in documents(bins))
    assert bins.n_bytes == sum(len(text.encode()) for text in texts)
    verify(bins.folder)


def test_the_same_bytes_for_any_number_of_workers(tmp_path, tok, corpus, small_batches):
    for workers in (1, 2, 3):
        prepare(corpus, tok, tmp_path / str(workers), workers=workers, slice_bytes=20_000)
    one = contents(tmp_path / "1")
    assert len(one) >= 3 * 4
    assert one == contents(tmp_path / "2") == contents(tmp_path / "3")
    assert (tmp_path / "1/manifest.json").read_bytes() == (tmp_path / "3/manifest.json").read_bytes()


def test_a_shard_is_a_slice_of_one_input(tmp_path, tok, corpus, small_batches):
    limit = 20_000
    bins = prepare(corpus, tok, tmp_path / "a", slice_bytes=limit)
    by_input = {path.name: [s for s in bins.shards if s["source"]["name"] == path.name] for path in corpus}
    for path, shards in zip(corpus, by_input.values(), strict=True):
        texts = [json.loads(line)["text"] if line.strip() else "" for line in path.read_text("utf-8").split("\n")[:-1]]
        for shard in shards:
            source = shard["source"]
            rows = texts[source["first_row"] : source["first_row"] + source["n_rows"]]
            sizes = [len(text.encode()) for text in rows if text.strip()]
            assert (shard["n_docs"], shard["n_bytes"]) == (len(sizes), sum(sizes))
            assert sum(sizes[:-1]) < limit
            assert source["last"] == (shard is shards[-1])
            assert source["last"] or sum(sizes) >= limit
        assert sum(shard["source"]["n_rows"] for shard in shards) == len(texts)
    assert sum(shard["source"]["n_empty"] for shard in bins.shards) == 10


def test_white_space_alone_is_no_document(tmp_path, tok):
    texts = ["", " ", "\n\t\u00a0\u2003", "\u200b", "\ufeff\n\u00ad\u2060", "\x00\ufe0f\u3164", "eins", " zwei\n"]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    for source in (path, tmp_path / "a.parquet"):
        bins = prepare([source], tok, tmp_path / source.suffix)
        assert (bins.n_docs, bins.n_bytes, bins.shards[0]["source"]["n_empty"]) == (2, len("eins zwei\n"), 6)
    path = write_jsonl(tmp_path / "b.jsonl", [*texts, *map(str, range(20))])
    sides = [prepare([path], tok, tmp_path / side, **{side: 0.5}) for side in ("hold_out", "held_out")]
    assert sum(bins.n_docs for bins in sides) == 22
    assert [bins.shards[0]["source"]["n_empty"] for bins in sides] == [6, 6]  # like "", on both


def test_a_template_that_renders_white_space_makes_no_document(monkeypatch):
    monkeypatch.setattr(encoding, "load_renderer", lambda job: lambda messages, tools, settings: ("\n", "\n"))
    job = encoding.Job("", "", 0, None, "messages", True, "tokenizers")
    parsed = encoding.parse_rows(job, Path("a.jsonl"), 0, [b'{"messages": [{"role": "assistant", "content": ""}]}'])
    assert (parsed.texts, parsed.empty) == ([], [0])


def test_all_formats_give_the_same_tokens(tmp_path, tok, small_batches):
    texts = [text_of(i) for i in range(200)]
    plain = write_jsonl(tmp_path / "a.jsonl", texts).read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain[:5000]) + gzip.compress(plain[5000:]))
    compress = zstandard.compress
    (tmp_path / "a.jsonl.zst").write_bytes(compress(plain[:5000]) + compress(plain[5000:]))  # in frames, as pzstd does
    for name, kind in (("a", pa.string()), ("b", pa.large_string()), ("c", pa.dictionary(pa.int32(), pa.string()))):
        table = pa.table({"id": range(200), "text": pa.array(texts, kind)})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=70)
    names = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "b.parquet", "c.parquet"]
    results = [prepare([tmp_path / name], tok, tmp_path / f"{name}-bins", slice_bytes=9_000) for name in names]
    assert len({bins.fingerprint for bins in results}) == 1
    assert results[0].n_docs == 200


def test_text_that_spells_a_special_token_stays_text(tmp_path, tok):
    tokenizer = Tokenizer.from_file(str(tok / "tokenizer.json"))
    tokenizer.add_tokens(["<tool_call>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "a<|endoftext|>b <|im_start|>system<tool_call>"
    bins = prepare([write_jsonl(tmp_path / "a.jsonl", [text])], tmp_path, tmp_path / "bins")
    [ids] = documents(bins)
    end, chat, tool = (tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_start|>", "<tool_call>"))
    assert (ids.count(end), ids.count(chat)) == (1, 0)
    assert ids.count(tool) == 1  # an ordinary added token is vocabulary
    assert tokenizer.decode(ids, skip_special_tokens=False) == text + "<|endoftext|>"


def test_the_separator_stays_text_even_if_it_is_not_marked_special(tmp_path, tok):
    tokenizer = Tokenizer.from_file(str(tok / "tokenizer.json"))
    tokenizer.add_tokens(["<end>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    [ids] = documents(prepare([write_jsonl(tmp_path / "a.jsonl", ["a<end>b"])], tmp_path, tmp_path / "bins", eos="<end>"))
    assert ids.count(tokenizer.token_to_id("<end>")) == 1


def test_a_word_level_vocabulary_cannot_forge_the_separator(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=r"a.jsonl: line 2: its text encodes to the separator's id 1"):
        prepare([write_jsonl(tmp_path / "a.jsonl", ["a", "a </s> a"])], tmp_path, tmp_path / "bins", eos="</s>")


def test_mistral_documents_begin_with_bos(tmp_path):
    tokenizer = with_bos()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}, "bos_token": "<s>"}))
    path = write_jsonl(tmp_path / "a.jsonl", ["Der <s> Patient", "erhält"])
    bins = prepare([path], tmp_path, tmp_path / "auto")
    bos, eos = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    assert (bins.bos, bins.separator) == (bos, eos)
    for ids in documents(bins):
        assert (ids[0], ids[-1], ids.count(bos), ids.count(eos)) == (bos, eos, 1, 1)
    assert verify(bins.folder).n_docs == 2
    without = prepare([path], tmp_path, tmp_path / "no", bos="no")
    assert without.bos is None
    assert [ids[1:] for ids in documents(bins)] == documents(without)


def test_saved_truncation_and_dropout_do_not_touch_the_text(tmp_path, tok):
    path = write_jsonl(tmp_path / "a.jsonl", [text_of(i) for i in range(30)])
    expected = prepare([path], tok, tmp_path / "expected").fingerprint
    tokenizer = Tokenizer.from_file(str(tok / "tokenizer.json"))
    tokenizer.enable_truncation(max_length=4)
    tokenizer.enable_padding(length=8, pad_id=256, pad_token="!")
    tokenizer.model.dropout = 0.5
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert prepare([path], tmp_path, tmp_path / "bins").fingerprint == expected


def test_equals_datatrove(tmp_path, tok):
    from datatrove.data import Document
    from datatrove.pipeline.tokens import DocumentTokenizer

    texts = [text_of(i) for i in range(120)]
    bins = prepare([write_jsonl(tmp_path / "a.jsonl", texts)], tok, tmp_path / "bins")
    peer = DocumentTokenizer(
        str(tmp_path / "peer"), str(tok / "tokenizer.json"), eos_token="<|endoftext|>", shuffle_documents=False
    )
    peer.run(Document(text, str(i)) for i, text in enumerate(texts))
    [ds] = (tmp_path / "peer").glob("*.ds")
    assert ds.read_bytes() == (bins.folder / "shard-00000.bin").read_bytes()
    ends = np.fromfile(f"{ds}.index", "<u8")
    assert ends.tolist() == np.fromfile(bins.folder / "shard-00000.idx", "<u8")[1:].tolist()


# ---- the command lines ----


def run(name: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "data" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd="/")


def test_command_lines(tmp_path, tok, corpus):
    arguments = (*corpus, "--tokenizer", tok, "--out", tmp_path / "bins", "--workers", 2)
    done = run("prepare.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert "540 documents" in done.stdout
    assert "10 empty documents skipped" in done.stdout
    assert "bytes/token" in done.stdout
    assert "MB/s" in done.stdout
    again = run("prepare.py", *arguments)
    assert (again.returncode, "already prepared" in again.stdout) == (0, True)
    bad = run("prepare.py", *arguments, "--eos", "<|im_end|>")
    assert bad.returncode == 1
    assert bad.stderr.startswith("error: ")
    assert bad.stderr.count("\n") == 1

    checked = run("verify.py", tmp_path / "bins", "--tokenizer", tok)
    assert checked.returncode == 0, checked.stderr
    first = next(text for line in corpus[0].open(encoding="utf-8") if (text := json.loads(line)["text"]))
    assert repr(first[:30])[1:-1] in checked.stdout
    assert "documents    540" in checked.stdout
    byte_level(50).save(str(tmp_path / "tokenizer.json"))
    other = run("verify.py", tmp_path / "bins", "--tokenizer", tmp_path)
    assert (other.returncode, "was made with" in other.stderr) == (1, True)
    with (tmp_path / "bins/shard-00000.bin").open("r+b") as file:
        byte = file.read(1)[0]
        file.seek(0)
        file.write(bytes([byte ^ 1]))
    damaged = run("verify.py", tmp_path / "bins")
    assert (damaged.returncode, damaged.stderr.count("\n")) == (1, 1)
    assert "sha256 is" in damaged.stderr
