"""Simulation: noise statistics, no inverse crime, independence of the batch, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import phantoms.simulate
from inverse.errors import GeometryError, InputError, UnsupportedError
from inverse.operators.ct import FanBeam, ParallelBeam, RayTransform
from inverse.operators.noise import add_gaussian, count_photons, generator, line_integrals
from inverse.operators.units import MU_WATER, mu_to_hu
from inverse.volumes import Chosen, DiskVolume, slabs
from phantoms.beam import implants
from phantoms.shapes import Ellipses
from phantoms.simulate import (
    Simulation,
    area_mean,
    simulate_ct,
    simulate_ct_analytic,
    simulate_inpainting,
    simulate_mri,
)

FINE, MATRIX, PX = 96, 48, 1.5  # native grid and pixel; the reconstruction's pixel is 3 mm
BEAM = ParallelBeam.sparse(24, (MATRIX, MATRIX), 2 * PX)
# (value above air, x, y, a, b, angle) in mm
BODY = Ellipses.of([(1000.0, 3.0, -4.0, 55.0, 40.0, 0.3), (600.0, 20.0, 5.0, 9.0, 6.0, 1.0)])


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECON_CACHE_DIR", "off")


def hu(slices: int = 2) -> np.ndarray:
    one = BODY.image((FINE, FINE), PX) - 1000.0
    return np.stack([one] * slices).astype(np.float32)


@pytest.mark.parametrize(
    "beam", [BEAM, FanBeam.sparse(24, (MATRIX, MATRIX), 2 * PX)], ids=["parallel", "fan"]
)
def test_ct_data_fit_the_truth_up_to_the_grid(beam) -> None:
    # few photons: noise dominates what the coarse grid cannot represent
    s = simulate_ct(hu(), PX, beam, matrix=MATRIX, photons=1e3, model_error=0.0)
    m = s.measurement
    assert m.chi2(s.truth).numpy() == pytest.approx(1.0, abs=0.15)
    assert m.pixel_mm == (2 * PX, 2 * PX)
    assert isinstance(m.operator, RayTransform)
    assert m.provenance["simulation"].startswith("2 rays a bin (line kernel) through 96 x 96")
    assert m.provenance["starved"] == 0
    # many photons: the mismatch shows, so the data are not the operator's own
    exact = simulate_ct(hu(1), PX, beam, matrix=MATRIX, photons=1e8, model_error=0.0)
    assert 3.0 < float(exact.measurement.chi2(exact.truth)) < 1e5
    mean = float((s.truth / MU_WATER * 1000).mean())
    assert mean == pytest.approx(float(np.mean(hu(1)) + 1000), rel=1e-5)


SIZE = ((MATRIX, MATRIX), 2 * PX)


@pytest.mark.parametrize(
    "beam",
    [
        FanBeam.sparse(24, *SIZE, short_scan=True),
        FanBeam.sparse(24, *SIZE, curved=True),
        replace(FanBeam.sparse(24, *SIZE), bins=40, offset_mm=30.0),
        replace(BEAM, bins=20),
        replace(BEAM, offset_mm=0.7),
    ],
    ids=["short scan", "curved", "half fan", "truncated", "offset"],
)
def test_every_geometry_is_simulated(beam) -> None:
    s = simulate_ct(hu(1), PX, beam, matrix=MATRIX, photons=1e3, model_error=0.0)
    assert s.measurement.chi2(s.truth).numpy() == pytest.approx(1.0, abs=0.2)
    exact = simulate_ct_analytic([BODY], 2 * PX, beam, matrix=MATRIX, photons=1e7)
    finer = simulate_ct(hu(1), PX, beam, matrix=MATRIX, photons=1e7)
    difference = finer.measurement.data - exact.measurement.data
    assert float(difference.norm() / exact.measurement.data.norm()) < 0.01


def test_electronic_noise_is_stated() -> None:
    kwargs = {"matrix": MATRIX, "photons": 2e3, "model_error": 0.0}
    loud = simulate_ct(hu(1), PX, BEAM, electronic_noise=15.0, **kwargs)
    quiet = simulate_ct(hu(1), PX, BEAM, **kwargs)
    assert loud.measurement.chi2(loud.truth).numpy() == pytest.approx(1.0, abs=0.15)
    assert float((loud.measurement.noise / quiet.measurement.noise).min()) > 1.0
    assert loud.measurement.provenance["electronic_noise"] == 15.0
    with pytest.raises(InputError, match="electronic"):
        simulate_ct(hu(1), PX, BEAM, electronic_noise=-1.0, **kwargs)


def test_starved_scans_stay_finite() -> None:
    s = simulate_ct(hu(1), PX, BEAM, matrix=MATRIX, photons=3.0, electronic_noise=2.0, kvp=80.0)
    m = s.measurement
    assert m.provenance["starved"] > 50
    assert bool(torch.isfinite(m.data).all() & torch.isfinite(m.noise).all())


@pytest.mark.parametrize("curved", [False, True])
def test_ct_on_an_equal_grid_of_fans(curved) -> None:
    beam = FanBeam.sparse(12, (FINE, FINE), PX, curved=curved)
    s = simulate_ct(hu(1), PX, beam, matrix=FINE)
    kernel = "linear" if curved else "strip"
    assert f"4 rays a bin ({kernel} kernel)" in s.measurement.provenance["simulation"]
    assert s.measurement.operator.kernel == "line"


def test_ct_on_an_equal_grid_uses_another_kernel() -> None:
    s = simulate_ct(hu(1), PX, ParallelBeam.sparse(24, (FINE, FINE), PX), matrix=FINE)
    assert "4 rays a bin (strip kernel)" in s.measurement.provenance["simulation"]
    assert s.measurement.operator.kernel == "linear"
    assert float((s.measurement.data - s.measurement.operator(s.truth)).abs().max()) > 1e-3


def test_ct_from_pixels_agrees_with_exact_line_integrals() -> None:
    a = simulate_ct(hu(1), PX, BEAM, matrix=MATRIX, photons=1e7)
    b = simulate_ct_analytic([BODY], 2 * PX, BEAM, matrix=MATRIX, photons=1e7)
    difference = (a.measurement.data - b.measurement.data).norm() / b.measurement.data.norm()
    assert float(difference) < 0.01
    torch.testing.assert_close(a.truth, b.truth, rtol=0, atol=0.05 * MU_WATER)
    assert "exact" in b.measurement.provenance["simulation"]


def test_a_bin_adds_intensities() -> None:
    # one bin wider than a slab: half the rays see it.  l = -log((1 + e^-L) / 2), not L / 2
    slab = Ellipses.of([(1000.0, 100.0, 0.0, 100.0, 1e6, 0.0)])  # the half plane x > 0, nearly
    beam = ParallelBeam((0.0,), 1, 50.0)
    length = slab.line_integrals([[25.0, 0.0]], [[0.0, 1.0]])[0]
    slab = slab.scaled(3.0 / (length * MU_WATER / 1000))
    s = simulate_ct_analytic([slab], 1.0, beam, matrix=4, photons=1e9, oversample=2)
    rays = slab.line_integrals(*beam.rays(2)).ravel() * MU_WATER / 1000
    expected = -math.log(np.mean(np.exp(-rays)))
    assert float(s.measurement.data) == pytest.approx(expected, abs=1e-3)
    assert expected < 0.5 * rays.max()


def test_photon_statistics() -> None:
    line, photons = torch.full((1, 200, 200), 2.0), 5e3
    y, std = line_integrals(count_photons(line, photons, [generator(0)]), photons)
    n = photons * math.exp(-2.0)
    assert float(y.std()) == pytest.approx(n**-0.5, rel=0.02)
    assert float(std.mean()) == pytest.approx(n**-0.5, rel=0.02)
    assert float(y.mean()) == pytest.approx(2.0 + 0.5 / n, abs=4 * n**-0.5 / 200)
    starved, weak = line_integrals(torch.zeros(1), photons)
    assert float(starved) == pytest.approx(math.log(photons))
    assert float(weak) == 1.0


def test_gaussian_statistics() -> None:
    z = add_gaussian(
        torch.zeros(2, 300, 300, dtype=torch.complex64), 0.5, [generator(0, i) for i in (0, 1)]
    )
    for part in (z.real, z.imag):
        assert float(part.std()) == pytest.approx(0.5, rel=0.02)
    assert abs(float((z.real * z.imag).mean())) < 0.01
    assert abs(float((z[0].real * z[1].real).mean())) < 0.01


def test_a_slice_does_not_depend_on_its_batch() -> None:
    kwargs = {"matrix": MATRIX, "seed": 7}
    whole = simulate_ct(hu(3), PX, BEAM, **kwargs).measurement
    alone = simulate_ct(hu(1), PX, BEAM, positions=[2], **kwargs).measurement
    torch.testing.assert_close(whole.data[2], alone.data[0], rtol=0, atol=2e-6)
    assert not torch.allclose(whole.data[0], whole.data[1])
    other = simulate_ct(hu(1), PX, BEAM, matrix=MATRIX, seed=8).measurement
    assert not torch.allclose(whole.data[0], other.data[0])


def test_model_error_widens_the_stated_noise_only() -> None:
    kwargs = {"matrix": MATRIX, "photons": 1e5}
    bare = simulate_ct(hu(1), PX, BEAM, model_error=0.0, **kwargs).measurement
    wide = simulate_ct(hu(1), PX, BEAM, model_error=0.02, **kwargs).measurement
    assert torch.equal(bare.data, wide.data)
    torch.testing.assert_close(wide.noise, (bare.noise**2 + 0.02**2).sqrt())
    with pytest.raises(InputError, match="model_error"):
        simulate_ct(hu(1), PX, BEAM, model_error=-0.1, **kwargs)


def test_views_in_blocks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    import phantoms.simulate as simulate

    whole = simulate_ct(hu(1), PX, BEAM, matrix=MATRIX).measurement.data
    monkeypatch.setattr(simulate, "_BLOCK_BYTES", 500_000)
    assert torch.equal(simulate_ct(hu(1), PX, BEAM, matrix=MATRIX).measurement.data, whole)


def test_area_mean_keeps_the_mass() -> None:
    image = np.random.default_rng(0).random((2, 12, 12)).astype(np.float32)
    np.testing.assert_allclose(
        area_mean(image, 4), image.reshape(2, 4, 3, 4, 3).mean((2, 4)), rtol=1e-5
    )
    odd = area_mean(image, 5)
    assert odd.shape == (2, 5, 5)
    np.testing.assert_allclose(odd.mean((1, 2)), image.mean((1, 2)), rtol=1e-5)


def test_ct_padding_and_rectangles() -> None:
    wide = hu(1)[:, 20:76]
    wide[0, 0, 0] = -3024.0  # scanner padding is air
    s = simulate_ct(wide, PX, BEAM, matrix=MATRIX)
    assert s.truth.shape == (1, MATRIX, MATRIX)
    assert float(s.truth.min()) == 0.0


def test_mri() -> None:
    image = np.abs(hu(3)) + np.arange(3)[:, None, None]
    s = simulate_mri(image, (1.0, 1.0), acceleration=4.0, noise=0.02, seed=1)
    m = s.measurement
    assert m.operator.acceleration == pytest.approx(4.0, rel=0.01)
    assert m.chi2(s.truth).numpy() == pytest.approx(1.0, abs=0.1)
    assert float(m.noise) == pytest.approx(0.02 * np.percentile(image, 99), rel=1e-5)
    assert not bool(m.data[:, ~m.operator.mask].any())
    assert "own grid" in m.provenance["simulation"]
    again = simulate_mri(image, (1.0, 1.0), acceleration=4.0, noise=0.02, seed=1)
    assert torch.equal(again.measurement.data, m.data)
    complex_image = image * np.exp(0.3j)
    twisted = simulate_mri(complex_image, (1.0, 1.0))
    torch.testing.assert_close(twisted.truth, torch.from_numpy(complex_image).to(torch.complex64))


@pytest.mark.parametrize("kind", ["square", "pixels"])
def test_inpainting(kind) -> None:
    s = simulate_inpainting(hu(), (PX, PX), modality="CT", hole=0.25, kind=kind, matrix=MATRIX)
    m = s.measurement
    share = 0.0625 if kind == "square" else 0.25
    assert m.operator.measured == pytest.approx((1 - share) * MATRIX**2, abs=1)
    assert m.chi2(s.truth).numpy() == pytest.approx(1.0, abs=0.15)
    assert m.pixel_mm == (2 * PX, 2 * PX)
    assert float(s.truth.max()) == pytest.approx(1.6 * MU_WATER, rel=0.05)
    mr = simulate_inpainting(np.abs(hu()), (PX, PX), modality="MR", kind=kind)
    assert mr.measurement.mu_water is None
    torch.testing.assert_close(mr.truth, torch.from_numpy(np.abs(hu())))


def test_refusals() -> None:
    with pytest.raises(InputError, match="photons"):
        simulate_ct(hu(1), PX, BEAM, matrix=MATRIX, photons=-1.0)
    with pytest.raises(InputError, match="photons"):
        simulate_ct_analytic([BODY], PX, BEAM, photons=0.0, matrix=8)
    with pytest.raises(GeometryError, match="at least one slice"):
        simulate_ct_analytic([], PX, BEAM)
    for matrix in (0, -3, FINE + 1):
        with pytest.raises(GeometryError, match="matrix"):
            simulate_ct(hu(1), PX, BEAM, matrix=matrix)
    with pytest.raises(GeometryError, match="stack"):
        simulate_ct(hu(1)[0], PX, BEAM)
    with pytest.raises(InputError, match="NaN"):
        simulate_ct(hu(1) * np.nan, PX, BEAM, matrix=MATRIX)
    with pytest.raises(UnsupportedError, match="square pixels"):
        simulate_ct(hu(1), (1.0, 2.0), BEAM, matrix=MATRIX)
    with pytest.raises(GeometryError, match="positions"):
        simulate_ct(hu(2), PX, BEAM, matrix=MATRIX, positions=[1])
    with pytest.raises(InputError, match="negative"):
        simulate_ct(hu(1), PX, BEAM, matrix=MATRIX, seed=-1)
    with pytest.raises(InputError, match="noise"):
        simulate_mri(np.ones((1, 32, 32)), (1.0, 1.0), noise=0.0)
    with pytest.raises(InputError, match="noise"):
        simulate_mri(np.zeros((1, 32, 32)), (1.0, 1.0))
    for hole in (0.0, 1.0, -0.5):
        with pytest.raises(GeometryError, match="hole"):
            simulate_inpainting(hu(1), (PX, PX), modality="CT", hole=hole)
    with pytest.raises(UnsupportedError, match="real"):
        simulate_inpainting(hu(1) * 1j, (PX, PX), modality="MR")


@pytest.mark.slow
def test_mismatch_of_real_slices(shared_data: Path) -> None:
    """23 views, 512 to 256, 1e5 photons: grid mismatch adds up to 2 to the noise's 1."""
    with np.load(shared_data / "ct_train" / "ct_hu_512.npz") as file:
        slices = file["hu"][[0, 12, 60]]
    beam = ParallelBeam.sparse(23, (256, 256), 1.4)
    s = simulate_ct(slices, 0.7, beam, model_error=0.0)
    chi2 = s.measurement.chi2(s.truth).numpy()
    assert ((chi2 > 1.0) & (chi2 < 4.0)).all()
    # and the default allowance for it covers it without drowning the data
    s = simulate_ct(slices, 0.7, beam)
    chi2 = s.measurement.chi2(s.truth).numpy()
    assert ((chi2 > 0.3) & (chi2 < 1.5)).all()


@pytest.mark.slow
def test_hu_of_a_real_slice_survive_180_views(shared_data: Path) -> None:
    """Air, lung and soft tissue within 15 HU of the source by FBP: units, grid and scale."""
    from scipy import ndimage

    from inverse.classical import fbp

    with np.load(shared_data / "ct_train" / "ct_hu_512.npz") as file:
        slices = file["hu"][[12]]
    beam = ParallelBeam.sparse(180, (256, 256), 1.4)
    scan = simulate_ct(slices, 0.7, beam, photons=1e6)
    truth = mu_to_hu(scan.truth).numpy()
    image = mu_to_hu(fbp(scan.measurement)).numpy()
    for low, high in ((-1050, -980), (-950, -700), (-20, 90)):
        region = ndimage.binary_erosion(
            (truth > low) & (truth < high), np.ones((1, 3, 3)), iterations=2
        )
        assert region.sum() > 200
        assert abs(float((image - truth)[region].mean())) < 15


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--geometry", "fan", "--short-scan"), "FanBeam(9 views over 2"),
        (("--geometry", "fan-curved"), "curved bins"),
        (("--detector", "40"), "40 bins"),
        (("--electronic-noise", "5", "--kvp", "120"), "ParallelBeam"),
        (("--metal", "1"), "ParallelBeam"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_command_line_options(tmp_path: Path, options, expected) -> None:
    from cli_tools import recon, series

    from inverse.io.measurement_file import read_measurement
    from inverse.operators.metal import UnspoiledRays

    source, out = series(tmp_path / "in", 1), tmp_path / "m.h5"
    assert recon("simulate", "ct", source, "-o", out, "--views", "9", *options) == 0
    m = read_measurement(out).measurement
    assert expected in m.provenance["geometry"]
    assert isinstance(m.operator, UnspoiledRays) == ("--metal" in options)
    assert m.provenance["electronic_noise"] == (5.0 if "--kvp" in options else 0.0)
    assert ("120 kV" in m.provenance["simulation"]) == ("--kvp" in options)


def test_command_line_refuses_short_scans_of_parallel_beams(tmp_path: Path, capsys) -> None:
    from cli_tools import recon, series

    source = series(tmp_path / "in", 1)
    out = tmp_path / "m.h5"
    assert recon("simulate", "ct", source, "-o", out, "--short-scan") == 4
    assert "half turn" in capsys.readouterr().err
    assert not out.exists()


def test_slices_are_simulated_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From disk and the truth into a sink, in slabs of three: the bits of the whole in memory."""
    rng = np.random.default_rng(0)
    volume = rng.uniform(-1000, 1500, (9, 32, 32)).astype(np.float32)
    disk = DiskVolume(tmp_path, volume.shape)
    disk[:] = volume
    beam, chosen = ParallelBeam.sparse(7, (16, 16), 4.0), [4, 1, 2, 0, 8, 7, 5]
    slices = Chosen(disk, chosen)
    metal = implants(volume[chosen] + 1500, 2.0, 1, radius_mm=4.0)
    metal = np.stack([np.roll(rod, k, axis=0) for k, rod in enumerate(metal)])
    ct = partial(simulate_ct, pixel_mm=2.0, geometry=beam, matrix=16, positions=chosen)
    mri = partial(simulate_mri, pixel_mm=(2.0, 2.0), acceleration=2.0, positions=chosen)
    scans: dict[str, Callable[..., Simulation]] = {
        "water": ct,
        "tube": partial(ct, kvp=120.0, electronic_noise=3.0),
        "metal": partial(ct, metal=metal),
        "one coil": partial(mri, phase=1.0),
        "coils": partial(mri, coils=3, centre_fraction=0.4, phase=1.0),
    }
    whole = {name: scan(volume[chosen]) for name, scan in scans.items()}
    taken: list[slice] = []

    def threes(count: int) -> list[slice]:
        taken.extend(slabs(count, 3))
        return list(slabs(count, 3))

    def take(
        given: list[tuple[int, int]], truth: torch.Tensor, at: slice, few: torch.Tensor
    ) -> None:
        given.append((at.start, at.stop))
        truth[at] = few

    monkeypatch.setattr(phantoms.simulate, "slabs", threes)
    for name, scan in scans.items():
        taken.clear()
        given: list[tuple[int, int]] = []
        truth = torch.zeros_like(whole[name].truth)

        parts = scan(slices, sink=partial(take, given, truth))
        assert given == [(s.start, s.stop) for s in taken] == [(0, 3), (3, 6), (6, 7)], name
        assert parts.truth.shape == (0, *truth.shape[1:])
        assert torch.equal(truth, whole[name].truth), name
        for field in ("data", "noise"):
            a, b = (getattr(s.measurement, field) for s in (parts, whole[name]))
            assert torch.equal(a, b), (name, field)
        assert parts.measurement.provenance == whole[name].measurement.provenance
        assert torch.equal(scan(slices).truth, truth)
    assert torch.equal(
        parts.measurement.operator(truth), whole["coils"].measurement.operator(truth)
    )


def test_a_truth_held_as_a_whole_goes_into_a_sink(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = simulate_inpainting(hu(5), (PX, PX), modality="CT")
    monkeypatch.setattr(phantoms.simulate, "slabs", partial(slabs, size=2))
    given: list[torch.Tensor] = []
    parts = whole.into(lambda items, few: given.append(few))
    assert [len(few) for few in given] == [2, 2, 1]
    assert torch.equal(torch.cat(given), whole.truth)
    assert len(parts.truth) == 0
    assert whole.into(None) is whole
