"""Volumes on disk: slices are read and written by plain calls, so that memory does not hold them.

A memory map would count the pages that it touched as memory of the process.
"""

from __future__ import annotations

import errno
import math
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

from inverse.errors import GeometryError, ResourceError

__all__ = [
    "Allocate",
    "Chosen",
    "DiskVolume",
    "Slices",
    "Volume",
    "extent",
    "order_statistics",
    "percentile",
    "slabs",
]

SLAB = 16
"""Slices that are in memory at a time."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Slices(Protocol):
    """What is read by slices along the first axis: a :class:`Volume`, or some of its slices."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(slices, ...)``."""

    @property
    def ndim(self) -> int:
        """Number of axes."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the values."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[NDArray[Any]]: ...

    def __getitem__(self, index: Any, /) -> Any: ...


class Volume(Slices, Protocol):
    """What NumPy arrays and :class:`DiskVolume` have in common: slices are also written."""

    def __setitem__(self, index: Any, values: Any, /) -> None: ...


class Allocate(Protocol):
    """Where a new volume goes: ``numpy.empty``, or a folder by ``partial(DiskVolume, folder)``."""

    def __call__(self, shape: tuple[int, ...], dtype: DTypeLike) -> Volume:
        """A volume to fill."""


class DiskVolume:
    """An array ``(slices, ...)`` in a file without a name, which goes with it, however that ends.

    Indexing by a number, a slice or a sequence of numbers reads those slices into memory; by a
    number or a slice of step 1 it takes new ones.  What was never written is zero.

    Args:
        folder: on whose disk; None for the system's temporary folder.
        shape: ``(slices, ...)``.
        dtype: of the values.

    Raises:
        GeometryError: a shape without slices' axis.
        ResourceError: the disk has no room for all of it.
        OSError: the folder cannot be written.
    """

    def __init__(
        self, folder: Path | None, shape: tuple[int, ...], dtype: DTypeLike = np.float32
    ) -> None:
        self._describe(shape, dtype, 0)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            self._hold(os.dup(file.fileno()))
        if self.nbytes:
            with _room(self.nbytes):
                if hasattr(os, "posix_fallocate"):  # not on macOS
                    os.posix_fallocate(self._file, 0, self.nbytes)
                else:
                    os.ftruncate(self._file, self.nbytes)

    @classmethod
    def of_npy(cls, path: Path) -> DiskVolume:
        """The array of an ``.npy`` file, to read only.

        Raises:
            ValueError: no such file's content, or Python objects.
            OSError: it cannot be read.
        """
        with path.open("rb") as stream:
            version = np.lib.format.read_magic(stream)
            if version != (1, 0):
                raise ValueError(f"'{path}' has another version of the format than 1.0")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
            start = stream.tell()
        volume = cls.__new__(cls)
        volume._describe(shape, dtype, start)
        if fortran or dtype.hasobject or path.stat().st_size < start + volume.nbytes:
            raise ValueError(f"'{path}' holds no array in C order, or is cut short")
        volume._hold(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        return volume

    def _describe(self, shape: tuple[int, ...], dtype: DTypeLike, start: int) -> None:
        if not shape:
            raise GeometryError("a volume on disk needs a shape (slices, ...), got ()")
        self.shape, self.dtype = tuple(int(n) for n in shape), np.dtype(dtype)
        self._each = math.prod(self.shape[1:]) * self.dtype.itemsize  # bytes of a slice
        self._start = start

    def _hold(self, file: int) -> None:
        self._file = file
        weakref.finalize(self, os.close, file)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return len(self) * self._each

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[:], dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[k] for k in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> NDArray[Any]: ...

    @overload
    def __getitem__(self, index: slice | Sequence[int] | NDArray[np.integer]) -> NDArray[Any]: ...

    def __getitem__(self, index: Any) -> NDArray[Any]:
        if isinstance(index, int | np.integer):
            return self._read(self._number(int(index)), 1)[0]
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._read(start, max(stop - start, 0))
            index = range(start, stop, step)
        chosen = np.empty((len(index), *self.shape[1:]), self.dtype)
        for place, k in zip(chosen, index, strict=True):
            place[...] = self[int(k)]
        return chosen

    def __setitem__(self, index: int | slice, values: Any) -> None:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise IndexError("slices of a volume on disk are written in order, by step 1")
            shape = (max(stop - start, 0), *self.shape[1:])
        else:
            start, shape = self._number(index), self.shape[1:]
        content = np.ascontiguousarray(np.broadcast_to(np.asarray(values, self.dtype), shape))
        rest, at = content.ravel().view(np.uint8).data, start * self._each
        with _room(self.nbytes):
            while len(rest):  # a call may write less than it is given
                written = os.pwrite(self._file, rest, self._start + at)
                rest, at = rest[written:], at + written

    def _number(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"slice {index} of a volume of {len(self)}")
        return index % len(self)

    def _read(self, first: int, count: int) -> NDArray[Any]:
        out = np.empty((count, *self.shape[1:]), self.dtype)
        rest, at = out.ravel().view(np.uint8).data, first * self._each
        while len(rest):
            read = os.preadv(self._file, [rest], self._start + at)
            if not read:
                raise OSError(errno.EIO, "a volume on disk is cut short")
            rest, at = rest[read:], at + read
        return out


class Chosen:
    """Some slices of a volume, which are read when they are asked for.

    Args:
        volume: the volume.
        numbers: which slices, in order.
    """

    def __init__(self, volume: Volume, numbers: Sequence[int]) -> None:
        self.volume, self.numbers = volume, list(numbers)
        self.shape, self.dtype = (len(self.numbers), *volume.shape[1:]), volume.dtype
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self.volume[k] for k in self.numbers)

    def __getitem__(self, index: int | slice) -> NDArray[Any]:
        return np.asarray(self.volume[self.numbers[index]])

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[:], dtype)


@contextmanager
def _room(nbytes: int) -> Iterator[None]:
    """A full disk told as what it is."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise ResourceError(
                f"no space left for a volume of {nbytes / 2**20:.1f} MiB; free some disk space"
            ) from error
        raise


def slabs(count: int, size: int = SLAB) -> Iterator[slice]:
    """A number of slices as ranges of a few."""
    return (slice(k, min(k + size, count)) for k in range(0, count, size))


def extent(volume: Slices) -> tuple[float, float]:
    """Least and greatest value."""
    ends = [(float(image.min()), float(image.max())) for image in volume]
    return min(low for low, _ in ends), max(high for _, high in ends)


def percentile(volume: Slices, q: float | Sequence[float], *, magnitude: bool = False) -> Any:
    """``numpy.percentile`` of a float32 volume, or of its magnitude, without sorting it in memory.

    Args:
        volume: finite real values; taken as float32.
        q: percent, one or several.
        magnitude: of the absolute values.

    Returns:
        float32 for one q, an array of float64 for several, as NumPy's.
    """
    count = math.prod(volume.shape)
    at = (count - 1) * (np.asarray(q, np.float64) / 100)
    below = np.floor(at).astype(np.int64)
    ranks = np.stack([below, np.minimum(below + 1, count - 1)])
    found = order_statistics(
        lambda: (np.abs(image) if magnitude else image for image in volume), ranks.ravel()
    )
    low, high = found.reshape(ranks.shape)
    t: Any = at - below if np.ndim(q) else float(at - below)
    # from the nearer end, as NumPy does
    return np.where(t < 0.5, low + (high - low) * t, high - (high - low) * (1 - t))[()]


def _keys(values: NDArray[Any]) -> NDArray[np.uint32]:
    """Numbers that are ordered as the values are."""
    bits = (np.asarray(values, np.float32).ravel() + np.float32(0)).view(np.uint32)  # no -0
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def order_statistics(
    parts: Callable[[], Iterator[NDArray[Any]]], ranks: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Values of some ranks, counted from 0, in the sorted values of all parts.

    The bits of a float ascend with its value, once those of negative ones are flipped.  One pass
    counts the upper halves of the bits, a second the lower halves below the wanted ones.

    Args:
        parts: gives all values, part by part; called twice.
        ranks: which, each less than the number of values.
    """
    counts = np.zeros(1 << 16, np.int64)
    for keys in map(_keys, parts()):
        counts += np.bincount(keys >> 16, minlength=1 << 16)
    ends = np.cumsum(counts)
    uppers = np.searchsorted(ends, ranks, side="right")
    lowers = {int(upper): np.zeros(1 << 16, np.int64) for upper in uppers}
    for keys in map(_keys, parts()):
        for upper, inside in lowers.items():
            inside += np.bincount(keys[keys >> 16 == upper] & 0xFFFF, minlength=1 << 16)
    found = []
    for rank, upper in zip(ranks, map(int, uppers), strict=True):
        rest = rank - (ends[upper] - counts[upper])
        found.append(upper << 16 | int(np.searchsorted(np.cumsum(lowers[upper]), rest, "right")))
    keys = np.array(found, np.uint32)
    return np.where(keys >> 31, keys & 0x7FFFFFFF, ~keys).astype(np.uint32).view(np.float32)
