"""Transmission noise: the likelihood, its Gaussian approximations, and starved detectors."""

from __future__ import annotations

import math

import pytest
import torch

from inverse.errors import InputError
from inverse.operators.noise import (
    TransmissionPoisson,
    count_photons,
    generator,
    line_integrals,
)

LINES = torch.linspace(0.0, 9.0, 40, dtype=torch.float64)


def test_readings_have_photon_and_electronic_variance() -> None:
    line, photons, sigma = torch.full((1, 300, 300), 3.0), 2e3, 20.0
    rate = photons * math.exp(-3.0)
    readings = count_photons(line, photons, [generator(0)], sigma)
    assert float(readings.mean()) == pytest.approx(rate, abs=4 * math.sqrt(rate + 400) / 300)
    assert float(readings.var()) == pytest.approx(rate + sigma**2, rel=0.02)
    # the photons are those of a quiet detector
    quiet = count_photons(line, photons, [generator(0)])
    assert float((readings - quiet).std()) == pytest.approx(sigma, rel=0.02)
    assert torch.equal(quiet, quiet.round())


def test_stated_std_is_that_of_the_line_integrals() -> None:
    line, photons, sigma = torch.full((1, 300, 300), 2.0), 1e4, 30.0
    y, std = line_integrals(count_photons(line, photons, [generator(1)], sigma), photons, sigma)
    assert float(y.std()) == pytest.approx(float(std.mean()), rel=0.02)
    n = photons * math.exp(-2.0)
    assert float(std.mean()) == pytest.approx(math.sqrt(n + sigma**2) / n, rel=0.01)


@pytest.mark.parametrize("sigma", [0.0, 15.0])
def test_starved_bins_are_weak_not_nan(sigma: float) -> None:
    counts = torch.tensor([0.0, -40.0, 1e-9, 1e5])
    y, std = line_integrals(counts, 1e5, sigma)
    assert bool(torch.isfinite(y).all() & torch.isfinite(std).all())
    assert y[:3].tolist() == pytest.approx([math.log(1e5)] * 3)
    assert bool((std[:3] >= 1.0).all())
    assert float(y[3]) == pytest.approx(0.0, abs=1e-6)
    poisson = TransmissionPoisson(counts, 1e5, sigma)
    for line in (torch.zeros(4), torch.full((4,), 30.0), torch.full((4,), 200.0)):
        parts = (poisson.value(line), poisson.gradient(line), *poisson.gaussian(line))
        assert all(bool(torch.isfinite(part).all()) for part in parts)


@pytest.mark.parametrize("sigma", [0.0, 12.0])
def test_gradient_is_the_derivative(sigma: float) -> None:
    counts = count_photons(LINES[None], 5e3, [generator(0)], sigma)[0]
    poisson = TransmissionPoisson(counts, 5e3, sigma)
    line = LINES.clone().requires_grad_()
    (expected,) = torch.autograd.grad(poisson.value(line).sum(), line)
    torch.testing.assert_close(poisson.gradient(LINES), expected)


def test_value_is_the_poisson_likelihood() -> None:
    counts = torch.tensor([0.0, 1.0, 7.0, 300.0], dtype=torch.float64)
    line = torch.tensor([3.0, 4.0, 5.0, 1.2], dtype=torch.float64)
    rate = 500.0 * torch.exp(-line)
    log_likelihood = torch.distributions.Poisson(rate).log_prob(counts)
    best = torch.distributions.Poisson(counts.clamp_min(1e-30)).log_prob(counts)
    torch.testing.assert_close(
        TransmissionPoisson(counts, 500.0).value(line), best - log_likelihood
    )


@pytest.mark.parametrize("sigma", [0.0, 12.0])
def test_gaussian_about_the_fit_is_its_second_order(sigma: float) -> None:
    photons, line = 5e3, LINES[:24]
    counts = photons * torch.exp(-line)
    poisson = TransmissionPoisson(counts, photons, sigma)
    data, std = poisson.gaussian(line)
    torch.testing.assert_close(data.double(), line, atol=1e-6, rtol=0)
    for step in (1e-3, -1e-3):
        quadratic = (line + step - data.double()) ** 2 / (2 * std.double() ** 2)
        torch.testing.assert_close(poisson.value(line + step), quadratic, rtol=5e-3, atol=0)
    # and it is what the logarithm states, where there are counts
    y, sd = line_integrals(counts, photons, sigma)
    torch.testing.assert_close(y.double(), line, atol=1e-5, rtol=0)
    torch.testing.assert_close(sd, std)


def test_scoring_is_unbiased_at_low_counts_where_the_logarithm_is_not() -> None:
    # four photons a bin: the mean over many bins of one object, by each data term
    photons, truth, n = 200.0, math.log(50.0), 20_000
    counts = count_photons(torch.full((1, n), truth), photons, [generator(3)])[0]
    logs, std = line_integrals(counts, photons)
    by_log = float((logs / std**2).sum() / (1 / std**2).sum())
    line = torch.tensor(by_log)
    for _ in range(5):
        data, sd = TransmissionPoisson(counts, photons).gaussian(line.expand(n))
        line = (data / sd**2).sum() / (1 / sd**2).sum()
    assert abs(float(line) - truth) < 4 / math.sqrt(4 * n)
    assert abs(by_log - truth) > 0.1
    # the fit is where the likelihood says
    gradient = TransmissionPoisson(counts, photons).gradient(line.expand(n)).mean()
    assert abs(float(gradient)) < 1e-3


def test_refusals() -> None:
    for photons, sigma in ((0.0, 0.0), (math.nan, 0.0), (10.0, -1.0), (10.0, math.inf)):
        with pytest.raises(InputError):
            line_integrals(torch.ones(1), photons, sigma)
        with pytest.raises(InputError):
            TransmissionPoisson(torch.ones(1), photons, sigma)
        with pytest.raises(InputError):
            count_photons(torch.ones(1, 1), photons, [generator(0)], sigma)
    with pytest.raises(InputError, match="NaN"):
        TransmissionPoisson(torch.tensor([math.nan]), 10.0)
