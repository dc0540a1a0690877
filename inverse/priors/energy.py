r"""Energy priors: a scalar :math:`E(x, \sigma)` whose negative gradient is the score.

.. math::
   p(x, \sigma) = \frac{e^{-E(x, \sigma)}}{Z(\sigma)}, \qquad
   s(x, \sigma) = -\nabla_x E(x, \sigma), \qquad
   D(x, \sigma) = x - \sigma^2\,\nabla_x E(x, \sigma)

with :math:`x = x_t/\alpha` and :math:`\sigma` the noise level on it.  Such a score is conservative
by construction: its Jacobian is symmetric and its integral over a closed path is zero, which a
network that puts the score out directly only approximates.

The energy of a network reuses the one U-Net: with :math:`u = x/\sqrt{\sigma^2+\sigma_d^2}`

.. math::
   E(x, \sigma) = \tfrac12 |u|^2 - \tfrac{\sigma_d}{\sigma} \langle u, F_\theta(u) \rangle
   \quad\Rightarrow\quad
   D = c_{skip}\,x + c_{out}\,\nabla_u \langle u, F_\theta(u) \rangle,

which is EDM's denoiser with the residual :math:`F + J_F^T u` in the place of :math:`F`; for
:math:`F = 0` it is the exact score of white Gaussian images of variance :math:`\sigma_d^2`.

Source: LeCun et al., A tutorial on energy-based learning (2006); the inner-product form follows
Salimans and Ho, Should EBMs model the energy or the score? (ICLR 2021 workshop); preconditioning
of Karras et al., EDM (NeurIPS 2022), table 1.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from inverse.errors import GeometryError
from inverse.priors.denoiser import Denoiser, expand
from inverse.priors.network import UNet, edm_denoise
from inverse.sde import SDE

__all__ = ["EnergyPrior", "FunctionEnergy", "edm_energy", "energy_score"]


def energy_score(
    energy: Callable[[Tensor], Tensor], x: Tensor, *, create_graph: bool | None = None
) -> Tensor:
    r""":math:`-\nabla_x E(x)` by automatic differentiation, shape of ``x``.

    Args:
        energy: ``(b, *shape) -> (b,)``; each value depends on its own element of the batch.
        x: points ``(b, *shape)``.
        create_graph: whether the result can be differentiated again, by parameters of the energy
            or by ``x``; by default wherever gradients are enabled.  Without it the result is a
            plain tensor, under ``inference_mode`` too.

    Raises:
        GeometryError: if the energy is not one number a batch element.

    Here: docs/theory.md, equation (7).
    """
    again = torch.is_grad_enabled() if create_graph is None else create_graph
    with torch.inference_mode(False), torch.enable_grad():
        u = x if again and x.requires_grad else x.detach().clone().requires_grad_(True)
        value = energy(u)
        if value.shape != x.shape[:1]:
            raise GeometryError(
                f"an energy is one number a batch element, shape {tuple(x.shape[:1])}, got "
                f"{tuple(value.shape)}; sum over pixels"
            )
        (gradient,) = torch.autograd.grad(value.sum(), u, create_graph=again)
    return -gradient


def edm_energy(
    net: UNet,
    x: Tensor,
    sigma: Tensor,
    pixel_mm: Tensor,
    position: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""The network energy of the module's text, ``(b,)``; arguments as of ``edm_denoise``.

    Written with the direct denoiser, :math:`c_{out} F = D_\theta - c_{skip} x`:

    .. math:: E = \frac{|x|^2}{2(\sigma^2+\sigma_d^2)}
              - \frac{\langle x, D_\theta(x, \sigma) - c_{skip} x\rangle}{\sigma^2}

    Here: docs/theory.md, equation (22).
    """
    s2 = expand(sigma.to(torch.float32) ** 2, x)
    d2 = net.config.sigma_data**2
    residual = edm_denoise(net, x, sigma, pixel_mm, position, dtype) - d2 / (s2 + d2) * x
    return (x * (x / (2 * (s2 + d2)) - residual / s2)).flatten(1).sum(dim=1)


class EnergyPrior(Denoiser):
    r"""A :class:`Denoiser` by :math:`D = x - \sigma^2\nabla E`; costs one backward pass a call.

    Here: docs/theory.md, equation (1).
    """

    @abstractmethod
    def energy(self, x: Tensor, sigma: Tensor) -> Tensor:
        r""":math:`E(x, \sigma)`, shape ``(b,)``, in nats.

        Args:
            x: images with noise of level ``sigma``, ``(b, *shape)``, prior units.
            sigma: noise levels ``sigma(t)/alpha(t)``, ``(b,)``.
        """

    def log_density(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        r""":math:`\log p_t(x_t) = -E(x_t/\alpha, \sigma/\alpha)` up to a function of ``t``.

        Shape ``(b,)``.  Differences at one ``t`` are exact differences of log-density.
        """
        alpha, level = self._coefficients(x_t, t)
        return -self.energy(x_t / expand(alpha, x_t), level)

    def score(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        r""":math:`\nabla_{x_t}\log p_t = -\nabla E(x_t/\alpha)/\alpha`, shape of ``x_t``."""
        alpha, level = self._coefficients(x_t, t)
        return self._score(x_t / expand(alpha, x_t), level) / expand(alpha, x_t)

    def denoise(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        r""":math:`x - \sigma^2\nabla E(x, \sigma)` at :math:`x = x_t/\alpha`."""
        alpha, level = self._coefficients(x_t, t)
        x = x_t / expand(alpha, x_t)
        return x + expand(level**2, x) * self._score(x, level)

    def _score(self, x: Tensor, level: Tensor) -> Tensor:
        """``-grad E``; with a graph where ``x`` or a parameter will be differentiated by."""
        again = torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in self.parameters())
        )
        return energy_score(lambda u: self.energy(u, level), x, create_graph=again)

    def _coefficients(self, x_t: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """``(alpha, sigma / alpha)``, the latter ``(b,)`` and usable by autograd."""
        alpha, sigma = self.sde.marginal(t)
        with torch.inference_mode(False):  # autograd refuses tensors of inference mode
            level = (sigma / alpha).clone().to(x_t.device).expand(x_t.shape[0])
        return alpha, level


class FunctionEnergy(EnergyPrior):
    r"""An energy in closed form, for toys: the truth that learned energies are tested against.

    Args:
        function: ``(x, sigma) -> E``, shapes ``(b, *shape)``, ``(b,)`` and ``(b,)``; for a
            Gaussian of variance v, :math:`|x|^2/2(v+\sigma^2)`.  A trainable one is a module.
        sde: forward process.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], sde: SDE) -> None:
        super().__init__(sde)
        self.function = function

    def energy(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The function's value."""
        return self.function(x, sigma)
