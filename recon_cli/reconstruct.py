"""``recon reconstruct``: images from a measurement file, with no truth needed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recon_cli import options as o
from recon_cli.options import command
from recon_cli.output import working_folder
from recon_cli.pipeline import (
    Recipe,
    Task,
    check_method,
    choose_prior,
    execute,
    pick_device,
    show,
)
from recon_cli.runlog import RunLog, sha256_of
from recon_cli.scans import Limits, bytes_of

if TYPE_CHECKING:
    from inverse.io.measurement_file import MeasurementFile

_Input = Annotated[
    Path,
    typer.Argument(
        metavar="MEAS",
        help="Measurement file, as 'recon simulate' writes it.",
        show_default=False,
    ),
]


def _headers(file: MeasurementFile, identity: str) -> list[bytes]:
    """DICOM headers for data that came without any: no patient, axial slices about the origin."""
    import numpy as np

    from inverse.io.dicom import TOOLKIT, deterministic_uid, read_series, write_instances

    measurement = file.measurement
    rows, columns = measurement.operator.in_shape
    dy, dx = measurement.pixel_mm
    count = len(measurement)
    z_mm = file.z_mm or tuple(float(k) for k in range(count))
    thickness = float(np.median(np.diff(z_mm))) if count > 1 else 1.0
    ct = measurement.modality == "CT"
    common: dict[str, Any] = {
        "SOPClassUID": f"1.2.840.10008.5.1.4.1.1.{2 if ct else 4}",
        "Modality": measurement.modality,
        "ImageType": ["DERIVED", "SECONDARY", "AXIAL" if ct else "OTHER"],
        "StudyInstanceUID": deterministic_uid("raw study", identity),
        "SeriesInstanceUID": deterministic_uid("raw series", identity),
        "FrameOfReferenceUID": deterministic_uid("raw frame", identity),
        "PatientName": "UNKNOWN",
        "PatientID": f"RAW-{identity[:12]}",
        "StudyID": "1",
        "PatientPosition": "HFS",
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelSpacing": [dy, dx],
        "SliceThickness": abs(thickness) or 1.0,
        "Manufacturer": TOOLKIT,
    }
    if ct:
        common |= {"RescaleSlope": 1, "RescaleIntercept": -1024, "RescaleType": "HU"}
    x, y = -(columns - 1) / 2 * dx, -(rows - 1) / 2 * dy
    headers = [
        common
        | {
            "SOPInstanceUID": deterministic_uid("raw slice", identity, k),
            "InstanceNumber": k + 1,
            "ImagePositionPatient": [x, y, z],
        }
        for k, z in enumerate(z_mm)
    ]
    with tempfile.TemporaryDirectory() as folder:
        pixels = np.zeros((count, rows, columns), np.uint16)
        write_instances(Path(folder) / "headers", headers, pixels)
        return list(read_series(Path(folder) / "headers").templates)


def _task(path: Path, run: RunLog, max_bytes: int) -> Task:
    from inverse.errors import InputError
    from inverse.io.measurement_file import read_measurement

    with run.phase("read"):
        file = read_measurement(path, max_bytes=max_bytes)
        run.inputs["measurement"] = sha256_of(path)
    provenance = dict(file.measurement.provenance)
    run.settings["measurement"] = provenance
    templates = list(file.template)
    if not templates:
        if list(file.z_mm) != sorted(set(file.z_mm)):
            raise InputError(
                f"'{path}' gives slice positions that do not ascend; sort the slices by position"
            )
        templates = _headers(file, str(run.inputs["measurement"]["sha256"]))
        run.warn(
            "NO_TEMPLATE",
            "the measurement carries no DICOM headers; the series are of an unknown patient, with "
            "new identifiers, axial slices about the origin"
            + ("" if file.z_mm else " and a slice spacing of 1 mm"),
        )
    count = len(file.measurement)
    slices = provenance.get("slices")
    if not isinstance(slices, list) or [type(k) for k in slices] != [int] * count:
        slices = list(range(count))
    return Task(
        measurement=file.measurement,
        truth=file.truth,
        templates=templates,
        label=str(provenance.get("label") or f"{file.measurement.modality} reconstruction"),
        simulated="simulation" in provenance,
        slices=slices,
    )


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(
        app,
        "reconstruct",
        examples="""
        recon reconstruct scan.h5 -o out
        recon reconstruct scan.h5 -o out --samples 8 --seed 1
        recon reconstruct scan.h5 -o out --samples 8 --seed 1 --resume
        """,
    )
    def reconstruct(
        path: _Input,
        out: o.Out,
        prior: o.PriorName = None,
        method: o.MethodName = o.DEFAULT_METHOD,
        option: o.MethodOption = None,
        steps: o.Steps = None,
        samples: o.Samples = 1,
        batch: o.Batch = 8,
        device: o.Device = "auto",
        seed: o.Seed = 0,
        limits: Limits = 4.0,
        resume: o.Resume = False,
        overwrite: o.Overwrite = False,
        as_json: o.Json = False,
    ) -> None:
        """Reconstruct a measurement file, beside its direct classical image."""
        chosen = check_method(method)
        options = o.read_options(chosen, option or [])
        run = RunLog("reconstruct", {path: "MEAS", out: "OUT"})
        with working_folder(out, overwrite=overwrite, inputs=[path], resume=resume) as work:
            device = pick_device(device)
            task = _task(path, run, bytes_of(limits))
            recipe = Recipe(
                prior=choose_prior(prior, task.measurement.modality),
                method=method,
                steps=steps,
                samples=samples,
                seed=seed,
                batch=batch,
                device=device,
                options=options,
                tv=False,
            )
            metrics = execute(task, recipe, work.folder, run, work.saved)
        show(out, task, metrics, run, as_json)
