"""Read fastMRI HDF5 files: k-space of single-coil and multi-coil scans.

``kspace`` is (slices, H, W) or (slices, coils, H, W) with phase encoding along W.  Test files
carry a mask of the measured columns; in full ones all columns within the encoding limits count as
measured.  Readout oversampling is removed to the matrix that the ISMRMRD header states.

Source: J. Zbontar et al., fastMRI: an open dataset and benchmarks for accelerated MRI,
arXiv:1811.08839 (2018).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from inverse.errors import InputError
from inverse.io.hdf5 import open_hdf5
from inverse.io.ismrmrd import parse_header
from inverse.io.kspace import KSpace, crop_readout

__all__ = ["read_fastmri"]


def read_fastmri(path: str | os.PathLike[str], *, max_bytes: int = 1 << 32) -> KSpace:
    """Read a fastMRI file.

    Args:
        path: the file.
        max_bytes: most bytes of k-space.

    Raises:
        NoInputError: no such file.
        InputError: damaged, links, or parts that contradict each other.
        ResourceError: more than ``max_bytes``.
    """
    source = Path(path)
    with open_hdf5(source, "fastMRI", max_bytes) as file:
        kspace = file.array("kspace", kinds="c")
        if kspace is None:
            raise InputError(f"{source} has no dataset 'kspace', so it is not a fastMRI file")
        columns = file.array("mask", kinds="biuf")
        xml = file.text("ismrmrd_header")
    if kspace.ndim == 3:
        kspace = kspace[:, None]
    if kspace.ndim != 4 or 0 in kspace.shape:
        raise InputError(
            f"{source}: k-space must be (slices, H, W) or (slices, coils, H, W), got "
            f"{kspace.shape}"
        )
    if xml is None:
        raise InputError(f"{source} has no ismrmrd_header, so its pixel size is unknown")
    encoding = parse_header(xml, source)
    width = kspace.shape[-1]
    if columns is None:
        # steps that the header leaves out are zeros that were never measured
        step = np.arange(width)
        first, last = encoding.offset, encoding.last + encoding.offset
        measured = (step >= first) & (step <= last)
    else:
        measured = columns.reshape(-1) != 0
    if measured.shape != (width,):
        raise InputError(
            f"{source}: the mask has {measured.size} columns, k-space has {width}; write it again"
        )
    rows = min(encoding.recon[0], kspace.shape[-2])
    data = crop_readout(kspace, rows, axis=-2) * measured.astype(np.float32)
    return KSpace(
        data=data,
        mask=np.ascontiguousarray(np.broadcast_to(measured, data.shape[-2:])),
        pixel_mm=(
            encoding.recon_fov_mm[0] / encoding.recon[0],
            encoding.encoded_fov_mm[1] / width,
        ),
        provenance={
            "source": "fastMRI",
            "oversampling_removed": kspace.shape[-2] / rows,
            "columns_measured": int(measured.sum()),
        },
    )
