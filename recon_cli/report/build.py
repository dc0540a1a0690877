"""The page and the figures of an output folder."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inverse.volumes import extent
from recon_cli.report import figures, pixels
from recon_cli.report.content import SCORES, Output, load
from recon_cli.report.figures import Window

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["build", "draw_figures", "draw_overview", "report_figures"]

PICTURES = 3
IMAGE_BITS = {"HU": 16, "signal": 12}
MAP_BITS = 10
TOOLS = {
    "slice": "Slices", "window": "Window", "move": "Move", "profile": "Profile", "roi": "Region",
}  # fmt: skip
VERDICTS = {
    "green": "No cause for doubt found",
    "amber": "Look at the reasons before use",
    "red": "Do not use",
}


# --- pixel data --------------------------------------------------------------------------------


def _layers(output: Output) -> list[dict[str, Any]]:
    """Everything of a layer that the page knows, but its pixels."""
    found: list[dict[str, Any]] = []
    titles = {"truth": "Reference", **output.titles}
    for key in (["truth"] if output.truth is not None else []) + list(output.images):
        found.append({"key": key, "title": titles[key], "kind": "image", "unit": output.unit,
                      "style": output.styles[key]})  # fmt: skip
    for key, told in output.maps.items():
        entry = {k: v for k, v in vars(told).items() if k not in ("volume", "step")}
        found.append({"key": key, "kind": "map", "style": "s-prior", **entry})
    return found


def _packed(output: Output, budget: int) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Layers with their steps, and the text of every slice of each by its name in the page."""
    entries, layers = _layers(output), []
    for entry in entries:
        key = entry["key"]
        if entry["kind"] == "map":
            told = output.maps[key]
            layers.append(pixels.Layer.of(key, told.volume, told.step, MAP_BITS))
        else:
            volume = output.truth if key == "truth" else output.images[key]
            assert volume is not None
            bits = IMAGE_BITS[output.unit]
            layers.append(pixels.Layer.of(key, volume, output.steps[key], bits))
    layers, texts = pixels.fit(layers, budget)
    for entry, layer in zip(entries, layers, strict=True):
        entry |= {"base": layer.base, "step": layer.step, "levels": layer.levels}
    named = [(f"{i}-{k}", text) for i, row in enumerate(texts) for k, text in enumerate(row)]
    return entries, named


def _quantised(layers: Iterable[Mapping[str, Any]]) -> str:
    """In which steps the page holds the values; one number where they are nearly equal."""
    images = [layer for layer in layers if layer["kind"] == "image"]
    steps = [layer["step"] for layer in images]
    unit = images[0]["unit"]
    if max(steps) < 1.5 * min(steps):
        return f"values rounded to {max(steps):.3g} {unit}"
    titles: dict[str, list[str]] = {}
    for layer in images:
        titles.setdefault(f"{layer['step']:.3g} {unit}", []).append(layer["title"])
    return "values rounded to " + ", ".join(f"{s} ({', '.join(t)})" for s, t in titles.items())


# --- the page ----------------------------------------------------------------------------------


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


def _verdict(output: Output) -> dict[str, Any] | None:
    """The traffic light with its reasons, where there is one."""
    light, reasons = output.trust.get("light"), output.trust.get("reasons")
    if light not in VERDICTS or not isinstance(reasons, list) or not reasons:
        return None
    return {"light": light, "words": VERDICTS[light], "reasons": [str(r) for r in reasons]}


def _windows(output: Output) -> list[Window]:
    """Windows of the page, the first one to begin with, and one of all values."""
    whole = Window("All values", *extent(output.reference))
    windows = [*output.windows, whole]
    if output.unit == "HU":
        # without air, soft tissue tells more
        low = sum(int((image < -500).sum()) for image in output.reference)
        lungs = sum(int(((image > -950) & (image < -500)).sum()) for image in output.reference)
        first = 0 if lungs > 0.1 * (math.prod(output.reference.shape) - low) else 1
        windows = [windows.pop(first), *windows]
    return windows


def _facts(output: Output, layers: list[dict[str, Any]], windows: list[Window]) -> dict[str, Any]:
    """What the script of the page reads."""
    rows, columns = output.reference.shape[1:]
    methods = output.metrics["methods"]
    palettes = {layer["palette"] for layer in layers if layer["kind"] == "map"}
    return {
        "rows": rows,
        "columns": columns,
        "spacing": output.spacing,
        "slices": output.source,
        "unit": output.unit,
        "span": windows[-1].high - windows[-1].low or 1.0,
        "windows": [asdict(window) for window in windows],
        "errorTop": output.error_top,
        "layers": layers,
        "palettes": {name: figures.palette(name) for name in palettes}
        | {"error": figures.palette(figures.ERROR_MAP)},
        "methods": [
            {"key": name, "title": title, "style": output.styles[name],
             **{score: methods[name].get(score) for score in SCORES}}
            for name, title in output.titles.items()
        ],
        "scores": {name: output.score(name) for name in SCORES},
        "scoreLabels": {name: {"label": label} for name, label in SCORES.items()},
        "residual": output.residual,
        "coverage": None if output.coverage is None else asdict(output.coverage),
    }  # fmt: skip


def _stills(output: Output, window: Window) -> dict[str, Any]:
    """Pictures for browsers without scripts: the middle slice."""
    k = len(output.source) // 2
    images = {} if output.truth is None else {"Reference": output.truth}
    images |= {output.titles[name]: volume for name, volume in output.images.items()}
    pictures = [(title, figures.grey(volume[k], window)) for title, volume in images.items()]
    text = f"{window.name} window, {window.low:.4g} to {window.high:.4g} {output.unit}"
    if output.std is not None:
        top = output.maps["std"].high
        pictures.append(("Std of samples", figures.heat(output.std[k], top, figures.STD_MAP)))
        text += f"; std 0 to {top:.3g} {output.unit}"
    return {"slice": output.source[k], "text": text, "pictures": pictures}


def _source(text: str) -> tuple[Any, str]:
    """A script or style for the page, and the hash by which the page's policy admits it."""
    from markupsafe import Markup

    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Markup(text), f"sha256-{digest}"


def _json_text(value: Any) -> Any:
    """JSON that cannot end its script element."""
    from markupsafe import Markup

    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)  # its signs are escaped


def _write(path: Path, texts: Iterable[str]) -> None:
    """Write by temporary and rename."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.writelines(texts)
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def build(folder: Path, budget: int = pixels.BUDGET) -> Path:
    """Write ``report.html`` into an output folder from what it holds.

    Args:
        folder: what demo, study or reconstruct wrote.
        budget: bytes for pixel data; where they do not fit, values are rounded to larger steps.

    Raises:
        NoInputError: no output of this toolkit.
        InputError: a damaged one.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    output = load(folder)
    environment = Environment(
        loader=PackageLoader("recon_cli", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    here = files("recon_cli") / "report"
    style, style_hash = _source((here / "report.css").read_text(encoding="utf-8"))
    script, script_hash = _source((here / "report.js").read_text(encoding="utf-8"))
    layers, packed = _packed(output, budget)
    windows = _windows(output)
    facts = _facts(output, layers, windows)
    run, prior = output.run, output.run.get("prior") or {}
    coverage = facts["coverage"]
    page = environment.get_template("report.html.j2").generate(
        run=run,
        label=run["settings"]["label"],
        metrics=output.metrics,
        verdict=_verdict(output),
        rows=[
            (row["title"], list(_cells(row)), name == "prior")
            for name, row in output.metrics["methods"].items()
        ],
        images=[layer for layer in layers if layer["kind"] == "image"],
        maps=[layer for layer in layers if layer["kind"] == "map"],
        methods=facts["methods"],
        has_truth=output.truth is not None,
        has_std=output.std is not None,
        windows=windows,
        tools=TOOLS.items(),
        quantised=_quantised(layers),
        scores=facts["scoreLabels"] if any(facts["scores"].values()) else {},
        residual=facts["residual"],
        coverage=coverage
        and coverage | {"at90": coverage["covered"][coverage["nominal"].index(90.0)]},
        stills=_stills(output, windows[0]),
        settings=_flat(run["settings"]),
        prior=prior,
        training=[
            pair
            for pair in _flat(prior.get("training") or {})
            if not pair[0].startswith("settings.")
        ],
        samples=(run["settings"].get("reconstruction") or {}).get("samples", 1),
        facts=_json_text(facts),
        pixels=packed,
        style=style,
        style_hash=style_hash,
        script=script,
        script_hash=script_hash,
    )
    path = folder / "report.html"
    _write(path, page)
    return path


# --- figures -----------------------------------------------------------------------------------


@contextmanager
def _plain_text() -> Iterator[None]:
    """Titles are text, not formulas."""
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}):
        yield


def _overview(output: Output, k: int) -> Figure:
    panels = {} if output.truth is None else {"Reference": output.truth[k]}
    panels |= {output.titles[name]: volume[k] for name, volume in output.images.items()}
    kind = ", simulated" if output.run["retrospective_simulation"] else ""
    return figures.overview(
        panels,
        None if output.truth is None else output.truth[k],
        None if output.std is None else output.std[k],
        output.windows[:2] if output.unit == "HU" else output.windows[:1],
        output.error_top,
        output.unit,
        output.captions(k),
        f"{output.run['settings']['label']}{kind}. Research use only.",
    )


def report_figures(folder: Path) -> Iterator[tuple[str, Figure]]:
    """The figures of a report, each with its name: overviews, metrics, residuals, coverage."""
    output = load(folder)
    count = len(output.source)
    chosen = sorted(
        {round((i + 0.5) * count / PICTURES - 0.5) for i in range(min(PICTURES, count))}
    )
    with _plain_text():
        for k in chosen:
            yield f"slice-{output.source[k]:04d}", _overview(output, k)
        for name, label in SCORES.items():
            values = output.score(name)
            if not values:
                continue
            means = {}
            for method in values:
                found = output.metrics["methods"][method][name]
                interval = None if found["ci95"] is None else tuple(found["ci95"])
                means[method] = (output.titles[method], found["mean"], interval)
            yield name, figures.scores(means, output.source, values, output.styles, label)
        if output.residual:
            lines = [(m["title"], m["style"], m["value"]) for m in output.residual["methods"]]
            expected = output.residual["expected"]
            yield (
                "residual",
                figures.residual(
                    output.residual["at"],
                    lines,
                    None if expected is None else (expected[0], expected[1]),
                    output.residual["axis"],
                ),
            )
        if output.coverage is not None:
            c = output.coverage
            yield (
                "coverage",
                figures.coverage(c.nominal, c.covered, c.std, c.rmse, output.unit),
            )


def draw_figures(folder: Path, into: Path) -> list[Path]:
    """Write the figures of a report as PNG files, for papers.

    Args:
        folder: output folder.
        into: where to write; made if it is not there.

    Raises:
        OutputError: ``into`` cannot be written.
        InputError: a damaged output.
    """
    from inverse.errors import OutputError

    paths = []
    for name, figure in report_figures(folder):
        path = into / f"{name}.png"
        try:
            into.mkdir(parents=True, exist_ok=True)
            with _plain_text():
                figure.savefig(path)
        except OSError as error:
            raise OutputError(
                f"figures cannot be written to '{into}' ({error.strerror}); give another folder"
            ) from error
        paths.append(path)
    return paths


def draw_overview(folder: Path, path: Path, index: int | None = None) -> None:
    """Write a PNG of one slice of an output folder: truth, baselines, prior, errors, std.

    Args:
        folder: output folder.
        path: PNG to write.
        index: position of the slice in the output; the middle one by default.
    """
    from inverse.errors import InputError

    output = load(folder)
    count = len(output.source)
    k = count // 2 if index is None else index
    if not 0 <= k < count:
        raise InputError(f"slice {k} is not in the output, which has {count}; count from 0")
    with _plain_text():
        _overview(output, k).savefig(path)
