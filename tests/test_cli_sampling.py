"""``recon sample`` and ``recon likelihood``, on tiny images with an untrained prior."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import SIZE, discs, recon, series, tiny_prior

from inverse.sampling import SAMPLERS


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    tiny_prior(root / "ct.safetensors")
    tiny_prior(root / "mr.safetensors", "MR")
    series(root / "ct", 3)
    series(root / "mr", 2, modality="MR")
    return root


def quick(root: Path, out: Path, *more: object) -> int:
    prior = root / "ct.safetensors"
    return recon("sample", "-o", out, "--prior", prior, "--matrix", 16, "-q", *more)


def score(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    capsys.readouterr()
    assert recon("likelihood", *arguments, "--json", "--steps", 3, "-q") == 0
    return json.loads(capsys.readouterr().out, parse_constant=lambda c: pytest.fail(c))


def refused(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    """The message of a command that fails with ``code``."""
    capsys.readouterr()
    assert recon(*arguments) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = [x for x in shown.err.splitlines() if x.startswith("recon: error:")]
    return line


# --- sample ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_every_sampler_draws(root: Path, sampler: str, capsys) -> None:
    out = root / f"s-{sampler}"
    steps = ["--option", "rtol=0.1", "--option", "atol=0.1"] if sampler == "rk45" else []
    steps = steps or ["--steps", 30]
    assert quick(root, out, "-n", 2, "--sampler", sampler, "--json", *steps) == 0
    told = json.loads(capsys.readouterr().out)
    assert {p.name for p in out.iterdir()} == {"samples.npz", "samples.png", "run.json"}
    with np.load(out / "samples.npz", allow_pickle=False) as file:
        assert file["images"].shape == (2, 16, 16)
        assert np.isfinite(file["images"]).all()
        assert float(file["pixel_mm"]) == 1.5
        assert (str(file["modality"]), str(file["unit"])) == ("CT", "HU")
    run = json.loads((out / "run.json").read_text())
    assert run["settings"]["sampler"] == sampler
    assert run["prior"]["name"] == "tiny-ct"
    assert told["network_calls"] == run["settings"]["network_calls"]
    if sampler != "rk45":
        assert abs(told["network_calls"] - 30 * SAMPLERS[sampler].calls_per_step) <= 1


def test_samples_depend_on_the_seed_and_not_on_the_batch(root: Path) -> None:
    def draw(name: str, *more: object) -> np.ndarray:
        out = root / name
        assert quick(root, out, "-n", 3, "--steps", 4, "--sampler", "pc", *more) == 0
        with np.load(out / "samples.npz") as file:
            return file["images"]

    a, b, c = draw("a"), draw("b", "--batch", 2), draw("c", "--seed", 1)
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=0.5)
    assert np.abs(a - c).mean() > 10


@pytest.mark.parametrize("sde", ["vp", "subvp"])
def test_other_processes_stay_within_the_noise_of_training(root: Path, sde: str) -> None:
    out = root / f"sde-{sde}"
    assert quick(root, out, "-n", 1, "--steps", 4, "--sde", sde) == 0
    levels = json.loads((out / "run.json").read_text())["settings"]["levels"]
    assert levels[0] <= 80.0
    assert levels[1] >= 0.005


def test_the_list_of_samplers(capsys) -> None:
    assert recon("sample", "--list") == 0
    table = capsys.readouterr().out
    for name in SAMPLERS:
        assert name in table


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--sampler", "nuts"], "no sampler 'nuts'; there are langevin"),
        (["--sampler", "rk45", "--steps", 3], "sampler 'rk45' has no option steps"),
        (["--option", "eta"], "is not NAME=VALUE"),
        (["--sampler", "ddim", "--option", "eta=much"], "eta takes a finite number, got 'much'"),
    ],
)
def test_usage_of_sample(root: Path, arguments, text: str, capsys) -> None:
    line = refused(capsys, 2, "sample", "-o", root / "never", *arguments)
    assert text in line
    assert not (root / "never").exists()


def test_samples_that_diverge_are_exit_9(root: Path, capsys) -> None:
    prior = root / "ct.safetensors"
    line = refused(
        capsys, 9, "sample", "-o", root / "never", "--prior", prior, "--matrix", 16, "-n", 1,
        "--sampler", "langevin", "--option", "epsilon=100", "-q",
    )  # fmt: skip
    assert "lower epsilon" in line
    assert not (root / "never").exists()


def test_an_earlier_output_is_not_replaced(root: Path, capsys) -> None:
    assert quick(root, root / "kept", "-n", 1, "--steps", 2) == 0
    assert "not empty" in refused(capsys, 6, "sample", "-o", root / "kept", "-q")
    assert quick(root, root / "kept", "-n", 1, "--steps", 2, "--overwrite") == 0


# --- likelihood --------------------------------------------------------------------------------


def test_likelihood_of_a_series(root: Path, capsys) -> None:
    prior = root / "ct.safetensors"
    result = score(capsys, root / "ct", "--prior", prior, "--slices", "0:3:2", "--probes", 3)
    assert [row["slice"] for row in result["slices"]] == [0, 2]
    assert result["pixel_mm"] == pytest.approx(6.0)
    assert result["flags"] == []
    for row in result["slices"]:
        assert row["status"] == "ok"
        assert row["network_calls"] == 7
        # an untrained network is a white Gaussian, whose Jacobian is diagonal
        assert row["bits_standard_error"] == 0.0
        # bins of 1 HU: bits and nats are the same density
        expected = -row["nats"] / SIZE**2 / math.log(2)
        assert row["bits_per_dim"] == pytest.approx(expected)
    # a bin of half the width costs one bit more, but for the noise that fills it
    half = score(capsys, root / "ct", "--prior", prior, "--slices", "0", "--bin", 0.5)
    assert half["slices"][0]["bits_per_dim"] == pytest.approx(
        result["slices"][0]["bits_per_dim"] + 1, abs=0.1
    )


def test_bits_of_a_white_gaussian(root: Path, capsys) -> None:
    """The untrained network's prior is N(0, 1) in units of 500 HU about -500 HU, exactly."""
    capsys.readouterr()
    arguments = ["--solver", "rk45", "--tolerance", 1e-4, "--slices", "0", "--json", "-q"]
    assert recon("likelihood", root / "ct", "--prior", root / "ct.safetensors", *arguments) == 0
    (row,) = json.loads(capsys.readouterr().out)["slices"]
    x = (discs(1).astype(np.float64) + 500) / 500
    nats = -(0.5 * x**2 + 0.5 * math.log(2 * math.pi) + math.log(500)).sum()
    assert row["nats"] == pytest.approx(nats, rel=1e-3)
    assert row["bits_per_dim"] == pytest.approx(-nats / SIZE**2 / math.log(2), rel=1e-3)
    assert row["bits_standard_error"] is None


def test_a_slices_likelihood_does_not_depend_on_its_batch(root: Path, capsys) -> None:
    prior = root / "ct.safetensors"
    whole = score(capsys, root / "ct", "--prior", prior)["slices"]
    alone = score(capsys, root / "ct", "--prior", prior, "--slices", "1", "--batch", 1)["slices"]
    assert alone[0]["nats"] == pytest.approx(whole[1]["nats"], rel=1e-5)


def test_likelihood_of_own_samples(root: Path, capsys) -> None:
    assert quick(root, root / "own", "-n", 2, "--steps", 4, "--pixel-mm", 6) == 0
    result = score(capsys, root / "own" / "samples.npz", "--prior", root / "ct.safetensors")
    assert len(result["slices"]) == 2
    assert result["pixel_mm"] == 6.0
    assert result["unit"] == "HU"


def test_fine_pixels_are_averaged(root: Path, capsys) -> None:
    np.savez(root / "fine.npz", a=discs(1), pixel_mm=2.0, modality="CT")
    result = score(capsys, root / "fine.npz", "--prior", root / "ct.safetensors")
    assert result["matrix"] == [SIZE // 2, SIZE // 2]
    assert result["pixel_mm"] == 4.0
    assert result["flags"] == []


def test_likelihood_of_mr_is_relative_to_its_brightest(root: Path, capsys) -> None:
    """The same images in other units of signal have the same nats, up to the change of units."""
    prior = root / "mr.safetensors"
    image = discs(1) + 1000
    results = []
    for k, scale in enumerate((1.0, 10.0)):
        np.savez(root / f"mr{k}.npz", a=scale * image, pixel_mm=6.0, modality="MR")
        out = score(capsys, root / f"mr{k}.npz", "--prior", prior, "--bin", scale)
        results.append(out["slices"][0]["bits_per_dim"])
    assert results[0] == pytest.approx(results[1], abs=1e-3)
    assert score(capsys, root / "mr", "--prior", prior)["unit"] == "signal"


def test_what_does_not_fit_the_prior_is_flagged(root: Path, capsys) -> None:
    prior = root / "ct.safetensors"
    image = discs(2)
    image[1, :10, :10] = 9000
    np.savez(root / "odd.npz", a=image)
    result = score(capsys, root / "odd.npz", "--prior", prior)
    assert result["slices"][0]["status"] == "ok"
    assert "2.4 % of the pixels lie outside" in result["slices"][1]["status"]
    assert "-1000 to 1000 HU" in result["slices"][1]["status"]
    assert any("pixel size is unknown" in flag for flag in result["flags"])
    assert any("modality is unknown" in flag for flag in result["flags"])
    far = score(capsys, root / "odd.npz", "--prior", prior, "--pixel-mm", 30)
    assert any("30 mm lie outside the prior's 4 to 8 mm" in flag for flag in far["flags"])
    assert recon("likelihood", root / "odd.npz", "--prior", prior, "--steps", 2, "-q") == 0
    table = capsys.readouterr().out
    assert "bits/dim" in table
    assert "warning: the pixel size is unknown" in table


def test_input_that_cannot_be_scored(root: Path, capsys, tmp_path: Path) -> None:
    prior = ["--prior", root / "ct.safetensors", "-q"]

    def line(code: int, path: Path, *more: object) -> str:
        return refused(capsys, code, "likelihood", path, *(more or prior))

    mr = root / "mr.safetensors"
    assert "is for MR images, the input is CT" in line(10, root / "ct", "--prior", mr, "-q")
    assert "does not exist" in line(3, tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    assert "not a readable .npz" in line(4, tmp_path / "text.npz")
    np.savez(tmp_path / "two.npz", a=discs(1), b=discs(1))
    assert "found 2" in line(4, tmp_path / "two.npz")
    np.savez(tmp_path / "empty.npz", a=discs(1)[:0])
    assert "holds no images" in line(3, tmp_path / "empty.npz")
    image = discs(1)
    image[0, 0, 0] = np.nan
    np.savez(tmp_path / "nan.npz", a=image)
    assert "1 values of the images are not finite" in line(4, tmp_path / "nan.npz")
    np.savez(tmp_path / "dark.npz", a=0 * discs(1), modality="MR")
    assert "no signal above 0" in line(4, tmp_path / "dark.npz", "--prior", mr, "-q")
