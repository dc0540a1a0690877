"""Figures of a report for papers, pictures as PNG data URIs, colours."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "ERROR_MAP",
    "SHARE_MAP",
    "SIGNED_MAP",
    "STD_MAP",
    "Window",
    "coverage",
    "grey",
    "heat",
    "overview",
    "palette",
    "residual",
    "scores",
]

ERROR_MAP = "inferno"
STD_MAP = "viridis"
SHARE_MAP = "plasma"
SIGNED_MAP = "RdBu_r"
COLOURS = {
    "s-truth": "#16212c",
    "s-prior": "#1b6fb8",
    "s-0": "#7c8896",
    "s-1": "#b96a12",
    "s-2": "#2f8552",
    "s-3": "#8457ad",
    "s-4": "#a3476b",
}
"""Colours of images and methods; the page has its own for dark screens."""

EXACT = 1e-3
"""Chi-square that is drawn as an exact fit, such as zero filling has."""

Image = NDArray[np.float32]


@dataclass(frozen=True)
class Window:
    """Display window: values from ``low`` to ``high`` go from black to white."""

    name: str
    low: float
    high: float


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _levels(image: Image, low: float, high: float) -> NDArray[np.uint8]:
    scaled = (image.astype(np.float64) - low) / max(high - low, 1e-12)
    return np.asarray(np.rint(np.clip(scaled, 0, 1) * 255), np.uint8)


def _png(pixels: NDArray[np.uint8]) -> str:
    from PIL import Image as Pillow

    buffer = io.BytesIO()
    Pillow.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return _uri(buffer.getvalue())


def _colours(name: str) -> NDArray[np.uint8]:
    from matplotlib import colormaps

    return np.asarray(np.rint(colormaps[name](np.arange(256))[:, :3] * 255), np.uint8)


def grey(image: Image, window: Window) -> str:
    """An image in a display window."""
    return _png(_levels(image, window.low, window.high))


def heat(image: Image, top: float, colours: str) -> str:
    """An image from 0 to ``top`` in a colour map."""
    return _png(_colours(colours)[_levels(image, 0.0, top)])


def palette(name: str) -> str:
    """A colour map as base64 text of 256 red, green and blue bytes, for the page."""
    return base64.b64encode(_colours(name).tobytes()).decode()


def _figure(width: float, height: float) -> Figure:
    """A figure that is drawn without a display and without global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _axes(figure: Figure, place: Any, x: str, y: str) -> Any:
    axes = figure.add_subplot(place)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#e3e7ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _legend(axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(frameon=False, ncols=len(labels), loc="lower left", bbox_to_anchor=(0, 1))


def overview(
    panels: Mapping[str, Image],
    truth: Image | None,
    std: Image | None,
    windows: Sequence[Window],
    error_top: float,
    unit: str,
    captions: Mapping[str, str],
    mark: str,
) -> Figure:
    """The panels in each window, and below them the absolute errors.

    Args:
        panels: image of one slice by title; the truth first, where there is one.
        truth: reference, for the errors.
        std: standard deviation of the last panel.
        windows: one row of panels each.
        error_top: end of the colour scale of errors.
        unit: unit of the images.
        captions: text below a title, such as its PSNR.
        mark: what the picture is and is not, written below it.
    """
    rows = len(windows) + (truth is not None)
    columns = len(panels)
    figure = _figure(2.5 * columns + 0.5, 2.18 * rows + 0.4)
    grid: Any = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.ravel():
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_frame_on(False)
    for axes, title in zip(grid[0], panels, strict=True):
        axes.set_title(f"{title}\n{captions.get(title, '')}".strip(), fontsize=10)
    for row, window in zip(grid, windows, strict=False):
        for axes, image in zip(row, panels.values(), strict=True):
            axes.imshow(image, cmap="gray", vmin=window.low, vmax=window.high)
        row[0].set_ylabel(f"{window.name} window", fontsize=9)
    if truth is not None:
        row = grid[-1]
        for axes, image in zip(row[1:], list(panels.values())[1:], strict=True):
            shown = axes.imshow(np.abs(image - truth), cmap=ERROR_MAP, vmin=0, vmax=error_top)
        row[1].set_ylabel("|error|", fontsize=9)
        figure.colorbar(shown, ax=row[-1], label=unit, fraction=0.046)
        if std is not None:
            top = float(np.percentile(std, 99.7)) or 1.0
            shown = row[0].imshow(std, cmap=STD_MAP, vmin=0, vmax=top)
            row[0].set_ylabel("std of samples", fontsize=9)
            figure.colorbar(shown, ax=row[0], label=unit, fraction=0.046, location="left")
    figure.supxlabel(mark, fontsize=8)
    return figure


def scores(
    means: Mapping[str, tuple[str, float, tuple[float, float] | None]],
    slices: Sequence[int],
    values: Mapping[str, Sequence[float]],
    styles: Mapping[str, str],
    label: str,
) -> Figure:
    """A metric by method, mean with 95 % interval, and by slice.

    Args:
        means: title, mean and interval by method.
        slices: index of each slice in its source.
        values: the metric of each slice by method.
        styles: colour by method, of :data:`COLOURS`.
        label: name of the metric.
    """
    from matplotlib.ticker import MaxNLocator

    figure = _figure(9.6, 3.0)
    grid = figure.add_gridspec(1, 2, width_ratios=(1, 1.7))
    axes = _axes(figure, grid[0], f"{label}, mean and 95 % interval", "")
    for row, (name, (_, mean, interval)) in enumerate(means.items()):
        colour = COLOURS[styles[name]]
        axes.plot(interval or (mean, mean), (row, row), color=colour, linewidth=3, alpha=0.5)
        axes.plot(mean, row, "o", color=colour, markersize=6)
    axes.set_yticks(range(len(means)), [title for title, _, _ in means.values()])
    axes.set_ylim(len(means) - 0.5, -0.5)
    axes = _axes(figure, grid[1], "slice of the source", label)
    for name, line in values.items():
        axes.plot(slices, line, "o-", color=COLOURS[styles[name]], markersize=3.5, linewidth=1.5,
                  label=means[name][0])  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes)
    return figure


def residual(
    at: Sequence[float],
    lines: Sequence[tuple[str, str, Sequence[float]]],
    expected: tuple[Sequence[float], Sequence[float]] | None,
    axis: str,
) -> Figure:
    """Residual chi-square by view or ring of k-space.

    Args:
        at: place of each group on the axis.
        lines: title, style and values.
        expected: ends of the 95 % interval of a posterior sample.
        axis: label of the axis.
    """
    figure = _figure(8.4, 3.0)
    axes = _axes(figure, figure.add_gridspec(1, 1)[0], axis, "residual χ² per datum")
    if expected is not None:
        axes.fill_between(at, *expected, color=COLOURS["s-truth"], alpha=0.12, linewidth=0)
    for title, style, values in lines:
        dash = "o--" if "sample" in title else "o-"
        axes.plot(
            at,
            np.maximum(values, EXACT),
            dash,
            color=COLOURS[style],
            markersize=3,
            linewidth=1.4,
            label=title,
        )
    axes.set_yscale("log")
    axes.set_ylim(bottom=max(axes.get_ylim()[0], EXACT / 2))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    _legend(axes)
    return figure


def coverage(
    nominal: Sequence[float],
    covered: Sequence[float],
    std: Sequence[float],
    rmse: Sequence[float],
    unit: str,
) -> Figure:
    """What the intervals promise against what they hold, and spread against error.

    Args:
        nominal: promised shares, percent.
        covered: share of pixels whose truth lies inside, percent.
        std: standard deviation of groups of pixels.
        rmse: root mean square error of each.
        unit: of the last two.
    """
    figure = _figure(8.4, 3.6)
    grid = figure.add_gridspec(1, 2)
    axes = _axes(figure, grid[0], "promised share of pixels in %", "truth inside, %")
    axes.plot((0, 100), (0, 100), "--", color=COLOURS["s-truth"], linewidth=1)
    axes.plot(nominal, covered, "o-", color=COLOURS["s-prior"], markersize=4)
    axes = _axes(figure, grid[1], f"std of samples in {unit}", f"rms error in {unit}")
    end = max(*std, *rmse)
    axes.plot((0, end), (0, end), "--", color=COLOURS["s-truth"], linewidth=1)
    axes.plot(std, rmse, "o-", color=COLOURS["s-prior"], markersize=4)
    return figure
