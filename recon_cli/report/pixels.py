r"""Pixel data inside the page: rounded to a stated step, predicted, deflated, base64.

Each slice of each image is packed by itself, so that the page unpacks what it shows and no more:

.. math:: q = \mathrm{round}\frac{v - v_0}{\Delta}, \qquad
    r_{ij} = q_{ij} - \mathrm{med}(a, b, a + b - c) \bmod 2^{16}

with a the left, b the upper and c the upper left neighbour, the median-edge predictor; rows and
columns outside the image are 0.  The remainders go by zigzag (0, -1, 1, -2, ...) into two planes
of bytes, low then high, and through raw deflate.  Rounding errs by at most half a step.

Source: Weinberger, Seroussi and Sapiro, IEEE Trans. Image Process. 9 (2000) 1309 (the predictor
of JPEG-LS); RFC 1951 (deflate).
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from inverse.volumes import Volume, extent

__all__ = ["BUDGET", "Layer", "fit", "pack", "unpack"]

BUDGET = 24_000_000
"""Bytes of pixel data in a page; its other parts fit into the rest of 25 MB."""
PROBES = 3
TOP = 2**16 - 1


@dataclass(frozen=True)
class Layer:
    """An image of the page.

    Attributes:
        key: its name in the page.
        volume: ``(slices, rows, columns)``.
        step: difference of neighbouring values that the page can tell apart.
    """

    key: str
    volume: Volume
    step: float

    @classmethod
    def of(cls, key: str, volume: Volume, step: float, bits: int) -> Layer:
        """A layer of at most ``bits`` bits, in steps of ``step`` times a power of two."""
        low, high = extent(volume)
        span = high - low
        while span > step * (2**bits - 1):
            step *= 2
        return cls(key, volume, step)

    @cached_property
    def extent(self) -> tuple[float, float]:
        """Least and greatest value."""
        return extent(self.volume)

    @property
    def base(self) -> float:
        """Value of level 0, a multiple of the step."""
        return float(np.floor(self.extent[0] / self.step)) * self.step

    @property
    def levels(self) -> int:
        """Number of levels."""
        return min(int(np.rint((self.extent[1] - self.base) / self.step)), TOP) + 1

    def packed(self, k: int) -> str:
        """Slice ``k`` as text."""
        levels = np.rint((self.volume[k].astype(np.float64) - self.base) / self.step)
        return pack(np.clip(levels, 0, TOP).astype(np.uint16))


def _shifted(q: NDArray[np.int32]) -> tuple[NDArray[np.int32], ...]:
    """Left, upper and upper left neighbours."""
    padded = np.pad(q, ((1, 0), (1, 0)))
    return padded[1:, :-1], padded[:-1, 1:], padded[:-1, :-1]


def pack(levels: NDArray[np.uint16]) -> str:
    """An image of levels as base64 text."""
    q = levels.astype(np.int32)
    a, b, c = _shifted(q)
    low, high = np.minimum(a, b), np.maximum(a, b)
    r = (q - np.clip(a + b - c, low, high)).astype(np.int16)  # the median of three is a clip
    zigzag = ((r << 1) ^ (r >> 15)).astype(np.uint16).ravel()
    planes = np.concatenate([zigzag & 255, zigzag >> 8]).astype(np.uint8)
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15, 9, zlib.Z_FILTERED)
    return base64.b64encode(deflate.compress(planes.tobytes()) + deflate.flush()).decode()


def unpack(text: str, shape: tuple[int, int]) -> NDArray[np.uint16]:
    """The inverse of :func:`pack`, as the page does it."""
    planes = np.frombuffer(zlib.decompress(base64.b64decode(text), -15), np.uint8)
    z = planes.reshape(2, -1).astype(np.int32)
    r = (((z[0] | z[1] << 8) >> 1) ^ -(z[0] & 1)).reshape(shape)
    q = np.zeros((shape[0] + 1, shape[1] + 1), np.int32)
    for i in range(shape[0]):
        for j in range(shape[1]):
            a, b, c = int(q[i + 1, j]), int(q[i, j + 1]), int(q[i, j])
            median = min(max(a + b - c, min(a, b)), max(a, b))
            q[i + 1, j + 1] = (median + int(r[i, j])) & TOP
    return q[1:, 1:].astype(np.uint16)


def _size(layer: Layer) -> float:
    """Bytes of a layer in the page, from a few slices."""
    count = len(layer.volume)
    probes = sorted({round((i + 0.5) * count / PROBES - 0.5) for i in range(min(PROBES, count))})
    return count * float(np.mean([len(layer.packed(k)) for k in probes]))


def fit(layers: Sequence[Layer], budget: int = BUDGET) -> tuple[list[Layer], list[list[str]]]:
    """Double the step of the costliest layer until all fit.

    Args:
        layers: of one shape.
        budget: bytes for all of them.

    Returns:
        The layers with the steps that fit, and the text of each slice of each.
    """
    chosen = list(layers)
    sizes = [_size(layer) for layer in chosen]
    while sum(sizes) > budget:
        worst = int(np.argmax(sizes))
        chosen[worst] = replace(chosen[worst], step=2 * chosen[worst].step)
        sizes[worst] = _size(chosen[worst])
    texts = [[layer.packed(k) for k in range(len(layer.volume))] for layer in chosen]
    while sum(sizes := [sum(map(len, slices)) for slices in texts]) > budget:
        worst = int(np.argmax(sizes))
        chosen[worst] = replace(chosen[worst], step=2 * chosen[worst].step)
        texts[worst] = [chosen[worst].packed(k) for k in range(len(chosen[worst].volume))]
    return chosen, texts
