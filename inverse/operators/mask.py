"""Missing pixels, voxels or data: the operator of inpainting, and patterns for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inverse.errors import GeometryError, InputError
from inverse.operators.linop import LinearOperator, Solve, _per_sample

__all__ = ["Mask", "central_hole", "missing_slices", "random_pixels"]


class Mask(LinearOperator):
    r"""Known pixels of an image: :math:`(Ax)_i = m_i x_i` with :math:`m_i \in \{0, 1\}`.

    Args:
        mask: image or volume, true (or 1) where it is known, else false (or 0); an array is
            taken, too.  Shared by the whole batch.
        dtype: dtype of the images.

    Raises:
        GeometryError: if no pixel is known.
        InputError: values other than 0 and 1.
    """

    mask: Tensor

    def __init__(
        self, mask: Tensor | NDArray[np.generic], dtype: torch.dtype = torch.float32
    ) -> None:
        mask = torch.as_tensor(mask)
        super().__init__(mask.shape, mask.shape, dtype)
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise InputError(
                "Mask takes true or 1 where a pixel is known and false or 0 where not, got other "
                "values; compare with a threshold first"
            )
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
    def slicewise(self) -> bool:
        """Whether this is a volume of which whole slices are missing, and nothing else."""
        volume = self.mask.ndim == 3
        return volume and bool((self.mask == self.mask[..., :1, :1]).all())

    @property
    def measured(self) -> int:
        """Pixels that are seen."""
        return int(self.mask.sum())

    def spec(self) -> dict[str, Any]:
        """Plain JSON values; the mask itself is stored beside them as an array."""
        return {"type": "mask", "shape": list(self.in_shape), "complex": self.dtype.is_complex}


def random_pixels(shape: Sequence[int], missing: float, seed: torch.Generator) -> Tensor:
    """A mask without an exact share of its pixels, drawn at random.

    Args:
        shape: of the image or volume.
        missing: share of pixels that are not known.
        seed: generator of the draw.

    Raises:
        GeometryError: a share outside 0 to 1.
    """
    _check_share(missing, "the share of missing pixels")
    known = torch.ones(tuple(shape), dtype=torch.bool)
    order = torch.randperm(known.numel(), generator=seed)
    known.view(-1)[order[: round(missing * known.numel())]] = False
    return known


def central_hole(shape: Sequence[int], side: float) -> Tensor:
    """A mask with a rectangular hole in the middle of the last two axes.

    Args:
        shape: of the image or volume.
        side: the hole's sides relative to the image's.

    Raises:
        GeometryError: a side outside 0 to 1.
    """
    _check_share(side, "the hole's side")
    known = torch.ones(tuple(shape), dtype=torch.bool)
    h, w = shape[-2:]
    a, b = round(side * h), round(side * w)
    top, left = (h - a) // 2, (w - b) // 2
    known[..., top : top + a, left : left + b] = False
    return known


def missing_slices(shape: Sequence[int], slices: Sequence[int]) -> Tensor:
    """A mask of a volume (Z, Y, X) that lacks whole slices.

    Args:
        shape: of the volume.
        slices: numbers of the missing slices along z.

    Raises:
        GeometryError: a shape without slices, or a slice that is not there.
    """
    if len(shape) != 3 or not all(-shape[0] <= k < shape[0] for k in slices):
        raise GeometryError(
            f"missing slices need a volume (Z, Y, X) and numbers within it, got {tuple(shape)} "
            f"and {list(slices)}"
        )
    known = torch.ones(tuple(shape), dtype=torch.bool)
    known[list(slices)] = False
    return known


def _check_share(value: float, what: str) -> None:
    if not 0.0 < value < 1.0:
        raise GeometryError(f"{what} must be a share of the image between 0 and 1, got {value}")


def masked_divide(b: Tensor, weight: Tensor, start: Tensor | None) -> Tensor:
    """``b / weight``; ``start`` (default zero) where the weight vanishes and b says nothing."""
    rest = torch.zeros_like(b) if start is None else start
    return torch.where(weight > 0, b / weight.clamp_min(torch.finfo(weight.dtype).tiny), rest)


def exact_solve(x: Tensor, b: Tensor, ndim: int) -> Solve:
    """A closed-form solution as the result of a solve."""
    batch = b.shape[: b.ndim - ndim]
    residual = torch.zeros(batch, device=b.device)
    return Solve(x, 0, residual, torch.ones(batch, dtype=torch.bool, device=b.device))
