"""``--dry-run``: what a command would read and write, with nothing computed to the end or written.

The input is read and checked as in a run, and the scan, with a few of its views, and the classical
baselines are tried on one slice, so that a run would fail where this does.  The prior is loaded
and never called.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recon_cli.baselines import folders
from recon_cli.console import log, print_json, print_table
from recon_cli.evidence import FOLDER
from recon_cli.runlog import SCHEMA_VERSION, RunLog
from recon_cli.task import Recipe, Task

if TYPE_CHECKING:
    from inverse.io.measurement_file import MeasurementFile
    from inverse.io.series import Series

__all__ = ["Plan", "Write", "plan_file", "plan_measurement", "plan_output", "tell"]

_DICOM_HEADER = 3000
"""Bytes of a derived slice's header beyond those of its source, about."""
_TEXT, _PICTURE, _PAGE = 40_000, 0.7, 160_000
"""Bytes of a report's text, of its pictures a pixel, and of a page of its PDF, about."""


@dataclass(frozen=True)
class Write:
    """Files that would be written, with their size in bytes, about."""

    name: str
    files: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """What a run would do; plain JSON values."""

    command: str
    out: str
    reads: Mapping[str, Any]
    settings: Mapping[str, Any]
    writes: Sequence[Write]
    warnings: Sequence[Mapping[str, str]] = field(default_factory=list)
    patient: Mapping[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of all files, about."""
        return sum(w.bytes for w in self.writes)


def _input(run: RunLog, images: Series | None, slices: Sequence[int]) -> dict[str, Any]:
    """What was read: hashes of the files, and the stack."""
    reads: dict[str, Any] = {**run.inputs, "slices": [int(k) for k in slices]}
    if images is not None:
        reads["stack"] = {
            "modality": images.modality,
            "shape": list(images.array.shape),
            "spacing_mm": [round(v, 6) for v in images.spacing],
        }
    return reads


def plan_output(
    out: Path,
    task: Task,
    recipe: Recipe,
    slices: Sequence[int],
    run: RunLog,
    *,
    images: Series | None = None,
) -> Plan:
    """What `recon_cli.pipeline.execute` would do.

    Args:
        out: output folder.
        task: the measurement, of all slices or of the first one.
        recipe: how to reconstruct it.
        slices: all slices, by their index in the source.
        run: log of the run so far.
        images: the source, where there is one.
    """
    from inverse.posterior.methods import METHODS

    run.identify(task.templates[0])
    method = METHODS[recipe.method]
    given = {**recipe.options, **({} if recipe.steps is None else {"steps": recipe.steps})}
    options = method.resolve(given, task.measurement.modality)
    each = method.calls_per_step
    calls = int(options["steps"]) * int(options[each] if isinstance(each, str) else each)
    count, (rows, columns) = len(slices), task.measurement.operator.in_shape[-2:]
    header = _DICOM_HEADER + max(map(len, task.templates))
    names = folders(task, recipe, run)
    writes = [Write(f"{name}/", count, count * (header + 2 * rows * columns)) for name in names]
    writes.append(Write(f"{FOLDER}/", 2, 4 * count * rows * columns))
    if "parametric-map" in recipe.also and "std" in names:
        writes.append(Write("std-map/", 1, header + count * (1000 + 4 * rows * columns)))
    shown = min(3, count)
    pixels = shown * (2 * len(names) + 1) * rows * columns
    writes.append(Write("report.html", 1, _TEXT + int(_PICTURE * 4 / 3 * pixels)))
    if "pdf" in recipe.also:
        pdf = _TEXT + shown * _PAGE
        writes += [Write("report.pdf", 1, pdf), Write("report-dicom/", 1, pdf + header)]
    writes += [Write("metrics.json", 1, 1000 + 600 * count), Write("run.json", 1, 8000)]
    settings = {
        "measurement": task.label,
        "prior": recipe.prior.card.name,
        "prior_sha256": recipe.prior.card.sha256,
        "method": recipe.method,
        **options,
        "samples": recipe.samples,
        "network_calls": calls * recipe.samples * count,
        "batch": recipe.batch,
        "device": recipe.device,
        "seed": recipe.seed,
        "matrix": [rows, columns],
        "pixel_mm": list(task.measurement.pixel_mm),
    }
    return Plan(
        run.command, str(out), _input(run, images, slices), settings, writes, run.warnings,
        run.patient,
    )  # fmt: skip


def plan_file(
    out: Path,
    task: Task,
    slices: Sequence[int],
    run: RunLog,
    *,
    images: Series,
    shape: Sequence[int] | None = None,
) -> Plan:
    """What ``simulate`` would do.

    Args:
        out: file to write.
        task: what was tried: the first slice, or a volume.
        slices: all slices, by their index in the source.
        run: log of the run so far.
        images: the source.
        shape: of all the data; by default as many items as there are of those tried.
    """
    from torch import Tensor

    measurement, count = task.measurement, len(slices)
    assert isinstance(task.truth, Tensor)
    items = count if task.depth == 1 else len(measurement)
    shape = [items, *measurement.data.shape[1:]] if shape is None else list(shape)
    size = math.prod(shape) * measurement.data.element_size()
    size += items * task.truth.nbytes // len(measurement)
    size += count * len(task.templates[0])
    shared = sum(t.nbytes for t in _tensors(measurement.operator))
    settings = {
        "measurement": task.label,
        "data_shape": shape,
        **run.settings["simulation"],
    }
    writes = [Write(out.name, 1, size + shared + 10_000)]
    return Plan(
        run.command, str(out), _input(run, images, slices), settings, writes, run.warnings,
        run.patient,
    )  # fmt: skip


def _tensors(operator: Any) -> list[Any]:
    """Arrays of an operator that its file holds."""
    names = ("mask", "maps", "trajectory", "density", "good")
    return [t for t in (getattr(operator, name, None) for name in names) if hasattr(t, "nbytes")]


def plan_measurement(out: Path, told: Mapping[str, Any], file: MeasurementFile) -> Plan:
    """What ``convert`` would do; ``told`` describes the measurement."""
    measurement = file.measurement
    size = measurement.data.nbytes + measurement.noise.nbytes + sum(map(len, file.template))
    size += sum(t.nbytes for t in _tensors(measurement.operator))
    kept = ("label", "modality", "operator", "shape", "pixel_mm", "z_mm", "noise", "provenance")
    reads = {"format": told["format"], "slices": told["slices"]}
    settings = {name: told[name] for name in kept}
    return Plan("convert", str(out), reads, settings, [Write(out.name, 1, size + 10_000)])


def _size(count: int) -> str:
    """Bytes in words."""
    power = min(int(math.log2(max(count, 1)) // 10), 3)
    return f"{count / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def _text(name: str, value: Any) -> str:
    """A setting in a line; long lists by their length, sizes as products."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_text(k, v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        between = " x " if name.endswith(("shape", "matrix", "_mm")) else ", "
        many = len(value) > 8
        return f"{len(value)} values" if many else between.join(_text("", v) for v in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def tell(plan: Plan, as_json: bool) -> None:
    """Print a plan: a table of the files on stdout, or JSON."""
    if as_json:
        print_json(
            {
                "schema_version": SCHEMA_VERSION,
                "dry_run": True,
                **asdict(plan),
                "bytes": plan.bytes,
            }
        )
        return
    for title, values in (("Read", plan.reads), ("Settings", plan.settings)):
        print(title)
        for name, value in values.items():
            if value not in (None, {}, []):
                print(f"  {name}: {_text(name, value)}")
    for name, text in plan.patient.items():
        print(f"  {name}: {text}")
    print(f"Would be written to {plan.out}, about {_size(plan.bytes)}")
    rows = [[w.name, str(w.files), _size(w.bytes)] for w in plan.writes]
    print_table("", ["name", "files", "about"], rows)
    log("dry run: nothing was written")
