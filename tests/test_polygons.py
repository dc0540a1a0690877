"""Convex polygons against brute force and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inverse.errors import GeometryError
from phantoms.polygons import Polygons, cut
from phantoms.shapes import Ellipses

TWO = Polygons.boxes([[1, 1, 2, 3, 1, 0.3], [2, -4, 1, 2, 2, 1.0]])
TRIANGLE = Polygons.of(
    [(2.0, [[0, 0], [4, 1], [1, 5]]), (-1.0, [[-3, -3], [0, -3], [0, 0], [-3, 0]])]
)


def points(shape, pixel, fine):
    (h, w), (py, px) = shape, pixel
    y = (np.arange(h * fine) - (h * fine - 1) / 2) / fine * py
    x = (np.arange(w * fine) - (w * fine - 1) / 2) / fine * px
    return x[None, :], y[:, None]


@pytest.mark.parametrize("phantom", [TWO, TRIANGLE], ids=["boxes", "triangle"])
def test_image_is_the_area_average(phantom):
    shape, pixel, fine = (40, 50), (0.5, 0.4), 32
    brute = phantom.at(*points(shape, pixel, fine)).reshape(40, fine, 50, fine).mean(axis=(1, 3))
    image = phantom.image(shape, pixel)
    assert np.abs(image - brute).max() < 0.03
    np.testing.assert_allclose(image.sum(dtype=float) * 0.2, phantom.mass, rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    st.floats(-30, 30), st.floats(-30, 30), st.floats(0.05, 9), st.floats(0.05, 9), st.floats(0, 6)
)
def test_image_conserves_mass_and_clips_at_the_border(x, y, a, b, angle):
    box = Polygons.boxes([1.0, x, y, a, b, angle])
    whole = box.image((220, 220), 0.5)
    np.testing.assert_allclose(whole.sum(dtype=float) * 0.25, 4 * a * b, rtol=1e-4)
    part = box.image((20, 24), 0.5)
    np.testing.assert_allclose(part, whole[100:120, 98:122], atol=1e-5)


def test_half_a_pixel_is_exact():
    box = Polygons.boxes([1.0, 0.25, 0.0, 0.25, 0.5, 0.0])  # the right half of the middle pixel
    image = box.image((3, 3), 1.0)
    np.testing.assert_allclose(image, [[0, 0, 0], [0, 0.5, 0], [0, 0, 0]], atol=1e-7)


def test_line_integrals_of_a_square():
    square = Polygons.boxes([3.0, 0, 0, 1, 1, 0])
    root = np.sqrt(0.5)
    got = square.line_integrals(
        [[0, 0], [0, 0], [0, 0.9], [0, 1.1], [0, 0.5]],
        [[1, 0], [root, root], [2, 0], [1, 0], [0, 1]],
    )
    np.testing.assert_allclose(got, [6, 6 * np.sqrt(2), 6, 0, 6], atol=1e-12)


def test_line_integrals_match_sums_over_points(rng: np.random.Generator):
    origin, angle = rng.uniform(-3, 3, (20, 2)), rng.uniform(0, 2 * np.pi, 20)
    d = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    t = (np.arange(40000) + 0.5) / 1000 - 20
    p = origin[:, None] + t[:, None] * d[:, None]
    for phantom in (TWO, TRIANGLE):
        numeric = phantom.at(p[..., 0], p[..., 1]).sum(axis=1) / 1000
        np.testing.assert_allclose(phantom.line_integrals(origin, d), numeric, atol=0.01)


def test_kspace_of_a_box_is_a_product_of_sincs(rng: np.random.Generator):
    box = Polygons.boxes([2.0, 1.5, -0.5, 3.0, 1.0, 0.0])
    kx, ky = rng.uniform(-0.5, 0.5, (2, 50))
    kx[0] = ky[0] = 0
    kx[1] = ky[2] = 0
    exact = 24 * np.sinc(6 * kx) * np.sinc(2 * ky) * np.exp(-2j * np.pi * (1.5 * kx - 0.5 * ky))
    np.testing.assert_allclose(box.kspace(kx, ky), exact, atol=1e-10)


def test_kspace_is_the_numerical_transform():
    x, y = points((100, 100), (0.16, 0.16), 16)
    values = TRIANGLE.at(x, y)
    for kx, ky in ((0.1, 0.05), (-0.2, 0.3)):
        numeric = (np.exp(-2j * np.pi * ky * y.T) @ values @ np.exp(-2j * np.pi * kx * x.T)) * 1e-4
        assert abs(TRIANGLE.kspace(kx, ky) - numeric.item()) < 0.01


def test_a_cut_ellipse_is_the_ellipse_on_one_side_and_nothing_on_the_other():
    whole = Ellipses.of([1.0, 2.0, 1.0, 5.0, 3.0, 0.4])
    half = Polygons.of([(1.0, cut(2.0, 1.0, 5.0, 3.0, 0.4, [(0.7, 0.5)]))])
    x, y = points((60, 60), (0.25, 0.25), 1)
    side = (x - 2) * np.cos(0.7) + (y - 1) * np.sin(0.7) <= 0.5
    agree = half.at(x, y) == np.where(side, whole.at(x, y), 0)
    assert agree.mean() > 0.999
    full = Polygons.of([(1.0, cut(0, 0, 5.0, 3.0, 0.0, []))])
    np.testing.assert_allclose(full.mass, 15 * np.pi, rtol=2e-5)
    assert len(cut(0, 0, 1, 1, 0, [(0.0, -2.0)])) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: Polygons([1.0], [[[0, 0], [1, 1], [2, 2]]]),  # no area
        lambda: Polygons([1.0], [[[0, 0], [2, 0], [0.5, 0.5], [0, 2]]]),  # not convex
        lambda: Polygons([1.0], [[[0, 0], [1, 0], [0, np.nan]]]),
        lambda: TWO.image((0, 4), 1.0),
    ],
)
def test_refusals_say_what_was_expected(make):
    with pytest.raises(GeometryError, match="expected"):
        make()
