"""merge.py: the formula in float64, every dtype, tied and untied, schedules, sweeps, sums that are kept."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import merge
from merge_pairs import CONFIGS, assert_close, files_of, fixture_pair, make_pair, reference, run, tensors_of  # noqa: F401
from nanomed import hf, shards
from nanomed.merging import stream, write
from nanomed.merging.schedule import read_rules
from nanomed.merging.slerp import DOT_THRESHOLD, Stats, factors

# --- arithmetic ----------------------------------------------------------------------------------------------------


def test_bf16_in_and_out_is_torchs():
    every = np.arange(1 << 16, dtype=np.uint16)
    finite = every[(every & 0x7F80) != 0x7F80]
    wide = torch.from_numpy(finite.view(np.int16)).view(torch.bfloat16).float()
    buffers = np.empty(stream.CHUNK, np.uint16), np.empty(stream.CHUNK, np.float32)
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 1 << 18, dtype=np.uint32)
    bits[: 1 << 17] &= 0xFFFF8000  # half of them exact ties
    x = bits.view(np.float32)
    x = x[np.isfinite(x) & (np.abs(x) < 3.38e38)]
    narrowed = stream.narrow(x.copy(), "BF16", buffers[1], buffers[0]).copy()
    assert np.array_equal(narrowed.view(np.int16), torch.from_numpy(x).bfloat16().view(torch.int16).numpy())
    again = stream.narrow(wide.numpy().copy(), "BF16", buffers[1], buffers[0])
    assert np.array_equal(again, finite)


@given(
    seed=st.integers(0, 2**32 - 1), n=st.integers(1, 5000), change=st.sampled_from([0, 1e-4, 0.01, 0.031, 0.033, 0.3, 1, 30, -2]),
    t=st.sampled_from([0, 0.1, 0.5, 0.77, 1, -0.5, 1.5]), scale=st.sampled_from([1e-30, 1e-6, 1, 1e25]),
)  # fmt: skip
def test_the_factors_are_those_of_float64(seed, n, change, t, scale):
    """Any angle from 0 to 180°, any scale: the sums do not lose the small changes nor overflow in the large values."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, generator=generator) * scale
    b = a + change * (a if change == -2 else scale * torch.randn(n, generator=generator))
    with np.errstate(over="ignore"):
        found = stream.sums(a.numpy(), b.numpy(), np.empty(n, np.float32))
        if not np.isfinite(found).all():
            found = stream.sums(a.double().numpy(), b.double().numpy(), np.empty(n))
    stats = Stats(*found)
    x, y, cos = reference(a, b, t)
    if scale == 1e-30:
        cos = 0.0  # below mergekit's eps
        x, y = (math.sin((1 - t) * math.pi / 2) * a.double(), math.sin(t * math.pi / 2) * b.double())
    if abs(abs(cos) - DOT_THRESHOLD) < 1e-5 or (abs(cos) > 1 - 1e-9 and change == -2):
        return
    longer = max(stats.cpt / stats.base, stats.base / stats.cpt) ** 0.5 if stats.base and stats.cpt else 1
    assert stats.cos == pytest.approx(cos, abs=2e-7 * (4 + longer))  # Σ(b-a)² is rounded to float32 before |b|-|a| leaves it
    of_base, of_cpt = factors(stats, t)
    difference = of_base * a.double() + of_cpt * b.double() - (x + y)
    assert difference.norm() <= 1e-6 * max(1, longer / 4) * max(x.norm(), y.norm())
    if scale != 1e-30:
        expected = (b.double() - a.double()).norm() / a.double().norm()
        assert stats.relative_change == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_tensor_is_the_formulas(kind, dtype, tmp_path, tiny, monkeypatch):
    """Both branches, zero tensors, many shards in; and transformers loads it whole, with BASE's tokenizer."""
    base, cpt = make_pair(tmp_path, tiny.model, kind, dtype, max_shard_size="40KB")
    (base / "model.safetensors").unlink(missing_ok=True)
    (cpt / "model.safetensors").unlink(missing_ok=True)
    monkeypatch.setattr(shards, "SHARD_BYTES", 50_000)
    monkeypatch.setattr(stream, "CHUNK", 1000)  # several chunks a tensor, the last one short
    run(monkeypatch, base, cpt, tmp_path / "out", "--t", "0.3", "--verify")
    a, b, out = map(tensors_of, (base, cpt, tmp_path / "out"))
    assert a.keys() == b.keys() == out.keys()
    assert all(out[name].dtype == dtype and out[name].shape == a[name].shape for name in out)
    branches = {name: assert_close(out[name], a[name], b[name], 0.3, name) for name in out}
    assert set(branches.values()) == {"lerp", "slerp"}
    assert out["model.norm.weight"].eq(0).all() or a["model.norm.weight"].ne(0).any()
    told = {row["tensor"]: row for row in json.loads((tmp_path / "out" / "merge_report.json").read_text())["tensors"]}
    assert {name: row["branch"] for name, row in told.items() if row["branch"] != "zero"}.items() <= branches.items()
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(loaded.model.embed_tokens.weight, out["model.embed_tokens.weight"])
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages }}"
    assert len({*hf.find_weights(tmp_path / "out").values()}) > 1


def test_squares_beyond_float32_are_summed_all_the_same(pair, tmp_path, monkeypatch):
    name = "model.layers.3.mlp.up_proj.weight"
    for folder in pair:
        tensors = load_file(folder / "model.safetensors")
        tensors[name] *= 1e25
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    run(monkeypatch, *pair, tmp_path / "out", "--t", "0.3")
    a, b, out = map(tensors_of, (*pair, tmp_path / "out"))
    assert assert_close(out[name], a[name], b[name], 0.3, name) == "slerp"


def test_the_ends_are_the_two_models_bit_for_bit(pair, tmp_path, monkeypatch):
    base, cpt = pair
    file = base / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.input_layernorm.weight"][:2] = torch.tensor([-0.0, 1e-39])
    save_file(tensors, file, metadata={"format": "pt"})
    run(monkeypatch, base, cpt, tmp_path / "out", "--sweep", "0,1")
    for source, t in ((base, "t-0"), (cpt, "t-1")):
        expected, found = tensors_of(source), tensors_of(tmp_path / "out" / t)
        for name in expected:
            assert torch.equal(expected[name].view(torch.int16), found[name].view(torch.int16)), name


def test_the_result_takes_the_dtype_asked_for_in_one_rounding(tmp_path, tiny, monkeypatch):
    """float32 inputs are not rounded before the maths."""
    base, cpt = make_pair(tmp_path, tiny.model, dtype=torch.float32)
    run(monkeypatch, base, cpt, tmp_path / "out", "--t", "0.5", "--dtype", "bfloat16")
    a, b, out = map(tensors_of, (base, cpt, tmp_path / "out"))
    early = 0
    for name, found in out.items():
        assert found.dtype == torch.bfloat16
        x, y, _ = reference(a[name], b[name], 0.5)
        half_ulp = torch.exp2((x + y).abs().clamp_min(1e-30).log2().floor() - 8)
        assert ((found.double().flatten() - (x + y)).abs() <= half_ulp * 1.01).all(), name
        x, y, _ = reference(a[name].bfloat16(), b[name].bfloat16(), 0.5)
        early += int(((x + y).bfloat16() != found.flatten()).sum())
    assert early > 1000  # so the assertion above can tell the two apart


# --- schedules, sweeps, sums kept -----------------------------------------------------------------------------------


def test_a_schedule_file(pair, tmp_path, monkeypatch):
    base, cpt = pair
    (tmp_path / "t.yaml").write_text(
        "t:\n- {filter: self_attn, value: [0, 0.5, 1]}\n- {filter: layers.3., value: 0.9}\n- value: 0.25\n"
    )
    run(monkeypatch, base, cpt, tmp_path / "out", "--t-file", tmp_path / "t.yaml")
    a, b, out = map(tensors_of, (base, cpt, tmp_path / "out"))
    for name, found in out.items():
        t = (0, 1 / 3, 2 / 3, 1)[int(name.split(".")[2])] if "self_attn" in name else 0.9 if "layers.3." in name else 0.25
        assert_close(found, a[name], b[name], t, name)
    record = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert read_rules(record["t"], "") == merge.read_t_file(tmp_path / "t.yaml")


@pytest.mark.parametrize("n_threads", [1, 3])
def test_a_sweep_is_its_single_merges_and_no_thread_shows(n_threads, pair, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK", 1000)
    monkeypatch.setattr(stream, "GROUP_BYTES", 20_000)
    monkeypatch.setattr(write, "N_THREADS", n_threads)
    run(monkeypatch, *pair, tmp_path / "sweep" / "all", "--sweep", "0,0.3,1")
    monkeypatch.setattr(write, "N_THREADS", 2)
    for t in ("0", "0.3", "1"):
        run(monkeypatch, *pair, tmp_path / t / "one", "--t", t)
        assert files_of(tmp_path / t / "one") == files_of(tmp_path / "sweep" / "all" / f"t-{t}")


def test_a_further_t_finds_the_sums_and_a_changed_input_does_not(pair, tmp_path, monkeypatch, capsys):
    base, cpt = pair
    run(monkeypatch, base, cpt, tmp_path / "out" / "first", "--t", "0.3")
    run(monkeypatch, base, cpt, tmp_path / "elsewhere" / "fresh", "--t", "0.7")
    counted = stream.Streamer.stats
    with monkeypatch.context() as patch:
        patch.setattr(stream.Streamer, "stats", lambda *_: pytest.fail("summed again"))
        run(monkeypatch, base, cpt, tmp_path / "out" / "second", "--t", "0.7")
    assert "taken from" in capsys.readouterr().err
    assert files_of(tmp_path / "out" / "second") == files_of(tmp_path / "elsewhere" / "fresh")
    tensors = load_file(cpt / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, cpt / "model.safetensors", metadata={"format": "pt"})
    calls = []
    monkeypatch.setattr(stream.Streamer, "stats", lambda self, names: (calls.append(names), counted(self, names))[1])
    run(monkeypatch, base, cpt, tmp_path / "out" / "third", "--t", "0.7")
    assert calls
    assert_close(tensors_of(tmp_path / "out" / "third")["model.norm.weight"],
                 tensors_of(base)["model.norm.weight"], tensors["model.norm.weight"], 0.7)  # fmt: skip


def test_stats_only_tells_and_writes_nothing(pair, monkeypatch, capsys, tmp_path):
    before = files_of(tmp_path)
    run(monkeypatch, *pair, "--stats-only")
    shown = capsys.readouterr().out
    assert files_of(tmp_path) == before
    a, b = map(tensors_of, pair)
    names = [n for n in a if "layers.3." in n and "mlp" in n]
    change = math.sqrt(sum((b[n] - a[n]).double().square().sum() for n in names) / sum(a[n].double().square().sum() for n in names))
    line = next(line for line in shown.splitlines() if line.startswith("    3 "))
    assert float(line.split()[2].rstrip("%")) == pytest.approx(100 * change, abs=0.01)
