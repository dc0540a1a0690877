"""``recon simulate``: a measurement file from images, as a scanner might have measured them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import typer

from recon_cli import options as o
from recon_cli.console import log, print_json
from recon_cli.dryrun import plan_file, tell
from recon_cli.options import check_ending
from recon_cli.output import check_file
from recon_cli.runlog import SCHEMA_VERSION, RunLog, sha256_of
from recon_cli.scans import (
    CtScan,
    Scan,
    Selection,
    heights,
    read,
    register_scans,
    rehearse,
    simulate,
)


@dataclass(frozen=True)
class How:
    """Options of every simulation: all but what is scanned."""

    seed: o.Seed = 0
    slices: o.Slices = None
    series: o.SeriesName = None
    stack: o.StackName = None
    limits: o.Limits = 4.0
    overwrite: o.Overwrite = False
    dry_run: o.DryRun = False
    as_json: o.Json = False


def _simulate(scan: Scan, path: Path, out: Path, how: How) -> None:
    check_ending(out, ".h5", ".hdf5")
    check_file(out, how.overwrite)
    run = RunLog(f"simulate {scan.command}", {path: "IN", out: "OUT"})
    selection = Selection(path, how.series, how.stack, how.slices, how.limits)
    images, chosen = read(selection, scan, run)
    run.identify(images.templates[0])
    if how.dry_run:
        task = rehearse(scan, images, chosen, how.seed, run)
        shape = scan.data_shape(images, chosen) if isinstance(scan, CtScan) else None
        tell(plan_file(out, task, chosen, run, images=images, shape=shape), how.as_json)
        return
    task = simulate(scan, images, chosen, how.seed, run)

    from torch import Tensor

    from inverse.io.measurement_file import write_measurement

    assert isinstance(task.truth, Tensor)
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

    examples = {
        "ct": """
        recon simulate ct CT_FOLDER -o scan.h5 --views 23
        recon simulate ct CT_FOLDER -o low-dose.h5 --views 180 --photons 5e3
        recon simulate ct CT_FOLDER -o metal.h5 --views 180 --metal 2 --kvp 120
        recon simulate ct CT_FOLDER -o cone.h5 --geometry cone --views 60 --matrix 64
        """,
        "mri": """
        recon simulate mri MR_FOLDER -o scan.h5 --acceleration 4
        recon simulate mri MR_FOLDER -o scan.h5 --coils 8 --acceleration 8 --mask poisson
        recon simulate mri MR_FOLDER -o volume.h5 --volume --acceleration 6 --mask poisson
        """,
        "inpaint": "recon simulate inpaint CT_FOLDER -o holes.h5 --hole 0.2",
        "slices": """
        recon simulate slices CT_FOLDER -o gaps.h5 --missing 1::2
        recon simulate slices MR_FOLDER -o thick.h5 --thickness 4
        """,
    }
    register_scans(group, _simulate, How, o.OutFile, examples, phi=True)
