r"""Split Gibbs methods: the likelihood is sampled exactly, the prior by its own diffusion.

The posterior is split over two copies of the image,

.. math:: \pi(x, z) \propto \exp\!\Big(-\tfrac12\big\|\tfrac{y - Ax}{\sigma_y}\big\|^2
          - \frac{\|x - z\|^2}{2\rho^2}\Big)\, p(z),

whose marginal of ``z`` tends to the posterior as :math:`\rho \to 0`.  Noise levels are those of
:math:`x_t/\alpha_t`, so the methods run on every SDE.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from inverse.errors import InputError, NumericalError
from inverse.measurement import Measurement
from inverse.operators.linop import cg
from inverse.posterior.problem import Problem
from inverse.priors.denoiser import Denoiser, expand
from inverse.sampling import Count, Noise, NotNegative, Positive, time_grid
from inverse.sampling.sample import DIVERGED

__all__ = [
    "LikelihoodStep",
    "daps",
    "denoise_level",
    "denoising_posterior",
    "extrapolate",
    "geometric",
    "pnpdm",
    "red_diff",
    "report",
]


def denoise_level(prior: Denoiser, x: Tensor, level: float) -> Tensor:
    r"""``E[x_0 | x]`` for :math:`x = x_0 + \mathrm{level}\cdot z` on any SDE; one network call."""
    t = prior.sde.time(level)
    return prior.denoise(expand(prior.sde.alpha(t), x) * x, t)


class LikelihoodStep:
    r"""Exact draws of :math:`x \sim \exp(-\tfrac12\|(y - Ax)/\sigma_y\|^2 - \|x-z\|^2/2\rho^2)`.

    Perturb and optimise: with whitened ``A``, ``y`` and fresh standard normal ``n``, ``e``,

    .. math:: u = z + \rho e, \qquad
              x = u + (A^H A + \rho^{-2} I)^{-1} A^H (y + n - A u),

    which has mean and covariance :math:`(A^H A + \rho^{-2}I)^{-1}` of the Gaussian exactly.  The
    system is solved by conjugate gradients (closed form where the operator has one) to a relative
    residual of ``tol``; what the data do not see needs no solve.  Complex data get noise in the
    real and in the imaginary part.

    ``balance`` :math:`= \kappa > 0` weights the data by :math:`I + \kappa AA^H` in place of ``I``,
    that is, takes from their noise what the coupling adds to it: between ``z`` and ``y`` there
    lies noise of covariance :math:`(I + \kappa AA^H)^{-1} + \rho^2AA^H`, which at
    :math:`\kappa = \rho^2` differs from that of the data by :math:`O(\rho^4)` only.

    Source: Papandreou and Yuille (NeurIPS 2010); Orieux et al., IEEE SPL 19 (2012).

    Args:
        measurement: data of the batch, in prior units.
        noise: randomness of the batch's samples.
        tol: relative residual of the solve.
        iterations: most conjugate-gradient steps.

    Here: docs/theory.md, equation (30).
    """

    def __init__(
        self, measurement: Measurement, noise: Noise, *, tol: float = 1e-4, iterations: int = 50
    ) -> None:
        white = measurement.whitened()
        self.operator, self.data, self.noise = white.operator, white.data, noise
        self.tol, self.iterations = tol, iterations

    def __call__(self, z: Tensor, rho: float, balance: float = 0.0) -> Tensor:
        """``x`` given ``z``, ``(b, *shape)``."""
        operator, u = self.operator, z + rho * self.noise()
        misfit = self.data - operator(u)
        b = operator.adjoint(misfit + self._data_noise())
        if balance == 0.0:
            solve = operator.normal_solve(b, rho**-2, tol=self.tol, max_iter=self.iterations)
            return u + solve.x

        def normal(x: Tensor) -> Tensor:
            return operator.adjoint(operator(x))

        # noise of covariance A^H (I + balance A A^H) A
        b = b + normal(balance * operator.adjoint(misfit) + balance**0.5 * self.noise())
        solve = cg(
            lambda x: normal(x + balance * normal(x)) + x / rho**2,
            b,
            ndim=len(operator.in_shape),
            tol=self.tol,
            max_iter=self.iterations,
        )
        return u + solve.x

    def _data_noise(self) -> Tensor:
        """Standard normal in the shape of the data, for each of the two parts if complex."""
        shape = self.data.shape[1:]
        if self.data.is_complex():
            return torch.view_as_complex(self.noise((*shape, 2)))
        return self.noise(shape)


def denoising_posterior(
    prior: Denoiser, x: Tensor, level: float, noise: Noise, *, calls: int, ratio: float = 0.1
) -> Tensor:
    r"""A draw of :math:`z \sim p(z) \exp(-\|x - z\|^2 / 2\rho^2)`: reverse SDE from ``rho``.

    Levels fall geometrically from :math:`\rho` to ``ratio`` times it, ``calls`` of them, and the
    last call ends in the denoised image.  From level ``t`` to ``s``, exactly for a denoiser that
    is linear in :math:`\log t`,

    .. math:: x_s = \tfrac{s^2}{t^2} x_t + \big(1 - \tfrac{s^2}{t^2}\big)\hat D
              + s\sqrt{1 - \tfrac{s^2}{t^2}}\;z

    with :math:`\hat D` of :func:`extrapolate`; second order in the step, one network call.

    Args:
        prior: denoiser.
        x: noisy images ``(b, *shape)``, that is ``x_t / alpha``.
        level: noise level of ``x``.
        noise: randomness.
        calls: network calls.
        ratio: last level over first.
    """
    floor = float(prior.sde.noise_level(prior.sde.t_min))
    levels = geometric(level, max(ratio * level, floor), calls)
    before: tuple[float, Tensor] | None = None
    for t, s in zip(levels, levels[1:], strict=False):
        x0 = denoise_level(prior, x, t)
        keep = (s / t) ** 2
        target = extrapolate(x0, t, s, before)
        x = keep * x + (1 - keep) * target + s * math.sqrt(1 - keep) * noise()
        before = t, x0
    return denoise_level(prior, x, levels[-1])


def extrapolate(x0: Tensor, t: float, s: float, before: tuple[float, Tensor] | None) -> Tensor:
    r"""The denoised image averaged over a reverse step from level ``t`` to ``s``.

    A reverse SDE step integrates ``D`` with the weight :math:`2e^{-2(h-u)}` over
    :math:`u = \log(t/\cdot) \in [0, h]`, :math:`h = \log(t/s)`.  With the line through the last
    two calls, at ``t`` and :math:`t' > t`,

    .. math:: \hat D = D_t + \frac{D_t - D_{t'}}{\log(t'/t)}
              \Big(\frac{h}{1 - e^{-2h}} - \frac12\Big).

    Source: Lu et al., DPM-Solver++ (arXiv 2211.01095), SDE form of the two-step solver, with the
    integral of the line exact.

    Args:
        x0: ``D_t``.
        t: level of the call.
        s: next level.
        before: level and result of the previous call; without one ``D_t`` is returned.
    """
    if before is None:
        return x0
    h = math.log(t / s)
    return x0 + (x0 - before[1]) / math.log(before[0] / t) * (h / -math.expm1(-2 * h) - 0.5)


def geometric(high: float, low: float, count: int) -> list[float]:
    """``count`` levels from ``high`` to ``low``, evenly spaced in their logarithm.

    Raises:
        InputError: fewer than one level, or levels out of order.
    """
    if count < 1 or not 0 < low <= high:
        raise InputError(
            f"noise levels must be at least one and fall, got {count} from {high:g} to {low:g}; "
            "the last may not lie below the smallest level of the prior's SDE"
        )
    return [high * (low / high) ** (i / max(count - 1, 1)) for i in range(count)]


def pnpdm(
    problem: Problem,
    *,
    steps: Count = 100,
    calls: Count = 8,
    rho_start: Positive = 3.0,
    rho_end: Positive = 0.03,
    balanced: bool = True,
    cg_iterations: Count = 50,
) -> Tensor:
    r"""PnP-DM: Gibbs sampling between exact likelihood and diffusion prior, ``rho`` annealed.

    .. math:: x \sim \exp\!\big(-\tfrac12\|(y-Ax)/\sigma_y\|^2 - \|x-z\|^2/2\rho^2\big),
              \qquad z \sim p(z)\exp\!\big(-\|x-z\|^2/2\rho^2\big)

    by :class:`LikelihoodStep` and :func:`denoising_posterior`, with :math:`\rho` falling
    geometrically.  At a fixed :math:`\rho` the law of ``z`` is the posterior for noise of
    covariance :math:`\sigma_y^2 + \rho^2 AA^H`.  ``balanced`` takes that excess from the noise of
    the likelihood step (see there), which leaves an error of second order in :math:`\rho^2` where
    the paper's step has one of first order.

    Each direction of the image is frozen when :math:`\rho` falls below its posterior spread, so a
    slow fall is what makes the result exact.  Weights of modes are frozen first, at a
    :math:`\rho` of their distance: where they matter, compare
    :func:`inverse.posterior.smc.tds`.  Exact as :math:`\rho \to 0`, ``steps`` and ``calls``
    :math:`\to \infty`.

    The authors: ``rho`` from 10 by a factor of 0.9 a step to 0.3 (0.02 to 0.1 for hard problems),
    100 steps, 100 EDM levels a prior step, not balanced.

    Source: Wu et al., Principled Probabilistic Imaging using Diffusion Models as Plug-and-Play
    Priors (NeurIPS 2024), algorithm 1; Vono et al., IEEE TSP 67 (2019) for split Gibbs.

    Args:
        problem: the batch.
        steps: Gibbs iterations, ``calls`` network calls each.
        calls: network calls of a prior step.
        rho_start: first coupling, prior units; at least the spread of the prior.
        rho_end: last coupling; small against the posterior spread that matters.
        balanced: take the noise of the coupling from that of the data.
        cg_iterations: most conjugate-gradient steps of a likelihood step.

    Here: docs/theory.md, equation (29).
    """
    likelihood = LikelihoodStep(problem.measurement, problem.noise, iterations=cg_iterations)
    # bounds the condition of the balanced system, so that float32 serves
    most = 30 / likelihood.operator.norm() ** 2
    z = torch.zeros_like(problem.noise())
    for i, rho in enumerate(geometric(rho_start, rho_end, steps)):
        x = likelihood(z, rho, min(rho**2, most) if balanced else 0.0)
        z = denoising_posterior(problem.prior, x, rho, problem.noise, calls=calls)
        report(problem, z, i, steps, scale=rho_start, advice="raise rho_end or steps")
    return z


def daps(
    problem: Problem,
    *,
    steps: Count = 200,
    ode_steps: Count = 1,
    variance: Literal["error", "level"] = "error",
    start_level: Positive | None = None,
    end_level: Positive = 0.02,
    cg_iterations: Count = 50,
) -> Tensor:
    r"""DAPS: decoupled annealing; the estimate is sampled afresh at every noise level.

    .. math:: \hat x_0 = \mathrm{ODE}(x_t),\qquad
              x_0 \sim \exp\!\big(-\tfrac12\|(y-Ax_0)/\sigma_y\|^2
              - \|x_0 - \hat x_0\|^2/2r_t^2\big),\qquad x_s = x_0 + s\,z

    exact if :math:`p(x_0 \mid x_t)` were the Gaussian that is assumed.  Its mean is the denoised
    image, which is one Euler step of the flow to zero, and its mean variance a pixel is
    ``prior.error``: the defaults.  The authors take the end of the flow and :math:`r_t = t`, which
    inflates the spread; their 100 Langevin steps on the Gaussian are replaced by one exact draw,
    :class:`LikelihoodStep`, which they have as stationary law.

    The authors: 200 levels from 100 to 0.1 even in their seventh root, 5 Euler steps
    (``steps=200, ode_steps=5, variance="level", start_level=100, end_level=0.1``).

    Source: Zhang et al., Improving Diffusion Inverse Problem Solving with Decoupled Noise
    Annealing (CVPR 2025), algorithm 1 and equation 9.

    Args:
        problem: the batch.
        steps: noise levels, ``ode_steps`` network calls each.
        ode_steps: Euler steps of the probability flow from a level to zero.
        variance: ``"error"``, the prior's own; ``"level"``, the authors'.
        start_level: first level, default the largest of the prior's SDE.
        end_level: last level.
        cg_iterations: most conjugate-gradient steps of a draw.
    """
    prior, sde = problem.prior, problem.prior.sde
    likelihood = LikelihoodStep(problem.measurement, problem.noise, iterations=cg_iterations)
    times = time_grid(sde, steps, start=start_level, end=end_level, spacing="karras")
    levels = sde.noise_level(times).tolist()
    x0 = torch.zeros_like(problem.noise())
    for i, level in enumerate(levels):
        x = x0 + level * problem.noise()
        estimate = _flow(prior, x, level, ode_steps)
        r = float(prior.error(level)) if variance == "error" else level
        x0 = likelihood(estimate, r)
        report(problem, x0, i, steps, scale=levels[0], advice="use more steps")
    return x0


def _flow(prior: Denoiser, x: Tensor, level: float, count: int) -> Tensor:
    """Probability flow from ``level`` to zero: Euler steps, the last one Tweedie's."""
    floor = float(prior.sde.noise_level(prior.sde.t_min))
    levels = geometric(level, max(0.01 * level, floor), count)
    for t, s in zip(levels, levels[1:], strict=False):
        x = x + (s / t - 1) * (x - denoise_level(prior, x, t))
    return denoise_level(prior, x, levels[-1])


def red_diff(
    problem: Problem,
    *,
    steps: Count = 1000,
    lr: Positive = 0.1,
    weight: NotNegative = 1.0,
    start_level: Positive | None = None,
    end_level: Positive = 0.02,
) -> Tensor:
    r"""RED-diff: a point mass fitted to the posterior by stochastic regularisation by denoising.

    .. math:: \mu \leftarrow \mathrm{Adam}\big(r_t^2 A^H(A\mu - y)/\sigma_y^2
              + w\,(\mu - D(\alpha_t\mu + \sigma_t\varepsilon, t))\big),
              \qquad \mu - D = \tfrac{\sigma_t}{\alpha_t}(\hat\varepsilon - \varepsilon)

    with no gradient through the network.  :math:`r_t` is the prior's own error, as in
    :class:`inverse.posterior.Proximal`, where the authors have a constant: for a Gaussian prior
    and small ``t`` the mean of the gradient vanishes at the posterior mode.  The step of Adam
    falls linearly to zero, so that the noise of the gradient averages out.  The result is a mode:
    its spread says nothing of the posterior's.

    The authors: 1000 steps in descending ``t``, ``lr`` 0.1, Adam with (0.9, 0.99), data weight 1
    and 0.25 on the regulariser weighted by :math:`\sigma_t/\alpha_t`.

    Source: Mardani et al., A Variational Perspective on Solving Inverse Problems with Diffusion
    Models (ICLR 2024), equation 10 and algorithm 1; Kingma and Ba, Adam (ICLR 2015).

    Args:
        problem: the batch.
        steps: network calls.
        lr: first step of Adam, prior units.
        weight: weight of the prior.
        start_level: first noise level, default the largest of the prior's SDE.
        end_level: last noise level.
    """
    prior, sde = problem.prior, problem.prior.sde
    white = problem.measurement.whitened()
    levels = sde.noise_level(time_grid(sde, steps, start=start_level, end=end_level)).tolist()
    backprojection = white.operator.adjoint(white.data)
    mu = white.operator.normal_solve(backprojection, 1.0, tol=1e-3, max_iter=30).x
    size = float(mu.abs().max())
    m, v = torch.zeros_like(mu), torch.zeros_like(mu)
    beta1, beta2 = 0.9, 0.99
    for i, level in enumerate(levels):
        x0 = denoise_level(prior, mu + level * problem.noise(), level)
        misfit = white.operator.adjoint(white.operator(mu)) - backprojection
        gradient = float(prior.error(level)) ** 2 * misfit + weight * (mu - x0)
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        rate = lr * (1 - i / steps) / (1 - beta1 ** (i + 1))
        mu = mu - rate * m / ((v / (1 - beta2 ** (i + 1))).sqrt() + 1e-8)
        # Adam hides a gradient that overflows: look at the network's image, too
        seen = torch.maximum(mu.abs(), x0.abs())
        report(problem, seen, i, steps, scale=size + levels[0], advice="lower lr")
    return mu


def report(problem: Problem, x: Tensor, i: int, steps: int, *, scale: float, advice: str) -> None:
    """Progress of step ``i``; stop a run that diverged from a start of size ``scale``.

    Raises:
        NumericalError: if ``x`` is not finite or out of all proportion.
    """
    if not bool((x.abs() <= DIVERGED * (1 + scale)).all()):
        raise NumericalError(
            f"sampling diverged at step {i + 1} of {steps}; {advice}, and check the noise level "
            "of the data and the adjoint of the operator (adjoint_error)"
        )
    if problem.callback is not None:
        problem.callback(i + 1, steps)
