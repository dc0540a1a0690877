r"""Measurement noise: photon counting before the logarithm, and Gaussian noise.

Every item of a batch has its own generator, seeded from (seed, position), so that noise depends
neither on the batch size nor on the order of the work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from inverse.errors import InputError

__all__ = ["add_gaussian", "count_photons", "generator", "line_integrals"]


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
    line_integrals: Tensor, photons: float, seeds: Sequence[torch.Generator]
) -> Tensor:
    r"""Photon counts of a transmission scan, :math:`N \sim \mathrm{Poisson}(I_0 e^{-l})`.

    Args:
        line_integrals: :math:`l`, without unit, ``(items, *shape)``.
        photons: :math:`I_0`, expected counts a detector bin in air.
        seeds: one generator an item.

    Returns:
        Counts, float64 ``(items, *shape)``.

    Raises:
        InputError: if ``photons`` is not positive and finite.
    """
    _check_photons(photons)
    rate = photons * torch.exp(-line_integrals.to(torch.float64))
    return torch.stack([torch.poisson(r, generator=g) for r, g in zip(rate, seeds, strict=True)])


def line_integrals(counts: Tensor, photons: float) -> tuple[Tensor, Tensor]:
    r"""Line integrals from counts, and their standard deviation.

    .. math:: y = \log\frac{I_0}{N}, \qquad \sigma = \frac{1}{\sqrt N}

    which is the Gaussian approximation of the Poisson likelihood about the measured counts
    (second order in :math:`l`).  Bins that caught nothing have no logarithm: counts below one
    are taken as one, so a starved bin reads :math:`\log I_0` with std 1, a weak lower bound of
    the true line integral.

    Args:
        counts: photon counts, any shape.
        photons: :math:`I_0`, expected counts a detector bin in air.

    Returns:
        Line integrals and their std, both float32 of the shape of ``counts``.

    Raises:
        InputError: if ``photons`` is not positive and finite.

    Source: Bouman and Sauer, IEEE Trans. Image Process. 5 (1996).
    """
    _check_photons(photons)
    n = counts.to(torch.float64).clamp_min(1.0)
    return torch.log(photons / n).to(torch.float32), torch.rsqrt(n).to(torch.float32)


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


def _check_photons(photons: float) -> None:
    if not (math.isfinite(photons) and photons > 0):
        raise InputError(
            f"photons must be the positive expected count of a bin in air (such as 1e5), "
            f"got {photons}"
        )
