"""``recon inspect``: what a folder, file or zip archive holds, and which prior fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from recon_cli.console import log, print_json, print_table
from recon_cli.options import Input, Json, command
from recon_cli.scans import Limits, bytes_of

if TYPE_CHECKING:
    from pathlib import Path

    from inverse.io.series import Inspection, Stack
    from inverse.priors import PriorCard


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(
        app,
        "inspect",
        examples="""
        recon inspect CT_FOLDER
        recon inspect archive.zip --json
        recon inspect brain.nii.gz
        """,
    )
    def inspect(path: Input, limits: Limits = 4.0, as_json: Json = False) -> None:
        """Show stacks, geometry, units, warnings and fitting priors; reads headers only."""
        from inverse.errors import NoInputError
        from inverse.io.raw import describe_hdf5
        from inverse.io.series import inspect as read
        from inverse.priors import list_priors

        raw = describe_hdf5(path)
        if raw is not None:
            _tell_raw(path, raw, as_json)
            return
        found = read(path, max_bytes=bytes_of(limits))
        if not found.stacks:
            reasons = "; ".join(f"{n} x {reason}" for reason, n in found.skipped.items())
            raise NoInputError(
                f"'{path}' holds no CT or MR images ({reasons}); give a CT or MR series"
            )
        cards = list_priors()
        fits = [_fitting(stack, cards) for stack in found.stacks]
        if as_json:
            result = found.to_dict()
            for entry, names in zip(result["stacks"], fits, strict=True):
                entry["priors"] = names
            print_json({"schema_version": 1, **result})
            return
        print_table(
            _title(found, path),
            ["stack", "series", "no.", "modality", "slices", "matrix", "spacing mm", "remarks",
             "priors"],
            [_row(stack, names) for stack, names in zip(found.stacks, fits, strict=True)],
            left=9,
        )  # fmt: skip
        for stack in found.stacks:
            for kind, notes in (("problem", stack.problems), ("warning", stack.warnings)):
                for note in notes:
                    print(f"stack {stack.key}: {kind}: {note.text} [{note.code}]")
        for reason, count in found.skipped.items():
            log(f"skipped {count} files: {reason}")
        for note in found.warnings:
            log(f"warning: {note.text} [{note.code}]")


def _tell_raw(path: Path, raw: Mapping[str, Any], as_json: bool) -> None:
    """A measurement file or raw data, and which command takes them."""
    measured = raw["kind"] == "measurement"
    command = "reconstruct" if measured else "convert"
    if raw["kind"] == "unknown HDF5":
        command = "convert --format NAME"
    if as_json:
        print_json({"schema_version": 1, "stacks": [], "raw": {**raw, "command": command}})
        return
    shape = " x ".join(map(str, raw.get("shape", ())))
    label = f", {raw['label']}" if raw.get("label") else ""
    size = f", data {shape}" if shape else ""
    what = "measurement file" if measured else f"{raw['kind']} raw data"
    if measured:
        size += ", simulated" if raw["simulated"] else ", measured"
    print(f"{path}: {what}{label}{size}; next: recon {command} {path} -o OUT")


def _title(found: Inspection, path: Path) -> str:
    """How much was found, and how much of it is no image to reconstruct."""
    scouts = sum(stack.localizer for stack in found.stacks)
    skipped = sum(found.skipped.values())
    parts = [f"{len(found.stacks)} stack{'s' * (len(found.stacks) != 1)} in {path}"]
    parts += [f"{scouts} of them localizer{'s' * (scouts > 1)}"] if scouts else []
    parts += [f"{skipped} other file{'s' * (skipped > 1)} skipped"] if skipped else []
    return ", ".join(parts)


def _row(stack: Stack, priors: Sequence[str]) -> list[str]:
    spacing = " x ".join(f"{v:.4g}" for v in stack.spacing) if stack.spacing else "unknown"
    remarks = ["localizer"] * stack.localizer + ["lossy"] * stack.lossy
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
