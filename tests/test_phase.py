"""The phase of MR images: known maps, from centre lines and from all samples."""

from __future__ import annotations

import laws
import pytest
import torch
from torch import Tensor

from inverse.operators.linop import LinearOperator
from inverse.operators.mri import CartesianMRI, Sense, cartesian_mask, centred_ifft
from inverse.operators.phase import _Cosines, estimated_phase, low_resolution_phase
from phantoms.coils import CoilArray
from phantoms.shapes import shepp_logan
from phantoms.simulate import smooth_phase

N = 64


def test_low_resolution_phase_of_an_undersampled_image() -> None:
    row = (torch.arange(N) - N / 2)[:, None] / N
    turn = 1.2 * torch.cos(2 * row) * torch.cos(1.5 * row.T + 0.3)
    magnitude = torch.from_numpy(shepp_logan(220.0).image((N, N), 220.0 / N))
    image = torch.polar(magnitude, turn)[None]
    op = CartesianMRI(cartesian_mask((N, N), 3.0, 0.15, "gaussian2d"))
    phasor = estimated_phase(op, op(image)).weight
    torch.testing.assert_close(phasor.abs(), torch.ones(1, N, N))
    inside = magnitude > 0.15
    error = torch.angle(phasor[0] * torch.polar(torch.ones(N, N), -turn))[inside]
    assert float(error.abs().quantile(0.95)) < 0.1
    zero = low_resolution_phase(torch.zeros(1, 8, 8, dtype=torch.complex64))
    assert torch.equal(zero, torch.ones_like(zero))


def test_low_resolution_phase_ignores_samples_beyond_the_centre() -> None:
    mask = cartesian_mask((N, N), 3.0, 0.2, "gaussian2d")
    k = laws.random((1, N, N), torch.complex64, 0)
    other = k.clone()
    low, high = N // 2 - 4, N // 2 + 4
    other[:, :low] *= 3.0
    other[:, :, high:] = 0.0
    a, b = (low_resolution_phase(centred_ifft(v), mask) for v in (k, other))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def head(seed: int, size: int = 128, amplitude: float = 1.0) -> tuple[Tensor, Tensor]:
    """A head with a smooth phase, and its magnitude."""
    magnitude = torch.from_numpy(shepp_logan(220.0).image((size, size), 220.0 / size))
    turn = smooth_phase((size, size), amplitude, torch.Generator().manual_seed(seed))
    return torch.polar(magnitude, turn), magnitude


def wrong(phasor: Tensor, image: Tensor) -> float:
    """Root-mean-square angle between a map and the image's phase where there is signal."""
    seen = image.abs() > 0.05
    return float(torch.angle(phasor * image.conj())[seen].square().mean().sqrt())


@pytest.mark.parametrize("coils", [1, 6])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_all_samples_tell_more_than_the_centre(coils: int, seed: int) -> None:
    image, _ = head(seed)
    mask = cartesian_mask((128, 128), 6.0, 0.06, "gaussian1d", seed)
    operator: LinearOperator = CartesianMRI(mask)
    if coils > 1:
        maps = torch.from_numpy(CoilArray(coils, 190.0).maps((128, 128), (1.72, 1.72)))
        operator = Sense(maps, mask)
    data = operator(image[None])
    data = data + 0.005 * laws.random(tuple(data.shape), torch.complex64, seed) * (data != 0)
    first = low_resolution_phase(operator.adjoint(data), mask)[0]
    found = estimated_phase(operator, data).weight[0]
    torch.testing.assert_close(found.abs(), torch.ones(128, 128))
    assert wrong(found, image) < (0.55 if coils == 1 else 0.4) * wrong(first, image)


def test_a_slice_has_its_bits_whatever_is_beside_it() -> None:
    images = torch.stack([head(seed)[0] for seed in range(3)])
    operator = CartesianMRI(cartesian_mask((128, 128), 4.0, 0.08, "gaussian1d"))
    data = operator(images)
    together = estimated_phase(operator, data).weight
    assert torch.equal(together[1:2], estimated_phase(operator, data[1:2]).weight)


def test_what_there_is_not_has_no_phase() -> None:
    operator = CartesianMRI(cartesian_mask((32, 32), 2.0, 0.2, "gaussian1d"))
    flat = estimated_phase(operator, torch.zeros(1, 32, 32, dtype=torch.complex64)).weight
    assert torch.equal(flat, torch.ones_like(flat))


def test_the_unit_of_the_data_does_not_matter() -> None:
    image, _ = head(3)
    operator = CartesianMRI(cartesian_mask((128, 128), 4.0, 0.08, "gaussian1d"))
    data = operator(image[None])
    a, b = (estimated_phase(operator, scale * data).weight for scale in (1.0, 1e6))
    torch.testing.assert_close(a, b, rtol=0, atol=0.01)


def test_cosines_have_an_adjoint_and_unit_mean_square() -> None:
    cosines = _Cosines((6, 20, 24), torch.device("cpu"))
    assert cosines.sides == (6, 16, 16)
    c, image = (
        laws.random(cosines.sides, torch.float32, 0),
        laws.random((1, 6, 20, 24), torch.float32, 1),
    )
    left, right = (cosines(c) * image[0]).sum(), (c * cosines.adjoint(image)).sum()
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cosines(c).square().mean(), c.square().sum(), rtol=1e-4, atol=1e-4)
