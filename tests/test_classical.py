"""Classical reconstructions: closed forms, certificates, and a phantom."""

from __future__ import annotations

from dataclasses import replace

import laws
import numpy as np
import pytest
import torch

from inverse.classical import (
    TV_WEIGHT_MR,
    cgls,
    fbp,
    os_sart,
    sirt,
    tikhonov,
    tv,
    zero_filled,
)
from inverse.errors import InputError, UnsupportedError
from inverse.measurement import Measurement
from inverse.operators.ct import ParallelBeam, RayTransform
from inverse.operators.linop import Diagonal, Identity
from inverse.operators.mask import Mask
from inverse.operators.mri import CartesianMRI, cartesian_mask

N = 48
ROWS = torch.arange(N)[:, None] - (N - 1) / 2
COLS = torch.arange(N) - (N - 1) / 2


def body() -> torch.Tensor:
    """A disc of water with a denser and an empty inset, 1/mm."""
    x = 0.02 * ((ROWS**2 + COLS**2) < 20**2).float()
    x += 0.02 * (((ROWS - 5) ** 2 + (COLS + 8) ** 2) < 16).float()
    return x - x * (((ROWS + 6) ** 2 + (COLS - 7) ** 2) < 25)


def ct_measurement(slices: int = 2, std: float = 0.01) -> tuple[Measurement, torch.Tensor]:
    op = RayTransform(ParallelBeam.sparse(16, (N, N), 2.0), (N, N), 2.0)
    x = torch.stack([body() * (1 - 0.3 * k) for k in range(slices)])
    y = op(x)
    y = y + std * laws.random(tuple(y.shape), torch.float32, 0)
    return Measurement(op, y, torch.tensor(std), "CT", (2.0, 2.0), 0.02), x


def denoising(y: torch.Tensor, std: float = 1.0) -> Measurement:
    return Measurement(Identity(y.shape[1:], y.dtype), y, torch.tensor(std), "MR", (1.0, 1.0))


def nrmse(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((x - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_tv_shrinks_a_step_by_the_known_amount(dtype: torch.dtype) -> None:
    # A step along columns of a (H, W) image, half and half: TV = H |jump|.  Each side moves
    # towards the other by sigma^2 weight / (u W / 2), until they meet.
    h, w, std, unit = 6, 10, 0.5, 2.0
    phase = 1.0 if dtype == torch.float32 else 0.6 + 0.8j
    y = torch.zeros(1, h, w, dtype=dtype)
    y[..., w // 2 :] = 4.0 * phase
    for weight in (2.0, 8.0):
        move = std**2 * weight / (unit * w / 2)
        x = tv(denoising(y, std), weight, unit=unit, tol=1e-5, max_iter=2000)
        assert bool(x.converged.all())
        expected = torch.full((h, w), move, dtype=torch.float32)
        expected[:, w // 2 :] = 4.0 - move
        torch.testing.assert_close(x.x[0], (expected * phase).to(dtype), rtol=0, atol=2e-3)
    flat = tv(denoising(y, std), 1e3, unit=unit, tol=1e-5, max_iter=2000)
    torch.testing.assert_close(
        flat.x[0], torch.full((h, w), 2.0 * phase, dtype=dtype), rtol=0, atol=1e-2
    )


def test_tv_gap_is_a_bound_that_closes() -> None:
    m, _ = ct_measurement()
    best = tv(m, 20.0, tol=1e-3, max_iter=2000)
    assert bool(best.converged.all())
    gaps = []
    for iterations in (5, 50, 200):
        some = tv(m, 20.0, tol=1e-9, max_iter=iterations)
        gap = some.gap * some.objective
        # the certificate: no image has an objective below P - gap, and `best` is nearly minimal
        assert bool((some.gap > 0).all())
        assert bool((some.objective - gap <= best.objective * (1 + 1e-6)).all())
        assert not bool(some.converged.any())
        gaps.append(float(some.gap.max()))
    assert gaps[2] < 0.2 * gaps[1] < 0.2 * gaps[0]


@pytest.mark.parametrize("nonnegative", [True, False])
def test_tv_recovers_a_piecewise_constant_body(nonnegative: bool) -> None:
    m, truth = ct_measurement()
    result = tv(m, 20.0, nonnegative=nonnegative, tol=0.01, max_iter=600)
    assert bool(result.converged.all())
    assert nrmse(result.x, truth) < 0.35 * nrmse(fbp(m), truth)
    assert nrmse(result.x, truth) < 0.5 * nrmse(cgls(m), truth)
    assert (float(result.x.min()) >= 0) == nonnegative
    torch.testing.assert_close(
        result.objective[0].item(), _objective(m, result.x, 20.0, 0.02)[0], rtol=1e-3, atol=0
    )


def _objective(m: Measurement, x: torch.Tensor, weight: float, unit: float) -> list[float]:
    fit = (((m.operator(x) - m.data) / m.noise) ** 2).sum((1, 2)) / 2
    dx = torch.diff(x, dim=2, append=x[..., -1:])
    dy = torch.diff(x, dim=1, append=x[:, -1:])
    return (fit + weight / unit * torch.hypot(dx, dy).sum((1, 2))).tolist()


def test_tv_slices_do_not_depend_on_each_other() -> None:
    m, _ = ct_measurement(3)
    together = tv(m, 20.0)
    alone = tv(m.take(torch.tensor([1])), 20.0)
    assert together.iterations[1] == alone.iterations[0]
    torch.testing.assert_close(together.x[1], alone.x[0], rtol=1e-3, atol=2e-5)


def test_tv_of_complex_images() -> None:
    truth = (50 * body() * torch.exp(0.5j * COLS / N)).to(torch.complex64)[None]
    op = CartesianMRI(cartesian_mask((N, N), 3.0, 0.1, "gaussian2d"))
    noise = torch.complex(*(laws.random((1, N, N), torch.float32, s) for s in (1, 2)))
    y = torch.where(op.mask, op(truth) + 0.01 * noise, 0)
    m = Measurement(op, y, torch.tensor(0.01), "MR", (1.0, 1.0))
    result = tv(m, tol=0.02)
    assert result.weight == TV_WEIGHT_MR
    assert result.unit == pytest.approx(float(np.percentile(zero_filled(m).abs(), 99)))
    assert bool(result.converged.all())
    assert nrmse(result.x, truth) < 0.5 * nrmse(zero_filled(m), truth)


def test_tv_refusals() -> None:
    m = denoising(torch.zeros(1, 4, 4))
    with pytest.raises(InputError, match="weight"):
        tv(m, 0.0, unit=1.0)
    with pytest.raises(InputError, match="unit"):
        tv(m, 1.0)  # an empty image has no percentile to scale by
    with pytest.raises(UnsupportedError, match="nonnegative"):
        tv(denoising(torch.zeros(1, 4, 4, dtype=torch.complex64)), 1.0, unit=1.0, nonnegative=True)
    with pytest.raises(UnsupportedError, match="images and volumes"):
        tv(denoising(torch.zeros(1, 4)), 1.0, unit=1.0)


def test_tikhonov_solves_its_normal_equations() -> None:
    m, _ = ct_measurement()
    rho = 2e5
    x = tikhonov(m, rho).x
    residual = m.operator.adjoint((m.operator(x) - m.data) / m.noise**2) + rho * x
    assert float(residual.norm()) < 1e-3 * float(m.operator.adjoint(m.data).norm() / m.noise**2)


def test_cgls_stops_at_the_noise_and_reaches_the_dense_solution() -> None:
    m, _ = ct_measurement()
    chi2 = m.chi2(cgls(m, 100))
    assert bool((chi2 <= 1.0).all())
    assert bool((chi2 > 0.5).all())
    assert bool((m.chi2(cgls(m, 3)) > chi2).all())
    matrix = laws.random((9, 4), torch.float32, 2)
    op = Identity((4,))
    op.out_shape = (9,)
    op._forward = lambda x: x @ matrix.T  # type: ignore[method-assign]
    op._adjoint = lambda y: y @ matrix  # type: ignore[method-assign]
    y = laws.random((2, 9), torch.float32, 3)
    exact = torch.linalg.lstsq(matrix, y.T).solution.T
    full = cgls(Measurement(op, y, torch.tensor(1.0), "MR", (1.0, 1.0)), 20, discrepancy=0.0)
    torch.testing.assert_close(full, exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", [sirt, os_sart])
def test_sirt_and_ordered_subsets(method) -> None:
    m, truth = ct_measurement()
    x = method(m)
    chi2 = m.chi2(x)
    assert bool((chi2 < 3.0).all())
    assert bool((m.chi2(method(m, 2)) > chi2).all())
    assert nrmse(x, truth) < 0.7 * nrmse(fbp(m), truth)
    assert float(x.min()) >= 0.0
    signed = method(m, nonnegative=False)
    assert float(signed.min()) < 0.0
    # a slice does not depend on its batch mates
    alone = method(m.take(torch.tensor([1])))
    torch.testing.assert_close(alone[0], x[1], rtol=1e-4, atol=1e-6)
    stopped = method(m, 50, discrepancy=50.0)
    assert bool((m.chi2(stopped) <= 50.0).all() & (m.chi2(stopped) > 5.0).all())


def test_sirt_is_its_formula() -> None:
    op = RayTransform(ParallelBeam.sparse(6, (8, 8), 1.0), (8, 8), 1.0)
    y = laws.random((2, *op.out_shape), torch.float32, 0)
    m = Measurement(op, y, torch.tensor(1.0), "CT", (1.0, 1.0), 0.02)
    a = op(torch.eye(64).reshape(64, 8, 8)).flatten(1).T.double()
    rows, columns = a.sum(1), a.sum(0)
    r = torch.where(rows > 0, 1 / rows, 0.0)
    x = torch.zeros(64, 2, dtype=torch.float64)
    for _ in range(4):
        x = x + (a.T @ (r[:, None] * (y.flatten(1).T.double() - a @ x))) / columns[:, None]
    expected = x.T.reshape(2, 8, 8).float()
    got = sirt(m, 4, discrepancy=0.0, nonnegative=False)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    one = os_sart(m, 4, 1, discrepancy=0.0, nonnegative=False)
    torch.testing.assert_close(one, got)


def test_subsets_carry_their_noise() -> None:
    m, _ = ct_measurement()
    noise = torch.full(m.data.shape, 0.01)
    noise[:, ::2] = 0.05
    mapped = replace(m, noise=noise)
    torch.testing.assert_close(
        os_sart(mapped, 2, 4, discrepancy=0.0), os_sart(m, 2, 4, discrepancy=0.0)
    )


def test_ordered_subsets_are_faster_per_pass() -> None:
    m, truth = ct_measurement(std=1e-3)
    assert nrmse(os_sart(m, 4, 8), truth) < 0.8 * nrmse(sirt(m, 4), truth)


def test_sirt_refusals() -> None:
    m, _ = ct_measurement()
    for subsets in (0, 17):
        with pytest.raises(InputError, match="1 to 16 subsets"):
            os_sart(m, 1, subsets)
    mri = denoising(torch.zeros(1, 4, 4, dtype=torch.complex64))
    with pytest.raises(UnsupportedError, match="cgls"):
        sirt(mri)
    with pytest.raises(UnsupportedError, match="RayTransform"):
        os_sart(denoising(torch.zeros(1, 4, 4)))


def test_direct_reconstructions() -> None:
    m, truth = ct_measurement(std=1e-4)
    assert float(fbp(m)[0][N // 2, N // 2]) == pytest.approx(0.02, rel=0.1)
    image = laws.random((2, 8, 8), torch.complex64, 0)
    full = CartesianMRI(torch.ones(8, 8, dtype=torch.bool))
    mri = Measurement(full, full(image), torch.tensor(1.0), "MR", (1.0, 1.0))
    torch.testing.assert_close(zero_filled(mri), image)
    with pytest.raises(UnsupportedError, match="RayTransform"):
        fbp(mri)
    assert truth.shape == fbp(m).shape


def test_cgls_stops_at_the_rounding_of_float32() -> None:
    """Long after convergence the recursion of the residual means nothing and used to diverge."""
    generator = torch.Generator().manual_seed(0)
    mask = Mask(torch.rand(16, 16, generator=generator) > 0.3)
    matrix = Diagonal(torch.linspace(0.01, 1.0, 256).reshape(16, 16), (16, 16))
    operator = mask @ matrix
    x = torch.randn(1, 16, 16, generator=generator)
    measured = Measurement(operator, operator(x), torch.tensor(1e-3), "MR", (1.0, 1.0))
    found = cgls(measured, 2000, discrepancy=0.0)
    torch.testing.assert_close(operator(found), operator(x), rtol=1e-3, atol=1e-4)
