"""Model folders that contradict themselves: read as transformers reads them, or refused in one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from nanomed import InputError, hf
from nanomed.evaluation.loading import load_decoder
from nanomed.merging.source import open_checkpoint
from nanomed.tokenizer import tokenizer_sha256


@pytest.fixture(name="folder")
def fixture_folder(tiny, tmp_path):
    return shutil.copytree(tiny.model, tmp_path / "model")


def shard(folder, change=0.0) -> dict[str, str]:
    """Write the weights, changed or not, as two shards with an index, beside model.safetensors; the index's
    weight_map."""
    tensors = {name: tensor + change for name, tensor in load_file(folder / "model.safetensors").items()}
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def readers(folder):
    """Every way to read the folder's weights."""
    return (
        lambda: load_decoder(folder, torch.float32, torch.device("cpu")),
        lambda: open_checkpoint(str(folder), "BASE"),
        lambda: hf.find_weights(folder),
    )


def refused(folder, *words: str) -> None:
    """Every reader refuses the folder in one line with these words."""
    for read in readers(folder):
        with pytest.raises(InputError) as error:
            read()
        assert "\n" not in str(error.value)
        assert not [word for word in words if word not in str(error.value)], error.value


def test_a_single_file_beside_the_index_of_old_shards(folder):
    shard(folder, change=1.0)
    refused(folder, str(folder), "model.safetensors", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "old")
    (folder / "model.safetensors").unlink()
    for read in readers(folder):
        read()


def test_an_index_that_names_the_single_file(folder):
    """It may even leave out tensors: transformers reads all of the file."""
    tensors = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(sorted(tensors)[1:], "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert hf.find_weights(folder) == dict.fromkeys(tensors, folder / "model.safetensors")
    for read in readers(folder):
        read()


def test_a_tensor_in_two_shards(folder):
    weight_map = shard(folder)
    (folder / "model.safetensors").unlink()
    name, other = sorted(weight_map)[0], folder / "model-00002-of-00002.safetensors"
    tensors = load_file(other)
    save_file(tensors | {name: torch.zeros(384, 32)}, other, {"format": "pt"})
    for read in readers(folder)[:2]:
        with pytest.raises(InputError, match=f"holds tensor {name}, which the index places in model-00001"):
            read()


@pytest.mark.parametrize("file", ["../model/model.safetensors", "/etc/passwd", 3])
def test_an_index_that_names_no_file_of_its_folder(file, folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": file}}))
    refused(folder, "lm_head.weight", str(file), "same folder")


def test_an_adapter_beside_the_weights(folder):
    """transformers would load the adapter's base model."""
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "adapter_config.json", "Merge the adapter")


def test_what_is_read_is_what_transformers_reads(folder):
    """With pytorch_model.bin and Mistral's own consolidated.safetensors beside."""
    torch.save({}, folder / "pytorch_model.bin")
    save_file({"tok_embeddings.weight": torch.zeros(2)}, folder / "consolidated.safetensors")
    ours = load_decoder(folder, torch.float32, torch.device("cpu")).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert all(torch.equal(ours[name].float(), theirs[name]) for name in theirs)


@pytest.mark.parametrize("number", [0, 5, 319])
def test_two_tokens_for_one_id(number, folder):
    """The special token, and two of the vocabulary."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    names = {str(i): {"content": tokenizer.id_to_token(i)} for i in (0, 5, 319)} | {"320": {"content": "<new>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": names}))
    tokenizer_sha256(folder / "tokenizer.json")
    names[str(number)] = {"content": "<other>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": names}))
    with pytest.raises(InputError, match=f"has '<other>' for id {number}, tokenizer.json"):
        open_checkpoint(str(folder), "BASE")


# --- the hub -------------------------------------------------------------------------------------------------------


@pytest.fixture(name="hub")
def fixture_hub(folder, tmp_path, monkeypatch):
    """A repository in the cache of the hub, as snapshot_download leaves it; what was asked of it."""
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "c0ffee"
    shutil.copytree(folder, snapshot)
    asked = []

    def download(name, allow_patterns, revision=None):
        asked.append((name, revision, tuple(allow_patterns)))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.file_exists", lambda name, file, revision: (snapshot / file).exists())
    return snapshot, asked


def test_a_revision_of_a_hub_id(hub, tmp_path, monkeypatch):
    snapshot, asked = hub
    assert hf.fetch("owner/name@v1.0") == snapshot
    assert [call[:2] for call in asked] == [("owner/name", "v1.0"), ("owner/name", "c0ffee")]
    asked.clear()
    assert hf.fetch("owner/name") == snapshot
    assert [call[:2] for call in asked] == [("owner/name", None), ("owner/name", "c0ffee")]  # both of one commit
    with pytest.raises(InputError, match="neither a local folder nor a hub id"):
        hf.fetch("name@v1.0")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="owner/name is a local folder, which has no revisions"):
        hf.fetch("owner/name@v1.0")


def test_a_repository_with_a_single_file_and_an_index_of_shards(hub):
    snapshot, asked = hub
    shard(snapshot)
    with pytest.raises(InputError, match=r"owner/name: the repository has model.safetensors, .* and model.safetensors.index.json"):
        hf.fetch("owner/name")
    assert len(asked) == 1  # before the weights are downloaded
    (snapshot / "model.safetensors").unlink()
    assert hf.fetch("owner/name") == snapshot
    assert asked[-1][2] == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
