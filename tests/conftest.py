"""Small models, batches and runs that several tests share. No network, no GPU."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads slow each other down; read when torch is loaded
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reached for the hub would hang where there is none

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported

import gc
import importlib.util
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig

from nanomed.batches import Batch
from nanomed.bins import ShardWriter, settings_of, write_manifest
from nanomed.kernels.linear_cross_entropy import IGNORED
from nanomed.tokenizer import tokenizer_sha256

# Helpers that assert: a failure there shows what was found, as in a test.
pytest.register_assert_rewrite("chat_requests", "merge_pairs", "refusals")

# Triton exists on Linux only; without a GPU its kernels run in the interpreter.
collect_ignore = []
if importlib.util.find_spec("triton") is None:
    collect_ignore += [f"test_{x}.py" for x in ("adamw", "kernels", "kernel_ops", "rms_norm", "rope", "cross_entropy", "registers")]
elif not torch.cuda.is_available():
    import interpreter  # noqa: F401
if not torch.cuda.is_available():
    collect_ignore += ["test_gpu.py"]  # tests/bench/gpu.sh runs it

torch.set_num_threads(1)  # tiny products: a second thread only waits; and the bits are those of run_train's processes


@pytest.fixture(autouse=True)
def _the_process_as_it_was():
    """A run with --deterministic, or a sweep with --threads, in this process must not move the next test's bits."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)


# In CI the same examples each time, so that a red run can be told from a new find; elsewhere new ones each time.
# No limit on the time of an example: how fast the machine is says nothing about the code.
settings.register_profile(
    "nanomed",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
)
settings.load_profile("nanomed")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def batch_of(documents: list[torch.Tensor], pad_to: int = 0) -> Batch:
    """Token tensors → one batch, written in the slow, obvious way."""
    documents = list(documents)
    if (n_tokens := sum(map(len, documents))) < pad_to:
        documents.append(torch.zeros(pad_to - n_tokens, dtype=torch.int64))
    end = torch.tensor([IGNORED])
    borders = torch.tensor([0] + [len(d) for d in documents]).cumsum(0)
    return Batch(
        tokens=torch.cat(documents),
        labels=torch.cat([torch.cat((d[1:], end)) for d in documents]),
        positions=torch.cat([torch.arange(len(d)) for d in documents]),
        cu_seqlens=torch.cat((borders, borders[-1:].repeat(3))).to(torch.int32),
        extent=torch.tensor([len(documents), max(map(len, documents))]),
        sum_squared_lens=sum(len(d) ** 2 for d in documents),
    )


def save_reference(config, folder, dtype=torch.float32):
    """A transformers model with random weights (norms and biases too) saved to the folder; returns it."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for param in model.parameters():
        torch.nn.init.normal_(param, 1.0 if param.ndim == 1 else 0.0, 0.1)
    model.save_pretrained(folder)
    return model.eval()


def write_bins(folder, documents: list[list[int]], vocab_size: int, tokenizer_sha256: str = "0" * 64, n_bytes: int = 1000):
    """Token lists (without separator) → a finished set of bins."""
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, 0, settings_of(vocab_size, 0, None, tokenizer_sha256), "test")
    ids = np.array([token for document in documents for token in document])
    writer.write(ids, np.array([len(d) for d in documents]), n_bytes=n_bytes)
    writer.commit({"name": "test"})
    write_manifest(folder)
    return folder


# --- a whole tiny training run -------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent.parent
SENTENCES = ("Das Herz pumpt Blut.", "Die Leber baut Alkohol ab.", "Fieber ist ein Symptom.",
             "Der Arzt hört die Lunge ab.", "Insulin senkt den Blutzucker.", "Die Niere filtert das Blut.")  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """A random model of 30 thousand parameters with its own tokenizer, and bins of German sentences."""

    model: Path
    train: Path
    val: Path
    texts: list[str]  # of the validation set

    def flags(self, out: Path, **changes) -> list[str]:
        """Command line of a 20-step run; changes override or add flags, None removes one."""
        flags = dict(recipe="miniature", init=self.model, data=self.train, val=f"med={self.val}", out=out, steps=20, seq_len=32,
                     precision="fp32", batch_tokens=256, micro_batch=2, lr=1e-2,
                     warmup_steps=2, checkpoint_every=5, eval_every=10)  # fmt: skip
        flags |= changes
        return [x for name, value in flags.items() if value is not None for x in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    return make_tiny(folder)


def make_tiny(folder: Path) -> Tiny:
    """Write the tiny model, its tokenizer and bins below the folder."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(SENTENCES, k=rng.randint(1, 6))) for _ in range(400)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    model = folder / "model"
    config = LlamaConfig(vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
                         bos_token_id=0, eos_token_id=0)  # fmt: skip
    save_reference(config, model, torch.bfloat16)
    tokenizer.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|endoftext|>",
                "chat_template": "{{ messages }}",
            }
        )
    )
    digest = tokenizer_sha256(model / "tokenizer.json")
    encode = lambda part: [tokenizer.encode(t, add_special_tokens=False).ids for t in part]  # noqa: E731
    write_bins(folder / "train", encode(texts[20:]), 320, tokenizer_sha256=digest)
    write_bins(
        folder / "val",
        encode(texts[:20]),
        320,
        tokenizer_sha256=digest,
        n_bytes=sum(len(t.encode()) for t in texts[:20]),
    )
    return Tiny(model, folder / "train", folder / "val", texts[:20])


def command(nproc: int, flags: list[str], script: Path = ROOT / "train.py") -> list[str]:
    """train.py's command line, through torchrun for several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"] if nproc > 1 else []
    return [sys.executable, *launcher, str(script), *flags]


def run_train(flags: list[str], nproc: int = 1, script: Path = ROOT / "train.py") -> subprocess.CompletedProcess:
    """Run train.py as a user does; the finished process with its output."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command(nproc, flags, script), capture_output=True, text=True, env=env)


def read_losses(out: Path) -> list[float]:
    """Training loss of every step, from metrics.jsonl."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [r for r in rows if "loss" in r]
    assert [r["step"] for r in rows] == list(range(1, len(rows) + 1))
    return [r["loss"] for r in rows]


@pytest.fixture
def run(monkeypatch):
    """train.py's main in this process; False if it ended with exit status 1."""
    import train  # seconds, which tests of other parts do without

    def run(flags: list[str]) -> bool:
        monkeypatch.setattr(sys, "argv", ["train.py", *flags])
        status = 0
        try:
            train.main()
        except SystemExit as exit_:
            status = exit_.code
        assert gc.isenabled()
        assert status in (0, 1)
        return status == 0

    return run


def assert_linear(work: Callable[[int], object], n: int) -> None:
    """Assert that work(8 n) takes about 8 times the CPU time of work(n), and not the 64 times of a square."""

    def seconds(size: int) -> float:
        started = time.process_time()
        work(size)
        return time.process_time() - started

    assert min(seconds(8 * n) for _ in range(3)) < 24 * min(seconds(n) for _ in range(3)) + 0.01


def rows_of(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def undisturbed(tiny, tmp_path_factory):
    """A whole run; its folder."""
    import train

    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *tiny.flags(out)])
        train.main()
    return out


def send(number: int) -> None:
    """Send a signal to this process; return once the run's StopSignal has noted it."""
    from nanomed.guard import StopSignal

    targets = [getattr(thread, "_target", None) for thread in threading.enumerate()]
    listening = [target for target in targets if getattr(target, "__func__", None) is StopSignal._listen]
    signals = [target.__self__ for target in listening]
    [stop] = [found for found in signals if found._theirs.fileno() != -1]  # a closed one takes no signals
    os.kill(os.getpid(), number)
    while not stop._asked:
        time.sleep(0.001)
