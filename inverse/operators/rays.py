r"""Which voxels a ray meets, and with what weight: in the plane and in space, on any device.

A voxel image is either constant in each voxel, so that a ray's weight is its length in it
(``"line"``, Siddon), or linear between voxel centres, sampled where the ray crosses the planes of
centres along its steepest axis (``"linear"``, Joseph).  Projection gathers with these weights and
backprojection scatters with the same ones, so that the two are each other's exact adjoints.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["RayKernel", "blocks"]

RayKernel = Literal["linear", "line"]

_BLOCK = 2**21  # crossings held at a time


def blocks(
    origin: Tensor,
    direction: Tensor,
    shape: Sequence[int],
    spacing: Sequence[float],
    kernel: RayKernel,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Weights of many rays, some rays at a time.

    Args:
        origin: points on the rays in mm, float64 ``(rays, n)`` in (x, y) or (x, y, z).
        direction: unit directions, likewise.
        shape: grid in array order, (Y, X) or (Z, Y, X), centred on the origin.
        spacing: voxel size in mm, in array order.
        kernel: see above.

    Yields:
        Numbers of the rays ``(r,)``, flat indices of voxels ``(r, k)`` and their weights in mm
        ``(r, k)``, zero where a ray meets nothing.
    """
    size = torch.tensor(list(reversed(shape)), device=origin.device)  # (x, y, z) as the rays
    step = torch.tensor(list(reversed(spacing)), dtype=torch.float64, device=origin.device)
    stride = torch.tensor(
        [1, *itertools.accumulate(list(reversed(shape))[:-1], lambda a, b: a * b)],
        device=origin.device,
    )
    steepest = direction.abs().argmax(dim=-1)
    groups = [torch.arange(len(origin), device=origin.device)]
    if kernel == "linear":
        groups = [(steepest == axis).nonzero()[:, 0] for axis in range(len(shape))]
    per_ray = sum(shape) + len(shape) if kernel == "line" else max(shape) * 2 ** (len(shape) - 1)
    for axis, group in enumerate(groups):
        for rays in group.split(max(1, _BLOCK // per_ray)):
            if kernel == "line":
                index, weight = _siddon(origin[rays], direction[rays], size, step, stride)
            else:
                index, weight = _joseph(origin[rays], direction[rays], size, step, stride, axis)
            yield rays, index, weight


def _siddon(
    origin: Tensor, direction: Tensor, size: Tensor, step: Tensor, stride: Tensor
) -> tuple[Tensor, Tensor]:
    """Lengths in each voxel: sort the crossings with all planes between voxels.

    Source: R. L. Siddon, Med. Phys. 12 (1985).
    """
    crossings, enter, leave = [], [], []
    for axis, n in enumerate(size.tolist()):
        o, d = origin[:, axis, None], direction[:, axis, None]
        planes = (torch.arange(n + 1, device=o.device, dtype=o.dtype) - n / 2) * step[axis]
        along = d.abs() > 1e-12
        t = (planes - o) / torch.where(along, d, 1.0)
        # a ray along the planes is within the slab everywhere, or nowhere
        inside = (o >= planes[0]) & (o < planes[-1])
        bound = torch.where(inside, torch.inf, -torch.inf)
        first, last = torch.minimum(t[:, :1], t[:, -1:]), torch.maximum(t[:, :1], t[:, -1:])
        enter.append(torch.where(along, first, -bound))
        leave.append(torch.where(along, last, bound))
        crossings.append(torch.where(along, t, -torch.inf))
    start = torch.cat(enter, dim=1).amax(dim=1, keepdim=True)
    stop = torch.cat(leave, dim=1).amin(dim=1, keepdim=True)
    hit = start < stop
    start, stop = torch.where(hit, start, 0.0), torch.where(hit, stop, 0.0)
    t = torch.cat(crossings, dim=1).clamp(start, stop).sort(dim=1).values
    weight = t.diff(dim=1)
    middle = (t[:, 1:] + t[:, :-1]) / 2
    index = torch.zeros_like(middle, dtype=torch.int64)
    for axis, n in enumerate(size.tolist()):
        x = origin[:, axis, None] + middle * direction[:, axis, None]
        cell = (x / step[axis] + n / 2).floor_().clamp_(0, n - 1)
        index += cell.to(torch.int64) * stride[axis]
    return index, weight


def _joseph(
    origin: Tensor, direction: Tensor, size: Tensor, step: Tensor, stride: Tensor, main: int
) -> tuple[Tensor, Tensor]:
    """Linear interpolation in each plane of voxel centres across the axis ``main``.

    Source: P. M. Joseph, IEEE Trans. Med. Imaging 1 (1982).
    """
    d = direction[:, main, None]
    plane = torch.arange(int(size[main]), device=origin.device)
    t = ((plane - (size[main] - 1) / 2) * step[main] - origin[:, main, None]) / d
    index = (plane * stride[main]).expand(t.shape)[..., None]
    weight = (step[main] / d.abs()).expand(t.shape)[..., None]
    for axis, n in enumerate(size.tolist()):
        if axis == main:
            continue
        x = (origin[:, axis, None] + t * direction[:, axis, None]) / step[axis] + (n - 1) / 2
        low = x.floor()
        part = x - low
        cells = torch.stack([low, low + 1], dim=-1)
        shares = torch.stack([1 - part, part], dim=-1)
        shares = torch.where((cells >= 0) & (cells < n), shares, 0.0)
        cells = cells.clamp(0, n - 1).to(torch.int64)
        index = (index[..., None] + (cells * stride[axis])[..., None, :]).flatten(-2)
        weight = (weight[..., None] * shares[..., None, :]).flatten(-2)
    return index.flatten(1), weight.flatten(1)
