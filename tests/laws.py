"""Laws that every linear operator obeys; used for each operator and for their algebra."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inverse.errors import GeometryError
from inverse.operators.linop import LinearOperator

BATCHES = ((), (1,), (3,), (2, 2))


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def inner(u: Tensor, v: Tensor) -> float:
    """Re <u, v> in double precision."""
    if u.is_complex():
        u, v = torch.view_as_real(u), torch.view_as_real(v)
    return float((u.double() * v.double()).sum())


def norm(u: Tensor) -> float:
    return inner(u, u) ** 0.5


def check_adjoint(op: LinearOperator, tol: float = 1e-5) -> None:
    """Re <Ax, y> = Re <x, A^H y>."""
    for seed, batch in enumerate(BATCHES):
        x = random((*batch, *op.in_shape), op.dtype, seed)
        y = random((*batch, *op.out_shape), op.out_dtype, 100 + seed)
        ax, aty = op(x), op.adjoint(y)
        assert ax.shape == y.shape
        assert ax.dtype == op.out_dtype
        assert aty.shape == x.shape
        assert aty.dtype == op.dtype
        assert abs(inner(ax, y) - inner(x, aty)) <= tol * norm(ax) * norm(y)
        assert norm(ax) > 0


def check_linear(op: LinearOperator, tol: float = 1e-5) -> None:
    """A(ax + z) = a Ax + Az with real a (adjoints of real structure are real-linear only)."""
    x, z = (random((2, *op.in_shape), op.dtype, seed) for seed in (1, 2))
    left, right = op(-1.7 * x + z), -1.7 * op(x) + op(z)
    assert norm(left - right) <= tol * norm(right)


def check_autograd(op: LinearOperator, tol: float = 1e-5) -> None:
    """The gradient of Re <Ax, y> is A^H y, and of Re <A^H y, x> it is A x."""
    x = random((2, *op.in_shape), op.dtype, 3).requires_grad_()
    y = random((2, *op.out_shape), op.out_dtype, 4).requires_grad_()

    def scalar(u: Tensor, v: Tensor) -> Tensor:
        if u.is_complex():
            u, v = torch.view_as_real(u), torch.view_as_real(v)
        return (u * v).sum()

    (gx,) = torch.autograd.grad(scalar(op(x), y.detach()), x)
    aty = op.adjoint(y.detach())
    assert norm(gx - aty) <= tol * norm(aty)
    (gy,) = torch.autograd.grad(scalar(op.adjoint(y), x.detach()), y)
    ax = op(x.detach())
    assert norm(gy - ax) <= tol * norm(ax)


def check_shapes(op: LinearOperator) -> None:
    """Wrong shapes are caller errors, for inputs and data."""
    for call, shape, dtype in (
        (op, op.in_shape, op.dtype),
        (op.adjoint, op.out_shape, op.out_dtype),
    ):
        wrong = (*shape[:-1], shape[-1] + 1)
        with pytest.raises(GeometryError, match="must have shape"):
            call(torch.zeros(wrong, dtype=dtype))
        with pytest.raises(GeometryError):
            call(torch.zeros(shape[1:], dtype=dtype))


def check_batch(op: LinearOperator, tol: float = 1e-6) -> None:
    """A batch is its members."""
    for call, shape, dtype in (
        (op, op.in_shape, op.dtype),
        (op.adjoint, op.out_shape, op.out_dtype),
    ):
        batch = random((3, *shape), dtype, 5)
        whole = call(batch)
        single = torch.stack([call(item) for item in batch])
        assert norm(whole - single) <= tol * norm(single)


def check_all(op: LinearOperator) -> None:
    """Every law."""
    check_adjoint(op)
    check_linear(op)
    check_autograd(op)
    check_shapes(op)
    check_batch(op)
