"""Score matching without the data's score: exact (implicit) and sliced.

A run multiplies the losses by sigma^2 / d, so that levels weigh alike.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from inverse.errors import InputError, UnsupportedError
from inverse.training.objectives.base import (
    Field,
    Model,
    Objective,
    Perturbed,
    check_samples,
    dot,
    follow,
    vjp,
)

__all__ = [
    "EXACT_LIMIT",
    "Exact",
    "Sliced",
    "SlicedReduced",
    "exact_score_matching",
    "projections",
    "sliced_score_matching",
]

EXACT_LIMIT = 1024
"""Most unknowns for the exact trace, which costs one backward pass each."""


def exact_score_matching(score: Field, x: Tensor, *, limit: int = EXACT_LIMIT) -> Tensor:
    r"""Hyvarinen's score matching, without the data's score.

    .. math:: L = E\left[\mathrm{tr}\,\nabla s(x) + \tfrac12 \|s(x)\|^2\right]
              = \tfrac12 E\|s - \nabla\log p\|^2 - \tfrac12 E\|\nabla\log p\|^2

    The trace takes ``d`` vector-Jacobian products.

    Source: Hyvarinen, Estimation of non-normalized statistical models by score matching (JMLR
    2005), theorem 1, equation 4.

    Args:
        score: ``(n, *shape) -> (n, *shape)``.
        x: samples ``(n, *shape)``.
        limit: most unknowns a sample.

    Returns:
        Losses ``(n,)``.

    Raises:
        UnsupportedError: for more unknowns than ``limit``.
        InputError: for samples that are not finite.

    Here: docs/theory.md, equation (8).
    """
    check_samples(x)
    d = x[0].numel()
    if d > limit:
        raise UnsupportedError(
            f"exact score matching takes one backward pass an unknown, at most {limit}, got {d}; "
            "use sliced score matching (ssm-vr) or smaller images"
        )
    u, s = follow(score, x)
    trace = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for i in range(d):
        e = torch.zeros_like(x)
        e.flatten(1)[:, i] = 1
        trace = trace + vjp(s, u, e).flatten(1)[:, i]
    return trace + 0.5 * dot(s, s)


def sliced_score_matching(
    score: Field, x: Tensor, v: Tensor, *, variance_reduced: bool = True
) -> Tensor:
    r"""Sliced score matching: Hyvarinen's objective along random directions.

    .. math::
       L_{SSM} = E\left[v^T \nabla s\, v + \tfrac12 (v^T s)^2\right], \qquad
       L_{SSM\text{-}VR} = E\left[v^T \nabla s\, v + \tfrac12 \|s\|^2\right]

    Both average to :func:`exact_score_matching` for :math:`E[v v^T] = I`.

    Source: Song, Garg, Shi, Ermon, Sliced score matching (UAI 2019), section 3.1: the sliced
    objective and its variance-reduced form.

    Args:
        score: ``(n, *shape) -> (n, *shape)``.
        x: samples ``(n, *shape)``.
        v: directions ``(n, *shape)``, or ``(m, n, *shape)`` to average over ``m``; see
            :func:`projections`.
        variance_reduced: SSM-VR, else SSM.

    Returns:
        Losses ``(n,)``.

    Raises:
        InputError: for samples that are not finite or directions of another shape.

    Here: docs/theory.md, equation (9).
    """
    check_samples(x)
    directions = v if v.ndim == x.ndim + 1 else v[None]
    if directions.shape[1:] != x.shape:
        raise InputError(
            f"projection vectors must have the samples' shape {tuple(x.shape)}, with or without "
            f"a leading number of projections, got {tuple(v.shape)}"
        )
    u, s = follow(score, x)
    total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for w in directions:
        total = total + dot(vjp(s, u, w), w)
        total = total + 0.5 * (dot(s, s) if variance_reduced else dot(s, w) ** 2)
    return total / len(directions)


def projections(
    x: Tensor, generator: torch.Generator, kind: Literal["rademacher", "gaussian"] = "rademacher"
) -> Tensor:
    """Random directions with :math:`E[v v^T] = I`, of the shape, dtype and device of ``x``."""
    if kind == "gaussian":
        v = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    elif kind == "rademacher":
        v = 2 * torch.randint(2, x.shape, generator=generator).to(x.dtype) - 1
    else:
        raise InputError(f"projections are 'rademacher' or 'gaussian', got '{kind}'")
    return v.to(x.device)


# --- in a run ---------------------------------------------------------------------------------


class Exact(Objective):
    """Times sigma^2 / d, so that levels weigh alike."""

    together = False

    def losses(self, model: Model, batch: Perturbed, generator: torch.Generator) -> Tensor:
        """By :func:`exact_score_matching`."""
        loss = exact_score_matching(model.score(batch), batch.x)
        return batch.sigma**2 * loss / batch.x0[0].numel()


class Sliced(Objective):
    """Times sigma^2 / d, so that levels weigh alike."""

    variance_reduced = False

    def losses(self, model: Model, batch: Perturbed, generator: torch.Generator) -> Tensor:
        """By :func:`sliced_score_matching`."""
        v = projections(batch.x0, generator)
        loss = sliced_score_matching(
            model.score(batch), batch.x, v, variance_reduced=self.variance_reduced
        )
        return batch.sigma**2 * loss / batch.x0[0].numel()


class SlicedReduced(Sliced):
    """The variance-reduced form."""

    variance_reduced = True
