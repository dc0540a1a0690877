"""Cuboids and elliptic cylinders in space: sections, line integrals and Fourier transforms.

Coordinates are those of `phantoms.shapes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray

from inverse.errors import GeometryError
from phantoms.polygons import Polygons, clipped_length, cut
from phantoms.shapes import Ellipses, Float, _chunks, _jinc, _rays, _Shapes

__all__ = ["Boxes", "Cylinders"]


class _Oriented(_Shapes):
    """Solids with a centre and own axes."""

    centre: Float
    rotation: Float

    def _check_rotation(self) -> None:
        square = np.swapaxes(self.rotation, 1, 2) @ self.rotation
        if len(self) and np.abs(square - np.eye(3)).max() > 1e-6:
            raise GeometryError(
                f"{type(self).__name__}.rotation holds a matrix that is not orthogonal; expected "
                "R'R = 1, as rotation_matrix gives."
            )

    def _local(self, vectors: Float, *, points: bool) -> Float:
        """Points or directions (p, 3) in each solid's axes, (p, n, 3)."""
        u = vectors[:, None] - self.centre if points else vectors[:, None]
        return np.einsum("pni,nij->pnj", np.broadcast_to(u, (len(vectors), len(self), 3)),
                         self.rotation)  # fmt: skip

    def _frequencies(self, k: tuple[ArrayLike, ...]) -> tuple[tuple[int, ...], Float]:
        parts = np.broadcast_arrays(*(np.asarray(part, np.float64) for part in k))
        return parts[0].shape, np.stack([part.reshape(-1) for part in parts], axis=1)


@dataclass(frozen=True, eq=False)
class Boxes(_Oriented):
    """Sum of constant cuboids.

    Args:
        value: (n,) additive value inside each.
        centre: (n, 3) centre (x, y, z), mm.
        half: (n, 3) half lengths of the sides, mm.
        rotation: (n, 3, 3) orthogonal matrices; column k is the direction of side k.

    Raises:
        GeometryError: shapes differ, entries are not finite, a length is not positive, or a
            matrix is not orthogonal.
    """

    value: Float
    centre: Float
    half: Float
    rotation: Float

    def __post_init__(self) -> None:
        self._store(value=(), centre=(3,), half=(3,), rotation=(3, 3))
        self._positive("half")
        self._check_rotation()

    def scaled(self, factor: float) -> Boxes:
        """The same boxes with their values multiplied by `factor`."""
        return Boxes(self.value * factor, self.centre, self.half, self.rotation)

    @property
    def mass(self) -> float:
        """Integral over space, value times mm^3."""
        return float(8 * self.value @ np.prod(self.half, axis=1))

    def at(self, points: ArrayLike) -> Float:
        """Values at points (*points, 3) of (x, y, z) mm."""
        array = np.asarray(points, np.float64)
        flat = array.reshape(-1, 3)
        out = np.zeros(len(flat))
        for part in _chunks(len(flat), 3 * len(self)):
            inside = (np.abs(self._local(flat[part], points=True)) <= self.half).all(axis=2)
            out[part] = inside @ self.value
        return out.reshape(array.shape[:-1])

    def line_integrals(self, origin: ArrayLike, direction: ArrayLike) -> Float:
        """Integrals along whole lines (*rays, 3): three slabs cut each line."""
        o, d, shape = _rays(origin, direction, 3)
        out = np.zeros(len(o))
        for part in _chunks(len(o), 24 * len(self)):
            u, v = self._local(o[part], points=True), self._local(d[part], points=False)
            room = np.concatenate([self.half - u, self.half + u], axis=2)
            out[part] = clipped_length(room, np.concatenate([v, -v], axis=2)) @ self.value
        return out.reshape(shape)

    def kspace(self, kx: ArrayLike, ky: ArrayLike, kz: ArrayLike) -> NDArray[np.complex128]:
        """Continuous Fourier transform: a product of sincs along the sides, value times mm^3."""
        shape, k = self._frequencies((kx, ky, kz))
        out = np.zeros(len(k), dtype=np.complex128)
        for part in _chunks(len(k), 6 * len(self)):
            side = 2 * self.half * self._local(k[part], points=False)
            phase = np.exp(-2j * np.pi * (k[part] @ self.centre.T))
            volume = 8 * self.value * np.prod(self.half, axis=1)
            out[part] = (np.sinc(side).prod(axis=2) * phase) @ volume
        return out.reshape(shape)

    def slice(self, z: float) -> Polygons:
        """Exact section by the plane at height `z` (mm): polygons of three to six corners."""
        signs = np.array(list(product((-1, 1), repeat=3)))
        pairs = [
            (i, j) for i in range(8) for j in range(i) if np.abs(signs[i] - signs[j]).sum() == 2
        ]
        parts = []
        for value, centre, half, rotation in zip(
            self.value, self.centre, self.half, self.rotation, strict=True
        ):
            corners = centre + (signs * half) @ rotation.T
            points = []
            for i, j in pairs:
                low, high = corners[i], corners[j]
                if (low[2] < z) != (high[2] < z):
                    share = (z - low[2]) / (high[2] - low[2])
                    points.append(low[:2] + share * (high[:2] - low[:2]))
            if len(points) >= 3:
                outline = np.array(points)
                middle = outline.mean(axis=0)
                turn = np.arctan2(*(outline - middle).T[::-1])
                parts.append((float(value), outline[np.argsort(turn)]))
        return Polygons.of(parts)


@dataclass(frozen=True, eq=False)
class Cylinders(_Oriented):
    """Sum of constant elliptic cylinders with flat ends.

    Args:
        value: (n,) additive value inside each.
        centre: (n, 3) centre (x, y, z), mm.
        axes: (n, 2) semi-axes of the cross section, mm.
        half_length: (n,) half length along the axis, mm.
        rotation: (n, 3, 3) orthogonal matrices; columns 0 and 1 are the semi-axes' directions,
            column 2 that of the axis.

    Raises:
        GeometryError: shapes differ, entries are not finite, a length is not positive, or a
            matrix is not orthogonal.
    """

    value: Float
    centre: Float
    axes: Float
    half_length: Float
    rotation: Float

    def __post_init__(self) -> None:
        self._store(value=(), centre=(3,), axes=(2,), half_length=(), rotation=(3, 3))
        self._positive("axes")
        self._positive("half_length")
        self._check_rotation()

    def scaled(self, factor: float) -> Cylinders:
        """The same cylinders with their values multiplied by `factor`."""
        return Cylinders(
            self.value * factor, self.centre, self.axes, self.half_length, self.rotation
        )

    @property
    def _volumes(self) -> Float:
        return np.asarray(2 * np.pi * np.prod(self.axes, axis=1) * self.half_length)

    @property
    def mass(self) -> float:
        """Integral over space, value times mm^3."""
        return float(self.value @ self._volumes)

    def at(self, points: ArrayLike) -> Float:
        """Values at points (*points, 3) of (x, y, z) mm."""
        array = np.asarray(points, np.float64)
        flat = array.reshape(-1, 3)
        out = np.zeros(len(flat))
        for part in _chunks(len(flat), 3 * len(self)):
            u = self._local(flat[part], points=True)
            inside = np.square(u[..., :2] / self.axes).sum(axis=2) <= 1
            out[part] = (inside & (np.abs(u[..., 2]) <= self.half_length)) @ self.value
        return out.reshape(array.shape[:-1])

    def line_integrals(self, origin: ArrayLike, direction: ArrayLike) -> Float:
        """Integrals along whole lines (*rays, 3): the chord of the mantle between the ends."""
        o, d, shape = _rays(origin, direction, 3)
        out = np.zeros(len(o))
        for part in _chunks(len(o), 12 * len(self)):
            u, v = self._local(o[part], points=True), self._local(d[part], points=False)
            p, q = u[..., :2] / self.axes, v[..., :2] / self.axes
            # |p + t q| <= 1 for t within middle -+ half
            qq = np.square(q).sum(axis=2)
            along = qq < 1e-24
            safe = np.where(along, 1.0, qq)
            middle = -np.sum(p * q, axis=2) / safe
            miss = np.square(p + middle[..., None] * q).sum(axis=2)
            half = np.where(along, np.inf, np.sqrt(np.maximum(1 - miss, 0) / safe))
            half = np.where(miss < 1, half, 0.0)
            room = np.stack([self.half_length - u[..., 2], self.half_length + u[..., 2]], axis=2)
            speed = np.stack([v[..., 2], -v[..., 2]], axis=2)
            still = speed == 0
            t = room / np.where(still, 1.0, speed)
            first = np.where(speed < 0, t, -np.inf).max(axis=2)
            last = np.where(speed > 0, t, np.inf).min(axis=2)
            length = np.minimum(last, middle + half) - np.maximum(first, middle - half)
            hit = (half > 0) & ~(still & (room < 0)).any(axis=2)
            out[part] = np.where(hit, np.maximum(length, 0), 0.0) @ self.value
        return out.reshape(shape)

    def kspace(self, kx: ArrayLike, ky: ArrayLike, kz: ArrayLike) -> NDArray[np.complex128]:
        """Continuous Fourier transform: `2 J1(t)/t` across, sinc along; value times mm^3."""
        shape, k = self._frequencies((kx, ky, kz))
        out = np.zeros(len(k), dtype=np.complex128)
        for part in _chunks(len(k), 6 * len(self)):
            q = self._local(k[part], points=False)
            across = _jinc(2 * np.pi * np.hypot(*np.moveaxis(q[..., :2] * self.axes, 2, 0)))
            along = np.sinc(2 * self.half_length * q[..., 2])
            phase = np.exp(-2j * np.pi * (k[part] @ self.centre.T))
            out[part] = (across * along * phase) @ (self.value * self._volumes)
        return out.reshape(shape)

    def slice(self, z: float) -> tuple[Ellipses, Polygons]:
        """Section by the plane at height `z` (mm).

        Returns:
            Whole ellipses, of upright cylinders and of those cut between their ends, exact; and
            ellipses cut by an end, as polygons (`phantoms.polygons.cut`).
        """
        whole, parts = [], []
        for value, centre, axes, half, rotation in zip(
            self.value, self.centre, self.axes, self.half_length, self.rotation, strict=True
        ):
            axis, h = rotation[:, 2], float(z) - centre[2]
            level = np.hypot(axis[0], axis[1])
            if level < 1e-12:
                if abs(h) <= half:
                    angle = np.arctan2(rotation[1, 0], rotation[0, 0])
                    whole.append([value, centre[0], centre[1], *axes, angle])
                continue
            if abs(axis[2]) < 1e-9:  # lies in the plane: a rectangle
                parts += _lying(value, centre, axes, half, rotation, h)
                continue
            # The mantle: |diag(1/axes) R2' (r - c)| <= 1 with R2 the first two columns.
            form = (rotation[:, :2] / axes**2) @ rotation[:, :2].T
            shift = -h * np.linalg.solve(form[:2, :2], form[:2, 2])
            eigen, basis = np.linalg.eigh(form[:2, :2])
            a, b = eigen**-0.5
            angle = np.arctan2(basis[1, 0], basis[0, 0])
            x, y = centre[:2] + shift
            # The ends: |axis . (r - c)| <= half, seen from the section's centre.
            offset, turn = float(axis[:2] @ shift + axis[2] * h), np.arctan2(axis[1], axis[0])
            lines = [(turn, (half - offset) / level), (turn + np.pi, (half + offset) / level)]
            reach = np.hypot(a * np.cos(turn - angle), b * np.sin(turn - angle))
            if min(distance for _, distance in lines) >= reach:
                whole.append([value, x, y, a, b, angle])
            elif len(corners := cut(x, y, a, b, angle, lines)) >= 3:
                parts.append((float(value), corners))
        return Ellipses.of(whole), Polygons.of(parts)


def _lying(
    value: float, centre: Float, axes: Float, half: float, rotation: Float, h: float
) -> list[tuple[float, Float]]:
    """The section of a cylinder whose axis lies in the plane."""
    # Across: points s of the horizontal normal with |diag(1/axes) R2' (s n + h e_z)| <= 1.
    n = np.array([-rotation[1, 2], rotation[0, 2], 0.0])
    p, q = rotation[2, :2] * h / axes, (n @ rotation[:, :2]) / axes
    middle = -(p @ q) / (q @ q)
    miss = np.square(p + middle * q).sum()
    if miss >= 1:
        return []
    wide = np.sqrt((1 - miss) / (q @ q))
    turn = np.arctan2(rotation[1, 2], rotation[0, 2])
    x, y = centre[:2] + middle * n[:2]
    return [(float(value), Polygons.boxes([1, x, y, half, wide, turn]).vertices[0])]
