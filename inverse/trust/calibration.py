r"""Do samples of a posterior spread as they should: tests over many simulated problems.

Draw a truth from the prior, data from the truth, and L samples of the posterior of the data: if
the sampler is right, truth and samples are L + 1 draws of one law.  Then the truth's rank among
the samples is uniform (:func:`ranks`, for any numbers taken of the images), intervals hold it as
often as they say (:func:`coverage`), and so does every ball about a point that the data choose
(:func:`tarp`), which tests all pixels at once.

:func:`sfrc` compares a reconstruction with its truth instead, patch by patch: the share of patches
whose fine structure is not that of the truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from inverse.errors import GeometryError, InputError

__all__ = [
    "Coverage",
    "Ranks",
    "Sfrc",
    "Tarp",
    "coverage",
    "fourier_ring_correlation",
    "ranks",
    "sfrc",
    "tarp",
]

LEAST_A_BIN = 5
"""Expected count of a bin below which the chi-square law does not hold."""


@dataclass(frozen=True)
class Ranks:
    """Ranks of truths among samples, and the test that they are uniform.

    Attributes:
        ranks: ``(n, q)``, integers from 0 to L.
        draws: L.
        counts: ranks by bin, ``(bins, q)``.
        p_each: p-value of each of the q numbers, ``(q,)``.
    """

    ranks: Tensor
    draws: int
    counts: Tensor
    p_each: Tensor

    @property
    def p(self) -> float:
        """Bonferroni's ``min(1, q min p)`` over the q numbers."""
        return min(1.0, float(self.p_each.min()) * len(self.p_each))


def ranks(truth: Tensor, samples: Tensor, bins: int = 16) -> Ranks:
    r"""Simulation-based calibration: the rank of the truth among samples is uniform.

    .. math:: r = \#\{l : g(\tilde x_l) < g(x^*)\} \in \{0, \dots, L\}, \qquad
        \sum_b \frac{(c_b - n/B)^2}{n/B} \sim \chi^2_{B-1}

    The caller chooses the numbers g: pixels, the mean of a region, a projection on the range or
    the null space, and the log likelihood, which catches a sampler that returns the prior.

    Args:
        truth: ``(n, q)``: q numbers of each of n truths.
        samples: ``(n, L, q)``: the same of the samples of each.  Independent ones: those of a
            Markov chain must be thinned first.
        bins: B, of equal size: it has to divide L + 1.

    Raises:
        GeometryError: shapes that do not match.
        InputError: values that are not finite, bins that do not divide L + 1, or fewer than five
            simulations a bin.

    Source: Talts, Betancourt, Simpson, Vehtari and Gelman, arXiv:1804.06788 (2018).
    """
    _check(truth, samples)
    n, draws, _ = samples.shape
    if bins < 2 or (draws + 1) % bins:
        raise InputError(f"{bins} bins do not divide the {draws + 1} ranks of {draws} samples")
    if n < LEAST_A_BIN * bins:
        raise InputError(
            f"{bins} bins need at least {LEAST_A_BIN * bins} simulations, got {n}; use fewer bins"
        )
    r = (samples < truth[:, None]).sum(dim=1)
    binned = r * bins // (draws + 1)
    counts = torch.stack([torch.bincount(b, minlength=bins) for b in binned.T], dim=1).cpu()
    p = torch.as_tensor(stats.chisquare(counts.numpy(), axis=0).pvalue)
    return Ranks(r.cpu(), draws, counts, p)


@dataclass(frozen=True)
class Coverage:
    """Share of truths inside central intervals of the samples.

    Attributes:
        levels: nominal shares.
        held: measured shares.
        error: their standard errors over simulations, numbers of one simulation being dependent.
    """

    levels: tuple[float, ...]
    held: tuple[float, ...]
    error: tuple[float, ...]


def coverage(
    truth: Tensor, samples: Tensor, levels: Sequence[float] = (0.5, 0.8, 0.95)
) -> Coverage:
    r"""Coverage of the central intervals between samples.

    The interval of level c leaves out the :math:`(1-c)(L+1)/2` smallest and largest ranks, so
    that it holds the truth with probability c exactly where those are whole numbers.

    Args:
        truth: ``(n, q)``.
        samples: ``(n, L, q)``.
        levels: nominal shares.

    Raises:
        GeometryError: shapes that do not match.
        InputError: values that are not finite, or a level outside (0, 1).

    Source: Cook, Gelman and Rubin, J. Comput. Graph. Stat. 15 (2006).
    """
    _check(truth, samples)
    for level in levels:
        if not 0 < level < 1:
            raise InputError(f"the level of an interval must lie between 0 and 1, got {level}")
    n, draws, _ = samples.shape
    middle = ((samples < truth[:, None]).sum(dim=1) - draws / 2).abs()
    held, error = [], []
    for level in levels:
        inside = (middle < (draws + 1) * level / 2).double().mean(dim=1)
        held.append(float(inside.mean()))
        error.append(float(inside.std() / n**0.5) if n > 1 else float("inf"))
    return Coverage(tuple(levels), tuple(held), tuple(error))


@dataclass(frozen=True)
class Tarp:
    """Test of all unknowns at once.

    Attributes:
        share: share of samples nearer to the reference than the truth, ``(n,)``; uniform.
        levels: nominal expected coverage.
        expected_coverage: share of simulations with ``share`` below the level; equal to it for a
            right sampler, flat in the middle for an overconfident one.
        p: Kolmogorov-Smirnov p-value of uniformity.
    """

    share: Tensor
    levels: Tensor
    expected_coverage: Tensor
    p: float


def tarp(truth: Tensor, samples: Tensor, references: Tensor, seed: int = 0) -> Tarp:
    r"""Tests of accuracy with random points: expected coverage of balls about references.

    .. math:: f = \frac1L \#\{l : \|\tilde x_l - x_r\| < \|x^* - x_r\|\} \sim U(0, 1)

    for references that may depend on the data but not on the truth; those that do depend on them
    also catch a sampler that ignores the data.

    Args:
        truth: ``(n, *shape)``.
        samples: ``(n, L, *shape)``.
        references: ``(n, *shape)``, such as draws of the prior moved by an estimate from the data.
        seed: of the noise of half a step that makes ranks continuous.

    Raises:
        GeometryError: shapes that do not match.
        InputError: values that are not finite.

    Source: Lemos, Coogan, Hezaveh and Perreault-Levasseur, ICML (2023).
    """
    if references.shape != truth.shape:
        raise GeometryError(
            f"tarp needs one reference a truth, {tuple(truth.shape)}, got "
            f"{tuple(references.shape)}"
        )
    _check(truth.flatten(1), samples.flatten(2))
    x, r, s = truth.flatten(1).double(), references.flatten(1).double(), samples.flatten(2)
    n, draws, _ = s.shape
    mine = (x - r).norm(dim=1)
    theirs = (s.double() - r[:, None]).norm(dim=2)
    nearer = (theirs < mine[:, None]).sum(dim=1).cpu()
    generator = torch.Generator().manual_seed(seed)
    share = (nearer + torch.rand(n, generator=generator, dtype=torch.float64)) / (draws + 1)
    levels = torch.linspace(0, 1, 21, dtype=torch.float64)
    held = (share[None, :] <= levels[:, None]).double().mean(dim=1)
    return Tarp(share, levels, held, float(stats.kstest(share.numpy(), "uniform").pvalue))


def fourier_ring_correlation(x: Tensor, truth: Tensor, window: bool = True) -> Tensor:
    r"""Correlation of two images in rings of the Fourier plane.

    .. math:: \mathrm{FRC}(k) = \frac{\mathrm{Re}\sum_{|q|=k} X_q \bar Y_q}
        {\sqrt{\sum_{|q|=k} |X_q|^2\, \sum_{|q|=k} |Y_q|^2}}

    Args:
        x: square images ``(*b, n, n)``, real or complex.
        truth: likewise.
        window: subtract the mean and taper by Hann's window, so that borders do not count.

    Returns:
        ``(*b, n // 2)`` for k of 1 to n // 2 cycles an image, float64; 1 where both are empty, 0
        where one is.

    Raises:
        GeometryError: images that differ in shape or are not square.

    Source: Saxton and Baumeister, J. Microsc. 127 (1982).
    """
    n = x.shape[-1]
    if x.shape != truth.shape or x.ndim < 2 or x.shape[-2] != n or n < 4:
        raise GeometryError(
            f"Fourier ring correlation needs square images of one shape, got {tuple(x.shape)} and "
            f"{tuple(truth.shape)}"
        )
    wide = torch.complex128 if x.is_complex() or truth.is_complex() else torch.float64
    a, b = x.to(wide), truth.to(wide)
    if window:
        taper = torch.hann_window(n, periodic=False, dtype=torch.float64, device=x.device)
        taper = taper[:, None] * taper
        a, b = (taper * (u - u.mean(dim=(-2, -1), keepdim=True)) for u in (a, b))
    fa, fb = torch.fft.fft2(a), torch.fft.fft2(b)
    k = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64, device=x.device)
    ring = torch.hypot(k[:, None], k).round().long()
    kept = (ring >= 1) & (ring <= n // 2)
    label = ring[kept] - 1

    def rings(values: Tensor) -> Tensor:
        total = torch.zeros(*values.shape[:-2], n // 2, dtype=torch.float64, device=values.device)
        return total.index_add(-1, label, values[..., kept])

    cross = rings((fa * fb.conj()).real)
    pa, pb = rings(fa.abs().square()), rings(fb.abs().square())
    floor = torch.finfo(torch.float64).eps ** 2 * (pa.amax(-1) + pb.amax(-1))[..., None]
    empty_a, empty_b = pa <= floor, pb <= floor
    value = cross / (pa * pb).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    value = torch.where(empty_a | empty_b, 0.0, value)
    return torch.where(empty_a & empty_b, 1.0, value)


@dataclass(frozen=True)
class Sfrc:
    """Patches whose structure is not that of the truth.

    Attributes:
        rate: share of patches flagged, among those with structure.
        flagged: boolean, ``(*b, rows, columns)`` of patches.
        cut: frequency at which the correlation first falls below the threshold, share of
            Nyquist's, ``(*b, rows, columns)``; 1 where it never does.
        patches: patches with structure in truth or image.
    """

    rate: float
    flagged: Tensor
    cut: Tensor
    patches: int


def sfrc(
    x: Tensor,
    truth: Tensor,
    *,
    side: int = 32,
    step: int | None = None,
    threshold: float = 0.5,
    frequency: float = 0.25,
    least: float = 0.0,
) -> Sfrc:
    r"""Scanning Fourier ring correlation: share of patches with false fine structure.

    A patch is flagged where :math:`\mathrm{FRC}` first falls below ``threshold`` at or below
    ``frequency``: its structure, coarse enough to be seen, is not that of the truth.  Blur alone
    does not flag, as it leaves the correlation of each ring; structure that was added, moved or
    taken away does, and so does noise.

    Args:
        x: images ``(*b, h, w)``.
        truth: likewise, same unit.
        side: of the patches, pixels.
        step: between patches, default half of ``side``.
        threshold: of the correlation.
        frequency: share of Nyquist's frequency.
        least: standard deviation within a patch, in the images' unit, up to which both count as
            empty: the rate is of the others.

    Raises:
        GeometryError: images of different shapes, or smaller than a patch.
        InputError: values that are not finite, or a threshold or frequency outside (0, 1].

    Source: Kc, Zeng, Soni and Badano, arXiv:2603.04673 (2026).
    """
    if x.shape != truth.shape or x.ndim < 2 or min(x.shape[-2:]) < side:
        raise GeometryError(
            f"sfrc needs images of one shape, at least {side} pixels wide, got {tuple(x.shape)} "
            f"and {tuple(truth.shape)}"
        )
    if not (0 < threshold <= 1 and 0 < frequency <= 1):
        raise InputError(
            f"sfrc needs threshold and frequency between 0 and 1, got {threshold}, {frequency}"
        )
    for u in (x, truth):
        if not bool(torch.isfinite(u.abs()).all()):
            raise InputError("the images hold NaN or infinite values; leave those out")
    hop = max(1, side // 2) if step is None else step
    a, b = (u.unfold(-2, side, hop).unfold(-2, side, hop) for u in (x, truth))
    correlation = fourier_ring_correlation(a, b)
    below = correlation < threshold
    k = torch.arange(1, below.shape[-1] + 1, dtype=torch.float64, device=x.device) * 2 / side
    cut = torch.where(below, k, 1.0).amin(dim=-1)
    spread = torch.maximum(*(u.abs().double().flatten(-2).std(dim=-1) for u in (a, b)))
    structured = spread > least
    flagged = structured & (cut <= frequency) & below.any(dim=-1)
    count = int(structured.sum())
    return Sfrc(float(flagged.sum()) / count if count else 0.0, flagged, cut, count)


def _check(truth: Tensor, samples: Tensor) -> None:
    n, q = truth.shape if truth.ndim == 2 else (-1, -1)
    if samples.ndim != 3 or samples.shape[0] != n or samples.shape[2] != q or not samples.numel():
        raise GeometryError(
            f"calibration needs truths (n, q) and samples (n, L, q), got {tuple(truth.shape)} and "
            f"{tuple(samples.shape)}"
        )
    for values in (truth, samples):
        if values.is_complex() or not bool(torch.isfinite(values).all()):
            raise InputError("calibration needs real finite numbers; give magnitudes, or parts")
