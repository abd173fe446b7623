"""kernels/ and the Hugging Face package of the same name live together: in the clone, in a wheel, beside transformers.

transformers imports a package `kernels` where one is installed. A kernels/__init__.py in the clone would be taken for it.
"""

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile

import pytest

import mutations
from conftest import ROOT


def run_python(code: str, cwd, path=None) -> str:
    """What the code prints in a fresh interpreter; path: PYTHONPATH (none: -P would drop the cwd, so -c keeps it)."""
    env = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"} | ({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_is_no_package_of_its_own():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "nanomed" / "kernels").is_symlink()
    assert (ROOT / "nanomed" / "kernels").readlink().as_posix() == "../kernels"


def test_every_mutation_still_finds_its_line():
    """Else `python tests/mutations.py` would end there, minutes after its start."""
    for what, file, old, _ in mutations.MUTATIONS:
        assert old in (ROOT / "kernels" / f"{file}.py").read_text(), (what, file, old)


def test_in_the_clone_transformers_finds_hugging_faces_kernels():
    """With the clone first on the path, as it is for `python -c` and scripts in it."""
    assert importlib.metadata.version("kernels")  # in the extra `test`: without it this test would prove nothing
    code = (
        "import nanomed.kernels.linear_cross_entropy as ours, transformers, kernels;"
        "from transformers.integrations import hub_kernels;"
        "print(ours.__file__, kernels.__file__, sep='\\n')"
    )
    ours, theirs = run_python(code, cwd=ROOT).split()
    assert ours == str(ROOT / "nanomed" / "kernels" / "linear_cross_entropy.py")
    assert "site-packages" in theirs


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the clone, unpacked; the folder."""
    folder = tmp_path_factory.mktemp("wheel")
    clone = folder / "clone"
    ignore = shutil.ignore_patterns(".*", "bins", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, clone, symlinks=True, ignore=ignore)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--skip-dependency-check"]
    done = subprocess.run([*build, "--outdir", folder, clone], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_the_wheel_holds_the_kernels_as_files(wheel):
    for file in (ROOT / "kernels").glob("*.py"):
        copied = wheel / "nanomed" / "kernels" / file.name
        assert not copied.is_symlink()
        assert copied.read_bytes() == file.read_bytes()
    for file in (p for folder in ("nanomed", "nanomed/merging") for p in (ROOT / folder).glob("*.py")):
        assert (wheel / file.relative_to(ROOT)).exists()
    assert not (wheel / "kernels").exists()


def test_the_wheel_imports_outside_the_clone(wheel, tmp_path):
    code = "import nanomed.kernels.linear_cross_entropy as ours, nanomed, transformers, kernels; print(ours.__file__)"
    assert run_python(code, tmp_path, path=wheel).strip().startswith(str(wheel))
