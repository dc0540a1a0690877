"""Lesions planted before measurement: ``python -m phantoms.benchmarks.lesions --prior ct-small``.

Slices of phantoms that no prior was trained on, and of real patients with ``--data``, are measured
twice, as they are and with lesions put in and structures taken out (:mod:`phantoms.lesions`), with
the same seed of the noise.  The prior says whether by CT or MRI.  Of each reconstruction
(classical ones, total variation, the prior) it is asked

* how much of each lesion's contrast arrives, put in or taken out: 1 is all of it;
* whether an observer that sees a few channels can tell the two, with the confidence interval.

Finished reconstructions are kept in the JSON file, so that an interrupted run goes on where it
stopped; those of another prior are computed anew, the classical ones are not.  The page has a
section for each prior, and a run replaces its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inverse import __version__
from inverse.classical import cg_sense, fbp, l1_wavelet, phased, tv, zero_filled
from inverse.errors import InputError
from inverse.measurement import Measurement
from inverse.operators.ct import ParallelBeam
from inverse.operators.mri import Sense
from inverse.operators.units import mu_to_hu
from inverse.priors import NetworkPrior, load_prior
from inverse.reconstruct import reconstruct
from inverse.training.data import load_images
from inverse.trust import Detection, contrast_recovery, hotelling, laguerre_gauss, sfrc
from phantoms.anatomy import AIR_HU, thorax
from phantoms.benchmarks.harness import Row, without_repeats
from phantoms.benchmarks.page import with_section
from phantoms.benchmarks.problems import brains
from phantoms.lesions import BRAIN, CHEST, Edit, Kind, plant
from phantoms.simulate import Simulation, simulate_ct, simulate_mri

HALF_MM = 20.0
"""Half side of the window about a lesion that is looked at."""
BLUR_MM = 4.0
"""Beyond the lesion's edge up to which its truth on the coarse grid reaches."""
CHANNELS = 5
"""Laguerre-Gauss channels that are kept; the observer uses as many as the images allow."""
IMAGES_PER_CHANNEL = 15
PHANTOM_SEEDS = range(50_000, 60_000)
"""Far from the seeds of training."""
MR_MATRIX = 256
"""Of phantom heads."""
COLOURS = {
    "fbp": "#7f7f7f", "zero-filled": "#7f7f7f", "cg-sense": "#7f7f7f", "l1-wavelet": "#009E73",
    "tv": "#0072B2", "prior": "#D55E00",
}  # fmt: skip
Solve = Callable[[Measurement], Tensor]


@dataclass(frozen=True)
class CTScan:
    """A parallel-beam scan with 1e5 photons.

    Attributes:
        views: evenly over 180 degrees.
    """

    views: int

    @property
    def label(self) -> str:
        """In words."""
        return f"{self.views} views"

    def measure(self, pair: NDArray[np.float32], pixel: float, matrix: int, number: int) -> Pair:
        """A slice without and with its edits, both with the same noise."""
        coarse = pixel * pair.shape[-1] / matrix
        geometry = ParallelBeam.sparse(self.views, (matrix, matrix), coarse)
        scan = simulate_ct(
            pair, pixel, geometry, matrix=matrix, seed=number, positions=[number, number]
        )
        water = float(scan.measurement.mu_water or 0.0)
        return Pair(scan, coarse, lambda x: mu_to_hu(x, water))

    def solvers(self) -> dict[str, Solve]:
        """Classical reconstructions."""
        return {"fbp": fbp, "tv": lambda m: tv(m).x}


@dataclass(frozen=True)
class MRScan:
    """Cartesian MRI; of several coils the object has a phase, which nobody knows.

    What lies beyond the coils' maps, where nothing was measured, is not looked at.

    Attributes:
        acceleration: k-space size over samples.
        coils: receive coils.
    """

    acceleration: float
    coils: int = 1

    @property
    def label(self) -> str:
        """In words."""
        return f"{self.acceleration:g}x, {self.coils} coil{'s' * (self.coils > 1)}"

    def measure(self, pair: NDArray[np.float32], pixel: float, matrix: int, number: int) -> Pair:
        """A slice without and with its edits, both with the same noise and phase.

        Raises:
            InputError: a matrix other than the slice's.
        """
        if matrix != pair.shape[-1]:
            raise InputError(
                f"MR slices are measured on their own grid of {pair.shape[-1]}, got {matrix}"
            )
        scan = simulate_mri(
            pair,
            (pixel, pixel),
            acceleration=self.acceleration,
            centre_fraction=min(0.32 / self.acceleration, 0.08),
            coils=self.coils,
            phase=1.0 if self.coils > 1 else 0.0,
            noise=0.005,
            seed=number,
            positions=[number, number],
        )
        operator = scan.measurement.operator
        seen = operator.support if isinstance(operator, Sense) else torch.ones(())
        return Pair(scan, pixel, lambda x: x.abs() * seen)

    def solvers(self) -> dict[str, Solve]:
        """Classical reconstructions; least squares of one coil is the zero-filled image."""
        linear: dict[str, Solve] = (
            {"zero-filled": zero_filled} if self.coils == 1 else {"cg-sense": cg_sense}
        )
        return {**linear, "l1-wavelet": phased(l1_wavelet), "tv": phased(lambda m: tv(m).x)}


Scan = CTScan | MRScan


@dataclass(frozen=True)
class Pair:
    """The simulated scan of a slice without and with its edits.

    Attributes:
        scan: of both.
        pixel_mm: of the reconstruction, mm.
        display: from the operator's unit to HU or signal.
    """

    scan: Simulation
    pixel_mm: float
    display: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Subject:
    """What is looked at, and its words.

    Attributes:
        kind: of lesions.
        unit: of contrasts.
        digits: of contrasts, behind the point.
        patch: standard deviation from which a patch has structure that can be false.
        removed: what is taken out.
        scans: how it was measured.
    """

    kind: Kind
    unit: str
    digits: int
    patch: float
    removed: str
    scans: str


SUBJECTS: dict[str, Subject] = {
    "CT": Subject(
        CHEST, "HU", 0, 20.0, "a vessel's section or nodule", "parallel beam, 1e5 photons"
    ),
    "MR": Subject(
        BRAIN, "signal", 2, 0.03, "what white matter encloses",
        "Cartesian, noise 0.005 of the signal. The object of one coil is real, and its k-space is "
        "the FFT on the reconstruction's own grid; that of several coils has a smooth phase and "
        "is seen through Biot-Savart fields on twice the grid, the maps calibrated from the data; "
        "beyond the maps nothing is compared",
    ),
}  # fmt: skip
"""By modality."""


@dataclass(frozen=True)
class Plan:
    """How much is done.

    Attributes:
        phantoms: phantom slices, one a body.
        real: real slices, evenly over the patients.
        steps: network calls of the prior.
        views: of scans by CT.
        accelerations: of those by MRI.
        coils: of those by MRI.
        matrix: rows and columns of the reconstruction.
    """

    phantoms: int
    real: int
    steps: int
    views: tuple[int, ...] = (23, 60)
    accelerations: tuple[float, ...] = (4.0, 8.0)
    coils: tuple[int, ...] = (1,)
    matrix: int = 256

    def scans(self, modality: str) -> tuple[Scan, ...]:
        """Those of a modality."""
        if modality == "CT":
            return tuple(map(CTScan, self.views))
        return tuple(MRScan(a, c) for c in self.coils for a in self.accelerations)


QUICK = Plan(phantoms=3, real=3, steps=8)
FULL = Plan(phantoms=24, real=48, steps=20, views=(23, 60, 180), coils=(1, 8))


@dataclass(frozen=True)
class Slice:
    """A slice to edit.

    Attributes:
        name: where it is from, without what may tell a patient.
        image: HU, or signal relative to the patient's 99.5th percentile, ``(n, n)``.
        pixel_mm: mm.
    """

    name: str
    image: NDArray[np.float32]
    pixel_mm: float


def phantom_slices(modality: str, count: int) -> Iterator[Slice]:
    """Sections of random chests, or of heads without their skull; with lesions of their own."""
    for seed in PHANTOM_SEEDS[:count]:
        if modality == "CT":
            height = float(np.random.default_rng(seed).uniform(-50, 50))
            hu = thorax(seed).slice(height).image((512, 512), 0.8, 2) + AIR_HU
            yield Slice(f"phantom {seed}", np.maximum(hu, AIR_HU).astype(np.float32), 0.8)
        else:
            images, pixel = brains(1, seed, MR_MATRIX)
            yield Slice(f"phantom {seed}", images[0], pixel)


def real_slices(
    path: Path,
    modality: str,
    count: int,
    select: Mapping[str, Sequence[str]],
) -> Iterator[Slice]:
    """Slices of the patients at ``path`` in turn, evenly spread over each patient's."""
    images = load_images(path, "CT" if modality == "CT" else "MR", select=select)
    places: dict[str, list[int]] = {}
    for i, patient in enumerate(images.patient):
        places.setdefault(patient, []).append(i)
    names = sorted(places)
    each = math.ceil(count / len(names))
    order: list[tuple[int, int]] = []
    for name in names:
        n = len(places[name])
        spread = np.linspace(0, n - 1, min(each, n) + 2)[1:-1] if n > 2 else np.arange(n)
        order += [(k, places[name][round(float(j))]) for k, j in enumerate(spread[:each])]
    for _, i in sorted(order, key=lambda pair: pair[0])[:count]:
        image = images.images[i]
        if image.shape[0] == image.shape[1]:
            digest = hashlib.sha256(image.tobytes()).hexdigest()[:8]
            yield Slice(f"real {i} {digest}", image, float(images.pixel_mm[i]))


def tasks(
    plan: Plan, prior: NetworkPrior, slices: Iterable[Slice]
) -> Iterator[tuple[int, Slice, Scan, str, Callable[[], list[Row]]]]:
    """What there is to compute: number of the slice, slice, scan, method, and rows; see `_row`."""

    def by_prior(measurement: Measurement) -> Tensor:
        return reconstruct(measurement, prior, steps=plan.steps, batch=2).mean

    subject = SUBJECTS[prior.card.modality]
    for number, one in enumerate(slices):
        for scan in plan.scans(prior.card.modality):

            @lru_cache(1)
            def made(one: Slice = one, number: int = number, scan: Scan = scan) -> _Made:
                return _make(one, number, scan, plan.matrix, subject)

            for method, solve in {**scan.solvers(), "prior": by_prior}.items():
                yield number, one, scan, method, partial(_rows, made, solve)


@dataclass(frozen=True)
class _Made:
    """A slice with edits, measured.

    Attributes:
        pair: measured.
        edits: the differences.
        ratio: of the reconstruction's grid to the slice's.
        patch: see :class:`Subject`.
    """

    pair: Pair
    edits: Sequence[Edit]
    ratio: float
    patch: float


def _make(one: Slice, number: int, scan: Scan, matrix: int, subject: Subject) -> _Made:
    rng = np.random.default_rng([number, 7])
    planted = plant(one.image, one.pixel_mm, rng, subject.kind, number=number)
    pair = np.stack([planted.first, planted.second])
    measured = scan.measure(pair, one.pixel_mm, matrix, number)
    return _Made(measured, planted.edits, matrix / len(one.image), subject.patch)


def _rows(made: Callable[[], _Made], solve: Solve) -> list[Row]:
    """Rows of one slice, scan and method, one an edit."""
    m = made()
    truth = m.pair.display(m.pair.scan.truth).double()
    found = m.pair.display(solve(m.pair.scan.measurement)).double().cpu()
    rate = sfrc(found[0], truth[0], least=m.patch).rate
    return [
        {**_row(edit, truth, found, m.ratio, m.pair.pixel_mm), "sfrc": rate} for edit in m.edits
    ]


def _row(edit: Edit, truth: Tensor, found: Tensor, ratio: float, pixel: float) -> dict[str, Any]:
    """One edit in one reconstruction.

    ``share`` is the recovered share of its contrast; ``false`` the contrast that is seen at its
    place in the object without it, as a share, less what is there in truth; ``with`` and
    ``without`` are the channels' outputs.
    """
    # pixel j of the fine grid is centred at (j + 1/2) ratio - 1/2 of the coarse one
    row, column = ((v + 0.5) * ratio - 0.5 for v in (edit.row, edit.column))
    half = math.ceil(HALF_MM / pixel)
    r, c = (min(max(round(v), half), truth.shape[-1] - 1 - half) for v in (row, column))
    window = (slice(r - half, r + half + 1), slice(c - half, c + half + 1))
    t, f = truth[:, window[0], window[1]], found[:, window[0], window[1]]
    sign = 1 if edit.direction == "insertion" else -1
    centre = (row - r + half, column - c + half)
    s = _near(sign * (t[1] - t[0]), *centre, (edit.diameter / 2 + BLUR_MM) / pixel)
    present, absent = (1, 0) if sign > 0 else (0, 1)
    power = float(s.square().sum())
    channels = laguerre_gauss(
        (t.shape[1], t.shape[2]),
        max(edit.diameter / pixel, 2.0),
        CHANNELS,
        centre,
    )
    outputs = torch.einsum("chw,nhw->nc", channels, f)
    return {
        **asdict(edit),
        "share": float((s * (f[present] - f[absent])).sum()) / power,
        "false": float((s * (f[absent] - t[absent])).sum()) / power,
        "with": outputs[present].tolist(),
        "without": outputs[absent].tolist(),
    }


def _near(difference: Tensor, row: float, column: float, reach: float) -> Tensor:
    """The difference within ``reach`` pixels of a place, so that no other edit counts."""
    y = torch.arange(difference.shape[0], dtype=torch.float64) - row
    x = torch.arange(difference.shape[1], dtype=torch.float64) - column
    return torch.where(torch.hypot(y[:, None], x[None, :]) <= reach, difference, 0.0)


def _size(row: Mapping[str, Any], kind: Kind) -> float:
    """Diameter class of a row: that of planted balls, or the nearest one."""
    return min(kind.diameters, key=lambda d: abs(d - float(row["diameter"])))


@dataclass(frozen=True)
class Point:
    """One point of a curve.

    Attributes:
        scan: how it was measured.
        method: which reconstruction.
        direction: insertion or removal.
        tissue: of the lesion.
        diameter: class, mm.
        contrast: of planted balls, HU or signal; of removed structures their mean.
        share: recovered contrast, mean over lesions.
        error: its standard error.
        false: contrast seen at the place in the object without it, root mean square share.
        count: lesions.
    """

    scan: str
    method: str
    direction: str
    tissue: str
    diameter: float
    contrast: float
    share: float
    error: float
    false: float
    count: int


def points(rows: Sequence[Mapping[str, Any]], kind: Kind) -> list[Point]:
    """Curves of contrast recovery: means over the lesions of each kind."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        inserted = row["direction"] == "insertion"
        key = (row["scan"], row["method"], row["direction"], row["tissue"], _size(row, kind))
        groups.setdefault((*key, row["contrast"] if inserted else None), []).append(row)
    found = []
    for (scan, method, direction, tissue, diameter, _), members in groups.items():
        shares = torch.tensor([m["share"] for m in members], dtype=torch.float64)
        if len(shares) < 2:
            continue
        # a lesion of one unit turns shares into the pairs that the estimate is of
        one = torch.ones(1, dtype=torch.float64)
        value, error = contrast_recovery(shares[:, None], torch.zeros_like(shares)[:, None], one)
        false = math.sqrt(float(np.mean([m["false"] ** 2 for m in members])))
        contrast = float(np.mean([m["contrast"] for m in members]))
        found.append(
            Point(scan, method, direction, tissue, diameter, contrast, value, error, false,
                  len(members))
        )  # fmt: skip
    scans = without_repeats(r["scan"] for r in rows)
    tissues: list[str] = list(kind.contrasts)
    return sorted(
        found,
        key=lambda p: (scans.index(p.scan), tissues.index(p.tissue), p.direction, p.diameter,
                       abs(p.contrast)),
    )  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """Detection of lesions of one kind.

    Attributes:
        scan: how it was measured.
        method: which reconstruction.
        tissue: around the lesion.
        diameter: mm.
        contrast: HU or signal, or ``None`` for all contrasts together.
        detection: of the test images; ``None`` where there were too few.
        count: lesions.
    """

    scan: str
    method: str
    tissue: str
    diameter: float
    contrast: float | None
    detection: Detection | None
    count: int


def seen(rows: Sequence[Mapping[str, Any]], kind: Kind) -> list[Seen]:
    """Channelised Hotelling observer on inserted lesions; slices of training and test differ."""
    inserted = [r for r in rows if r["direction"] == "insertion"]
    found = []
    for scan in without_repeats(r["scan"] for r in inserted):
        for method in COLOURS:
            for tissue, contrasts in kind.contrasts.items():
                for diameter in kind.diameters:
                    alike = [
                        r for r in inserted
                        if (r["scan"], r["method"], r["tissue"], r["diameter"])
                        == (scan, method, tissue, diameter)
                    ]  # fmt: skip
                    for contrast in (None, *contrasts):
                        part = [r for r in alike if contrast in (None, r["contrast"])]
                        if part:
                            detection = _observe(part)
                            found.append(
                                Seen(scan, method, tissue, diameter, contrast, detection,
                                     len(part))
                            )  # fmt: skip
    return found


def _observe(rows: Sequence[Mapping[str, Any]]) -> Detection | None:
    """Train on every second slice, test on the others, with as many channels as these bear."""
    order = sorted(rows, key=lambda r: (r["slice"] % 2, r["slice"]))
    train = sum(1 for r in order if r["slice"] % 2 == 0)
    channels = min(CHANNELS, 2 * train // IMAGES_PER_CHANNEL)
    if channels < 1 or len(order) - train < 2:
        return None
    present, absent = (
        torch.tensor([r[key][:channels] for r in order], dtype=torch.float64)[:, None]
        for key in ("with", "without")
    )
    eye = torch.eye(channels, dtype=torch.float64)[:, None]
    return hotelling(present, absent, eye, train=train)


INTRODUCTION = """# Planted lesions

Written by `python -m phantoms.benchmarks.lesions`, a section a prior; what it means is in
[when not to believe it](when-not-to-believe-it.md).

Each slice carries several lesions at least 28 mm apart, and is measured with and without them
before anything is reconstructed.

**Recovered contrast**: share of the lesion's contrast that arrives, mean ± standard error: 1 is
all, 0 none. In brackets the lesion-shaped error of the image without it, root mean square, as a
share: what is recovered below it cannot be told from chance in one image.

**Detection**: area under the ROC curve of a channelised Hotelling observer, trained on some slices
and tested on others, with its 95 % interval; 0.5 is guessing. All contrasts of a size together,
and each where there are images enough.

**False structure**: share of patches of 32 pixels whose structure, down to a quarter of Nyquist's
frequency, is not the truth's (scanning Fourier ring correlation), mean over slices.
"""


def markdown(state: Mapping[str, Any], picture: str) -> str:
    """The section of a prior: how it was measured, the figure and the tables."""
    rows, about = state["rows"], state["about"]
    subject = SUBJECTS[about["modality"]]
    slices = f"{about['phantoms']} phantom and {about['real']} real slices"
    source = f" ({about['source']})" if about["real"] else ""
    count = len({(r["slice"], r["row"], r["column"]) for r in rows})
    return (
        f"## `{about['prior']}`\n\n"
        f"recon-sde {about['version']}, prior sha256 {about['sha256'][:12]}, {about['steps']} "
        f"network calls; {slices}{source}, {count} lesions; {subject.scans}.\n\n"
        f"![Recovered contrast of planted lesions, and how well they are seen]({picture})\n\n"
        + tables(rows, subject)
    )


def tables(rows: Sequence[Mapping[str, Any]], subject: Subject) -> str:
    """Recovered contrast, detection and false structure in Markdown."""
    made = points(rows, subject.kind)
    present = {r["method"] for r in rows}
    methods = [m for m in COLOURS if m in present]
    lines = ["### Recovered contrast", ""]
    for direction, words in (
        ("insertion", "put in"), ("removal", f"taken out: {subject.removed}")
    ):  # fmt: skip
        lines += [
            f"| scan | {direction}: {words} | mm | {subject.unit} | n | "
            + " | ".join(methods) + " |",
            "|---|---|--:|--:|--:|" + "--:|" * len(methods),
        ]  # fmt: skip
        cells: dict[tuple[Any, ...], dict[str, Point]] = {}
        for p in made:
            if p.direction == direction:
                contrast = round(p.contrast, subject.digits)
                cells.setdefault((p.scan, p.tissue, p.diameter, contrast), {})[p.method] = p
        for (scan, tissue, diameter, contrast), found in cells.items():
            size = f"{diameter:g}" if direction == "insertion" else f"about {diameter:g}"
            count = max(p.count for p in found.values())
            lines.append(
                f"| {scan} | {tissue} | {size} | {contrast:g} | {count} | "
                + " | ".join(_share(found.get(m)) for m in methods) + " |"
            )  # fmt: skip
        lines.append("")
    lines += [
        "### Detection",
        "",
        f"| scan | tissue | mm | {subject.unit} | n | " + " | ".join(methods) + " |",
        "|---|---|--:|--:|--:|" + "--:|" * len(methods),
    ]
    table: dict[tuple[Any, ...], dict[str, Seen]] = {}
    for s in seen(rows, subject.kind):
        if s.detection is not None:
            table.setdefault((s.scan, s.tissue, s.diameter, s.contrast), {})[s.method] = s
    for (scan, tissue, diameter, contrast), areas in table.items():
        shown = "all" if contrast is None else f"{contrast:g}"
        lines.append(
            f"| {scan} | {tissue} | {diameter:g} | {shown} | "
            f"{max(s.count for s in areas.values())} | "
            + " | ".join(_area(areas.get(m)) for m in methods)
            + " |"
        )
    lines += [
        "",
        "### False structure",
        "",
        "| scan | " + " | ".join(methods) + " |",
        "|---|" + "--:|" * len(methods),
    ]
    for scan in without_repeats(r["scan"] for r in rows):
        # all rows of a slice carry its rate
        rates = [
            {r["slice"]: r["sfrc"] for r in rows if (r["scan"], r["method"]) == (scan, m)}
            for m in methods
        ]
        shares = [f"{100 * np.mean(list(r.values())):.0f} %" if r else "–" for r in rates]
        lines.append(f"| {scan} | " + " | ".join(shares) + " |")
    return "\n".join(lines) + "\n"


def _share(point: Point | None) -> str:
    return "–" if point is None else f"{point.share:.2f} ± {point.error:.2f} ({point.false:.2f})"


def _area(found: Seen | None) -> str:
    if found is None or found.detection is None:
        return "–"
    d = found.detection
    return f"{d.auc:.2f} [{d.low:.2f}, {d.high:.2f}]"


def draw(rows: Sequence[Mapping[str, Any]], subject: Subject, path: Path) -> None:
    """Curves of recovery over contrast by tissue and scan; detection below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kind = subject.kind
    made, detected = points(rows, kind), seen(rows, kind)
    scans = without_repeats(r["scan"] for r in rows)
    figure, axes = plt.subplots(
        len(kind.contrasts) + 1, len(scans), figsize=(4.2 * len(scans), 9.6), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for column, scan in enumerate(scans):
        present = {r["method"] for r in rows if r["scan"] == scan}
        colours = {m: c for m, c in COLOURS.items() if m in present}
        for axis, (tissue, contrasts) in zip(
            axes[:-1, column], kind.contrasts.items(), strict=True
        ):
            here = [p for p in made if (p.scan, p.tissue) == (scan, tissue)]
            _draw_curves(axis, here, contrasts, kind.diameters, colours)
            axis.set_title(f"{tissue}, {scan}", fontsize=10)
            axis.set_xlabel(f"contrast of the lesion, {subject.unit}")
        _draw_areas(axes[-1, column], [s for s in detected if s.scan == scan], kind, colours)
        axes[-1, column].set_title(f"seen by an observer, {scan}", fontsize=10)
    for axis in axes[:-1, 0]:
        axis.set_ylabel("recovered share of contrast")
    axes[-1, 0].set_ylabel("area under the ROC curve")
    figure.suptitle(
        "Lesions planted before measurement (bars: 2 standard errors; open: structures taken out)",
        fontsize=10,
    )
    entries = {
        label: handle
        for axis in axes[:-1].flat
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        entries.values(), entries, fontsize=8, ncols=max(3, len(kind.diameters) * len(scans)),
        loc="outside lower center",
    )  # fmt: skip
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_curves(
    axis: Any,
    here: Sequence[Point],
    contrasts: Sequence[float],
    diameters: Sequence[float],
    colours: Mapping[str, str],
) -> None:
    """Insertions as curves, removals as open marks; methods a little apart, to be told apart."""
    for level in (0.0, 1.0):
        axis.axhline(level, color="0.6", linewidth=0.8)
    middle = (len(colours) - 1) / 2
    for k, (method, colour) in enumerate(colours.items()):
        # the largest two sizes look the same whatever the number of sizes
        for diameter, mark, style in zip(diameters[::-1], "so^", ("-", "--", ":"), strict=False):
            for direction in ("insertion", "removal"):
                line = [p for p in here if (p.method, p.diameter, p.direction)
                        == (method, diameter, direction)]  # fmt: skip
                put = direction == "insertion"
                if line:
                    axis.errorbar(
                        [abs(p.contrast) * 1.04 ** (k - middle) for p in line],
                        [p.share for p in line], [2 * p.error for p in line], color=colour,
                        marker=mark, markersize=5, linestyle=style if put else "", capsize=2,
                        zorder=2 + k, markerfacecolor=colour if put else "white",
                        label=f"{method}, {diameter:g} mm" if put else None,
                    )  # fmt: skip
    axis.set_xscale("log")
    axis.minorticks_off()
    sizes = [abs(c) for c in contrasts]
    axis.set_xticks(sizes, [f"{c:g}" for c in contrasts])
    axis.set_xlim(0.8 * min(sizes), 1.25 * max(sizes))
    axis.set_ylim(-0.4, 1.6)


def _draw_areas(
    axis: Any, detected: Sequence[Seen], kind: Kind, colours: Mapping[str, str]
) -> None:
    """Areas with their intervals, by tissue and size."""
    places: list[tuple[str, float]] = [(t, d) for t in kind.contrasts for d in kind.diameters]
    axis.axhline(0.5, color="0.6", linewidth=0.8)
    for k, (method, colour) in enumerate(colours.items()):
        for s in detected:
            if s.method == method and s.contrast is None and s.detection is not None:
                x = places.index((s.tissue, s.diameter))
                d = s.detection
                axis.errorbar(
                    [x + 0.18 * (k - (len(colours) - 1) / 2)], [d.auc],
                    [[d.auc - d.low], [d.high - d.auc]], color=colour, marker="o",
                    capsize=3, markersize=5,
                )  # fmt: skip
    axis.set_xticks(range(len(places)), [f"{t}\n{d:g} mm" for t, d in places], fontsize=8)
    axis.set_xlim(-0.5, len(places) - 0.5)
    axis.set_ylim(0.3, 1.02)


def main() -> None:
    """Run what is missing; JSON in ``--out``, the prior's section and figure in ``--docs``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a few slices (the default)")
    size.add_argument("--full", action="store_true", help="every size, hours on a CPU")
    parser.add_argument("--prior", default="ct-small", help="which says whether CT or MR")
    parser.add_argument("--data", type=Path,
                        help="real slices nobody trained on: npz or DICOM")  # fmt: skip
    parser.add_argument("--select", action="append", default=[], metavar="COLUMN=A,B",
                        help="rows of the npz's table")  # fmt: skip
    parser.add_argument("--steps", type=int, help="network calls of the prior")
    parser.add_argument("--phantoms", type=int, help="phantom slices")
    parser.add_argument("--real", type=int, help="real slices")
    parser.add_argument("--views", type=int, nargs="+", help="of CT")
    parser.add_argument("--accelerations", type=float, nargs="+", help="of MRI")
    parser.add_argument("--coils", type=int, nargs="+", help="of MRI")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("lesions.json"),
                        help="JSON file, continued if it exists")  # fmt: skip
    parser.add_argument("--docs", type=Path, help="folder of the page; default beside --out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    select = {k: v.split(",") for k, _, v in (pair.partition("=") for pair in arguments.select)}
    if arguments.select and not all(select):
        parser.error("--select needs COLUMN=VALUE,VALUE")
    prior = load_prior(arguments.prior)
    base = FULL if arguments.full else QUICK
    plan = Plan(
        phantoms=base.phantoms if arguments.phantoms is None else arguments.phantoms,
        real=(base.real if arguments.real is None else arguments.real) if arguments.data else 0,
        steps=arguments.steps or base.steps,
        views=tuple(arguments.views or base.views),
        accelerations=tuple(arguments.accelerations or base.accelerations),
        coils=tuple(arguments.coils or base.coils),
    )
    state = run_all(plan, prior, arguments.data, select, arguments.out)
    folder = arguments.docs or arguments.out.parent
    pictures = folder / "images" if arguments.docs else folder
    pictures.mkdir(parents=True, exist_ok=True)
    name = arguments.out.stem
    picture = pictures / f"{name}-{prior.card.name}.png"
    draw(state["rows"], SUBJECTS[prior.card.modality], picture)
    page = folder / f"{name}.md"
    text = markdown(state, str(picture.relative_to(folder)))
    page.write_text(with_section(page, INTRODUCTION, text))
    print(f"{page}\n{picture}")


def all_slices(
    plan: Plan,
    modality: str,
    data: Path | None,
    select: Mapping[str, Sequence[str]],
) -> list[Slice]:
    """Those of the plan: phantoms first, then real ones."""
    slices = list(phantom_slices(modality, plan.phantoms))
    if data is not None:
        slices += real_slices(data, modality, plan.real, select)
    return slices


def run_all(
    plan: Plan,
    prior: NetworkPrior,
    data: Path | None,
    select: Mapping[str, Sequence[str]],
    out: Path,
) -> dict[str, Any]:
    """All of the plan that ``out`` does not hold yet; written after each reconstruction.

    Raises:
        InputError: a file that is not one of this benchmark's.
    """
    try:
        state: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"done": {}}
        done: dict[str, Any] = state["done"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"'{out.name}' is not of this benchmark; give another --out") from None
    slices = all_slices(plan, prior.card.modality, data, select)
    rows: list[dict[str, Any]] = []
    for number, one, scan, method, make in tasks(plan, prior, slices):
        by = method if method != "prior" else f"{prior.card.sha256[:12]}, {plan.steps} calls"
        key = f"{one.name} #{number}, {scan.label}, {by}"
        if key not in done:
            started = time.monotonic()
            done[key] = make()
            _write(out, {"done": done})
            print(f"{key}: {time.monotonic() - started:.1f} s", flush=True)
        rows += [{**r, "slice": number, "scan": scan.label, "method": method} for r in done[key]]
    patients = "; ".join(f"{k} {', '.join(v)}" for k, v in select.items())
    about = {
        "version": __version__,
        "prior": prior.card.name,
        "modality": prior.card.modality,
        "sha256": prior.card.sha256,
        "steps": plan.steps,
        "phantoms": plan.phantoms,
        "real": len(slices) - plan.phantoms,
        "source": "" if data is None else data.name + (f", {patients}" if patients else ""),
    }
    return {"about": about, "rows": rows}


def _write(path: Path, state: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(state) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    main()
