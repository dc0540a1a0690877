"""``recon study``: simulate, reconstruct, compare with classical baselines, report; in one go."""

from __future__ import annotations

from pathlib import Path

import typer

from recon_cli import options as o
from recon_cli.options import command
from recon_cli.output import working_folder
from recon_cli.pipeline import (
    Recipe,
    check_method,
    choose_prior,
    execute,
    pick_device,
    show,
)
from recon_cli.runlog import RunLog
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


def _study(
    scan: Scan,
    selection: Selection,
    out: Path,
    *,
    prior: str | None,
    method: str,
    option: list[str] | None,
    steps: int | None,
    samples: int,
    seed: int,
    batch: int,
    device: str,
    tv: bool,
    tv_weight: float | None,
    resume: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    row = check_method(method)
    options = o.read_options(row, option or [])
    run = RunLog(f"study {scan.command}", {selection.path: "IN", out: "OUT"})
    with working_folder(out, overwrite=overwrite, inputs=[selection.path], resume=resume) as work:
        device = pick_device(device)
        images, chosen = read(selection, scan.command, run)
        recipe = Recipe(
            prior=choose_prior(prior, images.modality),
            method=method,
            steps=steps,
            samples=samples,
            seed=seed,
            batch=batch,
            device=device,
            options=options,
            tv=tv,
            tv_weight=tv_weight,
        )
        task = simulate(scan, images, chosen, seed, run)
        del images  # the whole series; the task holds what is needed
        metrics = execute(task, recipe, work.folder, run, work.saved)
    show(out, task, metrics, run, as_json)


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(
        help="Simulate a measurement from images, reconstruct it with classical baselines and "
        "the prior, compare with the truth and write a report: a retrospective simulation from "
        "processed images.",
        no_args_is_help=True,
    )
    app.add_typer(group, name="study")

    @command(
        group,
        "ct",
        examples="""
        recon study ct CT_FOLDER -o out --views 23
        recon study ct CT_FOLDER -o out --views 60 --arc 120 --slices 10:50:4
        recon study ct CT_FOLDER -o out --geometry fan --views 64 --photons 2e4 --samples 8
        recon study ct CT_FOLDER -o out --views 180 --metal 2 --kvp 120
        recon study ct CT_FOLDER -o out --method dds --option weight=4 --option eta=0.85
        """,
    )
    def ct(
        path: o.Input,
        out: o.Out,
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
        prior: o.PriorName = None,
        method: o.MethodName = o.DEFAULT_METHOD,
        option: o.MethodOption = None,
        steps: o.Steps = None,
        samples: o.Samples = 1,
        batch: o.Batch = 8,
        device: o.Device = "auto",
        tv: o.Tv = True,
        tv_weight: o.TvWeight = None,
        seed: o.Seed = 0,
        slices: o.Slices = None,
        series: o.SeriesName = None,
        stack: o.StackName = None,
        limits: Limits = 4.0,
        resume: o.Resume = False,
        overwrite: o.Overwrite = False,
        as_json: o.Json = False,
    ) -> None:
        """Sparse-view, limited-angle, truncated or low-dose CT, with metal or without."""
        _study(
            CtScan(
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
            ),
            Selection(path, series, stack, slices, limits),
            out,
            prior=prior,
            method=method,
            option=option,
            steps=steps,
            samples=samples,
            seed=seed,
            batch=batch,
            device=device,
            tv=tv,
            tv_weight=tv_weight,
            resume=resume,
            overwrite=overwrite,
            as_json=as_json,
        )

    @command(
        group,
        "mri",
        examples="recon study mri MR_FOLDER -o out --acceleration 4 --prior mr.safetensors",
    )
    def mri(
        path: o.Input,
        out: o.Out,
        acceleration: o.Acceleration = 4.0,
        mask: o.MaskName = "gaussian1d",
        centre: o.Centre = 0.08,
        trajectory: o.TrajectoryName = "cartesian",
        coils: o.Coils = 1,
        noise: o.NoiseLevel = 0.01,
        prior: o.PriorName = None,
        method: o.MethodName = o.DEFAULT_METHOD,
        option: o.MethodOption = None,
        steps: o.Steps = None,
        samples: o.Samples = 1,
        batch: o.Batch = 8,
        device: o.Device = "auto",
        tv: o.Tv = True,
        tv_weight: o.TvWeight = None,
        seed: o.Seed = 0,
        slices: o.Slices = None,
        series: o.SeriesName = None,
        stack: o.StackName = None,
        limits: Limits = 4.0,
        resume: o.Resume = False,
        overwrite: o.Overwrite = False,
        as_json: o.Json = False,
    ) -> None:
        """Undersampled MRI by one coil or several from an MR series."""
        _study(
            MriScan(acceleration, mask, centre, trajectory, coils, noise),
            Selection(path, series, stack, slices, limits),
            out,
            prior=prior,
            method=method,
            option=option,
            steps=steps,
            samples=samples,
            seed=seed,
            batch=batch,
            device=device,
            tv=tv,
            tv_weight=tv_weight,
            resume=resume,
            overwrite=overwrite,
            as_json=as_json,
        )

    @command(group, "inpaint", examples="recon study inpaint CT_FOLDER -o out --hole 0.2")
    def inpaint(
        path: o.Input,
        out: o.Out,
        hole: o.Hole = 0.25,
        hole_kind: o.HoleKind = "square",
        noise: o.NoiseLevel = 0.01,
        matrix: o.Matrix = None,
        prior: o.PriorName = None,
        method: o.MethodName = o.DEFAULT_METHOD,
        option: o.MethodOption = None,
        steps: o.Steps = None,
        samples: o.Samples = 1,
        batch: o.Batch = 8,
        device: o.Device = "auto",
        tv: o.Tv = True,
        tv_weight: o.TvWeight = None,
        seed: o.Seed = 0,
        slices: o.Slices = None,
        series: o.SeriesName = None,
        stack: o.StackName = None,
        limits: Limits = 4.0,
        resume: o.Resume = False,
        overwrite: o.Overwrite = False,
        as_json: o.Json = False,
    ) -> None:
        """Missing pixels of a CT or MR series."""
        _study(
            InpaintScan(hole, hole_kind, noise, matrix),
            Selection(path, series, stack, slices, limits),
            out,
            prior=prior,
            method=method,
            option=option,
            steps=steps,
            samples=samples,
            seed=seed,
            batch=batch,
            device=device,
            tv=tv,
            tv_weight=tv_weight,
            resume=resume,
            overwrite=overwrite,
            as_json=as_json,
        )
