"""Operators on finer grids tend to the closed forms of phantoms, at the order that theory gives.

Line integrals of an image of area averages err by the square of the pixel where the object is
smooth, and by the pixel where it has edges; samples of k-space by the square, since a pixel's
average multiplies the transform by a sinc.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from inverse.operators.ct import ConeBeam, FanBeam, ParallelBeam, RayTransform
from inverse.operators.mri import CartesianMRI
from phantoms.gaussians import Gaussians
from phantoms.polygons import Polygons
from phantoms.scene import Scene
from phantoms.shapes import Ellipses, Ellipsoids, rotation_matrix

FIELD = 64.0

SMOOTH = Gaussians(
    [1.0, 0.6],
    [[3.0, -2.0], [-8.0, 6.0]],
    [[[20.0, 4.0], [4.0, 9.0]], [[12.0, -3.0], [-3.0, 30.0]]],
)
EDGES = Scene(
    (
        Ellipses.of([[1, 2, -1, 15, 9, 0.4], [-0.5, 5, 3, 4, 6, 1.0]]),
        Polygons.boxes([0.7, -6, -2, 3, 5, 0.5]),
    )
)
BLOBS = Gaussians(
    [1.0, 0.6],
    [[3.0, -2.0, 1.0], [-8.0, 6.0, -4.0]],
    [
        [[20.0, 4.0, 1.0], [4.0, 14.0, 2.0], [1.0, 2.0, 16.0]],
        [[16.0, -3.0, 0.0], [-3.0, 25.0, 1.0], [0.0, 1.0, 20.0]],
    ],
)
BALLS = Ellipsoids(
    [1.0, -0.5], [[2, -1, 1], [5, 3, -2]], [[15, 9, 11], [4, 6, 5]],
    rotation_matrix([0.4, 1.0], [0.2, 0.3], [0, 0.5]),
)  # fmt: skip
VIEWS = tuple(np.linspace(0.1, 6.0, 12))
PARALLEL = ParallelBeam(VIEWS, 41, 1.1)
FAN = FanBeam(VIEWS, 41, 2.0, 120.0, 100.0)
CURVED = FanBeam(VIEWS, 41, 2.0, 120.0, 100.0, curved=True)
CONE = ConeBeam(VIEWS[::3], 15, 21, 3.0, 3.0, 120.0, 100.0)


def orders(errors: list[float]) -> np.ndarray:
    return np.log2(np.array(errors[:-1]) / np.array(errors[1:]))


def plane_errors(phantom, geometry, kernel: str) -> list[float]:
    origin, direction = geometry.rays()
    exact = phantom.line_integrals(origin, direction)[..., 0]
    errors = []
    for n in (32, 64, 128):
        image = torch.from_numpy(phantom.image((n, n), FIELD / n))
        data = RayTransform(geometry, (n, n), FIELD / n, kernel, cache=False)(image).numpy()
        errors.append(float(np.linalg.norm(data - exact) / np.linalg.norm(exact)))
    return errors


@pytest.mark.parametrize(
    ("geometry", "kernel"),
    [(PARALLEL, "linear"), (PARALLEL, "line"), (FAN, "linear"), (FAN, "line"), (CURVED, "line")],
    ids=["parallel-linear", "parallel-line", "fan-linear", "fan-line", "curved-line"],
)
def test_line_integrals_of_smooth_objects_converge_with_the_square(geometry, kernel):
    errors = plane_errors(SMOOTH, geometry, kernel)
    assert errors[-1] < 3e-3
    assert (orders(errors) > 1.6).all(), errors
    assert (orders(errors) < 2.4).all(), errors


@pytest.mark.parametrize("geometry", [PARALLEL, FAN], ids=["parallel", "fan"])
def test_line_integrals_across_edges_converge_with_the_pixel(geometry):
    errors = plane_errors(EDGES, geometry, "linear")
    assert errors[-1] < 0.03
    overall = np.log2(errors[0] / errors[-1]) / 2
    assert 0.75 < overall < 1.4, errors


@pytest.mark.parametrize("phantom", [BLOBS, BALLS], ids=["smooth", "edges"])
def test_cone_beam_converges(phantom):
    """Between first and second order for smooth objects: its kernel does not interpolate, and a
    ray that stays in one layer of voxels sees the layer's mean, not its own height's value.
    """
    exact = phantom.line_integrals(*CONE.rays())
    errors = []
    for n in (16, 32, 64):
        heights = (np.arange(n) - (n - 1) / 2) * (48.0 / n)
        # A voxel's average: of two sections, by Gauss.
        inner = 48.0 / n / np.sqrt(12)
        planes = [
            (phantom.slice(z - inner).image((n, n), 48.0 / n)
             + phantom.slice(z + inner).image((n, n), 48.0 / n)) / 2
            for z in heights
        ]  # fmt: skip
        volume = torch.from_numpy(np.stack(planes))
        data = RayTransform(CONE, (n, n, n), 48.0 / n, cache=False)(volume).numpy()
        errors.append(float(np.linalg.norm(data - exact) / np.linalg.norm(exact)))
    overall = np.log2(errors[0] / errors[-1]) / 2
    low, high = (1.15, 2.2) if phantom is BLOBS else (0.75, 1.5)
    assert low < overall < high, errors


@pytest.mark.parametrize("phantom", [SMOOTH, EDGES], ids=["smooth", "edges"])
def test_kspace_of_the_operator_converges_with_the_square(phantom):
    errors = []
    for n in (32, 64, 128):
        pixel = FIELD / n
        image = torch.from_numpy(phantom.image((n, n), pixel)).to(torch.complex64)
        data = CartesianMRI(torch.ones(n, n, dtype=torch.bool))(image).numpy()
        window = slice(n // 2 - 6, n // 2 + 7)  # the same frequencies on every grid
        exact = phantom.fft((n, n), pixel)[window, window]
        wrong = data[window, window] - exact
        errors.append(float(np.linalg.norm(wrong) / np.linalg.norm(exact)))
    assert (orders(errors) > 1.7).all(), errors
    assert (orders(errors) < 2.3).all(), errors
