"""The default method: plug-and-play ADMM on noised estimates."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from inverse.classical import tv
from inverse.errors import NumericalError
from inverse.measurement import Measurement
from inverse.posterior.problem import Problem
from inverse.sampling import Count, Interval, Positive, Share, time_grid

__all__ = ["pnp_admm", "warm_start"]

_START_ITERATIONS = 25


def pnp_admm(
    problem: Problem,
    *,
    steps: Count = 20,
    start_level: Positive = 0.5,
    end_level: Positive = 0.08,
    weight: Positive = 6.0,
    damping: Share = 0.75,
    relaxation: Annotated[float, Interval(0, 2, "()")] = 1.2,
    cg_iterations: Count = 15,
) -> Tensor:
    r"""Plug-and-play ADMM with a denoiser on antithetically noised estimates.

    With :math:`\tilde\sigma_k` falling geometrically and :math:`z_{2j+1} = -z_{2j}`

    .. math::
       \hat x_0 &= D(\alpha_k(x - u) + \sigma_k z_k,\ t_k) \\
       \hat v &= \rho\,\hat x_0 + (1 - \rho)\,x + u \\
       x &\leftarrow \arg\min_v \tfrac12\|(Av - y)/\sigma_y\|^2
          + \tfrac{1}{2 r_k^2}\|v - \hat v\|^2 \\
       u &\leftarrow \gamma\,(\hat v - x)

    and :math:`r_k` is ``weight`` times the prior's expected error at the level, as in
    :class:`~inverse.posterior.guidance.Proximal`.  With ``damping`` 0, ``relaxation`` 1 and
    independent noise this is DDS with fresh noise at every step.  The dual variable ``u``
    remembers what data and prior disagree on, so that they meet in fewer steps.  Opposite noise
    in consecutive steps cancels to first order what the denoiser makes of the noise itself.  It
    starts from a rough total-variation image, where the noise need not hide streaks.

    A point estimate: samples of several seeds differ by less than the posterior's spread.

    Args:
        problem: the batch.
        steps: network calls.
        start_level: noise level of the first call, prior units.
        end_level: noise level of the last.
        weight: trust in the data.
        damping: share of the dual variable that is kept, 0 to 1.
        relaxation: ADMM's over-relaxation :math:`\rho` of the denoised image, below 2; above 1
            gains at few calls and loses a little at many.
        cg_iterations: conjugate-gradient steps a call.

    Raises:
        NumericalError: if an iterate is not finite.

    Source: Chan, Wang, Elgendy, Plug-and-play ADMM (IEEE TCI 2017); noised denoiser: Renaud et
    al., SNORE (ICML 2024); prior variance a level: Chung et al., DDS (ICLR 2024).
    Here: docs/theory.md, equation (28).
    """
    prior = problem.prior
    white = problem.measurement.whitened()
    operator = white.operator
    x = warm_start(problem.measurement, problem.offset, problem.scale)
    u = torch.zeros_like(x)
    times = time_grid(prior.sde, steps, start=start_level, end=end_level)
    z = u
    for i, t in enumerate(times):
        z = -z if i % 2 else problem.noise()
        level = prior.sde.noise_level(t)
        alpha = float(prior.sde.alpha(t))
        x0 = prior.denoise(alpha * (x - u + float(level) * z), t)
        v = relaxation * x0 + (1 - relaxation) * x + u
        rho = (weight * float(prior.error(level))) ** -2
        # as a correction of v: in float32 it would drown in the back-projection of all data
        misfit = operator.adjoint(white.data - operator(v))
        x = v + operator.normal_solve(misfit, rho, tol=1e-5, max_iter=cg_iterations).x
        u = damping * (v - x)
        if not bool(torch.isfinite(x).all()):
            raise NumericalError(
                f"plug-and-play ADMM left the finite numbers at step {i + 1} of {steps}; check "
                "the noise level and units of the data and the adjoint of the operator "
                "(adjoint_error), or lower weight"
            )
        if problem.callback is not None:
            problem.callback(i + 1, steps)
    return x


def warm_start(measurement: Measurement, offset: float, scale: float) -> Tensor:
    """A rough image to start from: a few iterations of total variation.

    Args:
        measurement: data of the batch, in prior units.
        offset: physical value of prior value 0.
        scale: physical units per prior unit.

    Returns:
        ``(b, *shape)`` in prior units; by Tikhonov regularisation for images of two channels,
        whose gradient across channels means nothing.
    """
    shape = measurement.operator.in_shape
    if len(shape) == 2 or (len(shape) == 3 and shape[0] != 2):
        physical = measurement.rescaled(-offset / scale, 1 / scale)
        # for MR the value of prior value 1, not a percentile of the batch: mates must not matter
        unit = None if measurement.modality == "CT" else abs(offset) + scale
        x = tv(physical, unit=unit, tol=0.0, max_iter=_START_ITERATIONS).x
        return (x - offset) / scale
    white = measurement.whitened()
    back = white.operator.adjoint(white.data)
    return white.operator.normal_solve(back, 1.0, tol=1e-3, max_iter=30).x
