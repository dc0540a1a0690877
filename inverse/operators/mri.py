r"""Single-coil Cartesian MRI: the centred orthonormal Fourier transform and sampling masks.

.. math:: y = M F x, \qquad
    (Fx)_k = \frac{1}{\sqrt n}\sum_j x_j\, e^{-2\pi i\,(j - c)(k - c)/n},
    \quad c = \lfloor n/2\rfloor

Images and k-space are ``complex64`` with the zero frequency at index ``c``.  Phase encoding runs
along columns, so line masks keep whole columns of k-space.
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from inverse.errors import GeometryError, UnsupportedError
from inverse.operators.linop import LinearOperator, Solve, _per_sample
from inverse.operators.mask import exact_solve, masked_divide

__all__ = ["CartesianMRI", "Fourier", "MaskKind", "cartesian_mask", "centred_fft", "centred_ifft"]

MaskKind = Literal["uniform1d", "random1d", "gaussian1d", "gaussian2d"]


def centred_fft(x: Tensor) -> Tensor:
    """Centred orthonormal FFT over the last two dimensions."""
    dims = (-2, -1)
    k = torch.fft.fft2(torch.fft.ifftshift(x, dim=dims), dim=dims, norm="ortho")
    return cast(Tensor, torch.fft.fftshift(k, dim=dims))


def centred_ifft(k: Tensor) -> Tensor:
    """The inverse and adjoint of :func:`centred_fft`."""
    dims = (-2, -1)
    x = torch.fft.ifft2(torch.fft.ifftshift(k, dim=dims), dim=dims, norm="ortho")
    return cast(Tensor, torch.fft.fftshift(x, dim=dims))


class Fourier(LinearOperator):
    """The centred orthonormal Fourier transform of an image (H, W); unitary."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__(shape, shape, torch.complex64)

    def _forward(self, x: Tensor) -> Tensor:
        return centred_fft(x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return centred_ifft(y)

    def normal_solve(
        self,
        b: Tensor,
        rho: float | Tensor,
        x0: Tensor | None = None,
        *,
        tol: float = 1e-6,
        max_iter: int = 50,
    ) -> Solve:
        r"""Closed form, since :math:`F^H F = I`: :math:`x = b / (1 + \rho)`."""
        return exact_solve(b / (1 + _per_sample(rho, b, 2)), b, 2)


class CartesianMRI(LinearOperator):
    """Measured part of k-space, ``y = M F x``; zeros where nothing was measured.

    Args:
        mask: boolean k-space mask (H, W) with the zero frequency at (H // 2, W // 2).

    Raises:
        GeometryError: a mask that is not two-dimensional or keeps nothing.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        if mask.ndim != 2 or not bool(mask.any()):
            raise GeometryError(
                f"CartesianMRI: the k-space mask must be (H, W) and keep at least one sample, got "
                f"shape {tuple(mask.shape)} with {int(mask.sum())} samples"
            )
        super().__init__(mask.shape, mask.shape, torch.complex64)
        self.register_buffer("mask", mask.to(torch.bool))

    def _forward(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, centred_fft(x), 0)

    def _adjoint(self, y: Tensor) -> Tensor:
        return centred_ifft(torch.where(self.mask, y, 0))

    def normal_solve(
        self,
        b: Tensor,
        rho: float | Tensor,
        x0: Tensor | None = None,
        *,
        tol: float = 1e-6,
        max_iter: int = 50,
    ) -> Solve:
        r"""Closed form: :math:`x = F^H (Fb)_k / (m_k + \rho)`; the start's where that is 0/0."""
        weight = self.mask + _per_sample(rho, b, 2)
        start = None if x0 is None else centred_fft(x0)
        return exact_solve(centred_ifft(masked_divide(centred_fft(b), weight, start)), b, 2)

    @property
    def measured(self) -> int:
        """k-space samples that are acquired."""
        return int(self.mask.sum())

    @property
    def acceleration(self) -> float:
        """Samples of the full grid over measured samples."""
        return self.mask.numel() / int(self.mask.sum())

    def spec(self) -> dict[str, Any]:
        """Plain JSON values; the mask itself is stored beside them as an array."""
        return {"type": "mri", "shape": list(self.in_shape)}

    def extra_repr(self) -> str:
        """Shape and acceleration, for ``repr``."""
        h, w = self.in_shape
        return f"{h} x {w}, {self.acceleration:.3g}x"


def cartesian_mask(
    shape: tuple[int, int],
    acceleration: float,
    centre_fraction: float = 0.08,
    kind: MaskKind = "uniform1d",
    seed: int = 0,
) -> Tensor:
    r"""A k-space sampling mask with a fully sampled centre.

    The number of samples (columns, or points for 2-D) is ``round(total / acceleration)``, the
    centre included.

    Args:
        shape: k-space grid (H, W).
        acceleration: grid size over measured samples, at least 1.
        centre_fraction: share of columns (of each axis for 2-D) around the zero frequency that
            are always measured.
        kind: ``"uniform1d"`` equidistant columns outside the centre with a random offset,
            ``"random1d"`` columns drawn uniformly, ``"gaussian1d"`` columns drawn with a normal
            density of std n/6, ``"gaussian2d"`` points drawn so in both axes.
        seed: seed of the offset or draw.

    Returns:
        Boolean ``(H, W)``, zero frequency at (H // 2, W // 2).

    Raises:
        GeometryError: an acceleration below 1, or a centre that alone exceeds the samples.
        UnsupportedError: another ``kind``.
    """
    h, w = shape
    if not (math.isfinite(acceleration) and acceleration >= 1.0):
        raise GeometryError(f"acceleration must be at least 1, got {acceleration}")
    if not 0.0 <= centre_fraction <= 1.0:
        raise GeometryError(f"centre_fraction must be within 0 and 1, got {centre_fraction}")
    if kind not in ("uniform1d", "random1d", "gaussian1d", "gaussian2d"):
        raise UnsupportedError(
            f"mask kind {kind!r} is not served; expected uniform1d, random1d, gaussian1d or "
            f"gaussian2d"
        )
    rng = np.random.default_rng(seed)
    two_d = kind == "gaussian2d"
    density = np.ones(w)
    if kind.startswith("gaussian"):
        density = _normal(w)
    centre = _centre(w, centre_fraction)
    if two_d:
        density = np.outer(_normal(h), density)
        centre = np.outer(_centre(h, centre_fraction), centre)
    keep = centre.ravel().copy()
    total = max(1, round(keep.size / acceleration))
    missing = total - int(keep.sum())
    if missing < 0:
        raise GeometryError(
            f"the fully sampled centre has {int(keep.sum())} samples, more than the {total} of "
            f"acceleration {acceleration:g}; lower centre_fraction below {total / keep.size:.3g}"
        )
    if kind == "uniform1d":
        step = (w - int(keep.sum())) / missing if missing else math.inf
        outside = np.flatnonzero(~keep)
        start = rng.uniform(0.0, step) if missing else 0.0
        picks = np.floor(start + step * np.arange(missing)).astype(int)
        keep[outside[picks]] = True
    else:
        weight = np.where(keep, 0.0, density.ravel())
        if missing:
            drawn = rng.choice(keep.size, missing, replace=False, p=weight / weight.sum())
            keep[drawn] = True
    mask = keep.reshape(h, w) if two_d else np.broadcast_to(keep, (h, w))
    return torch.from_numpy(np.ascontiguousarray(mask))


def _normal(n: int) -> np.ndarray:
    """Normal density of std n/6 about the zero frequency."""
    return np.asarray(np.exp(-0.5 * ((np.arange(n) - n // 2) / (n / 6)) ** 2))


def _centre(n: int, fraction: float) -> np.ndarray:
    """Mask of the ``round(fraction n)`` indices around the zero frequency, at least one."""
    size = max(1, round(fraction * n))
    start = n // 2 - size // 2
    return (np.arange(n) >= start) & (np.arange(n) < start + size)
