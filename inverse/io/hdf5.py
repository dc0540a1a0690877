"""HDF5 files from elsewhere: what may be opened, and how much of it.

A file is not trusted: links, external and virtual datasets, filters that load plug-ins, and sizes
over a cap are refused before anything of that kind is opened or read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inverse.errors import InputError, NoInputError, ReconError, ResourceError

__all__ = ["Hdf5", "open_hdf5", "vetted"]

BUILT_IN = (1, 2, 3, 4, 5, 6, 32000)
"""Filters that come with h5py: gzip, shuffle, fletcher32, szip, nbit, scale-offset, lzf."""


def vetted(file: Any, path: str, source: Path, filters: Sequence[int] = BUILT_IN) -> Any:
    """A dataset whose values lie in the file itself, or None where there is none.

    Args:
        file: open ``h5py.File``.
        path: where in the file, parts separated by ``/``.
        source: the file, for messages.
        filters: HDF5 filters that may be applied.

    Raises:
        InputError: a link, a group, values in other files, or a filter that needs a plug-in.
    """
    import h5py

    item = file
    for part in path.split("/"):
        link = item.get(part, getlink=True) if isinstance(item, h5py.Group) else None
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            raise InputError(
                f"{source}: '{path}' is a link to elsewhere, which is not followed; write the "
                f"file again with its values inside"
            )
        item = item[part]
    if not isinstance(item, h5py.Dataset):
        raise InputError(f"{source}: '{path}' must be a dataset, got {type(item).__name__}")
    if item.is_virtual or item.external:
        raise InputError(
            f"{source}: '{path}' keeps its values in other files, which are not opened; write it "
            f"again with its values inside"
        )
    plist = item.id.get_create_plist()
    used = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
    if any(f not in filters for f in used):
        raise InputError(
            f"{source}: '{path}' uses HDF5 filter {used}, which needs a plug-in; write it again "
            f"uncompressed or with gzip"
        )
    return item


class Hdf5:
    """An open file that gives vetted arrays up to a total size.

    Args:
        file: open ``h5py.File``.
        source: the file, for messages.
        max_bytes: most bytes of all arrays that are read.
    """

    def __init__(self, file: Any, source: Path, max_bytes: int) -> None:
        self.file, self.source, self.max_bytes = file, source, max_bytes
        self._read = 0

    def dataset(self, path: str) -> Any:
        """The vetted dataset at a path, or None."""
        return vetted(self.file, path, self.source)

    def need(self, path: str) -> Any:
        """The vetted dataset at a path.

        Raises:
            InputError: there is none.
        """
        item = self.dataset(path)
        if item is None:
            raise InputError(f"{self.source} has no dataset '{path}'; is it of another format?")
        return item

    def count(self, size: int, path: str) -> None:
        """Count bytes before they are read.

        Raises:
            ResourceError: more than the cap in total.
        """
        self._read += size
        if self._read > self.max_bytes:
            raise ResourceError(
                f"{self.source} declares {self._read / 2**30:.3g} GiB up to '{path}', more than "
                f"the cap of {self.max_bytes / 2**30:.3g} GiB; raise the cap (--limits) if the "
                f"file is trusted"
            )

    def array(self, path: str, *, kinds: str = "fiu") -> NDArray[Any] | None:
        """All values of a dataset, or None where there is none.

        Args:
            path: where in the file.
            kinds: numpy kinds that are accepted, such as ``"fiu"`` for real numbers.

        Raises:
            InputError: values of another kind.
        """
        item = self.dataset(path)
        if item is None:
            return None
        kind = "c" if item.dtype == np.complex64 else item.dtype.kind
        if kind not in kinds:
            raise InputError(f"{self.source}: '{path}' has values of type {item.dtype}")
        self.count(math.prod(item.shape) * item.dtype.itemsize, path)
        return np.asarray(item[()])

    def text(self, path: str) -> str | None:
        """A string, or None where there is none.

        Raises:
            InputError: several values.
            ResourceError: more than the cap in total.
        """
        item = self.dataset(path)
        if item is None:
            return None
        if math.prod(item.shape) != 1:
            raise InputError(f"{self.source}: '{path}' must hold one text, got {item.shape}")
        self.count(item.dtype.itemsize, path)
        value = item[()]
        while isinstance(value, np.ndarray) and value.size == 1:
            value = value.reshape(-1)[0]
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


@contextmanager
def open_hdf5(path: Path, what: str, max_bytes: int) -> Iterator[Hdf5]:
    """Open a file for reading; what h5py raises on damage becomes one error.

    Args:
        path: the file.
        what: name of the format, for messages.
        max_bytes: most bytes of all arrays together.

    Raises:
        NoInputError: there is no such file.
        InputError: damaged, or not as the format says.
    """
    import h5py

    if not path.is_file():
        raise NoInputError(f"no {what} file at {path}; give an existing file")
    try:
        with h5py.File(path, "r") as file:
            yield Hdf5(file, path, max_bytes)
    except ReconError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        OverflowError,
        RuntimeError,
    ) as error:
        raise InputError(
            f"{path} is not a readable {what} file ({type(error).__name__}); it may be damaged, "
            f"cut short or of another format"
        ) from error
