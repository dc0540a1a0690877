"""Pictures of a report as PNG data URIs, and the overview picture."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ERROR_MAP", "STD_MAP", "Window", "curve", "gradient", "grey", "heat", "overview"]

ERROR_MAP = "inferno"
STD_MAP = "viridis"

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


def gradient(colours: str) -> str:
    """The colour map as a CSS gradient."""
    stops = ", ".join(f"rgb({r},{g},{b})" for r, g, b in _colours(colours)[::32])
    return f"linear-gradient(to right, {stops})"


def _figure(width: float, height: float) -> Figure:
    """A figure that is drawn without a display and without global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def curve(series: Mapping[str, Sequence[float]], slices: Sequence[int], label: str) -> str:
    """One line a method over the slices."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure(8.4, 2.9)
    axes = figure.add_subplot()
    # the last curve is the prior's
    colours = [*(_CURVE_COLOURS * 4)[: len(series) - 1], _PRIOR_COLOUR]
    for (name, values), colour in zip(series.items(), colours, strict=True):
        axes.plot(slices, values, "o-", color=colour, markersize=3.5, linewidth=1.5, label=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("slice of the source")
    axes.set_ylabel(label)
    axes.grid(color="#e3e7ec", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(series), loc="lower left", bbox_to_anchor=(0, 1))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return _uri(buffer.getvalue())


_CURVE_COLOURS = ["#8a94a3", "#c77d2b", "#4f9d69", "#9467bd", "#7a5c3e"]
_PRIOR_COLOUR = "#1f6fb2"


def overview(
    path: Path,
    panels: Mapping[str, Image],
    truth: Image | None,
    std: Image | None,
    windows: Sequence[Window],
    error_top: float,
    unit: str,
    captions: Mapping[str, str],
    mark: str,
) -> None:
    """Write one picture: the panels in each window, and below them the absolute errors.

    Args:
        path: PNG to write.
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
    figure.savefig(path)
