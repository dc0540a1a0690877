r"""What the prior card says of a measurement: does it fit, and what was calibrated for it.

A prior is trusted for what it saw.  :func:`check_card` compares an image with the card;
:class:`CardCalibration` is what was measured on held-out patients under one :class:`Setting` and
stored in the card: the factor of conformal intervals and the references of the
out-of-distribution test.  Under another setting neither holds, and nothing is said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from inverse.errors import CheckpointError
from inverse.measurement import Measurement
from inverse.operators.ct import RayTransform
from inverse.operators.linop import LinearOperator
from inverse.operators.mri import CartesianMRI, Sense
from inverse.priors.checkpoint import PriorCard
from inverse.trust.ood import Reference
from inverse.trust.uncertainty import Conformal, measured_data

__all__ = ["CardCalibration", "Concern", "Setting", "check_card", "plane"]

VERSION = 3
"""Of the entries of ``PriorCard.calibration``; those of another version are not read."""

SAMPLING_TOLERANCE = 0.1
NOISE_TOLERANCE = 1.5
RADIUS_TOLERANCE = 0.35
IRREGULAR = 0.32
"""Standard deviation over mean of the steps between lines, from which these are random."""
PIXEL_TOLERANCE = 0.05
MATRIX_TOLERANCE = 0.25
OUT_OF_RANGE = 0.01
"""Share of pixels beyond the range of training from which the image counts as out of range."""
RANGE_MARGIN = 0.05
"""Of the range of training, by which a pixel may exceed it."""


@dataclass(frozen=True)
class Concern:
    """One reason for doubt.

    Attributes:
        light: ``"amber"``, look closer, or ``"red"``, do not use.
        text: the reason, with the number, what was expected and why it matters.
        about: the matter, where slices may differ in it; of these the one with the largest extent
            counts.
        extent: how far off.
    """

    light: Literal["amber", "red"]
    text: str
    about: str = ""
    extent: float = 0.0


def check_card(
    card: PriorCard,
    measurement: Measurement,
    x: Tensor,
    *,
    offset: float,
    scale: float,
    orientation: str = "",
) -> tuple[Concern, ...]:
    """Compare a reconstruction with what the prior saw.

    Args:
        card: the prior's card.
        measurement: what was measured.
        x: reconstructions ``(slices, h, w)``, physical units.
        offset: physical value of prior value 0.
        scale: physical units per prior unit.
        orientation: plane of the slices, see :func:`plane`; empty where it is not known.

    Returns:
        Reasons for doubt; none where all fits.
    """
    found: list[Concern] = []
    if card.modality != measurement.modality:
        found.append(
            Concern(
                "red", f"the prior is for {card.modality}, the data are {measurement.modality}"
            )
        )
    low, high = card.pixel_mm_range
    pixel = sum(measurement.pixel_mm) / len(measurement.pixel_mm)
    if not (1 - PIXEL_TOLERANCE) * low <= pixel <= (1 + PIXEL_TOLERANCE) * high:
        found.append(
            Concern(
                "amber",
                f"pixels of {pixel:.3g} mm, the prior saw {low:.3g} to {high:.3g} mm",
            )
        )
    sides = measurement.operator.in_shape[-2:]
    field = [side * pixel for side in sides]
    known = [side * bound for side, bound in zip(card.shape, (low, high), strict=True)]
    least, most = (1 - MATRIX_TOLERANCE) * known[0], (1 + MATRIX_TOLERANCE) * known[1]
    if not all(least <= extent <= most for extent in field):
        found.append(
            Concern(
                "amber",
                f"a field of {field[0]:.0f} x {field[1]:.0f} mm, the prior saw "
                f"{known[0]:.0f} to {known[1]:.0f} mm",
            )
        )
    if card.orientation and orientation and card.orientation != orientation:
        found.append(
            Concern("amber", f"{orientation} slices, the prior saw {card.orientation} ones")
        )
    units = card.offset + card.scale * ((x.abs() if x.is_complex() else x) - offset) / scale
    bottom, top = card.value_range
    margin = RANGE_MARGIN * (top - bottom)
    outside = (units < bottom - margin) | (units > top + margin)
    share = float(outside.double().mean())
    if share > OUT_OF_RANGE:
        found.append(
            Concern(
                "amber",
                f"{100 * share:.1f} % of pixels outside the prior's {bottom:g} to {top:g} "
                f"{card.unit}",
                about="range",
                extent=share,
            )
        )
    return tuple(found)


def plane(directions: tuple[float, ...] | list[float] | None) -> str:
    """Plane of slices from the direction cosines of a row and a column, patient space.

    Args:
        directions: six numbers as in DICOM's Image Orientation (Patient); ``None`` if unknown.

    Returns:
        ``"axial"``, ``"coronal"``, ``"sagittal"``, ``"oblique"`` (more than 25 degrees from each)
        or, where it is not known, the empty string.
    """
    if directions is None or len(directions) != 6:
        return ""
    row, column = torch.tensor(directions, dtype=torch.float64).reshape(2, 3)
    normal = torch.linalg.cross(row, column).abs()
    length = float(normal.norm())
    if not length > 0:
        return ""
    axis = int(normal.argmax())
    if float(normal[axis]) / length < math.cos(math.radians(25)):
        return "oblique"
    return ("sagittal", "coronal", "axial")[axis]


@dataclass(frozen=True)
class Setting:
    """How data were measured and reconstructed, as far as a calibration depends on it.

    Attributes:
        operator: kind of measurement, such as ``"parallel CT"``.
        sampling: real values measured over unknowns.
        arc: angle that the views span, degrees; 0 where there are no views.
        noise: RMS of the noise std over that of the measured data.
        method: posterior method.
        options: its options, plain JSON values.
        samples: samples a slice.
        pattern: what a grid of k-space was measured at: ``"lines"``, ``"regular lines"`` or
            ``"points"``; empty where there is none, or all of it.
        radius: RMS frequency of these lines or points over that of all; 1 where all are measured.
    """

    operator: str
    sampling: float
    arc: float
    noise: float
    method: str
    options: Mapping[str, Any]
    samples: int
    pattern: str = ""
    radius: float = 1.0

    @classmethod
    def of(cls, measurement: Measurement, settings: Mapping[str, Any]) -> Setting:
        """From a measurement and ``Reconstruction.settings``."""
        seen = measured_data(measurement)
        data = _rms(measurement.data, seen)
        noise = _rms(measurement.noise.expand(measurement.data.shape), seen)
        parts = math.sqrt(2.0) if measurement.data.is_complex() else 1.0
        operator = measurement.operator
        unknowns = math.prod(operator.in_shape) * (2 if operator.dtype.is_complex else 1)
        aside = {"method", "samples", "batch", "device", "prior", "prior_sha256", "offset",
                 "scale", "phase", "notes"}  # fmt: skip
        pattern, radius = _pattern(operator)
        return cls(
            operator=_kind(measurement),
            sampling=float(seen.sum()) * parts**2 / unknowns,
            arc=_arc(operator),
            noise=parts * noise / data,
            method=str(settings["method"]),
            options={k: v for k, v in settings.items() if k not in aside},
            samples=int(settings["samples"]),
            pattern=pattern,
            radius=radius,
        )

    def differences(self, other: Setting) -> tuple[str, ...]:
        """In what ``other`` differs by more than a calibration bears; empty where it does not."""
        found = [
            f"{name} {theirs} for {mine}"
            for name, mine, theirs in (
                ("operator", self.operator, other.operator),
                ("method", self.method, other.method),
                ("samples", self.samples, other.samples),
                ("pattern", self.pattern or "none", other.pattern or "none"),
            )
            if mine != theirs
        ]
        if self.method == other.method:
            found += [
                f"{key} {other.options.get(key)} for {self.options.get(key)}"
                for key in sorted(set(self.options) | set(other.options))
                if self.options.get(key) != other.options.get(key)
            ]
        if not math.isclose(self.sampling, other.sampling, rel_tol=SAMPLING_TOLERANCE):
            found.append(f"{other.sampling:.3g} data an unknown for {self.sampling:.3g}")
        if abs(self.arc - other.arc) > SAMPLING_TOLERANCE * max(self.arc, other.arc):
            found.append(f"an arc of {other.arc:.0f} degrees for {self.arc:.0f}")
        if not 1 / NOISE_TOLERANCE <= self.noise / other.noise <= NOISE_TOLERANCE:
            found.append(f"relative noise {other.noise:.2g} for {self.noise:.2g}")
        if not math.isclose(self.radius, other.radius, rel_tol=RADIUS_TOLERANCE):
            found.append(f"an RMS frequency of {other.radius:.2g} for {self.radius:.2g}")
        return tuple(found)


@dataclass(frozen=True)
class CardCalibration:
    """What held-out patients showed under one setting.

    Attributes:
        setting: the setting.
        source: which patients, in words.
        conformal: intervals that hold on average over fits; ``None`` where they were not fitted.
        guaranteed: wider ones that hold with a probability, see :func:`inverse.trust.rcps`.
        reference: of the out-of-distribution test; ``None`` where it was not measured.
    """

    setting: Setting
    source: str
    conformal: Conformal | None = None
    guaranteed: Conformal | None = None
    reference: Reference | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, an entry of ``PriorCard.calibration``."""
        reference = self.reference
        return {
            "version": VERSION,
            "setting": asdict(self.setting),
            "source": self.source,
            "conformal": None if self.conformal is None else asdict(self.conformal),
            "guaranteed": None if self.guaranteed is None else asdict(self.guaranteed),
            "reference": None
            if reference is None
            else {
                "values": [[round(v, 6) for v in row] for row in reference.values.tolist()],
                "levels": list(reference.levels),
                "seed": reference.seed,
            },
        }

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> CardCalibration:
        """Of an entry of ``PriorCard.calibration``.

        Raises:
            CheckpointError: an entry of another version, or one that is damaged.
        """
        if entry.get("version") != VERSION:
            raise CheckpointError(
                f"the card's calibration is of version {entry.get('version')}, this toolkit reads "
                f"{VERSION}; measure it again with python -m phantoms.benchmarks.conformal"
            )
        try:
            fit, sure, reference = (
                entry[name] for name in ("conformal", "guaranteed", "reference")
            )
            return cls(
                Setting(**entry["setting"]),
                str(entry["source"]),
                None if fit is None else Conformal(**fit),
                None if sure is None else Conformal(**sure),
                None
                if reference is None
                else Reference(
                    torch.tensor(reference["values"], dtype=torch.float64),
                    tuple(reference["levels"]),
                    int(reference["seed"]),
                ),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the card's calibration is damaged ({type(error).__name__}: {error}); measure it "
                "again with python -m phantoms.benchmarks.conformal"
            ) from error

    @classmethod
    def find(cls, card: PriorCard, setting: Setting) -> tuple[CardCalibration | None, str]:
        """The entry of a card for a setting, or why there is none.

        Entries of another version are passed over.
        """
        entries = [cls.from_dict(e) for e in card.calibration if e.get("version") == VERSION]
        if not entries:
            return None, f"the card of '{card.name}' holds no calibration"
        differing = [(entry.setting.differences(setting), entry) for entry in entries]
        reasons, nearest = min(differing, key=lambda pair: len(pair[0]))
        if reasons:
            return None, f"calibrated for another setting ({', '.join(reasons)})"
        return nearest, ""


def _rms(values: Tensor, seen: Tensor) -> float:
    """Root mean square of the data that are measured, slice by slice, which bounds the memory."""
    squares = (one[seen].abs().double().square_().mean() for one in values)
    return math.sqrt(float(torch.stack(list(squares)).mean()))


def _kind(measurement: Measurement) -> str:
    operator = measurement.operator
    if isinstance(operator, RayTransform):
        return f"{operator.geometry.kind} CT"
    return f"{type(operator).__name__} {measurement.modality}"


def _pattern(operator: LinearOperator) -> tuple[str, float]:
    r"""``Setting.pattern`` and ``Setting.radius`` of the measured set M of lines or points.

    .. math:: r = \Big(\frac1{|M|}\sum_{k \in M} |k|^2 \Big/ \frac1N\sum_k |k|^2\Big)^{1/2}

    over frequencies k in cycles a pixel; of lines, across them alone.
    """
    if not isinstance(operator, CartesianMRI | Sense) or bool(operator.mask.all()):
        return "", 1.0
    mask, along = operator.mask, "points"
    for axis in range(mask.ndim):
        lines = mask.movedim(axis, -1).flatten(0, -2)
        if bool((lines == lines[0]).all()):
            mask = lines[0]
            steps = mask.nonzero()[:, 0].diff().double()
            steps = steps[steps > 1]  # 1 is the fully sampled centre's
            regular = len(steps) > 1 and float(steps.std() / steps.mean()) < IRREGULAR
            along = "regular lines" if regular else "lines"
            break
    axes = [(torch.arange(n, dtype=torch.float64) - n // 2) / n for n in mask.shape]
    square = torch.stack([k.square() for k in torch.meshgrid(*axes, indexing="ij")]).sum(dim=0)
    return along, float((square[mask.cpu()].mean() / square.mean()).sqrt())


def _arc(operator: LinearOperator) -> float:
    """Angle spanned by the views, one step beyond the last included, degrees."""
    angles = getattr(getattr(operator, "geometry", None), "angles", ())
    if len(angles) < 2:
        return 0.0
    turns = sorted(angles)
    return math.degrees((turns[-1] - turns[0]) * len(turns) / (len(turns) - 1))
