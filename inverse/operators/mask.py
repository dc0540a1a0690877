"""Missing pixels: the operator of inpainting."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inverse.errors import GeometryError
from inverse.operators.linop import LinearOperator, Solve, _per_sample

__all__ = ["Mask"]


class Mask(LinearOperator):
    r"""Known pixels of an image: :math:`(Ax)_i = m_i x_i` with :math:`m_i \in \{0, 1\}`.

    Args:
        mask: boolean image, true where the pixel is known; shared by all slices.
        dtype: dtype of the images.

    Raises:
        GeometryError: if no pixel is known.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(mask.shape, mask.shape, dtype)
        if not bool(mask.any()):
            raise GeometryError("Mask: at least one pixel must be known, got an empty mask")
        self.register_buffer("mask", mask.to(torch.bool))

    def _forward(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, x, 0)

    def _adjoint(self, y: Tensor) -> Tensor:
        return torch.where(self.mask, y, 0)

    def normal_solve(
        self,
        b: Tensor,
        rho: float | Tensor,
        x0: Tensor | None = None,
        *,
        tol: float = 1e-6,
        max_iter: int = 50,
    ) -> Solve:
        r"""Closed form: :math:`x_i = b_i / (m_i + \rho)`; the start where that is 0/0."""
        r = _per_sample(rho, b, len(self.in_shape))
        return exact_solve(masked_divide(b, self.mask + r, x0), b, len(self.in_shape))

    @property
    def measured(self) -> int:
        """Pixels that are seen."""
        return int(self.mask.sum())

    def spec(self) -> dict[str, Any]:
        """Plain JSON values; the mask itself is stored beside them as an array."""
        return {"type": "mask", "shape": list(self.in_shape), "complex": self.dtype.is_complex}


def masked_divide(b: Tensor, weight: Tensor, start: Tensor | None) -> Tensor:
    """``b / weight``; ``start`` (default zero) where the weight vanishes and b says nothing."""
    rest = torch.zeros_like(b) if start is None else start
    return torch.where(weight > 0, b / weight.clamp_min(torch.finfo(weight.dtype).tiny), rest)


def exact_solve(x: Tensor, b: Tensor, ndim: int) -> Solve:
    """A closed-form solution as the result of a solve."""
    batch = b.shape[: b.ndim - ndim]
    residual = torch.zeros(batch, device=b.device)
    return Solve(x, 0, residual, torch.ones(batch, dtype=torch.bool, device=b.device))
