r"""Coupling across slices: how slice-wise priors make volumes without steps between slices.

A prior of slices knows nothing of the axis across them, so that slices which are sampled one by
one flicker along z.  Three couplings act at the three places of the sampling loop:

==========  ====================================================  ========================
``noise``   the noise, most of which neighbours share             :class:`CorrelatedNoise`
``tv``      the denoised estimate, by total variation along z     :class:`ThroughPlaneTV`
``planes``  the denoiser, of axial, coronal and sagittal images   :class:`PlanesInTurn`
==========  ====================================================  ========================

The last two need neighbours in one batch, whose first dimension then is z.  A series is cut into
:func:`windows` of neighbouring slices with a halo on each side, so that memory does not grow with
the series and results do not depend on the batch size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from inverse.errors import GeometryError, InputError
from inverse.priors.denoiser import Denoiser
from inverse.sampling import Noise

__all__ = [
    "COUPLINGS",
    "CorrelatedNoise",
    "Coupling",
    "CouplingKind",
    "InChunks",
    "PlanesInTurn",
    "SliceBySlice",
    "ThroughPlaneTV",
    "Window",
    "check_positions",
    "windows",
]

CouplingKind = Literal["none", "noise", "tv", "planes"]
COUPLINGS: tuple[CouplingKind, ...] = get_args(CouplingKind)

_ANCHOR = 0x5A  # keeps the seeds of anchors apart from those of slices
_THRESHOLD = 0.1  # shrinkage of ADMM, prior units: any serves, this one takes few sweeps


@dataclass(frozen=True)
class Coupling:
    """How slices are coupled.

    Attributes:
        kind: one of :data:`COUPLINGS`.
        length_mm: ``noise``: distance over which noise becomes independent.
        gradient: ``tv``: expected absolute gradient of images along z, prior units a mm.
        sweeps: ``tv``: ADMM sweeps a call; their state is kept from call to call.
        window: ``tv``: slices that a window contributes to the result.
        halo: ``tv``: further slices on each side that it is computed with.
        planes: ``planes``: priors of coronal and sagittal images, at the pixel size of these.

    Raises:
        InputError: an unknown kind, or a value out of range.
    """

    kind: CouplingKind = "none"
    length_mm: float = 10.0
    gradient: float = 0.05
    sweeps: int = 8
    window: int = 16
    halo: int = 4
    planes: Mapping[str, Denoiser] | None = None

    def __post_init__(self) -> None:
        if self.kind not in COUPLINGS:
            raise InputError(f"no coupling '{self.kind}'; there are {', '.join(COUPLINGS)}")
        if not (self.length_mm > 0 and self.gradient > 0):
            raise InputError(
                "a coupling's length_mm and gradient must be positive, got "
                f"{self.length_mm} and {self.gradient}"
            )
        if self.sweeps < 1 or self.window < 1 or self.halo < 0:
            raise InputError(
                "a coupling needs at least 1 sweep, a window of at least 1 slice and a halo of "
                f"at least 0, got {self.sweeps}, {self.window} and {self.halo}"
            )
        if self.kind == "planes" and not self.planes:
            raise InputError(
                "coupling 'planes' needs priors of coronal or sagittal images, since a prior of "
                "axial ones does not know these; give some, or choose 'tv' or 'noise'"
            )
        if not set(self.planes or ()) <= {"coronal", "sagittal"}:
            raise InputError(
                f"further planes are coronal and sagittal, got {', '.join(self.planes or ())}"
            )

    @property
    def windowed(self) -> bool:
        """Whether neighbours must be computed together."""
        return self.kind in ("tv", "planes")

    def settings(self) -> dict[str, Any]:
        """What applies of it, plain JSON values."""
        used: dict[CouplingKind, tuple[str, ...]] = {
            "noise": ("length_mm",),
            "tv": ("gradient", "sweeps", "window", "halo"),
        }
        found: dict[str, Any] = {"coupling": self.kind}
        found |= {name: getattr(self, name) for name in used.get(self.kind, ())}
        if self.kind == "planes":
            found["planes"] = ["axial", *sorted(self.planes or ())]
        return found

    def cut(self, count: int) -> list[Window]:
        """Windows of a series: whole for planes, whose images reach through all of it."""
        if self.kind == "planes":
            return windows(count, count, 0)
        return windows(count, self.window, self.halo)

    def around(self, prior: Denoiser, z_mm: Sequence[float]) -> Denoiser:
        """The prior of a window at positions ``z_mm``; a new one for every window."""
        if self.kind == "tv":
            return ThroughPlaneTV(prior, z_mm, gradient=self.gradient, sweeps=self.sweeps)
        if self.kind == "planes":
            return PlanesInTurn({"axial": prior, **(self.planes or {})})
        return prior


# --- windows -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """Slices that are computed together, and those of them that are kept."""

    slices: range
    kept: range


def windows(count: int, size: int, halo: int) -> list[Window]:
    """Windows of ``size`` slices that cover ``count``, with at most ``halo`` more on each side."""
    return [
        Window(
            range(max(first - halo, 0), min(first + size + halo, count)),
            range(first, min(first + size, count)),
        )
        for first in range(0, count, size)
    ]


def check_positions(z_mm: Sequence[float]) -> None:
    """Refuse positions along z that a coupling cannot use.

    Raises:
        InputError: positions that are not finite, or neither ascend nor descend.
    """
    steps = [b - a for a, b in zip(z_mm, z_mm[1:], strict=False)]
    if not all(map(math.isfinite, z_mm)) or not (
        all(s > 0 for s in steps) or all(s < 0 for s in steps)
    ):
        raise InputError(
            "coupling slices needs positions in mm that all ascend or all descend; sort the "
            "slices by position, without repeats, or choose coupling 'none'"
        )


# --- noise -------------------------------------------------------------------------------------


class CorrelatedNoise(Noise):
    r"""Noise that turns slowly from slice to slice, white in each.

    Independent anchors :math:`e_j` stand every ``length_mm``; at :math:`z = (j + f)\,L`

    .. math:: \varepsilon(z) = \cos(\tfrac{\pi}{2}f)\,e_j + \sin(\tfrac{\pi}{2}f)\,e_{j+1},

    the spherical interpolation of two orthogonal noises.  :math:`\varepsilon(z)` is exactly
    :math:`N(0, I)`, so that every slice is sampled from the same law as alone, and two slices of
    one interval at distance d have correlation :math:`\cos(\pi d / 2L)`.  It depends on the
    position only: neither on the batch nor on which slices are there.

    Source: Du et al., Inter-slice consistent stochasticity (ICLR 2026), whose anchors are the
    ends of the volume.

    Args:
        seed: seed of all.
        places: position in mm and number of each sample of the batch.
        shape: shape of one sample.
        device: where draws are returned.
        length_mm: distance of anchors.
    """

    def __init__(
        self,
        seed: int,
        places: Sequence[tuple[float, int]],
        shape: Sequence[int],
        device: torch.device | str = "cpu",
        *,
        length_mm: float = 10.0,
    ) -> None:
        cells = [(math.floor(z / length_mm), k) for z, k in places]
        anchors = sorted({(j + i, k) for j, k in cells for i in (0, 1)})
        super().__init__([(seed, _ANCHOR, j, k) for j, k in anchors], shape, device)
        row = {anchor: i for i, anchor in enumerate(anchors)}
        self._ends = torch.tensor([[row[j, k], row[j + 1, k]] for j, k in cells])
        turns = [
            (z / length_mm - j) * math.pi / 2 for (z, _), (j, _) in zip(places, cells, strict=True)
        ]
        self._weights = torch.tensor([[math.cos(a), math.sin(a)] for a in turns])

    def __call__(self, shape: Sequence[int] | None = None) -> Tensor:
        """Standard normal draws ``(samples, *shape)``, correlated between samples."""
        draws = super().__call__(shape)
        ends, weights = self._ends.to(draws.device), self._weights.to(draws.device)
        w = weights.reshape(*weights.shape, *[1] * (draws.ndim - 1))
        return w[:, 0] * draws[ends[:, 0]] + w[:, 1] * draws[ends[:, 1]]


# --- total variation along z -------------------------------------------------------------------


class ThroughPlaneTV(Denoiser):
    r"""The denoised slices of a window, made consistent along z by a proximal step.

    .. math:: \hat x = \arg\min_v\ \tfrac12\|v - D(x_t, t)\|^2
              + r_t^2 \sum_i \frac{|v_{i+1} - v_i|}{g\,h_i}

    is the most probable volume where slices scatter about their denoised images by the prior's
    own error :math:`r_t`, and gradients along z have the law of Laplace with mean absolute value
    ``gradient`` :math:`= g`; :math:`h_i` is the distance of two slices, so that unequal ones need
    no other treatment.  By ADMM on :math:`d = D_z v`, with the penalties
    :math:`R = \mathrm{diag}(r_t^2/(g h_i s))` and a shrinkage of s for all:

    .. math::
       v &\leftarrow (I + D_z^T R D_z)^{-1}\big(D(x_t, t) + D_z^T(R d - p)\big) \\
       d &\leftarrow \mathrm{shrink}(D_z v + R^{-1}p,\ s), \qquad
       p \leftarrow p + R(D_z v - d)

    The first is a product with a small dense matrix.  d and p are kept from call to call, so a
    few sweeps suffice: make a new one for every run.  Data consistency follows in the method that
    is given this denoiser.

    Source: Chung et al., DiffusionMBIR (CVPR 2023), section 3; Chung, Lee, Ye, DDS (ICLR 2024),
    section 4.3, which join it with the data term.

    Args:
        prior: denoiser of slices.
        z_mm: positions of the slices of the batch, monotonic.
        gradient: mean absolute gradient along z, prior units a mm.
        sweeps: ADMM sweeps a call.
    """

    def __init__(
        self, prior: Denoiser, z_mm: Sequence[float], *, gradient: float = 0.05, sweeps: int = 8
    ) -> None:
        super().__init__(prior.sde)
        check_positions(z_mm)
        self.prior, self.sweeps = prior, sweeps
        z = torch.tensor([float(z) for z in z_mm], dtype=torch.float64)
        self.rate = 1 / (gradient * (z[1:] - z[:-1]).abs())  # 1/(g h), a gap
        self._state: tuple[Tensor, Tensor] | None = None  # d, and p over its bound

    def denoise(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """``argmin`` of the class's equation; the first dimension is z.

        Raises:
            GeometryError: another number of slices than positions.
        """
        if len(x_t) != len(self.rate) + 1:
            raise GeometryError(
                f"total variation along z was made for {len(self.rate) + 1} slices, got {len(x_t)}"
            )
        x0 = self.prior.denoise(x_t, t)
        if len(x0) == 1:
            return x0
        r = float(self.prior.error(self.sde.noise_level(t)).max())
        return self.prox(x0, r**2 * self.rate)

    def prox(self, x: Tensor, bound: Tensor) -> Tensor:
        r""":math:`\arg\min_v \tfrac12\|v - x\|^2 + \sum_i b_i |v_{i+1} - v_i|`.

        Args:
            x: ``(n, *shape)``.
            bound: ``b``, ``(n - 1,)``, positive.
        """
        n = len(x)
        penalty = bound / _THRESHOLD
        difference = torch.diff(torch.eye(n, dtype=torch.float64), dim=0)  # D_z
        normal = torch.eye(n, dtype=torch.float64) + difference.T @ (penalty[:, None] * difference)
        inverse = torch.linalg.inv(normal).to(x)
        flat = x.flatten(1)
        weight = penalty.to(x)[:, None]
        if self._state is None:
            self._state = torch.diff(flat, dim=0), torch.zeros_like(flat[1:])
        d, q = self._state
        p = q * bound.to(x)[:, None]
        v = flat
        end = torch.zeros_like(flat[:1])
        for _ in range(self.sweeps):
            v = inverse @ (flat - torch.diff(weight * d - p, dim=0, prepend=end, append=end))
            target = torch.diff(v, dim=0) + p / weight
            clipped = target.clamp(-_THRESHOLD, _THRESHOLD)
            d, p = target - clipped, weight * clipped
        self._state = d, p / bound.to(x)[:, None]
        return v.reshape(x.shape)

    def error(self, noise_level: float | Tensor) -> Tensor:
        """The prior's, which bounds that of the volume."""
        return self.prior.error(noise_level)


# --- planes ------------------------------------------------------------------------------------


class PlanesInTurn(Denoiser):
    r"""Priors of perpendicular planes, one a call: axial, coronal, sagittal, axial, ...

    The density of volumes is taken as a product of those of their sections,
    :math:`p(x) \propto \prod_j p_j(x)^{1/J}`, and its score is followed a factor at a time.  A
    call of a volume ``(n, h, w)`` costs n, h or w network calls.

    Source: Lee et al., Improving 3D imaging with pre-trained perpendicular 2D diffusion models
    (ICCV 2023), algorithm 1.

    Args:
        priors: denoiser of each plane; the first counts for :meth:`error` and the SDE.
    """

    def __init__(self, priors: Mapping[str, Denoiser]) -> None:
        super().__init__(next(iter(priors.values())).sde)
        self.priors, self._calls = dict(priors), 0

    def denoise(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """By the plane whose turn it is; ``(n, h, w)``, or ``(n, 2, h, w)`` for complex ones."""
        plane = list(self.priors)[self._calls % len(self.priors)]
        self._calls += 1
        order = _sections(plane, x_t.ndim)
        back = sorted(range(x_t.ndim), key=order.__getitem__)
        sections = x_t.permute(order).contiguous()
        return self.priors[plane].denoise(sections, t).permute(back).contiguous()

    def error(self, noise_level: float | Tensor) -> Tensor:
        """Of the first prior."""
        return next(iter(self.priors.values())).error(noise_level)


def _sections(plane: str, ndim: int) -> tuple[int, ...]:
    """Axes of a volume ``(z, [channel,] y, x)`` with the number of the section first."""
    channel, z, y, x = range(1, ndim - 2), 0, ndim - 2, ndim - 1
    orders = {"axial": (z, y, x), "coronal": (y, z, x), "sagittal": (x, z, y)}
    first, *rest = orders[plane]
    return (first, *channel, *rest)


# --- shapes ------------------------------------------------------------------------------------


class InChunks(Denoiser):
    """The same denoiser, given at most ``limit`` images at a time.

    Args:
        inner: the denoiser.
        limit: most images a call; may be changed at any time.
    """

    def __init__(self, inner: Denoiser, limit: int) -> None:
        super().__init__(inner.sde)
        self.inner, self.limit = inner, limit

    def denoise(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """That of ``inner``."""
        if len(x_t) <= self.limit:
            return self.inner.denoise(x_t, t)
        several = isinstance(t, Tensor) and t.ndim > 0
        times = t.split(self.limit) if isinstance(t, Tensor) and several else None
        parts = x_t.split(self.limit)
        return torch.cat(
            [
                self.inner.denoise(part, t if times is None else times[i])
                for i, part in enumerate(parts)
            ]
        )

    def error(self, noise_level: float | Tensor) -> Tensor:
        """That of ``inner``."""
        return self.inner.error(noise_level)


class SliceBySlice(Denoiser):
    """A prior of slices for volumes ``(b, z, *slice)``: each volume is a batch of slices.

    Args:
        inner: denoiser of slices, coupled or not.
    """

    def __init__(self, inner: Denoiser) -> None:
        super().__init__(inner.sde)
        self.inner = inner

    def denoise(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """Volumes one after the other, so that a coupling sees one at a time."""
        times = t.expand(len(x_t)) if isinstance(t, Tensor) else [t] * len(x_t)
        return torch.stack([self.inner.denoise(x, s) for x, s in zip(x_t, times, strict=True)])

    def error(self, noise_level: float | Tensor) -> Tensor:
        """That of ``inner``."""
        return self.inner.error(noise_level)
