"""Image series in and out, whatever the file format: the one door to DICOM and NIfTI.

The format of the input is told by its content.  Derived series come out in the format of their
source, which the templates of the slices carry.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from inverse.errors import NoInputError
from inverse.io import dicom
from inverse.io.dicom import Derivation, Inspection, Note, Series, Stack, WrittenSeries
from inverse.io.nifti import (
    inspect_nifti,
    is_nifti_template,
    nifti_files,
    read_nifti,
    write_nifti,
)
from inverse.volumes import Allocate, Volume

__all__ = [
    "Derivation",
    "Inspection",
    "Note",
    "Series",
    "Stack",
    "WrittenSeries",
    "inspect",
    "read_series",
    "write_series",
]


def _holds_nifti(path: Path, max_bytes: int) -> bool:
    """Whether to read a path as NIfTI: such a file, or a folder with some and without DICOM."""
    if not nifti_files(path):
        return False
    if path.is_file():
        return True
    try:
        return not dicom.inspect(path, max_bytes=max_bytes).stacks
    except NoInputError:
        return True


def inspect(path: str | os.PathLike[str], *, max_bytes: int = 1 << 32) -> Inspection:
    """What a folder, file or zip archive holds; reads headers only.

    Args:
        path: DICOM folder, file or zip archive, or NIfTI file or folder.
        max_bytes: refuse archives that claim more than this.

    Raises:
        NoInputError: the path does not exist or holds no file at all.
        InputError: an unreadable path, an archive beyond the limits, a damaged header.
    """
    if _holds_nifti(Path(path), max_bytes):
        return inspect_nifti(path)
    return dicom.inspect(path, max_bytes=max_bytes)


def read_series(
    path: str | os.PathLike[str],
    series: str | None = None,
    stack: str | int | None = None,
    *,
    modality: Literal["CT", "MR"] | None = None,
    max_bytes: int = 1 << 32,
    allocate: Allocate = np.empty,
) -> Series:
    """Read exactly one stack in physical units; see `inverse.io.dicom.read_series`.

    Args:
        path: DICOM folder, file or zip archive, or NIfTI file or folder.
        series: which DICOM series, where there are several.
        stack: number of the stack as `inspect` shows it.
        modality: what a NIfTI image is, where no sidecar tells.
        max_bytes: limit on the decoded volume (4 bytes a voxel) and on archives.
        allocate: where the images of DICOM go; in memory by default, as those of NIfTI always.

    Raises:
        ReconError: as the readers of the formats do.
    """
    if _holds_nifti(Path(path), max_bytes):
        return read_nifti(path, modality, stack, max_bytes=max_bytes)
    return dicom.read_series(path, series, stack, max_bytes=max_bytes, allocate=allocate)


def write_series(
    out_dir: str | os.PathLike[str],
    volume: Volume,
    templates: Sequence[bytes],
    *,
    description: str,
    derivation: Derivation,
    kind: Literal["image", "std"] = "image",
    synthetic: bool = True,
    unit: Literal["HU", "signal"] = "HU",
    **dicom_options: Any,
) -> WrittenSeries:
    """Write a derived series in the format of its templates.

    Args:
        out_dir: new or empty folder.
        volume: ``(Z, Y, X)``, HU or signal, in memory or on disk.
        templates: a header a slice, from `Series.templates`.
        description: what the series is.
        derivation: provenance.
        kind: ``"image"`` or ``"std"``.
        synthetic: simulated data, inpainting or a generative prior.
        unit: ``"HU"`` or ``"signal"``.
        **dicom_options: further options of `inverse.io.dicom.write_series`.

    Raises:
        ReconError: as the writers of the formats do.
    """
    if templates and all(is_nifti_template(t) for t in templates):
        return write_nifti(
            out_dir,
            np.asarray(volume, np.float32),
            templates,
            description=description,
            derivation=derivation,
            kind=kind,
            synthetic=synthetic,
            unit=unit,
            created=dicom_options.get("created"),
        )
    return dicom.write_series(
        out_dir,
        volume,
        templates,
        description=description,
        derivation=derivation,
        kind=kind,
        synthetic=synthetic,
        unit=unit,
        **dicom_options,
    )
