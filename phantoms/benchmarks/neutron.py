r"""A measured sinogram end to end: ``python -m phantoms.benchmarks.neutron SINOGRAM.tif``.

The data are neutron transmission of rods in a can, parallel beams over a full turn, with stripes
from uneven detector columns.  Nothing about them is known but the picture, so everything is found
from it:

* Line integrals against the air beside the object, view by view.
* The centre of rotation c and the views h of a half turn, since opposite views mirror each other:
  minimise the mean of :math:`|p(i, s) - p(i + h, 2c - s)|^2`, to a hundredth of column and view.
* Rings: what a column reads more than the columns around, in the median over all views, is its
  own error, since the object moves from view to view; it is subtracted.  Columns that differ from
  their neighbours eight times as much as is usual there are dead and are left out, as rays
  through metal are.
* The noise, from second differences over neighbouring views, and in quadrature with it 0.02 for
  what no image explains (scatter and hardening behind the strongest rod): told the noise alone,
  total variation and the prior draw streaks to fit it, with a chi-square of 5 and 3.

Lengths are in detector columns, called mm in the code; attenuation is per column.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage, optimize
from torch import Tensor

from inverse.classical import fbp, sirt, tv
from inverse.measurement import Measurement
from inverse.operators.ct import ParallelBeam, RayTransform
from inverse.operators.metal import UnspoiledRays
from inverse.priors import load_prior
from inverse.reconstruct import reconstruct

Float64 = NDArray[np.float64]

EDGE = 40  # columns at either side that see air only
SPARSE = 9  # one view in this many for the sparse scan
MODEL_ERROR = 0.02


def line_integrals(transmission: NDArray[np.integer]) -> Float64:
    """Line integrals against the air at both edges of each view, ``(views, columns)``."""
    signal = np.maximum(transmission.astype(np.float64), 1.0)
    air = np.hstack([signal[:, :EDGE], signal[:, -EDGE:]]).mean(axis=1, keepdims=True)
    return np.asarray(np.log(air / signal))


def mirror(p: Float64) -> tuple[float, float]:
    """Views of a half turn and column of the rotation axis, both with fractions.

    Args:
        p: line integrals over about a turn in equal steps ``(views, columns)``, NaN where there
            are none.
    """
    views, columns = p.shape
    grid = np.arange(columns, dtype=np.float64)

    def misfit(at: Sequence[float]) -> float:
        half, axis = at
        row = np.arange(math.floor(views - half), dtype=np.float64)
        shape = (row.size, columns)
        where = [
            np.broadcast_to(row[:, None] + half, shape),
            np.broadcast_to(2 * axis - grid, shape),
        ]
        opposite = ndimage.map_coordinates(p, where, order=1, cval=np.nan)
        return float(np.nanmean((p[: row.size] - opposite) ** 2))

    half = (views - 1) / 2
    start = min(np.arange(columns / 4, 3 * columns / 4), key=lambda axis: misfit((half, axis)))
    simplex = [(half, start), (half - 2, start), (half, start + 1)]
    options = {"initial_simplex": simplex, "xatol": 0.005, "fatol": 1e-9}
    found = optimize.minimize(misfit, simplex[0], method="Nelder-Mead", options=options)
    return float(found.x[0]), float(found.x[1])


def dead_columns(p: Float64, limit: float = 8.0) -> NDArray[np.bool_]:
    """Columns that differ from their neighbours by many times what is usual around them."""
    rough = (p - ndimage.median_filter(p, (1, 5))).std(axis=0)
    return np.asarray(rough > limit * ndimage.median_filter(rough, 31))


def column_error(p: Float64, dead: NDArray[np.bool_], width: int = 15) -> Float64:
    """What each column reads too much, ``(columns,)``: the median of its excess over the views.

    The excess is over the mean of the columns around, where edges of the object enter too; they
    move from view to view, so that the median has little of them, and that little is smooth; an
    edge about the rotation axis itself does not move, and cannot be told from a stripe.
    """
    good = np.flatnonzero(~dead)
    bridged = np.stack([np.interp(np.arange(dead.size), good, view[good]) for view in p])
    excess = np.median(bridged - ndimage.uniform_filter1d(bridged, width, axis=1), axis=0)
    return np.where(dead, 0.0, excess - ndimage.median_filter(excess, width))


def noise_std(p: Float64) -> float:
    """Noise std from second differences over views, whose gain is the root of 6."""
    second = p[2:] - 2 * p[1:-1] + p[:-2]
    return float(1.4826 * np.median(np.abs(second)) / math.sqrt(6))


def scan(
    p: Float64, angles: Float64, axis: float, dead: NDArray[np.bool_], binning: int, pixels: int
) -> Measurement:
    """The measurement on ``pixels`` a side, every ``binning`` detector columns averaged."""
    columns = p.shape[1] // binning * binning
    middle = (columns - 1) / 2
    data = p[:, :columns].reshape(len(p), -1, binning).mean(axis=2)
    spoiled = dead[:columns].reshape(-1, binning).any(axis=1)
    beam = ParallelBeam(tuple(angles), data.shape[1], float(binning), middle - axis)
    # filtered backprojection of all views needs no matrix
    operator = RayTransform(beam, (pixels, pixels), float(binning), max_bytes=2**28)
    if spoiled.any():
        trace = torch.from_numpy(np.broadcast_to(spoiled, data.shape).copy())
        operator = UnspoiledRays(operator, trace)
        data = np.where(spoiled, 0.0, data)
    std = torch.tensor(math.hypot(noise_std(data[:, ~spoiled]), MODEL_ERROR), dtype=torch.float32)
    return Measurement(
        operator,
        torch.from_numpy(data).to(torch.float32)[None],
        std,
        "CT",
        (float(binning), float(binning)),
        mu_water=0.01,  # only a scale: of neutrons, there are no HU
        provenance={"label": "neutron transmission, measured"},
    )


def with_prior(measurement: Measurement, unit: float, seed: int = 0) -> Tensor:
    """What the bundled X-ray prior makes of it: far from anything that it was trained on.

    Args:
        measurement: the scan.
        unit: attenuation that is taken for water.
        seed: seed of the sample.
    """
    prior = load_prior("ct-small")
    scaled = replace(measurement, mu_water=unit, pixel_mm=(1.4, 1.4))
    result = reconstruct(scaled, prior, method="dds", seed=seed)
    return result.samples[0, 0]


def main() -> None:
    """Reconstruct, draw, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sinogram", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    from skimage.io import imread

    torch.set_num_threads(1)
    raw = line_integrals(imread(arguments.sinogram))
    dead = dead_columns(raw)
    p = raw - column_error(raw, dead)
    half, axis = mirror(np.where(dead, np.nan, p))
    angles: Float64 = np.arange(len(raw), dtype=np.float64) * (math.pi / half)
    print(
        f"{raw.shape[0]} views of {180 / half:.4f} deg, {raw.shape[1]} columns; axis at column "
        f"{axis:.2f}"
    )
    print(f"dead columns: {np.flatnonzero(dead).tolist()}; noise std {noise_std(p):.4f}")

    middle = (raw.shape[1] - 1) / 2
    whole = np.zeros_like(dead)
    full = {
        "all views, as measured": fbp(scan(raw, angles, axis, whole, 1, 400))[0],
        "all views, axis at the middle": fbp(scan(p, angles, middle, dead, 1, 400))[0],
        "all views, rings treated": fbp(scan(p, angles, axis, dead, 1, 400))[0],
    }
    few = scan(p[::SPARSE], angles[::SPARSE], axis, dead, 2, 200)
    level = float(np.percentile(full["all views, rings treated"].numpy(), 99.5))
    views = few.operator.out_shape[0]
    total = tv(few, unit=level)
    sparse = {
        f"{views} views, FBP": fbp(few)[0],
        f"{views} views, SIRT": sirt(few)[0],
        f"{views} views, TV": total.x[0],
        f"{views} views, X-ray prior (out of its domain)": with_prior(few, level / 2),
    }
    for name, image in sparse.items():
        print(f"{name}: chi-square a ray {float(few.chi2(image[None])):.2f}")
    _draw(full, level, arguments.out / "neutron_full.png")
    _draw(sparse, level, arguments.out / "neutron_sparse.png")


def _draw(images: dict[str, Tensor], level: float, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(images), 3.9), layout="constrained")
    axes = figure.subplots(1, len(images))
    for axis, (name, image) in zip(axes, images.items(), strict=True):
        axis.imshow(image.numpy(), cmap="gray", vmin=-0.1 * level, vmax=1.1 * level)
        axis.set_title(name, fontsize=9)
        axis.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
