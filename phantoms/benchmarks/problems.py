"""The problems of the benchmarks: known slices, their data, and every way to reconstruct them.

Slices are those of random phantoms, whose seeds no bundled prior was trained on, or of images of
the user's.  Data never come from the operator that reconstructs them; see
:mod:`phantoms.simulate`, also for the one exception, k-space of a single coil.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from inverse.classical import (
    cg_sense,
    cgls,
    fbp,
    inr,
    l1_wavelet,
    phased,
    sirt,
    tv,
    zero_filled,
)
from inverse.errors import ReconError
from inverse.io.dicom import inspect, read_series
from inverse.measurement import Measurement
from inverse.metrics import body_mask, psnr, ssim
from inverse.operators.ct import ParallelBeam
from inverse.operators.units import AIR_HU, mu_to_hu
from inverse.posterior import METHODS
from inverse.priors import NetworkPrior
from inverse.reconstruct import reconstruct
from inverse.training.data import load_images
from phantoms.anatomy import head, thorax
from phantoms.benchmarks.harness import Row, check, half_width, plus_minus, table, without_repeats
from phantoms.shapes import Ellipses
from phantoms.simulate import (
    Simulation,
    simulate_ct,
    simulate_ct_analytic,
    simulate_inpainting,
    simulate_mri,
)

__all__ = [
    "BASELINES",
    "Case",
    "Settings",
    "brains",
    "chests",
    "ct_case",
    "draw_case",
    "draw_cases",
    "hu_case",
    "inpainting_case",
    "mr_case",
    "quality_table",
    "solve",
]

Float32 = NDArray[np.float32]

BASELINES: dict[str, Callable[[Measurement], Tensor]] = {
    "fbp": fbp,
    "sirt": sirt,
    "cgls": cgls,
    "tv": phased(lambda m: tv(m).x),
    "zero-filled": zero_filled,
    "cg-sense": cg_sense,
    "l1-wavelet": phased(l1_wavelet),
    "inr": inr,
}
"""Reconstructions without a prior, by name; of complex images with the phase that priors get."""

CT_RANGE = 2000.0
"""Data range of PSNR and SSIM in HU."""
TRAINING_SEEDS = 1000
"""First seed of the phantoms that the bundled prior was trained on."""
FIELD_MM = 352.0
"""Side of a phantom chest's slice: 2 mm pixels at 176 x 176."""
HEAD_MM = 230.4
"""Side of a phantom brain's slice: 0.9 mm pixels at 256 x 256."""


@dataclass(frozen=True)
class Settings:
    """What every benchmark of images has.

    Attributes:
        slices: slices of a case, each of another phantom.
        matrix: rows and columns.
        first_seed: seed of the first phantom.
        methods: names of :data:`BASELINES`, or ``METHOD:CALLS`` with the network calls a sample.
        data: images to use instead of phantoms; a DICOM folder or zip, for MR also ``.npz``.
    """

    slices: int = 4
    matrix: int = 176
    first_seed: int = 200
    methods: tuple[str, ...] = ()
    data: str = ""

    def __post_init__(self) -> None:
        check(self.slices >= 1, f"slices must be at least 1, got {self.slices}")
        check(
            self.matrix >= 32 and self.matrix % 16 == 0,
            f"matrix must be a multiple of 16 from 32 on, which the networks need, got "
            f"{self.matrix}",
        )
        last = TRAINING_SEEDS - self.slices
        check(
            0 <= self.first_seed <= last,
            f"phantoms of the seeds from {TRAINING_SEEDS} on are those of training; first_seed "
            f"must lie in 0 to {last}, got {self.first_seed}",
        )
        check(bool(self.methods), "methods must name at least one method or baseline, got none")
        for label in self.methods:
            parse(label)


def parse(label: str) -> tuple[str, int]:
    """A method's name and its network calls, 0 for a baseline.

    Raises:
        ReconError: neither a baseline nor ``METHOD:CALLS``.
    """
    name, colon, calls = label.partition(":")
    if not colon and name in BASELINES:
        return name, 0
    if name in METHODS and calls.isdecimal() and int(calls) > 0:
        return name, int(calls)
    raise ReconError(
        f"'{label}' is neither a baseline ({', '.join(BASELINES)}) nor METHOD:CALLS with a method "
        f"of 'recon methods', such as pnp_admm:20"
    )


@dataclass(frozen=True)
class Case:
    """One problem with its truth.

    Attributes:
        name: what is measured.
        measurement: the data, physical units.
        truth: display units (HU, or the magnitude), ``(slices, h, w)``.
        mask: where metrics are taken.
        data_range: of PSNR and SSIM, display units.
        display: physical images to display units.
        prior: a prior of the modality.
        offset: physical value of prior value 0 (CT).
        scale: physical units per prior unit (CT).
    """

    name: str
    measurement: Measurement
    truth: Float32
    mask: NDArray[np.bool_]
    data_range: float
    display: Callable[[Tensor], Float32]
    prior: NetworkPrior
    offset: float = 0.0
    scale: float = 1.0

    @property
    def inner(self) -> Measurement:
        """The measurement in prior units."""
        return self.measurement.rescaled(self.offset, self.scale)

    def quality(self, x: Tensor) -> Row:
        """PSNR, SSIM and reduced chi-square a slice of physical images."""
        image = self.display(x)
        how: dict[str, Any] = {"data_range": self.data_range, "mask": self.mask}
        return {
            "psnr": _values(psnr(image, self.truth, **how)),
            "ssim": _values(ssim(image, self.truth, **how)),
            "chi2": _values(self.measurement.chi2(x.to(self.measurement.operator.dtype))),
        }


# --- slices -------------------------------------------------------------------------------------


def chests(count: int, first_seed: int) -> list[Ellipses]:
    """One slice of each of ``count`` random chests, at heights within 40 mm of the middle.

    The field of view holds all of them, or the data would be inconsistent: chests with arms or
    flanks beyond it are passed over, and parts of the table that reach out of it are left out.

    Raises:
        ReconError: fewer such chests below the seeds of training.
    """
    heights = np.random.default_rng(first_seed)
    found: list[Ellipses] = []
    for seed in range(first_seed, TRAINING_SEEDS):
        section = thorax(seed).slice(float(heights.uniform(-40, 40)))
        pixel = FIELD_MM / 128
        inside = float(section.image((128, 128), pixel).sum(dtype=np.float64)) * pixel**2
        if abs(1 - inside / section.mass) < 0.02:
            found.append(_inside(section, FIELD_MM / 2))
        if len(found) == count:
            return found
    raise ReconError(
        f"only {len(found)} chests from seed {first_seed} to {TRAINING_SEEDS - 1} lie in the "
        f"field of view, {count} are asked for; lower slices or first_seed"
    )


def _inside(section: Ellipses, half: float) -> Ellipses:
    """The ellipses that lie in a square about the origin, half its side in mm."""
    c, s = np.cos(section.angle), np.sin(section.angle)
    right = np.abs(section.x) + np.hypot(section.a * c, section.b * s)
    down = np.abs(section.y) + np.hypot(section.a * s, section.b * c)
    keep = np.maximum(right, down) <= half
    names = ("value", "x", "y", "a", "b", "angle")
    return Ellipses(**{name: getattr(section, name)[keep] for name in names})


def brains(count: int, first_seed: int, matrix: int) -> tuple[Float32, float]:
    """T1-weighted slices of random heads without their skull, and their pixel size in mm.

    The skull is stripped as in the images that ``brain-small`` was trained on: of what is
    brighter than bone, the piece at the middle without its holes.
    """
    pixel = HEAD_MM / matrix
    heights = np.random.default_rng(first_seed).uniform(-10, 30, count)
    images = []
    for k, z in enumerate(heights):
        signal = head(first_seed + k, contrast="t1").slice(float(z)).image((matrix, matrix), pixel)
        pieces, _ = ndimage.label(signal > 0.09)
        brain = ndimage.binary_fill_holes(pieces == pieces[matrix // 2, matrix // 2])
        images.append(np.where(brain, np.maximum(signal, 0.0), 0.0).astype(np.float32))
    return np.stack(images), pixel


def series(path: Path, count: int) -> tuple[Float32, float]:
    """Evenly spaced slices in HU of the series at ``path``, and their pixel size in mm."""
    stacks = inspect(path).stacks
    volumes: list[Float32] = []
    pixel = 0.0
    for stack in stacks:
        found = read_series(path, stack=stack.key)
        if pixel and abs(found.spacing[1] - pixel) > 1e-3 * pixel:
            continue  # one pixel size a case
        pixel = float(found.spacing[1])
        volumes += list(found.array)
        if len(volumes) >= count:
            break
    return np.stack([volumes[i] for i in spread(len(volumes), count)]), pixel


def mr_images(path: Path, count: int) -> tuple[Float32, float]:
    """Evenly spaced magnitude images of ``path``, and their pixel size in mm."""
    images = load_images(path, "MR")
    chosen = spread(len(images), count)
    return np.stack([images.images[i] for i in chosen]), float(images.pixel_mm[chosen[0]])


def spread(total: int, count: int) -> list[int]:
    """``count`` indices spread evenly over ``total``, all where there are fewer."""
    return [round(i) for i in np.linspace(0, total - 1, min(count, total) + 2)[1:-1]]


# --- cases --------------------------------------------------------------------------------------


def ct_case(
    settings: Settings, prior: NetworkPrior, views: int, photons: float, arc: float = 180.0
) -> Case:
    """Parallel-beam CT of chests, or of the series at ``settings.data``.

    Args:
        settings: slices and grid.
        prior: a CT prior.
        views: number of views.
        photons: photons a detector bin in air.
        arc: angle that the views cover, degrees.
    """
    n = settings.matrix
    shape = (n, n)
    if settings.data:
        hu, fine = series(Path(settings.data), settings.slices)
        pixel = fine * max(hu.shape[1:]) / n
        beam = ParallelBeam.sparse(views, shape, pixel, arc=np.deg2rad(arc))
        scan = simulate_ct(hu, fine, beam, matrix=n, photons=photons)
    else:
        pixel = FIELD_MM / n
        beam = ParallelBeam.sparse(views, shape, pixel, arc=np.deg2rad(arc))
        bodies = chests(settings.slices, settings.first_seed)
        scan = simulate_ct_analytic(bodies, pixel, beam, matrix=n, photons=photons)
    return hu_case(f"CT, {views} views", scan, prior)


def hu_case(name: str, scan: Simulation, prior: NetworkPrior) -> Case:
    """A simulated CT scan as a case, in HU inside the body."""
    mu = float(scan.measurement.mu_water or 0.0)

    def hu(x: Tensor) -> Float32:
        return np.asarray(mu_to_hu(x.cpu().numpy(), mu), np.float32)

    truth = hu(scan.truth)
    return Case(
        name=name,
        measurement=scan.measurement,
        truth=truth,
        mask=body_mask(truth, -500.0),
        data_range=CT_RANGE,
        display=hu,
        prior=prior.at(pixel_mm=scan.measurement.pixel_mm[0]),
        offset=mu * (1 + prior.offset / 1000),
        scale=mu * prior.scale / 1000,
    )


def mr_case(
    settings: Settings,
    prior: NetworkPrior,
    acceleration: float,
    *,
    coils: int = 1,
    phase: float = 0.0,
    noise: float = 0.005,
    seed: int = 0,
) -> Case:
    """Cartesian MRI of brains, or of the images at ``settings.data``.

    Args:
        settings: slices and grid.
        prior: an MR prior.
        acceleration: k-space size over samples.
        coils: receive coils.
        phase: amplitude of the object's smooth phase in radians.
        noise: noise std relative to the brightest signal.
        seed: of the sampling pattern, the phase and the noise.
    """
    if settings.data:
        images, pixel = mr_images(Path(settings.data), settings.slices)
    else:
        images, pixel = brains(settings.slices, settings.first_seed, settings.matrix)
    scan = simulate_mri(
        images,
        (pixel, pixel),
        acceleration=acceleration,
        centre_fraction=min(0.32 / acceleration, 0.08),
        coils=coils,
        phase=phase,
        noise=noise,
        seed=seed,
    )
    return _mr(f"MRI, {acceleration:g}x, {coils} coil{'s' * (coils > 1)}", scan, prior)


def _mr(name: str, scan: Simulation, prior: NetworkPrior) -> Case:
    truth = scan.truth.abs().numpy().astype(np.float32)
    return Case(
        name=name,
        measurement=scan.measurement,
        truth=truth,
        mask=body_mask(truth, 0.05 * float(truth.max())),
        data_range=float(np.percentile(truth, 99.9)),
        display=lambda x: x.abs().cpu().numpy().astype(np.float32),
        prior=prior.at(pixel_mm=scan.measurement.pixel_mm[0]),
    )


def inpainting_case(
    settings: Settings, prior: NetworkPrior, hole: float, kind: Any, noise: float = 0.01
) -> Case:
    """Chest slices with missing pixels; metrics are taken in these alone.

    Args:
        settings: slices and grid.
        prior: a CT prior.
        hole: side of the square relative to the image's, or share of missing pixels.
        kind: ``"square"`` or ``"pixels"``.
        noise: noise std relative to water.
    """
    n = settings.matrix
    if settings.data:
        hu, fine = series(Path(settings.data), settings.slices)
        pixel = (fine, fine)
    else:
        side = FIELD_MM / n
        bodies = chests(settings.slices, settings.first_seed)
        hu = AIR_HU + np.stack([body.image((n, n), side) for body in bodies]).astype(np.float32)
        pixel = (side, side)
    scan = simulate_inpainting(
        hu, pixel, modality="CT", hole=hole, kind=kind, matrix=n, noise=noise
    )
    what = "square" if kind == "square" else "pixels"
    case = hu_case(f"{what}, {hole:g}", scan, prior)
    known = scan.measurement.operator(torch.ones(n, n)) != 0
    missing = np.broadcast_to(~known.numpy(), case.truth.shape)
    return Case(**{**vars(case), "mask": missing})


# --- reconstructions ----------------------------------------------------------------------------


def solve(case: Case, label: str, *, seed: int = 0) -> tuple[Row, Tensor | None]:
    """The row of a method on a case, and its images in physical units.

    A method that refuses the case leaves a row without values, and no images.

    Args:
        case: the problem.
        label: as in ``Settings.methods``.
        seed: seed of the sampler.
    """
    name, calls = parse(label)
    started = time.monotonic()
    status = "ok"
    try:
        if calls:
            result = reconstruct(
                case.measurement, case.prior, method=name, steps=steps(name, calls), seed=seed
            )
            x, calls, status = result.mean, result.nfe, result.status
        else:
            with torch.inference_mode():
                x = BASELINES[name](case.measurement)
    except ReconError as error:
        return {"case": case.name, "method": label, "status": str(error)}, None
    seconds = (time.monotonic() - started) / len(case.truth)
    row = {
        "case": case.name,
        "method": label,
        **case.quality(x),
        "calls": calls,
        "seconds": round(seconds, 2),
        "status": status,
    }
    return row, x


def steps(name: str, calls: int) -> int:
    """Sampler steps that cost about ``calls`` network calls."""
    each = METHODS[name].calls_per_step
    return max(
        1, round(calls / int(METHODS[name].options[each] if isinstance(each, str) else each))
    )


def quality_table(rows: Mapping[str, Row]) -> str:
    """A table a case: PSNR, its gain over the best baseline on the same slices, SSIM, cost."""
    parts = []
    for case in without_repeats(row["case"] for row in rows.values()):
        own = [row for row in rows.values() if row["case"] == case]
        baselines = [row for row in own if "psnr" in row and not row["calls"]]
        best = max(baselines, key=lambda row: float(np.mean(row["psnr"])), default=None)
        against = "best baseline" if best is None else best["method"]
        head = ("method", "PSNR dB", f"gain on {against}", "SSIM", "χ²", "network calls",
                "s a slice", "status")  # fmt: skip
        cells = [_cells(row, best) for row in own]
        parts.append(f"**{case}**\n\n{table(head, cells)}")
    return "\n".join(parts)


def _cells(row: Row, best: Row | None) -> list[str]:
    status = "" if row["status"] == "ok" else row["status"].split(":")[0]
    if "psnr" not in row:
        return [row["method"], *["–"] * 6, status]
    gain = "–"
    if best is not None and best is not row:
        gain = plus_minus(np.subtract(row["psnr"], best["psnr"]))
    return [
        row["method"],
        plus_minus(row["psnr"]),
        gain,
        plus_minus(row["ssim"], 3),
        f"{np.mean(row['chi2']):.2f}",
        str(row["calls"]),
        f"{row['seconds']:.1f}",
        status,
    ]


def draw_cases(rows: Mapping[str, Row], path: Path) -> None:
    """PSNR with its interval, a panel a case, a line a method."""
    from matplotlib.figure import Figure

    names = without_repeats(row["case"] for row in rows.values())
    drawing = Figure(figsize=(4.2 * len(names), 3.6), layout="constrained")
    axes = drawing.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        draw_case(axis, name, [row for row in rows.values() if row["case"] == name])
    drawing.savefig(path, dpi=100)


def draw_case(axis: Any, name: str, rows: Sequence[Row]) -> None:
    """One panel of :func:`draw_cases`."""
    rows = [row for row in rows if "psnr" in row][::-1]
    for k, row in enumerate(rows):
        width = half_width(row["psnr"]) or 0.0
        colour = "C1" if row["calls"] else "C0"
        axis.errorbar(np.mean(row["psnr"]), k, xerr=width, fmt="o", color=colour, capsize=3)
    axis.set_yticks(range(len(rows)), [row["method"] for row in rows])
    axis.set(title=name, xlabel="PSNR, dB")
    axis.grid(axis="x", alpha=0.3)


def _values(x: Any) -> list[float]:
    return [round(float(v), 4) for v in x]
