"""``recon demo``: the whole way on a phantom, with nothing but this toolkit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recon_cli import options as o
from recon_cli.console import log
from recon_cli.options import command
from recon_cli.output import output_folder
from recon_cli.pipeline import execute, show
from recon_cli.runlog import RunLog, sha256_of
from recon_cli.task import Recipe, Task, check_method, choose_prior, named_prior, pick_device

ANATOMY_SEED = 55
FIELD_MM = 360.0
SPACING_MM = 4.0
SUB_SLICES = 2


def _phantom(folder: Path, slices: int, matrix: int, photons: float, views: int, seed: int,
             run: RunLog) -> Task:  # fmt: skip
    """A chest as a DICOM series, and the exact line integrals of its slices with photon noise."""
    import numpy as np

    from inverse.io.dicom import read_series
    from inverse.operators.ct import ParallelBeam
    from phantoms.anatomy import AIR_HU, thorax
    from phantoms.series import write_phantom_series
    from phantoms.simulate import simulate_ct_analytic

    pixel = FIELD_MM / matrix
    label = f"Phantom chest, {views}-view parallel-beam CT"
    with run.phase("phantom"):
        log(f"phantom chest: {slices} slices of {matrix} x {matrix} pixels")
        body = thorax(ANATOMY_SEED)
        heights = [(k - (slices - 1) / 2) * SPACING_MM for k in range(slices)]
        slabs = [body.slab(z, SPACING_MM, SUB_SLICES) for z in heights]
        volume = AIR_HU + np.stack([slab.image((matrix, matrix), pixel) for slab in slabs])
        write_phantom_series(
            folder, volume.astype(np.float32), (SPACING_MM, pixel, pixel), seed=ANATOMY_SEED
        )
        run.outputs["phantom"] = sha256_of(folder) | {"slices": slices}
    with run.phase("simulate"):
        log(f"simulating {views} views with {photons:g} photons a bin")
        result = simulate_ct_analytic(
            slabs,
            pixel,
            ParallelBeam.sparse(views, (matrix, matrix), pixel),
            matrix=matrix,
            photons=photons,
            seed=seed,
        )
    run.settings["simulation"] = {
        "anatomy_seed": ANATOMY_SEED,
        "views": views,
        "matrix": matrix,
        "pixel_mm": pixel,
        **result.measurement.provenance,
    }
    return Task(
        measurement=result.measurement,
        truth=result.truth,
        templates=read_series(folder).templates,
        label=label,
        simulated=True,
        slices=range(slices),
        phantom=True,
        z_mm=heights,
    )


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(app, "demo", examples="recon demo -o demo-out")
    def demo(
        out: o.Out = Path("demo-out"),
        slices: Annotated[int, typer.Option(min=1, max=30, help="Slices of the phantom.")] = 8,
        views: o.Views = 23,
        photons: o.Photons = 1e5,
        matrix: Annotated[
            int, typer.Option(min=16, max=512, help="Rows and columns of the images.")
        ] = 256,
        prior: o.PriorName = None,
        method: o.MethodName = "dds",
        steps: o.Steps = None,
        coupling: o.CouplingName = "tv",
        samples: o.Samples = 8,
        batch: o.Batch = 8,
        device: o.Device = "auto",
        seed: o.Seed = 0,
        overwrite: o.Overwrite = False,
        as_json: o.Json = False,
    ) -> None:
        """Phantom chest, sparse-view CT, FBP, TV and prior, to DICOM and a report."""
        check_method(method)
        run = RunLog("demo", {out: "OUT"})
        with output_folder(out, overwrite=overwrite) as folder:
            recipe = Recipe(
                prior=choose_prior(named_prior(prior), "CT"),
                method=method,
                steps=steps,
                coupling=coupling,
                samples=samples,
                seed=seed,
                batch=batch,
                device=pick_device(device),
            )
            task = _phantom(folder / "phantom", slices, matrix, photons, views, seed, run)
            metrics = execute(task, recipe, folder, run)
        show(out, task, metrics, run, as_json)
        if not as_json:
            print(f"Open {out / 'report.html'} in a browser; the DICOM series are in {out}.")
