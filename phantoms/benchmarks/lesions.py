"""Lesions planted before measurement: ``python -m phantoms.benchmarks.lesions --quick``.

Slices of phantoms that no prior was trained on, and of real patients with ``--ct``, are measured
twice, as they are and with lesions put in and structures taken out (:mod:`phantoms.lesions`), with
the same seed of the noise.  Of each reconstruction (filtered backprojection, total variation, the
prior) it is asked

* how much of each lesion's contrast arrives, put in or taken out: 1 is all of it;
* whether an observer that sees a few channels can tell the two, with the confidence interval.

Finished reconstructions are kept in the JSON file, so that an interrupted run goes on where it
stopped; those of another prior are computed anew, the classical ones are not.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inverse import __version__
from inverse.classical import fbp, tv
from inverse.errors import InputError
from inverse.measurement import Measurement
from inverse.operators.ct import ParallelBeam
from inverse.operators.units import mu_to_hu
from inverse.priors import NetworkPrior, load_prior
from inverse.reconstruct import reconstruct
from inverse.training.data import load_images
from inverse.trust import Detection, contrast_recovery, hotelling, laguerre_gauss, sfrc
from phantoms.anatomy import AIR_HU, thorax
from phantoms.lesions import CONTRASTS, DIAMETERS, Edit, plant
from phantoms.simulate import simulate_ct

HALF_MM = 20.0
"""Half side of the window about a lesion that is looked at."""
BLUR_MM = 4.0
"""Beyond the lesion's edge up to which its truth on the coarse grid reaches."""
PATCH_HU = 20.0
"""Standard deviation from which a patch has structure that can be false."""
CHANNELS = 5
"""Laguerre-Gauss channels that are kept; the observer uses as many as the images allow."""
IMAGES_PER_CHANNEL = 15
PHANTOM_SEEDS = range(50_000, 60_000)
"""Far from the seeds of training."""
COLOURS = {"fbp": "#7f7f7f", "tv": "#0072B2", "prior": "#D55E00"}


@dataclass(frozen=True)
class Plan:
    """How much is done.

    Attributes:
        views: of the parallel-beam scans.
        phantoms: phantom slices, one a chest.
        real: real slices, evenly over the patients.
        steps: network calls of the prior.
        matrix: rows and columns of the reconstruction.
    """

    views: tuple[int, ...]
    phantoms: int
    real: int
    steps: int
    matrix: int = 256


QUICK = Plan(views=(23, 60), phantoms=3, real=3, steps=8)
FULL = Plan(views=(23, 60, 180), phantoms=24, real=48, steps=20)


@dataclass(frozen=True)
class Slice:
    """A slice to edit.

    Attributes:
        name: where it is from, without what may tell a patient.
        hu: ``(n, n)``.
        pixel_mm: mm.
    """

    name: str
    hu: NDArray[np.float32]
    pixel_mm: float


def phantom_slices(count: int) -> Iterator[Slice]:
    """Sections of random chests, their own nodules included."""
    for seed in PHANTOM_SEEDS[:count]:
        height = float(np.random.default_rng(seed).uniform(-50, 50))
        hu = thorax(seed).slice(height).image((512, 512), 0.8, 2) + AIR_HU
        yield Slice(f"phantom {seed}", np.maximum(hu, AIR_HU).astype(np.float32), 0.8)


def real_slices(path: Path, count: int, select: Mapping[str, Sequence[str]]) -> Iterator[Slice]:
    """Slices of the patients at ``path`` in turn, evenly spread over each patient's."""
    images = load_images(path, "CT", select=select)
    places: dict[str, list[int]] = {}
    for i, patient in enumerate(images.patient):
        places.setdefault(patient, []).append(i)
    names = sorted(places)
    each = math.ceil(count / len(names))
    order: list[tuple[int, int]] = []
    for name in names:
        n = len(places[name])
        spread = np.linspace(0, n - 1, min(each, n) + 2)[1:-1] if n > 2 else np.arange(n)
        order += [(k, places[name][round(float(j))]) for k, j in enumerate(spread[:each])]
    for _, i in sorted(order, key=lambda pair: pair[0])[:count]:
        hu = images.images[i]
        if hu.shape[0] == hu.shape[1]:
            yield Slice(f"real {i}", hu, float(images.pixel_mm[i]))


Solve = Callable[[Measurement], Tensor]


def solvers(prior: NetworkPrior, steps: int) -> dict[str, Solve]:
    """What is compared: name and reconstruction."""
    return {
        "fbp": fbp,
        "tv": lambda m: tv(m).x,
        "prior": lambda m: reconstruct(m, prior, steps=steps, batch=2).mean,
    }


def run(
    one: Slice, number: int, views: int, plan: Plan, solves: Mapping[str, Solve]
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Rows of one slice and scan for each method, one an edit; see :func:`_row`."""
    planted = plant(one.hu, one.pixel_mm, np.random.default_rng([number, 7]), number=number)
    pixel = one.pixel_mm * len(one.hu) / plan.matrix
    scan = simulate_ct(
        np.stack([planted.first, planted.second]),
        one.pixel_mm,
        ParallelBeam.sparse(views, (plan.matrix, plan.matrix), pixel),
        matrix=plan.matrix,
        seed=number,
        positions=[number, number],  # the same noise in both
    )
    water = float(scan.measurement.mu_water or 0.0)
    truth, ratio = mu_to_hu(scan.truth, water).double(), plan.matrix / len(one.hu)
    for name, solve in solves.items():
        found = mu_to_hu(solve(scan.measurement), water).double().cpu()
        rate = sfrc(found[0], truth[0], least=PATCH_HU).rate
        yield (
            name,
            [{**_row(edit, truth, found, ratio, pixel), "sfrc": rate} for edit in planted.edits],
        )


def _row(edit: Edit, truth: Tensor, found: Tensor, ratio: float, pixel: float) -> dict[str, Any]:
    """One edit in one reconstruction.

    ``share`` is the recovered share of its contrast; ``false`` the contrast that is seen at its
    place in the object without it, as a share, less what is there in truth; ``with`` and
    ``without`` are the channels' outputs.
    """
    # pixel j of the fine grid is centred at (j + 1/2) ratio - 1/2 of the coarse one
    row, column = ((v + 0.5) * ratio - 0.5 for v in (edit.row, edit.column))
    half = math.ceil(HALF_MM / pixel)
    r, c = (min(max(round(v), half), truth.shape[-1] - 1 - half) for v in (row, column))
    window = (slice(r - half, r + half + 1), slice(c - half, c + half + 1))
    t, f = truth[:, window[0], window[1]], found[:, window[0], window[1]]
    sign = 1 if edit.direction == "insertion" else -1
    centre = (row - r + half, column - c + half)
    s = _near(sign * (t[1] - t[0]), *centre, (edit.diameter / 2 + BLUR_MM) / pixel)
    present, absent = (1, 0) if sign > 0 else (0, 1)
    power = float(s.square().sum())
    channels = laguerre_gauss(
        (t.shape[1], t.shape[2]),
        max(edit.diameter / pixel, 2.0),
        CHANNELS,
        centre,
    )
    outputs = torch.einsum("chw,nhw->nc", channels, f)
    return {
        **asdict(edit),
        "share": float((s * (f[present] - f[absent])).sum()) / power,
        "false": float((s * (f[absent] - t[absent])).sum()) / power,
        "with": outputs[present].tolist(),
        "without": outputs[absent].tolist(),
    }


def _near(difference: Tensor, row: float, column: float, reach: float) -> Tensor:
    """The difference within ``reach`` pixels of a place, so that no other edit counts."""
    y = torch.arange(difference.shape[0], dtype=torch.float64) - row
    x = torch.arange(difference.shape[1], dtype=torch.float64) - column
    return torch.where(torch.hypot(y[:, None], x[None, :]) <= reach, difference, 0.0)


def _size(row: Mapping[str, Any]) -> float:
    """Diameter class of a row: that of planted balls, or the nearer one."""
    return min(DIAMETERS, key=lambda d: abs(d - float(row["diameter"])))


@dataclass(frozen=True)
class Point:
    """One point of a curve.

    Attributes:
        views: of the scan.
        method: which reconstruction.
        direction: insertion or removal.
        tissue: around the lesion.
        diameter: class, mm.
        contrast: of planted balls, HU; of removed structures their mean.
        share: recovered contrast, mean over lesions.
        error: its standard error.
        false: contrast seen at the place in the object without it, root mean square share.
        count: lesions.
    """

    views: int
    method: str
    direction: str
    tissue: str
    diameter: float
    contrast: float
    share: float
    error: float
    false: float
    count: int


def points(rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Curves of contrast recovery: means over the lesions of each kind."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        inserted = row["direction"] == "insertion"
        key = (row["views"], row["method"], row["direction"], row["tissue"], _size(row))
        groups.setdefault((*key, row["contrast"] if inserted else None), []).append(row)
    found = []
    for (views, method, direction, tissue, diameter, _), members in groups.items():
        shares = torch.tensor([m["share"] for m in members], dtype=torch.float64)
        if len(shares) < 2:
            continue
        # a lesion of one unit turns shares into the pairs that the estimate is of
        one = torch.ones(1, dtype=torch.float64)
        value, error = contrast_recovery(shares[:, None], torch.zeros_like(shares)[:, None], one)
        false = math.sqrt(float(np.mean([m["false"] ** 2 for m in members])))
        contrast = float(np.mean([m["contrast"] for m in members]))
        found.append(
            Point(views, method, direction, tissue, diameter, contrast, value, error, false,
                  len(members))
        )  # fmt: skip
    return sorted(found, key=lambda p: (p.views, p.tissue, p.direction, p.diameter, p.contrast))


@dataclass(frozen=True)
class Seen:
    """Detection of lesions of one kind.

    Attributes:
        views: of the scan.
        method: which reconstruction.
        tissue: around the lesion.
        diameter: mm.
        contrast: HU, or ``None`` for all contrasts together.
        detection: of the test images; ``None`` where there were too few.
        count: lesions.
    """

    views: int
    method: str
    tissue: str
    diameter: float
    contrast: float | None
    detection: Detection | None
    count: int


def seen(rows: Sequence[Mapping[str, Any]]) -> list[Seen]:
    """Channelised Hotelling observer on inserted lesions; slices of training and test differ."""
    inserted = [r for r in rows if r["direction"] == "insertion"]
    found = []
    for views in sorted({r["views"] for r in inserted}):
        for method in COLOURS:
            for tissue, contrasts in CONTRASTS.items():
                for diameter in DIAMETERS:
                    kind = [
                        r for r in inserted
                        if (r["views"], r["method"], r["tissue"], r["diameter"])
                        == (views, method, tissue, diameter)
                    ]  # fmt: skip
                    for contrast in (None, *contrasts):
                        part = [r for r in kind if contrast in (None, r["contrast"])]
                        if part:
                            detection = _observe(part)
                            found.append(
                                Seen(views, method, tissue, diameter, contrast, detection,
                                     len(part))
                            )  # fmt: skip
    return found


def _observe(rows: Sequence[Mapping[str, Any]]) -> Detection | None:
    """Train on every second slice, test on the others, with as many channels as these bear."""
    order = sorted(rows, key=lambda r: (r["slice"] % 2, r["slice"]))
    train = sum(1 for r in order if r["slice"] % 2 == 0)
    channels = min(CHANNELS, 2 * train // IMAGES_PER_CHANNEL)
    if channels < 1 or len(order) - train < 2:
        return None
    present, absent = (
        torch.tensor([r[key][:channels] for r in order], dtype=torch.float64)[:, None]
        for key in ("with", "without")
    )
    eye = torch.eye(channels, dtype=torch.float64)[:, None]
    return hotelling(present, absent, eye, train=train)


def markdown(state: Mapping[str, Any], picture: str) -> str:
    """The page: how it was measured, tables and the figure."""
    rows, about = state["rows"], state["about"]
    lines = [
        "# Planted lesions",
        "",
        "Written by `python -m phantoms.benchmarks.lesions`; what it means is in "
        "[when not to believe it](when-not-to-believe-it.md).",
        "",
        f"recon-sde {about['version']}, prior `{about['prior']}` "
        f"(sha256 {about['sha256'][:12]}), {about['steps']} network calls; "
        f"{about['phantoms']} phantom and {about['real']} real slices"
        + (f" ({about['source']})" if about["real"] else "")
        + f", {len({(r['slice'], r['row'], r['column']) for r in rows})} lesions; parallel beam, "
        "1e5 photons. Each slice carries several lesions at least 28 mm apart, and is "
        "measured with and without them before anything is reconstructed.",
        "",
        f"![Recovered contrast of planted lesions, and how well they are seen]({picture})",
        "",
    ]
    return "\n".join(lines) + "\n" + tables(rows)


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Recovered contrast and detection in Markdown."""
    made = points(rows)
    lines = [
        "## Recovered contrast",
        "",
        "Share of the lesion's contrast that arrives, mean ± standard error: 1 is all, 0 none. In "
        "brackets the lesion-shaped error of the image without it, root mean square, as a share: "
        "what is recovered below it cannot be told from chance in one image.",
        "",
    ]
    methods = [m for m in COLOURS if any(r["method"] == m for r in rows)]
    for direction, words in (
        ("insertion", "put in"), ("removal", "taken out: a vessel's section or nodule")
    ):  # fmt: skip
        lines += [
            f"| views | {direction}: {words} | mm | HU | n | " + " | ".join(methods) + " |",
            "|--:|---|--:|--:|--:|" + "--:|" * len(methods),
        ]
        kinds = {
            (p.views, p.tissue, p.diameter, round(p.contrast)): p.count
            for p in made if p.direction == direction
        }  # fmt: skip
        for (views, tissue, diameter, contrast), count in kinds.items():
            cells = []
            for method in methods:
                point = next(
                    (p for p in made if p.direction == direction and p.method == method
                     and (p.views, p.tissue, p.diameter, round(p.contrast))
                     == (views, tissue, diameter, contrast)), None,
                )  # fmt: skip
                cells.append(
                    "–" if point is None
                    else f"{point.share:.2f} ± {point.error:.2f} ({point.false:.2f})"
                )  # fmt: skip
            size = f"{diameter:g}" if direction == "insertion" else f"about {diameter:g}"
            lines.append(
                f"| {views} | {tissue} | {size} | {contrast} | {count} | "
                + " | ".join(cells) + " |"
            )  # fmt: skip
        lines.append("")
    lines += [
        "## Detection",
        "",
        "Area under the ROC curve of a channelised Hotelling observer, trained on some slices and "
        "tested on others, with its 95 % interval; 0.5 is guessing. All contrasts of a size "
        "together, and each where there are images enough.",
        "",
        "| views | tissue | mm | HU | n | " + " | ".join(methods) + " |",
        "|--:|---|--:|--:|--:|" + "--:|" * len(methods),
    ]
    table: dict[tuple[Any, ...], dict[str, Seen]] = {}
    for s in seen(rows):
        if s.detection is not None:
            table.setdefault((s.views, s.tissue, s.diameter, s.contrast), {})[s.method] = s
    for (views, tissue, diameter, contrast), found in table.items():
        cells = [_area(found.get(m)) for m in methods]
        count = max(s.count for s in found.values())
        shown = "all" if contrast is None else f"{contrast:g}"
        lines.append(
            f"| {views} | {tissue} | {diameter:g} | {shown} | {count} | "
            + " | ".join(cells)
            + " |"
        )
    lines += [
        "",
        "## False structure",
        "",
        "Share of patches of 32 pixels whose structure, down to a quarter of Nyquist's frequency, "
        "is not the truth's (scanning Fourier ring correlation), mean over slices.",
        "",
        "| views | " + " | ".join(methods) + " |",
        "|--:|" + "--:|" * len(methods),
    ]
    for views in sorted({r["views"] for r in rows}):
        # all rows of a slice carry its rate
        rates = [
            {r["slice"]: r["sfrc"] for r in rows
             if (r["views"], r["method"]) == (views, m) and "sfrc" in r}
            for m in methods
        ]  # fmt: skip
        cells = [f"{100 * np.mean(list(r.values())):.0f} %" if r else "–" for r in rates]
        lines.append(f"| {views} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _area(found: Seen | None) -> str:
    if found is None or found.detection is None:
        return "–"
    d = found.detection
    return f"{d.auc:.2f} [{d.low:.2f}, {d.high:.2f}]"


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Curves of recovery over contrast by tissue and views; detection below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made, detected = points(rows), seen(rows)
    views = sorted({r["views"] for r in rows})
    figure, axes = plt.subplots(
        len(CONTRASTS) + 1, len(views), figsize=(4.2 * len(views), 9.6), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for column, number in enumerate(views):
        for axis, tissue in zip(axes[:-1, column], CONTRASTS, strict=True):
            here = [p for p in made if (p.views, p.tissue) == (number, tissue)]
            _draw_curves(axis, here, CONTRASTS[tissue])
            axis.set_title(f"{tissue}, {number} views", fontsize=10)
        _draw_areas(axes[-1, column], [s for s in detected if s.views == number])
        axes[-1, column].set_title(f"seen by an observer, {number} views", fontsize=10)
    for axis in axes[:-1, 0]:
        axis.set_ylabel("recovered share of contrast")
    axes[-1, 0].set_ylabel("area under the ROC curve")
    axes[0, 0].legend(fontsize=7, ncols=3, loc="lower right")
    figure.suptitle(
        "Lesions planted before measurement (bars: 2 standard errors; open: structures taken out)",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_curves(axis: Any, here: Sequence[Point], contrasts: Sequence[float]) -> None:
    """Insertions as curves, removals as open marks; methods a little apart, to be told apart."""
    for level in (0.0, 1.0):
        axis.axhline(level, color="0.6", linewidth=0.8)
    for k, (method, colour) in enumerate(COLOURS.items()):
        for diameter, mark, style in zip(DIAMETERS, ("o", "s"), ("--", "-"), strict=True):
            for direction in ("insertion", "removal"):
                line = [p for p in here if (p.method, p.diameter, p.direction)
                        == (method, diameter, direction)]  # fmt: skip
                put = direction == "insertion"
                if line:
                    axis.errorbar(
                        [p.contrast * 1.04 ** (k - 1) for p in line], [p.share for p in line],
                        [2 * p.error for p in line], color=colour, marker=mark, markersize=5,
                        linestyle=style if put else "", capsize=2, zorder=2 + k,
                        markerfacecolor=colour if put else "white",
                        label=f"{method}, {diameter:g} mm" if put else None,
                    )  # fmt: skip
    axis.set_xscale("log")
    axis.minorticks_off()
    axis.set_xticks(contrasts, [f"{c:g}" for c in contrasts])
    axis.set_ylim(-0.4, 1.6)
    axis.set_xlabel("contrast of the lesion, HU")


def _draw_areas(axis: Any, detected: Sequence[Seen]) -> None:
    """Areas with their intervals, by tissue and size."""
    kinds: list[tuple[str, float]] = [(t, d) for t in CONTRASTS for d in DIAMETERS]
    axis.axhline(0.5, color="0.6", linewidth=0.8)
    for k, (method, colour) in enumerate(COLOURS.items()):
        for s in detected:
            if s.method == method and s.contrast is None and s.detection is not None:
                x = kinds.index((s.tissue, s.diameter)) + 0.2 * (k - 1)
                d = s.detection
                axis.errorbar(
                    [x], [d.auc], [[d.auc - d.low], [d.high - d.auc]], color=colour, marker="o",
                    capsize=3, markersize=5,
                )  # fmt: skip
    axis.set_xticks(range(len(kinds)), [f"{t}\n{d:g} mm" for t, d in kinds], fontsize=8)
    axis.set_xlim(-0.5, len(kinds) - 0.5)
    axis.set_ylim(0.3, 1.02)


def main() -> None:
    """Run what is missing; JSON in ``--out``, the page and its figure in ``--docs``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a few slices (the default)")
    size.add_argument("--full", action="store_true", help="every size, hours on a CPU")
    parser.add_argument("--ct", type=Path, help="real slices nobody trained on: npz or DICOM")
    parser.add_argument("--select", action="append", default=[], metavar="COLUMN=A,B",
                        help="rows of the npz's table")  # fmt: skip
    parser.add_argument("--prior", default="ct-small")
    parser.add_argument("--steps", type=int, help="network calls of the prior")
    parser.add_argument("--phantoms", type=int, help="phantom slices")
    parser.add_argument("--real", type=int, help="real slices")
    parser.add_argument("--views", type=int, nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("lesions.json"),
                        help="JSON file, continued if it exists")  # fmt: skip
    parser.add_argument("--docs", type=Path, help="folder of the page; default beside --out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    base = FULL if arguments.full else QUICK
    plan = Plan(
        views=tuple(arguments.views or base.views),
        phantoms=base.phantoms if arguments.phantoms is None else arguments.phantoms,
        real=(base.real if arguments.real is None else arguments.real) if arguments.ct else 0,
        steps=arguments.steps or base.steps,
    )
    select = {k: v.split(",") for k, _, v in (pair.partition("=") for pair in arguments.select)}
    if arguments.select and not all(select):
        parser.error("--select needs COLUMN=VALUE,VALUE")
    state = run_all(plan, load_prior(arguments.prior), arguments.ct, select, arguments.out)
    folder = arguments.docs or arguments.out.parent
    pictures = folder / "images" if arguments.docs else folder
    pictures.mkdir(parents=True, exist_ok=True)
    picture = pictures / f"{arguments.out.stem}.png"
    draw(state["rows"], picture)
    page = folder / f"{arguments.out.stem}.md"
    page.write_text(markdown(state, str(picture.relative_to(folder))))
    print(f"{page}\n{picture}")


def run_all(
    plan: Plan,
    prior: NetworkPrior,
    ct: Path | None,
    select: Mapping[str, Sequence[str]],
    out: Path,
) -> dict[str, Any]:
    """All of the plan that ``out`` does not hold yet; written after each reconstruction.

    Raises:
        InputError: a file that is not one of this benchmark's.
    """
    try:
        state: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"done": {}}
        done: dict[str, Any] = state["done"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"'{out.name}' is not of this benchmark; give another --out") from None
    slices = list(phantom_slices(plan.phantoms))
    if ct is not None:
        slices += real_slices(ct, plan.real, select)
    solves = solvers(prior, plan.steps)
    labels = {name: name for name in solves}
    labels["prior"] = f"{prior.card.sha256[:12]}, {plan.steps} calls"
    rows: list[dict[str, Any]] = []
    for number, one in enumerate(slices):
        for views in plan.views:
            keys = {m: f"{one.name} #{number}, {views} views, {labels[m]}" for m in solves}
            missing = {m: solves[m] for m in solves if keys[m] not in done}
            started = time.monotonic()
            for name, found in run(one, number, views, plan, missing) if missing else ():
                done[keys[name]] = found
                _write(out, {"done": done})
                print(f"{keys[name]}: {time.monotonic() - started:.1f} s", flush=True)
                started = time.monotonic()
            for m, key in keys.items():
                rows += [{**r, "slice": number, "views": views, "method": m} for r in done[key]]
    about = {
        "version": __version__,
        "prior": prior.card.name,
        "sha256": prior.card.sha256,
        "steps": plan.steps,
        "phantoms": plan.phantoms,
        "real": len(slices) - plan.phantoms,
        "source": "" if ct is None else ct.name,
    }
    return {"about": about, "rows": rows}


def _write(path: Path, state: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(state) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    main()
