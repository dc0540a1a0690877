"""Ray transform: anchors in closed form and from outside, the matrix cache, FBP."""

from __future__ import annotations

import copy
import logging
import math
import os
from pathlib import Path

import laws
import numpy as np
import pytest
import torch
from skimage.transform import radon

from inverse.errors import GeometryError, InputError, ResourceError, UnsupportedError
from inverse.operators.ct import (
    FanBeam,
    ParallelBeam,
    RayTransform,
    fbp,
    geometry_from_dict,
)
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


def fan(views: int = 120) -> FanBeam:
    return FanBeam.sparse(views, (N, N), PX, source_mm=200.0, detector_mm=150.0)


CASES = [
    (parallel(), "linear"),
    (parallel(), "line"),
    (parallel(), "strip"),
    (fan(), "line"),
    (fan(), "strip"),
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
        (got * s).sum(1) / got.sum(1), (expected * s).sum(1) / expected.sum(1), atol=0.2
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


@pytest.mark.parametrize(
    "geometry",
    [
        parallel(90),
        ParallelBeam.sparse(180, (N, N), PX, arc=2 * math.pi),
        # so near a source that the cosine weight is far from 1
        FanBeam.sparse(360, (N, N), PX, source_mm=100.0, detector_mm=90.0),
        # golden angle: not equidistant
        ParallelBeam(tuple(k * math.pi * 0.618034 for k in range(144)), 92, PX),
    ],
    ids=["half turn", "full turn", "fan", "golden angle"],
)
def test_fbp_of_a_disc_has_its_value(geometry) -> None:
    op = RayTransform(geometry, (N, N), PX)
    data = torch.from_numpy(0.02 * chords(*geometry.rays(4)).mean(-1)).float()
    image = fbp(torch.stack([data, 2 * data]), op)
    g = (torch.arange(N) - (N - 1) / 2) * PX
    distance = torch.hypot(g - CENTRE[0], g[:, None] - CENTRE[1])
    inside = image[0][distance < 0.8 * RADIUS]
    assert float(inside.mean()) == pytest.approx(0.02, rel=0.01)
    assert float((inside / 0.02 - 1).abs().max()) < 0.05
    outside = image[0][(distance > 1.3 * RADIUS) & (torch.hypot(g, g[:, None]) < 50)]
    assert float(outside.mean().abs()) < 0.01 * 0.02
    near = torch.where(distance < 1.3 * RADIUS, image[0], 0.0).double()
    centre = (near * g).sum() / near.sum(), (near * g[:, None]).sum() / near.sum()
    assert [float(c) for c in centre] == pytest.approx(CENTRE, abs=0.1)  # of a 1.8 mm pixel
    torch.testing.assert_close(image[1], 2 * image[0])
    smooth = fbp(data, op, "hann")
    assert float(smooth[distance < 0.6 * RADIUS].mean()) == pytest.approx(0.02, rel=0.01)


def test_fbp_refusals() -> None:
    short = FanBeam.sparse(60, (N, N), PX, arc=math.pi)
    op = RayTransform(short, (N, N), PX)
    with pytest.raises(UnsupportedError, match="full turn"):
        fbp(torch.zeros(op.out_shape), op)
    op = RayTransform(parallel(4), (N, N), PX)
    with pytest.raises(GeometryError):
        fbp(torch.zeros(3, 3), op)
    with pytest.raises(UnsupportedError, match="shepp"):
        fbp(torch.zeros(op.out_shape), op, "shepp")  # type: ignore[arg-type]


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
    with pytest.raises(UnsupportedError, match="parallel beams only"):
        RayTransform(fan(), (N, N), PX, "linear")
    with pytest.raises(UnsupportedError, match="helix"):
        geometry_from_dict({"type": "helix"})


@pytest.mark.parametrize("geometry", [parallel(), fan()], ids=["parallel", "fan"])
def test_geometry_round_trip(geometry) -> None:
    again = geometry_from_dict(geometry.to_dict())
    assert again == geometry
    assert hash(again) == hash(geometry)
    op = RayTransform(geometry, (N, N), PX)
    twin = RayTransform.from_spec(op.spec())
    assert torch.equal(op(disc()), twin(disc()))
    # the detector covers the diagonal; no ray along an axis runs between pixels
    assert geometry.bins % 2 == N % 2
    assert geometry.radius_mm >= math.hypot(N, N) * PX / 2 - 1e-6


def test_memory_bound_says_what_to_do() -> None:
    huge = ParallelBeam.sparse(1200, (1024, 1024), 0.5)
    with pytest.raises(ResourceError, match="fewer views"):
        RayTransform(huge, (1024, 1024), 0.5)


@pytest.mark.parametrize(("geometry", "kernel"), CASES)
def test_memory_estimate_is_near(geometry, kernel) -> None:
    from inverse.operators.ct import matrix_bytes

    op = RayTransform(geometry, (N, N), PX, kernel)
    true = 16 * op._a_vals.numel()
    assert matrix_bytes(geometry, (N, N), PX, kernel) == pytest.approx(true, rel=0.15)


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
    for path in tmp_path.glob("ray-*.npz"):
        path.unlink()

    for damage in (lambda b: b[: len(b) // 2], lambda b: b"", _flip_middle):
        RayTransform(parallel(5), (N, N), PX)
        for path in tmp_path.glob("ray-*.npz"):
            path.write_bytes(damage(path.read_bytes()))
        before = len(built)
        with caplog.at_level(logging.WARNING):
            again = RayTransform(parallel(5), (N, N), PX)
        assert len(built) == before + 1
        assert "rebuilding" in caplog.text
        assert torch.equal(first(disc()), again(disc()))


def _flip_middle(b: bytes) -> bytes:
    assert b
    return b[: len(b) // 2] + bytes([b[len(b) // 2] ^ 255]) + b[len(b) // 2 + 1 :]


def test_cache_drops_what_was_unused_for_longest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import inverse.operators.ct as ct

    monkeypatch.setenv("RECON_CACHE_DIR", str(tmp_path))
    RayTransform(parallel(5), (N, N), PX)
    (first,) = tmp_path.glob("ray-*.npz")
    RayTransform(parallel(6), (N, N), PX)
    (second,) = set(tmp_path.glob("ray-*.npz")) - {first}
    for path, age in ((first, 200), (second, 100)):
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
    RayTransform(parallel(5), (N, N), PX)  # used again
    monkeypatch.setattr(ct, "_CACHE_BYTES", 2.5 * first.stat().st_size)
    RayTransform(parallel(5), (N, N), PX, "line")
    kept = set(tmp_path.glob("ray-*.npz"))
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
