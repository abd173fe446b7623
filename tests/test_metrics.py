"""FLOPs, peaks, metrics.jsonl across a resumption, time spent waiting for data."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from conftest import batch_of
from nanomed import metrics, parallel
from nanomed.config import Config
from nanomed.guard import Verdict
from nanomed.hf import ModelConfig
from nanomed.metrics import Metrics, attention_flops, flops_per_token, peak_flops
from nanomed.model import Decoder
from nanomed.plot import plot_curves

V, D, F, LAYERS, H, K, HEAD = 50, 24, 40, 3, 4, 2, 16


def model_of(tied: bool) -> Decoder:
    return Decoder(ModelConfig(V, D, F, LAYERS, H, K, HEAD, 1e-6, 1e4, tie_word_embeddings=tied, qkv_bias=True))


@pytest.mark.parametrize("tied", [False, True])
def test_flops_by_hand(tied):
    """Six for every weight of a matrix product; biases, norms and the embedding look-up cost none, lm_head does, tied or not."""
    attention = D * H * HEAD + 2 * D * K * HEAD + H * HEAD * D
    assert flops_per_token(model_of(tied)) == 6 * (LAYERS * (attention + 3 * D * F) + D * V)
    assert attention_flops(model_of(tied)) == 6 * LAYERS * H * HEAD


@pytest.mark.parametrize("tied", [False, True])
def test_flops_equal_torchs_count(tied):
    """Forward and backward are three times the forward; torch counts the matrix products in it, attention set aside."""
    batch = batch_of([torch.randint(0, V, (n,)) for n in (5, 9)])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model_of(tied)(batch, torch.tensor(1.0))
    assert flops_per_token(model_of(tied)) * 14 == 3 * counter.get_total_flops()


def test_attention_flops_equal_half_of_the_dense_products():
    """One document of n tokens: q kᵀ and p v over all n², of which causality needs half; three times for both passes."""
    n, q = 20, torch.randn(H, 20, HEAD)
    with FlopCounterMode(display=False) as counter:
        (q @ q.transpose(1, 2)) @ q
    assert attention_flops(model_of(False)) * n**2 == 3 * LAYERS * counter.get_total_flops() / 2


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce GTX 1080", None),
        ("Some GPU of next year", None),
    ],
)
def test_peaks_by_the_drivers_name(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda"), "bf16") == peak
    assert peak_flops(torch.device("cuda"), "fp32") is None
    assert peak_flops(torch.device("cpu"), "bf16") is None


@pytest.fixture
def world():
    config = Config()
    yield parallel.start(config)
    dist.destroy_process_group()


def rows_of(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


VERDICT = Verdict(torch.tensor(False), torch.full((2,), torch.inf, dtype=torch.float64))


def metrics_of(out, world, step=0) -> Metrics:
    return Metrics(out, Config(batch_tokens=100), world, model_of(False), None, step, n_steps=10)


def set_clock(monkeypatch, seconds: float) -> None:
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: seconds))


def add_steps(m: Metrics, steps, wait_s=0.0):
    for step in steps:
        m.add(step, 0.5, torch.tensor(1 / step), torch.tensor(2.0), VERDICT, sum_squared_lens=7)
    m.flush(wait_s)


def test_rows_are_whole_and_unrounded(world, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "peak_flops", lambda *_: 1e12)
    m = metrics_of(tmp_path, world)
    m.validation(0, {"val_med_loss": 1 / 3, "val_med_bpb": 0.1, "val_new_bpb": float("inf")})
    set_clock(monkeypatch, 10.0)
    m.restart_clock()
    set_clock(monkeypatch, 10.5)
    add_steps(m, [1, 2, 3])
    m.flush(0.0)  # nothing new: writes nothing
    m.close()
    first, *rows = rows_of(tmp_path)
    assert first == {"step": 0, "tokens": 0, "val_med_loss": 1 / 3, "val_med_bpb": 0.1, "val_new_bpb": None}
    assert (tmp_path / "curves.svg") == plot_curves(tmp_path)  # what is not finite is not drawn
    assert [(r["step"], r["tokens"], r["lr"], r["grad_norm"]) for r in rows] == [(s, 100 * s, 0.5, 2.0) for s in (1, 2, 3)]
    assert rows[2]["loss"] == float(torch.tensor(1 / 3))
    seconds = 0.5  # one figure for the steps between two flushes
    assert {r["tok_s"] for r in rows} == {300 / seconds}
    flops = 300 * flops_per_token(model_of(False)) + 3 * 7 * attention_flops(model_of(False))
    assert rows[0]["mfu"] == pytest.approx(flops / seconds / 1e12)


def test_tensorboard_and_wandb_get_numbers_only(world, tmp_path, monkeypatch):
    """TensorBoard raises at words, W&B at steps that it has seen: why a step was skipped goes to the file alone."""
    seen = []
    monkeypatch.setattr(metrics, "_sinks", lambda *_: [seen.append])
    monkeypatch.setattr(metrics.batches, "documents", lambda *_: {"bins": [1]})
    m = metrics_of(tmp_path, world)
    skip = Verdict(torch.tensor(True), torch.full((2,), torch.inf, dtype=torch.float64))
    m.add(1, 0.5, torch.tensor(float("nan")), torch.tensor(2.0), skip, sum_squared_lens=7)
    m.flush(0.0)
    m.close()
    assert "why" in rows_of(tmp_path)[-1]
    assert len(seen) == 1
    assert all(value is None or isinstance(value, int | float) for row in seen for value in row.values())


def test_each_log_gets_what_there_is_of_a_row(tmp_path, monkeypatch):
    """W&B's id is run.json's: a run that goes on is one run there, another of the same name another."""
    seen, begun, begun_at = [], [], []
    writer = SimpleNamespace(add_scalar=lambda *call: seen.append(call), add_text=lambda *call: None)
    for folder in ("a/run", "b/run"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "run.json").write_text(json.dumps({"id": folder}))
    monkeypatch.setitem(
        sys.modules,
        "torch.utils.tensorboard",
        SimpleNamespace(SummaryWriter=lambda folder, purge_step: begun_at.append(purge_step) or writer),
    )
    run = SimpleNamespace(log=lambda row, step: seen.append((row, step)))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **how: begun.append(how) or run))
    row = {"step": 3, "loss": 2.0, "mfu": None}
    for folder in ("a/run", "b/run", "a/run"):
        for sink in metrics._sinks(tmp_path / folder, Config(tensorboard=True, wandb="project"), 2):
            sink(row)
    assert begun_at == [3, 3, 3]  # a resumed run's TensorBoard goes on there
    assert seen[:3] == [("step", 3, 3), ("loss", 2.0, 3), (row, 3)]
    assert [(how["project"], how["name"], how["resume"]) for how in begun] == [("project", "run", "allow")] * 3
    assert begun[0]["id"] == begun[2]["id"] != begun[1]["id"]
    assert metrics._sinks(tmp_path, Config(), 0) == []
    metrics._sinks(tmp_path, Config(tensorboard=True), 0)
    assert begun_at[-1] == 0  # its validation comes anew, too


def test_an_unknown_device_has_no_mfu(world, tmp_path):
    m = metrics_of(tmp_path, world)
    add_steps(m, [1])
    assert rows_of(tmp_path)[0]["mfu"] is None


@pytest.mark.parametrize("torn", ["", '{"step": 7, "tokens": 700, "lo', "\n", '{"step": 7'])
def test_resuming_cuts_metrics_back_to_the_checkpoint(torn, world, tmp_path):
    """A kill may come steps after the checkpoint, and in the middle of a line; the evaluation of the kept step stays."""
    m = metrics_of(tmp_path, world)
    m.validation(0, {"val_a_loss": 3.0})
    add_steps(m, range(1, 6))
    m.validation(5, {"val_a_loss": 2.0})
    kept = (tmp_path / "metrics.jsonl").read_text()
    add_steps(m, [6])
    m.validation(6, {"val_a_loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    resumed = metrics_of(tmp_path, world, step=5)
    assert (tmp_path / "metrics.jsonl").read_text() == kept
    add_steps(resumed, [6, 7])
    assert [r["step"] for r in rows_of(tmp_path)] == [0, 1, 2, 3, 4, 5, 5, 6, 7]
    assert resumed.validated


def test_a_step_whose_evaluation_was_cut_short_is_known(world, tmp_path):
    """Its row of the step is there, that of the evaluation is not."""
    m = metrics_of(tmp_path, world)
    m.validation(0, {"val_a_loss": 3.0})
    add_steps(m, range(1, 6))
    assert not metrics_of(tmp_path, world, step=5).validated
    assert not metrics_of(tmp_path, world).validated  # from step 0 it begins anew


def test_a_step_back_to_zero_empties_the_file(world, tmp_path):
    """A run killed before its first checkpoint begins anew, its evaluation at step 0 is not there twice."""
    m = metrics_of(tmp_path, world)
    m.validation(0, {"val_a_loss": 3.0})
    add_steps(m, [1, 2])
    m = metrics_of(tmp_path, world)
    m.validation(0, {"val_a_loss": 3.0})
    assert [r["step"] for r in rows_of(tmp_path)] == [0]


def test_data_wait_is_the_share_of_time_since_the_last_flush(world, tmp_path, monkeypatch):
    m = metrics_of(tmp_path, world)
    for step, (start, end, wait_s) in enumerate([(0.0, 1.0, 0.5), (2.0, 3.0, 0.5), (3.0, 5.0, 1.0)], 1):
        set_clock(monkeypatch, start)
        m.restart_clock()
        set_clock(monkeypatch, end)
        add_steps(m, [step], wait_s)  # seconds waited since the start of the run
    assert [r["data_wait"] for r in rows_of(tmp_path)] == [0.5, 0.0, 0.25]
