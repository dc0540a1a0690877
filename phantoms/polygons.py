"""Convex polygons: exact images, line integrals and Fourier transforms.

Bars, boxes, the sections of cuboids, and ellipses cut by lines.  Coordinates are those of
`phantoms.shapes`.

References:
    McInturff and Simon, "The Fourier transform of linearly varying functions with polygonal
    support", IEEE Trans. Antennas Propag. 39 (1991): the transform as a sum over edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from inverse.errors import GeometryError
from phantoms.shapes import Float, _chunks, _grid, _rays, _Shapes, fft_samples

__all__ = ["Polygons", "cut"]

_ARC = 720  # vertices of a whole ellipse: its area is short by 1.3e-5


@dataclass(frozen=True, eq=False)
class Polygons(_Shapes):
    """Sum of constant convex polygons in the plane.

    Args:
        value: (n,) additive value inside each polygon.
        vertices: (n, m, 2) corners (x, y) in mm, in order, either way round; polygons of fewer
            corners repeat their last one.

    Raises:
        GeometryError: shapes differ, entries are not finite, or a polygon is not convex or has
            no area.
    """

    value: Float
    vertices: Float

    def __post_init__(self) -> None:
        corners = np.shape(self.vertices)[1:2] or (3,)
        self._store(value=(), vertices=(*corners, 2))
        edge = np.roll(self.vertices, -1, axis=1) - self.vertices
        area = _cross(self.vertices, np.roll(self.vertices, -1, axis=1)).sum(axis=1) / 2
        size = np.square(edge).sum(axis=(1, 2))
        if np.any(np.abs(area) <= 1e-12 * size):
            raise GeometryError("Polygons.vertices holds a polygon without area, expected some.")
        turned = np.where(area[:, None, None] < 0, self.vertices[:, ::-1], self.vertices)
        turned.setflags(write=False)
        object.__setattr__(self, "vertices", turned)
        for polygon, scale in zip(turned, size, strict=True):
            side = np.roll(polygon, -1, axis=0) - polygon
            side = side[np.square(side).sum(axis=1) > 0]
            turn = _cross(side, np.roll(side, -1, axis=0))
            # Convex: it turns one way, and once around.
            angle = np.arctan2(turn, np.sum(side * np.roll(side, -1, axis=0), axis=1)).sum()
            if turn.min() < -1e-9 * scale or angle > 3 * np.pi:
                raise GeometryError(
                    "Polygons.vertices holds a polygon that is not convex, expected corners in "
                    "order of a convex one; split it."
                )

    @classmethod
    def of(cls, parts: Sequence[tuple[float, ArrayLike]]) -> Self:
        """From pairs of a value and corners (k, 2), of any number of corners each."""
        corners = [np.asarray(c, np.float64).reshape(-1, 2) for _, c in parts]
        most = max((len(c) for c in corners), default=3)
        padded = [np.concatenate([c, np.repeat(c[-1:], most - len(c), axis=0)]) for c in corners]
        return cls(np.array([value for value, _ in parts]), np.array(padded))

    @classmethod
    def boxes(cls, rows: ArrayLike) -> Self:
        """From rows (value, x, y, half width, half height, angle), as `Ellipses.of`."""
        value, x, y, a, b, angle = np.asarray(rows, dtype=np.float64).reshape(-1, 6).T
        u = np.stack([-a, a, a, -a], axis=1)
        v = np.stack([-b, -b, b, b], axis=1)
        c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
        corners = np.stack([x[:, None] + c * u - s * v, y[:, None] + s * u + c * v], axis=2)
        return cls(value, corners)

    def scaled(self, factor: float) -> Polygons:
        """The same polygons with their values multiplied by `factor`."""
        return Polygons(self.value * factor, self.vertices)

    @property
    def areas(self) -> Float:
        """(n,) area of each polygon, mm^2."""
        return _cross(self.vertices, np.roll(self.vertices, -1, axis=1)).sum(axis=1) / 2

    @property
    def mass(self) -> float:
        """Integral over the plane, value times mm^2."""
        return float(self.value @ self.areas)

    def _edges(self) -> tuple[Float, Float]:
        """Outward normals of the length of each edge, (n, m, 2), and `normal . corner`."""
        edge = np.roll(self.vertices, -1, axis=1) - self.vertices
        normal = np.stack([edge[..., 1], -edge[..., 0]], axis=-1)
        return normal, np.sum(normal * self.vertices, axis=-1)

    def at(self, x: ArrayLike, y: ArrayLike) -> Float:
        """Values at points (*points,) in mm."""
        px, py = np.broadcast_arrays(np.asarray(x, np.float64), np.asarray(y, np.float64))
        normal, level = self._edges()
        flat = np.stack([px.reshape(-1), py.reshape(-1)], axis=1)
        out = np.zeros(len(flat))
        for part in _chunks(len(flat), level.size):
            inside = np.einsum("pd,nmd->pnm", flat[part], normal) <= level
            out[part] = inside.all(axis=2) @ self.value
        return out.reshape(px.shape)

    def image(
        self,
        shape: tuple[int, int],
        pixel_mm: float | tuple[float, float],
        supersample: int = 4,
    ) -> NDArray[np.float32]:
        """Area average over each pixel, exact.

        The edges are cut where they cross rows and columns; each piece then lies in one pixel,
        covers a trapezium of it and all that follows in its row. Summed along the rows, this is
        Green's theorem.

        Args:
            shape: rows H and columns W.
            pixel_mm: pixel size in mm, or (row, column) sizes.
            supersample: not needed; as `Ellipses.image` has it.

        Returns:
            (H, W) float32.
        """
        height, width, py, px = _grid(shape, pixel_mm)
        corners = self.vertices / [px, py] + [width / 2, height / 2]
        difference = np.zeros((height, width + 2))
        for value, polygon in zip(self.value, corners, strict=True):
            piece = _pieces(polygon)
            start, stop = piece[:-1], piece[1:]
            middle = (start + stop) / 2
            dy = value * (stop - start)[:, 1]
            row = np.floor(middle[:, 1]).astype(np.int64)
            within = (row >= 0) & (row < height) & (dy != 0)
            x, row, dy = middle[within, 0].clip(0, width), row[within], dy[within]
            column = np.minimum(np.floor(x).astype(np.int64), width)
            # The interior lies to the left of an edge that runs down: subtract what follows it.
            late = dy * (x - column)
            np.add.at(difference, (row, column), late - dy)
            np.add.at(difference, (row, column + 1), -late)
        return np.cumsum(difference, axis=1)[:, :width].astype(np.float32)

    def line_integrals(self, origin: ArrayLike, direction: ArrayLike) -> Float:
        """Integrals along whole lines: each edge's half-plane cuts the line.

        Args:
            origin: (*rays, 2) any point (x, y) on the line, mm.
            direction: (*rays, 2), of any length above 0.

        Returns:
            (*rays,) float64, value times mm.
        """
        o, d, shape = _rays(origin, direction, 2)
        normal, level = self._edges()
        out = np.zeros(len(o))
        for part in _chunks(len(o), 4 * level.size):
            room = level - np.einsum("pd,nmd->pnm", o[part], normal)
            speed = np.einsum("pd,nmd->pnm", d[part], normal)
            out[part] = clipped_length(room, speed) @ self.value
        return out.reshape(shape)

    def kspace(self, kx: ArrayLike, ky: ArrayLike) -> NDArray[np.complex128]:
        """Continuous Fourier transform `F(k) = int f(r) exp(-2 pi i k.r) dr`.

        By the divergence theorem a sum over edges of midpoint m, vector v and outward normal n
        of its length, `F = i/(2 pi |k|^2) sum k.n sinc(k.v) exp(-2 pi i k.m)`; at k = 0 the area.

        Args:
            kx: (*k,) cycles per mm along columns.
            ky: (*k,) cycles per mm along rows.

        Returns:
            (*k,) complex128, value times mm^2.
        """
        u, v = np.broadcast_arrays(np.asarray(kx, np.float64), np.asarray(ky, np.float64))
        k = np.stack([u.reshape(-1), v.reshape(-1)], axis=1)
        out = np.zeros(len(k), dtype=np.complex128)
        for value, polygon, area in zip(self.value, self.vertices, self.areas, strict=True):
            centre = polygon.mean(axis=0)
            start = polygon - centre
            stop = np.roll(start, -1, axis=0)
            edge, middle = stop - start, (start + stop) / 2
            normal = np.stack([edge[:, 1], -edge[:, 0]], axis=1)
            for part in _chunks(len(k), 4 * len(polygon)):
                q = k[part]
                square = np.sum(q * q, axis=1)
                small = square * area < 1e-12
                wave = (q @ normal.T) * np.sinc(q @ edge.T) * np.exp(-2j * np.pi * (q @ middle.T))
                sums = 1j / (2 * np.pi * np.where(small, 1, square)) * wave.sum(axis=1)
                turn = np.exp(-2j * np.pi * (q @ centre))
                out[part] += value * turn * np.where(small, area, sums)
        return out.reshape(u.shape)

    def fft(
        self, shape: tuple[int, int], pixel_mm: float | tuple[float, float]
    ) -> NDArray[np.complex64]:
        """Samples that the centred orthonormal FFT of a fine image tends to; `fft_samples`."""
        return fft_samples(self.kspace, shape, pixel_mm)


def cut(
    x: float,
    y: float,
    a: float,
    b: float,
    angle: float,
    lines: Sequence[tuple[float, float]],
) -> Float:
    """Corners of an ellipse cut by lines: the part with `u cos t + v sin t <= d` for every line.

    The arc is a polygon's, whose area is short by 1.3e-5 of the ellipse's.

    Args:
        x: centre along columns, mm.
        y: centre along rows, mm.
        a: semi-axis along the angle, mm.
        b: the other semi-axis, mm.
        angle: radians, from +x towards +y.
        lines: pairs (t, d): direction of the line's normal in rad and distance from the centre.

    Returns:
        (k, 2) corners in mm, empty where nothing is left.
    """
    t = 2 * np.pi * (np.arange(_ARC) + 0.5) / _ARC
    u, v = a * np.cos(t), b * np.sin(t)
    c, s = np.cos(angle), np.sin(angle)
    corners = np.stack([c * u - s * v, s * u + c * v], axis=1)
    for turn, distance in lines:
        over = corners @ [np.cos(turn), np.sin(turn)] - distance
        after, to = np.roll(corners, -1, axis=0), np.roll(over, -1)
        crosses = (over <= 0) != (to <= 0)
        share = (over / np.where(crosses, over - to, 1.0))[crosses, None]
        crossing = corners[crosses] + share * (after - corners)[crosses]
        place = np.concatenate([np.flatnonzero(over <= 0), np.flatnonzero(crosses) + 0.5])
        corners = np.concatenate([corners[over <= 0], crossing])[np.argsort(place)]
    return corners + np.array([x, y])


def clipped_length(room: Float, speed: Float) -> Float:
    """Length of a line of unit speed where `speed t <= room` for all bounds of the last axis.

    Args:
        room: (*rays, n, bounds).
        speed: (*rays, n, bounds), 0 where a line runs along the bound.

    Returns:
        (*rays, n).
    """
    still = speed == 0
    t = room / np.where(still, 1.0, speed)
    first = np.where(speed < 0, t, -np.inf).max(axis=-1)
    last = np.where(speed > 0, t, np.inf).min(axis=-1)
    missed = (still & (room < 0)).any(axis=-1)
    return np.where(missed, 0.0, np.maximum(last - first, 0.0))


def _cross(u: Float, v: Float) -> Float:
    return np.asarray(u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0])


def _pieces(polygon: Float) -> Float:
    """The closed outline with a point wherever it crosses a row or column of unit pixels."""
    points = []
    for start, stop in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        shares = [np.zeros(1)]
        for a, b in zip(start, stop, strict=True):
            if a != b:
                lines = np.arange(np.ceil(min(a, b)), np.floor(max(a, b)) + 1)
                shares.append((lines - a) / (b - a))
        share = np.unique(np.concatenate(shares).clip(0, 1))
        share = share[share < 1]
        points.append(start + share[:, None] * (stop - start))
    points.append(polygon[:1])
    return np.concatenate(points)
