"""Two models that do not belong together, files that are not whole: one line that names it, and nothing that looks whole."""

import json
import os
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from merge_pairs import fixture_pair_and_out, fixture_refused, make_pair, run  # noqa: F401
from nanomed.merging import write


def edit_config(folder, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# --- two models that do not belong together ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "mistral"),
        ("num_attention_heads", 8),
        ("rms_norm_eps", 1e-3),
        ("hidden_act", "gelu"),
        ("rope_theta", 5e6),
        ("factor", 4.0),
    ],
)
def test_another_architecture(field, value, refused):
    fields = {"rope_scaling": {"type": "yarn", "factor": value}} if field == "factor" else {field: value}
    refused(lambda base, cpt: edit_config(cpt, **fields), "CPT", field, str(value), "BASE")


def test_the_two_spellings_of_one_architecture_are_one(tmp_path, tiny, monkeypatch):
    base, cpt = make_pair(tmp_path, tiny.model)
    old = json.loads((base / "config.json").read_text())
    theta = old.pop("rope_parameters")["rope_theta"]
    del old["dtype"]
    old |= {"rope_theta": theta, "torch_dtype": "bfloat16", "transformers_version": "4.40.0", "rope_scaling": None}
    (base / "config.json").write_text(json.dumps(old))
    run(monkeypatch, base, cpt, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == old


def test_another_shape(refused):
    name = "model.layers.1.mlp.up_proj.weight"
    refused(
        lambda _, cpt: edit_tensors(cpt, lambda t: t.update({name: torch.zeros(57, 32).bfloat16()})),
        name,
        "[57, 32]",
        "[56, 32]",
    )


def test_a_tensor_too_few_and_too_many(refused):
    name = "model.layers.1.mlp.up_proj.weight"
    refused(lambda _, cpt: edit_tensors(cpt, lambda t: t.pop(name)), name, "missing", "BASE has it")
    refused(lambda base, _: edit_tensors(base, lambda t: t.pop(name)), name, "not in BASE")


@pytest.mark.parametrize("which", [0, 1])
def test_tied_and_untied(which, refused):
    """By the files; and where config.json says so."""
    refused(lambda *pair: edit_tensors(pair[which], lambda t: t.pop("lm_head.weight")), "lm_head.weight", "ties")
    refused(lambda *pair: edit_config(pair[which], tie_word_embeddings=True), "tie_word_embeddings")


def test_another_tokenizer(refused):
    def add_token(_, cpt):
        spec = json.loads((cpt / "tokenizer.json").read_text())
        spec["model"]["vocab"]["zusätzlich"] = 383
        (cpt / "tokenizer.json").write_text(json.dumps(spec))

    refused(add_token, "CPT", "tokenizer.json", "sha256", "BASE")

    def other_sentencepiece(base, cpt):
        for i, folder in enumerate((base, cpt)):
            (folder / "tokenizer.json").unlink()
            (folder / "tokenizer.model").write_bytes(bytes([i]))

    refused(other_sentencepiece, "tokenizer.model")


def test_a_tokenizer_saved_again_is_the_same_and_none_is_said(tmp_path, tiny, monkeypatch, capsys):
    base, cpt = make_pair(tmp_path, tiny.model)
    path = cpt / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=4))
    run(monkeypatch, base, cpt, tmp_path / "out")
    assert "warning" not in capsys.readouterr().err
    path.unlink()
    run(monkeypatch, base, cpt, tmp_path / "again")
    assert f"CPT {cpt} has no tokenizer, BASE {base} tokenizer.json: cannot be compared" in capsys.readouterr().err


def test_a_base_without_tokenizer(refused, capsys):
    refused(lambda base, _: (base / "tokenizer.json").unlink(), "BASE", "tokenizer.json", "tokenizer.model")
    assert "cpt has tokenizer.json, BASE" in capsys.readouterr().err


# --- files that are not whole --------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1])
def test_a_truncated_file(which, refused):
    def cut(*pair):
        file = pair[which] / "model.safetensors"
        os.truncate(file, file.stat().st_size - 100)

    refused(cut, ("base", "cpt")[which], "model.safetensors")


def test_a_missing_shard_and_an_index_that_lies(refused):
    def shard(cpt):
        tensors = load_file(cpt / "model.safetensors")
        names = sorted(tensors)
        for i, part in enumerate((names[::2], names[1::2])):
            save_file({name: tensors[name] for name in part}, cpt / f"m-{i}.safetensors")
        weight_map = {name: f"m-{i % 2}.safetensors" for i, name in enumerate(names)}
        (cpt / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (cpt / "model.safetensors").unlink()
        return names

    refused(lambda _, cpt: (shard(cpt), (cpt / "m-1.safetensors").unlink()), "m-1.safetensors", "missing")

    def lie(_, cpt):
        names = shard(cpt)
        index = json.loads((cpt / "model.safetensors.index.json").read_text())
        index["weight_map"][names[0]] = "m-1.safetensors"
        (cpt / "model.safetensors.index.json").write_text(json.dumps(index))

    refused(lie, "m-1.safetensors", "the index names it")


def test_no_weights_at_all(refused):
    refused(lambda _, cpt: (cpt / "model.safetensors").unlink(), "CPT", "safetensors")
    refused(lambda _, cpt: (cpt / "model.safetensors").rename(cpt / "pytorch_model.bin"), "pytorch_model.bin")
    refused(lambda _, cpt: (cpt / "config.json").unlink(), "CPT", "config.json")
    refused(lambda _, cpt: (cpt / "config.json").write_text("[]"), "config.json", "object")
    refused(lambda _, cpt: shutil.rmtree(cpt), "CPT", "cpt")


def test_integers_are_not_merged(refused):
    name = "model.layers.1.mlp.up_proj.weight"
    refused(lambda _, cpt: edit_tensors(cpt, lambda t: t.update({name: t[name].to(torch.int8)})), name, "I8", "BF16")


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
@pytest.mark.parametrize("which", [0, 1])
def test_a_tensor_that_is_not_finite(which, value, word, refused):
    name = "model.layers.2.self_attn.v_proj.weight"
    refused(
        lambda *pair: edit_tensors(pair[which], lambda t: t[name].view(-1)[-1].fill_(value)),
        name,
        word,
        ("base", "cpt")[which],
    )


def test_linear_finds_one_that_is_not_finite(pair_and_out, tmp_path, monkeypatch):
    """No sums are taken there, and rounding to bf16 would make a NaN a zero."""
    base, cpt, out = pair_and_out
    name = "model.layers.2.self_attn.v_proj.weight"
    edit_tensors(cpt, lambda t: t[name].view(-1)[-1].fill_(float("nan")))
    models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in (base, cpt)]
    (tmp_path / "c.yml").write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    with pytest.raises(SystemExit, match=f"cpt: tensor {name} holds NaN"):
        run(monkeypatch, out, "--mergekit-yaml", tmp_path / "c.yml")
    assert not out.exists()


def test_a_file_that_shrinks_meanwhile(refused, monkeypatch):
    whole_create = write.create

    def cut(folder, base, *rest):
        whole_create(folder, base, *rest)
        os.truncate(base.folder / "model.safetensors", 5000)

    monkeypatch.setattr(write, "create", cut)
    with pytest.raises(AssertionError):  # the damage is done by us: only the line counts here
        refused(lambda *_: None, "too early")


@pytest.mark.parametrize(("value", "flags"), [(1e6, ("--dtype", "float16")), (3e38, ("--t=-2",))])
def test_a_merged_value_too_large_for_its_dtype(value, flags, refused):
    """Beyond float16; and extrapolated from finite values beyond bf16."""
    name = "model.layers.2.self_attn.v_proj.weight"

    def enlarge(*pair):
        for path, x in zip(pair, (value, value * 0.99), strict=True):
            edit_tensors(path, lambda t, x=x: t[name].fill_(x))

    refused(enlarge, name, "dtype", flags=flags)
