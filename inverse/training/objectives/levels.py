"""Noise levels of a batch: lognormal, a geometric ladder, uniform in time; all stratified."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inverse.errors import InputError
from inverse.sde import SDE

__all__ = ["draw_levels", "geometric_levels", "lognormal_levels", "uniform_levels"]


def lognormal_levels(
    count: int,
    mean: float,
    std: float,
    bounds: tuple[float, float],
    generator: torch.Generator,
) -> Tensor:
    """Noise levels with ``ln sigma ~ N(mean, std^2)`` clipped to ``bounds``, shape ``(count,)``.

    Drawn by stratified quantiles: one draw a stratum, so that a small batch sees all levels.
    Source: Karras et al., EDM (NeurIPS 2022), table 1.
    """
    u = _stratified(count, generator)
    ln = mean + std * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))
    level = torch.exp(ln).clamp(*bounds)
    return level[torch.randperm(count, generator=generator)]


def geometric_levels(bounds: tuple[float, float], count: int) -> Tensor:
    """NCSN's ladder: ``count`` levels in geometric progression, largest first.

    Source: Song and Ermon, NCSN (NeurIPS 2019), section 4.2.
    """
    low, high = bounds
    if not 0 < low <= high or count < 1:
        raise InputError(
            f"a ladder needs 0 < low <= high and at least one level, got {bounds} and {count}"
        )
    return torch.logspace(math.log10(high), math.log10(low), count)


def draw_levels(ladder: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` levels of a ladder, each as likely, stratified like :func:`lognormal_levels`."""
    index = (_stratified(count, generator) * len(ladder)).long().clamp(max=len(ladder) - 1)
    return ladder[index[torch.randperm(count, generator=generator)]]


def uniform_levels(count: int, sde: SDE, generator: torch.Generator) -> Tensor:
    """Levels at times uniform on ``(0, 1)``, stratified."""
    level = sde.noise_level(_stratified(count, generator).double()).float()
    return level[torch.randperm(count, generator=generator)]


def _stratified(count: int, generator: torch.Generator) -> Tensor:
    """One uniform draw in each of ``count`` strata of (0, 1), in order."""
    return (torch.arange(count) + torch.rand(count, generator=generator)) / count
