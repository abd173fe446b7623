"""Whether two models have the same tokenizer: the merged model takes BASE's, so the same ids must mean the
same words.

Two tokenizer.json may differ in what no trained text contains, or what only decoding uses: special tokens
that one of them adds (a pad token, say), and the flags `special` and `normalized`. That is a warning. Any
other difference is an InputError.
"""

from pathlib import Path

from nanomed import InputError
from nanomed.merging.source import Checkpoint
from nanomed.tokenizer import tokenizer_parts, tokenizer_sha256

FREE_FLAGS = ("special", "normalized")


def check_tokenizers(base: Checkpoint, other: Checkpoint, role: str) -> list[str]:
    """InputError if token ids mean different words in the two; warnings for lesser differences."""
    common = [name for name in ("tokenizer.json", "tokenizer.model") if name in base.tokenizer and name in other.tokenizer]
    if not common:
        ours, theirs = (" and ".join(model.tokenizer) or "no tokenizer" for model in (base, other))
        return [f"{role} {other.name} has {theirs}, BASE {base.name} {ours}: cannot be compared; assuming the same tokenizer"]
    differing = [name for name in common if base.tokenizer[name] != other.tokenizer[name]]
    if differing == ["tokenizer.model"] and "tokenizer.json" in common:
        return [
            f"{role} {other.name}: its tokenizer.model differs from BASE's; tokenizer.json, which transformers reads, is the same"
        ]
    if not differing:
        return []
    if differing[0] == "tokenizer.json" and (files := _files(base, other)):
        return [
            f"{role} {other.name}: its tokenizer.json {what}; the result has BASE's"
            for what in _differences(*files, base, other, role)
        ]
    raise _other_words(base, other, role, differing[0])


def _files(*models: Checkpoint) -> list[Path]:
    """The tokenizer.json of both models; empty if one is not there, or is not the one that its model was
    trained with."""
    files = [model.folder / "tokenizer.json" for model in models if model.folder]
    sums = [model.tokenizer["tokenizer.json"] for model in models]
    same = [file.is_file() and tokenizer_sha256(file) == digest for file, digest in zip(files, sums, strict=False)]
    return files if len(files) == len(models) and all(same) else []


def _differences(ours: Path, theirs: Path, base: Checkpoint, other: Checkpoint, role: str) -> list[str]:
    """How `theirs` differs, in words, where the ids of both mean the same; InputError where they do not."""
    parts = [tokenizer_parts(path) for path in (ours, theirs)]
    added = [{token["id"]: token for token in part.pop("added_tokens")} for part in parts]
    if parts[0] != parts[1]:
        raise _other_words(base, other, role, "tokenizer.json")
    found = []
    for number in sorted(added[0].keys() | added[1].keys()):
        mine, its = (tokens.get(number) for tokens in added)
        if mine and its:
            flags = sorted(flag for flag in mine.keys() | its.keys() if mine.get(flag) != its.get(flag))
            if set(flags) - set(FREE_FLAGS):
                raise _other_words(base, other, role, "tokenizer.json", f"token {number} is {its}, BASE's {mine}")
            found += [f"has {flag} {its.get(flag)} for {mine['content']}, BASE's {mine.get(flag)}" for flag in flags]
            continue
        token, verb = (its, "adds") if its else (mine, "lacks")
        if not token.get("special"):
            raise _other_words(base, other, role, "tokenizer.json", f"it {verb} the token {token['content']!r}")
        found.append(f"{verb} the special token {token['content']} ({number})")
    return found


def _other_words(base: Checkpoint, other: Checkpoint, role: str, file: str, detail: str = "") -> InputError:
    ours, theirs = (model.tokenizer[file][:12] for model in (base, other))
    return InputError(
        f"{role} {other.name}: its {file} differs from BASE's (sha256 {theirs}, BASE {ours}): {detail or 'other words'}; "
        "token ids mean different words; merge models with the same tokenizer"
    )
