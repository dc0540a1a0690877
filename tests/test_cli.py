"""The command line from end to end, on tiny images with an untrained prior."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import discs, recon, series, tiny_prior

from inverse.io.dicom import read_series
from inverse.metrics import body_mask
from inverse.priors import load_prior
from recon_cli.options import parse_slices


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    tiny_prior(root / "ct.safetensors")
    tiny_prior(root / "mr.safetensors", "MR")
    series(root / "ct", 4)
    series(root / "mr", 2, modality="MR")
    return root


def quick(root: Path, out: Path, *more: object) -> list[object]:
    prior = root / "ct.safetensors"
    return ["-o", out, "--prior", prior, "--steps", 2, "--seed", 3, "--quiet", *more]


@pytest.fixture(scope="module")
def study(root: Path) -> Path:
    """A CT study of two slices with two samples."""
    where = quick(root, root / "study", "--samples", 2, "--slices", "1:4:2", "--views", 8)
    assert recon("study", "ct", root / "ct", *where) == 0
    return root / "study"


def load(path: Path) -> Any:
    return json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(f"{c} in {path}"))


# --- study -------------------------------------------------------------------------------------


def test_study_holds_what_the_design_says(study: Path) -> None:
    names = {p.name for p in study.iterdir()}
    assert names == {
        "recon", "std", "baseline-fbp", "baseline-tv", "truth", "maps", "report.html",
        "metrics.json", "run.json",
    }  # fmt: skip
    for name in ("recon", "std", "baseline-fbp", "baseline-tv", "truth"):
        assert len(list((study / name).glob("*.dcm"))) == 2
    assert not list(study.parent.glob(".study*")), "no temporary folder is left"


def test_study_is_in_hounsfield_units_at_the_right_place(study: Path, root: Path) -> None:
    source, truth = read_series(root / "ct"), read_series(study / "truth")
    np.testing.assert_allclose(truth.array, source.array[[1, 3]], atol=1.0)
    for name in ("recon", "baseline-fbp", "std"):
        np.testing.assert_allclose(
            read_series(study / name).positions, source.positions[[1, 3]], atol=1e-6
        )
    fbp = read_series(study / "baseline-fbp").array
    mask = body_mask(truth.array, -500)
    assert abs(fbp[mask].mean() - truth.array[mask].mean()) < 60
    std = read_series(study / "std").array
    assert 1 < np.median(std) < 500


def test_metrics_are_those_of_the_written_series(study: Path) -> None:
    from pydicom import dcmread

    metrics = load(study / "metrics.json")
    assert {"schema_version", "mask", "data_range", "methods", "per_slice"} <= set(metrics)
    assert (metrics["mask"], metrics["data_range"]) == ("body", 2000.0)
    assert set(metrics["methods"]) == {"fbp", "tv", "prior"}
    truth = read_series(study / "truth").array
    mask = body_mask(truth, -500)
    for name, folder in (("fbp", "baseline-fbp"), ("tv", "baseline-tv"), ("prior", "recon")):
        row = metrics["methods"][name]
        # the files themselves: a reader takes values below -1024 HU, which FBP has, for padding
        files = [dcmread(f) for f in sorted((study / folder).iterdir())]
        error = np.stack([f.pixel_array * float(f.RescaleSlope) for f in files]) - truth
        values = [20 * np.log10(2000 / np.sqrt(np.mean(e[m] ** 2)))
                  for e, m in zip(error, mask, strict=True)]  # fmt: skip
        assert row["psnr"]["mean"] == pytest.approx(np.mean(values), abs=0.02)
        assert row["psnr"]["ci95"][0] <= row["psnr"]["mean"] <= row["psnr"]["ci95"][1]
        assert [e[name]["psnr"] for e in metrics["per_slice"]] == pytest.approx(values, abs=0.02)
        assert {"ssim", "nrmse", "residual_chi2", "seconds", "network_calls"} <= set(row)
    assert [e["slice"] for e in metrics["per_slice"]] == [1, 3]
    assert metrics["methods"]["prior"]["network_calls"] == 2
    assert metrics["methods"]["tv"]["psnr"]["mean"] > metrics["methods"]["fbp"]["psnr"]["mean"]


def test_run_log(study: Path, root: Path) -> None:
    run = load(study / "run.json")
    assert run["schema_version"] == 1
    assert run["command"] == "study ct"
    assert run["argv"][:6] == ["recon", "study", "ct", "IN", "-o", "OUT"]
    assert run["retrospective_simulation"] is True
    assert (run["seed"], run["device"]) == (3, "cpu")
    assert {"python", "torch", "numpy", "astra-toolbox", "pydicom", "recon-sde"} <= set(
        run["versions"]
    )
    assert run["settings"]["simulation"]["views"] == 8
    assert run["settings"]["reconstruction"]["steps"] == 2
    assert run["inputs"]["images"]["files"] == 4
    assert re.fullmatch("[0-9a-f]{64}", run["inputs"]["images"]["sha256"])
    assert run["prior"]["name"] == "tiny-ct"
    for name in ("recon", "std", "baseline-fbp", "metrics.json"):
        assert re.fullmatch("[0-9a-f]{64}", run["outputs"][name]["sha256"])
    assert {"read", "simulate", "baselines", "prior", "write"} <= set(run["timings_seconds"])
    assert str(root) not in json.dumps(run)


def test_dicom_says_simulated_and_by_what(study: Path) -> None:
    from pydicom import dcmread

    ds = dcmread(study / "recon" / "0001.dcm")
    assert ds.SyntheticData == "YES"
    assert "retrospective simulation" in ds.DerivationDescription
    assert "prior tiny-ct sha256" in ds.DerivationDescription
    fbp = dcmread(study / "baseline-fbp" / "0001.dcm")
    assert "prior" not in fbp.DerivationDescription
    assert fbp.SeriesInstanceUID != ds.SeriesInstanceUID
    assert fbp.SeriesNumber != ds.SeriesNumber


def test_no_patient_data_outside_dicom(root: Path, tmp_path: Path) -> None:
    """Values planted in the headers and in the folder's name reach no report and no log."""
    from pydicom import dcmread

    folder = series(tmp_path / "CANARY^FOLDER", 2)
    for file in folder.iterdir():
        ds = dcmread(file)
        ds.PatientName, ds.PatientID, ds.PatientBirthDate = "CANARY^NAME", "CANARYID", "19010203"
        ds.StudyDescription = ds.InstitutionName = "CANARY <script>"
        ds.save_as(file)
    out = tmp_path / "out"
    where = quick(root, out, "--no-tv", "--matrix", 32, "--verbose", "--json")
    where.remove("--quiet")
    command = [sys.executable, "-m", "recon_cli.app", "study", "ct", folder, *where]
    done = subprocess.run(
        [str(c) for c in command],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    everything = done.stdout + done.stderr.replace(str(folder), "")
    everything += "".join(p.read_text() for p in out.iterdir() if p.is_file())
    assert "CANARY" not in everything
    assert "19010203" not in everything
    assert json.loads(done.stdout)["methods"]["prior"]


def test_one_sample_has_no_std_and_says_so(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = quick(root, tmp_path / "out", "--no-tv", "--slices", "0", "--matrix", 32)
    where.remove("--quiet")
    assert recon("study", "ct", root / "ct", *where) == 0
    out, err = capsys.readouterr()
    assert not (tmp_path / "out" / "std").exists()
    assert "NO_STD" in err
    assert "NO_STD" in (tmp_path / "out" / "run.json").read_text()
    assert "Retrospective simulation" in out
    ds = read_series(tmp_path / "out" / "recon")
    assert ds.array.shape == (1, 32, 32)
    assert ds.spacing[1:] == (12.0, 12.0), "a coarser matrix covers the same field"
    metrics = load(tmp_path / "out" / "metrics.json")
    assert metrics["methods"]["prior"]["psnr"]["ci95"] is None


def test_fan_beam_and_limited_angle(root: Path, tmp_path: Path) -> None:
    common = quick(root, tmp_path / "out", "--no-tv", "--slices", "0", "--geometry", "fan")
    assert recon("study", "ct", root / "ct", *common, "--views", 30, "--arc", 120) == 0
    metrics, run = load(tmp_path / "out" / "metrics.json"), load(tmp_path / "out" / "run.json")
    assert set(metrics["methods"]) == {"cgls", "prior"}, "FBP does not serve a short fan scan"
    assert "NO_FBP" in [w["code"] for w in run["warnings"]]
    assert run["settings"]["simulation"]["arc"] == 120


def test_result_does_not_depend_on_the_batch(root: Path, tmp_path: Path) -> None:
    arrays = []
    for batch in (1, 3):
        out = tmp_path / str(batch)
        where = quick(root, out, "--no-tv", "--slices", "0:2", "--samples", 2, "--batch", batch)
        assert recon("study", "ct", root / "ct", *where) == 0
        arrays.append(read_series(out / "recon").array)
    assert np.abs(arrays[0] - arrays[1]).max() <= 1.0


def test_study_mri(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    where = quick(root, out, "--prior", root / "mr.safetensors", "--samples", 2)
    assert recon("study", "mri", root / "mr", *where, "--acceleration", 2) == 0
    metrics = load(out / "metrics.json")
    assert set(metrics["methods"]) == {"zero-filled", "l1-wavelet", "tv", "prior"}
    assert metrics["unit"] == "signal"
    assert metrics["methods"]["zero-filled"]["psnr"]["mean"] > 20
    source = read_series(root / "mr")
    slope = load(out / "run.json")["outputs"]["truth"]["slope"]
    truth = read_series(out / "truth").array * slope
    np.testing.assert_allclose(truth, source.array, atol=slope)


def test_study_mri_of_several_coils(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    where = quick(root, out, "--prior", root / "mr.safetensors", "--slices", 0, "--no-tv")
    scan = ["--coils", 4, "--acceleration", 3, "--mask", "poisson", "--centre", 0.3]
    assert recon("study", "mri", root / "mr", *where, *scan) == 0
    metrics = load(out / "metrics.json")
    assert set(metrics["methods"]) == {"zero-filled", "cg-sense", "prior"}
    psnr = {name: row["psnr"]["mean"] for name, row in metrics["methods"].items()}
    assert psnr["cg-sense"] > psnr["zero-filled"] + 1
    settings = load(out / "run.json")["settings"]
    assert settings["simulation"]["coils"] == 4
    assert settings["reconstruction"]["phase"] == "estimated"
    narrow = ["--coils", 4, "--acceleration", 4, "--mask", "uniform1d", "--centre", 0.05]
    assert recon("study", "mri", root / "mr", *where, "--overwrite", *narrow) == 4


def test_study_inpaint_is_judged_in_the_hole(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    where = quick(root, out, "--slices", "0:2", "--hole", 0.25)
    assert recon("study", "inpaint", root / "ct", *where) == 0
    metrics = load(out / "metrics.json")
    assert metrics["mask"] == "missing pixels"
    zero_filled = read_series(out / "baseline-zero-filled").array
    hole = zero_filled == -1000
    assert hole[0, 24:40, 24:40].all()
    truth = read_series(out / "truth").array[0, 24:40, 24:40]
    expected = 20 * np.log10(2000 / np.sqrt(np.mean((truth + 1000.0) ** 2)))
    assert metrics["per_slice"][0]["zero-filled"]["psnr"] == pytest.approx(expected, abs=0.05)


def test_overwrite_replaces(root: Path, tmp_path: Path) -> None:
    where = quick(root, tmp_path / "out", "--no-tv", "--slices", "0", "--matrix", 32)
    assert recon("study", "ct", root / "ct", *where) == 0
    (tmp_path / "out" / "stale").write_text("")
    assert recon("study", "ct", root / "ct", *where) == 6
    assert recon("study", "ct", root / "ct", *where, "--overwrite") == 0
    assert not (tmp_path / "out" / "stale").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# --- simulate, reconstruct ---------------------------------------------------------------------


def test_simulate_then_reconstruct_is_the_study(root: Path, tmp_path: Path, study: Path) -> None:
    file = tmp_path / "scan.h5"
    arguments = ["--slices", "1:4:2", "--views", 8, "--seed", 3, "--quiet"]
    assert recon("simulate", "ct", root / "ct", "-o", file, *arguments) == 0
    assert recon("reconstruct", file, *quick(root, tmp_path / "out", "--samples", 2)) == 0
    for name in ("recon", "std", "baseline-fbp"):
        ours, theirs = read_series(tmp_path / "out" / name), read_series(study / name)
        np.testing.assert_array_equal(ours.array, theirs.array)
    metrics = load(tmp_path / "out" / "metrics.json")
    assert [e["slice"] for e in metrics["per_slice"]] == [1, 3]
    assert metrics["methods"]["fbp"]["psnr"]["mean"] > 10, "the file holds the truth"


def test_reconstruct_raw_data_without_headers_or_truth(root: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from inverse.io.measurement_file import read_measurement, write_measurement

    file, raw = tmp_path / "scan.h5", tmp_path / "raw.h5"
    recon("simulate", "ct", root / "ct", "-o", file, "--slices", "0:2", "--views", 8, "--quiet")
    measurement = replace(read_measurement(file).measurement, provenance={})
    write_measurement(raw, measurement, z_mm=[10.0, 14.0])
    out = tmp_path / "out"
    assert recon("reconstruct", raw, *quick(root, out)) == 0
    written = read_series(out / "recon")
    assert written.spacing == (4.0, 6.0, 6.0)
    assert written.positions[:, 2].tolist() == [10.0, 14.0]
    metrics, run = load(out / "metrics.json"), load(out / "run.json")
    assert metrics["mask"] is None
    assert set(metrics["methods"]["fbp"]) == {
        "title", "residual_chi2", "seconds", "network_calls"
    }  # fmt: skip
    assert run["retrospective_simulation"] is False
    assert "NO_TEMPLATE" in [w["code"] for w in run["warnings"]]
    assert "SyntheticData" not in _header(out / "baseline-fbp")
    assert _header(out / "recon").SyntheticData == "YES", "a generative prior made it"


def _header(folder: Path) -> Any:
    from pydicom import dcmread

    return dcmread(folder / "0001.dcm")


def test_data_of_a_slice_do_not_depend_on_the_others(root: Path, tmp_path: Path) -> None:
    from inverse.io.measurement_file import read_measurement

    data = []
    for name, slices in (("some.h5", "1:4:2"), ("one.h5", "3")):
        arguments = ["-o", tmp_path / name, "--slices", slices, "--views", 4, "--quiet"]
        assert recon("simulate", "ct", root / "ct", *arguments) == 0
        data.append(read_measurement(tmp_path / name).measurement.data[-1])
    assert bool((data[0] == data[1]).all())


@pytest.mark.parametrize("command", ["mri", "inpaint"])
def test_simulate_others(root: Path, tmp_path: Path, command: str) -> None:
    from inverse.io.measurement_file import read_measurement

    arguments = ["simulate", command, root / "mr", "-o", tmp_path / "m.h5", "--quiet"]
    assert recon(*arguments) == 0
    file = read_measurement(tmp_path / "m.h5")
    assert len(file.measurement) == len(file.template) == len(file.z_mm) == 2
    assert recon(*arguments) == 6
    assert recon(*arguments, "--overwrite") == 0


# --- demo and the small commands ---------------------------------------------------------------


def test_demo(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    size = ["--slices", 2, "--matrix", 64, "--samples", 2, "--views", 12]
    assert recon("demo", *quick(root, out), *size) == 0
    table = capsys.readouterr().out
    assert "Prior (dds)" in table
    assert str(out / "report.html") in table
    assert "mathematical phantom" in table
    assert "mathematical phantom" in _header(out / "recon").DerivationDescription
    phantom, truth = read_series(out / "phantom"), read_series(out / "truth")
    np.testing.assert_allclose(phantom.array, truth.array, atol=1.0)
    assert {p.name for p in out.iterdir()} >= {"recon", "std", "baseline-fbp", "baseline-tv"}
    codes = {warning["code"] for warning in json.loads((out / "run.json").read_text())["warnings"]}
    assert "NO_POSITIONS" not in codes  # slices are coupled at their true distance


def test_inspect(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recon("inspect", root / "ct", "--json") == 0
    (stack,) = json.loads(capsys.readouterr().out)["stacks"]
    assert (stack["modality"], stack["slices"], stack["spacing_mm"]) == ("CT", 4, [5.0, 6.0, 6.0])
    assert isinstance(stack["priors"], list)
    assert recon("inspect", root / "ct") == 0
    assert "64 x 64" in capsys.readouterr().out


def test_priors(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recon("priors", "show", root / "ct.safetensors") == 0
    assert "it was never trained" in capsys.readouterr().out
    assert recon("priors", "verify", root / "ct.safetensors", "--json") == 0
    assert json.loads(capsys.readouterr().out)["name"] == "tiny-ct"
    assert recon("priors", "list", "--json") == 0
    assert isinstance(json.loads(capsys.readouterr().out), list)


def test_the_default_method_is_that_of_the_library() -> None:
    import inspect

    from inverse import reconstruct
    from recon_cli.options import DEFAULT_METHOD

    assert inspect.signature(reconstruct).parameters["method"].default == DEFAULT_METHOD


def test_methods_and_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert recon("methods", "--json") == 0
    methods = json.loads(capsys.readouterr().out)
    assert methods["dds"]["network_calls"] == 40
    assert methods["pnp_admm"]["network_calls"] == 20
    assert recon("methods") == 0
    assert "Decomposed diffusion sampling" in capsys.readouterr().out
    assert recon("doctor", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert len(found["adjoint_errors"]) == 4
    assert max(found["adjoint_errors"].values()) < 1e-5


def test_doctor_fails_on_a_wrong_adjoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from inverse.operators.mask import Mask

    monkeypatch.setattr(Mask, "_adjoint", lambda self, y: 2 * y)
    assert recon("doctor") == 9
    out, err = capsys.readouterr()
    assert "FAILED" in out
    assert "adjoint of mask" in err


def test_train_writes_a_prior_that_reconstructs(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        rng = np.random.default_rng(seed)
        np.savez(tmp_path / f"{name}.npz", hu=discs(4) + rng.normal(0, 20, (4, 64, 64)))
        rows = "".join(f"{name}{k},6.0,{'xy'[k % 2]}\n" for k in range(4))
        (tmp_path / f"{name}.csv").write_text("patient,pixel_mm,collection\n" + rows)
    out = tmp_path / "new.safetensors"
    arguments = [
        "train", "--data", f"{tmp_path / 'a.npz'}:0.7", "--data", tmp_path / "b.npz",
        "--select", "collection=x", "--phantoms", 1, "--modality", "ct", "--out", out,
        "--steps", 2, "--widths", "8,8", "--blocks", 1, "--size", 64, "--crop", 32, "--batch", 2,
        "--pixel-mm", "5:8", "--licence", "CC0", "--limit", "too small", "--json",
    ]  # fmt: skip
    assert recon(*arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 2
    assert recon("priors", "show", out, "--json") == 0
    card = json.loads(capsys.readouterr().out)
    assert [s["name"] for s in card["training_data"]] == ["a", "b", "random chest phantoms"]
    assert card["training_data"][0]["weight"] == 0.7
    assert (card["offset"], card["scale"], card["unit"]) == (-500.0, 500.0, "HU")
    assert card["pixel_mm_range"] == [5.0, 8.0]
    network = load_prior(out).net.config
    assert (network.widths, network.blocks) == ((8, 8), 1)
    assert str(tmp_path) not in json.dumps(card)
    assert recon(*arguments) == 6, "an existing prior is kept"
    where = quick(root, tmp_path / "out", "--no-tv", "--slices", "0", "--prior", out)
    assert recon("study", "ct", root / "ct", *where) == 0


# --- parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, [0, 1, 2, 3, 4]),
        ("1:4", [1, 2, 3]),
        ("::2", [0, 2, 4]),
        ("-2:", [3, 4]),
        ("3", [3]),
    ],
)
def test_slices(text: str | None, expected: list[int]) -> None:
    assert parse_slices(text, 5) == expected


def test_body_mask_holds_the_lungs_and_not_the_table() -> None:
    image = discs(1)
    image[0, 60:62, 4:60] = 100.0
    mask = body_mask(image, -500)[0]
    y, x = (np.mgrid[:64, :64] - 31.5) / 32
    inside = (x / 0.8) ** 2 + (y / 0.6) ** 2
    assert mask[inside < 0.9].all(), "lungs are filled"
    assert not mask[inside > 1.1].any(), "the table is left out"
    assert not body_mask(np.full((1, 8, 8), -1000.0), -500).any()


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from recon_cli.app import main; main(['--help']);"
        "sys.exit(bool({'torch', 'matplotlib', 'astra', 'pydicom', 'numpy'} & set(sys.modules)))"
    )
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        check=False,
    )
    assert done.returncode == 0
    assert time.monotonic() - start < 10
    for name in ("demo", "inspect", "simulate", "reconstruct", "study", "report", "train",
                 "priors", "methods", "doctor"):  # fmt: skip
        assert name in done.stdout
