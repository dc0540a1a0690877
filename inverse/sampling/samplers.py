"""The named samplers of a prior: what each runs, costs and converges like.

A sampler is one function ``(denoiser, noise, *, steps, levels, callback, ...) -> samples`` and one
row of :data:`SAMPLERS`.  ``levels`` are the largest and the smallest noise level ``sigma/alpha``,
by default those of ``t = 1`` and ``t_min``; every sampler ends with the Tweedie step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from inverse.errors import GeometryError, InputError, NumericalError
from inverse.priors.denoiser import Denoiser, expand
from inverse.sampling import steps as step_functions
from inverse.sampling.named import Count, Named, NotNegative, Positive, Share
from inverse.sampling.ode import RK45, Heun, decode
from inverse.sampling.sample import DIVERGED, Noise, sample, time_grid
from inverse.sampling.steps import Corrector, Step

__all__ = ["SAMPLERS", "Sampler", "annealed_langevin", "langevin_dynamics"]

NCSN_RATIO = 0.6
"""Ratio of neighbouring noise levels: ten levels from 1 to 0.01."""

Levels: TypeAlias = tuple[float, float] | None
Callback: TypeAlias = Callable[[int, int], None] | None


def langevin_dynamics(
    denoiser: Denoiser,
    noise: Noise,
    *,
    steps: Count = 1000,
    epsilon: Positive | None = None,
    start: Tensor | None = None,
    levels: Levels = None,
    callback: Callback = None,
) -> Tensor:
    r"""Unadjusted Langevin at the smallest level: :math:`y \leftarrow y + \epsilon s
    + \sqrt{2\epsilon}\,z`.

    On :math:`N(0, v)` its stationary variance is :math:`v/(1 - \epsilon/2v)` and it diverges from
    :math:`\epsilon = 2v` on.  It does not cross between separate modes in any affordable time, so
    their weights stay those of the start: the failure that noise levels cure.

    Args:
        denoiser: prior.
        noise: source of noise; fixes the number and shape of samples.
        steps: network calls, less the last.
        epsilon: step, prior units squared; default a tenth of the level's variance.
        start: clean images to start from, ``(samples, *shape)``; default standard normal noise.
        levels: noise levels; the smallest is used.
        callback: progress, ``(done, total)``.

    Source: Parisi, Correlation functions and computer simulations (Nucl. Phys. B 180, 1981);
    Song and Ermon (NeurIPS 2019), equation 4, whose step is twice this one.
    """  # noqa: D205
    _, low = _range(denoiser, levels)
    z = noise()
    if start is not None and start.shape != z.shape:
        raise GeometryError(
            f"Langevin's start must have the shape of the noise, {tuple(z.shape)}, "
            f"got {tuple(start.shape)}"
        )
    y = z if start is None else start.to(z)
    return _langevin(denoiser, noise, y, [low], steps, epsilon, callback)


def annealed_langevin(
    denoiser: Denoiser,
    noise: Noise,
    *,
    steps: Count = 1000,
    count: Count | None = None,
    epsilon: Positive | None = None,
    levels: Levels = None,
    callback: Callback = None,
) -> Tensor:
    r"""Langevin at falling noise levels, with steps :math:`\alpha_i = \epsilon\,
    \sigma_i^2/\sigma_L^2`.

    The levels :math:`\sigma_1 > \dots > \sigma_L` are geometric and share the steps equally.  It
    runs on :math:`y = x/\alpha`, whose noise level is :math:`\sigma/\alpha`, under every SDE.

    Args:
        denoiser: prior.
        noise: source of noise; fixes the number and shape of samples.
        steps: Langevin steps in all: network calls, less the last.
        count: noise levels ``L``; default as many as keep their ratio at that of the paper, 0.6.
        epsilon: step at the last level, prior units squared; default a tenth of its variance.
        levels: largest and smallest noise level.
        callback: progress, ``(done, total)``.

    Source: Song and Ermon, Generative modeling by estimating gradients of the data distribution
    (NeurIPS 2019), algorithm 1, whose :math:`\alpha_i` is twice this one.
    Here: docs/theory.md, equation (13).
    """  # noqa: D205
    high, low = _range(denoiser, levels)
    if count is None:
        count = 1 + math.ceil(math.log(high / low) / -math.log(NCSN_RATIO))
    if not 1 <= count <= steps:
        raise InputError(
            f"annealed Langevin needs at least 1 level and a step for each, got {count} levels "
            f"and {steps} steps"
        )
    u = torch.linspace(0, 1, count, dtype=torch.float64)
    ladder = (high * (low / high) ** u).tolist()
    return _langevin(denoiser, noise, high * noise(), ladder, steps, epsilon, callback)


def _langevin(
    denoiser: Denoiser,
    noise: Noise,
    y: Tensor,
    ladder: list[float],
    steps: int,
    epsilon: float | None,
    callback: Callback,
) -> Tensor:
    """Langevin on ``y = x / alpha`` down a ladder of levels, then the Tweedie step."""
    if steps < 1:
        raise InputError(f"a sampler needs at least 1 step, got {steps}")
    if epsilon is not None and not epsilon > 0:
        raise NumericalError(
            f"Langevin's step must be above 0, got {epsilon:g}; a tenth of the smallest level's "
            f"variance, {0.1 * ladder[-1] ** 2:.2g}, is a safe choice"
        )
    relative = 0.1 if epsilon is None else epsilon / ladder[-1] ** 2
    bound = DIVERGED * (ladder[0] + float(y.abs().max()))
    times = denoiser.sde.time(torch.tensor(ladder, dtype=torch.float64))
    for i in range(steps):
        k = i * len(ladder) // steps
        level, alpha = ladder[k], expand(denoiser.sde.alpha(times[k]), y)
        step = relative * level**2
        score = (denoiser.denoise(alpha * y, times[k]) - y) / level**2
        y = y + step * score + (2 * step) ** 0.5 * noise()
        if not bool((y.abs() <= bound).all()):
            raise NumericalError(
                f"Langevin diverged at step {i + 1} of {steps} with a step of {step:.3g} at noise "
                f"level {level:.3g}; lower epsilon, below twice the smallest variance of the "
                f"noisy images (certainly stable: below {2 * ladder[-1] ** 2:.2g})"
            )
        if callback is not None:
            callback(i + 1, steps)
    return denoiser.denoise(expand(denoiser.sde.alpha(times[-1]), y) * y, times[-1])


def euler_maruyama(
    denoiser: Denoiser,
    noise: Noise,
    *,
    steps: Count = 500,
    levels: Levels = None,
    callback: Callback = None,
) -> Tensor:
    """Euler-Maruyama on the reverse SDE, steps even in ``t``."""
    return _reverse(denoiser, noise, step_functions.euler_maruyama, steps, levels, callback)


def ancestral(
    denoiser: Denoiser,
    noise: Noise,
    *,
    steps: Count = 500,
    levels: Levels = None,
    callback: Callback = None,
) -> Tensor:
    """Ancestral sampling, as in DDPM, steps even in ``t``."""
    return _reverse(denoiser, noise, step_functions.ancestral, steps, levels, callback)


def reverse_diffusion(
    denoiser: Denoiser,
    noise: Noise,
    *,
    steps: Count = 500,
    levels: Levels = None,
    callback: Callback = None,
) -> Tensor:
    """Reverse-diffusion sampling, steps even in ``t``."""
    return _reverse(denoiser, noise, step_functions.reverse_diffusion, steps, levels, callback)


def predictor_corrector(
    denoiser: Denoiser,
    noise: Noise,
    *,
    steps: Count = 250,
    snr: NotNegative = 0.16,
    norms: Literal["expected", "sample"] = "expected",
    levels: Levels = None,
    callback: Callback = None,
) -> Tensor:
    """A Langevin corrector before every reverse-diffusion predictor, steps even in ``t``.

    Args:
        denoiser: prior.
        noise: source of noise.
        steps: predictor steps; twice as many network calls, less one.
        snr: the corrector's signal-to-noise ratio ``r``.
        norms: what the corrector's step is made of; see :func:`inverse.sampling.langevin`.
        levels: largest and smallest noise level.
        callback: progress.
    """
    corrector = step_functions.langevin(snr, norms)
    step = step_functions.reverse_diffusion
    return _reverse(denoiser, noise, step, steps, levels, callback, corrector)


def ddim(
    denoiser: Denoiser,
    noise: Noise,
    *,
    steps: Count = 50,
    eta: Share = 0.0,
    levels: Levels = None,
    callback: Callback = None,
) -> Tensor:
    """DDIM with ``eta`` times the noise of ancestral sampling, steps even in ``t``."""
    return _reverse(denoiser, noise, step_functions.ddim(eta), steps, levels, callback)


def heun(
    denoiser: Denoiser,
    noise: Noise,
    *,
    steps: Count = 25,
    levels: Levels = None,
    callback: Callback = None,
) -> Tensor:
    """The probability-flow ODE by Heun's method on EDM's grid of levels."""
    return _flow(denoiser, noise, Heun(steps, "karras"), levels, callback)


def rk45(
    denoiser: Denoiser,
    noise: Noise,
    *,
    atol: Positive = 1e-5,
    rtol: Positive = 1e-5,
    levels: Levels = None,
    callback: Callback = None,
) -> Tensor:
    """The probability-flow ODE by an adaptive Runge-Kutta pair, each sample at its own step."""
    return _flow(denoiser, noise, RK45(atol, rtol), levels, callback)


def _range(denoiser: Denoiser, levels: Levels) -> tuple[float, float]:
    """Largest and smallest noise level, checked."""
    sde = denoiser.sde
    high, low = (
        (float(sde.noise_level(1.0)), float(sde.noise_level(sde.t_min)))
        if levels is None
        else levels
    )
    if not 0 < low <= high:
        raise NumericalError(
            f"noise levels must be above 0 and fall, got {high:g} to {low:g}; those of {sde} are "
            f"{float(sde.noise_level(1.0)):.3g} to {float(sde.noise_level(sde.t_min)):.3g}"
        )
    return high, low


def _reverse(
    denoiser: Denoiser,
    noise: Noise,
    step: Step,
    steps: int,
    levels: Levels,
    callback: Callback,
    corrector: Corrector | None = None,
) -> Tensor:
    high, low = _range(denoiser, levels)
    times = time_grid(denoiser.sde, steps, start=high, end=low, spacing="uniform")
    return sample(denoiser, times, step, noise, corrector=corrector, callback=callback)


def _flow(
    denoiser: Denoiser, noise: Noise, solver: Heun | RK45, levels: Levels, callback: Callback
) -> Tensor:
    levels = _range(denoiser, levels)
    z = noise()
    x = expand(denoiser.sde.sigma(denoiser.sde.time(levels[0])), z) * z
    return decode(denoiser, x, solver=solver, levels=levels, tweedie=True, callback=callback)


@dataclass(frozen=True)
class Sampler(Named):
    """A row of the table of samplers.

    Attributes:
        calls_per_step: network calls a step.
        stochastic: whether it draws noise after its start.
        order: order at which the error of expectations vanishes with the step; for Langevin, of
            its stationary law.
        when: when to use it.
        reference: source.
    """

    calls_per_step: int
    stochastic: bool
    order: int
    when: str
    reference: str

    _not_options = frozenset({"start", "levels", "callback"})


SAMPLERS: dict[str, Sampler] = {
    row.name: row
    for row in (
        Sampler(
            name="langevin",
            run=langevin_dynamics,
            title="Langevin dynamics at one noise level",
            calls_per_step=1,
            stochastic=True,
            order=1,
            when="to see why noise levels are needed: modes keep the weights of the start",
            reference="Song and Ermon, NeurIPS 2019",
        ),
        Sampler(
            name="annealed-langevin",
            run=annealed_langevin,
            title="Annealed Langevin dynamics",
            calls_per_step=1,
            stochastic=True,
            order=1,
            when="to reproduce NCSN",
            reference="Song and Ermon, NeurIPS 2019",
        ),
        Sampler(
            name="euler-maruyama",
            run=euler_maruyama,
            title="Euler-Maruyama on the reverse SDE",
            calls_per_step=1,
            stochastic=True,
            order=1,
            when="the plainest solver; needs many steps",
            reference="Song et al., ICLR 2021",
        ),
        Sampler(
            name="ancestral",
            run=ancestral,
            title="Ancestral sampling",
            calls_per_step=1,
            stochastic=True,
            order=1,
            when="the most robust stochastic sampler at few steps",
            reference="Ho et al., NeurIPS 2020",
        ),
        Sampler(
            name="reverse-diffusion",
            run=reverse_diffusion,
            title="Reverse-diffusion sampling",
            calls_per_step=1,
            stochastic=True,
            order=1,
            when="the predictor of the score-SDE paper",
            reference="Song et al., ICLR 2021",
        ),
        Sampler(
            name="pc",
            run=predictor_corrector,
            title="Predictor-corrector",
            calls_per_step=2,
            stochastic=True,
            order=1,
            when="to reproduce the score-SDE paper: reverse diffusion with Langevin corrections",
            reference="Song et al., ICLR 2021",
        ),
        Sampler(
            name="ddim",
            run=ddim,
            title="DDIM",
            calls_per_step=1,
            stochastic=False,
            order=1,
            when="few calls; eta above 0 makes it stochastic",
            reference="Song, Meng, Ermon, ICLR 2021",
        ),
        Sampler(
            name="heun",
            run=heun,
            title="Probability-flow ODE, Heun",
            calls_per_step=2,
            stochastic=False,
            order=2,
            when="good samples in 30 to 80 calls",
            reference="Karras et al., NeurIPS 2022",
        ),
        Sampler(
            name="rk45",
            run=rk45,
            title="Probability-flow ODE, Dormand-Prince 5(4)",
            calls_per_step=6,
            stochastic=False,
            order=5,
            when="samples at a stated tolerance; latents that encode and decode",
            reference="Song et al., ICLR 2021",
        ),
    )
}
