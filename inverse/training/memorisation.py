r"""Does a prior repeat its training images?  Two looks at it.

**Gap.**  A network that generalises denoises training and held-out images alike; one that
memorises denoises its training images better.  With :math:`e` the mean over noise levels of
:math:`\ln \mathrm{RMSE}` of a slice,

.. math:: g = \bar e_{held} - \bar e_{train}, \qquad
   s^2 = s_{held}^2/n_{held} + s_{train}^2/n_{train} .

The alarm is raised where :math:`g > \ln 1.1` and :math:`g > 3 s`: held-out images are more than a
tenth worse, beyond chance.  Held-out images of another kind (scanner, body part) raise it too.

**Nearest neighbours.**  Samples of a prior should be no closer to the training images than
held-out images are: see :func:`nearest_neighbours`.

Sources: Kadkhodaie et al., Generalization in diffusion models arises from geometry-adaptive
harmonic representations (ICLR 2024), section 2 (train and test denoising error); Carlini et al.,
Extracting training data from diffusion models (USENIX Security 2023), section 4 (nearest
neighbours against those of held-out images).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inverse.errors import InputError

__all__ = ["Gap", "Neighbours", "gap", "nearest_neighbours"]

RATIO, SIGMAS = 1.1, 3.0


@dataclass(frozen=True)
class Gap:
    """Held-out against training error.

    Attributes:
        ratio: :math:`e^g`, 1 without memorisation.
        standard_error: of :math:`g`.
        alarm: whether the rule of the module's text says memorisation.
    """

    ratio: float
    standard_error: float
    alarm: bool

    def record(self) -> dict[str, Any]:
        """For logs and cards, with the rule in words."""
        rule = f"alarm where ratio > {RATIO:g} and ln ratio > {SIGMAS:g} standard errors"
        return {**asdict(self), "rule": rule}


def gap(held_out: Tensor, training: Tensor) -> Gap:
    """The gap between mean squared errors of slices.

    Args:
        held_out: mean squared errors ``(levels, slices)`` of held-out images.
        training: the same of training images, at the same noise levels.

    Raises:
        InputError: fewer than two slices on a side.
    """
    if held_out.shape[1] < 2 or training.shape[1] < 2:
        raise InputError(
            f"a gap needs at least two slices on either side, got {held_out.shape[1]} held out "
            f"and {training.shape[1]} of training"
        )
    held, own = (0.5 * e.double().log().mean(dim=0) for e in (held_out, training))
    g = float(held.mean() - own.mean())
    s = math.sqrt(float(held.var() / len(held) + own.var() / len(own)))
    return Gap(round(math.exp(g), 4), round(s, 4), g > math.log(RATIO) and g > SIGMAS * s)


@dataclass(frozen=True)
class Neighbours:
    """How close samples come to training images.

    Attributes:
        nearest: index of each sample's nearest training image.
        correlation: normalised correlation with it.
        held_out: the same correlations of the held-out images.
        p_value: probability of samples that close, or closer, were they distributed as held-out
            images are (Mann-Whitney, one-sided); small means copies.
    """

    nearest: tuple[int, ...]
    correlation: tuple[float, ...]
    held_out: tuple[float, ...]
    p_value: float

    def record(self) -> dict[str, Any]:
        """For cards: numbers alone."""
        samples, held = torch.tensor(self.correlation), torch.tensor(self.held_out)
        return {
            "samples": len(samples),
            "median_correlation": round(float(samples.median()), 4),
            "largest_correlation": round(float(samples.max()), 4),
            "held_out_median": round(float(held.median()), 4),
            "held_out_largest": round(float(held.max()), 4),
            "p_value": float(f"{self.p_value:.3g}"),
        }


def nearest_neighbours(
    samples: Tensor, training: Tensor, held_out: Tensor, *, side: int = 32, shift: int = 2
) -> Neighbours:
    """Nearest training image of each sample, against that of each held-out image.

    Images are averaged down to ``side`` by ``side``, and compared by normalised correlation, the
    largest over shifts, since training moves images about.  Held-out slices of one patient are
    alike, so that the p-value is a little too sure of itself.

    Args:
        samples: images ``(n, h, w)``.
        training: training images ``(m, h, w)`` in the same unit.
        held_out: images of other patients ``(k, h, w)``.
        side: rows and columns of the comparison.
        shift: largest shift in each direction, in pixels of the comparison.

    Raises:
        InputError: no image on a side, or values that are not finite.
    """
    from scipy import stats

    for name, images in (("samples", samples), ("training", training), ("held-out", held_out)):
        if images.ndim != 3 or not len(images) or not bool(torch.isfinite(images).all()):
            raise InputError(
                f"{name} images must be a finite stack (n, rows, columns) with n > 0, got shape "
                f"{tuple(images.shape)}"
            )
    known = _features(training, side)
    steps = range(-shift, shift + 1)

    def closest(images: Tensor) -> tuple[Tensor, Tensor]:
        features = _features(images, side)
        best = torch.full((len(images), len(known)), -1.0, dtype=torch.float64)
        for rows in steps:
            for columns in steps:
                moved = features.roll((rows, columns), dims=(1, 2)).flatten(1)
                best = torch.maximum(best, moved @ known.flatten(1).T)
        return best.max(dim=1)

    correlation, index = closest(samples)
    reference, _ = closest(held_out)
    test = stats.mannwhitneyu(correlation.numpy(), reference.numpy(), alternative="greater")
    return Neighbours(
        tuple(index.tolist()),
        tuple(correlation.tolist()),
        tuple(reference.tolist()),
        float(test.pvalue),
    )


def _features(images: Tensor, side: int) -> Tensor:
    """Images on the small grid, of zero mean and unit norm; constant ones are zero."""
    small = F.interpolate(images[:, None].double(), size=(side, side), mode="area")[:, 0]
    small = small - small.mean(dim=(1, 2), keepdim=True)
    norm = small.flatten(1).norm(dim=1)[:, None, None]
    return torch.where(norm > 1e-9, small / norm.clamp_min(1e-9), torch.zeros_like(small))
