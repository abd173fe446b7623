"""Every command sets OpenMP's wait policy before torch is loaded, and its threads sleep while they wait."""

import os
import subprocess
import sys

import pytest

from conftest import ROOT

COMMANDS = [path for path in sorted((ROOT / "data").glob("*.py")) if '__name__ == "__main__"' in path.read_text()]
SCRIPTS = ["train.py", "merge.py", "eval.py", *(str(path.relative_to(ROOT)) for path in COMMANDS)]
MODULES = ["nanomed.plan", "nanomed.plot", "nanomed.batches", "nanomed.miniature", "nanomed.kernels.bench"]

# Runs a command up to the first import of torch, and prints the policy that torch would read.
PROBE = """
import os, runpy, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("policy", os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Finder())
how, name = sys.argv[1:3]
sys.argv = [name]
if how == "script":
    sys.path.insert(0, os.path.dirname(os.path.abspath(name)))
    runpy.run_path(name, run_name="probed")
else:
    runpy.run_module(name, run_name="probed")
import nanomed.model
"""


@pytest.mark.parametrize(("how", "name"), [("script", s) for s in SCRIPTS] + [("module", m) for m in MODULES])
def test_the_wait_policy_is_set_before_torch_is_loaded(how, name):
    env = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PROBE, how, name], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout == "policy PASSIVE\n", done.stdout + done.stderr


@pytest.mark.parametrize("name", ["data", "data_sweep", "eval", "merge", "train"])
def test_benchmarks_give_their_peers_the_same_policy(name):
    """The sides run in processes of their own, which inherit the environment."""
    code = "import os, runpy, sys; runpy.run_path(sys.argv[1]); print(os.environ['OMP_WAIT_POLICY'])"
    path = ROOT / "tests" / "bench" / f"{name}.py"
    env = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    env["PYTHONPATH"] = os.pathsep.join((str(path.parent), str(ROOT)))
    done = subprocess.run([sys.executable, "-c", code, path], env=env, capture_output=True, text=True)
    assert done.stdout == "PASSIVE\n", done.stdout + done.stderr


def test_a_policy_of_the_users_stays():
    code = "import nanomed, os; print(os.environ['OMP_WAIT_POLICY'])"
    env = os.environ | {"OMP_WAIT_POLICY": "ACTIVE"}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout == "ACTIVE\n"
