r"""Forward noising processes: VE, VP and sub-VP.

.. math:: x_t = \alpha(t)\,x_0 + \sigma(t)\,z, \qquad z \sim N(0, I),\quad t \in (0, 1]

Only :math:`\alpha` and :math:`\sigma` are written.  The SDE with these marginals,
:math:`dx = f(t)\,x\,dt + g(t)\,dw`, is derived from them:

.. math:: f = \frac{d\log\alpha}{dt}, \qquad g^2 = \frac{d\sigma^2}{dt} - 2 f \sigma^2

An SDE knows neither a number of steps nor a solver.  Coefficients are float64.

Source: Song et al., Score-Based Generative Modeling through SDEs (ICLR 2021), section 3 and
appendices B, C; the derived form is Karras et al. (NeurIPS 2022), appendix B.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from inverse.errors import InputError

__all__ = ["SDE", "VE", "VP", "SubVP", "as_time"]


def as_time(t: float | Tensor) -> Tensor:
    """``t`` as a float64 tensor."""
    return torch.as_tensor(t, dtype=torch.float64)


class SDE(ABC):
    """Forward process ``x_t = alpha(t) x_0 + sigma(t) z``; see the module's text.

    Here: docs/theory.md, equation (14).
    """

    t_min: float = 1e-5
    """Smallest time of a sampler (cut-off of Song et al., appendix C)."""

    @abstractmethod
    def alpha(self, t: float | Tensor) -> Tensor:
        """Signal coefficient, float64, of the shape of ``t``."""

    @abstractmethod
    def sigma(self, t: float | Tensor) -> Tensor:
        """Noise standard deviation, float64, of the shape of ``t``."""

    def marginal(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """``(alpha(t), sigma(t))``."""
        return self.alpha(t), self.sigma(t)

    def noise_level(self, t: float | Tensor) -> Tensor:
        """``sigma / alpha``: the noise on ``x_t / alpha``, which a denoiser sees."""
        return self.sigma(t) / self.alpha(t)

    def snr(self, t: float | Tensor) -> Tensor:
        """Signal-to-noise ratio ``alpha^2 / sigma^2``."""
        return self.noise_level(t) ** -2

    def f(self, t: float | Tensor) -> Tensor:
        """Linear drift coefficient ``d log alpha / dt``.

        Here: docs/theory.md, equation (15).
        """
        return _derivative(lambda u: torch.log(self.alpha(u)), t)

    def drift(self, x: Tensor, t: float | Tensor) -> Tensor:
        """``f(t) x``; ``t`` is a number or one a batch element."""
        f = self.f(t).to(x.dtype).to(x.device)
        return f.reshape(*f.shape, *([1] * (x.ndim - f.ndim))) * x

    def diffusion(self, t: float | Tensor) -> Tensor:
        """``g(t) = sqrt(d sigma^2/dt - 2 f sigma^2)``.

        Here: docs/theory.md, equation (15).
        """
        variance_rate = _derivative(lambda u: self.sigma(u) ** 2, t)
        return torch.sqrt(variance_rate - 2 * self.f(t) * self.sigma(t) ** 2)

    def time(self, noise_level: float | Tensor) -> Tensor:
        """The ``t`` at which ``sigma / alpha`` equals ``noise_level``, which grows with ``t``.

        Raises:
            InputError: if the level lies outside ``[noise_level(0), noise_level(1)]``.
        """
        target = as_time(noise_level)
        low, high = float(self.noise_level(0.0)), float(self.noise_level(1.0))
        if not bool(((target > low - 1e-9 * high) & (target < high * (1 + 1e-9))).all()):
            raise InputError(
                f"{self}: noise level must lie in [{low:.3g}, {high:.3g}], got "
                f"{float(target.min()):.3g} to {float(target.max()):.3g}; choose other levels or "
                "a wider SDE"
            )
        return self._invert(target).clamp(0.0, 1.0)

    def _invert(self, noise_level: Tensor) -> Tensor:
        """:meth:`time` by bisection; overridden where there is a closed form."""
        low, high = torch.zeros_like(noise_level), torch.ones_like(noise_level)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.noise_level(middle) < noise_level
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


@dataclass(frozen=True)
class VE(SDE):
    r"""Variance exploding: :math:`\alpha=1,\ \sigma=\sigma_{min}(\sigma_{max}/\sigma_{min})^t`."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise InputError(
                f"VE needs 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}"
            )

    def alpha(self, t: float | Tensor) -> Tensor:
        """One."""
        return torch.ones_like(as_time(t))

    def sigma(self, t: float | Tensor) -> Tensor:
        """Geometric between ``sigma_min`` and ``sigma_max``."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** as_time(t)

    def _invert(self, noise_level: Tensor) -> Tensor:
        return torch.log(noise_level / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class _Beta(SDE):
    r"""Linear :math:`\beta(t)`; :math:`B(t)=\beta_{min}t+\tfrac12(\beta_{max}-\beta_{min})t^2`."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_min < self.beta_max:
            raise InputError(
                f"{type(self).__name__} needs 0 < beta_min < beta_max, "
                f"got {self.beta_min} and {self.beta_max}"
            )

    def _integral(self, t: float | Tensor) -> Tensor:
        u = as_time(t)
        return self.beta_min * u + 0.5 * (self.beta_max - self.beta_min) * u**2

    def _inverse_integral(self, integral: Tensor) -> Tensor:
        """The ``t`` with ``B(t) = integral``."""
        slope = self.beta_max - self.beta_min
        # the root of slope t^2 / 2 + beta_min t = B, written without cancellation
        root = torch.sqrt(self.beta_min**2 + 2 * slope * integral)
        return 2 * integral / (self.beta_min + root)

    def alpha(self, t: float | Tensor) -> Tensor:
        """``exp(-B/2)``."""
        return torch.exp(-0.5 * self._integral(t))


@dataclass(frozen=True)
class VP(_Beta):
    r"""Variance preserving: :math:`\alpha=e^{-B/2},\ \sigma^2=1-e^{-B}`."""

    def sigma(self, t: float | Tensor) -> Tensor:
        """``sqrt(1 - exp(-B))`` by ``expm1``, exact for small ``t``."""
        return torch.sqrt(-torch.expm1(-self._integral(t)))

    def _invert(self, noise_level: Tensor) -> Tensor:
        return self._inverse_integral(torch.log1p(noise_level**2))  # level^2 = e^B - 1


@dataclass(frozen=True)
class SubVP(_Beta):
    r"""Sub-VP: :math:`\alpha=e^{-B/2},\ \sigma=1-e^{-B}`."""

    def sigma(self, t: float | Tensor) -> Tensor:
        """``1 - exp(-B)`` by ``expm1``, exact for small ``t``."""
        return -torch.expm1(-self._integral(t))

    def _invert(self, noise_level: Tensor) -> Tensor:
        return self._inverse_integral(2 * torch.asinh(noise_level / 2))  # level = 2 sinh(B/2)


def _derivative(function: Callable[[Tensor], Tensor], t: float | Tensor) -> Tensor:
    """Elementwise derivative by automatic differentiation in float64."""
    with torch.inference_mode(False), torch.enable_grad():
        u = as_time(t).detach().clone().requires_grad_(True)
        value = function(u)
        if not value.requires_grad:
            return torch.zeros_like(u)
        (grad,) = torch.autograd.grad(value.sum(), u)
    return grad.detach()
