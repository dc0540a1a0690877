r"""Receive coils: the sensitivity of circular loops about the object, by the law of Biot-Savart.

By reciprocity a coil receives in proportion to the field of a unit current in it,

.. math:: S(r) \propto B_x(r) - i B_y(r), \qquad
    B(r) = \frac{\mu_0}{4\pi}\oint \frac{dl \times (r - l)}{|r - l|^3}

with the static field along z.  Coordinates are those of :mod:`phantoms.shapes`: millimetres,
origin at the grid centre, x along columns, y along rows, z along slices.

Source: Hoult, Concepts Magn. Reson. 12 (2000); Jackson, Classical Electrodynamics, sec. 5.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from inverse.errors import GeometryError

__all__ = ["CoilArray", "loop_field"]

Float = NDArray[np.float64]


def loop_field(
    points: Float, centre: Float, axis: Float, radius: float, segments: int = 32
) -> Float:
    r"""Field of a unit current in a circular loop, in units of :math:`\mu_0` per mm.

    The trapezoidal rule on the circle, which converges exponentially off the wire.

    Args:
        points: (*points, 3) of (x, y, z) mm.
        centre: (3,) mm.
        axis: (3,) direction of the loop's normal, of any length.
        radius: mm.
        segments: nodes of the rule.

    Returns:
        (*points, 3) float64.
    """
    normal = axis / np.linalg.norm(axis)
    u = np.cross(normal, np.eye(3)[np.argmin(np.abs(normal))])
    u /= np.linalg.norm(u)
    v = np.cross(normal, u)
    field = np.zeros(points.shape)
    for angle in 2 * np.pi * np.arange(segments) / segments:
        wire = centre + radius * (np.cos(angle) * u + np.sin(angle) * v)
        sx, sy, sz = np.cos(angle) * v - np.sin(angle) * u
        x, y, z = (points[..., k] - wire[k] for k in range(3))
        weight = (x * x + y * y + z * z) ** -1.5
        field[..., 0] += (sy * z - sz * y) * weight
        field[..., 1] += (sz * x - sx * z) * weight
        field[..., 2] += (sx * y - sy * x) * weight
    return field * (radius / (2 * segments))


@dataclass(frozen=True)
class CoilArray:
    """Equal loops around the z axis, facing it, as in a head or body array.

    Attributes:
        coils: number of loops, equally spaced in angle; successive ones alternate in z.
        ring_mm: distance of the loops' centres from the axis.
        radius_mm: radius of a loop; by default neighbours overlap a little.
        stagger_mm: the loops' centres lie at z = +-stagger.

    Raises:
        GeometryError: no coil, or a length that is not positive.
    """

    coils: int
    ring_mm: float
    radius_mm: float | None = None
    stagger_mm: float = 0.0

    def __post_init__(self) -> None:
        if self.coils < 1 or not self.ring_mm > 0 or not self.loop_mm > 0:
            raise GeometryError(
                f"a coil array needs at least one coil and lengths above 0 mm, got {self}"
            )

    @property
    def loop_mm(self) -> float:
        """Radius of a loop."""
        if self.radius_mm is not None:
            return self.radius_mm
        return 1.2 * self.ring_mm * float(np.sin(np.pi / max(self.coils, 4)))

    def maps(
        self,
        shape: tuple[int, int],
        pixel_mm: tuple[float, float],
        z_mm: float = 0.0,
        *,
        normalised: bool = True,
    ) -> NDArray[np.complex64]:
        """Sensitivities of a slice.

        Args:
            shape: rows and columns.
            pixel_mm: (row, column) pixel size.
            z_mm: height of the slice.
            normalised: of unit root-sum-of-squares at every pixel, so that the image to be
                found is the object itself.

        Returns:
            (coils, rows, columns) complex64.

        Raises:
            GeometryError: a slice so wide that a wire crosses it.
        """
        h, w = shape
        y = (np.arange(h) - (h - 1) / 2) * pixel_mm[0]
        x = (np.arange(w) - (w - 1) / 2) * pixel_mm[1]
        points = np.stack(np.broadcast_arrays(x[None, :], y[:, None], float(z_mm)), axis=-1)
        if np.hypot(*points[0, 0, :2]) >= self.ring_mm:
            raise GeometryError(
                f"the slice reaches {np.hypot(*points[0, 0, :2]):.4g} mm from the axis, the coils "
                f"lie at {self.ring_mm:.4g} mm; give a larger ring"
            )
        out = np.empty((self.coils, h, w), dtype=np.complex128)
        for c in range(self.coils):
            angle = 2 * np.pi * (c + 0.5) / self.coils
            out_ward = np.array([np.cos(angle), np.sin(angle), 0.0])
            centre = self.ring_mm * out_ward + [0, 0, self.stagger_mm * (-1) ** c]
            field = loop_field(points, centre, -out_ward, self.loop_mm)
            out[c] = field[..., 0] - 1j * field[..., 1]
        if normalised:
            out /= np.sqrt((np.abs(out) ** 2).sum(axis=0))
        return out.astype(np.complex64)
