"""The planner against bytes counted: the real training step at full width, on tensors that have a shape and no memory."""

import dataclasses
import json
import sys

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nanomed.model
from conftest import write_bins
from nanomed import InputError, devices, optim, parallel, plan, run_script
from nanomed.batches import Batch
from nanomed.config import RECIPES, Config
from nanomed.kernels import adamw, cross_entropy, linear_cross_entropy, providers, roofline
from nanomed.metrics import flops_per_token
from nanomed.model import Decoder
from nanomed.parallel import World

QWEN, MISTRAL, SMALL, LLAMA, QWEN3, SMOL = plan.MODELS
FP32 = plan.REGIMES[0]


# --- bytes counted ---------------------------------------------------------------------------------------------------


class Bytes(TorchDispatchMode):
    """Bytes of all storages made so far that are alive, and the most of them at any time. FSDP frees by resizing to 0."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            x = x._local_tensor if isinstance(x, DTensor) else x
            if isinstance(x, torch.Tensor):
                self.storages.setdefault(x.untyped_storage()._cdata, StorageWeakRef(x.untyped_storage()))
        self.peak = max(self.peak, self.now())
        return out

    def now(self) -> int:
        self.storages = {key: ref for key, ref in self.storages.items() if not ref.expired()}
        return sum(torch.UntypedStorage._new_with_weak_ptr(ref.cdata).nbytes() for ref in self.storages.values())


def _accumulate_in_place(acc, a, b, first):
    """What addmm does on a GPU: no product beside the sum."""
    acc.copy_(a[:, :1] * b[:1, :1]) if first else acc.add_(a[:, :1] * b[:1, :1])


@pytest.fixture
def gpu_loss(monkeypatch):
    """Kernels that take the memory they take on a GPU: the loss' gradient in the logits' place, sums in place."""
    monkeypatch.setattr(adamw, "add_rounded_torch_", lambda total, grad, seed: total.add_(grad))
    monkeypatch.setattr(nanomed.model, "CPU_CHUNK", nanomed.model.GPU_CHUNK)
    monkeypatch.setattr(linear_cross_entropy, "_add_matmul", _accumulate_in_place)
    way = cross_entropy.TORCH._replace(loss_and_grad=lambda logits, *_: (torch.zeros(()), logits))

    def loss(hidden, weight, targets, scale, z_loss=0.0, chunk=4096):
        return linear_cross_entropy._apply(hidden, weight, targets, scale, z_loss, chunk, way)

    return dataclasses.replace(providers.TORCH, linear_cross_entropy=loss)


def counted(model_config, kernels, n_ranks: int, recompute: str, n: int, **regime) -> tuple[int, int, int]:
    """(held throughout, kept for the backward, peak) bytes on rank 0 of a step's second micro-batch of n tokens."""
    if n_ranks > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=n_ranks)
    world = World(0, 0, n_ranks, torch.device("cpu"), None)
    config = Config(recompute=recompute, compile=False, **regime)
    try:
        with torch.device("meta"):
            model = Decoder(model_config, torch.bfloat16, kernels)
        parallel.parallelize(model, config, world)
        with FakeTensorMode(allow_non_fake_inputs=True), Bytes() as n_bytes:
            model.to_empty(device="cpu")
            optimizer = optim.make_adamw(model, config)  # held: its moments
            tokens = [torch.zeros(n, dtype=torch.int64) for _ in range(3)]
            batch = Batch(*tokens, torch.zeros(17, dtype=torch.int32), torch.tensor([16, n]), 0)
            for _ in range(2):
                held, n_bytes.peak = n_bytes.now(), 0
                loss = model(batch, torch.ones(()))
                kept = n_bytes.now()
                loss.backward()
                del loss
        assert optimizer.state
        return held, kept, n_bytes.peak
    finally:
        if n_ranks > 1:
            dist.destroy_process_group()


CASES = [  # model, GPUs, recompute, tokens: each of the three is the largest somewhere
    (QWEN, 1, "none", 4096),
    (QWEN, 1, "selective", 4096),
    (QWEN, 1, "full", 16384),
    (QWEN, 8, "selective", 4096),
    (MISTRAL, 1, "selective", 16384),
    (MISTRAL, 8, "none", 4096),
    (MISTRAL, 8, "full", 16384),
    (SMALL, 8, "full", 4096),
    (QWEN3, 1, "none", 4096),
    (QWEN3, 8, "selective", 4096),
]


@pytest.mark.parametrize(("name", "n_gpus", "recompute", "n"), CASES)
def test_peak_is_within_a_tenth_of_the_bytes_counted(name, n_gpus, recompute, n, gpu_loss):
    """Not of the whole peak, which the weights would carry, but of what comes and goes."""
    c = dataclasses.replace(plan.MODELS[name], num_hidden_layers=3)
    held, kept, peak = counted(c, gpu_loss, n_gpus, recompute, n)
    n_params, _ = plan.parameters(c)
    assert held == pytest.approx(16 * n_params / n_gpus, rel=0.001)
    activations = plan.activation_bytes(c, n, recompute) + plan.kept_cast_bytes(c, FP32, n_gpus, recompute)
    # Of dW: FSDP gathers bf16, and then one chunk needs no float32.
    a_number = 2 if n_gpus > 1 and n <= nanomed.model.GPU_CHUNK else 4
    of_loss = a_number * c.vocab_size * c.hidden_size + 2 * n * c.hidden_size  # dW and dX are made in the forward pass
    gathered = 2 * c.vocab_size * c.hidden_size if n_gpus > 1 else 0  # lm_head stays between the two
    assert activations + of_loss + gathered == pytest.approx(kept - held, rel=0.01)
    transient = plan.transient_bytes(c, n, FP32, n_gpus, recompute)
    assert activations + max(transient.values()) == pytest.approx(peak - held, rel=0.1)


@pytest.mark.parametrize(("recompute", "n"), [("none", 4096), ("selective", 8192)])
def test_of_bf16_weights_on_one_gpu_too(recompute, n, gpu_loss):
    """One chunk of the loss and two: between micro-batches the gradients' sums hold no float32 memory."""
    c = dataclasses.replace(plan.MODELS[QWEN], num_hidden_layers=3)
    held, _, peak = counted(c, gpu_loss, 1, recompute, n, precision="pure-bf16", optimizer_states="bf16")
    assert held == pytest.approx(8 * plan.parameters(c)[0], rel=0.001)
    regime = next(r for r in plan.REGIMES if (r.weights, r.gradients, r.states) == (2, 2, 4))
    transient = plan.transient_bytes(c, n, regime, 1, recompute)
    assert plan.activation_bytes(c, n, recompute) + max(transient.values()) == pytest.approx(peak - held, rel=0.1)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_what_autograd_saves_is_the_formula_for_none(qk_norm, gpu_loss):
    """The same by torch's own hooks, on real tensors."""
    c = plan.ModelConfig(64, 48, 160, 2, 6, 2, 16, 1e-6, 1e4, False, qk_norm=qk_norm)
    model, n, seen = Decoder(c, torch.bfloat16, gpu_loss), 256, {}

    def note(x):
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    tokens = [torch.zeros(n, dtype=torch.int64) for _ in range(3)]
    batch = Batch(*tokens, torch.tensor([0, n], dtype=torch.int32), torch.tensor([1, n]), 0)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        hidden = model.hidden(batch)
    n_bytes = sum(seen.values()) - sum(seen.get(p.untyped_storage().data_ptr(), 0) for p in model.parameters())
    n_bytes -= plan.kept_cast_bytes(c, FP32, 1, "none")
    assert hidden.requires_grad
    assert plan.activation_bytes(c, n, "none") == pytest.approx(n_bytes, rel=0.1)


# --- shapes, speed, advice -------------------------------------------------------------------------------------------


def test_the_models_have_their_sizes():
    """Of the paper's three, and of the others; the kernels' benchmark measures at the paper's."""
    sizes = {name: plan.parameters(c)[0] / 1e9 for name, c in plan.MODELS.items()}
    known = {QWEN: 7.6156, MISTRAL: 7.2480, SMALL: 23.5724, LLAMA: 8.030261, QWEN3: 8.190735, SMOL: 0.134515}
    assert sizes == pytest.approx(known, rel=1e-5)
    assert {r.init for name, r in RECIPES.items() if name != "miniature"} == set(plan.MODELS)
    for name, shape in zip((QWEN, MISTRAL, SMALL), roofline.MODELS.values(), strict=True):
        c = plan.MODELS[name]
        assert (shape.hidden, shape.intermediate, shape.vocab) == (c.hidden_size, c.intermediate_size, c.vocab_size)
        assert (shape.q_heads, shape.k_heads) == (c.num_attention_heads, c.num_key_value_heads)


def test_time_and_money_by_hand():
    job = plan.parse("--recipe qwen2.5-7b --gpus 8 --gpu h100 --mfu 0.5 --price 2 --epoch-tokens 1e9 --epochs 3".split())
    with torch.device("meta"):
        flop = flops_per_token(Decoder(job.model)) + 6 * 28 * 28 * 128 * 4096
    assert flop == pytest.approx(44.9e9, rel=0.01)
    tok_s = plan.tokens_per_second(job, "selective")
    assert tok_s == pytest.approx(8 * 0.5 * 989e12 / flop)
    assert plan.tokens_per_second(job, "full") == pytest.approx(0.75 * tok_s)
    hours = 3e9 / tok_s / 3600
    line = next(row for row in plan.report(job).splitlines() if row.startswith("--recompute selective"))
    assert line.split()[2:] == [f"{tok_s:,.0f}", f"{hours:,.1f}", f"{hours * 8 * 2:,.0f}"]
    three = plan.parse("--recipe qwen2.5-7b --gpus 3 --mfu 0.5".split())  # 256 windows in 86 rounds of 3
    assert plan.tokens_per_second(three, "none") == pytest.approx(3 / 8 * tok_s * 256 / 258)


def test_tokens_come_from_the_bins_or_the_steps(tmp_path):
    write_bins(tmp_path / "bins", [[1, 2, 3]] * 10, 320)
    assert plan.parse(["--recipe", "qwen2.5-7b"]).n_tokens == 2 * 5.1e9
    assert plan.parse(["--recipe", "qwen2.5-7b", "--data", f"{tmp_path}/bins@0.5"]).n_tokens == 2 * 0.5 * 40
    assert plan.parse(["--recipe", "qwen2.5-7b", "--steps", "7"]).n_tokens == 7 * 1048576


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--recipe qwen2.5-7b", "--precision pure-bf16"),  # fp32 weights do not fit 80 GB, whatever the states
        ("--recipe qwen2.5-7b --gpus 8", "--optimizer-states fp32 --recompute none"),
        ("--recipe mistral-small-24b --gpus 8", "--optimizer-states fp32"),
        (
            "--recipe llama-3.1-8b",
            "--precision pure-bf16 --optimizer-states bf16 --recompute full: 68.7 of 85.5 GB, the most exact that leaves 5 GB "
            "free; a third faster: --precision pure-bf16 --optimizer-states int8 --recompute none, 70.9 GB",
        ),
        (
            "--recipe mistral-small-24b --gpu a100",
            "does not fit 1; the leanest regime with --recompute full fits 4 A100, or --offload --recompute full, slow, "
            "these 1 and 660 GB of the CPUs' memory",
        ),
        ("--recipe qwen2.5-7b --micro-batch 256", "fits no number of H100"),
    ],
)
def test_advice(flags, says):
    job = plan.parse(flags.split())
    assert says in plan.advice(job)
    assert says in plan.report(job).splitlines()[-1]


def test_flags_of_another_machine_can_be_planned():
    """float8 and Triton need a GPU to run; to plan they need none."""
    job = plan.parse("--recipe qwen2.5-7b --float8 --kernels triton --optimizer-states int8".split())
    assert job.config.float8


def test_offloading_moves_what_is_held_to_the_cpu():
    """16 bytes a parameter leave the GPU; FSDP's buffers come, on one GPU too, and a block in float32 passes through."""
    plain, offloaded = (plan.parse(["--recipe", "mistral-7b", *flags]) for flags in ([], ["--offload"]))
    n_params, block = plan.parameters(plain.model)
    assert sum(plan.held(offloaded, FP32).values()) == 16 * n_params
    before, after = (plan.memory(job, FP32, "full") for job in (plain, offloaded))
    assert after["weights"] == after["gradients"] == after["optimiser states"] == 0
    assert before["weights"] == 4 * n_params
    assert after["moment"] == max(plan.transient_bytes(plain.model, 4096, FP32, 2, "full").values()) + 4 * block
    rows = [line.split() for line in plan.report(offloaded).splitlines()]
    assert next(row for row in rows if row[:1] == ["weights"])[1:] == ["0.0"] * 4
    for job, a_number in (
        (plain, 12),
        (offloaded, 16 + 12),
    ):  # a checkpoint is written from a copy of weights and moments
        rows = [line.split() for line in plan.report(job).splitlines()]
        assert f"{a_number * n_params / 1e9:.1f}" == next(row for row in rows if row[:2] == ["CPU", "memory"])[-4]


def test_what_it_advises_leaves_five_gb(monkeypatch):
    for name in list(RECIPES)[:5]:
        for n_gpus in (1, 2, 8):
            job = plan.parse(["--recipe", name, "--gpus", str(n_gpus), "--gpu", "h200"])
            fits = [(r, m) for r in plan.REGIMES for m in plan.RECOMPUTE if plan.peak(job, r, m) <= 150.75e9 - 5e9]
            assert (f"{fits[0][0].flags} --recompute {fits[0][1]}:" if fits else "does not fit") in plan.advice(job)


def test_another_model_by_its_folder(tiny, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plan", *f"--recipe smollm2-135m --init {tiny.model} --gpu rtx4090".split()])
    plan.main()
    out = capsys.readouterr().out
    assert "1 x RTX 4090 of 25.8 GB" in out
    assert "dollars for a GPU hour" in out
    assert json.loads((tiny.model / "config.json").read_text())["vocab_size"] == 384


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gpu h1000", "--gpu h1000: not in the table; there are H100 PCIe, "),
        ("--gpus 2 --replicas 4", "--replicas 4: does not divide --gpus 2"),
        ("--gpus 0", "--gpus 0: must be at least 1"),
        ("--batch-tokens 1000000", "--batch-tokens 1000000: not a multiple of --seq-len 4096 x --micro-batch 1"),
        ("--mfu 45", "--mfu 45: is a share of the peak"),
        ("--price 0", "--price 0: must be more than 0"),
        ("--init some/model", "--init some/model: no such folder"),
        ("--data no/bins", "no/bins"),
        ("--recipe llama-9", "--recipe llama-9: no such recipe"),
        ("--seq-len 65536", "--seq-len 65536: the model was made for 32768"),
    ],
)
def test_bad_input_is_one_line(flags, message, monkeypatch, capsys):
    recipe = [] if "--recipe" in flags else ["--recipe", "qwen2.5-7b"]
    monkeypatch.setattr(sys, "argv", ["plan", *recipe, *flags.split()])
    with pytest.raises(SystemExit) as stopped:
        run_script(plan.main)
    assert str(stopped.value).startswith("error: ")
    assert message in str(stopped.value)
    assert "\n" not in str(stopped.value)


def test_gpus_are_found_by_any_spelling():
    assert devices.find("A100-40gb") == ("A100 40GB", devices.GPUS["A100 40GB"])
    assert devices.find("H100")[1].memory_bytes == 81559 * 2**20
    with pytest.raises(InputError, match="H200"):
        devices.find("tpu")
