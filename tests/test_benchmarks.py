"""The benchmarks' harness: what it keeps, refuses and prints; the committed results."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inverse.errors import InputError, NoInputError, OutputError, ReconError
from inverse.priors import load_prior
from phantoms.benchmarks import ct, fewstep, generalisation, harness, mri, problems
from phantoms.benchmarks.catalogue import BENCHMARKS, CalibrationSettings, LesionSettings
from phantoms.benchmarks.harness import Benchmark, half_width, page, plus_minus, read, run

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"


@dataclass(frozen=True)
class Toy:
    """Squares of these."""

    values: tuple[int, ...] = (1, 2, 3)


def toy(made: list[int], stop: int = 99) -> Benchmark:
    def square(k: int) -> harness.Row:
        if k == stop:
            raise KeyboardInterrupt
        made.append(k)
        return {"square": k * k}

    def tasks(settings: Toy) -> Iterator[tuple[str, Callable[[], harness.Row]]]:
        return ((f"{k}", lambda k=k: square(k)) for k in settings.values)

    def markdown(rows: Any) -> str:
        return harness.table(("k", "square"), [[k, str(r["square"])] for k, r in rows.items()])

    return Benchmark("toy", "Squares", "About it.", Toy(), Toy((4,)), tasks, markdown)


def test_rows_outlive_an_interruption_and_are_not_made_twice(tmp_path: Path) -> None:
    made: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        run(toy(made, stop=3), Toy(), tmp_path)
    half = read(tmp_path / "toy.json")
    assert not half.finished
    assert list(half.rows) == ["1", "2"]
    assert "Not finished" in page([toy(made)], tmp_path)
    done = run(toy(made), Toy(), tmp_path)
    assert made == [1, 2, 3]
    assert done.finished
    assert done.mode == "quick"
    assert {k: r["square"] for k, r in done.rows.items()} == {"1": 1, "2": 4, "3": 9}
    assert "| 3 | 9 |" in (tmp_path / "toy.md").read_text()
    run(toy(made), Toy(), tmp_path)
    assert made == [1, 2, 3]


def test_results_of_other_settings_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    run(toy(made), Toy((1,)), tmp_path)
    with pytest.raises(OutputError, match="of other values"):
        run(toy(made), Toy((1, 2)), tmp_path)
    run(toy(made), Toy((1, 2)), tmp_path, overwrite=True)
    assert made == [1, 1, 2]
    monkeypatch.setattr(harness, "_code", lambda: "another")
    with pytest.raises(OutputError, match="of other code"):
        run(toy(made), Toy((1, 2)), tmp_path)
    (tmp_path / "toy.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        run(toy(made), Toy((1,)), tmp_path)
    with pytest.raises(NoInputError, match="holds no result"):
        page([toy(made)], tmp_path / "nowhere")


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """SIGKILL between two rows; the file is whole and the next run makes the rest."""
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from test_benchmarks import toy, Toy, run\n"
        "class Dies(list):\n"
        "    def append(self, k):\n"
        "        if k == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "run(toy(Dies()), Toy(), Path(sys.argv[1]))\n"
    )
    died = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, check=False
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert list(read(tmp_path / "toy.json").rows) == ["1"]
    made: list[int] = []
    assert run(toy(made), Toy(), tmp_path).finished
    assert made == [2, 3]


def test_intervals() -> None:
    # 4 +- t(0.975, 2) * 1 / sqrt(3), t = 4.302653
    assert half_width([3.0, 4.0, 5.0]) == pytest.approx(2.48414, abs=1e-5)
    assert half_width([3.0]) is None
    assert plus_minus([3.0, 4.0, 5.0]) == "4.00 ± 2.48"
    assert plus_minus([3.0]) == "3.00"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ct.Settings(slices=0), "slices must be at least 1"),
        (lambda: ct.Settings(matrix=100), "multiple of 16"),
        (lambda: ct.Settings(views=(23, 0)), "views must be at least 1"),
        (lambda: ct.Settings(photons=0.0), "photons must be positive"),
        (lambda: ct.Settings(first_seed=1000), "those of training"),
        (lambda: ct.Settings(methods=("pnp_admm",)), "METHOD:CALLS"),
        (lambda: ct.Settings(methods=("sirt:20",)), "METHOD:CALLS"),
        (lambda: ct.Settings(methods=()), "at least one method"),
        (lambda: ct.Settings(acr_repeats=2), "acr_repeats must be at least 16"),
        (lambda: generalisation.Settings(accelerations=(0.5,)), "above 1"),
        (lambda: fewstep.Settings(calls=(0,)), "at least 1"),
        (lambda: fewstep.Settings(methods=("nothing",)), "no method 'nothing'"),
        (lambda: CalibrationSettings(methods=("none",)), "no none"),
        (lambda: LesionSettings(phantoms=0), "at least 1"),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ReconError, match=message):
        make()


def test_every_benchmark_names_its_rows_once() -> None:
    for benchmark in BENCHMARKS.values():
        for settings in (benchmark.quick, benchmark.full):
            if benchmark.name == "lesions":  # its slices are drawn first
                continue
            names = [name for name, _ in benchmark.tasks(settings)]
            assert len(set(names)) == len(names) > 0


def test_hu_errors_see_a_shift_and_leave_out_borders() -> None:
    truth = np.full((2, 40, 40), -800.0, np.float32)
    truth[:, :, 20:] = 40.0
    image = truth + np.where(truth < 0, 5.0, -3.0).astype(np.float32)
    image[:, :, 19:21] = 999.0  # the border of the two
    found = ct.hu_errors(image, truth, np.ones_like(truth, bool))
    assert found["lung"] == [5.0, 5.0]
    assert found["soft tissue"] == [-3.0, -3.0]
    assert found["bone"] is None


def test_calls_become_steps() -> None:
    assert problems.steps("pnp_admm", 20) == 20
    assert problems.steps("song", 200) == 100  # predictor and corrector
    assert problems.spread(10, 3) == [2, 4, 7]
    assert problems.spread(2, 3) == [0, 1]


def test_phantoms_differ_and_are_seeded() -> None:
    (body,), (again,) = (problems.chests(1, 202) for _ in range(2))
    assert body.mass == again.mass
    pixel = problems.FIELD_MM / 176  # the first chest of this seed has arms beyond the field
    assert body.image((176, 176), pixel).sum() * pixel**2 == pytest.approx(body.mass, rel=1e-4)
    with pytest.raises(ReconError, match="only 0 chests"):
        problems.chests(1, 1000)
    images, pixel = problems.brains(1, 200, 64)
    assert pixel == pytest.approx(3.6)
    assert images.min() == 0.0
    assert images[0, :4].max() == 0.0  # no scalp
    assert 0.15 < (images[0] > 0).mean() < 0.6


def test_a_case_is_judged_against_its_truth() -> None:
    settings = ct.Settings(slices=1, matrix=32, methods=("fbp",))
    case = problems.ct_case(settings, load_prior("ct-small"), 6, 1e5)
    mu = 0.0 if case.measurement.mu_water is None else case.measurement.mu_water
    shifted = torch.from_numpy(case.truth + 20.0) * (mu / 1000) + mu
    assert case.quality(shifted)["psnr"] == pytest.approx([40.0], abs=0.01)  # 20 log10(2000 / 20)
    row, x = problems.solve(case, "fbp")
    assert x is not None
    assert row["calls"] == 0


def test_gains_are_taken_slice_by_slice() -> None:
    def row(method: str, psnr: list[float], calls: int = 0) -> harness.Row:
        same = {"ssim": [1.0, 1.0], "chi2": [1.0, 1.0], "seconds": 0.0, "status": "ok"}
        return {"case": "X", "method": method, "psnr": psnr, "calls": calls, **same}

    rows = [row("fbp", [10.0, 20.0]), row("tv", [20.0, 30.0]), row("dds:8", [22.0, 31.8], 8)]
    text = problems.quality_table({r["method"]: r for r in rows})
    assert "gain on tv" in text
    # (2.0 + 1.8) / 2 +- 12.7062 * 0.1
    assert "| dds:8 | 26.90 ± 62.26 | 1.90 ± 1.27 |" in text
    assert "| fbp | 15.00 ± 63.53 | -10.00 ± 0.00 |" in text


def test_a_method_that_refuses_leaves_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Any) -> Any:
        raise ReconError("not this scan: at all")

    monkeypatch.setitem(problems.BASELINES, "fbp", refuse)
    case = problems.Case("X", *[None] * 6)  # type: ignore[arg-type]
    row, images = problems.solve(case, "fbp")
    assert images is None
    assert problems.quality_table({"x": row}).endswith(
        "| fbp | – | – | – | – | – | – | not this scan |\n"
    )


def test_the_command_lists_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from recon_cli.app import main

    assert main(["benchmark", "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["generalisation"]["full"]["views"][-1] == 180
    out = ["-o", str(tmp_path / "out")]
    for words, code, message in (
        (["ct", *out, "--option", "views=23,0"], 4, "views must be at least 1"),
        (["ct", *out, "--option", "beams=3"], 2, "no setting beams"),
        (["ct", *out, "--option", "views=many"], 2, "takes a whole number"),
        (["nothing", *out], 2, "no benchmark 'nothing'"),
        (["all", *out, "--data", "x"], 2, "for one benchmark"),
        (["ct"], 2, "give the folder"),
        (["--page", str(tmp_path / "page.md"), *out], 3, "holds no result"),
    ):
        assert main(["benchmark", *words]) == code
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_options_become_settings() -> None:
    from recon_cli.benchmark import _settings

    given = ["views=23,60", "methods=fbp,pnp_admm:8", "photons=2e4"]
    settings = _settings(BENCHMARKS["ct"], True, given, Path("some/series"))
    assert settings.views == (23, 60)
    assert settings.methods == ("fbp", "pnp_admm:8")
    assert settings.photons == 2e4
    assert settings.data == "some/series"
    labels = _settings(BENCHMARKS["calibration"], False, ["methods=mmps, 20 steps,dds"], None)
    assert labels.methods == ("mmps, 20 steps", "dds")


# --- the committed results ----------------------------------------------------------------------

COMMITTED = sorted(RESULTS.glob("*.json"))


def test_the_page_is_made_of_the_committed_results() -> None:
    assert COMMITTED
    text = (ROOT / "docs" / "results.md").read_text()
    assert text == page(BENCHMARKS.values(), RESULTS), "run 'make benchmarks'"
    for result in map(read, COMMITTED):
        assert result.finished
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", result.made["date"])
        for name, digest in result.made["priors"].items():
            assert load_prior(name).card.sha256.startswith(digest), "run 'make benchmarks'"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("ct", ("23 views, fbp", "23 views, cgls", "23 views, pnp_admm:8")),
        ("mri", ("4x, 1 coils, zero-filled", "4x, 1 coils, l1-wavelet")),
    ],
)
def test_a_rerun_lies_within_the_committed_intervals(name: str, rows: tuple[str, ...]) -> None:
    committed = read(RESULTS / f"{name}.json")
    assert committed.mode == "quick"
    benchmark = BENCHMARKS[name]
    tasks = dict(benchmark.tasks(benchmark.quick))
    for row in rows:
        found, old = tasks[row](), committed.rows[row]
        for metric in ("psnr", "ssim"):
            half = half_width(old[metric])
            assert half is not None
            assert np.mean(found[metric]) == pytest.approx(np.mean(old[metric]), abs=half)


def test_another_pattern_is_another_scan() -> None:
    settings, prior = mri.Settings(slices=1, matrix=128), load_prior("brain-small")
    a, b, c = (
        problems.mr_case(settings, prior, 4.0, coils=4, phase=1.0, seed=seed) for seed in (1, 2, 1)
    )
    assert not torch.equal(a.measurement.data != 0, b.measurement.data != 0)
    assert torch.equal(a.measurement.data, c.measurement.data)
