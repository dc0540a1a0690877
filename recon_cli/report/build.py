"""Gather what an output folder holds and render it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recon_cli.report import figures
from recon_cli.report.figures import Window

__all__ = ["build", "draw_overview"]

CT_WINDOWS = (Window("Lung", -1350.0, 150.0), Window("Soft tissue", -160.0, 240.0))
CT_ERROR_TOP = 200.0
SHOWN = 3

Volume = NDArray[np.float32]


@dataclass(frozen=True)
class _Output:
    """What an output folder holds."""

    run: Mapping[str, Any]
    metrics: Mapping[str, Any]
    truth: Volume | None
    std: Volume | None
    images: Mapping[str, Volume]

    @property
    def unit(self) -> str:
        return str(self.metrics["unit"])

    @property
    def windows(self) -> tuple[Window, ...]:
        """Display windows: fixed for CT, from the values for MR."""
        if self.unit == "HU":
            return CT_WINDOWS
        reference = self.truth if self.truth is not None else next(iter(self.images.values()))
        return (Window("Signal", 0.0, float(np.percentile(reference, 99.7))),)

    @property
    def error_top(self) -> float:
        """End of the error scale: fixed for CT, so that reports compare."""
        return CT_ERROR_TOP if self.unit == "HU" else 0.25 * self.windows[0].high


def _json(path: Path) -> Any:
    from inverse.errors import InputError, NoInputError

    if not path.is_file():
        raise NoInputError(
            f"'{path.parent}' holds no {path.name}, so it is no output of recon; give the folder "
            "that 'recon study', 'demo' or 'reconstruct' wrote"
        )
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise InputError(f"'{path}' is not valid JSON; run the reconstruction again") from None


def _volume(folder: Path, name: str, run: Mapping[str, Any]) -> Volume | None:
    """A series of the output in its unit; MR files hold steps, whose size the run log knows."""
    from inverse.io.series import read_series

    if not (folder / name).is_dir():
        return None
    series = read_series(folder / name)
    slope = 1.0 if series.unit == "HU" else float(run["outputs"][name]["slope"])
    return np.asarray(series.array * np.float32(slope), np.float32)


def _load(folder: Path) -> _Output:
    from inverse.errors import InputError

    run, metrics = _json(folder / "run.json"), _json(folder / "metrics.json")
    images: dict[str, Volume] = {}
    try:
        for name in metrics["methods"]:
            where = "recon" if name == "prior" else f"baseline-{name}"
            volume = _volume(folder, where, run)
            if volume is not None:
                images[name] = volume
        truth, std = _volume(folder, "truth", run), _volume(folder, "std", run)
    except KeyError as error:
        raise InputError(
            f"the JSON files in '{folder}' lack {error}; run the reconstruction again"
        ) from None
    if not images:
        raise InputError(f"'{folder}' holds no image series; run the reconstruction again")
    return _Output(run, metrics, truth, std, images)


def _titles(output: _Output) -> dict[str, str]:
    return {name: str(output.metrics["methods"][name]["title"]) for name in output.images}


def _shown(count: int) -> list[int]:
    """A few slices, evenly spread."""
    return sorted({round((i + 0.5) * count / SHOWN - 0.5) for i in range(min(SHOWN, count))})


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _cells(row: Mapping[str, Any]) -> Iterable[str]:
    for name, digits in (("psnr", 2), ("ssim", 3), ("nrmse", 4)):
        value = row.get(name)
        if value is None:
            yield "–"
            continue
        low_high = value["ci95"]
        text = _number(value["mean"], digits)
        if low_high:
            text += f" [{_number(low_high[0], digits)}, {_number(low_high[1], digits)}]"
        yield text
    chi2 = row["residual_chi2"]
    yield "–" if chi2 is None else f"{chi2:.3g}"
    yield f"{row['seconds']:.1f}"
    yield str(row["network_calls"])


_STD_NOTE = (
    "The std is the spread of the posterior samples. A low value does not mean correct: the "
    "spread knows nothing of what the prior is wrong about, and the sampler's approximations make "
    "it too small."
)

Panel = tuple[str, str, str]
"""Title, remark and data URI of one picture; all empty for a gap."""


def _sections(output: _Output) -> list[dict[str, Any]]:
    """Groups of picture rows: one group a display window, then errors and std."""
    shown = _shown(len(next(iter(output.images.values()))))
    groups = [
        (f"{w.name} window", [("", f"{w.low:.4g} to {w.high:.4g} {output.unit}")], "",
         partial(_window_row, output, w))
        for w in output.windows
    ]  # fmt: skip
    scales = []
    if output.truth is not None:
        text = f"error, 0 to {output.error_top:.3g} {output.unit}"
        scales.append((figures.gradient(figures.ERROR_MAP), text))
    if output.std is not None:
        text = f"std, 0 to {_std_top(output):.3g} {output.unit}"
        scales.append((figures.gradient(figures.STD_MAP), text))
    if scales:
        title = " and ".join(
            ["Absolute error"] * (output.truth is not None)
            + ["uncertainty"] * (output.std is not None)
        )
        note = _STD_NOTE if output.std is not None else ""
        row = partial(_error_row, output, _std_top(output))
        groups.append((title[0].upper() + title[1:], scales, note, row))
    source = [entry["slice"] for entry in output.metrics["per_slice"]]
    return [
        {
            "title": title,
            "scales": scales,
            "note": note,
            "rows": [{"slice": source[k], "panels": row(k)} for k in shown],
        }
        for title, scales, note, row in groups
    ]


def _window_row(output: _Output, window: Window, k: int) -> list[Panel]:
    """Truth and reconstructions of slice ``k``."""
    panels: list[Panel] = []
    if output.truth is not None:
        panels.append(("Reference", "", figures.grey(output.truth[k], window)))
    for name, title in _titles(output).items():
        value = output.metrics["per_slice"][k].get(name, {}).get("psnr")
        remark = "" if value is None else f"{value:.1f} dB"
        panels.append((title, remark, figures.grey(output.images[name][k], window)))
    return panels


def _std_top(output: _Output) -> float:
    """End of the scale of the std map."""
    return 0.0 if output.std is None else float(np.percentile(output.std, 99.7)) or 1.0


def _error_row(output: _Output, top: float, k: int) -> list[Panel]:
    """Std below the truth, errors below the reconstructions of slice ``k``."""
    panels: list[Panel] = []
    if output.std is not None:
        panels.append(("Std of samples", "", figures.heat(output.std[k], top, figures.STD_MAP)))
    elif output.truth is not None:
        panels.append(("", "", ""))
    if output.truth is not None:
        for name, title in _titles(output).items():
            error = np.abs(output.images[name][k] - output.truth[k])
            picture = figures.heat(error, output.error_top, figures.ERROR_MAP)
            panels.append((title, "|error|", picture))
    return panels


def _flat(value: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, text)."""
    pairs: list[tuple[str, str]] = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            pairs += _flat(item, f"{before}{key}.")
        elif item not in (None, [], ""):
            text = ", ".join(map(str, item)) if isinstance(item, list) else str(item)
            pairs.append((before + str(key), text if len(text) <= 200 else text[:197] + "..."))
    return pairs


def _curve(output: _Output) -> str | None:
    per_slice = output.metrics["per_slice"]
    if output.truth is None or len(per_slice) < 2:
        return None
    lines = {
        title: [entry[name]["psnr"] for entry in per_slice]
        for name, title in _titles(output).items()
    }
    return figures.curve(lines, [entry["slice"] for entry in per_slice], "PSNR in dB")


def _write(path: Path, text: str) -> None:
    """Write by temporary and rename."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def build(folder: Path) -> Path:
    """Write ``report.html`` into an output folder from its series, metrics and run log.

    Raises:
        NoInputError: no output of this toolkit.
        InputError: a damaged one.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    output = _load(folder)
    environment = Environment(
        loader=PackageLoader("recon_cli", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    run, prior = output.run, output.run.get("prior") or {}
    training = prior.get("training") or {}
    page = environment.get_template("report.html.j2").render(
        run=run,
        label=run["settings"]["label"],
        metrics=output.metrics,
        rows=[
            (row["title"], list(_cells(row)), name == "prior")
            for name, row in output.metrics["methods"].items()
        ],
        sections=_sections(output),
        curve=_curve(output),
        settings=_flat(run["settings"]),
        prior=prior,
        training=[(k, v) for k, v in _flat(training) if not k.startswith("settings.")],
        samples=(run["settings"].get("reconstruction") or {}).get("samples", 1),
    )
    path = folder / "report.html"
    _write(path, page)
    return path


def draw_overview(folder: Path, path: Path, index: int | None = None) -> None:
    """Write a PNG of one slice of an output folder: truth, baselines, prior, errors, std.

    Args:
        folder: output folder.
        path: PNG to write.
        index: position of the slice in the output; the middle one by default.
    """
    from inverse.errors import InputError

    output = _load(folder)
    count = len(next(iter(output.images.values())))
    k = count // 2 if index is None else index
    if not 0 <= k < count:
        raise InputError(f"slice {k} is not in the output, which has {count}; count from 0")
    titles = _titles(output)
    panels = {} if output.truth is None else {"Reference": output.truth[k]}
    panels |= {titles[name]: volume[k] for name, volume in output.images.items()}
    captions = {
        titles[name]: f"{entry['psnr']:.1f} dB"
        for name, entry in output.metrics["per_slice"][k].items()
        if isinstance(entry, Mapping) and entry.get("psnr") is not None
    }
    kind = ", simulated" if output.run["retrospective_simulation"] else ""
    mark = f"{output.run['settings']['label']}{kind}. Research use only."
    figures.overview(
        path,
        panels,
        None if output.truth is None else output.truth[k],
        None if output.std is None else output.std[k],
        output.windows,
        output.error_top,
        output.unit,
        captions,
        mark,
    )
