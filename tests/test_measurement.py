"""Measurements: affine change of units, whitening, chi-square, refusals."""

from __future__ import annotations

import math

import laws
import numpy as np
import pytest
import torch

from inverse.errors import GeometryError, InputError
from inverse.measurement import Measurement
from inverse.operators.ct import ParallelBeam, RayTransform
from inverse.operators.linop import Identity
from inverse.operators.mri import CartesianMRI, cartesian_mask

SHAPE = (12, 12)


def ct(noise: torch.Tensor) -> tuple[Measurement, torch.Tensor]:
    op = RayTransform(ParallelBeam.sparse(7, SHAPE, 2.0), SHAPE, 2.0)
    x = 0.02 * laws.random((3, *SHAPE), torch.float32, 0).abs()
    y = op(x) + noise * laws.random((3, *op.out_shape), torch.float32, 1)
    return Measurement(op, y, noise, "CT", (2.0, 2.0), 0.0206), x


@pytest.mark.parametrize("per_slice", [False, True])
def test_change_of_units_keeps_the_residual(per_slice: bool) -> None:
    noise = torch.rand(3, 7, 18) + 0.5 if per_slice else torch.tensor(0.3)
    m, x = ct(noise)
    offset, scale = 0.0206, -0.01
    inner = m.rescaled(offset, scale)
    torch.testing.assert_close(inner.chi2((x - offset) / scale), m.chi2(x), rtol=1e-4, atol=0)
    white = m.whitened()
    torch.testing.assert_close(white.chi2(x), m.chi2(x), rtol=1e-4, atol=0)
    # whitening a slice taken alone gives an operator on single images
    laws.check_adjoint(m.take(torch.tensor([0])).rescaled(0.0, scale).operator)


def test_chi2_of_the_truth_is_one() -> None:
    noise = torch.tensor(0.5)
    m, x = ct(noise)
    # std of a mean of m squares: sqrt(2 / m)
    assert bool(((m.chi2(x) - 1).abs() < 5 * (2 / (7 * 18)) ** 0.5).all())


def test_chi2_counts_measured_samples_only() -> None:
    op = CartesianMRI(cartesian_mask((64, 64), 4.0))
    x = laws.random((2, 64, 64), torch.complex64, 0)
    n = torch.complex(*(laws.random((2, 64, 64), torch.float32, s) for s in (1, 2)))
    m = Measurement(op, op(x) + op.mask * n, torch.tensor(1.0), "MR", (1.0, 1.0))
    assert m.chi2(x).numpy() == pytest.approx(1.0, abs=0.15)


def test_take_repeats_slices_and_their_noise() -> None:
    noise = torch.arange(1.0, 4.0).reshape(3, 1, 1).expand(3, 7, 18)
    m, _ = ct(noise)
    taken = m.take(torch.tensor([2, 0, 2]))
    assert torch.equal(taken.data, m.data[[2, 0, 2]])
    assert taken.noise[:, 0, 0].tolist() == [3.0, 1.0, 3.0]
    shared, _ = ct(torch.tensor(0.3))
    assert shared.take(torch.tensor([1])).noise.ndim == 0


def test_refusals() -> None:
    op = Identity((2, 2))
    y, one = torch.zeros(3, 2, 2), torch.tensor(1.0)
    with pytest.raises(GeometryError, match="slices"):
        Measurement(op, y[0], one, "MR", (1.0, 1.0))
    with pytest.raises(InputError, match="NaN"):
        Measurement(op, y / 0, one, "MR", (1.0, 1.0))
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="noise"):
            Measurement(op, y, torch.tensor(bad), "MR", (1.0, 1.0))
    for mu in (None, 0.0, -1.0, math.nan, "0.02"):
        with pytest.raises(InputError, match="mu_water"):
            Measurement(op, y, one, "CT", (1.0, 1.0), mu)
    for modality in ("ct", "MRI", "banana", None):
        with pytest.raises(InputError, match="modality must be 'CT' or 'MR', got"):
            Measurement(op, y, one, modality, (1.0, 1.0), 0.02)
    for pixel in (1.0, (-1.0, 1.0), (1.0, math.nan), (1.0,), (1.0, 1.0, 1.0), "ab", None):
        with pytest.raises(GeometryError, match="pixel_mm must be two positive numbers"):
            Measurement(op, y, one, "MR", pixel)
    for shape in ((3,), (3, 2), (2, 2, 2), (1, 3, 2, 2)):
        with pytest.raises(InputError, match=r"one value a slice has shape \(3, 1, 1\)"):
            Measurement(op, y, torch.ones(shape), "MR", (1.0, 1.0))
    for data in (y.to(torch.int64), y.to(torch.complex64)):
        with pytest.raises(InputError, match="must be real floating-point numbers"):
            Measurement(op, data, one, "MR", (1.0, 1.0))
    with pytest.raises(InputError, match="must be complex"):
        Measurement(Identity((2, 2), torch.complex64), y, one, "MR", (1.0, 1.0))
    with pytest.raises(InputError, match="needs a LinearOperator"):
        Measurement(lambda x: x, y, one, "MR", (1.0, 1.0))


def test_numbers_and_arrays_are_taken() -> None:
    data = np.ones((3, 2, 2))
    m = Measurement(Identity((2, 2)), data, 0.5, "CT", [1, np.float64(2)], np.float32(0.02))
    assert m.data.dtype == m.noise.dtype == torch.float32
    assert m.pixel_mm == (1, 2)
    assert m.chi2(torch.zeros(3, 2, 2)).tolist() == [4.0] * 3
    column = Measurement(Identity((2, 2)), data, np.array([1.0, 2.0]), "MR", (1, 1))
    assert column.chi2(torch.zeros(3, 2, 2)).tolist() == [0.625] * 3
    each = Measurement(Identity((2, 2)), data, torch.ones(3, 1, 1), "MR", (1, 1))
    assert each.take(torch.tensor([2, 0])).noise.shape == (2, 1, 1)


def test_a_measurement_shows_shapes_not_values() -> None:
    m, _ = ct(torch.tensor(0.3))
    assert "Measurement(CT, data (3, 7, 18) torch.float32, noise 0.3" in repr(m)
    assert len(repr(m)) < 300
