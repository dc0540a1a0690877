r"""Read DICOM: inspect an input, choose one stack, decode its slices into physical units.

Source: DICOM PS3.3 C.7.6.3 (Image Pixel), C.11.1 (Modality LUT), C.7.5.1.1.2 (Pixel Padding).
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from inverse.errors import (
    InputError,
    NoInputError,
    ResourceError,
    UnsupportedError,
)
from inverse.io.dicom_enhanced import classic_frames, is_enhanced
from inverse.io.dicom_files import Source, guarded, open_sources, quiet_pydicom
from inverse.io.dicom_headers import (
    IDENTITY_TAGS,
    PROJECTIONS,
    TEMPLATE_TAGS,
    Header,
    Note,
    identity_of,
    integer_of,
    number_of,
    open_dicom,
    read_headers,
    text_of,
)
from inverse.io.dicom_stacks import (
    SAME_MM,
    Inspection,
    Stack,
    decoder_plugin,
    group_headers,
    heights,
    make_stack,
    slice_normal,
)

if TYPE_CHECKING:
    from pydicom import Dataset

    from inverse.volumes import Allocate

__all__ = [
    "AIR_HU",
    "Series",
    "codestream_size",
    "identities",
    "inspect",
    "patient_of",
    "read_series",
    "template_of",
]

AIR_HU = -1000.0
"""What replaces padding in CT: the forward model must see air, not -3024 HU."""

_DAMAGED = "UNREADABLE_FILES"
_UNSUPPORTED_CODES = frozenset(
    {"MULTIFRAME", "MOSAIC", "MONOCHROME1", "COLOUR", "NO_DECODER", "NOT_HU"}
)


@dataclass(frozen=True)
class Series:
    """One stack in physical units.

    Attributes:
        array: ``(Z, Y, X)`` float32; HU for CT, the scanner's signal for MR.  As the mask, a
            `inverse.volumes.DiskVolume` where the reader was told so.
        modality: ``"CT"`` or ``"MR"``.
        unit: ``"HU"`` or ``"signal"``.
        spacing: (slice, row, column) in mm.
        positions: ``(Z, 3)`` centre of the first pixel of each slice, patient space (LPS), mm.
        orientation: direction cosines of a row, then of a column.
        templates: a header a slice in the format of the source, without pixels, for the writer;
            DICOM ones carry patient data.
        mask: ``(Z, Y, X)`` bool, true where the scanner padded and ``array`` holds air or 0.
        rescale: ``(Z, 2)`` slope and intercept that took stored values to ``array``.
        tilt_deg: gantry tilt; slices of a tilted stack may be used one by one only.
        synthetic: the source says that its content is synthetic.
        warnings: (code, text) without patient data.
    """

    array: NDArray[np.float32]
    modality: str
    unit: str
    spacing: tuple[float, float, float]
    positions: NDArray[np.float64]
    orientation: tuple[float, ...]
    templates: tuple[bytes, ...] = field(repr=False)
    mask: NDArray[np.bool_] = field(repr=False)
    rescale: NDArray[np.float64] = field(repr=False)
    tilt_deg: float
    synthetic: bool
    warnings: list[Note]

    @property
    def patient_key(self) -> str:
        """A hash that tells patients apart without naming them; a study's where there is no ID.

        Formats that name no patient count each volume as one.
        """
        from pydicom import dcmread

        if self.templates[0][128:132] != b"DICM":
            return hashlib.sha256(self.array.tobytes()).hexdigest()[:12]
        header = dcmread(io.BytesIO(self.templates[0]), force=True)
        identity = str(header.get("PatientID") or header.get("StudyInstanceUID") or "")
        return hashlib.sha256(identity.encode()).hexdigest()[:12]


def _scan(sources: Sequence[Source], skipped: Counter[str]) -> Inspection:
    """Headers of all sources, grouped and checked."""
    headers: list[Header] = []
    damaged: list[str] = []
    odd = 0
    for index, source in enumerate(sources):
        with quiet_pydicom() as caught:
            try:
                found = guarded(
                    partial(read_headers, index, source), source.label, "read the header"
                )
            except InputError as error:
                damaged.append(str(error))
                found = "unreadable header"
        if isinstance(found, str):
            skipped[found] += 1
        else:
            headers += found
            odd += bool(caught)
    stacks = tuple(make_stack(str(i + 1), group) for i, group in enumerate(group_headers(headers)))
    notes = []
    if odd:
        notes.append(Note("NONSTANDARD_HEADER", f"{odd} files have non-standard header values"))
    if damaged:
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        notes.append(Note(_DAMAGED, damaged[0] + more))
    return Inspection(stacks, dict(sorted((+skipped).items())), tuple(notes))


def inspect(path: str | os.PathLike[str], *, max_bytes: int = 1 << 32) -> Inspection:
    """What a folder (all levels), a file or a zip archive holds; reads headers only.

    Files are recognised by the DICOM magic, not by name.  Links that leave the folder are not
    followed, archives are never unpacked to disk.

    Args:
        path: folder, DICOM file or zip archive.
        max_bytes: refuse archives that claim more than this.

    Raises:
        NoInputError: the path does not exist or holds no file at all.
        InputError: an unreadable path, an archive beyond the limits.
    """
    root = Path(path)
    skipped: Counter[str] = Counter()
    with open_sources(root, skipped, max_bytes) as sources:
        if not sources:
            raise NoInputError(f"{root} holds no files; give a DICOM folder, file or zip archive")
        return _scan(sources, skipped)


def identities(
    path: str | os.PathLike[str], found: Inspection, *, max_bytes: int = 1 << 32
) -> list[dict[str, str]]:
    """Who is imaged in each stack of `inspect`: patient data, for who asks for it.

    Args:
        path: the folder, file or archive that was inspected.
        found: what `inspect` returned.
        max_bytes: as there.

    Returns:
        DICOM keywords and texts, a stack.
    """
    result: list[dict[str, str]] = []
    with open_sources(Path(path), Counter(), max_bytes) as sources, quiet_pydicom():
        for stack in found.stacks:
            if not stack.headers:  # of a format that names no patient
                result.append({})
                continue
            first = stack.headers[0]
            ds = guarded(
                partial(open_dicom, sources[first.source], pixels=False, more=IDENTITY_TAGS),
                first.label,
                "read the header",
            )
            result.append({} if isinstance(ds, str) else identity_of(ds))
    return result


def patient_of(template: bytes) -> dict[str, str]:
    """Who is imaged, of a slice's template: patient data, for who asks for it.

    Returns:
        DICOM keywords and texts; nothing for formats that name no patient.
    """
    from pydicom import dcmread

    if template[128:132] != b"DICM":
        return {}
    with quiet_pydicom():
        return identity_of(dcmread(io.BytesIO(template)))


# --- pixels ------------------------------------------------------------------------------------


def _choose(found: Inspection, series: str | None, stack: str | int | None) -> tuple[Stack, int]:
    """The one stack that was asked for, and how many localizers were left out."""
    for note in found.warnings:
        # It may be a slice of the very stack that was asked for.
        if note.code == _DAMAGED:
            raise InputError(note.text)
    if not found.stacks:
        reasons = "; ".join(f"{n} x {reason}" for reason, n in found.skipped.items())
        foreign = ("not a CT or MR", "deflated", PROJECTIONS)
        error = UnsupportedError if any(r.startswith(foreign) for r in found.skipped) else None
        projections = any(r.startswith(PROJECTIONS) for r in found.skipped)
        todo = "see 'recon convert'" if projections else "give a CT or MR series"
        raise (error or NoInputError)(f"no CT or MR images found ({reasons}); {todo}")
    chosen = list(found.stacks)
    if series is not None:
        wanted = str(series)
        chosen = [
            s
            for s in chosen
            if wanted in (s.series, str(s.series_number), s.headers[0].series_uid)
        ]
    if stack is not None:
        chosen = [s for s in chosen if s.key == str(stack)]
    if not chosen:
        asked = " ".join(
            f"--{n} {v}" for n, v in (("series", series), ("stack", stack)) if v is not None
        )
        raise InputError(f"no stack matches {asked}; there are:\n{found.table()}")
    images = [s for s in chosen if not s.localizer]
    dropped = sum(s.slices for s in chosen if s.localizer) if images else 0
    chosen = images or chosen
    if len(chosen) > 1:
        raise InputError(
            f"{len(chosen)} stacks found, one is needed; choose with --series or --stack:\n"
            f"{found.table()}"
        )
    return chosen[0], dropped


def template_of(ds: Dataset) -> bytes:
    """The header that a derived slice needs, as the bytes of a DICOM file without pixels."""
    import pydicom
    from pydicom.charset import python_encoding
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    template = pydicom.Dataset()
    for name in TEMPLATE_TAGS:
        if name in ds:
            with suppress(Exception):  # what cannot be converted is left out
                template[name] = ds[name]
    charsets = template.get("SpecificCharacterSet") or ""
    if any(
        c not in python_encoding for c in ([charsets] if isinstance(charsets, str) else charsets)
    ):
        del template.SpecificCharacterSet  # decoded with the default; do not pass it on
    if not text_of(ds, "SOPInstanceUID"):
        raise InputError("a slice has no SOPInstanceUID; export the series again")
    template.file_meta = FileMetaDataset()
    template.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, template, enforce_file_format=True)
    return buffer.getvalue()


@dataclass(frozen=True)
class _File:
    """A data set with pixels, and the classic header of each of its images."""

    ds: Dataset
    frames: tuple[Dataset, ...]


def _open_file(source: Source, label: str) -> _File:
    ds = open_dicom(source, pixels=True)
    if isinstance(ds, str):
        raise InputError(f"{label}: {ds}")
    return _File(ds, tuple(classic_frames(ds)) if is_enhanced(ds) else (ds,))


def _stored(file: _File, header: Header, notes: Counter[str]) -> NDArray[Any]:
    """Stored values ``(rows, columns)``, checked against the header before decoding."""
    from pydicom.pixels.utils import pixel_array

    ds = file.ds
    if "ModalityLUTSequence" in ds:
        raise UnsupportedError(
            f"{header.label}: a modality look-up table instead of a slope; convert it to HU first"
        )
    if "PixelData" not in ds:
        raise InputError(f"{header.label}: no pixel data; export the series again")
    plugin = decoder_plugin(header.syntax)
    if plugin is not None:
        _check_codestream(ds, header, len(file.frames))
    else:
        expected = len(file.frames) * header.rows * header.columns * header.bits // 8
        got = len(ds.PixelData)
        if got < expected:
            raise InputError(
                f"{header.label}: pixel data are truncated, {expected} bytes expected, got {got}; "
                "copy the file again"
            )
        if got > expected + 1:
            notes["EXCESS_PIXELS"] += 1
            ds.PixelData = ds.PixelData[: expected + expected % 2]
    pixels: NDArray[Any] = pixel_array(
        ds, index=header.frame or 0, raw=True, decoding_plugin=plugin or ""
    )
    if pixels.shape != (header.rows, header.columns):
        raise InputError(
            f"{header.label}: decoded to {pixels.shape}, the header says "
            f"({header.rows}, {header.columns}); export it again"
        )
    return pixels


def _check_codestream(ds: Dataset, header: Header, frames: int) -> None:
    """Refuse a compressed image whose own size is not the header's, before a decoder believes it.

    Raises:
        InputError: another size, or more than one component.
    """
    from pydicom.encaps import get_frame

    frame = get_frame(ds.PixelData, header.frame or 0, number_of_frames=frames)
    found = codestream_size(frame)
    if found is not None and found != (header.rows, header.columns, 1):
        raise InputError(
            f"{header.label}: the compressed image is {found[0]} x {found[1]} with {found[2]} "
            f"components, the header says {header.rows} x {header.columns} with 1; export it again"
        )


def codestream_size(frame: bytes) -> tuple[int, int, int] | None:
    """Rows, columns and components as a JPEG, JPEG-LS or JPEG 2000 codestream states them.

    Args:
        frame: one compressed frame.

    Returns:
        None where the codestream states none, as in RLE.
    """
    start = frame.find(b"\xff\x4f\xff\x51")  # JPEG 2000: start of codestream, size
    if start >= 0 and len(frame) >= start + 42:
        x1, y1, x0, y0 = struct.unpack_from(">4I", frame, start + 8)
        return y1 - y0, x1 - x0, struct.unpack_from(">H", frame, start + 40)[0]
    if frame[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 10 <= len(frame) and frame[at] == 0xFF:
        marker, length = frame[at + 1], struct.unpack_from(">H", frame, at + 2)[0]
        # start of frame: JPEG has C0 to CF without three tables, JPEG-LS has F7
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            rows, columns, components = struct.unpack_from(">HHB", frame, at + 5)
            return rows, columns, components
        at += 1 if marker == 0xFF else 2 + length
    return None


def _padding(ds: Dataset, stored: NDArray[Any], bits: int) -> NDArray[np.bool_]:
    """True where stored values are the scanner's padding (PS3.3 C.7.5.1.1.2)."""
    low = number_of(ds, "PixelPaddingValue")
    if low is None:
        return np.zeros(stored.shape, dtype=bool)
    high = number_of(ds, "PixelPaddingRangeLimit")
    signed = integer_of(ds, "PixelRepresentation", 0) == 1

    def as_stored(value: float) -> int:
        # Some writers give the bit pattern with the wrong signedness.
        value = int(value) % (1 << bits)
        return value - (1 << bits) if signed and value >= 1 << (bits - 1) else value

    a = as_stored(low)
    b = a if high is None else as_stored(high)
    return (stored >= min(a, b)) & (stored <= max(a, b))


@dataclass(frozen=True)
class _Slice:
    values: NDArray[np.float32]
    mask: NDArray[np.bool_]
    rescale: tuple[float, float]
    template: bytes
    synthetic: bool


def _read_slice(file: _File, header: Header, notes: Counter[str]) -> _Slice:
    """One slice in physical units; padding becomes air (CT) or 0 (MR) and is masked."""
    ds = file.frames[header.frame or 0]
    template = template_of(ds)
    stored = _stored(file, header, notes)
    mask = _padding(ds, stored, header.bits)
    slope, intercept = header.rescale or (1.0, 0.0)
    values = (stored.astype(np.float64) * slope + intercept).astype(np.float32)
    if not np.isfinite(values).all():
        raise InputError(f"{header.label}: the rescale slope or intercept overflows")
    if header.modality == "CT":
        # in derived images such values are meant: filtered backprojection undershoots air
        derived = "DERIVED" in text_of(ds, "ImageType").upper()
        untagged = (values < -1024.0) & ~mask & (not derived)
        if untagged.any():
            notes["UNTAGGED_PADDING"] += 1
            mask |= untagged
        if header.rescale_type == "HU_MOD":
            notes["HU_MOD"] += 1
    elif header.philips:
        notes["PHILIPS_SCALE"] += 1
    elif header.rescale not in (None, (1.0, 0.0)):
        notes["MR_RESCALED"] += 1
    values[mask] = AIR_HU if header.modality == "CT" else 0.0
    synthetic = text_of(ds, "SyntheticData") == "YES"
    return _Slice(values, mask, (slope, intercept), template, synthetic)


_COUNTED = {
    "EXCESS_PIXELS": "{n} slices have bytes after the pixels, which were ignored",
    "UNTAGGED_PADDING": "{n} slices have values below -1024 HU that no header marks as padding; "
    "they count as air",
    "HU_MOD": "{n} slices are in modified HU; values may not be linear in attenuation",
    "MR_RESCALED": "{n} MR slices have a rescale slope or intercept, which was applied",
    "PHILIPS_SCALE": "{n} MR slices are in Philips' floating-point values (stored value by scale "
    "slope), which scans share",
    "DUPLICATES_DROPPED": "{n} slices were copies of another and were dropped",
}


def read_series(
    path: str | os.PathLike[str],
    series: str | None = None,
    stack: str | int | None = None,
    *,
    max_bytes: int = 1 << 32,
    allocate: Allocate = np.empty,
) -> Series:
    r"""Read exactly one stack of a folder, file or zip archive in physical units.

    .. math:: x = m\,s + b \quad\text{(each slice with its own slope m and intercept b)}

    Args:
        path: folder, DICOM file or zip archive.
        series: series UID, its hash as `inspect` shows it, or series number, where there are
            several.
        stack: number of the stack as `inspect` shows it.
        max_bytes: limit on the decoded volume (4 bytes a voxel) and on archives.
        allocate: where ``array`` and ``mask`` go; in memory by default.

    Raises:
        NoInputError: nothing there, or no images.
        InputError: several stacks and no choice; missing, duplicate or uneven slices; truncated or
            damaged files.
        UnsupportedError: multi-frame, mosaic, colour, MONOCHROME1, no decoder.
        ResourceError: a volume beyond ``max_bytes``.
    """
    root = Path(path)
    skipped: Counter[str] = Counter()
    with open_sources(root, skipped, max_bytes) as sources:
        if not sources:
            raise NoInputError(f"{root} holds no files; give a DICOM folder, file or zip archive")
        found = _scan(sources, skipped)
        chosen, localizers = _choose(found, series, stack)
        for note in chosen.problems:
            error = UnsupportedError if note.code in _UNSUPPORTED_CODES else InputError
            raise error(f"stack {chosen.key}: {note.text} [{note.code}]")
        assert chosen.spacing is not None
        assert chosen.orientation is not None
        rows, columns = chosen.shape
        needed = 4 * len(chosen.headers) * rows * columns
        if needed > max_bytes:
            raise ResourceError(
                f"stack {chosen.key} claims {len(chosen.headers)} x {rows} x {columns} voxels, "
                f"{needed >> 20} MiB, the limit is {max_bytes >> 20} MiB; read fewer slices or "
                "raise the limit (--limits)"
            )
        pixels = _read_slices(sources, chosen, allocate)
    notes = [*found.warnings]
    notes += [n for n in chosen.warnings if n.code != "DUPLICATE_POSITION"]
    if localizers:
        notes.append(Note("LOCALIZER_DROPPED", f"{localizers} localizer images were left out"))
    notes += [Note(code, _COUNTED[code].format(n=n)) for code, n in sorted(pixels.counts.items())]
    return Series(
        array=pixels.array,
        modality=chosen.modality,
        unit="HU" if chosen.modality == "CT" else "signal",
        spacing=chosen.spacing,
        positions=np.array([h.position for h in pixels.headers], dtype=np.float64),
        orientation=chosen.orientation,
        templates=tuple(pixels.templates),
        mask=pixels.mask,
        rescale=np.array(pixels.rescale, dtype=np.float64),
        tilt_deg=chosen.tilt_deg,
        synthetic=pixels.synthetic,
        warnings=notes,
    )


@dataclass
class _Pixels:
    """The slices of a stack as they are decoded, in order."""

    array: Any
    mask: Any
    headers: list[Header] = field(default_factory=list)
    templates: list[bytes] = field(default_factory=list)
    rescale: list[tuple[float, float]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    synthetic: bool = False


def _read_slices(sources: Sequence[Source], chosen: Stack, allocate: Allocate) -> _Pixels:
    """Decode the slices of a stack; copies at one position are dropped, others are an error."""
    shape = (chosen.slices, *chosen.shape)
    pixels = _Pixels(allocate(shape, np.float32), allocate(shape, np.bool_))
    z = heights(chosen.headers, slice_normal(chosen.orientation or ()))
    multiframe: dict[int, _File] = {}

    def read(header: Header) -> _Slice:
        file = multiframe.get(header.source)
        if file is None:
            file = _open_file(sources[header.source], header.label)
        if header.frame is not None:
            multiframe[header.source] = file
        return _read_slice(file, header, pixels.counts)

    for i, header in enumerate(chosen.headers):
        with quiet_pydicom():
            current = guarded(partial(read, header), header.label, "decode the pixels")
        k = len(pixels.headers)
        if i and z[i] - z[i - 1] < SAME_MM:
            if not np.array_equal(current.values, pixels.array[k - 1]):
                raise InputError(
                    f"stack {chosen.key}: two different slices at {z[i]:.2f} mm along the "
                    f"normal ({pixels.headers[-1].label}; {header.label}); remove one"
                )
            pixels.counts["DUPLICATES_DROPPED"] += 1
            continue
        pixels.array[k], pixels.mask[k] = current.values, current.mask
        pixels.headers.append(header)
        pixels.templates.append(current.template)
        pixels.rescale.append(current.rescale)
        pixels.synthetic |= current.synthetic
    return pixels
