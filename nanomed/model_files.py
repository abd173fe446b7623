"""Files of a model folder: which of them go with the model, which hold the weights, and folders that
contradict themselves.

Where two files say the same thing, we read the one that transformers 5 reads:

    model.safetensors, else the shards that model.safetensors.index.json names; both only if they agree
    tokenizer.json, never tokenizer.model, vocab.json, merges.txt or tekken.json beside it
    chat_template.jinja and additional_chat_templates/, else chat_template of tokenizer_config.json; never
        chat_template.json
    generation_config.json for how to generate, config.json for what the model computes

A second file with other contents is no error where every reader agrees which of the two counts; it is one
where they do not.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

from nanomed import InputError
from nanomed.files import read_json, staging, write_json
from nanomed.shards import open_safetensors, same_tensor

READ_DTYPES = ("F32", "BF16", "F16")  # of a safetensors file
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TEMPLATES = "additional_chat_templates"  # of a model with several templates: tool_use.jinja, ...

CARRIED = (  # copied verbatim to what is made of a model, where present
    "config.json generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json "
    "vocab.json merges.txt tokenizer.model tekken.json chat_template.jinja"
).split()
MODEL_PATTERNS = [*CARRIED, f"{TEMPLATES}/*.jinja"]
LEGAL_PATTERNS = ["LICEN[CS]E*", "licen[cs]e*", "NOTICE*", "USE_POLICY*"]  # most licences ask for a copy
ALL_PATTERNS = [*MODEL_PATTERNS, *LEGAL_PATTERNS]


# --- what goes with a model ----------------------------------------------------------------------------------------


def carried_files(folder: Path, patterns: Iterable[str] = ALL_PATTERNS) -> list[str]:
    """Names of the files that go with a model, relative to its folder."""
    found = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]
    return list(dict.fromkeys(path.relative_to(folder).as_posix() for path in found))


def copy_carried(source: Path, target: Path, patterns: Iterable[str] = ALL_PATTERNS) -> None:
    """Copy carried_files that are not there yet."""
    for name in carried_files(source, patterns):
        if not (target / name).exists():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)


# --- the weights ---------------------------------------------------------------------------------------------------


def find_weights(folder: Path) -> dict[str, Path]:
    """Tensor name → the file that holds it: what the index names, or the one model.safetensors; empty where
    neither is.

    InputError where both are there and the index names other files: transformers reads model.safetensors
    then, other programs the shards. Never a glob: repositories hold the same weights under other names too
    (consolidated.safetensors).
    """
    index, single = folder / INDEX, folder / SINGLE
    if (folder / "adapter_config.json").exists() and (index.exists() or single.exists()):
        raise InputError(
            f"{folder}: has weights and adapter_config.json; transformers would load the adapter over its own base model. "
            "Merge the adapter into the weights, or move adapter_config.json away"
        )
    if index.exists():
        weight_map = _weight_map(index)
        if single.exists() and (others := sorted(set(weight_map.values()) - {SINGLE})):
            missing = [file for file in others if not (folder / file).exists()]
            named = f"{missing[0]}, which is missing" if missing else others[0]
            raise InputError(
                f"{folder}: has {SINGLE}, which transformers reads, and {INDEX}, which names {named}; "
                "remove whichever of the two is old"
            )
        if single.exists():  # all of its tensors, as transformers reads them
            weight_map |= dict.fromkeys(open_safetensors(single, "np").keys(), SINGLE)
        return {name: folder / file for name, file in weight_map.items()}
    if not single.exists():
        others = [p.name for kind in ("*.safetensors", "pytorch_model*", "*.gguf", "*.pth") for p in folder.glob(kind)]
        if others:
            raise InputError(f"{folder}: has {min(others)} but neither {SINGLE} nor its index; only those are read")
        return {}
    return dict.fromkeys(open_safetensors(single, "np").keys(), single)


def stored_name(name: str, stored: Iterable[str]) -> str:
    """The name under which a file holds a tensor: some files of tied models store the embedding only as
    lm_head.weight."""
    return HEAD if name == EMBEDDING and EMBEDDING not in stored and HEAD in stored else name


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name → file name, of an index. InputError where it is not one, or names files outside its
    folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{index}: has no weight_map; fetch it again")
    for name, file in weight_map.items():
        if not (isinstance(file, str) and file == Path(file).name):
            raise InputError(f"{index}: tensor {name} is in {file!r}, expected the name of a file in the same folder")
    return weight_map


def check_one_place(files: dict[str, Path], held: dict[Path, Iterable[str]]) -> None:
    """InputError if a shard holds a tensor that the index places in another: which of the two is meant cannot
    be known.

    files: as find_weights returns them. held: the tensors that are in every file.
    """
    for path, names in held.items():
        if twice := sorted(name for name in names if files.get(name, path) != path):
            raise InputError(
                f"{path}: holds tensor {twice[0]}, which the index places in {files[twice[0]].name}; which is meant? "
                "Fetch the checkpoint again"
            )


def check_weights(model, folder: Path) -> dict[str, Path]:
    """find_weights for an nn.Module; InputError naming the first tensor that is missing, extra, misshapen or
    of an unknown dtype.

    Empty where the folder has no weights at all: training then starts from random ones.
    """
    files, params = find_weights(folder), dict(model.named_parameters())
    if not files:
        return {}
    if model.config.tie_word_embeddings and HEAD in files and EMBEDDING not in files:
        files[EMBEDDING] = files.pop(HEAD)  # under its other name: stored_name
    if missing := sorted(params.keys() - files.keys()):
        raise InputError(f"{folder}: tensor {missing[0]} is missing from its safetensors ({len(missing)} in all)")
    # Some files hold what is no parameter: a tied model's head once more (small Qwen3's), old Llamas' RoPE
    # frequencies.
    copies = {HEAD} if model.config.tie_word_embeddings else set()
    copies |= {name for name in files if name.endswith(".rotary_emb.inv_freq")}
    if extra := sorted(files.keys() - params.keys() - copies):
        raise InputError(f"{folder}: tensor {extra[0]} has no place in the model that config.json describes ({len(extra)} in all)")
    handles = {file: open_safetensors(file) for file in set(files.values())}
    held = {file: set(handle.keys()) for file, handle in handles.items()}
    for name, file in files.items():
        stored = stored_name(name, held[file])
        if stored not in held[file]:
            raise InputError(f"{file}: tensor {name} is missing, though the index names it")
        if name not in params:
            continue
        found = handles[file].get_slice(stored)
        if list(found.get_shape()) != list(params[name].shape):
            raise InputError(
                f"{file}: tensor {stored} has shape {found.get_shape()}, config.json asks for {list(params[name].shape)}"
            )
        if found.get_dtype() not in READ_DTYPES:
            raise InputError(f"{file}: tensor {stored} has dtype {found.get_dtype()}; {', '.join(READ_DTYPES)} are read")
    check_one_place(files, held)
    if HEAD in files.keys() - params.keys():
        check_copied_head(folder, files)
    return {name: files[name] for name in params}


def check_copied_head(folder: Path, files: dict[str, Path]) -> None:
    """InputError unless the head that a tied model's files hold all the same is the embedding, bit for bit."""
    if EMBEDDING not in files or not same_tensor((files[HEAD], HEAD), (files[EMBEDDING], EMBEDDING)):
        raise InputError(
            f"{folder}: config.json has tie_word_embeddings, but its {HEAD} is no copy of {EMBEDDING}; which is meant? "
            "Set tie_word_embeddings to false there, or leave the tensor out"
        )


# --- what a run keeps of the model it began with -------------------------------------------------------------------

KEPT = "tensors.json"  # its presence tells RUN/source from a model's folder


def kept_record(folder: Path) -> dict | None:
    """{weights, dtypes} of a RUN/source: the weights' fingerprint and the dtype of every tensor; None of any other folder."""
    return read_json(folder / KEPT) if (folder / KEPT).is_file() else None


def keep_source(source: Path, out: Path, weights: str | None, dtypes: dict[str, str]) -> None:
    """Write RUN/source: everything that an export needs of the source model, so that a run can end without it.

    dtypes: tensor name → dtype as safetensors spells it.
    """
    if source.resolve() == out.resolve():
        return
    shutil.rmtree(out, ignore_errors=True)  # of an earlier run in this folder, which made no step
    with staging(out, "--out", durable=True) as tmp:
        copy_carried(source, tmp)
        write_json(tmp / KEPT, {"weights": weights, "dtypes": dtypes})
