r"""Retrospective simulation of scans whose operator acts on a whole volume.

Cone beams, k-space with two directions of phase encoding, thick slices and missing ones.  As in
:mod:`phantoms.simulate` the data do not come from the operator that reconstructs them; where an
image leaves no other way, the provenance says so.  A volume is one item: its random numbers are
seeded by the seed alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr
from torch import Tensor

from inverse.errors import GeometryError, ResourceError, UnsupportedError
from inverse.measurement import Measurement
from inverse.operators.coils import espirit_volume
from inverse.operators.ct import ConeBeam, RayTransform, square_pixel
from inverse.operators.mask import Mask, missing_slices
from inverse.operators.mri import (
    CartesianMRI,
    MaskKind,
    Sense,
    cartesian_mask,
    centred_fft,
    centred_ifft,
)
from inverse.operators.noise import add_gaussian, generator
from inverse.operators.patterns import central_box
from inverse.operators.resample import ThickSlices, Upsample
from inverse.operators.units import AIR_HU, MU_WATER, hu_to_mu
from phantoms.beam import Tube, split
from phantoms.coils import CoilArray
from phantoms.simulate import (
    MODEL_ERROR,
    Simulation,
    _level,
    _noise_std,
    _of_bins,
    _scan,
    _square,
    _stack,
    area_mean,
    physical,
)

__all__ = ["simulate_cone", "simulate_mri_volume", "simulate_slices"]

_CALIBRATION = 24  # slices and rows of k-space that calibrate the coils
_FIELD_BYTES = 4 * 2**30  # most memory of coil fields
_SOFTNESS = 0.15  # std of a slice profile's edges, in slice thicknesses


def simulate_cone(
    hu: NDArray[Any],
    spacing: tuple[float, float, float],
    geometry: ConeBeam,
    *,
    matrix: int = 256,
    photons: float = 1e5,
    electronic_noise: float = 0.0,
    kvp: float | None = None,
    model_error: float = MODEL_ERROR,
    seed: int = 0,
    mu_water: float = MU_WATER,
) -> Simulation:
    """A cone-beam CT scan of a volume, to be reconstructed on the same slices, coarser in them.

    Two by two rays an element of the panel measure their length in the voxels of the native grid,
    or, where that is not finer than the reconstruction's, of slices interpolated to twice it.
    The object ends at the first and the last slice, beyond which there is air.

    Args:
        hu: volume ``(Z, Y, X)`` in HU; values below air count as air.
        spacing: voxel size (z, y, x) of ``hu`` in mm.
        geometry: the scan; should cover the volume, as :meth:`ConeBeam.sparse` does.
        matrix: rows and columns of the reconstruction grid, at most those of ``hu``; slices that
            are not square are first padded with air.
        photons: expected counts of an element in air.
        electronic_noise: std of the electronics' noise in counts.
        kvp: tube voltage of a polychromatic beam; see :func:`phantoms.simulate.simulate_ct`.
        model_error: std of what the reconstruction's voxels cannot represent, in line integrals.
        seed: seed of the noise.
        mu_water: attenuation of water in 1/mm.

    Raises:
        GeometryError: an array that is no volume, a matrix finer than the slices, or a source
            inside the volume.
        InputError: values that are not finite, photons, noise or voltage out of range.
        UnsupportedError: pixels that are not square.
    """
    volume = _stack(hu, "CT volumes")
    fine = square_pixel(spacing[1:])
    padded = _square(np.maximum(volume, np.float32(AIR_HU)), AIR_HU)
    native = padded.shape[-1]
    pixel = native * fine / matrix if matrix > 0 else math.nan
    truth = hu_to_mu(torch.from_numpy(area_mean(padded, matrix)), mu_water)[None]
    # for lack of a finer grid the slices are interpolated to one
    finer = Upsample(padded.shape, 1 if native > matrix else 2)
    side = fine * native / finer.out_shape[-1]
    scanner = RayTransform(
        geometry.finer(2), finer.out_shape, (spacing[0], side, side), "line", max_bytes=-1
    )

    def project(part: NDArray[np.float32]) -> Tensor:
        lines = scanner(finer(torch.from_numpy(part)[None]))
        # (1, views, rows, 2, columns, 2) to four rays an element
        pairs = lines.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))
        return pairs.transpose(-3, -2).flatten(-2)

    parts = split(padded, None, mu_water)
    width = finer.out_shape[-1]
    how = f"2 x 2 rays an element through {width} x {width} pixels of {side:.4g} mm"
    tube = None if kvp is None else Tube(kvp)
    if tube is None:
        values = project(np.sum(list(parts.values()), axis=0))
    else:
        values = tube.measured({m: project(part) for m, part in parts.items()})
        how += f"; {kvp:g} kV spectrum through {', '.join(m.name for m in parts)}"
    operator = RayTransform(geometry, tuple(truth.shape[1:]), (spacing[0], pixel, pixel))
    return _scan(
        _of_bins(values),
        truth,
        operator,
        photons,
        model_error,
        seed,
        None,
        mu_water,
        how,
        electronic_noise,
        tube,
    )


def simulate_mri_volume(
    image: NDArray[Any],
    spacing: tuple[float, float, float],
    *,
    acceleration: float = 4.0,
    kind: MaskKind = "poisson",
    centre_fraction: float = 0.08,
    coils: int = 1,
    noise: float = 0.01,
    seed: int = 0,
) -> Simulation:
    """Undersampled k-space of a volume with two directions of phase encoding: slices and rows.

    The pattern is one of the plane (z, y) and repeats along x, the readout.  One coil: the FFT of
    the volume on its own grid, which is the reconstruction's too; k-space of one uniform coil has
    no finer grid that would differ.  Several: the volume on twice the grid, seen through the
    Biot-Savart fields of loops around it, and maps calibrated from a short scan before.

    Args:
        image: volume ``(Z, Y, X)``, real or complex, any unit.
        spacing: voxel size (z, y, x) in mm.
        acceleration: grid size over measured samples.
        kind: sampling pattern; see :func:`inverse.operators.mri.cartesian_mask`.
        centre_fraction: its fully sampled centre, along each of the two axes.
        coils: receive coils around the volume.
        noise: std of the real and of the imaginary part of a sample, relative to the 99th
            percentile of the magnitude.
        seed: seed of the pattern and the noise.

    Returns:
        Data and truth; with several coils the truth has the phase of the calibration's virtual
        coil.

    Raises:
        GeometryError: an array that is no volume, an impossible pattern, or too few slices to
            calibrate coils.
        InputError: values that are not finite, or a noise level that is not positive.
        ResourceError: coil fields of more than 4 GiB.
    """
    volume = _stack(image, "MR volumes")
    std = _noise_std(noise, _level(volume))
    slices, rows, columns = volume.shape
    pattern = cartesian_mask((slices, rows), acceleration, centre_fraction, kind, seed)
    mask = pattern[..., None].expand(slices, rows, columns).contiguous()
    truth = torch.from_numpy(volume).to(torch.complex64)[None]
    seeds = [generator(seed, 0)]
    operator: CartesianMRI | Sense
    if coils == 1:
        operator = CartesianMRI(mask)
        data = torch.where(mask, add_gaussian(centred_fft(truth, 3), std, seeds), 0)
        how = "FFT of the volume on its own grid, which is the reconstruction's too"
    else:
        fields = _fields((slices, rows, columns), spacing, coils)
        data = _coil_data(truth[0], fields, mask, std, seeds)
        # a scan of low resolution before calibrates the coils
        before = torch.zeros_like(mask)
        before[
            central_box(mask.shape, [*(min(_CALIBRATION, n) for n in mask.shape[:2]), columns])
        ] = True
        maps = espirit_volume(_coil_data(truth[0], fields, before, std, seeds)[0]).maps
        operator = Sense(maps, mask)
        seen = torch.sgn((_coarse(fields) * truth[0] * maps.conj()).sum(dim=0))
        truth = truth.abs() * torch.where(seen == 0, 1, seen)
        how = f"Fourier transform on twice the grid, Biot-Savart fields of {coils} loops"
    provenance = {
        "simulation": how,
        "mask": kind,
        "phase_encoding": ["z", "y"],
        "centre_fraction": centre_fraction,
        "acceleration": acceleration,
        "coils": coils,
        "noise": noise,
        "seed": seed,
    }
    pixel_mm = (spacing[1], spacing[2])
    measurement = Measurement(
        operator, data, torch.tensor(std), "MR", pixel_mm, provenance=provenance
    )
    return Simulation(measurement, truth)


def _fields(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], coils: int
) -> Tensor:
    """Sensitivities on twice the grid, ``(coils, 2 Z, 2 Y, 2 X)``."""
    need = 8 * coils * 8 * math.prod(shape)
    if need > _FIELD_BYTES:
        raise ResourceError(
            f"the fields of {coils} coils on twice a grid of {' x '.join(map(str, shape))} need "
            f"{need / 2**30:.3g} GiB, more than {_FIELD_BYTES / 2**30:g}; take fewer slices or "
            f"coils"
        )
    fine = [h / 2 for h in spacing]
    reach = math.hypot(shape[1] * spacing[1], shape[2] * spacing[2]) / 2
    array = CoilArray(coils, 1.15 * reach, stagger_mm=0.1 * reach)
    plane = (2 * shape[1], 2 * shape[2])
    heights = (np.arange(2 * shape[0]) - shape[0] + 0.5) * fine[0]
    planes = [array.maps(plane, (fine[1], fine[2]), float(z)) for z in heights]
    return torch.from_numpy(np.stack(planes, axis=1))


def _coarse(fine: Tensor) -> Tensor:
    """Every second voxel: voxel j of n is voxel ``2 (j - n // 2) + n`` of 2 n."""
    starts = [side // 2 - 2 * (side // 4) for side in fine.shape[-3:]]
    return fine[..., starts[0] :: 2, starts[1] :: 2, starts[2] :: 2]


def _coil_data(
    truth: Tensor, fields: Tensor, mask: Tensor, std: float, seeds: Sequence[torch.Generator]
) -> Tensor:
    """Measured k-space ``(1, coils, Z, Y, X)``, computed on twice the grid, coil by coil."""
    box = central_box(tuple(fields.shape[1:]), tuple(mask.shape))
    spectrum = truth.new_zeros(fields.shape[1:])
    spectrum[box] = centred_fft(truth, 3)
    finer = centred_ifft(spectrum, 3)
    full = torch.stack([centred_fft(field * finer, 3)[box] for field in fields])
    return torch.where(mask, add_gaussian(full[None], std, seeds), 0)


def simulate_slices(
    image: NDArray[Any],
    pixel_mm: tuple[float, float],
    *,
    modality: Literal["CT", "MR"],
    missing: Sequence[int] = (),
    thickness: int = 1,
    step: int | None = None,
    matrix: int | None = None,
    noise: float = 0.01,
    seed: int = 0,
    mu_water: float = MU_WATER,
) -> Simulation:
    """A volume of which slices are missing, or are thick; one of the two.

    A thick slice is the volume under a smooth slice profile, a box of the nominal thickness
    whose edges are normal distributions of 0.15 of it; reconstruction takes the box itself.

    Args:
        image: volume ``(Z, Y, X)``: HU for CT, signal for MR (real).
        pixel_mm: (row, column) spacing in mm.
        modality: CT images become attenuation in 1/mm.
        missing: numbers of the slices that are not measured.
        thickness: thin slices a thick one, at least 2; 1 for none.
        step: thin slices from one thick slice to the next, default ``thickness``.
        matrix: area-average to this many rows and columns first (square images); default as is.
        noise: std relative to water (CT) or to the 99th percentile of the volume (MR).
        seed: seed of the noise.
        mu_water: attenuation of water in 1/mm.

    Raises:
        GeometryError: an array that is no volume, no slice left, neither missing nor thick slices
            or both, or a volume thinner than a thick slice.
        InputError: values that are not finite, or a noise level that is not positive.
        UnsupportedError: complex images.
    """
    volume = _stack(image, f"{modality} volumes")
    if np.iscomplexobj(volume):
        raise UnsupportedError("missing and thick slices are for real images; pass magnitudes")
    if bool(len(missing)) == (thickness > 1):
        raise GeometryError(
            f"give either slices that are missing or a thickness of at least 2, got "
            f"{len(missing)} missing slices and thickness {thickness}"
        )
    plane, pixel_mm, level = physical(volume, pixel_mm, modality, matrix, mu_water)
    truth = plane[None]
    std = _noise_std(noise, level)
    seeds = [generator(seed, 0)]
    operator: Mask | ThickSlices
    told: dict[str, Any]
    if thickness > 1:
        operator = ThickSlices(tuple(plane.shape), thickness, step)
        profile = _profile(operator)
        data = add_gaussian(torch.einsum("jz,bzyx->bjyx", profile, truth), std, seeds)
        told = {
            "simulation": "thin slices under a smooth slice profile",
            "thickness": operator.thickness,
            "step": operator.step,
        }
    else:
        operator = Mask(missing_slices(tuple(plane.shape), missing))
        data = torch.where(operator.mask, add_gaussian(truth, std, seeds), 0)
        told = {
            "simulation": "slices removed from the volume",
            "missing": sorted(int(k) for k in missing),
        }
    measurement = Measurement(
        operator,
        data,
        torch.tensor(std),
        modality,
        pixel_mm,
        mu_water if modality == "CT" else None,
        {**told, "noise": noise, "seed": seed},
    )
    return Simulation(measurement, truth)


def _profile(operator: ThickSlices) -> Tensor:
    r"""Share of each thin slice in each thick one, ``(J, Z)``; rows sum to one.

    The box of width n about the centre c, convolved with a normal density of std s:
    :math:`P(z) = \Phi((z - c + n/2)/s) - \Phi((z - c - n/2)/s)`.
    """
    width = float(operator.thickness)
    fine = 8  # midpoints a thin slice: the profile varies within it
    z = (np.arange(operator.in_shape[0] * fine) + 0.5) / fine - 0.5
    away = z - operator.centres.numpy()[:, None]
    s = _SOFTNESS * width
    share = ndtr((away + width / 2) / s) - ndtr((away - width / 2) / s)
    share = share.reshape(len(share), -1, fine).mean(axis=-1)
    return torch.from_numpy(share / share.sum(axis=1, keepdims=True)).float()
