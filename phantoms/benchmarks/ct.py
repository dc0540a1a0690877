"""Sparse-view CT: every method on known chests, with what a physicist asks of a scanner."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from inverse.priors import load_prior
from phantoms.benchmarks import problems
from phantoms.benchmarks.harness import (
    Benchmark,
    Row,
    Task,
    check,
    plus_minus,
    table,
    without_repeats,
)
from phantoms.benchmarks.physics import Scanner, draw, measure, physics_table
from phantoms.benchmarks.problems import Case, Float32, ct_case, draw_case, quality_table, solve

__all__ = ["BENCHMARK", "Settings", "hu_errors"]

TISSUES = {"lung": (-950.0, -600.0), "soft tissue": (-20.0, 100.0), "bone": (250.0, 1600.0)}
"""Range of the truth in HU; pixels beside others do not count."""

EVERY = (
    "fbp", "sirt", "cgls", "tv", "inr", "pnp_admm:8", "pnp_admm:20", "dds:8", "dds:20",
    "diffpir:20", "ddnm:20", "pigdm:20", "mmps:20", "dps:100", "red_diff:100", "daps:100",
    "pnpdm:160", "mcg:200", "score_mri:200", "song:200", "ald:300",
)  # fmt: skip
"""All but ``smc``, whose particles are for small images; the authors' own lengths are up to 4000
calls."""


@dataclass(frozen=True)
class Settings(problems.Settings):
    """Settings of ``ct``.

    Attributes:
        views: numbers of views over a half turn, a case each.
        photons: photons a detector bin in air.
        acr_methods: methods that also measure the ACR phantom; none to leave it out.
        acr_views: its views.
        acr_repeats: its scans with and without the rod that is to be seen, at least 16.
        prior: a CT prior.
    """

    methods: tuple[str, ...] = ("fbp", "sirt", "cgls", "tv", "pnp_admm:8", "pnp_admm:20", "dds:20")
    views: tuple[int, ...] = (23,)
    photons: float = 1e5
    acr_methods: tuple[str, ...] = ("fbp", "tv", "pnp_admm:8")
    acr_views: int = 60
    acr_repeats: int = 16
    prior: str = "ct-small"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.views), "views must name at least one number of views, got none")
        check(min(self.views) >= 1, f"views must be at least 1, got {min(self.views)}")
        check(self.photons > 0, f"photons must be positive, got {self.photons}")
        check(self.acr_views >= 1, f"acr_views must be at least 1, got {self.acr_views}")
        check(self.acr_repeats >= 16, f"acr_repeats must be at least 16, got {self.acr_repeats}")
        for label in self.acr_methods:
            problems.parse(label)


def tasks(settings: Settings) -> Iterator[Task]:
    """A row a case and method; then the ACR phantom."""
    prior = load_prior(settings.prior)

    @functools.cache
    def case(views: int) -> Case:
        return ct_case(settings, prior, views, settings.photons)

    for views in settings.views:
        for label in settings.methods:
            yield f"{views} views, {label}", functools.partial(_row, case, views, label)
    acr = Scanner(settings.acr_views, settings.photons, settings.acr_repeats, 4, prior)
    for label in settings.acr_methods:
        yield f"ACR phantom, {label}", functools.partial(measure, acr, label)


def _row(case: functools._lru_cache_wrapper[Case], views: int, label: str) -> Row:
    problem = case(views)
    row, x = solve(problem, label)
    if x is not None:
        row["hu"] = hu_errors(problem.display(x), problem.truth, problem.mask)
    return row


def hu_errors(
    image: Float32, truth: Float32, mask: NDArray[np.bool_]
) -> dict[str, list[float] | None]:
    """Mean error in HU a slice inside each of :data:`TISSUES`, in homogeneous regions.

    Args:
        image: HU, ``(slices, h, w)``.
        truth: HU.
        mask: the body.

    Returns:
        Values of the slices that hold the tissue, ``None`` where none does.
    """
    found: dict[str, list[float] | None] = {}
    for tissue, (low, high) in TISSUES.items():
        values = []
        for x, t, m in zip(image, truth, mask, strict=True):
            inside = ndimage.binary_erosion((t > low) & (t < high) & m)
            if inside.sum() >= 20:
                values.append(round(float((x - t)[inside].mean()), 3))
        found[tissue] = values or None
    return found


def markdown(rows: Mapping[str, Row]) -> str:
    """Quality, HU accuracy, and the ACR phantom."""
    chests = {name: row for name, row in rows.items() if "case" in row}
    parts = [quality_table(chests)]
    done = [row for row in chests.values() if "hu" in row]
    for name in without_repeats(row["case"] for row in done):
        cells = [
            [row["method"], *("–" if v is None else plus_minus(v, 1) for v in row["hu"].values())]
            for row in done
            if row["case"] == name
        ]
        head = ("mean error in HU", *TISSUES)
        parts.append(f"**{name}: accuracy**\n\n{table(head, cells)}")
    return "\n".join([*parts, physics_table([r for r in rows.values() if "case" not in r])])


def figure(rows: Mapping[str, Row], path: Path) -> None:
    """PSNR a case; sharpness and noise of the ACR phantom."""
    from matplotlib.figure import Figure

    chests = [row for row in rows.values() if "case" in row]
    acr = [row for row in rows.values() if "case" not in row]
    names = without_repeats(row["case"] for row in chests)
    drawing = Figure(figsize=(4.2 * (len(names) + 2), 3.6), layout="constrained")
    axes = drawing.subplots(1, len(names) + 2)
    for axis, name in zip(axes, names, strict=False):
        draw_case(axis, name, [row for row in chests if row["case"] == name])
    draw(acr, axes[-2:])
    drawing.savefig(path, dpi=100)


BENCHMARK = Benchmark(
    name="ct",
    title="CT from few views",
    about="""
Parallel-beam CT with photon noise of random chests that no prior was trained on (or of your own
series with `--data`). PSNR and SSIM inside the body, data range 2000 HU; χ² is the reduced
residual of the data. Accuracy is the mean error in homogeneous parts of each tissue. The ACR
phantom is far from anything that the prior was trained on; MTF and noise hold for its contrasts
and this dose.
""",
    quick=Settings(),
    full=Settings(
        slices=8,
        matrix=256,
        methods=EVERY,
        views=(23, 60, 180),
        acr_methods=("fbp", "sirt", "tv", "pnp_admm:20", "mmps:100"),
        acr_repeats=64,
    ),
    tasks=tasks,
    markdown=markdown,
    figure=figure,
)
