"""Operator algebra and the solves on it."""

from __future__ import annotations

import math

import laws
import pytest
import torch

from inverse.errors import GeometryError, NumericalError
from inverse.operators.linop import (
    ComplexFromChannels,
    ComplexFromReal,
    CountedOperator,
    Diagonal,
    Identity,
    LinearOperator,
    Stack,
    cg,
)
from inverse.operators.mask import Mask
from inverse.operators.mri import CartesianMRI, Fourier, cartesian_mask


class Dense(LinearOperator):
    """A matrix, for comparison with dense algebra."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__(matrix.shape[1:], matrix.shape[:1], matrix.dtype)
        self.register_buffer("matrix", matrix)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix.T

    def _adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return y @ self.matrix.conj()


def dense(m: int, n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Dense:
    return Dense(laws.random((m, n), dtype, seed))


SHAPE = (6, 5)
OPERATORS = {
    "dense": dense(7, 5),
    "dense complex": dense(7, 5, torch.complex64),
    "identity": Identity(SHAPE),
    "diagonal complex": Diagonal(laws.random(SHAPE, torch.complex64, 1), SHAPE, torch.complex64),
    "adjoint": dense(7, 5, torch.complex64).H,
    "compose": dense(4, 7, torch.complex64, 1) @ dense(7, 5, torch.complex64, 2),
    "sum": dense(7, 5, seed=1) + dense(7, 5, seed=2),
    "scaled": 2.5 * dense(7, 5),
    "scaled complex": (1.0 - 2.0j) * dense(7, 5, torch.complex64),
    "normal": dense(7, 5).normal,
    "stack": Stack([dense(7, 5), dense(3, 5, seed=1)]),
    "weighted": dense(7, 5).weighted(torch.linspace(0.5, 2.0, 7)),
    "real to complex": Fourier(SHAPE) @ ComplexFromReal(SHAPE),
    "channels to complex": Fourier(SHAPE) @ ComplexFromChannels(SHAPE),
    "mask": Mask(torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) > 0.4),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_laws(name: str) -> None:
    laws.check_all(OPERATORS[name])


def test_algebra_matches_matrices() -> None:
    a, b = dense(4, 7, torch.complex64, 1), dense(7, 5, torch.complex64, 2)
    x = laws.random((5,), torch.complex64, 3)
    c = 1.0 - 2.0j
    torch.testing.assert_close((a @ b)(x), a.matrix @ (b.matrix @ x))
    torch.testing.assert_close((c * b)(x), c * (b.matrix @ x))
    torch.testing.assert_close((c * b).H((b)(x)), (c * b.matrix).mH @ (b.matrix @ x))
    torch.testing.assert_close(b.normal(x), b.matrix.mH @ (b.matrix @ x))
    assert b.H.H is b


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(GeometryError, match="cannot compose"):
        dense(7, 5) @ dense(7, 5)
    with pytest.raises(GeometryError, match="cannot add"):
        dense(7, 5) + dense(7, 4)
    with pytest.raises(GeometryError, match="at least one"):
        Stack([])


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_cg_solves_as_dense_algebra_does(dtype: torch.dtype) -> None:
    op = dense(9, 6, dtype)
    b = laws.random((3, 6), dtype, 5)
    rho = torch.tensor([0.1, 1.0, 10.0])
    solve = op.normal_solve(b, rho, tol=1e-6, max_iter=60)
    eye = torch.eye(6, dtype=dtype)
    for k in range(3):
        m = op.matrix.mH @ op.matrix + rho[k] * eye
        torch.testing.assert_close(solve.x[k], torch.linalg.solve(m, b[k]), rtol=1e-4, atol=1e-5)
    assert bool(solve.converged.all())
    warm = op.normal_solve(b, rho, solve.x, tol=1e-5)
    assert warm.iterations == 0


def test_cg_elements_do_not_depend_on_each_other() -> None:
    op = dense(40, 30)
    b = laws.random((3, 30), torch.float32, 5)
    b[1] *= 1e4
    together = op.normal_solve(b, 0.5, tol=1e-4).x
    alone = torch.stack([op.normal_solve(item[None], 0.5, tol=1e-4).x[0] for item in b])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


def test_cg_stops_at_the_limit_and_refuses_nan() -> None:
    op = dense(40, 30)
    b = laws.random((1, 30), torch.float32, 5)
    short = op.normal_solve(b, 1e-3, max_iter=2)
    assert short.iterations == 2
    assert not bool(short.converged.any())
    with pytest.raises(NumericalError):
        cg(lambda x: x, torch.full((1, 3), torch.nan), ndim=1)


@pytest.mark.parametrize(
    "op",
    [
        Mask(torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) > 0.4),
        Fourier(SHAPE),
        CartesianMRI(cartesian_mask(SHAPE, 2.0, 0.2, "random1d")),
        0.3 * CartesianMRI(cartesian_mask(SHAPE, 2.0, 0.2, "random1d")),
    ],
    ids=repr,
)
def test_closed_form_solves_agree_with_cg(op: LinearOperator) -> None:
    b = laws.random((2, *SHAPE), op.dtype, 1)
    rho = torch.tensor([0.3, 4.0])
    closed = op.normal_solve(b, rho)
    iterated = LinearOperator.normal_solve(op, b, rho, tol=1e-7, max_iter=100)
    torch.testing.assert_close(closed.x, iterated.x, rtol=1e-4, atol=1e-5)
    assert bool(closed.converged.all())


def test_norm_is_the_largest_singular_value() -> None:
    op = dense(9, 6)
    expected = float(torch.linalg.matrix_norm(op.matrix, 2))
    assert op.norm(iterations=200) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_error_of_a_right_adjoint_is_rounding(name: str) -> None:
    assert OPERATORS[name].adjoint_error() < 1e-5


class Crooked(LinearOperator):
    """An operator of an author who got the adjoint wrong."""

    def __init__(self, n: int, wrong: float) -> None:
        super().__init__((n,), (n,))
        self.wrong = wrong

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def _adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return self.wrong * y


def test_a_wrong_adjoint_shows_at_every_size_and_is_named_where_it_fails() -> None:
    for n in (4, 100_000):
        # <Ax, y> = |Ax| (1 + O(1/sqrt n)), |y| = sqrt 2
        assert Crooked(n, 1.1).adjoint_error() == pytest.approx(0.1 / 2**0.5, rel=0.6)
        assert Crooked(n, math.nan).adjoint_error() == math.inf
    turned = Crooked(16, 1.0)
    # skew: the residual grows by 1e4 at the first step, and out of float32
    turned._adjoint = lambda y: 1e4 * (y.roll(1, -1) - y.roll(-1, -1))  # type: ignore[method-assign]
    b = 1e35 * laws.random((1, 16), torch.float32, 0)
    with pytest.raises(NumericalError, match=r"adjoint_error\(\) must be near 0"):
        turned.normal_solve(b, 1.0)


def test_a_counted_operator_counts_and_is_the_same() -> None:
    op = dense(7, 5, torch.float32)
    counted = CountedOperator(op)
    x = torch.ones(2, 5)
    torch.testing.assert_close(counted(x), op(x))
    counted.take(torch.tensor([0])).adjoint(op(x))
    assert counted.tally == [2]
    solve = counted.normal_solve(x, 1.0, x, max_iter=3)
    assert counted.tally == [2 + 2 * (solve.iterations + 1)]
