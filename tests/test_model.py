"""The decoder against transformers, config.json's traps, and packing."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from conftest import batch_of, save_reference
from nanomed import InputError, hf, weights
from nanomed.model import Decoder

SMALL = dict(vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
             num_key_value_heads=2, max_position_embeddings=128)  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e6}
# At a base of 1e4 and 8 numbers a head, of 33 tokens: one pair of them stays, one lies on the ramp, two are slowed down.
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 128}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SMALL, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
    "llama-biases": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, rope_parameters=ROPE),
    "llama-tied-mha": LlamaConfig(**SMALL | {"num_key_value_heads": 6}, tie_word_embeddings=True, rope_parameters=ROPE),
    "llama-3.1": LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "mistral": MistralConfig(**SMALL, head_dim=16, sliding_window=None, rope_parameters=ROPE),
    "mistral-window": MistralConfig(**SMALL, sliding_window=7, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    "qwen2": Qwen2Config(**SMALL, use_sliding_window=False, sliding_window=9, rope_parameters=ROPE, rms_norm_eps=1e-5),
    "qwen2-tied": Qwen2Config(**SMALL, tie_word_embeddings=True, rope_parameters=ROPE),
    "qwen2-window": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=5, max_window_layers=1, rope_parameters=ROPE),
    "qwen3": Qwen3Config(**SMALL, head_dim=16, rope_parameters=ROPE),
    "qwen3-tied-biases": Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True, attention_bias=True, rope_parameters=ROPE),
    "qwen3-window": Qwen3Config(
        **SMALL, head_dim=16, use_sliding_window=True, sliding_window=5, max_window_layers=1, rope_parameters=ROPE
    ),
}


def load(folder) -> Decoder:
    model = Decoder(hf.model_config(folder))
    weights.load_weights(model, hf.check_weights(model, folder))
    return model


def spell_as_transformers_4(path) -> None:
    """Rewrite a config.json of transformers 5 the way transformers 4 wrote it, as the hub's files still are."""
    raw = json.loads(path.read_text())
    rope = raw.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    scaling = rope if rope["rope_type"] != "default" else None
    raw |= {"rope_theta": theta, "rope_scaling": scaling, "torch_dtype": raw.pop("dtype")}
    raw.pop("layer_types", None)
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize("spelling", [4, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name, spelling, tmp_path):
    reference = save_reference(CONFIGS[name], tmp_path)
    if spelling == 4:
        spell_as_transformers_4(tmp_path / "config.json")
    tokens = torch.randint(0, SMALL["vocab_size"], (33,))
    expected = reference(tokens[None]).logits[0]
    model = load(tmp_path)
    logits = model.logits(model.hidden(batch_of([tokens])))
    assert (logits - expected).abs().max() <= 1e-4
    assert expected.std() > 0.1  # the reference says something


@pytest.mark.parametrize("name", ["llama-tied-mha", "llama-3.1", "mistral-window", "qwen2", "qwen3"])
def test_loss_and_gradients_equal_transformers(name, tmp_path):
    reference = save_reference(CONFIGS[name], tmp_path)
    tokens = torch.randint(0, SMALL["vocab_size"], (29,))
    reference(tokens[None], labels=tokens[None]).loss.backward()
    model = load(tmp_path)
    batch = batch_of([tokens])
    loss = model(batch, torch.tensor(1 / 28))
    loss.backward()
    expected = dict(reference.named_parameters())
    for param_name, param in model.named_parameters():
        torch.testing.assert_close(param.grad, expected[param_name].grad, rtol=1e-4, atol=1e-6, msg=param_name)


@pytest.mark.parametrize("name", ["llama", "llama-3.1", "mistral-window", "qwen2-tied", "qwen3"])
def test_packed_documents_equal_the_same_documents_alone(name, tmp_path):
    save_reference(CONFIGS[name], tmp_path)
    model = load(tmp_path)
    documents = [torch.randint(0, SMALL["vocab_size"], (n,)) for n in (5, 1, 17, 30, 2)]
    packed = model.logits(model.hidden(batch_of(documents, pad_to=64)))
    at = 0
    for document in documents:
        alone = model.logits(model.hidden(batch_of([document])))
        assert (packed[at : at + len(document)] - alone).abs().max() <= 1e-4
        at += len(document)


def test_autoload_gives_the_same_class_of_model(tmp_path):
    """The reference above really is what AutoModel makes of the folder, in both spellings."""
    save_reference(CONFIGS["qwen2"], tmp_path)
    tokens = torch.randint(0, SMALL["vocab_size"], (1, 12))
    before = AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits
    spell_as_transformers_4(tmp_path / "config.json")
    assert torch.equal(before, AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits)


# The fields of the real files on the hub.
QWEN = dict(architectures=["Qwen2ForCausalLM"], attention_dropout=0.0, bos_token_id=151643, eos_token_id=151645,
            hidden_act="silu", hidden_size=3584, initializer_range=0.02, intermediate_size=18944, max_position_embeddings=32768,
            max_window_layers=28, model_type="qwen2", num_attention_heads=28, num_hidden_layers=28, num_key_value_heads=4,
            rms_norm_eps=1e-06, rope_theta=1000000.0, sliding_window=131072, tie_word_embeddings=False, torch_dtype="bfloat16",
            transformers_version="4.43.1", use_cache=True, use_sliding_window=False, vocab_size=152064)  # fmt: skip
MISTRAL_SMALL = dict(architectures=["MistralForCausalLM"], attention_dropout=0.0, bos_token_id=1, eos_token_id=2,
                     head_dim=128, hidden_act="silu", hidden_size=5120, initializer_range=0.02, intermediate_size=32768,
                     max_position_embeddings=32768, model_type="mistral", num_attention_heads=32, num_hidden_layers=40,
                     num_key_value_heads=8, rms_norm_eps=1e-05, rope_theta=100000000.0, sliding_window=None,
                     tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True, vocab_size=131072)  # fmt: skip


LLAMA31 = dict(architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=128000,
               eos_token_id=[128001, 128008, 128009], hidden_act="silu", hidden_size=4096, initializer_range=0.02,
               intermediate_size=14336, max_position_embeddings=131072, mlp_bias=False, model_type="llama",
               num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, pretraining_tp=1, rms_norm_eps=1e-05,
               rope_scaling={"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 8192, "rope_type": "llama3"},
               rope_theta=500000.0, tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True,
               vocab_size=128256)  # fmt: skip
QWEN3 = dict(architectures=["Qwen3ForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=151643,
             eos_token_id=151645, head_dim=128, hidden_act="silu", hidden_size=4096, initializer_range=0.02,
             intermediate_size=12288, max_position_embeddings=40960, max_window_layers=36, model_type="qwen3",
             num_attention_heads=32, num_hidden_layers=36, num_key_value_heads=8, rms_norm_eps=1e-06, rope_scaling=None,
             rope_theta=1000000, sliding_window=None, tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True,
             use_sliding_window=False, vocab_size=151936)  # fmt: skip


def config_of(tmp_path, raw: dict):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return hf.model_config(tmp_path)


def test_the_real_models_configs(tmp_path):
    qwen = config_of(tmp_path, QWEN)
    assert (qwen.head_dim, qwen.rope_theta, qwen.sliding_windows, qwen.qkv_bias, qwen.o_bias) == (
        128,
        1e6,
        (),
        True,
        False,
    )
    small = config_of(tmp_path, MISTRAL_SMALL)
    assert (small.head_dim, small.rope_theta, small.sliding_windows, small.qkv_bias) == (128, 1e8, (), False)
    llama = config_of(tmp_path, LLAMA31)
    assert (llama.head_dim, llama.rope_scaling, llama.qkv_bias, llama.o_bias) == (128, (8, 1, 4, 8192), False, False)
    qwen3 = config_of(tmp_path, QWEN3)
    assert (qwen3.head_dim, qwen3.qk_norm, qwen3.qkv_bias, qwen3.sliding_windows, qwen3.rope_scaling) == (
        128,
        True,
        False,
        (),
        None,
    )
    v01 = config_of(tmp_path, MISTRAL_SMALL | {"sliding_window": 4096})
    assert v01.sliding_windows == (4096,) * 40


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gemma2"}, "gemma2"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3 needs .*original_max_position_embeddings"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "llama3 needs"),
        ({"rope_scaling": LLAMA3 | {"rope_theta": 1e6, "beta_fast": 32}}, "beta_fast"),
        ({"rope_scaling": LLAMA3 | {"rope_theta": 1e6}, "rope_parameters": ROPE}, "contradict"),
        ({"rope_theta": None}, "rope_theta"),
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default"}}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_theta"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}},
            "partial_rotary",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_interleaved": True}},
            "mrope_interleaved",
        ),
        ({"use_sliding_window": True, "max_window_layers": None}, "max_window_layers is missing"),
        ({"use_sliding_window": True, "layer_types": ["chunked_attention"] * 28}, "chunked_attention"),
        ({"use_sliding_window": True, "layer_types": ["full_attention"] * 27}, "layer_types"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": None}, "num_key_value_heads"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
    ],
)
def test_what_changes_the_maths_is_refused_by_name(change, named, tmp_path):
    with pytest.raises(InputError, match=named):
        config_of(tmp_path, QWEN | change)


def test_where_transformers_has_a_default_of_its_own_the_field_must_stand_there(tmp_path):
    """Mistral's window is 4,096 if left out, Qwen3's heads have 128 numbers whatever the width."""
    for raw, missing in (
        (MISTRAL_SMALL, "sliding_window"),
        (QWEN3, "head_dim"),
        (QWEN | {"use_sliding_window": True}, "sliding_window"),
    ):
        with pytest.raises(InputError, match=f"{missing} is missing"):
            config_of(tmp_path, {k: v for k, v in raw.items() if k != missing})
    windowed = MISTRAL_SMALL | {
        "sliding_window": 7,
        "use_sliding_window": False,
        "layer_types": ["full_attention"] * 40,
    }
    assert config_of(tmp_path, windowed).sliding_windows == (7,) * 40  # transformers asks neither
    assert config_of(tmp_path, LLAMA31 | {"unsloth_fixed": True, "_attn_implementation_autoset": True}).head_dim == 128


@pytest.mark.parametrize("missing", ["rope_theta", "num_key_value_heads", "hidden_size", "vocab_size", "model_type"])
def test_missing_fields_are_never_guessed(missing, tmp_path):
    with pytest.raises(InputError, match=missing):
        config_of(tmp_path, {k: v for k, v in QWEN.items() if k != missing})
