r"""Measurement noise: photon counting before the logarithm, and Gaussian noise.

Every item of a batch has its own generator, seeded from (seed, position), so that noise depends
neither on the batch size nor on the order of the work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from inverse.errors import InputError

__all__ = [
    "TransmissionPoisson",
    "add_gaussian",
    "count_photons",
    "generator",
    "line_integrals",
]


def generator(seed: int, *position: int) -> torch.Generator:
    """A CPU generator for the item at ``position``; different positions are independent.

    Args:
        seed: seed of the run, not negative.
        position: what numbers the item, such as slice and sample.

    Raises:
        InputError: if a number is negative.
    """
    if min((seed, *position)) < 0:
        raise InputError(f"seed and position must not be negative, got {(seed, *position)}")
    state = np.random.SeedSequence([seed, *position]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


def count_photons(
    line_integrals: Tensor,
    photons: float,
    seeds: Sequence[torch.Generator],
    electronic: float = 0.0,
) -> Tensor:
    r"""Detector readings of a transmission scan, in counts.

    .. math:: N = \mathrm{Poisson}(I_0 e^{-l}) + \sigma_e\,n, \qquad n \sim N(0, 1)

    Args:
        line_integrals: :math:`l`, without unit, ``(items, *shape)``.
        photons: :math:`I_0`, expected counts a detector bin in air.
        seeds: one generator an item.
        electronic: :math:`\sigma_e`, std of the electronics' noise in counts; with it, readings
            may be negative.

    Returns:
        Readings, float64 ``(items, *shape)``.

    Raises:
        InputError: if ``photons`` is not positive or ``electronic`` negative.
    """
    _check_photons(photons, electronic)
    rate = photons * torch.exp(-line_integrals.to(torch.float64))
    counts = torch.stack([torch.poisson(r, generator=g) for r, g in zip(rate, seeds, strict=True)])
    return add_gaussian(counts, electronic, seeds) if electronic else counts


def line_integrals(
    counts: Tensor, photons: float, electronic: float = 0.0
) -> tuple[Tensor, Tensor]:
    r"""Line integrals from readings, and their standard deviation.

    .. math:: y = \log\frac{I_0}{N}, \qquad \sigma = \frac{\sqrt{N + \sigma_e^2}}{N}

    which is the Gaussian approximation of the Poisson likelihood about the measured counts
    (second order in :math:`l`); see :class:`TransmissionPoisson` for the likelihood itself.  Bins
    that caught nothing have no logarithm: readings below one are taken as one, so a starved bin
    reads :math:`\log I_0` with a std of at least 1, a weak lower bound of the true line integral.

    Args:
        counts: readings, any shape.
        photons: :math:`I_0`, expected counts a detector bin in air.
        electronic: :math:`\sigma_e`, std of the electronics' noise in counts.

    Returns:
        Line integrals and their std, both float32 of the shape of ``counts``.

    Raises:
        InputError: if ``photons`` is not positive or ``electronic`` negative.

    Source: Bouman and Sauer, IEEE Trans. Image Process. 5 (1996).
    """
    _check_photons(photons, electronic)
    n = counts.to(torch.float64).clamp_min(1.0)
    std = torch.sqrt(n + electronic**2) / n
    return torch.log(photons / n).to(torch.float32), std.to(torch.float32)


@dataclass(frozen=True)
class TransmissionPoisson:
    r"""The likelihood of a transmission scan before the logarithm.

    Readings with electronic noise are a Poisson number and a Gaussian one; shifted by the
    variance of the second they have nearly a Poisson law, mean and variance being right:

    .. math:: N + \sigma_e^2 \sim \mathrm{Poisson}(\lambda), \qquad
        \lambda(l) = I_0 e^{-l} + \sigma_e^2 .

    Attributes:
        counts: readings N, any shape; negative ones are allowed with electronic noise.
        photons: :math:`I_0`, expected counts a detector bin in air.
        electronic: :math:`\sigma_e` in counts.

    Raises:
        InputError: counts that are not finite, or photons or noise out of range.

    Source: Snyder et al., J. Opt. Soc. Am. A 10 (1993), for the shift; Erdogan and Fessler, IEEE
    Trans. Med. Imaging 18 (1999), for the approximation.
    """

    counts: Tensor
    photons: float
    electronic: float = 0.0

    def __post_init__(self) -> None:
        _check_photons(self.photons, self.electronic)
        if not bool(torch.isfinite(self.counts).all()):
            raise InputError("photon counts hold NaN or infinite values; mask those bins")

    def _shifted(self) -> Tensor:
        """Readings as a Poisson number; the likelihood has none below zero."""
        return (self.counts.to(torch.float64) + self.electronic**2).clamp_min(0.0)

    def _rate(self, line: Tensor) -> tuple[Tensor, Tensor]:
        signal = self.photons * torch.exp(-line.to(torch.float64))
        return signal, signal + self.electronic**2

    def value(self, line: Tensor) -> Tensor:
        r"""Negative log-likelihood of line integrals, less that of a perfect fit; each datum's.

        .. math:: \lambda - N' - N'\log(\lambda/N'), \qquad N' = N + \sigma_e^2

        so it is zero at best, half a chi-square near it, and finite for starved bins.

        Args:
            line: line integrals, of the shape of ``counts`` up to broadcasting.
        """
        n = self._shifted()
        _, rate = self._rate(line)
        return rate - n + torch.xlogy(n, n) - torch.xlogy(n, rate)

    def gradient(self, line: Tensor) -> Tensor:
        r"""Derivative of :meth:`value`, :math:`I_0 e^{-l}\,(N'/\lambda - 1)`; float64."""
        signal, rate = self._rate(line)
        return signal * (self._shifted() / rate - 1.0)

    def curvature(self, line: Tensor | None = None) -> Tensor:
        r"""Curvature of a parabola above :meth:`value`, touching it at ``line``; float64.

        The least one that holds for all :math:`l \ge 0`, with f short for the value,

        .. math:: c(l) = \Big[\frac{2}{l^2}\big(f(0) - f(l) + l\dot f(l)\big)\Big]_+ ,
            \qquad c(0) = [\ddot f(0)]_+ ;

        without ``line`` that of f itself where it fits the count,
        :math:`(N' - \sigma_e^2)_+^2/N'`, which is no bound.

        Args:
            line: line integrals, not negative, of the shape of ``counts`` up to broadcasting.

        Source: Erdogan and Fessler, IEEE Trans. Med. Imaging 18 (1999), and Phys. Med. Biol. 44
        (1999).
        """
        n, dark = self._shifted(), self.electronic**2
        if line is None:
            return (n - dark).clamp_min(0.0) ** 2 / n.clamp_min(1.0)
        at = line.to(torch.float64)
        air = self.photons + dark
        flat = self.photons * (1.0 - n * dark / air**2)  # second derivative at zero
        rise = self.value(torch.zeros_like(at)) - self.value(at) + at * self.gradient(at)
        # the difference of like numbers is rounding where l is small, and the limit is known
        small = at < 1e-3
        c = torch.where(small, flat, 2.0 * rise / at.clamp_min(1e-3).square())
        return c.clamp_min(0.0)

    def gaussian(self, line: Tensor) -> tuple[Tensor, Tensor]:
        r"""The Gaussian likelihood that is nearest about given line integrals.

        One step of Fisher scoring, :math:`y = l - \dot\ell/\mathcal I` with the information
        :math:`\mathcal I = (I_0 e^{-l})^2/\lambda`; repeated at the solution it becomes the
        Poisson likelihood's own.  Unlike :func:`line_integrals` it is unbiased at low counts.

        Args:
            line: line integrals about which to expand, such as those of an earlier image.

        Returns:
            Data and their std, float32, for :class:`inverse.measurement.Measurement`.  Where the
            expected signal is below a thousandth of a count, the datum says nothing, and its std
            is that of such a bin.
        """
        signal, rate = self._rate(line)
        signal = signal.clamp_min(1e-3)
        rate = torch.maximum(rate, signal)
        data = line - signal * (self._shifted() / rate - 1.0) * rate / signal**2
        return data.to(torch.float32), (torch.sqrt(rate) / signal).to(torch.float32)


def add_gaussian(data: Tensor, std: float | Tensor, seeds: Sequence[torch.Generator]) -> Tensor:
    """Data with white Gaussian noise; complex data get it in the real and imaginary part each.

    Args:
        data: ``(items, *shape)``, real or complex.
        std: standard deviation (of each part), a number or a tensor that broadcasts to ``data``.
        seeds: one generator an item.

    Raises:
        InputError: if a standard deviation is negative or not finite.
    """
    s = torch.as_tensor(std, dtype=torch.float32)
    if not bool(((s >= 0) & torch.isfinite(s)).all()):
        raise InputError(
            f"the noise standard deviation must be finite and not negative, got {std}"
        )
    shape = (*data.shape[1:], 2) if data.is_complex() else data.shape[1:]
    noise = torch.stack(
        [torch.randn(shape, generator=g) for g, _ in zip(seeds, data, strict=True)]
    )
    if data.is_complex():
        noise = torch.view_as_complex(noise)
    return data + (s * noise).to(data.device)


def _check_photons(photons: float, electronic: float) -> None:
    if not (math.isfinite(photons) and photons > 0):
        raise InputError(
            f"photons must be the positive expected count of a bin in air (such as 1e5), "
            f"got {photons}"
        )
    if not (math.isfinite(electronic) and electronic >= 0):
        raise InputError(
            f"the electronic noise must be a std in counts, not negative, got {electronic}"
        )
