"""Files as the hub has them beside the same model as transformers writes it: a stored copy of a tied head, a sliding window
that is not in force; and the dtype that the result's config.json names."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from merge_pairs import assert_close, fixture_refused, make_pair, run, tensors_of  # noqa: F401

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def store_head(folder, change=lambda head: head) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD] = change(tensors[EMBEDDING].clone())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, drop: str = "", **fields) -> None:
    path = folder / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key != drop}
    path.write_text(json.dumps(config | fields))


# --- a tied head that is stored ------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_head", [(0,), (1,), (0, 1)])
def test_a_stored_copy_of_a_tied_head_is_no_tensor_of_its_own(with_head, tmp_path, tiny, monkeypatch):
    pair = make_pair(tmp_path, tiny.model, "tied")
    for i in with_head:
        store_head(pair[i])
    run(monkeypatch, *pair, tmp_path / "out", "--t", "0.3", "--verify")
    a, b, out = map(tensors_of, (*pair, tmp_path / "out"))
    assert HEAD not in out
    assert out.keys() == a.keys() - {HEAD} == b.keys() - {HEAD}
    assert_close(out[EMBEDDING], a[EMBEDDING], b[EMBEDDING], 0.3)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(loaded.lm_head.weight, out[EMBEDDING])


@pytest.mark.parametrize("which", [0, 1])
def test_a_tied_head_with_values_of_its_own_is_refused(which, refused):
    def last_value(head):
        head[-1, -1] += 1
        return head

    names = (f"/{('base', 'cpt')[which]}: ", HEAD, "tie_word_embeddings", EMBEDDING)
    refused(lambda *pair: store_head(pair[which], last_value), *names, kind="tied")
    refused(lambda *pair: store_head(pair[which], torch.Tensor.float), *names, kind="tied")


@pytest.mark.parametrize("which", [0, 1])
def test_rope_frequencies_of_old_files_are_no_tensors(which, tmp_path, tiny, monkeypatch):
    pair = make_pair(tmp_path, tiny.model)
    tensors = load_file(pair[which] / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, pair[which] / "model.safetensors", metadata={"format": "pt"})
    run(monkeypatch, *pair, tmp_path / "out", "--verify")
    assert tensors_of(tmp_path / "out").keys() == tensors_of(pair[1 - which]).keys()


# --- a sliding window ----------------------------------------------------------------------------------------------

OFF = {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28}


@pytest.mark.parametrize(
    ("base_has", "cpt_has"),
    [
        (OFF, {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 21}),
        (OFF, {"use_sliding_window": True, "sliding_window": None}),
        (OFF, {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 4}),  # from a layer on that is none
        (
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 28,
             "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2},
        ),
    ],
)  # fmt: skip
def test_windows_are_compared_as_they_are_in_force(base_has, cpt_has, tmp_path, tiny, monkeypatch):
    base, cpt = make_pair(tmp_path, tiny.model, "tied")
    edit_config(base, "layer_types", **base_has)
    edit_config(cpt, "layer_types", **cpt_has)
    run(monkeypatch, base, cpt, tmp_path / "out", "--t", "0.5")
    run(monkeypatch, cpt, base, tmp_path / "other-way", "--t", "0.5")


@pytest.mark.parametrize(
    "fields",
    [
        {"use_sliding_window": True, "max_window_layers": 2},
        {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 4},
    ],
)
def test_a_window_in_force_on_one_side_only_is_refused(fields, refused):
    def damage(base, cpt):
        edit_config(base, "layer_types", **OFF)
        edit_config(cpt, "layer_types", **(OFF | fields))

    refused(damage, "CPT", "sliding_window", "131072", "BASE", kind="tied")


# --- the dtype -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("by", ["--dtype", "slerp", "linear"])
def test_config_json_names_the_dtype_of_the_result(spelling, by, tmp_path, tiny, monkeypatch):
    base, cpt = make_pair(tmp_path, tiny.model)
    edit_config(base, "dtype", **{spelling: "bfloat16"})
    if by == "--dtype":
        run(monkeypatch, base, cpt, tmp_path / "out", "--t", "0.5", "--dtype", "float32")
    else:
        recipe = {"merge_method": by, "base_model": str(base), "out_dtype": "float32", "dtype": "bfloat16",
                  "models": [{"model": str(m), "parameters": {"weight": 0.5}} for m in (base, cpt)],
                  "parameters": {"t": 0.5}}  # fmt: skip
        (tmp_path / "c.yml").write_text(yaml.safe_dump(recipe))
        run(monkeypatch, tmp_path / "out", "--mergekit-yaml", tmp_path / "c.yml")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "out"))
    assert after == before | {spelling: "float32"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.float32


def test_without_another_dtype_config_json_is_bases_byte_for_byte(tmp_path, tiny, monkeypatch):
    base, cpt = make_pair(tmp_path, tiny.model)
    run(monkeypatch, base, cpt, tmp_path / "out", "--t", "0.5")
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
