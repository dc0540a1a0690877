"""Contrastive divergence of energies: negatives from Langevin chains, fresh or persistent."""

from __future__ import annotations

import torch
from torch import Tensor

from inverse.errors import InputError, NumericalError
from inverse.priors.denoiser import expand
from inverse.priors.energy import energy_score
from inverse.training.objectives.base import (
    Field,
    Model,
    Objective,
    Perturbed,
    Setting,
    check_samples,
    rms,
)

__all__ = [
    "Contrastive",
    "Persistent",
    "contrastive_divergence",
    "langevin_chain",
    "persistent_contrastive_divergence",
]


def langevin_chain(
    score: Field, x: Tensor, epsilon: float | Tensor, noise: Tensor, *, bound: float = 1e3
) -> Tensor:
    r"""Unadjusted Langevin: :math:`x \leftarrow x + \epsilon\, s(x) + \sqrt{2\epsilon}\, z`.

    Its stationary law differs from the target by :math:`O(\epsilon)`: variance
    :math:`1/(1-\epsilon/2)` on N(0, 1).

    Source: Roberts and Tweedie, Exponential convergence of Langevin distributions and their
    discrete approximations (Bernoulli 1996), section 1.4.1.

    Args:
        score: ``(n, *shape) -> (n, *shape)``.
        x: starts ``(n, *shape)``.
        epsilon: step size, a number or ``(n,)``.
        noise: standard normal ``(k, n, *shape)``, one a step.
        bound: largest root mean square of a chain relative to one plus that of ``x``.

    Returns:
        The last states ``(n, *shape)``, detached.

    Raises:
        InputError: for a step size that is not positive or noise of another shape.
        NumericalError: if a chain diverges.

    Here: docs/theory.md, equation (3).
    """
    check_samples(x)
    step = torch.as_tensor(epsilon, dtype=x.dtype, device=x.device)
    if not bool((step > 0).all()) or noise.shape[1:] != x.shape:
        raise InputError(
            f"Langevin needs positive step sizes and noise (steps, *{tuple(x.shape)}), got "
            f"{float(step.min()):g} and {tuple(noise.shape)}"
        )
    step = expand(step, x)
    limit = bound * (1 + rms(x))
    with torch.no_grad():
        for z in noise:
            x = x + step * score(x) + torch.sqrt(2 * step) * z
            size = rms(x)
            if not bool((size <= limit).all()):  # false for NaN too
                raise NumericalError(
                    f"Langevin diverged: a chain's root mean square is {float(size.max()):.3g}, "
                    f"expected at most {float(limit.min()):.3g}; lower the step size "
                    f"(largest {float(step.max()):.3g})"
                )
    return x.detach()


def contrastive_divergence(
    energy: Field, x: Tensor, epsilon: float | Tensor, noise: Tensor
) -> Tensor:
    r"""CD-k: the energy of samples against that of ``k`` Langevin steps from them.

    .. math:: L = E_{p}[E_\theta(x)] - E_{p_k}[E_\theta(\mathrm{sg}(x_k))], \qquad x_0 = x \sim p

    Its gradient is :math:`E_p \nabla_\theta E - E_{p_k}\nabla_\theta E`; its zero is where ``k``
    steps leave the data's moments alone.  For :math:`E = \theta x^2/2`, one step and variance v
    that is :math:`\theta = (1 - \sqrt{1 - 2\epsilon/v})/\epsilon`, a bias of the step size.

    Source: Hinton, Training products of experts by minimizing contrastive divergence (Neural
    Computation 2002), equation 5 without its small third term; Langevin as in Du and Mordatch
    (NeurIPS 2019), equation 1.

    Args:
        energy: ``(n, *shape) -> (n,)``.
        x: samples ``(n, *shape)``.
        epsilon: step size, a number or ``(n,)``.
        noise: standard normal ``(k, n, *shape)``.

    Returns:
        Losses ``(n,)``; only their gradient means something.

    Raises:
        InputError, NumericalError: see :func:`langevin_chain`.

    Here: docs/theory.md, equation (4).
    """
    return persistent_contrastive_divergence(energy, x, x, epsilon, noise)[0]


def persistent_contrastive_divergence(
    energy: Field,
    x: Tensor,
    chains: Tensor,
    epsilon: float | Tensor,
    noise: Tensor,
    *,
    chain_energy: Field | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Persistent CD: negatives continue the chains of earlier steps.

    .. math:: L = E_{p}[E_\theta(x)] - E_\theta(\mathrm{sg}(x^-)), \qquad
              x^- = \text{k Langevin steps from } \texttt{chains}

    Chains that keep up with the parameters follow the stationary law of Langevin, so that the
    fixed point is that law's: for :math:`E = \theta x^2/2` its variance is
    :math:`1/(\theta(1 - \epsilon\theta/2))`.

    Source: Tieleman, Training restricted Boltzmann machines using approximations to the
    likelihood gradient (ICML 2008), section 3.

    Args:
        energy: ``(n, *shape) -> (n,)``.
        x: samples ``(n, *shape)``.
        chains: states of the chains, of the shape of ``x``.
        epsilon: step size, a number or ``(n,)``.
        noise: standard normal ``(k, n, *shape)``.
        chain_energy: the energy under the chains' own conditions, where they differ.

    Returns:
        Losses ``(n,)`` and the chains' new states.

    Raises:
        InputError: see :func:`langevin_chain`, or chains of another shape than ``x``.
        NumericalError: see :func:`langevin_chain`.
    """
    check_samples(x)
    if chains.shape != x.shape:
        raise InputError(
            f"persistent chains must have the samples' shape {tuple(x.shape)}, got "
            f"{tuple(chains.shape)}"
        )
    own = energy if chain_energy is None else chain_energy
    negatives = langevin_chain(lambda u: energy_score(own, u), chains, epsilon, noise)
    return energy(x) - own(negatives), negatives


# --- in a run ---------------------------------------------------------------------------------


class Contrastive(Objective):
    """Negatives start from the batch."""

    def noise(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Noise of all Langevin steps."""
        steps = self.setting.langevin_steps
        return torch.randn((steps, *x.shape), generator=generator).to(x)

    def losses(self, model: Model, batch: Perturbed, generator: torch.Generator) -> Tensor:
        """By :func:`contrastive_divergence`."""
        return contrastive_divergence(
            lambda u: model.energy(u, batch.sigma, batch.pixel_mm),
            batch.x,
            self.setting.langevin_step * batch.sigma**2,
            self.noise(batch.x, generator),
        )


class Persistent(Contrastive):
    """Each chain keeps its noise level and its pixel size; batches take chains in turn."""

    state: Tensor
    level: Tensor
    pixel: Tensor
    turn: Tensor

    def __init__(
        self, setting: Setting, start: Tensor, pixel_mm: Tensor, generator: torch.Generator
    ) -> None:
        super().__init__(setting, start, pixel_mm, generator)
        chosen = torch.arange(setting.chains) % len(start)
        level = super().levels(setting.chains, generator)
        z = torch.randn(start[chosen].shape, generator=generator)
        self.register_buffer("state", start[chosen] + expand(level, z) * z)
        self.register_buffer("level", level)
        self.register_buffer("pixel", pixel_mm[chosen])
        self.register_buffer("turn", torch.zeros((), dtype=torch.long))

    def _index(self, count: int) -> Tensor:
        if count > len(self.state):
            raise InputError(
                f"persistent CD needs a chain for every image of a batch, {count}, got "
                f"{len(self.state)}; raise chains or lower batch"
            )
        return (int(self.turn) + torch.arange(count)) % len(self.state)

    def levels(self, count: int, generator: torch.Generator) -> Tensor:
        """Those of the chains whose turn it is."""
        return self.level.cpu()[self._index(count)]

    def losses(self, model: Model, batch: Perturbed, generator: torch.Generator) -> Tensor:
        """By :func:`persistent_contrastive_divergence`."""
        index = self._index(len(batch.x0)).to(self.state.device)
        level, pixel = self.level[index], self.pixel[index]
        loss, negatives = persistent_contrastive_divergence(
            lambda u: model.energy(u, batch.sigma, batch.pixel_mm),
            batch.x,
            self.state[index],
            self.setting.langevin_step * level**2,
            self.noise(batch.x, generator),
            chain_energy=lambda u: model.energy(u, level, pixel),
        )
        self.state[index] = negatives
        self.turn.copy_((self.turn + len(index)) % len(self.state))
        return loss
