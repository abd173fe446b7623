"""The encoder as classify.py leaves it: its scores can be computed again, and no text is on both sides of the split."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaModel,
)

import encoder
import threshold
from classify import classify, part_of, read_labels
from encoder import load_base
from nanomed import InputError

MEDICAL, OTHER = "fieber husten arzt klinik dosis".split(), "vertrag gericht frist miete steuer".split()
SHARED = "der die und mit von auf".split()
KNOBS = {"epochs": 3, "lr": 4e-3, "batch_size": 16, "max_tokens": 24, "seed": 0}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random encoder of XLM-RoBERTa's shape: one layer, 17 words."""
    folder = tmp_path_factory.mktemp("base")
    words = ["<s>", "<pad>", "</s>", "<unk>", *MEDICAL, *OTHER, *SHARED]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    marks = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=32, **marks).save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    XLMRobertaModel(XLMRobertaConfig(vocab_size=len(words), max_position_embeddings=34, **size)).save_pretrained(folder)
    return folder


def documents(n: int = 400, noise: float = 0.1, n_invalid: int = 7) -> list[dict]:
    """Texts of 3 to 40 words, more of their own kind than of the other; a tenth of the labels are wrong."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        is_medical = rng.random() < 0.4
        pool = [*MEDICAL * (3 if is_medical else 1), *OTHER * (1 if is_medical else 3), *SHARED]
        words = rng.choice(pool, rng.integers(3, 40))
        label = "medical" if is_medical != (rng.random() < noise) else "not_medical"
        rows.append({"id": f"d{i}", "text": " ".join(words), "label": "invalid" if i < n_invalid else label})
    return [row | {"model": "annotator", "prompt_sha256": "abc"} for row in rows]


def write(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    result = classify(write(folder / "labels.parquet", documents()), folder / "clf", str(base), 0.6, **KNOBS)
    return folder, result


def test_the_folder_is_a_checkpoint_that_gives_the_stored_scores(trained):
    folder, result = trained
    tokenizer = AutoTokenizer.from_pretrained(folder / "clf")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "clf", dtype=torch.float32).eval()
    assert model.config.id2label == {0: "not_medical", 1: "medical"}
    held_out = pq.read_table(folder / "clf/held_out.parquet").to_pylist()
    texts = {row["id"]: row["text"] for row in documents()}
    assert len({row["score"] for row in held_out}) > 40, "scores that are all alike would hide what padding does to them"
    assert {row["part"] for row in held_out} == {"choose", "report"}
    for row in held_out:  # one at a time, without padding
        assert row["part"] == part_of(texts[row["id"]])
        ids = tokenizer(texts[row["id"]][: result["max_chars"]], truncation=True, max_length=24, return_tensors="pt")
        with torch.no_grad():
            expected = model(**ids).logits.softmax(-1)[0, 1].item()
        assert row["score"] == pytest.approx(expected, abs=1e-5)


def test_an_interrupted_run_ends_with_the_same_bits(trained, base, monkeypatch):
    folder, _ = trained
    save, out = encoder.save_epoch, folder / "again"

    def stop(partial, epoch, *state):
        save(partial, epoch, *state)
        if epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(encoder, "save_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        classify(folder / "labels.parquet", out, str(base), 0.6, **KNOBS)
    assert not out.exists()
    monkeypatch.setattr(encoder, "save_epoch", save)
    with pytest.raises(InputError, match=r"in which lr was 0\.004, now it is 0\.02"):
        classify(folder / "labels.parquet", out, str(base), 0.6, **KNOBS | {"lr": 0.02})
    classify(folder / "labels.parquet", out, str(base), 0.6, **KNOBS)
    for name in ("model.safetensors", "threshold.json", "scores.svg"):
        assert (out / name).read_bytes() == (folder / "clf" / name).read_bytes(), name


def test_another_threshold_needs_no_training(trained, monkeypatch, capsys):
    folder, before = trained
    monkeypatch.setattr("sys.argv", ["threshold.py", str(folder / "clf"), "--target-precision", "0.5"])
    kept = (folder / "clf/threshold.json").read_text()
    threshold.main()
    result = json.loads((folder / "clf/threshold.json").read_text())
    (folder / "clf/threshold.json").write_text(kept)
    assert result["threshold"] < before["threshold"]
    assert result["recall"][0] >= before["recall"][0]
    assert result["labels_sha256"] == before["labels_sha256"]
    assert "threshold" in capsys.readouterr().out


def test_copies_of_a_text_are_on_one_side(tmp_path):
    rows = documents(300)
    copies = [row | {"id": f"copy of {row['id']}"} for row in rows]
    parts, about = read_labels(write(tmp_path / "labels.parquet", rows + copies), 144)
    texts = [{row["text"] for row in part} for part in parts.values()]
    assert sum(map(len, texts)) == len(set.union(*texts))
    assert sum(map(len, parts.values())) == 600 - about["counts"]["invalid"]


def test_a_parquet_file_without_its_tail(tmp_path):
    path = write(tmp_path / "labels.parquet", documents())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"labels\.parquet: not a whole Parquet file"):
        read_labels(path, 100)


def test_labels_without_texts(tmp_path):
    path = write(tmp_path / "labels.parquet", [{"id": "d0", "label": "medical"}])
    with pytest.raises(InputError, match=r"labels\.parquet: .*'text'"):
        read_labels(path, 100)


def test_what_is_no_encoder(tmp_path, base, monkeypatch):
    with pytest.raises(InputError, match="cannot be loaded as an encoder"):
        load_base(str(tmp_path), 0)
    for path in base.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": None}))
    with pytest.raises(InputError, match="no padding token"):
        load_base(str(tmp_path), 0)
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(InputError, match=r"no tokenizer\.json, which scoring needs"):
        load_base(str(base), 0)
