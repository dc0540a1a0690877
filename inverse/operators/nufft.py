r"""Non-Cartesian MRI: radial and spiral trajectories by the non-uniform FFT.

.. math:: y_{ci} = \sqrt{d_i}\;\frac{1}{\sqrt{HW}}\sum_j S_{cj}\,x_j\,
    e^{-2\pi i\,\kappa_i\cdot(j - c)}, \quad c = \lfloor n/2\rfloor

with sample positions :math:`\kappa` in cycles per pixel, (row, column), and density compensation
d, in pixels of k-space that a sample stands for.  Data and operator carry :math:`\sqrt d` each, so
:math:`A^H y` is the gridding reconstruction in physical units; raw samples and their noise std are
multiplied by :math:`\sqrt d` first, which changes no likelihood.

Source: Fessler and Sutton, IEEE Trans. Signal Process. 51 (2003) for the NUFFT; Wajer and
Pruessmann, Proc. ISMRM 9 (2001) and Fessler et al., IEEE Trans. Signal Process. 53 (2005) for the
Toeplitz form of :math:`A^H A`.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from inverse.errors import GeometryError, UnsupportedError
from inverse.operators.coils import combine_coils
from inverse.operators.linop import LinearOperator, Solve, _per_sample, cg

__all__ = ["NonCartesian", "density_compensation", "radial", "spiral"]

_TABLE = 2**13  # entries a grid step of the interpolation table: 1e-4 accuracy
_GOLDEN = math.pi * (math.sqrt(5.0) - 1) / 2  # golden angle, 111.25 degrees


def radial(spokes: int, readout: int, *, golden: bool = True) -> Tensor:
    r"""Spokes through the zero frequency.

    Args:
        spokes: number of spokes.
        readout: samples a spoke, evenly spaced over [-1/2, 1/2); ``n`` for Nyquist sampling
            along the spoke, ``2 n`` with the usual oversampling.
        golden: successive spokes turn by the golden angle, else by :math:`\pi/` spokes.

    Returns:
        ``(spokes * readout, 2)`` float32, (row, column) in cycles per pixel.

    Raises:
        GeometryError: no spoke, or fewer than two samples.

    Source: Winkelmann et al., IEEE Trans. Med. Imaging 26 (2007) for the golden angle.
    """
    if spokes < 1 or readout < 2:
        raise GeometryError(
            f"a radial trajectory needs at least 1 spoke of 2 samples, got {spokes} of {readout}"
        )
    angle = np.arange(spokes) * (_GOLDEN if golden else math.pi / spokes)
    k = (np.arange(readout) - readout // 2) / readout
    points = k[None, :, None] * np.stack([np.sin(angle), np.cos(angle)], axis=1)[:, None]
    return torch.from_numpy(points.reshape(-1, 2).astype(np.float32))


def spiral(arms: int, samples: int, turns: float) -> Tensor:
    r"""Archimedean arms from the zero frequency, :math:`\kappa = \tau/2\,e^{2\pi i\,(t\tau + a)}`.

    With ``arms * turns`` equal to half the matrix, the arms are a pixel of k-space apart.  Samples
    are spaced evenly along the curve but for the start, :math:`\tau \propto \sqrt{s}`.

    Args:
        arms: interleaves, turned evenly.
        samples: samples an arm.
        turns: revolutions of an arm.

    Returns:
        ``(arms * samples, 2)`` float32, (row, column) in cycles per pixel.

    Raises:
        GeometryError: no arm, fewer than two samples, or no turn.
    """
    if arms < 1 or samples < 2 or not turns > 0:
        raise GeometryError(
            f"a spiral needs arms, samples and turns, got {arms}, {samples} and {turns}"
        )
    tau = np.sqrt(np.arange(samples) / samples)
    angle = 2 * math.pi * (turns * tau[None] + np.arange(arms)[:, None] / arms)
    points = 0.5 * tau[None, :, None] * np.stack([np.sin(angle), np.cos(angle)], axis=-1)
    return torch.from_numpy(points.reshape(-1, 2).astype(np.float32))


def density_compensation(trajectory: Tensor, shape: tuple[int, int]) -> Tensor:
    r"""Area of k-space that each sample stands for, in pixels of the grid of ``shape``.

    Pipe and Menon's iteration.  Its convolution kernel leaves the scale open, which is set so that
    a sample of a Cartesian grid stands for one pixel.

    Args:
        trajectory: ``(samples, 2)`` cycles per pixel.
        shape: image grid.

    Returns:
        ``(samples,)`` float32.

    Raises:
        UnsupportedError: torchkbnufft is not installed.

    Source: Pipe and Menon, MRM 41 (1999).
    """
    iterate = _torchkbnufft().calc_density_compensation_function
    axis = (torch.arange(16) - 8) / 16
    grid = torch.cartesian_prod(axis, axis).to(trajectory.device)
    one = iterate(_omega(grid), (16, 16)).abs().median()
    return cast(Tensor, (iterate(_omega(trajectory), shape).abs() / one).reshape(-1).float())


class NonCartesian(LinearOperator):
    r"""Samples of k-space anywhere, of one coil or several; see the module's equation.

    Args:
        trajectory: ``(samples, 2)``, (row, column) in cycles per pixel, within :math:`\pm 1/2`.
        shape: image grid (H, W).
        maps: coil sensitivities, complex ``(coils, H, W)``, or one set a slice ``(slices, coils,
            H, W)``; default one coil that sees all.
        density: d, ``(samples,)``, positive; default :func:`density_compensation`.

    Raises:
        GeometryError: positions outside k-space, or maps or density that do not fit.
        UnsupportedError: torchkbnufft is not installed.
    """

    trajectory: Tensor
    maps: Tensor
    density: Tensor

    def __init__(
        self,
        trajectory: Tensor,
        shape: tuple[int, int],
        maps: Tensor | None = None,
        density: Tensor | None = None,
    ) -> None:
        tkbn = _torchkbnufft()
        if trajectory.ndim != 2 or trajectory.shape[1] != 2 or len(trajectory) == 0:
            raise GeometryError(
                f"NonCartesian: the trajectory must be (samples, 2), got {tuple(trajectory.shape)}"
            )
        if not bool((trajectory.abs() <= 0.5).all()):
            raise GeometryError(
                "NonCartesian: sample positions must be within half a cycle per pixel; divide "
                "those in radians by 2 pi, or those in 1/mm by the pixels a mm"
            )
        if maps is None:
            maps = torch.ones(1, *shape, dtype=torch.complex64)
        if maps.ndim not in (3, 4) or tuple(maps.shape[-2:]) != tuple(shape):
            raise GeometryError(
                f"NonCartesian: coil maps must be (coils, {shape[0]}, {shape[1]}), one set a "
                f"slice or one for all, got {tuple(maps.shape)}"
            )
        if density is None:
            density = density_compensation(trajectory, shape)
        if tuple(density.shape) != (len(trajectory),) or not bool((density > 0).all()):
            raise GeometryError(
                f"NonCartesian: the density must be positive, one a sample, got shape "
                f"{tuple(density.shape)}; drop samples of no weight"
            )
        super().__init__(shape, (maps.shape[-3], len(trajectory)), torch.complex64)
        self.register_buffer("trajectory", trajectory.float())
        self.register_buffer("maps", maps.to(torch.complex64))
        self.register_buffer("density", density.float())
        grid = {"im_size": tuple(shape), "numpoints": 6, "table_oversamp": _TABLE}
        self._nufft: nn.Module = tkbn.KbNufft(**grid)
        self._nufft_adjoint: nn.Module = tkbn.KbNufftAdjoint(**grid)
        self._kernel: Tensor | None = None

    def _forward(self, x: Tensor) -> Tensor:
        images = self.maps * x.unsqueeze(-3)
        y = self._nufft(images.reshape(-1, *self.maps.shape[-3:]), _omega(self.trajectory))
        y = y * (self.density / math.prod(self.in_shape)).sqrt()
        return cast(Tensor, y.reshape(*images.shape[:-2], -1))

    def _adjoint(self, y: Tensor) -> Tensor:
        flat = y.reshape(-1, *self.out_shape)
        flat = flat * (self.density / math.prod(self.in_shape)).sqrt()
        images = self._nufft_adjoint(flat, _omega(self.trajectory))
        return combine_coils(images.reshape(*y.shape[:-1], *self.in_shape), self.maps)

    @property
    def normal(self) -> LinearOperator:
        """``A^H A`` without a NUFFT: a convolution on twice the grid."""
        if self._kernel is None or self._kernel.device != self.trajectory.device:
            weights = (self.density / math.prod(self.in_shape)).to(torch.complex64)
            self._kernel = _torchkbnufft().calc_toeplitz_kernel(
                _omega(self.trajectory), self.in_shape, weights[None], table_oversamp=_TABLE
            )
        return _Toeplitz(self._kernel, self.maps)

    def normal_solve(
        self,
        b: Tensor,
        rho: float | Tensor,
        x0: Tensor | None = None,
        *,
        tol: float = 1e-6,
        max_iter: int = 50,
    ) -> Solve:
        """Conjugate gradients on the Toeplitz form."""
        normal, r = self.normal, _per_sample(rho, b, 2)
        return cg(lambda x: normal(x) + r * x, b, x0, ndim=2, tol=tol, max_iter=max_iter)

    def weighted(self, weight: Tensor) -> LinearOperator:
        """``diag(w) A``; a weight that all coils and slices share is absorbed by the density."""
        shared = weight.numel() in (1, len(self.density)) and weight.shape[-1:] == (
            len(self.density),
        )
        if not shared or not bool((weight > 0).all()):
            return super().weighted(weight)
        density = self.density * weight.reshape(-1) ** 2
        return NonCartesian(self.trajectory, cast(Any, self.in_shape), self.maps, density)

    def take(self, index: Tensor) -> LinearOperator:
        """With the maps of the slices ``index``, where there is one set a slice."""
        if self.maps.ndim == 3 or self.maps.shape[0] == 1:
            return self
        other = copy.copy(self)
        other._buffers = {**self._buffers, "maps": self.maps[index]}
        return other

    @property
    def coils(self) -> int:
        """Number of coils."""
        return self.out_shape[0]

    def spec(self) -> dict[str, Any]:
        """Plain JSON values; trajectory, density and maps are stored beside them as arrays."""
        return {"type": "noncartesian", "shape": list(self.in_shape), "coils": self.coils}

    def extra_repr(self) -> str:
        """Coils, shape and samples, for ``repr``."""
        h, w = self.in_shape
        return f"{self.coils} coils, {h} x {w}, {len(self.density)} samples"


class _Toeplitz(LinearOperator):
    r""":math:`\sum_c \bar S_c\,(k * S_c x)`; the kernel k by its transform on twice the grid."""

    def __init__(self, kernel: Tensor, maps: Tensor) -> None:
        super().__init__(maps.shape[-2:], maps.shape[-2:], torch.complex64)
        self.register_buffer("kernel", kernel)
        self.register_buffer("maps", maps)

    def _forward(self, x: Tensor) -> Tensor:
        h, w = self.in_shape
        maps = cast(Tensor, self.maps)
        spectrum = torch.fft.fft2(maps * x.unsqueeze(-3), s=(2 * h, 2 * w))
        images = torch.fft.ifft2(cast(Tensor, self.kernel) * spectrum, norm="forward")
        return combine_coils(images[..., :h, :w], maps)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._forward(y)


def _omega(trajectory: Tensor) -> Tensor:
    """Radians per pixel, ``(2, samples)``, as the NUFFT takes them."""
    return (2 * math.pi * trajectory).mT.contiguous()


def _torchkbnufft() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it scripts functions on import
            import torchkbnufft
    except ImportError:
        raise UnsupportedError(
            "non-Cartesian MRI needs the package torchkbnufft, which is not installed; install "
            "the extra 'nufft' (pip install 'recon-sde[nufft]')"
        ) from None
    return torchkbnufft
