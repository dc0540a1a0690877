"""What all objectives share: the batch, the model, the interface, and small algebra."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from inverse.errors import InputError
from inverse.priors.denoiser import expand
from inverse.training.objectives.levels import lognormal_levels

__all__ = [
    "Field",
    "Model",
    "Objective",
    "Perturbed",
    "Setting",
    "check_levels",
    "check_samples",
    "dot",
    "follow",
    "rms",
    "vjp",
]

Field: TypeAlias = Callable[[Tensor], Tensor]
"""A function of points alone: a score ``(n, *shape) -> (n, *shape)`` or an energy ``-> (n,)``."""


@dataclass(frozen=True)
class Perturbed:
    """A batch of images in prior units and the noise on them.

    Attributes:
        x0: clean images ``(b, h, w)``.
        sigma: noise levels ``(b,)``.
        z: standard normal noise ``(b, h, w)``.
        pixel_mm: pixel sizes ``(b,)``.
    """

    x0: Tensor
    sigma: Tensor
    z: Tensor
    pixel_mm: Tensor

    @property
    def x(self) -> Tensor:
        """``x0 + sigma z``."""
        return self.x0 + expand(self.sigma, self.x0) * self.z


@dataclass(frozen=True)
class Model:
    """The network under training, at the positions of the batch.

    Attributes:
        denoise: ``(x, sigma, pixel_mm) -> D``, ``(b, h, w)``.
        energy: ``(x, sigma, pixel_mm) -> E``, ``(b,)``; of an energy network.
        sigma_data: standard deviation of the images.
    """

    denoise: Callable[[Tensor, Tensor, Tensor], Tensor]
    energy: Callable[[Tensor, Tensor, Tensor], Tensor]
    sigma_data: float

    def denoiser(self, batch: Perturbed) -> Callable[[Tensor, Tensor], Tensor]:
        """``(x, sigma) -> D`` at the pixel sizes of the batch."""
        return lambda x, sigma: self.denoise(x, sigma, batch.pixel_mm)

    def score(self, batch: Perturbed) -> Field:
        """``x -> (D - x) / sigma^2`` at the levels of the batch."""
        s2 = expand(batch.sigma**2, batch.x0)
        return lambda x: (self.denoise(x, batch.sigma, batch.pixel_mm) - x) / s2


@dataclass(frozen=True)
class Setting:
    """What the objectives of a run are told.

    Attributes:
        sigma_range: noise levels; equal ends for a single one.
        p_mean: mean of ln sigma.
        p_std: standard deviation of ln sigma.
        levels: length of NCSN's ladder.
        langevin_steps: steps of Langevin for negatives.
        langevin_step: their size relative to sigma^2.
        chains: number of persistent chains.
        sigma_data: standard deviation of the images.
    """

    sigma_range: tuple[float, float]
    p_mean: float
    p_std: float
    levels: int
    langevin_steps: int
    langevin_step: float
    chains: int
    sigma_data: float


class Objective(nn.Module, ABC):
    """One objective in a run; its buffers and parameters are part of the run's state.

    Args:
        setting: see :class:`Setting`.
        start: clean training images ``(m, h, w)`` in prior units.
        pixel_mm: their pixel sizes ``(m,)``.
        generator: randomness of the start.

    Attributes:
        together: whether the losses draw noise for, or keep state of, a whole batch, which one
            process must then hold.
        second_order: whether they take derivatives of the network's derivatives.
    """

    together: ClassVar[bool] = True
    second_order: ClassVar[bool] = True

    def __init__(
        self, setting: Setting, start: Tensor, pixel_mm: Tensor, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.setting = setting

    def levels(self, count: int, generator: torch.Generator) -> Tensor:
        """Noise levels of a batch ``(count,)``; lognormal unless overridden."""
        s = self.setting
        return lognormal_levels(count, s.p_mean, s.p_std, s.sigma_range, generator)

    @abstractmethod
    def losses(self, model: Model, batch: Perturbed, generator: torch.Generator) -> Tensor:
        """Losses of a batch ``(b,)``; advances the state."""


# --- checks and small algebra ------------------------------------------------------------------


def check_samples(x: Tensor) -> None:
    """Refuse what is no batch of finite real samples."""
    if x.ndim < 2 or not x.is_floating_point() or not len(x):
        raise InputError(
            f"samples must be a real floating-point tensor (n, *shape) with n > 0, got {x.dtype} "
            f"of shape {tuple(x.shape)}"
        )
    if not bool(torch.isfinite(x).all()):
        raise InputError("samples hold NaN or infinite values; remove or repair those images")


def check_levels(sigma: Tensor, x: Tensor) -> None:
    """Refuse levels that are not one positive number a sample."""
    if sigma.shape != x.shape[:1]:
        raise InputError(
            f"noise levels must be one a sample, shape {tuple(x.shape[:1])}, got "
            f"{tuple(sigma.shape)}"
        )
    if not bool(((sigma > 0) & torch.isfinite(sigma)).all()):
        raise InputError(
            f"noise levels must be positive and finite, got {float(sigma.min()):g} to "
            f"{float(sigma.max()):g}; for clean samples use score matching without noise"
        )


def follow(function: Field, x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` as autograd's input, and the function's value there."""
    with torch.enable_grad():
        u = x if x.requires_grad else x.detach().clone().requires_grad_(True)
        value = function(u)
    if value.shape != x.shape or not value.requires_grad:
        raise InputError(
            f"a score or denoiser must be a differentiable function onto the samples' shape "
            f"{tuple(x.shape)}, got {tuple(value.shape)}; compute it without detach or no_grad"
        )
    return u, value


def vjp(output: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """``v^T d output / du``; differentiable where gradients are enabled."""
    again = torch.is_grad_enabled()
    return torch.autograd.grad(output, u, v, create_graph=again, retain_graph=True)[0]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products a sample, ``(n,)``."""
    return (a * b).flatten(1).sum(dim=1)


def rms(x: Tensor) -> Tensor:
    """Root mean square a sample, ``(n,)``."""
    return x.flatten(1).square().mean(dim=1).sqrt()
