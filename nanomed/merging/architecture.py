"""Whether two config.json describe the same architecture: compared by what they mean, after the family's
defaults.

transformers leaves out of config.json what equals a default, fields are added over the years (Llama-2's file
has no rope_theta), and version 5 spells RoPE in another way than version 4. So a field that only one file has
is compared with its default. Bookkeeping (nanomed/hf.py) may differ. A field without a known default that
only one file has is reported as a warning.
"""

from nanomed import InputError
from nanomed.hf import is_bookkeeping

# Fields that may differ: compared by meaning elsewhere, or without effect on a merge. (vocab_size is compared by
# shape too.)
FREE = {"attention_dropout", "layer_types", "max_window_layers", "sliding_window", "use_sliding_window", "rope_theta",
        "rope_parameters", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor"}  # fmt: skip

# The defaults of transformers 5.
_TIED = {"gemma", "gemma2", "gemma3", "gemma3_text", "cohere", "cohere2", "smollm3", "starcoder2", "falcon"}
_HEAD_DIMS = {"gemma": 256, "gemma2": 256, "gemma3_text": 256, "qwen3": 128}  # of the others hidden_size / heads
_ROPE_THETAS = {"cohere": 5e5, "mixtral": 1e6, "smollm3": 2e6, "gemma3_text": 1e6}  # of the others 10,000
_OFF = ("attention_bias", "mlp_bias")  # False in every family that has them and is supported here


def is_tied(config: dict) -> bool:
    """Whether the head is the embedding, by config.json or by the family's default."""
    tied = config.get("tie_word_embeddings")
    return bool(config.get("model_type") in _TIED if tied is None else tied)


def with_defaults(config: dict) -> dict:
    """The fields that are not null, with defaults for the commonest ones that are missing."""
    full = {field: value for field, value in config.items() if value is not None}
    family, n_heads = full.get("model_type"), full.get("num_attention_heads")
    full["tie_word_embeddings"] = is_tied(full)
    if n_heads:
        full.setdefault("head_dim", _HEAD_DIMS.get(family, full.get("hidden_size", 0) // n_heads))
        if family == "llama":
            full.setdefault("num_key_value_heads", n_heads)
    return dict.fromkeys(_OFF, False) | full


def rope_of(config: dict) -> dict:
    """RoPE's parameters from either spelling, by name; "full_attention.rope_theta" where kinds of layers
    differ."""
    new, family = config.get("rope_parameters") or {}, config.get("model_type")
    if any(isinstance(value, dict) for value in new.values()):  # {"full_attention": {...}, "sliding_attention": {...}}
        kinds = {kind: _plain(value) for kind, value in new.items() if isinstance(value, dict)}
    else:
        kinds = {"": _plain(new) | _old_rope(config)}
        if local := config.get("rope_local_base_freq"):  # Gemma 3, as transformers 4 spells it
            kinds = {"full_attention": kinds[""], "sliding_attention": {"rope_theta": local}}
    named = {}
    for kind, parameters in kinds.items():
        defaults = {"rope_type": "default", "rope_theta": _ROPE_THETAS.get(family, 10_000.0)}
        named |= {f"{kind}.{key}" if kind else key: value for key, value in (defaults | parameters).items()}
    return named


def check_rope(config: dict, where: str) -> None:
    """InputError if config.json has RoPE in both spellings, with different values: which one counts depends
    on the reader."""
    new, old = _plain(config.get("rope_parameters") or {}), _old_rope(config)
    if twice := sorted(key for key in new.keys() & old.keys() if new[key] != old[key]):
        raise InputError(
            f"{where}: config.json has {twice[0]} {old[twice[0]]}, and {new[twice[0]]} in rope_parameters; which is meant?"
        )


def _old_rope(config: dict) -> dict:
    """RoPE's parameters as transformers 4 spells them."""
    fields = {key: config.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    return _plain({**(config.get("rope_scaling") or {}), **fields})


def _plain(parameters: dict) -> dict:
    """RoPE parameters without what is null or the default of every scheme, and with one name for the scheme."""
    plain = {("rope_type" if key == "type" else key): value for key, value in parameters.items() if value is not None}
    if plain.get("partial_rotary_factor") == 1:
        del plain["partial_rotary_factor"]
    return plain


def check_fields(ours: dict, theirs: dict, where: str, base: str, prefix: str = "") -> list[str]:
    """InputError if the architectures differ; warnings for what cannot be compared.

    ours, theirs: contents of BASE's and the other's config.json. where, base: name the two, for the errors.
    prefix: of a part of config.json with its own model_type, such as text_config.
    """

    def expect(field: str, found, expected) -> None:
        if found != expected:
            raise InputError(
                f"{where}: config.json has {prefix}{field} {found}, BASE {expected}; "
                "only models of the same architecture can be merged"
            )

    expect("model_type", theirs.get("model_type"), ours.get("model_type"))
    ropes, both = (rope_of(theirs), rope_of(ours)), ((theirs, where), (ours, base))
    ours, theirs, alone = with_defaults(ours), with_defaults(theirs), []
    for field in sorted(ours.keys() | theirs.keys()):
        if field in FREE or is_bookkeeping(field):
            continue
        if field in ours and field in theirs:
            if isinstance(ours[field], dict) and "model_type" in ours[field] and isinstance(theirs[field], dict):
                alone += check_fields(ours[field], theirs[field], where, base, f"{prefix}{field}.")
            else:
                expect(field, theirs[field], ours[field])
        elif value := ours.get(field) or theirs.get(field):
            alone.append(f"{prefix}{field} = {value!r} ({'BASE' if field in ours else 'the other'} only)")
    for field in sorted(ropes[0].keys() | ropes[1].keys()):
        expect(field, ropes[0].get(field), ropes[1].get(field))
    for config, name in both:
        check_rope(config, name)
    if alone and not prefix:
        return [f"{where}: config.json cannot be compared with BASE's in {', '.join(alone)}; the result has BASE's"]
    return alone
