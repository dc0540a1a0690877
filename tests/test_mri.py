"""Fourier operators: a Gaussian's transform, masks, closed-form solves."""

from __future__ import annotations

import math
from typing import get_args

import laws
import numpy as np
import pytest
import torch

from inverse.errors import GeometryError, UnsupportedError
from inverse.operators.mask import Mask
from inverse.operators.mri import (
    CartesianMRI,
    Fourier,
    MaskKind,
    Sense,
    calibration_centre,
    cartesian_mask,
    centred_fft,
    centred_ifft,
)

KINDS = get_args(MaskKind)


@pytest.mark.parametrize("shape", [(16, 16), (15, 12), (9, 7)])
def test_laws(shape: tuple[int, int]) -> None:
    laws.check_all(Fourier(shape))
    laws.check_all(CartesianMRI(cartesian_mask(shape, 2.0, 0.2, "gaussian2d")))
    laws.check_all(Mask(cartesian_mask(shape, 2.0, 0.2, "random1d"), torch.complex64))


@pytest.mark.parametrize("shape", [(64, 48), (63, 49)])
def test_transform_of_a_shifted_gaussian(shape: tuple[int, int]) -> None:
    # sum_j exp(-(j - c - d)^2 / 2 s^2) e^{-2 pi i (j - c) k / n}
    #     = s sqrt(2 pi) e^{-2 (pi s k / n)^2} e^{-2 pi i d k / n}, up to tails
    s, shift = 2.5, (3, -2)
    axes = [np.arange(n) - n // 2 for n in shape]
    x = [np.exp(-((a - d) ** 2) / (2 * s**2)) for a, d in zip(axes, shift, strict=True)]
    f = [
        s
        * math.sqrt(2 * math.pi / n)
        * np.exp(-2 * (math.pi * s * a / n) ** 2 - 2j * math.pi * d * a / n)
        for a, d, n in zip(axes, shift, shape, strict=True)
    ]
    image = torch.from_numpy(np.outer(*x)).to(torch.complex64)
    expected = torch.from_numpy(np.outer(*f)).to(torch.complex64)
    torch.testing.assert_close(Fourier(shape)(image), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(centred_ifft(Fourier(shape)(image)), image, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_masks(kind) -> None:
    shape = (128, 100)
    acceleration = 1.6 if kind == "partial1d" else 4.0
    mask = cartesian_mask(shape, acceleration, 0.08, kind, seed=3)
    assert mask.shape == shape
    assert mask.dtype == torch.bool
    lines = 1 if kind.endswith("1d") else shape[0]
    assert int(mask[:lines].sum()) == round(lines * shape[1] / acceleration)
    h, w = (round(0.08 * n) for n in shape)
    middle = mask[64 - h // 2 : 64 - h // 2 + h, 50 - w // 2 : 50 - w // 2 + w]
    assert bool(middle.all())
    assert bool(mask[64, 50])
    if kind.endswith("1d"):
        assert bool((mask == mask[0]).all())
    if kind == "uniform1d":
        gaps = np.diff(np.flatnonzero(mask[0, 54:].numpy()))
        assert gaps.max() - gaps.min() <= 1
    assert torch.equal(mask, cartesian_mask(shape, acceleration, 0.08, kind, seed=3))
    other = cartesian_mask(shape, acceleration, 0.08, kind, seed=4)
    assert torch.equal(mask, other) == (kind == "partial1d")  # which has nothing to draw
    assert bool(cartesian_mask(shape, 1.0, 0.08, kind).all())


def test_gaussian_masks_are_denser_at_the_centre() -> None:
    total = sum(cartesian_mask((64, 64), 4.0, 0.04, "gaussian2d", s).float() for s in range(20))
    assert float(total[20:44, 20:44].mean()) > 3 * float(total[:12].mean())


def test_partial_fourier_measures_one_half_and_the_centre() -> None:
    mask = cartesian_mask((8, 64), 1.6, 0.1, "partial1d")[0]
    # 40 columns end to end, up to the highest frequency
    assert np.flatnonzero(mask).tolist() == list(range(24, 64))
    with pytest.raises(GeometryError, match="at least one half"):
        cartesian_mask((8, 64), 2.0, 0.1, "partial1d")


def test_poisson_discs_keep_their_distance() -> None:
    mask = cartesian_mask((96, 80), 8.0, 0.06, "poisson", seed=1).numpy()
    row, col = (a.ravel() for a in np.nonzero(mask))
    k = np.hypot((row - 48) / 48, (col - 40) / 40)
    outside = np.flatnonzero((np.abs(row - 48) > 4) | (np.abs(col - 40) > 4))
    distance = np.hypot(row[:, None] - row, col[:, None] - col)
    np.fill_diagonal(distance, np.inf)
    nearest = distance[outside].min(1)
    # as far apart as their growing discs say, and never neighbours at the edge
    far, near = k[outside] > 0.8, k[outside] < 0.4
    assert nearest[far].min() > 1.9
    assert nearest[far].mean() > 1.4 * nearest[near].mean()
    # a uniform draw of as many points has neighbours everywhere
    drawn = cartesian_mask((96, 80), 8.0, 0.06, "random2d", seed=1).numpy()
    pairs = drawn[:-1, :12] & drawn[1:, :12]
    assert pairs.sum() > 3
    assert not (mask[:-1, :12] & mask[1:, :12]).any()


def test_fully_sampled_centre_is_found() -> None:
    lines = torch.zeros(100, dtype=torch.bool)
    lines[46:54], lines[::7] = True, True
    assert calibration_centre(lines.expand(128, 100)) == (128, 8)
    mask = torch.zeros(32, 31, dtype=torch.bool)
    mask[11:21, 12:20] = True  # 10 x 8 about (16, 15): rows 11 to 20, columns 12 to 19
    mask[0, 0] = True
    assert calibration_centre(mask) == (10, 7)
    assert calibration_centre(~mask) == (0, 0)
    assert calibration_centre(torch.ones(4, 5, 6, dtype=torch.bool)) == (4, 5, 6)


# --- several coils -----------------------------------------------------------------------------


def sense(shape: tuple[int, ...], coils: int = 3, slices: int | None = None) -> Sense:
    lead = (coils,) if slices is None else (slices, coils)
    maps = laws.random((*lead, *shape), torch.complex64, 8)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
    return Sense(maps, mask)


@pytest.mark.parametrize("shape", [(16, 16), (18, 14), (15, 12), (9, 7), (4, 6, 5)])
def test_sense_is_the_masked_transform_of_the_coil_images(shape: tuple[int, ...]) -> None:
    op = sense(shape)
    laws.check_all(op)
    x = laws.random((2, *shape), torch.complex64, 0)
    expected = torch.where(op.mask, centred_fft(op.maps * x[:, None], len(shape)), 0)
    torch.testing.assert_close(op(x), expected, rtol=1e-4, atol=1e-5)
    assert op.measured == 3 * int(op.mask.sum())
    one = Sense(torch.ones(1, *shape, dtype=torch.complex64), op.mask)
    torch.testing.assert_close(one(x)[:, 0], CartesianMRI(op.mask)(x), rtol=1e-4, atol=1e-5)


def test_maps_of_each_slice() -> None:
    op = sense((8, 10), slices=3)
    x = laws.random((3, 8, 10), torch.complex64, 0)
    y = op(x)
    assert y.shape == (3, 3, 8, 10)
    for k in range(3):
        torch.testing.assert_close(y[k], Sense(op.maps[k], op.mask)(x[k]))
    twice = laws.random((2, 3, 8, 10), torch.complex64, 0)
    torch.testing.assert_close(op(twice)[1], op(twice[1]))
    torch.testing.assert_close(op.adjoint(op(twice))[1], op.adjoint(op(twice[1])))
    torch.testing.assert_close(op(x[0])[2], Sense(op.maps[2], op.mask)(x[0]))
    index = torch.tensor([2, 2, 0])
    taken = op.take(index)
    torch.testing.assert_close(taken(x[index]), y[index])
    # through the algebra, as whitening and embedding make it
    chain = (2.0 * op) @ Mask(torch.ones(8, 10, dtype=torch.bool), torch.complex64)
    torch.testing.assert_close(chain.take(index)(x[index]), 2 * y[index])
    data = laws.random((3, 3, 8, 10), torch.complex64, 1)
    assert laws.inner(op(x), data) == pytest.approx(laws.inner(x, op.adjoint(data)), rel=1e-5)


def test_sense_solves_its_normal_equations() -> None:
    op = sense((12, 10), coils=4)
    b = laws.random((2, 12, 10), torch.complex64, 1)
    rho = torch.tensor([0.1, 2.0])
    solved = op.normal_solve(b, rho, tol=1e-6, max_iter=200)
    assert bool(solved.converged.all())
    residual = op.normal(solved.x) + rho[:, None, None] * solved.x - b
    assert laws.norm(residual) < 1e-5 * laws.norm(b)


def test_two_phase_directions_are_slicewise_where_the_readout_is_full() -> None:
    # a mask that repeats along x decouples into one problem a column of the volume
    mask = cartesian_mask((12, 10), 2.0, 0.2, "poisson")
    volume = CartesianMRI(mask[..., None].expand(12, 10, 8))
    laws.check_all(volume)
    x = laws.random((12, 10, 8), torch.complex64, 0)
    b = volume.adjoint(volume(x))
    planar = CartesianMRI(mask)
    each = torch.stack([planar.adjoint(planar(x[..., k])) for k in range(8)], dim=-1)
    torch.testing.assert_close(b, each, rtol=1e-4, atol=1e-5)
    solved = volume.normal_solve(b, 0.5)
    torch.testing.assert_close(volume.normal(solved.x) + 0.5 * solved.x, b, rtol=1e-4, atol=1e-5)


def test_sense_refusals() -> None:
    mask = torch.ones(8, 8, dtype=torch.bool)
    with pytest.raises(GeometryError, match="coil maps must be"):
        Sense(torch.ones(2, 8, 9, dtype=torch.complex64), mask)
    with pytest.raises(GeometryError, match="finite"):
        Sense(torch.full((2, 8, 8), math.nan, dtype=torch.complex64), mask)
    with pytest.raises(GeometryError, match="at least one sample"):
        Sense(torch.ones(2, 8, 8, dtype=torch.complex64), ~mask)


def test_refusals() -> None:
    with pytest.raises(GeometryError, match="acceleration"):
        cartesian_mask((8, 8), 0.5)
    with pytest.raises(GeometryError, match="centre"):
        cartesian_mask((64, 64), 8.0, 0.5)
    with pytest.raises(GeometryError, match="centre_fraction"):
        cartesian_mask((64, 64), 8.0, -0.5)
    with pytest.raises(UnsupportedError, match="radial"):
        cartesian_mask((64, 64), 4.0, kind="radial")  # type: ignore[arg-type]
    with pytest.raises(GeometryError, match="at least one sample"):
        CartesianMRI(torch.zeros(4, 4, dtype=torch.bool))
    with pytest.raises(GeometryError, match="at least one pixel"):
        Mask(torch.zeros(4, 4, dtype=torch.bool))


def test_unmeasured_samples_do_not_reach_the_image() -> None:
    op = CartesianMRI(cartesian_mask((16, 16), 2.0))
    y = laws.random((16, 16), torch.complex64, 0)
    cleaned = torch.where(op.mask, y, 0)
    torch.testing.assert_close(op.adjoint(y), op.adjoint(cleaned))
    assert op.acceleration == pytest.approx(2.0)
    assert op.measured == 128
