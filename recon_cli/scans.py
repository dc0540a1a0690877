"""Measurements simulated from images: what ``simulate`` writes and ``study`` reconstructs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import typer

from recon_cli import options as o
from recon_cli.console import log
from recon_cli.inspect import telling_kind
from recon_cli.options import bytes_of, command, parse_slices
from recon_cli.runlog import RunLog, sha256_of
from recon_cli.task import Task

if TYPE_CHECKING:
    from torch import Tensor

    from inverse.io.series import Series
    from inverse.operators.ct import ConeBeam, FanBeam, ParallelBeam
    from phantoms.simulate import Simulation, Sink

__all__ = [
    "CtScan",
    "InpaintScan",
    "MriScan",
    "Scan",
    "Selection",
    "SliceScan",
    "heights",
    "read",
    "register_scans",
    "rehearse",
    "simulate",
]

# what the images must be; inpainting and slices take both
_MODALITY: dict[str, Literal["CT", "MR"]] = {"ct": "CT", "mri": "MR"}
TRIED_VIEWS = 16
"""Views of a scan that a dry run tries, since more tell no more."""


@dataclass(frozen=True)
class Selection:
    """Which images; ``limits`` in GiB."""

    path: Path
    series: str | None = None
    stack: str | None = None
    slices: str | None = None
    limits: float = 4.0


@dataclass(frozen=True)
class CtScan:
    """Sparse-view, limited-angle, truncated or low-dose CT, with metal or without.

    ``arc`` is in degrees, ``electronic_noise`` in counts; ``metal`` is a number of rods, and
    ``metal_trace`` says how the rays through them are found.
    """

    views: o.Views = 23
    geometry: o.GeometryName = "parallel"
    arc: o.Arc = None
    short_scan: o.ShortScan = False
    detector: o.Detector = None
    photons: o.Photons = 1e5
    electronic_noise: o.ElectronicNoise = 0.0
    kvp: o.Kvp = None
    metal: o.Metal = 0
    metal_trace: o.MetalTraceName = "true"
    matrix: o.Matrix = None

    command: ClassVar = "ct"

    @property
    def volume(self) -> bool:
        """Whether all slices are measured together."""
        return self.geometry == "cone"

    @property
    def label(self) -> str:
        """In words."""
        beam = {"parallel": "parallel-beam", "cone": "cone-beam"}.get(self.geometry, "fan-beam")
        arc = "" if self.arc is None else f" over {self.arc:g} degrees"
        short = " short scan" if self.short_scan else ""
        detector = "" if self.detector is None else f" on {self.detector} bins"
        left_in = self.metal_trace == "none"
        metal = ("", " without the rays through metal", " through metal")[
            (1 + left_in) * bool(self.metal)
        ]
        return f"{self.views}-view {beam} CT{short}{arc}{detector}{metal}"

    def beam(self, matrix: int, pixel_mm: float) -> ParallelBeam | FanBeam:
        """The geometry that covers a reconstruction grid, unless the detector is cut.

        Raises:
            GeometryError: a short scan of parallel beams, or one with an arc of its own.
        """
        from inverse.errors import GeometryError
        from inverse.operators.ct import FanBeam, ParallelBeam

        shape = (matrix, matrix)
        arc = None if self.arc is None else math.radians(self.arc)
        beam: ParallelBeam | FanBeam
        if self.geometry == "parallel":
            if self.short_scan:
                raise GeometryError(
                    "--short-scan is for fan beams, since parallel beams need a half turn only; "
                    "use --arc, or --geometry fan"
                )
            beam = ParallelBeam.sparse(
                self.views, shape, pixel_mm, math.pi if arc is None else arc
            )
        else:
            curved = self.geometry == "fan-curved"
            beam = FanBeam.sparse(
                self.views, shape, pixel_mm, arc, curved=curved, short_scan=self.short_scan
            )
        return beam if self.detector is None else replace(beam, bins=self.detector)

    def cone(self, matrix: int, pixel_mm: float, slices: int, dz: float) -> ConeBeam:
        """The cone beam that covers a volume in width, unless the detector is cut."""
        from inverse.operators.ct import ConeBeam

        arc = 2 * math.pi if self.arc is None else math.radians(self.arc)
        beam = ConeBeam.sparse(self.views, (slices, matrix, matrix), (dz, pixel_mm, pixel_mm), arc)
        return beam if self.detector is None else replace(beam, columns=self.detector)

    def _grid(self, images: Series) -> tuple[int, float]:
        """Matrix and pixel size of the reconstruction."""
        matrix = _matrix(self.matrix, images)
        return matrix, images.spacing[1] * images.array.shape[-1] / matrix

    def on(self, images: Series, chosen: Sequence[int]) -> ParallelBeam | FanBeam | ConeBeam:
        """The geometry for chosen slices."""
        matrix, pixel = self._grid(images)
        if self.geometry == "cone":
            return self.cone(matrix, pixel, len(chosen), _slice_distance(images, chosen))
        return self.beam(matrix, pixel)

    def data_shape(self, images: Series, chosen: Sequence[int]) -> tuple[int, ...]:
        """Shape of what the scan measures, with nothing computed."""
        one: Any = replace(self, views=1).on(images, chosen)
        if self.geometry == "cone":
            return 1, self.views, one.rows, one.columns
        return len(chosen), self.views, one.bins

    def run(
        self, images: Series, chosen: Sequence[int], seed: int, sink: Sink | None = None
    ) -> Simulation:
        """Simulate the chosen slices; a sink takes the truth."""
        from inverse.volumes import Chosen
        from phantoms.beam import implants
        from phantoms.simulate import simulate_ct

        matrix, pixel = self._grid(images)
        if self.geometry == "cone":
            return self._cone(images, chosen, matrix, pixel, seed).into(sink)
        slices = Chosen(images.array, chosen)
        metal = None
        if self.metal:
            metal = implants(slices, images.spacing[1], self.metal, seed=seed)
        return simulate_ct(
            slices,
            images.spacing[1:],
            self.beam(matrix, pixel),
            matrix=matrix,
            photons=self.photons,
            electronic_noise=self.electronic_noise,
            metal=metal,
            metal_trace=self.metal_trace,
            kvp=self.kvp,
            seed=seed,
            positions=chosen,
            sink=sink,
        )

    def _cone(
        self, images: Series, chosen: Sequence[int], matrix: int, pixel_mm: float, seed: int
    ) -> Simulation:
        """A cone beam through all chosen slices.

        Raises:
            UnsupportedError: metal, or a short scan.
        """
        from inverse.errors import UnsupportedError
        from phantoms.volumes import simulate_cone

        if self.metal or self.short_scan:
            raise UnsupportedError(
                "cone beams are simulated over an arc of --arc and without metal; leave out "
                "--metal and --short-scan, or use --geometry fan"
            )
        dz = _slice_distance(images, chosen)
        return simulate_cone(
            images.array[chosen],
            (dz, *images.spacing[1:]),
            self.cone(matrix, pixel_mm, len(chosen), dz),
            matrix=matrix,
            photons=self.photons,
            electronic_noise=self.electronic_noise,
            kvp=self.kvp,
            seed=seed,
        )


@dataclass(frozen=True)
class MriScan:
    """Undersampled k-space of one coil or several, slice by slice or of a volume."""

    acceleration: o.Acceleration = 4.0
    mask: o.MaskName = "gaussian1d"
    centre: o.Centre = 0.08
    trajectory: o.TrajectoryName = "cartesian"
    coils: o.Coils = 1
    noise: o.NoiseLevel = 0.01
    volume: o.VolumeScan = False

    command: ClassVar = "mri"

    @property
    def label(self) -> str:
        """In words."""
        path = "" if self.trajectory == "cartesian" else f" {self.trajectory}"
        path += " 3-D" if self.volume else ""
        coils = "" if self.coils == 1 else f" by {self.coils} coils"
        return f"{self.acceleration:g}-fold undersampled{path} MRI{coils}"

    def run(
        self, images: Series, chosen: Sequence[int], seed: int, sink: Sink | None = None
    ) -> Simulation:
        """Simulate the chosen slices; a sink takes the truth."""
        from inverse.volumes import Chosen
        from phantoms.simulate import simulate_mri

        if self.volume:
            return self._volume(images, chosen, seed).into(sink)
        return simulate_mri(
            Chosen(images.array, chosen),
            images.spacing[1:],
            acceleration=self.acceleration,
            kind=self.mask,
            centre_fraction=self.centre,
            trajectory=self.trajectory,
            coils=self.coils,
            noise=self.noise,
            seed=seed,
            positions=chosen,
            sink=sink,
        )

    def _volume(self, images: Series, chosen: Sequence[int], seed: int) -> Simulation:
        """One scan of all chosen slices, phase encoded along slices and rows.

        Raises:
            UnsupportedError: a pattern of one direction, or another trajectory.
        """
        from inverse.errors import UnsupportedError
        from phantoms.volumes import simulate_mri_volume

        if self.trajectory != "cartesian" or self.mask.endswith("1d"):
            raise UnsupportedError(
                f"--volume undersamples two directions of phase encoding, got --mask {self.mask} "
                f"and --trajectory {self.trajectory}; give --mask poisson, gaussian2d or random2d"
            )
        return simulate_mri_volume(
            images.array[chosen],
            (_slice_distance(images, chosen), *images.spacing[1:]),
            acceleration=self.acceleration,
            kind=self.mask,
            centre_fraction=self.centre,
            coils=self.coils,
            noise=self.noise,
            seed=seed,
        )


@dataclass(frozen=True)
class InpaintScan:
    """Missing pixels of a CT or MR series: a central square, or pixels at random."""

    hole: o.Hole = 0.25
    kind: o.HoleKind = "square"
    noise: o.NoiseLevel = 0.01
    matrix: o.Matrix = None

    command: ClassVar = "inpaint"
    volume: ClassVar = False

    @property
    def label(self) -> str:
        """In words."""
        if self.kind == "square":
            return f"Inpainting of a square, {100 * self.hole:g} % of the side"
        return f"Inpainting of {100 * self.hole:g} % of the pixels"

    def run(
        self, images: Series, chosen: Sequence[int], seed: int, sink: Sink | None = None
    ) -> Simulation:
        """Simulate the chosen slices; a sink takes the truth."""
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
        ).into(sink)


@dataclass(frozen=True)
class SliceScan:
    """Missing or thick slices of a CT or MR series.

    ``missing`` is START:STOP:STEP among the chosen slices; ``thickness`` and ``step`` count
    slices of the images, ``step`` from one thick slice to the next.
    """

    missing: o.Missing = None
    thickness: o.Thickness = None
    step: o.SliceStep = None
    noise: o.NoiseLevel = 0.01
    matrix: o.Matrix = None

    command: ClassVar = "slices"
    volume: ClassVar = True

    def __post_init__(self) -> None:
        from inverse.errors import GeometryError

        if (self.missing is None) == (self.thickness is None):
            raise GeometryError(
                "give either --missing START:STOP:STEP for slices that are not there, or "
                "--thickness N for thick ones"
            )

    @property
    def label(self) -> str:
        """In words."""
        if self.thickness is None:
            return f"Volume without the slices {self.missing}"
        apart = "" if self.step in (None, self.thickness) else f", {self.step} apart"
        return f"Thick slices of {self.thickness}{apart}"

    def run(
        self, images: Series, chosen: Sequence[int], seed: int, sink: Sink | None = None
    ) -> Simulation:
        """Simulate the volume of the chosen slices; a sink takes the truth.

        Raises:
            GeometryError: slices of unequal distance, or fewer than a thick slice has.
        """
        from phantoms.volumes import simulate_slices

        _slice_distance(images, chosen)
        missing = () if self.missing is None else parse_slices(self.missing, len(chosen))
        return simulate_slices(
            images.array[chosen],
            images.spacing[1:],
            modality="CT" if images.unit == "HU" else "MR",
            missing=missing,
            thickness=1 if self.thickness is None else self.thickness,
            step=self.step,
            matrix=_matrix(self.matrix, images) if images.unit == "HU" or self.matrix else None,
            noise=self.noise,
            seed=seed,
        ).into(sink)


def heights(images: Series, chosen: Sequence[int]) -> list[float]:
    """Position of each slice along the normal, mm."""
    import numpy as np

    row, column = np.array(images.orientation).reshape(2, 3)
    return [float(z) for z in images.positions[list(chosen)] @ np.cross(row, column)]


def _slice_distance(images: Series, chosen: Sequence[int]) -> float:
    """Distance of the chosen slices in mm, which a volume needs to be one.

    Raises:
        GeometryError: slices of unequal distance.
    """
    import numpy as np

    from inverse.errors import GeometryError

    steps = np.abs(np.diff(heights(images, chosen)))
    if len(steps) == 0:
        return float(images.spacing[0])
    if steps.min() < 0.98 * steps.max():
        raise GeometryError(
            f"a volume needs slices at equal distances, these lie {steps.min():.4g} to "
            f"{steps.max():.4g} mm apart; choose evenly spaced ones with --slices"
        )
    return float(steps.mean())


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


def read(
    selection: Selection, scan: Scan, run: RunLog, folder: Path | None = None
) -> tuple[Series, list[int]]:
    """Read the series and pick its slices; the images go to ``folder`` rather than to memory.

    Raises:
        InputError: images of another modality than the scan's, no images, or no slice left.
        ResourceError: a scan that would measure more than the limit.
    """
    import numpy as np

    from inverse.errors import InputError
    from inverse.io.series import read_series
    from inverse.volumes import DiskVolume

    log(f"reading {selection.path}")
    told, cap = _MODALITY.get(scan.command), bytes_of(selection.limits)
    with run.phase("read"), telling_kind(selection.path, "study", cap):
        images = read_series(
            selection.path,
            selection.series,
            selection.stack,
            modality=told,
            max_bytes=cap,
            allocate=np.empty if folder is None else partial(DiskVolume, folder),
        )
        run.inputs["images"] = sha256_of(selection.path)
    wanted = told or images.modality
    if images.modality != wanted:
        right = "mri" if images.modality == "MR" else "ct"
        raise InputError(
            f"'{selection.path}' holds {images.modality} images, '{scan.command}' needs {wanted}; "
            f"use 'recon study {right}' or 'recon simulate {right}'"
        )
    run.notes(images.warnings)
    if images.synthetic:
        run.warn("SYNTHETIC_SOURCE", "the source images are marked as synthetic")
    chosen = parse_slices(selection.slices, len(images.array))
    _check_size(scan, images, chosen, cap)
    return images, chosen


def _check_size(scan: Scan, images: Series, chosen: Sequence[int], cap: int) -> None:
    """Refuse a scan that would measure more than the limit, before it is simulated.

    Raises:
        ResourceError: with how much that is.
    """
    from inverse.errors import ResourceError

    if not isinstance(scan, CtScan):
        return
    shape = scan.data_shape(images, chosen)
    size = 4 * math.prod(shape)
    if size > cap:
        raise ResourceError(
            f"{scan.label} of {len(chosen)} slices measures {' x '.join(map(str, shape))} values, "
            f"{size / 2**30:.3g} GiB, which is over the limit of {cap / 2**30:g} GiB; give fewer "
            "--views or --slices, or raise --limits"
        )


def rehearse(scan: Scan, images: Series, chosen: list[int], seed: int, run: RunLog) -> Task:
    """What a dry run tries: a scan of one slice, or of the volume, with a few of its views."""
    tried = scan
    if isinstance(scan, CtScan) and scan.views > TRIED_VIEWS:
        tried = replace(scan, views=TRIED_VIEWS)
    task = simulate(tried, images, chosen if scan.volume else chosen[:1], seed, run)
    run.settings["simulation"] |= asdict(scan)
    if isinstance(scan, CtScan):
        run.settings["simulation"]["geometry"] = repr(scan.on(images, chosen))
    return replace(task, label=scan.label)


def simulate(
    scan: Scan,
    images: Series,
    chosen: list[int],
    seed: int,
    run: RunLog,
    folder: Path | None = None,
) -> Task:
    """Simulate the scan of chosen slices; its truth goes to ``folder`` rather than to memory."""
    from inverse.trust import plane
    from inverse.volumes import DiskVolume

    truth: DiskVolume | None = None

    def keep(items: slice, few: Tensor) -> None:
        nonlocal truth
        if truth is None:
            count = 1 if scan.volume else len(chosen)
            truth = DiskVolume(folder, (count, *few.shape[1:]), few.numpy().dtype)
        truth[items] = few

    log(f"simulating {scan.label}, slices: {len(chosen)}")
    with run.phase("simulate"):
        result = scan.run(images, chosen, seed, None if folder is None else keep)
    provenance = dict(result.measurement.provenance)
    run.settings["simulation"] = {**asdict(scan), **provenance}
    starved = int(provenance.get("starved", 0))
    if starved:
        run.warn("STARVED", f"{starved} detector readings caught no photon; raise --photons")
    return Task(
        measurement=result.measurement,
        truth=result.truth if truth is None else truth,
        templates=[images.templates[k] for k in chosen],
        label=scan.label,
        simulated=True,
        slices=chosen,
        z_mm=heights(images, chosen),
        plane=plane(images.orientation),
    )


Scan = CtScan | MriScan | InpaintScan | SliceScan
SCANS: tuple[type[Scan], ...] = (CtScan, MriScan, InpaintScan, SliceScan)


def register_scans(
    group: typer.Typer,
    act: Callable[[Any, Path, Path, Any], None],
    how: type,
    out: Any,
    examples: Mapping[str, str],
    *,
    phi: bool = False,
) -> None:
    """Add a command for each kind of scan to a group.

    Args:
        group: of commands.
        act: what a command does with scan, input, output and the values of ``how``.
        how: data class of the options that the group's commands share.
        out: type of the output's option.
        examples: command lines for the help, by command.
        phi: whether the commands have ``--include-phi``.
    """
    for kind in SCANS:

        def one(path: Path, out: Path, scan: Any, how: Any) -> None:
            act(scan, path, out, how)

        one.__annotations__ = {"path": o.Input, "out": out, "scan": kind, "how": how,
                               "return": None}  # fmt: skip
        one.__doc__ = str(kind.__doc__).partition("\n")[0]
        command(group, kind.command, examples=examples[kind.command], phi=phi)(one)
