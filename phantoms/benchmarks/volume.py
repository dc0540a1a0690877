"""Volumes from priors of slices: ``python -m phantoms.benchmarks.volume --out FILE.json``.

Sparse-view CT of a phantom chest (exact line integrals) and, with ``--ct``, of a real series, by
each method without coupling of slices and with each.  For each: PSNR of axial, coronal and
sagittal sections inside the body; the energy of the z-gradient over that of the truth, which is 1
where slices neither flicker nor blur into each other; the error of the z-gradient over the same;
network calls and seconds a slice.  JSON to ``--out``, Markdown and pictures beside it.

Priors of other planes (``--coronal``, ``--sagittal``) need cubic voxels: ``--cubic`` makes those
of the phantom cubes.  ``recon train --phantoms 300 --orientation PLANE`` trains such priors.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inverse.classical import fbp
from inverse.io.series import read_series
from inverse.metrics import body_mask, psnr
from inverse.operators.ct import ParallelBeam
from inverse.operators.units import mu_to_hu
from inverse.posterior.volume import Coupling, CouplingKind
from inverse.priors import NetworkPrior, load_prior
from inverse.reconstruct import reconstruct
from phantoms.anatomy import thorax
from phantoms.simulate import Simulation, simulate_ct, simulate_ct_analytic

Volume = NDArray[np.float32]

SIDE = 256
FIELD_MM = 360.0
SPACING_MM = 2.0
ANATOMY_SEED = 55
DATA_RANGE = 2000.0
COUPLINGS: tuple[CouplingKind, ...] = ("none", "noise", "tv")
PLANES = ("axial", "coronal", "sagittal")
_LEAST = 200  # pixels of body that a section must show


@dataclass(frozen=True)
class Case:
    """A scan of a volume with its truth.

    Attributes:
        name: what is scanned.
        scan: measurement and truth.
        z_mm: position of each slice.
        pixel_mm: pixel size of the reconstruction.
    """

    name: str
    scan: Simulation
    z_mm: Sequence[float]
    pixel_mm: float

    def hu(self, x: Tensor) -> Volume:
        """Attenuation to HU."""
        mu = float(self.scan.measurement.mu_water or 0.0)
        return mu_to_hu(x.cpu(), mu).numpy().astype(np.float32)


def phantom(
    slices: int,
    views: int,
    photons: float = 1e5,
    *,
    side: int = SIDE,
    spacing: float | None = SPACING_MM,
) -> Case:
    """A chest of ellipsoids, its line integrals exact.

    Args:
        slices: number of slabs about the middle.
        views: projections.
        photons: counts of a bin in air.
        side: rows and columns.
        spacing: distance and thickness of the slabs, mm; None for cubic voxels.
    """
    body, pixel = thorax(ANATOMY_SEED), FIELD_MM / side
    step = pixel if spacing is None else spacing
    heights = [(k - (slices - 1) / 2) * step for k in range(slices)]
    slabs = [body.slab(z, step, 2) for z in heights]
    geometry = ParallelBeam.sparse(views, (side, side), pixel)
    scan = simulate_ct_analytic(slabs, pixel, geometry, matrix=side, photons=photons)
    return Case(f"phantom chest, {views} views", scan, heights, pixel)


def real(path: Path, slices: int, views: int, photons: float = 1e5, *, side: int = SIDE) -> Case:
    """The middle slices of a series."""
    series = read_series(path)
    first = max(0, (len(series.array) - slices) // 2)
    volume = series.array[first : first + slices]
    pixel = float(series.spacing[1]) * volume.shape[-1] / side
    geometry = ParallelBeam.sparse(views, (side, side), pixel)
    scan = simulate_ct(volume, series.spacing[1:], geometry, matrix=side, photons=photons)
    heights = [k * float(series.spacing[0]) for k in range(len(volume))]
    return Case(f"patient's chest, {views} views", scan, heights, pixel)


def judge(image: Volume, truth: Volume, mask: NDArray[np.bool_]) -> dict[str, float]:
    """PSNR of the sections of each plane, and how the z-gradient compares."""
    found = {}
    for axis, plane in enumerate(PLANES):
        a, b, m = (np.moveaxis(v, axis, 0) for v in (image, truth, mask))
        shown = m.sum(axis=(1, 2)) >= min(_LEAST, mask[0].sum())
        values = psnr(a[shown], b[shown], data_range=DATA_RANGE, mask=m[shown])
        found[f"psnr_{plane}"] = float(values.mean())
    both = mask[1:] & mask[:-1]
    step, wanted = (np.diff(v.astype(np.float64), axis=0)[both] for v in (image, truth))
    energy = float(np.square(wanted).sum())
    found["z_energy"] = float(np.square(step).sum()) / energy
    found["z_error"] = float(np.square(step - wanted).sum()) / energy
    return found


def rows(
    case: Case,
    prior: NetworkPrior,
    methods: Sequence[str],
    couplings: Sequence[Coupling],
    steps: int | None,
    images: dict[str, Volume],
) -> Iterator[dict[str, Any]]:
    """One row a method and coupling, filtered backprojection first; fills ``images`` by name."""
    truth = case.hu(case.scan.truth)
    mask = body_mask(truth, -500.0)
    images["truth"], images["FBP"] = truth, case.hu(fbp(case.scan.measurement))
    yield {
        "case": case.name, "method": "FBP", "coupling": "", "calls": 0, "seconds": 0.0,
        **judge(images["FBP"], truth, mask),
    }  # fmt: skip
    for method in methods:
        for coupling in couplings:
            started = time.monotonic()
            result = reconstruct(
                case.scan.measurement,
                prior,
                method=method,
                steps=steps,
                coupling=coupling,
                z_mm=case.z_mm,
            )
            seconds = (time.monotonic() - started) / len(truth)
            images[f"{method}, {coupling.kind}"] = case.hu(result.mean)
            yield {
                "case": case.name,
                "method": method,
                "coupling": coupling.kind,
                "calls": result.nfe,
                "seconds": seconds,
                **judge(case.hu(result.mean), truth, mask),
            }


def markdown(table: Sequence[dict[str, Any]]) -> str:
    """One Markdown table a case."""
    lines: list[str] = []
    for name in dict.fromkeys(row["case"] for row in table):
        lines += [
            f"\n### {name}\n",
            "| method | coupling | axial dB | coronal dB | sagittal dB | z energy | z error "
            "| network calls | s a slice |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in (r for r in table if r["case"] == name):
            values = [f"{row[f'psnr_{plane}']:.2f}" for plane in PLANES]
            values += [f"{row['z_energy']:.3f}", f"{row['z_error']:.3f}"]
            cells = [row["method"], row["coupling"], *values, str(row["calls"])]
            lines.append(f"| {' | '.join(cells)} | {row['seconds']:.1f} |")
    return "\n".join(lines) + "\n"


def draw(case: Case, images: dict[str, Volume], path: Path) -> None:
    """Coronal and sagittal sections of the inner half, side by side; short ones stretched."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    side = images["truth"].shape[-1]
    inner = slice(side // 4, 3 * side // 4)
    height = 0.035 * max(len(case.z_mm), 16)
    figure, axes = plt.subplots(
        len(images), 2, figsize=(7.0, (height + 0.22) * len(images)), layout="constrained"
    )
    for line, (name, image) in zip(axes, images.items(), strict=True):
        sections = {
            "coronal": image[:, side // 2, inner],
            "sagittal": image[:, inner, int(0.62 * side)],
        }
        for axis, (plane, section) in zip(line, sections.items(), strict=True):
            axis.imshow(
                section, cmap="gray", vmin=-250, vmax=350, aspect="auto", origin="lower",
                interpolation="nearest",
            )  # fmt: skip
            axis.set_title(f"{name}: {plane}", fontsize=6, pad=2)
            axis.axis("off")
    figure.savefig(path, dpi=200)
    plt.close(figure)


def main() -> None:
    """Run all cases; JSON in ``--out``, Markdown and PNG beside it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ct", type=Path, help="CT series (DICOM folder or zip)")
    parser.add_argument("--prior", default="ct-small")
    parser.add_argument("--coronal", help="prior of coronal images, adds coupling 'planes'")
    parser.add_argument("--sagittal", help="prior of sagittal images, likewise")
    parser.add_argument("--cubic", action="store_true", help="phantom of cubic voxels")
    parser.add_argument("--side", type=int, default=SIDE, help="rows and columns")
    parser.add_argument("--views", type=int, default=23)
    parser.add_argument("--slices", type=int, default=40)
    parser.add_argument("--methods", nargs="+", default=["pnp_admm", "dds"])
    parser.add_argument("--quick", action="store_true", help="10 slices, 8 network calls")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    slices, steps = (10, 8) if arguments.quick else (arguments.slices, None)
    spacing = None if arguments.cubic else SPACING_MM
    cases = [phantom(slices, arguments.views, side=arguments.side, spacing=spacing)]
    if arguments.ct:
        cases.append(real(arguments.ct, slices, arguments.views, side=arguments.side))
    couplings = [Coupling(kind) for kind in COUPLINGS]
    named = {"coronal": arguments.coronal, "sagittal": arguments.sagittal}
    planes = {plane: load_prior(name) for plane, name in named.items() if name}
    if planes:
        couplings.append(Coupling("planes", planes=planes))
    prior, table = load_prior(arguments.prior), []
    for number, case in enumerate(cases):
        images: dict[str, Volume] = {}
        for row in rows(case, prior, arguments.methods, couplings, steps, images):
            table.append(row)
            setting = {
                "slices": slices,
                "side": arguments.side,
                "voxels": "cubic" if arguments.cubic else f"{SPACING_MM:g} mm slices",
                "steps": steps,
                "prior": arguments.prior,
                **{f"{plane} prior": name for plane, name in named.items() if name},
            }
            content = {"setting": setting, "rows": table}
            arguments.out.write_text(json.dumps(content, indent=1) + "\n")
            print(
                f"{row['case']:30} {row['method']:9} {row['coupling']:6} "
                + " ".join(f"{plane} {row[f'psnr_{plane}']:.2f}" for plane in PLANES)
                + f"  z energy {row['z_energy']:.3f} error {row['z_error']:.3f}  "
                f"{row['seconds']:.1f} s a slice",
                flush=True,
            )
        draw(case, images, arguments.out.with_name(f"{arguments.out.stem}-{number}.png"))
    arguments.out.with_suffix(".md").write_text(markdown(table))


if __name__ == "__main__":
    main()
