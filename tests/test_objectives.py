"""Objectives against closed forms: Gaussians and the mixture toy of the score-matching papers.

Expectations are integrals on a fine grid where the space is one-dimensional (exact to rounding
for these smooth densities), Monte-Carlo averages within three standard errors elsewhere.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from inverse.errors import GeometryError, InputError, NumericalError, ReconError, UnsupportedError
from inverse.priors import energy_score
from inverse.priors.denoiser import expand
from inverse.sde import VE
from inverse.training import objectives
from inverse.training.flow import RealNVP
from inverse.training.objectives import (
    OBJECTIVES,
    Model,
    Objective,
    Perturbed,
    Setting,
    contrastive_divergence,
    denoising_score_matching,
    draw_levels,
    exact_score_matching,
    flow_contrastive_estimation,
    geometric_levels,
    langevin_chain,
    lognormal_levels,
    noise_contrastive_estimation,
    persistent_contrastive_divergence,
    projections,
    sliced_score_matching,
    sure,
    weight,
)

WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
MEANS = torch.tensor([-2.0, 2.0], dtype=torch.float64)


def log_g(x: Tensor, sigma: float = 0.0) -> Tensor:
    """log density of 0.3 N(-2, .25) + 0.7 N(2, .25), convolved with N(0, sigma^2); (n,)."""
    v = 0.25 + sigma**2
    parts = WEIGHTS.log() - 0.5 * ((x - MEANS) ** 2 / v + math.log(2 * math.pi * v))
    return torch.logsumexp(parts, dim=1)


def score_g(x: Tensor, sigma: float = 0.0) -> Tensor:
    v = 0.25 + sigma**2
    parts = WEIGHTS.log() - 0.5 * (x - MEANS) ** 2 / v
    return (torch.softmax(parts, dim=1) * (MEANS - x)).sum(dim=1, keepdim=True) / v


def denoise_g(x: Tensor, sigma: Tensor) -> Tensor:
    level = float(sigma[0])
    return x + level**2 * score_g(x, level)


def line(half: float = 16.0, count: int = 8001) -> tuple[Tensor, float]:
    """Points ``(n, 1)`` and their spacing."""
    x = torch.linspace(-half, half, count, dtype=torch.float64)[:, None]
    return x, 2 * half / (count - 1)


def normal(count: int = 2001, half: float = 10.0) -> tuple[Tensor, Tensor]:
    """Points ``(n, 1)`` and weights of N(0, 1)."""
    x, h = line(half, count)
    return x, h * torch.exp(-0.5 * x[:, 0] ** 2) / math.sqrt(2 * math.pi)


def mean(weights: Tensor, values: Tensor) -> float:
    """An integral as a weighted sum."""
    return float((weights * values).sum().detach())


def within(values: Tensor, truth: float) -> None:
    """The mean of independent values is the truth to three standard errors."""
    values = values.detach()
    error = float(values.std()) / math.sqrt(len(values))
    assert abs(float(values.mean()) - truth) < 3 * error, (float(values.mean()), truth, error)


def full(x: Tensor, sigma: float) -> Tensor:
    return torch.full((len(x),), sigma, dtype=x.dtype)


# --- score matching ----------------------------------------------------------------------------


def test_exact_score_matching_has_its_known_minimum_on_the_mixture() -> None:
    x, h = line()
    loss = exact_score_matching(score_g, x)
    assert mean(h * log_g(x).exp(), loss) == pytest.approx(-1.997134, abs=1e-6)


def test_the_gap_of_the_objective_is_half_the_fisher_divergence() -> None:
    x, h = line()
    p = h * log_g(x).exp()
    off = 0.3 * torch.sin(2 * x) + 0.1
    gap = exact_score_matching(lambda u: score_g(u) + 0.3 * torch.sin(2 * u) + 0.1, x)
    gap = mean(p, gap - exact_score_matching(score_g, x))
    assert gap == pytest.approx(mean(p, 0.5 * off[:, 0] ** 2), abs=1e-9)


@pytest.mark.parametrize(("sigma", "fisher"), [(0.5, 1.895702), (1.0, 0.546054), (2.0, 0.143679)])
def test_exact_score_matching_on_perturbed_samples(sigma: float, fisher: float) -> None:
    x, h = line(30.0)
    loss = exact_score_matching(lambda u: score_g(u, sigma), x)
    assert mean(h * log_g(x, sigma).exp(), loss) == pytest.approx(-fisher / 2, abs=1e-6)


def field(x: Tensor) -> Tensor:
    """A score in 2 x 2 unknowns with a Jacobian that is neither diagonal nor symmetric."""
    a = torch.arange(16.0, dtype=x.dtype).reshape(4, 4) / 8 - 1
    return torch.sin(x.flatten(1) @ a).reshape(x.shape) * x.square().mean(dim=(1, 2), keepdim=True)


def test_the_exact_trace_is_that_of_the_jacobian() -> None:
    x = torch.randn(3, 2, 2, dtype=torch.float64)
    got = exact_score_matching(field, x)
    for i in range(3):
        jacobian = torch.autograd.functional.jacobian(field, x[i : i + 1]).reshape(4, 4)
        expected = jacobian.trace() + 0.5 * field(x[i : i + 1]).square().sum()
        torch.testing.assert_close(got[i], expected)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("reduced", [True, False])
def test_sliced_score_matching_averages_to_the_exact_one(kind: str, reduced: bool) -> None:
    n = 20_000
    x = torch.randn(1, 2, 2, dtype=torch.float64)
    many = x.expand(n, 2, 2)
    v = projections(many, torch.Generator().manual_seed(1), kind)
    within(
        sliced_score_matching(field, many, v, variance_reduced=reduced),
        float(exact_score_matching(field, x).detach()),
    )


def test_sliced_forms_differ_by_the_squared_projection_alone() -> None:
    x = torch.randn(5, 2, 2, dtype=torch.float64)
    v = torch.randn(3, 5, 2, 2, dtype=torch.float64)
    gap = sliced_score_matching(field, x, v, variance_reduced=False)
    gap = gap - sliced_score_matching(field, x, v, variance_reduced=True)
    s = field(x)
    dots = (s * v).sum(dim=(2, 3)) ** 2 - s.square().sum(dim=(1, 2))
    torch.testing.assert_close(gap, 0.5 * dots.mean(dim=0))


@pytest.mark.parametrize("reduced", [True, False])
def test_rademacher_in_one_dimension_is_exact_sample_by_sample(reduced: bool) -> None:
    x = 3 * torch.randn(100, 1, dtype=torch.float64)
    v = projections(x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        sliced_score_matching(score_g, x, v, variance_reduced=reduced),
        exact_score_matching(score_g, x),
    )


def test_score_matching_gives_gradients_for_parameters_and_works_without() -> None:
    """For s = -x/v on N(0, 1): L = -1/v + 1/(2 v^2), dL/dv = 1/v^2 - 1/v^3."""
    x, p = normal()
    v = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    (p * exact_score_matching(lambda u: -u / v, x)).sum().backward()
    assert float(v.grad) == pytest.approx(1 / 4 - 1 / 8, abs=1e-9)
    with torch.no_grad():
        value = mean(p, exact_score_matching(lambda u: -u / v, x))
    assert value == pytest.approx(-1 / 2 + 1 / 8, abs=1e-9)


# --- denoising ---------------------------------------------------------------------------------


def perturbations(sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Points ``x0``, ``z`` of a product grid, and weights of the mixture times N(0, 1)."""
    x0, h = line(5.0, 801)
    z, pz = normal(321, 8.0)
    weights = (h * log_g(x0).exp())[:, None] * pz
    return x0.repeat_interleave(len(z), 0), z.repeat(len(x0), 1), weights.flatten()


@pytest.mark.parametrize(
    ("sigma", "floor", "ncsn"),
    [(0.5, 1.052149, 0.263037), (1.0, 0.226973, 0.226973), (2.0, 0.053160, 0.212642)],
)
def test_denoising_score_matching_floors(sigma: float, floor: float, ncsn: float) -> None:
    """1/2 E|s + z/sigma|^2, and NCSN's sigma^2 times it, of the exact score."""
    x0, z, p = perturbations(sigma)
    loss = denoising_score_matching(denoise_g, x0, full(x0, sigma), z, 1.0, "sigma2")
    half = 0.5 * mean(p, loss)
    assert half == pytest.approx(ncsn, abs=1e-6)
    assert half / sigma**2 == pytest.approx(floor, abs=1e-6)


def test_no_denoiser_is_below_the_floor() -> None:
    x0, z, p = perturbations(1.0)
    one = full(x0, 1.0)
    best = mean(p, denoising_score_matching(denoise_g, x0, one, z, 1.0))
    for a in (-0.05, 0.05):
        loss = denoising_score_matching(
            lambda x, s, a=a: denoise_g(x, s) + a * torch.cos(x), x0, one, z, 1.0
        )
        assert mean(p, loss) > best + 1e-4


def test_edm_weights_make_the_first_loss_one() -> None:
    """A network that puts out zero has D = c_skip x: its error on N(0, s_d^2) is 1/weight."""
    x0, p = normal(401)
    sd = 0.7
    for sigma in (0.05, 0.7, 20.0):
        z, pz = normal(401)
        a, b = sd * x0.repeat_interleave(len(z), 0), z.repeat(len(x0), 1)
        loss = denoising_score_matching(
            lambda x, s: sd**2 / (expand(s, x) ** 2 + sd**2) * x, a, full(a, sigma), b, sd
        )
        assert mean(torch.outer(p, pz).flatten(), loss) == pytest.approx(1, abs=1e-9)


def test_likelihood_weighting_integrates_to_the_drop_of_the_kl_divergence() -> None:
    """KL(p_0|q_0) - KL(p_1|q_1) = 1/2 int g^2 E|s_p - s_q|^2 dt on N(0, 1) and N(0, 9)."""
    sde = VE(0.1, 5.0)
    n, u = 200_000, 9.0
    generator = torch.Generator().manual_seed(0)
    t = (torch.arange(n) + torch.rand(n, generator=generator)).double() / n
    x0 = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    z = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    sigma, g = sde.sigma(t), sde.diffusion(t)

    def gaussian(v: float):
        return lambda x, s: v / (v + expand(s, x) ** 2) * x

    def loss(v: float) -> Tensor:
        return denoising_score_matching(gaussian(v), x0, sigma, z, 1.0, "likelihood", g)

    def kl(time: float) -> float:
        s2 = float(sde.sigma(time)) ** 2
        ratio = (1 + s2) / (u + s2)
        return 0.5 * (ratio - 1 - math.log(ratio))

    within(0.5 * (loss(u) - loss(1.0)), kl(0.0) - kl(1.0))


@pytest.mark.parametrize(("sigma", "mmse"), [(0.5, 0.131518), (1.0, 0.453946), (2.0, 1.701136)])
def test_sure_is_the_error_of_the_best_denoiser_and_of_wrong_ones(
    sigma: float, mmse: float
) -> None:
    y, h = line(30.0)
    p = h * log_g(y, sigma).exp()
    v = projections(y, torch.Generator().manual_seed(0))
    level = full(y, sigma)
    # printed as sigma^2 (1 - sigma^2 J) with J to six digits
    best = mean(p, sure(denoise_g, y, level, v))
    assert best == pytest.approx(mmse, abs=1e-6 * max(1, sigma**4))
    half = mean(p, sure(lambda x, _: 0.5 * x, y, level, v))
    assert half == pytest.approx(0.25 * 4.25 + 0.25 * sigma**2, abs=1e-6)
    x0, z, q = perturbations(sigma)
    truth = mean(q, (torch.tanh(x0 + sigma * z) - x0)[:, 0] ** 2)
    wrong = mean(p, sure(lambda x, _: torch.tanh(x), y, level, v))
    assert wrong == pytest.approx(truth, abs=1e-6)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_sure_is_unbiased_for_every_fixed_image(kind: str) -> None:
    n, sigma = 40_000, 0.7
    generator = torch.Generator().manual_seed(2)
    x0 = torch.randn(1, 2, 2, dtype=torch.float64).expand(n, 2, 2)
    y = x0 + sigma * torch.randn(n, 2, 2, generator=generator, dtype=torch.float64)
    v = projections(y, generator, kind)
    truth = (field(y) - x0).square().mean(dim=(1, 2))
    within(sure(lambda x, _: field(x), y, full(y, sigma), v) - truth, 0.0)


# --- levels ------------------------------------------------------------------------------------


def test_levels_are_lognormal_stratified_and_clipped() -> None:
    generator = torch.Generator().manual_seed(0)
    levels = lognormal_levels(4096, -1.0, 1.5, (0.01, 50.0), generator)
    assert float(levels.log().mean()) == pytest.approx(-1.0, abs=0.01)
    assert float(levels.log().std()) == pytest.approx(1.5, rel=0.02)
    assert float(levels.min()) >= 0.01 - 1e-8
    few = lognormal_levels(4, -1.0, 1.5, (0.01, 50.0), generator).sort().values
    assert float(few[0]) < math.exp(-1.0) < float(few[-1])


def test_the_ladder_is_geometric_and_its_levels_are_drawn_alike() -> None:
    ladder = geometric_levels((0.5, 2.0), 3)
    torch.testing.assert_close(ladder, torch.tensor([2.0, 1.0, 0.5]))
    drawn = draw_levels(ladder, 300, torch.Generator().manual_seed(0))
    assert [int((drawn == v).sum()) for v in ladder] == [100, 100, 100]
    assert not torch.equal(drawn, drawn.sort().values)
    torch.testing.assert_close(geometric_levels((0.5, 0.5), 4), torch.full((4,), 0.5))


# --- energies ----------------------------------------------------------------------------------

EPSILON = 0.1
FIXED = (1 - math.sqrt(1 - 2 * EPSILON)) / EPSILON


def pairs() -> tuple[Tensor, Tensor, Tensor]:
    """Independent standard normals ``x``, ``z`` by quadrature, and weights."""
    x, p = normal(161, 8.0)
    return x.repeat_interleave(len(x), 0), x.repeat(len(x), 1), torch.outer(p, p).flatten()


def test_langevin_step_and_its_stationary_variance() -> None:
    x, z, p = pairs()
    root = 1 / math.sqrt(1 - EPSILON / 2)
    after = langevin_chain(lambda u: -u, root * x, EPSILON, z[None])
    torch.testing.assert_close(after, (1 - EPSILON) * root * x + math.sqrt(0.2) * z)
    assert mean(p, after[:, 0] ** 2) == pytest.approx(1 / (1 - EPSILON / 2), abs=1e-9)


def gradient(loss, theta: float) -> float:
    """d/dtheta of an expected loss for E = theta x^2 / 2."""
    value = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    loss(lambda u: value * u.square().sum(dim=1) / 2).backward()
    return float(value.grad)


def test_contrastive_divergence_vanishes_at_its_biased_fixed_point() -> None:
    x, z, p = pairs()
    assert pytest.approx(1.0557, abs=5e-5) == FIXED

    def loss(energy):
        return (p * contrastive_divergence(energy, x, EPSILON, z[None])).sum()

    assert gradient(loss, FIXED) == pytest.approx(0, abs=1e-9)
    for theta in (0.8, 1.0, 1.3):  # E_data x^2/2 - E_1 x^2/2, in closed form
        after = (1 - EPSILON * theta) ** 2 + 2 * EPSILON
        assert gradient(loss, theta) == pytest.approx(0.5 * (1 - after), abs=1e-9)


def test_persistent_chains_lead_to_the_stationary_law_of_langevin() -> None:
    x, z, p = pairs()
    for theta in (0.7, 1.0, FIXED):
        variance = 1 / (theta * (1 - EPSILON * theta / 2))
        moved = []

        def loss(energy, variance=variance, moved=moved):
            value, chains = persistent_contrastive_divergence(
                energy, x, math.sqrt(variance) * x, EPSILON, z[None]
            )
            moved.append(chains)
            return (p * value).sum()

        got = gradient(loss, theta)
        assert got == pytest.approx(0.5 * (1 - variance), abs=1e-9)
        assert mean(p, moved[0][:, 0] ** 2) == pytest.approx(variance, abs=1e-9)
    assert got == pytest.approx(0, abs=1e-9)


def test_persistent_descent_ends_at_the_fixed_point() -> None:
    """Robbins-Monro from theta = 0.5 with chains that start far away."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    chains = torch.full((4000, 1), 3.0, dtype=torch.float64)
    late = []
    for k in range(400):
        x = torch.randn(4000, 1, generator=generator, dtype=torch.float64)
        z = torch.randn(1, 4000, 1, generator=generator, dtype=torch.float64)
        loss, chains = persistent_contrastive_divergence(
            lambda u, theta=theta: theta * u.square().sum(dim=1) / 2, x, chains, EPSILON, z
        )
        (slope,) = torch.autograd.grad(loss.mean(), theta)
        theta = (theta - 0.2 * slope).detach().requires_grad_(True)
        if k >= 200:
            late.append(float(theta.detach()))
    # chains forget in 1/epsilon = 10 steps: about 20 independent values of spread 0.02
    assert sum(late) / len(late) == pytest.approx(FIXED, abs=0.015)


def test_noise_contrastive_estimation_finds_the_normaliser() -> None:
    u, p = normal()
    c = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def log_noise(x: Tensor) -> Tensor:
        return -x.square().sum(dim=1) / 8 - math.log(2 * math.sqrt(2 * math.pi))

    def loss() -> Tensor:
        values = noise_contrastive_estimation(
            lambda x: -x.square().sum(dim=1) / 2 - c, log_noise, u, 2 * u
        )
        return (p * values).sum()

    for _ in range(30):  # Newton's method
        (slope,) = torch.autograd.grad(loss(), c, create_graph=True)
        (curve,) = torch.autograd.grad(slope, c)
        c = (c - slope.detach() / curve).requires_grad_(True)
    assert float(c.detach()) == pytest.approx(0.918939, abs=1e-6)


class Affine(nn.Module):
    """q = N(m, e^{2a}) by y = m + e^a z."""

    def __init__(self, m: float, a: float) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.tensor(m, dtype=torch.float64))
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def sample(self, z: Tensor) -> Tensor:
        return self.m + self.a.exp() * z

    def log_prob(self, x: Tensor) -> Tensor:
        w = (x - self.m) * (-self.a).exp()
        return (-0.5 * w**2 - self.a - 0.5 * math.log(2 * math.pi)).sum(dim=1)


def test_flow_contrastive_value_at_the_optimum() -> None:
    flow = Affine(0.0, 0.0)
    x = torch.randn(50, 1, dtype=torch.float64)
    loss = flow_contrastive_estimation(
        lambda u: -0.5 * u.square().sum(dim=1) - 0.5 * math.log(2 * math.pi),
        flow.log_prob,
        x,
        flow.sample(torch.randn(50, 1, dtype=torch.float64)),
    )
    torch.testing.assert_close(-loss, torch.full_like(loss, -2 * math.log(2)))
    assert float(-loss.detach().mean()) == pytest.approx(-1.386294, abs=1e-6)


def test_flow_contrastive_descent_raises_the_model_and_lowers_the_flow() -> None:
    """Gradients of the loss against those of the value V itself, written out."""
    flow = Affine(0.4, 0.3)
    theta = torch.tensor([1.2, 0.1], dtype=torch.float64, requires_grad=True)
    x = torch.randn(200, 1, dtype=torch.float64)
    z = torch.randn(200, 1, dtype=torch.float64)

    def log_model(u: Tensor) -> Tensor:
        return -0.5 * theta[0] * u.square().sum(dim=1) - theta[1]

    y = flow.sample(z)
    p_x, q_x, p_y, q_y = log_model(x), flow.log_prob(x), log_model(y), flow.log_prob(y)
    value = p_x - torch.logaddexp(p_x, q_x) + q_y - torch.logaddexp(p_y, q_y)
    up = torch.autograd.grad(value.mean(), [theta, flow.m, flow.a])
    loss = flow_contrastive_estimation(log_model, flow.log_prob, x, flow.sample(z)).mean()
    assert float(loss.detach()) == pytest.approx(-float(value.detach().mean()))
    down = torch.autograd.grad(loss, [theta, flow.m, flow.a])
    torch.testing.assert_close(down[0], -up[0])
    torch.testing.assert_close(down[1:], up[1:])


# --- flow --------------------------------------------------------------------------------------


def random_flow(d: int, condition: int = 0) -> RealNVP:
    torch.manual_seed(3)
    flow = RealNVP(d, layers=4, hidden=16, condition=condition).double()
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return flow


def test_flow_starts_as_the_standard_normal() -> None:
    x = torch.randn(5, 6)
    expected = torch.distributions.Normal(0, 1).log_prob(x).sum(dim=1)
    torch.testing.assert_close(RealNVP(6).log_prob(x), expected)


def test_flow_change_of_variables_is_the_jacobian_and_inverts() -> None:
    flow = random_flow(4, condition=1)
    z, c = torch.randn(3, 2, 2, dtype=torch.float64), torch.randn(3, 1, dtype=torch.float64)
    x, logdet = flow.decode(z, c)
    back, inverse = flow.encode(x, c)
    torch.testing.assert_close(back, z)
    torch.testing.assert_close(inverse, -logdet)
    assert bool(((x - z).abs() > 1e-3).all()), "every unknown moves"
    for i in range(3):
        jacobian = torch.autograd.functional.jacobian(
            lambda u, i=i: flow.decode(u, c[i : i + 1])[0], z[i : i + 1]
        )
        torch.testing.assert_close(
            logdet[i], torch.linalg.slogdet(jacobian.reshape(4, 4)).logabsdet
        )
    assert not torch.allclose(flow.decode(z, c + 1)[0], x)


def test_flow_density_integrates_to_one_and_is_that_of_its_samples() -> None:
    flow = random_flow(2)
    axis = torch.linspace(-30, 30, 601, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        p = flow.log_prob(grid).exp() * float(axis[1] - axis[0]) ** 2
        samples = flow.sample(20_000, torch.Generator().manual_seed(0))
    assert float(p.sum()) == pytest.approx(1, abs=1e-4)
    for k in range(2):
        within(samples[:, k], float((p * grid[:, k]).sum()))
        within(samples[:, k].square(), float((p * grid[:, k] ** 2).sum()))


def test_flow_refuses_what_does_not_fit() -> None:
    with pytest.raises(GeometryError, match="takes 4 unknowns and 0 conditions"):
        RealNVP(4).log_prob(torch.zeros(2, 5))
    with pytest.raises(GeometryError, match="got 4 and 0"):
        RealNVP(4, condition=1).decode(torch.zeros(2, 4))


# --- objectives of a run -----------------------------------------------------------------------

SETTING = Setting(
    sigma_range=(0.1, 10.0),
    p_mean=-1.0,
    p_std=1.0,
    levels=5,
    langevin_steps=3,
    langevin_step=0.05,
    chains=6,
    sigma_data=0.8,
)


def begin(name: str, **changes) -> Objective:
    generator = torch.Generator().manual_seed(0)
    start = 0.8 * torch.randn(20, 4, 4, generator=generator)
    values = {f: getattr(SETTING, f) for f in SETTING.__dataclass_fields__} | changes
    return OBJECTIVES[name].make(Setting(**values), start, torch.ones(20), generator)


class Counted:
    """The model of N(0, a I) images, counting calls; energies and scores are its own."""

    def __init__(self, a: float = 0.64) -> None:
        self.a = torch.tensor(a, requires_grad=True)
        self.calls = 0

    def denoise(self, x: Tensor, sigma: Tensor, pixel_mm: Tensor) -> Tensor:
        self.calls += 1
        return self.a / (self.a + expand(sigma, x) ** 2) * x

    def energy(self, x: Tensor, sigma: Tensor, pixel_mm: Tensor) -> Tensor:
        self.calls += 1
        return (x**2 / (self.a + expand(sigma, x) ** 2) / 2).flatten(1).sum(dim=1)

    def model(self) -> Model:
        return Model(self.denoise, self.energy, 0.8)


def perturbed(objective: Objective, count: int = 6) -> Perturbed:
    generator = torch.Generator().manual_seed(1)
    sigma = objective.levels(count, generator)
    x0 = 0.8 * torch.randn(count, 4, 4, generator=generator)
    z = torch.randn(count, 4, 4, generator=generator)
    return Perturbed(x0, sigma, z, torch.ones(count))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_costs_what_its_table_says(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = OBJECTIVES[name]
    objective, network = begin(name), Counted()
    passes = 1  # the backward pass of the step
    plain = torch.autograd.grad

    def grad(*arguments, **options):
        nonlocal passes
        passes += arguments[1].ndim == 3  # by images, not the SDE's own by time
        return plain(*arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    losses = objective.losses(
        network.model(), perturbed(objective), torch.Generator().manual_seed(2)
    )
    assert losses.shape == (6,)
    losses.mean().backward()
    assert bool(torch.isfinite(network.a.grad))
    assert float(network.a.grad) != 0
    given = {"d": 16, "k": SETTING.langevin_steps}
    assert network.calls == eval(entry.calls, given)
    assert passes == eval(entry.backward, given)


@pytest.mark.parametrize("name", ["dsm", "dsm-sigma2", "ncsn", "dsm-likelihood", "ism", "ssm",
                                  "ssm-vr", "sure"])  # fmt: skip
def test_every_score_objective_is_least_at_the_true_variance(name: str) -> None:
    """Images N(0, 0.64 I): the derivative by the variance vanishes there, not beside it."""

    def slopes(a: float) -> Tensor:
        objective, network = begin(name, sigma_range=(0.3, 3.0)), Counted(a)
        values = []
        generator = torch.Generator().manual_seed(5)
        for _ in range(40):
            sigma = objective.levels(64, generator)
            x0 = 0.8 * torch.randn(64, 4, 4, generator=generator)
            batch = Perturbed(x0, sigma, torch.randn(x0.shape, generator=generator), sigma)
            loss = objective.losses(network.model(), batch, generator).mean()
            values.append(torch.autograd.grad(loss, network.a)[0])
        return torch.stack(values)

    within(slopes(0.64), 0.0)
    low, high = slopes(0.5), slopes(0.8)
    assert float(low.mean()) < -3 * float(low.std()) / math.sqrt(len(low))
    assert float(high.mean()) > 3 * float(high.std()) / math.sqrt(len(high))


def test_likelihood_objective_draws_uniform_times_and_knows_their_diffusion() -> None:
    objective = begin("dsm-likelihood")
    levels = objective.levels(1000, torch.Generator().manual_seed(0))
    assert float(levels.log10().mean()) == pytest.approx(0, abs=1e-3)
    assert float(levels.log10().std()) == pytest.approx(2 / math.sqrt(12), rel=1e-2)
    g = objective.diffusion(levels)
    torch.testing.assert_close(g**2, 2 * levels**2 * math.log(100.0))
    with pytest.raises(UnsupportedError, match="single level"):
        begin("dsm-likelihood", sigma_range=(1.0, 1.0))


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n != "dsm-likelihood"])
def test_equal_ends_of_the_range_are_one_level(name: str) -> None:
    objective = begin(name, sigma_range=(0.5, 0.5))
    levels = objective.levels(6, torch.Generator().manual_seed(0))
    torch.testing.assert_close(levels, torch.full((6,), 0.5))


def test_persistent_chains_keep_their_level_and_take_turns() -> None:
    objective = begin("pcd")
    before = objective.state.clone()
    batch = perturbed(objective, 4)
    torch.testing.assert_close(batch.sigma, objective.level[:4])
    moved = dataclasses.replace(batch, sigma=3 * batch.sigma, pixel_mm=5 * batch.pixel_mm)
    seen = []

    def energy(x: Tensor, sigma: Tensor, pixel_mm: Tensor) -> Tensor:
        seen.append((sigma, pixel_mm))
        return Counted().energy(x, sigma, pixel_mm)

    objective.losses(Model(energy, energy, 0.8), moved, torch.Generator().manual_seed(0))
    chains = [s for s, p in seen if torch.equal(s, objective.level[:4]) and bool((p == 1).all())]
    assert len(chains) == len(seen) - 1, "only the images' own energy is at their conditions"
    assert not bool((objective.state[:4] == before[:4]).any())
    torch.testing.assert_close(objective.state[4:], before[4:])
    again = objective.levels(4, torch.Generator())
    torch.testing.assert_close(again, objective.level[[4, 5, 0, 1]])
    with pytest.raises(InputError, match="a chain for every image"):
        objective.levels(7, torch.Generator())


def test_nce_noise_has_the_moments_of_the_images_and_its_own_density() -> None:
    """With the model equal to the noise, every loss is 2 ln 2 whatever the images."""
    objective = begin("nce")
    covariance = objective.basis @ torch.diag(objective.eigenvalues) @ objective.basis.T

    def energy(x: Tensor, sigma: Tensor, pixel_mm: Tensor) -> Tensor:
        logs = [
            torch.distributions.MultivariateNormal(
                objective.mean.double(), (covariance + s**2 * torch.eye(16)).double()
            ).log_prob(u.flatten().double())
            for u, s in zip(x, sigma, strict=True)
        ]
        c = 16 * torch.log(math.sqrt(2 * math.pi) * torch.sqrt(sigma**2 + 0.64))
        return -torch.stack(logs).float() - c

    batch = perturbed(objective)
    losses = objective.losses(Model(energy, energy, 0.8), batch, torch.Generator().manual_seed(0))
    torch.testing.assert_close(losses, torch.full((6,), 2 * math.log(2)), rtol=1e-4, atol=1e-4)


def test_untrained_flow_is_the_untrained_network() -> None:
    """Both are N(0, sigma^2 + s_d^2) at every level, normalised: V = -2 ln 2."""
    objective = begin("fce")
    losses = objective.losses(
        Counted().model(), perturbed(objective), torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(losses, torch.full((6,), 2 * math.log(2)), rtol=1e-4, atol=1e-4)


# --- refusals ----------------------------------------------------------------------------------


def test_objectives_refuse_bad_input() -> None:
    x = torch.randn(3, 2)
    bad = x.clone()
    bad[1, 1] = float("nan")
    ones, generator = torch.ones(3), torch.Generator()
    identity = lambda u, *_: u  # noqa: E731
    quadratic = lambda u: u.square().sum(dim=1) / 2  # noqa: E731
    with pytest.raises(UnsupportedError, match="use sliced score matching"):
        exact_score_matching(identity, torch.zeros(1, 40, 40))
    for call in (
        lambda: exact_score_matching(identity, bad),
        lambda: sliced_score_matching(identity, bad, x),
        lambda: denoising_score_matching(identity, bad, ones, x, 1.0),
        lambda: sure(identity, bad, ones, x),
        lambda: contrastive_divergence(quadratic, bad, 0.1, x[None]),
        lambda: noise_contrastive_estimation(quadratic, quadratic, x, bad),
    ):
        with pytest.raises(InputError, match="NaN"):
            call()
    for level in (0.0, -1.0, float("inf")):
        with pytest.raises(InputError, match="positive and finite"):
            denoising_score_matching(identity, x, torch.tensor([1.0, level, 1.0]), x, 1.0)
    with pytest.raises(InputError, match="one a sample"):
        sure(identity, x, torch.ones(2), x)
    with pytest.raises(InputError, match="shape"):
        denoising_score_matching(identity, x, ones, x[:, :1], 1.0)
    with pytest.raises(InputError, match="projection vectors"):
        sliced_score_matching(identity, x, x[:2])
    with pytest.raises(InputError, match="projection vectors"):
        sure(identity, x, ones, x[:2])
    with pytest.raises(InputError, match="floating-point"):
        exact_score_matching(identity, torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(InputError, match="persistent chains"):
        persistent_contrastive_divergence(quadratic, x, x[:2], 0.1, x[None])
    with pytest.raises(InputError, match="as many noise samples"):
        noise_contrastive_estimation(quadratic, quadratic, x, x[:2])
    with pytest.raises(InputError, match="positive step sizes"):
        langevin_chain(identity, x, 0.0, x[None])
    with pytest.raises(ReconError, match="without detach"):
        exact_score_matching(lambda u: u.detach(), x)
    with pytest.raises(ReconError, match="one number a batch element"):
        energy_score(lambda u: u, x)
    with pytest.raises(ReconError, match="'likelihood' with the diffusion"):
        weight(ones, 1.0, "likelihood")
    with pytest.raises(ReconError, match="'rademacher' or 'gaussian'"):
        projections(x, generator, "uniform")
    with pytest.raises(ReconError, match="0 < low <= high"):
        geometric_levels((0.0, 1.0), 3)


@pytest.mark.parametrize("slope", [-5.0, float("nan")])
def test_diverging_negatives_are_an_error(slope: float) -> None:
    x = torch.randn(3, 2)
    noise = torch.randn(50, 3, 2)
    with pytest.raises(NumericalError, match="lower the step size"):
        contrastive_divergence(lambda u: slope * u.square().sum(dim=1), x, 0.5, noise)


def test_public_names_of_the_module_exist() -> None:
    for name in objectives.__all__:
        assert hasattr(objectives, name)
