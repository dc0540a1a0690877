"""Changes of grid as linear operators: finer pixels, thicker slices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inverse.errors import GeometryError
from inverse.operators.linop import LinearOperator, Solve, _per_sample
from inverse.operators.mask import exact_solve

__all__ = ["ThickSlices", "Upsample", "between_slices"]


class Upsample(LinearOperator):
    """Bilinear interpolation to ``factor`` times as many rows and columns of the same field.

    Separable, ``x -> R x C^T``, with weights between pixel centres and constant continuation at
    the border, so that a constant image stays constant.

    Args:
        shape: coarse ``(rows, columns)``, or a volume's, whose slices stay as many.
        factor: whole refinement factor.
        dtype: image dtype.
    """

    rows: Tensor
    columns: Tensor

    def __init__(
        self, shape: Sequence[int], factor: int, dtype: torch.dtype = torch.float32
    ) -> None:
        if len(shape) not in (2, 3) or factor < 1:
            raise GeometryError(
                f"Upsample takes an image or a volume and a factor of at least 1, got "
                f"{tuple(shape)} and {factor}"
            )
        h, w = shape[-2:]
        super().__init__(shape, (*shape[:-2], h * factor, w * factor), dtype)
        self.register_buffer("rows", _weights(h, factor).to(dtype), persistent=False)
        self.register_buffer("columns", _weights(w, factor).to(dtype), persistent=False)

    def _forward(self, x: Tensor) -> Tensor:
        return self.rows @ x @ self.columns.T

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.rows.T @ y @ self.columns


class ThickSlices(LinearOperator):
    r"""Thick slices of a volume: the operator of super-resolution along z.

    Each thick slice is the mean of ``thickness`` thin ones, and the next one starts ``step``
    further on: :math:`y_j = \frac1n\sum_{i<n} x_{js+i}`.  Overlap (step below thickness) and gaps
    (above) are as the protocol has them; thin slices after the last whole thick one are not seen.

    Args:
        shape: volume (Z, Y, X).
        thickness: thin slices a thick one.
        step: thin slices from one thick slice to the next, default ``thickness``.
        dtype: dtype of the volume.

    Raises:
        GeometryError: a shape that is no volume, or no whole thick slice in it.
    """

    weights: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        thickness: int,
        step: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        step = thickness if step is None else step
        if len(shape) != 3 or thickness < 1 or step < 1 or thickness > shape[0]:
            raise GeometryError(
                f"ThickSlices needs a volume (Z, Y, X) of at least one thick slice and a step of "
                f"at least 1, got {tuple(shape)}, thickness {thickness} and step {step}"
            )
        count = (shape[0] - thickness) // step + 1
        super().__init__(shape, (count, *shape[1:]), dtype)
        self.thickness, self.step = thickness, step
        thin = torch.arange(shape[0]) - step * torch.arange(count)[:, None]
        inside = (thin >= 0) & (thin < thickness)
        self.register_buffer("weights", inside.to(dtype) / thickness, persistent=False)

    def _forward(self, x: Tensor) -> Tensor:
        return _along_z(self.weights, x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return _along_z(self.weights.T, y)

    def normal_solve(
        self,
        b: Tensor,
        rho: float | Tensor,
        x0: Tensor | None = None,
        *,
        tol: float = 1e-6,
        max_iter: int = 50,
    ) -> Solve:
        r"""Closed form along z: :math:`x = V (\Lambda + \rho)^{-1} V^H b`."""
        r = _per_sample(rho, b, 3)
        if not bool((r > 0).all()):  # singular without a ridge
            return super().normal_solve(b, rho, x0, tol=tol, max_iter=max_iter)
        gram = self.weights.T @ self.weights
        values, vectors = torch.linalg.eigh(gram)
        values = values.real.clamp_min(0.0)[:, None, None]
        x = _along_z(vectors, _along_z(vectors.mH, b) / (values + r))
        return exact_solve(x, b, 3)

    def spec(self) -> dict[str, Any]:
        """Plain JSON values that rebuild this operator."""
        return {
            "type": "thick slices",
            "shape": list(self.in_shape),
            "thickness": self.thickness,
            "step": self.step,
            "complex": self.dtype.is_complex,
        }

    @property
    def centres(self) -> Tensor:
        """Position of each thick slice's middle, in thin slices, ``(J,)``."""
        return torch.arange(self.out_shape[0]) * float(self.step) + (self.thickness - 1) / 2

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> ThickSlices:
        """The inverse of :meth:`spec`."""
        dtype = torch.complex64 if spec["complex"] else torch.float32
        return cls(
            [int(n) for n in spec["shape"]], int(spec["thickness"]), int(spec["step"]), dtype
        )

    def extra_repr(self) -> str:
        """Shapes, thickness and step, for ``repr``."""
        return f"{super().extra_repr()}, thickness {self.thickness}, step {self.step}"


def between_slices(known: Tensor, positions: Tensor, count: int) -> Tensor:
    """Slices 0, 1, ... interpolated linearly along z between those that are known.

    Args:
        known: ``(*b, J, Y, X)``, real or complex.
        positions: of the known slices, ascending, in slices, ``(J,)``.
        count: Z, the number of slices wanted; those beyond the ends repeat the nearest one.

    Returns:
        ``(*b, Z, Y, X)``.
    """
    at = positions.to(known.device, torch.float32)
    z = torch.arange(count, dtype=torch.float32, device=known.device)
    high = torch.searchsorted(at, z).clamp(1, max(len(at) - 1, 1)).clamp_max(len(at) - 1)
    low = (high - 1).clamp_min(0)
    share = ((z - at[low]) / (at[high] - at[low]).clamp_min(1e-6)).clamp(0.0, 1.0)
    return torch.lerp(
        known[..., low, :, :], known[..., high, :, :], share[:, None, None].to(known.dtype)
    )


def _along_z(matrix: Tensor, x: Tensor) -> Tensor:
    """``matrix`` times the third axis from the end."""
    return torch.einsum("jz,...zyx->...jyx", matrix, x)


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
