"""The classical images that the prior's is compared with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from recon_cli.console import progress
from recon_cli.evidence import Fit
from recon_cli.task import BASELINES, Outcome, Recipe, Task

if TYPE_CHECKING:
    from torch import Tensor

    from inverse.measurement import Measurement
    from inverse.volumes import Allocate
    from recon_cli.runlog import RunLog

    Solve = Callable[[Measurement], Tensor]

__all__ = ["Job", "folders", "jobs"]

Job = tuple[str, "Callable[[], list[Outcome]]"]
"""A name, and what computes the images under it."""


def jobs(task: Task, recipe: Recipe, run: RunLog, allocate: Allocate) -> list[Job]:
    """The baselines of a run: the direct image, those usual for k-space, and those asked for."""
    found: list[Job] = [("direct", lambda: [_direct(task, run, allocate)])]
    if task.kind == "mri" and task.measurement.operator.dtype.is_complex:
        found.append(("mri", lambda: _mri(task, recipe.tv, allocate)))
    names = ["tv"] * recipe.tv + [
        name for name in recipe.baselines if name != "tv" or not recipe.tv
    ]

    def named(name: str) -> Job:
        return name, lambda: [_named(task, name, recipe.tv_weight, run, allocate)]

    return found + [named(name) for name in names]


def folders(task: Task, recipe: Recipe, run: RunLog) -> list[str]:
    """Folders of the series that a run writes, from its baselines of one slice."""
    import numpy as np
    import torch

    first = task.measurement.take(torch.tensor([0]))
    one = replace(task, measurement=first, truth=None, slices=task.slices[: task.depth])
    with torch.inference_mode():
        found = [_direct(one, run, np.empty)]
        if task.kind == "mri" and first.operator.dtype.is_complex:
            found += _mri(one, recipe.tv, np.empty)
    names = [outcome.folder for outcome in found] + ["baseline-tv"] * recipe.tv
    names += [f"baseline-{name}" for name in recipe.baselines]
    names = [*dict.fromkeys(names), "recon"]
    return names + ["std"] * (recipe.samples > 1) + ["truth"] * (task.truth is not None)


def _baseline(
    task: Task, name: str, title: str, solve: Solve, allocate: Allocate, *, together: bool = False
) -> Outcome:
    """An image by a solver, which is given a few items at a time, or all ``together``."""
    volume, fit, seconds = allocate(task.shape, "float32"), Fit(task), 0.0
    every = slice(0, len(task.measurement))
    for given in [every] if together else task.groups():
        start = time.monotonic()
        x = solve(task.part(given))
        seconds += time.monotonic() - start
        for items in task.groups() if together else [given]:
            few = x[items] if together else x
            volume[task.places(items)] = task.image(few)
            fit.add(items, few)
    return Outcome(name, title, volume, fit.chi2, seconds, fit=fit.by_group)


def _direct(task: Task, run: RunLog, allocate: Allocate) -> Outcome:
    """The classical linear image: filtered backprojection, zero filling, or CG where neither.

    Volumes of thick or missing slices are interpolated along z.
    """
    from inverse.classical import cgls, fbp, interpolated, zero_filled
    from inverse.errors import UnsupportedError

    if task.kind == "inpaint" and task.depth > 1:
        return _baseline(task, "interpolated", "Linear interpolation", interpolated, allocate)
    if task.kind != "ct":
        return _baseline(task, "zero-filled", "Zero-filled", zero_filled, allocate)
    try:
        return _baseline(task, "fbp", "FBP", fbp, allocate)
    except UnsupportedError as error:
        run.warn("NO_FBP", f"{error}; the baseline is least squares by conjugate gradients")
        return _baseline(task, "cgls", "CGLS", cgls, allocate)


def _mri(task: Task, sparse: bool, allocate: Allocate) -> list[Outcome]:
    """What is usual for k-space beyond zero filling: coils by CG-SENSE, sparsity by wavelets."""
    from inverse.classical import cg_sense, l1_wavelet, phased
    from inverse.operators.mri import CartesianMRI

    found = []
    if not isinstance(task.measurement.operator, CartesianMRI):  # there it is zero filling
        found.append(_baseline(task, "cg-sense", "CG-SENSE", cg_sense, allocate))
    if sparse and task.depth == 1:
        found.append(_baseline(task, "l1-wavelet", "L1-wavelet", phased(l1_wavelet), allocate))
    return found


def _named(
    task: Task, name: str, weight: float | None, run: RunLog, allocate: Allocate
) -> Outcome:
    """A classical image of `BASELINES`."""
    from inverse import classical

    if name == "tv":
        return _tv(task, weight, run, allocate)
    solve: dict[str, Solve] = {
        "cgls": classical.cgls,
        "os-sart": classical.os_sart,
        "poisson": lambda m: classical.poisson(m).x,
        "sirt": classical.sirt,
    }
    with progress(BASELINES[name]):
        return _baseline(task, name, BASELINES[name], solve[name], allocate)


def _tv(task: Task, weight: float | None, run: RunLog, allocate: Allocate) -> Outcome:
    from inverse.classical import phased, tv

    late, settings = 0, {"weight": weight, "iterations": 0}

    def solve(measurement: Measurement) -> Tensor:
        nonlocal late, settings
        result = tv(measurement, weight)
        late += int((~result.converged).sum())
        iterations = max(int(settings["iterations"] or 0), int(result.iterations.max()))
        settings = {"weight": result.weight, "iterations": iterations}
        return result.x

    with progress("total variation"):
        # of MR images the unit of the weight is a percentile of all
        together = task.measurement.modality == "MR"
        outcome = _baseline(task, "tv", "TV", phased(solve), allocate, together=together)
    if late:
        run.warn(
            "TV_NOT_CONVERGED",
            f"total variation did not converge in {late} slices; its image may fall short",
        )
    run.settings["tv"] = settings
    return replace(outcome, settings=settings)
