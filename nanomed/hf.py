"""Hugging Face checkpoints on disk: which files, and what their config.json says.

config.json comes in two spellings, transformers 4's (`rope_theta`, `torch_dtype`) and 5's (`rope_parameters`,
`dtype`). A reader that falls back to a default where it misses a field trains with the wrong maths and says nothing;
this one has no default for what changes the maths, and refuses by name every field it does not know.

No pickle is ever loaded and no code of a repository ever run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from nanomed import InputError, first_line
from nanomed.files import read_json, similar_path
from nanomed.model_files import ALL_PATTERNS, INDEX, SINGLE
from nanomed.model_files import CARRIED as CARRIED  # the names under which others use this module
from nanomed.model_files import check_copied_head as check_copied_head
from nanomed.model_files import check_weights as check_weights
from nanomed.model_files import find_weights as find_weights

# Fields of config.json that do not change what the decoder computes: transformers' and other tools' bookkeeping, and
# old defaults for generation and for other kinds of models.
_BOOKKEEPING = set(
    "architectures model_type transformers_version torch_dtype dtype _name_or_path _commit_hash use_cache "
    "max_position_embeddings initializer_range pretraining_tp max_window_layers is_llama_config transformers.js_config "
    "bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id tokenizer_class "
    "attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal "
    "_experts_implementation _flash_attn_2_enabled gradient_checkpointing cache_implementation "
    "return_dict output_attentions output_hidden_states id2label label2id num_labels problem_type finetuning_task "
    "task_specific_params prefix is_decoder is_encoder_decoder chunk_size_feed_forward "
    "max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups num_return_sequences temperature "
    "top_k top_p typical_p repetition_penalty length_penalty diversity_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids suppress_tokens begin_suppress_tokens forced_bos_token_id "
    "forced_eos_token_id remove_invalid_values exponential_decay_length_penalty output_scores return_dict_in_generate".split()
)


def is_bookkeeping(field: str) -> bool:
    """Whether a field of config.json leaves unchanged what the decoder computes."""
    return field in _BOOKKEEPING or field.startswith("unsloth_")


# --- config.json ---------------------------------------------------------------------------------------------------


class Llama3Scaling(NamedTuple):
    """How Llama 3.1 stretches RoPE to long contexts; nanomed.model.rope_frequencies has the formula."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """The fields of config.json that decide what the model computes."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int  # not always hidden / heads: Mistral-Small has 5120 hidden and 32 heads of 128
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of every query and key head (Qwen3)
    rope_scaling: Llama3Scaling | None = None
    sliding_windows: tuple[int | None, ...] = ()  # of each layer, in tokens; None: full attention
    initializer_range: float = 0.02
    max_position_embeddings: int | None = None  # tokens of context it was made for


def model_config(folder: Path) -> ModelConfig:
    """Read FOLDER/config.json. InputError where a field is missing, or asks for maths that the decoder lacks."""
    path = folder / "config.json"
    raw = read_json(path)
    fields = dict(raw)

    def refuse(what: str):
        raise InputError(f"{path}: {what}")

    def need(name: str):
        if fields.get(name) is None:
            refuse(f"{name} is missing; it changes the maths, so it is never guessed")
        return fields.pop(name)

    model_type = need("model_type")
    if model_type not in ("llama", "mistral", "qwen2", "qwen3"):
        refuse(f"model_type {model_type!r} is not supported; llama, mistral, qwen2 and qwen3 are")
    if (act := need("hidden_act")) != "silu":
        refuse(f"hidden_act {act!r} is not supported; silu is")
    n_layers, n_heads, hidden_size = need("num_hidden_layers"), need("num_attention_heads"), need("hidden_size")
    attention_bias = bool(fields.pop("attention_bias", False)) and model_type in ("llama", "qwen3")
    rope_theta, rope_scaling = _rope(fields, refuse)
    config = ModelConfig(
        vocab_size=need("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=need("intermediate_size"),
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=need("num_key_value_heads"),
        # Left out, it is hidden / heads; but qwen3's default is another.
        head_dim=need("head_dim") if model_type == "qwen3" else fields.pop("head_dim", None) or hidden_size // n_heads,
        rms_norm_eps=need("rms_norm_eps"),
        rope_theta=rope_theta,
        tie_word_embeddings=bool(fields.pop("tie_word_embeddings", False)),
        qkv_bias=model_type == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=bool(fields.pop("mlp_bias", False)),
        qk_norm=model_type == "qwen3",
        rope_scaling=rope_scaling,
        sliding_windows=_sliding_windows(model_type, fields, n_layers, refuse),
        initializer_range=fields.get("initializer_range", 0.02),
        max_position_embeddings=fields.get("max_position_embeddings"),
    )
    # Whatever is left and not empty, off or zero may change the maths: softcaps, multipliers, quantisation, ...
    if fields.get("partial_rotary_factor") == 1:  # RoPE over whole heads, as ours
        fields.pop("partial_rotary_factor")
    if unknown := sorted(name for name, value in fields.items() if value and not is_bookkeeping(name)):
        refuse(f"{unknown[0]} = {fields[unknown[0]]!r} is not supported")
    return config


def _rope(fields: dict, refuse: Callable) -> tuple[float, Llama3Scaling | None]:
    """RoPE's base and Llama 3's scaling of it from either spelling; any other scaling is refused."""
    thetas, scalings = [fields.pop("rope_theta", None)], []
    for name in ("rope_scaling", "rope_parameters"):
        if not (scheme := fields.pop(name, None)):
            continue
        kind = scheme.get("rope_type", scheme.get("type", "default"))
        extra = {key: x for key, x in scheme.items() if key not in ("rope_type", "type", "rope_theta")}
        scaling = None
        if kind == "llama3":
            numbers = [extra.pop(field, None) for field in Llama3Scaling._fields]
            scaling = Llama3Scaling(*numbers)
            if None in numbers or not (scaling.factor > 0 and scaling.low_freq_factor < scaling.high_freq_factor):
                refuse(f"{name} = {scheme}: llama3 needs {', '.join(Llama3Scaling._fields)}, the second below the third")
        if kind not in ("default", "llama3") or any(x is True or x not in (None, 1) for x in extra.values()):
            refuse(f"{name} = {scheme} is not supported; plain RoPE (rope_type default) and llama3 are")
        thetas.append(scheme.get("rope_theta"))
        scalings.append(scaling)
    found = {float(theta) for theta in thetas if theta is not None}
    if len(found) != 1:
        refuse(f"rope_theta must stand there once, found {sorted(found) or 'none'}; it changes the maths, so it is not guessed")
    if len(set(scalings)) > 1:
        refuse("rope_scaling and rope_parameters contradict each other")
    return found.pop(), scalings[0] if scalings else None


def _sliding_windows(model_type: str, fields: dict, n_layers: int, refuse: Callable) -> tuple[int | None, ...]:
    """The sliding window of every layer where one is in force; Qwen's files carry one that mostly is not.

    As transformers decides it: Mistral's is for all layers, Qwen's begins at max_window_layers where no layer_types are given.
    """
    wanted, types = fields.pop("use_sliding_window", False), fields.pop("layer_types", None)
    given, window = "sliding_window" in fields, fields.pop("sliding_window", None)
    if model_type == "llama" or (model_type != "mistral" and not wanted):
        return ()
    if not given:
        refuse("sliding_window is missing; it changes the maths, so it is never guessed (null: none)")
    if window is None:
        return ()
    if model_type == "mistral":
        return (window,) * n_layers
    if types is None:
        if (first := fields.get("max_window_layers")) is None:
            refuse("max_window_layers is missing; with use_sliding_window it changes the maths, so it is never guessed")
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(n_layers)]
    if len(types) != n_layers or set(types) - {"sliding_attention", "full_attention"}:
        refuse(f"layer_types = {types} is not supported; full_attention or sliding_attention for every layer is")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


# --- finding files -------------------------------------------------------------------------------------------------


def fetch(init: str, flag: str = "--init") -> Path:
    """A local folder as it is, a run folder's hf/, or a hub id (owner/name or owner/name@revision) downloaded: JSON, tokenizer
    files and licence, then only the weights that the index names.

    flag: what the command line calls it, for the errors.
    """
    folder = exported(Path(init), flag)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"{flag} {init}: the folder has no config.json")
        return folder
    name, _, revision = init.partition("@")
    if init.startswith((".", "/")) or name.count("/") != 1:
        raise InputError(
            f"{flag} {init}: neither a local folder nor a hub id (owner/name, or owner/name@revision){similar_path(init)}"
        )
    if Path(name).is_dir():
        raise InputError(f"{flag} {init}: {name} is a local folder, which has no revisions; leave out @{revision}")
    from huggingface_hub import snapshot_download  # slow to import, and a local folder does without
    from huggingface_hub.errors import HFValidationError

    at = {"revision": revision} if revision else {}
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*ALL_PATTERNS, INDEX], **at))
        if folder.parent.name == "snapshots":  # both downloads from one commit, though the branch may move meanwhile
            at = {"revision": folder.name}
        index = folder / INDEX
        names = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else [SINGLE]
        if SINGLE not in names and _on_the_hub(name, SINGLE, at):
            raise InputError(
                f"{flag} {init}: the repository has {SINGLE}, which transformers reads, and {INDEX}, which names {names[0]}; "
                "download it, and remove whichever of the two is old"
            )
        snapshot_download(name, allow_patterns=names, **at)
    except (OSError, HFValidationError, ValueError) as error:
        raise InputError(f"{flag} {init}: no such local folder, and the hub says: {first_line(error)}") from error
    if not ((folder / INDEX).exists() or (folder / SINGLE).exists()):
        raise InputError(f"{flag} {init}: the repository has no {SINGLE}; only safetensors are read")
    return folder


def _on_the_hub(name: str, file: str, at: dict) -> bool:
    """Whether the repository has the file; False without a network, where nobody can tell."""
    from huggingface_hub import file_exists
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        return file_exists(name, file, **at)
    except OfflineModeIsEnabled:
        return False


def exported(folder: Path, flag: str = "--init") -> Path:
    """RUN/hf of a run folder of train.py, whose own config.json is no model's; any other path as it is."""
    if not ((folder / "run.json").is_file() and (folder / "config.json").is_file()):
        return folder
    if "model_type" in read_json(folder / "config.json"):
        return folder
    if not (folder / "hf" / "config.json").is_file():
        raise InputError(f"{flag} {folder}: this run has not written its model yet; let it finish")
    return folder / "hf"
