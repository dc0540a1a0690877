"""Options from a file: their order, their checks, and what the run log keeps of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cli_tools import recon, series, tiny_prior

from phantoms.series import write_phantom_series


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("config")
    tiny_prior(root / "tiny.safetensors")
    series(root / "ct", 2)
    return root


def config(folder: Path, text: str) -> Path:
    path = folder / "my.toml"
    path.write_text(text)
    return path


def test_command_line_over_file_over_default(root: Path, tmp_path: Path) -> None:
    file = config(
        tmp_path,
        f'''
        prior = "{root / "tiny.safetensors"}"
        out = "{tmp_path / "out"}"
        views = 8
        steps = 5
        seed = 4
        method = "dds"
        option = ["weight=3.0"]
        tv = false
        slices = "1"
        ''',
    )
    code = recon("study", "ct", root / "ct", "--config", file, "--steps", 2, "--quiet")
    assert code == 0
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    options = run["options"]
    assert (options["views"], options["seed"], options["tv"]) == (8, 4, False)
    assert options["steps"] == 2, "the command line wins"
    assert options["batch"] == 8, "defaults are there too"
    assert options["arc"] is None
    assert options["option"] == ["weight=3.0"]
    assert (options["prior"], options["out"]) == ("tiny.safetensors", "out"), "no folder names"
    assert not {"quiet", "json", "config", "help"} & set(options)
    reconstruction = run["settings"]["reconstruction"]
    assert (reconstruction["method"], reconstruction["weight"]) == ("dds", 3.0)
    assert run["settings"]["slices"] == [1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("view = 8", "sets 'view', which 'recon study ct' does not have; it has"),
        ('path = "x"', "sets 'path'"),
        ('config = "x"', "sets 'config'"),
        ("views = 2.5", "'--views'"),
        ("views = 0", "'--views'"),
        ("views = true", "'views' is one text or number, got True"),
        ("views = [8]", "'views' is one text or number"),
        ("tv = 0", "'tv' is true or false, got 0"),
        ('option = "a=1"', "'option' is a list"),
        ("seed = 1979-05-27", "'seed' is one text or number"),
        ("[study]\nviews = 8", "sets 'study'"),
        ('geometry = "helix"', "helix"),
        ("views 8", "not valid TOML"),
    ],
)
def test_refusals(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    file = config(tmp_path, text)
    code = recon("study", "ct", root / "ct", "-o", tmp_path / "out", "--config", file)
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not (tmp_path / "out").exists()


def test_absent_file(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["-o", tmp_path / "out", "--config", tmp_path / "none.toml"]
    assert recon("study", "ct", root / "ct", *arguments) == 2
    assert "cannot be read (No such file" in capsys.readouterr().err


def test_limits_hold_before_decoding(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    little = ["--limits", 0.001, "--quiet"]
    big = tmp_path / "big"
    write_phantom_series(big, np.zeros((3, 512, 512), np.float32), (5.0, 1.0, 1.0), seed=1)
    assert recon("simulate", "ct", big, "-o", tmp_path / "scan.h5", *little) == 7
    assert recon("study", "ct", big, "-o", tmp_path / "out", *little) == 7
    more = ["--slices", 0, "--matrix", 512, "--quiet"]
    assert recon("simulate", "inpaint", big, "-o", tmp_path / "scan.h5", *more) == 0
    prior = root / "tiny.safetensors"
    scan = ["reconstruct", tmp_path / "scan.h5", "-o", tmp_path / "out", "--prior", prior]
    assert recon(*scan, *little) == 7
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert not (tmp_path / "out").exists()
