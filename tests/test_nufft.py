"""Non-Cartesian MRI: the exact Fourier sum, a Gaussian, density compensation, Toeplitz form."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import laws
import numpy as np
import pytest
import torch

from inverse.errors import GeometryError, UnsupportedError
from inverse.io.measurement_file import read_measurement, write_measurement
from inverse.measurement import Measurement
from inverse.operators.nufft import NonCartesian, density_compensation, radial, spiral

installed = pytest.mark.skipif(
    importlib.util.find_spec("torchkbnufft") is None, reason="the extra 'nufft' is not installed"
)
SHAPES = [(16, 16), (15, 12)]


def operator(shape: tuple[int, int], coils: int = 3) -> NonCartesian:
    path = radial(7, 20)
    density = 0.5 + torch.rand(len(path), generator=torch.Generator().manual_seed(0))
    return NonCartesian(path, shape, laws.random((coils, *shape), torch.complex64, 8), density)


@installed
@pytest.mark.parametrize("shape", SHAPES)
def test_laws(shape: tuple[int, int]) -> None:
    laws.check_all(operator(shape))


@installed
@pytest.mark.parametrize("shape", SHAPES)
def test_samples_are_the_fourier_sum(shape: tuple[int, int]) -> None:
    op = operator(shape)
    x = laws.random((2, *shape), torch.complex64, 0)
    row, col = (torch.arange(n, dtype=torch.float64) - n // 2 for n in shape)
    k = op.trajectory.double()
    turns = k[:, 0, None, None] * row[:, None] + k[:, 1, None, None] * col
    wave = torch.exp(-2j * math.pi * turns)
    expected = torch.einsum("khw,zchw->zck", wave, (op.maps * x[:, None]).to(torch.complex128))
    expected = expected * (op.density.double() / math.prod(shape)).sqrt()
    assert laws.norm(op(x) - expected) < 2e-4 * laws.norm(expected)


@installed
def test_transform_of_a_gaussian() -> None:
    # sum_j exp(-|j - c - d|^2 / 2 s^2) e^{-2 pi i k (j - c)}
    #     = 2 pi s^2 e^{-2 (pi s |k|)^2} e^{-2 pi i k d}, up to tails and aliases
    n, s, shift = 48, 2.5, np.array([3.0, -2.0])
    axis = np.arange(n) - n // 2
    image = np.exp(
        -((axis[:, None] - shift[0]) ** 2 + (axis - shift[1]) ** 2) / (2 * s**2)
    ).astype(np.complex64)
    path = spiral(3, 200, 4.0)
    op = NonCartesian(path, (n, n), density=torch.ones(len(path)))
    k = path.double().numpy()
    expected = 2 * math.pi * s**2 * np.exp(-2 * (math.pi * s) ** 2 * (k**2).sum(1))
    expected = expected * np.exp(-2j * math.pi * (k @ shift)) / n
    got = op(torch.from_numpy(image))[0].numpy()
    assert np.abs(got - expected).max() < 2e-4 * np.abs(expected).max()


@installed
@pytest.mark.parametrize("shape", SHAPES)
def test_toeplitz_form_is_the_normal_operator(shape: tuple[int, int]) -> None:
    op = operator(shape)
    laws.check_adjoint(op.normal)
    x = laws.random((2, *shape), torch.complex64, 0)
    expected = op.adjoint(op(x))
    assert laws.norm(op.normal(x) - expected) < 1e-4 * laws.norm(expected)
    solved = op.normal_solve(x, 0.3, max_iter=200)
    residual = op.adjoint(op(solved.x)) + 0.3 * solved.x - x
    assert laws.norm(residual) < 1e-3 * laws.norm(x)


@installed
def test_density_of_a_grid_is_one_and_of_spokes_their_sectors() -> None:
    n = 24
    axis = (torch.arange(n) - n // 2) / n
    grid = density_compensation(torch.cartesian_prod(axis, axis), (n, n))
    torch.testing.assert_close(grid, torch.ones(n * n), rtol=0.02, atol=0)
    # uniform spokes at the Nyquist rate: d = pi |k| dk / spokes in pixels of area 1 / n^2
    spokes, readout = 48, 48
    path = radial(spokes, readout, golden=False)
    density = density_compensation(path, (n, n))
    k = path.norm(dim=1)
    middle = (k > 0.15) & (k < 0.4)
    expected = math.pi * k / spokes / readout * n**2
    torch.testing.assert_close(density[middle], expected[middle], rtol=0.1, atol=0)


@installed
@pytest.mark.parametrize("path", [radial(64, 80), spiral(10, 600, 3.0)], ids=["radial", "spiral"])
def test_gridding_of_full_sampling_is_the_image(path: torch.Tensor) -> None:
    n = 40
    axis = torch.arange(n) - n / 2
    image = torch.exp(-((axis[:, None] - 3) ** 2 + axis**2) / 30).to(torch.complex64)
    op = NonCartesian(path, (n, n))
    gridded = op.adjoint(op(image))
    assert laws.norm(gridded - image) < 0.05 * laws.norm(image)


@installed
def test_noise_weights_become_density() -> None:
    op = operator((12, 12))
    x = laws.random((2, 12, 12), torch.complex64, 0)
    weight = 0.5 + torch.rand(len(op.density))
    white = op.weighted(weight)
    assert isinstance(white, NonCartesian)
    torch.testing.assert_close(white(x), weight * op(x), rtol=1e-4, atol=1e-5)
    coilwise = torch.rand(3, 1) + 0.5
    torch.testing.assert_close(op.weighted(coilwise)(x), coilwise * op(x))


@installed
def test_maps_of_each_slice() -> None:
    path = radial(5, 16)
    maps = laws.random((2, 3, 12, 12), torch.complex64, 1)
    op = NonCartesian(path, (12, 12), maps, torch.ones(len(path)))
    x = laws.random((2, 12, 12), torch.complex64, 0)
    y = op(x)
    assert y.shape == (2, 3, 80)
    taken = op.take(torch.tensor([1]))
    torch.testing.assert_close(taken(x[1:]), y[1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(taken.normal(x[1:]), op.normal(x)[1:], rtol=1e-4, atol=1e-5)


@installed
def test_measurement_file_round_trip(tmp_path: Path) -> None:
    op = operator((12, 10))
    data = laws.random((2, *op.out_shape), torch.complex64, 3)
    m = Measurement(op, data, op.density.sqrt(), "MR", (1.0, 1.0))
    write_measurement(tmp_path / "m.h5", m)
    got = read_measurement(tmp_path / "m.h5").measurement
    assert torch.equal(got.noise, m.noise)
    x = laws.random((2, 12, 10), torch.complex64, 4)
    assert torch.equal(got.operator(x), op(x))


def test_trajectories() -> None:
    path = radial(4, 8, golden=False).reshape(4, 8, 2)
    assert torch.equal(path[:, 4], torch.zeros(4, 2))
    torch.testing.assert_close(
        path[0], torch.stack([torch.zeros(8), (torch.arange(8) - 4) / 8], 1)
    )
    angle = torch.atan2(path[:, 7, 0], path[:, 7, 1])
    torch.testing.assert_close(angle, torch.arange(4) * math.pi / 4)
    golden = radial(2, 8).reshape(2, 8, 2)[1, 7]
    degrees = math.degrees(math.atan2(float(golden[0]), float(golden[1])))
    assert degrees == pytest.approx(111.246, abs=1e-2)
    arms = spiral(3, 500, 2.0).reshape(3, 500, 2)
    radius = arms.norm(dim=2)
    assert float(radius.max()) < 0.5
    assert float(radius[0, -1]) > 0.499
    steps = arms[0].diff(dim=0).norm(dim=1)[100:]
    assert float(steps.max() / steps.min()) < 1.2
    for call in (lambda: radial(0, 8), lambda: spiral(1, 100, 0.0)):
        with pytest.raises(GeometryError):
            call()


@installed
def test_refusals() -> None:
    path = radial(2, 8)
    with pytest.raises(GeometryError, match="half a cycle"):
        NonCartesian(2 * math.pi * path, (8, 8))
    with pytest.raises(GeometryError, match="samples, 2"):
        NonCartesian(path[:, 0], (8, 8))
    with pytest.raises(GeometryError, match="coil maps"):
        NonCartesian(path, (8, 8), torch.ones(1, 8, 9, dtype=torch.complex64))
    with pytest.raises(GeometryError, match="density"):
        NonCartesian(path, (8, 8), density=torch.zeros(16))


def test_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchkbnufft", None)
    with pytest.raises(UnsupportedError, match=r"recon-sde\[nufft\]"):
        NonCartesian(radial(2, 8), (8, 8))
