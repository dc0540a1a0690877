"""Problems with known posteriors, and the exact law of samplers that are affine in their noise.

With a Gaussian prior most samplers are affine maps of their normal draws.  Fed with zeros they
return the mean of their samples, fed with one unit draw at a time the columns of a square root of
their covariance: the law of the sampler without Monte-Carlo error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from inverse.measurement import Measurement
from inverse.operators.ct import ParallelBeam, RayTransform
from inverse.operators.linop import ComplexFromReal, Identity, LinearOperator
from inverse.operators.mask import Mask
from inverse.operators.mri import CartesianMRI, cartesian_mask
from inverse.posterior import Problem
from inverse.priors import GaussianPrior
from inverse.priors.denoiser import Denoiser
from inverse.priors.exact import GaussianPosterior
from inverse.sampling import Noise
from inverse.sde import SDE, VE

Run = Callable[[Problem], Tensor]


class CountingPrior(Denoiser):
    """A prior that counts its calls."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__(inner.sde)
        self.inner, self.calls = inner, 0

    def denoise(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        self.calls += 1
        return self.inner.denoise(x_t, t)

    def error(self, noise_level: float | Tensor) -> Tensor:
        return self.inner.error(noise_level)


class _Record:
    """Zeros for draws; remembers how many were asked for."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape, self.count = tuple(shape), 0

    def __call__(self, shape: Sequence[int] | None = None) -> Tensor:
        size = self.shape if shape is None else tuple(shape)
        self.count += math.prod(size)
        return torch.zeros(1, *size)


class _Unit:
    """Sample 0 gets zeros, sample k a single one as its k-th number."""

    def __init__(self, shape: Sequence[int], count: int) -> None:
        self.shape, self.count, self.used = tuple(shape), count, 0

    def __call__(self, shape: Sequence[int] | None = None) -> Tensor:
        size = self.shape if shape is None else tuple(shape)
        n = math.prod(size)
        draw = torch.zeros(1 + self.count, n)
        draw[1 + self.used : 1 + self.used + n] = torch.eye(n)
        self.used += n
        return draw.reshape(-1, *size)


def law(run: Run, prior: Denoiser, measurement: Measurement) -> tuple[Tensor, Tensor]:
    """Mean ``(d,)`` and covariance ``(d, d)`` of a sampler that is affine in its noise."""
    shape = measurement.operator.in_shape
    with torch.inference_mode():
        record = _Record(shape)
        run(Problem(prior, measurement, record))
        seen = measurement.take(torch.zeros(1 + record.count, dtype=torch.long))
        out = run(Problem(prior, seen, _Unit(shape, record.count))).flatten(1).double()
    columns = out[1:] - out[:1]
    return out[0].clone(), columns.T @ columns


def problem(
    prior: Denoiser, measurement: Measurement, samples: int, first: int = 0, seed: int = 0
) -> Problem:
    """``samples`` of every slice, seeded by slice and sample."""
    index = torch.arange(len(measurement)).repeat_interleave(samples)
    seeds = [(seed, int(z), first + k % samples) for k, z in enumerate(index)]
    return Problem(prior, measurement.take(index), Noise(seeds, measurement.operator.in_shape))


def plane(noise: float = 0.3, sde: SDE | None = None) -> tuple[GaussianPrior, Measurement]:
    """Prior N(0, [[1, .8], [.8, 1]]), y = x_1 + noise n = 1."""
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    prior = GaussianPrior(0.0, covariance, (1, 2), sde or VE(0.005, 50.0))
    operator = Mask(torch.tensor([[True, False]]))
    data = torch.tensor([[[1.0, 0.0]]])
    return prior, Measurement(operator, data, torch.tensor(noise), "MR", (1.0, 1.0))


def plane_posterior(noise: float = 0.3) -> GaussianPosterior:
    """The exact posterior of :func:`plane`."""
    matrix = torch.tensor([[1.0, 0.0]])
    return plane()[0].posterior(matrix, torch.ones(1), noise)


def pixel(noise: float) -> tuple[GaussianPrior, Measurement]:
    """Prior N(0, 1) on one pixel, y = x + noise n = 1."""
    prior = GaussianPrior(0.0, torch.ones(1, 1), (1, 1), VE(1e-4, 50.0))
    data = torch.ones(1, 1, 1)
    return prior, Measurement(Identity((1, 1)), data, torch.tensor(noise), "MR", (1.0, 1.0))


def smooth_prior(side: int, sde: SDE | None = None) -> GaussianPrior:
    """A smooth Gaussian field of ``side`` x ``side`` pixels with a white floor."""
    i = torch.arange(side, dtype=torch.float64)
    one = torch.exp(-((i[:, None] - i[None, :]) ** 2) / (2 * (side / 6) ** 2))
    covariance = torch.kron(one, one) + 0.01 * torch.eye(side**2, dtype=torch.float64)
    return GaussianPrior(0.0, covariance, (side, side), sde or VE(0.005, 50.0))


def operator(kind: str, side: int) -> tuple[LinearOperator, float]:
    """Six parallel views, or complex Cartesian MRI at 4x, with a fitting noise std."""
    shape = (side, side)
    if kind == "ct":
        return RayTransform(ParallelBeam.sparse(6, shape, 1.0), shape, 1.0), 0.5
    return CartesianMRI(cartesian_mask(shape, 4.0, 0.15)) @ ComplexFromReal(shape), 0.1


def dense(op: LinearOperator) -> Tensor:
    """The operator as a real matrix ``(m, d)``, imaginary rows below the real ones."""
    d = math.prod(op.in_shape)
    columns = op(torch.eye(d).reshape(d, *op.in_shape)).flatten(1)
    return parts(columns).T


def parts(y: Tensor) -> Tensor:
    """Data ``(n, m)`` with real and imaginary part side by side."""
    return torch.cat([y.real, y.imag], dim=1) if y.is_complex() else y


def field(
    kind: str, side: int = 16, slices: int = 1, seed: int = 0
) -> tuple[GaussianPrior, Measurement, Tensor]:
    """Smooth prior, a measurement of ``slices`` draws from it, and these truths.

    The model of the data is exact on purpose: what is tested is the sampler.
    """
    prior = smooth_prior(side)
    op, noise = operator(kind, side)
    generator = torch.Generator().manual_seed(seed)
    truth = prior.sample(slices, generator)
    clean = op(truth)
    n = torch.randn(*clean.shape, 2, generator=generator)
    n = torch.view_as_complex(n) if clean.is_complex() else n[..., 0]
    data = clean + noise * torch.where(clean.abs().sum(0) > 0, n, 0)  # unmeasured stays zero
    return prior, Measurement(op, data, torch.tensor(noise), "MR", (1.0, 1.0)), truth


def check_calls(run: Run, calls: int) -> None:
    """A method makes as many network calls as stated and reports every step once."""
    prior, measurement = plane()
    counted = CountingPrior(prior)
    progress: list[tuple[int, int]] = []
    run(replace(problem(counted, measurement, 2), callback=lambda i, n: progress.append((i, n))))
    assert counted.calls == calls
    steps = progress[-1][1]
    assert progress == [(i + 1, steps) for i in range(steps)]


def check_batch(run: Run, kind: str) -> None:
    """A sample does not depend on its batch."""
    prior, measurement, _ = field(kind, side=8)
    with torch.inference_mode():
        many = run(problem(prior, measurement, 8))
        one = run(problem(prior, measurement, 1, first=5))
    torch.testing.assert_close(many[5], one[0], rtol=1e-5, atol=1e-5)
