"""Denoising score matching: EDM, sigma^2 and likelihood weights, NCSN's ladder of levels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from inverse.errors import InputError, UnsupportedError
from inverse.priors.denoiser import expand
from inverse.sde import VE
from inverse.training.objectives.base import (
    Model,
    Objective,
    Perturbed,
    Setting,
    check_levels,
    check_samples,
)
from inverse.training.objectives.levels import draw_levels, geometric_levels, uniform_levels

__all__ = [
    "Denoising",
    "Ladder",
    "Likelihood",
    "Sigma2",
    "Weighting",
    "denoising_score_matching",
    "weight",
]

Weighting = Literal["edm", "sigma2", "likelihood"]


def weight(
    sigma: Tensor, sigma_data: float, weighting: Weighting, diffusion: Tensor | None = None
) -> Tensor:
    r""":math:`w(\sigma)` on the denoising error, shape of ``sigma``.

    With :math:`\lambda` the weight on the score error, :math:`w = \lambda/\sigma^4`.

    ``sigma2``: :math:`\lambda = \sigma^2`, NCSN's choice (Song and Ermon 2019, section 4.2).
    ``edm``: :math:`w = (\sigma^2+\sigma_d^2)/(\sigma\sigma_d)^2`, unit loss at the start for all
    levels (Karras et al. 2022, table 1).
    ``likelihood``: :math:`\lambda = g(t)^2`, with times drawn uniformly; then half the excess over
    the floor, ``d`` times, is the drop of the KL divergence along the process (Song, Durkan,
    Murray, Ermon, Maximum likelihood training of score-based diffusion models, NeurIPS 2021,
    theorem 1).

    Args:
        sigma: noise levels.
        sigma_data: standard deviation of the images, for ``edm``.
        weighting: the name.
        diffusion: ``g(t)`` of the times of the levels, for ``likelihood``.
    """
    if weighting == "edm":
        return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    if weighting == "sigma2":
        return sigma**-2
    if weighting == "likelihood" and diffusion is not None:
        return diffusion.to(sigma) ** 2 / sigma**4
    raise InputError(
        f"a weighting is 'edm', 'sigma2', or 'likelihood' with the diffusion g(t) of each level, "
        f"got '{weighting}'{'' if diffusion is None else ' with a diffusion'}"
    )


def denoising_score_matching(
    denoise: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    sigma: Tensor,
    z: Tensor,
    sigma_data: float,
    weighting: Weighting = "edm",
    diffusion: Tensor | None = None,
) -> Tensor:
    r"""Denoising score matching, mean over unknowns of the weighted error.

    .. math::
       L = E_{x_0, \sigma, z}\; w(\sigma)\, \| D(x_0 + \sigma z, \sigma) - x_0 \|^2 / d
         = E\; w(\sigma)\,\sigma^4 \| s(x, \sigma) + z/\sigma \|^2 / d

    Its floor is positive, :math:`w\sigma^4(1/\sigma^2 - J_\sigma/d)` with :math:`J_\sigma` the
    Fisher information of the perturbed density: a loss below it is overfitting or a bug.

    Source: Vincent, A connection between score matching and denoising autoencoders (2011),
    section 4.2; Song and Ermon, NCSN (NeurIPS 2019), equations 5 and 6 (many levels: ``sigma``
    drawn from :func:`geometric_levels`); Karras et al., EDM (NeurIPS 2022), equation 2.

    Args:
        denoise: ``(x, sigma) -> E[x_0 | x]``, samples ``(n, *shape)`` and levels ``(n,)``.
        x0: clean samples ``(n, *shape)``.
        sigma: noise levels ``(n,)``.
        z: standard normal noise of the shape of ``x0``.
        sigma_data: standard deviation of the samples.
        weighting: see :func:`weight`.
        diffusion: see :func:`weight`.

    Returns:
        Losses ``(n,)``.

    Raises:
        InputError: for samples that are not finite, levels that are not positive, or shapes that
            do not fit.

    Here: docs/theory.md, equation (10).
    """
    check_samples(x0)
    check_levels(sigma, x0)
    if z.shape != x0.shape:
        raise InputError(
            f"noise must have the shape {tuple(x0.shape)} of the samples, got {tuple(z.shape)}"
        )
    x = x0 + expand(sigma, x0) * z
    error = (denoise(x, sigma) - x0).square().flatten(1).mean(dim=1)
    return weight(sigma, sigma_data, weighting, diffusion) * error


# --- in a run ---------------------------------------------------------------------------------


class Denoising(Objective):
    """EDM's weights and lognormal levels; others derive from it."""

    weighting: Weighting = "edm"
    together = False
    second_order = False

    def losses(self, model: Model, batch: Perturbed, generator: torch.Generator) -> Tensor:
        """By :func:`denoising_score_matching`."""
        return denoising_score_matching(
            model.denoiser(batch),
            batch.x0,
            batch.sigma,
            batch.z,
            model.sigma_data,
            self.weighting,
            self.diffusion(batch.sigma),
        )

    def diffusion(self, sigma: Tensor) -> Tensor | None:
        """``g`` of the levels, where the weighting takes it."""
        return None


class Sigma2(Denoising):
    """NCSN's weights."""

    weighting = "sigma2"


class Ladder(Sigma2):
    """NCSN's weights and its ladder of levels."""

    def levels(self, count: int, generator: torch.Generator) -> Tensor:
        """Of the ladder."""
        ladder = geometric_levels(self.setting.sigma_range, self.setting.levels)
        return draw_levels(ladder, count, generator)


class Likelihood(Denoising):
    """Weights g(t)^2 at times that are uniform."""

    weighting = "likelihood"

    def __init__(
        self, setting: Setting, start: Tensor, pixel_mm: Tensor, generator: torch.Generator
    ) -> None:
        super().__init__(setting, start, pixel_mm, generator)
        low, high = setting.sigma_range
        if low == high:
            raise UnsupportedError(
                "likelihood weighting balances noise levels by their share of the process, got "
                f"the single level {low:g}; give a range of levels, or use 'dsm'"
            )
        self.sde = VE(low, high)

    def levels(self, count: int, generator: torch.Generator) -> Tensor:
        """At uniform times."""
        return uniform_levels(count, self.sde, generator)

    def diffusion(self, sigma: Tensor) -> Tensor:
        """``g`` of the levels, ``(b,)``."""
        bounded = sigma.cpu().double().clamp(self.sde.sigma_min, self.sde.sigma_max)
        return self.sde.diffusion(self.sde.time(bounded)).to(sigma)
