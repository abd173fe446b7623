"""gigatoken and tokenizers give the same ids, and where they do not, it is noticed before it matters."""

import json
import random
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import encoding
import engines
from engines import Unproven, added_tokens, fast_engine, probes, reference_engine, without_special, young
from nanomed import InputError
from nanomed.bins import Bins
from prepare import prepare
from texts import contents, text_of, write_jsonl

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}"
    r"\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make_tokenizer(path, pattern=QWEN):
    """A byte-level BPE as the field's models have it, with special and ordinary added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text_of(i) + " 😀🏥 “Größe” Ⅷ ١٢ ά नमस्ते" for i in range(300)], trainer)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in ("<tool_call>", "<think>")])
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("qwen") / "tokenizer.json")


def both(path, protected=()):
    reference = reference_engine(path, protected)
    return fast_engine(path, protected, lambda: reference), reference


def assert_same(path, texts, protected=()):
    fast, reference = both(path, protected)
    for text, ids, expected in zip(texts, fast(texts), reference(texts), strict=True):
        assert ids.tolist() == expected.tolist(), text


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(st.text(max_size=60) | st.sampled_from(SPECIAL), min_size=1, max_size=5))
def test_any_text_gives_the_same_ids(qwen, texts):
    assert_same(qwen, [*texts, "".join(texts)])


@pytest.mark.parametrize("pattern", [QWEN, TEKKEN])
def test_every_character_gives_the_same_ids(tmp_path, pattern):
    """Every character but surrogates, between letters, digits, spaces and marks; the young ones too, by the reference."""
    path = make_tokenizer(tmp_path / "tokenizer.json", pattern)
    codes = [code for code in range(1, 0x20000) if not 0xD800 <= code < 0xE000]
    texts = ["".join(f"a{chr(c)}b {chr(c)}1{chr(c)}\n" for c in codes[i : i + 500]) for i in range(0, len(codes), 500)]
    assert_same(path, texts)


def test_young_characters_are_the_ones_unicode_14_lacks():
    assert young(["alt", "a\u0378", "😀 Größe", "neu \U0001fae8", "\U0001cc00"]) == [3, 4]
    assert young(["\u20c1"]) == [0]  # of Unicode 17


def test_young_characters_go_to_the_reference(qwen):
    seen, (_, reference) = [], both(qwen)
    fast = fast_engine(qwen, (), lambda: lambda texts: seen.extend(texts) or reference(texts))
    fast(["jung \U0001fae8", "alt 😀"])
    assert seen == ["jung \U0001fae8"]


def test_special_tokens_are_text_and_added_ones_tokens(qwen):
    fast, _ = both(qwen, (Tokenizer.from_file(str(qwen)).token_to_id("<think>"),))
    ids = fast(["a<|im_end|><tool_call><think>"])[0].tolist()
    tokenizer = Tokenizer.from_file(str(qwen))
    assert tokenizer.token_to_id("<tool_call>") in ids
    assert not {tokenizer.token_to_id(name) for name in (*SPECIAL, "<think>")} & set(ids)
    assert_same(qwen, probes(qwen), (tokenizer.token_to_id("<think>"),))


@pytest.mark.parametrize("indent", [None, 2])
def test_only_the_list_of_added_tokens_is_touched(qwen, indent):
    spec = json.loads(qwen.read_text("utf-8"))
    spec["model"]["vocab"] = {'"added_tokens": [1]': 0, "added_tokens": 1} | spec["model"]["vocab"]
    first = {"model": spec["model"]} | spec  # the model, and its word "added_tokens", before the list
    [tool_call] = [token["id"] for token in spec["added_tokens"] if token["content"] == "<tool_call>"]
    changed = json.loads(without_special(json.dumps(first, indent=indent), (tool_call,)))
    assert [token["content"] for token in changed.pop("added_tokens")] == ["<think>"]
    assert changed == {key: value for key, value in spec.items() if key != "added_tokens"}
    assert added_tokens(json.dumps({"model": {}})) == ([], 0, 0)
    assert without_special('{"model": {}}', ()) == '{"model": {}}'


def test_memory_is_bounded_by_making_a_new_one(qwen, monkeypatch):
    sizes = iter([0] + [engines.MAX_GROWTH + 1] * 100)
    monkeypatch.setattr(engines, "resident_bytes", lambda: next(sizes))
    loads, gigatoken = [], pytest.importorskip("gigatoken")
    from_json = gigatoken.Tokenizer.from_json
    monkeypatch.setattr(gigatoken.Tokenizer, "from_json", lambda source: loads.append(1) or from_json(source))
    fast, reference = both(qwen)
    for i in range(3):
        assert fast([text_of(i)])[0].tolist() == reference([text_of(i)])[0].tolist()
    assert len(loads) >= 2


# ---- in prepare.py ----


def test_both_engines_write_the_same_bytes(tmp_path, qwen, monkeypatch):
    monkeypatch.setattr(sys.modules["reading"], "BATCH_BYTES", 3_000)
    texts = [text_of(i) + random.Random(i).choice([" 😀", " \U0001fae8", " <|im_end|>", " e\u0301", ""]) for i in range(400)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    for engine, workers in (("gigatoken", 1), ("gigatoken", 2), ("tokenizers", 1), ("auto", 5)):
        prepare([path], qwen, tmp_path / f"{engine}{workers}", workers=workers, engine=engine, slice_bytes=20_000)
    expected = contents(tmp_path / "tokenizers1")
    for name in ("gigatoken1", "gigatoken2", "auto5"):
        found = contents(tmp_path / name)
        assert {key: data for key, data in found.items() if not key.endswith("json")} == {
            key: data for key, data in expected.items() if not key.endswith("json")
        }
    assert {shard["engine"][:9] for shard in Bins(tmp_path / "auto5").shards} == {"gigatoken"}


def wrong(monkeypatch, is_wrong):
    """gigatoken gives a wrong id for some texts."""
    make = encoding.fast_engine

    def broken(*arguments):
        encode = make(*arguments)
        return lambda texts: [ids ^ np.uint32(1) if is_wrong(text) else ids
                              for text, ids in zip(texts, encode(texts), strict=True)]  # fmt: skip

    monkeypatch.setattr(encoding, "fast_engine", broken)
    encoding.load_engine.cache_clear()


@pytest.mark.parametrize("what", ["first documents", "added token"])
def test_a_wrong_engine_is_not_used(tmp_path, qwen, monkeypatch, capsys, what):
    text = "<tool_call>" if what == "added token" else "Patient"
    path = write_jsonl(tmp_path / "a.jsonl", ["Der Patient schläft."] * 3)
    expected = prepare([path], qwen, tmp_path / "expected", engine="tokenizers").fingerprint
    wrong(monkeypatch, lambda string: text in string)
    assert prepare([path], qwen, tmp_path / "bins").fingerprint == expected
    assert "gigatoken is not used: its ids differ" in capsys.readouterr().err
    assert Bins(tmp_path / "bins").shards[0]["engine"].startswith("tokenizers")
    encoding.load_engine.cache_clear()
    with pytest.raises(InputError, match="--engine gigatoken: its ids differ"):
        prepare([path], qwen, tmp_path / "other", engine="gigatoken")
    encoding.load_engine.cache_clear()


def test_an_added_token_that_gigatoken_takes_otherwise(tmp_path, qwen, capsys):
    """One that is looked for in the normalised text: gigatoken 0.10 differs there, and the probe of its spelling shows it."""
    tokenizer = Tokenizer.from_file(str(qwen))
    tokenizer.add_tokens([AddedToken("<Größe>", normalized=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    path = write_jsonl(tmp_path / "a.jsonl", ["die <Größe> und <Gro\u0308ße>"])
    bins = prepare([path], tmp_path, tmp_path / "bins", eos="<|endoftext|>")
    if "gigatoken is not used" not in capsys.readouterr().err:
        assert bins.fingerprint == prepare([path], tmp_path, tmp_path / "b", engine="tokenizers").fingerprint


def test_an_engine_that_goes_wrong_later_is_caught(tmp_path, qwen, monkeypatch):
    """Batches are small here, so that a shard is committed before the wrong document comes."""
    monkeypatch.setattr(sys.modules["reading"], "BATCH_BYTES", 100)
    path = write_jsonl(tmp_path / "a.jsonl", [f"Text {i} und noch viel mehr davon" * 5 for i in range(200)])
    wrong(monkeypatch, lambda string: "Text 150" in string)
    with pytest.raises(InputError, match=r"its ids differ from those of tokenizers for '.*line 151'; delete .*, use --engine"):
        prepare([path], qwen, tmp_path / "bins", slice_bytes=4_000)
    encoding.load_engine.cache_clear()


def test_where_gigatoken_is_missing_or_refuses(tmp_path, qwen, monkeypatch, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", ["Der Patient"])
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("<|endoftext|>", -9.0)], 0))
    unigram.save(str(tmp_path / "unigram.json"))
    empty = write_jsonl(tmp_path / "empty.jsonl", [])  # whose shard needs no engine
    unigram = prepare([empty, path], tmp_path / "unigram.json", tmp_path / "unigram")
    assert {shard["engine"].split()[0] for shard in unigram.shards} == {"tokenizers"}
    assert "gigatoken is not used: it refuses the tokenizer" in capsys.readouterr().err
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    encoding.load_engine.cache_clear()
    engines.load_gigatoken.cache_clear()
    shards = prepare([empty, path], qwen, tmp_path / "missing").shards
    assert {shard["engine"].split()[0] for shard in shards} == {"tokenizers"}
    assert "gigatoken is not used: it is not installed" in capsys.readouterr().err
    with pytest.raises(Unproven, match="not installed"):
        fast_engine(qwen, (), lambda: None)
    encoding.load_engine.cache_clear()
