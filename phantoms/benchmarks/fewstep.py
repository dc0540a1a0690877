"""Quality against network calls, 4 to 1000: what a longer run buys."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from inverse.posterior import METHODS
from inverse.priors import load_prior
from phantoms.benchmarks import problems
from phantoms.benchmarks.generalisation import curves_table, plot_curves
from phantoms.benchmarks.harness import Benchmark, Row, Task, check
from phantoms.benchmarks.problems import BASELINES, Case, ct_case, solve

__all__ = ["BENCHMARK", "Settings"]


@dataclass(frozen=True)
class Settings(problems.Settings):
    """Settings of ``fewstep``; ``methods`` are baselines and names without calls.

    Attributes:
        calls: network calls a sample, for every method.
        views: number of CT views.
        prior: a CT prior.
    """

    slices: int = 4
    methods: tuple[str, ...] = ("tv", "pnp_admm", "dds", "diffpir")
    calls: tuple[int, ...] = (4, 8, 20, 50)
    views: int = 23
    prior: str = "ct-small"

    def __post_init__(self) -> None:
        check(bool(self.calls), "calls must name at least one number of network calls, got none")
        check(min(self.calls) >= 1, f"calls must be at least 1, got {min(self.calls)}")
        check(self.views >= 1, f"views must be at least 1, got {self.views}")
        for name in self.methods:
            check(
                name in BASELINES or name in METHODS,
                f"no method '{name}'; there are {', '.join((*BASELINES, *METHODS))}",
            )
        labels = tuple(label for label, _ in self.runs())
        problems.Settings(self.slices, self.matrix, self.first_seed, labels, self.data)

    def runs(self) -> list[tuple[str, int]]:
        """Labels of :func:`phantoms.benchmarks.problems.solve` with their calls."""
        return [
            (name if name in BASELINES else f"{name}:{calls}", calls)
            for name in self.methods
            for calls in self.calls
            if name in METHODS or calls == self.calls[0]
        ]


def tasks(settings: Settings) -> Iterator[Task]:
    """A row a method and number of calls."""
    prior = load_prior(settings.prior)

    @functools.cache
    def case() -> Case:
        return ct_case(settings, prior, settings.views, 1e5)

    def row(label: str, calls: int) -> Row:
        found = solve(case(), label)[0]
        return {**found, "method": label.partition(":")[0], "kind": "CT", "budget": calls}

    for label, calls in settings.runs():
        yield label, functools.partial(row, label, calls)


def _everywhere(rows: Mapping[str, Row]) -> list[Row]:
    """The rows, those of baselines repeated at every number of calls."""
    budgets = sorted({row["budget"] for row in rows.values()})
    spread = []
    for row in rows.values():
        free = row.get("calls") == 0
        spread += [{**row, "budget": b} for b in (budgets if free else [row["budget"]])]
    return spread


def markdown(rows: Mapping[str, Row]) -> str:
    """PSNR by calls and method."""
    return curves_table(_everywhere(rows), {"CT": "network calls"}, by="budget")


def figure(rows: Mapping[str, Row], path: Path) -> None:
    """PSNR against network calls."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(5.6, 4.0), layout="constrained")
    axis = drawing.subplots()
    plot_curves(axis, _everywhere(rows), by="budget")
    axis.set(title="CT from few views", xlabel="network calls a sample")
    drawing.savefig(path, dpi=100)


BENCHMARK = Benchmark(
    name="fewstep",
    title="Quality against network calls",
    about="""
Sparse-view CT of random chests. Total variation needs no network and is the line to beat; methods
that start from pure noise need their authors' hundreds to thousands of calls.
""",
    quick=Settings(),
    full=Settings(
        slices=8,
        matrix=256,
        methods=("fbp", "tv", "pnp_admm", "dds", "ddnm", "diffpir", "mmps", "dps", "song",
                 "pnpdm"),
        calls=(4, 8, 20, 50, 100, 200, 500, 1000),
    ),
    tasks=tasks,
    markdown=markdown,
    figure=figure,
)  # fmt: skip
