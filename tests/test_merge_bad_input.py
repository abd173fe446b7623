"""Every wrong input ends in one line that names it, exit status 1, and no folder that looks whole."""

import dataclasses
import json
import os
import shutil
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import merge
from nanomed import InputError
from nanomed.merging import checks, mergekit_yaml, stream, write
from nanomed.merging.source import open_checkpoint
from test_merge import files_of, make_pair, run


@pytest.fixture
def refused(tmp_path, tiny, monkeypatch):
    """Damage a pair with a function of (BASE, CPT), run merge.py with flags; its one line. Nothing may be left behind."""

    def attempt(damage, *named: str, flags=("--t", "0.5"), kind="untied") -> str:
        base, cpt = make_pair(tmp_path / "pair", tiny.model, kind)
        damage(base, cpt)
        before = files_of(tmp_path)
        with pytest.raises(SystemExit) as exit_:
            run(monkeypatch, base, cpt, tmp_path / "out", *flags)
        line = str(exit_.value.code)
        assert line.startswith("error: ")
        assert "\n" not in line
        assert not [what for what in named if what not in line], line
        assert files_of(tmp_path) == before
        assert not (tmp_path / "out.tmp").exists()
        return line

    return attempt


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
    assert "warning: CPT" in capsys.readouterr().err


def test_a_base_without_tokenizer(refused):
    refused(lambda base, _: (base / "tokenizer.json").unlink(), "BASE", "tokenizer.json", "tokenizer.model")


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
        refused(lambda *_: None, "ends too early")


@pytest.mark.parametrize(("value", "flags"), [(1e6, ("--dtype", "float16")), (3e38, ("--t=-2",))])
def test_a_merged_value_too_large_for_its_dtype(value, flags, refused):
    """Beyond float16; and extrapolated from finite values beyond bf16."""
    name = "model.layers.2.self_attn.v_proj.weight"

    def enlarge(*pair):
        for path, x in zip(pair, (value, value * 0.99), strict=True):
            edit_tensors(path, lambda t, x=x: t[name].fill_(x))

    refused(enlarge, name, "dtype", flags=flags)


# --- the command line ----------------------------------------------------------------------------------------------


def test_out_exists(pair_and_out, monkeypatch):
    base, cpt, out = pair_and_out
    out.mkdir()
    (out / "mine").write_text("keep me")
    with pytest.raises(SystemExit, match=r"error: OUT .*exists already"):
        run(monkeypatch, base, cpt, out)
    assert files_of(out) == {"mine": b"keep me"}


@pytest.fixture
def pair_and_out(tmp_path, tiny):
    return *make_pair(tmp_path, tiny.model), tmp_path / "out"


def test_too_little_disk_is_found_before_writing(pair_and_out, monkeypatch):
    free = shutil.disk_usage("/")._replace(free=33 * 10**6)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: free)
    monkeypatch.setattr(write, "create", lambda *_: pytest.fail("wrote"))
    monkeypatch.setattr(checks, "check_out", lambda out, n, real=checks.check_out: real(out, n + 967 * 10**6))
    with pytest.raises(SystemExit, match=r"needs 1.00 GB, the disk has 0.03 GB free"):
        run(monkeypatch, *pair_and_out)


def test_a_full_disk_is_one_line(pair_and_out, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stream, "write_fully", full)
    with pytest.raises(SystemExit, match="No space left"):
        run(monkeypatch, *pair_and_out)
    assert not pair_and_out[2].exists()
    assert not pair_and_out[2].with_name("out.tmp").exists()


@pytest.mark.parametrize("t", ["-0.5", "1.5"])
def test_extrapolation_is_allowed_and_said(t, pair_and_out, monkeypatch, capsys):
    run(monkeypatch, *pair_and_out, f"--t={t}")
    assert f"warning: t = {t} lies outside [0, 1]" in capsys.readouterr().err
    assert pair_and_out[2].exists()


@pytest.mark.parametrize(
    "flags", [["--t", "nan"], ["--sweep", "0,x"], ["--t", "inf"], ["--sweep", "0,inf"], ["--sweep", "0,,1"]]
)
def test_t_is_no_number(flags, refused):
    refused(lambda *_: None, flags[0], flags=flags)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("t: [", "YAML"), ("0.5", "one key"), ("x: 0.5", "one key"), ("t: {filter: mlp}", "t"), ("t: []", "t"), ("t: half", "half"),
        ("t: [0, .nan]", "nan"), ("t: [{filter: mlp, value: 1}]", "gives no t for"), ("t: [{filter: mlp, valu: 1}]", "valu"),
    ],
)  # fmt: skip
def test_a_schedule_file_that_is_none(content, named, refused, tmp_path):
    (tmp_path / "t.yaml").write_text(content)
    refused(lambda *_: None, "t.yaml", named, flags=("--t-file", tmp_path / "t.yaml"))


def test_flags_that_exclude_each_other(capsys):
    for argv in (
        ["a", "b", "c", "--t", "1", "--sweep", "0,1"], ["a", "b"], ["a", "b", "c", "d"], ["a", "b", "c", "--stats-only"],
        ["c", "--mergekit-yaml", "x", "--t", "0.5"], ["a", "b", "c", "--mergekit-yaml", "x"],
    ):  # fmt: skip
        with pytest.raises(SystemExit) as exit_:
            merge.parse(argv)
        assert exit_.value.code == 2
    assert "exclude each other" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("a: [", "YAML"),
        ("models: []", "merge_method"),
        ("{merge_method: slerp, base_model: x, models: [{model: a}, {model: b}]}", "base_model"),
        ("{merge_method: slerp, models: [{model: a}, {model: b}]}", "base_model"),
        ("{merge_method: linear, dtype: int8, models: [{model: a}]}", "int8"),
        ("{merge_method: linear, models: [{model: BASE}, {model: CPT}]}", "gives no weight for"),
        ("{merge_method: linear, parameters: {weight: 0}, models: [{model: BASE}, {model: CPT}]}", "sum to 0"),
        ("{merge_method: slerp, base_model: BASE, models: [{model: BASE}, {model: CPT}]}", "gives no t for"),
        ("{merge_method: slerp, base_model: BASE, models: [{model: BASE}, {model: nowhere}]}", "nowhere"),
    ],
)
def test_a_mergekit_configuration_that_cannot_be(content, named, pair_and_out, tmp_path, monkeypatch):
    base, cpt, out = pair_and_out
    (tmp_path / "c.yml").write_text(content.replace("BASE", str(base)).replace("CPT", str(cpt)))
    with pytest.raises(SystemExit) as exit_:
        run(monkeypatch, out, "--mergekit-yaml", tmp_path / "c.yml")
    line = str(exit_.value.code)
    assert line.startswith("error: ")
    assert named in line
    assert "\n" not in line
    assert not out.exists()
    assert sys.argv[1] == str(out)


@pytest.mark.parametrize(
    "content",
    [
        "{merge_method: slerp, models: 3}",
        "{merge_method: slerp, models: [a, b]}",
        "{merge_method: linear, slices: 3}",
        "{merge_method: slerp, slices: [{sources: [{model: a, layer_range: 2}]}]}",
        "{merge_method: slerp, base_model: a, models: [{model: a}, {model: b}], parameters: 3}",
        "{merge_method: slerp, base_model: a, models: [{model: a}, {model: b}], dtype: [1]}",
        "{merge_method: [slerp]}",
    ],
)
def test_a_mergekit_configuration_laid_out_wrongly(content, tmp_path):
    (tmp_path / "c.yml").write_text(content)
    with pytest.raises(InputError, match=r"c.yml: is not laid out"):
        mergekit_yaml.read_config(tmp_path / "c.yml")


def test_a_place_to_write_that_is_none(pair_and_out, tmp_path, monkeypatch):
    base, cpt, _ = pair_and_out
    (tmp_path / "file").write_text("")
    for flags in ((tmp_path / "file" / "out",), ("--emit-mergekit", tmp_path / "nowhere" / "c.yml")):
        with pytest.raises(SystemExit, match=r"error: .*(file|nowhere)"):
            run(monkeypatch, base, cpt, *flags)


def test_a_run_that_has_not_exported_is_no_base_and_no_run_is_mergekits(pair_and_out, tmp_path, monkeypatch):
    base, cpt, out = pair_and_out
    unexported = dataclasses.replace(open_checkpoint(str(base), "BASE"), folder=None)
    with pytest.raises(InputError, match="has not exported"):
        checks.check_base(unexported)
    (cpt / "run.json").write_text("{}")
    shutil.copytree(cpt, cpt / "hf")
    with pytest.raises(SystemExit, match=r"run folder, which mergekit does not read; give its export, .*hf"):
        run(monkeypatch, base, cpt, out, "--emit-mergekit", tmp_path / "c.yml")
    assert not (tmp_path / "c.yml").exists()


def test_a_run_folder_that_is_none(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no whole checkpoint"):
        open_checkpoint(str(tmp_path), "CPT")
