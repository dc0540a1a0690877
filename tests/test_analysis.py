"""MTF, NPS, detectability and HU accuracy against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.special import erf

from inverse.errors import GeometryError, InputError, NumericalError
from inverse.trust.detectability import hotelling, laguerre_gauss
from phantoms.analysis import (
    disc_mtf,
    edge_mtf,
    hu_accuracy,
    nps,
    npw_detectability,
    wire_mtf,
)
from phantoms.fields import GaussianField
from phantoms.gaussians import Gaussians
from phantoms.polygons import Polygons
from phantoms.published import acr_ct
from phantoms.shapes import Ellipses

PIXEL, SIGMA = 0.5, 0.8


def gaussian_mtf(frequency: np.ndarray) -> np.ndarray:
    return np.exp(-2 * np.pi**2 * SIGMA**2 * frequency**2)


SILENT = nps(np.zeros((2, 16, 16)), 1.0)
HALF = math.sqrt(math.log(2) / 2) / (math.pi * SIGMA)  # where a Gaussian blur's MTF is 1/2


@pytest.mark.parametrize(("tilt", "contrast"), [(0.06, 100.0), (-0.1, -3.0)])
def test_slanted_edge_of_a_gaussian_blur(tilt, contrast):
    r = (np.arange(96) - 47.5) * PIXEL
    distance = np.cos(tilt) * r[None, :] + np.sin(tilt) * r[:, None] - 1.3
    image = 7 + contrast / 2 * (1 + erf(distance / SIGMA / math.sqrt(2)))
    transfer = edge_mtf(image, PIXEL)
    low = transfer.frequency < 0.7
    np.testing.assert_allclose(transfer.mtf[low], gaussian_mtf(transfer.frequency[low]), atol=5e-3)
    assert transfer.at(0.5) == pytest.approx(HALF, rel=5e-3)
    assert transfer.at(-1.0) == math.inf


def test_slanted_edge_of_pixels_alone_is_their_sinc():
    edge = Polygons.boxes([1.0, 40.0, 0.0, 40.0, 80.0, 0.08])
    transfer = edge_mtf(edge.image((96, 96), PIXEL), PIXEL)
    f = transfer.frequency[transfer.frequency < 0.9]
    # Across a slightly turned edge a pixel is nearly a box of its width.
    np.testing.assert_allclose(transfer.mtf[: f.size], np.sinc(f * PIXEL), atol=0.03)


def test_disc_edge_of_a_gaussian_blur():
    disc, n = Ellipses.of([100, 3.2, -1.7, 12.5, 12.5, 0]), 6
    fine = ndimage.gaussian_filter(
        disc.image((120 * n, 120 * n), PIXEL / n).astype(float), SIGMA / (PIXEL / n)
    )
    image = fine.reshape(120, n, 120, n).mean(axis=(1, 3))
    transfer = disc_mtf(np.stack([image, image]), PIXEL, (3.2, -1.7), 12.5)
    low = transfer.frequency < 0.6
    f = transfer.frequency[low]
    np.testing.assert_allclose(transfer.mtf[low], gaussian_mtf(f) * np.sinc(f * PIXEL), atol=8e-3)


def test_wire_of_a_gaussian_blur():
    blob = Gaussians([50.0], [[0.13, -0.2]], [SIGMA**2 * np.eye(2)])
    transfer = wire_mtf(blob.image((64, 64), PIXEL) + 7, PIXEL)
    f = transfer.frequency
    np.testing.assert_allclose(transfer.mtf, gaussian_mtf(f) * np.sinc(f * PIXEL), atol=3e-3)
    # A wire of 1 mm that is itself the image has a flat transfer once divided out.
    wire = Ellipses.of([1.0, 0, 0, 1.5, 1.5, 0]).image((256, 256), 0.1)
    flat = wire_mtf(wire, 0.1, width_mm=3.0)
    low = flat.frequency < 0.25
    np.testing.assert_allclose(flat.mtf[low], 1, atol=0.01)


def test_nps_of_white_noise_is_flat_and_integrates_to_the_variance(rng):
    noise = 3 * rng.normal(size=(200, 64, 48)) + 100
    spectrum = nps(noise, (0.5, 0.4))
    assert spectrum.variance == pytest.approx(noise.var(axis=0, ddof=1).mean(), rel=1e-9)
    assert spectrum.variance == pytest.approx(9, rel=0.01)
    np.testing.assert_allclose(spectrum.radial[2:], 9 * 0.5 * 0.4, rtol=0.06)
    assert spectrum.spectrum.shape == (64, 48)
    detrended = nps(noise[:50], (0.5, 0.4), detrend=True)
    assert detrended.variance == pytest.approx(9, rel=0.03)
    assert detrended.spectrum[32, 24] < 1e-12  # the mean is gone


def test_nps_of_filtered_noise_is_the_filters():
    field = GaussianField.periodic((64, 64), (0.5, 0.5), lambda k: 4 * np.exp(-((k / 0.3) ** 2)))
    spectrum = nps(field.sample(0, 300), 0.5)
    f = spectrum.frequency
    strong = (f < 0.5) & (f > 0.05)
    np.testing.assert_allclose(
        spectrum.radial[strong], 4 * np.exp(-((f[strong] / 0.3) ** 2)), rtol=0.08
    )
    white = nps(np.random.default_rng(1).normal(size=(50, 64, 64)), 0.5)
    assert spectrum.mean_frequency < 0.6 * white.mean_frequency


def test_object_structure_does_not_count_as_noise(rng):
    scene = Ellipses.of([1000.0, 2, 1, 8, 6, 0.3]).image((48, 48), 0.5)
    noise = rng.normal(size=(60, 48, 48))
    np.testing.assert_allclose(
        nps(scene + noise, 0.5).spectrum, nps(noise, 0.5).spectrum, atol=1e-3
    )


def test_detectability_in_white_noise_is_the_signals_energy(rng):
    spectrum = nps(3 * rng.normal(size=(200, 64, 48)), (0.5, 0.4))
    signal = np.zeros((64, 48))
    signal[20:30, 10:20] = 1.2
    assert npw_detectability(signal, spectrum) == pytest.approx(1.2 * 10 / 3, rel=0.03)


def test_model_and_image_observers_agree_on_an_acr_rod(rng):
    """The channelised observer of `inverse.trust` on images, and the integral over spectra."""
    rod = Ellipses.of([6.0, 0.3, -0.2, 5, 5, 0]).image((48, 48), 1.0)
    sigma = 16.0
    noise = sigma * rng.normal(size=(2400, 48, 48))
    present = torch.from_numpy(noise[:1200] + rod)
    absent = torch.from_numpy(noise[1200:])
    channels = laguerre_gauss((48, 48), 12.0, 6)
    found = hotelling(present, absent, channels)
    model = npw_detectability(rod, nps(noise[:200], 1.0))
    assert model == pytest.approx(np.linalg.norm(rod) / sigma, rel=0.03)
    assert found.d_prime == pytest.approx(model, rel=0.12)  # channels hold nearly all of a disc


def test_hu_accuracy_of_the_acr_phantom(rng):
    image = acr_ct(1).image((256, 256), 0.9) - 1000
    readings = hu_accuracy(image + rng.normal(0, 5, image.shape), 0.9)
    for name, reading in readings.items():
        assert abs(reading.error) < 1.0, name
        assert 4 < reading.std < 6
        assert reading.passes
    shifted = hu_accuracy(image + 20.0, 0.9)
    assert {n for n, r in shifted.items() if not r.passes} == {
        "water", "polyethylene", "acrylic", "bone",
    }  # fmt: skip
    assert shifted["bone"].error == pytest.approx(20, abs=0.5)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: edge_mtf(np.zeros((8, 8)), 1.0), GeometryError),
        (lambda: edge_mtf(np.zeros((32, 32)), 1.0), InputError),
        (lambda: edge_mtf(np.tile(np.arange(32.0) > 15.5, (32, 1)) * 1.0, 1.0), InputError),
        (lambda: edge_mtf(np.full((32, 32), np.nan), 1.0), InputError),
        (lambda: disc_mtf(np.zeros((64, 64)), 1.0, (0, 0), 30.0), GeometryError),
        (lambda: disc_mtf(np.zeros((64, 64)), 1.0, (0, 0), 10.0), InputError),
        (lambda: wire_mtf(np.zeros((32, 32)), 1.0), InputError),
        (lambda: nps(np.zeros((3, 4, 4)), 1.0), GeometryError),
        (lambda: nps(np.zeros((1, 16, 16)), 1.0), InputError),
        (lambda: hu_accuracy(np.zeros((64, 64)), 1.0), GeometryError),
        (lambda: npw_detectability(np.zeros((16, 8)), SILENT), GeometryError),
        (lambda: npw_detectability(np.ones((16, 16)), SILENT), NumericalError),
    ],
)  # fmt: skip
def test_impossible_requests(make, error):
    with pytest.raises(error):
        make()
