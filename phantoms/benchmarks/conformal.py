"""Calibrate a prior on held-out patients: ``python -m phantoms.benchmarks.conformal --write``.

One slice of each patient whom the prior has not seen is measured and reconstructed in a few
settings.  From these come, for each setting,

* the factor of ``mean ± factor spread`` that misses at most a tenth of the body's pixels, on
  average over patients (conformal risk control; with probability 90 % too, where there are
  patients enough), and its risk on patients outside the fit: each against a fit on all others,
  and over 200 random splits;
* the references of the out-of-distribution test, and its power: which other anatomy, which
  objects and which mistakes of units, pixel size and orientation it tells from the patients.

``--write`` puts both into the prior's card, beside the weights, which stay as they are.  Finished
reconstructions are kept beside ``--out``, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inverse import __version__
from inverse.errors import CheckpointError, InputError, NoInputError
from inverse.metrics import body_mask
from inverse.operators.ct import ParallelBeam
from inverse.operators.units import MU_WATER, mu_to_hu
from inverse.priors import NetworkPrior, load_prior, update_card
from inverse.reconstruct import reconstruct
from inverse.training.data import load_images
from inverse.trust import (
    CardCalibration,
    Conformal,
    Rank,
    Reference,
    Setting,
    auc,
    crc,
    interval,
    rcps,
    risk,
    shown,
    statistics,
)
from inverse.trust.ood import LEVELS, TURNS
from inverse.trust.verdict import likeness
from phantoms.anatomy import AIR_HU, abdomen, head, thorax
from phantoms.beam import implants
from phantoms.benchmarks.harness import half_width
from phantoms.benchmarks.page import with_section
from phantoms.published import acr_ct, forbild_head
from phantoms.scene import Section
from phantoms.simulate import Simulation, simulate_ct, simulate_mri

TITANIUM_HU = 8000
ALPHA = 0.1
DELTA = 0.1
SPLITS = 200
MATRIX = 256
NOISE = 0.01
"""Of MRI, relative to the brightest signal: what ``recon study mri`` simulates by default."""
CENTRE = 0.08
"""Fully sampled share of k-space, likewise."""
PHASE = 1.0
"""Greatest phase of the images in radians, as measured ones have some that must be estimated."""
WHOLE = 0.5
"""Least area of a brain's slice, relative to the patient's largest."""


@dataclass(frozen=True)
class Subject:
    """One slice.

    Attributes:
        name: where it is from, without what may tell a patient.
        group: ``"patients"``, of whom the fit is made, or another set, which is only looked at.
        image: HU, or signal relative to the patient's 99.5th percentile.
        pixel_mm: mm.
        foreign: unlike the patients, and there for the test of likeness alone: one sample.
        of: number of the patient whom it is made of, who is left out of its references.
    """

    name: str
    group: str
    image: NDArray[np.float32]
    pixel_mm: float
    foreign: bool = False
    of: int | None = None


@dataclass(frozen=True)
class Found:
    """What one slice shows in one setting.

    Attributes:
        truth: ``(h, w)``, physical units; the magnitude of complex images.
        mean: of the samples.
        spread: of the samples, see :func:`inverse.trust.shown`.
        body: where the promise holds.
        values: statistics of the out-of-distribution test of the mean of all samples, and of the
            first, ``(2, statistics)``.
        settings: of all samples, and of one.
    """

    truth: Tensor
    mean: Tensor
    spread: Tensor
    body: Tensor
    values: Tensor
    settings: tuple[Setting, Setting]


def patients(
    path: Path, modality: Literal["CT", "MR"], select: Mapping[str, Sequence[str]], most: int
) -> list[Subject]:
    """One slice of each patient at ``path``, chosen at random, so that they are independent.

    Of brains those are left out whose area is below :data:`WHOLE` of the patient's largest.
    """
    images = load_images(path, modality, select=select)
    found = []
    for k, patient in enumerate(images.patients[:most]):
        members = list(images.members[patient])
        if modality == "MR":
            areas = [float((images.images[i] > 0.1).mean()) for i in members]
            least = WHOLE * max(areas)
            members = [i for i, area in zip(members, areas, strict=True) if area >= least]
        i = members[int(np.random.default_rng([k, 3]).integers(len(members)))]
        found.append(
            Subject(f"slice {i}", "patients", images.images[i], float(images.pixel_mm[i]))
        )
    return found


def others(count: int) -> list[Subject]:
    """Phantoms: chests, whose like the prior saw, and heads, which it did not."""
    made = []
    for seed in range(60_000, 60_000 + count):
        for group, body in (("chest phantoms", thorax(seed)), ("head phantoms", head(seed))):
            made.append(Subject(f"seed {seed}", group, _section(body.slice(5.0)), 0.75))
    return made


def _section(scene: Section) -> NDArray[np.float32]:
    """HU of a section, pixels of 0.75 mm, finer than the reconstruction's."""
    hu = scene.image((2 * MATRIX, 2 * MATRIX), 0.75, 2) + AIR_HU
    return np.maximum(hu, AIR_HU).astype(np.float32)


Change = Callable[[NDArray[np.float32], float], tuple[NDArray[np.float32], float]]


def _with_metal(hu: NDArray[np.float32], pixel: float) -> tuple[NDArray[np.float32], float]:
    """Two titanium rods of 1 cm, which the prior's range of values does not hold."""
    return np.where(implants(hu[None], pixel)[0], np.float32(TITANIUM_HU), hu), pixel


MISTAKES: Mapping[str, Change] = {
    "left and right exchanged": lambda x, pixel: (x[:, ::-1], pixel),
    "upside down": lambda x, pixel: (x[::-1], pixel),
    "turned by 90 degrees": lambda x, pixel: (np.rot90(x), pixel),
    "pixel size times 0.6": lambda x, pixel: (x, 0.6 * pixel),
    "pixel size times 1.5": lambda x, pixel: (x, 1.5 * pixel),
}
"""What is made of a patient's slice and its pixel size, mm."""
MISTAKES_OF_CT: Mapping[str, Change] = {
    "HU of slope 1.2": lambda x, pixel: (1.2 * (x - AIR_HU) + AIR_HU, pixel),
    "HU plus 100": lambda x, pixel: (x + 100, pixel),
    "metal": _with_metal,
}


def foreign(
    ours: Sequence[Subject],
    modality: Literal["CT", "MR"],
    count: int,
    elsewhere: Mapping[str, Path],
) -> list[Subject]:
    """What the prior did not see: mistakes made with patients' slices, other bodies, noise.

    Args:
        ours: the patients.
        modality: theirs.
        count: slices of each group, about.
        elsewhere: more images by name of group; MR images count as HU in CT, from air to 1000 HU.
    """
    chosen = sorted({round(i) for i in np.linspace(0, len(ours) - 1, count)})
    mistakes = {**MISTAKES, **(MISTAKES_OF_CT if modality == "CT" else {})}
    made = []
    for group, change in mistakes.items():
        for i in chosen:
            image, pixel = change(ours[i].image, ours[i].pixel_mm)
            image = np.ascontiguousarray(image, dtype=np.float32)
            made.append(Subject(ours[i].name, group, image, pixel, True, i))
    for group, path in elsewhere.items():
        made += [replace(s, group=group, foreign=True) for s in _elsewhere(path, modality, count)]
    if modality != "CT":
        return made
    bodies: list[tuple[str, str, Section]] = [
        ("abdomen phantoms", f"seed {k}", abdomen(k).slice(5.0)) for k in range(count)
    ]
    objects = {"ACR 1": acr_ct(1), "ACR 2": acr_ct(2), "ACR 4": acr_ct(4),
               "FORBILD head": forbild_head()}  # fmt: skip
    bodies += [("test objects", name, body) for name, body in list(objects.items())[:count]]
    made += [Subject(name, group, _section(body), 0.75, True) for group, name, body in bodies]
    for k in range(count):
        noise = np.random.default_rng([k, 7]).normal(-500, 300, (MATRIX, MATRIX))
        image = np.maximum(noise, AIR_HU).astype(np.float32)
        made.append(Subject(f"seed {k}", "white noise", image, ours[0].pixel_mm, True))
    return made


def _elsewhere(path: Path, modality: Literal["CT", "MR"], count: int) -> list[Subject]:
    """A slice of each of some patients in a file of CT, or of MR as if it were CT."""
    try:
        return patients(path, modality, {}, count)
    except NoInputError:
        if modality == "MR":
            raise
    found = patients(path, "MR", {}, count)
    return [replace(s, image=AIR_HU + (1000 - AIR_HU) * s.image) for s in found]


def scan(subject: Subject, modality: str, amount: float, number: int) -> Simulation:
    """The measurement of a slice: views of CT, or acceleration of MRI."""
    image = subject.image[None]
    if modality == "CT":
        pixel = subject.pixel_mm * max(image.shape[1:]) / MATRIX
        geometry = ParallelBeam.sparse(int(amount), (MATRIX, MATRIX), pixel)
        return simulate_ct(
            image, subject.pixel_mm, geometry, matrix=MATRIX, seed=1, positions=[number]
        )
    return simulate_mri(
        image,
        (subject.pixel_mm, subject.pixel_mm),
        acceleration=amount,
        centre_fraction=CENTRE,
        phase=PHASE,
        noise=NOISE,
        seed=number,  # of the pattern too, as patients differ in it
        positions=[number],
    )


def measure(
    subject: Subject,
    number: int,
    prior: NetworkPrior,
    amount: float,
    *,
    method: str,
    steps: int | None,
    samples: int,
) -> Found:
    """Measure and reconstruct one slice."""
    made = scan(subject, prior.card.modality, amount, number)
    measurement = made.measurement
    result = reconstruct(measurement, prior, method=method, steps=steps, samples=samples)
    truth = made.truth[0]
    ct = prior.card.modality == "CT"
    hu = mu_to_hu(truth, float(measurement.mu_water or 1.0)) if ct else truth.abs()
    body = body_mask(hu[None].numpy(), -500.0 if ct else 0.1 * float(hu.max()))[0]
    single = result.samples[0, 0].abs() if truth.is_complex() else result.samples[0, 0]
    mean, spread = shown(result.samples[0]) if samples > 1 else (single, torch.zeros_like(single))
    at = prior.at(pixel_mm=measurement.pixel_mm[0])
    offset, scale = float(result.settings["offset"]), float(result.settings["scale"])
    values = [
        statistics(at, measurement, x, offset=offset, scale=scale)[0]
        for x in (result.mean, result.samples[:, 0])[: min(2, samples)]
    ]
    all_of_them = Setting.of(measurement, result.settings)
    return Found(
        truth=truth.abs() if truth.is_complex() else truth,
        mean=mean,
        spread=spread,
        body=torch.from_numpy(body) if body.any() else torch.ones_like(hu, dtype=torch.bool),
        values=torch.stack(values).expand(2, -1).clone(),
        settings=(all_of_them, replace(all_of_them, samples=1)),
    )


def typical(settings: Sequence[Setting]) -> Setting:
    """That of all patients: the median of what depends on the patient, noise and drawn pattern."""
    noise, radius = (
        float(np.median([getattr(s, k) for s in settings])) for k in ("noise", "radius")
    )
    return replace(settings[0], noise=noise, radius=radius)


def fit(found: Sequence[Found], by: Callable[..., Conformal] = crc) -> Conformal | None:
    """Factor of conformal risk control, or of ``rcps``; ``None`` where patients are too few."""
    truth, mean, spread, body = _stacked(found)
    try:
        return by(truth, mean, spread, alpha=ALPHA, mask=body)
    except InputError:
        return None


@dataclass(frozen=True)
class Splits:
    """Risk on patients outside the fit, over random splits.

    Attributes:
        patients: of the fit.
        mean: risk, on average over splits: conformal risk control promises alpha.
        exceeding: share of splits with a risk above alpha on the others.
        guaranteed: share of splits in which the factor of :func:`inverse.trust.rcps` exceeded it;
            ``None`` where the patients of a fit are too few for it.
    """

    patients: int
    mean: float
    exceeding: float
    guaranteed: float | None


@dataclass(frozen=True)
class LeftOut:
    """Risk on each patient of the factor fitted on all others: what the factor of all will do.

    Attributes:
        patients: of each fit, one less than there are.
        mean: risk, on average over patients.
        half: half of its 95 % interval, :func:`inverse.metrics.ci95`.
        worst: risk on the patient of the greatest.
    """

    patients: int
    mean: float
    half: float
    worst: float


def left_out(found: Sequence[Found], alpha: float = ALPHA) -> LeftOut | None:
    """Leave-one-out risk; ``None`` where a fit on one patient less is impossible."""
    truth, mean, spread, body = _stacked(found)
    risks = []
    for i in range(len(found)):
        k = [j for j in range(len(found)) if j != i]
        try:
            fitted = crc(truth[k], mean[k], spread[k], alpha=alpha, mask=body[k])
        except InputError:
            return None
        own = (truth[[i]], mean[[i]], spread[[i]])
        risks.append(risk(*own, fitted.factor, mask=body[[i]]))
    return LeftOut(len(risks) - 1, float(np.mean(risks)), half_width(risks) or 0.0, max(risks))


def splits(found: Sequence[Found], alpha: float = ALPHA, count: int = SPLITS) -> Splits | None:
    """Fit on one half of the patients, or the least that alpha needs; test on the others."""
    fitted = max(len(found) // 2, math.ceil(1 / alpha) - 1)
    if len(found) < fitted + 2:
        return None
    truth, mean, spread, body = _stacked(found)
    risks: list[float] = []
    broken: list[bool] = []
    for k in range(count):
        order = torch.from_numpy(np.random.default_rng([k, 5]).permutation(len(found)))
        one, two = order[:fitted], order[fitted:]

        def of(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return truth[index], mean[index], spread[index]

        factor = crc(*of(one), alpha=alpha, mask=body[one]).factor
        risks.append(risk(*of(two), factor, mask=body[two]))
        try:
            sure = rcps(*of(one), alpha=alpha, delta=DELTA, mask=body[one]).factor
            broken.append(risk(*of(two), sure, mask=body[two]) > alpha)
        except InputError:
            continue
    return Splits(
        fitted,
        float(np.mean(risks)),
        float(np.mean([r > alpha for r in risks])),
        float(np.mean(broken)) if broken else None,
    )


@dataclass(frozen=True)
class Stated:
    """What the standard deviation s of K samples is worth as it stands, in the body.

    Attributes:
        samples: K.
        error: root mean square of truth minus mean, in the unit of the page.
        std: root mean square of s; ``std sqrt(1 + 1/K)`` is what ``error`` would be if the truth
            were one more draw.
        held: share of pixels in the 90 % interval of :func:`inverse.trust.interval`, mean over
            patients.
        half: half of its 95 % interval over patients.
    """

    samples: int
    error: float
    std: float
    held: float
    half: float


def stated(found: Sequence[Found], unit: float = 1.0) -> Stated | None:
    """The spread without calibration; ``None`` of single samples."""
    k = found[0].settings[0].samples
    if k < 2:
        return None
    errors, variances, shares = [], [], []
    for f in found:
        square = f.spread.double().square()
        # the floor of `shown` is the mean square of s, so half of u^2 on average
        s = (square - square.mean() / 2).clamp_min(0).sqrt()
        low, high = interval(f.mean.double(), s, k, 1 - ALPHA)
        shares.append(float(((f.truth > low) & (f.truth < high))[f.body].double().mean()))
        errors.append(float((f.truth - f.mean)[f.body].double().square().mean()))
        variances.append(float(s[f.body].square().mean()))
    error, std = (unit * math.sqrt(float(np.mean(v))) for v in (errors, variances))
    return Stated(k, error, std, float(np.mean(shares)), half_width(shares) or 0.0)


def _stacked(found: Sequence[Found]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Truth, mean, spread and body, cropped to the rows and columns that all share."""
    h = min(f.truth.shape[0] for f in found)
    w = min(f.truth.shape[1] for f in found)
    truth, mean, spread, body = (
        torch.stack([getattr(f, name)[:h, :w] for f in found])
        for name in ("truth", "mean", "spread", "body")
    )
    return truth, mean, spread, body


def _kept(folder: Path, key: Mapping[str, Any], make: Callable[[], Found]) -> Found:
    """A result, computed once."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"{name}.npz"
    if path.exists():
        with np.load(path, allow_pickle=False) as file:
            tensors = {k: torch.from_numpy(file[k]) for k in file.files if k != "settings"}
            settings = json.loads(file["settings"].tobytes())
        one, two = (Setting(**s) for s in settings)
        return Found(**tensors, settings=(one, two))
    started = time.monotonic()
    found = make()
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps([asdict(s) for s in found.settings]).encode()
    arrays = {k: getattr(found, k).numpy() for k in ("truth", "mean", "spread", "body", "values")}
    temporary = path.with_name(f".{path.name}")
    with temporary.open("wb") as stream:
        np.savez(stream, settings=np.frombuffer(text, np.uint8), **arrays)
    temporary.replace(path)
    print(f"{key['subject']}, {key['amount']:g}: {time.monotonic() - started:.1f} s", flush=True)
    return found


def calibrate(
    prior: NetworkPrior,
    subjects: Sequence[Subject],
    source: str,
    amounts: Sequence[float],
    method: str,
    steps: int | None,
    samples: int,
    folder: Path,
) -> tuple[list[CardCalibration], list[dict[str, Any]]]:
    """Entries of the card, and the rows of the page, one a setting."""
    entries, rows = [], []
    for amount in amounts:
        groups: dict[str, list[Found]] = {}
        strange: dict[str, list[tuple[int | None, Found]]] = {}
        for number, subject in enumerate(subjects):
            drawn = 1 if subject.foreign else samples
            key = {
                "statistics": [len(LEVELS), len(TURNS)], "prior": prior.card.sha256,
                "subject": f"{subject.group}, {subject.name}", "number": number,
                "amount": amount, "method": method, "steps": steps, "samples": drawn,
                "pixels": hashlib.sha256(subject.image.tobytes()).hexdigest(),
            }  # fmt: skip

            make = partial(
                measure, subject, number, prior, amount, method=method, steps=steps,
                samples=drawn,
            )  # fmt: skip
            found = _kept(folder, key, make)
            if subject.foreign:
                strange.setdefault(subject.group, []).append((subject.of, found))
            else:
                groups.setdefault(subject.group, []).append(found)
        ours = groups["patients"]
        conformal, guaranteed = fit(ours), fit(ours, partial(rcps, delta=DELTA))
        references = [Reference(torch.stack([f.values[i] for f in ours])) for i in (0, 1)]
        several, single = (typical([f.settings[i] for f in ours]) for i in (0, 1))
        entries += [
            CardCalibration(several, source, conformal, guaranteed, references[0]),
            CardCalibration(single, source, reference=references[1]),
        ]
        unit = 1000 / MU_WATER if prior.card.modality == "CT" else 100.0
        row = _summary(amount, groups, conformal, guaranteed, unit)
        rows.append(row | {"likeness": _likeness(groups, strange, references)})
    return entries, rows


def _summary(
    amount: float,
    groups: Mapping[str, Sequence[Found]],
    conformal: Conformal | None,
    guaranteed: Conformal | None,
    unit: float,
) -> dict[str, Any]:
    """A row of the page; half widths in HU, or per cent of the signal's 99.5th percentile."""
    ours = groups["patients"]
    outside, alone, plain = splits(ours), left_out(ours), stated(ours, unit)
    elsewhere = {}
    for name, found in groups.items():
        truth, mean, spread, body = _stacked(found)
        elsewhere[name] = {
            "slices": len(found),
            "risk": None
            if conformal is None
            else risk(truth, mean, spread, conformal.factor, mask=body),
        }
    return {
        "amount": amount,
        "patients": len(ours),
        "conformal": None if conformal is None else asdict(conformal),
        "guaranteed": None if guaranteed is None else asdict(guaranteed),
        "half_width": None
        if conformal is None
        else unit * conformal.factor * float(np.median([f.spread[f.body].median() for f in ours])),
        "left_out": None if alone is None else asdict(alone),
        "splits": None if outside is None else asdict(outside),
        "stated": None if plain is None else asdict(plain),
        "groups": elsewhere,
    }


def _likeness(
    groups: Mapping[str, Sequence[Found]],
    strange: Mapping[str, Sequence[tuple[int | None, Found]]],
    references: Sequence[Reference],
) -> dict[str, dict[str, Any]]:
    """What the out-of-distribution test says of each group, its power and its false alarms.

    Args:
        groups: patients, each ranked among the others, and phantoms.
        strange: what is foreign, from one sample each.
        references: for the mean of all samples, and for one.
    """
    ours = [_without(references[0], i) for i in range(len(references[0].values))]
    ranks = {"patients": ours}
    for name, found in groups.items():
        if name != "patients":
            ranks[name] = [references[0].rank(f.values[0]) for f in found]
    for name, members in strange.items():
        ranks[name] = [_without(references[1], of, f.values[1]) for of, f in members]
    usual = torch.tensor([r.distance for r in ours])
    table = {}
    for name, these in ranks.items():
        lights = [likeness(r) for r in these]
        distances = torch.tensor([r.distance for r in these])
        table[name] = {
            "slices": len(these),
            "distance": float(distances.median()),
            "median_p": float(np.median([r.p for r in these])),
            "auc": None if name == "patients" else auc(distances, usual)[0],
            "doubted": float(np.mean([light != "green" for light in lights])),
            "red": float(np.mean([light == "red" for light in lights])),
        }
    return table


def _without(reference: Reference, i: int | None, value: Tensor | None = None) -> Rank:
    """Rank of a patient, or of what was made of one, among the others."""
    if i is None:
        assert value is not None
        return reference.rank(value)
    kept = [k for k in range(len(reference.values)) if k != i]
    others = replace(reference, values=reference.values[kept])
    return others.rank(reference.values[i] if value is None else value)


INTRODUCTION = """# Calibration of the priors

Written by `python -m phantoms.benchmarks.conformal`, a section a prior; what it means is in
[when not to believe it](when-not-to-believe-it.md).
"""


def markdown(about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The section of a prior."""
    unit, width = ("views", "HU") if about["modality"] == "CT" else ("x", "% of signal")
    lines = [
        f"## `{about['prior']}`",
        "",
        f"recon-sde {about['version']}, prior sha256 {about['sha256'][:12]}; {about['source']}; "
        f"method {about['method']}, {about['steps']} steps, {about['samples']} samples; one slice "
        + (
            "a patient."
            if about["modality"] == "CT"
            else f"a patient, of at least {WHOLE:g} of "
            f"its largest area; Cartesian, one coil, noise {NOISE:g}, centre {CENTRE:g}, a "
            f"smooth phase of at most {PHASE:g} rad."
        ),
        "",
        f"### Intervals that miss at most {100 * ALPHA:.0f} % of the body's pixels",
        "",
        "The factor of the spread by conformal risk control, the median half width of "
        "the interval in the body (a method whose spread means little needs a large factor, and "
        "its intervals are wide where they need not be), and its risk: on the fit; on each "
        "patient of a factor fitted on all others (n of each fit; mean with its 95 % interval "
        f"over patients, and the worst); and over {SPLITS} random splits, on the patients outside "
        "a fit on n. Expect of a new patient what the left-out ones had: the factor of all has "
        "one patient more. Fits on fewer, such as those of the splits, are more cautious, since "
        f"conformal risk control keeps the risk on a fit below ({ALPHA:g} (n + 1) - 1) / n. The "
        "promise is about the mean over fits. The guarantee is that at most "
        f"{100 * DELTA:.0f} % of fits exceed "
        f"{ALPHA:g}, at the price of a larger factor; the patients of a split can be too few. "
        "The last columns use the first factor where it was not fitted: no promise holds there.",
        "",
    ]
    names = [name for row in rows[:1] for name in row["groups"] if name != "patients"]
    lines += [
        "| "
        + " | ".join(
            [
                unit,
                "patients",
                "factor",
                f"half width, {width}",
                "risk on the fit",
                "left-out patient",
                "worst",
                "outside a split",
                f"splits above {ALPHA:g}",
                "factor with the guarantee",
                "splits above with it",
                *names,
            ]
        )
        + " |",
        "|" + "--:|" * (11 + len(names)),
    ]
    for row in rows:
        made, outside = row["conformal"], row["splits"]
        cells = [f"{row['amount']:g}", str(row["patients"])]
        cells += (
            ["too few", "–", "–"]
            if made is None
            else [f"{made['factor']:.2f}", f"{row['half_width']:.3g}", f"{made['risk']:.3f}"]
        )
        sure, broken = row["guaranteed"], None if outside is None else outside["guaranteed"]
        alone = row["left_out"]
        cells += ["–", "–"] if alone is None else [
            f"{alone['mean']:.3f} ± {alone['half']:.3f} (n = {alone['patients']})",
            f"{alone['worst']:.3f}",
        ]  # fmt: skip
        cells += ["–", "–"] if outside is None else [
            f"{outside['mean']:.3f} (n = {outside['patients']})",
            f"{100 * outside['exceeding']:.0f} %",
        ]  # fmt: skip
        cells.append("too few" if sure is None else f"{sure['factor']:.2f}")
        cells.append("too few" if broken is None else f"{100 * broken:.0f} %")
        values = [row["groups"][name]["risk"] for name in names]
        cells += ["–" if v is None else f"{v:.3f}" for v in values]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "### The spread as it stands",
        "",
        "Without calibration, in the body of the patients: root-mean-square error of the mean of "
        "K samples, what it would be if the truth were one more draw (their standard deviation "
        "times √(1 + 1/K)), and the share of pixels in Student's "
        f"{100 * (1 - ALPHA):.0f} % interval of the samples, with the 95 % interval of that share "
        "over patients.",
        "",
        f"| {unit} | K | error, {width} | error that the spread says, {width} | pixels held |",
        "|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        s = row["stated"]
        if s is not None:
            lines.append(
                f"| {row['amount']:g} | {s['samples']} | {s['error']:.3g} | "
                f"{s['std'] * math.sqrt(1 + 1 / s['samples']):.3g} | "
                f"{100 * s['held']:.0f} ± {100 * s['half']:.0f} % |"
            )
    lines += [
        "",
        "### Unlike the patients?",
        "",
        "The out-of-distribution test, of patients each among the others, and of what is none of "
        "them. Distance: of the statistics from the patients' over theirs from each other, median "
        "of the group, 1 is usual. AUC: share of pairs in which the foreign one is farther than a "
        "patient. Doubted: amber or red; of patients these are false alarms.",
        "",
        f"| {unit} | group | slices | distance | median p | AUC | doubted | red |",
        "|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        for name, g in row["likeness"].items():
            area = "–" if g["auc"] is None else f"{g['auc']:.2f}"
            lines.append(
                f"| {row['amount']:g} | {name} | {g['slices']} | {g['distance']:.3g} | "
                f"{g['median_p']:.2f} | {area} | {100 * g['doubted']:.0f} % | "
                f"{100 * g['red']:.0f} % |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is missing, write the page, and with ``--write`` the card."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prior", default="ct-small")
    parser.add_argument("--data", type=Path, required=True,
                        help="patients whom the prior has not seen: npz or DICOM")  # fmt: skip
    parser.add_argument("--select", action="append", default=[], metavar="COLUMN=A,B",
                        help="rows of the npz's table")  # fmt: skip
    parser.add_argument("--amounts", type=float, nargs="+",
                        help="views (23 60) or acceleration (4 8)")  # fmt: skip
    parser.add_argument("--method", default="pnp_admm")
    parser.add_argument("--steps", type=int, help="default the method's")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--patients", type=int, default=1000, help="most patients")
    parser.add_argument("--phantoms", type=int, default=4,
                        help="slices of each group that is not patients")  # fmt: skip
    parser.add_argument("--foreign", action="append", default=[], metavar="NAME=PATH",
                        help="more images that the prior did not see, for the power of the "
                        "out-of-distribution test; MR counts as CT")  # fmt: skip
    parser.add_argument("--orientation", help="plane of training, for the card")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="put the result into the card")
    parser.add_argument("--out", type=Path, default=Path("conformal.json"))
    parser.add_argument("--docs", type=Path, help="folder of the page; default beside --out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prior = load_prior(arguments.prior)
    modality: Literal["CT", "MR"] = "CT" if prior.card.modality == "CT" else "MR"
    select = {k: v.split(",") for k, _, v in (pair.partition("=") for pair in arguments.select)}
    subjects = patients(arguments.data, modality, select, arguments.patients)
    count = len(subjects)
    if count < 4:
        parser.error(f"{count} patients after selection; a calibration needs four and more")
    strange = {k: Path(v) for k, _, v in (pair.partition("=") for pair in arguments.foreign)}
    unlike = foreign(subjects, modality, arguments.phantoms, strange)
    if modality == "CT":
        subjects += others(arguments.phantoms)
    subjects += unlike
    chosen = " ".join(arguments.select)
    source = f"{count} patients of {arguments.data.name}" + (f" ({chosen})" if chosen else "")
    entries, rows = calibrate(
        prior,
        subjects,
        source,
        arguments.amounts or ([23.0, 60.0] if modality == "CT" else [4.0, 8.0]),
        arguments.method,
        arguments.steps,
        arguments.samples,
        arguments.out.with_suffix(""),
    )
    about = {
        "version": __version__,
        "prior": prior.card.name,
        "sha256": prior.card.sha256,
        "modality": modality,
        "source": source,
        "method": arguments.method,
        "steps": arguments.steps or "the default",
        "samples": arguments.samples,
    }
    arguments.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    page = (arguments.docs or arguments.out.parent) / f"{arguments.out.stem}.md"
    page.write_text(with_section(page, INTRODUCTION, markdown(about, rows)))
    print(page)
    if arguments.write:
        kept = [e for e in prior.card.calibration if not _replaced(e, entries)]
        plane = {"orientation": arguments.orientation} if arguments.orientation else {}
        added = [entry.to_dict() for entry in entries]
        update_card(arguments.prior, calibration=(*kept, *added), **plane)
        print(f"{len(entries)} entries written to the card of '{prior.card.name}'")


def _replaced(entry: Mapping[str, Any], entries: Sequence[CardCalibration]) -> bool:
    """Whether an entry of the card is for a setting that was measured anew."""
    try:
        old = CardCalibration.from_dict(entry).setting
    except CheckpointError:
        return True
    return any(not new.setting.differences(old) for new in entries)


if __name__ == "__main__":
    main()
