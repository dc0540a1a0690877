"""Data consistency on the iterate: ``x_t -> x_t``; and the methods that are built on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from torch import Tensor

from inverse.errors import InputError
from inverse.measurement import Measurement
from inverse.posterior.gibbs import denoise_level, geometric, report
from inverse.posterior.problem import Problem
from inverse.priors.denoiser import expand
from inverse.sampling import (
    Count,
    Interval,
    Mixing,
    Noise,
    NotNegative,
    Positive,
    langevin,
    reverse_diffusion,
    sample,
    time_grid,
)
from inverse.sde import SDE

__all__ = ["ald", "mcg", "pocs", "score_mri", "song_projection"]


def song_projection(
    measurement: Measurement,
    sde: SDE,
    noise: Noise,
    *,
    lam: float,
    iterations: int = 10,
    tol: float = 1e-4,
) -> Callable[[Tensor, Tensor], Tensor]:
    r"""The projection of Song, Shen, Xing, Ermon (ICLR 2022), in its proximal form.

    .. math::
       \hat y_t = \alpha_t y + \sigma_t A z, \qquad
       x \leftarrow \arg\min_u\ \lambda\|\hat y_t - Au\|^2/\|A\|^2 + (1-\lambda)\|u - x\|^2

    Where :math:`A = P(\Lambda)T` with orthonormal ``T`` this is the paper's equation 9,
    :math:`T^{-1}[\lambda\Lambda P^{-1}\hat y_t + (1-\lambda)\Lambda Tx + (I-\Lambda)Tx]`, and it
    also serves operators with no invertible ``T`` (fan beams, several coils).  The noise of the
    data is not modelled.

    Args:
        measurement: data of the batch, in prior units.
        sde: forward process.
        noise: fresh noise on the image grid.
        lam: mixing weight in (0, 1]; 1 is a hard projection.
        iterations: conjugate-gradient steps.
        tol: relative residual at which they stop.

    Returns:
        ``project(x, t)``.

    Here: docs/theory.md, equation (25).
    """
    if not 0.0 < lam <= 1.0:
        raise InputError(f"Song's mixing weight lambda must lie in (0, 1], got {lam}")
    operator = measurement.operator
    rho = (1 - lam) / lam * operator.norm() ** 2
    backprojection = operator.adjoint(measurement.data)

    def project(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = sde.marginal(t)
        z = noise()
        b = expand(alpha, x) * backprojection
        b = b + expand(sigma, x) * operator.adjoint(operator(z)) + rho * x
        return operator.normal_solve(b, rho, x, tol=tol, max_iter=iterations).x

    return project


def pocs(
    measurement: Measurement,
    sde: SDE,
    *,
    lam: float = 1.0,
    iterations: int = 10,
    tol: float = 1e-4,
) -> Callable[[Tensor, Tensor], Tensor]:
    r"""Projection onto the data without noise added to them.

    .. math:: x \leftarrow \arg\min_u\ \lambda\|\alpha_t y - Au\|^2/\|A\|^2
              + (1-\lambda)\|u - x\|^2

    With :math:`\lambda = 1` this is the nearest image that fits the data, by conjugate gradients
    from ``x``; for masks and Cartesian MRI the measured values are replaced.  The noise of the
    data is not modelled.

    Source: Chung and Ye, Score-based diffusion models for accelerated MRI (MedIA 80, 2022),
    equation 17.

    Args:
        measurement: data of the batch, in prior units.
        sde: forward process.
        lam: mixing weight in (0, 1].
        iterations: conjugate-gradient steps.
        tol: relative residual at which they stop.

    Returns:
        ``project(x, t)``.
    """
    if not 0.0 < lam <= 1.0:
        raise InputError(f"the mixing weight lambda must lie in (0, 1], got {lam}")
    operator = measurement.operator
    rho = 0.0 if lam == 1.0 else (1 - lam) / lam * operator.norm() ** 2
    backprojection = operator.adjoint(measurement.data)

    def project(x: Tensor, t: Tensor) -> Tensor:
        b = expand(sde.alpha(t), x) * backprojection + rho * x
        return operator.normal_solve(b, rho, x, tol=tol, max_iter=iterations).x

    return project


def score_mri(
    problem: Problem,
    *,
    steps: Count = 1000,
    snr: NotNegative = 0.16,
    lam: Mixing = 1.0,
    cg_iterations: Count = 10,
) -> Tensor:
    """Score-MRI: predictor-corrector, projected onto the data after each half-step.

    :func:`pocs` after every predictor and every corrector, and once on the result.  It takes the
    data as noise-free.  Two network calls a step.

    The authors: VE from 378 to 0.01, 2000 steps, snr 0.16, one corrector, ``lam`` 1, for complex
    images the network once for the real and once for the imaginary part.

    Source: Chung and Ye, Score-based diffusion models for accelerated MRI (MedIA 80, 2022),
    algorithm 2.

    Args:
        problem: the batch.
        steps: predictor steps; twice as many network calls.
        snr: corrector's signal-to-noise ratio.
        lam: mixing weight of the projection; below 1 where an operator amplifies noise (CT).
        cg_iterations: conjugate-gradient steps a projection.
    """
    sde = problem.prior.sde
    project = pocs(problem.measurement, sde, lam=lam, iterations=cg_iterations)
    times = time_grid(sde, steps)
    x = sample(
        problem.prior,
        times,
        reverse_diffusion,
        problem.noise,
        corrector=langevin(snr),
        project=project,
        callback=problem.callback,
    )
    return project(x, times[-1])


def ald(
    problem: Problem,
    *,
    steps: Count = 400,
    inner: Count = 3,
    step: Annotated[float, Interval(0, 2, "()")] = 0.3,
    start_level: Positive | None = None,
    end_level: Positive = 0.01,
) -> Tensor:
    r"""Annealed Langevin dynamics with the gradient of the likelihood.

    .. math:: x \leftarrow x + \eta\Big(\frac{D(x) - x}{s^2}
              + A^H\,\frac{y - Ax}{\sigma_y^2 + s^2\|A\|^2}\Big) + \sqrt{2\eta}\,z,
              \qquad \eta = \epsilon s^2

    on :math:`x = x_t/\alpha_t` at falling noise levels ``s``.  The variance of the data grows with
    ``s`` as that of :math:`A x` does, so both terms have curvature at most :math:`1/s^2` and one
    :math:`\epsilon < 1` is stable for every operator and noise.  (The authors' code rescales the
    likelihood gradient to a multiple of the norm of the score instead.)  Approaches the posterior
    for small ``step`` and many steps.

    The authors: 1155 levels geometric from about 1.2 to 0.0066, 3 inner steps (brain 4),
    :math:`\eta = 5\cdot10^{-5}(s/0.0066)^2`, that is ``step`` 1.15.

    Source: Jalal et al., Robust compressed sensing MRI with deep generative priors
    (NeurIPS 2021), equation 5.

    Args:
        problem: the batch.
        steps: noise levels, ``inner`` network calls each, and one call at the end.
        inner: Langevin steps a level.
        step: :math:`\epsilon`; Langevin is stable below 2.
        start_level: first noise level, default the largest of the prior's SDE.
        end_level: last noise level.

    Here: docs/theory.md, equation (32).
    """
    sde, measurement = problem.prior.sde, problem.measurement
    operator, norm = measurement.operator, measurement.operator.norm()
    high = float(sde.noise_level(1.0)) if start_level is None else start_level
    levels = geometric(high, end_level, steps)
    x = high * problem.noise()
    for i, s in enumerate(levels):
        precision = 1 / (measurement.noise**2 + (s * norm) ** 2)
        eta = step * s**2
        for _ in range(inner):
            prior_score = (denoise_level(problem.prior, x, s) - x) / s**2
            data_score = operator.adjoint(precision * (measurement.data - operator(x)))
            x = x + eta * (prior_score + data_score) + (2 * eta) ** 0.5 * problem.noise()
        report(problem, x, i, steps, scale=high, advice="lower step")
    return denoise_level(problem.prior, x, end_level)


def mcg(
    problem: Problem,
    *,
    steps: Count = 1000,
    snr: NotNegative = 0.16,
    zeta: NotNegative = 1.0,
    cg_iterations: Count = 10,
) -> Tensor:
    r"""Manifold constrained gradient: predictor-corrector, gradient of the residual, data step.

    After the corrector at level ``s``, with :math:`u` the part of the residual that the data
    resolve, :math:`J` the Jacobian of the denoiser and :math:`P` the measured directions,

    .. math:: u = (A^HA + r^{-2})^{-1}A^H(y - A\hat x_0), \quad
              g = \zeta\,\kappa\,\tfrac{s^2}{r^2}\,(I - P)\,J^T u, \quad
              x \leftarrow \arg\min_v \|(y - Av)/\sigma_y\|^2 + \|v - (x + g)\|^2/s^2

    where ``A`` and ``y`` in the first two are whitened,
    :math:`P = (A^HA + r^{-2})^{-1}A^HA`, and :math:`\kappa` is the share of :math:`\hat x_0` in
    the predictor's step.  :math:`J^T u` is, up to scale, the paper's
    :math:`-\nabla_{x_t}\|A^\dagger(y - A\hat x_0)\|`; noise and schedule give its length in
    place of a constant, and :math:`\zeta = 1` is the length for a denoiser with error ``r``.
    The data are not noised to the level of the iterate.  Two network calls a step, one of them
    differentiated.

    The authors (CT, 30 of 180 views): VE from 378 to 0.01, 2000 steps, snr 0.16, gradient 0.1
    times the unit vector, SIRT steps with relaxation from 1 to 0.6.

    Source: Chung, Sim, Ryu, Ye, Improving Diffusion Models for Inverse Problems using Manifold
    Constraints (NeurIPS 2022), equations 14 and 15 and algorithm 2.

    Args:
        problem: the batch.
        steps: predictor steps; twice as many network calls.
        snr: corrector's signal-to-noise ratio.
        zeta: length of the gradient step; 0 leaves the data step alone.
        cg_iterations: conjugate-gradient steps a solve.
    """
    prior, sde = problem.prior, problem.prior.sde
    white = problem.measurement.whitened()
    operator, correct = white.operator, langevin(snr)

    def solve(b: Tensor, r: float) -> Tensor:
        return operator.normal_solve(b, r**-2, tol=1e-4, max_iter=cg_iterations).x

    times = time_grid(sde, steps)
    scale, advice = float(sde.sigma(times[0])), "lower zeta or use more steps"
    x = scale * problem.noise()
    for i, (t, s) in enumerate(zip(times, times[1:], strict=False)):
        following = times[min(i + 2, steps - 1)]
        x0 = prior.denoise(x, t)
        x = reverse_diffusion(sde, x, x0, t, s, problem.noise())
        level, alpha = float(sde.noise_level(s)), expand(sde.alpha(s), x)
        r = float(prior.error(level))

        x0, pull_back = prior.linearise(x, s)
        product = pull_back(solve(operator.adjoint(white.data - operator(x0)), r))
        unmeasured = product - solve(operator.adjoint(operator(product)), r)
        share = 1 - (level / float(sde.noise_level(t))) ** 2
        x = correct(sde, x, x0, s, following, problem.noise()) / alpha
        # d/dx_t = d/d(x_t / alpha) / alpha
        x = x + zeta * share * (level / r) ** 2 * alpha * unmeasured
        x = alpha * (x + solve(operator.adjoint(white.data - operator(x)), level))
        report(problem, x, i, steps, scale=scale, advice=advice)
    x = prior.denoise(x, times[-1])
    report(problem, x, steps - 1, steps, scale=scale, advice=advice)
    return x
