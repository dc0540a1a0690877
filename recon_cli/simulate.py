"""``recon simulate``: a measurement file from images, as a scanner might have measured them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import typer

from recon_cli import options as o
from recon_cli.console import log, print_json
from recon_cli.dryrun import plan_file, tell
from recon_cli.options import command
from recon_cli.output import check_file
from recon_cli.runlog import SCHEMA_VERSION, RunLog, sha256_of
from recon_cli.scans import (
    CtScan,
    InpaintScan,
    Limits,
    MriScan,
    Scan,
    Selection,
    SliceScan,
    heights,
    read,
    simulate,
)


def _simulate(
    scan: Scan,
    selection: Selection,
    out: Path,
    *,
    seed: int,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    check_file(out, overwrite)
    run = RunLog(f"simulate {scan.command}", {selection.path: "IN", out: "OUT"})
    images, chosen = read(selection, scan.command, run)
    run.identify(images.templates[0])
    if dry_run:
        # one slice tells what the scan makes of all of them, but where it measures volumes
        task = simulate(scan, images, chosen if scan.volume else chosen[:1], seed, run)
        tell(plan_file(out, task, chosen, run, images=images), as_json)
        return
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
        out, measurement, task.truth, task.templates, heights(images, chosen), overwrite=overwrite
    )
    result = {
        "schema_version": SCHEMA_VERSION,
        "out": str(out),
        "label": task.label,
        "slices": len(chosen),
        "shape": list(measurement.data.shape),
        **sha256_of(out),
        "retrospective_simulation": True,
        "warnings": run.warnings,
        **({"patient": run.patient} if run.patient else {}),
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
        phi=True,
        examples="""
        recon simulate ct CT_FOLDER -o scan.h5 --views 23
        recon simulate ct CT_FOLDER -o low-dose.h5 --views 180 --photons 5e3
        recon simulate ct CT_FOLDER -o metal.h5 --views 180 --metal 2 --kvp 120
        recon simulate ct CT_FOLDER -o cone.h5 --geometry cone --views 60 --matrix 64
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
        metal_trace: o.MetalTraceName = "true",
        matrix: o.Matrix = None,
        seed: o.Seed = 0,
        slices: o.Slices = None,
        series: o.SeriesName = None,
        stack: o.StackName = None,
        limits: Limits = 4.0,
        overwrite: o.Overwrite = False,
        dry_run: o.DryRun = False,
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
            metal_trace,
        )
        _simulate(
            scan,
            Selection(path, series, stack, slices, limits),
            out,
            seed=seed,
            overwrite=overwrite,
            dry_run=dry_run,
            as_json=as_json,
        )

    @command(
        group,
        "mri",
        phi=True,
        examples="""
        recon simulate mri MR_FOLDER -o scan.h5 --acceleration 4
        recon simulate mri MR_FOLDER -o scan.h5 --coils 8 --acceleration 8 --mask poisson
        recon simulate mri MR_FOLDER -o volume.h5 --volume --acceleration 6 --mask poisson
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
        volume: o.VolumeScan = False,
        seed: o.Seed = 0,
        slices: o.Slices = None,
        series: o.SeriesName = None,
        stack: o.StackName = None,
        limits: Limits = 4.0,
        overwrite: o.Overwrite = False,
        dry_run: o.DryRun = False,
        as_json: o.Json = False,
    ) -> None:
        """Undersampled MRI by one coil or several, slice by slice or of a volume."""
        scan = MriScan(acceleration, mask, centre, trajectory, coils, noise, volume)
        _simulate(
            scan,
            Selection(path, series, stack, slices, limits),
            out,
            seed=seed,
            overwrite=overwrite,
            dry_run=dry_run,
            as_json=as_json,
        )

    @command(
        group,
        "inpaint",
        phi=True,
        examples="recon simulate inpaint CT_FOLDER -o holes.h5 --hole 0.2",
    )
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
        dry_run: o.DryRun = False,
        as_json: o.Json = False,
    ) -> None:
        """Missing pixels."""
        scan = InpaintScan(hole, hole_kind, noise, matrix)
        _simulate(
            scan,
            Selection(path, series, stack, slices, limits),
            out,
            seed=seed,
            overwrite=overwrite,
            dry_run=dry_run,
            as_json=as_json,
        )

    @command(
        group,
        "slices",
        phi=True,
        examples="""
        recon simulate slices CT_FOLDER -o gaps.h5 --missing 1::2
        recon simulate slices MR_FOLDER -o thick.h5 --thickness 4
        """,
    )
    def slices_(
        path: o.Input,
        out: o.OutFile,
        missing: o.Missing = None,
        thickness: o.Thickness = None,
        slice_step: o.SliceStep = None,
        noise: o.NoiseLevel = 0.01,
        matrix: o.Matrix = None,
        seed: o.Seed = 0,
        slices: o.Slices = None,
        series: o.SeriesName = None,
        stack: o.StackName = None,
        limits: Limits = 4.0,
        overwrite: o.Overwrite = False,
        dry_run: o.DryRun = False,
        as_json: o.Json = False,
    ) -> None:
        """Missing or thick slices of a volume."""
        scan = SliceScan(missing, thickness, slice_step, noise, matrix)
        _simulate(
            scan,
            Selection(path, series, stack, slices, limits),
            out,
            seed=seed,
            overwrite=overwrite,
            dry_run=dry_run,
            as_json=as_json,
        )
