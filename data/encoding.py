"""Encoding: raw rows to token ids, in this process or in workers, in order.

Text that spells a special token, such as "<|endoftext|>", is encoded as the ordinary characters it is; otherwise a web
page could end a document or open a chat turn. Added tokens that are not special (Qwen's <tool_call>, runs of spaces) do
become their ids, as in any use of the tokenizer; the separator and BOS never do, special or not. In chat records the
special tokens of the template are real and those of the messages are not (conversations.py).

Workers are spawned: a fork would copy the held locks of the tokenizer's threads.
"""

import functools
import hashlib
import multiprocessing
import os
import re
import signal
import threading
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chat_records import Conversation, read_conversation
from conversations import FORGED, conversation_engine, renderer
from engines import (
    FIRST_DOCS,
    LATER_DOCS,
    PROBE_CHARS,
    Encode,
    Unproven,
    fast_engine,
    probes,
    reference_engine,
    warm_up,
)
from nanomed import InputError, first_line
from nanomed.files import read_json
from reading import is_blank, parse_record, parse_row, read_batches, suggestion


@dataclass(frozen=True)
class Job:
    """What a worker needs to know; small, since it is sent with every batch."""

    tokenizer: str  # path of tokenizer.json
    tokenizer_sha256: str
    separator: int
    bos: int | None
    key: str  # of the text, or of the messages
    messages: bool  # chat records
    engine: str  # "tokenizers" or "gigatoken"
    hold_out: float | None = None  # leave out this share of the documents,
    held_out: float | None = None  # or take exactly what that leaves out
    normal_forms: tuple[str, ...] = ()  # Unicode forms that the tokenizer gives a text; bytes are counted in the last one


@dataclass
class Encoded:
    """A batch after encoding: D documents of T tokens, without BOS and separator."""

    ids: np.ndarray  # uint32 (T,)
    lengths: np.ndarray  # int64 (D,), tokens
    n_bytes: np.ndarray  # int64 (D,), UTF-8
    rows: np.ndarray  # int64 (D,), row of the input that a document is, from 0
    empty: list[int]  # rows whose text is blank
    end_row: int  # row after the batch
    position: int  # bytes of the input read so far
    sample: list[tuple[str, str, np.ndarray]]  # (where, text, ids) of a few, to be compared with the reference


def find_tokenizer(model: str | Path) -> Path:
    """tokenizer.json of a folder, that file itself, or of a hub id, of which only the tokenizer's files are downloaded.

    InputError if there is no tokenizer.json.
    """
    path = Path(model)
    if not path.exists() and re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(model)):
        from huggingface_hub import snapshot_download  # slow to import

        names = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
        names.append("additional_chat_templates/*.jinja")
        try:
            path = Path(snapshot_download(str(model), allow_patterns=names))
        except (OSError, ValueError) as error:
            what = f"no such folder{suggestion(path)}, and the hub does not provide it: {first_line(error)}"
            raise InputError(f"{model}: {what}") from None
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        meant = suggestion(path) or "; expected a folder with tokenizer.json, that file or a hub id"
        raise InputError(f"{path}: no such file{meant}")
    return path


@functools.lru_cache(maxsize=1)  # loading takes up to a second; a worker does it once
def load_engine(job: Job) -> Encode:
    """The function that encodes texts (conversations: with aliases) to uint32 ids."""
    path, protected = Path(job.tokenizer), (job.separator, job.bos)
    if job.messages:
        return conversation_engine(read_json(path), protected)
    reference = functools.partial(load_reference, job)  # loaded where it is needed
    return fast_engine(path, protected, reference) if job.engine == "gigatoken" else reference()


@functools.lru_cache(maxsize=1)
def load_reference(job: Job) -> Encode:
    """The engine `tokenizers`, whatever the job's is."""
    return reference_engine(Path(job.tokenizer), (job.separator, job.bos))


@functools.lru_cache(maxsize=1)
def load_renderer(job: Job) -> Callable[..., tuple[str, str]]:
    """The function (messages, tools, settings) → (text with aliases, text as it reads)."""
    path = Path(job.tokenizer)
    return renderer(path.parent, read_json(path), (job.separator, job.bos))


@dataclass
class Parsed:
    """A batch's D documents before encoding. text: with aliases, in conversations."""

    texts: list[str]
    n_bytes: list[int]  # UTF-8, of the text as it reads
    rows: list[int]  # from 0
    empty: list[int]  # rows whose text is blank


def describe_row(path: Path, row: int) -> str:
    """How an error names a row."""
    return f"{path}: {'row' if path.suffix == '.parquet' else 'line'} {row + 1}"


def is_wanted(job: Job, value: str | Conversation) -> bool:
    """Does a document belong in these bins? A hash of its text decides; of a conversation, of its messages.

    So equal texts are on one side, in any order and format of the inputs, and for any tokenizer.
    """
    share = job.hold_out or job.held_out
    if share is None:
        return True
    content = value.text() if isinstance(value, Conversation) else value
    content = unicodedata.normalize("NFC", content)  # equal texts, however their umlauts are spelled
    digest = hashlib.blake2b(content.encode("utf-8"), digest_size=8, person=b"hold-out").digest()
    return (int.from_bytes(digest, "big") < share * 2**64) == bool(job.held_out)


def read_value(job: Job, row: bytes | None, is_json: bool) -> str | Conversation | None:
    """What a raw row holds, "" where that is nothing to read; None for a blank line. ValueError: what is wrong."""
    if not job.messages:
        text = parse_row(row, job.key, is_json)
        return "" if text is not None and is_blank(text) else text
    record = parse_record(row, job.key, list)
    if record is None:
        return None
    return read_conversation(record, job.key) if record[job.key] else ""


def count_bytes(text: str, normal_forms: tuple[str, ...]) -> int:
    """UTF-8 bytes of a text in the Unicode form that the tokenizer sees; bits per byte must not depend on the file's."""
    for form in normal_forms:
        text = unicodedata.normalize(form, text)
    return len(text.encode("utf-8"))


def parse_rows(job: Job, path: Path, first_row: int, rows: list[bytes | None]) -> Parsed:
    """The documents of a batch; InputError names file and line of the first bad row."""
    is_json, parsed = job.messages or path.suffix != ".parquet", Parsed([], [], [], [])
    for number, row in enumerate(rows, first_row):
        try:
            value = read_value(job, row, is_json)
            if value is None or (value and not is_wanted(job, value)):
                continue
            text = visible = value
            if isinstance(value, Conversation):
                text, visible = load_renderer(job)(value.messages, value.tools, value.settings)
            size = count_bytes(visible, job.normal_forms)  # fails for half a surrogate pair: JSON can spell it
        except RecursionError:
            raise InputError(f"{describe_row(path, number)}: JSON nested too deeply") from None
        except ValueError as error:
            what = f"not valid UTF-8: {error}; expected UTF-8 text" if isinstance(error, UnicodeError) else str(error)
            raise InputError(f"{describe_row(path, number)}: {what}") from None
        if is_blank(visible):
            parsed.empty.append(number)
            continue
        parsed.texts.append(text)
        parsed.n_bytes.append(size)
        parsed.rows.append(number)
    return parsed


def encode_rows(job: Job, path: Path, n_sample: int, first_row: int, rows: list[bytes | None], position: int) -> Encoded:
    """Parse and encode a batch, in a worker; InputError names file and line of the first bad row."""
    parsed = parse_rows(job, path, first_row, rows)
    ids = load_engine(job)(parsed.texts)
    sample = []
    if job.engine == "gigatoken":
        short = [i for i, text in enumerate(parsed.texts) if len(text) <= PROBE_CHARS][:n_sample]
        sample += [(describe_row(path, parsed.rows[i]), parsed.texts[i], ids[i]) for i in short]
        if n_sample > LATER_DOCS:
            spelled = probes(Path(job.tokenizer))
            sample += zip(spelled, spelled, load_engine(job)(spelled), strict=True)
    if job.messages:
        ids = [strip_separator(code, job.separator) for code in ids]
    lengths = np.array([code.size for code in ids], np.int64)
    flat = np.concatenate(ids) if ids else np.empty(0, np.uint32)
    # A word-level vocabulary can do that, or a Unigram one. In a conversation the separator may end turns.
    if (inside := np.flatnonzero(flat == (FORGED if job.messages else job.separator))).size:
        row = parsed.rows[int(np.searchsorted(np.cumsum(lengths), inside[0], "right"))]
        what = f"its text encodes to the separator's id {job.separator}; remove it, or choose another with --eos TOKEN"
        if job.messages:
            what = "a message encodes to the id of a special token; remove what spells it"
        raise InputError(f"{describe_row(path, row)}: {what}")
    numbers = (np.array(values, np.int64) for values in (parsed.n_bytes, parsed.rows))
    return Encoded(flat, lengths, *numbers, parsed.empty, first_row + len(rows), position, sample)


def strip_separator(ids: np.ndarray, separator: int) -> np.ndarray:
    """A conversation's ids without the separator that many chat templates end with: the bins add it."""
    return ids[:-1] if ids.size and ids[-1] == separator else ids


def compare(job: Job, encoded: Encoded) -> Encoded:
    """The batch itself; Unproven if the reference gives other ids to a document of its sample."""
    if encoded.sample:
        expected = load_reference(job)([text for _, text, _ in encoded.sample])
        for (where, _, ids), other in zip(encoded.sample, expected, strict=True):
            if not np.array_equal(ids, other):
                raise Unproven(f"its ids differ from those of tokenizers for {where[:200]!r}")
    return encoded


def start_worker() -> None:
    """In a fresh process: one thread, Ctrl-C left to the parent, whose end (kill -9 included) is its own."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@contextmanager
def worker_pool(n: int, tokenizer: Path) -> Iterator[ProcessPoolExecutor | None]:
    """n worker processes, which start and load at once, while this one still reads the tokenizer; None for n = 1."""
    if n == 1:
        yield None
        return
    pool = ProcessPoolExecutor(n, mp_context=multiprocessing.get_context("spawn"), initializer=start_worker)
    for _ in range(n):
        pool.submit(warm_up, tokenizer)  # a process is started when it is first needed
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def encode_file(job: Job, path: Path, first_row: int, pool: ProcessPoolExecutor | None, workers: int) -> Iterator[Encoded]:
    """The batches of a file, encoded and compared, in order; two per worker are in flight. Unproven: see engines.py."""
    waiting: deque = deque()
    for number, batch in enumerate(read_batches(path, job.key, first_row, job.messages)):
        n_sample = LATER_DOCS if number else FIRST_DOCS
        if pool is None:
            yield compare(job, encode_rows(job, path, n_sample, *batch))
            continue
        waiting.append(pool.submit(encode_rows, job, path, n_sample, *batch))
        if len(waiting) > 2 * workers:
            yield compare(job, waiting.popleft().result())
    while waiting:
        yield compare(job, waiting.popleft().result())
