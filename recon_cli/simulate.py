"""``recon simulate``: a measurement file from images, as a scanner might have measured them."""

from __future__ import annotations

from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class How:
    """Options of every simulation: all but what is scanned."""

    seed: o.Seed = 0
    slices: o.Slices = None
    series: o.SeriesName = None
    stack: o.StackName = None
    limits: Limits = 4.0
    overwrite: o.Overwrite = False
    dry_run: o.DryRun = False
    as_json: o.Json = False


def _simulate(scan: Scan, path: Path, out: Path, how: How) -> None:
    check_file(out, how.overwrite)
    run = RunLog(f"simulate {scan.command}", {path: "IN", out: "OUT"})
    selection = Selection(path, how.series, how.stack, how.slices, how.limits)
    images, chosen = read(selection, scan.command, run)
    run.identify(images.templates[0])
    if how.dry_run:
        # one slice tells what the scan makes of all of them, but where it measures volumes
        task = simulate(scan, images, chosen if scan.volume else chosen[:1], how.seed, run)
        tell(plan_file(out, task, chosen, run, images=images), how.as_json)
        return
    task = simulate(scan, images, chosen, how.seed, run)

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
        out,
        measurement,
        task.truth,
        task.templates,
        heights(images, chosen),
        overwrite=how.overwrite,
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
    if how.as_json:
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
    def ct(path: o.Input, out: o.OutFile, scan: CtScan, how: How) -> None:
        """Sparse-view, limited-angle, truncated or low-dose CT, with metal or without."""
        _simulate(scan, path, out, how)

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
    def mri(path: o.Input, out: o.OutFile, scan: MriScan, how: How) -> None:
        """Undersampled MRI by one coil or several, slice by slice or of a volume."""
        _simulate(scan, path, out, how)

    @command(
        group,
        "inpaint",
        phi=True,
        examples="recon simulate inpaint CT_FOLDER -o holes.h5 --hole 0.2",
    )
    def inpaint(
        path: o.Input,
        out: o.OutFile,
        *,
        hole: o.Hole = 0.25,
        hole_kind: o.HoleKind = "square",
        noise: o.NoiseLevel = 0.01,
        matrix: o.Matrix = None,
        how: How,
    ) -> None:
        """Missing pixels."""
        _simulate(InpaintScan(hole, hole_kind, noise, matrix), path, out, how)

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
        *,
        missing: o.Missing = None,
        thickness: o.Thickness = None,
        slice_step: o.SliceStep = None,
        noise: o.NoiseLevel = 0.01,
        matrix: o.Matrix = None,
        how: How,
    ) -> None:
        """Missing or thick slices of a volume."""
        _simulate(SliceScan(missing, thickness, slice_step, noise, matrix), path, out, how)
