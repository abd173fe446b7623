"""merge.py beside mergekit itself: the same configuration gives the same weights, and what we do not do mergekit does."""

import json
import shutil

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import MistralConfig

import merge
from conftest import save_reference
from merge_pairs import CONFIGS, make_pair, reference, run, tensors_of
from nanomed import InputError
from nanomed.merging import mergekit_yaml
from nanomed.merging.schedule import depths, evaluate, read_rules, spell
from nanomed.merging.slerp import DOT_THRESHOLD

# BioMistral's own file, from its repository (Merges/MergeSLERP.py)
BIOMISTRAL = """\
slices:
  - sources:
      - model: mistralai/Mistral-7B-Instruct-v0.1
        layer_range: [0, 32]
      - model: Project44/BioMistral-7B-0.1-PubMed-V2
        layer_range: [0, 32]
merge_method: slerp
base_model: mistralai/Mistral-7B-Instruct-v0.1
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
"""


def run_mergekit(path, out):
    """mergekit in this process: its import takes seconds, once."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(quiet=True, write_model_card=False)  # the card asks the hub about the models' names
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(path.read_text())), str(out), options)


def assert_same_merge(ours, theirs, base, cpt) -> None:
    """Element by element within a unit in the last place (16 bits) or 1e-6 of the norm; tensors at the threshold excepted."""
    a, b, x, y = map(tensors_of, (base, cpt, ours, theirs))
    assert x.keys() == y.keys()
    for name in x:
        if abs(abs(reference(a[name], b[name], 0.5)[2]) - DOT_THRESHOLD) < 1e-5:
            continue
        assert x[name].dtype == y[name].dtype
        p, q = x[name].double(), y[name].double()
        if x[name].dtype == torch.float32:
            assert (p - q).norm() <= 1e-6 * q.norm(), name
        else:
            larger = torch.maximum(a[name].double().abs(), b[name].double().abs()).clamp_min(1e-38)
            assert ((p - q).abs() <= torch.exp2(larger.log2().floor() - 7)).all(), name
            assert (p != q).double().mean() < 1e-3, name


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_file_we_emit_makes_mergekit_do_the_same(kind, tmp_path, tiny, monkeypatch):
    base, cpt = make_pair(tmp_path, tiny.model, kind)
    run(monkeypatch, base, cpt, tmp_path / "ours", "--preset", "gradient", "--emit-mergekit", tmp_path / "c.yml")
    run_mergekit(tmp_path / "c.yml", tmp_path / "theirs")
    assert_same_merge(tmp_path / "ours", tmp_path / "theirs", base, cpt)
    run(monkeypatch, tmp_path / "back", "--mergekit-yaml", tmp_path / "c.yml", "--verify")
    for name, tensor in tensors_of(tmp_path / "ours").items():
        assert torch.equal(tensor, tensors_of(tmp_path / "back")[name]), name


def test_in_float32(tmp_path, tiny, monkeypatch):
    base, cpt = make_pair(tmp_path, tiny.model, dtype=torch.float32)
    run(monkeypatch, base, cpt, tmp_path / "ours", "--t", "0.3", "--emit-mergekit", tmp_path / "c.yml")
    run_mergekit(tmp_path / "c.yml", tmp_path / "theirs")
    assert_same_merge(tmp_path / "ours", tmp_path / "theirs", base, cpt)


def test_biomistrals_own_file_on_stand_ins_of_32_layers(tmp_path, tiny, monkeypatch):
    config = MistralConfig(vocab_size=384, hidden_size=16, intermediate_size=24, num_hidden_layers=32, num_attention_heads=2,
                           num_key_value_heads=1, bos_token_id=0, eos_token_id=0)  # fmt: skip
    monkeypatch.setitem(CONFIGS, "mistral", config)
    monkeypatch.chdir(tmp_path)
    model = save_reference(config, tmp_path / "mistralai/Mistral-7B-Instruct-v0.1", torch.bfloat16)
    base, cpt = tmp_path / "mistralai/Mistral-7B-Instruct-v0.1", tmp_path / "Project44/BioMistral-7B-0.1-PubMed-V2"
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_((torch.randn(p.shape) * p.float().std().nan_to_num(0.1) * (0.01, 0.3)[i % 2]).to(p.dtype))
    model.save_pretrained(cpt)
    for folder in (base, cpt):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tiny.model / file, folder / file)
    (tmp_path / "slerp.yml").write_text(BIOMISTRAL)
    run(monkeypatch, "ours", "--mergekit-yaml", "slerp.yml", "--verify")
    run_mergekit(tmp_path / "slerp.yml", tmp_path / "theirs")
    assert_same_merge(tmp_path / "ours", tmp_path / "theirs", base, cpt)
    branches = {row["branch"] for row in json.loads((tmp_path / "ours" / "merge_report.json").read_text())["tensors"]}
    assert branches == {"lerp", "slerp"}


@pytest.mark.parametrize("normalize", [True, False])
def test_linear_of_three_models(normalize, tmp_path, tiny, monkeypatch):
    base, one = make_pair(tmp_path / "1", tiny.model, dtype=torch.float32)
    _, two = make_pair(tmp_path / "2", tiny.model, dtype=torch.float32)
    template = json.loads((two / "tokenizer_config.json").read_text()) | {"chat_template": "of base_model"}
    (two / "tokenizer_config.json").write_text(json.dumps(template))
    config = {"merge_method": "linear", "dtype": "float32", "base_model": str(two),
              "parameters": {"normalize": normalize, "weight": [0.2, 0.6]},
              "models": [{"model": str(base), "parameters": {"weight": 0.5}},
                         {"model": str(one), "parameters": {"weight": [{"filter": "mlp", "value": [0, 1]}]}},
                         {"model": str(two)}]}  # fmt: skip
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
    run(monkeypatch, tmp_path / "ours", "--mergekit-yaml", tmp_path / "c.yml", "--verify")
    run_mergekit(tmp_path / "c.yml", tmp_path / "theirs")
    ours, theirs = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs")
    assert (tmp_path / "c.yml").read_text().rstrip() in (tmp_path / "ours" / "README.md").read_text()
    assert ours.keys() == theirs.keys()
    for side in ("ours", "theirs"):
        assert json.loads((tmp_path / side / "tokenizer_config.json").read_text())["chat_template"] == "of base_model"
    for name in ours:
        assert (ours[name] - theirs[name]).norm() <= 1e-6 * theirs[name].norm(), name


def test_other_methods_are_mergekits_own(tmp_path, tiny, monkeypatch, capfd):
    base, cpt = make_pair(tmp_path, tiny.model)
    (base / "LICENSE").write_text("Apache 2.0")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    config = {"merge_method": "task_arithmetic", "base_model": str(base), "dtype": "bfloat16",
              "models": [{"model": str(cpt), "parameters": {"weight": 0.5}}]}  # fmt: skip
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
    run(monkeypatch, tmp_path / "ours", "--mergekit-yaml", tmp_path / "c.yml")
    assert "merge_method task_arithmetic: calling mergekit" in capfd.readouterr().err
    for name in ("LICENSE", "additional_chat_templates/tool_use.jinja", "tokenizer.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (base / name).read_bytes()
    a, b, out = map(tensors_of, (base, cpt, tmp_path / "ours"))
    for name in out:  # BASE + 0.5 (CPT - BASE)
        middle = (a[name].double() + b[name].double()) / 2
        assert (out[name].double() - middle).norm() <= 0.01 * middle.norm(), name
    assert {p.name for p in tmp_path.iterdir()} == {"base", "cpt", "c.yml", "ours"}


def test_mergekits_own_failure_is_one_line(tmp_path, tiny, monkeypatch):
    base, cpt = make_pair(tmp_path, tiny.model)
    config = {"merge_method": "task_arithmetic", "base_model": str(base), "models": [{"model": str(cpt)}]}  # no weight
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as exit_:
        run(monkeypatch, tmp_path / "out", "--mergekit-yaml", tmp_path / "c.yml")
    assert "mergekit failed" in str(exit_.value.code)
    assert "\n" not in str(exit_.value.code)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="only slerp and linear can be verified"):
        run(monkeypatch, tmp_path / "out", "--mergekit-yaml", tmp_path / "c.yml", "--verify")
    monkeypatch.setattr(mergekit_yaml.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match="pip install"):
        run(monkeypatch, tmp_path / "out", "--mergekit-yaml", tmp_path / "c.yml")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"merge_method": "ties"}, "merge_method ties"),
        ({"tokenizer_source": "union"}, "tokenizer_source union"),
        ({"chat_template": "chatml"}, "the field chat_template"),
        ({"slices": [{"sources": []}, {"sources": []}]}, "several slices"),
        ({"slices": [{"sources": [], "residual_weight": 1}]}, "the field residual_weight of a slice"),
        (
            {"slices": [{"sources": [{"model": x, "layer_range": [1, 4]} for x in "ab"]}]},
            "a layer_range that is not all layers",
        ),
        (
            {"slices": [{"sources": [{"model": x, "layer_range": [0, n]} for x, n in (("a", 2), ("b", 4))]}]},
            "a layer_range that is not all layers",
        ),
        ({"merge_method": "linear", "parameters": {"weight": 1, "normalize": [0, 1]}}, "a conditional normalize"),
        ({"models": [{"model": "a+lora"}, {"model": "b"}]}, "a model reference that is not a plain name"),
        (
            {"merge_method": "linear", "slices": [{"sources": [{"model": x} for x in "bc"]}], "parameters": {"weight": 1}},
            "a base_model that is not its slice's",
        ),
    ],
)
def test_what_is_left_to_mergekit(change, why, tmp_path):
    config = {
        "merge_method": "slerp",
        "base_model": "a",
        "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"t": 0.5},
    }
    path = tmp_path / "c.yml"
    path.write_text(yaml.safe_dump(config))
    assert mergekit_yaml.read_config(path).models == ["a", "b"]
    one_slice = {"slices": [{"sources": config["models"][::-1], "base_model": "a"}]}
    path.write_text(yaml.safe_dump({key: config[key] for key in ("merge_method", "parameters")} | one_slice))
    assert mergekit_yaml.read_config(path).models == ["a", "b"]
    path.write_text(yaml.safe_dump(config | {"models": [{"model": "a"}] * 2}))
    assert mergekit_yaml.read_config(path).models == ["a", "a"]
    path.write_text(yaml.safe_dump(config | change))
    assert mergekit_yaml.read_config(path) == why


# --- schedules -----------------------------------------------------------------------------------------------------

gradients = st.one_of(st.floats(-1, 2), st.lists(st.floats(-1, 2), min_size=1, max_size=6))
filters = st.sampled_from(["self_attn", "mlp", "q_proj", "layers.1", "*"])
entries = st.fixed_dictionaries({"value": gradients}, optional={"filter": filters})
spellings = st.one_of(gradients, st.lists(entries, min_size=1, max_size=4))


@given(setting=spellings, n_layers=st.integers(1, 40))
def test_a_schedule_is_evaluated_as_mergekit_does(setting, n_layers):
    from mergekit.config import ConditionalParameter, evaluate_setting

    parts = ("self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight")
    names = [f"model.layers.{i}.{part}" for i in range(n_layers) for part in parts]
    rules = [*read_rules(setting, "here"), *read_rules(7.0, "here")]
    found = evaluate(rules, [*names, "lm_head.weight"], "here")
    theirs = [ConditionalParameter(**e) for e in setting] if isinstance(setting, list) and isinstance(setting[0], dict) else setting
    for name, t in found.items():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        x = 0 if layer is None else layer / (n_layers - 1) if n_layers > 1 else 1
        expected = evaluate_setting(name, theirs, x, validate=float)
        assert t == pytest.approx(7.0 if expected is None else expected, abs=1e-12), name
    assert read_rules(spell(rules), "here") == rules


def test_layers_are_found_in_names():
    assert depths(["model.embed_tokens.weight", "model.layers.0.x", "model.layers.4.x", "transformer.h.2.x"]) == {
        "model.embed_tokens.weight": 0, "model.layers.0.x": 0, "model.layers.4.x": 1, "transformer.h.2.x": 0.5}  # fmt: skip


def test_the_emitted_file_replaces_no_other_and_is_not_left_by_a_failed_merge(tmp_path, tiny, monkeypatch):
    base, cpt = make_pair(tmp_path, tiny.model)
    file = tmp_path / "c.yml"
    with monkeypatch.context() as patch:
        patch.setattr(merge, "write_merges", lambda *_: (_ for _ in ()).throw(InputError("full")))
        with pytest.raises(SystemExit, match="full"):
            run(monkeypatch, base, cpt, tmp_path / "out", "--emit-mergekit", file)
    assert not file.exists()
    run(monkeypatch, base, cpt, "--emit-mergekit", file)
    run(monkeypatch, base, cpt, "--emit-mergekit", file)  # the same again
    before = file.read_bytes()
    with pytest.raises(SystemExit, match=r"c\.yml: exists already with other content"):
        run(monkeypatch, base, cpt, "--t", "0.1", "--emit-mergekit", file)
    assert file.read_bytes() == before


def test_help_shows_the_ways(capsys):
    with pytest.raises(SystemExit):
        merge.parse(["--help"])
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--t-file", "--sweep", "--mergekit-yaml", "--stats-only", "tune"))
