"""``recon reconstruct``: images from a measurement file, with no truth needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recon_cli import options as o
from recon_cli.dryrun import plan_output, tell
from recon_cli.inspect import telling_kind
from recon_cli.options import bytes_of, command
from recon_cli.pipeline import execute, show
from recon_cli.processes import shared_folder
from recon_cli.runlog import RunLog, sha256_of
from recon_cli.task import (
    Recipe,
    Task,
    check_baselines,
    check_method,
    choose_planes,
    choose_prior,
    named_prior,
    pick_device,
)

if TYPE_CHECKING:
    from inverse.io.dicom import PatientFrame
    from inverse.io.measurement_file import MeasurementFile

_Input = Annotated[
    Path,
    typer.Argument(
        metavar="MEAS",
        help="Measurement file, as 'recon simulate' writes it.",
        show_default=False,
    ),
]


def _place(path: Path, file: MeasurementFile, run: RunLog) -> PatientFrame:
    """Where the slices lie: as the raw data tell, or axial ones about the origin."""
    from inverse.errors import InputError
    from inverse.io.dicom import PatientFrame

    count, told = file.measurement.slices, file.measurement.provenance.get("patient_frame")
    if told is not None:
        frame = PatientFrame.from_spec(told)
        if len(frame.positions) != count:
            raise InputError(
                f"'{path}' gives {len(frame.positions)} positions in its patient frame for "
                f"{count} slices; write it again"
            )
        where = "in the place that the raw data tell"
    else:
        if list(file.z_mm) != sorted(set(file.z_mm)):
            raise InputError(
                f"'{path}' gives slice positions that do not ascend; sort the slices by position"
            )
        shape, pixel_mm = file.measurement.operator.in_shape, file.measurement.pixel_mm
        frame = PatientFrame.axial(
            (shape[-2], shape[-1]), pixel_mm, file.z_mm or [float(k) for k in range(count)]
        )
        where = "axial slices about the origin"
        where += "" if file.z_mm else " and a slice spacing of 1 mm"
    run.warn(
        "NO_TEMPLATE",
        "the measurement carries no DICOM headers; the series are of an unknown patient, with "
        f"new identifiers, {where}",
    )
    return frame


def _without_metal(task: Task, threshold: float, run: RunLog) -> Task:
    """The task without the rays through metal that its own image shows."""
    from inverse.classical import leave_out_metal

    measurement = leave_out_metal(task.measurement, threshold)
    if measurement is task.measurement:
        run.warn("NO_METAL", f"nothing is above {threshold:g} HU, so all rays are used")
        return task
    run.settings["measurement"] = dict(measurement.provenance)
    return replace(task, measurement=measurement, label=f"{task.label} without metal's rays")


def _task(path: Path, run: RunLog, max_bytes: int) -> Task:
    from inverse.io.dicom import blank_templates
    from inverse.io.measurement_file import read_measurement
    from inverse.trust import plane

    with run.phase("read"), telling_kind(path, "reconstruct", max_bytes):
        file = read_measurement(path, max_bytes=max_bytes)
        run.inputs["measurement"] = sha256_of(path)
    provenance = dict(file.measurement.provenance)
    run.settings["measurement"] = provenance
    templates = list(file.template)
    if not templates:
        shape, identity = file.measurement.operator.in_shape, run.inputs["measurement"]["sha256"]
        templates = list(
            blank_templates(
                file.measurement.modality,
                (shape[-2], shape[-1]),
                file.measurement.pixel_mm,
                _place(path, file, run),
                str(identity),
            )
        )
    count = file.measurement.slices
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
        z_mm=file.z_mm,
        plane=plane((provenance.get("patient_frame") or {}).get("orientation")),
    )


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(
        app,
        "reconstruct",
        phi=True,
        examples="""
        recon reconstruct scan.h5 -o out
        recon reconstruct scan.h5 -o out --samples 8 --seed 1
        recon reconstruct scan.h5 -o out --baseline poisson --metal-threshold 3000
        recon reconstruct scan.h5 -o out --samples 8 --seed 1 --resume
        """,
    )
    def reconstruct(
        path: _Input,
        out: o.Out,
        prior: o.PriorName = None,
        method: o.MethodName = o.DEFAULT_METHOD,
        option: o.MethodOption = None,
        baseline: o.BaselineNames = None,
        metal_threshold: o.MetalThreshold = None,
        steps: o.Steps = None,
        samples: o.Samples = 1,
        batch: o.Batch = 8,
        coupling: o.CouplingName = "none",
        plane_prior: o.PlanePrior = None,
        max_memory: o.MaxMemory = None,
        device: o.Device = "auto",
        seed: o.Seed = 0,
        limits: o.Limits = 4.0,
        pdf: o.Pdf = False,
        parametric_map: o.ParametricMap = False,
        resume: o.Resume = False,
        overwrite: o.Overwrite = False,
        dry_run: o.DryRun = False,
        as_json: o.Json = False,
    ) -> None:
        """Reconstruct a measurement file, beside its direct classical image."""
        chosen, baselines = check_method(method), check_baselines(baseline)
        options = o.read_options(chosen, option or [])
        also = o.companions(pdf=pdf, parametric_map=parametric_map)
        run = RunLog("reconstruct", {path: "MEAS", out: "OUT"})
        asked = named_prior(prior)
        if resume and not overwrite and run.is_complete(out, path, asked, as_json=as_json):
            return
        with shared_folder(
            out, overwrite=overwrite, inputs=[path], resume=resume, dry=dry_run
        ) as work:
            device = pick_device(device)
            task = _task(path, run, bytes_of(limits))
            if metal_threshold is not None:
                task = _without_metal(task, metal_threshold, run)
            recipe = Recipe(
                prior=choose_prior(asked, task.measurement.modality),
                method=method,
                steps=steps,
                samples=samples,
                seed=seed,
                batch=batch,
                device=device,
                options=options,
                tv=False,
                baselines=baselines,
                coupling=coupling,
                planes=choose_planes(coupling, plane_prior or [], task.measurement.modality),
                max_memory=max_memory,
                also=also,
            )
            if dry_run:
                tell(plan_output(out, task, recipe, task.slices, run), as_json)
                return
            task = task.with_truth_in(work.folder)
            metrics = execute(task, recipe, work.folder, run, work.saved, work.processes)
        if work.processes.first:
            show(out, task, metrics, run, as_json)
