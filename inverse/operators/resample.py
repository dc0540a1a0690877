"""Interpolation from a coarse image grid to a fine one, as a linear operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inverse.errors import GeometryError
from inverse.operators.linop import LinearOperator

__all__ = ["Upsample"]


class Upsample(LinearOperator):
    """Bilinear interpolation to ``factor`` times as many rows and columns of the same field.

    Separable, ``x -> R x C^T``, with weights between pixel centres and constant continuation at
    the border, so that a constant image stays constant.

    Args:
        shape: coarse ``(rows, columns)``.
        factor: whole refinement factor.
        dtype: image dtype.
    """

    rows: Tensor
    columns: Tensor

    def __init__(
        self, shape: Sequence[int], factor: int, dtype: torch.dtype = torch.float32
    ) -> None:
        if len(shape) != 2 or factor < 1:
            raise GeometryError(
                f"Upsample takes a 2-D shape and a factor of at least 1, got {tuple(shape)} and "
                f"{factor}"
            )
        super().__init__(shape, [n * factor for n in shape], dtype)
        self.register_buffer("rows", _weights(shape[0], factor).to(dtype), persistent=False)
        self.register_buffer("columns", _weights(shape[1], factor).to(dtype), persistent=False)

    def _forward(self, x: Tensor) -> Tensor:
        return self.rows @ x @ self.columns.T

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.rows.T @ y @ self.columns


def _weights(n: int, factor: int) -> Tensor:
    """``(n * factor, n)`` linear interpolation weights between pixel centres."""
    position = ((torch.arange(n * factor) + 0.5) / factor - 0.5).clamp(0, n - 1)
    low = position.floor().long().clamp_max(max(n - 2, 0))
    weight = position - low
    matrix = torch.zeros(n * factor, n)
    index = torch.arange(n * factor)
    matrix[index, low] += 1 - weight
    matrix[index, (low + 1).clamp_max(n - 1)] += weight
    return matrix
