"""The report as PDF: a page of figures, then a page a shown slice; made of the output folder."""

from __future__ import annotations

import json
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recon_cli.report.build import draw_overview
from recon_cli.runlog import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["build_pdf"]

_PAGES = 3
_A4 = (11.69, 8.27)  # inches, landscape
_COLUMNS = ("method", "PSNR dB", "SSIM", "NRMSE", "residual χ²", "seconds", "network calls")


def _page() -> Figure:
    """A page that is drawn without a display and without global state."""
    from matplotlib.backends.backend_pdf import FigureCanvasPdf
    from matplotlib.figure import Figure

    page = Figure(figsize=_A4)
    FigureCanvasPdf(page)
    return page


def _row(method: Mapping[str, Any]) -> list[str]:
    values = [(method.get(name) or {}).get("mean") for name in ("psnr", "ssim", "nrmse")]
    cells = ["-" if v is None else f"{v:.4g}" for v in [*values, method["residual_chi2"]]]
    return [method["title"], *cells, f"{method['seconds']:.1f}", str(method["network_calls"])]


def _first_page(run: Mapping[str, Any], metrics: Mapping[str, Any]) -> Figure:
    """What was run, what came of it, and what to beware of."""
    page = _page()
    about = [
        f"recon {run['command']}, {run['started']}, {len(metrics['per_slice'])} slices, seed "
        f"{run['seed']}, {run['device']}",
        "Research use only. Not a medical device, not for diagnosis, not clinically validated. A "
        "reconstruction with a learned prior may remove or invent anatomy.",
    ]
    if run["retrospective_simulation"]:
        about.append("Simulated data: results on a scanner's raw data will differ.")
    lines = [f"{name}: {text}" for name, text in run.get("patient", {}).items()]
    prior = run.get("prior") or {}
    if prior:
        lines.append(f"Prior {prior['name']}, sha256 {prior['sha256']}")
    lines += [f"Warning: {w['text']} [{w['code']}]" for w in run["warnings"]]
    page.text(0.06, 0.92, textwrap.shorten(run["settings"]["label"], 90), fontsize=18)
    _paragraphs(page, 0.89, about, most=4)
    axes = page.add_axes((0.06, 0.58, 0.88, 0.2))
    axes.set_axis_off()
    rows = [_row(method) for method in metrics["methods"].values()]
    table = axes.table(cellText=rows, colLabels=_COLUMNS, loc="upper left", cellLoc="left")
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    for cell in table.get_celld().values():
        cell.set_linewidth(0.4)
    _paragraphs(page, 0.56, lines, most=22)
    return page


def _paragraphs(page: Figure, top: float, lines: Sequence[str], most: int) -> None:
    """Wrapped lines of text from ``top`` downwards, ``most`` of them at most."""
    parts = [part for line in lines for part in textwrap.wrap(line, 150)]
    if len(parts) > most:
        parts = [*parts[: most - 1], "... and more in report.html"]
    page.text(0.06, top, "\n".join(parts), fontsize=9, va="top", linespacing=1.5)


def build_pdf(folder: Path) -> Path:
    """Write ``report.pdf`` into an output folder from its series, metrics and run log.

    Equal folders give equal files.

    Args:
        folder: what demo, study or reconstruct wrote.

    Raises:
        ReconError: no output of this toolkit, or a damaged one.
    """
    import io

    from matplotlib import rc_context
    from matplotlib.backends.backend_pdf import PdfPages
    from matplotlib.image import imread

    run, metrics = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("run", "metrics")
    )
    count = len(metrics["per_slice"])
    made = datetime.fromisoformat(run["started"])
    about = {
        "Title": "Reconstruction report, research only",
        "CreationDate": made,
        "ModDate": made,
    }
    content = io.BytesIO()
    with (
        tempfile.TemporaryDirectory() as scratch,
        rc_context({"text.parse_math": False, "pdf.compression": 6}),
        PdfPages(content, metadata=about) as pages,
    ):
        pages.savefig(_first_page(run, metrics))
        picture = Path(scratch) / "slice.png"
        for k in sorted(
            {round((i + 0.5) * count / _PAGES - 0.5) for i in range(min(_PAGES, count))}
        ):
            draw_overview(folder, picture, k)
            page = _page()
            axes = page.add_axes((0.02, 0.02, 0.96, 0.92))
            axes.imshow(imread(picture))
            axes.set_axis_off()
            page.text(0.04, 0.95, f"Slice {metrics['per_slice'][k]['slice']}", fontsize=12)
            pages.savefig(page)
    path = folder / "report.pdf"
    write_whole(path, content.getvalue())
    return path
