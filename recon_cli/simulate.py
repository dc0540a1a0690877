"""``recon simulate``: a measurement file from images, as a scanner might have measured them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from recon_cli import options as o
from recon_cli.console import log, print_json
from recon_cli.options import command
from recon_cli.output import check_file
from recon_cli.runlog import RunLog, sha256_of
from recon_cli.scans import (
    CtScan,
    InpaintScan,
    Limits,
    MriScan,
    Scan,
    Selection,
    read,
    simulate,
)

if TYPE_CHECKING:
    from inverse.io.series import Series


def _heights(images: Series, chosen: list[int]) -> list[float]:
    """Position of each slice along the normal, mm."""
    import numpy as np

    row, column = np.array(images.orientation).reshape(2, 3)
    return [float(z) for z in images.positions[chosen] @ np.cross(row, column)]


def _simulate(
    scan: Scan, selection: Selection, out: Path, seed: int, overwrite: bool, as_json: bool
) -> None:
    check_file(out, overwrite)
    run = RunLog(f"simulate {scan.command}", {selection.path: "IN", out: "OUT"})
    images, chosen = read(selection, scan.command, run)
    task = simulate(scan, images, chosen, seed, run)

    from inverse.io.measurement_file import write_measurement

    measurement = replace(
        task.measurement,
        provenance={
            **task.measurement.provenance,
            "label": task.label,
            "slices": list(chosen),
            "source": run.inputs["images"],
        },
    )
    write_measurement(
        out, measurement, task.truth, task.templates, _heights(images, chosen), overwrite=overwrite
    )
    result = {
        "out": str(out),
        "label": task.label,
        "slices": len(chosen),
        "shape": list(measurement.data.shape),
        **sha256_of(out),
        "retrospective_simulation": True,
        "warnings": run.warnings,
    }
    if as_json:
        print_json(result)
        return
    print(f"{out}: {task.label}, data {' x '.join(map(str, measurement.data.shape))}")
    log("retrospective simulation from processed images; the file holds the truth and the DICOM "
        "headers (patient data) of its source")  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(
        help="Simulate a measurement from images and write it to a file: a retrospective "
        "simulation from processed images, by another projector than the one that reconstructs.",
        no_args_is_help=True,
    )
    app.add_typer(group, name="simulate")

    @command(
        group,
        "ct",
        examples="""
        recon simulate ct CT_FOLDER -o scan.h5 --views 23
        recon simulate ct CT_FOLDER -o low-dose.h5 --views 180 --photons 5e3
        recon simulate ct CT_FOLDER -o metal.h5 --views 180 --metal 2 --kvp 120
        """,
    )
    def ct(
        path: o.Input,
        out: o.OutFile,
        views: o.Views = 23,
        geometry: o.GeometryName = "parallel",
        arc: o.Arc = None,
        short_scan: o.ShortScan = False,
        detector: o.Detector = None,
        photons: o.Photons = 1e5,
        electronic_noise: o.ElectronicNoise = 0.0,
        kvp: o.Kvp = None,
        metal: o.Metal = 0,
        matrix: o.Matrix = None,
        seed: o.Seed = 0,
        slices: o.Slices = None,
        series: o.SeriesName = None,
        stack: o.StackName = None,
        limits: Limits = 4.0,
        overwrite: o.Overwrite = False,
        as_json: o.Json = False,
    ) -> None:
        """Sparse-view, limited-angle, truncated or low-dose CT, with metal or without."""
        scan = CtScan(
            views,
            geometry,
            arc,
            short_scan,
            detector,
            photons,
            electronic_noise,
            kvp,
            metal,
            matrix,
        )
        _simulate(
            scan, Selection(path, series, stack, slices, limits), out, seed, overwrite, as_json
        )

    @command(
        group,
        "mri",
        examples="""
        recon simulate mri MR_FOLDER -o scan.h5 --acceleration 4
        recon simulate mri MR_FOLDER -o scan.h5 --coils 8 --acceleration 8 --mask poisson
        """,
    )
    def mri(
        path: o.Input,
        out: o.OutFile,
        acceleration: o.Acceleration = 4.0,
        mask: o.MaskName = "gaussian1d",
        centre: o.Centre = 0.08,
        trajectory: o.TrajectoryName = "cartesian",
        coils: o.Coils = 1,
        noise: o.NoiseLevel = 0.01,
        seed: o.Seed = 0,
        slices: o.Slices = None,
        series: o.SeriesName = None,
        stack: o.StackName = None,
        limits: Limits = 4.0,
        overwrite: o.Overwrite = False,
        as_json: o.Json = False,
    ) -> None:
        """Undersampled MRI by one coil or several."""
        scan = MriScan(acceleration, mask, centre, trajectory, coils, noise)
        _simulate(
            scan, Selection(path, series, stack, slices, limits), out, seed, overwrite, as_json
        )

    @command(group, "inpaint", examples="recon simulate inpaint CT_FOLDER -o holes.h5 --hole 0.2")
    def inpaint(
        path: o.Input,
        out: o.OutFile,
        hole: o.Hole = 0.25,
        hole_kind: o.HoleKind = "square",
        noise: o.NoiseLevel = 0.01,
        matrix: o.Matrix = None,
        seed: o.Seed = 0,
        slices: o.Slices = None,
        series: o.SeriesName = None,
        stack: o.StackName = None,
        limits: Limits = 4.0,
        overwrite: o.Overwrite = False,
        as_json: o.Json = False,
    ) -> None:
        """Missing pixels."""
        scan = InpaintScan(hole, hole_kind, noise, matrix)
        _simulate(
            scan, Selection(path, series, stack, slices, limits), out, seed, overwrite, as_json
        )
