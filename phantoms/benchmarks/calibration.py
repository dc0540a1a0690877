r"""How far each method is from the exact posterior: ``python -m phantoms.benchmarks.calibration``.

Problems whose posterior is known in closed form, so that nothing but the method can err:

* two-dimensional Gaussian, prior N(0, [[1, .8], [.8, 1]]), one noisy value of two;
* one-dimensional Gaussian, prior N(0, 1), noise .5;
* two-dimensional mixture of two modes, whose weights the data shift;
* smooth Gaussian fields of dense covariance seen by parallel-beam CT and by Cartesian MRI.

For the small problems one fixed measurement, sampled n times, gives the moments, the KL
divergence and the mode weights, and many simulated pairs of truth and data give what must hold
over them: coverage of intervals, uniform ranks (simulation-based calibration, Talts et al. 2018)
and a reduced chi-square of 1.  The fields run through :func:`inverse.reconstruct.reconstruct` with
16 samples.

``--acceptance`` tests the instruments themselves: they have to pass exact draws of the posterior
of a field, and to refuse draws that are a little too narrow, moved, or of the prior.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inverse.measurement import Measurement
from inverse.operators.ct import ParallelBeam, RayTransform
from inverse.operators.linop import ComplexFromReal, LinearOperator
from inverse.operators.mask import Mask
from inverse.operators.mri import CartesianMRI, cartesian_mask
from inverse.posterior import METHODS, Problem
from inverse.priors import GaussianPrior, MixturePrior
from inverse.priors.denoiser import CountedDenoiser, Denoiser
from inverse.priors.exact import GaussianPosterior
from inverse.reconstruct import reconstruct
from inverse.sampling import Noise
from inverse.sde import SDE, VE
from inverse.trust import coverage, interval, ranks, tarp

_FROM_NOISE = {"steps": 50, "start_level": 40.0, "end_level": 0.01, "eta": 0.85}
SETTINGS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "pnp_admm": ("pnp_admm", {}),
    "pnp_admm, weight 1": ("pnp_admm", {"weight": 1.0, "end_level": 0.01, "steps": 50}),
    "mmps": ("mmps", {}),
    "mmps, 20 steps": ("mmps", {"steps": 20}),
    "pigdm": ("pigdm", {}),
    "dps": ("dps", {"steps": 1000}),
    "diffpir": ("diffpir", {}),
    "ddnm": ("ddnm", {}),
    "dds": ("dds", _FROM_NOISE),
    "dds, weight 1": ("dds", {**_FROM_NOISE, "weight": 1.0}),
    "song": ("song", {"steps": 200, "lam": 1.0, "snr": 0.16}),
    "score_mri": ("score_mri", {"steps": 200}),
    "mcg": ("mcg", {"steps": 200}),
    "ald": ("ald", {}),
    "pnpdm": ("pnpdm", {}),
    "daps": ("daps", {}),
    "red_diff": ("red_diff", {"steps": 200}),
    "smc": ("smc", {"group": 1 << 20}),
}
"""Label: method and options.  All but pnp_admm start from noise, unlike the default of dds."""

SLOW: Mapping[str, int] = {
    "pnp_admm": 20,
    "pnp_admm, weight 1": 20,
    "dps": 2,
    "pnpdm": 2,
    "ald": 5,
    "smc": 20,
}
"""What the numbers of samples are divided by; smc is left out of the fields altogether."""

DRAWS = 79
"""Draws a simulated pair: 80 ranks, of which 50, 80 and 95 % are whole numbers."""
LEVELS = (50, 80, 95)
"""Per cent of the intervals of small problems."""


@dataclass(frozen=True)
class Toy:
    """A small problem with its exact posterior.

    Attributes:
        name: name.
        prior: prior over images of ``operator.in_shape``.
        operator: forward operator, real.
        noise: standard deviation of the data.
        data: the fixed measurement, ``(1, *out_shape)``.
        exact: weights and Gaussians of its posterior.
    """

    name: str
    prior: GaussianPrior | MixturePrior
    operator: LinearOperator
    noise: float
    data: Tensor

    @property
    def exact(self) -> tuple[Tensor, list[GaussianPosterior]]:
        """Weights ``(k,)`` and components of the posterior of ``data``."""
        matrix = dense(self.operator)
        if isinstance(self.prior, MixturePrior):
            return self.prior.posterior(matrix, self.data.flatten(), self.noise)
        single = self.prior.posterior(matrix, self.data.flatten(), self.noise)
        return torch.ones(1, dtype=torch.float64), [single]

    def measurement(self, data: Tensor | None = None) -> Measurement:
        """The fixed measurement, or one of other ``data``."""
        y = self.data if data is None else data
        return Measurement(self.operator, y, torch.tensor(self.noise), "MR", (1.0, 1.0))

    def simulate(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """``count`` pairs of a truth from the prior and its data."""
        generator = torch.Generator().manual_seed(seed)
        truth = _draw(self.prior, count, generator)
        clean = self.operator(truth)
        noise = torch.randn(clean.shape, generator=generator) * (dense(self.operator).any(dim=1))
        return truth, clean + self.noise * noise.reshape(clean.shape)


def two_dimensional(sde: SDE | None = None) -> Toy:
    """Prior N(0, [[1, .8], [.8, 1]]), y = x_1 + 0.3 n = 1."""
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    prior = GaussianPrior(0.0, covariance, (1, 2), sde or VE(0.005, 50.0))
    operator = Mask(torch.tensor([[True, False]]))
    return Toy("2-D Gaussian", prior, operator, 0.3, torch.tensor([[[1.0, 0.0]]]))


def one_dimensional(sde: SDE | None = None) -> Toy:
    """Prior N(0, 1), y = x + 0.5 n = 1.5; posterior N(1.2, .447^2)."""
    prior = GaussianPrior(0.0, torch.ones(1, 1), (1, 1), sde or VE(0.005, 50.0))
    operator = Mask(torch.tensor([[True]]))
    return Toy("1-D Gaussian", prior, operator, 0.5, torch.tensor([[[1.5]]]))


def mixture(sde: SDE | None = None) -> Toy:
    """Modes at (-1.5, -2) and (1.5, 2) of weights .3 and .7; y = x_1 + n = -0.2."""
    prior = MixturePrior(
        torch.tensor([0.3, 0.7]),
        torch.tensor([[-1.5, -2.0], [1.5, 2.0]]),
        torch.tensor([[[0.4, 0.1], [0.1, 0.3]], [[0.3, -0.1], [-0.1, 0.4]]]),
        (1, 2),
        sde or VE(0.005, 50.0),
    )
    operator = Mask(torch.tensor([[True, False]]))
    return Toy("2-D mixture", prior, operator, 1.0, torch.tensor([[[-0.2, 0.0]]]))


TOYS = (two_dimensional, one_dimensional, mixture)


@dataclass(frozen=True)
class Row:
    """Distance of a method's samples from the exact posterior.

    Attributes:
        problem: problem.
        method: label of the method and its settings.
        calls: network calls a sample.
        n: samples of the fixed measurement; of fields, of all slices.
        mean_error: RMS of (mean - exact mean) / exact sd.
        sd_ratio: mean of sd / exact sd; below 1 is overconfident.
        correlation: of the first two unknowns, beside the exact one; None in one dimension.
        kl: KL divergence of the fitted Gaussian from a Gaussian posterior in nats; infinite where
            the samples' covariance is singular, None where the posterior is a mixture.
        modes: weight of the first mode, beside the exact one; None for Gaussians.
        pairs: simulated pairs of truth and data; of fields, slices.
        coverage: share of truths in central intervals, by nominal per cent.
        half: what the coverage of exact draws varies by, half of its 95 % interval.
        sbc_p: p value that ranks are uniform, the least over the unknowns and the log likelihood,
            times their number; None for fields and for fewer than ten simulations.
        chi2: reduced residual of a sample over simulated pairs, 1 for an exact one.
        seconds: wall-clock time.
    """

    problem: str
    method: str
    calls: int
    n: int
    mean_error: float
    sd_ratio: float
    correlation: tuple[float, float] | None
    kl: float | None
    modes: tuple[float, float] | None
    pairs: int
    coverage: Mapping[int, float]
    half: Mapping[int, float]
    sbc_p: float | None
    chi2: float
    seconds: float


def run(
    prior: Denoiser,
    measurement: Measurement,
    count: int,
    method: str,
    options: Mapping[str, Any],
    seed: int = 0,
) -> Tensor:
    """``(slices * count, d)`` samples, float64, ``count`` for each slice in turn."""
    n = len(measurement)
    index = torch.arange(n).repeat_interleave(count)
    noise = _Draws(n * count, measurement.operator.in_shape, seed)
    problem = Problem(prior, measurement.take(index), noise)
    with torch.inference_mode():
        samples = METHODS[method].run(problem, **METHODS[method].resolve(options))
    return samples.flatten(1).to(torch.float64)


def moments(toy: Toy, draws: Tensor) -> dict[str, Any]:
    """What one fixed measurement shows: errors of mean, sd and correlation, KL, mode weights."""
    weights, parts = toy.exact
    means = torch.stack([p.mean for p in parts])
    exact_mean = weights @ means
    second = torch.stack([p.covariance + torch.outer(p.mean, p.mean) for p in parts])
    exact = torch.einsum("k,kij->ij", weights, second) - torch.outer(exact_mean, exact_mean)
    mean, covariance = draws.mean(dim=0), torch.cov(draws.T).reshape(exact.shape)
    exact_sd = exact.diagonal().sqrt()
    kl = modes = None
    if len(parts) == 1:
        singular = float(torch.linalg.eigvalsh(covariance).min()) < 1e-10
        kl = math.inf if singular else parts[0].kl(mean, covariance)
    else:
        share = torch.softmax(_log_densities(weights, parts, draws), dim=1).mean(dim=0)
        modes = (float(share[0]), float(weights[0]))
    return {
        "mean_error": float(((mean - exact_mean) / exact_sd).square().mean().sqrt()),
        "sd_ratio": float((covariance.diagonal().sqrt() / exact_sd).mean()),
        "correlation": (
            (_correlation(covariance), _correlation(exact)) if len(exact_sd) > 1 else None
        ),
        "kl": kl,
        "modes": modes,
    }


def calibration(toy: Toy, truth: Tensor, data: Tensor, draws: Tensor) -> dict[str, Any]:
    """What simulated pairs show: coverage, ranks, chi-square.

    Args:
        toy: the problem.
        truth: ``(n, *in_shape)``.
        data: ``(n, *out_shape)``.
        draws: ``(n * DRAWS, d)`` samples of the posteriors of ``data``.
    """
    n = len(truth)
    images = draws.to(torch.float32).reshape(-1, *toy.operator.in_shape)
    repeated = data.repeat_interleave(DRAWS, dim=0)
    misfit = (repeated - toy.operator(images)).square().flatten(1).sum(dim=1) / toy.noise**2
    true_misfit = (data - toy.operator(truth)).square().flatten(1).sum(dim=1) / toy.noise**2
    unknowns, samples = truth.flatten(1).double(), draws.reshape(n, DRAWS, -1)
    # the log likelihood catches a sampler that returns the prior, whose marginals are right
    likelihood = -misfit.double().reshape(n, DRAWS, 1)
    with_likelihood = torch.cat([samples, likelihood], dim=2)
    numbers = torch.cat([unknowns, -true_misfit.double()[:, None]], dim=1)
    shares = coverage(unknowns, samples, [level / 100 for level in LEVELS])
    # of 16 bins as many as hold five simulations each; they have to divide the 80 ranks
    bins = next((b for b in (16, 10, 8, 5, 4, 2) if n >= 5 * b), None)
    return {
        "coverage": dict(zip(LEVELS, shares.held, strict=True)),
        "sbc_p": ranks(numbers, with_likelihood, bins=bins).p if bins else None,
        "chi2": float(misfit.mean() / toy.operator.measured),
    }


def binomial(share: float, count: int) -> float:
    """Half of the 95 % interval of a share of ``count`` independent draws."""
    return 1.96 * math.sqrt(share * (1 - share) / count)


def measure(
    toy: Toy, label: str, *, count: int = 20000, simulations: int = 320, seed: int = 0
) -> Row:
    """Run a row of :data:`SETTINGS` on a small problem."""
    started = time.monotonic()
    method, options = SETTINGS[label]
    counted = CountedDenoiser(toy.prior)
    draws = run(counted, toy.measurement(), count, method, options, seed)
    calls = counted.images // count
    truth, data = toy.simulate(simulations, seed + 1)
    simulated = run(toy.prior, toy.measurement(data), DRAWS, method, options, seed + 2)
    return Row(
        problem=toy.name,
        method=label,
        calls=calls,
        n=count,
        **moments(toy, draws),
        pairs=simulations,
        **calibration(toy, truth, data, simulated),
        half={level: binomial(level / 100, simulations) for level in LEVELS},
        seconds=time.monotonic() - started,
    )


@dataclass(frozen=True)
class Field:
    """Gaussian fields, their measurements and exact posteriors.

    Attributes:
        name: name.
        prior: prior over real images.
        measurement: one slice a truth.
        truth: ``(slices, side, side)``.
        exact: one posterior a slice.
    """

    name: str
    prior: GaussianPrior
    measurement: Measurement
    truth: Tensor
    exact: list[GaussianPosterior]


def field(kind: str = "ct", side: int = 16, slices: int = 1, seed: int = 0) -> Field:
    """Smooth Gaussian fields of ``side`` x ``side`` seen by 6 views, or a quarter of k-space."""
    i = torch.arange(side, dtype=torch.float64)
    one = torch.exp(-((i[:, None] - i[None, :]) ** 2) / (2 * (side / 6) ** 2))
    covariance = torch.kron(one, one) + 0.01 * torch.eye(side**2, dtype=torch.float64)
    prior = GaussianPrior(0.0, covariance, (side, side), VE(0.005, 50.0))
    generator = torch.Generator().manual_seed(seed)
    truth = prior.sample(slices, generator)
    if kind == "ct":
        geometry = ParallelBeam.sparse(6, (side, side), 1.0)
        operator: LinearOperator = RayTransform(geometry, (side, side), 1.0)
        real, noise = operator, 0.5
        data = operator(truth)
        data = data + noise * torch.randn(data.shape, generator=generator)
    else:
        mask = cartesian_mask((side, side), 4.0, 0.12, "random1d")
        operator = CartesianMRI(mask)
        real, noise = operator @ ComplexFromReal((side, side)), 0.2
        pairs = torch.randn(slices, side, side, 2, generator=generator)
        data = real(truth) + noise * mask * torch.view_as_complex(pairs)
    matrix = dense(real)
    seen = matrix.any(dim=1)
    exact = [prior.posterior(matrix[seen], _real(y).flatten()[seen], noise) for y in data]
    measurement = Measurement(operator, data, torch.tensor(noise), "MR", (1.0, 1.0))
    return Field(f"Gaussian field, {kind.upper()}", prior, measurement, truth, exact)


def held(
    truth: Tensor, mean: Tensor, std: Tensor, samples: int, levels: Sequence[int]
) -> dict[int, float]:
    """Share of pixels whose truth lies in the interval of ``samples`` samples, by per cent."""
    shares = {}
    for level in levels:
        low, high = interval(mean, std, samples, level / 100)
        shares[level] = float(((truth > low) & (truth < high)).to(torch.float64).mean())
    return shares


def variation(
    fixture: Field, samples: int, levels: Sequence[int], repeats: int = 100, seed: int = 0
) -> dict[int, float]:
    """Half of the 95 % interval of the coverage of exact draws.

    Pixels of a slice are not independent, so that it is drawn: truth and samples of the posterior,
    ``repeats`` times for each slice.
    """
    covariance = fixture.exact[0].covariance
    d, n = len(covariance), len(fixture.exact)
    factor = torch.linalg.cholesky(covariance + 1e-10 * torch.eye(d, dtype=torch.float64))
    generator = torch.Generator().manual_seed(seed)
    shares = []
    for _ in range(repeats):
        z = torch.randn(samples + 1, n, d, generator=generator, dtype=torch.float64)
        truth, *draws = z @ factor.T
        x = torch.stack(draws)
        shares.append(held(truth, x.mean(dim=0), x.std(dim=0), samples, levels))
    spread = {level: torch.tensor([s[level] for s in shares]).std() for level in levels}
    return {level: 1.96 * float(sd) for level, sd in spread.items()}


def measure_field(
    fixture: Field,
    label: str,
    samples: int = 16,
    seed: int = 0,
    levels: Sequence[int] = (50, 80, 90, 95),
) -> Row:
    """Run a row of :data:`SETTINGS` on fields, through :func:`reconstruct`."""
    method, options = SETTINGS[label]
    n = len(fixture.measurement)
    result = reconstruct(
        fixture.measurement,
        fixture.prior,
        method=method,
        samples=samples,
        batch=n * samples,
        seed=seed,
        phase="zero",
        options=options,
    )
    truth = fixture.truth
    mean, std = result.mean.real, result.std
    exact_mean = torch.stack([e.mean for e in fixture.exact]).reshape(truth.shape)
    exact_sd = fixture.exact[0].covariance.diagonal().sqrt().reshape(truth.shape[1:])
    coverage = held(truth, mean, std, samples, levels)
    index = torch.arange(n).repeat_interleave(samples)
    chi2 = fixture.measurement.take(index).chi2(result.samples.flatten(0, 1))
    return Row(
        problem=fixture.name,
        method=label,
        calls=result.nfe,
        n=n * samples,
        mean_error=float(((mean - exact_mean) / exact_sd).square().mean().sqrt()),
        sd_ratio=float((std / exact_sd).mean()),
        correlation=None,
        kl=None,
        modes=None,
        pairs=n,
        coverage=coverage,
        half=variation(fixture, samples, levels),
        sbc_p=None,
        chi2=float(chi2.mean()),
        seconds=result.seconds,
    )


@dataclass(frozen=True)
class Acceptance:
    """What the instruments of :mod:`inverse.trust.calibration` say of draws of known quality.

    Attributes:
        problem: problem.
        draws: what the draws are of.
        right: whether they are the posterior's.
        sbc_p: of ranks, over pixels, a region's mean, range, null space and log likelihood.
        tarp_p: of the expected coverage.
        held_75: coverage of the 75 % intervals.
        mean_ok: whether ``N (m' - m)^T C^-1 (m' - m)`` is within ``d +- 4 sqrt(2 d)``.
        spread_ok: whether the whitened covariance's eigenvalues are within 5 % of
            ``(1 +- sqrt(d / N))^2``.
    """

    problem: str
    draws: str
    right: bool
    sbc_p: float
    tarp_p: float
    held_75: float
    mean_ok: bool
    spread_ok: bool


def acceptance(
    kind: str = "ct", side: int = 16, simulations: int = 640, draws: int = 63, seed: int = 0
) -> list[Acceptance]:
    """Exact, narrow, moved and prior draws of a Gaussian field through every instrument."""
    fixture = field(kind, side, simulations, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    d = side**2
    operator = fixture.measurement.operator
    if operator.dtype.is_complex:
        operator = operator @ ComplexFromReal((side, side))
    a = dense(operator)
    noise = float(fixture.measurement.noise)
    exact = fixture.exact[0]
    factor = torch.linalg.cholesky(exact.covariance + 1e-10 * torch.eye(d, dtype=torch.float64))
    mean = torch.stack([e.mean for e in fixture.exact])
    z = torch.randn(simulations, draws, d, generator=generator, dtype=torch.float64)
    many = torch.randn(8 * d, d, generator=generator, dtype=torch.float64)
    blind = fixture.prior.sample(simulations * draws + 8 * d, generator).flatten(1).double()
    sd = exact.covariance.diagonal().sqrt()
    spread = z @ factor.T
    kinds = {
        "posterior": (mean[:, None] + spread, mean[0] + many @ factor.T),
        "posterior, spread x 0.8": (
            mean[:, None] + 0.8 * spread, mean[0] + 0.8 * many @ factor.T,
        ),
        "posterior, moved by sd / 2": (
            mean[:, None] + 0.5 * sd + spread, mean[0] + 0.5 * sd + many @ factor.T,
        ),
        "prior": (blind[: simulations * draws].reshape(z.shape), blind[simulations * draws :]),
    }  # fmt: skip
    truth = fixture.truth.flatten(1).double()
    y = _real(fixture.measurement.data.flatten(1)).reshape(simulations, -1).double()
    functionals = _functionals(a, side, generator)
    reference = torch.linalg.solve(a.T @ a + torch.eye(d, dtype=torch.float64), a.T @ y.T).T
    reference = reference + fixture.prior.sample(simulations, generator).flatten(1).double()

    def numbers(x: Tensor, data: Tensor) -> Tensor:
        misfit = (data - x @ a.T).square().sum(dim=-1, keepdim=True) / noise**2
        return torch.cat([x @ functionals.T, -misfit], dim=-1)

    rows = []
    for name, (samples, fixed) in kinds.items():
        of_samples = numbers(samples, y[:, None])
        of_truth = numbers(truth, y)
        bins = max(b for b in (16, 8, 4) if simulations >= 5 * b)
        shift = torch.linalg.solve_triangular(
            factor, (fixed.mean(dim=0) - mean[0])[:, None], upper=False
        )
        white = torch.linalg.solve_triangular(factor, (fixed - fixed.mean(dim=0)).T, upper=False)
        eigenvalues = torch.linalg.eigvalsh(white @ white.T / (len(fixed) - 1))
        edge = math.sqrt(d / len(fixed))
        rows.append(
            Acceptance(
                problem=f"{fixture.name}, {side} x {side}",
                draws=name,
                right=name == "posterior",
                sbc_p=ranks(of_truth, of_samples, bins=bins).p,
                tarp_p=tarp(truth, samples, reference).p,
                held_75=coverage(truth, samples, (0.75,)).held[0],
                mean_ok=abs(len(fixed) * float(shift.square().sum()) - d) < 4 * math.sqrt(2 * d),
                spread_ok=bool(
                    (eigenvalues > 0.95 * (1 - edge) ** 2).all()
                    & (eigenvalues < 1.05 * (1 + edge) ** 2).all()
                ),
            )
        )
    return rows


def _functionals(a: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Three pixels, a region's mean, one direction that is seen best and one not at all."""
    d = side**2
    pixels = torch.eye(d, dtype=torch.float64)[[0, d // 2 + side // 2, d - side // 3]]
    region = torch.zeros(side, side, dtype=torch.float64)
    region[side // 4 : side // 2, side // 4 : side // 2] = 1 / (side // 4) ** 2
    _, s, vh = torch.linalg.svd(a, full_matrices=True)
    silent = vh[int((s > 1e-6 * s[0]).sum()) :]
    hidden = torch.randn(len(silent), generator=generator, dtype=torch.float64) @ silent
    return torch.cat([pixels, torch.stack([region.flatten(), vh[0], hidden])])


def dense(operator: LinearOperator) -> Tensor:
    """The real matrix ``(m, d)`` of an operator on real images; complex data as (re, im) pairs."""
    d = math.prod(operator.in_shape)
    columns = operator(torch.eye(d).reshape(d, *operator.in_shape))
    return _real(columns).reshape(d, -1).T.to(torch.float64)


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
    lines = [
        "| problem | method | network calls | n | mean err/sd | sd ratio | corr (exact) | KL "
        "| mode (exact) | ± | pairs | coverage | ± | SBC p | χ² | s |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        coverage = " ".join(f"{level}: {100 * c:.1f}" for level, c in r.coverage.items())
        cells = [
            r.problem,
            r.method,
            str(r.calls),
            str(r.n),
            f"{r.mean_error:.3f}",
            f"{r.sd_ratio:.3f}",
            "" if r.correlation is None else f"{r.correlation[0]:.3f} ({r.correlation[1]:.3f})",
            "" if r.kl is None else f"{r.kl:.2g}",
            "" if r.modes is None else f"{r.modes[0]:.3f} ({r.modes[1]:.3f})",
            "" if r.modes is None else f"{binomial(r.modes[1], r.n):.3f}",
            str(r.pairs),
            coverage,
            " ".join(f"{100 * h:.1f}" for h in r.half.values()),
            "" if r.sbc_p is None else f"{r.sbc_p:.2g}",
            f"{r.chi2:.3g}",
            f"{r.seconds:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


class _Draws(Noise):
    """Draws of all samples from one generator: fast where samples are many and tiny."""

    def __init__(self, count: int, shape: Sequence[int], seed: int) -> None:
        super().__init__([], shape)
        self.count, self.generator = count, torch.Generator().manual_seed(seed)

    def __call__(self, shape: Sequence[int] | None = None) -> Tensor:
        size = self.shape if shape is None else tuple(shape)
        return torch.randn(self.count, *size, generator=self.generator)


def _draw(prior: GaussianPrior | MixturePrior, count: int, generator: torch.Generator) -> Tensor:
    """``(count, *shape)`` draws of the prior."""
    if isinstance(prior, GaussianPrior):
        return prior.sample(count, generator)
    which = torch.multinomial(prior.weights, count, replacement=True, generator=generator)
    draws = torch.stack([c.sample(count, generator) for c in prior.components])
    return draws[which, torch.arange(count)]


def _log_densities(weights: Tensor, parts: list[GaussianPosterior], x: Tensor) -> Tensor:
    """``log w_k N(x; m_k, C_k)``, ``(n, k)``."""
    return torch.stack(
        [
            w.log() + torch.distributions.MultivariateNormal(p.mean, p.covariance).log_prob(x)
            for w, p in zip(weights, parts, strict=True)
        ],
        dim=1,
    )


def _correlation(covariance: Tensor) -> float:
    """Of the first two unknowns; 0 where one does not vary."""
    variance = float(covariance[0, 0] * covariance[1, 1])
    return float(covariance[0, 1]) / math.sqrt(variance) if variance > 1e-12 else 0.0


def _real(x: Tensor) -> Tensor:
    """Complex values as pairs of real ones."""
    return torch.view_as_real(x) if x.is_complex() else x


def table(labels: Sequence[str] = tuple(SETTINGS), quick: bool = False) -> Iterator[Row]:
    """Rows of :data:`SETTINGS` on every problem, as they are finished."""
    count, simulations, side, slices = (2000, 80, 16, 4) if quick else (20000, 320, 32, 4)
    for toy in TOYS:
        for label in labels:
            k = SLOW.get(label, 1)
            yield measure(toy(), label, count=count // k, simulations=simulations // k)
    for kind in ("ct", "mri"):
        fixture = field(kind, side, slices)
        for label in labels:
            if label != "smc":
                yield measure_field(fixture, label)


def main() -> None:
    """Print the table; write JSON with ``--out``."""
    parser = argparse.ArgumentParser(description="Every method against exact posteriors.")
    parser.add_argument("labels", nargs="*", help=f"of {', '.join(SETTINGS)}; default all")
    parser.add_argument("--quick", action="store_true", help="a tenth of the samples, 16 x 16")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--acceptance", action="store_true", help="test the instruments instead")
    arguments = parser.parse_args()
    if arguments.acceptance:
        size = {"side": 8, "simulations": 320} if arguments.quick else {}
        found = [row for kind in ("ct", "mri") for row in acceptance(kind, **size)]
        print("| problem | draws | SBC p | TARP p | 75 % holds | mean | spread |")
        print("|---|---|--:|--:|--:|---|---|")
        for r in found:
            print(f"| {r.problem} | {r.draws} | {r.sbc_p:.2g} | {r.tarp_p:.2g} | "
                  f"{100 * r.held_75:.1f} | {r.mean_ok} | {r.spread_ok} |")  # fmt: skip
        return
    unknown = set(arguments.labels) - set(SETTINGS)
    if unknown:
        parser.error(f"no setting {', '.join(sorted(unknown))}; there are {', '.join(SETTINGS)}")
    rows = []
    for row in table(arguments.labels or tuple(SETTINGS), arguments.quick):
        rows.append(row)
        print(f"{row.problem}: {row.method}, {row.seconds:.0f} s", file=sys.stderr)
        if arguments.out:
            arguments.out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    main()
