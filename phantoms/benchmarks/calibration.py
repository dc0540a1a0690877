"""How far each method is from the exact posterior: ``python -m phantoms.benchmarks.calibration``.

Two Gaussian problems with closed-form posteriors: the two-dimensional fixture of the literature,
prior N(0, [[1, .8], [.8, 1]]) and one noisy value, and a smooth Gaussian field seen by a few
parallel-beam views.  Printed for each method: error of the mean and of the standard deviation in
units of the exact one, and KL(method || exact) of the moments where samples suffice.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inverse.measurement import Measurement
from inverse.operators.ct import ParallelBeam, RayTransform
from inverse.operators.linop import LinearOperator
from inverse.operators.mask import Mask
from inverse.priors import GaussianPrior
from inverse.priors.exact import GaussianPosterior
from inverse.reconstruct import reconstruct
from inverse.sde import VE

_NOISE = {"steps": 50, "start_level": 40.0, "end_level": 0.01, "eta": 0.85}
SETTINGS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "dds": ("dds", _NOISE),
    "dds, weight 1": ("dds", {**_NOISE, "weight": 1.0}),
    "song": ("song", {"steps": 200, "lam": 1.0, "snr": 0.16}),
}
"""Label: method and options.  All start from noise, unlike the default of dds."""


@dataclass(frozen=True)
class Fixture:
    """A Gaussian problem with its exact posterior."""

    name: str
    prior: GaussianPrior
    measurement: Measurement
    exact: GaussianPosterior


@dataclass(frozen=True)
class Bias:
    """Distance of a method's samples from the exact posterior.

    Attributes:
        problem: fixture.
        method: label of the method and its settings.
        mean_error: RMS of (mean - exact mean) / exact sd.
        sd_ratio: mean of sd / exact sd; below 1 is overconfident.
        kl: KL divergence of the fitted Gaussian from the exact posterior in nats; infinite where
            the samples' covariance is singular, None where there are too few samples.
        chi2: reduced residual of a sample, 1 for an exact one.
    """

    problem: str
    method: str
    mean_error: float
    sd_ratio: float
    kl: float | None
    chi2: float


def two_dimensional() -> Fixture:
    """Prior N(0, [[1, .8], [.8, 1]]), y = x_1 + 0.3 n = 1."""
    prior = GaussianPrior(0.0, torch.tensor([[1.0, 0.8], [0.8, 1.0]]), (1, 2), VE(0.005, 50.0))
    operator = Mask(torch.tensor([[True, False]]))
    return _fixture("two-dimensional", prior, operator, torch.tensor([[1.0, 0.0]]), 0.3)


def field(side: int = 16, views: int = 6, noise: float = 0.5, seed: int = 0) -> Fixture:
    """Smooth Gaussian field of ``side`` x ``side`` seen by ``views`` parallel projections."""
    i = torch.arange(side, dtype=torch.float64)
    one = torch.exp(-((i[:, None] - i[None, :]) ** 2) / (2 * (side / 6) ** 2))
    covariance = torch.kron(one, one) + 0.01 * torch.eye(side**2, dtype=torch.float64)
    prior = GaussianPrior(0.0, covariance, (side, side), VE(0.005, 50.0))
    geometry = ParallelBeam.sparse(views, (side, side), 1.0)
    operator = RayTransform(geometry, (side, side), 1.0)
    generator = torch.Generator().manual_seed(seed)
    truth = prior.sample(1, generator)
    clean = operator(truth)
    data = clean + noise * torch.randn(clean.shape, generator=generator)
    return _fixture("gaussian field, CT", prior, operator, data, noise)


def _fixture(
    name: str, prior: GaussianPrior, operator: LinearOperator, data: Tensor, noise: float
) -> Fixture:
    d = math.prod(operator.in_shape)
    columns = operator(torch.eye(d).reshape(d, *operator.in_shape)).flatten(1)
    exact = prior.posterior(columns.T, data.flatten(), noise)
    measurement = Measurement(
        operator, data.reshape(1, *operator.out_shape), torch.tensor(noise), "MR", (1.0, 1.0)
    )
    return Fixture(name, prior, measurement, exact)


def measure(fixture: Fixture, label: str, samples: int, seed: int = 0) -> Bias:
    """Run a row of :data:`SETTINGS` on ``fixture`` and compare its moments with the exact ones."""
    method, options = SETTINGS[label]
    result = reconstruct(
        fixture.measurement,
        fixture.prior,
        method=method,
        samples=samples,
        batch=samples,
        seed=seed,
        options=options,
    )
    draws = result.samples[0].flatten(1).to(torch.float64)
    mean, sd = draws.mean(dim=0), draws.std(dim=0)
    exact_sd = fixture.exact.covariance.diagonal().sqrt()
    d = len(mean)
    kl = None
    if samples > 20 * d:
        covariance = torch.cov(draws.T)
        determinant = torch.linalg.slogdet(covariance)[1]
        kl = math.inf
        if bool(determinant > -25 * d):
            kl = fixture.exact.kl(mean, covariance)
    return Bias(
        problem=fixture.name,
        method=label,
        mean_error=float(((mean - fixture.exact.mean) / exact_sd).square().mean().sqrt()),
        sd_ratio=float((sd / exact_sd).mean()),
        kl=kl,
        chi2=float(
            fixture.measurement.take(torch.zeros(samples, dtype=torch.long))
            .chi2(result.samples[0])
            .mean()
        ),
    )


def main() -> None:
    """Print the table; write JSON with ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=2000, help="samples on the 2-D fixture")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    rows = []
    for fixture, count in ((two_dimensional(), arguments.samples), (field(), 64)):
        rows += [measure(fixture, label, count) for label in SETTINGS]
    print(
        f"{'problem':20} {'method':14} {'mean err/sd':>11} {'sd ratio':>9} {'KL':>8} {'chi2':>8}"
    )
    for row in rows:
        kl = "-" if row.kl is None else f"{row.kl:.3f}"
        print(
            f"{row.problem:20} {row.method:14} {row.mean_error:11.3f} {row.sd_ratio:9.3f} "
            f"{kl:>8} {row.chi2:8.3f}"
        )
    if arguments.out:
        arguments.out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
