"""Solids in space: sections, line integrals and transforms agree with points and each other."""

from __future__ import annotations

import numpy as np
import pytest

from inverse.errors import GeometryError
from phantoms.gaussians import Gaussians
from phantoms.scene import Body, Scene
from phantoms.shapes import Ellipsoids, rotation_matrix
from phantoms.solids import Boxes, Cylinders

TURNS = rotation_matrix([0.3, 1.2, 0.0], [0.5, -0.8, 0.0], [1.0, 0.2, 0.0])
BOXES = Boxes(
    [1, 2, -1], [[0, 0, 0], [4, 1, 2], [-5, 3, 1]], [[3, 2, 4], [1, 5, 2], [2, 2, 2]], TURNS
)
RODS = Cylinders(
    [1, 2, -1], [[0, 0, 0], [4, 1, 2], [-5, 3, 1]], [[3, 2], [1, 2], [2, 2]], [4, 5, 3], TURNS
)
LYING = Cylinders([1.0], [[1, -2, 0.5]], [[2, 1]], [4], [rotation_matrix(0.4, 0, np.pi / 2)])
OVALS = Ellipsoids([1, 2, -1], BOXES.centre, [[3, 2, 4], [1, 5, 2], [2, 2, 3]], TURNS)
SOLIDS = {"boxes": BOXES, "cylinders": RODS, "lying": LYING, "ellipsoids": OVALS}
each = pytest.mark.parametrize("solid", SOLIDS.values(), ids=SOLIDS)


def section(solid, z: float) -> Scene:
    return Body((solid,)).slice(z)


@each
def test_section_is_the_solid_cut_by_the_plane(solid, rng):
    points = rng.uniform(-8, 8, (4000, 3))
    for z in (-2.0, 0.1, 1.7):
        points[:, 2] = z
        agree = np.isclose(section(solid, z).at(points[:, 0], points[:, 1]), solid.at(points))
        assert agree.mean() > 0.998
    assert section(solid, 100.0).at(0.0, 0.0) == 0


@each
def test_line_integrals_match_sums_over_points(solid, rng):
    origin, d = rng.uniform(-4, 4, (12, 3)), rng.normal(size=(12, 3))
    d[0] = [0, 0, 1]  # along z
    d[1] = [1, 0, 0]
    unit = d / np.linalg.norm(d, axis=1, keepdims=True)
    t = (np.arange(20000) + 0.5) / 500 - 20
    numeric = solid.at(origin[:, None] + t[:, None] * unit[:, None]).sum(axis=1) / 500
    np.testing.assert_allclose(solid.line_integrals(origin, d), numeric, atol=0.02)


@each
def test_line_in_a_section_plane_agrees_with_the_section(solid, rng):
    angle = rng.uniform(0, 2 * np.pi, 40)
    d = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    o = rng.uniform(-4, 4, (40, 2))
    z = 0.7
    space = solid.line_integrals(
        np.column_stack([o, np.full(40, z)]), np.column_stack([d, np.zeros(40)])
    )
    np.testing.assert_allclose(section(solid, z).line_integrals(o, d), space, atol=2e-3)


@each
def test_kspace_is_the_numerical_transform(solid):
    n, half = 96, 9.0
    r = ((np.arange(n) + 0.5) / n * 2 - 1) * half
    grid = np.stack(np.meshgrid(r, r, r, indexing="ij"), axis=-1)  # x, y, z
    values = solid.at(grid) * (2 * half / n) ** 3
    np.testing.assert_allclose(solid.kspace(0, 0, 0), solid.mass, rtol=1e-12)
    for k in ((0.0, 0.0, 0.0), (0.05, -0.03, 0.02), (0.0, 0.1, 0.0), (-0.08, 0.04, 0.11)):
        wave = [np.exp(-2j * np.pi * q * r) for q in k]
        numeric = np.einsum("xyz,x,y,z->", values, *wave)
        assert abs(solid.kspace(*k) - numeric) < 0.01 * np.abs(values).sum()


def test_kspace_of_a_ball_vanishes_where_tan_t_is_t():
    ball = Ellipsoids([1.0], [[0, 0, 0]], [[1, 1, 1]], [np.eye(3)])
    k = 4.493409457909064 / (2 * np.pi)  # first root of tan t = t
    assert abs(ball.kspace(0.0, k, 0.0)) < 1e-9
    assert abs(ball.kspace(0.0, 0.8 * k, 0.0)) > 0.05
    small, smaller = ball.kspace(0.0017, 0, 0), ball.kspace(0.0015, 0, 0)  # across the series
    assert abs(small - smaller) < 1e-4


def test_slabs_of_a_body_add_up_to_its_mass():
    body = Body((BOXES, RODS, OVALS))
    masses = [body.slab(z, 0.5, 4).mass * 0.5 for z in np.arange(-12, 12, 0.5) + 0.25]
    np.testing.assert_allclose(sum(masses), body.mass, rtol=5e-3)


def test_scenes_and_bodies_are_sums(rng):
    body = Body((BOXES,)) + Body((OVALS,))
    o, d = rng.uniform(-4, 4, (9, 3)), rng.normal(size=(9, 3))
    parts = BOXES.line_integrals(o, d) + OVALS.line_integrals(o, d)
    np.testing.assert_allclose(body.scaled(2.0).line_integrals(o, d), 2 * parts)
    scene = body.slice(0.4)
    whole = scene.image((32, 30), 0.6)
    np.testing.assert_allclose(whole, sum(part.image((32, 30), 0.6) for part in scene.parts))
    np.testing.assert_allclose(
        scene.fft((32, 30), 0.6), sum(part.fft((32, 30), 0.6) for part in scene.parts), atol=1e-5
    )


def test_gaussians_in_closed_form(rng):
    c3 = np.array([[[9.0, 2, 1], [2, 5, -1], [1, -1, 4]], [[3, 0, 0], [0, 6, 1], [0, 1, 2.0]]])
    blobs = Gaussians([1.0, -2.0], [[1, 2, 0.5], [-3, 0, 1]], c3)
    r = (np.arange(80) + 0.5) / 80 * 40 - 20
    grid = np.meshgrid(r, r, r, indexing="ij")
    np.testing.assert_allclose(blobs.at(*grid).sum() * 0.125, blobs.mass, rtol=1e-6)
    o, d = rng.uniform(-3, 3, (6, 3)), rng.normal(size=(6, 3))
    unit = d / np.linalg.norm(d, axis=1, keepdims=True)
    t = np.linspace(-60, 60, 4001)
    p = o[:, None] + t[:, None] * unit[:, None]
    numeric = blobs.at(p[..., 0], p[..., 1], p[..., 2]).sum(axis=1) * 0.03
    np.testing.assert_allclose(blobs.line_integrals(o, d), numeric, rtol=1e-6, atol=1e-9)
    k = (0.03, -0.05, 0.04)
    waves = [np.exp(-2j * np.pi * q * r) for q in k]
    transform = np.einsum("xyz,x,y,z->", blobs.at(*grid), *waves) * 0.125
    np.testing.assert_allclose(blobs.kspace(*k), transform, rtol=1e-6)
    plane = blobs.slice(1.3)
    np.testing.assert_allclose(plane.at(0.4, -0.7), blobs.at(0.4, -0.7, 1.3), rtol=1e-12)
    image = plane.image((40, 44), (1.0, 0.9))
    fine = 12
    y = (np.arange(40 * fine) - (40 * fine - 1) / 2) / fine
    x = (np.arange(44 * fine) - (44 * fine - 1) / 2) / fine * 0.9
    brute = plane.at(x[None], y[:, None]).reshape(40, fine, 44, fine).mean(axis=(1, 3))
    np.testing.assert_allclose(image, brute, atol=3e-3)
    np.testing.assert_allclose(image.sum() * 0.9, plane.mass, rtol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Boxes([1.0], [[0, 0, 0]], [[1, 0, 1]], [np.eye(3)]),
        lambda: Cylinders([1.0], [[0, 0, 0]], [[1, 1]], [1], [2 * np.eye(3)]),
        lambda: Gaussians([1.0], [[0, 0]], [[[1, 0], [0, -1]]]),
        lambda: Gaussians([1.0], [[0, 0, 0]], [np.eye(3)]).image((4, 4), 1.0),
        lambda: Gaussians([1.0], [[0, 0]], [np.eye(2)]).slice(0.0),
        lambda: Body((OVALS,)).slab(0, 1, 0),
    ],
)
def test_refusals_say_what_was_expected(make):
    with pytest.raises(GeometryError, match="expected"):
        make()
