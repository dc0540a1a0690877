"""``recon phantom``: every format holds the same object, and impossible wishes are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_tools import recon

from inverse.classical import fbp
from inverse.io.measurement_file import read_measurement
from inverse.io.series import read_series
from inverse.operators.units import MU_WATER, hu_to_mu, mu_to_hu
from phantoms.catalogue import PHANTOMS
from phantoms.published import acr_ct

SMALL = ("--size", 32)


def test_list_names_every_phantom_and_its_unit(capsys):
    assert recon("phantom", "--list") == 0
    told = capsys.readouterr().out
    for name in [*PHANTOMS, "texture"]:
        assert name in told
    assert "signal" in told
    assert "HU" in told


def test_arrays_hold_image_geometry_unit_and_lesions(tmp_path: Path, capsys):
    out = tmp_path / "chest.npz"
    assert recon("phantom", "chest", "-o", out, *SMALL, "--slices", 2, "--seed", 4, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["unit"] == "HU"
    with np.load(out) as file:
        assert file["image"].shape == (2, 32, 32)
        assert file["image"].dtype == np.float32
        assert str(file["unit"]) == "HU"
        np.testing.assert_allclose(file["pixel_mm"], 360 / 32)
        np.testing.assert_allclose(file["z_mm"], [-2, 2])
        assert len(file["lesion"]) == len(file["lesion_site"]) == told["lesions"] > 0
        image = file["image"]
    bare = tmp_path / "chest.npy"
    assert recon("phantom", "chest", "-o", bare, *SMALL, "--slices", 2, "--seed", 4) == 0
    np.testing.assert_array_equal(np.load(bare), image)
    healthy = tmp_path / "healthy.npy"
    assert (
        recon(
            "phantom", "chest", "-o", healthy, *SMALL, "--slices", 2, "--seed", 4, "--no-lesions"
        )
        == 0
    )
    assert not np.array_equal(np.load(healthy), image)


def test_dicom_and_nifti_hold_the_same_volume(tmp_path: Path):
    options = ("phantom", "shepp-logan-3d", *SMALL, "--slices", 3, "--spacing-mm", 6)
    options += ("--thickness-mm", 4)
    for out in ("dicom", "volume.nii.gz", "plain.nii", "array.npy"):
        assert recon(*options, "-o", tmp_path / out) == 0, out
    array = np.load(tmp_path / "array.npy")
    for out in ("dicom", "volume.nii.gz", "plain.nii"):
        read = read_series(tmp_path / out)
        assert read.modality == "CT"
        np.testing.assert_allclose(read.array, array, atol=0.51)
        np.testing.assert_allclose(np.diff(read.positions[:, 2]), 6, atol=1e-5)
    again = tmp_path / "again"
    assert recon(*options, "-o", again) == 0
    for path in (tmp_path / "dicom").glob("*.dcm"):
        assert path.read_bytes() == (again / path.name).read_bytes()
    run = json.loads((again / "run.json").read_text())
    assert run["command"] == "phantom"
    assert run["settings"]["phantom"]["z_mm"] == [-6, 0, 6]


def test_dicom_of_the_brain_names_its_sequence(tmp_path: Path):
    from pydicom import dcmread

    options = ("--size", 32, "--slices", 1, "--contrast", "flair", "--field", 3)
    assert recon("phantom", "brain", "-o", tmp_path / "b", *options) == 0
    header = dcmread(next((tmp_path / "b").glob("*.dcm")))
    assert header.MagneticFieldStrength == 3
    assert list(header.ScanningSequence) == ["SE", "IR"]
    assert (header.RepetitionTime, header.EchoTime) == (9000, 120)
    assert header.InversionTime == pytest.approx(
        4300 * np.log(2 / (1 + np.exp(-9000 / 4300))), abs=0.01
    )


def test_mu_is_at_the_stated_energy(tmp_path: Path):
    for name, options in (("hu", ()), ("mu", ("--unit", "mu", "--kev", 60))):
        assert recon("phantom", "acr-ct", "-o", tmp_path / f"{name}.npy", *SMALL, *options) == 0
    hu, mu = np.load(tmp_path / "hu.npy"), np.load(tmp_path / "mu.npy")
    np.testing.assert_allclose(mu, hu_to_mu(hu, 0.02059), rtol=1e-5, atol=1e-8)


def test_acr_slices_are_the_modules(tmp_path: Path):
    assert recon("phantom", "acr-ct", "-o", tmp_path / "a.npy", "--size", 64) == 0
    volume = np.load(tmp_path / "a.npy")
    for k in range(4):
        image = np.maximum(acr_ct(k + 1).image((64, 64), 220 / 64) - 1000, -1000)
        np.testing.assert_allclose(volume[k], image, atol=1e-3)


def test_brain_follows_the_sequence(tmp_path: Path):
    images = {}
    for name in ("t1", "flair"):
        out = tmp_path / f"{name}.npy"
        assert (
            recon("phantom", "brain", "-o", out, "--size", 48, "--slices", 1, "--contrast", name)
            == 0
        )
        images[name] = np.load(out)
    assert images["flair"].min() >= 0
    assert images["t1"].max() > images["flair"].max()  # fat shines in T1


def test_ct_measurement_reconstructs_to_the_phantom(tmp_path: Path):
    out = tmp_path / "scan.h5"
    arguments = ("--views", 60, "--photons", 1e6)
    assert recon("phantom", "acr-ct", "-o", out, "--size", 48, "--slices", 1, *arguments) == 0
    file = read_measurement(out)
    assert len(file.template) == 1
    truth = mu_to_hu(file.truth, MU_WATER)
    found = mu_to_hu(fbp(file.measurement), MU_WATER)
    middle = (slice(None), slice(18, 30), slice(18, 30))
    assert float((found - truth)[middle].abs().mean()) < 25
    assert file.measurement.provenance["phantom"] == "acr-ct"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("chest", ("--metal", 1, "--geometry", "fan")),
        ("chest", ("--motion", "breathing")),
        ("texture", ()),
        ("shepp-logan-schabel", ("--motion", "breathing")),
        ("acr-mr", ("--part", "contrast", "--mask", "poisson")),
    ],
)
def test_measurements_of_every_kind(tmp_path: Path, name, options):
    out = tmp_path / "scan.h5"
    size = ("--size", 48, "--slices", 1, "--views", 20)
    assert recon("phantom", name, "-o", out, *size, *options) == 0
    file = read_measurement(out)
    assert file.truth is not None
    assert bool(torch.isfinite(file.measurement.data.abs()).all())


def test_motion_changes_the_data_not_the_truth(tmp_path: Path):
    files = []
    for motion in ("none", "rigid"):
        out = tmp_path / f"{motion}.h5"
        options = ("--size", 32, "--slices", 1, "--motion", motion)
        assert recon("phantom", "shepp-logan-modified", "-o", out, *options) == 0
        files.append(read_measurement(out))
    torch.testing.assert_close(files[0].truth, files[1].truth)
    assert float((files[0].measurement.data - files[1].measurement.data).abs().max()) > 0.03


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("nope", "-o", "x"), 2, "no phantom 'nope'"),
        (("chest",), 2, "-o"),
        (("chest", "-o", "x", "--size", 8), 2, "size"),
        (("chest", "-o", "x", "--slices", 300), 4, "reach"),
        (("forbild-head", "-o", "x", "--size", 4096, "--slices", 2000), 7, "GiB"),
        (("brain", "-o", "x.npy", "--unit", "mu"), 2, "MR signal"),
        (("chest", "-o", "x", "--unit", "mu"), 2, "DICOM CT holds HU"),
        (("brain", "-o", "x.npy", "--metal", 2), 2, "--metal"),
        (("chest", "-o", "x.npy", "--motion", "rigid"), 2, ".h5"),
        (("texture", "-o", "x.h5", "--motion", "rigid"), 2, "closed form"),
        (("brain", "-o", "x.npy", "--field", 7), 4, "1.5 and 3 T"),
        (("brain", "-o", "x.h5", "--acceleration", 20, "--size", 32), 4, "centre"),
    ],
)
def test_impossible_wishes_are_refused_and_leave_nothing(
    tmp_path: Path, monkeypatch, capsys, arguments, code, text
):
    monkeypatch.chdir(tmp_path)
    assert recon("phantom", *arguments) == code
    assert text in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_outputs_are_replaced_only_on_request(tmp_path: Path, capsys):
    for out in (tmp_path / "a.npy", tmp_path / "folder", tmp_path / "v.nii"):
        command = ("phantom", "shepp-logan", "-o", out, *SMALL)
        assert recon(*command) == 0
        assert recon(*command) == 6
        assert recon(*command, "--overwrite") == 0
    assert "exists" in capsys.readouterr().err
