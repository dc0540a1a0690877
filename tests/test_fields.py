"""Gaussian fields: their covariance and spectrum are those that were asked for."""

from __future__ import annotations

import numpy as np
import pytest

from inverse.errors import GeometryError, InputError
from phantoms.fields import GaussianField, matern, power_law


def test_periodic_field_has_its_spectrum():
    field = GaussianField.periodic((24, 20), (0.5, 0.8), lambda k: np.exp(-((k / 0.4) ** 2)))
    x = field.sample(1, 2000)
    power = (np.abs(np.fft.fft2(x)) ** 2).mean(axis=0) * 0.4 / (24 * 20)
    ky, kx = np.fft.fftfreq(24, 0.5), np.fft.fftfreq(20, 0.8)
    density = np.exp(-((np.hypot(ky[:, None], kx) / 0.4) ** 2))
    ratio = power / density
    # A periodogram is exponential (chi-square of one at real frequencies): std of the mean 2.2 %
    # to 3.2 %.
    assert abs(ratio.mean() - 1) < 0.006
    assert np.abs(ratio - 1).max() < 0.16


def test_spectrum_integrates_to_the_variance():
    field = GaussianField.periodic((32, 32), (1.0, 1.0), power_law(3.0, 50.0), variance=9.0)
    np.testing.assert_allclose(field.covariance[0, 0], 9.0, rtol=1e-12)
    x = field.sample(0, 400)
    np.testing.assert_allclose((x**2).mean(), 9.0, rtol=0.15)
    assert abs(x.mean()) < 0.3


@pytest.mark.parametrize("smoothness", [0.5, 1.5, np.inf])
def test_embedded_field_has_its_covariance(smoothness):
    covariance = matern(2.0, 3.0, smoothness)
    field = GaussianField.embedded((16, 12), (1.0, 0.5), covariance)
    r = np.hypot(np.arange(16)[:, None], 0.5 * np.arange(12))
    np.testing.assert_allclose(field.covariance, covariance(r), rtol=1e-6, atol=1e-6)
    x = field.sample(3, 1500).reshape(1500, -1)
    y, z = np.divmod(np.arange(16 * 12), 12)
    distance = np.hypot(y[:, None] - y, 0.5 * (z[:, None] - z))
    sample = x.T @ x / 1500
    # Standard error of a covariance: sqrt((c(0)^2 + c^2)/n) <= 4 sqrt(2/n) = 0.146.
    assert np.abs(sample - covariance(distance)).max() < 5.5 * 0.146


def test_matern_by_name():
    r = np.array([0.0, 1.0, 4.0])
    np.testing.assert_allclose(matern(2, 3, 0.5)(r), 4 * np.exp(-r / 3), rtol=1e-12)
    exact = (1 + np.sqrt(3) * r / 3) * np.exp(-np.sqrt(3) * r / 3)
    np.testing.assert_allclose(matern(1, 3, 1.5)(r), exact, rtol=1e-12)


def test_draws_depend_on_seed_and_number_alone():
    field = GaussianField.periodic((8, 8, 8), (1, 1, 1), power_law(2.0, 10.0))
    np.testing.assert_array_equal(field.sample(7, 5)[:2], field.sample(7, 2))
    assert np.abs(field.sample(7, 1) - field.sample(8, 1)).max() > 0.01


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: GaussianField.periodic((8,), (1, 1), power_law(1, 1)), GeometryError),
        (lambda: GaussianField.periodic((8, 8), (1, 0), power_law(1, 1)), GeometryError),
        (lambda: GaussianField.periodic((8, 8), (1, 1), lambda k: 1 / k), InputError),
        (lambda: GaussianField.embedded((8, 8), (1, 1), lambda r: np.cos(r)), InputError),
        (lambda: matern(0, 1), InputError),
        (lambda: power_law(1, 0), InputError),
    ],
)
def test_impossible_fields(make, error):
    with pytest.raises(error):
        make()
