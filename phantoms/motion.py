r"""Motion during a scan: every view, or every phase encoding, sees the object in another pose.

A pose maps a point of the object to :math:`A r + s`.  Then, in closed form,

.. math::
    \int f(A^{-1}(o + t d - s))\,dt = \frac{1}{|A^{-1} d|} \int f(A^{-1}(o - s) + t d')\,dt,
    \qquad
    F_A(k) = |\det A|\, e^{-2\pi i k\cdot s}\, F(A^T k)

with the unit vector :math:`d' \parallel A^{-1} d`.

References:
    Lujan, Larsen, Balter and Ten Haken, Med. Phys. 26 (1999) 715: breathing as an even power of a
    cosine, which rests longer when breathed out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from inverse.errors import GeometryError
from inverse.measurement import Measurement
from inverse.operators.mri import CartesianMRI, MaskKind, cartesian_mask
from inverse.operators.noise import add_gaussian, generator
from phantoms.scene import Section
from phantoms.shapes import Float, fft_samples
from phantoms.simulate import Simulation

__all__ = ["Motion", "Moving", "breath", "simulate_mri_analytic"]


def breath(time_s: ArrayLike, period_s: float = 4.0, rest: int = 3) -> Float:
    r"""Depth of breath, :math:`\sin^{2n}(\pi t/\tau)`: 0 breathed out, 1 breathed in.

    Args:
        time_s: times.
        period_s: length of a breath, tau.
        rest: n; larger rests longer.

    Raises:
        GeometryError: a period that is not positive, or n below 1.
    """
    if not period_s > 0 or rest < 1:
        raise GeometryError(
            f"A breath needs a period above 0 s and a power of 1 or more, expected that, got "
            f"{period_s} s and {rest}."
        )
    return np.asarray(np.sin(np.pi * np.asarray(time_s, np.float64) / period_s) ** (2 * rest))


@dataclass(frozen=True, eq=False)
class Motion:
    """Poses in the order of the scan.

    Args:
        matrix: (n, 2, 2) A of each pose.
        shift: (n, 2) s of each pose, (x, y) in mm.

    Raises:
        GeometryError: shapes that do not match, or a matrix without inverse.
    """

    matrix: Float
    shift: Float

    def __post_init__(self) -> None:
        n = len(self.shift)
        if np.shape(self.matrix) != (n, 2, 2) or np.shape(self.shift) != (n, 2) or not n:
            raise GeometryError(
                f"Motion has matrices {np.shape(self.matrix)} and shifts {np.shape(self.shift)}, "
                "expected (n, 2, 2) and (n, 2)."
            )
        if not (np.abs(np.linalg.det(self.matrix)) > 1e-6).all():
            raise GeometryError("Motion has a matrix without inverse, expected invertible poses.")

    @classmethod
    def rigid(cls, angle: ArrayLike, x: ArrayLike, y: ArrayLike) -> Motion:
        """Turns by `angle` (rad, from +x towards +y) about the origin, then shifts by (x, y) mm.

        Args:
            angle: (n,) or a number.
            x: (n,) or a number, mm.
            y: (n,) or a number, mm.
        """
        t, u, v = np.broadcast_arrays(
            *(np.atleast_1d(np.asarray(a, float)) for a in (angle, x, y))
        )
        c, s = np.cos(t), np.sin(t)
        matrix = np.stack([np.stack([c, -s], -1), np.stack([s, c], -1)], -2)
        return cls(matrix, np.stack([u, v], -1))

    @classmethod
    def breathing(
        cls, depth: ArrayLike, rise_mm: float = 10.0, back_y_mm: float = 100.0
    ) -> Motion:
        """The chest's front rises and its back stays: a stretch along y about the back.

        Args:
            depth: (n,) 0 to 1, of `breath`.
            rise_mm: how far a point as far before the origin as the back is behind it moves.
            back_y_mm: where the back is.
        """
        grow = 1 + np.atleast_1d(np.asarray(depth, float)) * rise_mm / (2 * back_y_mm)
        matrix = np.zeros((len(grow), 2, 2))
        matrix[:, 0, 0], matrix[:, 1, 1] = 1, grow
        return cls(matrix, np.stack([np.zeros_like(grow), (1 - grow) * back_y_mm], -1))

    def __len__(self) -> int:
        return len(self.shift)


@dataclass(frozen=True, eq=False)
class Moving:
    """A section in motion, to be scanned in place of the section itself.

    Views are poses for line integrals, columns (phase encodings) for k-space; the image is that
    of the first pose.

    Args:
        section: the object in its rest pose.
        motion: one pose a view or column.
        order: position of each column in the scan; by default from left to right.
    """

    section: Section
    motion: Motion
    order: Sequence[int] | None = None

    @property
    def mass(self) -> float:
        """Integral over the plane in the first pose."""
        return float(abs(np.linalg.det(self.motion.matrix[0])) * self.section.mass)

    def scaled(self, factor: float) -> Moving:
        """The same with values multiplied by `factor`."""
        return Moving(self.section.scaled(factor), self.motion, self.order)

    def at(self, x: ArrayLike, y: ArrayLike) -> Float:
        """Values at points in the first pose."""
        p = np.stack(np.broadcast_arrays(np.asarray(x, float), np.asarray(y, float)), -1)
        back = (p - self.motion.shift[0]) @ np.linalg.inv(self.motion.matrix[0]).T
        return self.section.at(back[..., 0], back[..., 1])

    def image(
        self, shape: tuple[int, int], pixel_mm: float | tuple[float, float], supersample: int = 4
    ) -> NDArray[np.float32]:
        """Area averages of the object in its first pose; where moved by 8 x 8 points a pixel."""
        if np.array_equal(self.motion.matrix[0], np.eye(2)) and not self.motion.shift[0].any():
            return self.section.image(shape, pixel_mm, supersample)
        py, px = (pixel_mm, pixel_mm) if isinstance(pixel_mm, int | float) else pixel_mm
        n, (h, w) = 8, shape
        y = (np.arange(h * n) - (h * n - 1) / 2) * (py / n)
        x = (np.arange(w * n) - (w * n - 1) / 2) * (px / n)
        fine = self.at(x[None, :], y[:, None])
        return fine.reshape(h, n, w, n).mean(axis=(1, 3)).astype(np.float32)

    def line_integrals(self, origin: ArrayLike, direction: ArrayLike) -> Float:
        """Integrals along lines (views, ..., 2), each view in its pose.

        Raises:
            GeometryError: as many views as poses are not given.
        """
        o, d = np.broadcast_arrays(np.asarray(origin, float), np.asarray(direction, float))
        self._count(len(o), "views")
        back = np.linalg.inv(self.motion.matrix)
        flat_o, flat_d = o.reshape(len(o), -1, 2), d.reshape(len(d), -1, 2)
        flat_d = flat_d / np.linalg.norm(flat_d, axis=-1, keepdims=True)
        moved_o = (flat_o - self.motion.shift[:, None]) @ np.swapaxes(back, 1, 2)
        moved_d = flat_d @ np.swapaxes(back, 1, 2)
        values = self.section.line_integrals(moved_o, moved_d)
        return (values / np.linalg.norm(moved_d, axis=-1)).reshape(o.shape[:-1])

    def kspace(self, kx: ArrayLike, ky: ArrayLike) -> NDArray[np.complex128]:
        """Continuous Fourier transform at (..., columns) frequencies, each column in its pose.

        Raises:
            GeometryError: as many columns as poses are not given.
        """
        u, v = np.broadcast_arrays(np.asarray(kx, float), np.asarray(ky, float))
        self._count(u.shape[-1], "columns")
        order = np.arange(len(self.motion)) if self.order is None else np.asarray(self.order)
        a, s = self.motion.matrix[order], self.motion.shift[order]
        turned = (a[:, 0, 0] * u + a[:, 1, 0] * v, a[:, 0, 1] * u + a[:, 1, 1] * v)
        phase = np.exp(-2j * np.pi * (u * s[:, 0] + v * s[:, 1]))
        return np.abs(np.linalg.det(a)) * phase * self.section.kspace(*turned)

    def fft(
        self, shape: tuple[int, int], pixel_mm: float | tuple[float, float]
    ) -> NDArray[np.complex64]:
        """Samples of the moving object's transform; `phantoms.shapes.fft_samples`."""
        return fft_samples(self.kspace, shape, pixel_mm)

    def _count(self, got: int, what: str) -> None:
        if got != len(self.motion):
            raise GeometryError(
                f"The scan has {got} {what}, expected {len(self.motion)}, one for each pose."
            )


def simulate_mri_analytic(
    sections: Sequence[Section],
    shape: tuple[int, int],
    pixel_mm: float | tuple[float, float],
    *,
    acceleration: float = 4.0,
    kind: MaskKind = "gaussian1d",
    centre_fraction: float = 0.08,
    noise: float = 0.01,
    seed: int = 0,
) -> Simulation:
    """An undersampled single-coil acquisition of analytic slices: no grid at all.

    Args:
        sections: slices, still or `Moving`.
        shape: rows and columns.
        pixel_mm: pixel size, or (row, column) sizes.
        acceleration: grid size over measured samples.
        kind: sampling pattern; see :func:`inverse.operators.mri.cartesian_mask`.
        centre_fraction: its fully sampled centre.
        noise: std of the real and the imaginary part of a sample, relative to the 99th percentile
            of all images.
        seed: seed of the pattern and of the noise.

    Returns:
        Data and truth, complex area averages on the grid.

    Raises:
        GeometryError: no slices, an impossible grid or pattern, a noise level that is not
            positive, or slices without signal.
    """
    if not sections:
        raise GeometryError("simulate_mri_analytic needs at least one slice, expected some.")
    pixel: tuple[float, float]
    pixel = (pixel_mm, pixel_mm) if isinstance(pixel_mm, int | float) else pixel_mm
    truth = torch.from_numpy(np.stack([s.image(shape, pixel) for s in sections]))
    full = torch.from_numpy(np.stack([s.fft(shape, pixel) for s in sections]))
    std = noise * float(np.percentile(truth.abs().numpy(), 99.0))
    if not std > 0:
        raise GeometryError(
            f"The noise level is {noise} of a signal that may be empty, expected both above 0."
        )
    mask = cartesian_mask(shape, acceleration, centre_fraction, kind, seed)
    seeds = [generator(seed, k) for k in range(len(sections))]
    data = torch.where(mask, add_gaussian(full, std, seeds), 0)
    provenance: dict[str, Any] = {
        "simulation": "Fourier transform of the object in closed form",
        "motion": any(isinstance(s, Moving) for s in sections),
        "mask": kind,
        "centre_fraction": centre_fraction,
        "acceleration": acceleration,
        "noise": noise,
        "seed": seed,
    }
    measurement = Measurement(
        CartesianMRI(mask), data, torch.tensor(std), "MR", pixel, provenance=provenance
    )
    return Simulation(measurement, truth.to(torch.complex64))
