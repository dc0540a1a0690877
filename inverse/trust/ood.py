r"""Whether a measurement is one that the prior could have made.

A prior trained on chests reconstructs a knee, and the image looks like a good one.  For a
Gaussian prior the question has an exact answer (:func:`prior_predictive`).  For a network the
density of the data is out of reach, and likelihoods of images mislead; what is measured instead,
at a few noise levels of the reconstruction (:func:`statistics`), is

* the norm of the score, whose mean over the prior's own images is known by the Fisher information;
* the residual in the data once the prior has had its way with the noised reconstruction: what it
  does not know it removes, and the data then miss it.

The numbers by themselves say nothing.  They are ranked among those of held-out patients that were
measured and reconstructed in the same way (:class:`Reference`), which gives a p-value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from inverse.errors import GeometryError, InputError, UnsupportedError
from inverse.measurement import Measurement
from inverse.priors.denoiser import Denoiser, expand
from inverse.priors.exact import GaussianPrior
from inverse.trust.uncertainty import measured_data

__all__ = ["LEVELS", "PriorPredictive", "Rank", "Reference", "prior_predictive", "statistics"]

LEVELS = (0.1, 0.3, 1.0)
"""Noise levels of :func:`statistics`, prior units: from about the error of a reconstruction, where
fine structure counts, to the contrast of tissues, where only organs and their places do."""
_BATCH = 8


@dataclass(frozen=True)
class PriorPredictive:
    """Exact test of data under a Gaussian prior.

    Attributes:
        value: T, ``(slices,)``.
        degrees: its degrees of freedom m, real values measured.
        p: probability of a T at least as large under the prior, ``(slices,)``.
    """

    value: Tensor
    degrees: int
    p: Tensor


def prior_predictive(prior: GaussianPrior, measurement: Measurement) -> PriorPredictive:
    r"""Prior-predictive chi-square of data under a Gaussian prior, exact.

    .. math:: T = (y - A\mu)^T (A\Sigma A^T + \mathrm{diag}\,\sigma_y^2)^{-1}(y - A\mu)
        \;\sim\; \chi^2_m

    Data moved by :math:`\delta` make T non-central chi-square, with non-centrality
    :math:`\delta^T(A\Sigma A^T + \mathrm{diag}\,\sigma_y^2)^{-1}\delta`: its power.

    Args:
        prior: Gaussian prior over real images of the operator's ``in_shape``, in physical units.
        measurement: data and noise; dense linear algebra, so at most some thousand numbers.

    Raises:
        GeometryError: a prior of another image shape than the operator's.
        UnsupportedError: an operator that does not tell which data it measures.

    Source: Box, J. R. Stat. Soc. A 143 (1980), the prior predictive check.
    """
    operator = measurement.operator
    if prior.shape != operator.in_shape:
        raise GeometryError(
            f"the prior is over images {prior.shape}, {operator!r} takes {operator.in_shape}; "
            "give the prior of that grid"
        )
    d = math.prod(operator.in_shape)
    eye = torch.eye(d, dtype=operator.dtype, device=measurement.data.device)
    columns = operator(eye.reshape(d, *operator.in_shape))
    seen = measured_data(measurement)
    a = _real(columns[:, seen]).T
    y = _real(measurement.data[:, seen])
    noise = measurement.noise.expand(measurement.data.shape)[:, seen]
    variance = _real(torch.complex(noise, noise) if y.shape[1] != noise.shape[1] else noise) ** 2
    spread = a @ prior.covariance_matrix @ a.T
    shared = bool((variance == variance[:1]).all())
    factor = torch.linalg.cholesky(spread + torch.diag_embed(variance[:1] if shared else variance))
    z = torch.linalg.solve_triangular(factor, (y - a @ prior.mean)[..., None], upper=False)
    value = z.square().sum(dim=(1, 2)).cpu()
    p = torch.as_tensor(stats.chi2.sf(value.numpy(), len(a)))
    return PriorPredictive(value, len(a), p)


def statistics(
    prior: Denoiser,
    measurement: Measurement,
    x: Tensor,
    *,
    offset: float = 0.0,
    scale: float = 1.0,
    levels: Sequence[float] = LEVELS,
    seed: int = 0,
) -> Tensor:
    r"""Score norms and residuals of noised reconstructions, at each noise level.

    With the reconstruction u in prior units and one draw z, the same for every image,

    .. math:: a_\sigma = \log\frac{\|\sigma s_\sigma(u + \sigma z)\|^2}{d}, \qquad
        r_\sigma = \log\frac{1}{m}\Big\|\frac{y - A(\hat x + \Delta_\sigma)}{\sigma_y}\Big\|^2,
        \qquad \Delta_\sigma = D(u + \sigma z) - u

    For images of the prior the mean of :math:`\|\sigma s_\sigma\|^2` is
    :math:`\sigma^2 J_\sigma`, with J the Fisher information.  :math:`\Delta_\sigma`, what the
    prior changes, goes back to the grid, the phase and the unit of the reconstruction.

    Args:
        prior: the denoiser.
        measurement: data, operator and noise, physical units.
        x: reconstruction of each slice, ``(slices, *in_shape)``, physical units; of complex ones
            the prior sees the magnitude.
        offset: physical value of prior value 0.
        scale: physical units per prior unit.
        levels: noise levels, prior units.
        seed: of the draw.

    Returns:
        ``(slices, 2 * len(levels))``, float64: the :math:`a_\sigma`, then the :math:`r_\sigma`.

    Raises:
        GeometryError: images that are not one a slice.
        InputError: images that are not finite, or no level.
        UnsupportedError: a prior of two channels, or images that are not 2-D.

    Source: score norms: Mahmood, Oliva and Styner, ICLR (2021); reconstructions from several
    noise levels: Graham et al., CVPRW (2023), here with their residual in the data.
    """
    shape = (len(measurement), *measurement.operator.in_shape)
    if tuple(x.shape) != shape:
        raise GeometryError(f"statistics need one image a slice, {shape}, got {tuple(x.shape)}")
    if len(shape) != 3:
        raise UnsupportedError("out-of-distribution statistics serve 2-D images; take slices")
    if not levels or min(levels) <= 0 or scale == 0:
        raise InputError(
            f"statistics need noise levels above 0 and a scale, got {levels}, {scale}"
        )
    if not bool(torch.isfinite(x.abs()).all()):
        raise InputError("the reconstruction holds NaN or infinite values; leave those out")
    phase = torch.sgn(x) if x.is_complex() else None
    u = ((x.abs() if x.is_complex() else x).float() - offset) / scale
    generator = torch.Generator().manual_seed(seed)
    norms, misfits = [], []
    with torch.inference_mode():
        for level in levels:
            z = torch.randn(shape[1:], generator=generator).to(u.device)
            change, norm = _denoised(prior, u, level, z)
            norms.append(norm)
            back = scale * change if phase is None else scale * change * phase
            misfits.append(measurement.chi2((x + back).to(measurement.operator.dtype)).double())
    tiny = torch.finfo(torch.float64).tiny
    return torch.stack([*norms, *misfits], dim=1).clamp_min(tiny).log().cpu()


@dataclass(frozen=True)
class Rank:
    """Where a measurement stands among the references.

    Attributes:
        distance: mean of the squared standard scores of the statistics, 1 on average.
        p: share of references, itself among them, that stand out at least as far.
        beyond: its distance over the largest of the references'; above 1 it stands out most.
        patients: how many references there are, n; p is at least 1 / (n + 1).
    """

    distance: float
    p: float
    beyond: float
    patients: int


@dataclass(frozen=True)
class Reference:
    """Statistics of held-out patients, one slice each, so that they are independent.

    Attributes:
        values: ``(patients, statistics)`` of :func:`statistics`.
        levels: the noise levels they were taken at.
        seed: the seed of their draw.

    Raises:
        InputError: fewer than two patients, or values that are not finite.
    """

    values: Tensor
    levels: tuple[float, ...] = LEVELS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or len(self.values) < 2:
            raise InputError(
                f"a reference needs at least two patients, (patients, statistics), got "
                f"{tuple(self.values.shape)}"
            )
        if not bool(torch.isfinite(self.values).all()):
            raise InputError("the reference holds NaN or infinite values; measure it again")

    def rank(self, value: Tensor) -> Rank:
        r"""Rank of one measurement among the references.

        .. math:: T_i = \frac1q \sum_{k=1}^q \frac{(v_{ik} - \bar v_k)^2}{s_k^2}, \qquad
            p = \frac{1 + \#\{i \le n : T_i \ge T_{n+1}\}}{n + 1}

        Mean and deviation are over the references *and* the measurement, so that all n + 1 are
        treated alike: for a patient like the references p is uniform on its n + 1 values,
        whatever the statistics.

        Args:
            value: ``(statistics,)``, of :func:`statistics` with the reference's levels and seed.

        Raises:
            GeometryError: another number of statistics.
            InputError: values that are not finite.

        Source: full conformal prediction, Vovk, Gammerman and Shafer, *Algorithmic Learning in a
        Random World* (2005), ch. 2.
        """
        if value.shape != self.values.shape[1:]:
            raise GeometryError(
                f"the reference holds {self.values.shape[1]} statistics, got {tuple(value.shape)}"
            )
        if not bool(torch.isfinite(value).all()):
            raise InputError("the statistics hold NaN or infinite values; check the image")
        pool = torch.cat([self.values, value[None].to(self.values)]).double()
        spread = pool.std(dim=0, unbiased=False)
        z = torch.where(spread > 0, (pool - pool.mean(dim=0)) / spread.clamp_min(1e-300), 0.0)
        distances = z.square().mean(dim=1)
        mine, others = float(distances[-1]), distances[:-1]
        # a tie by rounding counts as one
        n = len(others)
        ties = int((others >= mine * (1 - 1e-12)).sum())
        top = float(others.max())
        return Rank(mine, (1 + ties) / (n + 1), mine / top if top > 0 else math.inf, n)


def _denoised(prior: Denoiser, u: Tensor, level: float, z: Tensor) -> tuple[Tensor, Tensor]:
    """``D(u + level z) - u`` and ``|sigma s|^2 / d``, by batches."""
    t = prior.sde.time(level)
    alpha, sigma = prior.sde.marginal(t)
    changes, norms = [], []
    for part in u.split(_BATCH):
        x_t = expand(alpha, part) * (part + level * z)
        times = t.expand(len(part)) if t.ndim == 0 else t
        score = prior.score(x_t, times)
        scaled = expand(sigma, part) * score
        norms.append(scaled.double().square().flatten(1).mean(dim=1))
        # Tweedie's formula backwards: D = (x_t + sigma^2 s) / alpha
        changes.append((x_t + expand(sigma, part) * scaled) / expand(alpha, part) - part)
    return torch.cat(changes), torch.cat(norms)


def _real(x: Tensor) -> Tensor:
    """Rows of real numbers, imaginary parts beside the real ones, float64."""
    rows = x.flatten(1)
    return (torch.cat([rows.real, rows.imag], dim=1) if rows.is_complex() else rows).double()
