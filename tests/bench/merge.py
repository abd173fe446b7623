"""merge.py beside mergekit on the CPU: wall time, a further t, peak memory, and both against a float64 reference.

    python tests/bench/merge.py [--rounds 5] [--shape 0.5b | wide]

The pair is Qwen2-shaped with random bf16 weights: `0.5b` is Qwen2.5-0.5B (494 M parameters, tied), `wide` has one tensor
of 1 GB. CPT differs by 2 % (LERP) in even layers and by 10 % (SLERP) in odd ones. Each side is a process of its own on
files that lie in the page cache, and they take turns; mergekit is tried at several settings once and then runs at its
best. Results go to tests/bench/results/.
"""

import json
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {
    "0.5b": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                 num_key_value_heads=2, vocab_size=151936),
    "wide": dict(hidden_size=2048, intermediate_size=512, num_hidden_layers=2, num_attention_heads=16,
                 num_key_value_heads=2, vocab_size=262144),
}  # fmt: skip
PEER_SETTINGS = {
    "default": [], "async": ["--async-write"], "async, 200M shards": ["--async-write", "--out-shard-size", "200M"],
    "async, 1 thread": ["--async-write", "--num-threads", "1"],
}  # fmt: skip


# --- the pair ------------------------------------------------------------------------------------------------------


def shapes_of(c: dict) -> dict[str, list[int]]:
    """Qwen2's tensors, tied."""
    d, f, kv = (
        c["hidden_size"],
        c["intermediate_size"],
        c["hidden_size"] // c["num_attention_heads"] * c["num_key_value_heads"],
    )
    shapes = {"model.embed_tokens.weight": [c["vocab_size"], d]}
    for i in range(c["num_hidden_layers"]):
        layer = {"self_attn.q_proj.weight": [d, d], "self_attn.k_proj.weight": [kv, d], "self_attn.v_proj.weight": [kv, d],
                 "self_attn.q_proj.bias": [d], "self_attn.k_proj.bias": [kv], "self_attn.v_proj.bias": [kv],
                 "self_attn.o_proj.weight": [d, d], "mlp.gate_proj.weight": [f, d], "mlp.up_proj.weight": [f, d],
                 "mlp.down_proj.weight": [d, f], "input_layernorm.weight": [d], "post_attention_layernorm.weight": [d]}  # fmt: skip
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": [d]}


def make_pair(folder: Path, shape: dict) -> tuple[Path, Path]:
    """BASE and CPT below the folder."""
    from nanomed import shards

    shapes = shapes_of(shape)
    plan = shards.plan({name: ("BF16", s) for name, s in shapes.items()}, shards.SHARD_BYTES)
    ((file, entries),) = plan.items()
    paths = folder / "base", folder / "cpt"
    for path in paths:
        path.mkdir(parents=True)
        config = shape | dict(
            architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_act="silu", max_position_embeddings=32768,
            rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True, torch_dtype="bfloat16", bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        (path / "config.json").write_text(json.dumps(config))
        write_tokenizer(path)
        shards.write_header(path / file, entries)
    rng, start = np.random.default_rng(0), len(shards.header(entries))
    with (paths[0] / file).open("r+b") as base, (paths[1] / file).open("r+b") as cpt:
        for name, entry in entries.items():
            layer = int(name.split(".")[2]) if ".layers." in name else 0
            for at in range(0, shards.n_elements(entry["shape"]), 1 << 24):
                n = min(1 << 24, shards.n_elements(entry["shape"]) - at)
                a = rng.standard_normal(n, np.float32) * np.float32(0.02)
                b = a + rng.standard_normal(n, np.float32) * np.float32(0.02 * (0.1 if layer % 2 else 0.02))
                for out, x in ((base, a), (cpt, b)):
                    out.seek(start + entry["data_offsets"][0] + 2 * at)
                    out.write((x.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    return paths


def write_tokenizer(folder: Path) -> None:
    """The smallest tokenizer that both sides accept."""
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="<|endoftext|>")).save(
        str(folder / "tokenizer.json")
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
