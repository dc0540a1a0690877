r"""Read ISMRMRD raw MRI: Cartesian two-dimensional scans, one or many coils and slices.

Readouts are put on the encoded grid by their encoding step, repeated ones averaged, reversed ones
turned round, readout oversampling is removed.  Noise readouts give the coils' covariance at the
bandwidth of the scan,

.. math:: \Psi = \frac{\tau_n}{\tau\, b} \cdot \frac{1}{2N}\sum_i n_i n_i^H

with dwell times :math:`\tau_n` (noise) and :math:`\tau` (imaging) and the relative receiver noise
bandwidth b.

Source: S. Inati et al., ISMRM Raw data format, Magn. Reson. Med. 77 (2017) 411.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from numpy.typing import NDArray

from inverse.errors import InputError, UnsupportedError
from inverse.io.dicom_frame import PatientFrame
from inverse.io.hdf5 import Hdf5, open_hdf5
from inverse.io.kspace import KSpace, crop_readout
from inverse.operators.coils import noise_covariance

__all__ = ["Encoding", "parse_header", "read_ismrmrd"]

_XML_BYTES = 2**24

# Acquisition flags, numbered from 1 as the format does.
_NOISE, _CALIBRATION, _CALIBRATION_AND_IMAGING, _REVERSE = 19, 20, 21, 22
_NO_IMAGE = {23: "navigation", 24: "phase correction", 26: "feedback", 27: "dummy",
             28: "feedback", 29: "surface coil correction"}  # fmt: skip


@dataclass(frozen=True)
class Encoding:
    """What the XML header says about one encoding; sizes (x, y, z), readout first.

    Attributes:
        encoded: matrix of the encoded space.
        encoded_fov_mm: field of view of the encoded space.
        recon: matrix of the reconstruction.
        recon_fov_mm: field of view of the reconstruction.
        centre: phase-encoding step of the zero frequency.
        last: highest phase-encoding step.
        trajectory: kind of trajectory.
        bandwidth: relative receiver noise bandwidth.
    """

    encoded: tuple[int, int, int]
    encoded_fov_mm: tuple[float, float, float]
    recon: tuple[int, int, int]
    recon_fov_mm: tuple[float, float, float]
    centre: int
    last: int
    trajectory: str
    bandwidth: float

    @property
    def offset(self) -> int:
        """What to add to a phase-encoding step so that the zero frequency is at ny // 2."""
        return self.encoded[1] // 2 - self.centre


def parse_header(xml: str, source: Path) -> Encoding:
    """The encoding of an ISMRMRD header.

    Args:
        xml: the header.
        source: its file, for messages.

    Raises:
        InputError: XML that is damaged, declares entities or lacks sizes.
        UnsupportedError: several encodings.
    """
    if len(xml) > _XML_BYTES or "<!DOCTYPE" in xml or "<!ENTITY" in xml:
        raise InputError(f"{source}: the XML header is oversized or declares entities")
    try:
        root = ElementTree.fromstring(xml.strip("\0 \n\t"))
    except ElementTree.ParseError:
        raise InputError(f"{source}: the XML header is damaged; export the file again") from None
    for element in root.iter():
        element.tag = element.tag.rsplit("}", 1)[-1]
    encodings = root.findall("encoding")
    if len(encodings) != 1:
        raise UnsupportedError(
            f"{source} has {len(encodings)} encodings, one is served; export one scan a file"
        )
    encoding = encodings[0]

    def number(where: ElementTree.Element, path: str, default: float | None = None) -> float:
        found = where.findtext(path)
        try:
            value = float(found) if found is not None else default
        except ValueError:
            value = None
        if value is None or not math.isfinite(value):
            raise InputError(f"{source}: the XML header has no number '{path}'")
        return value

    def triple(path: str) -> tuple[float, float, float]:
        x, y, z = (number(encoding, f"{path}/{axis}") for axis in "xyz")
        return x, y, z

    def matrix(space: str) -> tuple[int, int, int]:
        x, y, z = (int(v) for v in triple(f"{space}/matrixSize"))
        if not (0 < x <= 65535 and 0 < y <= 65535 and 0 < z <= 65535):
            raise InputError(f"{source}: the matrix {x} x {y} x {z} of {space} is not possible")
        return x, y, z

    limits = "encodingLimits/kspace_encoding_step_1"
    encoded = matrix("encodedSpace")
    return Encoding(
        encoded=encoded,
        encoded_fov_mm=triple("encodedSpace/fieldOfView_mm"),
        recon=matrix("reconSpace"),
        recon_fov_mm=triple("reconSpace/fieldOfView_mm"),
        centre=int(number(encoding, f"{limits}/center", encoded[1] // 2)),
        last=int(number(encoding, f"{limits}/maximum", encoded[1] - 1)),
        trajectory=(encoding.findtext("trajectory") or "").strip().lower(),
        bandwidth=number(root, "acquisitionSystemInformation/relativeReceiverNoiseBandwidth", 1.0),
    )


def _flag(head: Any, number: int) -> bool:
    return bool(int(head["flags"]) >> (number - 1) & 1)


def read_ismrmrd(
    path: str | os.PathLike[str],
    *,
    contrast: int | None = None,
    repetition: int | None = None,
    max_bytes: int = 1 << 32,
) -> KSpace:
    """Read the Cartesian k-space of an ISMRMRD file.

    Args:
        path: the file.
        contrast: which contrast (echo), where there are several; counts from 0.
        repetition: which repetition, where there are several; counts from 0.
        max_bytes: most bytes of readouts and of the k-space that they make.

    Raises:
        NoInputError: no such file, or no imaging readout in it.
        InputError: damaged, links, readouts that contradict the header, several contrasts or
            repetitions and no choice.
        UnsupportedError: other trajectories, three-dimensional encoding, asymmetric echoes,
            masks that differ between slices.
        ResourceError: more than ``max_bytes``.
    """
    source = Path(path)
    with open_hdf5(source, "ISMRMRD", max_bytes) as file:
        xml = file.text("dataset/xml")
        if xml is None:
            raise InputError(f"{source} has no dataset/xml, so it is not an ISMRMRD file")
        encoding = parse_header(xml, source)
        if encoding.trajectory != "cartesian":
            raise UnsupportedError(
                f"{source}: trajectory '{encoding.trajectory}' is not served, only cartesian is; "
                "grid the data first"
            )
        if encoding.encoded[2] != 1:
            raise UnsupportedError(
                f"{source}: three-dimensional encoding ({encoding.encoded[2]} partitions) is not "
                "served; transform the third axis first and store slices"
            )
        return _assemble(source, encoding, file, contrast, repetition)


def _choice(source: Path, heads: NDArray[Any], name: str, wanted: int | None) -> NDArray[np.bool_]:
    """Readouts of the one contrast or repetition that was asked for."""
    values = heads["idx"][name]
    there = sorted({int(v) for v in values})
    if wanted is None and len(there) > 1:
        raise InputError(
            f"{source} has {len(there)} {name}s ({', '.join(map(str, there[:10]))}); choose one "
            f"with --{name}"
        )
    chosen = there[0] if wanted is None else wanted
    if chosen not in there:
        raise InputError(f"{source} has no {name} {chosen}; there are {there[:10]}")
    return np.asarray(values == chosen)


def _assemble(
    source: Path, encoding: Encoding, file: Hdf5, contrast: int | None, repetition: int | None
) -> KSpace:
    acquisitions = file.need("dataset/data")
    if {"head", "data"} - set(acquisitions.dtype.names or ()):
        raise InputError(f"{source}: dataset/data holds no acquisitions; is it ISMRMRD?")
    file.count(acquisitions.shape[0] * acquisitions.dtype.itemsize, "dataset/data")
    heads = np.asarray(acquisitions["head"])
    flags = heads["flags"]

    def flagged(number: int) -> NDArray[np.bool_]:
        return np.asarray((flags >> np.uint64(number - 1)) & np.uint64(1), dtype=bool)

    left_out = np.zeros(len(heads), bool)
    for number in _NO_IMAGE:
        left_out |= flagged(number)
    calibration = flagged(_CALIBRATION) & ~flagged(_CALIBRATION_AND_IMAGING)
    imaging = ~(left_out | calibration | flagged(_NOISE))
    if not imaging.any():
        raise InputError(f"{source} holds no imaging readout; export the scan again")
    keep = imaging.copy()
    for name, wanted in (("contrast", contrast), ("repetition", repetition)):
        keep[imaging] &= _choice(source, heads[imaging], name, wanted)
    for name in ("phase", "set"):
        if len(np.unique(heads[keep]["idx"][name])) > 1:
            raise UnsupportedError(
                f"{source} has several values of '{name}' (cardiac phases, velocity encodings), "
                "which are not served; export one of them"
            )
    if heads[keep]["idx"]["kspace_encode_step_2"].any():
        raise UnsupportedError(f"{source}: a second phase-encoding direction is not served")
    data, counts = _fill(source, encoding, file, acquisitions, heads, np.flatnonzero(keep))
    mask = counts > 0
    if (mask != mask[:1]).any():
        raise UnsupportedError(
            f"{source}: slices are sampled differently; convert them one by one"
        )
    if (counts[:, mask[0]] != counts[0, mask[0]][0]).any():
        raise UnsupportedError(
            f"{source}: some lines are averaged more often than others; export one average"
        )
    averages = int(counts.max())
    data /= averages
    lines = None
    chosen = calibration & np.isin(heads["idx"]["slice"], np.unique(heads[keep]["idx"]["slice"]))
    for name in ("contrast", "repetition"):
        chosen &= heads["idx"][name] == heads[keep][0]["idx"][name]
    if chosen.any():
        sums, times = _fill(source, encoding, file, acquisitions, heads, np.flatnonzero(chosen))
        lines = sums / np.maximum(times, 1).astype(np.float32)[:, None, None, :]
    covariance = _covariance(encoding, file, acquisitions, heads, flagged(_NOISE), keep)
    pixel_mm = (
        encoding.recon_fov_mm[0] / encoding.recon[0],
        encoding.encoded_fov_mm[1] / encoding.encoded[1],
    )
    numbers, first = np.unique(heads[keep]["idx"]["slice"], return_index=True)
    order, z_mm, frame = _geometry(heads[keep][first], data.shape[2:], pixel_mm)
    return KSpace(
        data=np.ascontiguousarray(data[order]),
        mask=np.ascontiguousarray(np.broadcast_to(mask[0], data.shape[2:])),
        pixel_mm=pixel_mm,
        z_mm=z_mm,
        covariance=None if covariance is None else covariance / averages,
        calibration=None if lines is None or len(lines) != len(data) else lines[order],
        frame=frame,
        provenance={
            "source": "ISMRMRD",
            "slices": [int(numbers[k]) for k in order],
            "averages": averages,
            "calibration_readouts": int(calibration.sum()),
            "readouts_left_out": int(left_out.sum()),
            "oversampling_removed": encoding.encoded[0] / encoding.recon[0],
        },
    )


def _fill(
    source: Path,
    encoding: Encoding,
    file: Hdf5,
    acquisitions: Any,
    heads: NDArray[Any],
    chosen: NDArray[np.intp],
) -> tuple[NDArray[np.complex64], NDArray[np.intp]]:
    """Sums of the readouts ``(slices, coils, readout, phase)``, and how many went into each line.

    Counts are ``(slices, phase)``.
    """
    nx, ny, _ = encoding.encoded
    keep_x = min(encoding.recon[0], nx)
    coils = int(heads[chosen[0]]["active_channels"])
    numbers = {int(v): k for k, v in enumerate(np.unique(heads[chosen]["idx"]["slice"]))}
    file.count(8 * len(numbers) * coils * keep_x * ny, "k-space")
    data = np.zeros((len(numbers), coils, keep_x, ny), np.complex64)
    counts = np.zeros((len(numbers), ny), np.intp)
    for i in chosen:
        head = heads[i]
        samples = int(head["number_of_samples"])
        column = int(head["idx"]["kspace_encode_step_1"]) + encoding.offset
        if int(head["active_channels"]) != coils or not 0 <= column < ny:
            raise InputError(
                f"{source}: readout {i} has {int(head['active_channels'])} coils and encoding "
                f"step {int(head['idx']['kspace_encode_step_1'])}, which does not fit {coils} "
                f"coils and {ny} steps; export the scan again"
            )
        line = _readout(source, acquisitions, int(i), coils, samples)
        line = line[:, int(head["discard_pre"]) : samples - int(head["discard_post"])]
        middle = (int(head["center_sample"]) or samples // 2) - int(head["discard_pre"])
        if _flag(head, _REVERSE):
            line, middle = line[:, ::-1], line.shape[1] - 1 - middle
        if line.shape[1] != nx or middle != nx // 2:
            raise UnsupportedError(
                f"{source}: readout {i} has {line.shape[1]} samples about sample {middle}, the "
                f"encoded matrix {nx}; partial readouts (asymmetric echoes) are not served"
            )
        z = numbers[int(head["idx"]["slice"])]
        data[z, :, :, column] += crop_readout(line, keep_x)
        counts[z, column] += 1
    return data, counts


def _readout(
    source: Path, acquisitions: Any, index: int, coils: int, samples: int
) -> NDArray[np.complex64]:
    """One readout, ``(coils, samples)``."""
    values = np.asarray(acquisitions[index]["data"], np.float32)
    if values.size != 2 * coils * samples:
        raise InputError(
            f"{source}: readout {index} holds {values.size} numbers, expected "
            f"{2 * coils * samples} for {coils} coils of {samples} samples; export it again"
        )
    return values.view(np.complex64).reshape(coils, samples)


def _covariance(
    encoding: Encoding,
    file: Hdf5,
    acquisitions: Any,
    heads: NDArray[Any],
    noise: NDArray[np.bool_],
    keep: NDArray[np.bool_],
) -> NDArray[np.complex128] | None:
    """Covariance of the coils' noise at the bandwidth of the scan."""
    if not noise.any():
        return None
    first = heads[noise][0]
    coils = int(heads[keep][0]["active_channels"])
    lines = [
        _readout(file.source, acquisitions, int(i), coils, int(heads[i]["number_of_samples"]))
        for i in np.flatnonzero(noise)
    ]
    n = np.concatenate(lines, axis=1)
    dwell_noise, dwell = float(first["sample_time_us"]), float(heads[keep][0]["sample_time_us"])
    ratio = dwell_noise / dwell if dwell_noise > 0 and dwell > 0 else 1.0
    psi = noise_covariance(torch.from_numpy(n)).numpy()
    return np.asarray(ratio / encoding.bandwidth * psi)


def _geometry(
    heads: NDArray[Any], shape: tuple[int, ...], pixel_mm: tuple[float, float]
) -> tuple[list[int], tuple[float, ...], PatientFrame | None]:
    r"""Order of the slices along their normal, their heights, and where they lie in the patient.

    Readouts run down the columns of the image and phase encoding along its rows, and a readout's
    position is that of the zero of space, pixel (H // 2, W // 2):

    .. math:: p = x - \lfloor H/2\rfloor\,\Delta_y\,\hat e_\text{read}
       - \lfloor W/2\rfloor\,\Delta_x\,\hat e_\text{phase}
    """
    read, phase, along = (
        heads[name].astype(np.float64) for name in ("read_dir", "phase_dir", "slice_dir")
    )
    position = heads["position"].astype(np.float64)
    (r, c), (rows, columns) = (phase[0], read[0]), shape
    axes = np.stack([r, c])
    known = (
        np.abs(axes @ axes.T - np.eye(2)).max() < 1e-3
        and np.ptp(read, axis=0).max() < 1e-3
        and np.ptp(phase, axis=0).max() < 1e-3
    )
    normal = np.cross(r, c) if known else along[0]
    z = position @ normal
    if not np.isfinite(z).all() or len(np.unique(z.round(4))) < len(z):
        return list(range(len(heads))), (), None
    order = [int(k) for k in np.argsort(z)]
    if not known:
        return order, tuple(float(v) for v in z[order]) if len(z) > 1 else (), None
    first = position - rows // 2 * pixel_mm[0] * c - columns // 2 * pixel_mm[1] * r
    frame = PatientFrame((*r.tolist(), *c.tolist()), tuple(map(tuple, first[order].tolist())))
    return order, tuple(float(v) for v in z[order]), frame
