"""Our training step beside transformers' on the CPU: same weights, tokens, threads; speed and peak memory.

    python tests/bench/train.py [--rounds 15] [--cases eager compiled packed packed-compiled] [--threads 2]
    python tests/bench/train.py --model FOLDER --cases eager --rounds 5        a real checkpoint instead

Each side runs in a process of its own (so that peak memory is its own) and they take turns step by step: whatever
else the machine does hits both. The peer is `AutoModelForCausalLM` in a plain loop: bf16 autocast, SDPA attention,
fused AdamW, clipping; for packed documents it gets position_ids, from which it makes its own block-diagonal mask. The
model is Qwen2-shaped: 15 M parameters, vocabulary 8,192. `eager` and `compiled` train 4 windows of 512 tokens, one
document each; `packed` trains a window of 2,048 tokens with documents of 200 on average. Results go to
tests/bench/results/.
"""

import argparse
import importlib
import json
import multiprocessing as mp
import platform
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from machine import cpu_name

SHAPE = dict(vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
             num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=False)  # fmt: skip
LR, CLIP, N_TOKENS = 1e-4, 1.0, 2048


def lengths(case: str) -> list[int]:
    """Document lengths of one step's 2,048 tokens."""
    if not case.startswith("packed"):
        return [512] * 4
    rng, found = np.random.default_rng(0), []
    while sum(found) < N_TOKENS:
        found.append(min(max(8, int(rng.exponential(200))), N_TOKENS - sum(found)))
    return found


def our_step(folder: str, case: str):
    """The step of train.py on one process: returns a function that makes one and gives its loss."""
    from nanomed import hf, optim, parallel, weights
    from nanomed.batches import Batch
    from nanomed.config import RECIPES
    from nanomed.model import Decoder

    config = dataclass_replace(RECIPES["miniature"], compile="compiled" in case, precision="bf16", lr=LR, weight_decay=0.0)
    world = parallel.start(config)
    with torch.device("meta"):
        model = Decoder(hf.model_config(Path(folder)), torch.bfloat16)
    parallel.parallelize(model, config, world)
    model.to_empty(device="cpu")
    weights.load_weights(model, hf.check_weights(model, Path(folder)))
    optimizer = optim.make_adamw(model, config)
    docs = np.array(lengths(case))
    borders = np.concatenate(([0], np.cumsum(docs)))
    positions = torch.from_numpy(np.arange(N_TOKENS) - np.repeat(borders[:-1], docs))
    tokens, labels = tokens_and_labels(docs)
    cu_seqlens = torch.from_numpy(borders.astype(np.int32))
    batch = Batch(tokens, labels, positions, cu_seqlens, torch.tensor([len(docs), docs.max()]), 0)
    scale = torch.tensor(1 / int((labels != -100).sum()))

    def step() -> float:
        loss = model(batch, scale)
        loss.backward()
        optim.clip(model, optimizer, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def peer_step(folder: str, case: str):
    """The same step in transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model.train()
    forward = torch.compile(model) if "compiled" in case else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    docs = lengths(case)
    tokens, labels = tokens_and_labels(docs)
    inputs = {"input_ids": tokens.view(4, -1), "shift_labels": labels.view(4, -1)}
    if case.startswith("packed"):
        position_ids = torch.cat([torch.arange(n) for n in docs])
        inputs = {"input_ids": tokens[None], "shift_labels": labels[None], "position_ids": position_ids[None]}
    n_labels = (labels != -100).sum()

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(**inputs, labels=inputs["shift_labels"], num_items_in_batch=n_labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def tokens_and_labels(docs) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens, and the next one of the same document as label."""
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, SHAPE["vocab_size"], N_TOKENS))
    labels = tokens.roll(-1)
    labels[np.cumsum(docs) - 1] = -100
    return tokens, labels


def dataclass_replace(config, **fields):
    """dataclasses.replace, imported late so that the peer's process imports nothing of ours."""
    import dataclasses

    return dataclasses.replace(config, **fields)


def worker(side: str, folder: str, case: str, threads: int, pipe) -> None:
    """Make a step whenever asked; answer (loss, seconds, peak bytes so far, those after the imports)."""
    torch.set_num_threads(threads)
    importlib.import_module("nanomed.parallel" if side == "ours" else "transformers.models.qwen2.modeling_qwen2")
    imported = peak_bytes()
    step = {"ours": our_step, "peer": peer_step}[side](folder, case)
    while pipe.recv():
        start = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - start
        pipe.send((loss, seconds, peak_bytes(), imported))


def peak_bytes() -> int:
    """Largest resident size of this process so far (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(case: str, folder: str, rounds: int, threads: int, warmup: int = 3) -> dict:
    """Both sides in turn: median milliseconds a step, the ratio pair by pair, peak memory, the first losses."""
    context, pipes, processes = mp.get_context("spawn"), {}, {}
    for side in ("ours", "peer"):
        pipes[side], theirs = context.Pipe()
        processes[side] = context.Process(target=worker, args=(side, folder, case, threads, theirs), daemon=True)
        processes[side].start()
    answers = {"ours": [], "peer": []}
    for i in range(warmup + rounds):
        for side in ("ours", "peer") if i % 2 else ("peer", "ours"):
            pipes[side].send(True)
            answers[side].append(pipes[side].recv())
    for side in pipes:
        pipes[side].send(False)
        processes[side].join()
    seconds = {side: [a[1] for a in rows[warmup:]] for side, rows in answers.items()}
    peak = {side: rows[-1][2] for side, rows in answers.items()}
    above = {side: rows[-1][2] - rows[-1][3] for side, rows in answers.items()}
    return {
        "case": case,
        "ours_ms": 1e3 * statistics.median(seconds["ours"]),
        "peer_ms": 1e3 * statistics.median(seconds["peer"]),
        "speed_ratio": statistics.median(p / o for o, p in zip(seconds["ours"], seconds["peer"], strict=True)),
        "ours_peak_mb": peak["ours"] / 1e6,
        "peer_peak_mb": peak["peer"] / 1e6,
        "memory_ratio": peak["ours"] / peak["peer"],
        "memory_ratio_above_imports": above["ours"] / above["peer"],
        "losses_ours": [a[0] for a in answers["ours"][:4]],
        "losses_peer": [a[0] for a in answers["peer"][:4]],
    }


def main() -> None:
    """Run the cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="counted steps of each side (default 15)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", nargs="+", default=["eager", "compiled", "packed", "packed-compiled"])
    parser.add_argument("--model", help="a checkpoint's folder; default: random weights of the shape above")
    args = parser.parse_args()
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        if args.model is None:
            transformers.AutoModelForCausalLM.from_config(transformers.Qwen2Config(**SHAPE)).save_pretrained(folder)
        results = []
        for case in args.cases:
            results.append(r := measure(case, args.model or folder, args.rounds, args.threads))
            print(
                f"{case:16} ours {r['ours_ms']:5.0f} ms  transformers {r['peer_ms']:5.0f} ms  {r['speed_ratio']:.2f} x  "
                f"peak {r['ours_peak_mb']:,.0f} / {r['peer_peak_mb']:,.0f} MB = {r['memory_ratio']:.2f}, "
                f"above imports {r['memory_ratio_above_imports']:.2f}  "
                f"loss {r['losses_ours'][-1]:.4f} / {r['losses_peer'][-1]:.4f}",
                flush=True,
            )
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    report = {
        "device": cpu_name() + bf16_flags(),
        "threads": args.threads,
        "versions": versions,
        "rounds": args.rounds,
        "results": results,
    }
    name = "train-cpu.json" if args.model is None else f"train-cpu-{Path(args.model).name}.json"
    path = Path(__file__).parent / "results" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)


def bf16_flags() -> str:
    """What the processor can do with bf16, as Linux names it."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    return "".join(f" {flag}" for flag in ("amx_bf16", "avx512_bf16") if flag in text)


if __name__ == "__main__":
    main()
