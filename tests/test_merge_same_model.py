"""Two folders of one architecture and one tokenizer that spell them differently: merged, with a warning where
it matters."""

import json

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from merge_pairs import assert_close, files_of, fixture_pair, fixture_refused, make_pair, run, tensors_of  # noqa: F401
from nanomed import InputError, hf
from nanomed.evaluation.loading import load_decoder
from nanomed.merging.architecture import check_fields, rope_of, with_defaults

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def edit(path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# --- config.json ---------------------------------------------------------------------------------------------------

LLAMA_2 = {"model_type": "llama", "hidden_size": 5120, "num_attention_heads": 40, "hidden_act": "silu", "rope_scaling": None,
           "rms_norm_eps": 1e-5, "vocab_size": 32000, "tie_word_embeddings": False}  # fmt: skip
GEMMA = {"model_type": "gemma", "hidden_size": 3072, "num_attention_heads": 16, "head_dim": 256, "rope_theta": 10000.0}
GEMMA_3 = {"model_type": "gemma3_text", "hidden_size": 1152, "num_attention_heads": 4, "head_dim": 256, "rope_theta": 1e6,
           "rope_local_base_freq": 10000.0}  # fmt: skip


def compare(ours: dict, theirs: dict) -> list[str]:
    return check_fields(ours, theirs, "CPT x", "BASE y")


@pytest.mark.parametrize("old", [LLAMA_2, GEMMA, GEMMA_3], ids=lambda config: config["model_type"])
def test_an_old_file_and_transformers_5s_are_one_architecture(old):
    """Whatever is absent in the one and a default in the other, in either direction."""
    new = CONFIG_MAPPING[old["model_type"]].from_dict(dict(old)).to_dict()
    new = {field: new[field] for field in (*old, "rope_parameters", "num_key_value_heads", "head_dim", "tie_word_embeddings",
                                           "attention_bias", "mlp_bias") if field in new}  # fmt: skip
    old = {**new, **old}  # the fields that only the version changes are below
    for absent in ("rope_parameters", "num_key_value_heads", "tie_word_embeddings", "attention_bias", "mlp_bias"):
        if absent != "num_key_value_heads" or old["model_type"] == "llama":
            old.pop(absent, None)
    for gone in ("rope_theta", "rope_local_base_freq"):
        new.pop(gone, None)
    assert compare(old, new) == compare(new, old) == []


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "mixtral",
                                    "cohere", "smollm3", "starcoder2", "olmo2", "granite"])  # fmt: skip
def test_our_defaults_are_those_of_transformers(family):
    theirs = CONFIG_MAPPING[family]()
    shape = {"model_type": family, "hidden_size": theirs.hidden_size, "num_attention_heads": theirs.num_attention_heads}
    ours = with_defaults(shape)
    assert ours["tie_word_embeddings"] == theirs.tie_word_embeddings
    for field in ("head_dim", "attention_bias", "mlp_bias"):
        if getattr(theirs, field, None) is not None:
            assert ours[field] == getattr(theirs, field), field
    full = theirs.rope_parameters.get("full_attention", theirs.rope_parameters)
    assert rope_of(shape)["rope_theta"] == full["rope_theta"]


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        ({}, {"rope_theta": 5e5}, "rope_theta 500000.0, BASE 10000.0"),
        ({}, {"tie_word_embeddings": True}, "tie_word_embeddings True, BASE False"),
        ({"model_type": "gemma", "tie_word_embeddings": None}, {"model_type": "gemma"}, "tie_word_embeddings False, BASE True"),
        ({}, {"num_key_value_heads": 8}, "num_key_value_heads 8, BASE 40"),
        ({}, {"head_dim": 64}, "head_dim 64, BASE 128"),
        ({}, {"attention_bias": True}, "attention_bias True, BASE False"),
        ({}, {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5, BASE None"),
        ({}, {"rope_parameters": {"rope_type": "yarn", "factor": 2}}, "factor 2, BASE None"),
        ({"rope_theta": 1e4}, {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta 10000.0, and 1000000.0 in"),
        ({"text_config": {"model_type": "llama"}}, {"text_config": {"model_type": "llama", "rope_theta": 1e6}},
         "text_config.rope_theta 1000000.0"),
    ],
)  # fmt: skip
def test_another_value_than_the_default_is_refused(ours, theirs, words):
    with pytest.raises(InputError, match=words):
        compare(LLAMA_2 | ours, LLAMA_2 | theirs)


@given(st.dictionaries(st.sampled_from(["unsloth_version", "unsloth_fixed", "unsloth_x", "id2label", "max_length", "use_cache",
                                        "tokenizer_class", "temperature", "eos_token_id", "output_attentions",
                                        "transformers_version", "_attn_implementation"]),
                       st.sampled_from(["2025.1", "", 7, True, None, {"0": "A"}])))  # fmt: skip
def test_bookkeeping_may_differ(fields):
    assert compare(LLAMA_2 | {"unsloth_version": "2024.9", "use_cache": True}, LLAMA_2 | fields) == []


def test_a_field_without_a_known_default_is_reported():
    [line] = compare(LLAMA_2, LLAMA_2 | {"final_logit_softcapping": 30.0, "qk_clip": 0})
    assert "final_logit_softcapping = 30.0 (the other only)" in line
    assert "qk_clip" not in line


def test_bookkeeping_is_read_past_in_training_and_maths_is_not(pair):
    path = pair[0] / "config.json"
    fields = {"unsloth_version": "2024.9", "id2label": {"0": "A", "1": "B"}, "temperature": 0.6, "do_sample": True,
              "gradient_checkpointing": True, "tokenizer_class": "LlamaTokenizer", "partial_rotary_factor": 1.0}  # fmt: skip
    edit(path, lambda c: c.update(fields))
    hf.model_config(pair[0])
    for field, value in (("partial_rotary_factor", 0.5), ("attention_dropout", 0.1), ("quantization_config", {"bits": 4}),
                         ("auto_map", {"AutoModel": "x.py"}), ("transformers_weights", "other.safetensors")):  # fmt: skip
        edit(path, lambda c, field=field, value=value: c.update({field: value}))
        with pytest.raises(InputError, match=field):
            hf.model_config(pair[0])
        edit(path, lambda c, field=field: c.pop(field))


# --- a tied model that stores its embedding as the head ------------------------------------------------------------


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
def test_a_tied_model_that_stores_only_its_head(which, tmp_path, tiny, monkeypatch):
    pair = make_pair(tmp_path, tiny.model, "tied")
    before = [tensors_of(folder) for folder in pair]
    for i in which:
        tensors = load_file(pair[i] / "model.safetensors")
        tensors[HEAD] = tensors.pop(EMBEDDING)
        save_file(tensors, pair[i] / "model.safetensors", metadata={"format": "pt"})
    run(monkeypatch, *pair, tmp_path / "out", "--t", "0.3", "--verify")
    found = tensors_of(tmp_path / "out")
    assert found.keys() == before[0].keys()
    for name in found:
        assert_close(found[name], before[0][name], before[1][name], 0.3, name)
    for i in which:
        ours = load_decoder(pair[i], torch.float32, torch.device("cpu"))
        theirs = AutoModelForCausalLM.from_pretrained(pair[i], dtype=torch.float32)
        assert torch.equal(ours.model.embed_tokens.weight.float(), before[i][EMBEDDING].float())
        assert torch.equal(theirs.model.embed_tokens.weight, before[i][EMBEDDING].float())


# --- tokenizers ----------------------------------------------------------------------------------------------------


def add_pad(spec: dict) -> None:
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    spec["added_tokens"].append({"id": 320, "content": "<pad>"} | flags)


def change_flag(name: str):
    def change(spec: dict) -> None:
        spec["added_tokens"][0][name] = not spec["added_tokens"][0][name]

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (add_pad, ("adds the special token <pad> (320)", "lacks the special token <pad> (320)")),
        (change_flag("special"), ("has special False for <|endoftext|>, BASE's True", "has special True")),
        (change_flag("normalized"), ("has normalized", "has normalized")),
    ],
)
def test_a_lesser_difference_of_tokenizers_is_a_warning(change, words, pair, tmp_path, monkeypatch, capsys):
    edit(pair[1] / "tokenizer.json", change)
    for (base, cpt), said in zip((pair, pair[::-1]), words, strict=True):
        run(monkeypatch, base, cpt, tmp_path / f"out-{base.name}")
        assert f"warning: CPT {cpt}: its tokenizer.json {said}" in capsys.readouterr().err
        assert (tmp_path / f"out-{base.name}" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def no_special(spec: dict) -> None:
    add_pad(spec)
    spec["added_tokens"][-1] |= {"content": "Herzinfarkt", "special": False}


def other_word(spec: dict) -> None:
    spec["added_tokens"][0]["content"] = "<eos>"


@pytest.mark.parametrize("change", [no_special, other_word, change_flag("lstrip"), change_flag("rstrip")])
def test_a_difference_that_changes_ids_is_refused(change, refused):
    refused(lambda _, cpt: edit(cpt / "tokenizer.json", change), "CPT", "tokenizer.json", "sha256", "same tokenizer")


def test_another_sentencepiece_model_beside_the_same_tokenizer_json_is_a_warning(pair, tmp_path, monkeypatch, capsys):
    for i, folder in enumerate(pair):
        (folder / "tokenizer.model").write_bytes(bytes([i]))
    run(monkeypatch, *pair, tmp_path / "out")
    assert (
        "its tokenizer.model differs from BASE's; tokenizer.json, which transformers reads, is the same" in capsys.readouterr().err
    )


# --- model@revision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["slerp", "linear"])
def test_a_revision_in_a_mergekit_configuration(method, pair, tmp_path, monkeypatch):
    folders, asked = {"owner/base": pair[0], "owner/cpt": pair[1]}, set()

    def download(name, allow_patterns, revision):
        asked.add((name, revision))
        return str(folders[name])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    models = [{"model": "owner/base@v1", "parameters": {"weight": 1}}, {"model": "owner/cpt@main", "parameters": {"weight": 1}}]
    config = {"merge_method": method, "models": models, "base_model": "owner/base@v1", "parameters": {"t": 0.5}}
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
    run(monkeypatch, tmp_path / "out", "--mergekit-yaml", tmp_path / "c.yml")
    assert asked == {("owner/base", "v1"), ("owner/cpt", "main")}
    card = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == ["owner/base", "owner/cpt"]  # as the hub spells them
    assert "owner/base@v1" in card


# --- models that are not what was meant ----------------------------------------------------------------------------


def randomised(folder, which=lambda name: True) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if which(name):
            tensors[name] = (torch.randn(tensor.shape) * tensor.float().std()).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def warnings(folders, tmp_path, monkeypatch, capsys) -> list[list[str]]:
    """What --t, --sweep, --stats-only and a linear configuration warn of."""
    models = [{"model": str(folder), "parameters": {"weight": 1}} for folder in folders]
    (tmp_path / "c.yml").write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    found = []
    for flags in ((*folders, tmp_path / "1"), (*folders, tmp_path / "2", "--sweep", "0.2,0.5"), (*folders, "--stats-only"),
                  (tmp_path / "3", "--mergekit-yaml", tmp_path / "c.yml")):  # fmt: skip
        run(monkeypatch, *flags)
        found.append([line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")])
    return found


def test_models_that_have_nothing_in_common(pair, tmp_path, monkeypatch, capsys):
    randomised(pair[1])
    for lines in warnings(pair, tmp_path, monkeypatch, capsys):
        assert len(lines) == 1
        assert "have nothing in common with BASE's" in lines[0]


def test_one_matrix_that_has_nothing_in_common(pair, tmp_path, monkeypatch, capsys):
    randomised(pair[1], lambda name: name == HEAD)
    for lines in warnings(pair, tmp_path, monkeypatch, capsys)[:3]:
        assert len(lines) == 1
        assert "1 of 30 matrices" in lines[0]
        assert HEAD in lines[0]


def test_identical_models(pair, tmp_path, monkeypatch, capsys):
    (pair[1] / "model.safetensors").write_bytes((pair[0] / "model.safetensors").read_bytes())
    for folders in (pair, (pair[0], pair[0])):
        (tmp_path / folders[1].name).mkdir(exist_ok=True)
        for lines in warnings(folders, tmp_path / folders[1].name, monkeypatch, capsys):
            assert len(lines) == 1
            assert "holds the same weights as BASE" in lines[0]


def test_a_pair_as_training_makes_it_has_no_warning(pair, tmp_path, monkeypatch, capsys):
    assert warnings(pair, tmp_path, monkeypatch, capsys) == [[], [], [], []]
