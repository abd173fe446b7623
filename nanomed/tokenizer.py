"""What a model's tokenizer files say: which tokenizer it is, and which tokens begin and end a document.

Token ids mean something only together with the tokenizer that made them, so bins record its hash, and everything that
reads them compares. What is read: tokenizer.json, and the configuration beside it for the names of special tokens.
"""

import hashlib
import json
from pathlib import Path

from tokenizers import Tokenizer

from nanomed import InputError
from nanomed.files import read_json

ENDS = ("<|endoftext|>", "<|end_of_text|>")  # what base models end documents with


def tokenizer_config(folder: Path) -> dict:
    """tokenizer_config.json over special_tokens_map.json, without what is null; {} where neither is."""
    config: dict = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config |= {key: value for key, value in read_json(folder / name).items() if value is not None}
    return config


def tokenizer_sha256(tokenizer_json: dict | Path) -> str:
    """The identity of a tokenizer: sha256 of the canonical JSON of what turns text into ids.

    Not covered: truncation and padding (mere use changes them), post_processor (the bins record BOS), decoder. A file
    that was saved again compares equal, however it spells merges and what it does not use.
    """
    if isinstance(tokenizer_json, Path):
        check_added_tokens(tokenizer_json)
    return hashlib.sha256(json.dumps(tokenizer_parts(tokenizer_json), sort_keys=True).encode()).hexdigest()


def tokenizer_parts(tokenizer_json: dict | Path) -> dict:
    """What turns text into ids, of a tokenizer.json: model, normalizer, pre_tokenizer and added_tokens, spelled in one way."""
    spec = read_json(tokenizer_json) if isinstance(tokenizer_json, Path) else tokenizer_json
    if not isinstance(spec.get("model"), dict):
        where = tokenizer_json if isinstance(tokenizer_json, Path) else "tokenizer.json"
        raise InputError(f"{where}: has no model; expected that of a Hugging Face fast tokenizer")
    # In a model null, "" and false all mean "unused" (transformers 5 turns null affixes into ""). `is`: an id may be 0.
    model = {key: value for key, value in spec["model"].items() if not (value is None or value is False or value == "")}
    if "merges" in model:
        model["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    # Old files leave out use_regex, which meant true.
    with_default = lambda step: {"use_regex": True} | step if step.get("type") == "ByteLevel" else step  # noqa: E731
    parts = {"model": model, "normalizer": spec.get("normalizer")}
    parts["pre_tokenizer"] = json.loads(json.dumps(spec.get("pre_tokenizer")), object_hook=with_default)
    parts["added_tokens"] = sorted(spec.get("added_tokens") or [], key=lambda token: token["id"])
    return parts


def normal_forms(spec: dict) -> tuple[str, ...]:
    """The Unicode normal forms that a tokenizer gives a text, one after the other; spec: contents of tokenizer.json."""
    normalizer = spec.get("normalizer") or {}
    steps = normalizer.get("normalizers", []) if normalizer.get("type") == "Sequence" else [normalizer]
    return tuple(step["type"] for step in steps if step.get("type") in ("NFC", "NFD", "NFKC", "NFKD"))


def check_added_tokens(tokenizer_json: Path) -> None:
    """InputError if tokenizer_config.json beside it gives an id another token: transformers would append that token under a
    new id, which the model has no embedding for or has trained as something else."""
    path = tokenizer_json.with_name("tokenizer_config.json")
    claimed = read_json(path).get("added_tokens_decoder") if path.is_file() else None
    if not isinstance(claimed, dict):
        return
    spec = read_json(tokenizer_json)
    vocab = (spec.get("model") or {}).get("vocab") or {}
    pairs = vocab.items() if isinstance(vocab, dict) else ((entry[0], i) for i, entry in enumerate(vocab))
    wanted = {int(number) for number in claimed if number.isdigit()}
    tokens = {number: token for token, number in pairs if number in wanted}
    tokens |= {token["id"]: token["content"] for token in spec.get("added_tokens") or []}
    for number in claimed:
        content, found = token_content(claimed, number), tokens.get(int(number) if number.isdigit() else -1)
        if None not in (content, found) and content != found:
            raise InputError(
                f"{path}: added_tokens_decoder has {content!r} for id {number}, tokenizer.json {found!r}; which is meant? "
                "Fetch both files again"
            )


def separator_id(tokenizer: Tokenizer, config: dict, eos: str | None = None) -> int:
    """The id that ends every document: `eos` if given, else that of the first of ENDS there is, else config's eos_token.

    An instruct model's eos may be a chat token (Qwen: <|im_end|>, Llama: <|eot_id|>): ending documents with it teaches
    the model to end its turn there, so ENDS go first. config: contents of tokenizer_config.json. InputError if none.
    """
    names = [eos] if eos else [*ENDS, token_content(config, "eos_token") or ""]
    found = next((i for name in names if (i := tokenizer.token_to_id(name)) is not None), None)
    if found is None:
        what = f"the tokenizer has no {', no '.join(name or 'eos_token' for name in names)}"
        raise InputError(f"{what}; expected a token that ends documents: name one with --eos TOKEN")
    return found


def bos_id(tokenizer: Tokenizer, config: dict, bos: str = "auto") -> int | None:
    """The id that begins every document, or None. config: contents of tokenizer_config.json.

    "auto": the one that the tokenizer's own post-processor puts before a text, if it does (Mistral yes, Qwen no).
    "no": none. "yes": that one, else config's bos_token; InputError if there is neither.
    """
    probe = tokenizer.encode("a", add_special_tokens=True)
    n_front = (*probe.special_tokens_mask, 0).index(0)  # how many tokens were put in front
    if bos == "no" or (bos == "auto" and n_front == 0):
        return None
    if n_front > 1:
        raise InputError(f"the tokenizer puts {probe.tokens[:n_front]} before a text, expected one token; use --bos no")
    token = probe.tokens[0] if n_front else token_content(config, "bos_token")
    found = tokenizer.token_to_id(token) if token else None
    if found is None:
        raise InputError(f"--bos yes, but the tokenizer adds none and its bos_token is {token!r}; use --bos auto")
    return found


def token_content(config: dict, key: str) -> str | None:
    """A token in tokenizer_config.json is spelled "</s>" or {"content": "</s>", ...}."""
    token = config.get(key)
    return token.get("content") if isinstance(token, dict) else token
