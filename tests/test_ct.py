"""Ray transform: anchors in closed form and from outside, the matrix cache, FBP."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
from dataclasses import replace
from pathlib import Path

import astra
import laws
import numpy as np
import pytest
import torch
from skimage.transform import radon

from inverse.errors import GeometryError, InputError, UnsupportedError
from inverse.io.measurement_file import read_measurement, write_measurement
from inverse.measurement import Measurement
from inverse.operators.ct import (
    ConeBeam,
    ConeVectors,
    FanBeam,
    ParallelBeam,
    RayTransform,
    fbp,
    geometry_from_dict,
    matrix_bytes,
)
from inverse.operators.fbp import _filter
from inverse.operators.units import MU_WATER, hu_to_mu, mu_to_hu

N, PX = 64, 1.8
CENTRE, RADIUS = (14.3, -21.7), 18.2  # mm; off-centre in x and y, and not on a diagonal


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "rays"))


def disc(n: int = N, px: float = PX, sub: int = 16) -> torch.Tensor:
    """Area mean of the disc on the grid."""
    g = (np.arange(n * sub) + 0.5 - n * sub / 2) * px / sub
    inside = (g[None] - CENTRE[0]) ** 2 + (g[:, None] - CENTRE[1]) ** 2 <= RADIUS**2
    return torch.from_numpy(inside.reshape(n, sub, n, sub).mean((1, 3), dtype=np.float32))


def chords(origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Length of the rays in the disc."""
    q = origin - np.asarray(CENTRE)
    along = (q * direction).sum(-1)
    return 2 * np.sqrt(np.maximum(RADIUS**2 - (q * q).sum(-1) + along**2, 0.0))


def parallel(views: int = 30) -> ParallelBeam:
    return ParallelBeam.sparse(views, (N, N), PX)


def fan(views: int = 120, **options) -> FanBeam:
    return FanBeam.sparse(views, (N, N), PX, source_mm=200.0, detector_mm=150.0, **options)


CUBE, VOXEL = (20, 24, 24), (2.0, 1.5, 1.5)
BALL, BALL_RADIUS = (3.1, -4.2, 2.7), 9.0  # mm, in x, y, z


def cone(views: int = 12) -> ConeBeam:
    angles = tuple(2 * math.pi * k / views for k in range(views))
    return ConeBeam(angles, 30, 36, 2.4, 2.2, 90.0, 60.0)


CASES = [
    (parallel(), "linear"),
    (parallel(), "line"),
    (parallel(), "strip"),
    (replace(parallel(), offset_mm=9.3), "linear"),
    (replace(parallel(), offset_mm=9.3), "strip"),
    (fan(), "line"),
    (fan(), "strip"),
    (fan(), "linear"),
    (replace(fan(), offset_mm=-14.7), "line"),
    (fan(curved=True), "line"),
    (replace(fan(curved=True), offset_mm=-14.7), "linear"),
]


@pytest.mark.parametrize(("geometry", "kernel"), CASES)
def test_off_centre_disc_has_its_chords(geometry, kernel) -> None:
    op = RayTransform(geometry, (N, N), PX, kernel)
    got = op(disc()).numpy()
    # strips average over a bin, rays pass its centre
    expected = chords(*geometry.rays(9 if kernel == "strip" else 1)).mean(-1)
    assert np.linalg.norm(got - expected) < 0.04 * np.linalg.norm(expected)
    # sub-pixel: where the shadow's mass and its centre fall on the detector
    s = np.arange(geometry.bins)
    np.testing.assert_allclose(got.sum(1), expected.sum(1), rtol=0.02)
    np.testing.assert_allclose(
        (got * s).sum(1) / got.sum(1), (expected * s).sum(1) / expected.sum(1), atol=0.25
    )


@pytest.mark.parametrize(("geometry", "kernel"), CASES)
def test_laws(geometry, kernel) -> None:
    laws.check_all(RayTransform(geometry, (N, N), PX, kernel))


def test_grids_that_are_not_square() -> None:
    geometry = ParallelBeam.sparse(12, (20, 33), 1.0)
    op = RayTransform(geometry, (20, 33), 1.0)
    laws.check_adjoint(op)
    # theta = 0: rays run along y, the detector along x; every column sums to its 20 mm
    top = op(torch.ones(20, 33))[0]
    assert float(top[geometry.bins // 2]) == pytest.approx(20.0, rel=1e-5)
    assert float(top.sum()) == pytest.approx(20 * 33, rel=1e-3)


def test_agrees_with_scikit_image() -> None:
    # skimage's radon(theta): s = x cos - y sin in rows-down coordinates about pixel n // 2
    # (odd n: the grid centre), which is our view -theta
    n = 65
    x = disc(n)
    degrees = np.arange(0.0, 180.0, 12.0)
    theirs = radon(x.numpy().astype(np.float64), theta=degrees, circle=True).T * PX
    geometry = ParallelBeam(tuple(-np.deg2rad(degrees)), n, PX)
    ours = RayTransform(geometry, (n, n), PX)(x).numpy()
    assert np.linalg.norm(ours - theirs) < 0.02 * np.linalg.norm(theirs)
    mirrored = RayTransform(ParallelBeam(tuple(np.deg2rad(degrees)), n, PX), (n, n), PX)(x)
    assert np.linalg.norm(mirrored.numpy() - theirs) > 0.2 * np.linalg.norm(theirs)


def test_agrees_with_astra() -> None:
    # the angles of ASTRA's own geometries, whose y axis points up: ours is the view -theta
    x = disc()
    scan = parallel(10)
    grid = astra.create_vol_geom(N, N, *(side * N * PX / 2 for side in (-1, 1, -1, 1)))
    theirs = astra.create_proj_geom("parallel", PX, scan.bins, -np.asarray(scan.angles))
    projector = astra.create_projector("linear", theirs, grid)
    item, sinogram = astra.create_sino(x.numpy(), projector)
    astra.data2d.delete(item)
    astra.projector.delete(projector)
    ours = RayTransform(scan, (N, N), PX)(x).numpy()
    np.testing.assert_allclose(ours, sinogram, atol=2e-4 * sinogram.max())


SHORT = fan(200, short_scan=True)
TURN = ParallelBeam.sparse(180, (N, N), PX, arc=2 * math.pi)
FULL = {
    "half turn": parallel(90),
    "full turn": TURN,
    "quarter-bin offset": replace(TURN, offset_mm=PX / 4),
    "half detector": replace(TURN, bins=62, offset_mm=-30 * PX / 2),
    # golden angle: not equidistant
    "golden angle": ParallelBeam(tuple(k * math.pi * 0.618034 for k in range(144)), 92, PX),
    # so near a source that the cosine weight is far from 1
    "fan": FanBeam.sparse(360, (N, N), PX, source_mm=100.0, detector_mm=90.0),
    "curved fan": FanBeam.sparse(360, (N, N), PX, source_mm=100.0, detector_mm=90.0, curved=True),
    "half fan": replace(fan(360), bins=66, offset_mm=31.0),
    "curved half fan": replace(fan(360, curved=True), bins=66, offset_mm=-31.0),
    "short scan": SHORT,
    "curved short scan": fan(200, short_scan=True, curved=True),
    "longer than short": fan(240, arc=math.radians(290.0)),
    "backwards": replace(SHORT, angles=tuple(1.0 - a for a in SHORT.angles)),
}


def rings(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances of the pixels from the disc's centre and from the axis."""
    g = (torch.arange(N) - (N - 1) / 2) * PX
    return torch.hypot(g - CENTRE[0], g[:, None] - CENTRE[1]), torch.hypot(g, g[:, None])


@pytest.mark.parametrize("geometry", FULL.values(), ids=FULL.keys())
def test_fbp_of_a_disc_has_its_value(geometry) -> None:
    op = RayTransform(geometry, (N, N), PX)
    mu = 0.02
    data = torch.from_numpy(mu * chords(*geometry.rays(4)).mean(-1)).float()
    image = fbp(torch.stack([data, 2 * data]), op)
    distance, radius = rings(image)
    hu = 1000.0 * (image[0] / mu - 1.0)
    inside = hu[distance < 0.8 * RADIUS]
    assert abs(float(inside.mean())) < 1.0  # HU
    assert float(inside.abs().max()) < 12.0
    outside = 1000.0 + hu[(distance > 1.3 * RADIUS) & (radius < 50)]
    assert abs(float(outside.mean())) < 2.0
    g = (torch.arange(N) - (N - 1) / 2) * PX
    near = torch.where(distance < 1.3 * RADIUS, image[0], 0.0).double()
    centre = (near * g).sum() / near.sum(), (near * g[:, None]).sum() / near.sum()
    assert [float(c) for c in centre] == pytest.approx(CENTRE, abs=0.05)  # of a 1.8 mm pixel
    torch.testing.assert_close(image[1], 2 * image[0])


@pytest.mark.parametrize("window", ["shepp-logan", "cosine", "hamming", "hann"])
def test_fbp_windows_keep_values_and_smooth(window) -> None:
    op = RayTransform(parallel(90), (N, N), PX)
    data = torch.from_numpy(0.02 * chords(*op.geometry.rays(4)).mean(-1)).float()
    distance, _ = rings(data)
    inside = fbp(data, op, window)[distance < 0.7 * RADIUS]
    assert float(inside.mean()) == pytest.approx(0.02, rel=2e-3)
    noise = laws.random((4, *op.out_shape), torch.float32, 0)
    sharp, smooth, smoother = (
        float(fbp(noise, op, *settings).std())
        for settings in (("ram-lak",), (window,), (window, 0.5))
    )
    assert smoother < smooth < 0.95 * sharp
    # at the detector's highest frequency, as the windows are known for
    ratio = {"shepp-logan": 2 / math.pi, "cosine": 0.0, "hamming": 0.08, "hann": 0.0}[window]
    comb = torch.ones(1, 1, 512)
    comb[..., ::2] = -1.0
    beam = ParallelBeam((0.0,), 512, 1.0)
    ramp, windowed = (
        _filter(comb, beam, w, 1.0, False)[0, 0, 200:300] for w in ("ram-lak", window)
    )
    assert float(windowed.abs().mean() / ramp.abs().mean()) == pytest.approx(ratio, abs=0.02)


def test_extension_lifts_the_rim_of_truncated_projections() -> None:
    scan = replace(parallel(90), bins=24)  # 43 mm across; the disc pokes out of it
    op = RayTransform(scan, (N, N), PX)
    data = torch.from_numpy(0.02 * chords(*scan.rays(4)).mean(-1)).float()
    distance, radius = rings(data)
    seen = (radius < 0.9 * scan.radius_mm) & (distance < 0.9 * RADIUS)
    plain, extended = (float((fbp(data, op, extend=e) / 0.02 - 1)[seen].std()) for e in (0, 1))
    assert extended < 0.5 * plain


def test_fbp_refusals() -> None:
    for arc in (math.pi, 0.98 * SHORT.short_arc):
        op = RayTransform(fan(60, arc=arc), (N, N), PX)
        with pytest.raises(UnsupportedError, match="short scan of"):
            fbp(torch.zeros(op.out_shape), op)
    op = RayTransform(replace(SHORT, offset_mm=20.0), (N, N), PX)
    with pytest.raises(UnsupportedError, match="shifted detector needs a full turn"):
        fbp(torch.zeros(op.out_shape), op)
    op = RayTransform(replace(TURN, offset_mm=100.0), (N, N), PX)
    with pytest.raises(UnsupportedError, match="rotation axis"):
        fbp(torch.zeros(op.out_shape), op)
    op = RayTransform(parallel(4), (N, N), PX)
    with pytest.raises(GeometryError):
        fbp(torch.zeros(3, 3), op)
    with pytest.raises(UnsupportedError, match="ramp"):
        fbp(torch.zeros(op.out_shape), op, "ramp")  # type: ignore[arg-type]
    for cutoff in (0.0, 1.5, math.nan):
        with pytest.raises(GeometryError, match="cutoff"):
            fbp(torch.zeros(op.out_shape), op, cutoff=cutoff)


def test_limited_angle_is_not_inflated() -> None:
    # views of 60 degrees: the missing 120 must not be filled with the end views' weight
    op = RayTransform(ParallelBeam.sparse(30, (N, N), PX, arc=math.pi / 3), (N, N), PX)
    data = torch.from_numpy(chords(*op.geometry.rays(4)).mean(-1)).float()
    assert float(fbp(data, op).max()) < 1.0


def test_bad_geometries() -> None:
    for angles in ((), (math.nan,), (math.inf,)):
        with pytest.raises(GeometryError, match="angles"):
            ParallelBeam(angles, 10, 1.0)
    with pytest.raises(GeometryError, match="bin"):
        ParallelBeam((0.0,), 0, 1.0)
    with pytest.raises(GeometryError, match="bin_mm"):
        ParallelBeam((0.0,), 3, -1.0)
    with pytest.raises(GeometryError, match="source_mm"):
        FanBeam((0.0,), 3, 1.0, 0.0, 1.0)
    with pytest.raises(GeometryError, match="view"):
        ParallelBeam.sparse(0, (8, 8), 1.0)
    with pytest.raises(GeometryError, match="inside the grid"):
        FanBeam.sparse(8, (N, N), PX, source_mm=50.0)
    with pytest.raises(GeometryError, match="inside the grid"):
        RayTransform(FanBeam((0.0,), 8, 1.0, 50.0, 50.0), (N, N), PX)
    with pytest.raises(GeometryError, match="pixel"):
        RayTransform(parallel(), (N, N), 0.0)
    with pytest.raises(UnsupportedError, match="square pixels"):
        RayTransform(parallel(), (N, N), (1.0, 2.0))
    with pytest.raises(UnsupportedError, match="strip kernel serves"):
        RayTransform(fan(curved=True), (N, N), PX, "strip")
    with pytest.raises(GeometryError, match="offset_mm"):
        ParallelBeam((0.0,), 3, 1.0, math.inf)
    with pytest.raises(GeometryError, match="half angle"):
        FanBeam((0.0,), 200, 1.0, 10.0, 10.0, curved=True)
    with pytest.raises(GeometryError, match="own arc"):
        FanBeam.sparse(8, (N, N), PX, arc=1.0, short_scan=True)
    with pytest.raises(GeometryError, match="grid of"):
        RayTransform(parallel(), (3, N, N), PX)
    with pytest.raises(GeometryError, match="numbered 0 to 29"):
        parallel().take([30])
    for vectors in ((), ((0.0,) * 11,), ((0.0,) * 12,), ((math.nan,) * 12,)):
        with pytest.raises(GeometryError, match="ConeVectors"):
            ConeVectors(vectors, 2, 2)
    with pytest.raises(GeometryError, match="rows"):
        replace(cone(), rows=0)
    with pytest.raises(GeometryError, match="inside the grid"):
        RayTransform(replace(cone(), source_mm=10.0), CUBE, VOXEL)
    inside = ConeVectors(((0.0, 1.0, 0.0, 0.0, 50.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0),), 2, 2)
    with pytest.raises(GeometryError, match="inside the grid"):
        RayTransform(inside, CUBE, VOXEL)
    with pytest.raises(UnsupportedError, match="helix"):
        geometry_from_dict({"type": "helix"})


@pytest.mark.parametrize("geometry", [parallel(), fan(), fan(curved=True)], ids=repr)
def test_detector_covers_the_grid(geometry) -> None:
    # and no ray along an axis runs between pixels
    assert geometry.bins % 2 == N % 2
    assert geometry.radius_mm >= math.hypot(N, N) * PX / 2 - 1e-6


@pytest.mark.parametrize(("geometry", "kernel"), CASES)
def test_round_trip(geometry, kernel) -> None:
    spec = json.loads(json.dumps(geometry.to_dict()))
    again = geometry_from_dict(spec)
    assert again == geometry
    assert hash(again) == hash(geometry)
    assert repr(again) == repr(geometry)
    assert ("offset" in repr(geometry)) == (geometry.offset_mm != 0)
    op = RayTransform(geometry, (N, N), PX, kernel)
    twin = RayTransform.from_spec(json.loads(json.dumps(op.spec())))
    assert torch.equal(op(disc()), twin(disc()))


@pytest.mark.parametrize(
    "geometry", [*FULL.values(), cone(3), cone(3).vectors()], ids=[*FULL, "cone", "vectors"]
)
def test_measurement_files_keep_the_geometry(geometry, tmp_path: Path) -> None:
    geometry = geometry.take(range(2))
    shape, size = ((8, 9), 2.0) if geometry.ndim == 2 else (CUBE, VOXEL)
    op = RayTransform(geometry, shape, size)
    x = laws.random((1, *shape), torch.float32, 0)
    m = Measurement(
        op, op(x), torch.tensor(0.1), "CT", (size, size) if geometry.ndim == 2 else VOXEL[1:], 0.02
    )
    write_measurement(tmp_path / "m.h5", m, x)
    again = read_measurement(tmp_path / "m.h5").measurement
    assert again.operator.geometry == geometry
    assert torch.equal(again.operator(x), m.data)


def test_stored_geometries_without_offset_are_read() -> None:
    spec = {"type": "parallel", "angles": [0.0, 1.0], "bins": 5, "bin_mm": 2.0}
    assert geometry_from_dict(spec) == ParallelBeam((0.0, 1.0), 5, 2.0)


@pytest.mark.parametrize(("geometry", "kernel"), CASES)
def test_beyond_the_memory_bound_weights_are_computed_anew(geometry, kernel) -> None:
    geometry = geometry.take(range(0, geometry.views, 6))
    held = RayTransform(geometry, (N, N), PX, kernel)
    free = RayTransform(geometry, (N, N), PX, kernel, max_bytes=held.held_bytes // 2)
    assert (held.path, free.path in ("astra", "rays")) == ("matrix", True)
    assert free.held_bytes == 0
    laws.check_all(free)  # the adjoint matches in float32 precision
    x, y = disc(), laws.random(held.out_shape, torch.float32, 3)
    torch.testing.assert_close(free(x), held(x), rtol=0, atol=1e-5 * float(held(x).max()))
    torch.testing.assert_close(
        free.adjoint(y), held.adjoint(y), rtol=0, atol=1e-5 * float(held.adjoint(y).max())
    )


def test_many_views_of_a_large_image_need_no_matrix() -> None:
    huge = ParallelBeam.sparse(1200, (1024, 1024), 0.5)
    op = RayTransform(huge, (1024, 1024), 0.5)
    assert (op.path, op.held_bytes) == ("astra", 0)
    assert RayTransform(parallel(), (N, N), PX).held_bytes > 0


@pytest.mark.parametrize("bound", [2 * 2**30, 0])
@pytest.mark.parametrize("geometry", [parallel(), fan(30, curved=True)], ids=["matrix", "rays"])
def test_subsets_are_the_views(geometry, bound) -> None:
    op = RayTransform(geometry, (N, N), PX, max_bytes=bound)
    x = disc()
    for views in (slice(1, None, 4), [7, 3, 3], [-1]):
        part = op.subset(views)
        assert part.geometry.angles == tuple(np.asarray(geometry.angles)[views])
        torch.testing.assert_close(part(x), op(x)[views])
        laws.check_adjoint(part)
    with pytest.raises(GeometryError, match="at least one view"):
        op.subset([])
    with pytest.raises(GeometryError, match="numbered"):
        op.subset([30])


@pytest.mark.parametrize(("geometry", "kernel"), CASES)
def test_memory_estimate_is_near(geometry, kernel) -> None:
    op = RayTransform(geometry, (N, N), PX, kernel)
    true = 16 * op._a_vals.numel()
    assert matrix_bytes(geometry, (N, N), PX, kernel) == pytest.approx(true, rel=0.15)
    assert op.held_bytes == pytest.approx(true, rel=0.05)


# --- cone beams ----------------------------------------------------------------------------------


def ball_chords(origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    q = origin - np.asarray(BALL)
    along = (q * direction).sum(-1)
    return 2 * np.sqrt(np.maximum(BALL_RADIUS**2 - (q * q).sum(-1) + along**2, 0.0))


def ball(sub: int = 6) -> torch.Tensor:
    axes = [
        (np.arange(n * sub) + 0.5 - n * sub / 2) * h / sub - c
        for n, h, c in zip(CUBE, VOXEL, BALL[::-1], strict=True)
    ]
    inside = axes[0][:, None, None] ** 2 + axes[1][:, None] ** 2 + axes[2] ** 2 < BALL_RADIUS**2
    cells = inside.reshape(*(m for n in CUBE for m in (n, sub)))
    return torch.from_numpy(cells.mean((1, 3, 5), dtype=np.float32))


@pytest.mark.parametrize("kernel", ["line", "linear"])
@pytest.mark.parametrize("bound", [2 * 2**30, 0], ids=["matrix", "rays"])
def test_cone_beam_of_a_ball(kernel, bound) -> None:
    op = RayTransform(cone(), CUBE, VOXEL, kernel, max_bytes=bound)
    expected = ball_chords(*op.geometry.rays())
    got = op(ball()).numpy()
    # voxels of a sixth of the radius: the rim of the shadow is rough, its mass is not
    assert np.linalg.norm(got - expected) < 0.1 * np.linalg.norm(expected)
    np.testing.assert_allclose(got.sum((1, 2)), expected.sum((1, 2)), rtol=0.02)
    for axis in (1, 2):  # where the shadow falls on the panel
        n = np.arange(got.shape[axis]).reshape((-1, 1) if axis == 1 else (-1,))
        places = [(d * n).sum((1, 2)) / d.sum((1, 2)) for d in (got, expected)]
        np.testing.assert_allclose(*places, atol=0.15 if kernel == "line" else 0.05)
    laws.check_adjoint(op)
    laws.check_autograd(op)


def test_laws_of_a_small_cone_beam() -> None:
    laws.check_all(RayTransform(replace(cone(3), rows=7, columns=8), (5, 6, 7), 4.0))


def test_cone_midplane_is_the_fan() -> None:
    # a slice that the rays of the middle row do not leave
    scan = replace(cone(), rows=3)
    fan_op = RayTransform(scan.midplane, CUBE[1:], VOXEL[1])
    x = ball()[10:11]
    got = RayTransform(scan, (1, *CUBE[1:]), VOXEL)(x)
    torch.testing.assert_close(got[:, 1], fan_op(x[0]), rtol=1e-4, atol=1e-4)


def test_cone_rows_run_along_z() -> None:
    # a view from -y: x is the columns, z the rows
    op = RayTransform(replace(cone(1), rows=31, columns=37), CUBE, VOXEL)
    x = torch.zeros(CUBE)
    x[14, 12, 18] = 1.0
    data = op(x)[0]
    row, column = (int(k) for k in (data == data.max()).nonzero()[0])
    assert (row > 15, column > 18) == (True, True)


def test_general_vectors() -> None:
    circle = cone()
    vectors = circle.vectors()
    again = geometry_from_dict(json.loads(json.dumps(vectors.to_dict())))
    assert again == vectors
    assert hash(again) == hash(vectors)
    a, b = (RayTransform(g, CUBE, VOXEL) for g in (circle, vectors))
    torch.testing.assert_close(a(ball()), b(ball()))
    twin = RayTransform.from_spec(json.loads(json.dumps(b.spec())))
    torch.testing.assert_close(twin(ball()), b(ball()))
    torch.testing.assert_close(b.subset([2, 5])(ball()), b(ball())[[2, 5]])
    # from above, where no circle goes
    top = ((0.0, 0.0, 80.0, 0.0, 0.0, -40.0, 2.0, 0.0, 0.0, 0.0, 2.0, 0.0),)
    scan = ConeVectors(top, 24, 24)
    expected = ball_chords(*scan.rays())
    got = RayTransform(scan, CUBE, VOXEL)(ball()).numpy()
    assert np.linalg.norm(got - expected) < 0.12 * np.linalg.norm(expected)
    assert got.sum() == pytest.approx(expected.sum(), rel=0.02)
    with pytest.raises(UnsupportedError, match="circle"):
        fbp(torch.zeros(1, 24, 24), RayTransform(scan, CUBE, VOXEL))


@pytest.mark.parametrize("arc", ["turn", "short", "half"])
def test_feldkamp_of_a_ball(arc) -> None:
    scan = cone(120)
    if arc == "short":
        step = scan.midplane.short_arc / 120
        scan = replace(scan, angles=tuple(k * step for k in range(120)))
    if arc == "half":
        scan = replace(scan, columns=24, offset_mm=12.0)
    op = RayTransform(scan, CUBE, VOXEL, max_bytes=0)
    data = torch.from_numpy(0.02 * ball_chords(*scan.rays())).float()
    image = fbp(torch.stack([data, 2 * data]), op)
    z, y, x = (
        (torch.arange(n) - (n - 1) / 2) * h - c
        for n, h, c in zip(CUBE, VOXEL, BALL[::-1], strict=True)
    )
    distance = (z[:, None, None] ** 2 + y[:, None] ** 2 + x**2).sqrt()
    inside = image[0][distance < 0.6 * BALL_RADIUS] / 0.02
    assert float(inside.mean()) == pytest.approx(1.0, abs=0.01)
    assert float((inside - 1).abs().max()) < 0.06
    near = torch.where(distance < 1.4 * BALL_RADIUS, image[0], 0.0)
    shift = [float((near * c).sum() / near.sum()) for c in (z[:, None, None], y[:, None], x)]
    # a short scan sees what is off the midplane from one side only
    assert shift == pytest.approx([0.0, 0.0, 0.0], abs=0.4 if arc == "short" else 0.15)
    torch.testing.assert_close(image[1], 2 * image[0])


# --- cache ---------------------------------------------------------------------------------------


def test_cache_is_used_and_survives_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import inverse.operators.ct as ct

    monkeypatch.setenv("RECON_CACHE_DIR", str(tmp_path))
    built = []
    build = ct._build_matrix
    monkeypatch.setattr(ct, "_build_matrix", lambda *a: built.append(a) or build(*a))
    first = RayTransform(parallel(5), (N, N), PX)
    second = RayTransform(parallel(5), (N, N), PX)
    assert len(built) == 1
    assert torch.equal(first(disc()), second(disc()))
    RayTransform(parallel(5), (N, N), PX, "line")
    assert len(built) == 2
    assert not list(tmp_path.glob("*.tmp"))
    for path in tmp_path.glob("ray-*.safetensors"):
        path.unlink()

    for damage in (lambda b: b[: len(b) // 2], lambda b: b"", _flip_middle):
        RayTransform(parallel(5), (N, N), PX)
        for path in tmp_path.glob("ray-*.safetensors"):
            path.write_bytes(damage(path.read_bytes()))
        before = len(built)
        with caplog.at_level(logging.WARNING):
            again = RayTransform(parallel(5), (N, N), PX)
        assert len(built) == before + 1
        assert "rebuilding" in caplog.text
        assert torch.equal(first(disc()), again(disc()))


def test_cached_matrix_is_mapped_so_that_processes_share_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not tell what a process has mapped")
    monkeypatch.setenv("RECON_CACHE_DIR", str(tmp_path))
    built = RayTransform(parallel(7), (N, N), PX)
    (path,) = tmp_path.glob("ray-*.safetensors")
    assert path.name not in maps.read_text()
    mapped = RayTransform(parallel(7), (N, N), PX)
    assert path.name in maps.read_text()
    y = built(disc())
    assert torch.equal(mapped(disc()), y)
    assert torch.equal(mapped.adjoint(y), built.adjoint(y))


def _flip_middle(b: bytes) -> bytes:
    assert b
    return b[: len(b) // 2] + bytes([b[len(b) // 2] ^ 255]) + b[len(b) // 2 + 1 :]


def test_cache_drops_what_was_unused_for_longest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import inverse.operators.ct as ct

    monkeypatch.setenv("RECON_CACHE_DIR", str(tmp_path))
    RayTransform(parallel(5), (N, N), PX)
    (first,) = tmp_path.glob("ray-*.safetensors")
    RayTransform(parallel(6), (N, N), PX)
    (second,) = set(tmp_path.glob("ray-*.safetensors")) - {first}
    for path, age in ((first, 200), (second, 100)):
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
    RayTransform(parallel(5), (N, N), PX)  # used again
    monkeypatch.setattr(ct, "_CACHE_BYTES", 2.5 * first.stat().st_size)
    RayTransform(parallel(5), (N, N), PX, "line")
    kept = set(tmp_path.glob("ray-*.safetensors"))
    assert first in kept
    assert second not in kept
    assert len(kept) == 2


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")
    monkeypatch.setenv("RECON_CACHE_DIR", str(blocked))
    assert RayTransform(parallel(5), (N, N), PX)(disc()).isfinite().all()
    monkeypatch.setenv("RECON_CACHE_DIR", "off")
    assert RayTransform(parallel(5), (N, N), PX)(disc()).isfinite().all()


def test_matrix_is_not_saved_and_moves_with_the_module() -> None:
    op = RayTransform(parallel(5), (N, N), PX)
    assert op.state_dict() == {}
    x = disc()
    assert torch.equal(copy.deepcopy(op)(x), op(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(op(x), op.cpu()(x))
        assert op(x).dtype == torch.float32


def test_units() -> None:
    hu = torch.tensor([-1000.0, 0.0, 1000.0])
    torch.testing.assert_close(hu_to_mu(hu), torch.tensor([0.0, MU_WATER, 2 * MU_WATER]))
    torch.testing.assert_close(mu_to_hu(hu_to_mu(hu, 0.02), 0.02), hu)
    with pytest.raises(InputError, match="mu_water"):
        hu_to_mu(hu, 0.0)
