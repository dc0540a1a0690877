"""Random bodies: same seed, same body; tissues in range; lesions where they are listed."""

from __future__ import annotations

import numpy as np
import pytest

from inverse.errors import InputError
from phantoms.anatomy import AIR_HU, Anatomy, abdomen, head, thorax
from phantoms.anatomy.builder import sphere
from phantoms.anatomy.cranial import _HEAD_TISSUES


def hu(body: Anatomy, z: float, size: int = 256, pixel: float = 1.6) -> np.ndarray:
    return body.slice(z).image((size, size), pixel, 3) + AIR_HU


@pytest.fixture(scope="module")
def chests() -> list[Anatomy]:
    return [thorax(seed) for seed in range(4)]


@pytest.mark.parametrize("make", [thorax, abdomen, head])
def test_same_seed_same_body(make):
    first, second, other = make(11), make(11), make(12)
    for name in ("value", "centre", "axes", "rotation"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert first.lesions == second.lesions
    assert not np.array_equal(first.value[:3], other.value[:3])


def test_lungs_fat_muscle_and_bone_have_their_numbers(chests):
    for chest in chests:
        for z in (-60.0, 0.0, 60.0):
            image = hu(chest, z)
            lung = np.mean((image > -920) & (image < -700))
            assert 0.05 < lung < 0.45, (z, lung)
            assert np.mean((image > -130) & (image < -70)) > 0.01  # fat
            assert np.mean((image > 20) & (image < 80)) > 0.05  # muscle
            assert np.sum(image > 250) > 50  # bone
            assert image.min() > AIR_HU - 1
            assert image.max() < 1800


def test_values_add_up_to_tissues_everywhere(chests):
    # A container that is not subtracted shows as a sum far outside the tissues' range.
    for chest in chests:
        for z in np.linspace(-75, 75, 6):
            image = hu(chest, float(z), 200, 2.0)
            assert np.mean(image > 900) < 1e-3
            assert np.mean(image < AIR_HU - 25) == 0


def test_air_outside_the_body(chests):
    for chest in chests:
        image = hu(chest, 0.0)
        assert (np.abs(image[:6] - AIR_HU) < 1e-2).all()
        trunk = np.abs(image[:, 128] - AIR_HU) > 400
        assert trunk.any()
        # In front of the trunk nothing floats.
        np.testing.assert_allclose(image[: int(np.argmax(trunk)) - 1, 128], AIR_HU, atol=1e-2)


def test_spine_is_at_the_back_and_heart_at_the_left(chests):
    # y grows to the back and x to the patient's left.
    for chest in chests:
        image = hu(chest, -20.0)
        middle = image[:, 100:156]
        rows = np.flatnonzero((middle > 300).sum(axis=1) > 4)
        body = np.flatnonzero((image > -300).sum(axis=1) > 60)
        assert rows.max() > body.mean()
        lung = (image > -920) & (image < -700)
        assert lung[:, :128].sum() > 0.95 * lung[:, 128:].sum()


@pytest.mark.parametrize("make", [thorax, abdomen, head])
def test_lesions_lie_where_listed_with_their_contrast(make):
    for seed in range(2):
        body, healthy = make(seed), make(seed, lesions=False)
        assert body.lesions
        assert not healthy.lesions
        for lesion in body.lesions:
            centre = np.array(lesion.centre)
            inside = centre + lesion.radius * np.array([[0, 0, 0], [0.9, 0, 0], [0, -0.6, 0.6]])
            outside = centre + lesion.radius * np.array([[1.1, 0, 0], [0, 0.8, 0.8]])
            # The rest of the body must be the same, or lesions could not be studied by pairs.
            np.testing.assert_allclose(
                body.at(inside) - healthy.at(inside), lesion.contrast, atol=1e-9
            )
            np.testing.assert_allclose(body.at(outside), healthy.at(outside), atol=1e-9)


def test_soft_tissue_lesions_are_of_low_contrast(chests):
    found = [lesion for chest in chests for lesion in chest.lesions]
    faint = [lesion for lesion in found if lesion.site == "muscle"]
    assert faint
    assert all(20 <= abs(lesion.contrast) <= 60 for lesion in faint)
    nodules = [lesion for lesion in found if lesion.site == "lung"]
    assert nodules
    for chest in chests:
        lung = [lesion.centre for lesion in chest.lesions if lesion.site == "lung"]
        around = thorax_value(chest, lung)
        assert (around > -800).all()


def thorax_value(chest: Anatomy, points) -> np.ndarray:
    return chest.at(points) + AIR_HU


def test_abdomens_have_their_organs():
    for seed in range(3):
        body = abdomen(seed)
        assert {lesion.site for lesion in body.lesions} <= {"liver", "kidney"}
        for z in (-40.0, 0.0, 40.0):
            image = hu(body, z)
            assert image.min() > AIR_HU - 1
            assert image.max() < 1200
            assert np.mean((image > -125) & (image < -80)) > 0.04  # fat
            assert np.mean((image > 20) & (image < 260)) > 0.08  # organs, muscle, blood
            assert np.sum(image > 250) > 30  # the spine
            np.testing.assert_allclose(image[:6], AIR_HU, atol=1e-2)
        liver = hu(body, 45.0)[:, :128] > 40
        assert liver.sum() > 1.2 * (hu(body, 45.0)[:, 128:] > 40).sum()  # on the right


@pytest.mark.parametrize(
    ("make", "parts", "value", "centre"),
    [
        (thorax, 8011, 5088975.719870513, 1416420.8439521128),
        (head, 605, -9253.493038006081, 43210.14053280471),
    ],
    ids=["thorax", "head"],
)
def test_bodies_are_those_of_earlier_versions(make, parts, value, centre):
    """Priors were trained on these bodies, and figures are quoted for them."""
    body = make(7)
    assert len(body) == parts
    np.testing.assert_allclose(body.value.sum(), value, rtol=1e-9)
    np.testing.assert_allclose(np.abs(body.centre).sum(), centre, rtol=1e-9)


def test_sections_have_vessels(chests):
    for chest in chests:
        image = hu(chest, 10.0)
        lung = (image > -920) & (image < -700)
        rows, columns = np.flatnonzero(lung.any(1)), np.flatnonzero(lung.any(0))
        box = image[rows[0] : rows[-1], columns[0] : columns[-1]]
        edges = np.abs(np.diff(box, axis=1)) > 150
        assert edges.mean() > 0.02


def test_head_has_skull_around_brain():
    image = hu(head(0), 10.0, 256, 0.95)
    centre = image[100:156, 100:156]
    assert (np.abs(centre[centre < 150]) < 110).all()
    assert np.sum(image > 900) > 300
    np.testing.assert_allclose(image[0], AIR_HU, atol=1e-2)


def test_lesions_of_a_head_replace_white_matter():
    white = _HEAD_TISSUES["t1"]["white"]
    for seed in range(2):
        body, healthy = (head(seed, contrast="t1", lesions=k) for k in (True, False))
        for lesion in body.lesions:
            points = np.array(lesion.centre) + 0.95 * lesion.radius * sphere(200)
            # mottle and the head's own white matter vary by some per cent of the signal
            np.testing.assert_allclose(healthy.at(points), white, atol=0.25 * white)
            assert body.at(points).min() > 0
        image = body.slice(body.lesions[0].centre[2]).image((96, 96), 2.4)
        assert image.min() > -1e-6


def test_contrasts_share_one_geometry():
    ct, t2 = (head(5, contrast=name) for name in ("ct", "t2"))
    np.testing.assert_array_equal(ct.centre, t2.centre)
    np.testing.assert_array_equal(ct.axes, t2.axes)
    fluid = t2.slice(8.0).image((128, 128), 1.9)
    assert fluid.min() > -0.1
    assert 0.8 < fluid.max() < 1.5  # fluid is the brightest
    with pytest.raises(InputError, match="expected one of"):
        head(0, contrast="flair")
