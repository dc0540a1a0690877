"""The named methods of :func:`inverse.reconstruct`: what each runs, costs and can claim.

A new method is one function of a :class:`Problem` and one row of :data:`METHODS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from inverse.posterior.gibbs import daps, pnpdm, red_diff
from inverse.posterior.guidance import (
    DPS,
    MMPS,
    HalfQuadratic,
    PiGDM,
    Proximal,
    ddnm_plus,
    has_closed_form,
    multistep,
)
from inverse.posterior.plug_and_play import pnp_admm
from inverse.posterior.problem import Problem
from inverse.posterior.projection import ald, mcg, score_mri, song_projection
from inverse.posterior.smc import tds
from inverse.sampling import (
    Count,
    Mixing,
    Named,
    NotNegative,
    Positive,
    Share,
    ancestral,
    ddim,
    langevin,
    renoise,
    reverse_diffusion,
    sample,
    time_grid,
)
from inverse.sde import SDE, VP

__all__ = ["METHODS", "PRESETS", "Method"]


def dds(
    problem: Problem,
    *,
    steps: Count = 40,
    eta: Share = 1.0,
    start_level: Positive = 0.5,
    end_level: Positive = 0.03,
    weight: Positive = 6.0,
    cg_iterations: Count = 15,
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
    steps: Count = 1000,
    lam: Mixing = 0.841,
    snr: NotNegative = 0.246,
    cg_iterations: Count = 10,
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


_END_LEVEL = 0.005
"""Last noise level, prior units: its square is what a sample's variance can lack."""


def _times(sde: SDE, steps: int) -> Tensor:
    """Times even in log noise level, from the largest to ``_END_LEVEL``."""
    return time_grid(sde, steps, end=max(_END_LEVEL, float(sde.noise_level(sde.t_min))))


def _ddpm_times(sde: SDE, steps: int, power: int) -> Tensor:
    """The same range, even in ``t^(1/power)`` of DDPM's clock, which is VP's, on any SDE."""
    ddpm = VP()
    high = min(float(sde.noise_level(1.0)), float(ddpm.noise_level(1.0)))
    low = max(_END_LEVEL, float(sde.noise_level(sde.t_min)))
    first, last = ddpm.time(high) ** (1 / power), ddpm.time(low) ** (1 / power)
    u = torch.linspace(0, 1, steps, dtype=torch.float64)
    return sde.time(ddpm.noise_level((first + u * (last - first)) ** power))


def dps(problem: Problem, *, steps: Count = 1000, zeta: Positive | None = None) -> Tensor:
    """Diffusion posterior sampling; see :class:`DPS`.

    Args:
        problem: the batch.
        steps: network calls, each with its backward pass.
        zeta: the authors' step size; default the weight of Bayes' rule.
    """
    times = _times(problem.prior.sde, steps)
    guided = DPS(problem.prior, problem.measurement, times, zeta=zeta)
    return sample(guided, times, ancestral, problem.noise, callback=problem.callback)


def pigdm(
    problem: Problem, *, steps: Count = 100, eta: Share = 1.0, cg_iterations: Count = 20
) -> Tensor:
    """Pseudo-inverse guidance with DDIM steps; see :class:`PiGDM`.

    Args:
        problem: the batch.
        steps: network calls, each with one vector-Jacobian product.
        eta: stochasticity of DDIM, 1 as in the paper.
        cg_iterations: conjugate-gradient steps a call, where there is no closed form.
    """
    times = _times(problem.prior.sde, steps)
    guided = PiGDM(problem.prior, problem.measurement, times, iterations=cg_iterations)
    return sample(guided, times, ddim(eta), problem.noise, callback=problem.callback)


def mmps(problem: Problem, *, steps: Count = 100, cg_iterations: Count = 5) -> Tensor:
    """Moment-matching posterior sampling with second-order SDE steps; see :class:`MMPS`.

    Five iterations leave samples 0.14 posterior standard deviations from those of exact solves
    (Gaussian field of 32 x 32, six CT views, 50 steps), ten 0.04, three 0.31.

    Args:
        problem: the batch.
        steps: network calls, each with at most ``cg_iterations + 2`` vector-Jacobian products.
        cg_iterations: conjugate-gradient steps a call.
    """
    guided = MMPS(problem.prior, problem.measurement, iterations=cg_iterations)
    times = _times(problem.prior.sde, steps)
    return sample(guided, times, multistep(), problem.noise, callback=problem.callback)


def ddnm(
    problem: Problem, *, steps: Count = 100, eta: Share = 0.85, cg_iterations: Count = 20
) -> Tensor:
    """DDNM+: :func:`ddnm_plus` where it exists, else a regularised pseudo-inverse.

    Args:
        problem: the batch.
        steps: network calls, evenly spaced in DDPM's time.
        eta: share of fresh noise a step (0.85: the authors').
        cg_iterations: conjugate-gradient steps a call, where there is no closed form.
    """
    prior, seen = problem.prior, problem.measurement
    times = _ddpm_times(prior.sde, steps, power=1)
    if has_closed_form(seen):
        return sample(prior, times, ddnm_plus(seen, eta), problem.noise, callback=problem.callback)
    guided = HalfQuadratic(prior, seen, iterations=cg_iterations)
    return sample(guided, times, renoise(eta), problem.noise, callback=problem.callback)


def diffpir(
    problem: Problem,
    *,
    steps: Count = 100,
    lam: Positive = 1.0,
    zeta: Share = 1.0,
    cg_iterations: Count = 20,
) -> Tensor:
    """DiffPIR; see :class:`HalfQuadratic`.  The authors' constants are those of inpainting.

    Args:
        problem: the batch.
        steps: network calls, evenly spaced in the square root of DDPM's time.
        lam: weight of the prior; 7 for deblurring.
        zeta: share of fresh noise in variance; 0.3 for deblurring.
        cg_iterations: conjugate-gradient steps a call, where there is no closed form.
    """
    guided = HalfQuadratic(
        problem.prior, problem.measurement, weight=lam**-0.5, iterations=cg_iterations
    )
    times = _ddpm_times(problem.prior.sde, steps, power=2)
    return sample(guided, times, renoise(zeta**0.5), problem.noise, callback=problem.callback)


@dataclass(frozen=True)
class Method(Named):
    """A row of the table of methods.

    Attributes:
        calls_per_step: network calls a step, or the option that says how many.
        operator_calls: applications of the operator or its adjoint a step, at most; an
            expression in the options.
        jacobian: whether it differentiates through the network.
        exactness: ``"asymptotically exact"``, ``"exact for Gaussian priors"`` or ``"biased"``.
        spread: what the standard deviation of its samples is worth on Gaussian problems: within
            a tenth of the posterior's, less than that, or no uncertainty at all.
        noise: what noise of the data it models.
        when: when to use it.
        reference: source.
    """

    calls_per_step: int | str
    operator_calls: str
    jacobian: bool
    exactness: str
    spread: Literal["posterior", "too small", "none"]
    noise: str
    when: str
    reference: str

    @property
    def network_calls(self) -> int:
        """Network calls a sample, with the default options."""
        calls = self.calls_per_step
        each = self.options[calls] if isinstance(calls, str) else calls
        return int(self.options["steps"]) * int(each)

    def resolve(self, given: Mapping[str, Any], modality: str = "") -> dict[str, Any]:
        """Defaults, overridden by the authors' constants for ``modality``, then by ``given``.

        Raises:
            InputError: an option that the method does not have, or a value out of its bounds.
        """
        return super().resolve({**PRESETS.get((self.name, modality), {}), **given})


PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    ("song", "CT"): {"lam": 0.841, "snr": 0.246},
    ("song", "MR"): {"lam": 1.0, "snr": 0.517},
}
"""Authors' constants, by method and modality: chest CT of 23 views, brain MR of 30 lines."""

METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method(
            name="pnp_admm",
            run=pnp_admm,
            title="Plug-and-play ADMM on noised estimates",
            calls_per_step=1,
            operator_calls="2 * cg_iterations + 2",
            jacobian=False,
            exactness="biased",
            spread="none",
            noise="Gaussian, known variance a datum",
            when="the default: the best image in 8 to 20 network calls; its spread is too small",
            reference="Chan et al., TCI 2017; Renaud et al., ICML 2024",
        ),
        Method(
            name="dds",
            run=dds,
            title="Decomposed diffusion sampling",
            calls_per_step=1,
            operator_calls="2 * cg_iterations + 2",
            jacobian=False,
            exactness="biased",
            spread="too small",
            noise="Gaussian, known variance a datum",
            when="the literature's fast point estimate, in 20 to 50 network calls",
            reference="Chung, Lee, Ye, ICLR 2024",
        ),
        Method(
            name="mmps",
            run=mmps,
            title="Moment-matching posterior sampling",
            calls_per_step=1,
            operator_calls="2 * cg_iterations + 4",
            jacobian=True,
            exactness="exact for Gaussian priors",
            spread="posterior",
            noise="Gaussian, known variance a datum",
            when="samples whose spread is right for exact priors, where the network's gradient is "
            "affordable",
            reference="Rozet et al., NeurIPS 2024",
        ),
        Method(
            name="pigdm",
            run=pigdm,
            title="Pseudo-inverse guidance (ΠGDM)",
            calls_per_step=1,
            operator_calls="2 * cg_iterations + 3",
            jacobian=True,
            exactness="biased",
            spread="posterior",
            noise="Gaussian, known variance a datum",
            when="nearly calibrated samples at one gradient a step",
            reference="Song, Vahdat, Mardani, Kautz, ICLR 2023",
        ),
        Method(
            name="dps",
            run=dps,
            title="Diffusion posterior sampling",
            calls_per_step=1,
            operator_calls="3",
            jacobian=True,
            exactness="biased",
            spread="too small",
            noise="Gaussian, known variance a datum; none with the authors' zeta",
            when="to compare with the literature; overconfident, a thousand network calls",
            reference="Chung et al., ICLR 2023",
        ),
        Method(
            name="ddnm",
            run=ddnm,
            title="Denoising diffusion null-space model (DDNM+)",
            calls_per_step=1,
            operator_calls="2 * cg_iterations + 2",
            jacobian=False,
            exactness="biased",
            spread="too small",
            noise="Gaussian, known variance a datum",
            when="masks and single-coil Cartesian MRI, where its step has a closed form",
            reference="Wang, Yu, Zhang, ICLR 2023",
        ),
        Method(
            name="diffpir",
            run=diffpir,
            title="Plug-and-play restoration (DiffPIR)",
            calls_per_step=1,
            operator_calls="2 * cg_iterations + 2",
            jacobian=False,
            exactness="biased",
            spread="too small",
            noise="Gaussian, known variance a datum",
            when="a fast point estimate without a gradient; its spread is too small",
            reference="Zhu et al., CVPRW 2023",
        ),
        Method(
            name="song",
            run=song,
            title="Predictor-corrector with projection",
            calls_per_step=2,
            operator_calls="2 * (2 * cg_iterations + 4)",
            jacobian=False,
            exactness="biased",
            spread="too small",
            noise="none: the data are taken as noise-free",
            when="to reproduce the 2022 paper; nearly noise-free data; thousands of network calls",
            reference="Song, Shen, Xing, Ermon, ICLR 2022",
        ),
        Method(
            name="pnpdm",
            run=pnpdm,
            title="Split Gibbs sampling (PnP-DM)",
            calls_per_step="calls",
            operator_calls="2 * cg_iterations + 2",
            jacobian=False,
            exactness="asymptotically exact",
            spread="posterior",
            noise="Gaussian, known variance a datum",
            when="samples whose spread is right for exact priors, without the network's gradient",
            reference="Wu et al., NeurIPS 2024",
        ),
        Method(
            name="daps",
            run=daps,
            title="Decoupled annealing (DAPS)",
            calls_per_step="ode_steps",
            operator_calls="2 * cg_iterations + 2",
            jacobian=False,
            exactness="biased",
            spread="posterior",
            noise="Gaussian, known variance a datum",
            when="samples at one call a step without a gradient; weights of modes err",
            reference="Zhang et al., CVPR 2025",
        ),
        Method(
            name="smc",
            run=tds,
            title="Twisted particle filter (TDS)",
            calls_per_step="particles",
            operator_calls="2 * cg_iterations + 2",
            jacobian=True,
            exactness="asymptotically exact",
            spread="posterior",
            noise="Gaussian, known variance a datum",
            when="the slow reference for small images, against which others are judged",
            reference="Wu et al., NeurIPS 2023",
        ),
        Method(
            name="red_diff",
            run=red_diff,
            title="Regularisation by denoising (RED-diff)",
            calls_per_step=1,
            operator_calls="2",
            jacobian=False,
            exactness="biased",
            spread="none",
            noise="Gaussian, known variance a datum",
            when="one likely image, a mode; its spread means nothing",
            reference="Mardani et al., ICLR 2024",
        ),
        Method(
            name="ald",
            run=ald,
            title="Annealed Langevin dynamics",
            calls_per_step="inner",
            operator_calls="2 * inner",
            jacobian=False,
            exactness="asymptotically exact",
            spread="posterior",
            noise="Gaussian, known variance a datum",
            when="to compare with the MRI literature; a thousand network calls and more",
            reference="Jalal et al., NeurIPS 2021",
        ),
        Method(
            name="score_mri",
            run=score_mri,
            title="Score-MRI: predictor-corrector with POCS",
            calls_per_step=2,
            operator_calls="2 * (2 * cg_iterations + 2)",
            jacobian=False,
            exactness="biased",
            spread="too small",
            noise="none: the data are taken as noise-free",
            when="to compare with the MRI literature; nearly noise-free data",
            reference="Chung and Ye, MedIA 2022",
        ),
        Method(
            name="mcg",
            run=mcg,
            title="Manifold constrained gradient",
            calls_per_step=2,
            operator_calls="6 * cg_iterations + 6",
            jacobian=True,
            exactness="biased",
            spread="too small",
            noise="Gaussian, known variance a datum",
            when="to compare with the CT literature",
            reference="Chung, Sim, Ryu, Ye, NeurIPS 2022",
        ),
    )
}
