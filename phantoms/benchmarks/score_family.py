r"""The score-SDE family against closed forms: ``python -m phantoms.benchmarks.score_family``.

Every objective's minimum, floor or fixed point, every sampler's mode weights and order, and every
likelihood's error, each beside the value that theory gives, with its cost.  The toys:

* **G**, the mixture :math:`0.3\,N(-2, 1/4) + 0.7\,N(2, 1/4)`, with the Fisher informations
  :math:`J_\sigma = E\,s_\sigma^2` of its noisy densities;
* **N**, standard normal numbers.

Expectations are integrals on grids where that is possible, and Monte-Carlo means with three
standard errors as tolerance elsewhere.  ``--out`` writes the table of docs/score-family.md.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inverse.priors import (
    Denoiser,
    GaussianPrior,
    MixturePrior,
    NetworkConfig,
    NetworkPrior,
    PriorCard,
    load_prior,
)
from inverse.sampling import (
    RK45,
    SAMPLERS,
    Heun,
    Likelihood,
    Noise,
    bits_per_dim,
    decode,
    dequantise,
    encode,
    euler_maruyama,
    log_likelihood,
)
from inverse.sde import SDE, VE, VP, SubVP
from inverse.training import objectives as o
from inverse.training.data import Augmentation, ImageSet
from inverse.training.flow import RealNVP
from inverse.training.loop import TrainConfig, train
from phantoms.slices import chest_slices

J = {0.0: 3.994267, 0.5: 1.895702, 1.0: 0.546054, 2.0: 0.143679}
"""Fisher information of G with noise of level sigma, by quadrature to seven digits."""


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        group: section of the table.
        method: what is checked.
        quantity: which of its properties.
        expected: value in closed form; ``None`` where the measured one stands by itself.
        measured: value found.
        tolerance: largest difference that is accepted.
        calls: calls of the score or denoiser, each on a whole batch.
        backward: backward passes through it.
        seconds: wall-clock time.
    """

    group: str
    method: str
    quantity: str
    expected: float | None
    measured: float
    tolerance: float
    calls: int
    backward: int
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether measured and expected agree."""
        return self.expected is None or abs(self.measured - self.expected) <= self.tolerance


# --- counting ----------------------------------------------------------------------------------


class _Tick(torch.autograd.Function):
    """The identity, which counts backward passes."""

    @staticmethod
    def forward(ctx: object, x: Tensor, cost: Cost) -> Tensor:
        ctx.cost = cost  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None]:
        cost: Cost = ctx.cost  # type: ignore[attr-defined]
        cost.backward += 1
        return gradients[0], None


class Cost:
    """Calls, backward passes and seconds of what runs inside ``with cost.timed()``."""

    def __init__(self) -> None:
        self.calls = self.backward = 0
        self.seconds = 0.0

    def count(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The same function, counted."""

        def counted(*arguments: Tensor) -> Tensor:
            self.calls += 1
            value = function(*arguments)
            return _Tick.apply(value, self) if value.requires_grad else value

        return counted

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Adds the time spent inside."""
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started


class _Counted(Denoiser):
    """A denoiser whose calls are counted."""

    def __init__(self, inner: Denoiser, cost: Cost) -> None:
        super().__init__(inner.sde)
        self.inner = inner
        self._denoise = cost.count(inner.denoise)

    def denoise(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        return self._denoise(x_t, t)


# --- the toys ----------------------------------------------------------------------------------


def mixture(sde: SDE) -> MixturePrior:
    """The toy G."""
    return MixturePrior(
        torch.tensor([0.3, 0.7]),
        torch.tensor([[-2.0], [2.0]]),
        torch.full((2, 1, 1), 0.25),
        (1,),
        sde,
    )


def noisy_score(sigma: float) -> Callable[[Tensor], Tensor]:
    """Score of G with noise of level ``sigma``, ``(n, 1) -> (n, 1)``, exact."""
    v = 0.25 + sigma**2
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    means = torch.tensor([-2.0, 2.0], dtype=torch.float64)

    def score(x: Tensor) -> Tensor:
        share = torch.softmax(weights.log() - (x - means) ** 2 / (2 * v), dim=1)
        return ((share * means).sum(dim=1, keepdim=True) - x) / v

    return score


def density(x: Tensor, sigma: float) -> Tensor:
    """Density of G with noise of level ``sigma`` at ``(n, 1)``, shape ``(n,)``."""
    s = math.sqrt(0.25 + sigma**2)
    parts = [
        w * torch.exp(-0.5 * ((x[:, 0] - m) / s) ** 2) / (s * math.sqrt(2 * math.pi))
        for w, m in ((0.3, -2.0), (0.7, 2.0))
    ]
    return parts[0] + parts[1]


def line(sigma: float, count: int) -> tuple[Tensor, Tensor]:
    """Points ``(n, 1)`` and weights ``(n,)`` that integrate against G with noise ``sigma``.

    The trapezoid rule converges exponentially for densities that vanish at the ends.
    """
    end = 2 + 12 * math.sqrt(0.25 + sigma**2)
    x = torch.linspace(-end, end, count, dtype=torch.float64)[:, None]
    return x, density(x, sigma) * (2 * end / (count - 1))


def plane(sigma: float, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clean points and standard normal noise, ``(n, 1)`` each, with joint weights ``(n,)``."""
    x, wx = line(0.0, count)
    z = torch.linspace(-9, 9, count, dtype=torch.float64)
    wz = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (18 / (count - 1))
    x0 = x.expand(count, count).reshape(-1, 1)
    return x0, z.repeat(count)[:, None], torch.outer(wx, wz).reshape(-1)


def draws(count: int, seed: int) -> Tensor:
    """Samples of G, ``(n, 1)``, float64."""
    g = torch.Generator().manual_seed(seed)
    side = torch.where(torch.rand(count, 1, generator=g, dtype=torch.float64) < 0.3, -2.0, 2.0)
    return side + 0.5 * torch.randn(count, 1, generator=g, dtype=torch.float64)


# --- objectives --------------------------------------------------------------------------------


def _mean(values: Tensor) -> tuple[float, float]:
    """Mean and three standard errors."""
    return float(values.mean()), 3 * float(values.std()) / math.sqrt(len(values))


def score_matching(quick: bool) -> Iterator[Row]:
    """Hyvarinen, sliced, denoising, likelihood weighting and Stein."""
    n, many = (400, 20_000) if quick else (2000, 400_000)
    group = "objective"

    def wrong(x: Tensor) -> Tensor:
        return noisy_score(0.0)(x) + 0.3 * torch.sin(x)

    cost = Cost()
    x, w = line(0.0, n)
    with cost.timed():
        least = float(w @ o.exact_score_matching(cost.count(noisy_score(0.0)), x).detach())
    yield Row(
        group, "ISM", "minimum -J/2", -J[0.0] / 2, least, 1e-6,
        cost.calls, cost.backward, cost.seconds,
    )  # fmt: skip
    cost = Cost()
    with cost.timed():
        gap = float(w @ o.exact_score_matching(cost.count(wrong), x).detach()) - least
    half = 0.5 * 0.09 * float(w @ torch.sin(x[:, 0]) ** 2)
    yield Row(
        group, "ISM", "gap = E‖s' - s‖²/2", half, gap, 1e-8,
        cost.calls, cost.backward, cost.seconds,
    )  # fmt: skip
    sample = draws(many, 0)
    exact = o.exact_score_matching(noisy_score(0.0), sample).detach()
    for name, reduced in (("SSM", False), ("SSM-VR", True)):
        for kind in ("gaussian", "rademacher"):
            v = o.projections(sample, torch.Generator().manual_seed(1), kind)
            cost = Cost()
            with cost.timed():
                loss = o.sliced_score_matching(
                    cost.count(noisy_score(0.0)), sample, v, variance_reduced=reduced
                ).detach()
            value, tolerance = _mean(loss - exact)
            yield Row(
                group, name, f"difference from ISM, {kind}", 0.0, value, max(tolerance, 1e-12),
                cost.calls, cost.backward, cost.seconds,
            )  # fmt: skip
    for sigma in (0.5, 1.0, 2.0):
        x0, z, w = plane(sigma, n)
        score = noisy_score(sigma)
        level = torch.full((len(x0),), sigma, dtype=torch.float64)
        floor = 1 / sigma**2 - J[sigma]
        for name, scale in (("DSM", 0.5 / sigma**2), ("NCSN", 0.5)):
            cost = Cost()
            denoise = cost.count(lambda u, _, f=score, s=sigma: u + s**2 * f(u))
            with cost.timed():
                loss = o.denoising_score_matching(denoise, x0, level, z, 1.0, "sigma2")
            expected = 0.5 * floor * (1.0 if name == "DSM" else sigma**2)
            yield Row(
                group, name, f"floor at sigma {sigma:g}", expected, scale * float(w @ loss), 1e-6,
                cost.calls, cost.backward, cost.seconds,
            )  # fmt: skip
        y, wy = line(sigma, n)
        level = torch.full((len(y),), sigma, dtype=torch.float64)
        for quantity, change in (("MMSE", 0.0), ("risk of a wrong denoiser", 0.2)):
            cost = Cost()
            denoise = cost.count(
                lambda u, _, f=score, s=sigma, c=change: u + s**2 * f(u) + c * torch.cos(u)
            )
            with cost.timed():
                risk = o.sure(denoise, y, level, torch.ones_like(y)).detach()
            expected = sigma**2 * (1 - sigma**2 * J[sigma])
            expected += change**2 * float(wy @ torch.cos(y[:, 0]) ** 2)
            yield Row(
                group, "SURE", f"{quantity}, sigma {sigma:g}", expected, float(wy @ risk),
                1e-6 * (1 + sigma**4), cost.calls, cost.backward, cost.seconds,
            )  # fmt: skip
    yield _likelihood_weighting(400)


def _likelihood_weighting(n: int) -> Row:
    """KL(p_0 || q_0) - KL(p_T || q_T) is half the g^2-weighted score error; p, q Gaussian."""
    sde, variance, other = VE(0.01, 20.0), 1.0, 1.7
    u, weights = _legendre(200)
    levels = sde.noise_level(u)
    z = torch.linspace(-9, 9, n, dtype=torch.float64)
    wz = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (18 / (n - 1))
    total = 0.0
    cost = Cost()
    with cost.timed():
        for level, t, weight in zip(levels, u, weights, strict=True):
            s = float(level)
            x0 = math.sqrt(variance) * z[:, None]

            # the excess over the floor: the error in the mean of x0 given x, integrated over x
            def loss(v: float, x0: Tensor = x0, s: float = s, t: Tensor = t) -> float:
                denoise = cost.count(lambda x, _: x * v / (v + s**2))
                x0s = x0.expand(n, n).reshape(-1, 1)
                zs = z.repeat(n)[:, None]
                each = o.denoising_score_matching(
                    denoise, x0s, torch.full((n * n,), s, dtype=torch.float64), zs, 1.0,
                    "likelihood", sde.diffusion(t).expand(n * n),
                )  # fmt: skip
                return float(torch.outer(wz, wz).reshape(-1) @ each)

            total += 0.5 * float(weight) * (loss(other) - loss(variance))

    def kl(v: float, q: float) -> float:
        return 0.5 * (v / q - 1 - math.log(v / q))

    low, high = sde.sigma_min**2, sde.sigma_max**2
    expected = kl(variance + low, other + low) - kl(variance + high, other + high)
    return Row(
        "objective", "DSM, likelihood weights", "drop of KL along the process (N)", expected,
        total, 1e-5, cost.calls, cost.backward, cost.seconds,
    )  # fmt: skip


def _legendre(count: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights on (0, 1), float64."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)


def energies(quick: bool) -> Iterator[Row]:
    """Contrastive divergence, NCE and FCE at their fixed points."""
    n = 40_000 if quick else 1_000_000
    group = "objective"
    g = torch.Generator().manual_seed(2)
    x = torch.randn(n, 1, generator=g, dtype=torch.float64)
    x = x / x.square().mean().sqrt()
    for epsilon in (0.1, 0.02):
        # antithetic noise of unit variance: neither its variance nor its products with x err
        z = torch.randn(n, 1, generator=g, dtype=torch.float64)
        z = z / z.square().mean().sqrt()
        noise, twice = torch.cat([z, -z])[None], torch.cat([x, x])
        theta = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        cost = Cost()

        def energy(u: Tensor, theta: Tensor = theta, cost: Cost = cost) -> Tensor:
            return cost.count(lambda w: theta * w[:, 0] ** 2 / 2)(u)

        with cost.timed():
            for _ in range(60):
                loss = o.contrastive_divergence(energy, twice, epsilon, noise).mean()
                (slope,) = torch.autograd.grad(loss, theta)
                # Newton: the slope of the condition in theta is epsilon, nearly
                theta.data += -slope / epsilon
        fixed = (1 - math.sqrt(1 - 2 * epsilon)) / epsilon
        yield Row(
            group, "CD-1", f"fixed point, epsilon {epsilon:g} (N)", fixed, float(theta.detach()),
            1e-4, cost.calls // 60, cost.backward // 60, cost.seconds / 60,
        )  # fmt: skip
    yield _persistent(quick)
    cost = Cost()
    c = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    y = 1.5 * torch.randn(n, 1, generator=g, dtype=torch.float64)

    def log_noise(u: Tensor) -> Tensor:
        return -0.5 * (u[:, 0] / 1.5) ** 2 - math.log(1.5 * math.sqrt(2 * math.pi))

    log_model = cost.count(lambda u: -0.5 * u[:, 0] ** 2 - c)
    with cost.timed():
        for _ in range(40):
            loss = o.noise_contrastive_estimation(log_model, log_noise, x, y).mean()
            (slope,) = torch.autograd.grad(loss, c, create_graph=True)
            (curve,) = torch.autograd.grad(slope, c)
            c.data -= slope.detach() / curve
    yield Row(
        group, "NCE", "log-normaliser of exp(-x²/2) (N)", 0.5 * math.log(2 * math.pi),
        float(c.detach()), 3 * 2 / math.sqrt(n), cost.calls // 40, cost.backward // 40,
        cost.seconds / 40,
    )  # fmt: skip
    flow = RealNVP(2, layers=4)
    z = torch.randn(n, 2, generator=g)
    cost = Cost()
    with cost.timed(), torch.no_grad():
        y = flow.sample(n, g)
        loss = o.flow_contrastive_estimation(cost.count(flow.log_prob), flow.log_prob, z, y)
    yield Row(
        group, "FCE", "value at the optimum, -2 ln 2", -2 * math.log(2), -float(loss.mean()), 1e-6,
        cost.calls, cost.backward, cost.seconds,
    )  # fmt: skip


def _persistent(quick: bool) -> Row:
    """Persistent CD on N: chains relax to Langevin's own law, whose variance must be one."""
    n, steps, epsilon = (20_000, 300, 0.1) if quick else (200_000, 600, 0.1)
    g = torch.Generator().manual_seed(4)
    x = torch.randn(n, 1, generator=g, dtype=torch.float64)
    x = (x - x.mean()) / x.std()
    chains = torch.randn(n, 1, generator=g, dtype=torch.float64)
    theta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    cost = Cost()
    tail = []
    with cost.timed():
        for k in range(steps):
            noise = torch.randn(1, n, 1, generator=g, dtype=torch.float64)
            energy = cost.count(lambda u: theta * u[:, 0] ** 2 / 2)
            loss, chains = o.persistent_contrastive_divergence(energy, x, chains, epsilon, noise)
            (slope,) = torch.autograd.grad(loss.mean(), theta)
            theta.data -= 0.2 * slope
            if k >= steps // 2:
                tail.append(float(theta.detach()))
    fixed = (1 - math.sqrt(1 - 2 * epsilon)) / epsilon
    return Row(
        "objective", "persistent CD", f"fixed point, epsilon {epsilon:g} (N)", fixed,
        sum(tail) / len(tail), 6 / math.sqrt(n), cost.calls // steps, cost.backward // steps,
        cost.seconds / steps,
    )  # fmt: skip


# --- samplers ----------------------------------------------------------------------------------


def samplers(quick: bool) -> Iterator[Row]:
    """Mode weights of G under every sampler and process, and orders of convergence."""
    n = 4000 if quick else 20_000
    tolerance = 0.02 if not quick else 0.03
    for name, sampler in SAMPLERS.items():
        for sde in (VE(0.01, 50.0), VP(), SubVP()):
            if name == "langevin" and not isinstance(sde, VE):
                continue  # one level: the process makes no difference
            cost = Cost()
            options: dict[str, Any] = {}
            if name == "langevin":
                g = torch.Generator().manual_seed(9)
                even = torch.rand(n, 1, generator=g, dtype=torch.float64) < 0.5
                options = {"start": torch.where(even, -2.0, 2.0).to(torch.float64)}
            if name == "annealed-langevin":
                options = {"steps": 4000}
            noise = _noise(n, seed=3)
            with cost.timed(), torch.no_grad():
                x = sampler.run(_Counted(mixture(sde), cost), noise, **options)
            left = float((x < 0).double().mean())
            plain = name == "langevin"
            yield Row(
                "sampler", sampler.title, f"weight of the left mode, {type(sde).__name__}"
                + (", started half and half: documented failure" if plain else ""),
                0.5 if plain else 0.3, left, tolerance, cost.calls, cost.backward, cost.seconds,
            )  # fmt: skip
    yield from _orders()
    yield _stationary(n)


def _noise(count: int, seed: int) -> Callable[..., Tensor]:
    """One generator for many one-dimensional samples."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(count, 1, generator=generator, dtype=torch.float64)


def _weak_error(denoiser: Denoiser, steps: int) -> float:
    """Euler-Maruyama's error in the variance of N(0, 1/4), propagated exactly.

    The step is linear in the iterate and in the noise.  It ends short of ``t = 0``, where errors
    of both signs cancel.
    """
    sde = denoiser.sde
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    times = torch.linspace(1.0, 0.4, steps + 1, dtype=torch.float64)
    exact = sde.alpha(times) ** 2 * 0.25 + sde.sigma(times) ** 2
    v = float(exact[0])
    for t, s in zip(times[:-1], times[1:], strict=True):
        gain = float(euler_maruyama(sde, one, denoiser.denoise(one, t), t, s, zero))
        spread = float(euler_maruyama(sde, zero, denoiser.denoise(zero, t), t, s, one))
        v = gain**2 * v + spread**2
    return abs(v - float(exact[-1]))


def _strong_error(denoiser: Denoiser, steps: int) -> float:
    """Heun's error in the image of the latent 1 on N(0, 1/4)."""
    one = torch.ones(1, 1, dtype=torch.float64)
    exact = decode(denoiser, one, solver=RK45(1e-12, 1e-12))
    return float((decode(denoiser, one, solver=Heun(steps)) - exact).abs())


def _orders() -> Iterator[Row]:
    """Slopes of the error in the step on a Gaussian."""
    for sde in (VE(0.01, 5.0), VP(), SubVP()):
        prior = GaussianPrior(0.0, torch.tensor([[0.25]], dtype=torch.float64), (1,), sde)
        for name, quantity, order, error, steps in (
            ("Euler-Maruyama", "weak order", 1.0, _weak_error, 400),
            ("probability-flow ODE, Heun", "order", 2.0, _strong_error, 100),
        ):
            cost = Cost()
            counted = _Counted(prior, cost)
            with cost.timed(), torch.no_grad():
                slope = math.log2(error(counted, steps) / error(counted, 2 * steps))
            yield Row(
                "sampler", name, f"{quantity}, {type(sde).__name__}", order, slope, 0.1,
                cost.calls, cost.backward, cost.seconds,
            )  # fmt: skip


def _stationary(n: int) -> Row:
    """Langevin's stationary variance on N(0, 1)."""
    epsilon, level = 0.4, 1e-3
    prior = GaussianPrior(
        0.0, torch.tensor([[1.0 - level**2]], dtype=torch.float64), (1,), VE(level, 2.0)
    )
    cost = Cost()
    with cost.timed(), torch.no_grad():
        x = SAMPLERS["langevin"].run(
            _Counted(prior, cost), _noise(n, 6), steps=60, epsilon=epsilon
        )
    v = 1 / (1 - epsilon / 2)
    return Row(
        "sampler", SAMPLERS["langevin"].title, "stationary variance 1/(1 - ε/2), ε = 0.4 (N)", v,
        float(x.var()), 3 * v * math.sqrt(2 / n), cost.calls, cost.backward, cost.seconds,
    )  # fmt: skip


# --- likelihood --------------------------------------------------------------------------------


def likelihood(quick: bool) -> Iterator[Row]:
    """Largest errors of log p on G, split by their cause; encode and decode."""
    count = 21 if quick else 81
    points = torch.linspace(-3.5, 3.5, count, dtype=torch.float64)[:, None]
    for sde, expected in (
        (VE(0.01, 50.0), 0.054), (VE(0.01, 5.0), 1.0), (VP(), 0.017), (SubVP(), 0.017),
    ):  # fmt: skip
        prior = mixture(sde)
        label = f"{type(sde).__name__}" + (
            f", σ_max {sde.sigma_max:g}" if isinstance(sde, VE) else ""
        )
        truth = prior.log_density(points, sde.t_min)
        cost = Cost()
        with cost.timed():
            found = log_likelihood(_Counted(prior, cost), points, divergence="exact")
        error = float((found.nats - truth).abs().max())
        yield Row(
            "likelihood", "log p, exact divergence", f"largest error in nats, {label}", expected,
            error, 0.1 * expected + 0.002, cost.calls, cost.backward, cost.seconds,
        )  # fmt: skip
        cost = Cost()
        with cost.timed():
            repaired = _with_true_end(_Counted(prior, cost), prior, points)
        yield Row(
            "likelihood", "of it: solver, rtol 1e-5", f"largest error with the true p_T, {label}",
            0.0, float((repaired.nats - truth).abs().max()), 2e-3,
            cost.calls, cost.backward, cost.seconds,
        )  # fmt: skip
    yield from _hutchinson(quick)
    inside = points[points.abs() >= 1.0].reshape(-1, 1)
    for rtol in (1e-5, 1e-8):
        sde = VE(0.01, 50.0)
        cost = Cost()
        counted = _Counted(mixture(sde), cost)
        solver = RK45(rtol, rtol)
        with cost.timed():
            back = decode(counted, encode(counted, inside, solver=solver), solver=solver)
        yield Row(
            "likelihood", "encode, decode",
            f"largest round-trip error within two deviations of a mode, rtol {rtol:g}", 0.0,
            float((back - inside).abs().max()), 100 * rtol, cost.calls, cost.backward,
            cost.seconds,
        )  # fmt: skip
    uniform = bits_per_dim(torch.zeros(1, dtype=torch.float64), 10, bin_width=1 / 256, scale=1.0)
    yield Row(
        "likelihood", "bits/dim", "uniform density on [0, 1), 256 levels", 8.0, float(uniform),
        1e-12, 0, 0, 0.0,
    )  # fmt: skip


def _with_true_end(denoiser: Denoiser, prior: MixturePrior, x: Tensor) -> Likelihood:
    """The likelihood with the exact density of ``x_T``: what is left is the solver's error."""
    return log_likelihood(
        denoiser, x, divergence="exact", log_prior=lambda end: prior.log_density(end, 1.0)
    )


def _hutchinson(quick: bool) -> Iterator[Row]:
    """Random probes against the exact trace on a correlated Gaussian of eight numbers."""
    i = torch.arange(8, dtype=torch.float64)
    covariance = torch.exp(-((i[:, None] - i) ** 2) / 8) + 0.05 * torch.eye(8, dtype=torch.float64)
    prior = GaussianPrior(0.0, covariance, (8,), VE(0.01, 50.0))
    n = 500 if quick else 4000
    x = prior.sample(1, torch.Generator().manual_seed(0)).to(torch.float64)
    exact = log_likelihood(prior, x, divergence="exact")
    generator = torch.Generator().manual_seed(1)
    for kind in ("rademacher", "gaussian"):
        cost = Cost()
        with cost.timed():
            found = log_likelihood(
                _Counted(prior, cost),
                x.expand(n, 8).clone(),
                lambda: torch.randn(n, 8, generator=generator, dtype=torch.float64),  # type: ignore[arg-type]
                divergence=kind,
            )
        value, tolerance = _mean(found.nats - exact.nats)
        spread = float((found.nats - exact.nats).std())
        yield Row(
            "likelihood", f"Hutchinson, {kind}", f"bias in nats (sd of one probe {spread:.2f})",
            0.0, value, tolerance, cost.calls, cost.backward, cost.seconds,
        )  # fmt: skip


# --- images ------------------------------------------------------------------------------------

SIDE, PIXEL_MM = 32, (10.0, 11.0)
"""Chest phantoms small enough to learn in a minute."""


def small_prior(folder: Path, steps: int) -> tuple[NetworkPrior, ImageSet]:
    """A prior of chest phantoms trained here, and held-out phantoms.

    Args:
        folder: for the run and the prior.
        steps: optimiser steps.
    """
    card = PriorCard(
        name="chest-32",
        modality="CT",
        unit="HU",
        offset=-500.0,
        scale=500.0,
        value_range=(0.0, 0.0),
        pixel_mm_range=PIXEL_MM,
        shape=(SIDE, SIDE),
        sigma_range=(0.01, 80.0),
    )
    held = chest_slices(range(300, 308), size=SIDE, pixel_mm=PIXEL_MM)
    train(
        [chest_slices(range(1, 81), size=SIDE, pixel_mm=PIXEL_MM)],
        held,
        NetworkConfig(widths=(32, 48), blocks=1, embedding=64, patch=2, pixel_mm=10.5),
        TrainConfig(steps=steps, batch=32, crop=SIDE, lr=3e-3, warmup=30, p_mean=-0.8),
        card,
        folder,
        folder / "chest-32.safetensors",
        augmentation=Augmentation(size=SIDE, pixel_mm=PIXEL_MM),
    )
    return load_prior(folder / "chest-32.safetensors"), held


def images(quick: bool) -> Iterator[Row]:
    """Bits a dimension of held-out phantoms, and of the same pixels in another order."""
    with TemporaryDirectory() as folder:
        prior, held = small_prior(Path(folder), 150 if quick else 900)
    x = (torch.stack([torch.from_numpy(i) for i in held.images]) - prior.offset) / prior.scale
    order = torch.randperm(SIDE**2, generator=torch.Generator().manual_seed(0))
    found = []
    for label, batch in (("held-out", x), ("shuffled", x.flatten(1)[:, order].reshape(x.shape))):
        noise = Noise([(0, i) for i in range(len(batch))], (SIDE, SIDE))
        # grey values of whole HU, dequantised
        u = dequantise(batch, 1 / prior.scale, noise)
        cost = Cost()
        with cost.timed():
            result = log_likelihood(
                _Counted(prior, cost), u, noise, solver=Heun(20), divergence="rademacher"
            )
        bits = float(bits_per_dim(result.nats, SIDE**2, bin_width=1.0, scale=prior.scale).mean())
        found.append(bits)
        yield Row(
            "images", "bits/dim", f"{label} chest phantoms, {SIDE} x {SIDE}, bins of 1 HU", None,
            bits, 0.0, cost.calls, cost.backward, cost.seconds,
        )  # fmt: skip
    # finite, and lower where the images are of the prior's kind: their difference is 1 or more
    yield Row(
        "images", "bits/dim", "held-out less than shuffled: min(difference, 1)", 1.0,
        min(found[1] - found[0], 1.0), 1e-9, 0, 0, 0.0,
    )  # fmt: skip


def figure(path: Path) -> None:
    """Samples of the small prior by every sampler, beside held-out phantoms."""
    from matplotlib.figure import Figure

    with TemporaryDirectory() as folder:
        prior, held = small_prior(Path(folder), 900)
    count = 8
    shown = [("held-out phantoms", torch.from_numpy(np.stack(held.images[:count])))]
    for sampler in SAMPLERS.values():
        noise = Noise([(1, i) for i in range(count)], (SIDE, SIDE))
        with torch.inference_mode():
            x = sampler.run(prior, noise)
        shown.append((sampler.title, prior.offset + prior.scale * x))
    drawing = Figure(figsize=(7.2, 0.95 * len(shown)), layout="constrained")
    axes = drawing.subplots(len(shown), count)
    for row, (title, batch) in zip(axes, shown, strict=True):
        for axis, image in zip(row, batch, strict=True):
            axis.imshow(image, cmap="gray", vmin=-1000, vmax=500)
            axis.set_axis_off()
        row[0].set_title(title, loc="left", fontsize=8)
    drawing.savefig(path, dpi=110)


# --- the table ---------------------------------------------------------------------------------

PARTS: tuple[Callable[[bool], Iterator[Row]], ...] = (
    score_matching, energies, samplers, likelihood, images,
)  # fmt: skip


def rows(quick: bool = False) -> Iterator[Row]:
    """All comparisons, as they are made."""
    for part in PARTS:
        yield from part(quick)


def markdown(table: list[Row]) -> str:
    """The table as Markdown."""
    lines = [
        "| method | quantity | expected | measured | tolerance | | calls | backward | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    group = ""
    for row in table:
        if row.group != group:
            group = row.group
            lines.append(f"| **{group}** | | | | | | | | |")
        expected = "" if row.expected is None else f"{row.expected:.6f}"
        lines.append(
            f"| {row.method} | {row.quantity} | {expected} | {row.measured:.6f} | "
            f"{row.tolerance:.2g} | {'ok' if row.ok else '**differs**'} | {row.calls} | "
            f"{row.backward} | {row.seconds:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table; write the page with ``--out``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer samples: under a minute")
    parser.add_argument("--out", type=Path, help="Markdown page to write")
    parser.add_argument("--figure", type=Path, help="PNG of samples by all samplers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for row in rows(arguments.quick):
        found.append(row)
        print(f"{'ok ' if row.ok else 'BAD'} {row.method}: {row.quantity}: {row.measured:.6f}")
    page = f"{_HEAD}\n{markdown(found)}\n"
    if arguments.out:
        arguments.out.write_text(page)
    if arguments.figure:
        figure(arguments.figure)
    wrong = [row for row in found if not row.ok]
    print(f"{len(found) - len(wrong)} of {len(found)} agree")


_HEAD = """# The score-SDE family, held against closed forms

Written by `python -m phantoms.benchmarks.score_family --out docs/score-family.md`; the same
comparisons at reduced size are tests.  **G** is the mixture 0.3 N(-2, 1/4) + 0.7 N(2, 1/4),
**N** are standard normal numbers; rows without a mark are on G.  *Calls* and *backward* count
evaluations of the score, denoiser or energy and backward passes through it, each on a whole batch
and, for objectives, per step; seconds are on one thread.  Tolerances are three standard errors
where the measured value is a Monte-Carlo mean.

The largest error of a log-likelihood is split in two: with the true density of `x_T` in the place
of the normal one only the solver's error is left, so the rest is the mismatch of the prior on
`x_T`, which no tolerance of the solver removes.  Random probes (Hutchinson) add the third part.
Round trips are shown inside the modes: between them the flow stretches an error of the solver ten
thousandfold, which no solver can help.

Seconds were measured on a machine shared with other jobs.

![Samples of a small prior by all samplers](images/samplers.png)

*A prior of 32 x 32 chest phantoms trained for a minute, and eight samples by every sampler at its
default length.*
"""


if __name__ == "__main__":
    main()
