"""``recon phantom``: a test object with known truth, to arrays, DICOM, NIfTI or a measurement."""

from __future__ import annotations

import io
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from recon_cli import options as o
from recon_cli.console import log, print_json, print_table
from recon_cli.errors import usage
from recon_cli.options import command
from recon_cli.output import check_file, output_folder
from recon_cli.runlog import RunLog, sha256_of, write_json, write_whole

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from phantoms.catalogue import Entry, Made
    from phantoms.scene import Section
    from phantoms.simulate import Simulation

_OBJECT, _SCAN = "Object", "Measurement (OUT ending in .h5)"
_FORMATS = (".npy", ".npz", ".nii", ".h5")
_MAX_BYTES = 4 * 2**30
TEXTURE = "texture"
"""The one phantom that is no sum of shapes."""

_Motion = Literal["none", "rigid", "breathing"]


@dataclass(frozen=True)
class _Grid:
    """Where the images are sampled."""

    size: int
    pixel_mm: float
    heights: list[float]
    spacing_mm: float
    thickness_mm: float

    @property
    def steps(self) -> tuple[float, float, float]:
        """(slice, row, column) spacing."""
        return self.spacing_mm, self.pixel_mm, self.pixel_mm


@dataclass(frozen=True)
class _Scan:
    """How a measurement file is simulated."""

    views: int
    geometry: str
    photons: float
    acceleration: float
    mask: str
    noise: float
    motion: _Motion
    metal: int


def _list(wanted: bool) -> None:
    if not wanted:
        return
    from phantoms.catalogue import PHANTOMS

    rows = [
        [name, e.modality, e.unit, e.summary, str(e.slices), f"{e.field_mm:g}"]
        for name, e in PHANTOMS.items()
    ]
    rows.append([TEXTURE, "CT", "HU", "random texture of anatomical noise, 20 HU", "1", "256"])
    print_table("Phantoms", ["name", "modality", "unit", "what", "slices", "field mm"], rows, 4)
    raise typer.Exit


def _entry(name: str) -> Entry:
    from phantoms.catalogue import PHANTOMS, Entry

    if name == TEXTURE:
        return Entry("random texture", "CT", lambda c: _no_section(), ("seed",), field_mm=256)
    if name not in PHANTOMS:
        raise usage(
            f"no phantom '{name}'; there are {', '.join([*PHANTOMS, TEXTURE])} "
            "('recon phantom --list')"
        )
    return PHANTOMS[name]


def _no_section() -> Made:
    raise usage(f"{TEXTURE} is random on its grid and has no closed form")


def _grid(
    entry: Entry,
    size: int,
    pixel_mm: float | None,
    slices: int | None,
    spacing_mm: float | None,
    thickness_mm: float,
) -> _Grid:
    """Slices about z = 0; refuses what lies outside the phantom or does not fit in memory."""
    from inverse.errors import GeometryError, ResourceError

    count = slices or entry.slices
    step = spacing_mm or entry.spacing_mm
    heights = [(k - (count - 1) / 2) * step for k in range(count)]
    reach = abs(heights[0]) + thickness_mm / 2
    if reach > entry.reach_mm:
        raise GeometryError(
            f"{count} slices {step:g} mm apart and {thickness_mm:g} mm thick reach {reach:g} mm "
            f"from the middle, the phantom {entry.reach_mm:g} mm; give fewer --slices or a "
            "smaller --spacing-mm"
        )
    if 4 * count * size**2 > _MAX_BYTES:
        raise ResourceError(
            f"{count} slices of {size} x {size} pixels need more than "
            f"{_MAX_BYTES / 2**30:g} GiB; give fewer --slices or a smaller --size"
        )
    return _Grid(size, pixel_mm or entry.field_mm / size, heights, step, thickness_mm)


def _images(
    name: str, entry: Entry, made: Made | None, grid: _Grid, metal: int, seed: int
) -> NDArray[np.float32]:
    """HU (CT) or signal (MR), (slices, rows, columns)."""
    import numpy as np

    from inverse.operators.units import AIR_HU
    from phantoms.catalogue import render, texture

    if made is None:
        return texture((len(grid.heights), grid.size, grid.size), grid.steps, seed)
    shape = (grid.size, grid.size)
    volume = render(made, grid.heights, shape, grid.pixel_mm, grid.thickness_mm)
    if entry.modality == "MR":
        return np.maximum(volume, 0)
    volume = np.maximum(volume + AIR_HU, AIR_HU).astype(np.float32)
    if metal:
        from phantoms.beam import TITANIUM, WATER, implants

        ratio = float(TITANIUM.attenuation(60.0) / WATER.attenuation(60.0))
        where = implants(volume, grid.pixel_mm, metal, seed=seed)
        volume = np.where(where, np.float32(1000 * (ratio - 1)), volume)
    return volume


def _motion(kind: _Motion, count: int, seed: int) -> Any:
    """Poses of a scan: a slow random drift, or breaths of 4 s while 0.02 s pass a pose."""
    import numpy as np

    from phantoms.motion import Motion, breath

    time = 0.02 * np.arange(count)
    if kind == "breathing":
        return Motion.breathing(breath(time))
    rng = np.random.default_rng([seed, 7])
    ends = np.array([np.deg2rad(3), 3.0, 3.0]) * rng.uniform(-1, 1, 3)
    drift = np.linspace(0, 1, count) ** 2
    return Motion.rigid(*(drift * end for end in ends))


def _measure(
    name: str, entry: Entry, made: Made | None, grid: _Grid, scan: _Scan, seed: int
) -> Simulation:
    """What a scanner would have measured, from closed forms wherever there are some."""
    import math

    from inverse.operators.ct import FanBeam, ParallelBeam
    from phantoms.catalogue import section
    from phantoms.simulate import simulate_ct, simulate_ct_analytic

    if entry.modality == "MR":
        from phantoms.motion import Moving, simulate_mri_analytic

        assert made is not None
        sections = [section(made, z, grid.thickness_mm) for z in grid.heights]
        if scan.motion != "none":
            poses = _motion(scan.motion, grid.size, seed)
            sections = [Moving(one, poses) for one in sections]
        return simulate_mri_analytic(
            sections,
            (grid.size, grid.size),
            grid.pixel_mm,
            acceleration=scan.acceleration,
            kind=cast(Any, scan.mask),
            noise=scan.noise,
            seed=seed,
        )
    beam: ParallelBeam | FanBeam
    shape = (grid.size, grid.size)
    if scan.geometry == "parallel":
        beam = ParallelBeam.sparse(scan.views, shape, grid.pixel_mm)
    else:
        far = max(570.0, math.hypot(*shape) * grid.pixel_mm)
        curved = scan.geometry == "fan-curved"
        beam = FanBeam.sparse(scan.views, shape, grid.pixel_mm, source_mm=far, curved=curved)
    if made is None or scan.metal:
        from phantoms.beam import implants

        fine = _Grid(
            2 * grid.size, grid.pixel_mm / 2, grid.heights, grid.spacing_mm, grid.thickness_mm
        )
        hu = _images(name, entry, made, fine, 0, seed)
        metal = implants(hu, fine.pixel_mm, scan.metal, seed=seed) if scan.metal else None
        return simulate_ct(
            hu, fine.pixel_mm, beam, matrix=grid.size, photons=scan.photons, metal=metal, seed=seed
        )
    still: list[Section] = [section(made, z, grid.thickness_mm) for z in grid.heights]
    if scan.motion != "none":
        from phantoms.motion import Moving

        poses = _motion(scan.motion, scan.views, seed)
        still = [Moving(one, poses) for one in still]
    return simulate_ct_analytic(
        still,
        grid.pixel_mm,
        beam,
        matrix=grid.size,
        photons=scan.photons,
        seed=seed,
    )


def _to_mu(volume: NDArray[np.float32], kev: float) -> NDArray[np.float32]:
    """HU to attenuation in 1/mm with water's at an energy."""
    import numpy as np

    from inverse.operators.units import hu_to_mu
    from phantoms.beam import WATER

    return np.asarray(hu_to_mu(volume, float(WATER.attenuation(kev))), np.float32)


def _attributes(name: str, contrast: str, field: float) -> dict[str, Any]:
    """DICOM attributes of the brain's sequence."""
    from phantoms.series import mr_attributes
    from phantoms.tissue import SEQUENCES

    return mr_attributes(SEQUENCES[contrast], field) if name == "brain" else {}


def _arrays(
    volume: NDArray[np.float32], grid: _Grid, unit: str, name: str, seed: int, made: Made | None
) -> dict[str, Any]:
    """What an .npz file holds."""
    import numpy as np

    lesions = made.lesions if made is not None else ()
    return {
        "image": volume,
        "z_mm": np.array(grid.heights),
        "pixel_mm": np.array([grid.pixel_mm, grid.pixel_mm]),
        "unit": np.array(unit),
        "phantom": np.array(name),
        "seed": np.array(seed),
        "lesion_site": np.array([lesion.site for lesion in lesions], dtype="U16"),
        "lesion": np.array(
            [[*lesion.centre, lesion.radius, lesion.contrast] for lesion in lesions]
        ).reshape(-1, 5),
    }


def _write_array(out: Path, volume: NDArray[np.float32], arrays: dict[str, Any]) -> None:
    import numpy as np

    stream = io.BytesIO()
    if out.suffix.lower() == ".npy":
        np.save(stream, volume)
    else:
        np.savez_compressed(stream, **arrays)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, stream.getvalue())


def _write_measurement(
    out: Path, result: Simulation, volume: NDArray[np.float32], grid: _Grid, entry: Entry,
    name: str, seed: int, attributes: dict[str, Any], overwrite: bool,
) -> None:  # fmt: skip
    """A measurement file with the DICOM headers of the phantom, so that results are DICOM."""
    from dataclasses import replace

    from inverse.io.dicom import read_series
    from inverse.io.measurement_file import write_measurement
    from phantoms.series import write_phantom_series

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "series"
        write_phantom_series(
            folder, volume, grid.steps, seed=seed, modality=entry.modality,
            body_part=entry.body_part, attributes=attributes,
        )  # fmt: skip
        templates = read_series(folder).templates
    provenance = {
        **result.measurement.provenance,
        "label": f"Phantom {name}, simulated",
        "phantom": name,
        "phantom_seed": seed,
        "slices": list(range(len(grid.heights))),
    }
    write_measurement(
        out,
        replace(result.measurement, provenance=provenance),
        result.truth,
        templates,
        grid.heights,
        overwrite=overwrite,
    )


def _check_options(name: str, entry: Entry, kind: str, unit: str, scan: _Scan) -> None:
    """Refuse combinations without a meaning; `kind` is the output's suffix."""
    if unit == "mu" and entry.modality != "CT":
        raise usage(f"--unit mu is for CT phantoms, {name} is MR signal")
    if unit == "mu" and kind not in (".npy", ".npz", ".nii"):
        raise usage("--unit mu is for .npy, .npz and .nii files; DICOM CT holds HU")
    if scan.metal and entry.modality != "CT":
        raise usage(f"--metal is for CT phantoms, {name} is MR")
    if scan.motion != "none" and kind != ".h5":
        raise usage("--motion acts during a scan; give an output that ends in .h5")
    if scan.motion != "none" and (name == TEXTURE or scan.metal):
        raise usage("--motion needs a phantom in closed form, without --metal")


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(
        app,
        "phantom",
        examples="""
        recon phantom --list
        recon phantom chest -o chest --slices 16 --seed 7
        recon phantom brain -o brain.nii.gz --contrast flair --field 3
        recon phantom acr-ct -o acr.h5 --views 180 --photons 2e4
        recon phantom forbild-head -o head.npz --size 512 --unit mu --kev 60
        """,
    )
    def phantom(
        name: Annotated[
            str | None,
            typer.Argument(metavar="NAME", help="Which phantom; --list tells.",
                           show_default=False),
        ] = None,
        out: Annotated[
            Path | None,
            typer.Option(
                "--out", "-o", metavar="OUT", show_default=False,
                help="A folder is a DICOM series; a file by its ending: .npy, .npz, .nii, "
                ".nii.gz, or .h5 for a simulated measurement.",
            ),
        ] = None,
        size: Annotated[
            int, typer.Option("--size", min=16, max=4096, help="Rows and columns.",
                              rich_help_panel=_OBJECT),
        ] = 256,
        pixel_mm: Annotated[
            float | None,
            typer.Option("--pixel-mm", min=0.01, max=100.0, help="Pixel size.",
                         show_default="the phantom's field over --size",
                         rich_help_panel=_OBJECT),
        ] = None,
        slices: Annotated[
            int | None,
            typer.Option("--slices", min=1, max=2000, help="Number of slices about the middle.",
                         show_default="the phantom's", rich_help_panel=_OBJECT),
        ] = None,
        spacing_mm: Annotated[
            float | None,
            typer.Option("--spacing-mm", min=0.01, help="Distance of slices.",
                         show_default="the phantom's", rich_help_panel=_OBJECT),
        ] = None,
        thickness_mm: Annotated[
            float, typer.Option("--thickness-mm", min=0.0, help="Thickness of a slice; 0 is thin.",
                                rich_help_panel=_OBJECT),
        ] = 0.0,
        seed: Annotated[
            int, typer.Option("--seed", min=0, help="Seed of the anatomy, of metal and noise.")
        ] = 0,
        lesions: Annotated[
            bool, typer.Option("--lesions/--no-lesions", help="Lesions of random anatomies.",
                               rich_help_panel=_OBJECT),
        ] = True,
        metal: Annotated[
            int, typer.Option("--metal", metavar="RODS", min=0, max=8,
                              help="Titanium rods of 10 mm (CT).", rich_help_panel=_OBJECT),
        ] = 0,
        contrast: Annotated[
            Literal["t1", "t2", "pd", "flair", "spgr"],
            typer.Option("--contrast", help="MR sequence of the brain.", rich_help_panel=_OBJECT),
        ] = "t1",
        field: Annotated[
            float, typer.Option("--field", metavar="1.5|3", help="Field of the brain in tesla.",
                                rich_help_panel=_OBJECT),
        ] = 1.5,
        part: Annotated[
            Literal["resolution", "grid", "uniformity", "contrast"],
            typer.Option("--part", help="Slice of the ACR MR phantom.", rich_help_panel=_OBJECT),
        ] = "resolution",
        unit: Annotated[
            Literal["auto", "mu"],
            typer.Option("--unit", help="HU for CT and signal for MR, or attenuation in 1/mm.",
                         rich_help_panel=_OBJECT),
        ] = "auto",
        kev: Annotated[
            float, typer.Option("--kev", min=20.0, max=150.0, help="Energy of --unit mu.",
                                rich_help_panel=_OBJECT),
        ] = 60.0,
        views: Annotated[
            int, typer.Option("--views", min=1, help="CT views.", rich_help_panel=_SCAN)
        ] = 180,
        geometry: Annotated[
            Literal["parallel", "fan", "fan-curved"],
            typer.Option("--geometry", help="CT beam.", rich_help_panel=_SCAN),
        ] = "parallel",
        photons: Annotated[
            float, typer.Option("--photons", min=1.0, help="Photons a detector bin in air.",
                                rich_help_panel=_SCAN),
        ] = 1e5,
        acceleration: Annotated[
            float, typer.Option("--acceleration", min=1.0, help="k-space size over samples.",
                                rich_help_panel=_SCAN),
        ] = 4.0,
        mask: Annotated[
            Literal["uniform1d", "random1d", "gaussian1d", "partial1d", "random2d", "gaussian2d",
                    "poisson"],
            typer.Option("--mask", help="Sampling pattern in k-space.", rich_help_panel=_SCAN),
        ] = "gaussian1d",
        noise: Annotated[
            float, typer.Option("--noise", min=1e-6, help="Noise std relative to the signal (MR).",
                                rich_help_panel=_SCAN),
        ] = 0.01,
        motion: Annotated[
            _Motion,
            typer.Option("--motion", help="Motion during the scan: a slow drift, or breaths.",
                         rich_help_panel=_SCAN),
        ] = "none",
        overwrite: o.Overwrite = False,
        as_json: o.Json = False,
        _: Annotated[
            bool, typer.Option("--list", callback=_list, is_eager=True, help="List the phantoms."),
        ] = False,
    ) -> None:  # fmt: skip
        """Make a phantom with known truth: arrays, DICOM, NIfTI, or a simulated measurement."""
        if name is None or out is None:
            raise usage("give a NAME ('recon phantom --list') and an output with -o")
        entry = _entry(name)
        kind = ".nii" if out.name.lower().endswith(".nii.gz") else out.suffix.lower()
        if kind not in ("", *_FORMATS):
            raise usage(
                f"output '{out}' ends in {kind}, which is none of {', '.join(_FORMATS)} and "
                ".nii.gz; a folder for a DICOM series has no ending"
            )
        scan = _Scan(views, geometry, photons, acceleration, mask, noise, motion, metal)
        _check_options(name, entry, kind, unit, scan)
        sidecar = out.with_name(out.name.partition(".nii")[0] + ".json")
        for path in [out] * bool(kind) + [sidecar] * (kind == ".nii"):
            check_file(path, overwrite)
        from phantoms.catalogue import Choice

        run = RunLog("phantom", {out: "OUT"})
        run.seed, run.simulation = seed, True
        choice = Choice(seed, lesions, contrast, field, part)
        grid = _grid(entry, size, pixel_mm, slices, spacing_mm, thickness_mm)
        made = None if name == TEXTURE else entry.make(choice)
        log(f"{name}: {len(grid.heights)} slices of {size} x {size} pixels")
        volume = _images(name, entry, made, grid, metal, seed)
        attributes = _attributes(name, contrast, field)
        planted = () if made is None else made.lesions
        run.settings["phantom"] = {
            "name": name,
            "z_mm": grid.heights,
            "thickness_mm": thickness_mm,
            "lesions": [asdict(lesion) for lesion in planted],
        }
        stored = "1/mm" if unit == "mu" else entry.unit
        if unit == "mu":
            volume = _to_mu(volume, kev)
        if kind in (".npy", ".npz"):
            _write_array(out, volume, _arrays(volume, grid, stored, name, seed, made))
        elif kind == ".nii":
            from phantoms.series import phantom_nifti

            packed, about = phantom_nifti(volume, grid.steps, modality=entry.modality, unit=stored,
                                          compress=out.name.endswith(".gz"))  # fmt: skip
            out.parent.mkdir(parents=True, exist_ok=True)
            write_whole(sidecar, about)
            write_whole(out, packed)
        elif kind == ".h5":
            result = _measure(name, entry, made, grid, scan, seed)
            _write_measurement(out, result, volume, grid, entry, name, seed, attributes, overwrite)
            stored = "measurement"
        else:
            from phantoms.series import write_phantom_series

            with output_folder(out, overwrite=overwrite) as folder:
                write_phantom_series(
                    folder, volume, grid.steps, seed=seed, modality=entry.modality,
                    body_part=entry.body_part, attributes=attributes,
                )  # fmt: skip
                run.outputs["dicom"] = sha256_of(folder) | {"slices": len(grid.heights)}
                write_json(folder / "run.json", run.to_dict())
        told = {
            "out": str(out),
            "phantom": name,
            "modality": entry.modality,
            "unit": stored,
            "shape": list(volume.shape),
            "spacing_mm": list(grid.steps),
            "range": [float(volume.min()), float(volume.max())],
            "lesions": len(planted),
            "seed": seed,
            **sha256_of(out),
        }
        if as_json:
            print_json(told)
            return
        low, high = told["range"]
        what = f"{stored}, {low:.4g} to {high:.4g}" if kind != ".h5" else "simulated measurement"
        print(f"{out}: {name}, {' x '.join(map(str, volume.shape))}, {what}")
