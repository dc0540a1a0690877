"""Split Gibbs methods against exact conditionals, exact posteriors and published values."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from affine import (
    CountingPrior,
    Run,
    check_batch,
    check_calls,
    dense,
    field,
    law,
    operator,
    parts,
    pixel,
    plane,
    plane_posterior,
    problem,
)
from scipy import stats

from inverse.errors import NumericalError, ReconError
from inverse.measurement import Measurement
from inverse.posterior import Problem
from inverse.posterior.gibbs import (
    LikelihoodStep,
    daps,
    denoising_posterior,
    extrapolate,
    pnpdm,
    red_diff,
)
from inverse.sde import VE, VP, SubVP

RUNS: dict[str, tuple[Run, int]] = {
    "pnpdm": (partial(pnpdm, steps=12, calls=3), 36),
    "daps": (partial(daps, steps=12), 12),
    "daps, flow": (partial(daps, steps=6, ode_steps=3, variance="level"), 18),
    "red_diff": (partial(red_diff, steps=20), 20),
}


@pytest.mark.parametrize("kind", ["ct", "mri"])
@pytest.mark.parametrize("balance", [0.0, 0.05])
@pytest.mark.parametrize("weighted", [False, True])
def test_likelihood_step_has_the_mean_and_covariance_of_its_gaussian(
    kind: str, weighted: bool, balance: float
) -> None:
    """Scalar noise and one noise map a slice; real and complex data; two slices at once."""
    op, noise = operator(kind, 4)
    generator = torch.Generator().manual_seed(3)
    y = op(torch.randn(2, 4, 4, generator=generator))
    sigma = torch.tensor(noise)
    if weighted:
        sigma = noise * (0.5 + torch.rand(2, *op.out_shape, generator=generator))
    measurement = Measurement(op, y, sigma, "MR", (1.0, 1.0))
    z, rho = torch.randn(2, 4, 4, generator=generator), 0.3
    a, rows = dense(op).double(), parts(y.flatten(1)).double()
    widths = sigma.expand(y.shape).flatten(1).double()
    if y.is_complex():
        widths = torch.cat([widths, widths], dim=1)

    def draw(p: Problem) -> torch.Tensor:
        likelihood = LikelihoodStep(p.measurement, p.noise, tol=1e-7)
        return likelihood(z[[k]].expand(len(p.measurement), 4, 4), rho, balance)

    for k in range(2):
        one = measurement.take(torch.tensor([k]))
        mean, covariance = law(draw, plane()[0], one)
        w = a / widths[k][:, None]
        weight = torch.eye(len(w)) + balance * w @ w.T
        exact = torch.linalg.inv(w.T @ weight @ w + torch.eye(16) / rho**2)
        b = w.T @ weight @ (rows[k] / widths[k]) + z[k].flatten() / rho**2
        torch.testing.assert_close(mean, exact @ b, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(covariance, exact, rtol=1e-3, atol=1e-4)


def _prior_step(calls: int, level: float = 0.5, ratio: float = 0.01) -> tuple[float, float]:
    """Gain and variance of the prior step for N(0, 1); exact: 1/(1 + l^2), l^2/(1 + l^2)."""
    prior, measurement = pixel(noise=1.0)

    def step(p: Problem) -> torch.Tensor:
        x = torch.ones(len(p.measurement), 1, 1)
        return denoising_posterior(prior, x, level, p.noise, calls=calls, ratio=ratio)

    mean, covariance = law(step, prior, measurement)
    return float(mean), float(covariance)


def test_prior_step_draws_the_denoising_posterior_to_second_order() -> None:
    exact = 0.25 / 1.25
    coarse, fine = (_prior_step(calls) for calls in (40, 80))
    assert fine[0] == pytest.approx(1 / 1.25, rel=1e-4)
    assert fine[1] == pytest.approx(exact, rel=1e-3)
    assert abs(coarse[1] - exact) > 3 * abs(fine[1] - exact)
    assert _prior_step(8, ratio=0.1)[1] == pytest.approx(exact, rel=0.05)  # as pnpdm calls it


def test_extrapolation_integrates_a_line_in_log_level_exactly() -> None:
    """D(t) = 2 - 3 log t, averaged with weight 2 exp(-2(h-u)) over a step by quadrature."""
    before, t, s = 3.0, 2.0, 0.7
    h = math.log(t / s)
    u = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000 * h
    weight = torch.exp(-2 * (h - u))
    exact = float((weight * (2 - 3 * (math.log(t) - u))).sum() / weight.sum())
    d = [torch.tensor(2 - 3 * math.log(level), dtype=torch.float64) for level in (before, t)]
    assert float(extrapolate(d[1], t, s, (before, d[0]))) == pytest.approx(exact, rel=1e-6)
    assert extrapolate(d[1], t, s, None) is d[1]


def test_pnpdm_at_fixed_rho_has_the_law_of_data_with_more_noise() -> None:
    """Noise variance .09 + .09 at rho = .3, the published row of the two-dimensional fixture."""
    run = partial(pnpdm, steps=60, rho_start=0.3, rho_end=0.3, calls=16, balanced=False)
    mean, covariance = law(run, *plane())
    exact = plane_posterior(math.sqrt(0.18))
    torch.testing.assert_close(mean, exact.mean, rtol=0.02, atol=0)
    torch.testing.assert_close(covariance, exact.covariance, rtol=0.03, atol=0)
    sd = covariance.diagonal().sqrt()
    published = [0.845, 0.672, 0.391, 0.680, 0.467]
    got = [*mean.tolist(), *sd.tolist(), float(covariance[0, 1] / sd.prod())]
    assert got == pytest.approx(published, abs=0.015)


@pytest.mark.slow
def test_pnpdm_approaches_the_posterior_as_rho_falls() -> None:
    exact = plane_posterior()

    def kl(**options: float) -> float:
        return exact.kl(*law(partial(pnpdm, **options), *plane()))

    plain = [kl(rho_end=rho, balanced=False, steps=60, calls=6) for rho in (0.3, 0.1)]
    assert plain[0] > 0.1 > 10 * plain[1]
    assert kl() == pytest.approx(0.0004, abs=0.0003)
    assert kl(balanced=False) == pytest.approx(0.0019, abs=0.0005)


@pytest.mark.parametrize("sde", [VP(), SubVP()], ids=repr)
@pytest.mark.parametrize("name", RUNS)
def test_methods_do_not_depend_on_the_sde(name: str, sde: VP | SubVP) -> None:
    """They live on noise levels; only the default start of daps and red_diff is the SDE's."""
    run, _ = RUNS[name]
    options = {"rho_end": 0.3} if name == "pnpdm" else {"start_level": 20.0, "end_level": 0.3}
    results = [
        run(problem(*plane(sde=s), samples=3), **options)  # type: ignore[call-arg]
        for s in (VE(1e-4, 50.0), sde)
    ]
    torch.testing.assert_close(*results, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ct", "mri"])
def test_pnpdm_is_calibrated_on_gaussian_fields(kind: str) -> None:
    """16 samples of 24 truths: 90 % intervals, mean, spread and residual."""
    prior, measurement, truth = field(kind, slices=24)
    with torch.inference_mode():
        p = problem(prior, measurement, 16)
        samples = pnpdm(p, steps=80)
        chi2 = float(p.measurement.chi2(samples).mean() / measurement.chi2(truth).mean())
    samples = samples.unflatten(0, (24, 16))
    mean, sd = samples.mean(dim=1), samples.std(dim=1)
    half = float(stats.t.ppf(0.95, 15)) * math.sqrt(1 + 1 / 16) * sd
    assert 0.88 < float(((truth - mean).abs() < half).float().mean()) < 0.92
    a, rows = dense(measurement.operator), parts(measurement.data.flatten(1))
    exact = [prior.posterior(a, y, float(measurement.noise)) for y in rows]
    widths = exact[0].covariance.diagonal().sqrt()
    means = torch.stack([e.mean for e in exact])
    error = ((mean.flatten(1) - means) / widths).square().mean().sqrt()
    assert float(error) == pytest.approx(1 / 4, abs=0.06)  # 1/sqrt(16) of Monte Carlo
    spread = sd.flatten(1).square().mean(dim=0).sqrt() / widths
    assert float(spread.mean()) == pytest.approx(1.0, abs=0.04)
    assert chi2 == pytest.approx(1.0, abs=0.1)


def test_daps_with_the_priors_own_variance_is_nearly_exact() -> None:
    exact = plane_posterior()
    few, many = (exact.kl(*law(partial(daps, steps=n), *plane())) for n in (100, 300))
    assert few == pytest.approx(0.0073, rel=0.1)
    assert many < 0.0015


@pytest.mark.parametrize(
    ("variance", "mean", "covariance"), [("error", 1 / 3, 4 / 9), ("level", 1 / 2, 9 / 16)]
)
def test_one_level_of_daps_by_hand(variance: str, mean: float, covariance: float) -> None:
    """x ~ N(0, 1), D = x/2, r^2 = 1/2 or 1; then y = 1 with unit noise."""
    run = partial(daps, steps=1, start_level=1.0, end_level=1.0, variance=variance)
    got = law(run, *pixel(noise=1.0))
    assert float(got[0]) == pytest.approx(mean, rel=1e-4)
    assert float(got[1]) == pytest.approx(covariance, rel=1e-4)


def test_daps_with_the_authors_variance_is_too_wide_as_published() -> None:
    run = partial(daps, steps=100, ode_steps=10, variance="level")
    mean, covariance = law(run, *plane())
    sd = covariance.diagonal().sqrt()
    got = [*mean.tolist(), *sd.tolist(), float(covariance[0, 1] / sd.prod())]
    assert got == pytest.approx([0.955, 0.735, 0.292, 0.915, 0.271], abs=0.06)
    assert plane_posterior().kl(mean, covariance) == pytest.approx(0.2, abs=0.05)


def test_red_diff_finds_the_mode_without_spread() -> None:
    with torch.inference_mode():
        x = red_diff(problem(*plane(), samples=200), steps=500).flatten(1)
    exact = plane_posterior()
    torch.testing.assert_close(x.mean(dim=0).double(), exact.mean, rtol=0.2, atol=0)
    assert bool((x.std(dim=0) < 0.35 * exact.covariance.diagonal().sqrt()).all())


@pytest.mark.parametrize("name", RUNS)
def test_network_calls_are_those_stated(name: str) -> None:
    check_calls(*RUNS[name])


@pytest.mark.parametrize("kind", ["ct", "mri"])
@pytest.mark.parametrize("name", RUNS)
def test_a_sample_does_not_depend_on_its_batch(name: str, kind: str) -> None:
    check_batch(RUNS[name][0], kind)


def test_noise_free_data_are_a_limit() -> None:
    prior, measurement = plane(noise=1e-4)
    with torch.inference_mode():
        x = pnpdm(problem(prior, measurement, 400), steps=60, calls=6)[:, 0]
    assert float((x[:, 0] - 1).abs().max()) < 0.15  # rho_end = .03 in four deviations
    assert float(x[:, 1].mean()) == pytest.approx(0.8, abs=0.1)
    assert float(x[:, 1].std()) == pytest.approx(0.6, rel=0.1)


class Exploding(CountingPrior):
    """A prior that blows up."""

    def denoise(self, x_t: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
        return 1e30 * super().denoise(x_t, t)


@pytest.mark.parametrize("name", RUNS)
def test_divergence_stops_with_advice(name: str) -> None:
    prior, measurement = plane()
    with pytest.raises(NumericalError, match=r"diverged at step|conjugate gradients left"):
        RUNS[name][0](problem(Exploding(prior), measurement, 2))


def test_bad_settings_are_named() -> None:
    p = problem(*plane(), samples=1)
    with pytest.raises(ReconError, match="noise levels must be at least one and fall"):
        pnpdm(p, rho_start=0.1, rho_end=0.2)
    with pytest.raises(ReconError, match="noise level must lie in"):
        pnpdm(p, rho_start=1000.0)
