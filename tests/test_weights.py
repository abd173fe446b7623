"""Checkpoints in and out: what is not trained comes back bit for bit, from any number of ranks, or not at all."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from conftest import save_reference
from merge_pairs import files_of
from nanomed import InputError, hf, parallel, weights
from nanomed.config import Config
from nanomed.model import Decoder
from nanomed.parallel import World
from test_parallel import ALONE, build, spawn

SMALL = dict(vocab_size=65, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 1e6})  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "mistral": MistralConfig(**SMALL, head_dim=16, sliding_window=None),
    "qwen2-tied": Qwen2Config(**SMALL, head_dim=2, tie_word_embeddings=True),  # k and v have 4 rows
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
}
BESIDE = ["additional_chat_templates/tool_use.jinja", "LICENSE", "NOTICE.txt", "USE_POLICY.md"]
HALF = Config(precision="fp32", compile=False)


def make_source(folder: Path, name: str, dtype=torch.float32, **saving) -> Path:
    """A checkpoint as transformers saves it, with every file that belongs to one beside it."""
    save_reference(CONFIGS[name], folder, dtype)
    if saving:
        AutoModelForCausalLM.from_pretrained(folder, dtype="auto").save_pretrained(folder, **saving)
        (folder / "model.safetensors").unlink()
    for i, file in enumerate([*hf.CARRIED, *BESIDE]):
        if not (folder / file).exists():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_bytes(bytes(range(256)) * (i + 1))  # copied, not parsed
    (folder / "consolidated.safetensors").write_bytes(b"Mistral's own copy of the same weights, under other names")
    (folder / "README.md").write_text("no part of the model")
    return folder


def store_head(folder: Path, change: float = 0.0) -> None:
    """Put a copy of the embedding, changed or not, into a tied model's file as its lm_head: Qwen3-0.6B has one."""
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][-1, -1] += change
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors that the folder's index, or its one file, names."""
    return {name: load_file(file)[name] for name, file in hf.find_weights(folder).items()}


def untouched(source: Path, out: Path, world: World = ALONE) -> None:
    """Import and export, as train.py does it around the training."""
    with torch.device("meta"):
        model = Decoder(hf.model_config(source))
    parallel.parallelize(model, HALF, world)
    model.to_empty(device="cpu")
    weights.load_weights(model, hf.check_weights(model, source))
    weights.export(model, source, out, world)


@pytest.fixture(autouse=True)
def _no_barriers(monkeypatch):
    monkeypatch.setattr(World, "barrier", lambda self: dist.is_initialized() and dist.barrier())


def assert_same_checkpoint(source: Path, out: Path) -> None:
    before, after = tensors_of(source), tensors_of(out)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name  # NaNs and -0 too
    for file in hf.find_weights(out).values():
        with safe_open(file, "pt") as handle:
            assert handle.metadata() == {"format": "pt"}
    for name in (*hf.CARRIED, *BESIDE):
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    weight_files = {file.name for file in hf.find_weights(out).values()}
    index = {"model.safetensors.index.json"} if len(weight_files) > 1 else set()
    carried = {*hf.CARRIED, *BESIDE}
    assert {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} == weight_files | index | carried


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", CONFIGS)
def test_untouched_is_bit_identical(name, dtype, tmp_path):
    source = make_source(tmp_path / "source", name, dtype)
    untouched(source, tmp_path / "out" / "hf")
    assert_same_checkpoint(source, tmp_path / "out" / "hf")
    assert not (tmp_path / "out" / "hf.tmp").exists()


def test_each_tensor_keeps_its_own_dtype(tmp_path):
    """Mixed checkpoints exist: norms in float32 among bf16 matrices. So do zeros with a sign and subnormal numbers."""
    source = make_source(tmp_path / "source", "llama", torch.bfloat16)
    tensors, dtypes = tensors_of(source), (torch.float32, torch.float16, torch.bfloat16)
    tensors = {k: v.to(dtypes[i % 3]) for i, (k, v) in enumerate(tensors.items())}
    for tensor in tensors.values():
        tensor.view(-1)[:3] = torch.tensor([-0.0, torch.finfo(tensor.dtype).smallest_normal / 4, float("inf")])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    untouched(source, tmp_path / "hf")
    assert_same_checkpoint(source, tmp_path / "hf")


def test_a_tied_model_that_stores_its_head_too(tmp_path):
    """The copy is read past and not written; another tensor under that name is refused."""
    source = make_source(tmp_path / "source", "qwen2-tied", torch.bfloat16)
    before = tensors_of(source)
    store_head(source)
    untouched(source, tmp_path / "hf")
    after = tensors_of(tmp_path / "hf")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    index = {"weight_map": dict.fromkeys([*before, "lm_head.weight"], "model.safetensors")}
    save_file(before, source / "model.safetensors", {"format": "pt"})
    (source / "model.safetensors.index.json").write_text(json.dumps(index))  # promises a head that is not there
    with pytest.raises(InputError, match=r"lm_head\.weight is missing, though the index names it"):
        untouched(source, tmp_path / "again")
    (source / "model.safetensors.index.json").unlink()
    store_head(source, change=1.0)
    with pytest.raises(InputError, match="has tie_word_embeddings, but its lm_head"):
        untouched(source, tmp_path / "again")


def test_the_rope_frequencies_of_old_llamas_are_read_past(tmp_path):
    source = make_source(tmp_path / "source", "llama")
    before = tensors_of(source)
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(3) for i in range(3)}
    save_file(before | frequencies, source / "model.safetensors", {"format": "pt"})
    untouched(source, tmp_path / "hf")
    assert tensors_of(tmp_path / "hf").keys() == before.keys()


def test_many_shards_in_many_shards_out(tmp_path, monkeypatch):
    """The index names the files; the export has its own cut, no file above the limit, and its total in the index."""
    source = make_source(tmp_path / "source", "qwen2-tied", torch.bfloat16, max_shard_size="10KB")
    assert len({*hf.find_weights(source).values()}) > 2
    monkeypatch.setattr(weights, "EXPORT_SHARD_BYTES", 7_000)
    untouched(source, tmp_path / "hf")
    assert_same_checkpoint(source, tmp_path / "hf")
    files = sorted(p.name for p in (tmp_path / "hf").glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 3
    tensors = [load_file(tmp_path / "hf" / file).values() for file in files]
    sizes = [sum(t.numel() * 2 for t in inside) for inside in tensors]
    assert all(size <= 7_000 or len(inside) == 1 for size, inside in zip(sizes, tensors, strict=True))
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)


@pytest.mark.parametrize("limit", [10**9, 7_000])
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_it_whole(name, limit, tmp_path, monkeypatch):
    source = tmp_path / "source"
    reference = save_reference(CONFIGS[name], source, torch.bfloat16)
    monkeypatch.setattr(weights, "EXPORT_SHARD_BYTES", limit)
    untouched(source, tmp_path / "hf")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    expected = reference.state_dict()
    for key, value in loaded.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_trained_from_scratch_it_exports_in_the_configs_dtype(field, tmp_path):
    source = make_source(tmp_path / "source", "llama")
    for path in source.glob("*.safetensors"):
        path.unlink()
    raw = json.loads((source / "config.json").read_text())
    raw.pop("dtype")
    (source / "config.json").write_text(json.dumps(raw | {field: "bfloat16"}))
    model = Decoder(hf.model_config(source))
    weights.random_weights(model, 0.02, seed=3)
    weights.export(model, source, tmp_path / "hf", ALONE)
    exported = tensors_of(tmp_path / "hf")
    for name, param in model.named_parameters():
        assert torch.equal(exported[name], param.bfloat16()), name


def test_random_weights_are_what_transformers_would_begin_with():
    """Matrices normal with the given deviation and all different, norms 1, biases 0; the seed decides."""
    model, again, other = (build(Config(precision="fp32", compile=False, seed=s)) for s in (1, 1, 2))
    for (name, p), q, r in zip(model.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        if p.ndim > 1:
            assert p.std().item() == pytest.approx(0.3, rel=0.15)  # what build asks for
            assert not torch.equal(p, r)
        else:
            assert (p == (0.0 if name.endswith("bias") else 1.0)).all()
    first, second = (model.model.layers[i].mlp.up_proj.weight for i in (0, 1))
    assert not torch.equal(first, second)


class Interrupted(BaseException):
    """An exception that no `except Exception` catches."""


@pytest.mark.parametrize("moment", ["write_header", "write_index", "_write_rows", "replace"])
def test_an_interrupted_export_leaves_nothing(moment, tmp_path, monkeypatch):
    """hf/ appears whole or not at all, and the next export gives the same bytes."""
    source, out = make_source(tmp_path / "source", "llama"), tmp_path / "run" / "hf"
    untouched(source, tmp_path / "right")
    monkeypatch.setattr(weights, "EXPORT_SHARD_BYTES", 7_000)  # other files, which must not stay behind

    def dies(*_args):
        raise Interrupted

    with monkeypatch.context() as patch:
        owner = {"replace": weights.os, "_write_rows": weights}.get(moment, weights.shards)
        patch.setattr(owner, moment, dies)
        with pytest.raises(Interrupted):
            untouched(source, out)
    assert not out.parent.exists()
    monkeypatch.undo()
    monkeypatch.setattr(World, "barrier", lambda self: None)
    untouched(source, out)
    assert files_of(out) == files_of(tmp_path / "right")
    assert [p.name for p in out.parent.iterdir()] == ["hf"]


def test_an_export_removes_nothing_that_it_did_not_make(tmp_path):
    source, out = make_source(tmp_path / "source", "llama"), tmp_path / "run" / "hf"
    for mine in (tmp_path / "run" / "hf.tmp", out):
        mine.mkdir(parents=True)
        (mine / "notes.txt").write_text("a user's")
    with pytest.raises(InputError, match="run/hf: exists already"):
        untouched(source, out)
    shutil.move(out, tmp_path / "elsewhere")
    untouched(source, out)
    assert (tmp_path / "run" / "hf.tmp" / "notes.txt").exists()
    assert (tmp_path / "elsewhere" / "notes.txt").exists()


# --- more ranks ----------------------------------------------------------------------------------------------------


def _on_each_rank(rank, sources, random, out):
    """Import and export every source, and export random weights of `random`'s config."""
    weights.EXPORT_SHARD_BYTES = 7_000
    world = parallel.start(HALF)
    for source in sources:
        untouched(source, out / source.name, world)
    with torch.device("meta"):
        model = Decoder(hf.model_config(random))
    parallel.parallelize(model, HALF, world)
    model.to_empty(device="cpu")
    weights.random_weights(model, 0.02, seed=3)
    weights.export(model, random, out / "random", world)
    dist.destroy_process_group()


def test_three_ranks_read_write_and_draw_the_same_bytes_as_one(tmp_path, monkeypatch):
    """Three, so that rows do not divide (65), and of small tensors one rank has none (4 rows are cut 2, 2, 0)."""
    sources = [make_source(tmp_path / name, name, torch.bfloat16) for name in CONFIGS]
    random = tmp_path / "random"
    shutil.copytree(sources[0], random, ignore=shutil.ignore_patterns("*.safetensors"))
    spawn(_on_each_rank, sources, random, tmp_path / "three", n_ranks=3)
    monkeypatch.setattr(weights, "EXPORT_SHARD_BYTES", 7_000)
    for source in sources:
        assert_same_checkpoint(source, tmp_path / "three" / source.name)
        untouched(source, tmp_path / "one" / source.name)
    model = Decoder(hf.model_config(random))
    weights.random_weights(model, 0.02, seed=3)
    weights.export(model, random, tmp_path / "one" / "random", ALONE)
    for one in (p for p in (tmp_path / "one").rglob("*") if p.is_file()):
        assert one.read_bytes() == (tmp_path / "three" / one.relative_to(tmp_path / "one")).read_bytes(), one


def test_from_the_hub_come_only_the_weights_that_the_index_names(tiny, tmp_path, monkeypatch):
    folder, asked = shutil.copytree(tiny.model, tmp_path / "hub"), []
    download = lambda name, allow_patterns: asked.append((name, allow_patterns)) or str(folder)  # noqa: E731
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert hf.fetch("owner/name") == folder
    assert {"tokenizer.json", "additional_chat_templates/*.jinja", "LICEN[CS]E*", "NOTICE*"} <= set(asked[0][1])
    assert asked[1] == ("owner/name", ["model.safetensors"])
    names = ["model-2.safetensors", "model-1.safetensors"]
    index = {"weight_map": dict(zip("abc", [*names, names[0]], strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    hf.fetch("owner/name")
    assert asked[3][1] == sorted(names)
    for path in folder.glob("model.safetensors*"):
        path.unlink()
    with pytest.raises(InputError, match="only safetensors are read"):
        hf.fetch("owner/name")
