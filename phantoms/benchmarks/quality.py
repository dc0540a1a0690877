"""Quality and cost of every method on real slices: ``python -m phantoms.benchmarks.quality``.

CT of 23 and 60 views with Poisson noise of 1e5 photons, and Cartesian MRI of one coil at four and
eight times acceleration, simulated from real slices on other grids or rays than those that
reconstruct.  For each method: PSNR and SSIM inside the body, the residual's reduced chi-square,
network calls, seconds a slice; filtered backprojection or the zero-filled image, total variation
and L1-wavelet beside them.  Finished rows are kept in the JSON file, so that an interrupted run
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inverse.classical import fbp, l1_wavelet, tv, zero_filled
from inverse.errors import ReconError
from inverse.io.dicom import inspect, read_series
from inverse.measurement import Measurement
from inverse.metrics import body_mask, ci95, psnr, ssim
from inverse.operators.ct import ParallelBeam
from inverse.operators.units import mu_to_hu
from inverse.posterior import METHODS
from inverse.priors import NetworkPrior, load_prior
from inverse.reconstruct import reconstruct
from inverse.training.data import load_images
from phantoms.simulate import Simulation, simulate_ct, simulate_mri

RUNS: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    ("pnp_admm, 8 calls", "pnp_admm", {"steps": 8}),
    ("pnp_admm, 20 calls", "pnp_admm", {"steps": 20}),
    ("dds, 8 calls", "dds", {"steps": 8}),
    ("dds, 20 calls", "dds", {"steps": 20}),
    ("diffpir, 20 calls", "diffpir", {"steps": 20}),
    ("ddnm, 20 calls", "ddnm", {"steps": 20}),
    ("pigdm, 20 calls", "pigdm", {"steps": 20}),
    ("mmps, 20 calls", "mmps", {"steps": 20}),
    ("dps, 100 calls", "dps", {"steps": 100}),
    ("red_diff, 100 calls", "red_diff", {"steps": 100}),
    ("daps, 100 calls", "daps", {"steps": 100}),
    ("pnpdm, 160 calls", "pnpdm", {"steps": 20}),
    ("mcg, 200 calls", "mcg", {"steps": 100}),
    ("score_mri, 200 calls", "score_mri", {"steps": 100}),
    ("song, 200 calls", "song", {"steps": 100}),
    ("ald, 300 calls", "ald", {"steps": 100}),
)
"""Label, method and options.  The authors' own lengths are up to 4000 calls."""


@dataclass(frozen=True)
class Case:
    """One problem with its truth.

    Attributes:
        name: what is measured.
        measurement: the data, physical units.
        truth: display units (HU, or magnitude relative to the scale), ``(slices, h, w)``.
        mask: where metrics are taken.
        data_range: of PSNR, display units.
        display: physical images to display units.
        prior: the prior at the pixel size of the case.
        offset: physical value of prior value 0 (CT).
        scale: physical units per prior unit (CT).
    """

    name: str
    measurement: Measurement
    truth: NDArray[np.float32]
    mask: NDArray[np.bool_]
    data_range: float
    display: Callable[[Tensor], NDArray[Any]]
    prior: NetworkPrior
    offset: float = 0.0
    scale: float = 1.0

    @property
    def inner(self) -> Measurement:
        """The measurement in prior units."""
        return self.measurement.rescaled(self.offset, self.scale)


def ct_cases(
    path: Path, prior: NetworkPrior, views: tuple[int, ...], count: int, photons: float = 1e5
) -> list[Case]:
    """Sparse-view CT of evenly spaced slices of the series at ``path``, 256 x 256."""
    images: list[NDArray[np.float32]] = []
    pixel = 0.0
    stacks = inspect(path).stacks
    for stack in stacks:
        series = read_series(path, stack=stack.key)
        if pixel and abs(series.spacing[1] - pixel) > 1e-3 * pixel:
            continue  # one pixel size a case
        pixel = float(series.spacing[1])
        images += list(series.array)
        if len(images) >= count and len(stacks) > 1:
            break
    chosen = np.linspace(0, len(images) - 1, count + 2)[1:-1] if len(images) > count else None
    kept = images if chosen is None else [images[round(i)] for i in chosen]
    volume = np.stack(kept)
    factor = volume.shape[-1] / 256
    cases = []
    for number in views:
        geometry = ParallelBeam.sparse(number, (256, 256), factor * pixel)
        scan = simulate_ct(volume, pixel, geometry, photons=photons)
        truth = _hu(scan)(scan.truth)
        mu = float(scan.measurement.mu_water or 0.0)
        cases.append(
            Case(
                name=f"CT, {number} views",
                measurement=scan.measurement,
                truth=truth,
                mask=body_mask(truth, -500.0),
                data_range=2000.0,
                display=_hu(scan),
                prior=prior.at(pixel_mm=scan.measurement.pixel_mm[0]),
                offset=mu * (1 + prior.offset / 1000),
                scale=mu * prior.scale / 1000,
            )
        )
    return cases


def _hu(scan: Simulation) -> Callable[[Tensor], NDArray[Any]]:
    mu = float(scan.measurement.mu_water or 0.0)
    return lambda x: mu_to_hu(x.cpu().numpy(), mu).astype(np.float32)


def mr_cases(
    path: Path, prior: NetworkPrior, accelerations: tuple[int, ...], count: int
) -> list[Case]:
    """Single-coil Cartesian MRI of evenly spaced images of ``path`` (npz or DICOM)."""
    images = load_images(path, "MR")
    chosen = [round(i) for i in np.linspace(0, len(images) - 1, count + 2)[1:-1]]
    volume = np.stack([images.images[i] for i in chosen])
    pixel = images.pixel_mm[0]
    cases = []
    for acceleration in accelerations:
        centre = 0.08 if acceleration <= 4 else 0.04
        scan = simulate_mri(
            volume, (pixel, pixel), acceleration=acceleration, centre_fraction=centre, noise=0.005
        )
        truth = scan.truth.abs().numpy().astype(np.float32)
        cases.append(
            Case(
                name=f"MRI, {acceleration}x",
                measurement=scan.measurement,
                truth=truth,
                mask=body_mask(truth, 0.05),
                data_range=1.0,
                display=lambda x: x.abs().cpu().numpy().astype(np.float32),
                prior=prior.at(pixel_mm=pixel),
            )
        )
    return cases


def rows(case: Case, wanted: tuple[str, ...] | None, done: set[str]) -> Iterator[dict[str, Any]]:
    """Baselines and methods on a case, those in ``done`` left out."""
    ct = case.measurement.modality == "CT"
    baselines: dict[str, Callable[[Measurement], Tensor]] = (
        {"fbp": fbp} if ct else {"zero-filled": zero_filled, "l1-wavelet": l1_wavelet}
    )
    baselines["tv"] = lambda m: tv(m).x
    for name, run in baselines.items():
        if name not in done:
            started = time.monotonic()
            x = run(case.measurement)
            yield _row(case, name, x, 0, time.monotonic() - started, "ok")
    for label, method, options in RUNS:
        if label in done or (wanted is not None and method not in wanted):
            continue
        started = time.monotonic()
        try:
            result = reconstruct(case.measurement, case.prior, method=method, options=options)
        except ReconError as error:
            nothing = torch.zeros_like(case.measurement.operator.adjoint(case.measurement.data))
            yield {**_row(case, label, nothing, 0, time.monotonic() - started, str(error)),
                   "psnr": None, "ssim": None}  # fmt: skip
            continue
        seconds = time.monotonic() - started
        yield _row(case, label, result.mean, result.nfe, seconds, result.status)


def _row(
    case: Case, name: str, x: Tensor, calls: int, seconds: float, status: str
) -> dict[str, Any]:
    image = case.display(x)
    value, similarity = (
        f(image, case.truth, data_range=case.data_range, mask=case.mask) for f in (psnr, ssim)
    )
    spread = ci95(value) if len(value) > 1 else (float(value[0]), float(value[0]))
    return {
        "case": case.name,
        "method": name,
        "psnr": float(np.mean(value)),
        "ci95": [float(c) for c in np.atleast_1d(spread)],
        "ssim": float(np.mean(similarity)),
        "chi2": float(case.measurement.chi2(x.to(case.measurement.operator.dtype)).mean()),
        "calls": calls,
        "seconds": seconds / len(case.truth),
        "status": status,
    }


def markdown(table: list[dict[str, Any]]) -> str:
    """One Markdown table a case."""
    lines: list[str] = []
    for case in dict.fromkeys(row["case"] for row in table):
        lines += [f"\n### {case}\n", "| method | PSNR dB | SSIM | χ² | calls | s a slice | |",
                  "|---|---|---|---|---|---|---|"]  # fmt: skip
        for row in (r for r in table if r["case"] == case):
            if row["psnr"] is None:
                lines.append(f"| {row['method']} | – | – | – | – | – | {row['status']} |")
                continue
            note = "" if row["status"] == "ok" else row["status"].split(":")[0]
            lines.append(
                f"| {row['method']} | {row['psnr']:.2f} | {row['ssim']:.3f} | {row['chi2']:.2f} | "
                f"{row['calls']} | {row['seconds']:.1f} | {note} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing, print the tables; keep JSON in ``--out`` and Markdown beside it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ct", type=Path, help="CT series (DICOM folder or zip)")
    parser.add_argument("--mr", type=Path, help="MR images (DICOM, or npz with a csv)")
    parser.add_argument("--ct-prior", default="ct-small")
    parser.add_argument("--mr-prior", default="brain-small")
    parser.add_argument("--slices", type=int, default=4)
    parser.add_argument("--methods", nargs="+", help="only these methods")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON file, continued if it exists"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases: list[Case] = []
    if arguments.ct:
        cases += ct_cases(arguments.ct, load_prior(arguments.ct_prior), (23, 60), arguments.slices)
    if arguments.mr:
        cases += mr_cases(arguments.mr, load_prior(arguments.mr_prior), (4, 8), arguments.slices)
    table = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    wanted = tuple(arguments.methods) if arguments.methods else None
    for method in wanted or ():
        if method not in METHODS:
            parser.error(f"no method '{method}'; there are {', '.join(METHODS)}")
    for case in cases:
        done = {row["method"] for row in table if row["case"] == case.name}
        for row in rows(case, wanted, done):
            table.append(row)
            arguments.out.write_text(json.dumps(table, indent=1) + "\n")
            value = "failed" if row["psnr"] is None else f"{row['psnr']:.2f} dB"
            print(f"{row['case']:14} {row['method']:22} {value:>9} {row['calls']:5} calls "
                  f"{row['seconds']:.1f} s a slice  {row['status'][:60]}", flush=True)  # fmt: skip
    page = arguments.out.with_suffix(".md")
    page.write_text(markdown(table))
    print(f"{page}")


if __name__ == "__main__":
    main()
