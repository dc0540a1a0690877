r"""Whether a measurement is one that the prior could have made.

A prior trained on chests reconstructs a knee, and the image looks like a good one.  For a
Gaussian prior the question has an exact answer (:func:`prior_predictive`).  For a network the
density of the data is out of reach, and likelihoods of images mislead, as simple images are likely
whatever they show.  What is measured instead (:func:`statistics`), at a few noise levels of the
reconstruction, is

* the error with which the prior denoises it, the Fisher information of the score-matching
  literature in another form: its mean over the prior's own images is known;
* the residual in the data once the prior has had its way with the noised reconstruction: what it
  does not know it removes, and the data then miss it;
* how much worse the prior denoises the image upside down and turned by 90 degrees.  The image is
  compared with itself, so that how much structure it has cancels, and what is left says
  whether the prior recognises what it sees.  No preference is as telling as the wrong one.

The numbers by themselves say nothing.  They are ranked among those of held-out patients that were
measured and reconstructed in the same way (:class:`Reference`), which gives a p-value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from scipy import stats
from torch import Tensor

from inverse.errors import GeometryError, InputError, UnsupportedError
from inverse.measurement import Measurement
from inverse.priors.denoiser import Denoiser, expand
from inverse.priors.exact import GaussianPrior
from inverse.trust.uncertainty import measured_data

__all__ = [
    "LEVELS",
    "TURNS",
    "PriorPredictive",
    "Rank",
    "Reference",
    "prior_predictive",
    "statistics",
]

LEVELS = (0.1, 0.3, 1.0)
"""Noise levels of :func:`statistics`, prior units: from about the error of a reconstruction, where
fine structure counts, to the contrast of tissues, where only organs and their places do."""
TURNS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x.flip(-2),
    lambda x: x.rot90(1, (-2, -1)),
)
"""Upside down, and a quarter turn, of the last two axes.  Not left and right exchanged: to the
bundled CT prior they are alike (errors 2 +- 3 % apart), so that it would only add noise."""
_BATCH = 8
_FLAT = 1e-4
"""Least standard deviation of a statistic, which is a logarithm: less is rounding."""
_SHRINK = 1e-3
_NEAR = 1e-12
"""Least distance, so that its logarithm is defined."""


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
    r"""Errors and residuals of denoised reconstructions, and how they fare when turned.

    With the reconstruction u in prior units and one draw z, the same for every image, at each
    noise level

    .. math:: e_\sigma = \log\frac{\|\Delta_\sigma\|^2}{\sigma^2 d}, \qquad
        r_\sigma = \log\frac{1}{m}\Big\|\frac{y - A(\hat x + \Delta_\sigma)}{\sigma_y}\Big\|^2,
        \qquad \Delta_\sigma = D(u + \sigma z) - u

    and at the middle level, for each T of :data:`TURNS`,

    .. math:: b_T = \log\frac{\|D(T(u + \sigma z)) - Tu\|^2}{\|D(u + \sigma z) - u\|^2}

    For images of the prior the mean of :math:`\|\Delta_\sigma\|^2 / (\sigma^2 d)` is
    :math:`1 - \sigma^2 J_\sigma / d`, with J the Fisher information and
    :math:`\sigma^2 J_\sigma` the mean of the norm of the score :math:`\|\sigma s_\sigma\|^2`.
    That norm is nearly all noise, d, where the error is small against it; the error itself, and
    on a logarithmic scale, shows what is the image's.  :math:`\Delta_\sigma`, what the prior
    changes, goes back to the grid, the phase and the unit of the reconstruction.
    Denoising errors add up over levels to the log-likelihood, so that :math:`b_T` says by how much
    the prior prefers u to Tu at that level: above 0 where it recognises how u lies, 0 for a prior
    to which all ways are alike.

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
        ``(slices, 2 * len(levels) + len(TURNS))``, float64: the :math:`e_\sigma`, then the
        :math:`r_\sigma`, then the :math:`b_T`.  Costs ``len(levels) + len(TURNS)`` network calls.

    Raises:
        GeometryError: images that are not one a slice.
        InputError: images that are not finite, or no level.
        UnsupportedError: a prior of two channels, or images that are not 2-D.

    Source: several noise levels at once: Mahmood, Oliva and Styner, ICLR (2021), by norms of the
    score; Graham et al., CVPRW (2023), by errors of reconstructions, here with their residual in
    the data too.  That likelihoods count in comparison with another's on the same image, so that
    its complexity cancels: Ren et al., NeurIPS (2019).
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
    errors, misfits, turned = [], [], []
    with torch.inference_mode():
        for k, level in enumerate(levels):
            z = torch.randn(shape[1:], generator=generator).to(u.device)
            change = _denoised(prior, u, level, z)
            errors.append(_power(change) / level**2)
            back = scale * change if phase is None else scale * change * phase
            misfits.append(measurement.chi2((x + back).to(measurement.operator.dtype)).double())
            if k == len(levels) // 2:
                own = _power(change)
                turned = [_power(_denoised(prior, t(u), level, t(z))) / own for t in TURNS]
    tiny = torch.finfo(torch.float64).tiny
    return torch.stack([*errors, *misfits, *turned], dim=1).clamp_min(tiny).log().cpu()


@dataclass(frozen=True)
class Rank:
    """Where a measurement stands among the references.

    Attributes:
        distance: of its statistics from the references', over theirs from each other (geometric
            mean): 1 is usual.
        p: share of references, itself among them, that stand out at least as far.  Exact, but
            never below 1 / (n + 1): it cannot tell far from very far.
        tail: probability of at least this distance, were the logarithms of distances normal;
            approximate, for what lies beyond all references.
        patients: how many references there are, n.
    """

    distance: float
    p: float
    tail: float
    patients: int


@dataclass(frozen=True)
class Reference:
    """Statistics of held-out patients, one slice each, so that they are independent.

    Attributes:
        values: ``(patients, statistics)`` of :func:`statistics`.
        levels: the noise levels they were taken at.
        seed: the seed of their draw.

    Raises:
        InputError: fewer than three patients, or values that are not finite.
    """

    values: Tensor
    levels: tuple[float, ...] = LEVELS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or len(self.values) < 3:
            raise InputError(
                f"a reference needs at least three patients, (patients, statistics), got "
                f"{tuple(self.values.shape)}"
            )
        if not bool(torch.isfinite(self.values).all()):
            raise InputError("the reference holds NaN or infinite values; measure it again")

    @cached_property
    def distances(self) -> Tensor:
        """Of each patient from the others, see :meth:`rank`, ``(patients,)``."""
        return _distances(self.values.double())

    def rank(self, value: Tensor) -> Rank:
        r"""Rank of one measurement among the references.

        Each of the n + 1 is compared with the n others, by their mean, standard deviations s and
        shrunk correlations R, so that the measurement and the references are treated alike,

        .. math:: T_i = \frac1q\, z_i^T R_{-i}^{-1} z_i, \qquad
            z_{ik} = \frac{v_{ik} - \bar v_{-i,k}}{s_{-i,k}}, \qquad
            p = \frac{1 + \#\{i \le n : T_i \ge T_{n+1}\}}{n + 1}

        For a patient like the references p is uniform on its n + 1 values, whatever the law of
        the statistics.  Without shrinkage T is Hotelling's :math:`T^2` of one against the others
        up to a factor.  The correlations count because the statistics rise and fall together from
        patient to patient: what breaks the pattern is foreign, though each number by itself is
        usual.

        The tail is that of the Student t prediction bound on the logarithm, with the mean m and
        the standard deviation s of the :attr:`distances` of the references from each other:

        .. math:: t = \frac{\log T_{n+1} - m}{s\sqrt{1 + 1/n}} \sim t_{n-1}

        One far patient widens s by a logarithm only.

        Args:
            value: ``(statistics,)``, of :func:`statistics` with the reference's levels and seed.

        Raises:
            GeometryError: another number of statistics.
            InputError: values that are not finite.

        Source: full conformal prediction, Vovk, Gammerman and Shafer, *Algorithmic Learning in a
        Random World* (2005), ch. 2; Hotelling, Ann. Math. Stat. 2 (1931).
        """
        if value.shape != self.values.shape[1:]:
            raise GeometryError(
                f"the reference holds {self.values.shape[1]} statistics, got {tuple(value.shape)}"
            )
        if not bool(torch.isfinite(value).all()):
            raise InputError("the statistics hold NaN or infinite values; check the image")
        distances = _distances(torch.cat([self.values, value[None].to(self.values)]).double())
        mine, others = float(distances[-1]), distances[:-1]
        # a tie by rounding counts as one
        n = len(others)
        ties = int((others >= mine * (1 - 1e-9)).sum())
        known = self.distances.clamp_min(_NEAR).log()
        beyond = math.log(max(mine, _NEAR)) - float(known.mean())
        spread = max(float(known.std()), _FLAT)
        tail = float(stats.t.sf(beyond / (spread * math.sqrt(1 + 1 / n)), n - 1))
        return Rank(math.exp(beyond), (1 + ties) / (n + 1), tail, n)


def _distances(pool: Tensor) -> Tensor:
    """Squared distance of each row from the others over the number of columns, ``(rows,)``."""
    n, q = pool.shape
    others = pool.expand(n, n, q)[~torch.eye(n, dtype=torch.bool)].reshape(n, n - 1, q)
    mean = others.mean(dim=1)
    spread = others.std(dim=1).clamp_min(_FLAT)
    z = (pool - mean) / spread
    correlation = _shrunk_correlation((others - mean[:, None]) / spread[:, None])
    solved = torch.linalg.solve(correlation, z[..., None])[..., 0]
    return (z * solved).mean(dim=1)


def _shrunk_correlation(z: Tensor) -> Tensor:
    r"""Correlation of standardised values ``(b, n, q)``, drawn to the identity as n is small.

    .. math:: \lambda = \frac{\sum_{j \ne k} \mathrm{Var}\,r_{jk}}{\sum_{j \ne k} r_{jk}^2}

    between :data:`_SHRINK`, so that it can be inverted, and 1.

    Source: Schäfer and Strimmer, Stat. Appl. Genet. Mol. Biol. 4 (2005), article 32.
    """
    n, q = z.shape[1:]
    products = z[..., :, None] * z[..., None, :]  # (b, n, q, q)
    mean = products.mean(dim=1)
    variance = n / (n - 1) ** 3 * (products - mean[:, None]).square().sum(dim=1)
    eye = torch.eye(q, dtype=z.dtype)
    off = (1 - eye) * mean * n / (n - 1)
    share = ((1 - eye) * variance).sum(dim=(1, 2)) / off.square().sum(dim=(1, 2)).clamp_min(1e-12)
    return (1 - share.clamp(_SHRINK, 1.0))[:, None, None] * off + eye


def _denoised(prior: Denoiser, u: Tensor, level: float, z: Tensor) -> Tensor:
    """``D(u + level z) - u``, by batches."""
    t = prior.sde.time(level)
    alpha, _ = prior.sde.marginal(t)
    changes = []
    for part in u.split(_BATCH):
        times = t.expand(len(part)) if t.ndim == 0 else t
        changes.append(prior.denoise(expand(alpha, part) * (part + level * z), times) - part)
    return torch.cat(changes)


def _power(x: Tensor) -> Tensor:
    """Mean square of each image; not zero, so that ratios are defined."""
    return x.double().square().flatten(1).mean(dim=1).clamp_min(torch.finfo(torch.float64).eps)


def _real(x: Tensor) -> Tensor:
    """Rows of real numbers, imaginary parts beside the real ones, float64."""
    rows = x.flatten(1)
    return (torch.cat([rows.real, rows.imag], dim=1) if rows.is_complex() else rows).double()
