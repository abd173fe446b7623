"""nanomed/figures.py: the same numbers give the same file, whose text is text."""

import subprocess
import sys

from conftest import ROOT
from nanomed.figures import canvas, save, svg


def drawn():
    figure, (left, right) = canvas(6, 3, columns=2)
    left.plot([1, 2], [3, 4], "o", label="Herz & Leber")
    left.legend()
    right.set_title("Niere")
    return figure


def test_the_same_numbers_give_the_same_bytes(tmp_path):
    for name in "ab":
        save(drawn(), tmp_path / name)
    text = (tmp_path / "a").read_text()
    assert text == (tmp_path / "b").read_text()
    assert ">Herz &amp; Leber</text>" in text
    assert "date>" not in text
    assert svg(drawn()) == text[text.index("<svg") :]


def test_matplotlib_is_imported_where_something_is_drawn():
    code = "import sys, nanomed.plot, nanomed.evaluation.report, nanomed.merging.report; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
