"""Steps, corrector, grids and the loop: laws on Gaussians, where the answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from inverse.errors import NumericalError, ReconError
from inverse.priors import Denoiser, GaussianPrior, MixturePrior
from inverse.sampling import (
    Noise,
    ancestral,
    ddim,
    euler_maruyama,
    langevin,
    renoise,
    reverse_diffusion,
    sample,
    time_grid,
)
from inverse.sde import SDE, VE, VP, SubVP

SDES = [VE(0.01, 20.0), VP(), SubVP()]


def gaussian(sde: SDE, variance: float = 0.49, mean: float = 0.7) -> GaussianPrior:
    return GaussianPrior(mean, torch.tensor([[variance]], dtype=torch.float64), (1,), sde)


def noise(n: int, shape: tuple[int, ...] = (1,), seed: int = 0):
    """Fast noise for many one-dimensional samples: one generator for all."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(n, *shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("sde", SDES, ids=repr)
@pytest.mark.parametrize(
    "step",
    [ancestral, ddim(0.0), ddim(0.5), reverse_diffusion, euler_maruyama],
    ids=["ancestral", "ddim0", "ddim.5", "rd", "em"],
)
def test_samples_of_a_gaussian_have_its_moments(sde: SDE, step) -> None:
    n = 20_000
    times = time_grid(sde, 200, end=0.01, spacing="karras")
    x = sample(gaussian(sde), times, step, noise(n))
    # starting from N(0, sigma_max^2) instead of p_T costs VE 0.7 (0.7 / 20) of the mean
    assert float(x.mean()) == pytest.approx(0.7, abs=0.05)
    assert float(x.std()) == pytest.approx(0.7, rel=0.03)


@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_ddim_with_eta_one_is_ancestral_sampling(sde: SDE) -> None:
    x, x0, z = torch.randn(3, 5, 4, dtype=torch.float64).unbind(0)
    a = ancestral(sde, x, x0, 0.6, 0.5, z)
    torch.testing.assert_close(ddim(1.0)(sde, x, x0, 0.6, 0.5, z), a, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_steps_keep_the_marginal_given_the_true_image(sde: SDE) -> None:
    """With D = x_0 exactly, ancestral, DDIM and renoise map p(x_t|x_0) to p(x_s|x_0)."""
    t, s, n = 0.5, 0.35, 100_000
    x0 = torch.full((n, 1), 1.3, dtype=torch.float64)
    draw = noise(n)
    x_t = sde.alpha(t) * x0 + sde.sigma(t) * draw()
    for step in (ancestral, ddim(0.0), ddim(0.7), renoise(0.0), renoise(0.6), renoise(1.0)):
        x_s = step(sde, x_t, x0, t, s, draw())
        sigma = float(sde.sigma(s))
        assert float(x_s.mean()) == pytest.approx(float(sde.alpha(s)) * 1.3, abs=0.015 * sigma)
        assert float(x_s.std()) == pytest.approx(sigma, rel=0.01)


def test_euler_maruyama_has_weak_order_one() -> None:
    """The variance error of an exact linear recursion halves with the step."""
    sde = VP()
    prior = gaussian(sde, 0.25, 0.0)

    def variance(steps: int) -> float:
        # propagate the variance exactly: the step is linear in x_t and z
        times = torch.linspace(1.0, 0.01, steps + 1, dtype=torch.float64)
        v = 1.0
        for t, s in zip(times[:-1], times[1:], strict=True):
            one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1)
            gain = euler_maruyama(sde, one, prior.denoise(one, t), t, s, zero)
            spread = euler_maruyama(sde, 0 * one, prior.denoise(0 * one, t), t, s, one)
            v = float(gain) ** 2 * v + float(spread) ** 2
        return v

    alpha, sigma = (float(c) for c in sde.marginal(0.01))
    truth = 0.25 * alpha**2 + sigma**2
    errors = [abs(variance(n) - truth) for n in (100, 200, 400)]
    slopes = [math.log2(a / b) for a, b in zip(errors[:-1], errors[1:], strict=True)]
    assert slopes[-1] == pytest.approx(1.0, abs=0.15)


def test_reverse_diffusion_of_vp_is_the_papers() -> None:
    """x_s = (2 - sqrt(1 - beta)) x + beta score + sqrt(beta) z, Song et al. (ICLR 2021), D.2."""
    sde, t, s = VP(), 0.5, 0.4
    x, x0, z = torch.randn(3, 5, 4, dtype=torch.float64).unbind(0)
    alpha, sigma = (float(c) for c in sde.marginal(t))
    beta = 1 - (alpha / float(sde.alpha(s))) ** 2
    score = (alpha * x0 - x) / sigma**2
    paper = (2 - math.sqrt(1 - beta)) * x + beta * score + math.sqrt(beta) * z
    torch.testing.assert_close(reverse_diffusion(sde, x, x0, t, s, z), paper)


def test_deterministic_ddim_follows_the_probability_flow() -> None:
    """VE, Gaussian data: x_0 = x_T sqrt((v + s_min^2) / (v + s_max^2)), exactly in the limit."""
    sde, v = VE(0.01, 20.0), 0.49
    prior = gaussian(sde, v, 0.0)
    times = torch.linspace(1, 0, 2001, dtype=torch.float64)
    x = torch.tensor([[5.0]], dtype=torch.float64)
    step = ddim(0.0)
    for t, s in zip(times[:-1], times[1:], strict=True):
        x = step(sde, x, prior.denoise(x, t), t, s, torch.zeros_like(x))
    assert float(x) == pytest.approx(5 * math.sqrt((v + 1e-4) / (v + 400.0)), rel=5e-3)


def test_langevin_corrector_is_per_sample_and_stationary() -> None:
    sde, t = VE(0.01, 20.0), 0.6
    d = 400
    prior = GaussianPrior(0.0, torch.eye(d, dtype=torch.float64), (d,), sde)
    scale = math.sqrt(1 + float(sde.sigma(t)) ** 2)
    draw = noise(64, (d,))
    x = scale * draw()
    alone = langevin(0.1)(sde, x[:1], prior.denoise(x[:1], t), t, x[1:2])
    mates = torch.cat([x[:1], 100 * x[:1]])
    both = langevin(0.1)(sde, mates, prior.denoise(mates, t), t, x[1:3])
    torch.testing.assert_close(both[:1], alone)
    for _ in range(50):
        x = langevin(0.5)(sde, x, prior.denoise(x, t), t, draw())
    # stationary variance of a Langevin step of size e on N(0, v): v / (1 - e/(2v))
    expected = scale / math.sqrt(1 - (0.5 * float(sde.sigma(t)) / scale) ** 2)
    assert float(x.std()) == pytest.approx(expected, rel=0.01)


def test_predictor_corrector_finds_the_weights_of_a_mixture() -> None:
    sde = VE(0.01, 50.0)
    prior = MixturePrior(
        torch.tensor([0.3, 0.7]),
        torch.tensor([[-2.0], [2.0]]),
        torch.full((2, 1, 1), 0.25),
        (1,),
        sde,
    )
    n = 20_000
    for corrector in (None, langevin(0.16)):
        times = time_grid(sde, 150, spacing="uniform")
        x = sample(prior, times, reverse_diffusion, noise(n, seed=2), corrector=corrector)
        assert float((x < 0).double().mean()) == pytest.approx(0.30, abs=0.02)


def test_the_number_of_network_calls_is_one_a_step() -> None:
    class Counting(Denoiser):
        calls = 0

        def denoise(self, x_t, t):
            Counting.calls += 1
            return 0 * x_t

    times = time_grid(VE(), 12)
    sample(Counting(VE()), times, ancestral, noise(2))
    assert Counting.calls == 12
    Counting.calls = 0
    sample(Counting(VE()), times, ancestral, noise(2), corrector=langevin(0.1))
    assert Counting.calls == 23


def test_noise_of_a_sample_depends_on_its_own_seed_only() -> None:
    alone = Noise([(7, 3, 0)], (4, 4))
    among = Noise([(7, 2, 0), (7, 3, 0), (7, 3, 1)], (4, 4))
    for _ in range(3):
        a, b = alone(), among()
        assert torch.equal(a[0], b[1])
        assert not torch.equal(b[0], b[1])
        assert not torch.equal(b[1], b[2])


def test_time_grid_ends_and_spacings() -> None:
    sde = VE(0.01, 50.0)
    for spacing in ("geometric", "karras", "uniform"):
        levels = sde.noise_level(time_grid(sde, 9, start=5.0, end=0.02, spacing=spacing))
        assert float(levels[0]) == pytest.approx(5.0)
        assert float(levels[-1]) == pytest.approx(0.02)
        assert bool((levels.diff() < 0).all())
    ratios = sde.noise_level(time_grid(sde, 5, start=5.0, end=0.05))
    torch.testing.assert_close(
        ratios[1:] / ratios[:-1], torch.full((4,), 0.01**0.25, dtype=torch.float64)
    )
    with pytest.raises(ReconError, match="at least 1 step"):
        time_grid(sde, 0)
    with pytest.raises(ReconError, match="fall from start to end"):
        time_grid(sde, 4, start=0.1, end=1.0)


def test_divergence_is_reported() -> None:
    class Exploding(Denoiser):
        def denoise(self, x_t, t):
            return x_t * float("inf")

    with pytest.raises(NumericalError, match="step 1 of 4"):
        sample(Exploding(VE()), time_grid(VE(), 4), ancestral, noise(1))
    for make in (lambda: ddim(1.5), lambda: renoise(-0.1), lambda: langevin(-1.0)):
        with pytest.raises(ReconError):
            make()
