"""All benchmarks by name, those with a table of their own among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

from inverse.posterior import METHODS
from inverse.posterior.volume import Coupling, CouplingKind
from inverse.priors import load_prior
from phantoms.benchmarks import (
    architecture,
    calibration,
    ct,
    fewstep,
    generalisation,
    inpainting,
    lesions,
    mri,
    score_family,
    speed,
    volume,
)
from phantoms.benchmarks.harness import Benchmark, Row, Task, check

__all__ = ["BENCHMARKS"]


# --- calibration --------------------------------------------------------------------------------


@dataclass(frozen=True)
class CalibrationSettings:
    """Settings of ``calibration``.

    Attributes:
        methods: labels of :data:`phantoms.benchmarks.calibration.SETTINGS`.
        count: samples of the one fixed measurement.
        simulations: simulated pairs of truth and data.
        side: rows and columns of the Gaussian fields.
        slices: fields.
    """

    methods: tuple[str, ...] = ("pnp_admm", "mmps", "mmps, 20 steps", "pigdm", "diffpir", "ddnm",
                                "dds", "dds, weight 1", "pnpdm", "daps", "red_diff")  # fmt: skip
    count: int = 2000
    simulations: int = 80
    side: int = 16
    slices: int = 4

    def __post_init__(self) -> None:
        unknown = set(self.methods) - set(calibration.SETTINGS)
        check(not unknown, f"no {', '.join(unknown)}; there are {', '.join(calibration.SETTINGS)}")
        least = max(calibration.SLOW.values())
        check(
            min(self.count, self.simulations) >= least,
            f"count and simulations must be at least {least}, got {self.count} and "
            f"{self.simulations}",
        )
        check(self.side >= 8 and self.slices >= 1, f"side must be at least 8, got {self.side}")


def _calibration_tasks(settings: CalibrationSettings) -> Iterator[Task]:
    def toy(make: Callable[[], calibration.Toy], label: str) -> Row:
        k = calibration.SLOW.get(label, 1)
        count, simulations = settings.count // k, settings.simulations // k
        found = calibration.measure(make(), label, count=count, simulations=simulations)
        return _json(found)

    def field(kind: str, label: str) -> Row:
        fixture = calibration.field(kind, settings.side, settings.slices)
        return _json(calibration.measure_field(fixture, label))

    for make in calibration.TOYS:
        for label in settings.methods:
            yield f"{make.__name__}, {label}", partial(toy, make, label)
    for kind in ("ct", "mri"):
        for label in settings.methods:
            if label != "smc":
                yield f"{kind} field, {label}", partial(field, kind, label)


def _json(row: calibration.Row) -> Row:
    """The row; an infinite divergence as a word, which JSON has no number for."""
    return {**asdict(row), "kl": "inf" if row.kl == math.inf else row.kl}


def _calibration_markdown(rows: Mapping[str, Row]) -> str:
    found = [{**row, "kl": float(row["kl"]) if row["kl"] is not None else None}
             for row in rows.values()]  # fmt: skip
    return calibration.markdown([calibration.Row(**row) for row in found]) + "\n"


CALIBRATION = Benchmark(
    name="calibration",
    title="Methods against exact posteriors",
    about="""
Problems whose posterior is known in closed form, so that nothing but the method can err: see
[calibration.md](calibration.md), which says how to read the columns and has the full table.
""",
    quick=CalibrationSettings(),
    full=CalibrationSettings(tuple(calibration.SETTINGS), 20000, 320, 32, 4),
    tasks=_calibration_tasks,
    markdown=_calibration_markdown,
)


# --- the score-SDE family -----------------------------------------------------------------------


@dataclass(frozen=True)
class FamilySettings:
    """Settings of ``score_family``.

    Attributes:
        parts: names of :data:`phantoms.benchmarks.score_family.PARTS`.
        reduced: fewer samples.
    """

    parts: tuple[str, ...] = tuple(part.__name__ for part in score_family.PARTS)
    reduced: bool = True

    def __post_init__(self) -> None:
        known = {part.__name__ for part in score_family.PARTS}
        unknown = set(self.parts) - known
        check(not unknown, f"no part {', '.join(unknown)}; there are {', '.join(known)}")


def _family_tasks(settings: FamilySettings) -> Iterator[Task]:
    def row(part: Callable[[bool], Iterator[score_family.Row]]) -> Row:
        return {"rows": [asdict(found) for found in part(settings.reduced)]}

    for part in score_family.PARTS:
        if part.__name__ in settings.parts:
            yield part.__name__, partial(row, part)


def _family_markdown(rows: Mapping[str, Row]) -> str:
    found = [score_family.Row(**row) for part in rows.values() for row in part["rows"]]
    return score_family.markdown(found) + "\n"


FAMILY = Benchmark(
    name="score_family",
    title="The score-SDE family against closed forms",
    about="""
Every objective, sampler and likelihood beside the value that theory gives: see
[score-family.md](score-family.md), which says how to read the columns and has the full table.
""",
    quick=FamilySettings(),
    full=FamilySettings(reduced=False),
    tasks=_family_tasks,
    markdown=_family_markdown,
)


# --- lesions ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LesionSettings:
    """Settings of ``lesions``.

    Attributes:
        views: numbers of views of CT, parallel beam.
        accelerations: of MRI, Cartesian.
        coils: numbers of receive coils of MRI.
        phantoms: phantom slices, one a body.
        real: slices of ``data``.
        steps: network calls of the prior.
        prior: says whether CT or MRI.
        data: real slices that nobody trained on, npz or DICOM; default none.
    """

    views: tuple[int, ...] = lesions.QUICK.views
    accelerations: tuple[float, ...] = lesions.QUICK.accelerations
    coils: tuple[int, ...] = lesions.QUICK.coils
    phantoms: int = lesions.QUICK.phantoms
    real: int = lesions.QUICK.real
    steps: int = lesions.QUICK.steps
    prior: str = "ct-small"
    data: str = ""

    def __post_init__(self) -> None:
        check(
            bool(self.views and self.accelerations and self.coils),
            "views, accelerations and coils must name at least one number each",
        )
        least = min(*self.views, *self.coils, self.phantoms, self.real, self.steps)
        check(
            least >= 1, f"views, coils, phantoms, real and steps must be at least 1, got {least}"
        )
        fastest = min(self.accelerations)
        check(fastest > 1, f"an acceleration must be above 1, got {fastest}")


def _lesion_tasks(settings: LesionSettings) -> Iterator[Task]:
    prior = load_prior(settings.prior)
    modality = prior.card.modality
    plan = lesions.Plan(
        settings.phantoms, settings.real, settings.steps, settings.views, settings.accelerations,
        settings.coils,
    )  # fmt: skip
    data = Path(settings.data) if settings.data else None

    def row(make: Callable[[], list[Row]], number: int, scan: lesions.Scan, method: str) -> Row:
        about = {"slice": number, "scan": scan.label, "method": method, "modality": modality}
        return {"rows": [{**r, **about} for r in make()]}

    slices = lesions.all_slices(plan, modality, data, {})
    for number, one, scan, method, make in lesions.tasks(plan, prior, slices):
        yield f"{one.name}, {scan.label}, {method}", partial(row, make, number, scan, method)


def _lesion_rows(rows: Mapping[str, Row]) -> tuple[list[Row], lesions.Subject]:
    found = [row for part in rows.values() for row in part["rows"]]
    return found, lesions.SUBJECTS[found[0]["modality"] if found else "CT"]


def _lesion_markdown(rows: Mapping[str, Row]) -> str:
    return lesions.tables(*_lesion_rows(rows))


LESIONS = Benchmark(
    name="lesions",
    title="Planted lesions",
    about="""
Lesions put in and structures taken out before the measurement: what of their contrast arrives
(mean ± standard error, in brackets the lesion-shaped error of the image without it), and whether
an observer of a few channels can tell (area under the ROC curve with its 95 % interval): see
[lesions.md](lesions.md).
""",
    quick=LesionSettings(),
    full=LesionSettings(
        lesions.FULL.views, lesions.FULL.accelerations, lesions.FULL.coils, lesions.FULL.phantoms,
        lesions.FULL.real, lesions.FULL.steps,
    ),
    tasks=_lesion_tasks,
    markdown=_lesion_markdown,
    figure=lambda rows, path: lesions.draw(*_lesion_rows(rows), path),
)  # fmt: skip


# --- volumes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VolumeSettings:
    """Settings of ``volume``.

    Attributes:
        slices: slices of the volume.
        views: number of views, parallel beam.
        methods: names of methods.
        couplings: of slices, which need no priors of other planes.
        steps: sampler steps.
        prior: a CT prior.
        data: a real series to use instead of the phantom.
    """

    slices: int = 10
    views: int = 23
    methods: tuple[str, ...] = ("pnp_admm", "dds")
    couplings: tuple[CouplingKind, ...] = tuple(volume.COUPLINGS)
    steps: int = 8
    prior: str = "ct-small"
    data: str = ""

    def __post_init__(self) -> None:
        check(self.slices >= 2, f"a volume needs at least 2 slices, got {self.slices}")
        least = min(self.views, self.steps)
        check(least >= 1, f"views and steps must be at least 1, got {least}")
        for name in self.methods:
            check(name in METHODS, f"no method '{name}'; there are {', '.join(METHODS)}")
        for kind in self.couplings:
            known = ", ".join(volume.COUPLINGS)
            check(kind in volume.COUPLINGS, f"no coupling '{kind}'; there are {known}")


def _volume_tasks(settings: VolumeSettings) -> Iterator[Task]:
    prior = load_prior(settings.prior)

    @cache
    def case() -> volume.Case:
        if settings.data:
            return volume.real(Path(settings.data), settings.slices, settings.views)
        return volume.phantom(settings.slices, settings.views)

    def row(methods: list[str], couplings: list[Coupling]) -> Row:
        *_, last = volume.rows(case(), prior, methods, couplings, settings.steps, {})
        return last

    yield "FBP", partial(row, [], [])
    for method in settings.methods:
        for kind in settings.couplings:
            yield f"{method}, {kind}", partial(row, [method], [Coupling(kind)])


VOLUME = Benchmark(
    name="volume",
    title="Volumes from priors of slices",
    about="""
Sparse-view CT of a chest by each method, without coupling of slices and with: PSNR of sections in
three planes; the energy of the z-gradient over that of the truth, 1 where slices neither flicker
nor blur; its error. What the couplings are: [scale.md](scale.md).
""",
    quick=VolumeSettings(),
    full=VolumeSettings(slices=40, steps=20),
    tasks=_volume_tasks,
    markdown=lambda rows: volume.markdown(list(rows.values())).lstrip(),
)

BENCHMARKS: dict[str, Benchmark] = {
    b.name: b
    for b in (
        ct.BENCHMARK,
        mri.BENCHMARK,
        inpainting.BENCHMARK,
        generalisation.BENCHMARK,
        fewstep.BENCHMARK,
        CALIBRATION,
        LESIONS,
        VOLUME,
        speed.BENCHMARK,
        architecture.BENCHMARK,
        FAMILY,
    )
}
"""All, in the order of the results page."""
