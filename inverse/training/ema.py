r"""Averages of the weights along a run, and any average afterwards.

An average is updated as :math:`\hat\theta_k = \beta_k \hat\theta_{k-1} + (1-\beta_k)\,\theta_k`.
The power function

.. math::
   \hat\theta_\gamma(t) = \frac{\int_0^t \tau^\gamma\, \theta(\tau)\, d\tau}
                               {\int_0^t \tau^\gamma\, d\tau},
   \qquad \beta_k = (1 - 1/k)^{\gamma+1}, \qquad
   \sigma_{rel} = \frac{\sqrt{\gamma+1}}{(\gamma+2)\sqrt{\gamma+3}}

has its width :math:`\sigma_{rel}` as a share of the run, whatever the run's length.  Each average
is a linear functional of the weights; its coefficients, the *profile* :math:`p \in R^{k+1}`,
follow from the :math:`\beta`.  From snapshots of a few averages any other is the combination whose
profile is closest in least squares, :math:`\min_x \|\sum_i x_i p_i - p\|_2`.  Profiles are summed
step by step here, so that every update rule can take part.

Source: Karras et al., Analyzing and improving the training dynamics of diffusion models (CVPR
2024), section 3.1 and appendix C.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from inverse.errors import InputError

__all__ = [
    "Average",
    "Keep",
    "combination",
    "combine",
    "half_life",
    "power",
    "power_exponent",
    "profile",
]

Keep = Callable[[int], float]
""":math:`\\beta_k` of step ``k`` (from 1)."""


def power_exponent(sigma_rel: float) -> float:
    r""":math:`\gamma` of the power function of relative width :math:`\sigma_{rel}`.

    The largest root of :math:`\gamma^3 + 7\gamma^2 + (16 - s)\gamma + (12 - s) = 0` with
    :math:`s = \sigma_{rel}^{-2}`.

    Raises:
        InputError: a width outside (0, 0.288), that of the plain mean of all steps.
    """
    if not 0 < sigma_rel < 12**-0.5:
        raise InputError(
            f"the relative width of an average must be above 0 and below 0.288 (the mean of the "
            f"whole run), got {sigma_rel:g}"
        )
    s = sigma_rel**-2
    return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())


def power(sigma_rel: float) -> Keep:
    r""":math:`\beta_k = (1 - 1/k)^{\gamma+1}`."""
    gamma = power_exponent(sigma_rel)
    return lambda step: (1 - 1 / step) ** (gamma + 1)


def half_life(share: float) -> Keep:
    r""":math:`\beta_k = 2^{-1/\max(1,\, share\, k)}`, a half-life that grows with the run.

    All but the first steps weigh like the power function of :math:`\gamma + 1 = \ln 2/share`.
    """
    return lambda step: float(0.5 ** (1 / max(1.0, share * step)))


@dataclass
class Average:
    """One average of a network's weights.

    Attributes:
        keep: its update rule.
        weights: its value, by name.
    """

    keep: Keep
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, net: nn.Module, keep: Keep) -> Average:
        """The average at the start of a run."""
        return cls(keep, {name: v.detach().clone() for name, v in net.state_dict().items()})

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        """Take in the weights after ``step`` steps."""
        fresh = 1 - self.keep(step)
        for name, value in net.state_dict().items():
            if value.dtype.is_floating_point:
                self.weights[name].lerp_(value, fresh)


def profile(keep: Keep, steps: int, length: int) -> NDArray[np.float64]:
    """What each step's weights, from those at the start on, count for after ``steps`` steps.

    Args:
        keep: update rule.
        steps: when the average is looked at.
        length: steps of the whole run; later ones count zero.

    Returns:
        ``(length + 1,)``, adding up to one.
    """
    beta = np.array([0.0, *(keep(k) for k in range(1, steps + 1))])
    later = np.cumprod(np.append(beta[1:], 1.0)[::-1])[::-1]  # product of beta_j, j > k
    result = np.zeros(length + 1)
    result[: steps + 1] = (1 - beta) * later
    return result


def combination(
    profiles: Sequence[NDArray[np.float64]], target: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """Least-squares coefficients of ``target`` in ``profiles``, and the relative error left."""
    basis = np.stack(profiles, axis=1)
    x = np.asarray(np.linalg.lstsq(basis, target, rcond=None)[0], np.float64)
    return x, float(np.linalg.norm(basis @ x - target) / np.linalg.norm(target))


def combine(
    snapshots: Sequence[Mapping[str, Tensor]], coefficients: Sequence[float]
) -> dict[str, Tensor]:
    r"""Weights :math:`\sum_i x_i \hat\theta_i`; what is not floating point is the last one's."""
    result = {}
    for name, last in snapshots[-1].items():
        result[name] = last
        if last.dtype.is_floating_point:
            terms = zip(coefficients, snapshots, strict=True)
            result[name] = sum((x * s[name].double() for x, s in terms), torch.zeros(())).float()
    return result
