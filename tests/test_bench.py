"""The kernel benchmark: its arithmetic, its report, and its way through all operations, with the clock replaced."""

import json
import os
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from nanomed.kernels import bench, peers, timing
from nanomed.kernels.roofline import GUESSED, MODELS, OPS, Model, floor_s, traffic

TINY = Model("tiny", 48, 80, 130, 4, 2, 16)


def test_floors_are_those_of_the_arithmetic():
    """Against figures worked out by hand: Qwen2.5-7B, 8,192 tokens, H100 at 3.0 TB/s and 800 TFLOP/s."""
    qwen, h100 = MODELS["qwen2.5-7b"], GUESSED["h100"]
    us = {op: {part: floor_s(c, h100) * 1e6 for part, c in traffic(op, qwen, 8192).items()} for op in OPS}
    assert us["rms_norm"] == pytest.approx({"forward": 39.1, "backward": 58.7, "both": 97.9}, rel=1e-2)
    assert us["add_rms_norm"] == pytest.approx({"forward": 78.3, "backward": 78.3, "both": 156.6}, rel=1e-2)
    assert us["swiglu"]["backward"] == pytest.approx(517, rel=1e-2)
    assert us["rope"]["forward"] == pytest.approx(44.7, rel=1e-2)
    assert us["norm_rope"] == pytest.approx({"forward": 44.7, "backward": 67.1, "both": 111.8}, rel=1e-2)
    assert us["cross_entropy"]["both"] == pytest.approx(2491, rel=1e-2)
    assert us["linear_cross_entropy"]["both"] == pytest.approx(33_480 + 2491, rel=1e-2)


@pytest.fixture
def clock(monkeypatch):
    """In the interpreter time means nothing: every piece of work runs once and takes a millisecond."""

    def quantiles_ms(work, graph):
        work()
        return 0.9, 1.0, 1.1

    monkeypatch.setattr(timing, "quantiles_ms", quantiles_ms)
    monkeypatch.setattr(timing, "peak_bytes", lambda work: work() and 4_000_000)
    monkeypatch.setattr(bench, "CHECK_TOKENS", 6)


MACHINE = {"gpu": "Test", "copy_bytes_s": 1e9, "gemm_flop_s": 1e10, "torch": "2", "triton": "3", "date": "2026-01-01"}


@pytest.mark.parametrize("op", OPS)
def test_every_operation_runs_for_every_provider_here(op, clock, monkeypatch):
    """Ours in the interpreter, eager, and torch's own; who is absent says why."""
    everybody = peers.everybody

    def without_compilers(op):  # 18 graphs to compile, and Liger in the interpreter: minutes
        absent = {"torch.compile": "left out", "liger": "left out", "liger default": "left out"}
        return everybody(op) | {k: v for k, v in absent.items() if k in everybody(op)}

    monkeypatch.setattr(peers, "everybody", without_compilers)
    rows = bench.rows_of(op, TINY, 5, MACHINE)
    by_name = {row["provider"]: row for row in rows}
    assert {"ours", "eager", "torch.compile", "torch", "liger"} <= by_name.keys()
    timed = "both" if "entropy" in op else "forward"
    for row in rows:
        if "absent" not in row:
            least = floor_s(traffic(op, TINY, 5)["both"], bench.Device("", 1e9, 1e10))
            assert row["both"]["of_floor"] == pytest.approx(least * 1e3)
            assert row[timed]["ms"] == [0.9, 1.0, 1.1]
            assert row["error"] < 0.02
        else:
            assert row["absent"]
    assert "absent" not in by_name["ours"]
    assert "absent" not in by_name["eager"]


def test_a_wrong_provider_is_not_timed(clock, monkeypatch):
    wrong = {"ours": peers.formula("swiglu"), "wrong": lambda gate, up: gate * up}
    monkeypatch.setattr(peers, "everybody", lambda op: wrong)
    ours, wrong = bench.rows_of("swiglu", TINY, 5, MACHINE)
    assert "both" in ours
    assert wrong["absent"].startswith("wrong: relative error")
    assert "both" not in wrong


def test_a_peer_that_fails_is_named_and_ours_is_not_forgiven(clock, monkeypatch):
    def fails(gate, up):
        if gate.dtype == torch.bfloat16:
            raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(peers, "everybody", lambda op: {"peer": fails})
    rows = bench.rows_of("swiglu", TINY, 5, MACHINE)
    assert rows[0]["absent"] == "RuntimeError: out of memory"
    assert bench.own_failures(rows) == []
    monkeypatch.setattr(peers, "everybody", lambda op: {"ours": fails})
    assert bench.own_failures(bench.rows_of("swiglu", TINY, 5, MACHINE)) == ["swiglu: RuntimeError: out of memory"]


def test_the_report_shows_what_was_measured_and_who_was_absent(tmp_path):
    part = {"ms": [0.1, 0.125, 0.2], "of_floor": 0.91}
    row = {"op": "swiglu", "model": "qwen2.5-7b", "tokens": 8192, "error": 1e-3, "extra_bytes": 3e6}
    rows = [
        row | {"provider": "ours", "forward": part, "backward": part, "both": part},
        row | {"provider": "quack", "absent": "not installed"},
        row | {"op": "rope", "provider": "ours", "absent": "out of memory"},  # of an operation that nobody did
    ]
    result = {"machine": MACHINE, "rows": rows}
    text = bench.as_text(result)
    assert "| ours | 0.125 | 91% | 0.125 | 91% | 0.125 | 91% | 3 | 1.0e-03 |" in text
    assert "- quack: not installed" in text
    bench.draw(result, tmp_path / "bench.svg")
    picture = (tmp_path / "bench.svg").read_text()
    assert "swiglu, qwen2.5-7b, 8,192 tokens" in picture
    assert "91 %" in picture
    assert json.loads(json.dumps(result)) == result


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it measures")
def test_without_a_gpu_the_command_predicts():
    """Interpreted, it leaves the register table out (test_registers.py has it)."""
    env = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "nanomed.kernels.bench"]
    flags = ["--op", "rope", "--model", "mistral-7b", "--tokens", "8192"]
    done = subprocess.run(command + flags, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nothing is measured" in done.stdout
    assert "| rope | mistral-7b | 8,192 | forward | 0.056 | 0.039 |" in done.stdout
    bad = subprocess.run([*command, "--tokens", "0"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (bad.returncode, bad.stderr) == (1, "error: --tokens 0: must be at least 1\n")
