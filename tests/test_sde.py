"""Forward processes: derived coefficients against finite differences, moments, inversion."""

from __future__ import annotations

import math

import pytest
import torch

from inverse.errors import ReconError
from inverse.sde import SDE, VE, VP, SubVP

SDES = [VE(0.01, 50.0), VP(), SubVP()]


@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_drift_and_diffusion_equal_finite_differences_of_the_marginals(sde: SDE) -> None:
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    h = 1e-5
    f = (sde.alpha(t + h).log() - sde.alpha(t - h).log()) / (2 * h)
    rate = (sde.sigma(t + h) ** 2 - sde.sigma(t - h) ** 2) / (2 * h)
    torch.testing.assert_close(sde.f(t), f, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        sde.diffusion(t), torch.sqrt(rate - 2 * f * sde.sigma(t) ** 2), rtol=1e-6, atol=1e-8
    )


def test_diffusion_equals_the_published_closed_forms() -> None:
    t = torch.linspace(0.05, 1.0, 20, dtype=torch.float64)
    beta = 0.1 + 19.9 * t
    b = 0.1 * t + 9.95 * t**2
    # Song et al. (ICLR 2021), equations 30, 33 and 28
    torch.testing.assert_close(VP().f(t), -beta / 2)
    torch.testing.assert_close(VP().diffusion(t), beta.sqrt())
    torch.testing.assert_close(SubVP().diffusion(t), (beta * (1 - torch.exp(-2 * b))).sqrt())
    ve = VE(0.01, 50.0)
    torch.testing.assert_close(ve.diffusion(t), ve.sigma(t) * math.sqrt(2 * math.log(5000.0)))


@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_forward_sde_has_the_stated_marginal(sde: SDE) -> None:
    """Euler-Maruyama of dx = f x dt + g dw from x_0 = 1 reproduces alpha and sigma."""
    n, steps = 20_000, 400
    generator = torch.Generator().manual_seed(1)
    start = 1e-3
    x = sde.alpha(start) + sde.sigma(start) * torch.randn(
        n, generator=generator, dtype=torch.float64
    )
    times = torch.linspace(start, 0.7, steps + 1, dtype=torch.float64)
    for t, s in zip(times[:-1], times[1:], strict=True):
        dt = s - t
        z = torch.randn(n, generator=generator, dtype=torch.float64)
        middle = (t + s) / 2
        x = x + sde.f(middle) * x * dt + sde.diffusion(middle) * dt.sqrt() * z
    alpha, sigma = float(sde.alpha(0.7)), float(sde.sigma(0.7))
    assert float(x.mean()) == pytest.approx(alpha, abs=4 * sigma / math.sqrt(n) + 2e-3)
    assert float(x.std()) == pytest.approx(sigma, rel=0.025)


@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_time_inverts_the_noise_level(sde: SDE) -> None:
    t = torch.tensor([1e-4, 0.03, 0.5, 0.99], dtype=torch.float64)
    torch.testing.assert_close(sde.time(sde.noise_level(t)), t, rtol=1e-8, atol=1e-10)
    with pytest.raises(ReconError, match="noise level must lie in"):
        sde.time(1e9)


@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_time_in_closed_form_is_the_bisections(sde: SDE) -> None:
    levels = sde.noise_level(torch.logspace(-4, 0, 9, dtype=torch.float64))
    torch.testing.assert_close(sde.time(levels), SDE._invert(sde, levels), rtol=1e-9, atol=1e-12)


def test_small_times_do_not_cancel() -> None:
    # 1 - exp(-B) in float64 loses all digits at B = 1e-17; expm1 keeps them
    t = 1e-16
    assert float(VP().sigma(t)) == pytest.approx(math.sqrt(0.1 * t), rel=1e-6)


def test_drift_broadcasts_over_a_batch_of_times() -> None:
    x = torch.ones(2, 3, 4)
    drift = VP().drift(x, torch.tensor([0.1, 0.9]))
    assert drift.shape == x.shape
    assert float(drift[1, 0, 0]) == pytest.approx(-(0.1 + 19.9 * 0.9) / 2, rel=1e-6)


@pytest.mark.parametrize("make", [lambda: VE(1.0, 0.5), lambda: VP(-1.0, 2.0)])
def test_impossible_parameters_are_refused(make) -> None:
    with pytest.raises(ReconError, match="needs 0 <"):
        make()
