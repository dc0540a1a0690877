"""Stein's unbiased risk estimate: training on noisy images alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from inverse.errors import InputError
from inverse.training.objectives.base import (
    Model,
    Objective,
    Perturbed,
    check_levels,
    check_samples,
    dot,
    follow,
    vjp,
)
from inverse.training.objectives.denoising import weight
from inverse.training.objectives.score_matching import projections

__all__ = ["Sure", "sure"]


def sure(
    denoise: Callable[[Tensor, Tensor], Tensor], y: Tensor, sigma: Tensor, v: Tensor
) -> Tensor:
    r"""Stein's unbiased risk estimate: the error of a denoiser, seen from noisy samples alone.

    .. math:: R = \frac{\|D(y) - y\|^2}{d} - \sigma^2 + \frac{2\sigma^2}{d}\, v^T \nabla D(y)\, v,
              \qquad E[R] = E\|D(y) - x_0\|^2/d

    for :math:`y = x_0 + \sigma z`, any fixed :math:`x_0` and :math:`E[v v^T] = I`.

    Source: Stein, Estimation of the mean of a multivariate normal distribution (Annals of
    Statistics 1981), theorem 1; random divergence: Ramani, Blu, Unser, Monte-Carlo SURE (IEEE
    TIP 2008), theorem 2, with the derivative exact here.

    Args:
        denoise: ``(y, sigma) -> E[x_0 | y]``.
        y: noisy samples ``(n, *shape)``.
        sigma: their noise levels ``(n,)``.
        v: directions of the shape of ``y``; see :func:`projections`.

    Returns:
        Estimates of the mean squared error a sample ``(n,)``; single ones can be negative.

    Raises:
        InputError: as :func:`denoising_score_matching`.

    Here: docs/theory.md, equation (12).
    """
    check_samples(y)
    check_levels(sigma, y)
    if v.shape != y.shape:
        raise InputError(
            f"projection vectors must have the shape {tuple(y.shape)} of the samples, got "
            f"{tuple(v.shape)}"
        )
    u, mean = follow(lambda w: denoise(w, sigma), y)
    d = y[0].numel()
    s2 = sigma.to(y) ** 2
    divergence = dot(vjp(mean, u, v), v)
    return (mean - y).square().flatten(1).sum(dim=1) / d - s2 + 2 * s2 * divergence / d


# --- in a run ---------------------------------------------------------------------------------


class Sure(Objective):
    """EDM's weight on the estimated error."""

    def losses(self, model: Model, batch: Perturbed, generator: torch.Generator) -> Tensor:
        """By :func:`sure`."""
        v = projections(batch.x0, generator)
        risk = sure(model.denoiser(batch), batch.x, batch.sigma, v)
        return weight(batch.sigma, model.sigma_data, "edm") * risk
