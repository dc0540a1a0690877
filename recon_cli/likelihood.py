"""``recon likelihood``: how probable images are under a prior."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from recon_cli import options as o
from recon_cli.console import log, print_json, print_table, progress
from recon_cli.options import command, parse_slices
from recon_cli.task import choose_prior, named_prior, pick_device

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from inverse.priors import NetworkPrior, PriorCard
    from inverse.sampling import RK45, Heun

_LIKELIHOOD = "Likelihood"
_Input = Annotated[
    Path,
    typer.Argument(
        metavar="IN",
        help="DICOM folder, file or zip, or an .npz of images as 'recon sample' writes it.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class _Images:
    """Images to score.

    Attributes:
        array: ``(slices, rows, columns)``, HU or signal.
        modality: ``"CT"`` or ``"MR"``; ``None`` where unknown.
        pixel_mm: pixel size; ``None`` where unknown.
        unit: ``"HU"``, ``"signal"`` or ``"relative"``.
        top: value that is 1 in the intensities of the prior's card: for a signal found from all
            slices of the source, 1 otherwise.
        chosen: numbers of the slices in the source.
    """

    array: NDArray[np.float32]
    modality: str | None
    pixel_mm: float | None
    unit: str
    top: float
    chosen: list[int]


def _read_npz(path: Path, slices: str | None) -> _Images:
    """One 3-D array, with ``pixel_mm``, ``modality`` and ``unit`` beside it where known.

    Raises:
        NoInputError: no such file.
        InputError: not an npz file, or not exactly one stack of real images in it.
    """
    import numpy as np

    from inverse.errors import InputError, NoInputError

    if not path.is_file():
        raise NoInputError(f"'{path}' does not exist; give an .npz file or a DICOM series")
    try:
        with np.load(path, allow_pickle=False) as archive:
            content = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise InputError(
            f"'{path}' is not a readable .npz file ({type(error).__name__}); write one with "
            "numpy.savez(path, images=array)"
        ) from None
    stacks = [v for v in content.values() if v.ndim == 3 and v.dtype.kind in "fiu"]
    if len(stacks) != 1:
        raise InputError(
            f"'{path}' must hold exactly one real array (slices, rows, columns), found "
            f"{len(stacks)}; save the images under one name"
        )
    if not stacks[0].size:
        raise NoInputError(f"'{path}' holds no images: its array has shape {stacks[0].shape}")
    known = {k: content[k].item() for k in ("pixel_mm", "modality", "unit") if k in content}
    chosen = parse_slices(slices, len(stacks[0]))
    unit = str(known.get("unit", "signal" if known.get("modality") == "MR" else "HU"))
    return _Images(
        stacks[0][chosen].astype(np.float32),
        known.get("modality"),
        known.get("pixel_mm"),
        unit,
        _top(stacks[0]) if unit == "signal" else 1.0,
        chosen,
    )


def _read(path: Path, series: str | None, stack: str | None, slices: str | None) -> _Images:
    log(f"reading {path}")
    if path.suffix == ".npz":
        return _read_npz(path, slices)
    from inverse.io.dicom import read_series

    found = read_series(path, series, stack)
    for note in found.warnings:
        log(f"warning: {note.text} [{note.code}]")
    chosen = parse_slices(slices, len(found.array))
    return _Images(
        found.array[chosen],
        found.modality,
        float(found.spacing[1]),
        found.unit,
        _top(found.array) if found.unit == "signal" else 1.0,
        chosen,
    )


def _top(array: NDArray[np.float32]) -> float:
    """The signal that is 1 in a prior's relative intensities, found as in its training.

    Raises:
        InputError: images with no signal.
    """
    import numpy as np

    from inverse.errors import InputError

    if not (array > 0).any():
        raise InputError("the images hold no signal above 0; there is nothing to score")
    return float(np.percentile(array[array > 0], 99.5))


def _fit(
    images: _Images, prior: NetworkPrior, pixel_mm: float | None
) -> tuple[NDArray[np.float32], NetworkPrior, list[str]]:
    """Images at a pixel size that the prior knows, the prior at it, and what does not fit.

    Raises:
        InputError: values that are not finite.
        UnsupportedError: a prior of complex images.
    """
    import numpy as np

    from inverse.errors import InputError, UnsupportedError

    card, array, flags = prior.card, images.array, []
    if not np.isfinite(array).all():
        raise InputError(
            f"{int((~np.isfinite(array)).sum())} values of the images are not finite; replace "
            "NaN and infinity first"
        )
    if prior.net.config.channels != 1:
        raise UnsupportedError(
            f"prior '{card.name}' is of complex images, the input is of magnitudes; choose a "
            "prior of one channel"
        )
    pixel = images.pixel_mm if pixel_mm is None else pixel_mm
    low, high = card.pixel_mm_range
    if pixel is None:
        flags.append(
            f"the pixel size is unknown and taken as {prior.pixel_mm:.3g} mm; give --pixel-mm"
        )
        return array, prior, flags
    rows, columns = array.shape[1:]
    factors = [
        k
        for k in (1, 2, 3, 4)
        if 0.95 * low <= k * pixel <= 1.05 * high and rows % k == 0 and columns % k == 0
    ]
    if not factors:
        flags.append(
            f"pixels of {pixel:.3g} mm lie outside the prior's {low:.3g} to {high:.3g} mm: it has "
            "not seen such images"
        )
    elif factors[0] > 1:
        k = factors[0]
        array = array.reshape(len(array), rows // k, k, columns // k, k).mean(axis=(2, 4))
        log(f"pixels of {pixel:.3g} mm are averaged to {k * pixel:.3g} mm, which the prior knows")
        pixel *= k
    return array, prior.at(pixel_mm=pixel), flags


def _range_flags(images: _Images, card: PriorCard) -> list[str | None]:
    """A sentence for each slice with values that training never had."""
    low, high = (images.top * v for v in card.value_range)
    slack = 0.005 * (high - low)
    outside = ((images.array < low - slack) | (images.array > high + slack)).mean(axis=(1, 2))
    return [
        f"{100 * share:.2g} % of the pixels lie outside the prior's range, {low:.4g} to "
        f"{high:.4g} {images.unit}"
        if share > 0
        else None
        for share in outside
    ]


def _score(
    array: NDArray[np.float32],
    chosen: list[int],
    prior: NetworkPrior,
    affine: tuple[float, float],
    solver: RK45 | Heun,
    *,
    bin_width: float,
    probes: int,
    batch: int,
    seed: int,
    device: str,
) -> list[dict[str, Any]]:
    """Nats and bits a dimension of each slice."""
    import torch

    from inverse.sampling import Noise, bits_per_dim, dequantise, log_likelihood

    prior = prior.to(device)
    offset, scale = affine
    shape, size = array.shape[1:], array[0].size
    rows: list[dict[str, Any]] = []
    count = len(array)
    with progress(f"prior '{prior.card.name}', likelihood of {count} slices") as advance:
        for first in range(0, count, batch):
            part = slice(first, first + batch)
            numbers = chosen[part]
            raw = torch.from_numpy(array[part]).to(device)
            x = dequantise(raw, bin_width, Noise([(seed, z, 0) for z in numbers], shape, device))

            def step(i: int, n: int, first: int = first, here: int = len(numbers)) -> None:
                advance(first * n + i * here, count * n)

            result = log_likelihood(
                prior,
                (x - offset) / scale,
                Noise([(seed, z, 1) for z in numbers], shape, device),
                probes=probes,
                solver=solver,
                callback=step,
            )
            # the density of the prior's values, as that of physical values
            nats = result.nats - size * math.log(scale)
            bits = bits_per_dim(result.nats, size, bin_width=bin_width, scale=scale)
            error = result.standard_error
            rows += [
                {
                    "slice": z,
                    "bits_per_dim": float(bits[i]),
                    "bits_standard_error": None
                    if error is None
                    else float(error[i]) / size / math.log(2),
                    "nats": float(nats[i]),
                    "network_calls": int(result.evaluations[i]),
                }
                for i, z in enumerate(numbers)
            ]
    return rows


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(
        app,
        "likelihood",
        examples="""
        recon likelihood CT_FOLDER --slices 10:50:10
        recon likelihood samples/samples.npz --probes 4 --json
        recon likelihood CT_FOLDER --slices 30 --solver rk45 --tolerance 1e-4
        """,
    )
    def likelihood(
        path: _Input,
        prior: o.PriorName = None,
        solver: Annotated[
            Literal["heun", "rk45"],
            typer.Option(
                help="Fixed steps, or adaptive ones at a tolerance.", rich_help_panel=_LIKELIHOOD
            ),
        ] = "heun",
        steps: Annotated[
            int,
            typer.Option(
                min=1, help="Steps of heun, two network calls each.", rich_help_panel=_LIKELIHOOD
            ),
        ] = 20,
        tolerance: Annotated[
            float,
            typer.Option(
                min=1e-6, max=0.1, help="Tolerance of a step of rk45, absolute and relative.",
                rich_help_panel=_LIKELIHOOD,
            ),
        ] = 1e-3,
        probes: Annotated[
            int,
            typer.Option(
                min=1, help="Random probes of the trace; 2 or more give a standard error.",
                rich_help_panel=_LIKELIHOOD,
            ),
        ] = 1,
        bin_width: Annotated[
            float,
            typer.Option(
                "--bin", min=1e-6, help="Distance of two grey levels, HU or signal.",
                rich_help_panel=_LIKELIHOOD,
            ),
        ] = 1.0,
        pixel_mm: Annotated[
            float | None,
            typer.Option(
                "--pixel-mm", min=0.01, help="Pixel size of the images.",
                show_default="the input's", rich_help_panel=_LIKELIHOOD,
            ),
        ] = None,
        batch: o.Batch = 8,
        device: o.Device = "auto",
        seed: o.Seed = 0,
        slices: o.Slices = None,
        series: o.SeriesName = None,
        stack: o.StackName = None,
        as_json: o.Json = False,
    ) -> None:  # fmt: skip
        """Score images under a prior: bits a dimension and nats of every slice."""
        from inverse.sampling import RK45, Heun

        asked = named_prior(prior)
        images = _read(path, series, stack, slices)
        told = images.modality or ("CT" if asked is None else asked.card.modality)
        chosen_prior = choose_prior(asked, told)
        array, fitted, flags = _fit(images, chosen_prior, pixel_mm)
        card = fitted.card
        affine = images.top * fitted.offset, images.top * fitted.scale
        if images.modality is None:
            flags.append(f"the modality is unknown and taken as {card.modality}")
        per_slice = _range_flags(images, card)
        rows = _score(
            array,
            images.chosen,
            fitted,
            affine,
            Heun(steps) if solver == "heun" else RK45(tolerance, tolerance),
            bin_width=bin_width,
            probes=probes,
            batch=batch,
            seed=seed,
            device=pick_device(device),
        )
        for row, flag in zip(rows, per_slice, strict=True):
            row["status"] = flag or "ok"
        if as_json:
            print_json(
                {
                    "schema_version": 1,
                    "prior": {"name": card.name, "sha256": card.sha256},
                    "unit": images.unit,
                    "bin": bin_width,
                    "matrix": array.shape[1:],
                    "pixel_mm": fitted.pixel_mm,
                    "seed": seed,
                    "solver": solver,
                    "flags": flags,
                    "slices": rows,
                }
            )
            return
        _show(rows, flags, card.name, array.shape[1:], f"{bin_width:g} {images.unit}")


def _show(
    rows: list[dict[str, Any]], flags: list[str], name: str, shape: tuple[int, ...], bins: str
) -> None:
    def bits(row: Mapping[str, Any]) -> str:
        error = row["bits_standard_error"]
        return f"{row['bits_per_dim']:.3f}" + ("" if error is None else f" ± {error:.3f}")

    print_table(
        f"Likelihood under '{name}', {shape[0]} x {shape[1]} pixels, bins of {bins}",
        ["slice", "status", "bits/dim", "nats", "network calls"],
        [
            [
                str(row["slice"]),
                row["status"],
                bits(row),
                f"{row['nats']:.6g}",
                str(row["network_calls"]),
            ]
            for row in rows
        ],
        left=2,
    )
    for flag in flags:
        print(f"warning: {flag}")
