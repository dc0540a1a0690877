r"""A prior is a denoiser: :math:`D(x_t, t) = E[x_0 \mid x_t]`.

Everything else follows from it by Tweedie's formula with
:math:`x_t = \alpha x_0 + \sigma z`:

.. math::
   \nabla_{x_t} \log p_t(x_t) = \frac{\alpha D(x_t, t) - x_t}{\sigma^2}, \qquad
   \mathrm{Cov}[x_0 \mid x_t] = \frac{\sigma^2}{\alpha}\,\frac{\partial D}{\partial x_t}

Source: Efron, Tweedie's formula and selection bias (JASA 2011); Song et al. (ICLR 2021).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from inverse.errors import GeometryError, UnsupportedError
from inverse.sde import SDE, as_time

__all__ = ["CountedDenoiser", "Denoiser", "expand"]


def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """A float64 coefficient (0-d, or one a batch element) shaped and cast to multiply ``x``."""
    c = coefficient.to(device=x.device, dtype=x.dtype)
    return c.reshape(*c.shape, *([1] * (x.ndim - c.ndim))) if c.ndim else c


class Denoiser(nn.Module, ABC):
    """The posterior mean of a clean image given a noisy one, in prior units.

    Attributes:
        sde: the forward process whose ``x_t`` it denoises.
        offset: physical value of prior value 0.
        scale: physical units per prior unit: ``physical = offset + scale * prior``.
        unit: unit of ``offset`` and ``scale``: ``"physical"``, the measurement's own; ``"HU"``;
            or ``"relative"``, 1 being the intensity scale estimated from MR data.
    """

    sde: SDE
    unit: Literal["physical", "HU", "relative"] = "physical"
    offset: float = 0.0
    scale: float = 1.0

    def __init__(self, sde: SDE) -> None:
        super().__init__()
        self.sde = sde

    @abstractmethod
    def denoise(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """``E[x_0 | x_t]``.

        Args:
            x_t: noisy images in prior units, ``(b, *shape)``.
            t: time, a number or one a batch element (shape ``(b,)``).

        Returns:
            The denoised images, ``(b, *shape)``.
        """

    def forward(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """Same as :meth:`denoise`."""
        return self.denoise(x_t, t)

    def error(self, noise_level: float | Tensor) -> Tensor:
        r"""Expected RMS error a pixel of ``D`` at a noise level, prior units, float64.

        The default is that of a white prior of unit variance,
        :math:`\tilde\sigma/\sqrt{1+\tilde\sigma^2}` (the r of PiGDM, Song et al., ICLR 2023);
        priors that know better override it.
        """
        level = as_time(noise_level)
        return level / torch.sqrt(1 + level**2)

    def score(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """``grad log p_t(x_t) = (alpha D - x_t) / sigma^2``, shape of ``x_t``.

        Here: docs/theory.md, equation (11).
        """
        alpha, sigma = self.sde.marginal(t)
        mean = self.denoise(x_t, t)
        return (expand(alpha, x_t) * mean - x_t) / expand(sigma, x_t) ** 2

    def linearise(
        self, x_t: Tensor, t: float | Tensor
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        r"""``D(x_t)`` and the product ``v -> (dD/dx_t)^T v``: one network call, also in inference.

        Args:
            x_t: noisy images ``(b, *shape)``.
            t: time.

        Raises:
            UnsupportedError: for a denoiser that cannot be differentiated.
        """
        with torch.inference_mode(False), torch.enable_grad():
            x = x_t.detach().clone().requires_grad_(True)
            x0 = self.denoise(x, t)
        if not x0.requires_grad:
            raise UnsupportedError(
                "the prior cannot be differentiated, which this method needs; choose a method "
                "without a gradient ('recon methods')"
            )

        def pull_back(v: Tensor) -> Tensor:
            with torch.inference_mode(False):
                (jv,) = torch.autograd.grad(x0, x, v.clone(), retain_graph=True)
            return jv

        return x0.detach(), pull_back

    def covariance(self, x_t: Tensor, t: float | Tensor, v: Tensor) -> Tensor:
        """``Cov[x_0 | x_t] v`` by one vector-Jacobian product (the Jacobian is symmetric).

        Args:
            x_t: noisy images ``(b, *shape)``.
            t: time.
            v: vectors ``(b, *shape)``.

        Here: docs/theory.md, equation (11).
        """
        alpha, sigma = self.sde.marginal(t)
        return expand(sigma**2 / alpha, x_t) * self.linearise(x_t, t)[1](v)


class CountedDenoiser(Denoiser):
    """The same denoiser, counting the images that it is given in ``images``.

    Args:
        inner: the denoiser.
    """

    def __init__(self, inner: Denoiser) -> None:
        super().__init__(inner.sde)
        self.inner = inner
        self.images = 0

    def denoise(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """That of ``inner``.

        Raises:
            GeometryError: it returns images of another shape than it is given.
        """
        self.images += len(x_t)
        x0 = self.inner.denoise(x_t, t)
        if x0.shape != x_t.shape:
            raise GeometryError(
                f"{type(self.inner).__name__} must return images of the shape that it is given, "
                f"{tuple(x_t.shape)}, got {tuple(x0.shape)}"
            )
        return x0

    def error(self, noise_level: float | Tensor) -> Tensor:
        """That of ``inner``."""
        return self.inner.error(noise_level)
