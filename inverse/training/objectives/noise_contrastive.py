"""Noise-contrastive estimation of energies, against a Gaussian or against a flow that learns."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inverse.errors import InputError
from inverse.priors.denoiser import expand
from inverse.training.flow import RealNVP
from inverse.training.objectives.base import (
    Field,
    Model,
    Objective,
    Perturbed,
    Setting,
    check_samples,
)

__all__ = [
    "WHOLE_LIMIT",
    "AgainstNoise",
    "FlowContrastive",
    "NoiseContrastive",
    "flow_contrastive_estimation",
    "noise_contrastive_estimation",
]

WHOLE_LIMIT = 4096
"""Most pixels for objectives with a dense noise density (NCE's Gaussian, FCE's flow)."""


def noise_contrastive_estimation(
    log_model: Field, log_noise: Field, x: Tensor, y: Tensor
) -> Tensor:
    r"""Noise-contrastive estimation: tell samples from noise by a density with a free constant.

    .. math:: L = -\log h(x) - \log(1 - h(y)), \qquad
              h(u) = \frac{p_\theta(u)}{p_\theta(u) + q(u)}, \quad
              \log p_\theta = -E_\theta - c

    with as many noise samples :math:`y \sim q` as samples; :math:`c` is learned and converges to
    the log-normaliser.

    Source: Gutmann and Hyvarinen, Noise-contrastive estimation (AISTATS 2010), equations 3 to 5.

    Args:
        log_model: ``-E - c``, ``(n, *shape) -> (n,)``.
        log_noise: ``log q``, normalised.
        x: samples ``(n, *shape)``.
        y: noise samples of the shape of ``x``.

    Returns:
        Losses ``(n,)``; :math:`2\ln 2` where model and noise are the same.

    Raises:
        InputError: for samples that are not finite, or of another number than the noise.

    Here: docs/theory.md, equation (5).
    """
    check_samples(x)
    check_samples(y.detach())
    if y.shape != x.shape:
        raise InputError(
            f"NCE takes as many noise samples as samples, {tuple(x.shape)}, got {tuple(y.shape)}"
        )
    return F.softplus(log_noise(x) - log_model(x)) + F.softplus(log_model(y) - log_noise(y))


def flow_contrastive_estimation(log_model: Field, log_flow: Field, x: Tensor, y: Tensor) -> Tensor:
    r"""Flow-contrastive estimation: NCE whose noise is a flow that learns to be hard.

    .. math:: \min_\phi \max_\theta V, \qquad
              V = E_p \log\frac{p_\theta}{p_\theta + q_\phi}
                + E_{q_\phi} \log\frac{q_\phi}{p_\theta + q_\phi}

    The loss is :math:`-V`.  Gradients that reach the flow, by its samples and by its density, are
    reversed, so that one descent step raises V in :math:`\theta` and lowers it in :math:`\phi`.
    At the optimum all densities agree and :math:`V = -2\ln 2`.

    Source: Gao et al., Flow contrastive estimation of energy-based models (CVPR 2020), section
    3.3, its value function of both models.

    Args:
        log_model: ``-E - c``, ``(n, *shape) -> (n,)``, without parameters of the flow.
        log_flow: ``log q_phi``, for instance :meth:`inverse.training.flow.RealNVP.log_prob`.
        x: samples ``(n, *shape)``.
        y: samples of the flow, of the shape of ``x``, differentiable by its parameters.

    Returns:
        Losses ``(n,)``.

    Raises:
        InputError: see :func:`noise_contrastive_estimation`.

    Here: docs/theory.md, equation (6).
    """
    # y enters the model reversed and the flow's density plainly, whose value is then reversed
    sampled = _Reverse.apply(y)

    def log_noise(u: Tensor) -> Tensor:
        return _Reverse.apply(log_flow(y if u is sampled else u))

    return noise_contrastive_estimation(log_model, log_noise, x, sampled)


class _Reverse(torch.autograd.Function):
    """The identity, whose derivative is minus one (Ganin and Lempitsky, ICML 2015)."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        """``x``."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        """Minus the gradient."""
        return -gradients[0]


# --- in a run ---------------------------------------------------------------------------------


class AgainstNoise(Objective):
    r"""What NCE and FCE share: whole images, and a log-normaliser by level.

    .. math:: c(\sigma) = \tfrac d2 \ln 2\pi(\sigma^2+\sigma_d^2)
              + c_0 + c_1\tau + c_2\tau^2, \qquad \tau = \tfrac14\ln\sigma,

    exact for the untrained network with :math:`c_i = 0`.
    """

    def __init__(
        self, setting: Setting, start: Tensor, pixel_mm: Tensor, generator: torch.Generator
    ) -> None:
        super().__init__(setting, start, pixel_mm, generator)
        self.d = start[0].numel()
        self.c = nn.Parameter(torch.zeros(3))

    def total(self, sigma: Tensor) -> Tensor:
        """Standard deviation of perturbed images, ``(b,)``."""
        return torch.sqrt(sigma**2 + self.setting.sigma_data**2)

    def log_model(self, model: Model, batch: Perturbed) -> Field:
        """``-E - c``."""
        tau = torch.log(batch.sigma) / 4
        powers = torch.stack([torch.ones_like(tau), tau, tau**2], dim=1)
        c = self.d * torch.log(math.sqrt(2 * math.pi) * self.total(batch.sigma)) + powers @ self.c
        return lambda u: -model.energy(u, batch.sigma, batch.pixel_mm) - c


class NoiseContrastive(AgainstNoise):
    """The noise is the Gaussian with mean and covariance of the perturbed training images."""

    mean: Tensor
    eigenvalues: Tensor
    basis: Tensor

    def __init__(
        self, setting: Setting, start: Tensor, pixel_mm: Tensor, generator: torch.Generator
    ) -> None:
        super().__init__(setting, start, pixel_mm, generator)
        flat = start.flatten(1).double()
        mean = flat.mean(dim=0)
        eigenvalues, basis = torch.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))
        self.register_buffer("mean", mean.float())
        self.register_buffer("eigenvalues", eigenvalues.clamp(min=0).float())
        self.register_buffer("basis", basis.float())

    def losses(self, model: Model, batch: Perturbed, generator: torch.Generator) -> Tensor:
        """By :func:`noise_contrastive_estimation`."""
        variance = self.eigenvalues + batch.sigma[:, None] ** 2
        z = torch.randn(len(batch.x0), self.d, generator=generator).to(batch.x0)
        y = self.mean + (variance.sqrt() * z) @ self.basis.T

        def log_noise(u: Tensor) -> Tensor:
            w = (u.flatten(1) - self.mean) @ self.basis
            return -0.5 * (w**2 / variance + torch.log(2 * math.pi * variance)).sum(dim=1)

        return noise_contrastive_estimation(
            self.log_model(model, batch), log_noise, batch.x, y.reshape(batch.x0.shape)
        )


class FlowContrastive(AgainstNoise):
    """The noise is a flow of images scaled to unit variance, conditional on the level."""

    def __init__(
        self, setting: Setting, start: Tensor, pixel_mm: Tensor, generator: torch.Generator
    ) -> None:
        super().__init__(setting, start, pixel_mm, generator)
        self.flow = RealNVP(self.d, layers=6, hidden=128, condition=1)

    def losses(self, model: Model, batch: Perturbed, generator: torch.Generator) -> Tensor:
        """By :func:`flow_contrastive_estimation`."""
        tau = torch.log(batch.sigma)[:, None] / 4
        total = self.total(batch.sigma)
        y = expand(total, batch.x0) * self.flow.sample(len(tau), generator, tau).reshape(
            batch.x0.shape
        )

        def log_flow(u: Tensor) -> Tensor:
            inner = self.flow.log_prob(u / expand(total, u), tau)
            return inner - self.d * torch.log(total)

        return flow_contrastive_estimation(self.log_model(model, batch), log_flow, batch.x, y)
