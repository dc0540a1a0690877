"""Missing pixels: a square hole, where the prior must invent, and scattered ones."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from inverse.priors import load_prior
from phantoms.benchmarks import problems
from phantoms.benchmarks.harness import Benchmark, Row, Task, check
from phantoms.benchmarks.problems import Case, draw_cases, inpainting_case, quality_table, solve

__all__ = ["BENCHMARK", "Settings"]


@dataclass(frozen=True)
class Settings(problems.Settings):
    """Settings of ``inpainting``.

    Attributes:
        squares: sides of the square hole relative to the image's, a case each.
        shares: shares of pixels missing at random, a case each.
        noise: noise std relative to water.
        prior: a CT prior.
    """

    methods: tuple[str, ...] = ("zero-filled", "tv", "pnp_admm:20", "ddnm:20", "diffpir:20")
    squares: tuple[float, ...] = (0.25,)
    shares: tuple[float, ...] = (0.8,)
    noise: float = 0.01
    prior: str = "ct-small"

    def __post_init__(self) -> None:
        super().__post_init__()
        holes = (*self.squares, *self.shares)
        check(bool(holes), "give at least one of squares and shares")
        check(
            0 < min(holes) <= max(holes) < 1,
            f"a hole must be a share between 0 and 1, got {min(holes)} to {max(holes)}",
        )


def tasks(settings: Settings) -> Iterator[Task]:
    """A row a case and method."""
    prior = load_prior(settings.prior)

    @functools.cache
    def case(kind: str, hole: float) -> Case:
        return inpainting_case(settings, prior, hole, kind, settings.noise)

    def row(kind: str, hole: float, label: str) -> Row:
        return solve(case(kind, hole), label)[0]

    for kind, holes in (("square", settings.squares), ("pixels", settings.shares)):
        for hole in holes:
            for label in settings.methods:
                yield f"{kind} {hole:g}, {label}", functools.partial(row, kind, hole, label)


BENCHMARK = Benchmark(
    name="inpainting",
    title="Missing pixels",
    about="""
Chest slices with missing pixels and noise of one per cent of water; all metrics are taken in the
missing pixels alone, data range 2000 HU. Inside a square nothing is known: what is there is the
prior's word, and a low PSNR is the honest answer.
""",
    quick=Settings(),
    full=Settings(
        slices=8,
        matrix=256,
        squares=(0.125, 0.25, 0.5),
        shares=(0.5, 0.8, 0.95),
        methods=("zero-filled", "tv", "pnp_admm:20", "dds:20", "ddnm:100", "diffpir:100",
                 "mmps:100", "pnpdm:160", "song:2000"),
    ),
    tasks=tasks,
    markdown=quality_table,
    figure=draw_cases,
)  # fmt: skip
