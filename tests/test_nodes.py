"""Several nodes: two torchruns that find each other, a rank that dies, the example for Slurm, the GPU benchmark."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from conftest import ROOT, read_losses, run_train

# train.py, whose rank 1 kills itself before the update of step 5, once.
DIES_ONCE = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import train
marker, real = Path({marker!r}), train.optim.lr_at
def lr_at(step, *args):
    if step == 5 and os.environ["RANK"] == "1" and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return real(step, *args)
train.optim.lr_at = lr_at
train.main()
"""


def test_two_nodes_go_on_by_themselves_and_train_as_one(tiny, tmp_path):
    """Two torchruns of one process each; one process is killed, both start anew: the losses of one node with two.

    Without the variable in the environment processes that start anew get the store, and the addresses, of the dead ones
    (torch 2.13; pytorch #135712).
    """
    marker, script = tmp_path / "died", tmp_path / "dies.py"
    script.write_text(DIES_ONCE.format(root=str(ROOT), marker=str(marker)))
    same = dict(steps=7, checkpoint_every=2, val=None)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # keeps its port
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    node = [*torchrun, "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d",
            f"--rdzv-endpoint=127.0.0.1:{store.port}", "--rdzv-conf=is_host=false", "--rdzv-id=test", "--local-addr=127.0.0.1",
            str(script), *tiny.flags(tmp_path / "two", **same)]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    nodes = [subprocess.Popen(node, env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        said = [process.communicate()[1] for process in nodes]
    finally:
        for process in nodes:
            process.terminate()
    assert [process.returncode for process in nodes] == [0, 0], said
    assert marker.exists()
    assert "resuming from" in "".join(said)
    one = run_train(tiny.flags(tmp_path / "one", **same), nproc=2)
    assert one.returncode == 0, one.stderr
    assert read_losses(tmp_path / "two") == read_losses(tmp_path / "one")


@pytest.mark.parametrize("script", ["tests/bench/gpu.sh", "tests/bench/slurm/several_nodes.sbatch"])
def test_shell_scripts_parse(script):
    done = subprocess.run(["bash", "-n", ROOT / script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_gpu_sh_says_how_it_is_called():
    done = subprocess.run([ROOT / "tests/bench/gpu.sh"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "usage: tests/bench/gpu.sh tests|kernels|train\n")


def test_the_gpu_benchmark_runs_here_and_what_was_measured_survives_a_kill(tmp_path):
    """The whole of train_gpu.py on a tiny shape: both sides begin with the same loss; then killed at its third step."""
    script, out = ROOT / "tests" / "bench" / "train_gpu.py", tmp_path / "train.json"
    flags = ["--device", "cpu", "--models", "tiny", "--states", "fp32", "--seq-len", "128", "--out", str(out)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script, *flags, "--steps", "4", "--profile"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    ours, peer = result["rows"]
    assert result["finished"]
    assert ours["steps"] == peer["steps"] == 4
    assert ours["losses"] == pytest.approx(peer["losses"], rel=1e-3)
    for row in (ours, peer):
        dearest = [kernel["ms"] for kernel in row["kernels_of_a_step"]]
        assert dearest == sorted(dearest, reverse=True)
        assert dearest[0] > 0
        assert min(row["seconds"]) > 0
    out.unlink()
    process = subprocess.Popen([sys.executable, script, *flags, "--steps", "100000", "--sides", "ours"], env=env,
                               stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    while not out.exists() or json.loads(Path(out).read_text())["rows"][0].get("steps", 0) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    result = json.loads(out.read_text())
    assert not result["finished"]
    assert len(result["rows"][0]["losses"]) == result["rows"][0]["steps"] >= 3
