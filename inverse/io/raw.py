"""Which raw format a path holds."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any, Literal

from inverse.errors import InputError, NoInputError, ReconError
from inverse.io.bart import NAMES, dimensions
from inverse.io.hdf5 import Hdf5, open_hdf5
from inverse.io.ismrmrd import parse_header

__all__ = ["RAW_FORMATS", "RawFormat", "describe_raw", "detect_raw", "find_raw"]

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


def describe_raw(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What a raw or measurement file is, in plain JSON values; None for anything else.

    Args:
        path: HDF5 file or BART header; only names, shapes and headers are read.

    Returns:
        ``kind``, ``command`` (what takes it next, or None) and what its header tells.

    Raises:
        ReconError: a damaged file, or one that links elsewhere.
    """
    source = Path(path)
    if source.suffix in (".cfl", ".hdr"):
        return _describe_bart(source)
    with source.open("rb") as stream:
        if stream.read(8) != _HDF5_MAGIC:
            return None
    with open_hdf5(source, "HDF5", _HEADER_BYTES) as file:
        if file.dataset("header") is not None and file.dataset("data") is not None:
            return _describe_measurement(source, file)
        for mark, name in _MARKS:
            item = file.dataset(mark)
            if item is not None:
                found: dict[str, Any] = {"kind": name, "command": "convert"}
                if name == "ismrmrd":
                    return found | _describe_ismrmrd(source, file)
                return found | {"shape": list(item.shape)}
    return {"kind": "unknown HDF5", "command": None}


def _describe_bart(source: Path) -> dict[str, Any]:
    """Sizes of a BART file, without the dimensions of one entry."""
    sizes = dimensions(source.with_suffix(".hdr"))
    named = {name: n for name, n in zip(NAMES, sizes, strict=False) if n > 1}
    return {"kind": "bart", "command": "convert", "dimensions": named}


def _describe_ismrmrd(source: Path, file: Hdf5) -> dict[str, Any]:
    """Matrix and trajectory of an ISMRMRD file, and its number of readouts."""
    encoding = parse_header(file.text("dataset/xml") or "", source)
    readouts = file.dataset("dataset/data")
    return {
        "trajectory": encoding.trajectory,
        "encoded_matrix": list(encoding.encoded),
        "matrix": list(encoding.recon),
        "readouts": 0 if readouts is None else int(readouts.shape[0]),
    }


def _describe_measurement(source: Path, file: Hdf5) -> dict[str, Any]:
    """What the header of a measurement file tells."""
    try:
        header = file.array("header", kinds="u")
        assert header is not None
        about = json.loads(header.tobytes())
        provenance = dict(about["provenance"])
        return {
            "kind": "measurement",
            "command": "reconstruct",
            "label": provenance.get("label"),
            "modality": about["modality"],
            "operator": about["operator"]["type"],
            "shape": list(file.need("data").shape),
            "pixel_mm": about["pixel_mm"],
            "simulated": "simulation" in provenance,
            "has_truth": file.dataset("truth") is not None,
            "has_headers": file.dataset("template") is not None,
        }
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{source} is no readable measurement file ({type(error).__name__}); write it again"
        ) from None


def find_raw(folder: str | os.PathLike[str]) -> list[tuple[Path, dict[str, Any]]]:
    """Raw and measurement files of a folder (all levels), and what each is.

    A file that cannot be described is listed with its ``problem``; links are not followed.

    Args:
        folder: where to look.
    """
    found: list[tuple[Path, dict[str, Any]]] = []
    for where, _, names in os.walk(folder):
        for name in sorted(names):
            path = Path(where, name)
            if path.is_symlink() or not path.is_file() or path.suffix == ".cfl":
                continue
            if path.suffix == ".hdr" and not path.with_suffix(".cfl").is_file():
                continue
            try:
                about = describe_raw(path)
            except (ReconError, OSError) as error:
                # the text may show the file's name, which may be a patient's
                problem = f"cannot be described ({type(error).__name__})"
                about = {"kind": "damaged", "command": None, "problem": problem}
            if about is not None:
                found.append((path, about))
    return sorted(found, key=lambda entry: entry[0])
