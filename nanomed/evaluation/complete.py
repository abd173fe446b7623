"""Complete: see a model continue a text.

    python eval.py complete merged "Bei akuter Pankreatitis"
    python eval.py complete runs/miniature "Fragen und Antworten zur Migräne" --temperature 0.5 --seed 1

Greedy, or sampled at a temperature, until the model ends the text. A small model that has read little repeats itself, or ends at
once, where it is greedy; it shows more of what it has learnt in the form of its own documents (the second line) and sampled.
The text is read as it stands, without a chat template: `generate` asks a model through its own. Needs neither transformers nor
lm-eval.
"""

import argparse
import math
from collections.abc import Callable, Iterator

import torch
from tokenizers import Tokenizer
from torch import Tensor

from nanomed import InputError
from nanomed.config import has_bf16_hardware
from nanomed.evaluation.inference import continuation, greedy
from nanomed.evaluation.loading import load_decoder, load_tokenizer
from nanomed.hf import fetch
from nanomed.prompts import end_tokens
from nanomed.tokenizer import ENDS, bos_id, tokenizer_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder, hub id or run folder of train.py")
    add("text", metavar="TEXT", help="what the model continues")
    add("--max-new-tokens", type=int, default=60, metavar="N", help="tokens to generate at most (default: %(default)s)")
    add("--temperature", type=float, default=0.0, metavar="T", help="of sampling; 0 is greedy (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of sampling (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Print the text and, as they come, the model's tokens. InputError for whatever cannot be done."""
    if args.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {args.max_new_tokens}: expected 1 or more")
    if not 0 <= args.temperature < math.inf:
        raise InputError(f"--temperature {args.temperature}: expected 0 or more")
    folder = fetch(args.model, "MODEL")
    tokenizer = load_tokenizer(folder)
    tokens = encode(tokenizer, tokenizer_config(folder), args.text)
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu and has_bf16_hardware() else torch.float32
    model = load_decoder(folder, dtype, torch.device("cuda" if on_gpu else "cpu"))
    context = model.config.max_position_embeddings
    if context and len(tokens) + args.max_new_tokens > context:
        raise InputError(
            f"TEXT has {len(tokens)} tokens, and with --max-new-tokens {args.max_new_tokens} exceeds the model's context "
            f"of {context}; shorten one of them"
        )
    # Pre-training ends documents with a token that an instruct model's configuration need not name.
    ends = end_tokens(folder) | {i for name in ENDS if (i := tokenizer.token_to_id(name)) is not None}
    choose = sampled(args.temperature, args.seed) if args.temperature else greedy
    print(args.text, end="", flush=True)
    try:
        for piece in pieces(tokenizer, tokens, continuation(model, folder, tokens, args.max_new_tokens, ends, choose)):
            print(piece, end="", flush=True)
    finally:
        print()


def encode(tokenizer: Tokenizer, config: dict, text: str) -> list[int]:
    """The text's tokens, after BOS where the tokenizer's own post-processor puts one."""
    try:
        text.encode()
    except UnicodeEncodeError:  # how Python hands over arguments that are not UTF-8
        raise InputError("TEXT is not UTF-8") from None
    tokens, bos = tokenizer.encode(text, add_special_tokens=False).ids, bos_id(tokenizer, config)
    if bos is not None and tokens[:1] != [bos]:
        tokens = [bos, *tokens]
    if not tokens:
        raise InputError("TEXT is empty, and the tokenizer puts no BOS before it; give a word to begin with")
    return tokens


def sampled(temperature: float, seed: int) -> Callable[[Tensor], int]:
    """Choose from the softmax of logits / temperature; on the CPU, so that a seed gives the same draws on any device."""
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: Tensor) -> int:
        scaled = (logits - logits.max()).cpu().double() / temperature  # at most 0: no temperature is too low
        return int(torch.multinomial(scaled.softmax(0), 1, generator=generator))

    return choose


def pieces(tokenizer: Tokenizer, before: list[int], tokens: Iterator[int]) -> Iterator[str]:
    """The tokens' text, in whole characters: one may be split over several tokens, and what a token reads as depends on
    the ones before it. A character that never becomes whole is left out."""
    ids, shown = list(before), tokenizer.decode(before)
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)  # whole again: the tokenizers' own stream fails where byte tokens change what was said
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            shown = text
