r"""Filtered backprojection in physical units: parallel and fan beams, and Feldkamp's cone beams.

All is one sum over views: weight the data, filter along the detector, backproject with the inverse
squared distance from the source,

.. math:: f(x) = \sum_k w_k\, W_k(x)^2\; q_k\big(s_k(x)\big), \qquad
    q_k = (p_{\theta_k}\, c\, m_k) * h ,

with angular weights :math:`w_k`, the ray's obliquity c, redundancy weights :math:`m_k` that sum to
one over all measurements of a line, and the ramp h under a window.  The detector position
:math:`s_k(x)` that sees x and the magnification :math:`W_k` depend on the geometry:

==========  =============================  ===================================  ================
geometry    c                              s(x)                                 W(x)
==========  =============================  ===================================  ================
parallel    1                              :math:`x\cdot e`                     1
flat fan    :math:`D/\sqrt{D^2+s^2}`       :math:`D\,(x\cdot e)/(D+t)`          :math:`D/(D+t)`
curved fan  :math:`\cos(s/D)`              :math:`D\arctan(x\cdot e/(D+t))`     :math:`D/L`
cone        :math:`D/\sqrt{D^2+s^2+v^2}`   as flat fan; :math:`v=Dz/(D+t)`      :math:`D/(D+t)`
==========  =============================  ===================================  ================

for a source at distance D, depth :math:`t = x\cdot d` along the central ray and distance L from
source to x.

Source: Kak and Slaney, Principles of Computerized Tomographic Imaging (1988), ch. 3; Feldkamp,
Davis and Kress, J. Opt. Soc. Am. A 1 (1984).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inverse.errors import GeometryError, UnsupportedError
from inverse.operators.geometry import ConeBeam, ConeVectors, FanBeam, ParallelBeam

if TYPE_CHECKING:
    from inverse.operators.ct import RayTransform

__all__ = ["Window", "fbp"]

Window = Literal["ram-lak", "shepp-logan", "cosine", "hamming", "hann"]
Float64 = NDArray[np.float64]


def fbp(
    data: Tensor,
    operator: RayTransform,
    filter: Window = "ram-lak",
    cutoff: float = 1.0,
    *,
    extend: bool = False,
) -> Tensor:
    """Filtered backprojection in 1/mm; for cone beams on a circle, Feldkamp's.

    View angles need not be equidistant, and a gap of parallel views that is not covered is not
    filled.  Fans cover a full turn, or at least a half turn and the fan angle, which Parker's
    weights balance.  A detector that is shifted by more than a bin (half fan) needs a full turn,
    whose other half supplies the missing side.

    Args:
        data: line integrals ``(*b, *operator.out_shape)``.
        operator: the operator that the data belong to.
        filter: window on the ramp; ``"ram-lak"`` is the ramp itself.
        cutoff: frequency at which the window ends, relative to the detector's highest.
        extend: continue truncated projections smoothly to zero beyond the detector, which
            removes most of the bright rim of truncation (not its offset).

    Returns:
        Attenuation ``(*b, *operator.in_shape)`` in 1/mm.

    Raises:
        GeometryError: if the data do not have the operator's shape, or a cutoff outside (0, 1].
        UnsupportedError: another filter, fans of less than a short scan, a half fan of less than
            a full turn, or cone beams with sources anywhere.
    """
    operator._check(data, operator.out_shape, "data")
    if filter not in get_args(Window):
        raise UnsupportedError(
            f"filter {filter!r} is not served; expected one of {', '.join(get_args(Window))}"
        )
    if not 0.0 < cutoff <= 1.0:
        raise GeometryError(f"the filter's cutoff must be above 0 and at most 1, got {cutoff}")
    scan = operator.geometry
    if isinstance(scan, ConeVectors):
        raise UnsupportedError(
            f"filtered backprojection needs sources on a circle, got {scan!r}; use sirt or cgls"
        )
    beam = scan.midplane if isinstance(scan, ConeBeam) else scan
    device = data.device
    batch = data.shape[: data.ndim - len(operator.out_shape)]
    p = data.reshape(-1, *operator.out_shape)

    angular, redundancy = _weights(beam)
    s = beam.positions()
    weight = angular[:, None] * redundancy * _obliquity(beam, s)
    if isinstance(scan, ConeBeam):
        v = _rows(scan)[:, None]
        source = scan.source_mm
        lift = np.sqrt((source**2 + s**2) / (source**2 + s**2 + v**2))
        weight = weight[:, None] * lift
    p = p * torch.from_numpy(weight).to(device, p.dtype)
    p, beam = _completed(p, beam)
    q = _filter(p, beam, filter, cutoff, extend)
    if isinstance(scan, ConeBeam):
        image = _backproject_volume(q, operator, beam)
    else:
        image = _backproject(q, operator, beam)
    return image.reshape(*batch, *operator.in_shape)


def _shifted(beam: ParallelBeam | FanBeam) -> bool:
    """Whether the detector's shift leaves one side of the scan to the opposite views."""
    return abs(beam.offset_mm) > beam.bin_mm


def _completed(p: Tensor, beam: ParallelBeam | FanBeam) -> tuple[Tensor, ParallelBeam | FanBeam]:
    """Weighted data with zeros on the missing side, where filtered data are not zero."""
    if not _shifted(beam):
        return p, beam
    bins = round(2 * abs(beam.offset_mm) / beam.bin_mm)
    left = beam.offset_mm > 0
    shift = bins * beam.bin_mm / 2
    wide = replace(
        beam, bins=beam.bins + bins, offset_mm=beam.offset_mm - (shift if left else -shift)
    )
    return torch.nn.functional.pad(p, (bins, 0) if left else (0, bins)), wide


def _obliquity(beam: ParallelBeam | FanBeam, s: Float64) -> Float64:
    """Cosine of each ray's angle to the central ray."""
    if isinstance(beam, ParallelBeam):
        return np.ones_like(s)
    return np.asarray(np.cos(_fan_angles(beam, s)))


def _fan_angles(beam: FanBeam, s: Float64) -> Float64:
    """Angle of rays to the central ray in rad, from positions at the rotation axis."""
    return np.asarray(s / beam.source_mm if beam.curved else np.arctan2(s, beam.source_mm))


def _rows(scan: ConeBeam) -> Float64:
    """Heights of the detector rows scaled to the rotation axis, mm."""
    z = (np.arange(scan.rows) - (scan.rows - 1) / 2) * scan.row_mm
    return np.asarray(z * scan.pitch_mm / scan.column_mm)


def _weights(beam: ParallelBeam | FanBeam) -> tuple[Float64, Float64]:
    """Quadrature weight of each view in rad, and redundancy weights ``(views, bins)``."""
    s = beam.positions()
    fan = isinstance(beam, FanBeam)
    period = 2 * math.pi if fan else math.pi
    gaps, usual = _gaps(beam, period)
    full, usual_of_turn = _gaps(beam, 2 * math.pi)
    turn = bool(full.max() <= 3 * usual_of_turn)
    shifted = _shifted(beam)
    if isinstance(beam, FanBeam) and not turn:
        if shifted:
            raise UnsupportedError(
                f"filtered backprojection of {beam!r}: a shifted detector needs a full turn; use "
                f"sirt, cgls, tv or a prior"
            )
        return _parker(beam, s, usual)
    gaps[gaps > 3 * usual] = usual  # what no view covers is not filled
    order = np.argsort(np.mod(beam.angles, period), kind="stable")
    angular = np.empty_like(gaps)
    angular[order] = (gaps + np.roll(gaps, 1)) / 2
    share = _half_fan(s, beam) if turn and shifted else np.full_like(s, 0.5)
    # parallel views that coincide after a half turn share its angular weight already
    return angular, np.broadcast_to(share if fan else 2 * share, beam.data_shape)


def _gaps(beam: ParallelBeam | FanBeam, period: float) -> tuple[Float64, float]:
    """Gaps between neighbouring views on the circle, in sorted order, and the usual one."""
    theta = np.sort(np.mod(np.asarray(beam.angles), period), kind="stable")
    gaps = np.diff(theta, append=theta[0] + period)
    # rounding must not tear a repeated view (0 and pi of parallel beams) into a gap
    gaps[gaps < 1e-9] = 0.0
    return gaps, float(np.median(gaps[gaps > 0.0]))


def _half_fan(s: Float64, beam: ParallelBeam | FanBeam) -> Float64:
    r"""Weights :math:`m(s) + m(-s) = 1` that fall smoothly over the doubly measured middle.

    Source: G. Wang, Med. Phys. 29 (2002).
    """
    half = beam.pitch_mm / 2
    overlap = min(s.max() + half, -(s.min() - half))
    if overlap <= 0.0:
        raise UnsupportedError(
            f"filtered backprojection of {beam!r}: no view sees the rotation axis; use sirt, "
            f"cgls, tv or a prior"
        )
    side = 1.0 if beam.offset_mm > 0 else -1.0
    return np.asarray(0.5 + 0.5 * np.sin(np.pi / 2 * np.clip(side * s / overlap, -1.0, 1.0)))


def _parker(beam: FanBeam, s: Float64, step: float) -> tuple[Float64, Float64]:
    r"""Weights of a short scan: smooth, and 1 in sum over the two views of a line.

    With the arc :math:`\pi + 2\delta` and the view :math:`\beta` from its start, the line of
    (:math:`\beta, \gamma`) is seen again from :math:`\beta + \pi - 2\gamma` at :math:`-\gamma`.

    Source: D. L. Parker, Med. Phys. 9 (1982); M. D. Silver, Med. Phys. 27 (2000) for longer arcs.
    """
    theta = np.asarray(beam.angles)
    order = np.argsort(theta, kind="stable")
    gaps = np.diff(theta[order])
    arc = float(theta.max() - theta.min()) + step
    if gaps.size == 0 or gaps.max() > 3 * step or arc < beam.short_arc - 0.5 * step:
        raise UnsupportedError(
            f"filtered backprojection of {beam!r}: its views must cover a short scan of "
            f"{math.degrees(beam.short_arc):.4g} deg or a full turn without gaps; use sirt, cgls, "
            f"tv or a prior"
        )
    angular = np.empty_like(theta)
    ends = np.concatenate([[step], gaps, [step]])
    angular[order] = (ends[1:] + ends[:-1]) / 2
    beta = (theta - theta.min() + step / 2)[:, None]
    gamma = _fan_angles(beam, s)
    delta = max((arc - math.pi) / 2, beam.fan_angle)
    tiny = 1e-9
    rise = np.clip(beta / (2 * np.maximum(delta + gamma, tiny)), 0.0, 1.0)
    fall = np.clip((math.pi + 2 * delta - beta) / (2 * np.maximum(delta - gamma, tiny)), 0.0, 1.0)
    weight = np.sin(np.pi / 2 * rise) ** 2 * np.sin(np.pi / 2 * fall) ** 2
    return angular, weight


def _filter(
    p: Tensor, beam: ParallelBeam | FanBeam, window: Window, cutoff: float, extend: bool
) -> Tensor:
    """Convolve ``p`` along its last axis with the windowed band-limited ramp.

    Sampling the ramp in space keeps its mean right (Kak and Slaney eq. 3.61); on a curved detector
    the ramp's distance is the chord D sin(s/D).
    """
    bins, pitch = p.shape[-1], beam.pitch_mm
    size = 1 << ((4 if extend else 2) * bins - 1).bit_length()
    if extend:
        tail = torch.cos(torch.linspace(0.0, math.pi / 2, bins + 2, device=p.device)[1:-1]) ** 2
        left, right = tail.flip(0) * p[..., :1], tail * p[..., -1:]
        p = torch.cat([left, p, right], dim=-1)
    n = torch.fft.fftfreq(size, 1.0 / size, dtype=torch.float64, device=p.device).round()
    distance = n * pitch
    if isinstance(beam, FanBeam) and beam.curved:
        source = beam.source_mm
        # entries beyond the detector's length meet no datum
        distance = source * torch.sin((distance / source).clamp(-math.pi / 2, math.pi / 2))
    kernel = torch.where(n.remainder(2) == 1, -1.0 / (math.pi * distance) ** 2, 0.0)
    kernel[0] = 1.0 / (4.0 * pitch**2)
    response = pitch * torch.fft.rfft(kernel).real
    f = torch.arange(size // 2 + 1, dtype=torch.float64, device=p.device) / (size / 2 * cutoff)
    shape = {
        "ram-lak": torch.ones_like(f),
        "shepp-logan": torch.sinc(f / 2),
        "cosine": torch.cos(math.pi / 2 * f),
        "hamming": 0.54 + 0.46 * torch.cos(math.pi * f),
        "hann": 0.5 + 0.5 * torch.cos(math.pi * f),
    }[window]
    response = torch.where(f <= 1.0, response * shape, 0.0)
    q = torch.fft.irfft(torch.fft.rfft(p, n=size) * response.to(p.dtype), n=size)
    return cast(Tensor, q[..., bins : 2 * bins] if extend else q[..., :bins])


def _grid(operator: RayTransform, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pixel coordinates x ``(W,)`` and y ``(H, 1)`` in mm, float64."""
    h, w = operator.in_shape[-2:]
    x, y = (
        (torch.arange(n, device=device, dtype=torch.float64) - (n - 1) / 2) * operator.pixel_mm
        for n in (w, h)
    )
    return x, y[:, None]


def _seen_at(
    beam: ParallelBeam | FanBeam, theta: float, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Detector position s that sees each pixel of a view, and its magnification W."""
    c, sn = math.cos(theta), math.sin(theta)
    across, depth = x * c + y * sn, y * c - x * sn
    if isinstance(beam, ParallelBeam):
        return across, torch.ones_like(across)
    source = beam.source_mm
    if beam.curved:
        s = source * torch.atan2(across, source + depth)
        return s, source / torch.hypot(across, source + depth)
    scale = source / (source + depth)
    return across * scale, scale


def _between(position: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Index below each position on a line of ``count`` bins with a zero bin at each end."""
    index = (position + 1).clamp(0.0, count + 1.0)
    low = index.floor().clamp_(max=float(count))
    return low.to(torch.int64), index - low


def _backproject(q: Tensor, operator: RayTransform, beam: ParallelBeam | FanBeam) -> Tensor:
    """``(b, views, bins)`` to ``(b, H, W)``."""
    x, y = _grid(operator, q.device)
    first = float(beam.positions()[0])
    # (views, bins + 2, b): a zero bin at each end takes the rays that miss the detector
    q = torch.nn.functional.pad(q.permute(1, 2, 0), (0, 0, 1, 1)).contiguous()
    image = torch.zeros(math.prod(operator.in_shape), q.shape[-1], dtype=q.dtype, device=q.device)
    for k, theta in enumerate(beam.angles):
        s, scale = _seen_at(beam, theta, x, y)
        low, part = _between(((s - first) / beam.pitch_mm).ravel(), beam.bins)
        value = torch.lerp(q[k, low], q[k, low + 1], part.to(q.dtype)[:, None])
        image += value * scale.square().ravel().to(q.dtype)[:, None]
    return image.T.reshape(-1, *operator.in_shape)


def _backproject_volume(q: Tensor, operator: RayTransform, beam: ParallelBeam | FanBeam) -> Tensor:
    """``(b, views, rows, columns)`` to ``(b, Z, Y, X)``, bilinear on the panel."""
    scan = cast(ConeBeam, operator.geometry)
    heights = _rows(scan)
    x, y = _grid(operator, q.device)
    slices = operator.in_shape[0]
    z = (torch.arange(slices, device=q.device) - (slices - 1) / 2) * operator.spacing[0]
    first, bottom = float(beam.positions()[0]), float(heights[0])
    row_pitch = scan.row_mm * scan.pitch_mm / scan.column_mm
    q = torch.nn.functional.pad(q, (1, 1, 1, 1))
    volume = torch.zeros(len(q), *operator.in_shape, dtype=q.dtype, device=q.device)
    for k, theta in enumerate(beam.angles):
        s, scale = _seen_at(beam, theta, x, y)
        column, a = _between((s - first) / beam.pitch_mm, beam.bins)
        row, b = _between((z[:, None, None] * scale - bottom) / row_pitch, scan.rows)
        panel, a, b = q[:, k], a.to(q.dtype), b.to(q.dtype)
        below = torch.lerp(panel[:, row, column], panel[:, row, column + 1], a)
        above = torch.lerp(panel[:, row + 1, column], panel[:, row + 1, column + 1], a)
        volume += torch.lerp(below, above, b) * scale.square().to(q.dtype)
    return volume
