"""One prior, many scans: what Song et al. (ICLR 2022) showed against supervised networks.

A network trained for 23 views is of no use at 60; a prior of images alone serves every number of
views and every acceleration.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inverse.priors import load_prior
from phantoms.benchmarks import problems
from phantoms.benchmarks.harness import (
    Benchmark,
    Row,
    Task,
    check,
    half_width,
    plus_minus,
    table,
    without_repeats,
)
from phantoms.benchmarks.problems import BASELINES, Case, ct_case, mr_case, solve

__all__ = ["BENCHMARK", "Settings", "plot_curves"]


@dataclass(frozen=True)
class Settings(problems.Settings):
    """Settings of ``generalisation``; ``methods`` are those of CT and MRI alike.

    Attributes:
        views: numbers of CT views.
        accelerations: accelerations of one-coil MRI.
        ct_baselines: baselines of CT.
        mr_baselines: baselines of MRI.
        ct_prior: the one prior of all views.
        mr_prior: the one prior of all accelerations.
        mr_data: images to use for MRI instead of phantoms; ``data`` is for CT.
    """

    slices: int = 3
    methods: tuple[str, ...] = ("pnp_admm:20",)
    views: tuple[int, ...] = (10, 23, 60, 180)
    accelerations: tuple[float, ...] = (2.0, 4.0, 8.0, 24.0)
    ct_baselines: tuple[str, ...] = ("fbp", "tv")
    mr_baselines: tuple[str, ...] = ("zero-filled", "l1-wavelet", "tv")
    ct_prior: str = "ct-small"
    mr_prior: str = "brain-small"
    mr_data: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.views) or bool(self.accelerations), "give views or accelerations")
        check(min(self.views, default=1) >= 1, f"views must be at least 1, got {self.views}")
        check(
            min(self.accelerations, default=2) > 1,
            f"accelerations must be above 1, got {self.accelerations}",
        )
        for label in (*self.ct_baselines, *self.mr_baselines):
            check(label in BASELINES, f"no baseline '{label}'; there are {', '.join(BASELINES)}")


def tasks(settings: Settings) -> Iterator[Task]:
    """A row a scan and method."""
    priors = {name: load_prior(name) for name in (settings.ct_prior, settings.mr_prior)}

    @functools.cache
    def ct(views: int) -> Case:
        return ct_case(settings, priors[settings.ct_prior], views, 1e5)

    @functools.cache
    def mr(acceleration: float) -> Case:
        own = problems.Settings(
            settings.slices, 256, settings.first_seed, settings.methods, settings.mr_data
        )
        return mr_case(own, priors[settings.mr_prior], acceleration)

    def row(make: Any, scan: float, label: str) -> Row:
        found = solve(make(scan), label)[0]
        return {**found, "kind": "CT" if make is ct else "MRI", "scan": scan}

    for views in settings.views:
        for label in (*settings.ct_baselines, *settings.methods):
            yield f"{views} views, {label}", functools.partial(row, ct, views, label)
    for acceleration in settings.accelerations:
        for label in (*settings.mr_baselines, *settings.methods):
            yield f"{acceleration:g}x, {label}", functools.partial(row, mr, acceleration, label)


AXES = {"CT": "views", "MRI": "acceleration"}


def markdown(rows: Mapping[str, Row]) -> str:
    """PSNR by scan and method, a table a modality."""
    return curves_table(list(rows.values()), AXES)


def curves_table(rows: list[Row], axes: Mapping[str, str], by: str = "scan") -> str:
    """PSNR, a table a kind, a row a value of ``by``, a column a method."""
    parts = []
    for kind, what in axes.items():
        own = [row for row in rows if row["kind"] == kind and "psnr" in row]
        found = {(row[by], row["method"]): plus_minus(row["psnr"]) for row in own}
        labels = without_repeats(row["method"] for row in own)
        values = sorted({row[by] for row in own})
        cells = [[f"{v:g}", *(found.get((v, label), "–") for label in labels)] for v in values]
        if own:
            parts.append(f"**{kind}**, PSNR in dB\n\n{table((what, *labels), cells, text=0)}")
    return "\n".join(parts)


def figure(rows: Mapping[str, Row], path: Path) -> None:
    """PSNR against views and acceleration."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8.8, 3.8), layout="constrained")
    for axis, (kind, what) in zip(drawing.subplots(1, 2), AXES.items(), strict=True):
        plot_curves(axis, [row for row in rows.values() if row["kind"] == kind])
        axis.set(title=f"{kind}: one prior for all", xlabel=what)
    drawing.savefig(path, dpi=100)


def plot_curves(axis: Any, rows: list[Row], by: str = "scan") -> None:
    """PSNR with intervals against ``by``, a line a method; baselines dashed."""
    rows = [row for row in rows if "psnr" in row]
    for label in without_repeats(row["method"] for row in rows):
        own = sorted((row for row in rows if row["method"] == label), key=lambda row: row[by])
        axis.errorbar(
            [row[by] for row in own],
            [np.mean(row["psnr"]) for row in own],
            yerr=[half_width(row["psnr"]) or 0.0 for row in own],
            marker="o",
            capsize=3,
            linestyle="-" if own[0]["calls"] else "--",
            label=label,
        )
    ticks = sorted({row[by] for row in rows})
    if ticks:
        axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axis.minorticks_off()
        axis.legend(fontsize=8)
    axis.set_ylabel("PSNR, dB")
    axis.grid(alpha=0.3)


BENCHMARK = Benchmark(
    name="generalisation",
    title="One prior, many scans",
    about="""
The figure of Song et al. (ICLR 2022): the same prior, never told of a scanner, at every number of
views and every acceleration. A prior gains most where the data leave much open and still fix the
coarse structure: CT of few views, MRI at moderate undersampling. Where they suffice, a classical
method does; where next to nothing was measured, as at 24-fold, nobody knows. The brain phantoms
are piecewise constant, which total variation was made for, and it beats the prior on them at
4-fold; on real brains it is the other way round ([quality.md](quality.md)). One coil and no
phase: conjugate symmetry supplies lines, see the section on MRI.
""",
    quick=Settings(),
    full=Settings(
        slices=8,
        matrix=256,
        views=(10, 16, 23, 36, 60, 90, 180),
        accelerations=(2.0, 4.0, 8.0, 12.0, 16.0, 24.0),
        methods=("pnp_admm:20", "dds:40", "mmps:100"),
        ct_baselines=("fbp", "sirt", "cgls", "tv"),
        mr_baselines=("zero-filled", "cg-sense", "l1-wavelet", "tv"),
    ),
    tasks=tasks,
    markdown=markdown,
    figure=figure,
)
