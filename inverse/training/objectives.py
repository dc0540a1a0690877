r"""Training objectives of denoisers and scores.

Denoising score matching over noise levels :math:`\sigma`, written for the denoiser
:math:`D = x + \sigma^2 s`:

.. math::
   L = E_{x_0, \sigma, z}\; \lambda(\sigma)\, \| D(x_0 + \sigma z, \sigma) - x_0 \|^2
     = E\; \lambda(\sigma)\,\sigma^4 \| s(x, \sigma) + z/\sigma \|^2

Source: Vincent, A connection between score matching and denoising autoencoders (2011); Song and
Ermon, NCSN (NeurIPS 2019), equation 6; Karras et al., EDM (NeurIPS 2022), table 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from inverse.priors.denoiser import expand

__all__ = ["Weighting", "denoising_score_matching", "lognormal_levels", "weight"]

Weighting = Literal["edm", "sigma2"]


def weight(sigma: Tensor, sigma_data: float, weighting: Weighting) -> Tensor:
    r""":math:`\lambda(\sigma)` on the denoising error, shape of ``sigma``.

    ``edm``: :math:`(\sigma^2+\sigma_d^2)/(\sigma\sigma_d)^2`, unit loss at the start for all
    levels.  ``sigma2``: NCSN's :math:`\sigma^2` on the score error, :math:`\sigma^{-2}` here.
    """
    if weighting == "edm":
        return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return sigma**-2


def denoising_score_matching(
    denoise: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    sigma: Tensor,
    z: Tensor,
    sigma_data: float,
    weighting: Weighting = "edm",
) -> Tensor:
    r"""Denoising score matching, one value an image: mean over pixels of the weighted error.

    Args:
        denoise: ``(x, sigma) -> E[x_0 | x]``, images ``(b, *shape)`` and levels ``(b,)``.
        x0: clean images ``(b, *shape)`` in prior units.
        sigma: noise levels ``(b,)``.
        z: standard normal noise of the shape of ``x0``.
        sigma_data: standard deviation of the images.
        weighting: see :func:`weight`.

    Returns:
        Losses ``(b,)``.
    """
    x = x0 + expand(sigma, x0) * z
    error = (denoise(x, sigma) - x0).square().flatten(1).mean(dim=1)
    return weight(sigma, sigma_data, weighting) * error


def lognormal_levels(
    count: int,
    mean: float,
    std: float,
    bounds: tuple[float, float],
    generator: torch.Generator,
) -> Tensor:
    """Noise levels with ``ln sigma ~ N(mean, std^2)`` clipped to ``bounds``, shape ``(count,)``.

    Drawn by stratified quantiles: one draw a stratum, so that a small batch sees all levels.
    """
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    ln = mean + std * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))
    level = torch.exp(ln).clamp(*bounds)
    return level[torch.randperm(count, generator=generator)]
