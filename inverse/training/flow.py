r"""A real-NVP flow: a density that can be evaluated and sampled exactly.

A stack of affine couplings maps noise :math:`z \sim N(0, I)` to :math:`x`.  A coupling keeps the
masked half :math:`m \odot x` and moves the rest by functions of it:

.. math::
   x' = m \odot x + (1 - m) \odot \left(x\, e^{s(m \odot x)} + t(m \odot x)\right), \qquad
   \log\left|\det \frac{\partial x'}{\partial x}\right| = \sum_i (1 - m_i)\, s_i

so that :math:`\log q(x) = \log N(z; 0, I) - \sum \log|\det|` along the path from ``z`` to ``x``.

Source: Dinh, Sohl-Dickstein, Bengio, Density estimation using real NVP (ICLR 2017), equations 3,
6 and 9.  The logarithmic scales are bounded by a tanh, as there (section 4.1).
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from inverse.errors import GeometryError

__all__ = ["RealNVP"]


class _Coupling(nn.Module):
    """One affine coupling; the identity before training."""

    mask: Tensor

    def __init__(self, mask: Tensor, hidden: int, condition: int) -> None:
        super().__init__()
        d = len(mask)
        self.register_buffer("mask", mask)
        self.net = nn.Sequential(
            nn.Linear(d + condition, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, 2 * d),
        )
        last = cast(nn.Linear, self.net[-1])
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def scale_shift(self, kept: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """``(s, t)`` of the moved half, zero on the kept one; each ``(b, d)``."""
        given = kept if condition is None else torch.cat([kept, condition], dim=1)
        s, t = self.net(given).chunk(2, dim=1)
        moved = 1 - self.mask
        return moved * 2 * torch.tanh(s / 2), moved * t


class RealNVP(nn.Module):
    """The flow of the module's text on flattened images.

    Args:
        d: unknowns.
        layers: couplings; pairs share a random split of the unknowns in halves.
        hidden: width of their networks.
        condition: numbers that the density is conditional on, such as a noise level.
        seed: seed of the splits.
    """

    def __init__(
        self, d: int, layers: int = 6, hidden: int = 64, condition: int = 0, seed: int = 0
    ) -> None:
        super().__init__()
        self.d, self.condition = d, condition
        generator = torch.Generator().manual_seed(seed)
        self.couplings = nn.ModuleList()
        mask = torch.zeros(d)
        for k in range(layers):
            if k % 2:
                mask = 1 - mask
            else:
                mask = torch.zeros(d)
                mask[torch.randperm(d, generator=generator)[: d // 2]] = 1
            self.couplings.append(_Coupling(mask, hidden, condition))

    def decode(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise to data: ``x`` of the shape of ``z`` and ``log|det dx/dz|``, ``(b,)``.

        Args:
            z: ``(b, *shape)`` with ``d`` numbers an element.
            condition: ``(b, condition)``, ``None`` where the flow has none.

        Raises:
            GeometryError: if the numbers do not fit.
        """
        x, logdet = self._flat(z, condition), torch.zeros(len(z), dtype=z.dtype, device=z.device)
        for layer in self.couplings:
            coupling = cast(_Coupling, layer)
            s, t = coupling.scale_shift(coupling.mask * x, condition)
            x = x * s.exp() + t
            logdet = logdet + s.sum(dim=1)
        return x.reshape(z.shape), logdet

    def encode(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data to noise, the inverse of :meth:`decode`: ``z`` and ``log|det dz/dx|``, ``(b,)``."""
        z, logdet = self._flat(x, condition), torch.zeros(len(x), dtype=x.dtype, device=x.device)
        for layer in reversed(self.couplings):
            coupling = cast(_Coupling, layer)
            s, t = coupling.scale_shift(coupling.mask * z, condition)
            z = (z - t) * (-s).exp()
            logdet = logdet - s.sum(dim=1)
        return z.reshape(x.shape), logdet

    def log_prob(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """``log q(x)`` in nats, ``(b,)``."""
        z, logdet = self.encode(x, condition)
        return logdet - 0.5 * (z.flatten(1).square() + math.log(2 * math.pi)).sum(dim=1)

    def sample(
        self, count: int, generator: torch.Generator, condition: Tensor | None = None
    ) -> Tensor:
        """``(count, d)`` draws, differentiable by the flow's parameters."""
        reference = next(self.parameters())
        z = torch.randn(count, self.d, generator=generator, dtype=reference.dtype)
        return self.decode(z.to(reference.device), condition)[0]

    def _flat(self, x: Tensor, condition: Tensor | None) -> Tensor:
        flat = x.flatten(1)
        given = 0 if condition is None else condition.shape[1]
        if flat.shape[1] != self.d or given != self.condition:
            raise GeometryError(
                f"this flow takes {self.d} unknowns and {self.condition} conditions a batch "
                f"element, got {flat.shape[1]} and {given}; build it for the images at hand"
            )
        return flat
