"""merge.py's command line: OUT, the disk, t, schedules and mergekit's files; what cannot be ends in one line."""

import shutil
import sys

import pytest

import merge
from merge_pairs import files_of, fixture_pair_and_out, fixture_refused, run  # noqa: F401
from nanomed import InputError
from nanomed.merging import checks, mergekit_yaml, stream, write


def test_out_exists(pair_and_out, monkeypatch):
    base, cpt, out = pair_and_out
    out.mkdir()
    (out / "mine").write_text("keep me")
    with pytest.raises(SystemExit, match=r"error: OUT .*exists already"):
        run(monkeypatch, base, cpt, out)
    assert files_of(out) == {"mine": b"keep me"}


def test_too_little_disk_is_found_before_writing(pair_and_out, monkeypatch):
    free = shutil.disk_usage("/")._replace(free=33 * 10**6)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: free)
    monkeypatch.setattr(write, "create", lambda *_: pytest.fail("wrote"))
    monkeypatch.setattr(checks, "check_out", lambda out, n, real=checks.check_out: real(out, n + 967 * 10**6))
    with pytest.raises(SystemExit, match=r"needs 1.00 GB, the disk has 0.03 GB free"):
        run(monkeypatch, *pair_and_out)


def test_a_full_disk_is_one_line(pair_and_out, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stream, "write_fully", full)
    with pytest.raises(SystemExit, match="No space left"):
        run(monkeypatch, *pair_and_out)
    assert not pair_and_out[2].exists()
    assert not list(pair_and_out[2].parent.glob("*.tmp"))


@pytest.mark.parametrize("t", ["-0.5", "1.5"])
def test_extrapolation_is_allowed_and_said(t, pair_and_out, monkeypatch, capsys):
    run(monkeypatch, *pair_and_out, f"--t={t}")
    assert f"warning: t = {t} lies outside [0, 1]" in capsys.readouterr().err
    assert pair_and_out[2].exists()


@pytest.mark.parametrize("flags", [["--t", "nan"], ["--sweep", "0,x"], ["--t", "inf"], ["--sweep", "0,inf"], ["--sweep", "0,,1"]])
def test_t_is_no_number(flags, refused):
    refused(lambda *_: None, flags[0], flags=flags)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("t: [", "YAML"), ("0.5", "one key"), ("x: 0.5", "one key"), ("t: {filter: mlp}", "t"), ("t: []", "t"), ("t: half", "half"),
        ("t: [0, .nan]", "nan"), ("t: [{filter: mlp, value: 1}]", "gives no t for"), ("t: [{filter: mlp, valu: 1}]", "valu"),
    ],
)  # fmt: skip
def test_a_schedule_file_that_is_none(content, named, refused, tmp_path):
    (tmp_path / "t.yaml").write_text(content)
    refused(lambda *_: None, "t.yaml", named, flags=("--t-file", tmp_path / "t.yaml"))


def test_flags_that_exclude_each_other(capsys):
    for argv in (
        ["a", "b", "c", "--t", "1", "--sweep", "0,1"], ["a", "b"], ["a", "b", "c", "d"], ["a", "b", "c", "--stats-only"],
        ["c", "--mergekit-yaml", "x", "--t", "0.5"], ["a", "b", "c", "--mergekit-yaml", "x"],
    ):  # fmt: skip
        with pytest.raises(SystemExit) as exit_:
            merge.parse(argv)
        assert exit_.value.code == 2
    assert "exclude each other" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("a: [", "YAML"),
        ("models: []", "merge_method"),
        ("{merge_method: slerp, base_model: x, models: [{model: a}, {model: b}]}", "base_model"),
        ("{merge_method: slerp, models: [{model: a}, {model: b}]}", "base_model"),
        ("{merge_method: linear, dtype: int8, models: [{model: a}]}", "int8"),
        ("{merge_method: linear, models: [{model: BASE}, {model: CPT}]}", "gives no weight for"),
        ("{merge_method: linear, parameters: {weight: 0}, models: [{model: BASE}, {model: CPT}]}", "sum to 0"),
        ("{merge_method: slerp, base_model: BASE, models: [{model: BASE}, {model: CPT}]}", "gives no t for"),
        ("{merge_method: slerp, base_model: BASE, models: [{model: BASE}, {model: nowhere}]}", "nowhere"),
    ],
)
def test_a_mergekit_configuration_that_cannot_be(content, named, pair_and_out, tmp_path, monkeypatch):
    base, cpt, out = pair_and_out
    (tmp_path / "c.yml").write_text(content.replace("BASE", str(base)).replace("CPT", str(cpt)))
    with pytest.raises(SystemExit) as exit_:
        run(monkeypatch, out, "--mergekit-yaml", tmp_path / "c.yml")
    line = str(exit_.value.code)
    assert line.startswith("error: ")
    assert named in line
    assert "\n" not in line
    assert not out.exists()
    assert sys.argv[1] == str(out)


@pytest.mark.parametrize(
    "content",
    [
        "{merge_method: slerp, models: 3}",
        "{merge_method: slerp, models: [a, b]}",
        "{merge_method: linear, slices: 3}",
        "{merge_method: slerp, slices: [{sources: [{model: a, layer_range: 2}]}]}",
        "{merge_method: slerp, base_model: a, models: [{model: a}, {model: b}], parameters: 3}",
        "{merge_method: slerp, base_model: a, models: [{model: a}, {model: b}], dtype: [1]}",
        "{merge_method: [slerp]}",
    ],
)
def test_a_mergekit_configuration_laid_out_wrongly(content, tmp_path):
    (tmp_path / "c.yml").write_text(content)
    with pytest.raises(InputError, match=r"c.yml: is not laid out"):
        mergekit_yaml.read_config(tmp_path / "c.yml")


def test_a_configuration_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"error: .*/nope\.yml: no such file$"):
        run(monkeypatch, tmp_path / "out", "--mergekit-yaml", tmp_path / "nope.yml")


def test_a_place_to_write_that_is_none(pair_and_out, tmp_path, monkeypatch):
    base, cpt, _ = pair_and_out
    (tmp_path / "file").write_text("")
    for flags in ((tmp_path / "file" / "out",), ("--emit-mergekit", tmp_path / "nowhere" / "c.yml")):
        with pytest.raises(SystemExit, match=r"error: .*(file|nowhere)"):
            run(monkeypatch, base, cpt, *flags)
