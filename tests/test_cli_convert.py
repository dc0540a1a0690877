"""``recon convert``: raw data of every format to a measurement file that reconstructs."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from cli_tools import recon, series, tiny_prior
from test_raw_formats import (
    BINS,
    images,
    kspace,
    lines,
    oversampled,
    smooth_coils,
    write_bart,
    write_ctpd,
    write_dxchange,
    write_fastmri,
    write_ismrmrd,
    xml,
)

from inverse.io.measurement_file import read_measurement


def raw_file(name: str, folder: Path) -> Path:
    """One coil, or a few slices of discs."""
    if name == "ismrmrd":
        header = xml(patient="CANARY")
        return write_ismrmrd(folder / "CANARY.h5", lines(oversampled(images())), header)
    if name == "fastmri":
        return write_fastmri(folder / "CANARY.h5", oversampled(images())[:, 0], None, xml())
    if name == "bart":
        return write_bart(folder / "CANARY", kspace(images()))
    if name == "ctpd":
        return write_ctpd(folder / "CANARY", views=24)
    write_dxchange(folder / "CANARY.h5")
    return folder / "CANARY.h5"


FORMATS = {
    "ismrmrd": (2, 12, 10),
    "fastmri": (2, 12, 10),
    "bart": (2, 12, 10),
    "ctpd": (1, 24, 96),
    "dxchange": (3, 60, BINS),
}
OPTIONS = {"bart": ("--pixel-mm", "2"), "ctpd": ("--matrix", "32"), "dxchange": ("--matrix", "32")}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_becomes_a_measurement_file(tmp_path, capsys, name):
    path, out = raw_file(name, tmp_path), tmp_path / "m.h5"
    assert recon("convert", path, "-o", out, "--json", *OPTIONS.get(name, ())) == 0
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert (told["format"], tuple(told["shape"])) == (name, FORMATS[name])
    file = read_measurement(out)
    assert tuple(file.measurement.data.shape) == FORMATS[name]
    assert "simulation" not in file.measurement.provenance
    # neither the file's name nor what it says of the patient goes further
    assert b"CANARY" not in out.read_bytes()
    assert "CANARY" not in json.dumps({k: v for k, v in told.items() if k != "out"})
    assert "CANARY" not in printed.err


def test_several_coils_are_stored_with_their_maps(tmp_path):
    n = 48
    v, u = np.mgrid[:n, :n] / n - 0.5
    x = (((u / 0.35) ** 2 + (v / 0.42) ** 2 < 1) * smooth_coils(n))[None]
    write_bart(tmp_path / "ksp", kspace(x))
    out = tmp_path / "m.h5"
    assert recon("convert", tmp_path / "ksp", "-o", out, "--pixel-mm", "4") == 0
    measurement = read_measurement(out).measurement
    assert measurement.data.shape == (1, 4, n, n)
    assert measurement.operator.spec() == {"type": "sense", "shape": [n, n], "coils": 4}


def test_converted_data_are_reconstructed_as_measured(tmp_path, capsys):
    rng = np.random.default_rng(0)
    x = 100 * rng.random((1, 1, 64, 64))
    write_bart(tmp_path / "ksp", kspace(x))
    prior = tiny_prior(tmp_path / "mr.safetensors", "MR")
    assert recon("convert", tmp_path / "ksp", "-o", tmp_path / "m.h5", "--pixel-mm", "6") == 0
    code = recon("reconstruct", tmp_path / "m.h5", "-o", tmp_path / "out", "--prior", prior,
                 "--steps", "2")  # fmt: skip
    assert code == 0
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["settings"]["measurement"]["source"] == "BART"
    assert "Measured data" in capsys.readouterr().out


def test_slices_limits_and_overwriting(tmp_path, capsys):
    path, out = raw_file("dxchange", tmp_path), tmp_path / "m.h5"
    common = ("convert", path, "-o", out, "--matrix", "32")
    assert recon(*common, "--slices", "1:3", "--centre", "61.3") == 0
    file = read_measurement(out)
    assert file.z_mm == (1.5, 3.0)
    assert file.measurement.provenance["rotation_centre_from"] == "given"
    assert recon(*common) == 6
    assert recon(*common, "--overwrite", "--limits", "0.001") == 0
    assert recon(*common, "--overwrite", "--slices", "9") == 4
    assert recon(*common, "--overwrite", "--slices", "x") == 2
    with h5py.File(path, "r+") as f:  # a small file that claims gigabytes
        del f["exchange/data"]
        f.create_dataset("exchange/data", (60, 3, 10**7), np.float32, chunks=(1, 1, 1000))
    capsys.readouterr()
    assert recon(*common, "--overwrite", "--limits", "0.5") == 7
    assert "--limits" in capsys.readouterr().err


def test_template_gives_the_patient_and_the_place(tmp_path):
    source = series(tmp_path / "images", 2, modality="MR")
    write_bart(tmp_path / "ksp", kspace(np.ones((2, 1, 64, 64))))
    common = ("convert", tmp_path / "ksp", "-o", tmp_path / "m.h5", "--pixel-mm", "6")
    assert recon(*common, "--template", source) == 0
    assert len(read_measurement(tmp_path / "m.h5").template) == 2
    other = series(tmp_path / "other", 3, modality="MR")
    assert recon(*common, "--overwrite", "--template", other) == 4


@pytest.mark.parametrize(
    ("name", "arguments", "code", "text"),
    [
        ("bart", (), 2, "--pixel-mm"),
        ("fastmri", ("--format", "ismrmrd"), 4, "dataset/xml"),
        ("ismrmrd", ("--contrast", "3"), 4, "no contrast 3"),
    ],
)
def test_refusals(tmp_path, capsys, name, arguments, code, text):
    path, out = raw_file(name, tmp_path), tmp_path / "m.h5"
    assert recon("convert", path, "-o", out, *arguments) == code
    assert text in capsys.readouterr().err
    assert not out.exists()


def test_nothing_there(tmp_path, capsys):
    assert recon("convert", tmp_path / "absent.h5", "-o", tmp_path / "m.h5") == 3
    (tmp_path / "x.h5").write_text("not HDF5")
    assert recon("convert", tmp_path / "x.h5", "-o", tmp_path / "m.h5") == 4
    assert "raw formats" in capsys.readouterr().err


def test_helical_scans_are_refused_with_the_reason(tmp_path, capsys):
    folder = write_ctpd(tmp_path / "in", views=4,
                        change=lambda ds, k: ds.add_new(0x70371009, "CS", "HELICAL"))  # fmt: skip
    assert recon("convert", folder, "-o", tmp_path / "m.h5") == 5
    assert "helical" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ismrmrd", "fastmri", "bart", "dxchange"])
def test_inspect_names_raw_data_and_what_takes_them(tmp_path, capsys, name):
    path = raw_file(name, tmp_path)
    path = path.with_suffix(".cfl") if name == "bart" else path
    assert recon("inspect", path, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["raw"]["kind"], told["raw"]["command"]) == (name, "convert")
    assert recon("inspect", path) == 0
    assert "recon convert" in capsys.readouterr().out


def test_inspect_describes_a_measurement_file(tmp_path, capsys):
    path = raw_file("fastmri", tmp_path)
    assert recon("convert", path, "-o", tmp_path / "m.h5") == 0
    capsys.readouterr()
    assert recon("inspect", tmp_path / "m.h5", "--json") == 0
    told = json.loads(capsys.readouterr().out)["raw"]
    assert (told["kind"], told["operator"], told["shape"]) == ("measurement", "mri", [2, 12, 10])
    assert (told["simulated"], told["has_truth"]) == (False, False)
    assert recon("inspect", tmp_path / "m.h5") == 0
    assert "recon reconstruct" in capsys.readouterr().out
    (tmp_path / "m.h5").write_bytes((tmp_path / "m.h5").read_bytes()[:300])
    assert recon("inspect", tmp_path / "m.h5") == 4
