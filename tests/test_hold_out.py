"""A validation set from one's own text: --hold-out and --held-out split the documents by their text alone."""

import json
import random
import sys
import unicodedata

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

import encoding
import prepare as script
from nanomed import InputError
from nanomed.bins import Bins
from prepare import prepare
from texts import contents, fixture_small_batches, fixture_tok, text_of, write_jsonl  # noqa: F401
from verify import compare_text

SHARE = 0.25
TEXTS = [f"{i} {text_of(i)}" for i in range(400)]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def texts_in(bins: Bins, tok) -> list[str]:
    tokenizer = Tokenizer.from_file(str(tok / "tokenizer.json"))
    documents = (bins.tokens(doc, 0, bins.lengths[doc] - 1).tolist() for doc in range(bins.n_docs))
    return [tokenizer.decode(ids, skip_special_tokens=False) for ids in documents]


def both(inputs, tok, out, **options) -> tuple[Bins, Bins]:
    """(what --hold-out leaves, what --held-out takes)."""
    left = prepare(inputs, tok, out / "left", hold_out=SHARE, **options)
    return left, prepare(inputs, tok, out / "held", held_out=SHARE, **options)


@pytest.mark.parametrize("engine", ["gigatoken", "tokenizers"])
def test_two_sets_share_nothing_and_lose_nothing(tmp_path, tok, small_batches, engine):
    inputs = [write_jsonl(tmp_path / "a.jsonl", ["", *TEXTS[:300]]), write_jsonl(tmp_path / "b.jsonl", TEXTS[300:])]
    left, held = both(inputs, tok, tmp_path, engine=engine)
    assert sorted(texts_in(left, tok) + texts_in(held, tok)) == sorted(TEXTS)
    assert 70 <= held.n_docs <= 130  # 100 expected, three and a half standard deviations
    assert texts_in(held, tok) == [text for text in TEXTS if text in {*texts_in(held, tok)}]  # in their order
    for bins in (left, held):
        assert compare_text(bins, tok / "tokenizer.json", inputs, n_sample=10**6) == bins.n_docs


def test_the_same_documents_for_any_order_format_and_number_of_workers(tmp_path, tok, small_batches):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    one, two = (both([path], tok, tmp_path / str(n), workers=n, slice_bytes=9_000) for n in (1, 2))
    for first, second in zip(one, two, strict=True):
        assert len(first.shards) > 1
        assert contents(first.folder) == contents(second.folder)
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    pq.write_table(pa.table({"text": shuffled[:250]}), tmp_path / "b.parquet")
    other = both([write_jsonl(tmp_path / "c.jsonl", shuffled[250:]), tmp_path / "b.parquet"], tok, tmp_path / "other")
    for first, second in zip(one, other, strict=True):
        assert sorted(texts_in(first, tok)) == sorted(texts_in(second, tok))


def test_equal_texts_are_on_one_side(tmp_path, tok):
    inputs = [write_jsonl(tmp_path / f"{name}.jsonl", TEXTS) for name in "ab"]
    left, held = (texts_in(bins, tok) for bins in both(inputs, tok, tmp_path))
    assert {*left}.isdisjoint(held)
    assert len(left) + len(held) == 800


def test_equal_texts_are_on_one_side_however_their_umlauts_are_spelled(tmp_path, tok):
    texts = [f"Übelkeit und Ärger {i}" for i in range(40)]
    sides = []
    for form in ("NFC", "NFD"):
        path = write_jsonl(tmp_path / f"{form}.jsonl", [unicodedata.normalize(form, text) for text in texts])
        held = both([path], tok, tmp_path / form)[1]
        sides.append([unicodedata.normalize("NFC", text) for text in texts_in(held, tok)])
    assert sides[0] == sides[1]


def test_what_is_left_out_is_not_tokenised(tmp_path, tok, monkeypatch):
    """Nor rendered, in chat records, whose messages decide: the order of their keys does not."""
    seen, load = [], encoding.load_engine
    monkeypatch.setattr(encoding, "load_engine", lambda job: lambda texts: seen.extend(texts) or load(job)(texts))
    held = prepare([write_jsonl(tmp_path / "a.jsonl", TEXTS)], tok, tmp_path / "a", held_out=SHARE, engine="tokenizers")
    assert len(seen) == held.n_docs
    monkeypatch.undo()
    (tmp_path / "tokenizer.json").write_bytes((tok / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    orders = [lambda text: {"role": "assistant", "content": text}, lambda text: {"content": text, "role": "assistant"}]
    paths = []
    for name, turn in zip("bc", orders, strict=True):
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps({"messages": [turn(text)]}) + "\n" for text in TEXTS))
    one, two = (both([path], tmp_path, tmp_path / path.stem, messages_key="messages") for path in paths)
    assert [bins.fingerprint for bins in one] == [bins.fingerprint for bins in two]
    assert one[0].n_docs + one[1].n_docs == 400
    assert 70 <= one[1].n_docs <= 130
    for bins in one:
        assert compare_text(bins, tmp_path / "tokenizer.json", paths[:1], n_sample=10**6) == bins.n_docs


def test_another_share_or_side_is_refused_in_the_same_folder(tmp_path, tok):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    left, held = both([path], tok, tmp_path)
    whole = prepare([path], tok, tmp_path / "whole")
    (left.folder / "manifest.json").unlink()  # interrupted
    for bins, options, message in (
        (left, {"hold_out": 0.5}, r"prepared with --hold-out 0\.25, this command has --hold-out 0\.5"),
        (left, {"held_out": SHARE}, r"with --hold-out 0\.25, this command has --hold-out 0\.25 --part held-out"),
        (held, {}, r"with --hold-out 0\.25 --part held-out, this command has no --hold-out"),
        (whole, {"hold_out": SHARE}, r"with no --hold-out, this command has --hold-out 0\.25; .* choose another --out"),
    ):
        with pytest.raises(InputError, match=message):
            prepare([path], tok, bins.folder, **options)
    assert prepare([path], tok, left.folder, hold_out=SHARE).fingerprint == left.fingerprint


def test_the_flags_name_the_side(tmp_path, tok, monkeypatch):
    """--part, and --held-out, which it replaces."""
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS[:40])
    expected = [bins.fingerprint for bins in both([path], tok, tmp_path)]
    command = ["prepare.py", str(path), "--tokenizer", str(tok), "--workers", "1", "--out"]
    for number, flags in enumerate(
        (["--hold-out"], ["--part", "train", "--hold-out"], ["--part", "held-out", "--hold-out"], ["--held-out"])
    ):
        monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / str(number)), *flags, str(SHARE)])
        script.main()
        assert Bins(tmp_path / str(number)).fingerprint == expected[number // 2]


def test_what_cannot_be_is_one_line(tmp_path, tok, monkeypatch, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", ["eins", "zwei"])
    arguments = ["prepare.py", str(path), "--tokenizer", str(tok), "--out", str(tmp_path / "out"), "--workers", "1"]
    for flags, message in (
        (["--hold-out", "1"], r"^--hold-out is 1\.0, expected a share between 0 and 1"),
        (["--held-out", "nan"], r"^--hold-out is nan, expected a share"),
        (["--hold-out", "nan", "--part", "held-out"], r"^--hold-out is nan, expected a share"),
        (["--part", "held-out"], r"^--part held-out needs the share that is set aside: --hold-out SHARE"),
        (["--hold-out", "0.1", "--held-out", "0.1"], r"exclude each other; give --hold-out SHARE --part held-out"),
        (["--held-out", "1e-9"], r"a\.jsonl: --hold-out 1e-09 --part held-out leaves no documents; give another share"),
    ):
        monkeypatch.setattr(sys, "argv", [*arguments, *flags])
        with pytest.raises(InputError, match=message) as error:
            script.main()
        assert "\n" not in str(error.value)
    monkeypatch.setattr(sys, "argv", [*arguments, "--hold-out", "1e-9"])
    script.main()
    assert "2 documents" in capsys.readouterr().out
