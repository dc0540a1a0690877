"""What a run leaves beside its numbers: derived series, the std map, the report as PDF."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from recon_cli.errors import one_line
from recon_cli.runlog import sha256_of
from recon_cli.task import Outcome, Recipe, Task

if TYPE_CHECKING:
    from inverse.io.series import Derivation
    from inverse.volumes import Volume
    from recon_cli.runlog import RunLog

__all__ = ["write_companions", "write_dicom"]


def _derivation(
    task: Task, title: str, settings: Mapping[str, Any], run: RunLog, *, generative: bool
) -> Derivation:
    """How an outcome came about, for its DICOM headers."""
    from inverse.io.series import Derivation

    prior = run.prior or {}
    return Derivation(
        method=str(settings.get("method", title)),
        text=f"{task.label}; {task.origin}",
        seed=run.seed,
        settings=settings,
        prior=prior.get("name") if generative else None,
        prior_sha256=prior.get("sha256") if generative else None,
    )


def write_dicom(
    task: Task,
    outcomes: Sequence[Outcome],
    truth: Volume | None,
    folder: Path,
    run: RunLog,
) -> None:
    """One derived series an outcome; the truth too, as the reference of the report."""
    from inverse.io.series import write_series

    def write(
        name: str,
        volume: Volume,
        title: str,
        number: int,
        settings: Mapping[str, Any],
        *,
        kind: Literal["image", "std"] = "image",
        generative: bool = False,
    ) -> None:
        written = write_series(
            folder / name,
            volume,
            task.templates,
            description=title,
            derivation=_derivation(task, title, settings, run, generative=generative),
            kind=kind,
            series_number=number,
            synthetic=task.simulated or generative,
            unit=task.unit,
            created=run.started.astimezone(),
        )
        if written.saturated:
            run.warn(
                "SATURATED",
                f"{written.saturated} voxels of {name} exceed the range that DICOM stores and "
                "were clipped",
            )
        run.outputs[name] = sha256_of(folder / name) | {
            "slices": len(written.paths),
            "slope": written.slope,
        }

    for number, outcome in enumerate(outcomes, start=9001):
        mine = outcome.name == "prior"
        title = f"{outcome.title} {task.label}"
        write(outcome.folder, outcome.volume, title, number, outcome.settings, generative=mine)
        if outcome.std is not None:
            write("std", outcome.std, title, 9050, outcome.settings, kind="std", generative=mine)
    if truth is not None:
        write("truth", truth, "Reference on this grid", 9060, {})


def write_companions(
    task: Task, recipe: Recipe, outcome: Outcome, folder: Path, run: RunLog
) -> None:
    """What was asked for beside the result, which stands also where one of them fails.

    Of one that fails, what is whole stays, and half of a file or folder goes.
    """
    for name in recipe.also:
        before = set(folder.iterdir())
        try:
            {"parametric-map": write_map, "pdf": write_pdf}[name](task, outcome, folder, run)
        except Exception as error:
            for path in set(folder.iterdir()) - before:
                if path.name not in run.outputs:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            why = f"{type(error).__name__}: {one_line(error)}"
            run.warn("NO_COMPANION", f"--{name} failed ({why}); all else is written")


def write_map(task: Task, outcome: Outcome, folder: Path, run: RunLog) -> None:
    """The std map of the prior with exact values, as one Parametric Map."""
    import numpy as np

    from inverse.io.dicom import write_parametric_map

    if outcome.std is None:
        run.warn("NO_MAP", "one sample a slice has no std map, so no Parametric Map is written")
        return
    write_parametric_map(
        folder / "std-map",
        np.asarray(outcome.std, np.float32),
        task.templates,
        description=f"{outcome.title} {task.label}",
        derivation=_derivation(task, outcome.title, outcome.settings, run, generative=True),
        unit=task.unit,
        created=run.started.astimezone(),
    )
    run.outputs["std-map"] = sha256_of(folder / "std-map") | {"slices": len(task.slices)}


def write_pdf(task: Task, outcome: Outcome, folder: Path, run: RunLog) -> None:
    """The report as PDF, and as an object of the study where the source is DICOM."""
    from inverse.io import dicom
    from inverse.io.nifti import is_nifti_template
    from recon_cli.report.pdf import build_pdf

    path = build_pdf(folder)
    run.outputs[path.name] = sha256_of(path)
    if is_nifti_template(task.templates[0]):
        return
    dicom.write_pdf(
        folder / "report-dicom",
        path.read_bytes(),
        task.templates,
        title=f"{outcome.title} {task.label}",
        derivation=_derivation(task, outcome.title, outcome.settings, run, generative=True),
        names_patient=bool(run.patient),
        created=run.started.astimezone(),
    )
    run.outputs["report-dicom"] = sha256_of(folder / "report-dicom")
