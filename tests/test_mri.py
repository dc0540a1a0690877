"""Fourier operators: a Gaussian's transform, masks, closed-form solves."""

from __future__ import annotations

import math

import laws
import numpy as np
import pytest
import torch

from inverse.errors import GeometryError, UnsupportedError
from inverse.operators.mask import Mask
from inverse.operators.mri import CartesianMRI, Fourier, cartesian_mask, centred_ifft

KINDS = ("uniform1d", "random1d", "gaussian1d", "gaussian2d")


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
    mask = cartesian_mask(shape, 4.0, 0.08, kind, seed=3)
    assert mask.shape == shape
    assert mask.dtype == torch.bool
    assert int(mask.sum()) == shape[0] * shape[1] // 4
    h, w = (round(0.08 * n) for n in shape)
    middle = mask[64 - h // 2 : 64 - h // 2 + h, 50 - w // 2 : 50 - w // 2 + w]
    assert bool(middle.all())
    assert bool(mask[64, 50])
    if kind.endswith("1d"):
        assert bool((mask == mask[0]).all())
    if kind == "uniform1d":
        gaps = np.diff(np.flatnonzero(mask[0, 54:].numpy()))
        assert gaps.max() - gaps.min() <= 1
    assert torch.equal(mask, cartesian_mask(shape, 4.0, 0.08, kind, seed=3))
    assert not torch.equal(mask, cartesian_mask(shape, 4.0, 0.08, kind, seed=4))
    assert bool(cartesian_mask(shape, 1.0, 0.08, kind).all())


def test_gaussian_masks_are_denser_at_the_centre() -> None:
    total = sum(cartesian_mask((64, 64), 4.0, 0.04, "gaussian2d", s).float() for s in range(20))
    assert float(total[20:44, 20:44].mean()) > 3 * float(total[:12].mean())


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
