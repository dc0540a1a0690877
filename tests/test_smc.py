"""The particle method: resampling, twisting function, and exactness as particles grow."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from affine import CountingPrior, dense, field, parts, pixel, plane, plane_posterior, problem

from inverse.posterior.smc import _Twist, systematic_resample, tds
from phantoms.benchmarks.calibration import mixture


def test_systematic_resampling_keeps_floor_or_ceiling_of_the_expected_copies() -> None:
    generator = torch.Generator().manual_seed(0)
    logw = 2 * torch.randn(3, 16, generator=generator, dtype=torch.float64)
    expected = 16 * torch.softmax(logw, dim=1)
    total = torch.zeros(3, 16)
    for k in range(500):
        u = torch.full((3,), (k + 0.5) / 500, dtype=torch.float64)
        index, fresh = systematic_resample(logw, u, ess=1.0)
        assert bool((fresh == 0).all())
        copies = torch.stack([torch.bincount(row, minlength=16) for row in index])
        assert bool((copies >= expected.floor()).all() & (copies <= expected.ceil()).all())
        total += copies
    torch.testing.assert_close(total.double() / 500, expected, rtol=0, atol=0.01)  # unbiased


def test_only_samples_with_few_effective_particles_are_resampled() -> None:
    logw = torch.tensor([[0.0, 0.1, 0.0, 0.1], [0.0, -9.0, -9.0, -9.0]], dtype=torch.float64)
    index, fresh = systematic_resample(logw, torch.full((2,), 0.5, dtype=torch.float64), ess=0.5)
    assert index.tolist() == [[0, 1, 2, 3], [0, 0, 0, 0]]
    torch.testing.assert_close(fresh, torch.stack([logw[0], torch.zeros(4).double()]))


@pytest.mark.parametrize("kind", ["ct", "mri"])
def test_twisting_function_is_its_gaussian_and_gradient(kind: str) -> None:
    prior, measurement, _ = field(kind, side=6)
    t = prior.sde.time(0.7)
    a = dense(measurement.operator).double() / float(measurement.noise)
    y = parts(measurement.data.flatten(1)).double().flatten() / float(measurement.noise)
    twist = _Twist(prior, measurement.take(torch.zeros(2, dtype=torch.long)), 200)
    x = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        x0, shift, log_psi = twist(x, t)
    gram = torch.eye(len(a)) + float(prior.error(0.7)) ** 2 * a @ a.T

    def exact(v: torch.Tensor) -> torch.Tensor:
        e = y - prior.denoise(v, t).flatten(1).double() @ a.T
        return -0.5 * (e * torch.linalg.solve(gram, e.T).T).sum(dim=1)

    torch.testing.assert_close(log_psi.double(), exact(x), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(x0, prior.denoise(x, t))
    v = x.double().requires_grad_(True)
    (gradient,) = torch.autograd.grad(exact(v).sum(), v)
    torch.testing.assert_close(shift.double(), 0.7**2 * gradient, rtol=1e-3, atol=1e-3)


def test_divergence_from_the_exact_posterior_falls_with_the_particles() -> None:
    """20 steps, where the proposal alone is visibly wrong."""
    exact = plane_posterior()

    def kl(particles: int) -> float:
        p = problem(*plane(), samples=2000)
        with torch.inference_mode():
            x = tds(p, steps=20, particles=particles, group=32000).flatten(1).double()
        return exact.kl(x.mean(dim=0), torch.cov(x.T))

    one, few, many = kl(1), kl(4), kl(16)
    assert one > 0.05
    assert few < 0.4 * one
    assert many < 0.2 * one


def test_last_weight_is_the_likelihood_of_the_image_that_is_returned() -> None:
    """Stopped at level .5 the images are D(x) ~ N(0, .8), weighted by N(1; x0, .25)."""
    p = problem(*pixel(noise=0.5), samples=4000)
    with torch.inference_mode():
        x = tds(p, steps=60, particles=16, end_level=0.5, group=64000).flatten()
    assert float(x.mean()) == pytest.approx(0.8 / 1.05, abs=0.03)
    assert float(x.var()) == pytest.approx(0.8 * 0.25 / 1.05, rel=0.1)


def test_modes_get_their_weight() -> None:
    toy = mixture()
    weights, modes = toy.exact
    n = 1000
    with torch.inference_mode():
        p = problem(toy.prior, toy.measurement(), samples=n)
        x = tds(p, steps=50, particles=16, group=16000).flatten(1).double()
    logs = torch.stack(
        [torch.distributions.MultivariateNormal(m.mean, m.covariance).log_prob(x) for m in modes],
        dim=1,
    )
    second = logs.argmax(dim=1) == 1
    share = float(weights[1])
    assert float(second.double().mean()) == pytest.approx(
        share, abs=3 * (share * (1 - share) / n) ** 0.5
    )
    # two neighbouring modes: those assigned to one have its moments but for the overlap
    torch.testing.assert_close(x[second].mean(dim=0), modes[1].mean, rtol=0, atol=0.08)
    torch.testing.assert_close(
        x[second].std(dim=0), modes[1].covariance.diagonal().sqrt(), rtol=0.08, atol=0
    )


@pytest.mark.parametrize("kind", ["ct", "mri"])
def test_mean_and_spread_on_gaussian_fields(kind: str) -> None:
    prior, measurement, _ = field(kind)
    with torch.inference_mode():
        p = problem(prior, measurement, 24)
        x = tds(p, steps=60, particles=8).flatten(1).double()
    y = parts(measurement.data.flatten(1))[0]
    exact = prior.posterior(dense(measurement.operator), y, float(measurement.noise))
    sd = exact.covariance.diagonal().sqrt()
    error = ((x.mean(dim=0) - exact.mean) / sd).square().mean().sqrt()
    assert float(error) < 0.5  # 1/sqrt(24) = .2 of Monte Carlo
    assert float((x.std(dim=0) / sd).mean()) == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("kind", ["ct", "mri"])
def test_a_sample_does_not_depend_on_its_batch(kind: str) -> None:
    prior, measurement, _ = field(kind, side=8)
    run = partial(tds, steps=12, particles=4)
    with torch.inference_mode():
        many = run(problem(prior, measurement, 8))
        one = run(problem(prior, measurement, 1, first=5))
    torch.testing.assert_close(many[5], one[0], rtol=1e-5, atol=1e-5)


def test_one_network_call_a_step_and_group() -> None:
    prior, measurement = plane()
    counted = CountingPrior(prior)
    progress: list[int] = []
    p = replace(problem(counted, measurement, 2), callback=lambda i, n: progress.append(i))
    tds(p, steps=9, particles=6, group=12)
    assert counted.calls == 9
    assert progress == list(range(1, 10))
    tds(problem(counted, measurement, 2), steps=9, particles=6, group=4)
    assert counted.calls == 9 + 27


def test_noise_maps_and_bad_settings() -> None:
    """A map of equal values is the number; a slice's own map goes with its particles."""
    prior, measurement, _ = field("ct", side=8, slices=2)
    sigma = measurement.noise * torch.tensor([1.0, 2.0]).reshape(2, 1, 1)
    mapped = replace(measurement, noise=sigma.expand(measurement.data.shape))
    run = partial(tds, steps=8, particles=3)
    with torch.inference_mode():
        both = run(problem(prior, mapped, 1))
        plain = run(problem(prior, measurement, 1))
        doubled = run(problem(prior, replace(measurement, noise=2 * measurement.noise), 1))
    torch.testing.assert_close(both[0], plain[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both[1], doubled[1], rtol=1e-4, atol=1e-4)
