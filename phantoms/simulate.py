r"""Retrospective simulation: what a scanner would have measured of a known image.

Data never come from the operator that reconstructs them (which would flatter every method): CT
rays run through a finer grid or by another kernel, several to a bin, and their intensities are
added as a detector does; noise is that of photon counts.  Where an image leaves no finer grid, as
for k-space computed from an image of the same size, the provenance says so.

Every slice has its own random numbers, seeded from (seed, position in its series), so that a slice
has the same data whatever is simulated along with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inverse.errors import GeometryError, InputError, UnsupportedError
from inverse.measurement import Measurement
from inverse.operators.ct import Geometry, Kernel, RayTransform, matrix_bytes, square_pixel
from inverse.operators.mask import Mask
from inverse.operators.mri import CartesianMRI, MaskKind, cartesian_mask, centred_fft
from inverse.operators.noise import add_gaussian, count_photons, generator, line_integrals
from inverse.operators.units import AIR_HU, MU_WATER, hu_to_mu
from phantoms.shapes import Ellipses

__all__ = [
    "Simulation",
    "area_mean",
    "simulate_ct",
    "simulate_ct_analytic",
    "simulate_inpainting",
    "simulate_mri",
]

Float32 = NDArray[np.float32]

_BLOCK_BYTES = 256 * 2**20  # system matrix held at a time


MODEL_ERROR = 0.01
"""Default std of the discretisation error of line integrals, a little cautious: the RMS found
where a 512 x 512 chest is projected by another kernel than the 256 x 256 reconstruction's is
0.007 (docs/decisions.md)."""


@dataclass(frozen=True)
class Simulation:
    """Simulated data and the image they are of.

    Attributes:
        measurement: the data with the operator that is to reconstruct them.
        truth: the image on that operator's grid, physical units, ``(slices, H, W)``.
    """

    measurement: Measurement
    truth: Tensor


def simulate_ct(
    hu: NDArray[Any],
    pixel_mm: float | tuple[float, float],
    geometry: Geometry,
    *,
    matrix: int = 256,
    photons: float = 1e5,
    model_error: float = MODEL_ERROR,
    seed: int = 0,
    positions: Sequence[int] | None = None,
    mu_water: float = MU_WATER,
) -> Simulation:
    r"""A CT scan of given slices, to be reconstructed on a coarser grid of the same extent.

    With a native grid finer than the reconstruction's, rays measure their length in its pixels,
    two to a bin (each coarse bin's rays see pixels that the reconstruction cannot represent);
    on an equal grid, strips four to a bin do, since its own kernel would be an inverse crime.

    Args:
        hu: slices ``(Z, Y, X)`` in HU; values below air count as air.
        pixel_mm: pixel size of ``hu`` in mm, a number or (row, column).
        geometry: the scan; should cover the grid's diagonal.
        matrix: rows and columns of the reconstruction grid, at most those of ``hu``; slices that
            are not square are first padded with air.
        photons: expected counts of a bin in air.
        model_error: std of what the reconstruction's pixels cannot represent, in line integrals;
            added to the stated noise (not to the data), as a calibration scan would find it.
        seed: seed of the noise.
        positions: position of each slice in its series, for the seeds; default 0, 1, ...
        mu_water: attenuation of water in 1/mm.

    Raises:
        GeometryError: an array that is not a stack, or a matrix finer than the slices.
        InputError: values that are not finite, photons that are not positive.
        UnsupportedError: pixels that are not square.
    """
    volume = _stack(hu, "CT slices")
    fine = square_pixel(pixel_mm)
    padded = _square(np.maximum(volume, np.float32(AIR_HU)), AIR_HU)
    native = padded.shape[-1]
    pixel = native * fine / matrix if matrix > 0 else math.nan
    truth = hu_to_mu(torch.from_numpy(area_mean(padded, matrix)), mu_water)
    image = hu_to_mu(torch.from_numpy(padded), mu_water)
    finer = native > matrix
    kernel: Kernel = "line" if finer else "strip"
    rays = 2 if finer else 4
    values = _project(image, geometry.finer(rays), fine, kernel).unflatten(-1, (-1, rays))
    how = (
        f"{rays} rays a bin ({kernel} kernel) through {native} x {native} pixels of {fine:.4g} mm"
    )
    return _scan(
        values, truth, geometry, pixel, photons, model_error, seed, positions, mu_water, how
    )


def simulate_ct_analytic(
    slices: Sequence[Ellipses],
    pixel_mm: float,
    geometry: Geometry,
    *,
    matrix: int = 256,
    photons: float = 1e5,
    model_error: float = MODEL_ERROR,
    seed: int = 0,
    positions: Sequence[int] | None = None,
    mu_water: float = MU_WATER,
    oversample: int = 4,
) -> Simulation:
    """A CT scan of analytic slices: exact line integrals, no grid at all.

    Args:
        slices: ellipses with values in HU + 1000 (0 is air).
        pixel_mm: pixel size of the reconstruction grid in mm.
        geometry: the scan.
        matrix: rows and columns of the reconstruction grid.
        photons: expected counts of a bin in air.
        model_error: std of what the reconstruction's pixels cannot represent, in line integrals;
            added to the stated noise (not to the data), as a calibration scan would find it.
        seed: seed of the noise.
        positions: position of each slice in its series, for the seeds; default 0, 1, ...
        mu_water: attenuation of water in 1/mm.
        oversample: rays a bin.

    Raises:
        GeometryError: no slices.
        InputError: photons that are not positive.
    """
    if not slices:
        raise GeometryError("simulate_ct_analytic needs at least one slice, got none")
    origin, direction = geometry.rays(oversample)
    factor = mu_water / 1000.0
    values = torch.stack(
        [torch.from_numpy(factor * s.line_integrals(origin, direction)) for s in slices]
    )
    grid = (matrix, matrix)
    truth = torch.from_numpy(np.stack([factor * s.image(grid, pixel_mm) for s in slices]))
    how = f"exact line integrals of ellipses, {oversample} rays a bin"
    return _scan(
        values,
        truth.float(),
        geometry,
        pixel_mm,
        photons,
        model_error,
        seed,
        positions,
        mu_water,
        how,
    )


def simulate_mri(
    image: NDArray[Any],
    pixel_mm: tuple[float, float],
    *,
    acceleration: float = 4.0,
    kind: MaskKind = "gaussian1d",
    centre_fraction: float = 0.08,
    noise: float = 0.01,
    seed: int = 0,
    positions: Sequence[int] | None = None,
) -> Simulation:
    r"""An undersampled single-coil Cartesian acquisition of given images.

    The image itself is the object: its k-space is the FFT on its own grid, which is the
    reconstruction's too, as in most published experiments; real acquisitions are harder, and the
    provenance states it.

    Args:
        image: ``(Z, Y, X)``, real or complex, any unit.
        pixel_mm: (row, column) spacing in mm.
        acceleration: grid size over measured samples.
        kind: sampling pattern; see :func:`inverse.operators.mri.cartesian_mask`.
        centre_fraction: fully sampled centre.
        noise: std of the real and of the imaginary part of a k-space sample, relative to the 99th
            percentile of the magnitude of all images (the transform is orthonormal, so this is
            also the noise of a fully sampled image).
        seed: seed of the pattern and of the noise.
        positions: position of each slice in its series, for the seeds; default 0, 1, ...

    Raises:
        GeometryError: an array that is not a stack, or an impossible pattern.
        InputError: values that are not finite, or a noise level that is not positive.
    """
    volume = _stack(image, "MR images")
    truth = torch.from_numpy(volume).to(torch.complex64)
    std = _noise_std(noise, _level(volume))
    h, w = volume.shape[-2:]
    operator = CartesianMRI(cartesian_mask((h, w), acceleration, centre_fraction, kind, seed))
    noisy = add_gaussian(centred_fft(truth), std, _seeds(seed, len(truth), positions))
    provenance = {
        "simulation": "FFT of the images on their own grid, which is the reconstruction's too",
        "mask": kind,
        "acceleration": acceleration,
        "centre_fraction": centre_fraction,
        "noise": noise,
        "seed": seed,
    }
    data = torch.where(operator.mask, noisy, 0)
    measurement = Measurement(
        operator, data, torch.tensor(std), "MR", pixel_mm, provenance=provenance
    )
    return Simulation(measurement, truth)


def simulate_inpainting(
    image: NDArray[Any],
    pixel_mm: tuple[float, float],
    *,
    modality: Literal["CT", "MR"],
    hole: float = 0.25,
    kind: Literal["square", "pixels"] = "square",
    matrix: int | None = None,
    noise: float = 0.01,
    seed: int = 0,
    positions: Sequence[int] | None = None,
    mu_water: float = MU_WATER,
) -> Simulation:
    """Images with missing pixels, the same in every slice.

    Args:
        image: ``(Z, Y, X)``: HU for CT, signal for MR (real).
        pixel_mm: (row, column) spacing in mm.
        modality: CT images become attenuation in 1/mm.
        hole: side of the square relative to the image's, or the share of missing pixels.
        kind: ``"square"`` a square at the image's centre, ``"pixels"`` pixels drawn at random.
        matrix: area-average to this many rows and columns first (square images); default as is.
        noise: std relative to water (CT) or to the 99th percentile of all images (MR).
        seed: seed of the pixels and of the noise.
        positions: position of each slice in its series, for the seeds; default 0, 1, ...
        mu_water: attenuation of water in 1/mm.

    Raises:
        GeometryError: an array that is not a stack, or a hole that leaves nothing or is none.
        InputError: values that are not finite, or a noise level that is not positive.
        UnsupportedError: complex images, or another kind.
    """
    volume = _stack(image, f"{modality} images")
    if np.iscomplexobj(volume):
        raise UnsupportedError("inpainting serves real images; pass magnitudes")
    if not 0.0 < hole < 1.0:
        raise GeometryError(f"hole must be a share of the image between 0 and 1, got {hole}")
    if kind not in ("square", "pixels"):
        raise UnsupportedError(f"hole kind {kind!r} is not served; expected square or pixels")
    if modality == "CT":
        volume = np.maximum(volume, np.float32(AIR_HU))
    if matrix is not None:
        volume = _square(volume, AIR_HU if modality == "CT" else 0.0)
        factor = volume.shape[-1] / matrix if matrix > 0 else math.nan
        volume = area_mean(volume, matrix)
        pixel_mm = (pixel_mm[0] * factor, pixel_mm[1] * factor)
    truth = torch.from_numpy(volume)
    if modality == "CT":
        truth, level = hu_to_mu(truth, mu_water), mu_water
    else:
        level = _level(volume)
    std = _noise_std(noise, level)
    h, w = volume.shape[-2:]
    known = torch.ones(h, w, dtype=torch.bool)
    if kind == "square":
        a, b = round(hole * h), round(hole * w)
        top, left = (h - a) // 2, (w - b) // 2
        known[top : top + a, left : left + b] = False
    else:
        order = torch.randperm(h * w, generator=generator(seed))
        known.view(-1)[order[: round(hole * h * w)]] = False
    operator = Mask(known)
    noisy = add_gaussian(truth, std, _seeds(seed, len(truth), positions))
    provenance = {
        "simulation": "pixels removed from the images",
        "hole": hole,
        "kind": kind,
        "noise": noise,
        "seed": seed,
    }
    measurement = Measurement(
        operator,
        torch.where(known, noisy, 0),
        torch.tensor(std),
        modality,
        pixel_mm,
        mu_water if modality == "CT" else None,
        provenance,
    )
    return Simulation(measurement, truth)


def area_mean(image: Float32, size: int) -> Float32:
    """Square images averaged over the area of ``size`` x ``size`` larger pixels.

    Args:
        image: ``(Z, n, n)``.
        size: new rows and columns, at most n; need not divide it.

    Raises:
        GeometryError: a size below 1 or above n.
    """
    n = image.shape[-1]
    if not 1 <= size <= n:
        raise GeometryError(
            f"the reconstruction matrix must be between 1 and the image's {n} rows, got {size}; "
            f"a finer grid than the image's would have no truth"
        )
    if size == n:
        return image
    edge = np.linspace(0.0, n, size + 1)
    low = np.maximum(edge[:-1, None], np.arange(n))
    high = np.minimum(edge[1:, None], np.arange(1, n + 1))
    overlap = (np.maximum(high - low, 0.0) * (size / n)).astype(np.float32)
    return np.asarray(overlap @ image @ overlap.T)


def _project(image: Tensor, geometry: Geometry, pixel_mm: float, kernel: Kernel) -> Tensor:
    """Line integrals, some views at a time so that the matrix stays small; not cached."""
    shape = (image.shape[-2], image.shape[-1])
    views = len(geometry.angles)
    need = matrix_bytes(geometry, shape, pixel_mm, kernel)
    step = max(1, math.floor(views * _BLOCK_BYTES / max(need, 1)))
    parts = []
    for start in range(0, views, step):
        part = replace(geometry, angles=geometry.angles[start : start + step])
        parts.append(RayTransform(part, shape, pixel_mm, kernel, cache=False)(image))
    return torch.cat(parts, dim=-2)


def _scan(
    values: Tensor,
    truth: Tensor,
    geometry: Geometry,
    pixel_mm: float,
    photons: float,
    model_error: float,
    seed: int,
    positions: Sequence[int] | None,
    mu_water: float,
    how: str,
) -> Simulation:
    """Noisy data from the line integrals of each bin's rays, ``(slices, views, bins, rays)``."""
    # the rays of a bin add their intensities, not their line integrals
    line = math.log(values.shape[-1]) - torch.logsumexp(-values.double(), dim=-1)
    counts = count_photons(line, photons, _seeds(seed, len(line), positions))
    if not (math.isfinite(model_error) and model_error >= 0):
        raise InputError(f"model_error must be finite and not negative, got {model_error}")
    data, std = line_integrals(counts, photons)
    std = torch.hypot(std, torch.tensor(model_error))
    operator = RayTransform(geometry, (truth.shape[-2], truth.shape[-1]), pixel_mm)
    provenance = {
        "simulation": how,
        "geometry": repr(geometry),
        "photons": photons,
        "model_error": model_error,
        "starved": int((counts < 1).sum()),
        "seed": seed,
    }
    measurement = Measurement(
        operator, data, std, "CT", (pixel_mm, pixel_mm), mu_water, provenance
    )
    return Simulation(measurement, truth)


def _stack(image: NDArray[Any], what: str) -> Any:
    """A finite stack as float32 (complex64)."""
    array = np.asarray(image)
    array = array.astype(np.complex64 if np.iscomplexobj(array) else np.float32)
    if array.ndim != 3 or 0 in array.shape:
        raise GeometryError(
            f"{what} must be a non-empty stack (slices, rows, columns), got {array.shape}"
        )
    if not np.isfinite(array).all():
        raise InputError(f"{what} hold NaN or infinite values; replace them first")
    return array


def _square(volume: Float32, fill: float) -> Float32:
    """Slices padded to squares, centred."""
    h, w = volume.shape[-2:]
    n = max(h, w)
    top, left = (n - h) // 2, (n - w) // 2
    pad = ((0, 0), (top, n - h - top), (left, n - w - left))
    return np.pad(volume, pad, constant_values=fill)


def _level(volume: NDArray[Any]) -> float:
    return float(np.percentile(np.abs(volume), 99.0))


def _noise_std(noise: float, level: float) -> float:
    std = noise * level
    if not (math.isfinite(std) and std > 0.0):
        raise InputError(
            f"the noise level must be positive and the images not empty, got noise {noise} of a "
            f"signal of {level:g}; for nearly noise-free data give 1e-4"
        )
    return std


def _seeds(seed: int, count: int, positions: Sequence[int] | None) -> list[torch.Generator]:
    numbers = range(count) if positions is None else positions
    if len(numbers) != count:
        raise GeometryError(f"positions must number all {count} slices, got {len(numbers)}")
    return [generator(seed, int(n)) for n in numbers]
