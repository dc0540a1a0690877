"""The report: self-contained, escaped, complete, true to the pixels, and a viewer that works."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser, picture
from cli_tools import discs, recon, series, tiny_prior
from PIL import Image

from inverse.io.series import read_series
from inverse.measurement import Measurement
from inverse.operators.ct import ParallelBeam, RayTransform
from recon_cli import evidence
from recon_cli.report import build as building
from recon_cli.report import figures, pixels
from recon_cli.report.build import build, report_figures
from recon_cli.report.content import Map, Output

HOSTILE = "<script>document.title='hit'</script><img src=x onerror=\"document.title='hit'\">"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study")
    series(root / "ct", 3)
    prior = tiny_prior(
        root / "tiny.safetensors",
        training_data=({"name": HOSTILE, "licence": "CC0"},),
        limits=("fails on <b>bold</b> images",),
    )
    code = recon(
        "study", "ct", root / "ct", "-o", root / "out", "--prior", prior, "--views", 8,
        "--steps", 2, "--samples", 2, "--quiet",
    )  # fmt: skip
    assert code == 0
    return root / "out"


class Page(HTMLParser):
    """Tags, attributes and text of a page; scripts and styles apart."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.code: list[tuple[str, dict[str, str | None], str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.cdata_elem:
            self.code.append((self.cdata_elem, self.tags[-1][1], data))
        else:
            self.text += data


def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text())


def digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# --- the file ----------------------------------------------------------------------------------


def test_nothing_is_loaded_and_only_the_viewer_runs(study: Path) -> None:
    found = page(study)
    assert not {"link", "iframe", "object", "embed", "form", "base"} & {t for t, _ in found.tags}
    for _, attributes in found.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert not {"href", "style", "srcset"} & set(attributes)
        assert (attributes.get("src") or "data:").startswith("data:")
    running = [c for c in found.code if c[0] == "script" and c[1].get("type") == "module"]
    inert = {c[1].get("type") for c in found.code if c[0] == "script"} - {"module"}
    assert inert == {"application/json", "text/plain"}
    (style,) = [c[2] for c in found.code if c[0] == "style"]
    ((_, _, script),) = running
    assert not re.search(r"eval\(|new Function|innerHTML|document\.write|fetch\(|import", script)
    policies = [a["content"] for t, a in found.tags if a.get("http-equiv")]
    assert policies == [
        f"default-src 'none'; img-src data:; style-src '{digest(style)}'; "
        f"script-src '{digest(script)}'; base-uri 'none'; form-action 'none'"
    ]
    assert "<b>bold</b>" in found.text, "card texts are shown as text"
    assert HOSTILE in found.text


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
        "Lung",
        "Mediastinum",
        "Bone",
        "Brain",
        "values rounded to 1 HU",
    ):
        assert words in text


def test_still_pictures_show_the_values(study: Path) -> None:
    sources = [a["src"] for t, a in page(study).tags if t == "img" and "Reference" in a["alt"]]
    png = base64.b64decode(str(sources[0]).removeprefix("data:image/png;base64,"))
    shown = np.asarray(Image.open(io.BytesIO(png)))
    # lung window, -1350 to 150 HU: air at -1000 HU is 350/1500 of white, 5 HU is 1355/1500
    assert shown.shape == (64, 64)
    assert shown[0, 0] == round(255 * 350 / 1500)
    assert shown[15, 32] == round(255 * 1355 / 1500)


def test_heat_map_ends_where_it_says() -> None:
    uri = figures.heat(np.array([[0.0, 200.0, 500.0]], np.float32), 200.0, figures.ERROR_MAP)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
    assert (shown[0, 1] == shown[0, 2]).all()
    assert shown[0, 0].max() < 10 < shown[0, 1].min()


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
    for name in ("std", "truth", "maps"):
        shutil.rmtree(out / name)
    metrics = json.loads((out / "metrics.json").read_text())
    metrics["mask"] = metrics["data_range"] = None
    for row in metrics["methods"].values():
        for name in ("psnr", "ssim", "nrmse"):
            del row[name]
    (out / "metrics.json").write_text(json.dumps(metrics))
    build(out)
    text = page(out).text
    assert "No truth is known" in text
    assert "|error|" not in text
    assert "Std of samples" not in text
    assert "intervals keep their promise" not in text
    if CHROMIUM is not None:
        with Browser() as browser:
            browser.open(out / "report.html")
            browser.wait(f"{SHOWN} === '1'")
            browser.evaluate("document.getElementById('stage').focus()")
            for key in "procw":
                browser.key(key)
            frame(browser)
            assert browser.problems == []


def test_verdict_is_shown_with_its_reasons(study: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(study, out)

    def classes() -> list[str | None]:
        found = page(out).tags
        return [a.get("class") for _, a in found if a.get("aria-label") == "Verdict"]

    metrics = json.loads((out / "metrics.json").read_text())
    reasons = ["residual chi-square 9 for 1", HOSTILE]
    metrics["trust"] = {"light": "red", "reasons": reasons}
    (out / "metrics.json").write_text(json.dumps(metrics))
    build(out)
    found = page(out)
    assert classes() == ["card verdict red"]
    assert "Do not use" in found.text
    assert all(reason in found.text for reason in reasons)
    for none in ({"light": HOSTILE, "reasons": reasons}, {"light": "green", "reasons": []}, None):
        metrics["trust"] = none
        (out / "metrics.json").write_text(json.dumps(metrics))
        build(out)
        assert classes() == [], "a light that is unknown or without a reason is none"


def test_damaged_output_is_refused(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(study, tmp_path / "out")
    (tmp_path / "out" / "maps" / "residual.npy").write_bytes(b"none")
    assert recon("report", tmp_path / "out") == 4
    np.save(tmp_path / "out" / "maps" / "residual.npy", np.zeros((1, 64, 64), np.float16))
    assert recon("report", tmp_path / "out") == 4
    (tmp_path / "out" / "metrics.json").write_text("{")
    assert recon("report", tmp_path / "out") == 4
    (tmp_path / "out" / "metrics.json").write_text("{}")
    assert recon("report", tmp_path / "out") == 4
    assert len(capsys.readouterr().err.splitlines()) == 4


def test_overview_picture(study: Path, tmp_path: Path) -> None:
    assert recon("report", study, "--overview", tmp_path / "o.png", "--slice", 1) == 0
    with Image.open(tmp_path / "o.png") as shown:
        assert shown.width > 1000
    assert recon("report", study, "--overview", tmp_path / "p.png", "--slice", 3) == 4


def test_an_option_without_effect_is_refused(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recon("report", study, "--slice", 1) == 2
    assert "--overview" in capsys.readouterr().err
    assert recon("report", study, "--overview", tmp_path / "a.txt") == 2


def test_figures_for_papers(
    study: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(building, "PICTURES", 1)  # they take the time
    assert recon("report", study, "--figures", tmp_path / "figures") == 0
    names = {Path(line).name for line in capsys.readouterr().out.splitlines()}
    curves = {"psnr.png", "ssim.png", "nrmse.png", "residual.png", "coverage.png"}
    assert names == {"slice-0001.png"} | curves
    for name in names:
        with Image.open(tmp_path / "figures" / name) as shown:
            assert min(shown.size) > 300
            assert len(np.unique(np.asarray(shown))) > 10, "it is not blank"
    drawn = dict(report_figures(study))["residual"]
    (curve,) = [line for line in drawn.axes[0].lines if line.get_label() == "FBP"]
    metrics = json.loads((study / "metrics.json").read_text())
    assert list(curve.get_ydata()) == metrics["residual_by_group"]["methods"]["fbp"]
    (tmp_path / "file").write_text("")
    assert recon("report", study, "--figures", tmp_path / "file") == 6


@pytest.mark.parametrize("scheme", [0, 1])
def test_text_has_contrast(scheme: int) -> None:
    """WCAG 2.2, 1.4.3: 4.5 to 1 for text, on light and on dark screens."""
    style = (Path(building.__file__).parent / "report.css").read_text()
    block = style.split(":root {")[1 + scheme].split("}")[0]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6});", block))

    def luminance(name: str) -> float:
        digits = colours[name][1:]
        digits = digits if len(digits) == 6 else "".join(2 * d for d in digits)
        c = np.array([int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)])
        linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722))

    pairs = [(text, under) for text in ("ink", "soft", "green", "amber", "red")
             for under in ("paper", "card")]  # fmt: skip
    pairs += [("soft", "wash"), ("on-accent", "accent"), ("on-accent", "red")]
    for pair in pairs:
        low, high = sorted(luminance(name) for name in pair)
        assert (high + 0.05) / (low + 0.05) >= 4.5, pair


# --- pixel data --------------------------------------------------------------------------------


def test_packed_pixels_come_back(rng: np.random.Generator) -> None:
    for levels in (
        rng.integers(0, 2**16, (9, 7)).astype(np.uint16),
        np.array([[0, 65535], [65535, 0], [1, 65534]], np.uint16),
        np.zeros((1, 1), np.uint16),
    ):
        again = pixels.unpack(pixels.pack(levels), (levels.shape[0], levels.shape[1]))
        assert (again == levels).all()


def test_smooth_images_pack_well() -> None:
    """A plane costs next to nothing: the predictor sees it."""
    y, x = np.mgrid[:256, :256]
    assert len(pixels.pack((3 * x + 5 * y).astype(np.uint16))) < 2000


def test_layers_are_coarsened_until_they_fit(rng: np.random.Generator) -> None:
    noisy = rng.normal(0, 100, (4, 64, 64)).astype(np.float32)
    layers = [
        pixels.Layer.of("noisy", noisy, 1.0, 16),
        pixels.Layer.of("smooth", np.round(noisy / 50), 1.0, 16),
    ]
    whole, texts = pixels.fit(layers)
    assert [layer.step for layer in whole] == [1.0, 1.0]
    size = sum(len(text) for row in texts for text in row)
    fitted, texts = pixels.fit(layers, size * 3 // 4)
    assert sum(len(text) for row in texts for text in row) <= size * 3 // 4
    assert fitted[0].step > 1 == fitted[1].step, "the costliest layer pays"
    for layer, row in zip(fitted, texts, strict=True):
        shown = layer.base + layer.step * pixels.unpack(row[2], (64, 64)).astype(np.float64)
        assert np.abs(shown - layer.volume[2]).max() <= layer.step / 2 * (1 + 1e-9)
        assert layer.levels > pixels.unpack(row[2], (64, 64)).max()
    assert pixels.Layer.of("deep", 1e6 * noisy, 1.0, 12).step >= 1e6 * np.ptp(noisy) / 2**12


# --- what is shown -----------------------------------------------------------------------------


def output(truth: np.ndarray, mean: np.ndarray, std: np.ndarray, samples: int) -> Output:
    """An output in memory, of one method."""
    count = len(truth)
    method = {"title": "Prior", "residual_chi2": 1.0, "seconds": 1.0, "network_calls": 1}
    run: dict[str, Any] = {
        "command": "study ct", "started": "2026", "seed": 0, "device": "cpu", "argv": [],
        "versions": {"recon-sde": "0"}, "platform": "here", "timings_seconds": {}, "inputs": {},
        "warnings": [], "retrospective_simulation": True, "prior": None,
        "settings": {"label": "test", "phantom": False, "reconstruction": {"samples": samples}},
    }  # fmt: skip
    metrics: dict[str, Any] = {
        "unit": "HU", "mask": None, "data_range": None, "methods": {"prior": method},
        "per_slice": [{"slice": k, "prior": {"residual_chi2": 1.0}} for k in range(count)],
    }  # fmt: skip
    top = float(std.max())
    maps = {"std": Map("Std of samples", std, "HU", 0.01, 0.0, top, figures.STD_MAP)}
    steps = {"truth": 1.0, "prior": 1.0}
    return Output(run, metrics, truth, {"prior": mean}, steps, maps, (1.0, 1.0))


def test_coverage_of_true_samples_is_the_promised_one(rng: np.random.Generator) -> None:
    """Truth and samples of one Gaussian: t intervals hold what they promise, for any n."""
    scale = rng.uniform(5, 50, (1, 200, 200))
    truth, *samples = rng.normal(0, 1, (6, 1, 200, 200)) * scale
    mean, std = np.mean(samples, axis=0), np.std(samples, axis=0, ddof=1)
    found = output(truth.astype(np.float32), mean.astype(np.float32), std.astype(np.float32), 5)
    assert found.coverage is not None
    assert np.abs(np.subtract(found.coverage.covered, found.coverage.nominal)).max() < 1.0
    assert (np.diff(found.coverage.std) > 0).all()
    both = np.square(found.coverage.rmse).mean() / np.square(found.coverage.std).mean()
    assert both == pytest.approx(1 + 1 / 5, rel=0.03), "the mean of 5 samples errs too"


def test_residual_stands_out_where_the_data_do(rng: np.random.Generator) -> None:
    """One spoiled view has its excess in its own group; the map of pure noise has unit size."""
    geometry = ParallelBeam.sparse(12, (32, 32), 1.0)
    operator = RayTransform(geometry, (32, 32), (1.0, 1.0))
    x = torch.as_tensor(rng.uniform(0, 0.02, (1, 32, 32)), dtype=torch.float32)
    sigma = 0.05
    noise = torch.as_tensor(rng.normal(0, sigma, (1, *operator.out_shape)), dtype=torch.float32)
    clean = Measurement(operator, operator(x) + noise, torch.tensor(sigma), "CT", (1.0, 1.0), 0.02)
    fit = evidence.fit_by_group(clean, x)
    assert fit is not None
    assert fit.shape == (1, 12)
    assert fit.mean() == pytest.approx(1, abs=0.2)
    spread = evidence.residual_map(clean, x)
    assert np.sqrt(np.mean(spread**2)) == pytest.approx(1, abs=0.25)
    spoiled = noise.clone()
    spoiled[:, 7] += 4 * sigma
    wrong = replace(clean, data=operator(x) + spoiled)
    fit = evidence.fit_by_group(wrong, x)
    assert fit is not None
    assert fit[0].argmax() == 7
    assert fit[0, 7] == pytest.approx(17, abs=4), "1 + 4^2"
    brighter = evidence.residual_map(clean, x - 0.02)
    assert brighter.mean() > 3, "positive where the image is too dark"


# --- the viewer, in a browser --------------------------------------------------------------------

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
SHOWN = "document.body.dataset.slice"


@pytest.fixture(scope="module")
def viewer(study: Path) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with Browser() as browser:
        browser.open(study / "report.html")
        browser.wait(f"{SHOWN} === '1'")
        yield browser
        assert browser.problems == []
        assert browser.requests == [(study / "report.html").resolve().as_uri()]


@pytest.fixture
def fresh(viewer: Browser) -> Browser:
    """The viewer as it begins, at slice 1."""
    viewer.evaluate(
        "(() => { for (const [id, v] of [['overlay', ''], ['preset', '0']]) {"
        "const e = document.getElementById(id); e.value = v;"
        "e.dispatchEvent(new Event('change')); }"
        "document.getElementById('mode-panels').click(); document.getElementById('reset').click();"
        "document.getElementById('tool-slice').click();"
        "const s = document.getElementById('slice'); s.value = 1;"
        "s.dispatchEvent(new Event('input')); document.getElementById('stage').focus(); })()"
    )
    viewer.wait(f"{SHOWN} === '1'")
    return viewer


def frame(browser: Browser) -> None:
    """Wait until what was asked for is drawn."""
    browser.evaluate("new Promise((r) => requestAnimationFrame(() => requestAnimationFrame(r)))")


def pixel(browser: Browser, selector: str, x: float, y: float) -> list[int]:
    """Red, green and blue of a canvas at a share of its width and height."""
    frame(browser)
    return list(browser.evaluate(
        f"(() => {{ const c = document.querySelector({json.dumps(selector)});"
        f"const p = [Math.floor({x} * c.width), Math.floor({y} * c.height)];"
        "return [...c.getContext('2d').getImageData(...p, 1, 1).data].slice(0, 3); })()"
    ))  # fmt: skip


def panel(key: str) -> str:
    return f"#panels figure[data-key='{key}'] canvas"


def centre(browser: Browser, selector: str) -> tuple[float, float]:
    left, top, width, height = browser.box(selector)
    return left + width / 2, top + height / 2


def test_slices_by_keyboard_wheel_drag_touch_and_slider(fresh: Browser) -> None:
    fresh.key("ArrowDown")
    fresh.wait(f"{SHOWN} === '2'")
    fresh.key("Home")
    fresh.wait(f"{SHOWN} === '0'")
    at = centre(fresh, panel("truth"))
    fresh.mouse("mouseWheel", *at, deltaX=0, deltaY=100)
    fresh.wait(f"{SHOWN} === '2'")
    fresh.drag(at, (at[0], at[1] - 50))
    fresh.wait(f"{SHOWN} === '0'")
    points = [{"x": at[0] + dx, "y": at[1]} for dx in (0, 15, 30)]
    fresh.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=points[:1])
    fresh.send("Input.dispatchTouchEvent", type="touchMove", touchPoints=points[1:2])
    fresh.send("Input.dispatchTouchEvent", type="touchMove", touchPoints=points[2:])
    fresh.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    fresh.wait(f"{SHOWN} === '1'")
    fresh.evaluate("document.getElementById('slice').focus()")
    fresh.key("ArrowRight", code="ArrowRight", windowsVirtualKeyCode=39)
    fresh.wait(f"{SHOWN} === '2'")
    label = "document.getElementById('slice').getAttribute('aria-valuetext')"
    assert fresh.evaluate(label) == "slice 3 of 3"


def test_window_and_level(fresh: Browser, study: Path) -> None:
    value = float(read_series(study / "truth").array[1, 15, 32])
    for preset, low, high in (("0", -1350, 150), ("1", -160, 240), ("2", -770, 1730)):
        fresh.evaluate(
            f"(() => {{ const e = document.getElementById('preset'); e.value = '{preset}';"
            "e.dispatchEvent(new Event('change')); })()"
        )
        grey = round(255 * min(max((value - low) / (high - low), 0), 1))
        assert pixel(fresh, panel("truth"), 32.5 / 64, 15.5 / 64) == [grey] * 3
    fresh.evaluate("document.getElementById('tool-window').click()")
    at = centre(fresh, panel("truth"))
    width = float(fresh.evaluate("document.getElementById('width').value"))
    fresh.drag(at, (at[0] + 40, at[1]))
    assert float(fresh.evaluate("document.getElementById('width').value")) > width
    assert fresh.evaluate("document.getElementById('preset').value") == "custom"


def test_values_under_the_pointer_are_those_of_the_files(fresh: Browser, study: Path) -> None:
    left, top, width, height = fresh.box(panel("fbp"))
    row, column = 20, 41
    fresh.mouse("mouseMoved", left + (column + 0.5) / 64 * width, top + (row + 0.5) / 64 * height)
    frame(fresh)
    for key, name in (("truth", "truth"), ("fbp", "baseline-fbp"), ("prior", "recon")):
        shown = fresh.evaluate(
            f"document.querySelector(\"figure[data-key='{key}'] .value\").textContent"
        )
        assert shown == f"{read_series(study / name).array[1, row, column]:.0f} HU"


def test_swipe_shows_one_image_left_and_another_right(fresh: Browser, study: Path) -> None:
    fresh.evaluate("document.getElementById('mode-swipe').click()")
    for side, index in (("first", 0), ("second", 1)):  # reference and FBP
        fresh.evaluate(
            f"(() => {{ const e = document.getElementById('{side}'); e.value = '{index}';"
            "e.dispatchEvent(new Event('change')); })()"
        )
    images = [read_series(study / name).array[1] for name in ("truth", "baseline-fbp")]
    greys = [np.clip(np.rint(255 * (image + 1350) / 1500), 0, 255) for image in images]
    row = 20
    (left, right) = (int(np.abs(greys[0] - greys[1])[row, part].argmax()) + start
                     for part, start in ((slice(5, 27), 5), (slice(37, 59), 37)))  # fmt: skip

    def seen(column: int) -> int:
        return pixel(fresh, "#swipe-canvas", (column + 0.5) / 64, (row + 0.5) / 64)[0]

    assert (seen(left), seen(right)) == (greys[0][row, left], greys[1][row, right])
    x, y, width, height = fresh.box("#swipe-canvas")
    fresh.drag((x + width / 2, y + height / 2), (x + 0.97 * width, y + height / 2))
    assert (seen(left), seen(right)) == (greys[0][row, left], greys[0][row, right])
    fresh.evaluate("document.getElementById('stage').focus()")
    for _ in range(20):
        fresh.key("[")
    assert fresh.evaluate("document.getElementById('divider').value") == "0"
    assert (seen(left), seen(right)) == (greys[1][row, left], greys[1][row, right])
    fresh.key("c")
    assert fresh.evaluate("document.getElementById('swipe').hidden") is True


@needs_browser
@pytest.mark.parametrize("tall", [1, 3])
def test_swipe_leaves_room_for_divider_and_colour_bar(
    study: Path, tmp_path: Path, tall: int
) -> None:
    text = (study / "report.html").read_text()
    assert text.count('"spacing":[6.0,6.0]') == 1
    rows = f'"spacing":[{6.0 * tall},6.0]'
    (tmp_path / "report.html").write_text(text.replace('"spacing":[6.0,6.0]', rows))
    with Browser(1600, 900) as browser:
        browser.open(tmp_path / "report.html")
        browser.wait(f"{SHOWN} === '1'")
        browser.evaluate("document.getElementById('mode-swipe').click()")
        frame(browser)
        _, _, width, height = browser.box("#swipe-canvas")
        assert height == pytest.approx(tall * width, rel=0.01)
        bottom = "document.getElementById('position').getBoundingClientRect().bottom"
        top = "document.getElementById('viewer').getBoundingClientRect().top"
        assert browser.evaluate(f"{bottom} - {top}") < 850
        # a card of means is as high as that of the slices beside it
        means, slices = (browser.box(name)[3] for name in ("#score-means", "#score-slices"))
        assert means == pytest.approx(slices, abs=1)


def test_region_statistics_are_those_of_the_pixels(fresh: Browser, study: Path) -> None:
    fresh.evaluate("document.getElementById('tool-roi').click()")
    left, top, width, height = fresh.box(panel("truth"))
    corners = [(left + c / 64 * width, top + r / 64 * height) for r, c in ((20, 10), (44, 50))]
    fresh.drag(corners[0], corners[1])
    rows = fresh.evaluate(
        "[...document.querySelectorAll('#roi-rows tr')].map((r) => "
        "[...r.children].map((c) => c.textContent))"
    )
    parts = {name: read_series(study / name).array[1, 20:44, 10:50].astype(np.float64)
             for name in ("truth", "baseline-fbp", "baseline-tv", "recon")}  # fmt: skip
    assert [row[0] for row in rows[:5]] == ["Reference", "FBP", "TV", "Prior (pnp_admm)",
                                        "Std of samples"]  # fmt: skip
    for row, part in zip(rows, parts.values(), strict=False):
        assert float(row[1]) == pytest.approx(part.mean(), abs=0.051)
        assert float(row[2]) == pytest.approx(part.std(ddof=1), abs=0.051)
        rmse = np.sqrt(np.mean((part - parts["truth"]) ** 2))
        assert (
            row[3] == "–"
            if part is parts["truth"]
            else float(row[3]) == pytest.approx(rmse, abs=0.051)
        )
    size = fresh.evaluate("document.getElementById('roi-size').textContent")
    assert size == "n = 960 pixels, 240.0 × 144.0 mm, from column 10, row 20"


def test_profile_is_that_of_the_pixels(fresh: Browser, study: Path) -> None:
    fresh.evaluate("document.getElementById('tool-profile').click()")
    left, top, width, height = fresh.box(panel("truth"))
    ends = [(left + c / 64 * width, top + 24.5 / 64 * height) for c in (4.5, 60.5)]
    fresh.drag(*ends)
    frame(fresh)
    drawn = fresh.evaluate(
        "(() => { const s = document.getElementById('profile');"
        "const tick = [...s.querySelectorAll('text[text-anchor=end]')].map((t) => "
        "[Number(t.getAttribute('y')) - 4, Number(t.textContent)]);"
        "return [tick, [...s.querySelectorAll('polyline')].map((l) => "
        "l.getAttribute('points').split(' ').map((p) => Number(p.split(',')[1])))]; })()"
    )
    ticks, lines = drawn
    slope, offset = np.polyfit(*np.transpose(ticks), 1)
    assert len(lines) == 4
    for line, name in zip(lines, ("truth", "baseline-fbp", "baseline-tv", "recon"), strict=True):
        row = read_series(study / name).array[1, 24, 4:61]
        assert np.abs(slope * np.array(line) + offset - row).max() < 0.01 * np.ptp(row) + 1


def test_overlays_and_zoom(fresh: Browser) -> None:
    plain = {key: pixel(fresh, panel(key), 0.5, 0.5) for key in ("truth", "fbp", "prior")}
    for overlay, coloured in (("error", {"fbp", "prior"}), ("std", {"prior"}),
                              ("residual", {"prior"})):  # fmt: skip
        fresh.evaluate(
            f"(() => {{ const e = document.getElementById('overlay'); e.value = '{overlay}';"
            "e.dispatchEvent(new Event('change'));"
            "const o = document.getElementById('opacity'); o.value = 100;"
            "o.dispatchEvent(new Event('input')); })()"
        )
        changed = {key for key, was in plain.items() if pixel(fresh, panel(key), 0.5, 0.5) != was}
        assert changed == coloured
        assert fresh.evaluate("document.getElementById('legend').hidden") is False
    fresh.key("0")
    at = centre(fresh, panel("tv"))
    fresh.mouse("mouseWheel", *at, deltaX=0, deltaY=-300, modifiers=2)
    frame(fresh)
    fresh.mouse("mouseMoved", 1, 1)
    frame(fresh)
    assert fresh.evaluate("document.getElementById('position').textContent") == "zoom 2.7"
    assert fresh.evaluate(SHOWN) == "1", "zooming is not scrolling"
    fresh.evaluate("document.getElementById('reset').click()")
    for apart, kind in ((20, "touchStart"), (40, "touchMove"), (60, "touchMove")):
        points = [{"x": at[0] + side * apart / 2, "y": at[1], "id": side} for side in (-1, 1)]
        fresh.send("Input.dispatchTouchEvent", type=kind, touchPoints=points)
    fresh.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    frame(fresh)
    fresh.mouse("mouseMoved", 1, 1)
    frame(fresh)
    assert fresh.evaluate("document.getElementById('position').textContent") == "zoom 3.0"


@needs_browser
def test_payloads_do_nothing(study: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(study, out)
    run = json.loads((out / "run.json").read_text())
    run["settings"]["label"] = run["command"] = HOSTILE
    run["warnings"] = [{"code": HOSTILE, "text": HOSTILE}]
    (out / "run.json").write_text(json.dumps(run))
    metrics = json.loads((out / "metrics.json").read_text())
    for row in metrics["methods"].values():
        row["title"] = HOSTILE
    (out / "metrics.json").write_text(json.dumps(metrics))
    build(out)
    with Browser(420, 800, dark=True) as browser:
        browser.open(out / "report.html")
        browser.wait(f"{SHOWN} === '1'")
        browser.evaluate("document.getElementById('stage').focus()")
        browser.key("p")
        browser.key("r")
        frame(browser)
        assert browser.problems == []
        assert len(browser.requests) == 1
        assert "hit" not in browser.evaluate("document.title").replace("='hit'", "")
        assert browser.evaluate("document.querySelectorAll('img, b').length") == 0
        overflow = "document.documentElement.scrollWidth - window.innerWidth"
        assert browser.evaluate(overflow) <= 0, "nothing sticks out of a small screen"


@needs_browser
def test_without_scripts_there_are_pictures(study: Path) -> None:
    with Browser(scripts=False) as browser:
        browser.open(study / "report.html")
        browser.send("Emulation.setScriptExecutionDisabled", value=False)
        widths = browser.evaluate("[...document.images].map((i) => i.naturalWidth)")
        assert widths == [64] * 5
        assert browser.evaluate("document.getElementById('viewer').hidden") is True
        assert browser.problems == []


@needs_browser
@pytest.mark.slow
def test_forty_slices_of_512(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """40 slices of 512 x 512, five images and std, stay within 25 MB and work."""
    body = discs(1, 512)[0]
    volume = np.stack([np.roll(body, k, axis=1) for k in range(40)])

    def noisy(sigma: float) -> np.ndarray:
        white = rng.normal(0, sigma, (2, 512, 512)).astype(np.float32)
        return np.rint(volume + np.stack([white[k % 2] for k in range(40)]))

    found = output(noisy(15), noisy(8), np.abs(noisy(3) - volume) + 1, 8)
    method = found.metrics["methods"]["prior"]
    for name, sigma in (("fbp", 120.0), ("tv", 4.0), ("cgls", 60.0)):
        found.metrics["methods"][name] = method | {"title": name}
        found.steps[name] = 1.0  # type: ignore[index]
        found.images[name] = noisy(sigma)  # type: ignore[index]
        for entry in found.metrics["per_slice"]:
            entry[name] = {"residual_chi2": 1.0}
    monkeypatch.setattr(building, "load", lambda folder: found)
    path = build(tmp_path)
    assert path.stat().st_size < 25e6
    assert "HU (fbp" in page(tmp_path).text, "coarser steps are stated"
    with Browser() as browser:
        browser.open(path)
        browser.wait(f"{SHOWN} === '20'")
        browser.evaluate("document.getElementById('stage').focus()")
        browser.key("End")
        browser.wait(f"{SHOWN} === '39'")
        assert browser.problems == []


@needs_browser
@pytest.mark.slow
def test_picture_for_the_docs(study: Path, tmp_path: Path) -> None:
    picture(study / "report.html", tmp_path / "report.png")
    with Image.open(tmp_path / "report.png") as shown:
        assert shown.width == 1400
