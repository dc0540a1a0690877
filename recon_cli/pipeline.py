"""From a measurement to an output folder: baselines, prior, metrics, DICOM, report, run.json.

``study``, ``demo`` and ``reconstruct`` differ only in where the measurement comes from.  Volumes
are files of slices beside the output while they are worked on; memory holds a few slices of each.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recon_cli import baselines
from recon_cli.console import log, plain_json, print_json, print_table, progress
from recon_cli.evidence import FOLDER, Fit, residual_map, write_maps
from recon_cli.judge import judge, trust
from recon_cli.output import NOTHING_SAVED, Batches, Saved
from recon_cli.processes import ALONE, Processes
from recon_cli.products import write_companions, write_dicom
from recon_cli.runlog import ASIDE, RunLog, sha256_of, versions, write_json
from recon_cli.task import Outcome, Recipe, Task

if TYPE_CHECKING:
    from torch import Tensor

    from inverse.reconstruct import Plan
    from inverse.volumes import Allocate, Volume

__all__ = ["evaluate", "execute", "show"]


# --- computing ---------------------------------------------------------------------------------


def _count(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def _plan(task: Task, recipe: Recipe, processes: Processes = ALONE) -> Plan:
    """The prior's reconstruction in parts, each within the memory that the user allows."""
    from inverse.posterior.volume import Coupling
    from inverse.reconstruct import Plan

    plan = Plan(
        task.measurement,
        recipe.prior,
        method=recipe.method,
        steps=recipe.steps,
        samples=recipe.samples,
        seed=recipe.seed,
        batch=recipe.batch,
        device=recipe.device,
        options=recipe.options,
        positions=task.slices if task.depth == 1 else None,
        coupling=Coupling(recipe.coupling, planes=recipe.planes),
        z_mm=task.z_mm or None,
    )
    gib = recipe.max_memory
    if gib is not None:
        # of the first process, since bits depend on how many images go to the network at a time
        plan.limit = processes.from_first(lambda: plan.fit(int(gib * 2**30)))
        log(f"{_count(plan.limit, 'image')} a network call, to stay within {gib:g} GiB")
    return plan


def _compute(task: Task, recipe: Recipe, plan: Plan, batches: Batches) -> None:
    """The parts that are not finished and that no other process computes."""
    n = task.measurement.slices
    what = f"{_count(n, 'slice')} x {_count(recipe.samples, 'sample')}"
    with progress(f"prior '{recipe.prior.card.name}', method {recipe.method}, {what}") as advance:
        try:
            plan.run(batches, claim=batches.claim, callback=advance)
        finally:
            batches.finish()


def _merge(
    task: Task, recipe: Recipe, run: RunLog, plan: Plan, batches: Batches, allocate: Allocate
) -> Outcome:
    """The outcome of all parts."""
    import torch

    from inverse.operators.mask import Mask

    volume = allocate(task.shape, "float32")
    std = allocate(task.shape, "float32") if recipe.samples > 1 else None
    residual = allocate(task.shape, "float16")
    fit, generator = Fit(task), torch.Generator().manual_seed(0)

    def sink(items: slice, mean: Tensor, spread: Tensor) -> None:
        places, few = task.places(items), task.part(items)
        volume[places] = task.image(mean)
        if std is not None:
            std[places] = task.spread(spread)
        residual[places] = residual_map(few, mean, generator).reshape(-1, *task.shape[1:])
        fit.add(items, mean)

    result = plan.result(batches, sink=sink)
    run.notes(result.remarks)
    operator = task.measurement.operator
    if isinstance(operator, Mask) and operator.slicewise and recipe.coupling == "none":
        run.warn(
            "UNSEEN_SLICES",
            "slices that were not measured are the prior's invention, tied to their neighbours by "
            "nothing: look at the interpolated ones, or give --coupling tv",
        )
    run.settings["reconstruction"] = dict(result.settings) | {
        "operator_calls": result.operator_calls,
        "status": result.status,
    }
    return Outcome(
        "prior",
        f"Prior ({recipe.method})",
        volume,
        task.each_slice(result.residual_chi2),
        result.seconds,
        result.nfe // task.depth,
        std,
        dict(result.settings),
        fit.by_group,
        {"residual": residual},
    )


def _truth(task: Task, allocate: Allocate) -> Volume | None:
    """The truth in the written unit."""
    if task.truth is None:
        return None
    volume = allocate(task.shape, "float32")
    for items in task.groups():
        volume[task.places(items)] = task.true_image(items)
    return volume


def evaluate(task: Task, recipe: Recipe, run: RunLog) -> dict[str, Any]:
    """The prior's reconstruction judged as in ``metrics.json``; nothing is written."""
    import numpy as np

    plan, batches = _plan(task, recipe), Batches(NOTHING_SAVED)
    _compute(task, recipe, plan, batches)
    outcome = _merge(task, recipe, run, plan, batches, np.empty)
    return judge(task, [outcome], _truth(task, np.empty), run)


# --- continuing --------------------------------------------------------------------------------


def _manifest(task: Task, recipe: Recipe, run: RunLog) -> dict[str, Any]:
    """Everything that the bits of the result depend on."""
    import numpy as np

    digest = hashlib.sha256()
    for array in (task.measurement.data, task.measurement.noise, task.truth):
        if array is not None:
            digest.update(str(tuple(array.shape)).encode())
            for part in array if array.ndim else [array]:
                digest.update(np.ascontiguousarray(part).data)
    return {
        "command": run.command,
        **{f"--{name}": v for name, v in run.options.items() if name not in ASIDE},
        "device": recipe.device.partition(":")[0],
        "inputs": run.inputs,
        "measured data": digest.hexdigest(),
        "platform": platform.platform(),
        "prior": recipe.prior.card.sha256,
        "plane priors": {name: prior.card.sha256 for name, prior in recipe.planes.items()},
        "threads": run.settings["threads"],
        "versions": versions(),
    }


def _kept(saved: Saved, job: baselines.Job, run: RunLog, allocate: Allocate) -> list[Outcome]:
    """Baselines, computed once in the life of a run that is continued."""
    name, compute = job
    piece = saved.get(name, allocate)
    if piece is not None:
        arrays, meta = piece
        run.notes([(w["code"], w["text"]) for w in meta["warnings"]])
        run.settings |= meta["settings"]
        return [
            Outcome(
                volume=arrays[f"volume{i}"],
                chi2=arrays[f"chi2{i}"][:],
                fit=arrays[f"fit{i}"][:] if f"fit{i}" in arrays else None,
                **rest,
            )
            for i, rest in enumerate(meta["outcomes"])
        ]
    warned, known = len(run.warnings), set(run.settings)
    outcomes = compute()
    arrays = {f"volume{i}": o.volume for i, o in enumerate(outcomes)}
    arrays |= {f"chi2{i}": o.chi2 for i, o in enumerate(outcomes)}
    arrays |= {f"fit{i}": o.fit for i, o in enumerate(outcomes) if o.fit is not None}
    fields = ("name", "title", "seconds", "settings")
    meta = {
        "warnings": run.warnings[warned:],
        "settings": {k: v for k, v in run.settings.items() if k not in known},
        "outcomes": [{f: getattr(o, f) for f in fields} for o in outcomes],
    }
    saved.put(name, arrays, plain_json(meta))
    return outcomes


# --- the whole run -----------------------------------------------------------------------------


def execute(
    task: Task,
    recipe: Recipe,
    folder: Path,
    run: RunLog,
    saved: Saved = NOTHING_SAVED,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Reconstruct, judge and write everything into ``folder``.

    Args:
        task: what to reconstruct.
        recipe: how.
        folder: where the output goes; volumes in work lie there too, in files without a name.
        run: log of the run.
        saved: finished pieces, of a run that continues.
        processes: those that share the work; all but the first compute parts and write nothing.

    Returns:
        The content of ``metrics.json``; of the first process only.
    """
    from dataclasses import asdict

    import torch

    from inverse.volumes import DiskVolume
    from recon_cli.report.build import build

    run.prior = asdict(recipe.prior.card)
    run.seed, run.device, run.simulation = recipe.seed, recipe.device, task.simulated
    run.settings |= {"label": task.label, "slices": list(task.slices), "phantom": task.phantom}
    run.settings["threads"] = torch.get_num_threads()
    run.identify(task.templates[0])
    run.resumed = len(saved) > 0
    run.started = processes.from_first(
        lambda: saved.agree(_manifest(task, recipe, run), run.started)
    )
    with run.phase("prior"):
        plan, batches = _plan(task, recipe, processes), Batches(saved)
    if not processes.first:
        _compute(task, recipe, plan, batches)
        processes.wait()
        return {}
    allocate: Allocate = partial(DiskVolume, folder)
    with run.phase("baselines"), torch.inference_mode():
        outcomes: list[Outcome] = []
        for job in baselines.jobs(task, recipe, run, allocate):
            if job[0] not in {outcome.name for outcome in outcomes}:
                outcomes += _kept(saved, job, run, allocate)
    with run.phase("prior"):
        _compute(task, recipe, plan, batches)
        processes.wait()
        outcomes.append(_merge(task, recipe, run, plan, batches, allocate))
    if recipe.samples == 1:
        run.warn(
            "NO_STD",
            "one sample a slice, so no std map; for one give --samples 8 and a method whose "
            "spread is right for exact priors (--method mmps or pnpdm)",
        )
    with run.phase("metrics"):
        truth = _truth(task, allocate)
        metrics = judge(task, outcomes, truth, run)
        metrics["trust"], maps = trust(task, recipe, run, plan, batches, outcomes[-1], allocate)
    with run.phase("write"):
        write_dicom(task, outcomes, truth, folder, run)
        write_maps(folder, {**outcomes[-1].maps, **maps})
        run.outputs[FOLDER] = sha256_of(folder / FOLDER)
        write_json(folder / "metrics.json", metrics)
        run.outputs["metrics.json"] = sha256_of(folder / "metrics.json")
    with run.phase("report"):
        # the report reads the folder as 'recon report' does; its own time is the one left out
        write_json(folder / "run.json", run.to_dict())
        build(folder)
    with run.phase("companions"):  # last, as the result stands without them
        write_companions(task, recipe, outcomes[-1], folder, run)
    write_json(folder / "run.json", run.to_dict())
    return metrics


# --- telling -----------------------------------------------------------------------------------


def _cell(row: Mapping[str, Any], name: str, digits: int) -> str:
    value = row.get(name)
    if not value or value["mean"] is None:
        return "-"
    text = f"{value['mean']:.{digits}f}"
    if value["ci95"] and name == "psnr":
        text += f" [{value['ci95'][0]:.{digits}f}, {value['ci95'][1]:.{digits}f}]"
    return text


def show(out: Path, task: Task, metrics: Mapping[str, Any], run: RunLog, as_json: bool) -> None:
    """Print the result: the table of methods and where things are."""
    if as_json:
        print_json({"out": str(out), **metrics, "warnings": run.warnings})
        return
    rows = [
        [
            str(row["title"]),
            _cell(row, "psnr", 2),
            _cell(row, "ssim", 3),
            _cell(row, "nrmse", 4),
            f"{row['residual_chi2']:.3g}",
            f"{row['seconds']:.1f}",
            str(row["network_calls"]),
        ]
        for row in metrics["methods"].values()
    ]
    where = (
        f" inside {metrics['mask']}; [95 %]: of the mean over these slices"
        if metrics["mask"]
        else ""
    )
    print_table(
        f"{task.label}, {_count(len(task.slices), 'slice')}{where}",
        ["method", "PSNR dB [95 %]", "SSIM", "NRMSE", "residual χ²", "seconds", "network calls"],
        rows,
    )
    if "trust" in metrics:
        print(f"Verdict: {metrics['trust']['light']}: {'; '.join(metrics['trust']['reasons'])}")
    print(f"{task.origin[0].upper()}{task.origin[1:]}; research use only.")
    for name in [*run.outputs, "report.html", "run.json"]:
        log(f"wrote {out / name}")
