"""``recon tune`` and ``--option``: the best options are found, recorded, and can be retyped."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import recon, series, tiny_prior

from inverse.errors import NumericalError
from recon_cli import pipeline, tune
from recon_cli.tune import Range, Values, propose

SCAN = ("--views", 8, "--matrix", 32, "--slices", "1:4:2", "--seed", 3)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tune")
    tiny_prior(root / "ct.safetensors", pixel_mm_range=(4.0, 16.0))
    tiny_prior(root / "mr.safetensors", "MR")
    series(root / "ct", 4)
    series(root / "mr", 2, modality="MR")
    return root


def ct(root: Path, out: Path, *more: object) -> list[object]:
    common = ("--prior", root / "ct.safetensors", "--method", "dds", "--steps", 2, "--quiet")
    return ["tune", "ct", root / "ct", "-o", out, *common, *SCAN, *more]


def load(path: Path) -> Any:
    return json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(f"{c} in {path}"))


SEARCH = ("--option", "weight=0.01:30", "--option", "eta=0.2,1", "--trials", 6, "--rounds", 1)


@pytest.fixture(scope="module")
def found(root: Path) -> Path:
    assert recon(*ct(root, root / "found.json", *SEARCH)) == 0
    return root / "found.json"


# --- the result --------------------------------------------------------------------------------


def test_best_has_the_largest_mean_and_study_repeats_it(
    found: Path, root: Path, tmp_path: Path
) -> None:
    document = load(found)
    result = document["tune"]
    means = [trial["psnr"]["mean"] for trial in result["trials"]]
    assert len(means) == 6
    assert max(means) - min(means) > 0.02, "the options matter here"
    best = result["trials"][int(np.argmax(means))]
    assert result["best"] == best
    assert result["complete"] is True
    for trial in result["trials"]:
        assert trial["psnr"]["mean"] == pytest.approx(np.mean(trial["per_slice"]))
        assert trial["psnr"]["ci95"][0] <= trial["psnr"]["mean"] <= trial["psnr"]["ci95"][1]
    # what is printed, typed into study, gives the same image
    typed = [word for argument in result["arguments"] for word in argument.split()]
    assert typed[:4] == ["--method", "dds", "--steps", "2"]
    common = ("--prior", root / "ct.safetensors", "--quiet", "--no-tv", *SCAN)
    assert recon("study", "ct", root / "ct", "-o", tmp_path / "s", *common, *typed) == 0
    row = load(tmp_path / "s" / "metrics.json")["methods"]["prior"]
    assert row["psnr"]["mean"] == pytest.approx(best["psnr"]["mean"], abs=1e-9)
    used = load(tmp_path / "s" / "run.json")["settings"]["reconstruction"]
    assert {name: used[name] for name in best["options"]} == best["options"]


def test_volumes_are_tuned_on_what_is_judged(root: Path, tmp_path: Path) -> None:
    """Only the missing slices are judged."""
    out = tmp_path / "t.json"
    common = ["--prior", root / "ct.safetensors", "--matrix", 32, "--steps", 2, "--quiet"]
    search = ["--missing", "1::2", "--option", "weight=1,4", "--trials", 2]
    assert recon("tune", "slices", root / "ct", "-o", out, *common, *search) == 0
    trials = load(out)["tune"]["trials"]
    assert [len(trial["per_slice"]) for trial in trials] == [2, 2]


def test_the_commands_that_scan_have_the_same_options(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, options in (
        ("ct", ["--views", "--metal-trace", "--kvp"]),
        ("mri", ["--volume", "--trajectory"]),
        ("inpaint", ["--hole", "--hole-kind"]),
        ("slices", ["--missing", "--thickness", "--slice-step"]),
    ):
        for command in ("simulate", "study", "tune"):
            assert recon(command, kind, "--help") == 0
            told = capsys.readouterr().out
            assert [name for name in options if name not in told] == [], (command, kind)


def test_file_says_what_was_searched_and_on_what(found: Path, root: Path) -> None:
    document = load(found)
    assert document["command"] == "tune ct"
    assert (document["seed"], document["prior"]["name"]) == (3, "tiny-ct")
    assert document["retrospective_simulation"] is True
    assert document["inputs"]["images"]["files"] == 4
    settings = document["settings"]
    assert settings["simulation"]["views"] == 8
    assert settings["slices"] == [1, 3]
    assert settings["search"]["options"] == [
        {"name": "weight", "low": 0.01, "high": 30.0, "whole": False, "scale": "log"},
        {"name": "eta", "values": [0.2, 1.0]},
    ]
    assert "TUNED_ON_TRUTH" in [w["code"] for w in document["warnings"]]
    assert str(root) not in json.dumps(document)


def test_second_round_stays_near_the_best_of_the_first(found: Path) -> None:
    trials = load(found)["tune"]["trials"]
    share = [math.log(t["options"]["weight"] / 0.01) / math.log(3000) for t in trials]
    first = max(range(3), key=lambda k: trials[k]["psnr"]["mean"])
    assert all(abs(u - share[first]) <= 0.26 for u in share[3:])


def test_first_trial_is_the_default_where_it_lies_in_the_ranges(found: Path) -> None:
    assert load(found)["tune"]["trials"][0]["options"] == {"weight": 6.0, "eta": 1.0}
    search = {"metric": "psnr", "trials": 4, "rounds": 0, "seed": 0}
    axes = [Range("a", 1.0, 2.0, whole=False), Values("b", (1, 2))]
    assert propose(axes, [], start={"a": 1.0, "b": 2, "c": 3}, **search) == {"a": 1.0, "b": 2}
    for start in ({"a": 0.9, "b": 2}, {"a": 1.5, "b": 3}, {"a": None, "b": 2}):
        inside = propose(axes, [], start=start, **search)
        assert inside is not None
        assert 1 <= inside["a"] <= 2
        assert inside["b"] in (1, 2)


def test_table_says_what_to_type_and_that_the_truth_chose(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ct(root, tmp_path / "t.json", "--option", "eta=0.2,1", "--trials", 5)
    arguments.remove("--quiet")
    assert recon(*arguments) == 0
    out, err = capsys.readouterr()
    result = load(tmp_path / "t.json")["tune"]
    assert len(result["trials"]) == 2, "a list of two has no third point"
    assert f"Use: --method dds --steps 2 --option eta={result['best']['options']['eta']}" in out
    assert "truth of these images" in out
    assert "Searched eta of 0.2, 1.0" in out
    assert "EXHAUSTED" in err
    assert "must not be of test patients" in err


def test_a_best_at_the_end_of_its_range_is_told(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.json"
    assert recon(*ct(root, out, "--option", "cg_iterations=1:2", "--trials", 2)) == 0
    document = load(out)
    assert {t["options"]["cg_iterations"] for t in document["tune"]["trials"]} == {1, 2}
    assert document["tune"]["at_the_end"] == ["cg_iterations"]
    assert "END_OF_RANGE" in [w["code"] for w in document["warnings"]]
    middle = Range("a", 0.1, 10.0, whole=False)
    assert [middle.ends_at(v) for v in (0.1, 0.11, 1.0, 9.9)] == [True, True, False, True]


def test_json_and_ssim(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--option", "weight=0.01,1,30", "--metric", "ssim", "--trials", 3, "--json")
    assert recon(*ct(root, tmp_path / "t.json", *more)) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["best"]["ssim"]["mean"] == max(t["ssim"]["mean"] for t in printed["trials"])
    assert printed["trials"] == load(tmp_path / "t.json")["tune"]["trials"]


def test_mri_and_inpainting(root: Path, tmp_path: Path) -> None:
    common = ("--steps", 2, "--quiet", "--trials", 2, "--slices", 0, "--rounds", 0)
    prior = ("--prior", root / "mr.safetensors")
    for scan in ("mri", "inpaint"):
        out = tmp_path / f"{scan}.json"
        more = ("--method", "dds", "--option", "weight=1,9", *common, *prior)
        assert recon("tune", scan, root / "mr", "-o", out, *more) == 0
        document = load(out)
        assert document["tune"]["best"]["psnr"]["ci95"] is None, "one slice has no interval"
        assert document["settings"]["slices"] == [0]


# --- interruption and failure ------------------------------------------------------------------


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch, *, by: type[BaseException]) -> None:
    """Let the first trials through, then raise."""
    whole, calls = pipeline.evaluate, iter(range(count))

    def evaluate(*arguments: Any) -> Any:
        if next(calls, None) is None:
            raise by("stopped by the test")
        return whole(*arguments)

    monkeypatch.setattr(tune, "evaluate", evaluate)


def test_interrupted_tune_goes_on_to_the_same_end(
    found: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "t.json"
    with monkeypatch.context() as patch:
        stop_after(4, patch, by=KeyboardInterrupt)
        assert recon(*ct(root, out, *SEARCH)) == 130
    part = load(out)["tune"]
    assert (len(part["trials"]), part["complete"]) == (4, False)
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]
    with monkeypatch.context() as patch:
        stop_after(2, patch, by=AssertionError)  # the first four are not computed again
        assert recon(*ct(root, out, *SEARCH)) == 0
    whole = load(found)["tune"]
    for mine, theirs in zip(load(out)["tune"]["trials"], whole["trials"], strict=True):
        assert mine["options"] == theirs["options"]
        assert mine["psnr"] == theirs["psnr"]
    assert load(out)["tune"]["arguments"] == whole["arguments"]


def test_unfinished_tune_of_another_question_is_left_alone(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.json"
    with monkeypatch.context() as patch:
        stop_after(1, patch, by=KeyboardInterrupt)
        assert recon(*ct(root, out, *SEARCH)) == 130
    before = out.read_bytes()
    assert recon(*ct(root, out, *SEARCH, "--views", 9)) == 6
    assert "other settings" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_a_finished_file_is_not_replaced_unless_asked(found: Path, root: Path) -> None:
    before = found.read_bytes()
    assert recon(*ct(root, found, *SEARCH)) == 6
    assert found.read_bytes() == before


def test_a_failing_trial_is_recorded_and_the_search_goes_on(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Song's lambda must lie in (0, 1]: 1.5 is refused by the method, not by the command line."""
    more = ("--method", "song", "--option", "lam=0.5,1.5", "--trials", 2, "--rounds", 0)
    arguments = ct(root, tmp_path / "t.json", *more)
    arguments.remove("--quiet")
    assert recon(*arguments) == 0
    trials = {t["options"]["lam"]: t for t in load(tmp_path / "t.json")["tune"]["trials"]}
    assert trials[1.5]["status"] == "failed"
    assert "must be a number in (0, 1]" in trials[1.5]["reason"]
    assert load(tmp_path / "t.json")["tune"]["best"]["options"] == {"lam": 0.5}
    assert "1 of 2 trials failed" in capsys.readouterr().err


def test_all_failing_is_an_error(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_after(0, monkeypatch, by=NumericalError)
    out = tmp_path / "t.json"
    assert recon(*ct(root, out, "--option", "eta=0.5,1", "--trials", 2)) == 9
    assert "all 2 trials failed" in capsys.readouterr().err
    assert load(out)["tune"]["best"] is None
    assert [t["reason"] for t in load(out)["tune"]["trials"]] == ["stopped by the test"] * 2


# --- bad input ---------------------------------------------------------------------------------

Refused = Callable[..., str]


@pytest.fixture
def refused(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    def run(*more: object, command: str = "tune") -> str:
        arguments = [command, *ct(root, tmp_path / "t.json", *more)[1:]]
        assert recon(*arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.splitlines()) == 1, err
        assert not list(tmp_path.iterdir())
        return err

    return run


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("colour=1:2", "method 'dds' has no option colour; besides steps it has eta"),
        ("steps=5:10", "give --steps"),
        ("weight=6:1", "empty range; give LOW:HIGH"),
        ("weight=2:2", "empty range"),
        ("weight=1:2:3", "is not weight=LOW:HIGH"),
        ("weight=low:high", "takes a finite number, got 'low'"),
        ("weight=1:inf", "takes a finite number, got 'inf'"),
        ("weight=1,,2", "takes a finite number, got ''"),
        ("cg_iterations=1.5:3", "takes a whole number, got '1.5'"),
        ("weight", "is not NAME=VALUE"),
        ("weight=6", "nothing to tune"),
    ],
)
def test_bad_ranges(refused: Refused, option: str, says: str) -> None:
    assert says in refused("--option", option)


def test_bad_searches(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nothing to tune" in refused()
    assert "no method 'magic'" in refused("--method", "magic", "--option", "a=1:2")
    assert "given twice" in refused("--option", "eta=0:1", "--option", "eta=1,2")
    assert "takes error or level" in refused("--method", "daps", "--option", "variance=a,b")
    assert "takes true or false" in refused("--method", "pnpdm", "--option", "balanced=1")

    from dataclasses import replace

    from inverse.posterior.methods import METHODS

    def plain(problem: Any, *, steps: int = 3) -> Any: ...

    monkeypatch.setitem(METHODS, "plain", replace(METHODS["dds"], run=plain))
    assert "has no options to tune" in refused("--method", "plain")


@pytest.mark.parametrize(
    ("option", "says"),
    [("colour=1", "has no option colour"), ("weight=1:2", "a finite number, got '1:2'")],
)
def test_bad_options_of_study(refused: Refused, option: str, says: str) -> None:
    assert says in refused("--option", option, command="study")


def test_reconstruct_takes_options_too(root: Path, tmp_path: Path) -> None:
    scan = tmp_path / "scan.h5"
    assert recon("simulate", "ct", root / "ct", "-o", scan, *SCAN, "--quiet") == 0
    arguments = ("reconstruct", scan, "-o", tmp_path / "out", "--quiet")
    prior = ("--prior", root / "ct.safetensors")
    assert recon(*arguments, *prior, "--steps", 3, "--option", "weight=2.5") == 0
    used = load(tmp_path / "out" / "run.json")["settings"]["reconstruction"]
    assert (used["weight"], used["steps"]) == (2.5, 3)


# --- the search --------------------------------------------------------------------------------


def climb(score: Callable[[dict[str, Any]], float], axes: list[Any], **search: Any) -> list[Any]:
    tried: list[Any] = []
    while len(tried) < search["trials"]:
        options = propose(axes, tried, metric="psnr", start={}, **search)
        if options is None:
            break
        tried.append({"options": options, "status": "ok", "psnr": {"mean": score(options)}})
    return tried


def test_search_finds_a_peak_and_refining_helps() -> None:
    """Peak at (0.37, 12) of a smooth hill: refined searches end nearer than an even spread."""
    axes = [Range("a", 0.0, 1.0, whole=False), Range("b", 0.1, 100.0, whole=False)]

    def loss(options: dict[str, Any]) -> float:
        return (options["a"] - 0.37) ** 2 + (math.log(options["b"] / 12) / math.log(1000)) ** 2

    def left(rounds: int, seed: int) -> float:
        tried = climb(lambda p: -loss(p), axes, trials=24, rounds=rounds, seed=seed)
        return min(loss(trial["options"]) for trial in tried)

    spread = np.mean([left(0, seed) for seed in range(8)])
    refined = np.mean([left(2, seed) for seed in range(8)])
    assert refined < 0.002
    assert refined < spread / 3


def test_a_peak_at_the_end_of_a_range_is_reached() -> None:
    for seed in range(5):
        axes = [Range("a", 0.5, 1.0, whole=False)]
        tried = climb(lambda p: p["a"], axes, trials=12, rounds=2, seed=seed)
        assert max(trial["options"]["a"] for trial in tried) == 1.0


def test_search_repeats_with_its_seed_only() -> None:
    axes = [Range("a", 0.0, 1.0, whole=False)]

    def points(seed: int) -> list[Any]:
        tried = climb(lambda p: p["a"], axes, trials=6, rounds=1, seed=seed)
        return [trial["options"]["a"] for trial in tried]

    assert points(0) == points(0)
    assert points(0) != points(1)


def test_search_covers_every_point_of_a_small_space_once() -> None:
    axes = [Range("n", 1, 5, whole=True), Values("word", ("error", "level"))]
    tried = climb(lambda p: p["n"], axes, trials=30, rounds=2, seed=0)
    points = {(t["options"]["n"], t["options"]["word"]) for t in tried}
    assert points == {(n, w) for n in range(1, 6) for w in ("error", "level")}
    assert len(tried) == 10


def test_scale_is_logarithmic_from_a_decade_on() -> None:
    log, linear = Range("a", 0.1, 10.0, whole=False), Range("a", 0.3, 1.0, whole=False)
    assert (log.scale, linear.scale) == ("log", "linear")
    assert (log.at(0.5), linear.at(0.5)) == (pytest.approx(1.0), pytest.approx(0.65))
    assert Range("a", 0.0, 10.0, whole=False).scale == "linear", "zero has no logarithm"
    for axis in (log, linear):
        assert axis.share(axis.at(0.25)) == pytest.approx(0.25, abs=1e-3)
    assert Range("a", 0.12344, 1.0, whole=False).at(0.0) == 0.12344, "never outside the range"
