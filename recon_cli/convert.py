"""``recon convert``: scanners' raw data to a measurement file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from recon_cli import options as o
from recon_cli.console import log, print_json
from recon_cli.dryrun import plan_measurement, tell
from recon_cli.errors import usage
from recon_cli.inspect import telling_kind
from recon_cli.options import bytes_of, check_ending, command
from recon_cli.output import check_file
from recon_cli.runlog import SCHEMA_VERSION, sha256_of

if TYPE_CHECKING:
    from inverse.io.kspace import KSpace
    from inverse.io.measurement_file import MeasurementFile
    from inverse.io.sinogram import Sinogram

_RAW = "Raw data"

_Input = Annotated[
    Path,
    typer.Argument(
        metavar="RAW",
        help="ISMRMRD, fastMRI or Data Exchange HDF5 file, BART .cfl/.hdr pair, or a folder or "
        "zip archive of DICOM-CT-PD projections.",
        show_default=False,
    ),
]
_Format = Annotated[
    Literal["auto", "ismrmrd", "fastmri", "bart", "ctpd", "dxchange"],
    typer.Option("--format", help="Format of the raw data.", rich_help_panel=_RAW),
]
_Pixel = Annotated[
    float | None,
    typer.Option(
        "--pixel-mm",
        min=1e-6,
        help="Pixel size: of the image (MRI, fan-beam CT), of the detector (Data Exchange).",
        show_default="the file's",
        rich_help_panel=_RAW,
    ),
]
_Grid = Annotated[
    int,
    typer.Option(
        "--matrix", min=16, max=4096, help="Rows and columns of CT images.", rich_help_panel=_RAW
    ),
]
_Water = Annotated[
    float | None,
    typer.Option(
        "--mu-water",
        min=1e-6,
        help="Attenuation of water in 1/mm, which fixes HU.",
        show_default="the file's, else 0.0206 (60 keV)",
        rich_help_panel=_RAW,
    ),
]
_Axis = Annotated[
    float | None,
    typer.Option(
        "--centre",
        help="Detector column of the rotation axis, from 0 (Data Exchange).",
        show_default="the file's, else fitted",
        rich_help_panel=_RAW,
    ),
]
_Contrast = Annotated[
    int | None,
    typer.Option(
        "--contrast", min=0, help="Which contrast (ISMRMRD), from 0.", rich_help_panel=_RAW
    ),
]
_Repetition = Annotated[
    int | None,
    typer.Option(
        "--repetition", min=0, help="Which repetition (ISMRMRD), from 0.", rich_help_panel=_RAW
    ),
]
_Template = Annotated[
    Path | None,
    typer.Option(
        "--template",
        metavar="IMAGES",
        help="Image series of the same slices, whose patient and geometry the results take.",
        rich_help_panel=_RAW,
    ),
]


def _read(
    path: Path,
    name: str,
    *,
    slices: str | None,
    pixel_mm: float | None,
    centre: float | None,
    contrast: int | None,
    repetition: int | None,
    max_bytes: int,
) -> KSpace | Sinogram:
    """The raw data of the chosen slices."""
    raw: KSpace | Sinogram
    if name == "dxchange":
        from inverse.io.dxchange import read_dxchange

        return read_dxchange(
            path,
            pixel_mm=pixel_mm,
            centre=centre,
            rows=lambda count: o.parse_slices(slices, count),
            max_bytes=max_bytes,
        )
    if name == "ismrmrd":
        from inverse.io.ismrmrd import read_ismrmrd

        raw = read_ismrmrd(path, contrast=contrast, repetition=repetition, max_bytes=max_bytes)
    elif name == "fastmri":
        from inverse.io.fastmri import read_fastmri

        raw = read_fastmri(path, max_bytes=max_bytes)
    elif name == "bart":
        from inverse.io.bart import read_bart

        if pixel_mm is None:
            raise usage("BART files hold no geometry; give the image's pixel size with --pixel-mm")
        raw = read_bart(path, (pixel_mm, pixel_mm), max_bytes=max_bytes)
    else:
        from inverse.io.ctpd import read_ctpd

        raw = read_ctpd(path, max_bytes=max_bytes)
    return raw.take(o.parse_slices(slices, len(raw.data)))


def _templates(path: Path, file: MeasurementFile, max_bytes: int) -> tuple[bytes, ...]:
    """Headers of an image series with as many slices as the measurement."""
    from inverse.errors import InputError
    from inverse.io.series import inspect, read_series

    modality = file.measurement.modality
    stacks = [s for s in inspect(path, max_bytes=max_bytes).stacks if not s.localizer]
    if len(stacks) > 1:
        raise InputError(
            f"--template '{path}' holds {len(stacks)} stacks; give the folder or file of one "
            "series ('recon inspect' lists them)"
        )
    images = read_series(path, modality=modality, max_bytes=max_bytes)
    if images.modality != modality or len(images.templates) != len(file.measurement):
        raise InputError(
            f"--template '{path}' holds {len(images.templates)} {images.modality} slices, the raw "
            f"data {len(file.measurement)} {modality} slices; give a series of the same slices"
        )
    return images.templates


def _describe(out: Path, name: str, file: MeasurementFile) -> dict[str, Any]:
    """The measurement in plain JSON values."""
    measurement = file.measurement
    noise = measurement.noise
    return {
        "schema_version": SCHEMA_VERSION,
        "out": str(out),
        "format": name,
        "label": measurement.provenance["label"],
        "modality": measurement.modality,
        "operator": repr(measurement.operator),
        "slices": len(measurement),
        "shape": list(measurement.data.shape),
        "pixel_mm": list(measurement.pixel_mm),
        "z_mm": list(file.z_mm),
        "noise": {
            "median": float(noise.median()),
            "from": measurement.provenance["noise"],
        },
        "provenance": dict(measurement.provenance),
    }


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(
        app,
        "convert",
        examples="""
        recon convert scan.h5 -o meas.h5
        recon convert ksp.cfl -o meas.h5 --pixel-mm 1.2
        recon convert tomo.h5 -o meas.h5 --slices 500 --matrix 512
        """,
    )
    def convert(
        path: _Input,
        out: o.OutFile,
        format: _Format = "auto",
        slices: o.Slices = None,
        pixel_mm: _Pixel = None,
        matrix: _Grid = 256,
        mu_water: _Water = None,
        centre: _Axis = None,
        contrast: _Contrast = None,
        repetition: _Repetition = None,
        template: _Template = None,
        limits: o.Limits = 4.0,
        overwrite: o.Overwrite = False,
        dry_run: o.DryRun = False,
        as_json: o.Json = False,
    ) -> None:
        """Make a measurement file of raw data: k-space or projections as scanners export them."""
        from inverse.io.kspace import KSpace
        from inverse.io.measurement_file import write_measurement
        from inverse.io.raw import detect_raw

        check_ending(out, ".h5", ".hdf5")
        check_file(out, overwrite)
        cap = bytes_of(limits)
        with telling_kind(path, "convert", cap):
            name = detect_raw(path) if format == "auto" else format
            log(f"reading {name} data")
            raw = _read(
                path,
                name,
                slices=slices,
                pixel_mm=pixel_mm,
                centre=centre,
                contrast=contrast,
                repetition=repetition,
                max_bytes=cap,
            )
        if isinstance(raw, KSpace):
            file = raw.measurement()
        else:
            image_mm = pixel_mm if name == "ctpd" else None
            file = raw.measurement(matrix, image_mm, mu_water)
        if template is not None:
            file = replace(file, template=_templates(template, file, cap))
        result = _describe(out, name, file)
        if dry_run:
            tell(plan_measurement(out, result, file), as_json)
            return
        write_measurement(
            out, file.measurement, template=file.template, z_mm=file.z_mm, overwrite=overwrite
        )
        result |= sha256_of(out)
        if as_json:
            print_json(result)
            return
        print(f"{out}: {result['label']}, data {' x '.join(map(str, result['shape']))}")
        log(f"noise {result['noise']['median']:.4g} from {result['noise']['from']}")
