"""From a measurement to an output folder: baselines, prior, metrics, DICOM, report, run.json.

``study``, ``demo`` and ``reconstruct`` differ only in where the measurement comes from.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from recon_cli.console import log, plain_json, print_json, print_table, progress
from recon_cli.errors import usage
from recon_cli.evidence import FOLDER, fit_by_group, grouping, residual_map, write_maps
from recon_cli.options import DEFAULT_METHOD, parse_pairs
from recon_cli.output import NOTHING_SAVED, Batches, Saved
from recon_cli.processes import ALONE, Processes, local_rank
from recon_cli.runlog import RunLog, sha256_of, versions, write_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from inverse.io.series import Derivation
    from inverse.measurement import Measurement
    from inverse.posterior import Method
    from inverse.posterior.volume import CouplingKind
    from inverse.priors import NetworkPrior
    from inverse.reconstruct import Plan

    Volume = NDArray[np.float32]

__all__ = [
    "BASELINES",
    "Outcome",
    "Recipe",
    "Task",
    "check_baselines",
    "check_method",
    "choose_planes",
    "choose_prior",
    "evaluate",
    "execute",
    "folders",
    "pick_device",
    "show",
]

Kind = Literal["ct", "mri", "inpaint"]
METRICS = ("psnr", "ssim", "nrmse")
BASELINES = {
    "cgls": "CGLS",
    "os-sart": "OS-SART",
    "poisson": "Poisson likelihood",
    "sirt": "SIRT",
    "tv": "TV",
}
"""Classical images on request, by name: the title of each."""
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
        z_mm: position of each slice along z in mm; empty where it is not known.
        plane: of the slices, see `inverse.trust.plane`; empty where it is not known.
    """

    measurement: Measurement
    truth: Tensor | None
    templates: Sequence[bytes]
    label: str
    simulated: bool
    slices: Sequence[int]
    phantom: bool = False
    z_mm: Sequence[float] = ()
    plane: str = ""

    @property
    def kind(self) -> Kind:
        """Which family of operator measured."""
        from inverse.operators.ct import RayTransform
        from inverse.operators.mask import Mask
        from inverse.operators.resample import ThickSlices

        operator = self.measurement.operator
        if isinstance(operator, RayTransform):
            return "ct"
        return "inpaint" if isinstance(operator, Mask | ThickSlices) else "mri"

    @property
    def depth(self) -> int:
        """Slices of one measured item: one, or those of a volume."""
        return self.measurement.slices // len(self.measurement)

    def each_slice(self, value: Tensor) -> NDArray[np.float64]:
        """One number an item as one a slice; slices of a volume share its number."""
        return value.double().repeat_interleave(self.depth).numpy()

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

        x = x.reshape(-1, *x.shape[-2:])
        if self.unit == "signal":
            return x.abs().float().numpy()
        return mu_to_hu(x, float(self.measurement.mu_water or 0.0)).float().numpy()

    def spread(self, std: Tensor) -> Volume:
        """A standard deviation in the written unit."""
        scale = 1000.0 / float(self.measurement.mu_water or 1.0) if self.unit == "HU" else 1.0
        return (std.float() * scale).reshape(-1, *std.shape[-2:]).numpy()


@dataclass(frozen=True)
class Recipe:
    """How to reconstruct; ``None`` leaves the method's default, as does an option not given.

    ``also`` names files to write on request (`recon_cli.options.companions`), ``baselines``
    further classical images (`BASELINES`); ``planes`` holds priors of coronal and sagittal images;
    ``max_memory`` is in GiB.
    """

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
    also: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()
    coupling: CouplingKind = "none"
    planes: Mapping[str, NetworkPrior] = field(default_factory=dict)
    max_memory: float | None = None


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
        fit: chi-square by view or ring of k-space, ``(slices, groups)``.
        maps: further images of the report, by name.
    """

    name: str
    title: str
    volume: Volume
    chi2: NDArray[np.float64]
    seconds: float
    network_calls: int = 0
    std: Volume | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    fit: NDArray[np.float64] | None = None
    maps: Mapping[str, Volume] = field(default_factory=dict)

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


def check_baselines(names: Sequence[str] | None) -> tuple[str, ...]:
    """The classical images asked for, each once.

    Raises:
        typer.BadParameter: a name that is none; with those that exist.
    """
    wanted = tuple(dict.fromkeys(names or ()))
    for name in wanted:
        if name not in BASELINES:
            raise usage(f"no baseline '{name}'; there are {', '.join(BASELINES)}")
    return wanted


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


def choose_planes(coupling: str, given: Sequence[str], modality: str) -> dict[str, NetworkPrior]:
    """Priors of ``PLANE=NAME|FILE`` texts, by plane.

    Raises:
        typer.BadParameter: another plane, or priors of planes without the coupling that uses them.
        CheckpointError: a prior that is refused.
    """
    pairs = parse_pairs(given, "--plane-prior", "coronal=my.safetensors")
    if not set(pairs) <= {"coronal", "sagittal"}:
        raise usage(f"--plane-prior takes coronal and sagittal, got {', '.join(pairs)}")
    if pairs and coupling != "planes":
        raise usage(f"--plane-prior is for --coupling planes, got --coupling {coupling}")
    if coupling == "planes" and not pairs:
        raise usage(
            "--coupling planes needs a prior of coronal or sagittal images, since those bundled "
            "know axial ones only; give --plane-prior coronal=FILE, or choose --coupling tv"
        )
    return {plane: choose_prior(name, modality) for plane, name in pairs.items()}


def pick_device(name: str) -> str:
    """``auto`` becomes the GPU where there is one; another name is checked.

    Raises:
        ResourceError: the device is not there.
    """
    import torch

    from inverse.errors import ResourceError

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    place = local_rank()
    if name == "cuda" and place is not None and torch.cuda.is_available():
        return f"cuda:{place % torch.cuda.device_count()}"
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
    chi2 = task.each_slice(task.measurement.chi2(x))
    fit = fit_by_group(task.measurement, x)
    return Outcome(name, title, task.image(x), chi2, seconds, fit=fit)


def _in_groups(solve: Callable[[Measurement], Tensor]) -> Callable[[Measurement], Tensor]:
    """A solver of independent slices, given a few at a time, which bounds its memory."""
    import torch

    def grouped(measurement: Measurement) -> Tensor:
        groups = torch.arange(len(measurement)).split(16)
        return torch.cat([solve(measurement.take(index)) for index in groups])

    return grouped


def _direct(task: Task, run: RunLog) -> Outcome:
    """The classical linear image: filtered backprojection, zero filling, or CG where neither.

    Volumes of thick or missing slices are interpolated along z.
    """
    from inverse.classical import cgls, fbp, interpolated, zero_filled
    from inverse.errors import UnsupportedError

    if task.kind == "inpaint" and task.depth > 1:
        return _baseline(task, "interpolated", "Linear interpolation", interpolated)
    if task.kind != "ct":
        return _baseline(task, "zero-filled", "Zero-filled", zero_filled)
    try:
        return _baseline(task, "fbp", "FBP", _in_groups(fbp))
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
    if sparse and task.depth == 1:
        found.append(_baseline(task, "l1-wavelet", "L1-wavelet", l1_wavelet))
    return found


def _named(task: Task, name: str, weight: float | None, run: RunLog) -> Outcome:
    """A classical image of `BASELINES`."""
    from inverse import classical

    if name == "tv":
        return _tv(task, weight, run)
    solve: dict[str, Callable[[Measurement], Tensor]] = {
        "cgls": classical.cgls,
        "os-sart": classical.os_sart,
        "poisson": lambda m: classical.poisson(m).x,
        "sirt": classical.sirt,
    }
    with progress(BASELINES[name]):
        return _baseline(task, name, BASELINES[name], solve[name])


def folders(task: Task, recipe: Recipe, run: RunLog) -> list[str]:
    """Folders of the series that :func:`execute` writes, from its baselines of one slice."""
    import torch

    first = task.measurement.take(torch.tensor([0]))
    one = replace(task, measurement=first, truth=None, slices=task.slices[: task.depth])
    with torch.inference_mode():
        found = [_direct(one, run)]
        if task.kind == "mri" and first.operator.dtype.is_complex:
            found += _mri(one, recipe.tv)
    names = [outcome.folder for outcome in found] + ["baseline-tv"] * recipe.tv
    names += [f"baseline-{name}" for name in recipe.baselines]
    names = [*dict.fromkeys(names), "recon"]
    return names + ["std"] * (recipe.samples > 1) + ["truth"] * (task.truth is not None)


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
    chi2 = task.each_slice(task.measurement.chi2(result.x))
    fit = fit_by_group(task.measurement, result.x)
    return Outcome("tv", "TV", task.image(result.x), chi2, seconds, settings=settings, fit=fit)


def _plan(task: Task, recipe: Recipe, processes: Processes = ALONE) -> Plan:
    """The prior's reconstruction in parts, each within the memory that the user allows."""
    from inverse.posterior.volume import Coupling
    from inverse.reconstruct import Plan

    plan = Plan(
        task.measurement,
        recipe.prior,
        method=recipe.method,
        steps=recipe.steps,
        samples=recipe.samples,
        seed=recipe.seed,
        batch=recipe.batch,
        device=recipe.device,
        options=recipe.options,
        positions=task.slices if task.depth == 1 else None,
        coupling=Coupling(recipe.coupling, planes=recipe.planes),
        z_mm=task.z_mm or None,
    )
    gib = recipe.max_memory
    if gib is not None:
        # of the first process, since bits depend on how many images go to the network at a time
        plan.limit = processes.from_first(lambda: plan.fit(int(gib * 2**30)))
        log(f"{_count(plan.limit, 'image')} a network call, to stay within {gib:g} GiB")
    return plan


def _compute(task: Task, recipe: Recipe, plan: Plan, batches: Batches) -> None:
    """The parts that are not finished and that no other process computes."""
    n = task.measurement.slices
    what = f"{_count(n, 'slice')} x {_count(recipe.samples, 'sample')}"
    with progress(f"prior '{recipe.prior.card.name}', method {recipe.method}, {what}") as advance:
        plan.run(batches, claim=batches.claim, callback=advance)


def _merge(task: Task, recipe: Recipe, run: RunLog, plan: Plan, batches: Batches) -> Outcome:
    """The outcome of all parts."""
    from inverse.operators.mask import Mask

    result = plan.result(batches, keep_samples=False)
    if result.status != "ok":
        run.warn("RECONSTRUCTION", result.status)
    operator = task.measurement.operator
    if isinstance(operator, Mask) and operator.slicewise and recipe.coupling == "none":
        run.warn(
            "UNSEEN_SLICES",
            "slices that were not measured are the prior's invention, tied to their neighbours by "
            "nothing: look at the interpolated ones, or give --coupling tv",
        )
    run.settings["reconstruction"] = dict(result.settings) | {
        "operator_calls": result.operator_calls,
        "status": result.status,
    }
    volume = task.image(result.mean)
    return Outcome(
        "prior",
        f"Prior ({recipe.method})",
        volume,
        task.each_slice(result.residual_chi2),
        result.seconds,
        result.nfe // task.depth,
        task.spread(result.std) if recipe.samples > 1 else None,
        dict(result.settings),
        fit_by_group(task.measurement, result.mean),
        {"residual": residual_map(task.measurement, result.mean).reshape(volume.shape)},
    )


# --- judging -----------------------------------------------------------------------------------


def _mask(task: Task, truth: Volume, run: RunLog) -> tuple[str, NDArray[np.bool_]]:
    """Where images are compared: the missing pixels of inpainting, else the body."""
    import numpy as np

    from inverse.metrics import body_mask
    from inverse.operators.mask import Mask

    operator = task.measurement.operator
    if isinstance(operator, Mask):
        if operator.slicewise:
            return "missing slices", ~operator.mask.numpy()
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
    judged = np.arange(0)
    if task.truth is not None:
        truth = task.image(task.truth)
        result["mask"], mask = _mask(task, truth, run)
        top = HU_RANGE if task.unit == "HU" else float(np.percentile(truth, 99.9))
        result["data_range"] = top
        judged = np.flatnonzero(mask.any(axis=(1, 2)))  # not the slices that were measured
        truth, mask = truth[judged], mask[judged]
    for outcome in outcomes:
        row: dict[str, Any] = {}
        for name in METRICS if truth is not None else ():
            values = getattr(metrics, name)(
                outcome.volume[judged], truth, data_range=result["data_range"], mask=mask
            )
            interval = metrics.ci95(values) if len(values) > 1 else None
            row[name] = {"mean": float(values.mean()), "ci95": interval}
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


def _trust(
    task: Task, recipe: Recipe, run: RunLog, plan: Plan, batches: Batches, outcome: Outcome
) -> tuple[dict[str, Any], Outcome]:
    """What can be said without the truth: entry of ``metrics.json``, and maps of the prior's part.

    Where nothing can be said, the light is amber and the reason says why.
    """
    from inverse.errors import ReconError
    from inverse.trust import examine

    try:
        found = examine(
            task.measurement,
            recipe.prior,
            plan.draws(batches),
            outcome.settings,
            orientation=task.plane,
        )
    except ReconError as error:
        trust: dict[str, Any] = {"light": "amber", "reasons": [f"not examined: {error}"]}
        run.settings["verdict"] = trust
        return trust, outcome
    shape = outcome.volume.shape
    maps = {"prior-share": found.share.reshape(shape).numpy()}
    if found.null_std is not None:
        maps["null-std"] = task.spread(found.null_std)
    if found.interval is not None:
        maps["interval-low"] = task.image(found.interval.low)
        maps["interval-high"] = task.image(found.interval.high)
    trust = found.to_dict()
    run.settings["verdict"] = {name: trust[name] for name in ("light", "reasons")}
    return trust, replace(outcome, maps={**outcome.maps, **maps})


def evaluate(task: Task, recipe: Recipe, run: RunLog) -> dict[str, Any]:
    """The prior's reconstruction judged as in ``metrics.json``; nothing is written."""
    plan, batches = _plan(task, recipe), Batches(NOTHING_SAVED)
    _compute(task, recipe, plan, batches)
    return _judge(task, [_merge(task, recipe, run, plan, batches)], run)


# --- writing -----------------------------------------------------------------------------------


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


def _write_dicom(task: Task, outcomes: Sequence[Outcome], folder: Path, run: RunLog) -> None:
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
    if task.truth is not None:
        write("truth", task.image(task.truth), "Reference on this grid", 9060, {})


def _write_map(task: Task, outcome: Outcome, folder: Path, run: RunLog) -> None:
    """The std map of the prior with exact values, as one Parametric Map."""
    from inverse.io.dicom import write_parametric_map

    if outcome.std is None:
        run.warn("NO_MAP", "one sample a slice has no std map, so no Parametric Map is written")
        return
    write_parametric_map(
        folder / "std-map",
        outcome.std,
        task.templates,
        description=f"{outcome.title} {task.label}",
        derivation=_derivation(task, outcome.title, outcome.settings, run, generative=True),
        unit=task.unit,
        created=run.started.astimezone(),
    )
    run.outputs["std-map"] = sha256_of(folder / "std-map") | {"slices": len(task.slices)}


def _write_pdf(task: Task, outcome: Outcome, folder: Path, run: RunLog) -> None:
    """The report as PDF, and as an object of the study where the source is DICOM."""
    from inverse.io.dicom import write_pdf
    from inverse.io.nifti import is_nifti_template
    from recon_cli.report.pdf import build_pdf

    path = build_pdf(folder)
    run.outputs[path.name] = sha256_of(path)
    if is_nifti_template(task.templates[0]):
        return
    write_pdf(
        folder / "report-dicom",
        path.read_bytes(),
        task.templates,
        title=f"{outcome.title} {task.label}",
        derivation=_derivation(task, outcome.title, outcome.settings, run, generative=True),
        names_patient=bool(run.patient),
        created=run.started.astimezone(),
    )
    run.outputs["report-dicom"] = sha256_of(folder / "report-dicom")


def _manifest(task: Task, recipe: Recipe, run: RunLog) -> dict[str, Any]:
    """Everything that the bits of the result depend on."""
    digest = hashlib.sha256()
    for tensor in (task.measurement.data, task.measurement.noise, task.truth):
        if tensor is not None:
            digest.update(str(tensor.shape).encode() + tensor.numpy().tobytes())
    telling = ("out", "overwrite", "resume", "limits", "prior", "device", "max-memory")
    return {
        "command": run.command,
        **{f"--{name}": v for name, v in run.options.items() if name not in telling},
        "device": recipe.device.partition(":")[0],
        "inputs": run.inputs,
        "measured data": digest.hexdigest(),
        "platform": platform.platform(),
        "prior": recipe.prior.card.sha256,
        "plane priors": {name: prior.card.sha256 for name, prior in recipe.planes.items()},
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
            Outcome(
                volume=arrays[f"volume{i}"],
                chi2=arrays[f"chi2{i}"],
                fit=arrays.get(f"fit{i}"),
                **rest,
            )
            for i, rest in enumerate(meta["outcomes"])
        ]
    warned, known = len(run.warnings), set(run.settings)
    outcomes = compute()
    arrays = {f"volume{i}": o.volume for i, o in enumerate(outcomes)}
    arrays |= {f"chi2{i}": o.chi2 for i, o in enumerate(outcomes)}
    arrays |= {f"fit{i}": o.fit for i, o in enumerate(outcomes) if o.fit is not None}
    fields = ("name", "title", "seconds", "settings")
    meta = {
        "warnings": run.warnings[warned:],
        "settings": {k: v for k, v in run.settings.items() if k not in known},
        "outcomes": [{f: getattr(o, f) for f in fields} for o in outcomes],
    }
    saved.put(name, arrays, plain_json(meta))
    return outcomes


def execute(
    task: Task,
    recipe: Recipe,
    folder: Path,
    run: RunLog,
    saved: Saved = NOTHING_SAVED,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Reconstruct, judge and write everything into ``folder``.

    Args:
        task: what to reconstruct.
        recipe: how.
        folder: where the output goes.
        run: log of the run.
        saved: finished pieces, of a run that continues.
        processes: those that share the work; all but the first compute parts and write nothing.

    Returns:
        The content of ``metrics.json``; of the first process only.
    """
    from dataclasses import asdict

    import torch

    from recon_cli.report.build import build

    run.prior = asdict(recipe.prior.card)
    run.seed, run.device, run.simulation = recipe.seed, recipe.device, task.simulated
    run.settings |= {"label": task.label, "slices": list(task.slices), "phantom": task.phantom}
    run.settings["threads"] = torch.get_num_threads()
    run.identify(task.templates[0])
    run.resumed = len(saved) > 0
    run.started = processes.from_first(
        lambda: saved.agree(_manifest(task, recipe, run), run.started)
    )
    with run.phase("prior"):
        plan, batches = _plan(task, recipe, processes), Batches(saved)
    if not processes.first:
        _compute(task, recipe, plan, batches)
        processes.wait()
        return {}
    with run.phase("baselines"), torch.inference_mode():
        outcomes = _kept(saved, "direct", run, lambda: [_direct(task, run)])
        if task.kind == "mri" and task.measurement.operator.dtype.is_complex:
            outcomes += _kept(saved, "mri", run, lambda: _mri(task, recipe.tv))
        if recipe.tv:
            outcomes += _kept(saved, "tv", run, lambda: [_tv(task, recipe.tv_weight, run)])
        there = {outcome.name for outcome in outcomes}
        for name in (n for n in recipe.baselines if n not in there):

            def compute(name: str = name) -> list[Outcome]:
                return [_named(task, name, recipe.tv_weight, run)]

            outcomes += _kept(saved, name, run, compute)
    with run.phase("prior"):
        _compute(task, recipe, plan, batches)
        processes.wait()
        outcomes.append(_merge(task, recipe, run, plan, batches))
    if recipe.samples == 1:
        run.warn(
            "NO_STD",
            "one sample a slice, so no std map; for one to believe give --samples 8 and a method "
            "whose spread is the posterior's (--method mmps or pnpdm)",
        )
    with run.phase("metrics"):
        metrics = _judge(task, outcomes, run)
        metrics["trust"], outcomes[-1] = _trust(task, recipe, run, plan, batches, outcomes[-1])
    with run.phase("write"):
        _write_dicom(task, outcomes, folder, run)
        write_maps(folder, outcomes[-1].maps)
        run.outputs[FOLDER] = sha256_of(folder / FOLDER)
        if "parametric-map" in recipe.also:
            _write_map(task, outcomes[-1], folder, run)
        write_json(folder / "metrics.json", metrics)
        run.outputs["metrics.json"] = sha256_of(folder / "metrics.json")
    with run.phase("report"):
        # the report reads the folder as 'recon report' does; its own time is the one left out
        write_json(folder / "run.json", run.to_dict())
        build(folder)
        if "pdf" in recipe.also:
            _write_pdf(task, outcomes[-1], folder, run)
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
    if "trust" in metrics:
        print(f"Verdict: {metrics['trust']['light']}: {'; '.join(metrics['trust']['reasons'])}")
    print(f"{task.origin[0].upper()}{task.origin[1:]}; research use only.")
    for name in [*run.outputs, "report.html", "run.json"]:
        log(f"wrote {out / name}")
