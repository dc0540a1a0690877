"""Steps, corrector, grids and the loop: laws on Gaussians, where the answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from inverse.errors import GeometryError, InputError, NumericalError, ReconError
from inverse.priors import Denoiser, GaussianPrior, MixturePrior
from inverse.sampling import (
    SAMPLERS,
    Heun,
    Noise,
    ancestral,
    annealed_langevin,
    ddim,
    decode,
    euler_maruyama,
    langevin,
    langevin_dynamics,
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


def slope(error, counts: tuple[int, ...]) -> float:
    """Order of convergence between the last two numbers of steps."""
    a, b = (error(n) for n in counts[-2:])
    return math.log(a / b) / math.log(counts[-1] / counts[-2])


def variance_error(sde: SDE, step, v0: float, steps: int) -> float:
    """Relative error of the variance of ``x_s`` after exact propagation of a linear recursion.

    A step is linear in ``x_t`` and ``z``, so its gain and spread are its values at (1, 0), (0, 1).
    """
    prior = gaussian(sde, v0, 0.0)
    times = torch.linspace(1.0, 0.5, steps + 1, dtype=torch.float64)
    alpha, sigma = (float(c) for c in sde.marginal(1.0))
    v = v0 * alpha**2 + sigma**2
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    for t, s in zip(times[:-1], times[1:], strict=True):
        gain = step(sde, one, prior.denoise(one, t), t, s, zero)
        spread = step(sde, zero, prior.denoise(zero, t), t, s, one)
        v = float(gain) ** 2 * v + float(spread) ** 2
    alpha, sigma = (float(c) for c in sde.marginal(0.5))
    truth = v0 * alpha**2 + sigma**2
    return abs(v - truth) / truth


@pytest.mark.parametrize("sde", SDES, ids=repr)
@pytest.mark.parametrize(
    "step",
    [euler_maruyama, reverse_diffusion, ancestral, ddim(0.0)],
    ids=["em", "rd", "ancestral", "ddim"],
)
def test_reverse_steps_have_weak_order_one(sde: SDE, step) -> None:
    """The variance error of an exact linear recursion halves with the step."""
    measured = slope(lambda n: variance_error(sde, step, 0.25, n), (100, 200))
    assert measured == pytest.approx(1.0, abs=0.12)


@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_heun_has_order_two(sde: SDE) -> None:
    """On a Gaussian the flow is x_s = x_t sqrt((a^2 v + s^2) / (A^2 v + S^2)), exactly."""
    prior, v = gaussian(sde, 0.25, 0.0), 0.25
    z = torch.tensor([[1.7]], dtype=torch.float64)
    levels = float(sde.noise_level(1.0)), 0.05
    low = sde.time(levels[1])
    variance = [float(sde.alpha(t) ** 2 * v + sde.sigma(t) ** 2) for t in (1.0, low)]
    truth = 1.7 * math.sqrt(variance[1] / variance[0])

    def error(n: int) -> float:
        x = decode(prior, z, solver=Heun(n), levels=levels)
        return abs(float(x) - truth)

    assert slope(error, (60, 120)) == pytest.approx(2.0, abs=0.15)
    assert error(120) < 3e-3


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
    alone = langevin(0.1)(sde, x[:1], prior.denoise(x[:1], t), t, t, x[1:2])
    mates = torch.cat([x[:1], 100 * x[:1]])
    both = langevin(0.1)(sde, mates, prior.denoise(mates, t), t, t, x[1:3])
    torch.testing.assert_close(both[:1], alone)
    for _ in range(50):
        x = langevin(0.5)(sde, x, prior.denoise(x, t), t, t, draw())
    # stationary variance of a Langevin step of size e on N(0, v): v / (1 - e/(2v))
    expected = scale / math.sqrt(1 - (0.5 * float(sde.sigma(t)) / scale) ** 2)
    assert float(x.std()) == pytest.approx(expected, rel=0.01)


def test_a_correctors_step_is_the_papers() -> None:
    """By hand: DDPM's beta from 0.1 to 20 in N = 1000 steps, step i = 500, snr 0.16.

    beta_i = (0.1 + 19.9 * 499/999) / 1000 = 0.010040, alpha_i = 1 - beta_i = 0.989960,
    sigma^2 = 1 - exp(-2.5375) = 0.920936, eps = 2 * 0.989960 * 0.0256 * 0.920936 = 0.046679.
    """
    x0, z = torch.randn(2, 5, 4, dtype=torch.float64).unbind(0)
    x = VP().alpha(0.5) * x0  # the score is zero: the step shows in the noise alone
    moved = langevin(0.16)(VP(), x, x0, 0.5, 0.499, z)
    torch.testing.assert_close(moved - x, math.sqrt(2 * 0.046679) * z, rtol=1e-4, atol=0)
    ve = VE(0.01, 50.0)
    moved = langevin(0.16)(ve, x0, x0, 0.5, 0.499, z)  # sigma^2 = 0.5 and alpha_i = 1
    torch.testing.assert_close(moved - x0, math.sqrt(2 * 2 * 0.0256 * 0.5) * z)


@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_predictor_corrector_reaches_the_variance_of_a_gaussian(sde: SDE) -> None:
    """The exact recursion of the variance; the more steps, the nearer."""

    def error(n: int) -> float:
        times = time_grid(sde, n, end=0.01, spacing="uniform")
        prior, v = gaussian(sde, 0.25, 0.0), float(sde.sigma(1.0)) ** 2
        one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
        for t, s in zip(times[:-1], times[1:], strict=True):
            for step in (langevin(0.16), reverse_diffusion):
                gain = step(sde, one, prior.denoise(one, t), t, s, zero)
                spread = step(sde, zero, prior.denoise(zero, t), t, s, one)
                v = float(gain) ** 2 * v + float(spread) ** 2
        truth = float(sde.alpha(times[-1])) ** 2 * 0.25 + float(sde.sigma(times[-1])) ** 2
        return abs(v / truth - 1)

    near = error(240)
    assert near < 0.02
    assert near < 0.4 * error(60)


def test_a_correctors_step_by_norms_of_the_sample_is_its_own() -> None:
    """eps = 2 alpha_i (snr |z| / |score|)^2 of each sample, whatever its batch mates are."""
    sde, t, s, d = VP(), 0.5, 0.45, 50
    prior = GaussianPrior(0.3, torch.eye(d, dtype=torch.float64), (d,), sde)
    x, z = noise(3, (d,))(), noise(3, (d,), seed=1)()
    x[1] *= 30
    moved = langevin(0.2, "sample")(sde, x, prior.denoise(x, t), t, s, z)
    alpha, sigma = (float(c) for c in sde.marginal(t))
    decay = float(sde.alpha(t) / sde.alpha(s))
    for k in range(3):
        score = -(x[k] - alpha * 0.3) / (alpha**2 + sigma**2)
        eps = 2 * decay**2 * (0.2 * float(z[k].norm() / score.norm())) ** 2
        expected = x[k] + eps * score + math.sqrt(2 * eps) * z[k]
        torch.testing.assert_close(moved[k], expected, rtol=1e-9, atol=1e-12)


def test_norms_of_many_dimensions_lie_near_their_expectations() -> None:
    """Where noise dominates, both choices make the same step to 1/sqrt(d)."""
    sde, d = VE(0.01, 50.0), 40_000
    t = torch.tensor(1.0, dtype=torch.float64)
    prior = gaussian(sde)  # acts on one pixel at a time
    x, z = 50 * noise(d)(), noise(d, seed=1)()
    x0 = prior.denoise(x, t)
    x, x0, z = (v.reshape(1, d) for v in (x, x0, z))
    a, b = (langevin(0.2, kind)(sde, x, x0, t, t, z) - x for kind in ("expected", "sample"))
    assert float((a - b).norm() / a.norm()) < 0.02


def mixture(sde: SDE) -> MixturePrior:
    """Toy G: 0.3 N(-2, 0.25) + 0.7 N(2, 0.25)."""
    return MixturePrior(
        torch.tensor([0.3, 0.7], dtype=torch.float64),
        torch.tensor([[-2.0], [2.0]]),
        torch.full((2, 1, 1), 0.25),
        (1,),
        sde,
    )


_VE, _VP, _SUB = VE(0.01, 50.0), VP(), SubVP()


@pytest.mark.parametrize(
    ("name", "options", "sde"),
    [
        ("annealed-langevin", {"steps": 1000, "count": 10}, _VE),
        ("reverse-diffusion", {"steps": 150}, _VE),
        ("reverse-diffusion", {"steps": 150}, _VP),
        ("reverse-diffusion", {"steps": 150}, _SUB),
        ("pc", {"steps": 100}, _VE),
        ("pc", {"steps": 100}, _VP),
        ("pc", {"steps": 100}, _SUB),
        ("euler-maruyama", {"steps": 150}, _VP),
        ("ancestral", {"steps": 150}, _SUB),
        ("ddim", {"steps": 100}, _VE),
        ("heun", {"steps": 25}, _VE),
        ("rk45", {"atol": 1e-2, "rtol": 1e-2}, _VE),
    ],
    ids=str,
)
def test_samplers_find_the_weights_of_a_mixture(name: str, options, sde: SDE) -> None:
    # annealed Langevin freezes the weights at a level near 1, where modes overlap: truly 0.31
    levels = (8.0, 0.05) if name == "annealed-langevin" else (50.0, 0.02)
    x = SAMPLERS[name].run(mixture(sde), noise(6_000, seed=2), levels=levels, **options)
    assert float((x < 0).double().mean()) == pytest.approx(0.30, abs=0.02)
    assert float(x[x > 0].mean()) == pytest.approx(2.0, abs=0.04)
    assert float(x[x > 0].std()) == pytest.approx(0.5, abs=0.05)


def test_annealed_langevin_is_the_same_under_every_sde() -> None:
    """It runs on x / alpha, whose noise levels all SDEs share."""
    a, b, c = (
        annealed_langevin(mixture(sde), noise(50), steps=40, levels=(8.0, 0.05))
        for sde in (_VE, _VP, _SUB)
    )
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(a, c)


def test_plain_langevin_keeps_the_split_of_its_start() -> None:
    """The documented failure: right within each mode, whatever the weights of the modes are."""
    n = 5_000
    start = torch.where(torch.arange(n) < 0.6 * n, -2.0, 2.0).to(torch.float64)[:, None]
    prior = mixture(VE(0.01, 50.0))
    x = langevin_dynamics(prior, noise(n), steps=300, epsilon=0.02, start=start)
    assert float((x < 0).double().mean()) == pytest.approx(0.6, abs=0.02)
    # v / (1 - eps / 2v)
    deviation = math.sqrt(0.25 / (1 - 0.02 / 0.5))
    assert float((x[x < 0] + 2).std()) == pytest.approx(deviation, rel=0.04)


@pytest.mark.parametrize("epsilon", [0.1, 0.5])
def test_stationary_variance_of_langevin(epsilon: float) -> None:
    """On N(0, 1) it is 1 / (1 - eps / 2)."""
    prior = gaussian(VE(1e-4, 1.0), 1.0, 0.0)
    x = langevin_dynamics(prior, noise(50_000), steps=60, epsilon=epsilon)
    assert float(x.var()) == pytest.approx(1 / (1 - epsilon / 2), rel=0.02)


def test_annealed_langevin_goes_down_its_ladder() -> None:
    """Levels are geometric, share the steps, and each has the step eps sigma_i^2 / sigma_L^2."""
    seen: list[float] = []

    class Zero(Denoiser):
        def denoise(self, x_t, t):
            seen.append(float(self.sde.sigma(t)))
            return 0 * x_t

    sde = VE(0.01, 10.0)
    x = annealed_langevin(
        Zero(sde), noise(1000), steps=12, count=4, epsilon=0.2 * 0.1**2, levels=(2.7, 0.1)
    )
    assert float(x.abs().max()) == 0.0
    ladder = [2.7, 0.9, 0.3, 0.1]
    assert seen == pytest.approx([level for level in ladder for _ in range(3)] + [0.1])

    class Keep(Denoiser):
        """A score of zero leaves pure diffusion, whose variance adds up."""

        def denoise(self, x_t, t):
            return x_t

    x = annealed_langevin(
        Keep(sde), noise(40_000), steps=12, count=4, epsilon=0.2 * 0.1**2, levels=(2.7, 0.1)
    )
    expected = 2.7**2 + 3 * sum(2 * 0.2 * level**2 for level in ladder)
    assert float(x.var()) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_a_sampler_costs_what_its_row_says_and_is_one_sample_at_a_time(name: str) -> None:
    class Counting(GaussianPrior):
        calls = 0

        def denoise(self, x_t, t):
            self.calls += 1
            return super().denoise(x_t, t)

    sampler, steps = SAMPLERS[name], 20
    prior = Counting(0.5, torch.diag(torch.linspace(0.2, 2, 6)), (2, 3), VE(0.01, 20.0))
    progress: list[tuple[int, int]] = []
    options = sampler.resolve({"steps": steps} if "steps" in sampler.options else {})
    seeds = [(7, k) for k in range(3)]
    whole = sampler.run(
        prior, Noise(seeds, (2, 3)), callback=lambda i, n: progress.append((i, n)), **options
    )
    assert whole.shape == (3, 2, 3)
    assert whole.dtype == torch.float32
    assert progress[-1][0] == progress[-1][1]
    if name == "rk45":
        # two calls before the first step, one after the last
        assert (prior.calls - 3) % sampler.calls_per_step == 0
    else:
        assert abs(prior.calls - steps * sampler.calls_per_step) <= 1
    alone = sampler.run(prior, Noise(seeds[1:2], (2, 3)), **options)
    torch.testing.assert_close(whole[1:2], alone, rtol=1e-5, atol=1e-5)
    again = sampler.run(prior, Noise([(8, 0), *seeds[1:]], (2, 3)), **options)
    torch.testing.assert_close(whole[1:], again[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_stochastic_samplers_and_only_they_draw_noise_after_the_start(name: str) -> None:
    def run(later: float) -> torch.Tensor:
        """Noise of ones at the start and of ``later`` after it."""
        drawn: list[torch.Tensor] = []

        def draw() -> torch.Tensor:
            drawn.append(torch.full((2, 1), later if drawn else 1.0))
            return drawn[-1]

        options = {"steps": 3} if "steps" in SAMPLERS[name].options else {}
        options |= {"count": 2} if name == "annealed-langevin" else {}
        return SAMPLERS[name].run(gaussian(VE(0.01, 2.0)), draw, **options)

    assert torch.equal(run(0.0), run(1.0)) != SAMPLERS[name].stochastic


def test_options_of_a_sampler() -> None:
    assert SAMPLERS["pc"].options == {"steps": 250, "snr": 0.16, "norms": "expected"}
    assert SAMPLERS["ddim"].resolve({"eta": 0.5}) == {"steps": 50, "eta": 0.5}
    with pytest.raises(InputError, match="'heun' has no option colour; besides steps it has none"):
        SAMPLERS["heun"].resolve({"colour": 1})
    with pytest.raises(InputError, match="'rk45' has no option steps; it has atol, rtol"):
        SAMPLERS["rk45"].resolve({"steps": 1})
    with pytest.raises(InputError, match="option eta of sampler 'ddim' must be a number in"):
        SAMPLERS["ddim"].resolve({"eta": 1.5})


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
    for make in (
        lambda: ddim(1.5),
        lambda: renoise(-0.1),
        lambda: langevin(-1.0),
        lambda: langevin(0.1, "batch"),
    ):
        with pytest.raises(ReconError):
            make()


def test_steps_that_diverge_are_an_error_not_a_result() -> None:
    prior = gaussian(VE(0.01, 20.0), 1.0, 0.0)
    times = time_grid(prior.sde, 100, spacing="uniform")
    with pytest.raises(NumericalError, match=r"lower the corrector's snr"):
        sample(prior, times, reverse_diffusion, noise(10), corrector=langevin(1.5))
    # finite in double precision, but 1.2^100 times too large
    with pytest.raises(NumericalError, match="lower epsilon"):
        langevin_dynamics(prior, noise(10), steps=200, epsilon=2.2)
    with pytest.raises(NumericalError, match="lower epsilon"):
        annealed_langevin(prior, noise(10), steps=100, count=5, epsilon=3e-4)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_bad_options_are_named(name: str) -> None:
    prior = gaussian(VE(0.01, 20.0))
    run = SAMPLERS[name].run
    for levels in ((20.0, 0.0), (-1.0, 0.1), (0.1, 20.0)):
        with pytest.raises(NumericalError, match="noise levels must be above 0 and fall"):
            run(prior, noise(2), levels=levels)
    if "steps" in SAMPLERS[name].options:
        with pytest.raises(ReconError, match="at least 1"):
            run(prior, noise(2), steps=0)
    if "epsilon" in SAMPLERS[name].options:
        for epsilon in (0.0, -1.0, math.nan):
            with pytest.raises(NumericalError, match="must be above 0"):
                run(prior, noise(2), epsilon=epsilon)
    if name == "langevin":
        with pytest.raises(GeometryError, match="shape of the noise"):
            run(prior, noise(2), start=torch.zeros(3, 1))
