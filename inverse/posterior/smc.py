r"""Sequential Monte Carlo: weighted particles that become exact as their number grows.

The slow reference against which faster methods are judged.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inverse.measurement import Measurement
from inverse.posterior.gibbs import extrapolate, report
from inverse.posterior.problem import Problem
from inverse.priors.denoiser import Denoiser, expand
from inverse.sampling import Count, Positive, Share, time_grid

__all__ = ["systematic_resample", "tds"]


def tds(
    problem: Problem,
    *,
    steps: Count = 100,
    particles: Count = 16,
    ess: Share = 0.5,
    start_level: Positive | None = None,
    end_level: Positive = 0.02,
    cg_iterations: Count = 50,
    group: Count = 64,
) -> Tensor:
    r"""Twisted diffusion sampler: particles drawn to the data and weighted for it.

    The prior's reverse steps :math:`p(x_s \mid x_t) = N(m, v^2 I)` and the likelihood define the
    target.  Particles move by a proposal that knows the data through the twisting function

    .. math:: \psi_t(x_t) = N(y;\ A\hat x_0,\ \sigma_y^2 + r_t^2 A A^H), \qquad
              q(x_s \mid x_t) = N\big(m + \kappa\,\tfrac{t^2}{r_t^2} J^T u,\ v^2 I\big), \qquad
              u = (A^H A + r_t^{-2})^{-1} A^H (y - A\hat x_0)

    (``A``, ``y`` whitened in ``u``; :math:`J^T u/r_t^2` is :math:`\nabla\log\psi_t`;
    :math:`\kappa = 1 - s^2/t^2`), and weights make up for the difference:

    .. math:: w \leftarrow w\,
              \frac{\psi_s(x_s)\,p(x_s \mid x_t)}{\psi_t(x_t)\,q(x_s \mid x_t)},
              \qquad \psi_0 = N(y;\ A x_0,\ \sigma_y^2).

    Any :math:`\psi_t > 0` leaves the result exact as ``particles`` :math:`\to\infty`, up to the
    time steps of the prior; a good one keeps the weights even.  When the effective number of
    particles falls below ``ess`` of them they are resampled systematically.  Every sample of the
    batch has particles of its own, and returns one of them, drawn by weight.

    ``particles`` network calls a step and sample, each with a backward pass.

    The authors: 100 to 250 steps, up to 64 particles, resampling below half of them.

    Source: Wu et al., Practical and Asymptotically Exact Conditional Sampling in Diffusion Models
    (NeurIPS 2023), algorithm 1 and equations 8 to 11; the twisting variance is that of PiGDM.

    Args:
        problem: the batch.
        steps: noise levels.
        particles: particles a sample.
        ess: share of effective particles below which they are resampled.
        start_level: first noise level, default the largest of the prior's SDE.
        end_level: last noise level.
        cg_iterations: most conjugate-gradient steps of a solve.
        group: most images a network call.

    Here: docs/theory.md, equation (31).
    """
    prior, sde, noise = problem.prior, problem.prior.sde, problem.noise
    shape = noise.shape
    b = len(problem.measurement.data)
    owner = torch.arange(b, device=problem.measurement.data.device).repeat_interleave(particles)
    twists = [
        _Twist(prior, problem.measurement.take(part), cg_iterations) for part in owner.split(group)
    ]

    def evaluate(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = [f(part, t) for f, part in zip(twists, x.split(group), strict=True)]
        x0, shift, psi = (torch.cat(column) for column in zip(*parts, strict=True))
        return x0, shift, psi.reshape(b, particles)

    def flat(draw: Tensor) -> Tensor:
        return draw.reshape(b * particles, *shape)

    advice = "use more steps or particles"
    times = time_grid(sde, steps, start=start_level, end=end_level)
    levels = sde.noise_level(times).tolist()
    x = levels[0] * flat(noise((particles, *shape)))
    x0, shift, psi = evaluate(x, times[0])
    logw = psi
    before: tuple[float, Tensor] | None = None
    for i in range(steps - 1):
        t, s = levels[i], levels[i + 1]
        index, logw = systematic_resample(logw, _uniform(problem), ess)
        pick = (index + particles * torch.arange(b, device=index.device)[:, None]).flatten()
        x, x0, shift, psi = x[pick], x0[pick], shift[pick], psi.flatten()[pick].reshape(psi.shape)
        before = None if before is None else (before[0], before[1][pick])
        keep = (s / t) ** 2
        spread = s * math.sqrt(1 - keep)
        z = flat(noise((particles, *shape)))
        drift = (1 - keep) / spread * shift  # of the proposal's mean, in units of its spread
        x = keep * x + (1 - keep) * extrapolate(x0, t, s, before) + spread * (drift + z)
        before = t, x0
        # log p/q = (|z|^2 - |z + drift|^2) / 2
        ratio = -((z + drift / 2) * drift).flatten(1).sum(dim=1, dtype=torch.float64)
        x0, shift, new = evaluate(x, times[i + 1])
        logw = logw + ratio.reshape(b, particles) + new - psi
        psi = new
        report(problem, x, i, steps, scale=levels[0], advice=advice)
    final = torch.cat(
        [f.log_likelihood(part) for f, part in zip(twists, x0.split(group), strict=True)]
    )
    weights = torch.softmax(logw + final.reshape(b, particles) - psi, dim=1)
    chosen = torch.searchsorted(weights.cumsum(dim=1), _uniform(problem)[:, None])
    chosen = chosen.clamp_max(particles - 1)[:, 0]
    x0 = x0.unflatten(0, (b, particles))[torch.arange(b, device=x0.device), chosen]
    report(problem, x0, steps - 1, steps, scale=levels[0], advice=advice)
    return x0


class _Twist:
    """``psi_t`` of :func:`tds` with its gradient, for a group of particles."""

    def __init__(self, prior: Denoiser, measurement: Measurement, iterations: int) -> None:
        white = measurement.whitened()
        self.prior, self.operator, self.data = prior, white.operator, white.data
        self.iterations = iterations

    def __call__(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""``(x0, t^2 grad log psi, log psi)`` at ``x = x_t / alpha``.

        By Woodbury, :math:`e^H(I + r^2AA^H)^{-1}e = \|e\|^2 - \langle A^He, u\rangle`.
        """
        sde = self.prior.sde
        level, alpha = float(sde.noise_level(t)), expand(sde.alpha(t), x)
        r = float(self.prior.error(level))
        x0, pull_back = self.prior.linearise(alpha * x, t)
        e = self.data - self.operator(x0)
        back = self.operator.adjoint(e)
        u = self.operator.normal_solve(back, r**-2, tol=1e-5, max_iter=self.iterations).x
        quadratic = _square(e) - (back * u).flatten(1).sum(dim=1, dtype=torch.float64)
        product = pull_back(u)
        return x0, (level / r) ** 2 * alpha * product, -0.5 * quadratic

    def log_likelihood(self, x0: Tensor) -> Tensor:
        """``log N(y; A x0, sigma_y^2)`` up to a constant, float64."""
        return -0.5 * _square(self.data - self.operator(x0))


def _square(e: Tensor) -> Tensor:
    """Squared norm a batch element, float64."""
    e = torch.view_as_real(e) if e.is_complex() else e
    return e.flatten(1).square().sum(dim=1, dtype=torch.float64)


def _uniform(problem: Problem) -> Tensor:
    """One uniform number a sample, from its own generator, float64 ``(b,)``."""
    return torch.special.ndtr(problem.noise(()).to(torch.float64))


def systematic_resample(logw: Tensor, u: Tensor, ess: float) -> tuple[Tensor, Tensor]:
    r"""Indices of the surviving particles and their new log-weights, each sample on its own.

    Particle ``k`` survives :math:`\lfloor N w_k\rfloor` or :math:`\lceil N w_k\rceil` times.  A
    sample whose effective number :math:`1/\sum_k w_k^2` is at least ``ess`` N keeps them all.

    Source: Kitagawa, J. Comput. Graph. Stat. 5 (1996); Douc and Cappé (2005).

    Args:
        logw: log-weights ``(b, N)``.
        u: one uniform number a sample, ``(b,)``.
        ess: share of effective particles below which a sample is resampled.
    """
    n = logw.shape[1]
    order = torch.arange(n, device=logw.device)
    weights = torch.softmax(logw, dim=1)
    positions = (order + u[:, None]) / n
    index = torch.searchsorted(weights.cumsum(dim=1), positions).clamp_max(n - 1)
    enough = 1 / weights.square().sum(dim=1) >= ess * n
    enough = enough[:, None]
    return torch.where(enough, order, index), torch.where(enough, logw, torch.zeros_like(logw))
