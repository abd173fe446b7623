"""What a merge costs and gains, measured on the model in memory: the three losses that `merge.py tune` weighs.

All three are in bits per byte of text, so that they can be added:
    domain, general    -log2 p of held-out text of the domain, and of other text
    chat               KL(BASE ‖ merged) on BASE's own greedy answers to chat prompts: how far the merged model has moved
                       from the instruct model on instructions

Every other window and every other prompt is withheld from the search; `check` measures the result there. Chat keeps BASE's
log-probabilities of every answer token: 4 bytes x vocabulary x answer tokens of memory.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from nanomed import InputError
from nanomed.batches import Batch, Shape, pack, pack_documents
from nanomed.kernels.linear_cross_entropy import IGNORED
from nanomed.model import Decoder
from nanomed.prompts import end_tokens, read_prompts, render
from nanomed.stream import Stream, open_sources

ANSWER_TOKENS = 32  # of BASE's answer to a prompt
HALVES = ("search", "check")


class Text:
    """Held-out bins, cut into windows; the even ones to search with, the odd ones to check with."""

    def __init__(self, folder: str, vocab_size: int, tokenizer_sha256: str, seq_len: int, n_tokens: int, flag: str):
        bins = open_sources([folder])[0][0]
        if bins.tokenizer_sha256 != tokenizer_sha256:
            raise InputError(f"{flag} {folder}: was made with another tokenizer than BASE's; prepare it with --tokenizer BASE")
        self.stream = Stream([(bins, 1.0)], None, vocab_size)
        total = self.stream.start_of(1)
        self.stop = min(total, n_tokens)
        self.n_windows = -(-self.stop // seq_len)
        if self.n_windows < 2:
            raise InputError(f"{flag} {folder}: {self.stop:,} of its {total:,} tokens (--set-tokens {n_tokens}) are less than two "
                             f"windows of {seq_len}; give more text, or a larger --set-tokens")  # fmt: skip
        self.shape = Shape(seq_len, 1)
        self.bytes_per_label = bins.n_bytes / (total - bins.n_docs)

    def bits_per_byte(self, model: Decoder, half: str, device: torch.device) -> float:
        """Σ -log2 p over one half of the windows / the bytes of their text, estimated: labels x the whole set's bytes per label."""
        nll, n_labels, one = torch.zeros((), dtype=torch.float64, device=device), 0, torch.ones((), device=device)
        for window in range(HALVES.index(half), self.n_windows, 2):
            batch = pack(self.stream, window, self.shape, self.stop)
            n_labels += int((batch.labels != IGNORED).sum())
            nll += model(batch.to(device), one)
        return finite(nll.item()) / math.log(2) / (n_labels * self.bytes_per_label)


class Chat:
    """Chat prompts with BASE's answers to them and BASE's log-probabilities there."""

    def __init__(self, path: Path, folder: Path, model: Decoder, device: torch.device):
        """model: holds BASE's weights. path: JSONL of {"prompt": ...} or {"messages": [...]}."""
        self.tokenizer, self.device = Tokenizer.from_file(str(folder / "tokenizer.json")), device
        texts = [render(folder, messages) for messages in read_prompts(path).values()]
        if len(texts) < 2:
            raise InputError(f"--chat {path}: needs at least two prompts, one to search with and one to check with")
        prompts = [self.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        answers = greedy_answers(model, prompts, end_tokens(folder), device)
        self.halves = {}
        for i, half in enumerate(HALVES):
            batch, rows = self._rows(prompts[i::2], answers[i::2])
            n_bytes = sum(len(self.tokenizer.decode(a, skip_special_tokens=False).encode()) for a in answers[i::2])
            self.halves[half] = batch, rows, log_probs(model, model.hidden(batch), rows), n_bytes

    def _rows(self, prompts: list[list[int]], answers: list[list[int]]) -> tuple[Batch, Tensor]:
        """All conversations in one batch, and the positions that predict an answer's token."""
        batch = pack_documents([p + a for p, a in zip(prompts, answers, strict=True)]).to(self.device)
        starts = batch.cu_seqlens[:-1].tolist()
        rows = [torch.arange(start + len(p) - 1, start + len(p) + len(a) - 1)
                for start, p, a in zip(starts, prompts, answers, strict=True)]  # fmt: skip
        return batch, torch.cat(rows).to(self.device)

    def kl(self, model: Decoder, half: str) -> float:
        """Σ KL(BASE ‖ model) in bits over the answered tokens / bytes of the answers."""
        batch, rows, base, n_bytes = self.halves[half]
        states = model.hidden(batch)  # once; only the logits, over the whole vocabulary, are too large for one piece
        total = sum(F.kl_div(log_probs(model, states, r), b, reduction="sum", log_target=True).double()
                    for r, b in zip(rows.split(64), base.split(64), strict=True))  # fmt: skip
        return max(0.0, finite(total.item())) / math.log(2) / max(1, n_bytes)


def finite(loss: float) -> float:
    """The loss; InputError if it is NaN or infinite, since no comparison with it means anything."""
    if not math.isfinite(loss):
        raise InputError("a loss of the merged model is not finite: its numbers exceed what its dtype can represent")
    return loss


def log_probs(model: Decoder, states: Tensor, rows: Tensor) -> Tensor:  # (N, D), (R,) -> (R, V) float32
    """Of the next token at the chosen positions. states: the model's hidden states of a batch."""
    return model.logits(states, rows).float().log_softmax(-1)


def greedy_answers(model: Decoder, prompts: list[list[int]], ends: set[int], device: torch.device) -> list[list[int]]:
    """The likeliest next token, ANSWER_TOKENS times, up to and including an end token. All prompts at once, without a cache."""
    answers: list[list[int]] = [[] for _ in prompts]
    for _ in tqdm(range(ANSWER_TOKENS), "BASE answers", leave=False, delay=2):
        open_ = [i for i, a in enumerate(answers) if not (a and a[-1] in ends)]
        if not open_:
            break
        batch = pack_documents([prompts[i] + answers[i] for i in open_]).to(device)
        last = batch.cu_seqlens[1:].long() - 1
        for i, token in zip(open_, model.logits(model.hidden(batch), last).argmax(-1).tolist(), strict=True):
            answers[i].append(token)
    return answers
