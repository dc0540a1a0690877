"""Objects of several kinds at once: sums of sections in the plane, and of solids in space.

`Section` is what every phantom in the plane can do and `Solid` what every phantom in space can;
`Scene` and `Body` are their sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from inverse.errors import GeometryError
from phantoms.shapes import Float

__all__ = ["Body", "Scene", "Section", "Solid"]

Complex = NDArray[np.complex128]


class Section(Protocol):
    """A phantom in the plane: `phantoms.shapes.Ellipses` documents each method."""

    @property
    def mass(self) -> float:
        """Integral over the plane."""

    def scaled(self, factor: float) -> Any:
        """The same with values multiplied."""

    def at(self, x: ArrayLike, y: ArrayLike, /) -> Float:
        """Values at points."""

    def image(
        self, shape: tuple[int, int], pixel_mm: float | tuple[float, float], supersample: int = 4
    ) -> NDArray[np.float32]:
        """Area averages over pixels."""

    def line_integrals(self, origin: ArrayLike, direction: ArrayLike) -> Float:
        """Integrals along lines."""

    def kspace(self, kx: ArrayLike, ky: ArrayLike, /) -> Complex:
        """Continuous Fourier transform."""

    def fft(
        self, shape: tuple[int, int], pixel_mm: float | tuple[float, float]
    ) -> NDArray[np.complex64]:
        """Samples of the transform, scaled as the centred orthonormal FFT."""


class Solid(Protocol):
    """A phantom in space: `phantoms.shapes.Ellipsoids` documents each method."""

    @property
    def mass(self) -> float:
        """Integral over space."""

    def scaled(self, factor: float) -> Any:
        """The same with values multiplied."""

    def line_integrals(self, origin: ArrayLike, direction: ArrayLike) -> Float:
        """Integrals along lines."""

    def kspace(self, kx: ArrayLike, ky: ArrayLike, kz: ArrayLike, /) -> Complex:
        """Continuous Fourier transform."""

    def slice(self, z: float) -> Any:
        """Section by a plane, or several sections that add up."""


@dataclass(frozen=True)
class Scene:
    """The sum of sections.

    Args:
        parts: sections; values add where they overlap.
    """

    parts: tuple[Section, ...]

    def __add__(self, other: Scene) -> Scene:
        return Scene(self.parts + other.parts)

    def scaled(self, factor: float) -> Scene:
        """The same with values multiplied by `factor`."""
        return Scene(tuple(part.scaled(factor) for part in self.parts))

    @property
    def mass(self) -> float:
        """Integral over the plane, value times mm^2."""
        return sum(part.mass for part in self.parts)

    def at(self, x: ArrayLike, y: ArrayLike) -> Float:
        """Values at points, (*points,)."""
        zero = np.zeros(np.broadcast_shapes(np.shape(x), np.shape(y)))
        return sum((part.at(x, y) for part in self.parts), zero)

    def image(
        self, shape: tuple[int, int], pixel_mm: float | tuple[float, float], supersample: int = 4
    ) -> NDArray[np.float32]:
        """Area averages over pixels, (H, W) float32."""
        zero = np.zeros(shape, np.float32)
        return sum((part.image(shape, pixel_mm, supersample) for part in self.parts), zero)

    def line_integrals(self, origin: ArrayLike, direction: ArrayLike) -> Float:
        """Integrals along whole lines, (*rays,), value times mm."""
        shape = np.broadcast_shapes(np.shape(origin), np.shape(direction))[:-1]
        return sum(
            (part.line_integrals(origin, direction) for part in self.parts), np.zeros(shape)
        )

    def kspace(self, kx: ArrayLike, ky: ArrayLike) -> Complex:
        """Continuous Fourier transform, (*k,) complex128."""
        zero = np.zeros(np.broadcast_shapes(np.shape(kx), np.shape(ky)), np.complex128)
        return sum((part.kspace(kx, ky) for part in self.parts), zero)

    def fft(
        self, shape: tuple[int, int], pixel_mm: float | tuple[float, float]
    ) -> NDArray[np.complex64]:
        """Samples that the centred orthonormal FFT of a fine image tends to."""
        return sum(
            (part.fft(shape, pixel_mm) for part in self.parts), np.zeros(shape, np.complex64)
        )


@dataclass(frozen=True)
class Body:
    """The sum of solids.

    Args:
        parts: solids; values add where they overlap.
    """

    parts: tuple[Solid, ...]

    def __add__(self, other: Body) -> Body:
        return Body(self.parts + other.parts)

    def scaled(self, factor: float) -> Body:
        """The same with values multiplied by `factor`."""
        return Body(tuple(part.scaled(factor) for part in self.parts))

    @property
    def mass(self) -> float:
        """Integral over space, value times mm^3."""
        return sum(part.mass for part in self.parts)

    def line_integrals(self, origin: ArrayLike, direction: ArrayLike) -> Float:
        """Integrals along whole lines, (*rays,), value times mm."""
        shape = np.broadcast_shapes(np.shape(origin), np.shape(direction))[:-1]
        return sum(
            (part.line_integrals(origin, direction) for part in self.parts), np.zeros(shape)
        )

    def kspace(self, kx: ArrayLike, ky: ArrayLike, kz: ArrayLike) -> Complex:
        """Continuous Fourier transform, (*k,) complex128."""
        shape = np.broadcast_shapes(np.shape(kx), np.shape(ky), np.shape(kz))
        zero = np.zeros(shape, np.complex128)
        return sum((part.kspace(kx, ky, kz) for part in self.parts), zero)

    def slice(self, z: float) -> Scene:
        """Section by the plane at height `z` (mm)."""
        cuts: list[Section] = []
        for part in self.parts:
            section = part.slice(z)
            cuts += section if isinstance(section, tuple) else [section]
        return Scene(tuple(cuts))

    def slab(self, z: float, thickness: float, sub_slices: int) -> Scene:
        """Mean of `sub_slices` equidistant sections of a slab: a slice with a thickness.

        Args:
            z: height of the slab's middle, mm.
            thickness: mm.
            sub_slices: number of sections.
        """
        return mean_section(self, z, thickness, sub_slices)


def mean_section(body: Solid, z: float, thickness: float, sub_slices: int) -> Scene:
    """Mean of `sub_slices` equidistant sections of any solid; see `Body.slab`."""
    if sub_slices < 1:
        raise GeometryError(f"sub_slices is {sub_slices}, expected 1 or more sections.")
    heights = z + thickness * ((np.arange(sub_slices) + 0.5) / sub_slices - 0.5)
    cuts: Sequence[Any] = [body.slice(float(h)) for h in heights]
    return Scene(tuple(cut.scaled(1 / sub_slices) for cut in cuts))
