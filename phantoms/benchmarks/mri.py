"""Undersampled Cartesian MRI by one coil and by several: every method on known brains."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from inverse.priors import load_prior
from phantoms.benchmarks import problems
from phantoms.benchmarks.harness import Benchmark, Row, Task, check
from phantoms.benchmarks.problems import Case, draw_cases, mr_case, quality_table, solve

__all__ = ["BENCHMARK", "Settings"]

EVERY = (
    "zero-filled", "cg-sense", "l1-wavelet", "tv", "inr", "pnp_admm:8", "pnp_admm:20", "dds:8",
    "dds:20", "diffpir:20", "ddnm:20", "pigdm:20", "mmps:20", "dps:100", "red_diff:100",
    "daps:100", "pnpdm:160", "mcg:200", "score_mri:200", "song:200", "ald:300",
)  # fmt: skip


@dataclass(frozen=True)
class Settings(problems.Settings):
    """Settings of ``mri``.

    Attributes:
        accelerations: k-space size over samples, a case each.
        coils: numbers of receive coils, a case each; of several the maps are calibrated from the
            data, and the object has a phase, which a prior of real images is told as estimated.
        phase: amplitude in radians of the object's smooth phase where there are several coils.
        noise: noise std relative to the brightest signal.
        pattern: seed of the sampling pattern, the phase and the noise; at 8-fold patterns differ
            by 2 dB, so that a comparison of methods should see several.
        prior: an MR prior.
    """

    slices: int = 3
    matrix: int = 256
    methods: tuple[str, ...] = ("zero-filled", "cg-sense", "l1-wavelet", "tv", "pnp_admm:20")
    accelerations: tuple[float, ...] = (4.0,)
    coils: tuple[int, ...] = (1, 8)
    phase: float = 1.0
    noise: float = 0.005
    pattern: int = 0
    prior: str = "brain-small"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.accelerations) and bool(self.coils), "give an acceleration and coils")
        check(
            min(self.accelerations) > 1,
            f"an acceleration must be above 1, got {min(self.accelerations)}",
        )
        check(min(self.coils) >= 1, f"coils must be at least 1, got {min(self.coils)}")


def tasks(settings: Settings) -> Iterator[Task]:
    """A row a case and method."""
    prior = load_prior(settings.prior)

    @functools.cache
    def case(acceleration: float, coils: int) -> Case:
        phase = settings.phase if coils > 1 else 0.0
        return mr_case(
            settings,
            prior,
            acceleration,
            coils=coils,
            phase=phase,
            noise=settings.noise,
            seed=settings.pattern,
        )

    def row(acceleration: float, coils: int, label: str) -> Row:
        return solve(case(acceleration, coils), label)[0]

    for coils in settings.coils:
        for acceleration in settings.accelerations:
            for label in settings.methods:
                if label == "cg-sense" and coils == 1:
                    continue  # the zero-filled image
                name = f"{acceleration:g}x, {coils} coils, {label}"
                yield name, functools.partial(row, acceleration, coils, label)


BENCHMARK = Benchmark(
    name="mri",
    title="Undersampled MRI",
    about="""
Cartesian MRI of random brain phantoms, skull-stripped as the prior's training images are (or of
your own images with `--data`). One coil: a real object, k-space by FFT on its own grid. Several
coils: an object with a smooth phase seen through Biot-Savart fields on twice the grid, maps
calibrated from the data, the phase estimated. PSNR and SSIM of the magnitude inside the head,
data range its 99.9th percentile. The phantoms are piecewise constant, which total variation was
made for and the prior never saw: how the methods do on real brains is in
[quality.md](quality.md).

The k-space of a real image of zero phase is conjugate symmetric: a line at k tells that at -k. One
coil without phase is therefore easier than its acceleration says for whoever knows that the image
is real, and easier than a measured scan, which has a phase. The prior, total variation and
wavelets know it up to the same estimated phase; zero filling and CG-SENSE do not.
""",
    quick=Settings(),
    full=Settings(slices=8, methods=EVERY, accelerations=(4.0, 8.0)),
    tasks=tasks,
    markdown=quality_table,
    figure=draw_cases,
)
