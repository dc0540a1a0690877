"""The named methods of :func:`inverse.reconstruct`: what each runs, costs and can claim.

A new method is one function of a :class:`Problem` and one row of :data:`METHODS`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from inverse.errors import ReconError
from inverse.posterior.guidance import Proximal
from inverse.posterior.problem import Problem
from inverse.posterior.projection import song_projection
from inverse.sampling import langevin, renoise, reverse_diffusion, sample, time_grid

__all__ = ["METHODS", "Method"]


def dds(
    problem: Problem,
    *,
    steps: int = 40,
    eta: float = 1.0,
    start_level: float = 0.5,
    end_level: float = 0.03,
    weight: float = 6.0,
    cg_iterations: int = 15,
) -> Tensor:
    """Decomposed diffusion sampling from a Tikhonov start; see :class:`Proximal`.

    Instead of pure noise the sampler starts from the ridge solution plus noise of
    ``start_level``, where the prior still decides the structure and a tenth of the calls suffice.
    The defaults are the best found on 23-view CT of patients that no prior has seen; ``weight``
    above 1 because the error of a network is not white but sits where the data can correct it.

    Args:
        problem: the batch.
        steps: network calls.
        eta: share of fresh noise a step.
        start_level: noise level of the start, prior units.
        end_level: noise level of the last call.
        weight: trust in the data; see :class:`Proximal`.
        cg_iterations: conjugate-gradient steps a call.
    """
    white = problem.measurement.whitened()
    start = white.operator.normal_solve(
        white.operator.adjoint(white.data), 1.0, tol=1e-3, max_iter=30
    ).x
    guided = Proximal(problem.prior, problem.measurement, weight=weight, iterations=cg_iterations)
    times = time_grid(problem.prior.sde, steps, start=start_level, end=end_level)
    return sample(
        guided, times, renoise(eta), problem.noise, start=start, callback=problem.callback
    )


def song(
    problem: Problem,
    *,
    steps: int = 1000,
    lam: float = 0.841,
    snr: float = 0.246,
    cg_iterations: int = 10,
) -> Tensor:
    """Song et al. 2022: predictor-corrector with projection before each half-step.

    Args:
        problem: the batch.
        steps: predictor steps; twice as many network calls.
        lam: mixing weight of the projection (0.841: the authors' for 23-view chest CT).
        snr: corrector's signal-to-noise ratio (0.246: likewise).
        cg_iterations: conjugate-gradient steps a projection.
    """
    sde = problem.prior.sde
    project = song_projection(
        problem.measurement, sde, problem.noise, lam=lam, iterations=cg_iterations
    )
    x = sample(
        problem.prior,
        time_grid(sde, steps, spacing="uniform"),
        reverse_diffusion,
        problem.noise,
        corrector=langevin(snr),
        project=project,
        callback=problem.callback,
    )
    operator = problem.measurement.operator
    b = operator.adjoint(problem.measurement.data)
    return operator.normal_solve(b, 0.0, x, max_iter=3 * cg_iterations).x


@dataclass(frozen=True)
class Method:
    """A row of the table of methods.

    Attributes:
        run: the function; its keyword arguments are the method's options.
        title: what it is.
        calls_per_step: network calls a step.
        jacobian: whether it differentiates through the network.
        exactness: ``"asymptotically exact"``, ``"exact for Gaussian priors"`` or ``"biased"``.
        noise: what noise of the data it models.
        when: when to use it.
        reference: source.
    """

    run: Callable[..., Tensor]
    title: str
    calls_per_step: int
    jacobian: bool
    exactness: str
    noise: str
    when: str
    reference: str

    @property
    def options(self) -> Mapping[str, Any]:
        """Option names and their defaults."""
        parameters = inspect.signature(self.run).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    def resolve(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults overridden by ``given``.

        Raises:
            ReconError: for an option that the method does not have.
        """
        unknown = sorted(set(given) - set(self.options))
        if unknown:
            raise ReconError(
                f"method '{self.title}' has no option {', '.join(unknown)}; it has "
                f"{', '.join(self.options)}"
            )
        return {**self.options, **given}


METHODS: dict[str, Method] = {
    "dds": Method(
        run=dds,
        title="Decomposed diffusion sampling",
        calls_per_step=1,
        jacobian=False,
        exactness="biased",
        noise="Gaussian, known variance a sample",
        when="the default: a good image in 20 to 40 network calls; its spread is too small",
        reference="Chung, Lee, Ye, ICLR 2024",
    ),
    "song": Method(
        run=song,
        title="Predictor-corrector with projection",
        calls_per_step=2,
        jacobian=False,
        exactness="biased",
        noise="none: the data are taken as noise-free",
        when="to reproduce the 2022 paper; nearly noise-free data; thousands of network calls",
        reference="Song, Shen, Xing, Ermon, ICLR 2022",
    ),
}
