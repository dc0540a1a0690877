"""Closed forms of ellipses and ellipsoids against each other, brute force and skimage."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.data import shepp_logan_phantom

from inverse.errors import GeometryError
from phantoms.shapes import Ellipses, Ellipsoids, rotation_matrix, shepp_logan, shepp_logan_3d


@pytest.fixture
def several(rng: np.random.Generator) -> Ellipses:
    n = 30
    return Ellipses(
        rng.normal(size=n),
        rng.uniform(-20, 20, n),
        rng.uniform(-15, 15, n),
        rng.uniform(0.3, 12, n),
        rng.uniform(0.3, 6, n),
        rng.uniform(-4, 4, n),
    )


@pytest.fixture
def bodies(rng: np.random.Generator) -> Ellipsoids:
    n = 20
    return Ellipsoids(
        rng.normal(size=n),
        rng.uniform(-20, 20, (n, 3)),
        rng.uniform(2, 18, (n, 3)),
        rotation_matrix(*rng.uniform(-3, 3, (3, n))),
    )


def one(value=1.0, x=0.0, y=0.0, a=1.0, b=1.0, angle=0.0) -> Ellipses:
    return Ellipses.of([value, x, y, a, b, angle])


def test_chord_of_a_disc():
    disc = one(value=2.0, x=3.0, y=-4.0, a=5.0, b=5.0)
    s = np.linspace(-7, 7, 29)
    for theta in (0.0, 0.7, 2.5):
        normal = np.array([np.cos(theta), np.sin(theta)])
        along = np.array([-np.sin(theta), np.cos(theta)])
        origin = np.array([3.0, -4.0]) + s[:, None] * normal + 11.3 * along
        expected = 4 * np.sqrt(np.maximum(25 - s**2, 0))
        # The direction's length must not matter.
        np.testing.assert_allclose(disc.line_integrals(origin, 3 * along), expected, atol=1e-6)


def test_line_integral_turns_with_the_ellipse():
    # Longest and shortest chord of an ellipse tilted from +x towards +y (downwards).
    tilted = one(a=8.0, b=2.0, angle=0.6)
    long = np.array([np.cos(0.6), np.sin(0.6)])
    short = np.array([-np.sin(0.6), np.cos(0.6)])
    np.testing.assert_allclose(tilted.line_integrals([0.0, 0.0], long), 16, rtol=1e-12)
    np.testing.assert_allclose(tilted.line_integrals([0.0, 0.0], short), 4, rtol=1e-12)


def test_line_integrals_match_sums_over_points(several: Ellipses, rng: np.random.Generator):
    origin = rng.uniform(-8, 8, (20, 2))
    angle = rng.uniform(0, 2 * np.pi, 20)
    direction = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    t = (np.arange(40000) + 0.5) / 40000 * 140 - 70
    points = origin[:, None] + t[:, None] * direction[:, None]
    numeric = several.at(points[..., 0], points[..., 1]).sum(axis=1) * (140 / 40000)
    np.testing.assert_allclose(several.line_integrals(origin, direction), numeric, atol=0.03)


def test_projection_of_image_rows_is_the_line_integral(several: Ellipses):
    # Rays down the middle of fine columns: image convention, x along columns.
    pixel, size = 0.05, 1600
    image = several.image((size, size), pixel, 4)
    x = (np.arange(size) - (size - 1) / 2) * pixel
    exact = several.line_integrals(
        np.stack([x, np.zeros(size)], axis=1), np.broadcast_to([0.0, 1.0], (size, 2))
    )
    difference = image.sum(axis=0, dtype=np.float64) * pixel - exact
    assert np.abs(difference).mean() < 2e-3 * np.abs(exact).mean()


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.02, 9),
    st.floats(0.02, 9),
    st.floats(-4, 4),
    st.floats(-5, 5),
    st.floats(-5, 5),
    st.integers(1, 4),
)
def test_image_conserves_mass(a, b, angle, x, y, supersample):
    shape = one(value=-3.0, x=x, y=y, a=a, b=b, angle=angle)
    image = shape.image((40, 44), (0.9, 0.8), supersample)
    np.testing.assert_allclose(
        image.sum(dtype=np.float64) * 0.72, shape.mass, rtol=1e-5, atol=1e-9
    )


def test_image_is_the_area_average(several: Ellipses):
    coarse = several.image((40, 50), (1.0, 0.9), 8)
    fine = 24
    y = (np.arange(40 * fine) - (40 * fine - 1) / 2) / fine
    x = (np.arange(50 * fine) - (50 * fine - 1) / 2) / fine * 0.9
    brute = several.at(x[None, :], y[:, None]).reshape(40, fine, 50, fine).mean(axis=(1, 3))
    assert np.abs(coarse - brute).max() < 0.02 * np.abs(brute).max()


def test_image_sets_rows_downwards_and_clips_at_the_border():
    image = one(x=4.0, y=2.0).image((9, 11), 1.0, 4)
    assert np.unravel_index(image.argmax(), image.shape) == (6, 9)
    covering = one(a=100.0, b=100.0).image((5, 6), 1.0, 2)
    np.testing.assert_allclose(covering, 1, atol=1e-6)
    assert not one(x=100.0).image((5, 6), 1.0).any()
    # Half a unit square within the last column.
    half = one(x=5.5, a=1e4, b=1e4)
    np.testing.assert_allclose(half.image((3, 3), 1.0), 1, atol=1e-6)


def test_no_ellipses_are_an_empty_image():
    empty = Ellipses.of([])
    assert not empty.image((4, 5), 1.0).any()
    assert empty.line_integrals(np.zeros((3, 2)), np.ones((3, 2))).tolist() == [0, 0, 0]
    assert empty.kspace(np.zeros(2), 0.0).tolist() == [0, 0]


def test_kspace_at_zero_is_the_area():
    shape = one(value=2.0, x=3.0, y=1.0, a=4.0, b=1.5, angle=1.0)
    np.testing.assert_allclose(shape.kspace(0.0, 0.0), 2 * np.pi * 6, rtol=1e-12)


def test_kspace_of_the_unit_disc_has_its_first_zero_where_j1_has():
    # First zero of J1: 3.8317059702 (Abramowitz and Stegun, table 9.5).
    k = 3.8317059702 / (2 * np.pi)
    assert abs(one().kspace(k, 0.0)) < 1e-9
    assert abs(one().kspace(0.0, 0.9 * k)) > 0.01


def test_kspace_is_the_numerical_transform(several: Ellipses):
    pixel, size = 0.05, 1600
    image = several.image((size, size), pixel, 4).astype(np.float64)
    r = (np.arange(size) - (size - 1) / 2) * pixel
    for kx, ky in ((0.013, 0.0), (0.0, 0.02), (0.05, -0.03), (-0.11, 0.08)):
        wave_x, wave_y = np.exp(-2j * np.pi * kx * r), np.exp(-2j * np.pi * ky * r)
        numeric = wave_y @ image @ wave_x * pixel**2
        assert abs(several.kspace(kx, ky) - numeric) < 1e-3 * several.scaled(1).value.size


def test_parseval():
    disc = one(a=3.0, b=2.0, angle=0.4)
    k = (np.arange(400) - 199.5) * 0.02  # up to 4 cycles/mm; the tail falls as 1/k
    energy = np.sum(np.abs(disc.kspace(k[None, :], k[:, None])) ** 2) * 0.02**2
    np.testing.assert_allclose(energy, disc.mass, rtol=0.02)


@pytest.mark.parametrize("size", [(32, 32), (33, 32), (31, 33)])
def test_fft_of_a_finer_image_tends_to_the_samples(several: Ellipses, size):
    """Same frequencies, finer pixels: the error falls as the pixel's square."""
    field = (50.0, 60.0)
    few = 8  # compare the lowest frequencies
    errors = []
    for refine in (4, 8, 16):
        shape = (size[0] * refine, size[1] * refine)
        pixel = (field[0] / shape[0], field[1] / shape[1])
        image = several.image(shape, pixel, 4)
        transform = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(image), norm="ortho"))
        exact = several.fft(shape, pixel)
        window = tuple(slice(n // 2 - few, n // 2 + few + 1) for n in shape)
        scale = np.sqrt(shape[0] * shape[1]) * pixel[0] * pixel[1]
        errors.append(np.abs(transform[window] - exact[window]).max() * scale)
        assert errors[-1] < 0.3 * np.abs(exact[window]).max() * scale
    orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert (orders > 1.7).all(), (errors, orders)
    assert (orders < 2.5).all(), (errors, orders)


def test_section_is_the_ellipsoid_cut_by_the_plane(bodies: Ellipsoids, rng: np.random.Generator):
    points = rng.uniform(-25, 25, (4000, 3))
    for z in (-11.0, 0.0, 6.5):
        points[:, 2] = z
        np.testing.assert_allclose(
            bodies.slice(z).at(points[:, 0], points[:, 1]), bodies.at(points), atol=1e-9
        )
    assert len(bodies.slice(1e3)) == 0


def test_membership_of_a_turned_needle():
    # Body axis 0 along z after a turn about y: an anchor for the matrix's columns.
    needle = Ellipsoids(
        [1.0], [[1.0, 2.0, 3.0]], [[9.0, 1.0, 1.0]], [rotation_matrix(0, -np.pi / 2)]
    )
    assert needle.at([1.0, 2.0, 11.9]) == 1
    assert needle.at([3.0, 2.0, 3.0]) == 0
    cut = needle.slice(3.0)
    np.testing.assert_allclose([cut.a[0], cut.b[0]], 1, rtol=1e-9)


def test_slices_add_up_to_the_volume(bodies: Ellipsoids):
    volume = bodies.volume((100, 90, 90), (0.8, 1.0, 1.0), 3, sub_slices=3)
    np.testing.assert_allclose(volume.sum(dtype=np.float64) * 0.8, bodies.mass, rtol=2e-3)


def test_slab_averages_over_its_thickness():
    ball = Ellipsoids([1.0], [[0.0, 0.0, 0.0]], [[5.0] * 3], [np.eye(3)])
    slab = ball.slab(0.0, 10.0, 200)
    np.testing.assert_allclose(slab.mass * 10, ball.mass, rtol=1e-4)
    only = ball.volume((1, 3, 3), (1.0, 1.0, 1.0), z_positions=[4.99])
    np.testing.assert_allclose(only[0, 1, 1], np.pi * (25 - 4.99**2), rtol=1e-3)


def test_line_integral_through_a_ball(rng: np.random.Generator):
    centre = np.array([3.0, -2.0, 5.0])
    ball = Ellipsoids([1.5], [centre], [[4.0] * 3], [rotation_matrix(0.3, 0.2, 0.1)])
    d = rng.normal(size=(50, 3))
    d /= np.linalg.norm(d, axis=1, keepdims=True)
    side = np.cross(d, rng.normal(size=(50, 3)))
    side /= np.linalg.norm(side, axis=1, keepdims=True)
    s = rng.uniform(0, 6, 50)
    got = ball.line_integrals(centre + s[:, None] * side - 20 * d, 2 * d)
    np.testing.assert_allclose(got, 3 * np.sqrt(np.maximum(16 - s**2, 0)), atol=1e-6)


def test_line_in_a_section_plane_agrees_with_the_section(
    bodies: Ellipsoids, rng: np.random.Generator
):
    angle = rng.uniform(0, 2 * np.pi, 60)
    d = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    o = rng.uniform(-15, 15, (60, 2))
    z = 4.0
    in_space = bodies.line_integrals(
        np.column_stack([o, np.full(60, z)]), np.column_stack([d, np.zeros(60)])
    )
    np.testing.assert_allclose(bodies.slice(z).line_integrals(o, d), in_space, atol=1e-9)


def test_chunks_do_not_change_results(several: Ellipses, monkeypatch: pytest.MonkeyPatch):
    rays = np.linspace(-10, 10, 50)[:, None] * [1.0, 0.3]
    whole = several.line_integrals(rays, [0.2, 1.0]), several.image((30, 30), 1.5)
    monkeypatch.setattr("phantoms.shapes._CHUNK", 64)
    np.testing.assert_allclose(several.line_integrals(rays, [0.2, 1.0]), whole[0], rtol=1e-12)
    np.testing.assert_allclose(several.image((30, 30), 1.5), whole[1], atol=1e-6)


def test_shepp_logan_is_the_published_picture():
    reference = shepp_logan_phantom()  # 400 x 400, modified contrast
    image = shepp_logan(400.0).image((400, 400), 1.0)
    difference = np.abs(image - reference)
    assert np.median(difference) < 1e-6
    assert difference.mean() < 0.01  # edges only: skimage's is smoothed there
    for flipped in (image[::-1], image[:, ::-1]):
        assert np.abs(flipped - reference).mean() > 2 * difference.mean()


def test_original_contrast_inside_the_head():
    # Grey 1.02 between skull and ventricles, 1.00 in them, 1.03 in the upper disc (1974).
    head = shepp_logan(2.0, "original")
    np.testing.assert_allclose(head.at([0.0, 0.22, 0.0], [-0.7, 0.0, -0.45]), [1.02, 1.0, 1.03])


def test_kak_slaney_section_holds_the_ventricles():
    head = shepp_logan_3d(2.0, "original")
    at = head.at([[-0.22, 0.0, -0.25], [0.22, 0.0, -0.25], [0.0, -0.8, 0.0], [0.0, -0.35, -0.25]])
    np.testing.assert_allclose(at, [1.0, 1.0, 1.02, 1.04])
    modified = shepp_logan_3d(200.0).volume((3, 64, 64), (50.0, 3.2, 3.2))
    assert modified.min() > -1e-5
    assert modified.max() < 1 + 1e-5


@pytest.mark.parametrize(
    "make",
    [
        lambda: one(a=0.0),
        lambda: one(x=np.nan),
        lambda: Ellipses([1.0, 2.0], [0.0], [0.0], [1.0], [1.0], [0.0]),
        lambda: Ellipsoids([1.0], [[0, 0, 0]], [[1, 1, 1]], [2 * np.eye(3)]),
        lambda: one().image((0, 4), 1.0),
        lambda: one().image((4, 4), 1.0, 0),
        lambda: one().line_integrals([[0.0, 0.0]], [[0.0, 0.0]]),
        lambda: one().line_integrals([[0.0, 0.0, 0.0]], [[1.0, 0.0, 0.0]]),
        lambda: shepp_logan(-1.0),
        lambda: shepp_logan(1.0, "loud"),
    ],
)
def test_refusals_say_what_was_expected(make):
    with pytest.raises(GeometryError, match="expected"):
        make()
