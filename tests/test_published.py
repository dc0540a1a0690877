"""Published test objects: values and places of their definitions, and closed forms that agree."""

from __future__ import annotations

import numpy as np
import pytest

from inverse.errors import GeometryError, InputError
from phantoms.catalogue import PHANTOMS, Choice, render, section, texture
from phantoms.published import (
    ACR_INSERTS,
    ACR_LINE_PAIRS,
    acr_ct,
    acr_mr,
    forbild_head,
    forbild_thorax,
)
from phantoms.shapes import shepp_logan_schabel


def test_forbild_head_has_the_published_densities():
    head = forbild_head()
    # In cm, y upwards: brain 1.05, ear bone 1.8, skull 1.8, frontal sinus air, the eyes' 1.06,
    # the ventricle 1.045, an air cell of the ear.
    points = {
        (3.0, 0.0): 1.05,
        (8.0, 1.2): 1.8,
        (0.0, 11.8): 1.8,
        (0.5, 8.4): 0.0,
        (-4.7, 4.3): 1.06,
        (0.0, -3.6): 1.045,
        (8.8, 0.0): 0.0,
        (0.0, 3.6): 1.8,
        (0.1, 9.6): 1.8,
        (0.0, -11.2): 1.8,  # the occipital protuberance
        (-9.3, 0.0): 1.8,
        (-8.0, 0.0): 1.05,
        (11.0, 0.0): 0.0,
    }
    for (x, y), density in points.items():
        assert head.at(10 * x, -10 * y) == pytest.approx(1000 * density, abs=1e-6), (x, y)
    without = forbild_head(ear=False)
    assert without.at(80.0, -12.0) == pytest.approx(1050)
    image = head.image((300, 300), 0.9)
    assert image.min() > -1
    assert image.max() < 1801


def test_forbild_head_resolution_pattern_has_eighty_holes():
    plain, pattern = forbild_head(), forbild_head(resolution=True)
    areas = [np.pi / 4 * (10 * d) ** 2 for d in (0.0357, 0.0312, 0.0278, 0.0250)]
    np.testing.assert_allclose(pattern.mass - plain.mass, 750 * 20 * sum(areas), rtol=1e-6)


def test_forbild_thorax_has_its_parts_and_no_tissue_outside_its_range():
    body = forbild_thorax()
    points = {(105, 0): 260, (-105, 40): 260, (0, -90.9): 1150, (0, 62): 1150, (40, -65): 1000}
    for (x, y), value in points.items():
        assert body.slice(10.0).at(x, y) == pytest.approx(value), (x, y)
    for z in (-45.0, 55.0, 170.0):
        image = body.slice(z).image((80, 110), 6.0)
        assert image.min() > -1
        assert image.max() < 1601
    o = np.array([[0.0, -300, 3.0], [-300, 1.0, 5.0]])
    d = np.array([[0.0, 1, 0], [1, 0, 0]])
    plane = body.slice(3.0).line_integrals(o[:1, :2], d[:1, :2])
    np.testing.assert_allclose(body.line_integrals(o[:1], d[:1]), plane, rtol=1e-6)


def test_acr_inserts_are_where_the_table_says():
    module = acr_ct(1)
    for insert in ACR_INSERTS.values():
        assert module.at(insert.x, insert.y) - 1000 == pytest.approx(insert.hu)
        assert insert.low <= insert.hu <= insert.high
        assert np.hypot(insert.x, insert.y) == pytest.approx(63)
    assert module.at(0, 0) == 1000
    assert module.at(0, 100.1) == 0


def test_acr_low_contrast_rods_have_six_hu_and_their_sizes():
    module = acr_ct(2)
    assert module.at(0, -60) - module.at(0, 0) == pytest.approx(6)
    area = sum(4 * np.pi * (d / 2) ** 2 for d in (2, 3, 4, 5, 6)) + np.pi * 12.5**2
    np.testing.assert_allclose(module.mass - 1090 * np.pi * 1e4, 6 * area, rtol=1e-6)


def test_acr_bars_have_their_line_pairs():
    module = acr_ct(4)
    for k, pairs in enumerate(ACR_LINE_PAIRS):
        t = np.deg2rad(-135 + 45 * k)
        s = np.linspace(-7.5, 7.5, 6001)[:-1]  # across the bars
        profile = module.at(70 * np.cos(t) - s * np.sin(t), 70 * np.sin(t) + s * np.cos(t))
        edges = np.count_nonzero(np.diff(profile) > 0) + (profile[0] > 1000)
        assert edges == round(1.5 * pairs)
        width = np.mean(profile > 1000) * 15 / round(1.5 * pairs)
        np.testing.assert_allclose(width, 5 / pairs, atol=0.01)


def test_acr_mr_slices():
    holes = acr_mr("resolution")
    bar = acr_mr("uniformity").mass - holes.mass
    area = 84 * 26 - sum(32 * np.pi / 4 * d**2 for d in (1.1, 1.0, 0.9))
    np.testing.assert_allclose(bar, area, rtol=1e-9)
    for part in ("resolution", "grid", "contrast"):
        image = acr_mr(part).image((220, 220), 0.9)
        assert image.min() > -0.01, part  # an arc of a polygon against an ellipse's
        assert image.max() < 1 + 1e-5, part
    spokes = acr_mr("contrast", contrast=0.025)
    assert spokes.at(0, -26) == pytest.approx(0.975)


def test_schabel_head_resembles_the_plane_and_stays_in_range():
    image = shepp_logan_schabel(200.0).slice(0.0).image((128, 128), 1.6)
    assert image.min() > -1e-5
    assert image.max() < 1 + 1e-5
    head = shepp_logan_schabel(2.0)
    assert head.at([0.0, -0.88, 0.0]) == pytest.approx(1.0)  # the skull, in front
    assert head.at([0.0, -0.35, -0.15]) == pytest.approx(0.3)


@pytest.mark.parametrize("name", PHANTOMS)
def test_every_entry_of_the_catalogue_renders_in_its_range(name):
    entry = PHANTOMS[name]
    made = entry.make(Choice(seed=3))
    heights = [0.0, min(entry.reach_mm, 40.0)]
    image = render(made, heights, (32, 32), entry.field_mm / 32)
    assert image.shape == (2, 32, 32)
    assert np.isfinite(image).all()
    assert image.min() > (-30 if entry.modality == "CT" else -0.05)
    assert image.max() > (500 if entry.modality == "CT" else 0.1)
    assert np.abs(image[:, 0]).max() < 1e-2  # the field holds it
    assert bool(made.lesions) == ("lesions" in entry.options)


def test_a_thick_slice_is_the_mean_of_thin_ones():
    made = PHANTOMS["shepp-logan-3d"].make(Choice())
    thick = section(made, 10.0, 8.0).image((32, 32), 7.5)
    thin = render(made, [10.0 + d for d in np.arange(-3.5, 4)], (32, 32), 7.5)
    np.testing.assert_allclose(thick, thin.mean(axis=0), atol=0.05)


def test_texture_has_its_variance():
    x = texture((2, 64, 64), (4.0, 2.0, 2.0), 5)
    assert 5 < x.std() < 40
    np.testing.assert_array_equal(x, texture((2, 64, 64), (4.0, 2.0, 2.0), 5))


@pytest.mark.parametrize(
    "make",
    [
        lambda: acr_ct(5),
        lambda: acr_mr("wedge"),
        lambda: acr_mr("contrast", contrast=0.0),
        lambda: section(PHANTOMS["acr-ct"].make(Choice()), 0.0, -1.0),
    ],
)
def test_refusals_say_what_was_expected(make):
    with pytest.raises(GeometryError, match="expected"):
        make()


def test_the_brain_refuses_another_field_or_sequence():
    for choice in (Choice(field=7.0), Choice(sequence="dwi")):
        with pytest.raises(InputError, match="got"):
            PHANTOMS["brain"].make(choice)
