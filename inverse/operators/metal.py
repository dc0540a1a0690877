r"""Metal in CT: where it is, which rays it spoils, and data without those rays.

Metal artefact reduction is inpainting in the data: rays through metal are unknown, and a prior, or
linear interpolation along the detector, supplies what they would have read.

Source: Kalender, Hebel and Ebersberger, Radiology 164 (1987) for interpolation; Song et al.,
*Solving Inverse Problems in Medical Imaging with Score-Based Generative Models*, ICLR 2022, for
the trace as a mask under a score prior.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inverse.errors import GeometryError
from inverse.operators.ct import RayTransform

__all__ = ["METAL_HU", "UnspoiledRays", "interpolate_trace", "metal_trace", "segment_metal"]

METAL_HU = 3000.0
"""Threshold between the densest bone and metal."""


def segment_metal(hu: Tensor, threshold: float = METAL_HU, margin: int = 0) -> Tensor:
    """Pixels of metal.

    Args:
        hu: images ``(*b, H, W)`` in HU.
        threshold: metal is above it.
        margin: pixels by which the region is widened, in each of the eight directions.

    Returns:
        Boolean, of the shape of ``hu``.

    Raises:
        GeometryError: a negative margin.
    """
    if margin < 0:
        raise GeometryError(f"the margin around metal must not be negative, got {margin} pixels")
    metal = hu > threshold
    if margin == 0:
        return metal
    flat = metal.reshape(-1, 1, *hu.shape[-2:]).to(torch.float32)
    wide = torch.nn.functional.max_pool2d(flat, 2 * margin + 1, stride=1, padding=margin)
    return (wide > 0).reshape(hu.shape)


def metal_trace(operator: RayTransform, metal: Tensor, margin: int = 0) -> Tensor:
    """Data that any of the slices' metal spoils: the support of its projection.

    Args:
        operator: the scan.
        metal: boolean images ``(*b, H, W)``.
        margin: bins by which the trace is widened on both sides, for metal that is finer than
            the grid.

    Returns:
        Boolean ``(views, bins)``, true on the trace of the union of all images.

    Raises:
        GeometryError: images of another grid, or a negative margin.
    """
    if margin < 0:
        raise GeometryError(f"the margin of the trace must not be negative, got {margin} bins")
    union = metal.reshape(-1, *metal.shape[-2:]).any(dim=0).to(torch.float32)
    length = operator(union)
    # a grazing ray that meets less than a hundredth of a pixel is not spoiled
    trace = length > 0.01 * operator.pixel_mm
    if margin:
        wide = torch.nn.functional.max_pool1d(
            trace.to(torch.float32), 2 * margin + 1, stride=1, padding=margin
        )
        trace = wide > 0
    return trace


class UnspoiledRays(RayTransform):
    """A scan without the rays through metal, whose data read zero.

    Args:
        scan: the whole scan.
        trace: boolean ``(views, bins)``, true where data are spoiled; shared by all slices.

    Raises:
        GeometryError: a trace of another shape, or one that leaves no ray.
    """

    good: Tensor

    def __init__(self, scan: RayTransform, trace: Tensor) -> None:
        if tuple(trace.shape) != scan.out_shape or bool(trace.all()):
            raise GeometryError(
                f"the metal trace of {scan!r} must have shape {scan.out_shape} and leave a ray, "
                f"got {tuple(trace.shape)} with {int(trace.sum())} spoiled rays"
            )
        super().__init__(scan.geometry, scan.in_shape, scan.spacing, scan.kernel, max_bytes=-1)
        self.max_bytes, self.path = scan.max_bytes, scan.path
        for name, part in scan.named_buffers():
            self.register_buffer(name, part, persistent=False)
        self.register_buffer("good", ~trace.to(torch.bool))

    def _forward(self, x: Tensor) -> Tensor:
        return torch.where(self.good, super()._forward(x), 0.0)

    def _adjoint(self, y: Tensor) -> Tensor:
        return super()._adjoint(torch.where(self.good, y, 0.0))

    @property
    def measured(self) -> int:
        """Rays that are not spoiled."""
        return int(self.good.sum())

    def subset(self, views: Sequence[int] | slice) -> UnspoiledRays:
        """The transform of some views, by their numbers, without their spoiled rays.

        Raises:
            GeometryError: a number that is not a view's, no view, or none with a good ray.
        """
        chosen = views if isinstance(views, slice) else list(views)
        return UnspoiledRays(super().subset(views), ~self.good[chosen])

    def spec(self) -> dict[str, Any]:
        """Plain JSON values; the good rays are stored beside them as an array."""
        return {**super().spec(), "type": "ct without metal"}

    def extra_repr(self) -> str:
        """Geometry, grid and spoiled rays, for ``repr``."""
        return f"{super().extra_repr()}, {int((~self.good).sum())} rays spoiled by metal"


def interpolate_trace(data: Tensor, operator: UnspoiledRays) -> Tensor:
    """Data with the trace filled by linear interpolation along the detector, view by view.

    Args:
        data: line integrals ``(*b, *operator.out_shape)``; those on the trace are not used.
        operator: the scan and its trace.

    Returns:
        Line integrals of the same shape; a trace at the detector's end continues its
        neighbour, and a view without any good datum is zero.

    Raises:
        GeometryError: data of another shape.
    """
    operator._check(data, operator.out_shape, "data")
    bins = operator.out_shape[-1]
    good, n = operator.good, torch.arange(bins, device=data.device)
    left = torch.where(good, n, -1).cummax(dim=-1).values
    right = torch.where(good, n, bins).flip(-1).cummin(dim=-1).values.flip(-1)
    # at an end both neighbours are the one that exists
    low = torch.where(left < 0, right, left).clamp(0, bins - 1)
    high = torch.where(right >= bins, left, right).clamp(0, bins - 1)
    share = (n - low) / (high - low).clamp_min(1)
    known = torch.where(good, data, 0.0)
    a, b = (torch.gather(known, -1, k.expand(data.shape)) for k in (low, high))
    return torch.lerp(a, b, share.clamp(0.0, 1.0).to(data.dtype))
