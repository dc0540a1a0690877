r"""Sampling patterns of Cartesian k-space, each with a fully sampled centre and an exact size.

A pattern of acceleration R keeps ``round(N / R)`` of the N columns, or of the N points where it
undersamples both axes; the centre counts.  Columns are phase encoding steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inverse.errors import GeometryError, UnsupportedError

__all__ = ["MaskKind", "calibration_centre", "cartesian_mask", "central_box"]

MaskKind = Literal[
    "uniform1d", "random1d", "gaussian1d", "partial1d", "random2d", "gaussian2d", "poisson"
]

Bool = NDArray[np.bool_]


def cartesian_mask(
    shape: tuple[int, int],
    acceleration: float,
    centre_fraction: float = 0.08,
    kind: MaskKind = "uniform1d",
    seed: int = 0,
) -> Tensor:
    r"""A k-space sampling mask with a fully sampled centre.

    For a volume with two phase-encoding directions make the mask of these two axes and repeat it
    along the readout: ``cartesian_mask((z, y), 6, kind="poisson")[..., None].expand(z, y, x)``.

    Args:
        shape: k-space grid (H, W).
        acceleration: grid size over measured samples, at least 1.
        centre_fraction: share of columns (of each axis where both are undersampled) around the
            zero frequency that are always measured.
        kind: columns outside the centre are

            - ``"uniform1d"`` equidistant with a random offset,
            - ``"random1d"`` drawn uniformly,
            - ``"gaussian1d"`` drawn with a normal density of std W/6,
            - ``"partial1d"`` all on one side and, on the other, those next to the centre
              (partial Fourier; acceleration at most 2);

            points outside the centre are

            - ``"random2d"`` drawn uniformly,
            - ``"gaussian2d"`` drawn with a normal density of std H/6 and W/6,
            - ``"poisson"`` a Poisson-disc pattern: no two are nearer than a distance that grows
              with the distance from the zero frequency.
        seed: seed of the offset or draw.

    Returns:
        Boolean ``(H, W)``, zero frequency at (H // 2, W // 2).

    Raises:
        GeometryError: an acceleration below 1, a centre that alone exceeds the samples, or a
            partial Fourier acquisition of less than half of k-space.
        UnsupportedError: another ``kind``.

    Source: Cook, ACM Trans. Graph. 5 (1986) for Poisson discs.
    """
    h, w = shape
    if not (math.isfinite(acceleration) and acceleration >= 1.0):
        raise GeometryError(f"acceleration must be at least 1, got {acceleration}")
    if not 0.0 <= centre_fraction <= 1.0:
        raise GeometryError(f"centre_fraction must be within 0 and 1, got {centre_fraction}")
    if kind not in get_args(MaskKind):
        raise UnsupportedError(
            f"mask kind {kind!r} is not served; expected {', '.join(get_args(MaskKind))}"
        )
    rng = np.random.default_rng(seed)
    columns = kind.endswith("1d")
    centre = _centre(w, centre_fraction)
    if not columns:
        centre = np.outer(_centre(h, centre_fraction), centre)
    total = max(1, round(centre.size / acceleration))
    missing = total - int(centre.sum())
    if missing < 0:
        raise GeometryError(
            f"the fully sampled centre has {int(centre.sum())} samples, more than the {total} of "
            f"acceleration {acceleration:g}; lower centre_fraction below {total / centre.size:.3g}"
        )
    keep = centre.copy()
    if missing:
        keep.flat[_DRAW[kind](centre, missing, rng)] = True
    mask = np.broadcast_to(keep, (h, w)) if columns else keep
    return torch.from_numpy(np.ascontiguousarray(mask))


def calibration_centre(mask: Tensor) -> tuple[int, ...]:
    """Sides of a large fully sampled box about the zero frequency, for calibration and phase.

    The box grows along all axes together and stops along an axis at the first gap, so it is
    near-square where the pattern allows it.

    Args:
        mask: boolean k-space mask of any dimension, zero frequency at ``n // 2``.

    Returns:
        One side an axis; all zero where the zero frequency itself was not measured.
    """
    known = mask.cpu().numpy().astype(bool)
    sides = [0] * known.ndim
    growing = set(range(known.ndim))
    if known[tuple(n // 2 for n in known.shape)]:
        sides = [1] * known.ndim
    while growing and sides[0]:
        for axis in sorted(growing):
            wider = [side + (k == axis) for k, side in enumerate(sides)]
            if wider[axis] > known.shape[axis] or not known[central_box(known.shape, wider)].all():
                growing.discard(axis)
            else:
                sides = wider
    return tuple(sides)


def central_box(shape: tuple[int, ...], sides: list[int] | tuple[int, ...]) -> tuple[slice, ...]:
    """The box of ``sides`` about the zero frequency: starts at ``n // 2 - side // 2``."""
    return tuple(
        slice(n // 2 - side // 2, n // 2 - side // 2 + side)
        for n, side in zip(shape, sides, strict=True)
    )


def _centre(n: int, fraction: float) -> Bool:
    """Mask of the ``round(fraction n)`` indices around the zero frequency, at least one."""
    centre = np.zeros(n, dtype=bool)
    centre[central_box((n,), (max(1, round(fraction * n)),))] = True
    return centre


Draw = Callable[[Bool, int, np.random.Generator], NDArray[np.int64]]


def _equidistant(centre: Bool, missing: int, rng: np.random.Generator) -> NDArray[np.int64]:
    outside = np.flatnonzero(~centre)
    step = len(outside) / missing
    picks = np.floor(rng.uniform(0.0, step) + step * np.arange(missing)).astype(int)
    return np.asarray(outside[picks])


def _drawn(
    centre: Bool, missing: int, rng: np.random.Generator, gaussian: bool
) -> NDArray[np.int64]:
    """Without replacement, uniformly or with a normal density of std n/6 an axis."""
    density = np.ones(centre.shape)
    if gaussian:
        for axis, offset in enumerate(_offsets(centre.shape)):
            density = density * np.exp(-0.5 * (offset / (centre.shape[axis] / 6)) ** 2)
    weight = np.where(centre, 0.0, density).ravel()
    return np.asarray(rng.choice(centre.size, missing, replace=False, p=weight / weight.sum()))


def _one_sided(centre: Bool, missing: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """All columns above the centre, then those below it that are nearest."""
    outside = np.flatnonzero(~centre)
    below, above = outside[outside < len(centre) // 2], outside[outside > len(centre) // 2]
    if missing < len(above):
        raise GeometryError(
            f"partial Fourier measures at least one half of the {len(centre)} columns and the "
            f"centre, {len(centre) - len(below)} in all; got an acceleration that leaves "
            f"{len(centre) - len(outside) + missing}: lower it below "
            f"{len(centre) / (len(centre) - len(below)):.3g}"
        )
    return np.concatenate([above, below[::-1][: missing - len(above)]])


def _poisson_disc(centre: Bool, missing: int, rng: np.random.Generator) -> NDArray[np.int64]:
    r"""Darts in random order, each kept where none is nearer than :math:`r_0 (1 + 4 |k|)`.

    :math:`|k|` is 1 at the edge of k-space.  The largest :math:`r_0` whose pattern has enough
    points is found by bisection; its last few points are dropped at random to make the number
    exact.
    """
    order = rng.permutation(np.flatnonzero(~centre))
    rows, cols = np.divmod(order, centre.shape[1])
    squares = [
        (o / (n / 2)) ** 2 for o, n in zip(_offsets(centre.shape), centre.shape, strict=True)
    ]
    growth = (1 + 4 * np.sqrt(squares[0] + squares[1]))[rows, cols]
    low, high = 0.0, math.sqrt(centre.size / missing)
    best = order
    for _ in range(12):
        middle = (low + high) / 2
        kept = order[_darts(rows, cols, middle * growth, centre.shape)]
        if len(kept) >= missing:
            low, best = middle, kept
        else:
            high = middle
    return np.asarray(rng.permutation(best)[:missing])


def _darts(
    rows: NDArray[np.int64],
    cols: NDArray[np.int64],
    radius: NDArray[np.float64],
    shape: tuple[int, ...],
) -> Bool:
    """Which points survive when each that is accepted in turn blocks the disc about it."""
    reach = int(radius.max()) + 1
    free = np.ones((shape[0] + 2 * reach, shape[1] + 2 * reach), dtype=bool)
    offset = np.arange(-reach, reach + 1)
    distance = np.hypot(offset[:, None], offset)
    kept = np.zeros(len(rows), dtype=bool)
    for i, (row, col, r) in enumerate(zip(rows, cols, radius, strict=True)):
        if free[row + reach, col + reach]:
            kept[i] = True
            k = int(r)
            part = slice(reach - k, reach + k + 1)
            window = free[
                row + reach - k : row + reach + k + 1, col + reach - k : col + reach + k + 1
            ]
            window &= distance[part, part] > r
    return kept


def _offsets(shape: tuple[int, ...]) -> list[NDArray[np.int64]]:
    """Distance from the zero frequency along each axis, shaped to broadcast."""
    return list(np.ogrid[tuple(slice(-(n // 2), n - n // 2) for n in shape)])


_DRAW: dict[str, Draw] = {
    "uniform1d": _equidistant,
    "random1d": lambda c, m, rng: _drawn(c, m, rng, gaussian=False),
    "gaussian1d": lambda c, m, rng: _drawn(c, m, rng, gaussian=True),
    "partial1d": _one_sided,
    "random2d": lambda c, m, rng: _drawn(c, m, rng, gaussian=False),
    "gaussian2d": lambda c, m, rng: _drawn(c, m, rng, gaussian=True),
    "poisson": _poisson_disc,
}
