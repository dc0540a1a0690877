"""Metal: segmentation, trace, the scan without it, interpolation, and beam hardening."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import cli_tools
import laws
import numpy as np
import pytest
import torch

from inverse.classical import cgls, fbp, leave_out_metal, os_sart
from inverse.errors import GeometryError, InputError, UnsupportedError
from inverse.io.measurement_file import read_measurement, write_measurement
from inverse.operators.ct import FanBeam, ParallelBeam, RayTransform
from inverse.operators.linop import Identity
from inverse.operators.metal import (
    METAL_HU,
    UnspoiledRays,
    interpolate_trace,
    metal_trace,
    segment_metal,
)
from inverse.operators.units import MU_WATER, mu_to_hu
from phantoms.beam import BONE, TITANIUM, WATER, Tube, implants, split
from phantoms.simulate import simulate_ct

N, PX = 64, 3.0
ROWS = (np.arange(N)[:, None] - (N - 1) / 2) * PX
COLS = (np.arange(N) - (N - 1) / 2) * PX


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECON_CACHE_DIR", "off")


def disc(x: float, y: float, radius: float) -> np.ndarray:
    return (COLS - x) ** 2 + (ROWS - y) ** 2 <= radius**2


def body(slices: int = 1) -> np.ndarray:
    """A water disc with an inset of bone, HU."""
    hu = np.where(disc(0, 0, 80), 0.0, -1000.0)
    hu[disc(30, 20, 12)] = 900.0
    return np.stack([hu] * slices).astype(np.float32)


def scan(views: int = 60, beam: str = "parallel") -> RayTransform:
    make = ParallelBeam.sparse if beam == "parallel" else FanBeam.sparse
    return RayTransform(make(views, (N, N), PX), (N, N), PX)


def test_segmentation_is_a_threshold_and_a_margin() -> None:
    hu = torch.zeros(2, 9, 9)
    hu[0, 4, 4] = METAL_HU + 1
    hu[1, 0, 8] = METAL_HU
    assert segment_metal(hu).nonzero().tolist() == [[0, 4, 4]]
    wide = segment_metal(hu, margin=2)
    assert int(wide.sum()) == 25
    assert bool(wide[0, 2:7, 2:7].all())
    assert int(segment_metal(hu, threshold=METAL_HU - 1, margin=1)[1].sum()) == 4
    with pytest.raises(GeometryError, match="margin"):
        segment_metal(hu, margin=-1)


@pytest.mark.parametrize("beam", ["parallel", "fan"])
def test_trace_is_the_shadow(beam: str) -> None:
    op = scan(36, beam)
    x, y, radius = 20.0, -35.0, 9.0
    trace = metal_trace(op, torch.from_numpy(disc(x, y, radius)))
    origin, direction = (
        torch.from_numpy(part[..., 0, :]) for part in map(np.array, op.geometry.rays())
    )
    q = origin - torch.tensor([x, y])
    miss = (q[..., 0] * direction[..., 1] - q[..., 1] * direction[..., 0]).abs()
    assert bool(trace[miss < radius - PX].all())
    assert not bool(trace[miss > radius + PX].any())
    wide = metal_trace(op, torch.from_numpy(disc(x, y, radius)), margin=2)
    inner = trace.sum(1) > 0
    assert (wide.sum(1) - trace.sum(1))[inner].tolist() == [4] * int(inner.sum())
    both = torch.from_numpy(np.stack([disc(x, y, radius), disc(-x, y, radius)]))
    assert torch.equal(metal_trace(op, both), metal_trace(op, both.any(0)))
    with pytest.raises(GeometryError, match="margin"):
        metal_trace(op, both, margin=-1)


def unspoiled(views: int = 60) -> UnspoiledRays:
    op = scan(views)
    return UnspoiledRays(op, metal_trace(op, torch.from_numpy(disc(-25, 10, 8)), margin=1))


def test_laws_of_the_scan_without_metal() -> None:
    op = unspoiled(12)
    laws.check_all(op)
    part = op.subset(slice(1, None, 3))
    laws.check_adjoint(part)
    x = laws.random(op.in_shape, torch.float32, 0)
    torch.testing.assert_close(part(x), op(x)[1::3])
    assert op.measured == int(op.good.sum()) < 12 * op.geometry.bins
    assert not bool(op(x)[~op.good].any())
    torch.testing.assert_close(op(x)[op.good], scan(12)(x)[op.good])
    assert "spoiled" in repr(op)
    with pytest.raises(GeometryError, match="trace"):
        UnspoiledRays(scan(12), torch.zeros(3, 3, dtype=torch.bool))
    with pytest.raises(GeometryError, match="leave a ray"):
        UnspoiledRays(scan(12), torch.ones(12, op.geometry.bins, dtype=torch.bool))


def test_interpolation_is_exact_for_straight_data() -> None:
    op = unspoiled(12)
    ramp = torch.arange(12.0)[:, None] + 0.5 * torch.arange(op.geometry.bins)
    data = torch.where(op.good, ramp, math.nan)
    filled = interpolate_trace(torch.stack([data, 2 * data]), op)
    torch.testing.assert_close(filled, torch.stack([ramp, 2 * ramp]))
    # at the ends the neighbour continues; a view without data is zero
    trace = torch.zeros(12, op.geometry.bins, dtype=torch.bool)
    trace[0, :3] = trace[1, -2:] = trace[2] = True
    filled = interpolate_trace(ramp, UnspoiledRays(scan(12), trace))
    assert filled[0, :4].tolist() == [float(ramp[0, 3])] * 4
    assert filled[1, -3:].tolist() == [float(ramp[1, -3])] * 3
    assert not bool(filled[2].any())


def test_reduction_beats_the_streaks(tmp_path) -> None:
    hu = np.repeat(np.repeat(body(), 2, 1), 2, 2)  # a native grid twice as fine
    metal = np.repeat(np.repeat((disc(-35, 10, 6) | disc(10, -40, 6))[None], 2, 1), 2, 2)
    beam = ParallelBeam.sparse(90, (N, N), PX)
    settings = {"matrix": N, "photons": 1e5, "kvp": 120.0}
    reduced = simulate_ct(hu, PX / 2, beam, metal=metal, **settings)
    op = reduced.measurement.operator
    assert isinstance(op, UnspoiledRays)
    assert 0.05 < reduced.measurement.provenance["spoiled_rays"] < 0.4
    torch.testing.assert_close(reduced.truth, simulate_ct(hu, PX / 2, beam, **settings).truth)
    # water away from edges, which differ for other reasons
    aside = disc(-35, 10, 12) | disc(10, -40, 12) | disc(30, 20, 20)
    tissue = torch.from_numpy(disc(0, 0, 70) & ~aside)[None]

    def error(image: torch.Tensor) -> float:
        return float((mu_to_hu(image) - mu_to_hu(reduced.truth))[tissue].square().mean().sqrt())

    # the same rays with metal in the image: nothing left out
    dirty = np.where(metal, 15_000.0, hu).astype(np.float32)
    streaks = error(fbp(simulate_ct(dirty, PX / 2, beam, **settings).measurement))
    assert error(fbp(reduced.measurement)) < 0.35 * streaks
    assert error(cgls(reduced.measurement)) < 0.6 * streaks
    assert error(os_sart(reduced.measurement, 5)) < 0.4 * streaks
    # and the file keeps it
    write_measurement(tmp_path / "m.h5", reduced.measurement, reduced.truth)
    again = read_measurement(tmp_path / "m.h5").measurement
    assert isinstance(again.operator, UnspoiledRays)
    assert torch.equal(again.operator.good, op.good)
    assert torch.equal(again.operator(reduced.truth), op(reduced.truth))


# --- beam hardening ------------------------------------------------------------------------------


def test_attenuation_of_water_is_that_of_the_units() -> None:
    assert float(WATER.attenuation(60.0)) == pytest.approx(MU_WATER, rel=1e-3)
    # between the table's energies, NIST's finer tables: water 0.1929 cm^2/g at 70 keV
    assert float(WATER.attenuation(70.0)) == pytest.approx(0.01929, rel=0.01)


def test_one_energy_adds_and_many_harden() -> None:
    tube = Tube(120.0)
    kev, share = tube.spectrum()
    assert share.sum() == pytest.approx(1.0)
    assert 55.0 < float((kev * share).sum()) < 75.0
    thin = torch.tensor([1e-4], dtype=torch.float64)
    for material in (WATER, BONE, TITANIUM):
        ratio = material.attenuation(kev) / material.attenuation(60.0)
        expected = 1e-4 * float((share * ratio).sum())
        assert float(tube.measured({material: thin})) == pytest.approx(expected, rel=1e-3)
    line = torch.linspace(0.0, 8.0, 9, dtype=torch.float64)
    slope = {m: tube.measured({m: line}).diff() for m in (WATER, BONE)}
    assert all(bool((s.diff() < 0).all()) for s in slope.values())
    assert float(slope[BONE][-1] / slope[BONE][0]) < float(slope[WATER][-1] / slope[WATER][0])


def test_water_correction_undoes_water_and_not_bone() -> None:
    tube = Tube(100.0)
    line = torch.linspace(0.0, 8.0, 17, dtype=torch.float64)
    std = torch.full((17,), 0.01)
    data, wide = tube.water_corrected(tube.measured({WATER: line}), std)
    torch.testing.assert_close(data, line, atol=1e-3, rtol=0)
    assert bool((wide.diff() > 0).all())  # hardening is undone by a growing slope
    step = 1e-3
    p = tube.measured({WATER: line[8:10]})
    up, _ = tube.water_corrected(p + step, std[:2])
    down, _ = tube.water_corrected(p - step, std[:2])
    torch.testing.assert_close(
        (up - down) / (2 * step) * 0.01, wide[8:10].double(), rtol=1e-2, atol=0
    )
    bone, _ = tube.water_corrected(tube.measured({BONE: line}), std)
    assert float(bone[-1]) < 0.9 * 8.0
    for kvp in (30.0, 200.0, math.nan):
        with pytest.raises(InputError, match="kV"):
            Tube(kvp)


def test_split_is_a_partition() -> None:
    hu = np.array([[[-1000.0, -500.0, 0.0, 1000.0, 5000.0]]], dtype=np.float32)
    parts = split(hu, None, MU_WATER)
    total = sum(parts.values())
    np.testing.assert_allclose(total, MU_WATER * (1 + hu / 1000), rtol=1e-5, atol=1e-9)
    assert np.all(parts[BONE][hu <= 0] == 0)
    assert parts[WATER][0, 0, 4] == 0
    metal = hu > 4000
    with_metal = split(hu, metal, MU_WATER)
    assert with_metal[BONE][metal] == with_metal[WATER][metal] == 0
    assert with_metal[TITANIUM][metal] == pytest.approx(0.348, rel=0.01)  # 0.7661 x 4.54 / 10


def test_hardening_darkens_between_bones() -> None:
    hu = body()
    hu[0][disc(-45, 0, 12) | disc(45, 0, 12)] = 1500.0
    hu = np.repeat(np.repeat(hu, 2, 1), 2, 2)
    beam = ParallelBeam.sparse(90, (N, N), PX)
    plain, hard = (
        mu_to_hu(fbp(simulate_ct(hu, PX / 2, beam, matrix=N, photons=1e8, kvp=kvp).measurement))[0]
        for kvp in (None, 100.0)
    )
    between, aside = torch.from_numpy(disc(0, 0, 10)), torch.from_numpy(disc(0, -60, 10))
    assert abs(float(plain[between].mean())) < 8
    assert abs(float(hard[aside].mean())) < 20
    assert float(hard[between].mean()) < float(hard[aside].mean()) - 10


def test_implants_are_rods_in_tissue() -> None:
    hu = body(3)
    rods = implants(hu, PX, 2, radius_mm=6.0, seed=1)
    assert rods.shape == hu.shape
    assert np.array_equal(rods[0], rods[2])
    assert bool((hu[rods] > -300).all())
    assert rods[0].sum() * PX**2 == pytest.approx(2 * math.pi * 36, rel=0.25)
    assert not np.array_equal(rods, implants(hu, PX, 2, radius_mm=6.0, seed=2))
    with pytest.raises(InputError, match="no room"):
        implants(hu, PX, 2, radius_mm=70.0)
    with pytest.raises(GeometryError, match="metal mask"):
        simulate_ct(hu, PX, ParallelBeam.sparse(9, (N, N), PX), matrix=N, metal=rods[:1])


# --- metal that the scan itself must show ------------------------------------------------------


def rods() -> np.ndarray:
    """Two rods of 9 mm radius in the body."""
    return np.broadcast_to(disc(-35, 10, 9) | disc(20, -40, 9), (1, N, N))


def test_segmented_metal_is_the_true_one_about() -> None:
    geometry = scan(90).geometry
    options = {"matrix": N, "metal": rods()}
    told = simulate_ct(body(), PX, geometry, **options).measurement
    found = simulate_ct(body(), PX, geometry, **options, metal_trace="segmented").measurement
    kept = simulate_ct(body(), PX, geometry, **options, metal_trace="none")
    assert isinstance(found.operator, UnspoiledRays)
    assert found.provenance["metal_threshold_hu"] == METAL_HU
    true, seen = ~told.operator.good, ~found.operator.good
    assert float((seen & true).sum() / true.sum()) > 0.97  # what is spoiled is left out
    assert float(seen.double().mean()) < 1.6 * float(true.double().mean())  # and little else
    # the interpolated and the iterated image without the trace beat the one through metal
    whole = kept.measurement
    assert type(whole.operator) is RayTransform
    assert whole.provenance["metal_trace"] == "none"

    def error(x: torch.Tensor) -> float:
        outside = torch.from_numpy(~rods())
        return float((x - kept.truth)[outside].norm() / kept.truth.norm())

    assert error(fbp(found)) < 0.5 * error(fbp(whole))
    assert error(cgls(found)) < error(cgls(whole))


def test_nothing_to_leave_out_and_refusals() -> None:
    plain = simulate_ct(body(), PX, scan(40).geometry, matrix=N).measurement
    assert leave_out_metal(plain) is plain
    assert leave_out_metal(plain, threshold=400.0) is not plain  # bone counts, if asked for
    with pytest.raises(UnsupportedError, match="CT slices"):
        leave_out_metal(replace(plain, operator=Identity(plain.operator.out_shape)))
    with pytest.raises(UnsupportedError, match="metal_trace"):
        simulate_ct(body(), PX, scan(4).geometry, matrix=N, metal=rods(), metal_trace="guess")


@pytest.mark.slow
def test_metal_on_the_command_line(tmp_path) -> None:
    cli_tools.series(tmp_path / "ct", 2)
    prior = cli_tools.tiny_prior(tmp_path / "p.safetensors")
    meas, out = tmp_path / "m.h5", tmp_path / "out"
    options = ["--views", 60, "--metal", 1, "--metal-trace", "none"]
    assert cli_tools.recon("simulate", "ct", tmp_path / "ct", "-o", meas, *options) == 0
    quick = ["--prior", prior, "--method", "dds", "--steps", 2, "--baseline", "cgls"]
    threshold = ["--metal-threshold", 1200]  # pixels of 6 mm blur a rod of 10 mm
    assert cli_tools.recon("reconstruct", meas, "-o", out, *quick, *threshold) == 0
    run = json.loads((out / "run.json").read_text())
    assert run["settings"]["measurement"]["metal_threshold_hu"] == 1200.0
    assert 0.0 < run["settings"]["measurement"]["spoiled_rays"] < 0.4
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics["methods"]) == ["fbp", "cgls", "prior"]
    assert cli_tools.recon("reconstruct", meas, "-o", out, "--baseline", "magic") == 2
