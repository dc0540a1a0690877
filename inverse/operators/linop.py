r"""Linear operators: their algebra, their adjoints, and the least-squares solves on them.

An author writes ``_forward`` and ``_adjoint`` for a batch; everything else is inherited::

    A.H         the adjoint as an operator          A @ B     composition
    A.normal    A^H A                               A + B     sum
    2.0 * A     scaling                             Stack     one image, several measurements

Inner products are Hermitian, :math:`\langle u, v\rangle = \sum \bar u_i v_i`, and the adjoint is
the one of the real structure, :math:`\mathrm{Re}\langle Ax, y\rangle =
\mathrm{Re}\langle x, A^H y\rangle`, which for a complex-linear operator is the usual one and also
covers operators from real images to complex data.  PyTorch's gradient convention makes the adjoint
the backward pass, so each operator is differentiable without further code.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from inverse.errors import GeometryError, NumericalError

__all__ = [
    "Adjoint",
    "ComplexFromChannels",
    "ComplexFromReal",
    "Compose",
    "CountedOperator",
    "Diagonal",
    "Identity",
    "LinearOperator",
    "Scaled",
    "Solve",
    "Stack",
    "Sum",
    "cg",
]


class LinearOperator(nn.Module, ABC):
    """A linear map ``(*b, *in_shape) -> (*b, *out_shape)`` with its exact adjoint.

    Attributes:
        in_shape: shape of one input (an image), without batch dimensions.
        out_shape: shape of one output (a measurement), without batch dimensions.
        dtype: dtype of inputs, e.g. ``torch.float32``.
        out_dtype: dtype of outputs.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    dtype: torch.dtype
    out_dtype: torch.dtype

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        out_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_shape = tuple(int(n) for n in in_shape)
        self.out_shape = tuple(int(n) for n in out_shape)
        self.dtype = dtype
        self.out_dtype = dtype if out_dtype is None else out_dtype

    @abstractmethod
    def _forward(self, x: Tensor) -> Tensor:
        """``A x`` for ``x`` of shape ``(*b, *in_shape)``."""

    @abstractmethod
    def _adjoint(self, y: Tensor) -> Tensor:
        """``A^H y`` for ``y`` of shape ``(*b, *out_shape)``."""

    def forward(self, x: Tensor) -> Tensor:
        """``A x``: ``(*b, *in_shape) -> (*b, *out_shape)``.

        Raises:
            GeometryError: if the trailing dimensions of ``x`` are not ``in_shape``.
        """
        self._check(x, self.in_shape, "input")
        return cast(Tensor, _Linear.apply(x, self._forward, self._adjoint))

    def adjoint(self, y: Tensor) -> Tensor:
        """``A^H y``: ``(*b, *out_shape) -> (*b, *in_shape)``.

        Raises:
            GeometryError: if the trailing dimensions of ``y`` are not ``out_shape``.
        """
        self._check(y, self.out_shape, "data")
        return cast(Tensor, _Linear.apply(y, self._adjoint, self._forward))

    def _check(self, x: Tensor, shape: tuple[int, ...], what: str) -> None:
        n = len(shape)
        if x.ndim < n or (n and tuple(x.shape[-n:]) != shape):
            raise GeometryError(
                f"{self!r}: {what} must have shape (*batch, {', '.join(map(str, shape))}), "
                f"got {tuple(x.shape)}; reshape it or build the operator for this size"
            )

    @property
    def measured(self) -> int:
        """How many of the outputs are measurements; operators with masks count those they keep."""
        return math.prod(self.out_shape)

    @property
    def H(self) -> LinearOperator:
        """The adjoint as an operator; ``A.H.H is A``."""
        return Adjoint(self)

    @property
    def normal(self) -> LinearOperator:
        """``A^H A``."""
        return Compose(self.H, self)

    def __matmul__(self, other: LinearOperator) -> LinearOperator:
        return Compose(self, other)

    def __add__(self, other: LinearOperator) -> LinearOperator:
        return Sum(self, other)

    def __rmul__(self, factor: complex) -> LinearOperator:
        return Scaled(factor, self)

    def take(self, index: Tensor) -> LinearOperator:
        """The operator of the slices ``index``; itself where all slices share it.

        Operators that keep one set of values a slice (coil maps, weights) in front of
        ``in_shape`` select those.
        """
        return self

    def weighted(self, weight: Tensor) -> LinearOperator:
        """``diag(w) A``: what prewhitening makes of an operator; see :class:`Diagonal`."""
        if weight.numel() == 1:
            return Scaled(float(weight), self)
        return Compose(Diagonal(weight, self.out_shape, self.out_dtype), self)

    def normal_solve(
        self,
        b: Tensor,
        rho: float | Tensor,
        x0: Tensor | None = None,
        *,
        tol: float = 1e-6,
        max_iter: int = 50,
    ) -> Solve:
        r"""Solve :math:`(A^H A + \rho I)\,x = b` for a batch, by conjugate gradients.

        Args:
            b: right-hand sides ``(*b, *in_shape)``.
            rho: ridge weight, a number or one a batch element (shape ``b``).
            x0: start, default zero.
            tol: stop an element when its residual is below ``tol * |b|``.
            max_iter: most iterations.

        Returns:
            The solutions with iteration count and residuals.  Operators with a closed form
            override this method.

        Raises:
            NumericalError: if an iterate leaves the finite numbers.
        """
        r = _per_sample(rho, b, len(self.in_shape))

        def apply(x: Tensor) -> Tensor:
            return self._adjoint(self._forward(x)) + r * x

        return cg(apply, b, x0, ndim=len(self.in_shape), tol=tol, max_iter=max_iter)

    def norm(self, iterations: int = 30, seed: int = 0) -> float:
        r"""Largest singular value :math:`\|A\|_2`, by power iteration on ``A^H A``.

        A lower bound that has converged to a few per cent after 30 iterations on the operators
        here; multiply by 1.05 where an upper bound is needed.
        """
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.in_shape, generator=generator, dtype=self.dtype).to(self._device())
        value = 0.0
        for _ in range(iterations):
            x = x / torch.linalg.vector_norm(x)
            x = self._adjoint(self._forward(x))
            value = float(torch.linalg.vector_norm(x))
            if value == 0.0:
                return 0.0
        return math.sqrt(value)

    def adjoint_error(self, generator: torch.Generator | None = None, *, draws: int = 3) -> float:
        r"""How far :meth:`adjoint` is from the adjoint of :meth:`forward`; 0 where it is that.

        .. math:: \max\ \frac{|\mathrm{Re}\langle Ax, y\rangle
                  - \mathrm{Re}\langle x, A^H y\rangle|}{\|Ax\|\,\|y\|}, \qquad
                  y = \frac{Ax}{\|Ax\|} + \frac{z}{\|z\|}

        over random x and z; the first part of y shows a wrong scale however many data there are.
        Rounding leaves about 1e-6 in float32, and solves need less than 1e-3.  Infinite where a
        product is not finite.

        Args:
            generator: of the draws, on the CPU; default one of seed 0.
            draws: pairs to test.
        """
        device = self._device()
        generator = torch.Generator().manual_seed(0) if generator is None else generator

        def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=dtype).to(device)

        def unit(v: Tensor) -> Tensor:
            return v / torch.linalg.vector_norm(v).clamp_min(torch.finfo(v.dtype).tiny)

        worst = 0.0
        for _ in range(draws):
            x, z = draw(self.in_shape, self.dtype), draw(self.out_shape, self.out_dtype)
            with torch.no_grad():
                ax = self.forward(x)
                y = unit(ax) + unit(z)
                gap = abs(_real_dot(ax, y) - _real_dot(x, self.adjoint(y)))
            scale = float(torch.linalg.vector_norm(ax) * torch.linalg.vector_norm(y))
            error = gap / scale if scale > 0 else math.inf if gap else 0.0
            worst = max(worst, error if math.isfinite(error) else math.inf)
        return worst

    def _device(self) -> torch.device | None:
        """Where its values are; ``None`` for an operator without any."""
        return next((p.device for p in [*self.buffers(), *self.parameters()]), None)

    def extra_repr(self) -> str:
        """Shapes, for ``repr``."""
        return f"{self.in_shape} -> {self.out_shape}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


class _Linear(torch.autograd.Function):
    """Autograd of a linear map: the adjoint is the backward pass, and the reverse."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, op: Callable[[Tensor], Tensor], adj: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.op, ctx.adj = op, adj
        return op(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _Linear.apply(grads[0], ctx.adj, ctx.op), None, None


class Adjoint(LinearOperator):
    """``A^H``."""

    def __init__(self, op: LinearOperator) -> None:
        super().__init__(op.out_shape, op.in_shape, op.out_dtype, op.dtype)
        self.op = op

    def _forward(self, x: Tensor) -> Tensor:
        return self.op._adjoint(x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.op._forward(y)

    def take(self, index: Tensor) -> LinearOperator:
        """Of the operator's slices."""
        return Adjoint(self.op.take(index))

    @property
    def H(self) -> LinearOperator:
        """The operator itself."""
        return self.op

    def __repr__(self) -> str:
        return f"{self.op!r}.H"


class Compose(LinearOperator):
    """``A B``."""

    def __init__(self, a: LinearOperator, b: LinearOperator) -> None:
        if a.in_shape != b.out_shape:
            raise GeometryError(
                f"cannot compose {a!r} @ {b!r}: the left operator takes {a.in_shape}, the right "
                f"one gives {b.out_shape}"
            )
        super().__init__(b.in_shape, a.out_shape, b.dtype, a.out_dtype)
        self.a, self.b = a, b

    @property
    def measured(self) -> int:
        """Those of the outer operator."""
        return self.a.measured

    def take(self, index: Tensor) -> LinearOperator:
        """Of both operators' slices."""
        return Compose(self.a.take(index), self.b.take(index))

    def _forward(self, x: Tensor) -> Tensor:
        return self.a._forward(self.b._forward(x))

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.b._adjoint(self.a._adjoint(y))

    def __repr__(self) -> str:
        return f"{self.a!r} @ {self.b!r}"


class Sum(LinearOperator):
    """``A + B``."""

    def __init__(self, a: LinearOperator, b: LinearOperator) -> None:
        if (a.in_shape, a.out_shape) != (b.in_shape, b.out_shape):
            raise GeometryError(
                f"cannot add {a!r} and {b!r}: both must map the same shapes; adapt one of them"
            )
        super().__init__(a.in_shape, a.out_shape, a.dtype, a.out_dtype)
        self.a, self.b = a, b

    def _forward(self, x: Tensor) -> Tensor:
        return self.a._forward(x) + self.b._forward(x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.a._adjoint(y) + self.b._adjoint(y)

    def take(self, index: Tensor) -> LinearOperator:
        """Of both operators' slices."""
        return Sum(self.a.take(index), self.b.take(index))

    def __repr__(self) -> str:
        return f"({self.a!r} + {self.b!r})"


class Scaled(LinearOperator):
    """``c A``."""

    def __init__(self, factor: complex, op: LinearOperator) -> None:
        super().__init__(op.in_shape, op.out_shape, op.dtype, op.out_dtype)
        self.factor, self.op = factor, op

    @property
    def measured(self) -> int:
        """Those of the scaled operator."""
        return self.op.measured

    def take(self, index: Tensor) -> LinearOperator:
        """Of the operator's slices."""
        return Scaled(self.factor, self.op.take(index))

    def _forward(self, x: Tensor) -> Tensor:
        return self.factor * self.op._forward(x)

    def _adjoint(self, y: Tensor) -> Tensor:
        # conj(c) A^H y, also for real c
        c = self.factor.conjugate()
        return self.op._adjoint(c * y)

    def normal_solve(
        self,
        b: Tensor,
        rho: float | Tensor,
        x0: Tensor | None = None,
        *,
        tol: float = 1e-6,
        max_iter: int = 50,
    ) -> Solve:
        """``(|c|^2 A^H A + rho) x = b``, handed to ``A`` so that its closed form is used."""
        c2 = abs(self.factor) ** 2
        if c2 == 0.0:
            return super().normal_solve(b, rho, x0, tol=tol, max_iter=max_iter)
        return self.op.normal_solve(b / c2, rho / c2, x0, tol=tol, max_iter=max_iter)

    def __repr__(self) -> str:
        return f"{self.factor:g} * {self.op!r}"


class Stack(LinearOperator):
    """Several measurements of one image, flattened and joined: ``y = [A_1 x; A_2 x; ...]``."""

    def __init__(self, ops: Sequence[LinearOperator]) -> None:
        if not ops or any(op.in_shape != ops[0].in_shape for op in ops):
            raise GeometryError(
                f"Stack needs at least one operator, all on one image shape, got {list(ops)!r}"
            )
        self.sizes = [math.prod(op.out_shape) for op in ops]
        super().__init__(ops[0].in_shape, (sum(self.sizes),), ops[0].dtype, ops[0].out_dtype)
        self.ops = nn.ModuleList(ops)

    def _members(self) -> list[LinearOperator]:
        return [cast(LinearOperator, op) for op in self.ops]

    def _forward(self, x: Tensor) -> Tensor:
        batch = x.shape[: x.ndim - len(self.in_shape)]
        return torch.cat([op._forward(x).reshape(*batch, -1) for op in self._members()], dim=-1)

    def _adjoint(self, y: Tensor) -> Tensor:
        parts = torch.split(y, self.sizes, dim=-1)
        terms = [
            op._adjoint(part.reshape(*y.shape[:-1], *op.out_shape))
            for op, part in zip(self._members(), parts, strict=True)
        ]
        return torch.stack(terms).sum(dim=0)

    def take(self, index: Tensor) -> LinearOperator:
        """Of every operator's slices."""
        return Stack([op.take(index) for op in self._members()])


class Identity(LinearOperator):
    """``x -> x``."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
        super().__init__(shape, shape, dtype)

    def _forward(self, x: Tensor) -> Tensor:
        return x

    def _adjoint(self, y: Tensor) -> Tensor:
        return y


class Diagonal(LinearOperator):
    """``x -> w x`` elementwise; ``w`` may carry batch dimensions (one weight map a slice)."""

    weight: Tensor

    def __init__(
        self, weight: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(shape, shape, dtype)
        self.register_buffer("weight", weight)

    def _forward(self, x: Tensor) -> Tensor:
        return self.weight * x

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.weight.conj() * y

    def take(self, index: Tensor) -> LinearOperator:
        """The weights of the slices ``index``, where there is one map a slice."""
        if self.weight.ndim <= len(self.in_shape) or self.weight.shape[0] == 1:
            return self
        return Diagonal(self.weight[index], self.in_shape, self.dtype)


class ComplexFromReal(LinearOperator):
    """A real image as a complex one with zero phase; the adjoint keeps the real part."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__(shape, shape, torch.float32, torch.complex64)

    def _forward(self, x: Tensor) -> Tensor:
        return x.to(torch.complex64)

    def _adjoint(self, y: Tensor) -> Tensor:
        return y.real.contiguous()


class ComplexFromChannels(LinearOperator):
    """``(*b, 2, *shape)`` real and imaginary channels to ``(*b, *shape)`` complex."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__((2, *shape), shape, torch.float32, torch.complex64)
        self._axis = -1 - len(tuple(shape))

    def _forward(self, x: Tensor) -> Tensor:
        re, im = x.unbind(self._axis)
        return torch.complex(re, im)

    def _adjoint(self, y: Tensor) -> Tensor:
        return torch.stack([y.real, y.imag], dim=self._axis)


class CountedOperator(LinearOperator):
    """The same operator, counting its applications and those of its adjoint.

    Args:
        op: the operator.
        tally: where they are counted; default a new one.
    """

    def __init__(self, op: LinearOperator, tally: list[int] | None = None) -> None:
        super().__init__(op.in_shape, op.out_shape, op.dtype, op.out_dtype)
        self.op = op
        self.tally = [0] if tally is None else tally

    def take(self, index: Tensor) -> LinearOperator:
        """Of the operator's slices; counts go to the same tally."""
        return CountedOperator(self.op.take(index), self.tally)

    @property
    def measured(self) -> int:
        """Those of the operator."""
        return self.op.measured

    def _forward(self, x: Tensor) -> Tensor:
        self.tally[0] += 1
        return self.op._forward(x)

    def _adjoint(self, y: Tensor) -> Tensor:
        self.tally[0] += 1
        return self.op._adjoint(y)

    def normal_solve(
        self,
        b: Tensor,
        rho: float | Tensor,
        x0: Tensor | None = None,
        *,
        tol: float = 1e-6,
        max_iter: int = 50,
    ) -> Solve:
        """That of the operator, two applications an iteration."""
        result = self.op.normal_solve(b, rho, x0, tol=tol, max_iter=max_iter)
        self.tally[0] += 2 * (result.iterations + (x0 is not None))
        return result


@dataclass(frozen=True)
class Solve:
    """Result of an iterative solve.

    Attributes:
        x: solutions ``(*b, *shape)``.
        iterations: iterations done (operator applications).
        residual: relative residual a batch element, shape ``b``.
        converged: whether each element met the tolerance, shape ``b``.
    """

    x: Tensor
    iterations: int
    residual: Tensor
    converged: Tensor


def _real_dot(u: Tensor, v: Tensor) -> float:
    """``Re <u, v>``, float64."""
    if u.is_complex() or v.is_complex():
        u, v = (torch.view_as_real(w.to(torch.complex128)) for w in (u, v))
    return float((u.double() * v.double()).sum())


def _per_sample(value: float | Tensor, like: Tensor, ndim: int) -> Tensor:
    """A number or one number a batch element, shaped to multiply ``like``; float32."""
    v = torch.as_tensor(value, device=like.device, dtype=torch.float32)
    return v.reshape(*v.shape, *([1] * ndim)) if v.ndim else v


def cg(
    apply: Callable[[Tensor], Tensor],
    b: Tensor,
    x0: Tensor | None = None,
    *,
    ndim: int,
    tol: float = 1e-6,
    max_iter: int = 50,
) -> Solve:
    r"""Conjugate gradients for :math:`Mx = b`, ``M`` Hermitian positive definite, batched.

    Every batch element has its own step sizes and stops on its own, so its solution does not
    depend on the others.  Inner products are Hermitian and accumulated in float64.

    Args:
        apply: ``x -> M x`` on ``(*b, *shape)``.
        b: right-hand sides ``(*b, *shape)``.
        x0: start, default zero.
        ndim: how many trailing dimensions make one element.
        tol: relative residual at which an element stops.
        max_iter: most iterations.

    Raises:
        NumericalError: if a residual is not finite.

    Source: Hestenes and Stiefel, J. Res. Nat. Bur. Stand. 49 (1952).
    """
    dims = tuple(range(-ndim, 0))
    real = b.real.dtype if b.is_complex() else b.dtype

    def dot(u: Tensor, v: Tensor) -> Tensor:
        if u.is_complex():
            u, v = torch.view_as_real(u), torch.view_as_real(v)
            return (u * v).sum(
                dim=(*(d - 1 for d in dims), -1), keepdim=False, dtype=torch.float64
            )
        return (u * v).sum(dim=dims, dtype=torch.float64)

    def spread(s: Tensor) -> Tensor:
        return s.to(real).reshape(*s.shape, *([1] * ndim))

    x = torch.zeros_like(b) if x0 is None else x0.clone()
    r = b.clone() if x0 is None else b - apply(x)
    p = r.clone()
    rr, bb = dot(r, r), dot(b, b)
    stop = tol**2 * bb
    iterations = 0
    while iterations < max_iter and bool((rr > stop).any()):
        q = apply(p)
        pq = dot(p, q)
        active = (rr > stop) & (pq > 0)
        if not bool(active.any()):
            break
        step = torch.where(active, rr / pq.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
        x = x + spread(step) * p
        r = r - spread(step) * q
        new = torch.where(active, dot(r, r), rr)
        ratio = torch.where(active, new / rr.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
        p = r + spread(ratio) * p
        rr = new
        iterations += 1
    if not bool(torch.isfinite(rr).all()):
        raise NumericalError(
            "conjugate gradients left the finite numbers; check the data for infinite values and "
            "the operator for NaN, and, where it is your own, that its adjoint is the one of its "
            "forward map: A.adjoint_error() must be near 0"
        )
    residual = torch.sqrt(rr / bb.clamp_min(torch.finfo(torch.float64).tiny))
    return Solve(x, iterations, residual, rr <= stop)
