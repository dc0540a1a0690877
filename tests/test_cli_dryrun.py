"""``--dry-run`` tells what a run would do, and fails where it would; ``--include-phi`` names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import recon, series, tiny_prior
from test_cli_convert import FORMATS, OPTIONS, raw_file

from inverse.io.measurement_file import read_measurement
from recon_cli.scans import TRIED_VIEWS, CtScan


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dry")
    tiny_prior(root / "ct.safetensors")
    tiny_prior(root / "mr.safetensors", "MR")
    series(root / "ct", 4)
    series(root / "mr", 2, modality="MR")
    assert recon("simulate", "ct", root / "ct", "-o", root / "scan.h5", "--views", 8, "-q") == 0
    return root


def commands(root: Path, out: Path) -> dict[str, list[object]]:
    """A command of each kind, small."""
    ct = ["-o", out, "--prior", root / "ct.safetensors", "--steps", 2]
    mr = ["-o", out, "--prior", root / "mr.safetensors", "--steps", 2]
    return {
        "study ct": ["study", "ct", root / "ct", *ct, "--views", 8, "--slices", "1:4:2",
                     "--samples", 2, "--pdf", "--no-tv"],
        "study mri": ["study", "mri", root / "mr", *mr, "--coils", 2, "--acceleration", 2,
                      "--no-tv"],
        "study inpaint": ["study", "inpaint", root / "ct", *ct, "--slices", "0:2", "--no-tv"],
        "reconstruct": ["reconstruct", root / "scan.h5", *ct],
        "simulate ct": ["simulate", "ct", root / "ct", "-o", out, "--views", 8],
        "simulate mri": ["simulate", "mri", root / "mr", "-o", out, "--coils", 2,
                         "--acceleration", 2],
    }  # fmt: skip


def everything(folder: Path) -> dict[str, float]:
    """Files with the time of their last change."""
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*")}


def size(path: Path) -> int:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)


def dry(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """The plan of a command."""
    capsys.readouterr()
    assert recon(*arguments, "--dry-run", "--json") == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["study ct", "study mri", "study inpaint", "reconstruct"])
def test_what_is_announced_is_written(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out = tmp_path / "deep" / "out"
    command = commands(root, out)[name]
    before = everything(root)
    plan = dry(capsys, *command)
    assert list(tmp_path.iterdir()) == []
    assert everything(root) == before
    assert (plan["dry_run"], plan["command"], plan["out"]) == (True, name, str(out))
    assert plan["settings"]["steps"] == 2
    assert recon(*command, "--quiet") == 0
    written = {p.name + "/" * p.is_dir(): p for p in out.iterdir()}
    assert {w["name"] for w in plan["writes"]} == set(written)
    for announced in plan["writes"]:
        path = written[announced["name"]]
        if path.is_dir() and announced["name"] != "maps/":
            assert announced["files"] == len(list(path.iterdir())), announced
            if announced["name"] != "report-dicom/":
                assert announced["bytes"] == pytest.approx(size(path), rel=0.3), announced
    run = json.loads((out / "run.json").read_text())
    metrics = json.loads((out / "metrics.json").read_text())
    count = len(run["settings"]["slices"])
    assert plan["reads"]["slices"] == run["settings"]["slices"]
    calls = metrics["methods"]["prior"]["network_calls"] * count * plan["settings"]["samples"]
    assert plan["settings"]["network_calls"] == calls
    for key, value in run["inputs"].items():
        assert plan["reads"][key] == value


@pytest.mark.parametrize("name", ["simulate ct", "simulate mri"])
def test_measurement_files_are_announced(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out = tmp_path / "scan.h5"
    command = commands(root, out)[name]
    plan = dry(capsys, *command)
    assert list(tmp_path.iterdir()) == []
    assert recon(*command, "--quiet") == 0
    (announced,) = plan["writes"]
    assert announced["bytes"] == pytest.approx(size(out), rel=0.25)
    measurement = read_measurement(out).measurement
    assert plan["settings"]["data_shape"] == list(measurement.data.shape)


@pytest.mark.parametrize("name", FORMATS)
def test_conversions_are_announced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path, out = raw_file(name, tmp_path), tmp_path / "m.h5"
    plan = dry(capsys, "convert", path, "-o", out, *OPTIONS.get(name, ()))
    assert not out.exists()
    assert (plan["reads"]["format"], plan["settings"]["shape"]) == (name, list(FORMATS[name]))
    assert "CANARY" not in json.dumps({k: v for k, v in plan.items() if k != "out"})


def test_a_dry_run_in_words(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recon(*commands(root, tmp_path / "out")["study ct"], "--dry-run") == 0
    out, err = capsys.readouterr()
    assert "method: pnp_admm" in out
    assert "report-dicom/" in out
    assert "dry run: nothing was written" in err


def failures(root: Path, bad: Path) -> dict[str, tuple[int, list[object]]]:
    """Commands that fail, each with its exit code; ``bad`` holds damaged input."""
    shutil.copytree(root / "ct", bad / "gap")
    (bad / "gap" / "0002.dcm").unlink()
    shutil.copytree(root / "ct", bad / "cut")
    file = bad / "cut" / "0003.dcm"
    file.write_bytes(file.read_bytes()[:-3000])
    (bad / "empty").mkdir()
    (bad / "scan.h5").write_bytes((root / "scan.h5").read_bytes()[:3000])
    (bad / "full").mkdir()
    (bad / "full" / "precious").write_text("mine")
    out = ["-o", bad / "out"]
    prior = ["--prior", root / "ct.safetensors"]
    study = ["study", "ct"]
    return {
        "nothing there": (3, [*study, bad / "nowhere", *out]),
        "no files": (3, [*study, bad / "empty", *out]),
        "missing slice": (4, [*study, bad / "gap", *out, *prior]),
        "truncated pixels": (4, [*study, bad / "cut", *out, *prior]),
        "no slice left": (4, [*study, root / "ct", *out, *prior, "--slices", "9:"]),
        "wrong modality": (4, [*study, root / "mr", *out, *prior]),
        "centre too small": (4, ["simulate", "mri", root / "mr", "-o", bad / "out.h5", "--coils",
                                 4, "--mask", "uniform1d", "--centre", 0.05]),
        "ending of no format": (2, ["simulate", "ct", root / "ct", "-o", bad / "scan.txt"]),
        "too many views": (7, [*study, root / "ct", *out, *prior, "--views", 10**9]),
        "wrong prior": (10, [*study, root / "ct", *out, "--prior", root / "mr.safetensors"]),
        "damaged file": (4, ["reconstruct", bad / "scan.h5", *out, *prior]),
        "no option": (2, [*study, root / "ct", *out, "--option", "magic=1"]),
        "over the limit": (7, [*study, root / "ct", *out, *prior, "--limits", 0.001,
                               "--slices", 0, "--matrix", 64]),
        "output not empty": (6, [*study, root / "ct", "-o", bad / "full", *prior]),
        "below a file": (6, [*study, root / "ct", "-o", bad / "full" / "precious" / "x", *prior]),
        "file below a file": (6, ["simulate", "ct", root / "ct", "-o",
                                  bad / "full" / "precious" / "x.h5"]),
    }  # fmt: skip


def test_a_dry_run_fails_where_the_run_does(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = failures(root, tmp_path)
    del cases["over the limit"]  # the tiny series is below every limit
    before = everything(tmp_path)
    for name, (code, command) in cases.items():
        lines = []
        for more in (["--dry-run"], []):
            capsys.readouterr()
            assert recon(*command, *more, "--quiet") == code, (name, more)
            out, err = capsys.readouterr()
            assert out == ""
            lines.append(err)
        assert lines[0] == lines[1], name
        assert everything(tmp_path) == before, name


def test_of_many_views_a_dry_run_tries_few(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    run = CtScan.run

    def spy(self: CtScan, *args: Any) -> Any:
        tried.append(self.views)
        return run(self, *args)

    monkeypatch.setattr(CtScan, "run", spy)
    out = tmp_path / "scan.h5"
    plan = dry(capsys, "simulate", "ct", root / "ct", "-o", out, "--views", 90000, "--slices", 0)
    assert tried == [TRIED_VIEWS]
    assert plan["settings"]["data_shape"] == [1, 90000, 92]
    assert plan["settings"]["geometry"].startswith("ParallelBeam(90000 views")
    assert plan["writes"][0]["bytes"] > 4 * 90000 * 92
    assert recon("simulate", "ct", root / "ct", "-o", out, "--views", 10**9, "--quiet") == 7
    assert "4 x 1000000000 x 92 values" in capsys.readouterr().err
    assert len(tried) == 1, "refused before anything is computed"


@pytest.mark.parametrize(
    "more", [(), ("--geometry", "fan"), ("--geometry", "cone", "--matrix", 16), ("--detector", 40)]
)
def test_shapes_of_scans_are_known_before(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[object, ...]
) -> None:
    out = tmp_path / "scan.h5"
    command = ["simulate", "ct", root / "ct", "-o", out, "--views", 17, "--slices", "0:2", *more]
    plan = dry(capsys, *command)
    assert recon(*command, "--quiet") == 0
    assert plan["settings"]["data_shape"] == list(read_measurement(out).measurement.data.shape)


def test_a_run_that_was_cut_short_is_not_passed_over(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / ".out.recon-work" / "saved"
    saved.mkdir(parents=True)
    np.savez(saved / "direct.npz", meta=np.zeros(1))
    command = commands(root, tmp_path / "out")["reconstruct"]
    before = everything(tmp_path)
    assert recon(*command, "--dry-run", "--quiet") == 6
    assert "--resume" in capsys.readouterr().err
    assert recon(*command, "--dry-run", "--quiet", "--resume") == 0
    assert everything(tmp_path) == before


# --- patient data, where the user asks ---------------------------------------------------------


def test_include_phi_names_the_patient(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = series(tmp_path / "CANARY folder", 2)
    out = tmp_path / "out"
    command = ["study", "ct", folder, "-o", out, "--prior", root / "ct.safetensors", "--steps", 2,
               "--views", 8, "--slices", 0, "--no-tv", "--quiet"]  # fmt: skip
    assert recon(*command, "--include-phi") == 0
    run = json.loads((out / "run.json").read_text())
    assert run["patient"]["PatientName"] == "PHANTOM^SEED 1"
    assert str(folder) in run["argv"]
    assert "PHANTOM^SEED 1" in (out / "report.html").read_text()
    capsys.readouterr()
    assert recon(*command, "--overwrite") == 0
    for path in out.iterdir():
        if path.is_file():
            assert "PHANTOM^SEED" not in path.read_text()
            assert "CANARY" not in path.read_text()


def test_inspect_names_patients_only_when_asked(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ([], ["--json"]):
        assert recon("inspect", root / "ct", *more) == 0
        assert "PHANTOM" not in capsys.readouterr().out
    assert recon("inspect", root / "ct", "--include-phi", "--json") == 0
    (stack,) = json.loads(capsys.readouterr().out)["stacks"]
    assert stack["patient"]["PatientID"] == "PHANTOM-1"
    assert recon("inspect", root / "ct", "--include-phi") == 0
    assert "PatientName: PHANTOM^SEED 1" in capsys.readouterr().out
