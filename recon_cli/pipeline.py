"""From a measurement to an output folder: baselines, prior, metrics, DICOM, report, run.json.

``study``, ``demo`` and ``reconstruct`` differ only in where the measurement comes from.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from recon_cli.console import log, plain_json, print_json, print_table, progress
from recon_cli.errors import usage
from recon_cli.options import DEFAULT_METHOD
from recon_cli.output import NOTHING_SAVED, Batches, Saved
from recon_cli.runlog import RunLog, sha256_of, versions, write_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from inverse.measurement import Measurement
    from inverse.posterior import Method
    from inverse.priors import NetworkPrior

    Volume = NDArray[np.float32]

__all__ = [
    "Outcome",
    "Recipe",
    "Task",
    "check_method",
    "choose_prior",
    "evaluate",
    "execute",
    "pick_device",
    "show",
]

Kind = Literal["ct", "mri", "inpaint"]
METRICS = ("psnr", "ssim", "nrmse")
HU_RANGE = 2000.0
"""Data range of PSNR and SSIM for CT: air to dense bone."""


@dataclass(frozen=True)
class Task:
    """A measurement to reconstruct.

    Attributes:
        measurement: operator, data, noise.
        truth: the image it was simulated from, on the reconstruction grid, physical units.
        templates: DICOM headers, one a slice.
        label: what was measured, in words.
        simulated: computed from images or phantoms, not by a scanner.
        slices: index of each slice in its source.
        phantom: the data are exact line integrals of a phantom.
    """

    measurement: Measurement
    truth: Tensor | None
    templates: Sequence[bytes]
    label: str
    simulated: bool
    slices: Sequence[int]
    phantom: bool = False

    @property
    def kind(self) -> Kind:
        """Which family of operator measured."""
        from inverse.operators.ct import RayTransform
        from inverse.operators.mask import Mask

        operator = self.measurement.operator
        if isinstance(operator, RayTransform):
            return "ct"
        return "inpaint" if isinstance(operator, Mask) else "mri"

    @property
    def origin(self) -> str:
        """Where the data come from, in words."""
        if self.phantom:
            return "simulation of a mathematical phantom"
        return (
            "retrospective simulation from processed images" if self.simulated else "measured data"
        )

    @property
    def unit(self) -> Literal["HU", "signal"]:
        """Unit of the images that are written."""
        return "HU" if self.measurement.modality == "CT" else "signal"

    def image(self, x: Tensor) -> Volume:
        """Physical units to the written unit: HU, or the magnitude of the signal."""
        from inverse.operators.units import mu_to_hu

        if self.unit == "signal":
            return x.abs().float().numpy()
        return mu_to_hu(x, float(self.measurement.mu_water or 0.0)).float().numpy()

    def spread(self, std: Tensor) -> Volume:
        """A standard deviation in the written unit."""
        scale = 1000.0 / float(self.measurement.mu_water or 1.0) if self.unit == "HU" else 1.0
        return (std.float() * scale).numpy()


@dataclass(frozen=True)
class Recipe:
    """How to reconstruct; ``None`` leaves the method's default, as does an option not given."""

    prior: NetworkPrior
    method: str = DEFAULT_METHOD
    steps: int | None = None
    samples: int = 1
    seed: int = 0
    batch: int = 8
    device: str = "cpu"
    options: Mapping[str, Any] = field(default_factory=dict)
    tv_weight: float | None = None
    tv: bool = True


@dataclass(frozen=True)
class Outcome:
    """One reconstruction in the written unit.

    Attributes:
        name: key in ``metrics.json``.
        title: name for readers.
        volume: ``(slices, rows, columns)``.
        chi2: reduced residual chi-square a slice.
        seconds: wall-clock time.
        network_calls: a slice and sample.
        std: standard deviation over samples, where there are several.
        settings: resolved settings, for the DICOM provenance.
    """

    name: str
    title: str
    volume: Volume
    chi2: NDArray[np.float64]
    seconds: float
    network_calls: int = 0
    std: Volume | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Folder of its DICOM series in the output."""
        return "recon" if self.name == "prior" else f"baseline-{self.name}"


def check_method(name: str) -> Method:
    """The method of a name; an unknown one is a usage error.

    Raises:
        typer.BadParameter: with the names that exist.
    """
    from inverse.posterior.methods import METHODS

    if name not in METHODS:
        raise usage(f"no method '{name}'; there are {', '.join(METHODS)} ('recon methods')")
    return METHODS[name]


def choose_prior(name: str | None, modality: str) -> NetworkPrior:
    """Load the prior asked for, or the first bundled one of the modality.

    Raises:
        CheckpointError: none of that modality, a wrong one, or a file that is refused.
    """
    from inverse.errors import CheckpointError
    from inverse.priors import list_priors, load_prior

    if name is None:
        cards = list_priors()
        fitting = [card.name for card in cards if card.modality == modality]
        if not fitting:
            there = ", ".join(f"{c.name} ({c.modality})" for c in cards) or "none"
            raise CheckpointError(
                f"no bundled prior for {modality} images (bundled: {there}); give one with "
                f"--prior FILE, or train one with 'recon train --modality {modality.lower()}'"
            )
        name = fitting[0]
    prior = load_prior(name)
    if prior.card.modality != modality:
        raise CheckpointError(
            f"prior '{prior.card.name}' is for {prior.card.modality} images, the input is "
            f"{modality}; choose another --prior ('recon priors list')"
        )
    return prior


def pick_device(name: str) -> str:
    """``auto`` becomes the GPU where there is one; another name is checked.

    Raises:
        ResourceError: the device is not there.
    """
    import torch

    from inverse.errors import ResourceError

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise ResourceError(
            f"device '{name}' is not available here; give --device cpu ('recon doctor' lists "
            "devices)"
        ) from None
    return name


# --- computing ---------------------------------------------------------------------------------


def _count(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def _baseline(
    task: Task, name: str, title: str, solve: Callable[[Measurement], Tensor]
) -> Outcome:
    start = time.monotonic()
    x = solve(task.measurement)
    seconds = time.monotonic() - start
    chi2 = task.measurement.chi2(x).double().numpy()
    return Outcome(name, title, task.image(x), chi2, seconds)


def _direct(task: Task, run: RunLog) -> Outcome:
    """The classical linear image: filtered backprojection, zero filling, or CG where neither."""
    from inverse.classical import cgls, fbp, zero_filled
    from inverse.errors import UnsupportedError

    if task.kind != "ct":
        return _baseline(task, "zero-filled", "Zero-filled", zero_filled)
    try:
        return _baseline(task, "fbp", "FBP", fbp)
    except UnsupportedError as error:
        run.warn("NO_FBP", f"{error}; the baseline is least squares by conjugate gradients")
        return _baseline(task, "cgls", "CGLS", cgls)


def _mri(task: Task, sparse: bool) -> list[Outcome]:
    """What is usual for k-space beyond zero filling: coils by CG-SENSE, sparsity by wavelets."""
    from inverse.classical import cg_sense, l1_wavelet
    from inverse.operators.mri import CartesianMRI

    found = []
    if not isinstance(task.measurement.operator, CartesianMRI):  # there it is zero filling
        found.append(_baseline(task, "cg-sense", "CG-SENSE", cg_sense))
    if sparse:
        found.append(_baseline(task, "l1-wavelet", "L1-wavelet", l1_wavelet))
    return found


def _tv(task: Task, weight: float | None, run: RunLog) -> Outcome:
    from inverse.classical import tv

    with progress("total variation"):
        start = time.monotonic()
        result = tv(task.measurement, weight)
        seconds = time.monotonic() - start
    late = int((~result.converged).sum())
    if late:
        run.warn(
            "TV_NOT_CONVERGED",
            f"total variation did not converge in {late} slices; its image may fall short",
        )
    settings = {"weight": result.weight, "iterations": int(result.iterations.max())}
    run.settings["tv"] = settings
    chi2 = task.measurement.chi2(result.x).double().numpy()
    return Outcome("tv", "TV", task.image(result.x), chi2, seconds, settings=settings)


def _sample(task: Task, recipe: Recipe, run: RunLog, saved: Batches | None = None) -> Outcome:
    from inverse.reconstruct import reconstruct

    n = len(task.measurement)
    what = f"{_count(n, 'slice')} x {_count(recipe.samples, 'sample')}"
    with progress(f"prior '{recipe.prior.card.name}', method {recipe.method}, {what}") as advance:
        result = reconstruct(
            task.measurement,
            recipe.prior,
            method=recipe.method,
            steps=recipe.steps,
            samples=recipe.samples,
            seed=recipe.seed,
            batch=recipe.batch,
            device=recipe.device,
            callback=advance,
            options=recipe.options,
            positions=task.slices,
            saved=saved,
        )
    if result.status != "ok":
        run.warn("RECONSTRUCTION", result.status)
    run.settings["reconstruction"] = dict(result.settings) | {
        "operator_calls": result.operator_calls,
        "status": result.status,
    }
    return Outcome(
        "prior",
        f"Prior ({recipe.method})",
        task.image(result.mean),
        result.residual_chi2.double().numpy(),
        result.seconds,
        result.nfe,
        task.spread(result.std) if recipe.samples > 1 else None,
        dict(result.settings),
    )


# --- judging -----------------------------------------------------------------------------------


def _mask(task: Task, truth: Volume, run: RunLog) -> tuple[str, NDArray[np.bool_]]:
    """Where images are compared: the missing pixels of inpainting, else the body."""
    import numpy as np

    from inverse.metrics import body_mask
    from inverse.operators.mask import Mask

    operator = task.measurement.operator
    if isinstance(operator, Mask):
        return "missing pixels", np.broadcast_to(~operator.mask.numpy(), truth.shape)
    threshold = -500.0 if task.unit == "HU" else 0.1 * float(np.percentile(truth, 99))
    mask = body_mask(truth, threshold)
    empty = ~mask.any(axis=(1, 2))
    if empty.any():
        run.warn(
            "NO_BODY", f"{int(empty.sum())} slices show no body; their metrics are of all pixels"
        )
        mask[empty] = True
    return "body", mask


def _judge(task: Task, outcomes: Sequence[Outcome], run: RunLog) -> dict[str, Any]:
    """The content of ``metrics.json``."""
    import numpy as np

    from inverse import metrics
    from recon_cli.runlog import SCHEMA_VERSION

    result: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "unit": task.unit,
        "mask": None,
        "data_range": None,
        "methods": {},
        "per_slice": [{"slice": int(z)} for z in task.slices],
    }
    truth = mask = None
    if task.truth is not None:
        truth = task.image(task.truth)
        result["mask"], mask = _mask(task, truth, run)
        top = HU_RANGE if task.unit == "HU" else float(np.percentile(truth, 99.9))
        result["data_range"] = top
    for outcome in outcomes:
        row: dict[str, Any] = {}
        for name in METRICS if truth is not None else ():
            values = getattr(metrics, name)(
                outcome.volume, truth, data_range=result["data_range"], mask=mask
            )
            interval = metrics.ci95(values) if len(values) > 1 else None
            row[name] = {"mean": float(values.mean()), "ci95": interval}
            for entry, value in zip(result["per_slice"], values, strict=True):
                entry.setdefault(outcome.name, {})[name] = float(value)
        for entry, value in zip(result["per_slice"], outcome.chi2, strict=True):
            entry.setdefault(outcome.name, {})["residual_chi2"] = float(value)
        result["methods"][outcome.name] = {
            "title": outcome.title,
            **row,
            "residual_chi2": float(outcome.chi2.mean()),
            "seconds": round(outcome.seconds, 3),
            "network_calls": outcome.network_calls,
        }
    return result


def evaluate(task: Task, recipe: Recipe, run: RunLog) -> dict[str, Any]:
    """The prior's reconstruction judged as in ``metrics.json``; nothing is written."""
    return _judge(task, [_sample(task, recipe, run)], run)


# --- writing -----------------------------------------------------------------------------------


def _write_dicom(task: Task, outcomes: Sequence[Outcome], folder: Path, run: RunLog) -> None:
    """One derived series an outcome; the truth too, as the reference of the report."""
    from inverse.io.series import Derivation, write_series

    prior = run.prior or {}
    described = f"{task.label}; {task.origin}"

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
            derivation=Derivation(
                method=str(settings.get("method", title)),
                text=described,
                seed=run.seed,
                settings=settings,
                prior=prior.get("name") if generative else None,
                prior_sha256=prior.get("sha256") if generative else None,
            ),
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
    if task.truth is not None:
        write("truth", task.image(task.truth), "Reference on this grid", 9060, {})


def _manifest(task: Task, recipe: Recipe, run: RunLog) -> dict[str, Any]:
    """Everything that the bits of the result depend on."""
    digest = hashlib.sha256()
    for tensor in (task.measurement.data, task.measurement.noise, task.truth):
        if tensor is not None:
            digest.update(str(tensor.shape).encode() + tensor.numpy().tobytes())
    telling = ("out", "overwrite", "resume", "limits", "prior", "device")
    return {
        "command": run.command,
        **{f"--{name}": v for name, v in run.options.items() if name not in telling},
        "device": recipe.device,
        "inputs": run.inputs,
        "measured data": digest.hexdigest(),
        "platform": platform.platform(),
        "prior": recipe.prior.card.sha256,
        "threads": run.settings["threads"],
        "versions": versions(),
    }


def _kept(
    saved: Saved, name: str, run: RunLog, compute: Callable[[], list[Outcome]]
) -> list[Outcome]:
    """Baselines, computed once in the life of a run that is continued."""
    piece = saved.get(name)
    if piece is not None:
        arrays, meta = piece
        run.notes([(w["code"], w["text"]) for w in meta["warnings"]])
        run.settings |= meta["settings"]
        return [
            Outcome(volume=arrays[f"volume{i}"], chi2=arrays[f"chi2{i}"], **rest)
            for i, rest in enumerate(meta["outcomes"])
        ]
    warned, known = len(run.warnings), set(run.settings)
    outcomes = compute()
    arrays = {f"volume{i}": o.volume for i, o in enumerate(outcomes)}
    arrays |= {f"chi2{i}": o.chi2 for i, o in enumerate(outcomes)}
    fields = ("name", "title", "seconds", "settings")
    meta = {
        "warnings": run.warnings[warned:],
        "settings": {k: v for k, v in run.settings.items() if k not in known},
        "outcomes": [{f: getattr(o, f) for f in fields} for o in outcomes],
    }
    saved.put(name, arrays, plain_json(meta))
    return outcomes


def execute(
    task: Task, recipe: Recipe, folder: Path, run: RunLog, saved: Saved = NOTHING_SAVED
) -> dict[str, Any]:
    """Reconstruct, judge and write everything into ``folder``.

    Args:
        task: what to reconstruct.
        recipe: how.
        folder: where the output goes.
        run: log of the run.
        saved: finished pieces, of a run that continues.

    Returns:
        The content of ``metrics.json``.
    """
    from dataclasses import asdict

    import torch

    from recon_cli.report.build import build

    run.prior = asdict(recipe.prior.card)
    run.seed, run.device, run.simulation = recipe.seed, recipe.device, task.simulated
    run.settings |= {"label": task.label, "slices": list(task.slices), "phantom": task.phantom}
    run.settings["threads"] = torch.get_num_threads()
    run.resumed = len(saved) > 0
    run.started = saved.agree(_manifest(task, recipe, run), run.started)
    with run.phase("baselines"), torch.inference_mode():
        outcomes = _kept(saved, "direct", run, lambda: [_direct(task, run)])
        if task.kind == "mri" and task.measurement.operator.dtype.is_complex:
            outcomes += _kept(saved, "mri", run, lambda: _mri(task, recipe.tv))
        if recipe.tv:
            outcomes += _kept(saved, "tv", run, lambda: [_tv(task, recipe.tv_weight, run)])
    with run.phase("prior"):
        outcomes.append(_sample(task, recipe, run, Batches(saved)))
    if recipe.samples == 1:
        run.warn(
            "NO_STD",
            "one sample a slice, so no std map; for one to believe give --samples 8 and a method "
            "whose spread is the posterior's (--method mmps or pnpdm)",
        )
    with run.phase("metrics"):
        metrics = _judge(task, outcomes, run)
    with run.phase("write"):
        _write_dicom(task, outcomes, folder, run)
        write_json(folder / "metrics.json", metrics)
        run.outputs["metrics.json"] = sha256_of(folder / "metrics.json")
    with run.phase("report"):
        # the report reads the folder as 'recon report' does; its own time is the one left out
        write_json(folder / "run.json", run.to_dict())
        build(folder)
    write_json(folder / "run.json", run.to_dict())
    return metrics


# --- telling -----------------------------------------------------------------------------------


def _cell(row: Mapping[str, Any], name: str, digits: int) -> str:
    value = row.get(name)
    if not value or value["mean"] is None:
        return "-"
    text = f"{value['mean']:.{digits}f}"
    if value["ci95"] and name == "psnr":
        text += f" [{value['ci95'][0]:.{digits}f}, {value['ci95'][1]:.{digits}f}]"
    return text


def show(out: Path, task: Task, metrics: Mapping[str, Any], run: RunLog, as_json: bool) -> None:
    """Print the result: the table of methods and where things are."""
    if as_json:
        print_json({"out": str(out), **metrics, "warnings": run.warnings})
        return
    rows = [
        [
            str(row["title"]),
            _cell(row, "psnr", 2),
            _cell(row, "ssim", 3),
            _cell(row, "nrmse", 4),
            f"{row['residual_chi2']:.3g}",
            f"{row['seconds']:.1f}",
            str(row["network_calls"]),
        ]
        for row in metrics["methods"].values()
    ]
    where = f" inside {metrics['mask']}" if metrics["mask"] else ""
    print_table(
        f"{task.label}, {_count(len(task.slices), 'slice')}{where}",
        ["method", "PSNR dB [95% CI]", "SSIM", "NRMSE", "residual chi2", "seconds", "net calls"],
        rows,
    )
    print(f"{task.origin[0].upper()}{task.origin[1:]}; research use only.")
    for name in [*run.outputs, "report.html", "run.json"]:
        log(f"wrote {out / name}")
