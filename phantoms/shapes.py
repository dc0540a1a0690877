"""Ellipses and ellipsoids: images, line integrals and Fourier transforms in closed form.

A phantom is a sum of values on ellipses (ellipsoids), `f(r) = sum_e value_e 1[r in e]`, so that
image, ray sums and k-space are all known without a grid. Data made here never come from the
operator that reconstructs them.

Coordinates are millimetres, origin at the grid centre: x along columns, y along rows (downwards),
z along slices. Pixel (i, j) is centred at `((j - (W-1)/2) px, (i - (H-1)/2) py)`.

References:
    Shepp and Logan, "The Fourier reconstruction of a head section", IEEE TNS 21 (1974).
    Kak and Slaney, "Principles of Computerized Tomographic Imaging" (1988), ch. 3.
    Koay, Sarlls and Özarslan, "Three-dimensional analytical magnetic resonance imaging phantom
    in the Fourier domain", MRM 58 (2007): Fourier transform of ellipsoids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import j1

from inverse.errors import GeometryError

__all__ = [
    "Ellipses",
    "Ellipsoids",
    "fft_samples",
    "rotation_matrix",
    "shepp_logan",
    "shepp_logan_3d",
    "shepp_logan_schabel",
]

Float = NDArray[np.float64]

_COLUMNS = ("value", "x", "y", "a", "b", "angle")
_CHUNK = 1 << 21  # elements of the largest temporary array: 16 MiB in float64


class _Shapes:
    """What ellipses and ellipsoids share: stored arrays with the shape index first."""

    value: Float

    def _store(self, **trailing: tuple[int, ...]) -> None:
        """Freeze every field as a read-only float64 array of shape (n, *trailing)."""
        n = np.size(self.value)
        for name, tail in trailing.items():
            array = np.array(getattr(self, name), dtype=np.float64)
            if array.size == 0 and n == 0:
                array = array.reshape(0, *tail)
            if not tail:
                array = array.reshape(-1)
            if array.shape != (n, *tail):
                raise GeometryError(
                    f"{type(self).__name__}.{name} has shape {array.shape}, expected "
                    f"{(n, *tail)}; give one entry for each value."
                )
            if not np.isfinite(array).all():
                raise GeometryError(
                    f"{type(self).__name__}.{name} has non-finite entries; expected finite "
                    "numbers."
                )
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    def _positive(self, name: str) -> None:
        array = getattr(self, name)
        if array.size and array.min() <= 0:
            raise GeometryError(
                f"{type(self).__name__}.{name} holds {array.min():g} mm, expected semi-axes "
                "above 0; drop the empty shapes."
            )

    def __len__(self) -> int:
        return int(self.value.size)


@dataclass(frozen=True, eq=False)
class Ellipses(_Shapes):
    """Sum of constant ellipses in the plane.

    Args:
        value: (n,) additive value inside each ellipse.
        x: (n,) centre along columns, mm.
        y: (n,) centre along rows (downwards), mm.
        a: (n,) semi-axis along `(cos angle, sin angle)`, mm.
        b: (n,) semi-axis along `(-sin angle, cos angle)`, mm.
        angle: (n,) radians, from +x towards +y.

    Raises:
        GeometryError: shapes differ, entries are not finite, or a semi-axis is not positive.
    """

    value: Float
    x: Float
    y: Float
    a: Float
    b: Float
    angle: Float

    def __post_init__(self) -> None:
        self._store(value=(), x=(), y=(), a=(), b=(), angle=())
        self._positive("a")
        self._positive("b")

    @classmethod
    def of(cls, rows: ArrayLike) -> Self:
        """From rows (value, x, y, a, b, angle)."""
        return cls(*np.asarray(rows, dtype=np.float64).reshape(-1, 6).T)

    def __add__(self, other: Ellipses) -> Ellipses:
        return Ellipses(
            *(np.concatenate([getattr(self, name), getattr(other, name)]) for name in _COLUMNS)
        )

    def scaled(self, factor: float) -> Ellipses:
        """The same ellipses with their values multiplied by `factor`."""
        return Ellipses(self.value * factor, self.x, self.y, self.a, self.b, self.angle)

    @cached_property
    def _form(self) -> tuple[Float, Float, Float]:
        """A, B, C of the boundary `A u^2 + 2 B u v + C v^2 = 1`, (u, v) from the centre."""
        c, s = np.cos(self.angle), np.sin(self.angle)
        a2, b2 = self.a**-2, self.b**-2
        return c * c * a2 + s * s * b2, c * s * (a2 - b2), s * s * a2 + c * c * b2

    @property
    def mass(self) -> float:
        """Integral over the plane, `sum value pi a b`, value times mm^2."""
        return float(np.sum(self.value * np.pi * self.a * self.b))

    def at(self, x: ArrayLike, y: ArrayLike) -> Float:
        """Values at points.

        Args:
            x: (*points,) mm.
            y: (*points,) mm.

        Returns:
            (*points,) sum of the values of the ellipses that hold the point.
        """
        px, py = np.broadcast_arrays(np.asarray(x, np.float64), np.asarray(y, np.float64))
        out = np.zeros(px.size)
        qa, qb, qc = self._form
        for part in _chunks(px.size, len(self)):
            u = px.reshape(-1)[part, None] - self.x
            v = py.reshape(-1)[part, None] - self.y
            out[part] = (qa * u * u + 2 * qb * u * v + qc * v * v <= 1) @ self.value
        return out.reshape(px.shape)

    def image(
        self,
        shape: tuple[int, int],
        pixel_mm: float | tuple[float, float],
        supersample: int = 4,
    ) -> NDArray[np.float32]:
        """Area average of the phantom over each pixel.

        Along a row the covered length of a pixel is exact; across a row it is integrated by
        Gauss-Legendre nodes in phi, where `y = y_e + Y sin(phi)` runs over the part of the row
        that the ellipse reaches. The chord is then smooth, `x_e - (B/A) v +- cos(phi)/sqrt(A)`,
        and the mass of an ellipse inside the grid is right however small it is.

        Args:
            shape: rows H and columns W.
            pixel_mm: pixel size in mm, or (row, column) sizes.
            supersample: nodes per ellipse and row.

        Returns:
            (H, W) float32.

        Raises:
            GeometryError: an empty grid, a pixel size or `supersample` that is not positive.
        """
        height, width, py, px = _grid(shape, pixel_mm)
        if supersample < 1:
            raise GeometryError(f"supersample is {supersample}, expected 1 or more nodes a row.")
        qa, qb, _ = self._form
        reach = self.a * self.b * np.sqrt(qa)  # Y: half height of the bounding box
        first = np.floor((self.y - reach) / py + height / 2).astype(np.int64).clip(0, height)
        last = np.ceil((self.y + reach) / py + height / 2).astype(np.int64).clip(0, height)
        half_width = self.a * self.b * np.sqrt(self._form[2])
        outside = np.abs(self.x) - half_width > width * px / 2
        rows = np.where(outside, 0, np.maximum(last - first, 0))
        node, weight = np.polynomial.legendre.leggauss(supersample)

        # Differences along the row are scattered, then summed: an interval [l, r) touches only
        # the two pixels at either end.
        stride = width + 2
        difference = np.zeros(height * stride)
        ends = np.cumsum(rows)
        for start, stop in _runs(ends, _CHUNK // (4 * supersample)):
            count = rows[start:stop]
            e = np.repeat(np.arange(start, stop), count)
            base = np.cumsum(count) - count
            i = first[e] + np.arange(e.size) - np.repeat(base, count)
            low = np.arcsin((((i - height / 2) * py - self.y[e]) / reach[e]).clip(-1, 1))
            high = np.arcsin((((i + 1 - height / 2) * py - self.y[e]) / reach[e]).clip(-1, 1))
            middle, half = (low + high)[:, None] / 2, (high - low)[:, None] / 2
            phi = middle + half * node
            cos, v = np.cos(phi), reach[e, None] * np.sin(phi)
            w = (self.value * reach / py)[e, None] * half * weight * cos
            # The row's area is known: int cos^2 = h - sin(2h)/2 + cos^2(m) sin(2h) over m -+ h.
            # The first difference cancels on short arcs, where its series holds.
            cap = np.where(half < 0.02, half**3 * 2 / 3, half - np.sin(2 * half) / 2)
            area = cap + np.cos(middle) ** 2 * np.sin(2 * half)
            nodes = half * np.sum(weight * cos * cos, axis=1, keepdims=True)
            w *= np.divide(area, nodes, out=np.zeros_like(area), where=nodes > 0)
            x = self.x[e, None] - (qb / qa)[e, None] * v
            chord = cos / np.sqrt(qa)[e, None]
            row = np.broadcast_to(i[:, None] * stride, w.shape)
            for edge, sign in ((x - chord, 1.0), (x + chord, -1.0)):
                t = (edge / px + width / 2).clip(0, width)
                j = np.floor(t)
                at = (row + j.astype(np.int64)).reshape(-1)
                late = (sign * w * (t - j)).reshape(-1)
                early = (sign * w).reshape(-1) - late
                difference += np.bincount(at, early, difference.size)
                difference[1:] += np.bincount(at, late, difference.size)[:-1]
        image = np.cumsum(difference.reshape(height, stride), axis=1)[:, :width]
        return image.astype(np.float32)

    def line_integrals(self, origin: ArrayLike, direction: ArrayLike) -> Float:
        """Integrals along whole lines, in closed form.

        For a unit direction d through o, with c the centre and Q the quadratic form of an
        ellipse, the chord is `2 sqrt(d'Qd - ((o - c) x d)^2 / (a b)^2) / d'Qd`.

        Args:
            origin: (*rays, 2) any point (x, y) on the line, mm.
            direction: (*rays, 2), of any length above 0.

        Returns:
            (*rays,) float64, value times mm.
        """
        o, d, shape = _rays(origin, direction, 2)
        qa, qb, qc = self._form
        form = np.stack([qa, 2 * qb, qc])
        centre = np.stack([self.y, -self.x])  # d . (y, -x) = -(c x d)
        inverse_area = 1 / (self.a * self.b)
        out = np.zeros(o.shape[0])
        for part in _chunks(o.shape[0], len(self)):
            dx, dy = d[part].T
            squared = np.stack([dx * dx, dx * dy, dy * dy], axis=1) @ form
            offset = d[part] @ centre
            offset += (o[part, 0] * dy - o[part, 1] * dx)[:, None]
            offset *= inverse_area
            root = squared - offset * offset
            np.maximum(root, 0, out=root)
            np.sqrt(root, out=root)
            root /= squared
            out[part] = root @ (2 * self.value)
        return out.reshape(shape)

    def kspace(self, kx: ArrayLike, ky: ArrayLike) -> NDArray[np.complex128]:
        """Continuous Fourier transform `F(k) = int f(r) exp(-2 pi i k.r) dr`.

        One ellipse gives `value a b J1(2 pi q)/q exp(-2 pi i k.c)`, with q the length of k in
        the ellipse's axes, `q^2 = (a k_a)^2 + (b k_b)^2`; the limit at k = 0 is its area.

        Args:
            kx: (*k,) cycles per mm along columns.
            ky: (*k,) cycles per mm along rows.

        Returns:
            (*k,) complex128, value times mm^2.
        """
        u, v = np.broadcast_arrays(np.asarray(kx, np.float64), np.asarray(ky, np.float64))
        shape, u, v = u.shape, u.reshape(-1), v.reshape(-1)
        c, s = np.cos(self.angle), np.sin(self.angle)
        axes = np.stack([np.stack([self.a * c, -self.b * s]), np.stack([self.a * s, self.b * c])])
        mass = self.value * self.a * self.b * np.pi
        out = np.zeros(u.size, dtype=np.complex128)
        for part in _chunks(u.size, 2 * len(self)):
            k = np.stack([u[part], v[part]], axis=1)
            argument = 2 * np.pi * np.hypot(k @ axes[:, 0], k @ axes[:, 1])
            phase = -2 * np.pi * (k @ np.stack([self.x, self.y]))
            amplitude = _jinc(argument) * mass
            out[part].real = np.sum(amplitude * np.cos(phase), axis=1)
            out[part].imag = np.sum(amplitude * np.sin(phase), axis=1)
        return out.reshape(shape)

    def fft(
        self, shape: tuple[int, int], pixel_mm: float | tuple[float, float]
    ) -> NDArray[np.complex64]:
        """Samples that the centred orthonormal FFT of a fine image tends to; `fft_samples`."""
        return fft_samples(self.kspace, shape, pixel_mm)


@dataclass(frozen=True, eq=False)
class Ellipsoids(_Shapes):
    """Sum of constant ellipsoids in space.

    Args:
        value: (n,) additive value inside each ellipsoid.
        centre: (n, 3) centre (x, y, z), mm.
        axes: (n, 3) semi-axes, mm.
        rotation: (n, 3, 3) orthogonal matrices; column k is the direction of semi-axis k.

    Raises:
        GeometryError: shapes differ, entries are not finite, a semi-axis is not positive, or a
            matrix is not orthogonal.
    """

    value: Float
    centre: Float
    axes: Float
    rotation: Float

    def __post_init__(self) -> None:
        self._store(value=(), centre=(3,), axes=(3,), rotation=(3, 3))
        self._positive("axes")
        square = np.swapaxes(self.rotation, 1, 2) @ self.rotation
        if len(self) and np.abs(square - np.eye(3)).max() > 1e-6:
            raise GeometryError(
                "Ellipsoids.rotation holds a matrix that is not orthogonal; expected R'R = 1, "
                "as rotation_matrix gives."
            )

    def __add__(self, other: Ellipsoids) -> Ellipsoids:
        return Ellipsoids(
            *(
                np.concatenate([getattr(self, name), getattr(other, name)])
                for name in ("value", "centre", "axes", "rotation")
            )
        )

    def scaled(self, factor: float) -> Ellipsoids:
        """The same ellipsoids with their values multiplied by `factor`."""
        return Ellipsoids(self.value * factor, self.centre, self.axes, self.rotation)

    @property
    def mass(self) -> float:
        """Integral over space, `sum value (4/3) pi abc`, value times mm^3."""
        return float(np.sum(self.value * np.prod(self.axes, axis=1)) * 4 / 3 * np.pi)

    @cached_property
    def _section(self) -> tuple[Float, Float, Float, Float, Float]:
        """Constants of the sections z = const: half height, unit semi-axes, angle, drift.

        With `Q = R diag(axes^-2) R'` in blocks (Q2, q; q', q33), the section at height h above
        the centre is `(p - p0)'Q2 (p - p0) = 1 - h^2/Z^2`, `p0 = -h Q2^-1 q` and
        `Z^2 = (Q^-1)_33`.
        """
        form = (self.rotation / self.axes[:, None, :] ** 2) @ np.swapaxes(self.rotation, 1, 2)
        height = np.sqrt(np.sum((self.rotation[:, 2] * self.axes) ** 2, axis=1))
        p, q, r = form[:, 0, 0], form[:, 0, 1], form[:, 1, 1]
        determinant = p * r - q * q
        drift = -np.stack(
            [
                r * form[:, 0, 2] - q * form[:, 1, 2],
                p * form[:, 1, 2] - q * form[:, 0, 2],
            ]
        ) / np.where(determinant > 0, determinant, 1)
        # Eigenvalues of Q2 are mean -+ radius; the smaller belongs to the longer semi-axis, and
        # as determinant / larger it does not cancel in needles.
        larger = (p + r) / 2 + np.hypot((p - r) / 2, q)
        smaller = determinant / larger
        angle = 0.5 * np.arctan2(-2 * q, r - p)
        return height, smaller**-0.5, larger**-0.5, angle, drift

    def slice(self, z: float) -> Ellipses:
        """Exact section by the plane at height `z` (mm)."""
        height, long, short, angle, drift = self._section
        h = float(z) - self.centre[:, 2]
        keep = np.flatnonzero(np.abs(h) < height)
        h = h[keep]
        scale = np.sqrt(1 - (h / height[keep]) ** 2)
        # A plane that grazes a tip within rounding cuts nothing.
        cut = scale > 1e-9
        keep, h, scale = keep[cut], h[cut], scale[cut]
        return Ellipses(
            self.value[keep],
            self.centre[keep, 0] + h * drift[0, keep],
            self.centre[keep, 1] + h * drift[1, keep],
            long[keep] * scale,
            short[keep] * scale,
            angle[keep],
        )

    def slab(self, z: float, thickness: float, sub_slices: int) -> Ellipses:
        """Mean of `sub_slices` equidistant sections of a slab: a slice with a thickness.

        Args:
            z: height of the slab's middle, mm.
            thickness: mm.
            sub_slices: number of sections.
        """
        if sub_slices < 1:
            raise GeometryError(f"sub_slices is {sub_slices}, expected 1 or more sections.")
        heights = z + thickness * ((np.arange(sub_slices) + 0.5) / sub_slices - 0.5)
        cuts = [self.slice(h) for h in heights]
        return Ellipses(
            *(np.concatenate([getattr(cut, name) for cut in cuts]) for name in _COLUMNS)
        ).scaled(1 / sub_slices)

    def volume(
        self,
        shape: tuple[int, int, int],
        spacing: tuple[float, float, float],
        supersample: int = 4,
        *,
        z_positions: Sequence[float] | None = None,
        thickness: float | None = None,
        sub_slices: int = 1,
    ) -> NDArray[np.float32]:
        """Stack of slices.

        Args:
            shape: slices, rows, columns.
            spacing: (dz, dy, dx) mm.
            supersample: nodes per ellipse and row, see `Ellipses.image`.
            z_positions: slice heights in mm; by default equidistant about z = 0, ascending.
            thickness: slice thickness in mm that `sub_slices` sections average; by default dz.
            sub_slices: sections per slice; 1 is an infinitely thin slice.

        Returns:
            (Z, Y, X) float32.

        Raises:
            GeometryError: an empty grid, or as many heights as slices are not given.
        """
        slices, rows, columns = shape
        dz, dy, dx = spacing
        if z_positions is None:
            z_positions = [(k - (slices - 1) / 2) * dz for k in range(slices)]
        if len(z_positions) != slices:
            raise GeometryError(
                f"z_positions has {len(z_positions)} heights, expected {slices}, one a slice."
            )
        out = np.empty((slices, rows, columns), dtype=np.float32)
        width = dz if thickness is None else thickness
        for k, z in enumerate(z_positions):
            cut = self.slab(z, width, sub_slices)
            out[k] = cut.image((rows, columns), (dy, dx), supersample)
        return out

    def at(self, points: ArrayLike) -> Float:
        """Values at points.

        Args:
            points: (*points, 3) of (x, y, z) mm.

        Returns:
            (*points,) sum of the values of the ellipsoids that hold the point.
        """
        array = np.asarray(points, dtype=np.float64)
        flat = array.reshape(-1, 3)
        # |W r - W c| <= 1 with W = diag(1/axes) R'.
        whiten = np.swapaxes(self.rotation / self.axes[:, None, :], 1, 2)
        centre = np.einsum("nij,nj->ni", whiten, self.centre)
        out = np.zeros(flat.shape[0])
        for part in _chunks(flat.shape[0], 3 * len(self)):
            u = np.einsum("nij,pj->pni", whiten, flat[part]) - centre
            out[part] = (np.einsum("pni,pni->pn", u, u) <= 1) @ self.value
        return out.reshape(array.shape[:-1])

    def line_integrals(self, origin: ArrayLike, direction: ArrayLike) -> Float:
        """Integrals along whole lines, in closed form.

        In the axes where an ellipsoid is the unit ball, a line `u + t v` has the chord
        `2 sqrt(|v|^2 - |u x v|^2) / |v|^2` for a direction of unit length in mm.

        Args:
            origin: (*rays, 3) any point (x, y, z) on the line, mm.
            direction: (*rays, 3), of any length above 0.

        Returns:
            (*rays,) float64, value times mm.
        """
        o, d, shape = _rays(origin, direction, 3)
        whiten = np.swapaxes(self.rotation / self.axes[:, None, :], 1, 2)
        centre = np.einsum("nij,nj->in", whiten, self.centre)
        matrix = np.moveaxis(whiten, 0, 2)  # (i, j, n)
        out = np.zeros(o.shape[0])
        for part in _chunks(o.shape[0], 6 * len(self)):
            u = [o[part] @ matrix[i] - centre[i] for i in range(3)]
            v = [d[part] @ matrix[i] for i in range(3)]
            squared = v[0] ** 2 + v[1] ** 2 + v[2] ** 2
            cross = (
                (u[1] * v[2] - u[2] * v[1]) ** 2
                + (u[2] * v[0] - u[0] * v[2]) ** 2
                + (u[0] * v[1] - u[1] * v[0]) ** 2
            )
            out[part] = (np.sqrt(np.maximum(squared - cross, 0)) / squared) @ (2 * self.value)
        return out.reshape(shape)

    def kspace(self, kx: ArrayLike, ky: ArrayLike, kz: ArrayLike) -> NDArray[np.complex128]:
        """Continuous Fourier transform `F(k) = int f(r) exp(-2 pi i k.r) dr`.

        One ellipsoid gives `value (4/3) pi abc g(2 pi q) exp(-2 pi i k.c)` with q the length of k
        in the ellipsoid's axes and `g(t) = 3 (sin t - t cos t)/t^3`, 1 at t = 0 (Koay 2007).

        Args:
            kx: (*k,) cycles per mm along columns.
            ky: (*k,) cycles per mm along rows.
            kz: (*k,) cycles per mm along slices.

        Returns:
            (*k,) complex128, value times mm^3.
        """
        parts = np.broadcast_arrays(*(np.asarray(k, np.float64) for k in (kx, ky, kz)))
        shape, k = parts[0].shape, np.stack([part.reshape(-1) for part in parts], axis=1)
        scaled = np.moveaxis(self.rotation * self.axes[:, None, :], 0, 2)  # (3, axis, n)
        mass = self.value * np.prod(self.axes, axis=1) * (4 / 3 * np.pi)
        out = np.zeros(len(k), dtype=np.complex128)
        for part in _chunks(len(k), 4 * len(self)):
            along = [k[part] @ scaled[:, j] for j in range(3)]
            t = 2 * np.pi * np.sqrt(along[0] ** 2 + along[1] ** 2 + along[2] ** 2)
            phase = np.exp(-2j * np.pi * (k[part] @ self.centre.T))
            out[part] = (_ball(t) * phase) @ mass
        return out.reshape(shape)


def fft_samples(
    kspace: Callable[[Float, Float], NDArray[np.complex128]],
    shape: tuple[int, int],
    pixel_mm: float | tuple[float, float],
) -> NDArray[np.complex64]:
    """Samples of a Fourier transform that the centred orthonormal FFT of a fine image tends to.

    The discrete transform sums over pixels instead of integrating, hence the factor
    `1/(px py sqrt(H W))`; and it counts from pixel N//2, while coordinates count from the grid
    centre (N-1)/2, hence half a pixel of phase for even N. Unlike the FFT of an image, these
    samples are those of a continuous object: band-limiting them gives Gibbs ringing, as a scanner
    does.

    Args:
        kspace: the continuous transform of (kx, ky) in cycles per mm.
        shape: rows H and columns W.
        pixel_mm: pixel size in mm, or (row, column) sizes.

    Returns:
        (H, W) complex64; zero frequency at (H//2, W//2).
    """
    height, width, py, px = _grid(shape, pixel_mm)
    ky = ((np.arange(height) - height // 2) / (height * py))[:, None]
    kx = ((np.arange(width) - width // 2) / (width * px))[None, :]
    x, y = px * ((width - 1) / 2 - width // 2), py * ((height - 1) / 2 - height // 2)
    samples = kspace(kx, ky) * np.exp(-2j * np.pi * (kx * x + ky * y))
    return np.asarray(samples / (px * py * np.sqrt(height * width)), dtype=np.complex64)


def rotation_matrix(
    about_z: ArrayLike, about_y: ArrayLike = 0.0, about_x: ArrayLike = 0.0
) -> Float:
    """`R = Rz(about_z) Ry(about_y) Rx(about_x)`, right-handed rotations.

    Args:
        about_z: (*b,) radians.
        about_y: (*b,) radians.
        about_x: (*b,) radians.

    Returns:
        (*b, 3, 3).
    """
    c, b, a = np.broadcast_arrays(
        *(np.asarray(angle, dtype=np.float64) for angle in (about_z, about_y, about_x))
    )
    ca, sa, cb, sb, cc, sc = np.cos(a), np.sin(a), np.cos(b), np.sin(b), np.cos(c), np.sin(c)
    rows = [
        [cc * cb, cc * sb * sa - sc * ca, cc * sb * ca + sc * sa],
        [sc * cb, sc * sb * sa + cc * ca, sc * sb * ca - cc * sa],
        [-sb, cb * sa, cb * ca],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


# Columns: x, y (upwards, as published), semi-axis a, b, angle in degrees; unit: half the field.
_SHEPP_LOGAN = np.array(
    [
        [0.00, 0.0000, 0.6900, 0.9200, 0],
        [0.00, -0.0184, 0.6624, 0.8740, 0],
        [0.22, 0.0000, 0.1100, 0.3100, -18],
        [-0.22, 0.0000, 0.1600, 0.4100, 18],
        [0.00, 0.3500, 0.2100, 0.2500, 0],
        [0.00, 0.1000, 0.0460, 0.0460, 0],
        [0.00, -0.1000, 0.0460, 0.0460, 0],
        [-0.08, -0.6050, 0.0460, 0.0230, 0],
        [0.00, -0.6060, 0.0230, 0.0230, 0],
        [0.06, -0.6050, 0.0230, 0.0460, 0],
    ]
)
_SHEPP_LOGAN_VALUES = {
    "original": np.array([2.0, -0.98, -0.02, -0.02, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01]),
    "modified": np.array([1.0, -0.8, -0.2, -0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]),
}

# Columns: x, y (upwards), z, semi-axes, angle about z in degrees.
_KAK_SLANEY = np.array(
    [
        [0.00, 0.000, 0.000, 0.6900, 0.920, 0.900, 0],
        [0.00, 0.000, 0.000, 0.6624, 0.874, 0.880, 0],
        [-0.22, 0.000, -0.250, 0.4100, 0.160, 0.210, 108],
        [0.22, 0.000, -0.250, 0.3100, 0.110, 0.220, 72],
        [0.00, 0.350, -0.250, 0.2100, 0.250, 0.500, 0],
        [0.00, 0.100, -0.250, 0.0460, 0.046, 0.046, 0],
        [-0.08, -0.650, -0.250, 0.0460, 0.023, 0.020, 0],
        [0.06, -0.650, -0.250, 0.0460, 0.023, 0.020, 90],
        [0.06, -0.105, 0.625, 0.0560, 0.040, 0.100, 90],
        [0.00, 0.100, 0.625, 0.0560, 0.056, 0.100, 0],
    ]
)
_KAK_SLANEY_VALUES = {
    "original": np.array([2.0, -0.98, -0.02, -0.02, 0.02, 0.02, 0.01, 0.01, 0.02, -0.02]),
    "modified": np.array([1.0, -0.8, -0.2, -0.2, 0.2, 0.2, 0.1, 0.1, 0.2, -0.2]),
}

# Columns: value, semi-axes, x, y (upwards), z, and two angles about z in degrees.
_SCHABEL = np.array(
    [
        [1.0, 0.6900, 0.920, 0.810, 0.00, 0.0000, 0.00, 0, 0],
        [-0.8, 0.6624, 0.874, 0.780, 0.00, -0.0184, 0.00, 0, 0],
        [-0.2, 0.1100, 0.310, 0.220, 0.22, 0.0000, 0.00, -18, 10],
        [-0.2, 0.1600, 0.410, 0.280, -0.22, 0.0000, 0.00, 18, 10],
        [0.1, 0.2100, 0.250, 0.410, 0.00, 0.3500, -0.15, 0, 0],
        [0.1, 0.0460, 0.046, 0.050, 0.00, 0.1000, 0.25, 0, 0],
        [0.1, 0.0460, 0.046, 0.050, 0.00, -0.1000, 0.25, 0, 0],
        [0.1, 0.0460, 0.023, 0.050, -0.08, -0.6050, 0.00, 0, 0],
        [0.1, 0.0230, 0.023, 0.020, 0.00, -0.6060, 0.00, 0, 0],
        [0.1, 0.0230, 0.046, 0.020, 0.06, -0.6050, 0.00, 0, 0],
    ]
)


def shepp_logan(
    field_mm: float, contrast: Literal["original", "modified"] = "modified"
) -> Ellipses:
    """The ten-ellipse head section.

    Args:
        field_mm: side of the square that the tabulated interval [-1, 1] fills, mm.
        contrast: "original" (Shepp and Logan 1974, differences of 1 %) or "modified" (Toft 1996,
            values within [0, 1]).
    """
    x, y, a, b, degrees = _SHEPP_LOGAN.T
    half = _half_field(field_mm)
    return Ellipses(
        _contrast(_SHEPP_LOGAN_VALUES, contrast),
        half * x,
        -half * y,
        half * a,
        half * b,
        -np.deg2rad(degrees),
    )


def shepp_logan_3d(
    field_mm: float, contrast: Literal["original", "modified"] = "modified"
) -> Ellipsoids:
    """The ten-ellipsoid head (Kak and Slaney 1988, table 3.2).

    Args:
        field_mm: side of the cube that the tabulated interval [-1, 1] fills, mm.
        contrast: "original" as tabulated, or "modified" with the differences inside the skull
            raised tenfold and the sum within [0, 1], as Toft did in the plane.
    """
    x, y, z, a, b, c, degrees = _KAK_SLANEY.T
    half = _half_field(field_mm)
    return Ellipsoids(
        _contrast(_KAK_SLANEY_VALUES, contrast),
        half * np.stack([x, -y, z], axis=1),
        half * np.stack([a, b, c], axis=1),
        rotation_matrix(-np.deg2rad(degrees)),
    )


def shepp_logan_schabel(field_mm: float) -> Ellipsoids:
    """The ten-ellipsoid head that is widely used as "modified Shepp-Logan" in three dimensions.

    Toft's contrasts on ellipsoids whose section z = 0 resembles the head in the plane. As in the
    published program the centre turns with its ellipsoid, and the two angles about z add.

    Args:
        field_mm: side of the cube that the tabulated interval [-1, 1] fills, mm.

    Source: M. Schabel, "3D Shepp-Logan phantom", MATLAB Central File Exchange 9416 (2006).
    """
    value, a, b, c, x, y, z, phi, psi = _SCHABEL.T
    half, angle = _half_field(field_mm), np.deg2rad(phi + psi)
    turn = rotation_matrix(-angle)
    centre = np.einsum("nij,nj->ni", turn, np.stack([x, -y, z], axis=1))
    return Ellipsoids(value, half * centre, half * np.stack([a, b, c], axis=1), turn)


def _half_field(field_mm: float) -> float:
    if not field_mm > 0:
        raise GeometryError(f"field_mm is {field_mm}, expected a length above 0 mm.")
    return field_mm / 2


def _contrast(table: dict[str, Float], name: str) -> Float:
    if name not in table:
        raise GeometryError(f"Contrast is {name!r}, expected one of {', '.join(table)}.")
    return table[name]


def _jinc(argument: Float) -> Float:
    """`2 J1(t)/t`, 1 at t = 0."""
    small = argument < 1e-4
    safe = np.where(small, 1.0, argument)
    return np.where(small, 1 - argument**2 / 8, 2 * j1(safe) / safe)


def _ball(argument: Float) -> Float:
    """`3 (sin t - t cos t)/t^3`, 1 at t = 0."""
    small = argument < 1e-2
    t = np.where(small, 1.0, argument)
    series = 1 - argument**2 / 10 * (1 - argument**2 / 28)
    return np.where(small, series, 3 * (np.sin(t) - t * np.cos(t)) / t**3)


def _grid(
    shape: tuple[int, int], pixel_mm: float | tuple[float, float]
) -> tuple[int, int, float, float]:
    height, width = shape
    py, px = (pixel_mm, pixel_mm) if isinstance(pixel_mm, int | float) else pixel_mm
    if height < 1 or width < 1 or not (py > 0 and px > 0):
        raise GeometryError(
            f"Grid of {height} x {width} pixels of {py} x {px} mm, expected one pixel or more "
            "and sizes above 0 mm."
        )
    return height, width, float(py), float(px)


def _rays(
    origin: ArrayLike, direction: ArrayLike, dimension: int
) -> tuple[Float, Float, tuple[int, ...]]:
    """Flat origins (n, dimension), flat unit directions and the shape of the result."""
    o, d = np.broadcast_arrays(
        np.asarray(origin, dtype=np.float64), np.asarray(direction, dtype=np.float64)
    )
    if o.ndim == 0 or o.shape[-1] != dimension:
        raise GeometryError(
            f"Rays have shape {o.shape}, expected a last axis of {dimension} coordinates."
        )
    shape = o.shape[:-1]
    o, d = o.reshape(-1, dimension), d.reshape(-1, dimension)
    length = np.linalg.norm(d, axis=1, keepdims=True)
    if d.size and not length.min() > 0:
        raise GeometryError("A ray has direction 0, expected a length above 0.")
    return o, d / length, shape


def _chunks(rows: int, columns: int) -> Iterable[slice]:
    """Slices over `rows` such that a block of `columns` wide stays small."""
    step = max(1, _CHUNK // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _runs(ends: NDArray[np.int64], limit: int) -> Iterable[tuple[int, int]]:
    """Runs [start, stop) of entries whose counts add up to about `limit` or less."""
    start, total = 0, 0
    while start < ends.size:
        stop = max(start + 1, int(np.searchsorted(ends, total + limit, side="right")))
        yield start, stop
        start, total = stop, int(ends[stop - 1])
