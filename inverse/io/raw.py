"""Which raw format a path holds."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any, Literal

from inverse.errors import InputError, NoInputError
from inverse.io.hdf5 import open_hdf5

__all__ = ["RAW_FORMATS", "RawFormat", "describe_hdf5", "detect_raw"]

RawFormat = Literal["ismrmrd", "fastmri", "bart", "ctpd", "dxchange"]
RAW_FORMATS: tuple[RawFormat, ...] = ("ismrmrd", "fastmri", "bart", "ctpd", "dxchange")

_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
_HEADER_BYTES = 64 * 2**20

# HDF5 formats and the dataset that tells them
_MARKS: tuple[tuple[str, RawFormat], ...] = (
    ("dataset/xml", "ismrmrd"),
    ("kspace", "fastmri"),
    ("exchange/data", "dxchange"),
)


def detect_raw(path: str | os.PathLike[str]) -> RawFormat:
    """The raw format of a file or folder, from its content.

    Args:
        path: HDF5 file, BART pair (either file, or without a suffix), folder or zip archive.

    Raises:
        NoInputError: nothing there.
        InputError: none of the formats.
    """
    source = Path(path)
    if source.suffix in (".cfl", ".hdr") or source.with_name(source.name + ".cfl").is_file():
        return "bart"
    if not source.exists():
        raise NoInputError(f"{source} does not exist; give a raw data file or folder")
    if source.is_dir() or zipfile.is_zipfile(source):
        return "ctpd"
    with source.open("rb") as stream:
        start = stream.read(132)
    if start[128:] == b"DICM":
        return "ctpd"
    if start[:8] == _HDF5_MAGIC:
        with open_hdf5(source, "HDF5", 0) as file:
            for mark, name in _MARKS:
                if file.dataset(mark) is not None:
                    return name
    if start[:4] in (b"\x01\x00\x00\x00", b"\x00\x00\x00\x00") or source.suffix == ".dat":
        raise InputError(
            f"{source} looks like Siemens raw data; convert it with siemens_to_ismrmrd first"
        )
    raise InputError(
        f"{source} is none of the raw formats {', '.join(RAW_FORMATS)}; name one with --format if "
        "you know better"
    )


def describe_hdf5(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What an HDF5 file or a BART pair is, in plain JSON values; None for anything else.

    Args:
        path: the file; only names, shapes and the header of a measurement file are read.

    Raises:
        InputError: a damaged HDF5 file.
    """
    source = Path(path)
    if source.is_dir() or not source.exists():
        return None
    with source.open("rb") as stream:
        hdf5 = stream.read(8) == _HDF5_MAGIC
    if not hdf5:
        return {"kind": "bart"} if source.suffix in (".cfl", ".hdr") else None
    with open_hdf5(source, "HDF5", _HEADER_BYTES) as file:
        header = file.array("header", kinds="u")
        data = file.dataset("data")
        if header is not None and data is not None:
            about = json.loads(header.tobytes())
            return {
                "kind": "measurement",
                "label": about["provenance"].get("label"),
                "modality": about["modality"],
                "operator": about["operator"]["type"],
                "shape": list(data.shape),
                "pixel_mm": about["pixel_mm"],
                "simulated": "simulation" in about["provenance"],
                "has_truth": file.dataset("truth") is not None,
            }
        for mark, name in _MARKS:
            item = file.dataset(mark)
            if item is not None:
                return {"kind": name, "shape": list(item.shape)}
    return {"kind": "unknown HDF5"}
