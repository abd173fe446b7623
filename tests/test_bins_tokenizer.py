"""What bins remember of their tokenizer: a hash that survives saving, the separator, the BOS."""

import json

import pytest
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors

from bpe import byte_level, with_bos
from nanomed import InputError
from nanomed.tokenizer import bos_id, separator_id, tokenizer_sha256

QWEN = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def test_hash_survives_saving_again(tmp_path):
    tokenizer = byte_level()
    spec = json.loads(tokenizer.to_str())
    same = tokenizer_sha256(spec)
    old = json.loads(tokenizer.to_str())  # as written some years ago
    old["model"]["merges"] = [" ".join(pair) for pair in old["model"]["merges"]]
    old["model"] = {key: old["model"][key] for key in ("merges", "vocab")} | {"type": "BPE"}
    del old["pre_tokenizer"]["use_regex"]
    assert tokenizer_sha256(old) == same
    assert tokenizer_sha256(json.loads(Tokenizer.from_str(json.dumps(old)).to_str())) == same
    old["added_tokens"].reverse()
    assert tokenizer_sha256(old) == same
    tokenizer.enable_truncation(max_length=512)
    tokenizer.enable_padding(length=512)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer_sha256(tmp_path / "tokenizer.json") == same


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_hash_survives_transformers(tmp_path, kind):
    from transformers import AutoTokenizer

    tokenizer = byte_level()
    if kind == "Qwen2Tokenizer":  # transformers 5 builds it from code and takes only vocabulary and merges from the file
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(QWEN, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    added = json.loads(tokenizer.to_str())["added_tokens"]
    decoder = {str(token["id"]): {key: token[key] for key in token if key != "id"} for token in added}
    config = {"tokenizer_class": kind, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (tmp_path / "a").mkdir()
    tokenizer.save(str(tmp_path / "a/tokenizer.json"))
    (tmp_path / "a/tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": decoder}))
    again = AutoTokenizer.from_pretrained(tmp_path / "a")
    again("Ein Text", truncation=True, max_length=4, padding="max_length")  # leaves both in the file
    again.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/tokenizer.json").read_text() != (tmp_path / "b/tokenizer.json").read_text()
    assert tokenizer_sha256(tmp_path / "a/tokenizer.json") == tokenizer_sha256(tmp_path / "b/tokenizer.json")


def test_hash_tells_tokenizers_apart():
    spec = json.loads(byte_level().to_str())
    hashes = {tokenizer_sha256(spec)}
    for change in (
        lambda s: s["model"]["merges"].reverse(),
        lambda s: s["model"]["merges"].pop(),
        lambda s: s["model"]["vocab"].update(neu=999),
        lambda s: s["model"].update(ignore_merges=True),
        lambda s: s["pre_tokenizer"].update(use_regex=False),
        lambda s: s["pre_tokenizer"].update(add_prefix_space=True),
        lambda s: s.update(normalizer={"type": "NFC"}),
        lambda s: s["added_tokens"][0].update(special=False),
        lambda s: s["added_tokens"].pop(),
    ):
        changed = json.loads(json.dumps(spec))
        change(changed)
        hashes.add(tokenizer_sha256(changed))
    assert len(hashes) == 10
    with pytest.raises(InputError, match="no model"):
        tokenizer_sha256({"version": "1.0"})


def test_separator():
    qwen, mistral, bare = byte_level(), with_bos(), byte_level(special=())
    chat = {"eos_token": "<|im_end|>"}
    assert separator_id(qwen, chat) == qwen.token_to_id("<|endoftext|>")  # not the chat token
    assert separator_id(qwen, chat, eos="<|im_end|>") == qwen.token_to_id("<|im_end|>")
    assert separator_id(mistral, {"eos_token": "</s>"}) == mistral.token_to_id("</s>")
    assert separator_id(mistral, {"eos_token": {"content": "</s>", "lstrip": False}}) == mistral.token_to_id("</s>")
    llama = byte_level(special=("<|end_of_text|>", "<|eot_id|>"))
    assert separator_id(llama, {"eos_token": "<|eot_id|>"}) == llama.token_to_id("<|end_of_text|>")  # nor here
    for tokenizer, config, eos, message in (
        (bare, {}, None, "has no <|endoftext|>, no <|end_of_text|>, no eos_token"),
        (bare, {"eos_token": None}, None, "has no <|endoftext|>, no <|end_of_text|>, no eos_token"),
        (bare, {"eos_token": "</s>"}, None, "has no <|endoftext|>, no <|end_of_text|>, no </s>"),
        (qwen, chat, "<eos>", "has no <eos>; expected a token that ends documents"),
    ):
        with pytest.raises(InputError, match=message.replace("|", r"\|")):
            separator_id(tokenizer, config, eos)


def test_bos():
    qwen, mistral = byte_level(), with_bos()
    bos, config = mistral.token_to_id("<s>"), {"bos_token": {"content": "<s>"}}
    assert [bos_id(qwen, {"bos_token": None}, choice) for choice in ("auto", "no")] == [None, None]
    assert [bos_id(mistral, {}, choice) for choice in ("auto", "no", "yes")] == [bos, None, bos]
    mistral.post_processor = processors.ByteLevel()
    assert bos_id(mistral, config, "auto") is None  # the configuration alone does not put it there
    assert bos_id(mistral, config, "yes") == bos
    with pytest.raises(InputError, match="bos_token is None"):
        bos_id(qwen, {}, "yes")
    mistral.post_processor = processors.TemplateProcessing("<s> <s> $A", None, [("<s>", bos)])
    with pytest.raises(InputError, match="before a text, expected one"):
        bos_id(mistral, {}, "auto")
    mistral.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", mistral.token_to_id("</s>"))])
    assert bos_id(mistral, {}, "auto") is None  # an eos behind is none of a BOS
