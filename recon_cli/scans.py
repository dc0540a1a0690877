"""Measurements simulated from images: what ``simulate`` writes and ``study`` reconstructs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from recon_cli.console import log
from recon_cli.options import parse_slices
from recon_cli.pipeline import Task
from recon_cli.runlog import RunLog, sha256_of

if TYPE_CHECKING:
    from inverse.io.dicom import Series
    from inverse.operators.ct import FanBeam, ParallelBeam
    from phantoms.simulate import Simulation

__all__ = ["CtScan", "InpaintScan", "MriScan", "Scan", "Selection", "read", "simulate"]


@dataclass(frozen=True)
class Selection:
    """Which images."""

    path: Path
    series: str | None = None
    stack: str | None = None
    slices: str | None = None


@dataclass(frozen=True)
class CtScan:
    """Sparse-view, limited-angle or low-dose CT; ``arc`` in degrees."""

    views: int
    geometry: Literal["parallel", "fan"]
    arc: float | None
    photons: float
    matrix: int | None

    command: ClassVar = "ct"

    @property
    def label(self) -> str:
        """In words."""
        arc = "" if self.arc is None else f" over {self.arc:g} degrees"
        return f"{self.views}-view {self.geometry}-beam CT{arc}"

    def beam(self, matrix: int, pixel_mm: float) -> ParallelBeam | FanBeam:
        """The geometry that covers a reconstruction grid."""
        from inverse.operators.ct import FanBeam, ParallelBeam

        shape = (matrix, matrix)
        if self.geometry == "parallel":
            arc = math.radians(180.0 if self.arc is None else self.arc)
            return ParallelBeam.sparse(self.views, shape, pixel_mm, arc)
        arc = math.radians(360.0 if self.arc is None else self.arc)
        return FanBeam.sparse(self.views, shape, pixel_mm, arc)

    def run(self, images: Series, chosen: Sequence[int], seed: int) -> Simulation:
        """Simulate the chosen slices."""
        from phantoms.simulate import simulate_ct

        side = images.array.shape[-1]
        matrix = _matrix(self.matrix, images)
        pixel = images.spacing[1] * side / matrix
        return simulate_ct(
            images.array[chosen],
            images.spacing[1:],
            self.beam(matrix, pixel),
            matrix=matrix,
            photons=self.photons,
            seed=seed,
            positions=chosen,
        )


@dataclass(frozen=True)
class MriScan:
    """Cartesian undersampling of single-coil k-space."""

    acceleration: float
    mask: Literal["uniform1d", "random1d", "gaussian1d", "gaussian2d"]
    centre: float
    noise: float

    command: ClassVar = "mri"

    @property
    def label(self) -> str:
        """In words."""
        return f"{self.acceleration:g}-fold undersampled MRI"

    def run(self, images: Series, chosen: Sequence[int], seed: int) -> Simulation:
        """Simulate the chosen slices."""
        from phantoms.simulate import simulate_mri

        return simulate_mri(
            images.array[chosen],
            images.spacing[1:],
            acceleration=self.acceleration,
            kind=self.mask,
            centre_fraction=self.centre,
            noise=self.noise,
            seed=seed,
            positions=chosen,
        )


@dataclass(frozen=True)
class InpaintScan:
    """Missing pixels: a central square, or pixels at random."""

    hole: float
    kind: Literal["square", "pixels"]
    noise: float
    matrix: int | None

    command: ClassVar = "inpaint"

    @property
    def label(self) -> str:
        """In words."""
        if self.kind == "square":
            return f"Inpainting of a square, {100 * self.hole:g} % of the side"
        return f"Inpainting of {100 * self.hole:g} % of the pixels"

    def run(self, images: Series, chosen: Sequence[int], seed: int) -> Simulation:
        """Simulate the chosen slices."""
        from phantoms.simulate import simulate_inpainting

        return simulate_inpainting(
            images.array[chosen],
            images.spacing[1:],
            modality="CT" if images.unit == "HU" else "MR",
            hole=self.hole,
            kind=self.kind,
            matrix=_matrix(self.matrix, images) if images.unit == "HU" or self.matrix else None,
            noise=self.noise,
            seed=seed,
            positions=chosen,
        )


def _matrix(matrix: int | None, images: Series) -> int:
    """The reconstruction matrix; 256 by default, where the images have that many rows.

    Raises:
        UnsupportedError: images that are not square, whose field of view would change.
    """
    from inverse.errors import UnsupportedError

    rows, columns = images.array.shape[1:]
    if rows != columns:
        raise UnsupportedError(
            f"the images are {rows} x {columns}; only square ones can be averaged to another "
            "matrix without changing their field of view; crop or pad them first"
        )
    return min(256, rows) if matrix is None else matrix


def read(selection: Selection, command: str, run: RunLog) -> tuple[Series, list[int]]:
    """Read the series and pick its slices.

    Raises:
        InputError: images of another modality than the scan's, or no slice left.
    """
    from inverse.errors import InputError
    from inverse.io.dicom import read_series

    log(f"reading {selection.path}")
    with run.phase("read"):
        images = read_series(selection.path, selection.series, selection.stack)
        run.inputs["images"] = sha256_of(selection.path)
    wanted = {"ct": "CT", "mri": "MR"}.get(command, images.modality)
    if images.modality != wanted:
        right = "mri" if images.modality == "MR" else "ct"
        raise InputError(
            f"'{selection.path}' holds {images.modality} images, '{command}' needs {wanted}; "
            f"use 'recon study {right}' or 'recon simulate {right}'"
        )
    run.notes(images.warnings)
    if images.synthetic:
        run.warn("SYNTHETIC_SOURCE", "the source images are marked as synthetic")
    chosen = parse_slices(selection.slices, len(images.array))
    return images, chosen


def simulate(scan: Scan, images: Series, chosen: list[int], seed: int, run: RunLog) -> Task:
    """Simulate the scan of chosen slices."""
    log(f"simulating {scan.label}, {len(chosen)} slices")
    with run.phase("simulate"):
        result = scan.run(images, chosen, seed)
    provenance = dict(result.measurement.provenance)
    run.settings["simulation"] = {**asdict(scan), **provenance}
    starved = int(provenance.get("starved", 0))
    if starved:
        run.warn("STARVED", f"{starved} detector readings caught no photon; raise --photons")
    return Task(
        measurement=result.measurement,
        truth=result.truth,
        templates=[images.templates[k] for k in chosen],
        label=scan.label,
        simulated=True,
        slices=chosen,
    )


Scan = CtScan | MriScan | InpaintScan
