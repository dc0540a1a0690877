"""Simulated MRI: coils and trajectories that the reconstructing operator does not know."""

from __future__ import annotations

import importlib.util

import laws
import numpy as np
import pytest
import torch

from inverse.operators.coils import combine_coils
from inverse.operators.mri import Sense, centred_ifft
from inverse.operators.noise import generator
from inverse.operators.nufft import NonCartesian
from phantoms import simulate
from phantoms.shapes import shepp_logan
from phantoms.simulate import simulate_mri, smooth_phase

N, PX = 64, 220.0 / 64
IMAGE = np.stack([shepp_logan(220.0).image((N, N), PX)] * 2) * np.float32(3.0)
WIDE = {"acceleration": 4.0, "kind": "poisson", "centre_fraction": 0.25}

installed = pytest.mark.skipif(
    importlib.util.find_spec("torchkbnufft") is None, reason="the extra 'nufft' is not installed"
)


def test_coil_data_fit_the_truth_but_are_not_the_operators_own() -> None:
    s = simulate_mri(IMAGE, (PX, PX), coils=6, noise=0.02, seed=1, **WIDE)
    m = s.measurement
    assert isinstance(m.operator, Sense)
    assert m.operator.maps.shape == (2, 6, N, N)
    assert m.operator.acceleration == pytest.approx(4.0, rel=1e-3)
    assert m.chi2(s.truth).numpy() == pytest.approx(1.0, abs=0.1)
    torch.testing.assert_close(s.truth.abs(), torch.from_numpy(IMAGE), rtol=1e-5, atol=1e-6)
    exact = simulate_mri(IMAGE, (PX, PX), coils=6, noise=1e-4, **WIDE)
    assert float(exact.measurement.chi2(exact.truth).min()) > 10
    assert "twice the grid" in m.provenance["simulation"]
    assert m.provenance["coils"] == 6


@pytest.mark.parametrize("shape", [(12, 10), (9, 11)])
def test_twice_the_grid_holds_the_pixels_of_the_grid(shape: tuple[int, int]) -> None:
    image = laws.random((2, *shape), torch.complex64, 0)
    fine = simulate._finer(image)
    assert laws.norm(fine) == pytest.approx(laws.norm(image), rel=1e-5)
    torch.testing.assert_close(2 * simulate._crop(fine), image, rtol=1e-4, atol=1e-5)


def test_coil_images_of_full_sampling_combine_to_the_object() -> None:
    s = simulate_mri(IMAGE, (PX, PX), acceleration=1.0, coils=6, noise=1e-4)
    m = s.measurement
    image = combine_coils(centred_ifft(m.data), m.operator.maps)
    inside = torch.from_numpy(IMAGE) > 0.2
    torch.testing.assert_close(image[inside], s.truth[inside], rtol=0, atol=0.15)
    assert float((image - s.truth).norm() / s.truth.norm()) < 0.02


def test_phase_is_smooth_bounded_and_each_slices_own() -> None:
    phase = smooth_phase((40, 50), 0.9, generator(0, 1))
    assert float(phase.abs().max()) == pytest.approx(0.9)
    assert float(phase.diff(dim=0).abs().max()) < 2 * np.pi * 1.5 / 40
    s = simulate_mri(IMAGE, (PX, PX), phase=0.9, seed=3)
    assert s.measurement.chi2(s.truth).numpy() == pytest.approx(1.0, abs=0.1)
    angle = torch.angle(s.truth)
    seen = torch.from_numpy(IMAGE[0]) > 0
    assert float(angle[:, seen].abs().max()) < 0.91
    assert float((angle[0] - angle[1])[seen].abs().max()) > 0.1
    alone = simulate_mri(IMAGE[:1], (PX, PX), phase=0.9, seed=3, positions=[1])
    torch.testing.assert_close(alone.truth[0], s.truth[1])
    torch.testing.assert_close(alone.measurement.data[0], s.measurement.data[1])


@installed
@pytest.mark.parametrize(("trajectory", "coils"), [("radial", 1), ("radial", 4), ("spiral", 4)])
def test_trajectories(trajectory, coils: int) -> None:
    s = simulate_mri(
        IMAGE, (PX, PX), trajectory=trajectory, coils=coils, acceleration=2.0, noise=0.02, seed=1
    )
    m = s.measurement
    assert isinstance(m.operator, NonCartesian)
    assert m.operator.coils == coils
    assert m.chi2(s.truth).numpy() == pytest.approx(1.0, abs=0.2)
    # data and noise carry the root of the density
    torch.testing.assert_close(
        m.noise / m.noise[0], (m.operator.density / m.operator.density[0]).sqrt()
    )
    other = simulate_mri(
        IMAGE[:1], (PX, PX), trajectory=trajectory, coils=coils, acceleration=4.0, positions=[1]
    )
    spokes = other.measurement.operator.out_shape[1] / m.operator.out_shape[1]
    assert spokes == pytest.approx(0.5, abs=0.02)
