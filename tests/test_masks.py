"""Masks of pixels, voxels and slices, and thick slices: laws, counts and closed forms."""

from __future__ import annotations

import math

import laws
import numpy as np
import pytest
import torch

from inverse.errors import GeometryError, InputError
from inverse.io.measurement_file import read_measurement, write_measurement
from inverse.measurement import Measurement
from inverse.operators.mask import Mask, central_hole, missing_slices, random_pixels
from inverse.operators.noise import generator
from inverse.operators.resample import ThickSlices, Upsample

VOLUME = (11, 4, 5)


@pytest.mark.parametrize("shape", [(20, 30), (6, 10, 12)])
def test_random_pixels_are_an_exact_share(shape) -> None:
    known = random_pixels(shape, 0.3, generator(1))
    assert int((~known).sum()) == round(0.3 * known.numel())
    assert torch.equal(known, random_pixels(shape, 0.3, generator(1)))
    assert not torch.equal(known, random_pixels(shape, 0.3, generator(2)))
    laws.check_all(Mask(known))


def test_hole_is_central() -> None:
    known = central_hole((3, 8, 12), 0.5)
    hole = (~known[1]).nonzero()
    assert hole.amin(0).tolist() == [2, 3]
    assert hole.amax(0).tolist() == [5, 8]
    assert torch.equal(known[0], known[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_missing_slices(dtype) -> None:
    known = missing_slices(VOLUME, [0, 4, -1])
    op = Mask(known, dtype)
    x = laws.random((2, *VOLUME), dtype, 0)
    seen = op(x).abs().sum((0, 2, 3)) > 0
    assert (~seen).nonzero().flatten().tolist() == [0, 4, 10]
    assert op.measured == 8 * 20
    laws.check_all(op)


def test_thick_slices_are_means() -> None:
    x = torch.arange(11.0)[:, None, None].expand(VOLUME)
    for thickness, step, expected in (
        (3, None, [1.0, 4.0, 7.0]),
        (4, 2, [1.5, 3.5, 5.5, 7.5]),  # overlapping
        (2, 4, [0.5, 4.5, 8.5]),  # with gaps
        (11, None, [5.0]),
    ):
        op = ThickSlices(VOLUME, thickness, step)
        assert op(x)[:, 0, 0].tolist() == pytest.approx(expected)
        assert op(torch.ones(VOLUME)).unique().tolist() == pytest.approx([1.0])
        twin = ThickSlices.from_spec(op.spec())
        assert torch.equal(twin(x), op(x))
        assert f"thickness {thickness}" in repr(op)


@pytest.mark.parametrize(("thickness", "step"), [(3, 3), (4, 2), (2, 4), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_laws_of_thick_slices(thickness, step, dtype) -> None:
    op = ThickSlices(VOLUME, thickness, step, dtype)
    laws.check_all(op)
    b = laws.random((2, *VOLUME), dtype, 4)
    rho = torch.tensor([0.3, 2.0])
    solve = op.normal_solve(b, rho)
    x = solve.x
    again = op.adjoint(op(x)) + rho[:, None, None, None] * x
    torch.testing.assert_close(again, b, atol=2e-5, rtol=1e-4)
    assert bool(solve.converged.all())


def test_singular_systems_of_thick_slices_are_left_to_cg() -> None:
    op = ThickSlices(VOLUME, 2)
    b = op.adjoint(laws.random(op.out_shape, torch.float32, 1))
    x = op.normal_solve(b, 0.0).x
    torch.testing.assert_close(op.adjoint(op(x)), b, atol=1e-5, rtol=1e-4)


def test_upsampling_laws() -> None:
    laws.check_all(Upsample((4, 5), 3))


@pytest.mark.parametrize("name", ["slices", "thick", "thick complex"])
def test_volumes_in_files(tmp_path, name) -> None:
    op = {
        "slices": Mask(missing_slices(VOLUME, [3])),
        "thick": ThickSlices(VOLUME, 3, 2),
        "thick complex": ThickSlices(VOLUME, 2, None, torch.complex64),
    }[name]
    data = laws.random((1, *op.out_shape), op.out_dtype, 0)
    m = Measurement(op, data, torch.tensor(0.1), "MR", (1.0, 1.0))
    truth = laws.random((1, *VOLUME), op.dtype, 2)
    write_measurement(tmp_path / "m.h5", m, truth)
    again = read_measurement(tmp_path / "m.h5")
    assert torch.equal(again.measurement.operator(truth), op(truth))
    assert torch.equal(again.measurement.data, data)


def test_masks_of_numbers_and_arrays() -> None:
    for values in (np.array([True, False]), np.array([1.0, 0.0]), torch.tensor([1, 0])):
        assert Mask(values).mask.tolist() == [True, False]


def test_refusals() -> None:
    for share in (0.0, 1.0, -1.0):
        with pytest.raises(GeometryError, match="share"):
            random_pixels((4, 4), share, generator(0))
        with pytest.raises(GeometryError, match="side"):
            central_hole((4, 4), share)
    with pytest.raises(GeometryError, match="volume"):
        missing_slices((4, 4), [0])
    with pytest.raises(GeometryError, match="volume"):
        missing_slices(VOLUME, [11])
    with pytest.raises(GeometryError, match="at least one pixel"):
        Mask(missing_slices(VOLUME, range(11)))
    for values in ([1.0, 0.5], [1.0, math.nan], [0, 2], [1, -1]):
        with pytest.raises(InputError, match="true or 1 where a pixel is known"):
            Mask(torch.tensor(values))
    for arguments in (((4, 4), 2), (VOLUME, 12), (VOLUME, 0), (VOLUME, 2, 0)):
        with pytest.raises(GeometryError, match="ThickSlices"):
            ThickSlices(*arguments)
