r"""What samples say about their own certainty, and what the data say about the samples.

With K independent samples of the posterior in hand, without the truth:

* their mean and standard deviation, streamed (:class:`Moments`), and the interval that holds one
  more draw, the truth (:func:`interval`);
* whether their residuals look like the known noise: chi-square, in all or by view, coil or ring
  of k-space (:func:`residual_chi2`), and whiteness along an axis (:func:`whiteness`).

With the truths of validation patients: the factor that makes ``mean ± factor std`` miss no more
than a promised share of pixels, whatever method and prior gave mean and std (:func:`rcps`,
:func:`crc`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import optimize, special, stats
from torch import Tensor

from inverse.errors import GeometryError, InputError, UnsupportedError
from inverse.measurement import Measurement

__all__ = [
    "ChiSquare",
    "Conformal",
    "Moments",
    "Whiteness",
    "by_first_axis",
    "by_frequency",
    "crc",
    "interval",
    "rcps",
    "residual_chi2",
    "risk",
    "whiteness",
]


class Moments:
    r"""Mean and standard deviation of samples that pass by once and are not kept.

    For a batch of k samples of mean :math:`\bar b` and sum of squares :math:`S_b` about it,
    after K samples:

    .. math:: \delta = \bar b - \bar x, \quad
        \bar x \leftarrow \bar x + \frac{k}{K + k}\,\delta, \quad
        S \leftarrow S + S_b + \frac{K k}{K + k}\,|\delta|^2, \qquad
        s = \sqrt{S / (K - 1)}

    float64 inside, so that neither many samples nor a large mean cost digits.  The spread of
    complex samples is that of real and imaginary part together.

    Attributes:
        count: samples so far, K.

    Source: Welford, Technometrics 4 (1962); Chan, Golub and LeVeque, Am. Stat. 37 (1983).
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = torch.zeros(())
        self._squares = torch.zeros(())

    def add(self, samples: Tensor) -> None:
        """Take in samples ``(k, *shape)``.

        Raises:
            GeometryError: no sample, or another shape than before.
            InputError: samples that are not finite.
        """
        if samples.ndim < 1 or not len(samples):
            raise GeometryError(
                f"Moments.add needs samples (k, *shape) with k at least 1, got shape "
                f"{tuple(samples.shape)}; give one sample as sample[None]"
            )
        if self.count and samples.shape[1:] != self._mean.shape:
            raise GeometryError(
                f"Moments holds samples of shape {tuple(self._mean.shape)}, got "
                f"{tuple(samples.shape[1:])}; use one Moments a shape"
            )
        _check_finite(samples, "samples")
        x = samples.to(torch.complex128 if samples.is_complex() else torch.float64)
        k = len(x)
        mean = x.mean(dim=0)
        squares = (x - mean).abs().square().sum(dim=0)
        if not self.count:
            self.count, self._mean, self._squares = k, mean, squares
            return
        delta = mean - self._mean
        total = self.count + k
        self._squares = self._squares + squares + self.count * k / total * delta.abs().square()
        self._mean = self._mean + k / total * delta
        self.count = total

    @property
    def mean(self) -> Tensor:
        """Mean of the samples, ``shape``, float64 or complex128, in their unit.

        Raises:
            InputError: before the first sample.
        """
        self._check(1, "mean")
        return self._mean

    @property
    def std(self) -> Tensor:
        """Standard deviation with K - 1 in the denominator, ``shape``, float64, in their unit.

        Raises:
            InputError: before the second sample; one sample says nothing of certainty.
        """
        self._check(2, "standard deviation")
        return torch.sqrt(self._squares / (self.count - 1))

    def _check(self, least: int, what: str) -> None:
        if self.count < least:
            raise InputError(
                f"the {what} needs at least {least} samples, got {self.count}; add more"
            )


def interval(mean: Tensor, std: Tensor, samples: int, level: float) -> tuple[Tensor, Tensor]:
    r"""Interval that holds the truth with probability ``level`` if it is one more draw.

    .. math:: \bar x \pm t_{(1+\mathrm{level})/2,\,K-1}\; s\,\sqrt{1 + 1/K}

    The truth and the K samples are independent draws of one posterior, so its distance from their
    mean has variance :math:`\sigma^2(1 + 1/K)`, and ``s`` estimates :math:`\sigma`.  Exact for
    Gaussian marginals.

    Args:
        mean: mean of the samples, any shape and unit, real.
        std: their standard deviation (K - 1 in the denominator), same shape and unit.
        samples: how many there were, K, at least 2.
        level: probability, between 0 and 1.

    Returns:
        Lower and upper end, of the shape and unit of ``mean``.

    Raises:
        InputError: fewer than two samples, a level outside (0, 1), a negative or NaN std, complex
            values (give real and imaginary part by themselves).

    Source: the prediction interval, e.g. Geisser, *Predictive Inference* (1993).
    """
    if samples < 2:
        raise InputError(f"an interval needs at least 2 samples, got {samples}; draw more")
    if not 0 < level < 1:
        raise InputError(f"the level of an interval must lie between 0 and 1, got {level}")
    _check_pair(mean, std)
    t = float(stats.t.ppf((1 + level) / 2, samples - 1))
    half = t * std * math.sqrt(1 + 1 / samples)
    return mean - half, mean + half


@dataclass(frozen=True)
class ChiSquare:
    """Chi-square of residuals, a slice and group.

    Attributes:
        groups: numbers of the groups that hold data, ``(g,)``.
        value: chi-square over degrees of freedom, ``(slices, g)``; about 1 is right.
        degrees: degrees of freedom, real values measured, ``(g,)``.
        low: lower end of the interval of ``value`` under the null, ``(g,)``.
        high: its upper end, ``(g,)``.
        p: two-sided p-values, ``(slices, g)``.
    """

    groups: Tensor
    value: Tensor
    degrees: Tensor
    low: Tensor
    high: Tensor
    p: Tensor

    @property
    def p_slice(self) -> Tensor:
        """One p-value a slice, Bonferroni's ``min(1, g min p)``, ``(slices,)``."""
        return (self.p.min(dim=1).values * len(self.groups)).clamp(max=1.0)


def residual_chi2(
    measurement: Measurement,
    x: Tensor,
    groups: Tensor | None = None,
    *,
    level: float = 0.95,
) -> ChiSquare:
    r"""Test that the residual of a posterior *sample* is as large as the known noise.

    .. math:: T_g = \sum_{i \in g} |y_i - (A\tilde x)_i|^2/\sigma_i^2 \;\sim\; \chi^2_{m_g}

    Truth and sample have the same joint law with the data, so over problems the residual of a
    correct sample is the noise itself, in every group.  Far below 1: the noise was fitted; far
    above: data were not used.  The *mean* of samples does not obey this law: its residual is
    smaller, as the mean has followed the noise, or larger where the prior smooths.  Samples of
    one measurement share its noise: their p-values are not independent.

    Args:
        measurement: data and noise; complex data count twice.
        x: one sample a slice, ``(slices, *in_shape)``, physical units.
        groups: group of each datum, integers ``out_shape``, e.g. of :func:`by_first_axis` or
            :func:`by_frequency`; default all in one.
        level: probability of the interval under the null.

    Returns:
        Values, intervals and p-values; groups without data are left out.

    Raises:
        GeometryError: shapes that do not fit the measurement.
        InputError: samples that are not finite, groups that are not integers, a bad level.
        UnsupportedError: an operator that does not tell which data it measures.

    Source: the exchange of truth and sample is that of Talts et al., arXiv:1804.06788 (2018).
    """
    if not 0 < level < 1:
        raise InputError(f"the level of an interval must lie between 0 and 1, got {level}")
    z = _standard_residual(measurement, x)
    measured = measured_data(measurement)
    shape = measurement.operator.out_shape
    if groups is None:
        groups = torch.zeros(shape, dtype=torch.long, device=z.device)
    if tuple(groups.shape) != shape:
        raise GeometryError(
            f"groups must have the data's shape {shape}, got {tuple(groups.shape)}"
        )
    if groups.is_floating_point() or groups.is_complex() or bool((groups < 0).any()):
        raise InputError(f"groups must be integers from 0, got {groups.dtype}; number them")
    label = groups.to(z.device)[measured].to(torch.long)
    parts = 2 if measurement.data.is_complex() else 1
    degrees = parts * torch.bincount(label).to(torch.float64)
    squares = z.square().sum(dim=-1)[:, measured]
    total = torch.zeros(len(z), len(degrees), dtype=torch.float64, device=z.device)
    total.index_add_(1, label, squares)
    kept = degrees.nonzero()[:, 0]
    m, total = degrees[kept].cpu(), total[:, kept].cpu()
    law = stats.chi2(m.numpy())
    p = 2 * torch.minimum(
        torch.as_tensor(law.cdf(total.numpy())), torch.as_tensor(law.sf(total.numpy()))
    )
    low, high = (torch.as_tensor(end) / m for end in law.interval(level))
    return ChiSquare(kept.cpu(), total / m, m.to(torch.long), low, high, p.clamp(max=1.0))


@dataclass(frozen=True)
class Whiteness:
    """Correlation of residuals with their neighbours.

    Attributes:
        value: autocorrelation at lag 1, ``(slices,)``; 0 for white noise.
        variance: its variance under the null, exact.
        p: two-sided p-values, ``(slices,)``.
    """

    value: Tensor
    variance: float
    p: Tensor


def whiteness(measurement: Measurement, x: Tensor, axis: int) -> Whiteness:
    r"""Test that neighbours in the residual of a posterior *sample* are uncorrelated.

    .. math:: r = \frac{\sum_{(i,j)} z_i z_j}{\sum_i z_i^2}, \quad z = (y - A\tilde x)/\sigma,
        \qquad E[r] = 0, \quad \mathrm{Var}[r] = \frac{P}{N(N + 2)}

    over the P pairs of measured neighbours along ``axis`` and the N real values measured; a
    complex datum is two.  The variance is exact for white Gaussian noise: ``r`` is independent
    of its denominator (Basu), so that :math:`E[r^2] = E[(\sum z_i z_j)^2]/E[(\sum z_i^2)^2]`.
    It does not depend on the noise's scale, which :func:`residual_chi2` tests.  The p-value takes
    ``r`` as normal, which asks for some tens of pairs.

    Args:
        measurement: data and noise.
        x: one sample a slice, ``(slices, *in_shape)``, physical units.
        axis: axis of the data without slices; of a sinogram -2 is along views and -1 along the
            detector.

    Raises:
        GeometryError: shapes that do not fit, or no such axis.
        InputError: samples that are not finite, no two measured neighbours on the axis, or a
            residual of zero.
        UnsupportedError: an operator that does not tell which data it measures.

    Source: Box, Jenkins and Reinsel, *Time Series Analysis*, ch. 2 (lag-one autocorrelation);
    Basu, Sankhya 15 (1955).
    """
    n = len(measurement.operator.out_shape)
    if not -n <= axis < n:
        raise GeometryError(f"whiteness: data of {n} axes have no axis {axis}")
    z = _standard_residual(measurement, x)
    measured = measured_data(measurement).movedim(axis, -1)
    z = z.movedim(axis % n + 1, -1) * measured.unsqueeze(-2)  # (slices, *, real parts, axis)
    pairs = (measured[..., 1:] & measured[..., :-1]).sum() * z.shape[-2]
    if not int(pairs):
        raise InputError(
            f"whiteness: no two neighbours along axis {axis} are measured; choose another axis"
        )
    count = int(measured.sum()) * z.shape[-2]
    power = z.square().flatten(1).sum(dim=1)
    if not bool((power > 0).all()):
        raise InputError(
            "whiteness: the residual is zero, the sample fits the noise exactly; see residual_chi2"
        )
    r = (z[..., 1:] * z[..., :-1]).flatten(1).sum(dim=1) / power
    variance = int(pairs) / (count * (count + 2))
    p = torch.as_tensor(2 * stats.norm.sf(r.abs().cpu().numpy() / math.sqrt(variance)))
    return Whiteness(r.cpu(), variance, p)


def by_first_axis(shape: Sequence[int]) -> Tensor:
    """Group data by their first axis, the views of CT or the coils of MRI.

    Args:
        shape: the operator's ``out_shape``.

    Returns:
        Numbers from 0, ``shape``.

    Raises:
        GeometryError: an empty shape.
    """
    if not len(shape) or min(shape) < 1:
        raise GeometryError(f"groups need a shape without empty axes, got {tuple(shape)}")
    first = torch.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return first.expand(tuple(shape)).clone()


def by_frequency(shape: Sequence[int], rings: int) -> Tensor:
    r"""Group k-space by rings of equal width.

    .. math:: g = \lfloor \mathrm{rings}\;|k|/|k|_{max} \rfloor

    ``k`` is in cycles a pixel on the last two axes, zero at ``n // 2``; corners beyond
    :math:`|k|_{max} = 1/2` belong to the outermost ring.  Other axes (coils) share a ring.

    Args:
        shape: the operator's ``out_shape``, at least two axes.
        rings: number of rings.

    Returns:
        Numbers from 0 (low frequency) to ``rings - 1``, ``shape``.

    Raises:
        GeometryError: fewer than two axes or none without extent.
        InputError: no ring.
    """
    if len(shape) < 2 or min(shape) < 1:
        raise GeometryError(f"rings of k-space need a shape (..., H, W), got {tuple(shape)}")
    if rings < 1:
        raise InputError(f"k-space needs at least one ring, got {rings}")
    ky, kx = ((torch.arange(n, dtype=torch.float64) - n // 2) / n for n in shape[-2:])
    k = torch.hypot(ky[:, None], kx[None, :])
    return (rings * k / 0.5).to(torch.long).clamp(max=rings - 1).expand(tuple(shape)).clone()


@dataclass(frozen=True)
class Conformal:
    r"""Intervals :math:`\bar x \pm \hat\lambda s` fitted on validation patients.

    Attributes:
        factor: :math:`\hat\lambda`.
        alpha: promised share of pixels outside.
        delta: probability that the promise fails (:func:`rcps`); None where the promise is one
            about the mean (:func:`crc`).
        patients: how many there were, n.
        risk: share outside on them, which is below ``alpha`` by the price of the guarantee.
    """

    factor: float
    alpha: float
    delta: float | None
    patients: int
    risk: float

    def interval(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper end, of the shape and unit of ``mean``.

        Raises:
            InputError: a negative or NaN std, or complex values.
        """
        _check_pair(mean, std)
        return mean - self.factor * std, mean + self.factor * std


def rcps(
    truth: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    alpha: float = 0.1,
    delta: float = 0.1,
    mask: Tensor | None = None,
    patients: Sequence[int] | None = None,
) -> Conformal:
    r"""Factor whose risk is at most ``alpha`` with probability ``1 - delta`` over the fit.

    .. math:: \hat\lambda = \min\{\lambda : p(\hat R(\lambda')) \le \delta
        \;\; \forall \lambda' \ge \lambda\}, \qquad P\{R(\hat\lambda) \le \alpha\} \ge 1 - \delta

    with :math:`\hat R(\lambda)` the mean over n patients of the share of pixels with
    :math:`|x - \bar x| > \lambda s`, and p the bound of Hoeffding and Bentkus on the probability
    of so small a mean if the risk exceeded :math:`\alpha`,

    .. math:: p(r) = \min\{e^{-n\,h(r, \alpha)},\; e\,P(\mathrm{Bin}(n, \alpha) \le \lceil nr
        \rceil)\}, \quad h(a, b) = a\ln\frac ab + (1 - a)\ln\frac{1 - a}{1 - b}

    Never worse than :math:`\hat R + \sqrt{\ln(1/\delta)/(2n)} \le \alpha`, and of use with 22
    patients where that asks for 116.  Holds for any method and prior, for patients like those of
    the fit; void under shift of scanner, protocol or population.

    Args:
        truth: ``(images, *shape)``, real, any unit.
        mean: reconstructions, same shape and unit.
        std: their standard deviations, same shape and unit.
        alpha: most share of pixels outside.
        delta: probability of failing.
        mask: boolean, broadcastable to the images: pixels that count.
        patients: patient of each image, as images of one patient are not independent; default
            every image its own.

    Raises:
        GeometryError: shapes that differ.
        InputError: values that are not finite, alpha or delta outside (0, 1), an empty mask, too
            few patients for alpha and delta, or a std of zero at so many wrong pixels that no
            factor serves.

    Source: Bates et al., J. ACM 68 (2021), sec. 3.1; Angelopoulos et al., ICML (2022) for images.
    """
    _check_share(alpha, "alpha")
    _check_share(delta, "delta")
    ratio, weight, n = _misses(truth, mean, std, mask, patients)
    if (1 - alpha) ** n > delta:
        least = math.ceil(math.log(delta) / math.log1p(-alpha))
        raise InputError(
            f"rcps with alpha {alpha} and delta {delta} needs at least {least} patients, got {n}; "
            "add patients, allow more, or use crc"
        )
    factor, share = _smallest(ratio, weight, _budget(n, alpha, delta))
    return Conformal(factor, alpha, delta, n, share)


def crc(
    truth: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    alpha: float = 0.1,
    mask: Tensor | None = None,
    patients: Sequence[int] | None = None,
) -> Conformal:
    r"""Factor whose risk is at most ``alpha`` on average over fits and a next patient.

    .. math:: \hat\lambda = \min\Big\{\lambda :
        \frac{n \hat R(\lambda) + B}{n + 1} \le \alpha\Big\}, \quad B = 1, \qquad
        E[R(\hat\lambda)] \le \alpha

    The loss, a share of pixels, is at most B.  Arguments as of :func:`rcps`.

    Raises:
        GeometryError: shapes that differ.
        InputError: as :func:`rcps`.

    Source: Angelopoulos, Bates, Fisch, Lei and Schuster, ICLR (2024).
    """
    _check_share(alpha, "alpha")
    ratio, weight, n = _misses(truth, mean, std, mask, patients)
    budget = (alpha * (n + 1) - 1) / n
    if budget < 0:
        raise InputError(
            f"crc with alpha {alpha} needs at least {math.ceil(1 / alpha - 1)} patients, got {n}; "
            "add patients or allow more"
        )
    factor, share = _smallest(ratio, weight, budget)
    return Conformal(factor, alpha, None, n, share)


def risk(
    truth: Tensor,
    mean: Tensor,
    std: Tensor,
    factor: float,
    *,
    mask: Tensor | None = None,
    patients: Sequence[int] | None = None,
) -> float:
    r"""Mean over patients of the share of pixels with :math:`|x - \bar x| > \lambda s`.

    Arguments as of :func:`rcps`; ``factor`` is :math:`\lambda`, at least 0.

    Raises:
        GeometryError: shapes that differ.
        InputError: values that are not finite, a negative factor, an empty mask.

    Source: Angelopoulos et al., ICML (2022).
    """
    if not factor >= 0:
        raise InputError(f"the factor of an interval must be at least 0, got {factor}")
    ratio, weight, _ = _misses(truth, mean, std, mask, patients)
    return float(weight[ratio > factor].sum())


def _budget(n: int, alpha: float, delta: float) -> float:
    """Largest mean r of n losses with ``p(r) <= delta``, see :func:`rcps`."""

    def excess(r: float) -> float:
        h = special.rel_entr(r, alpha) + special.rel_entr(1 - r, 1 - alpha)
        return float(-n * h) - math.log(delta)

    hoeffding = optimize.brentq(excess, 0.0, alpha) if excess(0.0) < 0 else 0.0
    below = math.e * stats.binom.cdf(range(n), n, alpha) <= delta
    return max(float(hoeffding), (int(below.sum()) - 1) / n)


def _misses(
    truth: Tensor,
    mean: Tensor,
    std: Tensor,
    mask: Tensor | None,
    patients: Sequence[int] | None,
) -> tuple[Tensor, Tensor, int]:
    """``|x - mean| / std`` of every pixel, its weight in the risk, and the number of patients.

    Weights sum to one; every patient has the same, and so has every pixel of a patient.
    """
    if truth.ndim < 2 or truth.shape != mean.shape or truth.shape != std.shape:
        raise GeometryError(
            f"truth, mean and std must be alike, (images, *shape), got {tuple(truth.shape)}, "
            f"{tuple(mean.shape)} and {tuple(std.shape)}"
        )
    _check_pair(mean, std)
    _check_finite(mean, "means")
    _check_finite(truth, "truths")
    _check_finite(std, "standard deviations")
    if truth.is_complex():
        raise InputError("conformal intervals are of real values; give magnitudes, or parts")
    inside = torch.ones((), dtype=torch.bool) if mask is None else mask.to(torch.bool)
    try:
        inside = inside.to(truth.device).expand(truth.shape)
    except RuntimeError as error:
        raise GeometryError(
            f"the mask must broadcast to {tuple(truth.shape)}, got {tuple(inside.shape)}"
        ) from error
    labels = torch.arange(len(truth)) if patients is None else torch.as_tensor(patients)
    if labels.shape != (len(truth),):
        raise GeometryError(
            f"patients must name one for each of {len(truth)} images, got {tuple(labels.shape)}"
        )
    names, patient = torch.unique(labels, return_inverse=True)
    n = len(names)
    pixels = inside.flatten(1).sum(dim=1).to("cpu", torch.float64)
    per_patient = torch.zeros(n, dtype=torch.float64).index_add_(0, patient, pixels)
    if not bool((per_patient > 0).all()):
        raise InputError("the mask leaves a patient without pixels; give a larger mask")
    distance = (truth.double() - mean.double()).abs()
    # no miss where truth and mean agree, whatever std; a miss for every factor where std is 0
    ratio = torch.where(distance > 0, distance / std.double(), 0.0)
    weight = (1 / (n * per_patient))[patient].to(truth.device)
    weight = weight.reshape(-1, *[1] * (truth.ndim - 1)).expand(truth.shape)
    return ratio[inside], weight[inside], n


def _smallest(ratio: Tensor, weight: Tensor, budget: float) -> tuple[float, float]:
    """Smallest factor that leaves at most ``budget`` of the weight outside, and what it leaves.

    The risk falls at the ratios only, so that one of them, or 0, is the smallest factor.
    """
    value, order = torch.cat([ratio.new_zeros(1), ratio]).sort()
    mass = torch.cat([weight.new_zeros(1), weight])[order]
    # weight beyond the j-th, exact only at a run's end; none beyond the last, without rounding
    above = torch.cat([mass.flip(0).cumsum(0).flip(0)[1:], mass.new_zeros(1)])
    enough = above <= budget + 1e-12
    factor = float(value[enough][0])
    if not math.isfinite(factor):
        raise InputError(
            "the std is zero at too many pixels where the mean errs, so that no factor of it "
            "serves; give more samples, or mask the pixels without spread"
        )
    return factor, float(weight[ratio > factor].sum())


def _standard_residual(measurement: Measurement, x: Tensor) -> Tensor:
    """``(y - Ax) / sigma`` as real values, ``(slices, *out_shape, parts)``, float64."""
    shape = (len(measurement), *measurement.operator.in_shape)
    if tuple(x.shape) != shape:
        raise GeometryError(
            f"residual tests need one sample a slice, {shape}, got {tuple(x.shape)}; repeat the "
            "measurement with measurement.take for several"
        )
    _check_finite(x, "samples")
    z = (measurement.data - measurement.operator(x)) / measurement.noise
    return (torch.view_as_real(z.resolve_conj()) if z.is_complex() else z[..., None]).double()


def measured_data(measurement: Measurement) -> Tensor:
    """Which data are measured, boolean ``out_shape``; the others read zero, as does ``A x``."""
    operator, data = measurement.operator, measurement.data
    count = operator.measured
    if count == math.prod(operator.out_shape):
        return torch.ones(operator.out_shape, dtype=torch.bool, device=data.device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(operator.in_shape, generator=generator, dtype=operator.dtype).to(data.device)
    seen = torch.zeros(operator.out_shape, dtype=torch.bool, device=data.device)
    for few in measurement.parts():
        reached = few.operator(x.expand(len(few), *x.shape))
        seen |= ((few.data != 0) | (reached != 0)).any(dim=0)
    if int(seen.sum()) != count:
        raise UnsupportedError(
            f"{operator!r} measures {count} data, but {int(seen.sum())} are not zero; set the "
            "data that were not measured to zero"
        )
    return seen


def _check_finite(x: Tensor, what: str) -> None:
    if not bool(
        torch.isfinite(torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).all()
    ):
        raise InputError(f"the {what} hold NaN or infinite values; leave those out")


def _check_pair(mean: Tensor, std: Tensor) -> None:
    if mean.is_complex() or std.is_complex():
        raise InputError("intervals are of real values; give real and imaginary part each")
    if not bool((std >= 0).all()):
        raise InputError("standard deviations must be at least 0, got a negative one or NaN")


def _check_share(value: float, name: str) -> None:
    if not 0 < value < 1:
        raise InputError(f"{name} must lie between 0 and 1, got {value}")
