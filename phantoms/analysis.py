r"""Physical image quality: sharpness, noise texture, detectability, and right CT numbers.

Sharpness is the modulation transfer function,

.. math:: \mathrm{MTF}(f) = |\mathcal F\,\mathrm{LSF}|(f)\,/\,|\mathcal F\,\mathrm{LSF}|(0),

noise the noise power spectrum of N regions of H x W pixels,

.. math:: \mathrm{NPS}(k) = \frac{\Delta_x\Delta_y}{HW}\,
    \frac{1}{N}\sum_i |\mathcal F(x_i - \bar x)|^2, \qquad \int \mathrm{NPS}\,dk = \sigma^2.

Iterative and learned reconstructions are neither linear nor stationary: state contrast, dose and
place with every curve, as TG-233 asks.

References:
    Samei et al., "Performance evaluation of computed tomography systems: summary of AAPM Task
    Group 233", Med. Phys. 46 (2019): task transfer function, NPS, detectability.
    Richard et al., Med. Phys. 39 (2012) 4115: the transfer function from a circular edge.
    ISO 12233 (2017): the slanted edge.  ICRU Report 54 (1996): NPS and observers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from inverse.errors import GeometryError, InputError, NumericalError
from phantoms.published import ACR_INSERTS, Insert
from phantoms.shapes import _jinc

__all__ = [
    "InsertReading",
    "NoisePower",
    "Transfer",
    "disc_mtf",
    "edge_mtf",
    "hu_accuracy",
    "nps",
    "npw_detectability",
    "wire_mtf",
]

Float = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Transfer:
    """A modulation transfer function.

    Attributes:
        frequency: cycles per mm, from 0.
        mtf: 1 at frequency 0.
    """

    frequency: Float
    mtf: Float

    def at(self, level: float) -> float:
        """First frequency at which the function falls to `level`, cycles per mm; inf if never."""
        below = np.flatnonzero(self.mtf <= level)
        if not below.size:
            return math.inf
        j = int(below[0])
        if j == 0:
            return 0.0
        share = (self.mtf[j - 1] - level) / (self.mtf[j - 1] - self.mtf[j])
        return float(self.frequency[j - 1] + share * (self.frequency[j] - self.frequency[j - 1]))


def edge_mtf(image: NDArray[np.floating], pixel_mm: float, oversample: int = 4) -> Transfer:
    """MTF across a straight, slightly slanted edge.

    The edge is found by a line through the centroids of the rows' derivatives; every pixel's
    distance from it gives a finely sampled edge profile, whose derivative is transformed. The
    averaging over bins and the difference quotient are undone in the transform.

    Args:
        image: (H, W) region with one edge nearly along the columns, 2 to 10 degrees from them.
        pixel_mm: size of the square pixels.
        oversample: bins a pixel.

    Raises:
        GeometryError: a region below 16 x 16 pixels.
        InputError: values that are not finite, no edge, or one that is not slanted.

    Source: ISO 12233, annex; the pixel's own blur is part of the result.
    """
    region = _region(image, 16)
    slope = np.abs(np.diff(region, axis=1))
    if not slope.sum() > 0:
        raise InputError("the region holds no edge; give one with an edge along the columns")
    middle = np.arange(region.shape[1] - 1) + 0.5
    # Weights that fall off from the strongest step keep noise away from the centroid.
    at = (slope**2 @ middle) / np.maximum((slope**2).sum(axis=1), 1e-300)
    rows = np.arange(region.shape[0])
    tilt, start = np.polyfit(rows, at, 1)
    if not 0.01 < abs(tilt) < 0.5 or abs(tilt) * region.shape[0] < 1:
        raise InputError(
            f"the edge runs {math.degrees(math.atan(tilt)):.2f} degrees from the columns; a "
            "slanted edge of 2 to 10 degrees over several columns is needed"
        )
    distance = (np.arange(region.shape[1]) - (start + tilt * rows)[:, None]) / math.hypot(1, tilt)
    reach = float(min(-distance[:, 0].max(), distance[:, -1].min()))
    return _from_profile(distance, region, reach, pixel_mm, oversample)


def disc_mtf(
    image: NDArray[np.floating],
    pixel_mm: float,
    centre: tuple[float, float],
    radius_mm: float,
    oversample: int = 4,
) -> Transfer:
    """MTF from the edge of a disc, as of a rod in a CT phantom: the task transfer function.

    Args:
        image: (H, W) image, or (N, H, W) to average over.
        pixel_mm: size of the square pixels.
        centre: (x, y) of the disc from the image's centre, mm.
        radius_mm: its radius; the surroundings out to 1.8 radii must be uniform.
        oversample: bins a pixel.

    Raises:
        GeometryError: a disc below 5 pixels of radius, or whose surroundings leave the image.
        InputError: values that are not finite, or no contrast.

    Source: Richard et al. (2012); the curvature of the edge is neglected.
    """
    array = np.asarray(image, np.float64)
    mean = array.mean(axis=0) if array.ndim == 3 else array
    whole = _region(mean, 16)
    y = (np.arange(whole.shape[0]) - (whole.shape[0] - 1) / 2) * pixel_mm - centre[1]
    x = (np.arange(whole.shape[1]) - (whole.shape[1] - 1) / 2) * pixel_mm - centre[0]
    reach = 0.8 * radius_mm
    room = min(-y[0], y[-1], -x[0], x[-1])
    if radius_mm < 5 * pixel_mm or room < radius_mm + reach:
        raise GeometryError(
            f"the disc of {radius_mm:g} mm radius needs 5 pixels of radius and a margin of "
            f"{reach:g} mm, got pixels of {pixel_mm:g} mm and {room - radius_mm:g} mm of margin"
        )
    distance = (np.hypot(x[None, :], y[:, None]) - radius_mm) / pixel_mm
    near = np.abs(distance) <= reach / pixel_mm
    return _from_profile(distance[near], whole[near], reach / pixel_mm, pixel_mm, oversample)


def wire_mtf(image: NDArray[np.floating], pixel_mm: float, width_mm: float = 0.0) -> Transfer:
    """MTF from a thin wire's or bead's image: the radial mean of its transform.

    Args:
        image: (H, W) region around the wire, large enough to hold its tails; the background is
            the median of its rim.
        pixel_mm: size of the square pixels.
        width_mm: diameter of the wire, whose own transform is divided out; 0 for a point.

    Raises:
        GeometryError: a region below 16 x 16 pixels.
        InputError: values that are not finite, or no wire.
    """
    region = _region(image, 16)
    rim = np.concatenate([region[0], region[-1], region[:, 0], region[:, -1]])
    spectrum = np.abs(np.fft.fft2(region - np.median(rim)))
    if not spectrum[0, 0] > 1e-12 * np.abs(region).max():
        raise InputError("the region holds no wire above its background; give one around a wire")
    k = _radius(region.shape, pixel_mm)
    frequency, value = _radial(k, spectrum / spectrum[0, 0], 0.5 / pixel_mm, min(region.shape))
    if width_mm > 0:
        own = np.abs(_jinc(np.pi * frequency * width_mm))
        good = own > 0.2
        frequency, value = frequency[good], value[good] / own[good]
    return Transfer(frequency, value)


@dataclass(frozen=True, eq=False)
class NoisePower:
    """A noise power spectrum.

    Attributes:
        spectrum: (H, W) in value squared times mm^2, zero frequency at (H//2, W//2).
        pixel_mm: (row, column) pixel size.
        frequency: cycles per mm of the radial mean.
        radial: radial mean of the spectrum.
        variance: of a pixel, the integral of the spectrum.
    """

    spectrum: Float
    pixel_mm: tuple[float, float]
    frequency: Float
    radial: Float
    variance: float

    @property
    def mean_frequency(self) -> float:
        """Centroid of the radial spectrum, cycles per mm: lower is coarser texture."""
        return float(self.frequency @ self.radial / self.radial.sum())


def nps(
    regions: NDArray[np.floating],
    pixel_mm: float | tuple[float, float],
    *,
    detrend: bool = False,
) -> NoisePower:
    """Noise power spectrum of regions of pure noise about a common mean.

    The mean image of all regions is subtracted, which takes away the object and what is the same
    in all scans, and the variance that it takes with it, 1/N, is given back.

    Args:
        regions: (N, H, W) the same region in N >= 2 scans of equal statistics; or with
            `detrend` N >= 1 regions of a uniform object.
        pixel_mm: pixel size, or (row, column) sizes.
        detrend: subtract a plane fitted to each region instead of the mean image; low frequencies
            then lose power.

    Raises:
        GeometryError: an array that is not a stack of at least 8 x 8 pixels.
        InputError: too few regions, or values that are not finite.

    Source: Samei et al. (2019), section 3.3; Siewerdsen, Cunningham and Jaffray, Med. Phys. 29
    (2002) for the mean image.
    """
    x = np.asarray(regions, np.float64)
    if x.ndim != 3 or min(x.shape[1:]) < 8:
        raise GeometryError(f"nps needs regions (N, H, W) of 8 x 8 pixels or more, got {x.shape}")
    if not np.isfinite(x).all() or len(x) < (1 if detrend else 2):
        raise InputError(
            f"nps needs finite values and two regions (one with detrend), got {len(x)} regions"
        )
    py, px = (pixel_mm, pixel_mm) if isinstance(pixel_mm, int | float) else pixel_mm
    n, h, w = x.shape
    if detrend:
        v, u = np.meshgrid(np.linspace(-1, 1, h), np.linspace(-1, 1, w), indexing="ij")
        basis = np.linalg.qr(np.stack([np.ones(h * w), v.ravel(), u.ravel()], axis=1))[0]
        flat = x.reshape(n, -1)
        noise, share = (flat - (flat @ basis) @ basis.T).reshape(x.shape), 1.0
    else:
        noise, share = x - x.mean(axis=0), n / (n - 1)
    power = (np.abs(np.fft.fft2(noise)) ** 2).mean(axis=0) * (share * px * py / (h * w))
    k = np.hypot(np.fft.fftfreq(h, py)[:, None], np.fft.fftfreq(w, px)[None, :])
    frequency, radial = _radial(k, power, 0.5 / max(px, py), min(h, w))
    variance = float(power.sum() / (h * py * w * px))
    return NoisePower(np.fft.fftshift(power), (py, px), frequency, radial, variance)


def npw_detectability(signal: NDArray[np.floating], noise: NoisePower) -> float:
    r"""Detectability of a known signal for the non-prewhitening observer.

    .. math:: d'^2 = \frac{\big(\int |S|^2\,dk\big)^2}{\int |S|^2\,\mathrm{NPS}\,dk}

    In white noise this is the ideal observer's :math:`\|s\|/\sigma`. Learned observers of images
    are in :mod:`inverse.trust`.

    Args:
        signal: (H, W) mean image with the lesion less that without, of the spectrum's shape:
            already blurred by the system.
        noise: spectrum of the noise.

    Raises:
        GeometryError: another shape.
        NumericalError: no noise where the signal is.

    Source: ICRU Report 54 (1996); Samei et al. (2019), equation (10).
    """
    s = np.asarray(signal, np.float64)
    if s.shape != noise.spectrum.shape:
        raise GeometryError(
            f"the signal must have the spectrum's shape {noise.spectrum.shape}, got {s.shape}"
        )
    py, px = noise.pixel_mm
    h, w = s.shape
    transform = np.abs(np.fft.fftshift(np.fft.fft2(s))) ** 2 * (px * py) ** 2
    cell = 1 / (h * py * w * px)
    bottom = float((transform * noise.spectrum).sum() * cell)
    if not bottom > 0:
        raise NumericalError("the noise has no power where the signal is; give a noisy spectrum")
    return float(transform.sum() * cell / math.sqrt(bottom))


@dataclass(frozen=True)
class InsertReading:
    """CT number of an insert.

    Attributes:
        mean: measured HU.
        std: over the pixels of its region.
        nominal: HU of the phantom.
        error: mean less nominal.
        passes: whether the mean lies within the accreditation's limits.
    """

    mean: float
    std: float
    nominal: float
    error: float
    passes: bool


def hu_accuracy(
    image: NDArray[np.floating],
    pixel_mm: float,
    inserts: Mapping[str, Insert] = ACR_INSERTS,
    share: float = 0.8,
) -> dict[str, InsertReading]:
    """CT numbers of the inserts of an ACR phantom's first module against their limits.

    Args:
        image: (H, W) in HU, the phantom centred and upright.
        pixel_mm: size of the square pixels.
        inserts: where they are.
        share: radius of the region relative to the insert's.

    Raises:
        GeometryError: an insert of which no pixel lies in the image, or a share outside (0, 1].
        InputError: values that are not finite.
    """
    whole = _region(image, 1)
    if not 0 < share <= 1:
        raise GeometryError(f"the share of an insert's radius must be in (0, 1], got {share}")
    y = (np.arange(whole.shape[0]) - (whole.shape[0] - 1) / 2) * pixel_mm
    x = (np.arange(whole.shape[1]) - (whole.shape[1] - 1) / 2) * pixel_mm
    found = {}
    for name, insert in inserts.items():
        inside = np.hypot(x[None, :] - insert.x, y[:, None] - insert.y) <= share * insert.radius
        reach = insert.radius * share
        if not inside.any() or abs(insert.x) + reach > x[-1] or abs(insert.y) + reach > y[-1]:
            raise GeometryError(
                f"the insert {name} at ({insert.x:.0f}, {insert.y:.0f}) mm does not lie in the "
                f"image, which reaches {x[-1]:.0f} x {y[-1]:.0f} mm from its centre"
            )
        values = whole[inside]
        mean = float(values.mean())
        found[name] = InsertReading(
            mean,
            float(values.std()),
            insert.hu,
            mean - insert.hu,
            insert.low <= mean <= insert.high,
        )
    return found


def _region(image: NDArray[np.floating], least: int) -> Float:
    array = np.asarray(image, np.float64)
    if array.ndim != 2 or min(array.shape) < least:
        raise GeometryError(
            f"the region must be an image of at least {least} x {least} pixels, got {array.shape}"
        )
    if not np.isfinite(array).all():
        raise InputError("the image holds NaN or infinite values; replace them first")
    return array


def _from_profile(
    distance: Float, value: Float, reach: float, pixel_mm: float, oversample: int
) -> Transfer:
    """MTF from values at distances from an edge, in pixels, symmetric out to `reach`."""
    half = int(reach * oversample)
    if half < 4 * oversample:
        raise GeometryError(
            f"the edge profile reaches {reach:.1f} pixels, but needs 4; give a larger region"
        )
    index = np.rint(distance.reshape(-1) * oversample).astype(np.int64) + half
    within = (index >= 0) & (index <= 2 * half)
    count = np.bincount(index[within], minlength=2 * half + 1)
    total = np.bincount(index[within], value.reshape(-1)[within], minlength=2 * half + 1)
    filled = count > 0
    bins = np.arange(2 * half + 1)
    profile = np.interp(bins, bins[filled], total[filled] / count[filled])
    lsf = np.gradient(profile)
    contrast = abs(profile[-half // 4 :].mean() - profile[: half // 4].mean())
    if not contrast > 1e-9 * max(np.abs(profile).max(), 1e-300):
        raise InputError("the profile across the edge has no contrast; look at place and radius")
    lsf *= np.hanning(lsf.size) ** 0.25  # noise far from the edge
    spectrum = np.abs(np.fft.rfft(lsf, 8 * lsf.size))
    f = np.fft.rfftfreq(8 * lsf.size)  # cycles per bin
    # Undo the mean over a bin, sinc(f), and the central difference, sin(2 pi f)/(2 pi f).
    spectrum = spectrum / (np.sinc(f) * np.sinc(2 * f).clip(0.1))
    keep = f * oversample <= 0.5 * min(2, oversample / 2)
    frequency = np.asarray(f[keep] * oversample / pixel_mm, np.float64)
    return Transfer(frequency, (spectrum / spectrum[0])[keep])


def _radius(shape: tuple[int, ...], pixel_mm: float) -> Float:
    return np.asarray(
        np.hypot(
            np.fft.fftfreq(shape[0], pixel_mm)[:, None], np.fft.fftfreq(shape[1], pixel_mm)[None]
        )
    )


def _radial(k: Float, value: Float, limit: float, size: int) -> tuple[Float, Float]:
    """Mean over rings of |k| one frequency step wide, up to `limit`; frequencies of the rings."""
    step = 2 * limit / size
    ring = np.rint(k / step).astype(np.int64).reshape(-1)
    rings = size // 2 + 1
    inside = ring < rings
    count = np.bincount(ring[inside], minlength=rings)
    frequency = np.bincount(ring[inside], k.reshape(-1)[inside], minlength=rings)
    total = np.bincount(ring[inside], value.reshape(-1)[inside], minlength=rings)
    return frequency / count, total / count
