"""merge.py: the formula in float64, every dtype, tied and untied, run folders, sweeps; whole or not there; bounded memory."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

import merge
from conftest import ROOT, run_train, save_reference
from nanomed import InputError, hf, shards
from nanomed.checkpoint import whole
from nanomed.merging import report, stream, write
from nanomed.merging.schedule import read_rules
from nanomed.merging.slerp import DOT_THRESHOLD, Stats, factors
from nanomed.merging.source import open_checkpoint

SHAPE = dict(vocab_size=384, hidden_size=32, intermediate_size=56, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, bos_token_id=0, eos_token_id=0)  # fmt: skip
CONFIGS = {"untied": LlamaConfig(**SHAPE), "tied": Qwen2Config(**SHAPE, tie_word_embeddings=True)}
BITS = {torch.bfloat16: 7, torch.float16: 10}


# --- pairs and the reference ---------------------------------------------------------------------------------------


def make_pair(folder: Path, tokenizer: Path, kind: str = "untied", dtype=torch.bfloat16, **saving) -> tuple[Path, Path]:
    """BASE and CPT with BASE's tokenizer; layer i differs by 1, 2, 8 or 30 %, the last norm is zero in both."""
    base, cpt = folder / "base", folder / "cpt"
    model = save_reference(CONFIGS[kind], base, dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.save_pretrained(base, **saving)
        for name, p in model.named_parameters():
            change = (0.01, 0.02, 0.08, 0.3)[int(name.split(".")[2])] if ".layers." in name else 0.005
            noise = torch.randn(p.shape, generator=generator) * p.float().norm() / p.numel() ** 0.5
            p.add_((change * noise).to(p.dtype))
        model.save_pretrained(cpt, **saving)
    for path in (base, cpt):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tokenizer / file, path / file)
    return base, cpt


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors that the folder's index, or its one file, names."""
    return {name: load_file(file)[name] for name, file in hf.find_weights(folder).items()}


def reference(a: torch.Tensor, b: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The two terms of SLERP in float64, as mergekit's page has it, and the cosine."""
    a, b = a.double().flatten(), b.double().flatten()
    cos = float(a @ b / (a.norm() * b.norm())) if min(a.norm(), b.norm()) > 1e-8 else 0.0
    if abs(cos) > DOT_THRESHOLD:
        return (1 - t) * a, t * b, cos
    theta = math.acos(cos)
    return math.sin((1 - t) * theta) / math.sin(theta) * a, math.sin(t * theta) / math.sin(theta) * b, cos


def assert_close(found: torch.Tensor, a: torch.Tensor, b: torch.Tensor, t: float, name: str = "") -> str:
    """At most one unit in the last place of the larger term (16 bits), 1e-6 of the norm (float32); the branch."""
    x, y, cos = reference(a, b, t)
    error = (found.double().flatten() - (x + y)).abs()
    if found.dtype == torch.float32:
        assert error.norm() <= 1e-6 * (x + y).norm(), name
    else:
        larger = torch.maximum(torch.maximum(x.abs(), y.abs()), (x + y).abs()).clamp_min(torch.finfo(found.dtype).tiny)
        assert (error <= torch.exp2(larger.log2().floor() - BITS[found.dtype])).all(), name
        assert error.norm() <= 2.0 ** -BITS[found.dtype] * (x + y).norm(), name  # a systematic shift would show here
    return "lerp" if abs(cos) > DOT_THRESHOLD else "slerp"


def run(monkeypatch, *flags) -> None:
    """merge.py in this process."""
    monkeypatch.setattr(sys, "argv", ["merge.py", *map(str, flags)])
    merge.main()


def files_of(folder: Path) -> dict[str, bytes]:
    """Contents of every file below, by path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def pair(tmp_path, tiny):
    return make_pair(tmp_path, tiny.model)


# --- arithmetic ----------------------------------------------------------------------------------------------------


def test_bf16_in_and_out_is_torchs():
    every = np.arange(1 << 16, dtype=np.uint16)
    finite = every[(every & 0x7F80) != 0x7F80]
    wide = torch.from_numpy(finite.view(np.int16)).view(torch.bfloat16).float()
    files, buffers = {}, (np.empty(stream.CHUNK, np.uint16), np.empty(stream.CHUNK, np.float32))
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 1 << 18, dtype=np.uint32)
    bits[: 1 << 17] &= 0xFFFF8000  # half of them exact ties
    x = bits.view(np.float32)
    x = x[np.isfinite(x) & (np.abs(x) < 3.38e38)]
    narrowed = stream.narrow(x.copy(), "BF16", buffers[1], buffers[0]).copy()
    assert np.array_equal(narrowed.view(np.int16), torch.from_numpy(x).bfloat16().view(torch.int16).numpy())
    again = stream.narrow(wide.numpy().copy(), "BF16", buffers[1], buffers[0])
    assert np.array_equal(again, finite)
    assert not files


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
    assert stats.cos == pytest.approx(
        cos, abs=2e-7 * (4 + longer)
    )  # Σ(b-a)² is rounded to float32 before |b|-|a| leaves it
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
        t = (
            (0, 1 / 3, 2 / 3, 1)[int(name.split(".")[2])]
            if "self_attn" in name
            else 0.9
            if "layers.3." in name
            else 0.25
        )
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
    change = math.sqrt(
        sum((b[n] - a[n]).double().square().sum() for n in names) / sum(a[n].double().square().sum() for n in names)
    )
    line = next(line for line in shown.splitlines() if line.startswith("    3 "))
    assert float(line.split()[2].rstrip("%")) == pytest.approx(100 * change, abs=0.01)


# --- a run folder --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A run of two ranks: weights cut by rows into two files."""
    out = tmp_path_factory.mktemp("run") / "run"
    done = run_train(
        tiny.flags(out, steps=4, checkpoint_every=2, eval_every=100, compile=None, **{"lr": 1e-3}), nproc=2
    )
    assert done.returncode == 0, done.stderr
    return out


def masters(run_folder: Path) -> dict[str, torch.Tensor]:
    """The float32 weights of the newest checkpoint, through torch's own reader."""
    metadata = dcp.FileSystemReader(whole(run_folder / "checkpoints")[-1][1]).read_metadata().state_dict_metadata
    state = {key: torch.empty(entry.size) for key, entry in metadata.items() if key.startswith("model.")}
    dcp.load(state, checkpoint_id=whole(run_folder / "checkpoints")[-1][1], no_dist=True)
    return {key.removeprefix("model."): value for key, value in state.items()}


def test_a_run_folder_gives_its_float32_weights(trained, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stream, "CHUNK", 700)  # chunks that cross from one rank's rows to the other's
    run(monkeypatch, tiny.model, trained, tmp_path / "out", "--t", "0.5", "--dtype", "float32", "--verify")
    assert "verified" in capsys.readouterr().out
    base, cpt, out = tensors_of(tiny.model), masters(trained), tensors_of(tmp_path / "out")
    assert out.keys() == cpt.keys()
    assert any((v != v.bfloat16().float()).any() for v in cpt.values())
    for name, found in out.items():
        assert_close(found, base[name], cpt[name], 0.5, name)
    assert "step 4" in (tmp_path / "out" / "merge_report.md").read_text()


def test_a_run_without_checkpoints_gives_its_export_and_an_empty_one_is_refused(trained, tiny, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    shutil.rmtree(copy / "checkpoints")
    run(monkeypatch, tiny.model, copy, tmp_path / "out", "--t", "1")
    expected, found = tensors_of(trained / "hf"), tensors_of(tmp_path / "out")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    shutil.rmtree(copy / "hf")
    with pytest.raises(InputError, match="no whole checkpoint"):
        open_checkpoint(str(copy), "CPT")


@pytest.mark.parametrize("what", ["cut", "missing", "metadata"])
def test_a_broken_checkpoint_is_named(what, trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    newest = whole(copy / "checkpoints")[-1][1]
    victim = newest / ".metadata" if what == "metadata" else sorted(newest.glob("*.distcp"))[0]
    if what == "missing":
        victim.unlink()
    else:
        os.truncate(victim, victim.stat().st_size // 8)  # the weights come before the optimiser's means
    with pytest.raises(InputError, match=victim.name if what != "metadata" else r"\.metadata") as error:
        open_checkpoint(str(copy), "CPT")
    assert "\n" not in str(error.value)


# --- whole or not there; the report --------------------------------------------------------------------------------


def test_what_lies_beside_the_weights(pair, tmp_path, monkeypatch):
    base, cpt = pair
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (base / "generation_config.json").write_text('{"temperature": 0.7}')
    (base / "notes.txt").write_text("not part of a checkpoint")
    run(monkeypatch, base, cpt, tmp_path / "out", "--preset", "gradient")
    written = files_of(tmp_path / "out")
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ):
        assert written[name] == (base / name).read_bytes()
    assert written.keys() - files_of(base).keys() == {
        "README.md",
        "merge_report.json",
        "merge_report.md",
        "merge_report.svg",
    }
    assert "notes.txt" not in written
    ElementTree.fromstring(written["merge_report.svg"])
    card = written["README.md"].decode()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "merge_report.svg" in card
    table = json.loads(written["merge_report.json"])["tensors"]
    assert len(table) == len(tensors_of(base))
    for row in table:
        assert f"| {row['tensor']} | {row['t']:.4g} |" in written["merge_report.md"].decode()
    assert not (tmp_path / "out.tmp").exists()


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def test_a_failure_leaves_nothing_and_a_kill_nothing_that_looks_whole(pair, tmp_path, monkeypatch):
    run(monkeypatch, *pair, tmp_path / "right" / "out", "--t", "0.4")
    with monkeypatch.context() as patch:
        patch.setattr(report, "plot", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run(monkeypatch, *pair, tmp_path / "a" / "out", "--t", "0.4")
    assert not any((tmp_path / "a").iterdir())
    flags = [*map(str, pair), str(tmp_path / "a" / "out")]
    script = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import merge; from nanomed.merging import report; "
        f"report.plot = lambda *_: os.kill(os.getpid(), 9); sys.argv[1:] = {flags!r}; merge.main()"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == -9
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["out.tmp"]
    run(monkeypatch, *pair, tmp_path / "a" / "out", "--t", "0.4")
    assert files_of(tmp_path / "a" / "out") == files_of(tmp_path / "right" / "out")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["out"]


@pytest.mark.parametrize("damage", ["bit", "swap", "tensor"])
def test_verify_finds_damage(damage, pair, tmp_path, monkeypatch, capsys):
    """A flipped bit, two tensors in each other's place, one left out."""
    whole_write = write.verify

    def damaged(inputs, folder, *rest):
        tensors = load_file(folder / "model.safetensors")
        victim, other = "model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"
        if damage == "bit":
            tensors[victim].view(torch.int16).view(-1)[7] ^= 1 << 3
        elif damage == "swap":
            tensors[victim], tensors[other] = tensors[other], tensors[victim]
        else:
            del tensors[victim]
        save_file(tensors, folder / "model.safetensors")
        return whole_write(inputs, folder, *rest)

    monkeypatch.setattr(write, "verify", damaged)
    with pytest.raises(SystemExit) as exit_:
        run(monkeypatch, *pair, tmp_path / "out", "--verify")
    assert "model.layers.1.mlp.up_proj.weight" in str(exit_.value.code)
    assert not (tmp_path / "out").exists()


# Linux counts the parent's size at the start into ru_maxrss; VmHWM is the process's own.
PEAK = """
import pathlib, resource
assert "torch" not in sys.modules
status = pathlib.Path("/proc/self/status")
if status.exists():
    print(int(status.read_text().split("VmHWM:")[1].split()[0]) / 1e3)
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""


def test_memory_does_not_grow_with_a_tensor_and_torch_stays_out(tmp_path, tiny):
    """Peak of the process for a pair with tensors of 4 MB and for one with a tensor of 200 MB."""
    peaks = []
    for rows in (10_000, 500_000):
        for name, scale in (("base", 1.0), ("cpt", 1.5)):
            folder = tmp_path / str(rows) / name
            folder.mkdir(parents=True)
            save_file(
                {"model.embed_tokens.weight": torch.full((rows, 200), scale, dtype=torch.bfloat16)},
                folder / "model.safetensors",
            )
            (folder / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
            shutil.copyfile(tiny.model / "tokenizer.json", folder / "tokenizer.json")
        flags = [str(tmp_path / str(rows) / name) for name in ("base", "cpt", "out")]
        script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import merge; sys.argv[1:] = {flags!r}; merge.main()\n{PEAK}"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(float(done.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 20, peaks  # MB
