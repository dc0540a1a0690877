"""Phantom slices of three planes, and priors trained on them alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_tools import recon

from inverse.errors import NoInputError
from inverse.io.nifti import read_nifti
from inverse.priors import load_prior
from inverse.training.data import Augmentation, draw_batch, load_images
from inverse.training.files import Plane, _plane
from phantoms.anatomy import AIR_HU, thorax
from phantoms.benchmarks import volume
from phantoms.slices import chest_slices, facing

SIDE, PIXEL = 48, 7.5


@pytest.mark.parametrize("plane", ["coronal", "sagittal"])
def test_sections_are_those_of_the_volume(plane: Plane) -> None:
    """The same voxels, cut from slabs along z and from slabs along the other axis."""
    body = thorax(3)
    cube = body.volume((SIDE,) * 3, (PIXEL,) * 3, 4, thickness=PIXEL, sub_slices=8)
    turned = facing(body, plane)
    assert turned.mass == pytest.approx(body.mass)
    for k in (14, 24, 31):
        place = (k - (SIDE - 1) / 2) * PIXEL
        section = turned.slab(place, PIXEL, 8).image((SIDE, SIDE), PIXEL, 8)
        wanted = cube[:, k] if plane == "coronal" else cube[:, :, k]
        assert np.corrcoef(section.ravel(), wanted.ravel())[0, 1] > 0.998
        assert np.abs(section - wanted).mean() < 0.02 * np.abs(wanted).mean()


def test_cubic_slices_reach_through_the_body_and_thin_ones_cross_the_lungs() -> None:
    thin = chest_slices([5, 6], each=3, size=SIDE, pixel_mm=(PIXEL, PIXEL))
    again = chest_slices([5, 6], each=3, size=SIDE, pixel_mm=(PIXEL, PIXEL), plane="axial")
    cubic = chest_slices(
        [5, 6], each=12, size=SIDE, pixel_mm=(PIXEL, PIXEL), plane="coronal", cubic=True
    )
    assert all(np.array_equal(a, b) for a, b in zip(thin.images, again.images, strict=True))
    body = [float((i > AIR_HU + 100).mean()) for i in cubic.images]
    assert min(body) < 0.15 < 0.5 < max(body), "in front of the chest, and through it"
    assert cubic.patients == thin.patients


def test_rows_of_a_slab_are_all_that_there_are() -> None:
    data = chest_slices([5], each=2, size=SIDE, pixel_mm=(PIXEL, PIXEL))
    moves = Augmentation(size=SIDE, pixel_mm=(PIXEL, PIXEL), slabs=True)
    batch = draw_batch([data], moves, 4, 16, torch.Generator().manual_seed(0))
    rows, columns = batch.position[:, 0, :, 0], batch.position[:, 1, 0]
    torch.testing.assert_close(rows, ((torch.arange(16) + 0.5) / 8 - 1).expand(4, 16))
    assert float((columns[:, -1] - columns[:, 0]).max()) == pytest.approx(2 * 15 / SIDE)


@pytest.mark.parametrize("stored", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1)])
def test_volumes_of_cubic_voxels_are_cut_anew(
    tmp_path: Path, stored: tuple[int, ...], signs: tuple[int, ...]
) -> None:
    """However it is stored, a section is the same plane of the patient the same way up."""
    nibabel = pytest.importorskip("nibabel")
    value = np.random.default_rng(0).normal(0, 50, (6, 8, 10)).astype(np.float32)  # z, y, x LPS
    ras = value.transpose(2, 1, 0)[::-1, ::-1]  # x to the right, y to the front
    content = ras[tuple(slice(None, None, s) for s in signs)].transpose(stored)
    turned = np.zeros((4, 4))
    turned[3, 3] = 1
    for axis, k in enumerate(stored):
        turned[k, axis] = 1.5 * signs[k]
    folder = tmp_path / "n"
    folder.mkdir()
    nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(content), turned), folder / "a.nii")
    cut: dict[Plane, np.ndarray] = {
        "axial": value,
        "coronal": value.transpose(1, 0, 2),
        "sagittal": value.transpose(2, 0, 1),
    }
    as_it_is = _plane(read_nifti(folder / "a.nii", "CT").orientation)
    for plane, wanted in cut.items():
        loaded = load_images(folder, "CT", plane=plane)
        assert set(loaded.pixel_mm) == {1.5}
        assert len(loaded) == len(wanted)
        if plane != as_it_is:
            np.testing.assert_allclose(np.stack(loaded.images), wanted, atol=1e-3)
    turned[:3, stored.index(2)] *= 2
    nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(content), turned), folder / "a.nii")
    with pytest.raises(NoInputError, match="slice of voxels that are no cubes"):
        load_images(folder, "CT", plane="sagittal" if as_it_is == "axial" else "axial")


def test_dicom_slices_of_other_planes_are_left_out(tmp_path: Path) -> None:
    from phantoms.series import write_phantom_series

    stack = np.random.default_rng(0).normal(0, 50, (3, 16, 16)).astype(np.float32)
    write_phantom_series(tmp_path, stack, (3.0, 1.5, 1.5), seed=1)
    assert len(load_images(tmp_path, "CT", plane="axial")) == 3
    with pytest.raises(NoInputError, match="3 x axial slice"):
        load_images(tmp_path, "CT", plane="coronal")


def test_a_prior_of_phantoms_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "coronal.safetensors"
    arguments = [
        "train", "--modality", "ct", "--out", out, "--steps", 1, "--widths", "8", "--size", 16,
        "--crop", 16, "--batch", 2, "--pixel-mm", "22.5:22.5", "--samples", 1,
    ]  # fmt: skip
    assert recon(*arguments) == 2
    assert "nothing to train on" in capsys.readouterr().err
    assert recon(*arguments, "--phantoms", 6, "--orientation", "coronal") == 0
    assert "the same of training patients" in capsys.readouterr().out
    card = load_prior(out).card
    assert card.orientation == "coronal"
    assert card.pixel_mm_range == (22.5, 22.5)
    (source,) = card.training_data
    assert source["name"] == "random chest phantoms in coronal sections, cubic voxels"
    assert (source["patients"], card.training["validation_patients"]) == (5, 1)
    assert (
        recon(*arguments, "--phantoms", 4, "--samples", 0, "--overwrite", "--run", tmp_path / "r")
        == 0
    )
    assert load_prior(out).card.orientation == "axial"


@pytest.mark.slow
def test_the_benchmark_couples_three_planes_of_cubic_voxels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for plane in ("axial", "coronal", "sagittal"):
        assert recon(
            "train", "--modality", "ct", "--out", tmp_path / f"{plane}.safetensors", "--steps", 1,
            "--widths", "8", "--size", 32, "--crop", 16, "--batch", 2, "--samples", 0,
            "--pixel-mm", "11.25:11.25", "--phantoms", 12, "--orientation", plane,
        ) == 0  # fmt: skip
    monkeypatch.setattr(
        "sys.argv",
        ["volume", "--quick", "--cubic", "--side", "32", "--methods", "dds", "--threads", "1"]
        + ["--prior", str(tmp_path / "axial.safetensors"), "--out", str(tmp_path / "v.json")]
        + [f"--{p}={tmp_path / p}.safetensors" for p in ("coronal", "sagittal")],
    )
    volume.main()
    table = json.loads((tmp_path / "v.json").read_text())
    assert [r["coupling"] for r in table["rows"]] == ["", "none", "noise", "tv", "planes"]
    assert all(np.isfinite(r["psnr_coronal"]) for r in table["rows"])
    assert "| dds | planes |" in (tmp_path / "v.md").read_text()
