"""merge.py beside mergekit on the CPU: wall time, a further t, peak memory, and both against a float64 reference.

    python tests/bench/merge.py [--rounds 5] [--shape 0.5b | wide]

The pair is Qwen2-shaped with random bf16 weights: `0.5b` is Qwen2.5-0.5B (494 M parameters, tied), `wide` has one tensor
of 1 GB. CPT differs by 2 % (LERP) in even layers and by 10 % (SLERP) in odd ones. Each side is a process of its own on
files that lie in the page cache, and they take turns; mergekit is tried at several settings once and then runs at its
best. Results go to tests/bench/results/.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
from machine import cpu_name

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

    Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="<|endoftext|>")).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


# --- the two sides -------------------------------------------------------------------------------------------------


def measure(command: list[str]) -> dict:
    """Wall seconds and peak resident bytes of a process (and of its children, which mergekit has none of)."""
    os.sync()  # else one side's pages, still on their way to the disk, slow the other's writing
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.append(process.stderr.read()))
    reader.start()
    _, status, usage = os.wait4(process.pid, 0)
    reader.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: {errors[0][-2000:]}")
    return {
        "s": time.perf_counter() - start,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss * 1024 / 1e6,
    }


def ours(pair: tuple[Path, Path], out: Path, *flags: str) -> dict:
    """One run of merge.py into a fresh folder."""
    shutil.rmtree(out, ignore_errors=True)
    return measure([sys.executable, "merge.py", *map(str, pair), str(out), *flags])


def peer(config: Path, out: Path, flags: list[str]) -> dict:
    """One run of mergekit-yaml into a fresh folder."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "mergekit.scripts.run_yaml", str(config), str(out), *flags]
    return measure(command)


def differences(pair: tuple[Path, Path], mine: Path, theirs: Path, t: float) -> dict:
    """Both results against SLERP in float64, and against each other: units in the last place of the larger term."""
    import torch
    from safetensors import safe_open

    worst = {
        "ours_ulp": 0.0,
        "mergekit_ulp": 0.0,
        "unequal_elements": 0,
        "elements": 0,
        "branches": {"lerp": 0, "slerp": 0},
    }
    files = [safe_open(next(folder.glob("*.safetensors")), "pt") for folder in (*pair, mine)]
    where = {name: f for path in theirs.glob("*.safetensors") for f in [safe_open(path, "pt")] for name in f.keys()}  # noqa: SIM118
    for name in files[0].keys():  # noqa: SIM118
        a, b, x = (f.get_tensor(name).flatten() for f in files)
        y = where[name].get_tensor(name).flatten()
        dot, aa, bb = (sum(float(p.double() @ q.double()) for p, q in zip(u.split(1 << 22), v.split(1 << 22), strict=True))
                       for u, v in ((a, b), (a, a), (b, b)))  # fmt: skip
        cos = min(1.0, dot / (aa * bb) ** 0.5) if aa and bb else 0.0
        if abs(cos - 0.9995) < 1e-5:
            continue
        theta = float(np.arccos(cos))
        wa, wb = (1 - t, t) if cos > 0.9995 else (np.sin((1 - t) * theta) / np.sin(theta), np.sin(t * theta) / np.sin(theta))
        worst["branches"]["lerp" if cos > 0.9995 else "slerp"] += 1
        worst["unequal_elements"] += int((x != y).sum())
        worst["elements"] += x.numel()
        for p, q, u, v in zip(*(z.split(1 << 22) for z in (a, b, x, y)), strict=True):
            terms = wa * p.double(), wb * q.double()
            larger = torch.maximum(torch.maximum(*(term.abs() for term in terms)), sum(terms).abs()).clamp_min(2.0**-126)
            ulp = torch.exp2(larger.log2().floor() - 7)
            for key, found in (("ours_ulp", u), ("mergekit_ulp", v)):
                worst[key] = max(worst[key], float(((found.double() - sum(terms)).abs() / ulp).max()))
    return worst


# --- the runs ------------------------------------------------------------------------------------------------------


def compare(pair: tuple[Path, Path], folder: Path, rounds: int) -> dict:
    """Wall time and memory in turn, then the weights."""
    config, t = folder / "config.yml", "0.3"
    measure([sys.executable, "merge.py", *map(str, pair), "--t", t, "--emit-mergekit", str(config)])
    settings = {name: peer(config, folder / "theirs", flags) for name, flags in PEER_SETTINGS.items()}
    best = min(settings, key=lambda name: settings[name]["s"])
    runs = {"mergekit": [], "ours": [], "ours, a further t": [], "ours, sweep of 3": []}
    (folder / "kept").mkdir()
    ours(pair, folder / "kept" / "first", "--t", "0.5")  # leaves the sums
    (folder / "fresh").mkdir()
    for _ in range(rounds):
        runs["mergekit"].append(peer(config, folder / "theirs", PEER_SETTINGS[best]))
        runs["ours"].append(ours(pair, folder / "fresh" / "mine", "--t", t))
        runs["ours, a further t"].append(ours(pair, folder / "kept" / "mine", "--t", t))
        shutil.rmtree(folder / "fresh" / "mine")
        runs["ours, sweep of 3"].append(ours(pair, folder / "fresh" / "mine", "--sweep", f"0.1,{t},0.7"))
    result = {name: {key: statistics.median(r[key] for r in rows) for key in rows[0]} for name, rows in runs.items()}
    result["ratio"] = statistics.median(o["s"] / p["s"] for o, p in zip(runs["ours"], runs["mergekit"], strict=True))
    result["ratio_further_t"] = statistics.median(
        o["s"] / p["s"] for o, p in zip(runs["ours, a further t"], runs["mergekit"], strict=True)
    )
    result["ratio_further_t_of_a_sweep"] = statistics.median(
        (three["s"] - one["s"]) / 2 / p["s"]
        for three, one, p in zip(runs["ours, sweep of 3"], runs["ours"], runs["mergekit"], strict=True)
    )
    return result | {
        "mergekit_setting": best,
        "mergekit_settings_s": {name: r["s"] for name, r in settings.items()},
        "import_torch_mb": measure([sys.executable, "-c", "import torch"])["peak_mb"],
        "import_numpy_mb": measure([sys.executable, "-c", "import numpy"])["peak_mb"],
        "weights": differences(pair, folder / "fresh" / "mine" / f"t-{t}", folder / "theirs", float(t)),
    }


def main() -> None:
    """Run and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="counted runs of each side (default 5)")
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--ours-only", action="store_true", help="memory and time of our side alone")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In a process of its own: Linux counts the parent's size at the start into a child's peak.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as maker:
            pair = maker.submit(make_pair, folder / "pair", SHAPES[args.shape]).result()
        if args.ours_only:
            rows = [ours(pair, folder / str(i) / "out", "--t", "0.3") for i in range(args.rounds)]
            result = {"ours": {key: statistics.median(r[key] for r in rows) for key in rows[0]},
                      "import_torch_mb": measure([sys.executable, "-c", "import torch"])["peak_mb"]}  # fmt: skip
        else:
            result = compare(pair, folder, args.rounds)
    versions = {p: version(p) for p in ("mergekit", "torch", "numpy", "transformers")} | {"python": platform.python_version()}
    record = {
        "device": cpu_name(),
        "cores": os.cpu_count(),
        "versions": versions,
        "shape": args.shape,
        "rounds": args.rounds,
    }
    path = Path(__file__).parent / "results" / f"merge-{args.shape}.json"
    path.write_text(json.dumps(record | result, indent=1) + "\n")
    print(json.dumps(result, indent=1), path, sep="\n")


if __name__ == "__main__":
    main()
