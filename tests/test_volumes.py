"""Scans of whole volumes: simulation, measurement files, classical images, the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import cli_tools
import laws
import numpy as np
import pytest
import torch

from inverse.classical import cg_sense, fbp, interpolated, l1_wavelet, tv, zero_filled
from inverse.errors import GeometryError, InputError, ResourceError, UnsupportedError
from inverse.io.measurement_file import read_measurement, write_measurement
from inverse.measurement import Measurement
from inverse.operators.coils import espirit_volume
from inverse.operators.ct import ConeBeam, RayTransform
from inverse.operators.linop import Identity
from inverse.operators.mask import Mask, missing_slices, random_pixels
from inverse.operators.mri import CartesianMRI, Sense
from inverse.operators.noise import generator
from inverse.operators.resample import ThickSlices, Upsample, between_slices
from inverse.operators.units import MU_WATER
from inverse.priors import load_prior
from inverse.reconstruct import reconstruct
from phantoms.volumes import simulate_cone, simulate_mri_volume, simulate_slices

Z, N = 8, 24
SPACING = (8.0, 6.0, 6.0)


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECON_CACHE_DIR", "off")


def hu(slices: int = Z, side: int = N) -> np.ndarray:
    """A body of 0 HU whose inset of 500 HU moves from slice to slice."""
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    volume = np.full((slices, side, side), -1000.0, np.float32)
    volume[:, x**2 / 0.7 + y**2 / 0.5 < 1] = 0.0
    for k in range(slices):
        volume[k, (x - 0.4 + 0.8 * k / slices) ** 2 + y**2 < 0.05] = 500.0
    return volume


def nrmse(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((x - truth).norm() / truth.norm())


def cone(matrix: int = 12, views: int = 30, slices: int = Z) -> ConeBeam:
    pixel = N * SPACING[1] / matrix
    return ConeBeam.sparse(views, (slices, matrix, matrix), (SPACING[0], pixel, pixel))


# --- cone beams --------------------------------------------------------------------------------


def test_cone_covers_the_volume_and_no_more() -> None:
    scan = cone()
    pixel = N * SPACING[1] / 12
    corner = np.array([6 * pixel, 6 * pixel, Z / 2 * SPACING[0]])
    vectors = np.asarray(scan.vectors().vectors).reshape(-1, 4, 3)
    source, centre, column, row = vectors.transpose(1, 0, 2)
    widest = np.zeros(2)
    for signs in np.ndindex(2, 2, 2):
        ray = corner * (1 - 2 * np.array(signs)) - source
        # where the ray to the corner meets the panel, in columns and rows
        where = np.linalg.solve(
            np.stack([-ray, column, row], axis=-1), (source - centre)[..., None]
        )[..., 0]
        widest = np.maximum(widest, np.abs(where[:, 1:]).max(axis=0))
    assert scan.columns / 2 - 1.0 <= widest[0] <= scan.columns / 2 + 0.01
    assert scan.rows / 2 - 1.1 <= widest[1] <= scan.rows / 2 + 0.01
    assert scan.finer(2).data_shape == (30, 2 * scan.rows, 2 * scan.columns)
    torch.testing.assert_close(
        torch.tensor(scan.finer(2).rays()[1])
        .unflatten(2, (-1, 2))
        .unflatten(1, (-1, 2))
        .mean((2, 4)),
        torch.tensor(scan.rays()[1]),
        rtol=0,
        atol=1e-3,
    )
    with pytest.raises(GeometryError, match="inside the grid"):
        ConeBeam.sparse(4, (4, 12, 12), (1.0, 100.0, 100.0))


@pytest.mark.parametrize(("matrix", "pixels"), [(12, "24 x 24"), (24, "48 x 48")])
def test_cone_data_fit_the_truth_up_to_the_grid(matrix: int, pixels: str) -> None:
    # few photons: noise dominates what the coarse grid cannot represent
    s = simulate_cone(hu(4), SPACING, cone(matrix, 6, 4), matrix=matrix, photons=100.0)
    m = s.measurement
    assert m.operator.in_shape == (4, matrix, matrix)
    assert s.truth.shape == (1, 4, matrix, matrix)
    assert float(m.chi2(s.truth)) == pytest.approx(1.0, abs=0.25)
    assert f"2 x 2 rays an element through {pixels} pixels" in m.provenance["simulation"]
    # many photons: the mismatch shows, so the data are not the operator's own
    exact = simulate_cone(
        hu(4), SPACING, cone(matrix, 6, 4), matrix=matrix, photons=1e9, model_error=0.0
    )
    assert float(exact.measurement.chi2(exact.truth)) > 10.0
    assert nrmse(exact.measurement.operator(exact.truth), exact.measurement.data) < 0.03


def test_cone_elements_add_their_four_rays() -> None:
    """A box of water that all rays of an element cross at right angles about."""
    box = np.zeros((4, N, N), np.float32)
    far = ConeBeam((0.0,), 2, 4, 4.0, 4.0, 4000.0, 10.0)
    s = simulate_cone(box, SPACING, far, matrix=N, photons=1e12, model_error=0.0)
    length = N * SPACING[1] * MU_WATER
    assert s.measurement.data.numpy() == pytest.approx(length, rel=1e-3)


def test_cone_is_reconstructed_by_feldkamp_and_total_variation() -> None:
    s = simulate_cone(hu(), SPACING, cone(12, 40), matrix=12)
    # the middle slices, which the circle sees well
    middle = slice(2, -2)
    assert nrmse(fbp(s.measurement)[:, middle], s.truth[:, middle]) < 0.15
    assert nrmse(tv(s.measurement, tol=0.1).x, s.truth) < 0.15


# --- k-space of volumes ------------------------------------------------------------------------


def test_two_phase_encodings() -> None:
    volume = hu(16) + 1000
    s = simulate_mri_volume(volume, SPACING, acceleration=3.0, centre_fraction=0.2)
    m = s.measurement
    assert isinstance(m.operator, CartesianMRI)
    mask = m.operator.mask
    assert bool((mask == mask[..., :1]).all())  # the readout is whole
    assert m.operator.acceleration == pytest.approx(3.0, rel=0.01)
    assert float(m.chi2(s.truth)) == pytest.approx(1.0, abs=0.05)
    assert nrmse(tv(m, tol=0.1).x, s.truth) < 0.35 * nrmse(zero_filled(m), s.truth)


def test_coils_of_a_volume_are_calibrated() -> None:
    volume = hu(16) + 1000
    s = simulate_mri_volume(
        volume, SPACING, acceleration=3.0, centre_fraction=0.2, coils=6, noise=0.005
    )
    m = s.measurement
    assert isinstance(m.operator, Sense)
    assert m.data.shape == (1, 6, 16, N, N)
    assert float(m.chi2(s.truth)) < 3.0
    assert nrmse(cg_sense(m), s.truth) < 0.75 * nrmse(zero_filled(m), s.truth)
    # maps are continuous along the readout: one virtual coil for all sections
    body = torch.from_numpy(volume) > 100
    step = m.operator.maps.diff(dim=-1).abs().square().sum(dim=0).sqrt()
    assert float(step[body[..., 1:] & body[..., :-1]].quantile(0.99)) < 0.2
    with pytest.raises(ResourceError, match="coil"):
        simulate_mri_volume(np.ones((128, 256, 256), np.float32), SPACING, coils=32)
    with pytest.raises(GeometryError, match="fully sampled centre"):
        simulate_mri_volume(hu(4) + 1000, SPACING, coils=2, centre_fraction=0.3)


def test_maps_of_a_volume_agree_with_those_of_its_sections() -> None:
    """Coils that do not vary along the readout: every section has the same maps."""
    z, y = np.mgrid[-1:1:16j, -1:1:16j]
    coils = np.stack([np.exp(1j * z + 0.3 * y), np.exp(-0.4 * z - 1j * y)])
    coils /= np.sqrt((np.abs(coils) ** 2).sum(axis=0))
    image = torch.from_numpy(coils[..., None] * np.ones(10)).to(torch.complex64)
    image[:, :2] = image[:, -2:] = 0
    from inverse.operators.mri import centred_fft

    found = espirit_volume(centred_fft(image, 3), calibration=16)
    assert found.maps.shape == (2, 16, 16, 10)
    truth = torch.from_numpy(coils).to(torch.complex64)[..., None]
    alike = (found.maps * truth.conj()).sum(dim=0).abs()[3:-3, 2:-2]
    assert float(alike.min()) > 0.98
    with pytest.raises(GeometryError, match="coils, D, H, W"):
        espirit_volume(image[0])


# --- missing and thick slices ------------------------------------------------------------------


def test_thick_slices_have_a_smooth_profile() -> None:
    ramp = np.broadcast_to(1000.0 + np.arange(12.0)[:, None, None] ** 2, (12, 4, 4))
    s = simulate_slices(ramp, (1.0, 1.0), modality="MR", thickness=4, step=2, noise=1e-5)
    box = s.measurement.operator(s.truth)
    excess = (s.measurement.data - box)[0, :, 0, 0]
    # the profile's variance exceeds that of n points by its edges', (0.15 n)^2, and twice a
    # thin slice's own; except at the ends, where there is no more object
    assert excess[1:-1].numpy() == pytest.approx((0.15 * 4) ** 2 + 2 / 12, rel=0.03)
    assert s.measurement.data.shape == (1, 5, 4, 4)
    flat = simulate_slices(
        np.full((6, 4, 4), 7.0), (1.0, 1.0), modality="MR", thickness=3, noise=1e-6
    )
    assert flat.measurement.data.numpy() == pytest.approx(7.0, rel=1e-4)


@pytest.mark.parametrize("options", [{"thickness": 2}, {"missing": [1, 4, 5]}])
def test_interpolation_and_total_variation(options: dict) -> None:
    s = simulate_slices(hu(), (6.0, 6.0), modality="CT", noise=0.01, **options)
    m = s.measurement
    assert m.slices == Z
    assert float(m.chi2(s.truth)) < 3.0
    lines = interpolated(m)
    assert lines.shape == s.truth.shape
    assert nrmse(lines, s.truth) < 0.25
    smooth = nrmse(tv(m, tol=0.1).x, s.truth)
    assert smooth < (nrmse(lines, s.truth) if "thickness" in options else 0.15)


def test_interpolation_is_exact_on_lines() -> None:
    z = torch.arange(9.0)
    line = (3 * z - 2)[:, None, None].expand(9, 2, 2)
    thick = ThickSlices((9, 2, 2), 3, 2)
    assert thick.centres.tolist() == [1.0, 3.0, 5.0, 7.0]
    found = between_slices(thick(line), thick.centres, 9)
    torch.testing.assert_close(found[1:8], line[1:8])
    assert torch.equal(found[0], line[1])  # the nearest beyond the ends
    assert torch.equal(found[8], line[7])
    known = Mask(missing_slices((9, 2, 2), [0, 3, 4]))
    m = Measurement(known, known(line)[None], torch.tensor(1.0), "MR", (1.0, 1.0))
    torch.testing.assert_close(interpolated(m)[0, 1:], line[1:])
    one = between_slices(torch.ones(1, 2, 2), torch.tensor([4.0]), 9)
    assert torch.equal(one, torch.ones(9, 2, 2))
    for other in (Mask(random_pixels((9, 2, 2), 0.3, generator(0))), Identity((4, 4))):
        plain = Measurement(
            other, torch.zeros(1, *other.out_shape), torch.ones(()), "MR", (1.0, 1.0)
        )
        with pytest.raises(UnsupportedError, match="along z"):
            interpolated(plain)


def test_refusals() -> None:
    with pytest.raises(GeometryError, match="either"):
        simulate_slices(hu(), (1.0, 1.0), modality="CT")
    with pytest.raises(GeometryError, match="either"):
        simulate_slices(hu(), (1.0, 1.0), modality="CT", missing=[1], thickness=2)
    with pytest.raises(GeometryError, match="at least one pixel"):
        simulate_slices(hu(), (1.0, 1.0), modality="CT", missing=range(Z))
    with pytest.raises(GeometryError, match="numbers within"):
        simulate_slices(hu(), (1.0, 1.0), modality="CT", missing=[Z])
    with pytest.raises(GeometryError, match="thick slice"):
        simulate_slices(hu(), (1.0, 1.0), modality="CT", thickness=Z + 1)
    with pytest.raises(UnsupportedError, match="magnitudes"):
        simulate_slices(hu() + 0j, (1.0, 1.0), modality="MR", thickness=2)
    with pytest.raises(InputError, match="photons"):
        simulate_cone(hu(4), SPACING, cone(12, 4, 4), matrix=12, photons=0.0)
    with pytest.raises(UnsupportedError, match="square pixels"):
        simulate_cone(hu(4), (8.0, 6.0, 5.0), cone(12, 4, 4), matrix=12)
    s = simulate_mri_volume(hu() + 1000, SPACING, acceleration=2.0, centre_fraction=0.1)
    with pytest.raises(UnsupportedError, match="slices one by one"):
        l1_wavelet(s.measurement)


# --- total variation of volumes ----------------------------------------------------------------


def test_total_variation_of_a_volume() -> None:
    """Along every axis alike, by a closed form: a step between halves shrinks by 2 lambda / n."""
    n, weight = 6, 0.3
    for axis in range(3):
        shape = [4, 4, 4]
        shape[axis] = 2 * n
        step = torch.zeros(shape)
        step.narrow(axis, n, n).fill_(1.0)
        m = Measurement(Identity(shape), step[None], torch.tensor(1.0), "MR", (1.0, 1.0))
        found = tv(m, weight, unit=1.0, nonnegative=False, tol=1e-4, max_iter=600)
        low = found.x[0].narrow(axis, 0, n)
        high = found.x[0].narrow(axis, n, n)
        assert low.numpy() == pytest.approx(weight / n, abs=2e-3)
        assert high.numpy() == pytest.approx(1 - weight / n, abs=2e-3)
        assert float(found.gap) < 1e-4


def test_volumes_of_one_slice_are_images() -> None:
    image = laws.random((1, 10, 10), torch.float32, 0)
    flat = Measurement(Identity((10, 10)), image, torch.tensor(0.5), "MR", (1.0, 1.0))
    deep = Measurement(Identity((1, 10, 10)), image[None], torch.tensor(0.5), "MR", (1.0, 1.0))
    a, b = (tv(m, 1.0, unit=1.0, nonnegative=False, tol=1e-5, max_iter=400) for m in (flat, deep))
    torch.testing.assert_close(a.x, b.x[0], rtol=1e-3, atol=1e-3)


def test_upsampling_keeps_the_slices() -> None:
    up = Upsample((3, 4, 5), 2)
    assert up.out_shape == (3, 8, 10)
    laws.check_all(up)
    x = laws.random((3, 4, 5), torch.float32, 1)
    torch.testing.assert_close(up(x)[1], Upsample((4, 5), 2)(x[1]))


def test_the_prior_serves_volumes_of_finer_pixels(tmp_path: Path) -> None:
    """Slices are reconstructed at the prior's pixel size and interpolated; still a volume."""
    prior = load_prior(
        cli_tools.tiny_prior(tmp_path / "p.safetensors", pixel_mm_range=(8.0, 16.0))
    )
    s = simulate_slices(hu(4), (6.0, 6.0), modality="CT", thickness=2)
    for method, steps in (("dds", 2), ("pnp_admm", 2)):
        found = reconstruct(s.measurement, prior, method=method, steps=steps)
        assert found.mean.shape == (1, 4, N, N)
        assert "interpolated" in found.status
        assert float(found.residual_chi2) < 1e3


# --- files and the command line ----------------------------------------------------------------


def test_files_count_slices_of_volumes(tmp_path: Path) -> None:
    s = simulate_cone(hu(4), SPACING, cone(12, 6, 4), matrix=12, electronic_noise=2.0)
    path, heads = tmp_path / "m.h5", [b"a", b"", b"ccc", b"d"]
    write_measurement(path, s.measurement, s.truth, heads, [0.0, 8.0, 16.0, 24.0])
    again = read_measurement(path)
    assert again.template == tuple(heads)
    assert again.z_mm == (0.0, 8.0, 16.0, 24.0)
    m = again.measurement
    assert m.slices == 4
    assert len(m) == 1
    assert isinstance(m.operator, RayTransform)
    assert m.operator.geometry == s.measurement.operator.geometry
    assert torch.equal(m.operator(s.truth), s.measurement.operator(s.truth))
    assert m.counts is not None
    assert torch.equal(m.counts.counts, s.measurement.counts.counts)
    assert (m.counts.photons, m.counts.electronic) == (1e5, 2.0)
    with pytest.raises(InputError, match="number the 4 slices"):
        write_measurement(path, s.measurement, s.truth, heads[:1], overwrite=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("volumes")
    cli_tools.series(folder / "ct", 6)
    cli_tools.series(folder / "mr", 8, modality="MR")
    cli_tools.tiny_prior(folder / "ct.safetensors", pixel_mm_range=(4.0, 40.0))
    cli_tools.tiny_prior(folder / "mr.safetensors", "MR")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "source", "options", "shape", "baseline"),
    [
        ("ct", "ct", ["--geometry", "cone", "--views", 8, "--matrix", 16], [1, 8, 12, 26], "fbp"),
        ("slices", "ct", ["--missing", "1::2", "--matrix", 32], [1, 6, 32, 32], "interpolated"),
        ("slices", "mr", ["--thickness", 3], [1, 2, 64, 64], "interpolated"),
        (
            "mri",
            "mr",
            ["--volume", "--mask", "poisson", "--centre", 0.2],
            [1, 8, 64, 64],
            "zero-filled",
        ),
    ],
)
def test_simulate_then_reconstruct(
    root: Path,
    tmp_path: Path,
    command: str,
    source: str,
    options: list,
    shape: list,
    baseline: str,
) -> None:
    from inverse.io.dicom import read_series

    meas, out = tmp_path / "m.h5", tmp_path / "out"
    assert cli_tools.recon("simulate", command, root / source, "-o", meas, *options) == 0
    assert list(read_measurement(meas).measurement.data.shape) == shape
    prior = root / f"{source}.safetensors"
    quick = ["--prior", prior, "--method", "dds", "--steps", 2]
    assert cli_tools.recon("reconstruct", meas, "-o", out, *quick) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics["methods"]) == {baseline, "prior"}
    slices = 6 if source == "ct" else 8
    assert len(metrics["per_slice"]) == slices
    assert metrics["methods"]["prior"]["network_calls"] == 2
    assert len(read_series(out / "recon").array) == slices
    if source == "mr":  # the intensity scale, half the brightest signal for this prior
        run = json.loads((out / "run.json").read_text())
        scale = run["settings"]["reconstruction"]["scale"]
        truth = read_measurement(meas).truth
        assert scale == pytest.approx(0.5 * float(truth.abs().max()), rel=0.15)
    if "--missing" in options:  # judged where nothing was measured
        assert metrics["mask"] == "missing slices"
        warned = json.loads((out / "run.json").read_text())["warnings"]
        assert "UNSEEN_SLICES" in {w["code"] for w in warned}
        judged = ["psnr" in row["prior"] for row in metrics["per_slice"]]
        assert judged == [False, True] * 3
    assert math.isfinite(metrics["methods"]["prior"]["psnr"]["mean"])


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["mri", "mr", "--volume"], 5, "--mask poisson"),
        (["mri", "mr", "--volume", "--mask", "poisson", "--trajectory", "radial"], 5, "two dir"),
        (["ct", "ct", "--geometry", "cone", "--metal", 1], 5, "without metal"),
        (["slices", "ct"], 4, "either --missing"),
        (["slices", "ct", "--missing", "9:"], 4, "selects nothing"),
        (["slices", "ct", "--thickness", 9], 4, "thickness 9"),
    ],
)
def test_what_the_command_line_refuses(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list,
    code: int,
    text: str,
) -> None:
    command, source, *options = arguments
    out = tmp_path / "m.h5"
    assert cli_tools.recon("simulate", command, root / source, "-o", out, *options) == code
    assert text in " ".join(capsys.readouterr().err.split())
    assert not out.exists()
