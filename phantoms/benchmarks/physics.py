"""What a physicist asks of a CT scanner: CT numbers, sharpness, noise, low contrast.

The phantom is the ACR's for CT accreditation (:func:`phantoms.published.acr_ct`).  Neither
iterative nor learned reconstructions are linear, so that sharpness is stated for a contrast, and
noise and detectability for a dose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from inverse.operators.ct import ParallelBeam
from inverse.priors import NetworkPrior
from inverse.trust import hotelling
from phantoms.analysis import disc_mtf, hu_accuracy, nps
from phantoms.benchmarks.harness import Row, table
from phantoms.benchmarks.problems import Case, Float32, hu_case, solve
from phantoms.published import ACR_INSERTS, acr_ct
from phantoms.scene import Scene, Section
from phantoms.shapes import Ellipses
from phantoms.simulate import simulate_ct_analytic

__all__ = ["Scanner", "draw", "measure", "physics_table"]

PIXEL_MM, MATRIX = 2.0, 128
ROD_MM, ROD_HU = 10.0, 20.0
"""Diameter and contrast of the rod that is to be seen."""
REGION = 32
"""Side in pixels of the region of the noise, about the phantom's axis."""
EDGES = ("bone", "acrylic")
"""Inserts whose edges tell the sharpness, at high and at low contrast."""


@dataclass(frozen=True)
class Scanner:
    """A scan of the ACR phantom.

    Attributes:
        views: views over a half turn.
        photons: photons a detector bin in air.
        repeats: scans of the uniform module, and as many with the rod; the observer is trained
            on half of them.
        inserts: scans of the module with inserts.
        prior: a CT prior.
    """

    views: int
    photons: float
    repeats: int
    inserts: int
    prior: NetworkPrior

    def scan(self, section: Section, count: int, seed: int) -> Case:
        """``count`` scans of a section, which differ in their noise."""
        beam = ParallelBeam.sparse(self.views, (MATRIX, MATRIX), PIXEL_MM)
        scan = simulate_ct_analytic(
            [section] * count,
            PIXEL_MM,
            beam,
            matrix=MATRIX,
            photons=self.photons,
            seed=seed,
        )
        return hu_case("ACR phantom", scan, self.prior)


def measure(scanner: Scanner, label: str) -> Row:
    """Everything of one method; see :data:`physics_table`."""
    images, rows = [], []
    rod = Ellipses.of([ROD_HU, 0, 0, ROD_MM / 2, ROD_MM / 2, 0])
    scenes = (
        (acr_ct(1), scanner.inserts),
        (acr_ct(3), scanner.repeats),
        (acr_ct(3) + Scene((rod,)), scanner.repeats),
    )
    for seed, (scene, count) in enumerate(scenes):
        case = scanner.scan(scene, count, seed)
        row, x = solve(case, label)
        if x is None:
            return {**row, "kind": "physics"}
        images.append(case.display(x))
        rows.append(row)
    inserts, absent, present = images
    return {
        "kind": "physics",
        "method": label,
        "views": scanner.views,
        "calls": rows[0]["calls"],
        "seconds": round(float(np.mean([row["seconds"] for row in rows])), 2),
        "status": rows[0]["status"],
        **_numbers(inserts),
        **_noise(absent),
        **_rod(absent, present),
    }


def _numbers(images: Float32) -> Row:
    """Error of every insert in HU, and the transfer function at two contrasts."""
    read = hu_accuracy(images.mean(axis=0), PIXEL_MM)
    transfer = {}
    for name in EDGES:
        insert = ACR_INSERTS[name]
        found = disc_mtf(images, PIXEL_MM, (insert.x, insert.y), insert.radius)
        transfer[name] = {
            "frequency": [round(float(f), 4) for f in found.frequency],
            "mtf": [round(float(m), 4) for m in found.mtf],
            "half": round(min(found.at(0.5), float(found.frequency[-1])), 4),
        }
    errors = {name: round(reading.error, 2) for name, reading in read.items()}
    passed = {name: reading.passes for name, reading in read.items()}
    return {"inserts": errors, "passes": passed, "transfer": transfer}


def _noise(absent: Float32) -> Row:
    """Noise power of the uniform module about its axis."""
    low = (MATRIX - REGION) // 2
    found = nps(absent[:, low : low + REGION, low : low + REGION], PIXEL_MM)
    return {
        "noise": {
            "std": round(found.variance**0.5, 3),
            "mean_frequency": round(found.mean_frequency, 4),
            "frequency": [round(float(f), 4) for f in found.frequency],
            "power": [round(float(p), 3) for p in found.radial],
        }
    }


def _rod(absent: Float32, present: Float32) -> Row:
    """Contrast of the rod, and whether an observer who knows its place and size sees it."""
    y = (np.arange(MATRIX) - (MATRIX - 1) / 2) * PIXEL_MM
    distance = np.hypot(y[:, None], y)
    inside = distance < ROD_MM / 2
    around = (distance < 2 * ROD_MM) & (distance > 0.7 * ROD_MM)
    channel = torch.from_numpy(inside / inside.sum() - around / around.sum())[None]
    without, with_rod = (torch.from_numpy(x) for x in (absent, present))
    seen = hotelling(with_rod, without, channel)
    recovered = float(((with_rod.mean(dim=0) - without.mean(dim=0)) * channel[0]).sum())
    return {
        "rod": {
            "recovered": round(recovered / ROD_HU, 3),
            "auc": [round(v, 3) for v in (seen.auc, seen.low, seen.high)],
        }
    }


def physics_table(rows: Sequence[Row]) -> str:
    """CT numbers; then sharpness, noise and low contrast; rows of :func:`measure`."""
    rows = [row for row in rows if "inserts" in row]
    if not rows:
        return ""
    numbers = [[row["method"], *(_error(row, name) for name in ACR_INSERTS)] for row in rows]
    image = [
        [
            row["method"],
            *(f"{row['transfer'][name]['half']:.3f}" for name in EDGES),
            f"{row['noise']['std']:.1f}",
            f"{row['noise']['mean_frequency']:.3f}",
            f"{row['rod']['recovered']:.2f}",
            "{:.2f} [{:.2f}, {:.2f}]".format(*row["rod"]["auc"]),
        ]
        for row in rows
    ]
    head = (
        "method",
        *(f"MTF 50 % {name}, 1/mm" for name in EDGES),
        "noise, HU",
        "its mean frequency, 1/mm",
        f"rod {ROD_MM:g} mm, {ROD_HU:g} HU: share of contrast",
        "AUC [95 %]",
    )
    return (
        f"**ACR phantom, {rows[0]['views']} views: error of the CT number in HU** (in bold where "
        f"the accreditation would refuse it)\n\n{table(('method', *ACR_INSERTS), numbers)}\n"
        f"**ACR phantom: sharpness, noise, low contrast**\n\n{table(head, image)}"
    )


def _error(row: Row, name: str) -> str:
    text = f"{row['inserts'][name]:+.1f}"
    return text if row["passes"][name] else f"**{text}**"


def draw(rows: Sequence[Row], axes: Sequence[Any]) -> None:
    """Transfer function at low contrast, and noise power, on two axes of matplotlib."""
    for row in (row for row in rows if "inserts" in row):
        found = row["transfer"][EDGES[1]]
        axes[0].plot(found["frequency"], found["mtf"], label=row["method"])
        axes[1].plot(row["noise"]["frequency"], row["noise"]["power"], label=row["method"])
    axes[0].set(
        title=f"MTF, edge of {EDGES[1]}", xlabel="1/mm", ylim=(0, 1.3), xlim=(0, 0.5 / PIXEL_MM)
    )
    axes[1].set(title="noise power, HU² mm²", xlabel="1/mm", yscale="log")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
