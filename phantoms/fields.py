r"""Gaussian random fields of known covariance, sampled exactly.

On a torus a stationary covariance is diagonal in the Fourier basis, so that

.. math:: x = F^{-1}\sqrt{\lambda}\,F w, \qquad w \sim N(0, I), \qquad \lambda = F c

is a draw of exactly that covariance.  A periodic field takes :math:`\lambda = S(k)/\Delta` from
its spectral density S and the pixel area :math:`\Delta`; a field that is not periodic is cut out
of a torus large enough for its covariance to be one there (circulant embedding).

References:
    Wood and Chan, J. Comput. Graph. Statist. 3 (1994); Dietrich and Newsam, SIAM J. Sci. Comput.
    18 (1997): circulant embedding.
    Burgess, J. Opt. Soc. Am. A 16 (1999): power laws of anatomical noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from inverse.errors import GeometryError, InputError

__all__ = ["GaussianField", "matern", "power_law"]

Float = NDArray[np.float64]


@dataclass(frozen=True)
class GaussianField:
    """A stationary Gaussian field of mean 0 on a grid of two or three dimensions.

    Made by `periodic` or `embedded`.

    Attributes:
        shape: the grid.
        eigenvalues: covariance in the Fourier basis of the torus, its shape.
    """

    shape: tuple[int, ...]
    eigenvalues: Float

    @classmethod
    def periodic(
        cls,
        shape: Sequence[int],
        spacing_mm: Sequence[float],
        density: Callable[[Float], Float],
        variance: float | None = None,
    ) -> GaussianField:
        """A field that continues over the grid's borders.

        Args:
            shape: the grid, which is the torus.
            spacing_mm: pixel size, one an axis.
            density: S(k), of |k| in cycles per mm; value squared times mm^d, finite at 0.
            variance: scale S so that a pixel has this variance; by default as it is.

        Raises:
            GeometryError: an empty grid or a size that is not positive.
            InputError: a density that is negative or not finite somewhere, or zero everywhere.
        """
        grid, spacing = _grid(shape, spacing_mm)
        axes = [np.fft.fftfreq(n, d) for n, d in zip(grid, spacing, strict=True)]
        k = np.sqrt(np.sum(np.square(np.meshgrid(*axes, indexing="ij")), axis=0))
        with np.errstate(divide="ignore", invalid="ignore"):
            eigenvalues = np.asarray(density(k), np.float64) / math.prod(spacing)
        if not np.isfinite(eigenvalues).all() or eigenvalues.min() < 0 or not eigenvalues.any():
            raise InputError(
                "the spectral density of a field must be finite and not negative at all "
                "frequencies of the grid, 0 included, and not vanish; give it a low cut-off"
            )
        if variance is not None:
            if not variance > 0:
                raise InputError(f"the variance of a field must be positive, got {variance}")
            eigenvalues = eigenvalues * (variance / eigenvalues.mean())
        return cls(grid, eigenvalues)

    @classmethod
    def embedded(
        cls,
        shape: Sequence[int],
        spacing_mm: Sequence[float],
        covariance: Callable[[Float], Float],
    ) -> GaussianField:
        """A field that does not feel the grid's borders.

        Args:
            shape: the grid; the torus is two to eight times as large.
            spacing_mm: pixel size, one an axis.
            covariance: c(r) of the distance in mm.

        Raises:
            GeometryError: an empty grid or a size that is not positive.
            InputError: no torus of up to eight times the grid holds the covariance, because it
                reaches too far or is none.
        """
        grid, spacing = _grid(shape, spacing_mm)
        for factor in (2, 4, 8):
            torus = tuple(factor * n for n in grid)
            axes = [
                np.minimum(np.arange(n), n - np.arange(n)) * d
                for n, d in zip(torus, spacing, strict=True)
            ]
            r = np.sqrt(np.sum(np.square(np.meshgrid(*axes, indexing="ij")), axis=0))
            eigenvalues = np.fft.fftn(np.asarray(covariance(r), np.float64)).real
            if eigenvalues.min() > -1e-9 * eigenvalues.max():
                return cls(grid, eigenvalues.clip(0))
        raise InputError(
            f"the covariance does not fit on a torus of eight times the grid {grid}: least "
            f"eigenvalue {eigenvalues.min():.3g} of {eigenvalues.max():.3g}; shorten its length, "
            "enlarge the grid, or use a periodic field"
        )

    @property
    def covariance(self) -> Float:
        """Covariance of the first pixel with all others, of the grid's shape."""
        c = np.fft.ifftn(self.eigenvalues).real
        return np.asarray(c[tuple(slice(n) for n in self.shape)])

    def sample(self, seed: int, count: int = 1) -> Float:
        """Draws of the field; draw i depends on (seed, i) alone.

        Args:
            seed: not negative.
            count: number of draws.

        Returns:
            (count, *shape) float64.
        """
        out = np.empty((count, *self.shape))
        root = np.sqrt(self.eigenvalues)
        part = tuple(slice(n) for n in self.shape)
        for i in range(count):
            white = np.random.default_rng([seed, i]).normal(size=self.eigenvalues.shape)
            out[i] = np.fft.ifftn(root * np.fft.fftn(white)).real[part]
        return out


def matern(std: float, length_mm: float, smoothness: float = 0.5) -> Callable[[Float], Float]:
    r"""Matern covariance, for `GaussianField.embedded`.

    .. math:: \sigma^2\,\frac{2^{1-\nu}}{\Gamma(\nu)}\, t^\nu K_\nu(t), \qquad
        t = \sqrt{2\nu}\,r/\ell

    Args:
        std: standard deviation of a pixel.
        length_mm: correlation length.
        smoothness: nu; 0.5 is the exponential :math:`\sigma^2 e^{-r/\ell}`, infinity the Gaussian
            :math:`\sigma^2 e^{-r^2/2\ell^2}`.

    Raises:
        InputError: a number that is not positive.
    """
    if not (std > 0 and length_mm > 0 and smoothness > 0):
        raise InputError(
            f"a Matern covariance needs positive numbers, got std {std}, length {length_mm}, "
            f"smoothness {smoothness}"
        )

    def covariance(r: Float) -> Float:
        if math.isinf(smoothness):
            return np.asarray(std**2 * np.exp(-((r / length_mm) ** 2) / 2))
        t = math.sqrt(2 * smoothness) * np.asarray(r) / length_mm
        safe = np.where(t > 0, t, 1.0)
        value = 2 ** (1 - smoothness) / special.gamma(smoothness)
        value = value * safe**smoothness * special.kv(smoothness, safe)
        return np.asarray(std**2 * np.where(t > 0, value, 1.0))

    return covariance


def power_law(exponent: float, cutoff_mm: float) -> Callable[[Float], Float]:
    r"""Spectral density :math:`(k^2 + k_0^2)^{-\beta/2}`, for `GaussianField.periodic`.

    Args:
        exponent: beta; 3 is typical of breasts, 1 to 2 of lung and liver texture.
        cutoff_mm: length :math:`1/k_0` above which the field is flat.

    Raises:
        InputError: a cut-off that is not positive.
    """
    if not cutoff_mm > 0:
        raise InputError(f"the cut-off of a power law must be a positive length, got {cutoff_mm}")
    return lambda k: (k**2 + cutoff_mm**-2) ** (-exponent / 2)


def _grid(
    shape: Sequence[int], spacing_mm: Sequence[float]
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    grid, spacing = tuple(int(n) for n in shape), tuple(float(d) for d in spacing_mm)
    if len(grid) != len(spacing) or min(grid, default=0) < 1 or not min(spacing) > 0:
        raise GeometryError(
            f"a field needs a grid and a positive spacing for each axis, got {grid} of "
            f"{spacing} mm"
        )
    return grid, spacing
