"""The implicit neural representation: fits data to their noise, by seed alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from inverse.classical import inr, zero_filled
from inverse.errors import InputError, NumericalError
from inverse.operators.ct import ParallelBeam
from phantoms.gaussians import Gaussians
from phantoms.motion import simulate_mri_analytic
from phantoms.simulate import simulate_ct_analytic

BLOBS = Gaussians([800.0, 500.0], [[8.0, -5.0], [-15.0, 12.0]], [90 * np.eye(2), 60 * np.eye(2)])
SMALL = {"features": 32, "width": 32, "depth": 2, "bandwidth": 0.1}


@pytest.fixture(scope="module")
def scan():
    pixel = 100 / 24
    beam = ParallelBeam.sparse(24, (24, 24), pixel)
    return simulate_ct_analytic([BLOBS, BLOBS.scaled(0.5)], pixel, beam, matrix=24, photons=1e5)


def test_it_stops_at_the_noise_and_finds_a_smooth_object(scan):
    found = inr(scan.measurement, steps=400, **SMALL)
    assert found.shape == scan.truth.shape
    assert float(scan.measurement.chi2(found).max()) < 1.5
    relative = (found - scan.truth).norm() / scan.truth.norm()
    assert float(relative) < 0.2


def test_a_slice_depends_on_seed_and_place_alone(scan):
    both = inr(scan.measurement, steps=5, seed=3, **SMALL)
    first = inr(scan.measurement.take(torch.tensor([0])), steps=5, seed=3, **SMALL)
    torch.testing.assert_close(both[:1], first)
    other = inr(scan.measurement, steps=5, seed=4, **SMALL)
    assert float((both - other).abs().max()) > 0
    with torch.inference_mode():
        torch.testing.assert_close(inr(scan.measurement, steps=5, seed=3, **SMALL), both)


def test_units_of_the_data_do_not_matter(scan):
    scaled = replace(
        scan.measurement, data=1000 * scan.measurement.data, noise=1000 * scan.measurement.noise
    )
    torch.testing.assert_close(
        inr(scaled, steps=20, **SMALL) / 1000, inr(scan.measurement, steps=20, **SMALL),
        rtol=1e-2, atol=1e-5,
    )  # fmt: skip


def test_complex_images(scan):
    mri = simulate_mri_analytic(
        [BLOBS], (24, 24), 100 / 24, acceleration=2, centre_fraction=0.2, noise=0.01
    )
    found = inr(mri.measurement, steps=300, **SMALL)
    assert found.is_complex()
    error = float((found - mri.truth).abs().norm())
    assert error < 0.7 * float((zero_filled(mri.measurement) - mri.truth).abs().norm())


def test_refusals(scan):
    with pytest.raises(InputError, match="width 0"):
        inr(scan.measurement, width=0)
    with pytest.raises(InputError, match="rate"):
        inr(scan.measurement, rate=float("nan"))
    empty = replace(scan.measurement, data=torch.zeros_like(scan.measurement.data))
    with pytest.raises(NumericalError, match="nothing to fit"):
        inr(empty, steps=1, **SMALL)
