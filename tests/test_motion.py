"""Motion in closed form: still poses change nothing, one pose is the moved object, modes agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from inverse.classical import zero_filled
from inverse.errors import GeometryError
from inverse.operators.ct import FanBeam, ParallelBeam
from phantoms.gaussians import Gaussians
from phantoms.motion import Motion, Moving, breath, simulate_mri_analytic
from phantoms.shapes import Ellipses
from phantoms.simulate import simulate_ct_analytic

HEAD = Ellipses.of([[1.0, 3, -2, 20, 12, 0.3], [-0.4, 6, 1, 5, 8, 1.0]])


def still(n: int) -> Motion:
    return Motion.rigid(np.zeros(n), 0.0, 0.0)


def test_still_poses_change_nothing():
    beam = ParallelBeam.sparse(7, (32, 32), 2.0)
    moving = Moving(HEAD, still(7))
    origin, direction = beam.rays(2)
    np.testing.assert_allclose(
        moving.line_integrals(origin, direction), HEAD.line_integrals(origin, direction)
    )
    moving = Moving(HEAD, still(32))
    np.testing.assert_allclose(moving.fft((30, 32), 2.0), HEAD.fft((30, 32), 2.0), atol=1e-6)
    np.testing.assert_array_equal(moving.image((30, 32), 2.0), HEAD.image((30, 32), 2.0))


def test_a_rigid_pose_is_the_turned_and_shifted_object():
    angle, x, y = 0.4, 5.0, -3.0
    c, s = np.cos(angle), np.sin(angle)
    moved = Ellipses(
        HEAD.value, c * HEAD.x - s * HEAD.y + x, s * HEAD.x + c * HEAD.y + y, HEAD.a, HEAD.b,
        HEAD.angle + angle,
    )  # fmt: skip
    beam = FanBeam((0.3, 2.0), 21, 4.0, 200.0, 100.0)
    origin, direction = beam.rays()
    moving = Moving(HEAD, Motion.rigid(np.full(2, angle), x, y))
    np.testing.assert_allclose(
        moving.line_integrals(origin, 3 * direction), moved.line_integrals(origin, direction),
        atol=1e-6,
    )  # fmt: skip
    columns = Moving(HEAD, Motion.rigid(np.full(24, angle), x, y))
    np.testing.assert_allclose(columns.fft((20, 24), 3.0), moved.fft((20, 24), 3.0), atol=1e-5)
    np.testing.assert_allclose(columns.image((24, 24), 3.0), moved.image((24, 24), 3.0), atol=0.05)


def test_breathing_stretches_about_the_back():
    blob = Gaussians([1.0], [[2.0, -30.0]], [np.diag([16.0, 25.0])])
    pose = Motion.breathing([1.0], rise_mm=10.0, back_y_mm=100.0)
    grow = 1.05
    stretched = Gaussians([1.0], [[2.0, -30 * grow - 5]], [np.diag([16.0, 25.0 * grow**2])])
    moving = Moving(blob, pose)
    origin, direction = np.array([[[0.0, -36.0]]]), np.array([[[0.3, 1.0]]])
    np.testing.assert_allclose(
        moving.line_integrals(origin, direction), stretched.line_integrals(origin, direction)
    )
    np.testing.assert_allclose(
        moving.kspace(np.array([0.01]), 0.02), stretched.kspace(np.array([0.01]), 0.02)
    )
    assert moving.mass == pytest.approx(stretched.mass)
    # What lies at the back stays; what lies as far in front rises by 10 mm.
    points = np.array([[0, 100.0], [0, -100.0]])
    after = points @ pose.matrix[0].T + pose.shift[0]
    np.testing.assert_allclose(after, [[0, 100], [0, -110]])


def test_breath_rests_when_breathed_out():
    t = np.linspace(0, 4, 400, endpoint=False)
    depth = breath(t)
    assert depth[0] == 0
    assert depth.max() == pytest.approx(1)
    np.testing.assert_allclose(depth, breath(t + 4), atol=1e-12)
    assert np.mean(depth < 0.5) > 0.65


def test_motion_between_columns_blurs_the_image_and_order_matters():
    # A shift half way through the scan gives the two halves of k-space their own phase.
    n = 48
    shift = Motion.rigid(np.zeros(n), np.where(np.arange(n) < n // 2, 0.0, 8.0), 0.0)
    sharp = simulate_mri_analytic([HEAD], (n, n), 1.5, acceleration=1, noise=1e-4)
    moved = simulate_mri_analytic([Moving(HEAD, shift)], (n, n), 1.5, acceleration=1, noise=1e-4)
    error = [
        float((zero_filled(s.measurement) - s.truth).abs().square().mean().sqrt())
        for s in (sharp, moved)
    ]
    assert error[1] > 3 * error[0]
    reverse = Moving(HEAD, shift, order=range(n)[::-1]).fft((n, n), 1.5)
    forward = Moving(HEAD, shift).fft((n, n), 1.5)
    still_ = HEAD.fft((n, n), 1.5)
    np.testing.assert_allclose(forward[:, : n // 2], still_[:, : n // 2], atol=1e-6)
    np.testing.assert_allclose(reverse[:, n // 2 :], still_[:, n // 2 :], atol=1e-6)


def test_analytic_scan_is_the_transform_with_its_noise():
    scan = simulate_mri_analytic([HEAD] * 3, (40, 36), (1.5, 2.0), acceleration=2, noise=0.02)
    op = scan.measurement.operator
    exact = torch.from_numpy(HEAD.fft((40, 36), (1.5, 2.0)))
    noise = (scan.measurement.data - torch.where(op.mask, exact, 0))[:, op.mask]
    std = float(scan.measurement.noise)
    assert float(torch.view_as_real(noise).std()) == pytest.approx(std, rel=0.05)
    assert float((scan.measurement.data[:, ~op.mask]).abs().max()) == 0


def test_a_moving_chest_can_be_scanned_by_ct():
    beam = ParallelBeam.sparse(20, (32, 32), 3.0)
    body = HEAD.scaled(1000.0)
    moving = Moving(body, Motion.breathing(breath(0.1 * np.arange(20))))
    scan = simulate_ct_analytic([moving], 3.0, beam, matrix=32, photons=1e6)
    fixed = simulate_ct_analytic([body], 3.0, beam, matrix=32, photons=1e6)
    difference = (scan.measurement.data - fixed.measurement.data).abs().amax(dim=(0, 2))
    assert float(difference[0]) < 0.05
    assert float(difference[15:].max()) > 0.1


@pytest.mark.parametrize(
    "make",
    [
        lambda: Motion(np.zeros((2, 2, 2)), np.zeros((2, 2))),
        lambda: Motion(np.tile(np.eye(2), (2, 1, 1)), np.zeros((3, 2))),
        lambda: Moving(HEAD, still(3)).fft((8, 8), 1.0),
        lambda: Moving(HEAD, still(3)).line_integrals(np.zeros((2, 5, 2)), np.ones((2, 5, 2))),
        lambda: breath(0.0, period_s=0.0),
        lambda: simulate_mri_analytic([], (8, 8), 1.0),
        lambda: simulate_mri_analytic([HEAD.scaled(0.0)], (8, 8), 1.0),
    ],
)
def test_refusals_say_what_was_expected(make):
    with pytest.raises(GeometryError, match="expected"):
        make()
