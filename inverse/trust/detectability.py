r"""Whether a lesion survives reconstruction: model observers and contrast recovery.

A lesion ``s`` of known place and shape is put into the *object before measurement*; an observer
that sees only a few channels of the reconstruction has to tell images with it from images
without.  Insertion alone is not enough: a prior without lesions erases them, one with lesions
draws them, so that removal from objects that have one is measured the same way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy import optimize, special, stats
from torch import Tensor

from inverse.errors import GeometryError, InputError, NumericalError

__all__ = [
    "Detection",
    "auc",
    "contrast_recovery",
    "d_prime",
    "hotelling",
    "laguerre_gauss",
]

IMAGES_PER_CHANNEL = 15


def laguerre_gauss(
    shape: tuple[int, int],
    width: float,
    count: int = 6,
    centre: tuple[float, float] | None = None,
) -> Tensor:
    r"""Laguerre-Gauss channels, for signals without preferred direction.

    .. math:: u_j(r) = \frac{\sqrt 2}{a}\, e^{-\pi r^2/a^2}\, L_j(2\pi r^2/a^2),
        \qquad j = 0, \dots, \mathrm{count} - 1

    Orthonormal over the plane; on the grid as far as it holds and resolves them.

    Args:
        shape: image (H, W).
        width: ``a`` in pixels; near the lesion's diameter.
        count: number of channels, 5 to 10 as a rule.
        centre: (row, column) of the lesion in pixels, default the middle of the image.

    Returns:
        ``(count, H, W)``, float64.

    Raises:
        GeometryError: an empty image.
        InputError: a width that is not positive, no channel, or a centre outside the image.

    Source: Gallas and Barrett, J. Opt. Soc. Am. A 20 (2003).
    """
    if len(shape) != 2 or min(shape) < 1:
        raise GeometryError(f"channels need an image (H, W), got {tuple(shape)}")
    if not (math.isfinite(width) and width > 0) or count < 1:
        raise InputError(
            f"channels need a positive width and at least one, got width {width}, count {count}"
        )
    row, column = centre or ((shape[0] - 1) / 2, (shape[1] - 1) / 2)
    if not (0 <= row <= shape[0] - 1 and 0 <= column <= shape[1] - 1):
        raise InputError(f"the lesion's centre {(row, column)} lies outside the image {shape}")
    y = torch.arange(shape[0], dtype=torch.float64) - row
    x = torch.arange(shape[1], dtype=torch.float64) - column
    t = 2 * math.pi * (y[:, None] ** 2 + x[None, :] ** 2) / width**2
    polynomials = [torch.as_tensor(special.eval_laguerre(j, t.numpy())) for j in range(count)]
    return math.sqrt(2) / width * torch.exp(-t / 2) * torch.stack(polynomials)


def d_prime(difference: Tensor, covariance: Tensor) -> float:
    r"""Detectability index of the Hotelling observer from known moments.

    .. math:: d' = \sqrt{\Delta\bar v^T S^{-1} \Delta\bar v}

    In white noise of std :math:`\sigma` and orthonormal channels :math:`\|U^Ts\|/\sigma`.  No
    observer of any reconstruction of ``y = A x + n`` of a known object exceeds
    :math:`\|As\|/\sigma_y`.

    Args:
        difference: mean channel outputs with the lesion less those without, ``(c,)``.
        covariance: of the channel outputs, ``(c, c)``, in the unit squared.

    Raises:
        GeometryError: shapes that do not match.
        NumericalError: a covariance that is not positive definite.

    Source: Barrett and Myers, *Foundations of Image Science* (2004), section 13.2.12.
    """
    return math.sqrt(float(difference.double() @ _template(difference, covariance)))


def auc(present: Tensor, absent: Tensor, level: float = 0.95) -> tuple[float, float, float]:
    r"""Area under the ROC curve of scores, with a confidence interval.

    .. math:: \hat\theta = P(t_1 > t_0) + \tfrac12 P(t_1 = t_0), \qquad
        |\hat\theta - \theta| = z \sqrt{\frac{\theta(1 - \theta)}{mn}
        \Big(1 + N\frac{1 - \theta}{2 - \theta} + N\frac{\theta}{1 + \theta}\Big)}, \quad
        N = \frac{m + n}{2} - 1

    The interval's ends solve the second equation; unlike Wald's it has a width at 0 and 1.

    Args:
        present: scores with the lesion, ``(m,)``.
        absent: scores without, ``(n,)``, independent of those.
        level: confidence.

    Returns:
        Area, lower and upper end.

    Raises:
        InputError: no scores, scores that are not finite, a level outside (0, 1).

    Source: Newcombe, Stat. Med. 25 (2006) 559, method 5.
    """
    if not 0 < level < 1:
        raise InputError(f"the level of an interval must lie between 0 and 1, got {level}")
    for scores in (present, absent):
        if scores.ndim != 1 or not len(scores) or not bool(torch.isfinite(scores).all()):
            raise InputError(
                f"auc needs finite scores (n,) of both classes, got shape {tuple(scores.shape)}"
            )
    m, n = len(present), len(absent)
    ranks = stats.rankdata(torch.cat([present, absent]).double().cpu().numpy())
    value = float((ranks[:m].sum() - m * (m + 1) / 2) / (m * n))
    z, half = float(stats.norm.ppf((1 + level) / 2)), (m + n) / 2 - 1

    def excess(theta: float) -> float:
        spread = 1 + half * (1 - theta) / (2 - theta) + half * theta / (1 + theta)
        return (value - theta) ** 2 - z**2 * theta * (1 - theta) * spread / (m * n)

    tiny = 1e-12
    low = optimize.brentq(excess, 0.0, value - tiny) if value > tiny else 0.0
    high = optimize.brentq(excess, value + tiny, 1.0) if value < 1 - tiny else 1.0
    return value, float(low), float(high)


@dataclass(frozen=True)
class Detection:
    """How well the lesion is seen in images that the observer was not trained on.

    Attributes:
        d_prime: difference of mean scores over their standard deviation.
        auc: area under the ROC curve, 0.5 is guessing.
        low: lower end of its confidence interval.
        high: upper end.
        present: scores of the test images with the lesion.
        absent: scores of those without.
    """

    d_prime: float
    auc: float
    low: float
    high: float
    present: Tensor
    absent: Tensor


def hotelling(
    present: Tensor,
    absent: Tensor,
    channels: Tensor,
    *,
    train: int | None = None,
    level: float = 0.95,
) -> Detection:
    r"""Channelised Hotelling observer, trained on the first images and tested on the others.

    .. math:: v = U^T\hat x, \qquad w = S^{-1}\Delta\bar v, \qquad t = w^T v, \qquad
        d' = \frac{\bar t_1 - \bar t_0}{\sqrt{(s_1^2 + s_0^2)/2}}

    with S the mean of the two classes' covariances.  Testing on the training images would
    flatter it.

    Args:
        present: reconstructions of objects with the lesion, ``(n, H, W)``, real.
        absent: those without, ``(n', H, W)``, of other objects or noise.
        channels: ``(c, H, W)``, of :func:`laguerre_gauss`.
        train: images of each class for training, default half of the smaller class; both classes
            together at least 15 a channel.
        level: confidence of the area's interval.

    Raises:
        GeometryError: shapes that do not match.
        InputError: images that are not real and finite, too few of them.
        NumericalError: channels whose outputs do not vary, or depend on each other.

    Source: Barrett and Myers, *Foundations of Image Science* (2004), section 14.3; Gallas and
    Barrett, J. Opt. Soc. Am. A 20 (2003).
    """
    if channels.ndim != 3 or any(
        x.ndim != 3 or x.shape[1:] != channels.shape[1:] for x in (present, absent)
    ):
        raise GeometryError(
            f"hotelling needs images (n, H, W) and channels (c, H, W) of one size, got "
            f"{tuple(present.shape)}, {tuple(absent.shape)} and {tuple(channels.shape)}"
        )
    for x in (present, absent):
        if x.is_complex() or not bool(torch.isfinite(x).all()):
            raise InputError("hotelling needs real finite images; give magnitudes of complex ones")
    smaller = min(len(present), len(absent))
    train = smaller // 2 if train is None else train
    if 2 * train < IMAGES_PER_CHANNEL * len(channels) or smaller - train < 2:
        raise InputError(
            f"hotelling with {len(channels)} channels needs at least "
            f"{math.ceil(IMAGES_PER_CHANNEL * len(channels) / 2)} training images of each class "
            f"and 2 more to test, got {train} and {smaller - train}; add images or use fewer "
            "channels"
        )
    u = channels.double().flatten(1).to(present.device)
    v1, v0 = (x.double().flatten(1) @ u.T for x in (present, absent))
    difference = v1[:train].mean(dim=0) - v0[:train].mean(dim=0)
    covariance = (torch.cov(v1[:train].T) + torch.cov(v0[:train].T)) / 2
    w = _template(difference, covariance.reshape(len(u), len(u)))
    t1, t0 = v1[train:] @ w, v0[train:] @ w
    spread = float(torch.sqrt((t1.var() + t0.var()) / 2))
    if not spread > 0:
        raise NumericalError(
            "the scores of the test images do not vary; give images of different noise"
        )
    value, low, high = auc(t1, t0, level)
    return Detection(float(t1.mean() - t0.mean()) / spread, value, low, high, t1, t0)


def contrast_recovery(present: Tensor, absent: Tensor, lesion: Tensor) -> tuple[float, float]:
    r"""Share of a lesion's contrast that reaches the reconstruction, with its standard error.

    .. math:: \frac{s^T(E[\hat x \mid \mathrm{lesion}] - E[\hat x \mid \mathrm{none}])}{s^Ts}

    1 shows it as it is, 0 erases it, above 1 exaggerates it.  For a Gaussian posterior mean
    :math:`s^TKAs/s^Ts` with :math:`K = CA^T/\sigma_y^2`.

    Args:
        present: reconstructions with the lesion, ``(n, *shape)``, real.
        absent: those of the same objects without it, in the same order; the same noise in both
            makes the error small.
        lesion: what was added to the object, ``shape``, same unit.  For removal, ``present`` and
            ``absent`` keep their meaning and the object is one that has the lesion.

    Returns:
        Recovery and its standard error over the n pairs.

    Raises:
        GeometryError: shapes that do not match.
        InputError: fewer than two pairs, images that are not real and finite, a lesion of zero.

    Source: Fessler and Rogers, IEEE Trans. Image Process. 5 (1996), the local response.
    Here: docs/theory.md, equation (38).
    """
    if present.shape != absent.shape or present.shape[1:] != lesion.shape:
        raise GeometryError(
            f"contrast recovery needs pairs (n, *shape) and a lesion of that shape, got "
            f"{tuple(present.shape)}, {tuple(absent.shape)} and {tuple(lesion.shape)}"
        )
    for x in (present, absent, lesion):
        if x.is_complex() or not bool(torch.isfinite(x).all()):
            raise InputError("contrast recovery needs real finite images; give magnitudes")
    if len(present) < 2 or not bool(lesion.any()):
        raise InputError(
            f"contrast recovery needs two pairs and a lesion that is not zero, got "
            f"{len(present)} pairs"
        )
    s = lesion.double().flatten()
    shares = (present.double() - absent.double()).flatten(1) @ s / (s @ s)
    return float(shares.mean()), float(shares.std() / math.sqrt(len(shares)))


def _template(difference: Tensor, covariance: Tensor) -> Tensor:
    """``S^-1 dv``, ``(c,)``, float64."""
    c = len(difference)
    if difference.shape != (c,) or covariance.shape != (c, c):
        raise GeometryError(
            f"the observer needs a difference (c,) and a covariance (c, c), got "
            f"{tuple(difference.shape)} and {tuple(covariance.shape)}"
        )
    factor, failed = torch.linalg.cholesky_ex(covariance.double())
    if int(failed) or not bool(torch.isfinite(factor).all()):
        raise NumericalError(
            "the covariance of the channel outputs is not positive definite; give more images, "
            "or fewer channels that fit in the image"
        )
    return torch.cholesky_solve(difference.double()[:, None], factor)[:, 0]
