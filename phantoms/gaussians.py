"""Gaussian blobs in the plane or in space: smooth objects whose every transform is closed.

A blob is `value exp(-(r - c)' C^-1 (r - c) / 2)`.  Coordinates are those of `phantoms.shapes`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import erf

from inverse.errors import GeometryError
from phantoms.shapes import Float, _chunks, _grid, _rays, _Shapes, fft_samples

__all__ = ["Gaussians"]


@dataclass(frozen=True, eq=False)
class Gaussians(_Shapes):
    """Sum of Gaussian blobs of one dimension d, 2 or 3.

    Args:
        value: (n,) height of each blob.
        centre: (n, d) centre (x, y) or (x, y, z), mm.
        covariance: (n, d, d), mm^2, symmetric positive definite.

    Raises:
        GeometryError: shapes differ, entries are not finite, or a covariance is not positive
            definite.
    """

    value: Float
    centre: Float
    covariance: Float

    def __post_init__(self) -> None:
        d = np.shape(self.centre)[-1] if np.ndim(self.centre) == 2 else 2
        self._store(value=(), centre=(d,), covariance=(d, d))
        if d not in (2, 3):
            raise GeometryError(f"Gaussians have centres of {d} coordinates, expected 2 or 3.")
        asymmetry = np.abs(self.covariance - np.swapaxes(self.covariance, 1, 2)).max(initial=0)
        least = np.linalg.eigvalsh(self.covariance).min(initial=math.inf)
        if asymmetry > 1e-9 * np.abs(self.covariance).max(initial=0) or not least > 0:
            raise GeometryError(
                "Gaussians.covariance holds a matrix that is not symmetric and positive "
                "definite, expected one in mm^2."
            )

    @property
    def dimension(self) -> int:
        """2 or 3."""
        return int(self.centre.shape[1])

    def scaled(self, factor: float) -> Gaussians:
        """The same blobs with their values multiplied by `factor`."""
        return Gaussians(self.value * factor, self.centre, self.covariance)

    @property
    def masses(self) -> Float:
        """(n,) integral of each blob, `value (2 pi)^(d/2) sqrt(det C)`."""
        root = np.sqrt(np.linalg.det(self.covariance))
        return np.asarray(self.value * (2 * np.pi) ** (self.dimension / 2) * root)

    @property
    def mass(self) -> float:
        """Integral over the plane or space, value times mm^d."""
        return float(self.masses.sum())

    def at(self, *coordinates: ArrayLike) -> Float:
        """Values at points given by d arrays of coordinates (*points,) in mm."""
        parts = np.broadcast_arrays(*(np.asarray(c, np.float64) for c in coordinates))
        if len(parts) != self.dimension:
            raise GeometryError(
                f"Gaussians of {self.dimension} dimensions were asked at {len(parts)} "
                f"coordinates, expected {self.dimension}."
            )
        flat = np.stack([part.reshape(-1) for part in parts], axis=1)
        precision = np.linalg.inv(self.covariance)
        out = np.zeros(len(flat))
        for part in _chunks(len(flat), 3 * len(self)):
            u = flat[part, None] - self.centre
            form = np.einsum("pni,nij,pnj->pn", u, precision, u)
            out[part] = np.exp(-form / 2) @ self.value
        return out.reshape(parts[0].shape)

    def image(
        self,
        shape: tuple[int, int],
        pixel_mm: float | tuple[float, float],
        supersample: int = 4,
    ) -> NDArray[np.float32]:
        """Area average over each pixel of blobs in the plane.

        Exact along rows (error functions); across rows by Gauss-Legendre nodes, `supersample` for
        each standard deviation of the section, which is exact to 1e-6 at 4.

        Args:
            shape: rows H and columns W.
            pixel_mm: pixel size in mm, or (row, column) sizes.
            supersample: nodes.

        Returns:
            (H, W) float32.

        Raises:
            GeometryError: blobs in space; take a `slice` first.
        """
        self._planar("image")
        height, width, py, px = _grid(shape, pixel_mm)
        node, weight = np.polynomial.legendre.leggauss(max(supersample, 1))
        edges = (np.arange(width + 1) - width / 2) * px
        out = np.zeros((height, width))
        for value, centre, precision in zip(
            self.value, self.centre, np.linalg.inv(self.covariance), strict=True
        ):
            a, b, c = precision[0, 0], precision[0, 1], precision[1, 1]
            panels = max(1, math.ceil(py * math.sqrt(c)))
            step = py / panels
            start = (np.arange(height * panels) / panels - height / 2) * py
            y = (start[:, None] + step * (node + 1) / 2).reshape(-1)
            v = y - centre[1]
            height_at = np.exp(-(c - b * b / a) * v * v / 2) * np.tile(weight, len(start)) / 2
            t = math.sqrt(a / 2) * (edges[None] - centre[0] + (b / a) * v[:, None])
            strip = height_at[:, None] * np.diff(erf(t), axis=1) * math.sqrt(math.pi / (2 * a))
            out += value / (px * panels) * strip.reshape(height, -1, width).sum(axis=1)
        return out.astype(np.float32)

    def line_integrals(self, origin: ArrayLike, direction: ArrayLike) -> Float:
        """Integrals along whole lines, in closed form.

        With P the inverse covariance and u from the centre to the line's point,
        `value sqrt(2 pi / d'Pd) exp(-(u'Pu - (d'Pu)^2 / d'Pd) / 2)`.

        Args:
            origin: (*rays, d) any point on the line, mm.
            direction: (*rays, d), of any length above 0.

        Returns:
            (*rays,) float64, value times mm.
        """
        o, d, shape = _rays(origin, direction, self.dimension)
        precision = np.linalg.inv(self.covariance)
        out = np.zeros(len(o))
        for part in _chunks(len(o), 4 * len(self)):
            u = o[part, None] - self.centre
            along = np.einsum("pi,nij->pnj", d[part], precision)
            dd = np.einsum("pnj,pj->pn", along, d[part])
            du = np.einsum("pnj,pnj->pn", along, u)
            uu = np.einsum("pni,nij,pnj->pn", u, precision, u)
            out[part] = (np.sqrt(2 * np.pi / dd) * np.exp(-(uu - du**2 / dd) / 2)) @ self.value
        return out.reshape(shape)

    def kspace(self, *k: ArrayLike) -> NDArray[np.complex128]:
        """Continuous Fourier transform, `mass exp(-2 pi^2 k'Ck - 2 pi i k.c)`.

        Args:
            *k: d arrays (*k,) in cycles per mm: kx, ky and for blobs in space kz.

        Returns:
            (*k,) complex128, value times mm^d.
        """
        parts = np.broadcast_arrays(*(np.asarray(part, np.float64) for part in k))
        if len(parts) != self.dimension:
            raise GeometryError(
                f"Gaussians of {self.dimension} dimensions have as many frequencies, expected "
                f"{self.dimension}, got {len(parts)}."
            )
        q = np.stack([part.reshape(-1) for part in parts], axis=1)
        out = np.zeros(len(q), dtype=np.complex128)
        for part in _chunks(len(q), 3 * len(self)):
            form = np.einsum("pi,nij,pj->pn", q[part], self.covariance, q[part])
            phase = q[part] @ self.centre.T
            out[part] = np.exp(-2 * np.pi**2 * form - 2j * np.pi * phase) @ self.masses
        return out.reshape(parts[0].shape)

    def fft(
        self, shape: tuple[int, int], pixel_mm: float | tuple[float, float]
    ) -> NDArray[np.complex64]:
        """Samples that the centred orthonormal FFT of a fine image tends to; `fft_samples`."""
        self._planar("fft")
        return fft_samples(self.kspace, shape, pixel_mm)

    def slice(self, z: float) -> Gaussians:
        """Section of blobs in space by the plane at height `z` (mm): blobs in the plane."""
        if self.dimension != 3:
            raise GeometryError("Gaussians in the plane have no slice, expected blobs in space.")
        precision = np.linalg.inv(self.covariance)
        h = float(z) - self.centre[:, 2]
        covariance = np.linalg.inv(precision[:, :2, :2])
        shift = -h[:, None] * np.einsum("nij,nj->ni", covariance, precision[:, :2, 2])
        fade = np.exp(-(h**2) / (2 * self.covariance[:, 2, 2]))
        return Gaussians(self.value * fade, self.centre[:, :2] + shift, covariance)

    def _planar(self, what: str) -> None:
        if self.dimension != 2:
            raise GeometryError(
                f"Gaussians in space have no {what}, expected blobs in the plane; take a slice."
            )
