r"""One light for a reconstruction, with its reasons; never a bare number.

:func:`examine` gathers all that can be said without the truth (residuals, what the prior filled
in, intervals, the out-of-distribution test, the prior card) and lets :func:`judge` put it into a
:class:`Verdict`.  The thresholds are constants of this module, each with its reason.  Green means
that none of these tests found cause for doubt, not that the image is right: what the data do not
see and the prior takes for usual passes every one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from inverse.errors import GeometryError, InputError, UnsupportedError
from inverse.measurement import CHI2_HIGH, Measurement
from inverse.operators.ct import RayTransform
from inverse.priors.checkpoint import NetworkPrior
from inverse.priors.denoiser import Denoiser
from inverse.trust.card import CardCalibration, Concern, Setting, check_card
from inverse.trust.hallucination import noise_split, prior_part
from inverse.trust.ood import Rank, statistics
from inverse.trust.uncertainty import (
    ChiSquare,
    Conformal,
    Whiteness,
    by_first_axis,
    by_frequency,
    residual_chi2,
    whiteness,
)

__all__ = [
    "Evidence",
    "Examination",
    "Interval",
    "Maps",
    "Sink",
    "Verdict",
    "examine",
    "judge",
    "likeness",
    "shown",
]

CHI2_LOW = 0.03
"""Reduced chi-square below which the noise itself was fitted.  Well below 1 on purpose: stated
noise often includes a model error that the data at hand do not have."""
CHI2_WRONG = 5.0
"""Above :data:`inverse.measurement.CHI2_HIGH` the data are not fitted, amber; above this geometry,
units or noise level are wrong: red."""
GROUP_EXCESS = 4.0
"""A view (or ring of k-space) whose chi-square exceeds the median of all by this factor, and
:data:`CHI2_HIGH`, was spoiled by motion, metal or a defect: amber."""
CORRELATED = 0.5
"""Correlation of neighbours in the residual beyond which it is structure, not noise: amber.
Pixels too coarse for the object alone give up to about 0.3 along the detector."""
OOD_P = 0.05
"""p-value of the out-of-distribution test at or below which: amber.  With fewer than 19 reference
patients the smallest p-value that there is counts, and the reason says so."""
OOD_TAIL = 0.001
"""Probability of such a distance by the prediction bound of :class:`inverse.trust.Reference` at or
below which: red.  The bound is approximate; so small a number leaves room for that."""
DETAIL = 0.5
"""Share of the image's detail that the data do not determine at their noise: amber above it, as
most of what is seen beyond broad features is then the prior's."""
DETAIL_MOST = 0.9
"""Above it nearly all detail is the prior's: red."""
WHITE_P = 0.01
RINGS = 8
COLUMNS = 8
"""Images that go through the operator together: a sparse product reads its matrix once for all of
them, so that eight cost little more than one."""
COLUMN_PIXELS = 2**21
"""Most pixels of these, so that memory stays bounded for large images and volumes."""

Light = Literal["green", "amber", "red"]


@dataclass(frozen=True)
class Verdict:
    """Whether to believe a reconstruction.

    Attributes:
        light: ``"green"``: no test found cause for doubt; ``"amber"``: look at the reasons before
            use; ``"red"``: do not use.
        reasons: at least one sentence, the gravest first.

    Raises:
        InputError: no reason, as a light without one says nothing.
    """

    light: Light
    reasons: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.reasons:
            raise InputError("a verdict needs at least one reason; say what was tested")

    def __str__(self) -> str:
        return f"{self.light}: {'; '.join(self.reasons)}"


@dataclass(frozen=True)
class Evidence:
    """What :func:`judge` weighs; ``None`` where a test could not be made.

    Attributes:
        chi2: reduced chi-square of a sample's residual in the worst slice: the farthest from 1.
        groups: what the residual is grouped by: ``"view"``, ``"ring of k-space"``, or nothing.
        worst_group: number of the group that stands out most.
        group_chi2: its reduced chi-square over slices.
        group_excess: that over the median of all groups.
        correlation: of neighbours in the residual, the largest over axes and slices, where it is
            significant; else 0.
        axis: the axis of the data it is along.
        detail_share: share of the detail that the data do not determine, in the worst slice.
        split_error: bound on the relative error of the split.
        ood: rank among the references, of the slice in the middle of all by its distance from
            them: the farthest of many would stand out by chance.
        ood_note: why there is no rank.
        interval_note: ``"calibrated"``, or why intervals are not.
        concerns: of the prior card.
    """

    chi2: float
    groups: str = ""
    worst_group: int | None = None
    group_chi2: float | None = None
    group_excess: float | None = None
    correlation: float | None = None
    axis: int | None = None
    detail_share: float | None = None
    split_error: float | None = None
    ood: Rank | None = None
    ood_note: str = ""
    interval_note: str = ""
    concerns: tuple[Concern, ...] = ()


def judge(evidence: Evidence) -> Verdict:
    """Weigh the evidence by the thresholds of this module."""
    e = evidence
    found = list(e.concerns)

    def doubt(light: Literal["amber", "red"], text: str) -> None:
        found.append(Concern(light, text))

    if not math.isfinite(e.chi2) or e.chi2 > CHI2_WRONG:
        doubt("red", f"residual chi-square {e.chi2:.3g} for 1: geometry, units or noise are wrong")
    elif e.chi2 > CHI2_HIGH:
        doubt("amber", f"residual chi-square {e.chi2:.3g} for 1: the data are not fitted")
    elif e.chi2 < CHI2_LOW:
        doubt("amber", f"residual chi-square {e.chi2:.3g} for 1: the noise was fitted")
    if (
        e.group_chi2 is not None
        and e.group_excess is not None
        and e.group_chi2 > CHI2_HIGH
        and e.group_excess > GROUP_EXCESS
    ):
        doubt(
            "amber",
            f"{e.groups} {e.worst_group} disagrees with the others: chi-square "
            f"{e.group_chi2:.3g}, {e.group_excess:.3g} times the median",
        )
    if e.correlation is not None and abs(e.correlation) > CORRELATED:
        doubt(
            "amber",
            f"neighbours in the residual correlate by {e.correlation:.2g} along axis {e.axis}: "
            "structure of the data is left out",
        )
    if e.detail_share is not None and e.detail_share > DETAIL:
        light: Literal["amber", "red"] = "red" if e.detail_share > DETAIL_MOST else "amber"
        doubt(light, f"{100 * e.detail_share:.0f} % of the detail is the prior's, not the data's")
    if e.ood is not None and (unlike := likeness(e.ood)) != "green":
        least = ", the least" if e.ood.p <= 1.5 / (e.ood.patients + 1) else ""
        doubt(
            unlike,
            f"unlike the prior's held-out patients: p {e.ood.p:.2g}{least} with {e.ood.patients}, "
            f"{e.ood.distance:.2g} times the usual distance",
        )
    found.sort(key=lambda c: c.light != "red")
    notes = []
    if e.ood is None:
        notes.append(f"likeness to the prior's patients not tested ({e.ood_note})")
    if found:
        return Verdict(found[0].light, (*(c.text for c in found), *notes))
    passed = [f"residual chi-square {e.chi2:.2g}"]
    if e.detail_share is not None:
        passed.append(f"{100 * e.detail_share:.0f} % of the detail from the prior")
    if e.ood is not None:
        passed.append(f"like the prior's patients (p {e.ood.p:.2g} of {e.ood.patients})")
    return Verdict("green", ("no cause for doubt found: " + ", ".join(passed), *notes))


def likeness(rank: Rank) -> Light:
    """The light of the out-of-distribution test alone.

    Red needs both: the exact p-value, which cannot be small with few patients, and a distance
    beyond what they let expect.
    """
    if rank.p > max(OOD_P, 1.5 / (rank.patients + 1)):
        return "green"
    return "red" if rank.tail <= OOD_TAIL else "amber"


@dataclass(frozen=True)
class Interval:
    """Conformal interval of the reconstruction, physical units.

    Attributes:
        low: lower end, ``(slices, h, w)``, or of one slice.
        high: upper end.
        level: promised share of pixels inside, on average over patients like those of the fit.
        factor: of the standard deviation.
    """

    low: Tensor
    high: Tensor
    level: float
    factor: float


@dataclass(frozen=True)
class Maps:
    """The images of an examination, of one slice: see :class:`Examination`."""

    share: Tensor
    null_std: Tensor | None
    interval: Interval | None


Sink: TypeAlias = Callable[[int, Maps], None]
"""Takes the number of a slice and its maps, in the order of the samples."""


@dataclass(frozen=True)
class Examination:
    """All that is known of a reconstruction without the truth.

    Attributes:
        verdict: the light with its reasons.
        evidence: the numbers behind it.
        chi2: of one sample a slice, by group.
        whiteness: of the residual, by axis of the data.
        share: share of each pixel's value that the data do not determine at their noise, 0 to 1,
            ``(slices, h, w)``.
        null_std: standard deviation over samples of that part, physical units; ``None`` with one
            sample.
        interval: conformal interval of the magnitude; ``None`` where the card has none for this
            setting, see ``evidence.interval_note``.
        setting: how data were measured and reconstructed.

    Where a :data:`Sink` took the images, these are of no slices.
    """

    verdict: Verdict
    evidence: Evidence
    chi2: ChiSquare
    whiteness: Mapping[int, Whiteness]
    share: Tensor
    null_std: Tensor | None
    interval: Interval | None
    setting: Setting = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: all but the images."""
        e = self.evidence
        return {
            "light": self.verdict.light,
            "reasons": list(self.verdict.reasons),
            "chi2": {
                "by": e.groups or "all",
                "groups": self.chi2.groups.tolist(),
                "value": self.chi2.value.tolist(),
                "expected": [self.chi2.low.tolist(), self.chi2.high.tolist()],
            },
            "whiteness": {
                str(axis): {"value": w.value.tolist(), "p": w.p.tolist()}
                for axis, w in self.whiteness.items()
            },
            "detail_share": e.detail_share,
            "split_error": e.split_error,
            "out_of_distribution": None if e.ood is None else asdict(e.ood),
            "out_of_distribution_note": e.ood_note,
            "interval": None
            if self.interval is None
            else {"level": self.interval.level, "factor": self.interval.factor},
            "interval_note": e.interval_note,
            "card": [asdict(c) for c in e.concerns],
            "setting": asdict(self.setting),
        }


def examine(
    measurement: Measurement,
    prior: Denoiser,
    samples: Tensor | Iterable[tuple[int, Tensor]],
    settings: Mapping[str, Any],
    *,
    orientation: str = "",
    max_iter: int = 100,
    sink: Sink | None = None,
) -> Examination:
    """Examine a reconstruction: residuals, the prior's part, likeness, intervals, verdict.

    Slices are taken a few at a time, so that memory grows with the maps alone, unless a sink takes
    them.  A slice costs one network call a noise level of the out-of-distribution test, where the
    card has references for the setting, and at most ``max_iter`` applications of the operator and
    its adjoint a sample.

    Args:
        measurement: data, operator and noise.
        prior: the prior that reconstructed.
        samples: ``(slices, samples, *in_shape)``, of :class:`inverse.Reconstruction`, or each
            slice's number and its samples, in any order.
        settings: its settings.
        orientation: plane of the slices, see :func:`inverse.trust.plane`.
        max_iter: bound on the cost of the split of the mean and of each sample.
        sink: takes the images of each slice.

    Raises:
        GeometryError: samples that do not fit the measurement.
        InputError: samples that are not finite.
        UnsupportedError: an operator that does not tell which data it measures.
    """
    given = enumerate(samples) if isinstance(samples, Tensor) else samples
    setting = Setting.of(measurement, settings)
    name, groups = _groups(measurement)
    known, why = _known(prior, setting)
    interval_note = "calibrated"
    if known is None or known.conformal is None:
        interval_note = f"uncalibrated: {why or 'the card holds no intervals for this setting'}"
    elif setting.samples < 2:
        known, interval_note = replace(known, conformal=None), "uncalibrated: one sample a slice"
    found: dict[int, _Slice] = {}
    images: dict[int, Maps] = {}
    for numbers, draws in _few(given, measurement.operator.in_shape):
        some = measurement.take(torch.tensor(numbers))
        for z, (one, maps) in zip(
            numbers,
            _examine(some, prior, draws, settings, groups, known, orientation, max_iter),
            strict=True,
        ):
            if sink is not None:
                sink(z, maps)
                images.clear()  # one tells which maps there are
            found[z], images[z] = one, maps
    if sorted(found) != list(range(len(measurement))):
        raise GeometryError(
            f"examine needs samples of each of {len(measurement)} slices, got {sorted(found)}"
        )
    slices = [found[z] for z in sorted(found)]
    chi2 = _joined([s.chi2 for s in slices])
    white = {
        axis: Whiteness(
            torch.cat([s.whiteness[axis].value for s in slices]),
            slices[0].whiteness[axis].variance,
            torch.cat([s.whiteness[axis].p for s in slices]),
        )
        for axis in slices[0].whiteness
        if all(axis in s.whiteness for s in slices)
    }
    worst_group, group_chi2, excess = _worst(chi2)
    correlation, axis = _structure(white)
    whole = (chi2.value * chi2.degrees).sum(dim=1) / chi2.degrees.sum()
    ranks = sorted((s.rank for s in slices if s.rank is not None), key=lambda r: r.distance)
    notes = [s.note for s in slices if s.rank is None]
    evidence = Evidence(
        chi2=float(whole[int(whole.clamp_min(1e-300).log().abs().argmax())]),
        groups=name,
        worst_group=worst_group,
        group_chi2=group_chi2,
        group_excess=excess,
        correlation=correlation,
        axis=axis,
        detail_share=max(s.detail_share for s in slices),
        split_error=max(s.split_error for s in slices),
        ood=ranks[len(ranks) // 2] if ranks else None,
        ood_note="" if ranks else why or notes[0],
        interval_note=interval_note,
        concerns=_worst_of(c for s in slices for c in s.concerns),
    )
    maps = _stack([images[z] for z in sorted(images)], 0 if sink else len(slices))
    return Examination(
        verdict=judge(evidence),
        evidence=evidence,
        chi2=chi2,
        whiteness=white,
        share=maps.share,
        null_std=maps.null_std,
        interval=maps.interval,
        setting=setting,
    )


def _worst_of(concerns: Iterable[Concern]) -> tuple[Concern, ...]:
    """Of concerns about one matter in several slices the gravest."""
    worst: dict[str, Concern] = {}
    for concern in concerns:
        about = concern.about or concern.text
        if about not in worst or concern.extent > worst[about].extent:
            worst[about] = concern
    return tuple(worst.values())


@dataclass(frozen=True)
class _Slice:
    """What :func:`examine` finds in one slice."""

    chi2: ChiSquare
    whiteness: Mapping[int, Whiteness]
    detail_share: float
    split_error: float
    rank: Rank | None
    note: str
    concerns: tuple[Concern, ...]


def _few(
    given: Iterable[tuple[int, Tensor]], shape: tuple[int, ...]
) -> Iterator[tuple[list[int], Tensor]]:
    """Slices a few at a time: their numbers and ``(samples, slices, *shape)``."""
    columns = _columns(shape)
    held: dict[int, Tensor] = {}
    samples = 0
    for z, draws in given:
        samples = samples or (len(draws) if draws.ndim else 0)
        if not samples or tuple(draws.shape) != (samples, *shape):
            raise GeometryError(
                f"examine needs samples (samples, *{shape}) of each slice, as many of all, got "
                f"{tuple(draws.shape)}"
            )
        held[z] = draws
        # many samples are held of fewer slices
        if len(held) >= columns or len(held) * samples >= COLUMNS * columns:
            yield list(held), torch.stack(list(held.values()), dim=1)
            held = {}
    if held:
        yield list(held), torch.stack(list(held.values()), dim=1)


def _columns(shape: tuple[int, ...]) -> int:
    """How many images of a shape go through the operator together."""
    return max(1, min(COLUMNS, COLUMN_PIXELS // math.prod(shape)))


def _examine(
    some: Measurement,
    prior: Denoiser,
    draws: Tensor,
    settings: Mapping[str, Any],
    groups: Tensor | None,
    known: CardCalibration | None,
    orientation: str,
    max_iter: int,
) -> Iterator[tuple[_Slice, Maps]]:
    """A few slices with their samples ``(samples, slices, *in_shape)``."""
    offset, scale = float(settings["offset"]), float(settings["scale"])
    mean = draws.mean(dim=0)
    parts = partial(noise_split, some, contrast=abs(scale), max_iter=max_iter)
    part = parts(mean)
    share, detail_share = part.share.float(), part.detail_share
    std = None
    if len(draws) > 1:
        together = max(1, _columns(some.operator.in_shape) // len(some))
        std = prior_part(parts, draws.split(together)).std.float()
    chi2, white = residual_chi2(some, draws[0], groups), _whiteness(some, draws[0])
    ranks, note = _likeness(prior, known, some, mean, offset, scale)
    for i in range(len(some)):
        concerns: tuple[Concern, ...] = ()
        if isinstance(prior, NetworkPrior):
            concerns = check_card(
                prior.card,
                some,
                mean[i : i + 1],
                offset=offset,
                scale=scale,
                orientation=orientation,
            )
        found = _Slice(
            chi2=replace(chi2, value=chi2.value[i : i + 1], p=chi2.p[i : i + 1]),
            whiteness={
                axis: Whiteness(w.value[i : i + 1], w.variance, w.p[i : i + 1])
                for axis, w in white.items()
            },
            detail_share=float(detail_share[i]),
            split_error=float(part.error[i]),
            rank=ranks[i] if ranks else None,
            note=note,
            concerns=concerns,
        )
        interval = None
        if known is not None and known.conformal is not None:
            interval = _interval(known.conformal, draws[:, i])
        yield found, Maps(share[i], None if std is None else std[i], interval)


def _interval(conformal: Conformal, samples: Tensor) -> Interval:
    """The interval of one slice."""
    low, high = conformal.interval(*shown(samples))
    if samples.is_complex():
        low = low.clamp_min(0.0)  # of a magnitude
    return Interval(low, high, 1 - conformal.alpha, conformal.factor)


def _stack(parts: Sequence[Maps], count: int) -> Maps:
    """Maps of single slices as those of the first ``count``."""

    def stack(images: Iterable[Tensor]) -> Tensor:
        return torch.stack(list(images))[:count]

    stds = [p.null_std for p in parts if p.null_std is not None]
    ends = [p.interval for p in parts if p.interval is not None]
    return Maps(
        stack(p.share for p in parts),
        stack(stds) if stds else None,
        replace(ends[0], low=stack(e.low for e in ends), high=stack(e.high for e in ends))
        if ends
        else None,
    )


def _joined(tests: Sequence[ChiSquare]) -> ChiSquare:
    """Those of single slices as one."""
    first = tests[0]
    if any(not torch.equal(t.groups, first.groups) for t in tests):
        raise GeometryError("examine needs the same groups of data in every slice")
    value, p = (torch.cat([getattr(t, name) for t in tests]) for name in ("value", "p"))
    return ChiSquare(first.groups, value, first.degrees, first.low, first.high, p)


def shown(samples: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean and spread that conformal intervals are about: of complex images of the magnitude.

    .. math:: u = \sqrt{s^2 + \overline{s^2}}

    with s the standard deviation over samples, and its mean square over the image as a floor:
    where few samples happen to agree s says little, and a factor that had to serve those pixels
    too would widen all others.

    Args:
        samples: ``(samples, *shape)``, at least two.

    Returns:
        Magnitude of the mean, and u of the magnitudes (of real images, of the values).

    Raises:
        InputError: one sample.
    """
    if len(samples) < 2:
        raise InputError("an interval needs at least 2 samples a slice, got 1; draw more")
    mean = samples.mean(dim=0)
    if samples.is_complex():
        mean, samples = mean.abs(), samples.abs()
    variance = samples.var(dim=0)
    return mean, (variance + variance.mean()).sqrt()


def _groups(measurement: Measurement) -> tuple[str, Tensor | None]:
    """Name of the groups of the residual, and the group of each datum."""
    shape, images = measurement.operator.out_shape, measurement.operator.in_shape
    if measurement.data.is_complex() and shape[-2:] == images[-2:]:
        return "ring of k-space", by_frequency(shape, RINGS)
    if len(shape) < 2 or shape == images:  # samples of a trajectory; pixels
        return "", None
    rays = isinstance(measurement.operator, RayTransform)
    return ("view" if rays else "coil"), by_first_axis(shape)


def _whiteness(measurement: Measurement, x: Tensor) -> dict[int, Whiteness]:
    """Along the last two axes of the data, where neighbours are measured and the noise left."""
    found = {}
    for axis in range(-min(2, len(measurement.operator.out_shape)), 0):
        try:
            found[axis] = whiteness(measurement, x, axis)
        except InputError:  # no neighbours along it, or no residual: chi-square tells
            continue
    return found


def _worst(chi2: ChiSquare) -> tuple[int | None, float | None, float | None]:
    """The group that stands out most: number, chi-square over slices, and that over the median."""
    value = chi2.value.mean(dim=0)
    if len(value) < 3:
        return None, None, None
    worst, median = int(value.argmax()), float(value.median())
    excess = float(value[worst]) / median if median > 0 else math.inf
    return int(chi2.groups[worst]), float(value[worst]), excess


def _structure(white: Mapping[int, Whiteness]) -> tuple[float | None, int | None]:
    """Largest significant correlation of neighbours, and its axis; 0 where none is significant."""
    if not white:
        return None, None
    best, where = 0.0, None
    for axis, test in white.items():
        for value, p in zip(test.value.tolist(), test.p.tolist(), strict=True):
            if p < WHITE_P and abs(value) > abs(best):
                best, where = value, axis
    return best, where


def _known(prior: Denoiser, setting: Setting) -> tuple[CardCalibration | None, str]:
    """The card's calibration for a setting, or why there is none."""
    if not isinstance(prior, NetworkPrior):
        return None, "the prior has no card"
    return CardCalibration.find(prior.card, setting)


def _likeness(
    prior: Denoiser,
    known: CardCalibration | None,
    some: Measurement,
    mean: Tensor,
    offset: float,
    scale: float,
) -> tuple[list[Rank], str]:
    """Rank of each slice among the references, or why there is none."""
    if known is None or known.reference is None or not isinstance(prior, NetworkPrior):
        return [], "the card holds no references for this setting"
    reference = known.reference
    pixel = sum(some.pixel_mm) / len(some.pixel_mm)
    try:
        values = statistics(
            prior.at(pixel_mm=pixel),
            some,
            mean,
            offset=offset,
            scale=scale,
            levels=reference.levels,
            seed=reference.seed,
        )
    except UnsupportedError as error:
        return [], str(error)
    return [reference.rank(value) for value in values], ""
