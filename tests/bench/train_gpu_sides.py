"""The two sides of train_gpu.py: our model and transformers with Liger's kernels, on the same weights and windows.

A side is a function (model's shape, command line) -> (model, optimiser, loss of a window, clipping).
"""

import inspect
from functools import partial

import numpy as np
import torch

MODELS = {"qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct", "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
          "qwen3-8b": "Qwen/Qwen3-8B", "tiny": None}  # fmt: skip
LR, CLIP, DECAY, BETAS, MEAN_DOCUMENT = 1e-5, 1.0, 0.1, (0.9, 0.95), 700


def shape_of(name: str):
    """The ModelConfig of a model of MODELS."""
    from nanomed.hf import ModelConfig
    from nanomed.shapes import MODELS as SHAPES

    if name == "tiny":
        return ModelConfig(512, 64, 128, 2, 4, 2, 16, 1e-6, 1e4, False, qkv_bias=True)
    return SHAPES[MODELS[name]]


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """Random weights, the same for every model with the same parameter names."""
    for i, (name, param) in enumerate(sorted(model.named_parameters())):
        generator = torch.Generator(param.device).manual_seed(i)
        if param.ndim > 1:
            param.normal_(0.0, 0.02, generator=generator)
        else:
            param.fill_(1.0) if "norm" in name else param.zero_()


def window(n: int, vocab_size: int, seed: int) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """(document lengths, tokens (n,), labels (n,)) of a packed window: labels are -100 at the documents' ends."""
    rng, lengths = np.random.default_rng(seed), []
    while sum(lengths) < n:
        lengths.append(min(max(8, int(rng.exponential(MEAN_DOCUMENT))), n - sum(lengths)))
    tokens = torch.from_numpy(rng.integers(0, vocab_size, n))
    labels = tokens.roll(-1)
    labels[np.cumsum(lengths) - 1] = -100
    return np.array(lengths), tokens, labels


def our_side(c, args, float8: bool = False):
    """Our model, its optimiser, the function that makes the loss of a window, and the clipping."""
    from nanomed import optim, parallel
    from nanomed.batches import Batch
    from nanomed.config import Config
    from nanomed.kernels.providers import default, kernels
    from nanomed.model import Decoder

    config = Config(
        precision="pure-bf16" if args.states != "fp32" else "bf16", optimizer_states=args.states, lr=LR,
        weight_decay=DECAY, recompute=args.recompute, compile=args.device == "cuda", float8=float8,
    )  # fmt: skip
    world = parallel.start(config)
    with torch.device("meta"):
        model = Decoder(c, torch.bfloat16, kernels(default()))
    if args.states != "fp32":
        model.to(torch.bfloat16)
    parallel.parallelize(model, config, world)
    model.to_empty(device=world.device)
    fill(model)
    optimizer = optim.make_adamw(model, config)
    if args.states == "int8" and type(optimizer) is torch.optim.AdamW:
        raise RuntimeError("this version of nanomed has no 8-bit states")

    def loss_of(lengths, tokens, labels, scale):
        borders = np.concatenate(([0], np.cumsum(lengths)))
        positions = torch.from_numpy(np.arange(len(tokens)) - np.repeat(borders[:-1], lengths))
        padded = np.pad(borders, (0, max(0, 65 - len(borders))), mode="edge").astype(np.int32)  # one shape for all steps
        extent = torch.tensor([len(lengths), lengths.max()])
        batch = Batch(tokens, labels, positions, torch.from_numpy(padded), extent, 0)
        return model((batch.pinned() if world.device.type == "cuda" else batch).to(world.device), scale)

    return model, optimizer, loss_of, lambda: optim.clip(model, optimizer, CLIP)


def peer_side(c, args):
    """The same of transformers, with Liger's kernels on a GPU."""
    import transformers

    kind = "qwen2" if c.qkv_bias else "qwen3" if c.qk_norm else "mistral"
    if args.device == "cuda":
        import liger_kernel.transformers as liger

        getattr(liger, f"apply_liger_kernel_to_{kind}")()
    fields = ("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
              "rms_norm_eps tie_word_embeddings").split()  # fmt: skip
    options = {name: getattr(c, name) for name in fields} | {"max_position_embeddings": 32768, "sliding_window": None}
    if kind == "qwen2":
        del options["head_dim"]
    config = getattr(transformers, f"{kind.capitalize()}Config")(
        **options, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}
    )
    attention = "sdpa"
    if args.device == "cuda":
        has_4, has_2 = transformers.utils.is_flash_attn_4_available(), transformers.utils.is_flash_attn_2_available()
        attention = "flash_attention_4" if has_4 else "flash_attention_2" if has_2 else register_varlen()
    low = args.states != "fp32"
    with torch.device(args.device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16 if low else torch.float32, attn_implementation=attention
        )
    fill(model.train())
    if args.recompute != "none":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    known = dict(lr=LR, betas=BETAS, weight_decay=DECAY)
    if low:
        from torchao import optim as low_bit

        optimizer = low_bit.AdamW8bit(model.parameters(), **known, bf16_stochastic_round=True)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), **known, fused=True)

    def loss_of(lengths, tokens, labels, scale):
        positions = torch.cat([torch.arange(n) for n in lengths])
        borders = torch.from_numpy(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32))
        on_host = (x.pin_memory() if args.device == "cuda" else x for x in (tokens[None], labels[None], positions[None], borders))
        ids, labels, positions, borders = (x.to(args.device, non_blocking=True) for x in on_host)
        longest = int(lengths.max())
        packed = dict(cu_seq_lens_q=borders, cu_seq_lens_k=borders, max_length_q=longest, max_length_k=longest)
        if args.device == "cuda":  # all logits in one chunk: Liger's default, 128 tokens of Qwen's, took 170 ms of a step more
            packed["chunk_mem_const"] = -(-c.vocab_size // c.hidden_size)
        with torch.autocast(args.device, torch.bfloat16, enabled=not low):
            # num_items_in_batch 1: the loss is a sum, to be scaled as ours is
            out = model(input_ids=ids, position_ids=positions, labels=labels, shift_labels=labels, use_cache=False,
                        num_items_in_batch=1, **packed)  # fmt: skip
        return out.loss * scale

    return model, optimizer, loss_of, lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)


def register_varlen() -> str:
    """torch's own flash-attention over packed documents, as an attention of transformers; its name there."""
    from torch.nn.attention.varlen import varlen_attn
    from transformers import AttentionInterface

    gqa = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    def forward(module, query, key, value, _mask, cu_seq_lens_q, max_length_q, **_kwargs):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        y = varlen_attn(q, k, v, *[cu_seq_lens_q] * 2, *[max_length_q] * 2, window_size=(-1, 0), **gqa)
        return y[None], None

    AttentionInterface.register("varlen", forward)
    return "varlen"


SIDES = {"ours": our_side, "transformers + liger": peer_side, "ours, float8": partial(our_side, float8=True)}
