"""Calibrate a prior on held-out patients: ``python -m phantoms.benchmarks.conformal --write``.

One slice of each patient whom the prior has not seen is measured and reconstructed in a few
settings.  From these come, for each setting,

* the factor of ``mean ± factor spread`` that misses at most a tenth of the body's pixels, on
  average over patients (conformal risk control; with probability 90 % too, where there are
  patients enough), and its risk on patients outside the fit, over 200 random splits;
* the references of the out-of-distribution test, and what it says of heads and chest phantoms.

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
from inverse.errors import CheckpointError, InputError
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
    crc,
    rcps,
    risk,
    shown,
    statistics,
)
from phantoms.anatomy import AIR_HU, head, thorax
from phantoms.simulate import Simulation, simulate_ct, simulate_mri

ALPHA = 0.1
DELTA = 0.1
SPLITS = 200
MATRIX = 256
CENTRE = {4.0: 0.08, 8.0: 0.04}
"""Fully sampled share of k-space by acceleration; 0.08 for others."""


@dataclass(frozen=True)
class Subject:
    """One slice.

    Attributes:
        name: where it is from, without what may tell a patient.
        group: ``"patients"``, of whom the fit is made, or another set, which is only looked at.
        image: HU, or signal relative to the patient's 99.5th percentile.
        pixel_mm: mm.
    """

    name: str
    group: str
    image: NDArray[np.float32]
    pixel_mm: float


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
    """One slice of each patient at ``path``, chosen at random, so that they are independent."""
    images = load_images(path, modality, select=select)
    found = []
    for k, patient in enumerate(images.patients[:most]):
        members = [i for i, p in enumerate(images.patient) if p == patient]
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
            hu = body.slice(5.0).image((2 * MATRIX, 2 * MATRIX), 0.75, 2) + AIR_HU
            image = np.maximum(hu, AIR_HU).astype(np.float32)
            made.append(Subject(f"seed {seed}", group, image, 0.75))
    return made


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
        centre_fraction=CENTRE.get(amount, 0.08),
        noise=0.005,
        seed=1,
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
    mean, spread = shown(result.samples[0])
    at = prior.at(pixel_mm=measurement.pixel_mm[0])
    offset, scale = float(result.settings["offset"]), float(result.settings["scale"])
    values = [
        statistics(at, measurement, x, offset=offset, scale=scale)[0]
        for x in (result.mean, result.samples[:, 0])
    ]
    all_of_them = Setting.of(measurement, result.settings)
    return Found(
        truth=truth.abs() if truth.is_complex() else truth,
        mean=mean,
        spread=spread,
        body=torch.from_numpy(body) if body.any() else torch.ones_like(hu, dtype=torch.bool),
        values=torch.stack(values),
        settings=(all_of_them, replace(all_of_them, samples=1)),
    )


def typical(settings: Sequence[Setting]) -> Setting:
    """That of all patients: the median noise, as it depends on the patient."""
    return replace(settings[0], noise=float(np.median([s.noise for s in settings])))


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
        for number, subject in enumerate(subjects):
            key = {
                "prior": prior.card.sha256, "subject": f"{subject.group}, {subject.name}",
                "number": number, "amount": amount, "method": method, "steps": steps,
                "samples": samples, "pixels": hashlib.sha256(subject.image.tobytes()).hexdigest(),
            }  # fmt: skip

            make = partial(
                measure, subject, number, prior, amount, method=method, steps=steps,
                samples=samples,
            )  # fmt: skip
            groups.setdefault(subject.group, []).append(_kept(folder, key, make))
        ours = groups["patients"]
        conformal, guaranteed = fit(ours), fit(ours, partial(rcps, delta=DELTA))
        references = [Reference(torch.stack([f.values[i] for f in ours])) for i in (0, 1)]
        several, single = (typical([f.settings[i] for f in ours]) for i in (0, 1))
        entries += [
            CardCalibration(several, source, conformal, guaranteed, references[0]),
            CardCalibration(single, source, reference=references[1]),
        ]
        unit = 1000 / MU_WATER if prior.card.modality == "CT" else 100.0
        rows.append(_summary(amount, groups, conformal, guaranteed, references[0], unit))
    return entries, rows


def _summary(
    amount: float,
    groups: Mapping[str, Sequence[Found]],
    conformal: Conformal | None,
    guaranteed: Conformal | None,
    reference: Reference,
    unit: float,
) -> dict[str, Any]:
    """A row of the page; half widths in HU, or per cent of the signal's 99.5th percentile."""
    ours = groups["patients"]
    outside = splits(ours)
    elsewhere = {}
    for name, found in groups.items():
        if name == "patients":
            ranks = [_without(reference, i) for i in range(len(ours))]
        else:
            ranks = [reference.rank(f.values[0]) for f in found]
        truth, mean, spread, body = _stacked(found)
        elsewhere[name] = {
            "slices": len(found),
            "risk": None
            if conformal is None
            else risk(truth, mean, spread, conformal.factor, mask=body),
            "median_p": float(np.median([r.p for r in ranks])),
            "least_p": min(r.p for r in ranks),
            "beyond": float(np.median([r.beyond for r in ranks])),
        }
    return {
        "amount": amount,
        "patients": len(ours),
        "conformal": None if conformal is None else asdict(conformal),
        "guaranteed": None if guaranteed is None else asdict(guaranteed),
        "half_width": None
        if conformal is None
        else unit * conformal.factor * float(np.median([f.spread[f.body].median() for f in ours])),
        "splits": None if outside is None else asdict(outside),
        "groups": elsewhere,
    }


def _without(reference: Reference, i: int) -> Rank:
    """A patient's rank among the others."""
    kept = [k for k in range(len(reference.values)) if k != i]
    return replace(reference, values=reference.values[kept]).rank(reference.values[i])


def markdown(about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The page."""
    unit, width = ("views", "HU") if about["modality"] == "CT" else ("x", "% of signal")
    lines = [
        f"# Calibration of `{about['prior']}`",
        "",
        "Written by `python -m phantoms.benchmarks.conformal`; what it means is in "
        "[when not to believe it](when-not-to-believe-it.md).",
        "",
        f"recon-sde {about['version']}, prior sha256 {about['sha256'][:12]}; {about['source']}; "
        f"method {about['method']}, {about['steps']} steps, {about['samples']} samples; one slice "
        "a patient.",
        "",
        f"## Intervals that miss at most {100 * ALPHA:.0f} % of the body's pixels",
        "",
        "The factor of the spread by conformal risk control, the median half width of "
        "the interval in the body (a method whose spread means little needs a large factor, and "
        "its intervals are wide where they need not be), its risk on the fit, and "
        f"over {SPLITS} random splits the risk on patients outside it. The promise is about the "
        f"mean over splits. The guarantee is that at most {100 * DELTA:.0f} % of fits exceed "
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
                "outside the fit",
                f"splits above {ALPHA:g}",
                "factor with the guarantee",
                "splits above with it",
                *names,
            ]
        )
        + " |",
        "|" + "--:|" * (9 + len(names)),
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
        held = outside and [f"{outside['mean']:.3f}", f"{100 * outside['exceeding']:.0f} %"]
        cells += held or ["–", "–"]
        cells.append("too few" if sure is None else f"{sure['factor']:.2f}")
        cells.append("too few" if broken is None else f"{100 * broken:.0f} %")
        values = [row["groups"][name]["risk"] for name in names]
        cells += ["–" if v is None else f"{v:.3f}" for v in values]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "## Unlike the patients?",
        "",
        "p-values of the out-of-distribution test: of patients each among the others, and of "
        "images that are not of them. In brackets the distance over that of the farthest patient.",
        "",
        f"| {unit} | group | slices | median p | least p |",
        "|--:|---|--:|--:|--:|",
    ]
    for row in rows:
        for name, g in row["groups"].items():
            lines.append(
                f"| {row['amount']:g} | {name} | {g['slices']} | {g['median_p']:.2f} "
                f"({g['beyond']:.2f}) | {g['least_p']:.2f} |"
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
    parser.add_argument("--phantoms", type=int, default=4, help="chests and heads, CT only")
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
    if count < 2:
        parser.error(f"{count} patient after selection; a calibration needs two and more")
    if modality == "CT":
        subjects += others(arguments.phantoms)
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
    page.write_text(markdown(about, rows))
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
