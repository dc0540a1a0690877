"""``recon study``: simulate, reconstruct, compare with classical baselines, report; in one go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import typer

from recon_cli import jobs
from recon_cli import options as o
from recon_cli.dryrun import plan_output, tell
from recon_cli.pipeline import execute, show
from recon_cli.processes import shared_folder
from recon_cli.runlog import RunLog
from recon_cli.scans import (
    Scan,
    Selection,
    read,
    register_scans,
    rehearse,
    simulate,
)
from recon_cli.task import (
    Recipe,
    check_baselines,
    check_method,
    choose_planes,
    choose_prior,
    named_prior,
    pick_device,
)


@dataclass(frozen=True)
class How:
    """Options of every study: all but what is scanned."""

    prior: o.PriorName = None
    method: o.MethodName = o.DEFAULT_METHOD
    option: o.MethodOption = None
    steps: o.Steps = None
    samples: o.Samples = 1
    batch: o.Batch = 8
    coupling: o.CouplingName = "none"
    plane_prior: o.PlanePrior = None
    max_memory: o.MaxMemory = None
    device: o.Device = "auto"
    tv: o.Tv = True
    tv_weight: o.TvWeight = None
    baseline: o.BaselineNames = None
    seed: o.Seed = 0
    slices: o.Slices = None
    series: o.SeriesName = None
    stack: o.StackName = None
    limits: o.Limits = 4.0
    pdf: o.Pdf = False
    parametric_map: o.ParametricMap = False
    resume: o.Resume = False
    overwrite: o.Overwrite = False
    dry_run: o.DryRun = False
    as_json: o.Json = False


def _study(scan: Scan, path: Path, out: Path, how: How) -> None:
    row, baselines = check_method(how.method), check_baselines(how.baseline)
    options = o.read_options(row, how.option or [])
    also = o.companions(pdf=how.pdf, parametric_map=how.parametric_map)
    run = RunLog(f"study {scan.command}", {path: "IN", out: "OUT"})
    selection = Selection(path, how.series, how.stack, how.slices, how.limits)
    asked = named_prior(how.prior)
    if how.resume and not how.overwrite and run.is_complete(out, path, asked, as_json=how.as_json):
        return
    with shared_folder(
        out, overwrite=how.overwrite, inputs=[path], resume=how.resume, dry=how.dry_run
    ) as work:
        device = pick_device(how.device)
        images, chosen = read(selection, scan, run, None if how.dry_run else work.folder)
        recipe = Recipe(
            prior=choose_prior(asked, images.modality),
            method=how.method,
            steps=how.steps,
            samples=how.samples,
            seed=how.seed,
            batch=how.batch,
            device=device,
            options=options,
            tv=how.tv,
            tv_weight=how.tv_weight,
            baselines=baselines,
            coupling=how.coupling,
            planes=choose_planes(how.coupling, how.plane_prior or [], images.modality),
            max_memory=how.max_memory,
            also=also,
        )
        if how.dry_run:
            task = rehearse(scan, images, chosen, how.seed, run)
            tell(plan_output(out, task, recipe, chosen, run, images=images), how.as_json)
            return
        task = simulate(scan, images, chosen, how.seed, run, work.folder)
        del images  # the whole series; the task holds what is needed
        metrics = execute(task, recipe, work.folder, run, work.saved, work.processes)
    if work.processes.first:
        show(out, task, metrics, run, how.as_json)


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(
        help="Simulate a measurement from images, reconstruct it with classical baselines and "
        "the prior, compare with the truth and write a report: a retrospective simulation from "
        "processed images.",
        no_args_is_help=True,
    )
    app.add_typer(group, name="study")
    jobs.register(group)

    examples = {
        "ct": """
        recon study ct CT_FOLDER -o out --views 23 --dry-run
        recon study ct CT_FOLDER -o out --views 23
        recon study ct CT_FOLDER -o out --views 60 --arc 120 --slices 10:50:4
        recon study ct CT_FOLDER -o out --geometry fan --views 64 --photons 2e4 --samples 8
        recon study ct CT_FOLDER -o out --views 180 --metal 2 --kvp 120
        recon study ct CT_FOLDER -o out --method dds --option weight=4 --option eta=0.85
        """,
        "mri": "recon study mri MR_FOLDER -o out --acceleration 4 --prior mr.safetensors",
        "inpaint": "recon study inpaint CT_FOLDER -o out --hole 0.2",
        "slices": """
        recon study slices CT_FOLDER -o out --missing 1::2
        recon study slices MR_FOLDER -o out --thickness 4
        """,
    }
    register_scans(group, _study, How, o.Out, examples, phi=True)
