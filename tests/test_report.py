"""The report: self-contained, escaped, complete, and rebuilt from the output folder alone."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from cli_tools import recon, series, tiny_prior
from PIL import Image

from recon_cli.report import figures
from recon_cli.report.build import build


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study")
    series(root / "ct", 2)
    prior = tiny_prior(
        root / "tiny.safetensors",
        training_data=({"name": "<script>alert(1)</script>", "licence": "CC0"},),
        limits=("fails on <b>bold</b> images",),
    )
    code = recon(
        "study", "ct", root / "ct", "-o", root / "out", "--prior", prior, "--views", 8,
        "--steps", 2, "--samples", 2, "--quiet",
    )  # fmt: skip
    assert code == 0
    return root / "out"


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text())


def test_nothing_is_loaded_and_nothing_runs(study: Path) -> None:
    found = page(study)
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in found.tags}
    for _, attributes in found.tags:
        assert not any(name.startswith("on") or name == "href" for name in attributes)
        assert (attributes.get("src") or "data:").startswith("data:")
    policies = [a["content"] for t, a in found.tags if a.get("http-equiv")]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert "<b>bold</b>" in found.text, "card texts are shown as text"


def test_it_says_what_it_is(study: Path) -> None:
    text = " ".join(page(study).text.split())
    for words in (
        "Research use only",
        "Not a medical device",
        "may remove or invent anatomy",
        "Retrospective simulation from processed images",
        "8-view parallel-beam CT",
        "FBP",
        "TV",
        "Prior (pnp_admm)",
        "low value does not mean correct",
        "Lung window",
        "Soft tissue window",
    ):
        assert words in text


def test_pictures_show_the_values(study: Path) -> None:
    sources = [a["src"] for t, a in page(study).tags if t == "img" and "Reference" in a["alt"]]
    png = base64.b64decode(str(sources[0]).removeprefix("data:image/png;base64,"))
    shown = np.asarray(Image.open(io.BytesIO(png)))
    # lung window, -1350 to 150 HU: air at -1000 HU is 350/1500 of white, 0 HU is 1350/1500
    assert shown.shape == (64, 64)
    assert shown[0, 0] == round(255 * 350 / 1500)
    assert shown[15, 32] == round(255 * 1350 / 1500)


def test_heat_map_ends_where_it_says() -> None:
    uri = figures.heat(np.array([[0.0, 200.0, 500.0]], np.float32), 200.0, figures.ERROR_MAP)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
    assert (pixels[0, 1] == pixels[0, 2]).all()
    assert pixels[0, 0].max() < 10 < pixels[0, 1].min()


def test_table_is_that_of_the_metrics(study: Path) -> None:
    text = page(study).text
    metrics = json.loads((study / "metrics.json").read_text())
    for row in metrics["methods"].values():
        assert f"{row['psnr']['mean']:.2f} [{row['psnr']['ci95'][0]:.2f}" in text


def test_rebuilt_report_is_the_same(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(study, tmp_path / "out")
    first = (tmp_path / "out" / "report.html").read_text()
    (tmp_path / "out" / "report.html").unlink()
    assert recon("report", tmp_path / "out") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "report.html")
    again = (tmp_path / "out" / "report.html").read_text()
    timings = re.compile(r"<tr><td>time: .*?</tr>\n?")
    assert timings.sub("", again) == timings.sub("", first)


def test_without_std_and_truth(study: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(study, out)
    shutil.rmtree(out / "std")
    shutil.rmtree(out / "truth")
    metrics = json.loads((out / "metrics.json").read_text())
    metrics["mask"] = metrics["data_range"] = None
    for row in metrics["methods"].values():
        for name in ("psnr", "ssim", "nrmse"):
            del row[name]
    (out / "metrics.json").write_text(json.dumps(metrics))
    build(out)
    text = page(out).text
    assert "No truth is known" in text
    assert "Absolute error" not in text
    assert "Std of samples" not in text


def test_damaged_output_is_refused(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(study, tmp_path / "out")
    (tmp_path / "out" / "metrics.json").write_text("{")
    assert recon("report", tmp_path / "out") == 4
    (tmp_path / "out" / "metrics.json").write_text("{}")
    assert recon("report", tmp_path / "out") == 4
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_overview_picture(study: Path, tmp_path: Path) -> None:
    assert recon("report", study, "--overview", tmp_path / "o.png", "--slice", 1) == 0
    with Image.open(tmp_path / "o.png") as picture:
        assert picture.width > 1000
    assert recon("report", study, "--overview", tmp_path / "p.png", "--slice", 2) == 4
