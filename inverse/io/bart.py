"""Read BART k-space: a text header (.hdr) with dimensions and a column-major .cfl of complex64.

Served are the dimensions READ, PHS1, COIL and SLICE.  The format holds no geometry, so the pixel
size is asked for, and no mask: samples that are zero in all coils and slices were not measured.

Source: M. Uecker et al., Berkeley Advanced Reconstruction Toolbox, doi:10.5281/zenodo.592960.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np

from inverse.errors import InputError, NoInputError, ResourceError, UnsupportedError
from inverse.io.kspace import KSpace

__all__ = ["NAMES", "dimensions", "read_bart"]

NAMES = ("READ", "PHS1", "PHS2", "COIL", "MAPS", "TE", "COEFF", "COEFF2", "ITER", "CSHIFT",
          "TIME", "TIME2", "LEVEL", "SLICE", "AVG", "BATCH")  # fmt: skip
_READ, _PHS1, _COIL, _SLICE = 0, 1, 3, 13


def read_bart(
    path: str | os.PathLike[str],
    pixel_mm: tuple[float, float],
    *,
    max_bytes: int = 1 << 32,
) -> KSpace:
    """Read Cartesian k-space.

    Args:
        path: the pair of files, named by either of them or without a suffix.
        pixel_mm: (row, column) size of the image's pixels in mm; rows run along READ.
        max_bytes: most bytes of the data.

    Raises:
        NoInputError: one of the two files is missing.
        InputError: a damaged header, or data of another size.
        UnsupportedError: further dimensions.
        ResourceError: more than ``max_bytes``.
    """
    given = Path(path)
    stem = given.with_suffix("") if given.suffix in (".cfl", ".hdr") else given
    header, values = (stem.parent / (stem.name + suffix) for suffix in (".hdr", ".cfl"))
    for file in (header, values):
        if not file.is_file():
            raise NoInputError(f"no BART file at {file}; give NAME of NAME.hdr and NAME.cfl")
    sizes = dimensions(header)
    for k, size in enumerate(sizes):
        if size > 1 and k not in (_READ, _PHS1, _COIL, _SLICE):
            name = NAMES[k] if k < len(NAMES) else k
            raise UnsupportedError(
                f"{header}: dimension {name} has {size} entries; served are READ, PHS1, COIL and "
                "SLICE (take one entry with 'bart slice')"
            )
    expected, got = 8 * math.prod(sizes), values.stat().st_size
    if expected != got:
        raise InputError(
            f"{values} has {got} bytes, its header asks for {expected}; copy both files again"
        )
    if expected > max_bytes:
        raise ResourceError(
            f"{values} holds {expected >> 20} MiB, the limit is {max_bytes >> 20} MiB; raise it "
            "(--limits) if the file is trusted"
        )
    shape = [sizes[_READ], sizes[_PHS1], sizes[_COIL], sizes[_SLICE]]
    stored = np.fromfile(values, "<c8").reshape(shape, order="F")
    data = np.ascontiguousarray(stored.transpose(3, 2, 0, 1))
    return KSpace(
        data=data,
        mask=(data != 0).any(axis=(0, 1)),
        pixel_mm=pixel_mm,
        provenance={"source": "BART", "dimensions": shape},
    )


def dimensions(header: Path) -> tuple[int, ...]:
    """The sizes that follow ``# Dimensions``, 16 of them at least."""
    with header.open("rb") as stream:
        lines = stream.read(1 << 16).decode("ascii", "replace").splitlines()
    try:
        line = lines[lines.index("# Dimensions") + 1]
        sizes = tuple(int(v) for v in line.split())
    except (ValueError, IndexError):
        sizes = ()
    if not 1 <= len(sizes) <= 32 or min(sizes) < 1:
        raise InputError(f"{header} names no dimensions; is it a BART header?")
    return sizes + (1,) * (16 - len(sizes))
