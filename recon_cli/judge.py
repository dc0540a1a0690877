"""How good the images are: against the truth, and what can be said without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recon_cli.evidence import grouping
from recon_cli.output import Batches
from recon_cli.task import Outcome, Recipe, Task

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from inverse.reconstruct import Plan
    from inverse.trust.verdict import Maps
    from inverse.volumes import Allocate, Volume
    from recon_cli.runlog import RunLog

    Scores = dict[str, dict[str, NDArray[np.float64]]]

__all__ = ["judge", "trust"]

METRICS = ("psnr", "ssim", "nrmse")
TOLD = {"PIXEL_SIZE": "pixels of ", "RESIDUAL": "residual chi-square "}
"""Warnings of which a verdict judges too, with how its reasons begin."""
HU_RANGE = 2000.0
"""Data range of PSNR and SSIM for CT: air to dense bone."""


class _Mask:
    """Where images are compared: the missing pixels of inpainting, else the body.

    Args:
        task: with its truth.
        truth: in the written unit.
    """

    def __init__(self, task: Task, truth: Volume) -> None:
        from inverse.operators.mask import Mask
        from inverse.volumes import percentile

        operator = task.measurement.operator
        self._task = task
        self._missing: NDArray[np.bool_] | None = None
        self._threshold = -500.0
        if isinstance(operator, Mask):
            self.name = "missing slices" if operator.slicewise else "missing pixels"
            self._missing = ~operator.mask.numpy()
        else:
            self.name = "body"
            if task.unit != "HU":
                self._threshold = 0.1 * float(percentile(truth, 99))
        self.empty = 0

    def of(self, places: slice, truth: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Of some slices; of those that show no body all pixels, and :attr:`empty` counts them."""
        import numpy as np

        from inverse.metrics import body_mask

        if self._missing is None:
            mask = body_mask(truth, self._threshold)
            empty = ~mask.any(axis=(1, 2))
            self.empty += int(empty.sum())
            mask[empty] = True
            return mask
        if self.name == "missing slices":
            return self._missing[places]
        return np.broadcast_to(self._missing, truth.shape)


def _scores(
    task: Task, outcomes: Sequence[Outcome], truth: Volume, top: float, run: RunLog
) -> tuple[str, list[int], Scores]:
    """What is compared, the slices that are, and the metrics of each by outcome and name."""
    import numpy as np

    from inverse import metrics
    from inverse.volumes import slabs

    where, judged = _Mask(task, truth), list[int]()
    found: dict[str, dict[str, list[NDArray[np.float64]]]] = {
        outcome.name: {name: [] for name in METRICS} for outcome in outcomes
    }
    for places in slabs(len(truth)):
        image = truth[places]
        mask = where.of(places, image)
        here = np.flatnonzero(mask.any(axis=(1, 2)))  # not the slices that were measured
        judged += [places.start + int(k) for k in here]
        if not len(here):
            continue
        for outcome in outcomes:
            x = outcome.volume[places][here]
            for name, values in found[outcome.name].items():
                metric = getattr(metrics, name)
                values.append(metric(x, image[here], data_range=top, mask=mask[here]))
    if where.empty:
        run.warn("NO_BODY", f"{where.empty} slices show no body; their metrics are of all pixels")
    return (
        where.name,
        judged,
        {
            outcome: {name: np.concatenate(parts) for name, parts in rows.items()}
            for outcome, rows in found.items()
        },
    )


def judge(
    task: Task, outcomes: Sequence[Outcome], truth: Volume | None, run: RunLog
) -> dict[str, Any]:
    """The content of ``metrics.json``; ``truth`` in the written unit."""
    from inverse import metrics
    from inverse.volumes import percentile
    from recon_cli.runlog import SCHEMA_VERSION

    result: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "unit": task.unit,
        "mask": None,
        "data_range": None,
        "methods": {},
        "per_slice": [{"slice": int(z)} for z in task.slices],
    }
    judged: list[int] = []
    scores: Scores = {}
    if truth is not None:
        top = HU_RANGE if task.unit == "HU" else float(percentile(truth, 99.9))
        result["data_range"] = top
        result["mask"], judged, scores = _scores(task, outcomes, truth, top, run)
    for outcome in outcomes:
        row: dict[str, Any] = {}
        for name, values in scores.get(outcome.name, {}).items():
            row[name] = {"mean": float(values.mean()), "ci95": metrics.ci95(values)}
            for k, value in zip(judged, values, strict=True):
                result["per_slice"][k].setdefault(outcome.name, {})[name] = float(value)
        for entry, value in zip(result["per_slice"], outcome.chi2, strict=True):
            entry.setdefault(outcome.name, {})["residual_chi2"] = float(value)
        result["methods"][outcome.name] = {
            "title": outcome.title,
            **row,
            "residual_chi2": float(outcome.chi2.mean()),
            "seconds": round(outcome.seconds, 3),
            "network_calls": outcome.network_calls,
        }
    result["residual_by_group"] = grouping(task.measurement, {o.name: o.fit for o in outcomes})
    return result


def _leave_out_doubles(told: Mapping[str, Any], run: RunLog) -> None:
    """What a verdict gives as a reason for doubt is no warning beside it."""
    reasons = () if told["light"] == "green" else told["reasons"]
    run.warnings[:] = [
        warning
        for warning in run.warnings
        if not any(reason.startswith(TOLD.get(warning["code"], "?")) for reason in reasons)
    ]


def trust(
    task: Task,
    recipe: Recipe,
    run: RunLog,
    plan: Plan,
    batches: Batches,
    outcome: Outcome,
    allocate: Allocate,
) -> tuple[dict[str, Any], dict[str, Volume]]:
    """What can be said without the truth: entry of ``metrics.json``, and maps of the prior's part.

    Where nothing can be said, the light is amber and the reason says why.
    """
    from inverse.errors import ReconError
    from inverse.trust import examine

    maps: dict[str, Volume] = {}

    def sink(item: int, found: Maps) -> None:
        images = {"prior-share": found.share.reshape(-1, *task.shape[1:]).numpy()}
        if found.null_std is not None:
            images["null-std"] = task.spread(found.null_std)
        if found.interval is not None:
            images["interval-low"] = task.image(found.interval.low)
            images["interval-high"] = task.image(found.interval.high)
        for name, image in images.items():
            if name not in maps:
                maps[name] = allocate(task.shape, "float16")
            maps[name][task.places(slice(item, item + 1))] = image

    try:
        found = examine(
            task.measurement,
            recipe.prior,
            plan.draws(batches),
            outcome.settings,
            orientation=task.plane,
            sink=sink,
        )
    except ReconError as error:
        unknown: dict[str, Any] = {"light": "amber", "reasons": [f"not examined: {error}"]}
        run.settings["verdict"] = unknown
        return unknown, {}
    told = found.to_dict()
    _leave_out_doubles(told, run)
    run.settings["verdict"] = {name: told[name] for name in ("light", "reasons")}
    return told, maps
