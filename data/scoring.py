"""Scoring: what a worker of the sweep does: one input file in, its scores out, in the file's order.

A thread reads and tokenises (`tokenizers` releases the GIL and uses the cores it is given) while the device computes.
Documents are collected in windows, sorted by length and cut into batches of equal token budget: a batch then holds
documents of nearly equal length and next to no padding, and short documents come in large batches. Texts are capped in
characters before they are tokenised: the Unigram tokenizer reads everything and truncates afterwards.

The score is the softmax probability of class 1. On a GPU the encoder runs in bf16; where the GPU has none (before
Ampere) by autocast to fp16, since XLM-R may overflow where all of it is in fp16. Its last layer and the softmax are in
fp32. On the CPU all is fp32, and a batch gives the scores of one document at
a time. classify.py scores with this code, too, so a threshold is applied to the scores it was chosen from.

The file of scores is committed by its rename and records the configuration it was made with: an input that has one is
skipped. Memory: two windows of token ids, 512 tokens × 8,192 documents × 4 bytes at most, beside the model.
"""

import fcntl
import functools
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from documents import read_about, read_documents, write_parquet
from finding import find_files, first_twice
from nanomed import InputError, first_line
from nanomed.files import sha256_of
from nanomed.prefetch import Prefetch
from normalising import is_blank
from orphans import end_with_parent
from reading import SUFFIXES

WINDOW = 8192  # documents that are sorted together
COLUMNS = {"id": "string", "file": "string", "row": "int64", "score": "float32"}


@dataclass(frozen=True)
class Scoring:
    """How to score texts, as a step for datatrove's executors: task `rank` of `world_size` scores every world_size-th file."""

    classifier: str
    identity: str  # what decides the scores; in a sweep JSON, which goes into each file of scores
    max_chars: int
    max_tokens: int
    dtype: str = "auto"  # or "bf16", "fp16", "fp32"
    batch_tokens: int = 0  # 0: 65,536 on a GPU, 4,096 on the CPU
    files: tuple[str, ...] = ()
    out: str = ""
    text_key: str = "text"
    id_key: str = "id"
    threads: int = 1
    raises: bool = False  # for executors that let the other tasks go on; datatrove's local one would end them

    def __call__(self, data, rank: int, world_size: int) -> None:
        """Score the files of this task; an InputError is left where sweep.py finds it, and fails the task at its end."""
        failed: InputError | None = None
        if not self.raises:
            end_with_parent()
        os.environ["RAYON_NUM_THREADS"] = str(self.threads)  # of the tokenizer
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        for name in self.files[rank::world_size]:
            note = Path(self.out, "errors", f"{Path(name).name}.txt")
            note.unlink(missing_ok=True)
            try:
                [path] = find_files([name])
                if not is_committed(path, Path(self.out), self.identity):
                    score_file(self, path)
            except InputError as error:
                failed = failed or error
                note.parent.mkdir(parents=True, exist_ok=True)
                note.write_text(f"{error}\n", "utf-8")
        if failed and self.raises:
            raise failed


def score_path(path: Path, out: Path) -> Path:
    """Where the scores of an input go: under its name without .parquet, .jsonl.gz and so on."""
    stem = next((path.name.removesuffix(suffix) for suffix in SUFFIXES if path.name.endswith(suffix)), path.name)
    return out / "scores" / f"{stem}.parquet"


def find_inputs(inputs: list[str], out: Path) -> list[Path]:
    """`find_files`; InputError where two inputs would share a file of scores."""
    files = find_files(inputs)
    if twice := first_twice(score_path(path, out).name for path in files):
        raise InputError(f"two inputs would share scores/{twice}; give each once, rename one, or take them separately")
    return files


def is_committed(path: Path, out: Path, identity: str) -> bool:
    """Is this input scored? InputError if it was with another configuration, or has changed since."""
    target = score_path(path, out)
    if not target.exists():
        return False
    found, expected = read_about(target), about_scores(path, identity)
    for key in expected:
        if found.get(key) != expected[key]:
            what = f"{key} was {found.get(key)}, now it is {expected[key]}"
            raise InputError(f"{target}: made with another configuration: {what}; choose another --out, or delete it")
    return True


def about_scores(path: Path, identity: str) -> dict:
    """What decides the scores of an input: the configuration and the input."""
    return json.loads(identity) | {"input": path.name, "size": path.stat().st_size}


def classifier_identity(folder: Path) -> str:
    """sha256 over the classifier's weights, configuration and tokenizer."""
    try:
        return sha256_of(folder / name for name in ("config.json", "tokenizer.json", "model.safetensors"))
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}; expected a classifier of data/classify.py") from None


def score_file(task: Scoring, path: Path) -> None:
    """Write the scores of an input; an empty text has none (null)."""
    import torch

    torch.set_num_threads(task.threads)
    place = Path(task.out, "progress", path.name)
    place.parent.mkdir(parents=True, exist_ok=True)
    keys = (task.id_key, task.text_key)
    documents = (tuple(document[key] for key in keys) for document in read_documents(path, keys))

    def rows() -> Iterator[dict]:
        row = 0
        for window in score_documents(task, documents, path):
            for identifier, score in window:
                yield {"id": identifier, "file": path.name, "row": row, "score": score}
                row += 1
            place.write_text(str(row))

    about = about_scores(path, task.identity) | {"computed_in": dtype_of(task)}
    write_parquet(score_path(path, Path(task.out)), rows(), COLUMNS, about)


def score_documents(task: Scoring, documents: Iterable[tuple[str, str]], source: Path) -> Iterator[list[tuple[str, float | None]]]:
    """(id, text) of documents → (id, score), a window at a time; an empty text has no score (None).

    InputError where a text's score is not a number. source: where the documents are from, for its message.
    """
    scorer, n_scored = load_scorer(task), 0
    with Prefetch(read_windows(task, documents), depth=1) as windows:
        for ids, tokens in windows:
            scores = [score if text else None for score, text in zip(scorer(tokens).tolist(), tokens, strict=True)]
            for number, (identifier, score) in enumerate(zip(ids, scores, strict=True), n_scored + 1):
                if score is not None and np.isnan(score):
                    what = f"document {number}, {identifier!r}: the score is not a number"
                    raise InputError(f"{source}: {what}; train {task.classifier} again, or give --dtype fp32")
            yield [*zip(ids, scores, strict=True)]
            n_scored += len(ids)


def read_windows(task: Scoring, documents: Iterable[tuple[str, str]]) -> Iterator[tuple[list[str], list[list[int]]]]:
    """(ids, token ids) of up to WINDOW documents; no tokens for an empty text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(task.classifier) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(task.max_tokens)
    ids, tokens, texts = [], [], []

    def tokenise() -> None:
        codes = iter(tokenizer.encode_batch_fast([text for text in texts if text]))
        tokens.extend(next(codes).ids if text else [] for text in texts)
        texts.clear()

    for identifier, text in documents:
        ids.append(identifier)
        texts.append("" if is_blank(text[: task.max_chars]) else text[: task.max_chars])
        if len(texts) == 512 or len(ids) == WINDOW:  # few texts at a time: they are long, their tokens not
            tokenise()
        if len(ids) == WINDOW:
            yield ids, tokens
            ids, tokens = [], []
    tokenise()
    if ids:
        yield ids, tokens


def cut_batches(lengths: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Indices of documents, longest first, in batches of at most `budget` tokens with their padding (or one document).

    lengths: int (N,), tokens; documents of 0 are left out.
    """
    order = np.argsort(-lengths, kind="stable")[: int(np.count_nonzero(lengths))]
    while order.size:
        count = max(1, budget // int(lengths[order[0]]))
        yield order[:count]
        order = order[count:]


def dtype_of(task: Scoring) -> str:
    """What the encoder runs in on this machine: "bf16", "fp16" or "fp32"."""
    if task.dtype != "auto":
        return task.dtype
    device = claim_device()
    return half_precision(device) if device.type == "cuda" else "fp32"


def half_precision(device) -> str:
    """ "bf16", or "fp16" for a GPU that has no bf16: V100, T4 and others of a compute capability below 8.0."""
    import torch

    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


@functools.lru_cache(maxsize=1)
def load_scorer(task: Scoring):
    """The function list of token ids (N documents) → float32 (N,) scores, nan for a document without tokens."""
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading, which would break ours
    device = claim_device()
    dtype = dtype_of(task)
    autocast = torch.autocast(device.type, torch.float16, enabled=dtype == "fp16")
    try:
        model = AutoModelForSequenceClassification.from_pretrained(task.classifier, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{task.classifier}: no classifier: {first_line(error)}") from None
    model = model.to(device, torch.bfloat16 if dtype == "bf16" else torch.float32).eval()
    keep_head_in_fp32(model)
    pad = model.config.pad_token_id or 0
    budget = task.batch_tokens or (65_536 if device.type == "cuda" else 4_096)

    @torch.inference_mode()
    def score(tokens: list[list[int]]) -> np.ndarray:
        lengths = np.array([len(ids) for ids in tokens], np.int64)
        chosen, parts = [], []
        for batch in cut_batches(lengths, budget):
            longest = int(lengths[batch[0]])
            ids = np.full((batch.size, longest), pad, np.int64)
            for row, index in enumerate(batch):
                ids[row, : lengths[index]] = tokens[index]
            mask = torch.from_numpy(np.arange(longest) < lengths[batch, None]).long()
            inputs = torch.from_numpy(ids).to(device, non_blocking=True)
            with autocast:
                logits = model(input_ids=inputs, attention_mask=mask.to(device, non_blocking=True)).logits
            parts.append(logits.float().softmax(-1)[:, 1])  # stays on the device: one wait per window, not per batch
            chosen.append(batch)
        scores = np.full(len(tokens), np.nan, np.float32)
        if parts:
            scores[np.concatenate(chosen)] = torch.cat(parts).cpu().numpy()
        return scores

    return score


def keep_head_in_fp32(model) -> None:
    """The last layer in fp32, whatever the encoder's dtype: in bf16 a score of 0.95 is off by 0.004."""
    import torch

    def in_fp32(head: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.nn.functional.linear(hidden.float(), head.weight, head.bias)

    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.out_features == model.config.num_labels:
            module.float().forward = functools.partial(in_fp32, module)


@functools.cache
def claim_device():
    """The CPU, or a GPU that no other process on this machine scores on; held until this process ends."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index).uuid  # not the number: Slurm shows each job its card as 0
        path = Path(tempfile.gettempdir(), f"nanomed-sweep-{os.getuid()}-{card}.lock")
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return torch.device("cuda", index)
        except BlockingIOError:
            os.close(descriptor)
    raise InputError(f"all {torch.cuda.device_count()} GPUs are in use by other workers; use fewer --workers, or wait")
