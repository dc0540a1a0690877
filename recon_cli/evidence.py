"""What a run leaves for the report besides images: residuals by group, and maps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recon_cli.output import write_npy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Generator, Tensor

    from inverse.measurement import Measurement
    from inverse.volumes import Volume
    from recon_cli.task import Task

__all__ = ["FOLDER", "Fit", "fit_by_group", "grouping", "residual_map", "write_maps"]

FOLDER = "maps"
RINGS = 8


def _groups(measurement: Measurement) -> tuple[str, list[float], Tensor] | None:
    """What the data are grouped by, the place of each group, and each datum's group."""
    from inverse.operators.ct import RayTransform
    from inverse.operators.geometry import ConeVectors
    from inverse.operators.mri import CartesianMRI, Sense
    from inverse.trust import by_first_axis, by_frequency

    operator = measurement.operator
    if isinstance(operator, RayTransform):
        groups = by_first_axis(operator.out_shape)
        if isinstance(operator.geometry, ConeVectors):
            return "view", [float(k) for k in range(operator.geometry.views)], groups
        angles = [math.degrees(a) for a in operator.geometry.angles]
        return "view angle in degrees", angles, groups
    if isinstance(operator, CartesianMRI | Sense):
        edges = [0.5 * (k + 0.5) / RINGS for k in range(RINGS)]
        return "spatial frequency in 1/pixel", edges, by_frequency(operator.out_shape, RINGS)
    return None


def fit_by_group(measurement: Measurement, x: Tensor) -> NDArray[np.float64] | None:
    """Reduced chi-square of the residual by view or ring of k-space, ``(slices, groups)``.

    ``None`` for operators without such groups.  See `inverse.trust.residual_chi2`.
    """
    from inverse.trust import residual_chi2

    found = _groups(measurement)
    if found is None:
        return None
    value = residual_chi2(measurement, x, found[2]).value.numpy()
    return value if value.shape[1] == len(found[1]) else None


class Fit:
    """How an image fits the data, gathered from a few items at a time.

    Args:
        task: the measurement.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._chi2: list[NDArray[np.float64]] = []
        self._groups: list[NDArray[np.float64] | None] = []

    def add(self, items: slice, x: Tensor) -> None:
        """The next items' images, physical units."""
        few = self._task.part(items)
        self._chi2.append(self._task.each_slice(few.chi2(x)))
        self._groups.append(fit_by_group(few, x))

    @property
    def chi2(self) -> NDArray[np.float64]:
        """Reduced residual chi-square a slice."""
        import numpy as np

        return np.concatenate(self._chi2)

    @property
    def by_group(self) -> NDArray[np.float64] | None:
        """`fit_by_group` of all."""
        import numpy as np

        found = [part for part in self._groups if part is not None]
        return np.concatenate(found) if len(found) == len(self._groups) else None


def grouping(
    measurement: Measurement, fits: Mapping[str, NDArray[np.float64] | None]
) -> dict[str, Any] | None:
    """The entry ``residual_by_group`` of ``metrics.json``: means over slices, by method."""
    found = _groups(measurement)
    values = {name: fit.mean(axis=0).tolist() for name, fit in fits.items() if fit is not None}
    if found is None or not values:
        return None
    return {"axis": found[0], "at": found[1], "methods": values}


def residual_map(
    measurement: Measurement, x: Tensor, generator: Generator | None = None
) -> NDArray[np.float32]:
    r"""Where in the image the data are not fitted, in units of what noise alone gives.

    .. math:: \frac{g}{\mathrm{rms}\,A^H(z/\sigma)}, \qquad
        g = A^H\frac{y - Ax}{\sigma^2}, \quad z \sim N(0, I)

    the gradient of the log likelihood over its size for the true image, averaged over pixels.
    Of complex images, the part of the gradient along their phase.  Values within 3 are noise.

    Args:
        measurement: data, operator and noise.
        x: ``(slices, *in_shape)``, physical units.
        generator: of the noise, for slices that follow others; by default a new one.
    """
    import torch

    generator = generator or torch.Generator().manual_seed(0)
    a, sigma = measurement.operator, measurement.noise
    y = measurement.data
    real = torch.randn(
        (*y.shape, 2 if y.is_complex() else 1), generator=generator, dtype=y.real.dtype
    )
    z = torch.view_as_complex(real) if y.is_complex() else real[..., 0]
    with torch.no_grad():
        g, noise = (a.adjoint(r / sigma) for r in ((y - a(x)) / sigma, z.to(y.device)))
    if x.is_complex():
        size = x.abs()
        turn = torch.where(size > 0, x.conj() / size.clamp_min(torch.finfo(size.dtype).tiny), 1)
        g, noise = (g * turn).real, noise.real
    axes = tuple(range(1, g.ndim))
    rms = noise.square().mean(dim=axes, keepdim=True).sqrt()
    return (g / rms.clamp_min(torch.finfo(rms.dtype).tiny)).float().cpu().numpy()


def write_maps(folder: Path, maps: Mapping[str, Volume]) -> None:
    """Write maps ``(slices, rows, columns)`` as half-precision ``.npy`` files in ``maps/``."""
    (folder / FOLDER).mkdir(exist_ok=True)
    for name, volume in maps.items():
        with (folder / FOLDER / f"{name}.npy").open("wb") as stream:
            write_npy(stream, volume, "float16")
