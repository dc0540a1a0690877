"""``recon inspect``: what a folder, file or archive holds, and what can be done with it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recon_cli import runlog
from recon_cli.console import log, print_json, print_table
from recon_cli.options import Json, Limits, bytes_of, command
from recon_cli.runlog import SCHEMA_VERSION
from recon_cli.task import BASELINES

if TYPE_CHECKING:
    from inverse.io.series import Inspection, Stack
    from inverse.priors import PriorCard

_Input = Annotated[
    Path,
    typer.Argument(
        metavar="IN",
        help="DICOM folder, file or zip archive, NIfTI file, raw data, or measurement file.",
        show_default=False,
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(
        app,
        "inspect",
        phi=True,
        examples="""
        recon inspect CT_FOLDER
        recon inspect archive.zip --json
        recon inspect brain.nii.gz
        recon inspect scan.h5
        """,
    )
    def inspect(path: _Input, limits: Limits = 4.0, as_json: Json = False) -> None:
        """Show stacks, geometry, units, warnings, fitting priors and raw data; reads headers."""
        from inverse.errors import NoInputError
        from inverse.io.dicom import identities
        from inverse.priors import list_priors

        cap, phi = bytes_of(limits), bool(runlog.OPTIONS.get("include-phi"))
        found, raw = _look(path, cap, phi)
        if not found.stacks and not raw:
            reasons = "; ".join(f"{n} x {reason}" for reason, n in found.skipped.items())
            raise NoInputError(
                f"'{path}' holds no CT or MR images ({reasons}); give a CT or MR series"
            )
        cards = list_priors()
        fits = [_fitting(stack, cards) for stack in found.stacks]
        told = identities(path, found, max_bytes=cap)
        made = [_made(one.get("SeriesDescription", "")) for one in told]
        patients = told if phi else []
        if as_json:
            result = found.to_dict()
            for entry, names, what in zip(result["stacks"], fits, made, strict=True):
                entry |= {"priors": names} | ({"made": what} if what else {})
            for entry, patient in zip(result["stacks"], patients, strict=False):
                entry["patient"] = patient
            print_json({"schema_version": SCHEMA_VERSION, **result, "raw": raw})
            return
        if found.stacks:
            print_table(
                _title(found, path),
                ["stack", "series", "no.", "modality", "slices", "matrix", "spacing mm",
                 "remarks", "priors"],
                [_row(*entry) for entry in zip(found.stacks, fits, made, strict=True)],
                left=9,
            )  # fmt: skip
        for stack in found.stacks:
            for kind, notes in (("problem", stack.problems), ("warning", stack.warnings)):
                for note in notes:
                    print(f"stack {stack.key}: {kind}: {note.text} [{note.code}]")
        for stack, patient in zip(found.stacks, patients, strict=False):
            for name, text in patient.items():
                print(f"stack {stack.key}: {name}: {text}")
        for entry in raw:
            print(_line(path, entry))
        for reason, count in found.skipped.items():
            log(f"skipped {count} file{'s' * (count > 1)}: {reason}")
        for note in found.warnings:
            log(f"warning: {note.text} [{note.code}]")


def _look(path: Path, cap: int, phi: bool) -> tuple[Inspection, list[dict[str, Any]]]:
    """Image stacks, and raw data with what takes them; what is neither is counted."""
    from inverse.io.raw import describe_raw, find_raw
    from inverse.io.series import Inspection
    from inverse.io.series import inspect as read

    header = path.with_name(path.name + ".hdr")  # BART names a pair without suffix
    source = header if not path.exists() and header.is_file() else path
    alone = describe_raw(source) if source.is_file() else None
    if alone is not None:
        return Inspection((), {}), [{"file": "the file", **alone}]
    found = read(path, max_bytes=cap)
    files = find_raw(path) if path.is_dir() else []
    if found.stacks and found.stacks[0].headers:
        files += _images_beside(path)
    raw = [
        {"file": _shown(path, file, k, len(files), phi), **about}
        for k, (file, about) in enumerate(files, start=1)
    ]
    skipped = dict(found.skipped)
    if "not DICOM" in skipped:
        # a BART pair is two files
        known = sum(2 if about["kind"] == "bart" else 1 for _, about in files)
        skipped["not DICOM"] -= known
    raw += _projections(skipped)
    left = {k: n for k, n in skipped.items() if n > 0 and not k.startswith(_projection_words())}
    return replace(found, skipped=left), raw


@contextmanager
def telling_kind(path: Path, command: str, cap: int) -> Iterator[None]:
    """Where reading a path fails since it is of another kind, say which and what takes it.

    Args:
        path: what is read.
        command: that reads it: ``"study"`` (images), ``"reconstruct"`` or ``"convert"``.
        cap: limit on archives, bytes.

    Raises:
        ReconError: the reader's, or one of its kind in other words.
    """
    from inverse.errors import ReconError

    try:
        yield
    except ReconError as error:
        try:
            found, raw = _look(path, cap, phi=False)
        except ReconError:
            raise error from None
        takers = [entry["command"] for entry in raw] + ["study"] * bool(found.stacks)
        if command in takers:
            raise
        if found.stacks:
            stack = found.stacks[0]
            kind = "mri" if stack.modality == "MR" else "ct"
            text = (
                f"'{path}' holds {stack.modality} images; 'recon study {kind}' takes them, and "
                f"'recon simulate {kind}' makes a measurement file of them"
            )
        elif raw:
            text = _line(path, raw[0]).replace("; next: ", "; use ")
        elif command == "reconstruct" and path.exists() and not _is_hdf5(path):
            text = (
                f"'{path}' is no measurement file, nor images or raw data that recon reads; "
                "'recon simulate' and 'recon convert' write measurement files"
            )
        else:
            raise
        raise type(error)(text) from error


def _is_hdf5(path: Path) -> bool:
    """Whether a file begins as HDF5 does."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(8) == b"\x89HDF\r\n\x1a\n"


def _projection_words() -> str:
    from inverse.io.dicom_headers import PROJECTIONS

    return PROJECTIONS


def _images_beside(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """NIfTI images in a folder that is read as DICOM."""
    from inverse.io.nifti import nifti_files

    return [(file, {"kind": "nifti", "command": "study"}) for file in nifti_files(path)]


def _projections(skipped: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """Projection data among the DICOM files; helical scans with the reason why not."""
    for reason, count in skipped.items():
        if reason.startswith(_projection_words()):
            scan = reason.rpartition(" ")[2]
            entry: dict[str, Any] = {"kind": "ctpd", "files": count, "scan": scan}
            if scan == "helical":
                problem = "rebin to axial fan-beam data first; helical scans are not served"
                yield entry | {"command": None, "problem": problem}
            else:
                yield entry | {"command": "convert"}


def _shown(root: Path, file: Path, k: int, total: int, phi: bool) -> str:
    """A file by its name where that tells no patient, else by its number."""
    from inverse.io.dicom_files import is_plain_name

    if phi:
        return str(file.relative_to(root))
    name = f" ({file.name})" if is_plain_name(file.name) else ""
    return f"raw file {k} of {total} by path{name}"


_KINDS = {
    "measurement": "measurement file",
    "ismrmrd": "ISMRMRD raw data",
    "fastmri": "fastMRI raw data",
    "bart": "BART data",
    "dxchange": "Data Exchange raw data",
    "ctpd": "DICOM-CT-PD projections",
    "nifti": "NIfTI image",
}


def _line(path: Path, entry: Mapping[str, Any]) -> str:
    """An entry in words, with the command that takes it."""
    parts = [_KINDS.get(entry["kind"], str(entry["kind"]))]
    if entry["kind"] == "ctpd":
        parts.append(f"{entry['files']} files, {entry['scan']}")
    if entry.get("label"):
        parts.append(str(entry["label"]))
    for name in ("shape", "matrix"):
        if name in entry:
            word = "data" if name == "shape" else name
            parts.append(f"{word} {' x '.join(map(str, entry[name]))}")
    if "trajectory" in entry:
        parts.append(f"{entry['trajectory']}, {entry['readouts']} readouts")
    if "dimensions" in entry:
        parts.append(" x ".join(f"{n} {name}" for name, n in entry["dimensions"].items()))
    if "simulated" in entry:
        parts.append("simulated" if entry["simulated"] else "measured")
    if "problem" in entry:
        parts.append(str(entry["problem"]))
    alone = entry.get("file") in (None, "the file")
    where = str(path) if alone else f"{path}, {entry['file']}"
    target = str(path) if alone else "FILE"
    if entry["kind"] == "unknown HDF5":
        parts.append("of no known format; name one with 'recon convert --format'")
    todo = {
        "convert": f"recon convert {target} -o MEAS.h5",
        "reconstruct": f"recon reconstruct {target} -o OUT",
        "study": f"recon study ct {target} -o OUT, or study mri",
    }.get(entry["command"] or "", "")
    todo += " --pixel-mm MM" if entry["kind"] == "bart" else ""
    return f"{where}: {', '.join(parts)}" + (f"; next: {todo}" if todo else "")


def _title(found: Inspection, path: Path) -> str:
    """How much was found, and how much of it is no image to reconstruct."""
    scouts = sum(stack.localizer for stack in found.stacks)
    skipped = sum(found.skipped.values())
    parts = [f"{len(found.stacks)} stack{'s' * (len(found.stacks) != 1)} in {path}"]
    parts += [f"{scouts} of them localizer{'s' * (scouts > 1)}"] if scouts else []
    parts += [f"{skipped} other file{'s' * (skipped > 1)} skipped"] if skipped else []
    return ", ".join(parts)


_TITLES = "|".join(
    map(re.escape, ["Reference", "FBP", "Zero-filled", "CG-SENSE", "L1-wavelet",
                    "Linear interpolation", *BASELINES.values()])
)  # fmt: skip
_MADE = re.compile(rf"RESEARCH ONLY - ({_TITLES}|Prior \([a-z0-9_]+\))(?= |$).*?( STD|$)")


def _made(description: str) -> str:
    """Which of this toolkit's outputs a series is, in its own words alone; else nothing."""
    found = _MADE.match(description)
    return "".join(found.groups()) if found else ""


def _row(stack: Stack, priors: Sequence[str], made: str) -> list[str]:
    spacing = " x ".join(f"{v:.4g}" for v in stack.spacing) if stack.spacing else "unknown"
    remarks = [made] * bool(made)
    remarks += ["localizer"] * stack.localizer + ["lossy"] * stack.lossy
    remarks += [f"tilt {stack.tilt_deg:.1f} deg"] if stack.tilt_deg else []
    remarks += [note.code for note in stack.problems]
    return [
        stack.key,
        stack.series,
        "" if stack.series_number is None else str(stack.series_number),
        stack.modality,
        str(stack.slices),
        f"{stack.shape[0]} x {stack.shape[1]}",
        spacing,
        ", ".join(remarks),
        ", ".join(priors) or "none",
    ]


def _fitting(stack: Stack, cards: Sequence[PriorCard]) -> list[str]:
    """Bundled priors of the modality whose pixel sizes the stack has, or has when binned."""
    if stack.spacing is None or stack.localizer:
        return []
    pixel = stack.spacing[1]
    names = []
    for card in cards:
        low, high = card.pixel_mm_range
        if card.modality == stack.modality and any(
            0.95 * low <= factor * pixel <= 1.05 * high for factor in (1, 2, 3, 4)
        ):
            names.append(card.name)
    return names
