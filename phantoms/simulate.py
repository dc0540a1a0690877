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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inverse.classical import leave_out_metal
from inverse.errors import GeometryError, InputError, UnsupportedError
from inverse.measurement import Measurement
from inverse.operators.coils import combine_coils, espirit
from inverse.operators.ct import (
    FanBeam,
    Kernel,
    ParallelBeam,
    RayTransform,
    matrix_bytes,
    square_pixel,
)
from inverse.operators.mask import Mask, central_hole, random_pixels
from inverse.operators.metal import UnspoiledRays
from inverse.operators.metal import metal_trace as trace_of
from inverse.operators.mri import (
    CartesianMRI,
    MaskKind,
    Sense,
    cartesian_mask,
    centred_fft,
    centred_ifft,
)
from inverse.operators.noise import (
    TransmissionPoisson,
    add_gaussian,
    count_photons,
    generator,
    line_integrals,
)
from inverse.operators.nufft import NonCartesian, density_compensation, radial, spiral
from inverse.operators.patterns import central_box
from inverse.operators.units import AIR_HU, MU_WATER, hu_to_mu
from inverse.volumes import Slices, percentile, slabs
from phantoms.beam import WATER, Material, Tube, split
from phantoms.coils import CoilArray
from phantoms.scene import Section

__all__ = [
    "Simulation",
    "Sink",
    "area_mean",
    "physical",
    "simulate_ct",
    "simulate_ct_analytic",
    "simulate_inpainting",
    "simulate_mri",
    "smooth_phase",
]

Float32 = NDArray[np.float32]

MetalTrace = Literal["true", "segmented", "none"]

Scene: TypeAlias = Callable[[], Iterator[Tensor]]
"""Gives the images to measure, a few slices at a time."""
Sink: TypeAlias = Callable[[slice, Tensor], None]
"""Takes the truth a few slices at a time and in order: which they are, and ``(slices, *in_shape)``
in physical units.  That of the :class:`Simulation` is then empty, so that memory does not grow
with it."""

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
        truth: the image on that operator's grid, physical units, ``(slices, *in_shape)``; no
            slices, where a :data:`Sink` took them.
    """

    measurement: Measurement
    truth: Tensor

    def into(self, sink: Sink | None) -> Simulation:
        """The same, of whose truth, held as a whole until now, a sink takes all."""
        if sink is None:
            return self
        for items in slabs(len(self.truth)):
            sink(items, self.truth[items])
        return replace(self, truth=self.truth.new_empty(0, *self.truth.shape[1:]))


def simulate_ct(
    hu: Slices,
    pixel_mm: float | tuple[float, float],
    geometry: ParallelBeam | FanBeam,
    *,
    matrix: int = 256,
    photons: float = 1e5,
    electronic_noise: float = 0.0,
    metal: NDArray[np.bool_] | None = None,
    metal_trace: MetalTrace = "true",
    kvp: float | None = None,
    model_error: float = MODEL_ERROR,
    seed: int = 0,
    positions: Sequence[int] | None = None,
    mu_water: float = MU_WATER,
    sink: Sink | None = None,
) -> Simulation:
    r"""A CT scan of given slices, to be reconstructed on a coarser grid of the same extent.

    With a native grid finer than the reconstruction's, rays measure their length in its pixels,
    two to a bin (each coarse bin's rays see pixels that the reconstruction cannot represent);
    on an equal grid, four to a bin meet the pixels by another kernel than the reconstruction's,
    which would be an inverse crime.

    Metal becomes titanium.  The truth is the patient without metal; what of the metal is known to
    the operator that is to reconstruct the data, ``metal_trace`` says.

    Args:
        hu: slices ``(Z, Y, X)`` in HU; values below air count as air.  They are taken a few at a
            time, so that those of a volume on disk need not fit into memory.
        pixel_mm: pixel size of ``hu`` in mm, a number or (row, column).
        geometry: the scan; should cover the grid's diagonal.
        matrix: rows and columns of the reconstruction grid, at most those of ``hu``; slices that
            are not square are first padded with air.
        photons: expected counts of a bin in air.
        electronic_noise: std of the electronics' noise in counts.
        metal: mask of the shape of ``hu``, for example of :func:`phantoms.beam.implants`, or
            of :func:`inverse.operators.metal.segment_metal` for images that show some.
        metal_trace: the operator leaves out the rays through the ``"true"`` metal, widened by a
            bin; through metal ``"segmented"`` in the scan's own filtered backprojection, as a
            scanner must, see :func:`inverse.classical.leave_out_metal`; or through ``"none"``.
        kvp: tube voltage of a polychromatic beam with the scanner's correction for water, see
            :class:`phantoms.beam.Tube`; default a beam of one energy.
        model_error: std of what the reconstruction's pixels cannot represent, in line integrals;
            added to the stated noise (not to the data), as a calibration scan would find it.
        seed: seed of the noise.
        positions: position of each slice in its series, for the seeds; default 0, 1, ...
        mu_water: attenuation of water in 1/mm.
        sink: takes the truth.

    Raises:
        GeometryError: an array that is not a stack, a mask of another shape, or a matrix finer
            than the slices.
        InputError: values that are not finite, photons, noise or voltage out of range.
        UnsupportedError: pixels that are not square.
    """
    fine = square_pixel(pixel_mm)
    if metal is not None:
        if metal.shape != hu.shape:
            raise GeometryError(
                f"the metal mask must have the shape of the slices, {hu.shape}, got {metal.shape}"
            )
        if metal_trace not in get_args(MetalTrace):
            raise UnsupportedError(
                f"metal_trace {metal_trace!r} is not served; expected one of "
                f"{', '.join(get_args(MetalTrace))}"
            )

    def padded(items: slice) -> Float32:
        volume = _stack(hu[items], "CT slices")
        return _square(np.maximum(volume, np.float32(AIR_HU)), AIR_HU)

    def rods(items: slice) -> Float32:
        assert metal is not None
        return _square(metal[items].astype(np.float32), 0.0)

    groups = _groups(hu)
    truth = _gathered(
        ((s, hu_to_mu(torch.from_numpy(area_mean(padded(s), matrix)), mu_water)) for s in groups),
        sink,
    )
    native = max(hu.shape[1:])
    pixel = native * fine / matrix
    finer = native > matrix
    # strips for lack of a finer grid; beams without strips interpolate where lengths reconstruct
    strips = isinstance(geometry, ParallelBeam) or not (geometry.curved or geometry.offset_mm)
    kernel: Kernel = "line" if finer else "strip" if strips else "linear"
    rays = 2 if finer else 4
    how = (
        f"{rays} rays a bin ({kernel} kernel) through {native} x {native} pixels of {fine:.4g} mm"
    )
    tube = None if kvp is None else Tube(kvp)

    def materials(items: slice) -> dict[Material, Float32]:
        parts = split(padded(items), None if metal is None else rods(items) > 0, mu_water)
        return parts if tube is not None else {WATER: np.sum(list(parts.values()), axis=0)}

    if tube is not None:
        how += f"; {kvp:g} kV spectrum through {', '.join(m.name for m in materials(groups[0]))}"
    scan = _scan(
        _project(materials, groups, geometry, (native, native), fine, kernel, rays, tube),
        truth,
        RayTransform(geometry, (matrix, matrix), pixel),
        photons,
        model_error,
        seed,
        positions,
        mu_water,
        how,
        electronic_noise,
        tube,
    )
    if metal is None:
        return scan
    told = {**scan.measurement.provenance, "metal": "titanium", "metal_trace": metal_trace}
    scan = replace(scan, measurement=replace(scan.measurement, provenance=told))
    if metal_trace == "none":
        return scan
    if metal_trace == "segmented":
        return replace(scan, measurement=leave_out_metal(scan.measurement))
    coarse = [torch.from_numpy(area_mean(rods(items), matrix) > 0) for items in groups]
    return _without_metal(scan, torch.cat(coarse))


def _without_metal(scan: Simulation, metal: Tensor) -> Simulation:
    """The same scan for an operator that leaves out the rays through metal."""
    measurement = scan.measurement
    whole = measurement.operator
    assert isinstance(whole, RayTransform)
    operator = UnspoiledRays(whole, trace_of(whole, metal, margin=1))
    spoiled = float((~operator.good).double().mean())
    return replace(
        scan,
        measurement=replace(
            measurement,
            operator=operator,
            data=torch.where(operator.good, measurement.data, 0.0),
            provenance={**measurement.provenance, "spoiled_rays": spoiled},
        ),
    )


def simulate_ct_analytic(
    slices: Sequence[Section],
    pixel_mm: float,
    geometry: ParallelBeam | FanBeam,
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
        slices: phantoms in the plane, such as ellipses, with values in HU + 1000 (0 is air).
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
    values = (torch.from_numpy(factor * s.line_integrals(origin, direction)) for s in slices)
    grid = (matrix, matrix)
    truth = torch.from_numpy(np.stack([factor * s.image(grid, pixel_mm) for s in slices]))
    how = f"exact line integrals, {oversample} rays a bin"
    return _scan(
        torch.stack([_of_bins(rays) for rays in values]),
        truth.float(),
        RayTransform(geometry, grid, pixel_mm),
        photons,
        model_error,
        seed,
        positions,
        mu_water,
        how,
    )


def simulate_mri(
    image: Slices,
    pixel_mm: tuple[float, float],
    *,
    acceleration: float = 4.0,
    kind: MaskKind = "gaussian1d",
    centre_fraction: float = 0.08,
    trajectory: Literal["cartesian", "radial", "spiral"] = "cartesian",
    coils: int = 1,
    phase: float = 0.0,
    noise: float = 0.01,
    seed: int = 0,
    positions: Sequence[int] | None = None,
    sink: Sink | None = None,
) -> Simulation:
    r"""An undersampled acquisition of given images, by one coil or several.

    One coil on a Cartesian grid: the image itself is the object; its k-space is the FFT on its
    own grid, which is the reconstruction's too, as in most published experiments.  Real
    acquisitions are harder, and the provenance states it.

    Otherwise the image is interpolated to twice the grid, seen through the Biot-Savart fields of
    loops around it (:class:`phantoms.coils.CoilArray`) and transformed there.  The operator that
    is to reconstruct the data knows none of this: its maps are calibrated from the data's centre,
    as a scanner's are, or, for other trajectories, from a short Cartesian scan before.

    Args:
        image: ``(Z, Y, X)``, real or complex, any unit.  Slices are taken a few at a time, so
            that those of a volume on disk need not fit into memory.
        pixel_mm: (row, column) spacing in mm.
        acceleration: grid size over measured samples; for other trajectories the spokes, or the
            arms of a spiral, that leave no gap, over those measured.
        kind: Cartesian sampling pattern; see :func:`inverse.operators.mri.cartesian_mask`.
        centre_fraction: its fully sampled centre.
        trajectory: ``"radial"`` by the golden angle or ``"spiral"`` need the extra ``nufft``.
        coils: receive coils around the image.
        phase: amplitude in radians of a smooth random phase that the images get, each its own.
        noise: std of the real and of the imaginary part of a k-space sample, relative to the 99th
            percentile of the magnitude of all images (the transform is orthonormal, and coils
            have unit root-sum-of-squares, so this is also the noise of a fully sampled image).
        seed: seed of the pattern, the phase and the noise.
        positions: position of each slice in its series, for the seeds; default 0, 1, ...
        sink: takes the truth.

    Returns:
        Data and truth; with several coils the truth has the phase of the calibration's virtual
        coil, to which the maps refer.

    Raises:
        GeometryError: an array that is not a stack, an impossible pattern, or a centre too small
            for calibration.
        InputError: values that are not finite, or a noise level that is not positive.
        UnsupportedError: another trajectory without the package that it needs.
    """
    groups = _groups(image)
    for items in groups:
        _stack(image[items], "MR images")  # all refusals before the first number
    std = _noise_std(noise, _level(image))
    shape = (image.shape[-2], image.shape[-1])
    numbers = range(len(image)) if positions is None else positions
    seeds = _seeds(seed, len(image), positions)

    def scene() -> Iterator[Tensor]:
        """The images with their phase, a few at a time."""
        for items in groups:
            x = torch.from_numpy(_stack(image[items], "MR images")).to(torch.complex64)
            if phase:
                turns = [
                    smooth_phase(shape, phase, generator(seed, int(n), 1)) for n in numbers[items]
                ]
                x = x * torch.polar(torch.ones(()), torch.stack(turns))
            yield x

    fields = _fields(shape, pixel_mm, coils)
    path: dict[str, Any]
    operator: CartesianMRI | Sense | NonCartesian
    if trajectory == "cartesian":
        mask = cartesian_mask(shape, acceleration, centre_fraction, kind, seed)
        operator, data, sigma = _on_grid(scene, fields, mask, std, seeds)
        path = {"mask": kind, "centre_fraction": centre_fraction}
    else:
        samples = _path(trajectory, max(shape), acceleration)
        operator, data, sigma = _off_grid(scene, fields, samples, std, seeds)
        path = {"trajectory": trajectory, "samples": len(samples)}

    def seen(items: slice, x: Tensor) -> Tensor:
        """The truth: with several coils, of the phase to which the maps refer."""
        if isinstance(operator, CartesianMRI) or coils == 1:
            return x
        turn = torch.sgn(combine_coils(_crop(fields) * x[:, None], operator.maps[items]))
        return x.abs() * torch.where(turn == 0, 1, turn)

    truth = _gathered(
        ((items, seen(items, x)) for items, x in zip(groups, scene(), strict=True)), sink
    )
    provenance = {
        "simulation": (
            "FFT of the images on their own grid, which is the reconstruction's too"
            if isinstance(operator, CartesianMRI)
            else f"Fourier transform on twice the grid, Biot-Savart fields of {coils} loops"
            if coils > 1
            else "Fourier transform on twice the grid"
        ),
        **path,
        "acceleration": acceleration,
        "coils": coils,
        "phase": phase,
        "noise": noise,
        "seed": seed,
    }
    measurement = Measurement(operator, data, sigma, "MR", pixel_mm, provenance=provenance)
    return Simulation(measurement, truth)


def smooth_phase(shape: tuple[int, int], amplitude: float, seed: torch.Generator) -> Tensor:
    """A random phase map of at most 1.5 cycles over the field, ``|phase| <= amplitude``.

    Args:
        shape: rows and columns.
        amplitude: radians.
        seed: generator of the map.
    """
    y, x = (torch.linspace(-0.5, 0.5, n) for n in shape)
    wave, start = torch.rand(6, 2, generator=seed) * 3 - 1.5, torch.rand(6, generator=seed)
    turns = wave[:, :1, None] * y[:, None] + wave[:, 1:, None] * x + start[:, None, None]
    phase = torch.cos(2 * math.pi * turns).sum(dim=0)
    return amplitude * phase / phase.abs().max()


def _fields(shape: tuple[int, int], pixel_mm: tuple[float, float], coils: int) -> Tensor:
    """Sensitivities on twice the grid, ``(coils, 2 H, 2 W)``; one coil sees all alike."""
    h, w = shape
    if coils == 1:
        return torch.ones(1, 2 * h, 2 * w, dtype=torch.complex64)
    reach = math.hypot(h * pixel_mm[0], w * pixel_mm[1]) / 2
    array = CoilArray(coils, 1.15 * reach, stagger_mm=0.1 * reach)
    return torch.from_numpy(array.maps((2 * h, 2 * w), (pixel_mm[0] / 2, pixel_mm[1] / 2)))


def _crop(fine: Tensor) -> Tensor:
    """Every second pixel: pixel j of H is pixel ``2 (j - H // 2) + H`` of 2 H."""
    h, w = fine.shape[-2] // 2, fine.shape[-1] // 2
    return fine[..., h - 2 * (h // 2) :: 2, w - 2 * (w // 2) :: 2]


def _finer(image: Tensor) -> Tensor:
    """The image on twice the grid, of the same energy: zeros around its k-space."""
    h, w = image.shape[-2:]
    rows, cols = central_box((2 * h, 2 * w), (h, w))
    spectrum = image.new_zeros(len(image), 2 * h, 2 * w)
    spectrum[:, rows, cols] = centred_fft(image)
    return centred_ifft(spectrum)


def _on_grid(
    scene: Scene, fields: Tensor, mask: Tensor, std: float, seeds: Sequence[torch.Generator]
) -> tuple[CartesianMRI | Sense, Tensor, Tensor]:
    """Operator, data and noise std of a Cartesian scan."""
    sigma = torch.tensor(std)
    if len(fields) == 1:
        full = (centred_fft(few) for few in scene())
        data = _masked(full, tuple(mask.shape), mask, std, seeds)
        return CartesianMRI(mask), data, sigma
    data = _coil_data(scene, fields, mask, std, seeds)
    return Sense(espirit(data).maps, mask), data, sigma


def _coil_data(
    scene: Scene, fields: Tensor, mask: Tensor, std: float, seeds: Sequence[torch.Generator]
) -> Tensor:
    """Measured k-space ``(slices, coils, H, W)``, computed on twice the grid."""
    rows, cols = central_box((fields.shape[-2], fields.shape[-1]), tuple(mask.shape))
    full = (
        torch.stack([centred_fft(fields * one)[:, rows, cols] for one in _finer(few)])
        for few in scene()
    )
    return _masked(full, (len(fields), *mask.shape), mask, std, seeds)


def _masked(
    full: Iterable[Tensor],
    shape: tuple[int, ...],
    mask: Tensor,
    std: float,
    seeds: Sequence[torch.Generator],
) -> Tensor:
    """Noisy samples where the mask measures, of k-space that comes a few slices at a time."""
    data, done = torch.empty((len(seeds), *shape), dtype=torch.complex64), 0
    for few in full:
        items = slice(done, done + len(few))
        data[items] = torch.where(mask, add_gaussian(few, std, seeds[items]), 0)
        done = items.stop
    return data


def _path(name: str, n: int, acceleration: float) -> Tensor:
    """A trajectory for a matrix of n, thinned by the acceleration."""
    if name == "radial":
        return radial(max(1, round(math.pi / 2 * n / acceleration)), 2 * n)
    turns = 4.0
    arms = max(1, round(n / (2 * turns * acceleration)))
    return spiral(arms, round(math.pi * turns * n), turns)


def _off_grid(
    scene: Scene, fields: Tensor, path: Tensor, std: float, seeds: Sequence[torch.Generator]
) -> tuple[NonCartesian, Tensor, Tensor]:
    """Operator, data and noise std of a scan along a trajectory; all carry the root density."""
    shape = (fields.shape[-2] // 2, fields.shape[-1] // 2)
    density = density_compensation(path, shape)
    scanner = NonCartesian(path / 2, (2 * shape[0], 2 * shape[1]), fields, density)
    sigma = std * density.sqrt()
    data = add_gaussian(torch.cat([scanner(_finer(few)) for few in scene()]), sigma, seeds)
    if len(fields) == 1:
        return NonCartesian(path, shape, density=density), data, sigma
    # a Cartesian scan of low resolution before calibrates the coils
    before = torch.zeros(shape, dtype=torch.bool)
    before[central_box(shape, (32, 32))] = True
    maps = espirit(_coil_data(scene, fields, before, std, seeds)).maps
    return NonCartesian(path, shape, maps, density), data, sigma


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
    truth, pixel_mm, level = physical(volume, pixel_mm, modality, matrix, mu_water)
    std = _noise_std(noise, level)
    h, w = truth.shape[-2:]
    if kind == "square":
        known = central_hole((h, w), hole)
    else:
        known = random_pixels((h, w), hole, generator(seed))
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


def physical(
    volume: Float32,
    pixel_mm: tuple[float, float],
    modality: Literal["CT", "MR"],
    matrix: int | None,
    mu_water: float,
) -> tuple[Tensor, tuple[float, float], float]:
    """Images on the reconstruction's grid in physical units, their pixel size and signal level.

    Args:
        volume: slices in HU (those below air count as air) or signal.
        pixel_mm: (row, column) spacing in mm.
        modality: CT images become attenuation in 1/mm, the level is water's; that of MR is the
            99th percentile.
        matrix: area-average to this many rows and columns; default as is.
        mu_water: attenuation of water in 1/mm.

    Raises:
        GeometryError: a matrix finer than the images.
    """
    if modality == "CT":
        volume = np.maximum(volume, np.float32(AIR_HU))
    if matrix is not None:
        volume = _square(volume, AIR_HU if modality == "CT" else 0.0)
        factor = volume.shape[-1] / matrix if matrix > 0 else math.nan
        volume = area_mean(volume, matrix)
        pixel_mm = (pixel_mm[0] * factor, pixel_mm[1] * factor)
    truth = torch.from_numpy(volume)
    if modality == "CT":
        return hu_to_mu(truth, mu_water), pixel_mm, mu_water
    return truth, pixel_mm, _level(volume)


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


def _groups(volume: Slices) -> list[slice]:
    """Slices that are taken at a time; of an empty volume, none, for what is said of it."""
    return list(slabs(len(volume))) or [slice(0)]


def _gathered(parts: Iterable[tuple[slice, Tensor]], sink: Sink | None) -> Tensor:
    """Slices that come a few at a time as one stack; those a sink takes leave an empty one."""
    kept = list[Tensor]()
    for items, few in parts:
        if sink is None:
            kept.append(few)
        else:
            sink(items, few)
            kept = [few.new_empty(0, *few.shape[1:])]
    return torch.cat(kept)


def _project(
    materials: Callable[[slice], dict[Material, Float32]],
    groups: Sequence[slice],
    geometry: ParallelBeam | FanBeam,
    shape: tuple[int, int],
    pixel_mm: float,
    kernel: Kernel,
    rays: int,
    tube: Tube | None,
) -> Tensor:
    """Line integrals of bins of several rays, of some views and a few slices at a time.

    The matrix of those views is made once for all slices and not cached.
    """
    views, geometry = geometry.views, geometry.finer(rays)
    need = matrix_bytes(geometry, shape, pixel_mm, kernel)
    step = max(1, math.floor(views * _BLOCK_BYTES / max(need, 1)))
    blocks = []
    for start in range(0, views, step):
        part = geometry.take(range(start, min(start + step, views)))
        operator = RayTransform(part, shape, pixel_mm, kernel, cache=False)
        found = []
        for items in groups:
            through = {
                material: operator(torch.from_numpy(image)).unflatten(-1, (-1, rays))
                for material, image in materials(items).items()
            }
            found.append(_of_bins(through[WATER] if tube is None else tube.measured(through)))
        blocks.append(torch.cat(found))
    return torch.cat(blocks, dim=-2)


def _of_bins(values: Tensor) -> Tensor:
    r"""Line integrals of detector bins from those of their rays, ``(..., rays)``; float64.

    .. math:: l = -\log\frac1K\sum_{k=1}^K e^{-l_k}

    since the rays of a bin add their intensities, not their line integrals.
    """
    return math.log(values.shape[-1]) - torch.logsumexp(-values.double(), dim=-1)


def _scan(
    line: Tensor,
    truth: Tensor,
    operator: RayTransform,
    photons: float,
    model_error: float,
    seed: int,
    positions: Sequence[int] | None,
    mu_water: float,
    how: str,
    electronic_noise: float = 0.0,
    tube: Tube | None = None,
) -> Simulation:
    """Noisy data from the line integrals of bins, ``(slices, *out_shape)``."""
    counts = count_photons(line, photons, _seeds(seed, len(line), positions), electronic_noise)
    if not (math.isfinite(model_error) and model_error >= 0):
        raise InputError(f"model_error must be finite and not negative, got {model_error}")
    data, std = line_integrals(counts, photons, electronic_noise)
    likelihood = None
    if tube is None:  # the likelihood is that of one energy
        likelihood = TransmissionPoisson(counts.float(), photons, electronic_noise)
    else:
        data, std = tube.water_corrected(data, std)
    std = torch.hypot(std, torch.tensor(model_error))
    provenance = {
        "simulation": how,
        "geometry": repr(operator.geometry),
        "photons": photons,
        "electronic_noise": electronic_noise,
        "model_error": model_error,
        "starved": int((counts < 1).sum()),
        "seed": seed,
    }
    pixel_mm = (operator.pixel_mm, operator.pixel_mm)
    measurement = Measurement(
        operator, data, std, "CT", pixel_mm, mu_water, provenance, likelihood
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


def _level(volume: Slices) -> float:
    """What is called the signal of MR images: the 99th percentile of their magnitude."""
    return float(percentile(volume, 99.0, magnitude=True))


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
