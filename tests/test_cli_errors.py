"""Bad input: one line on stderr, the right exit code, and nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from cli_tools import recon, series, tiny_prior

from recon_cli.judge import _leave_out_doubles
from recon_cli.runlog import RunLog


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_prior(tmp_path_factory.mktemp("prior") / "tiny.safetensors")


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return series(tmp_path_factory.mktemp("series") / "ct", 4)


class Refusal:
    """Run a command that must fail: its exit code, and the one line that it leaves."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self.capsys = root, capsys

    def __call__(self, *arguments: object) -> tuple[int, str]:
        before = sorted(self.root.rglob("*"))
        self.capsys.readouterr()
        code = recon(*arguments, "--quiet")
        out, err = self.capsys.readouterr()
        assert out == ""
        lines = err.splitlines()
        assert len(lines) == 1, err
        assert lines[0].startswith("recon: error: ")
        assert sorted(self.root.rglob("*")) == before
        return code, lines[0]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refusal:
    return Refusal(tmp_path, capsys)


def study(path: Path, out: Path, prior: Path, *more: object) -> list[object]:
    return [
        "study",
        "ct",
        path,
        "-o",
        out,
        "--prior",
        prior,
        "--matrix",
        64,
        "--steps",
        2,
        "--no-tv",
        *more,
    ]


def test_empty_folder(refused: Refusal, tmp_path: Path, prior: Path) -> None:
    (tmp_path / "in").mkdir()
    code, line = refused(*study(tmp_path / "in", tmp_path / "deep" / "out", prior))
    assert code == 3
    assert "holds no files" in line


def test_absent_folder(refused: Refusal, tmp_path: Path, prior: Path) -> None:
    code, line = refused(*study(tmp_path / "nowhere", tmp_path / "out", prior))
    assert (code, "does not exist" in line) == (3, True)


def test_two_series(refused: Refusal, tmp_path: Path, prior: Path) -> None:
    series(tmp_path / "in" / "a", 2, seed=1)
    series(tmp_path / "in" / "b", 3, seed=2)
    code, line = refused(*study(tmp_path / "in", tmp_path / "out", prior))
    assert code == 4
    assert "--series" in line
    assert "recon inspect" in line


def test_missing_slice(refused: Refusal, tmp_path: Path, ct: Path, prior: Path) -> None:
    shutil.copytree(ct, tmp_path / "in")
    (tmp_path / "in" / "0002.dcm").unlink()
    code, line = refused(*study(tmp_path / "in", tmp_path / "out", prior))
    assert code == 4
    assert "MISSING_SLICES" in line or "UNEVEN" in line


def test_truncated_file(refused: Refusal, tmp_path: Path, ct: Path, prior: Path) -> None:
    shutil.copytree(ct, tmp_path / "in")
    file = tmp_path / "in" / "0003.dcm"
    file.write_bytes(file.read_bytes()[:-3000])
    assert refused(*study(tmp_path / "in", tmp_path / "out", prior))[0] == 4


def test_not_dicom(refused: Refusal, tmp_path: Path, prior: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    code, line = refused(*study(tmp_path / "notes.txt", tmp_path / "out", prior))
    assert code == 3
    assert "no CT or MR images" in line
    assert refused("inspect", tmp_path / "notes.txt")[0] == 3


def test_prior_of_another_modality(refused: Refusal, tmp_path: Path, ct: Path) -> None:
    mr = tiny_prior(tmp_path / "mr.safetensors", "MR")
    code, line = refused(*study(ct, tmp_path / "out", mr))
    assert code == 10
    assert "MR" in line
    assert "CT" in line


def test_no_prior_for_mr(
    refused: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inverse.priors.list_priors", list)
    series(tmp_path / "in", modality="MR")
    code, line = refused("study", "mri", tmp_path / "in", "-o", tmp_path / "out")
    assert code == 10
    assert "--prior" in line


def test_modality_of_the_images(refused: Refusal, tmp_path: Path, prior: Path) -> None:
    series(tmp_path / "in", modality="MR")
    code, line = refused(*study(tmp_path / "in", tmp_path / "out", prior))
    assert code == 4
    assert "study mri" in line


def test_pickled_prior_is_refused_unopened(refused: Refusal, tmp_path: Path, ct: Path) -> None:
    class Canary:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "canary"),)

    file = tmp_path / "prior.pt"
    file.write_bytes(pickle.dumps(Canary()))
    code, line = refused(*study(ct, tmp_path / "out", file))
    assert code == 10
    assert "pickled" in line
    file.rename(tmp_path / "prior.safetensors")
    assert refused(*study(ct, tmp_path / "out", tmp_path / "prior.safetensors"))[0] == 10
    assert refused("priors", "verify", tmp_path / "prior.safetensors")[0] == 10


def test_changed_prior(refused: Refusal, tmp_path: Path, prior: Path) -> None:
    data = bytearray(prior.read_bytes())
    data[-1] ^= 1
    (tmp_path / "bad.safetensors").write_bytes(data)
    code, line = refused("priors", "verify", tmp_path / "bad.safetensors")
    assert code == 10
    assert "sha256" in line


@pytest.mark.parametrize(
    "wrong",
    [
        ["--views", "0"],
        ["--views", "many"],
        ["--method", "magic"],
        ["--geometry", "helix"],
        ["--slices", "a:b"],
        ["--slices", "0:4:0"],
        ["--no-such-option"],
    ],
)
def test_usage(refused: Refusal, tmp_path: Path, ct: Path, prior: Path, wrong: list[str]) -> None:
    code, line = refused(*study(ct, tmp_path / "out", prior, *wrong))
    assert code == 2
    assert "--help" in line


@pytest.mark.parametrize(
    "wrong", [["--slices", "10-12"], ["--slices", "0:4:0"], ["--prior", "no-such-prior"]]
)
def test_syntax_and_names_are_checked_before_anything_is_read(
    refused: Refusal, tmp_path: Path, prior: Path, wrong: list[str]
) -> None:
    given = study(tmp_path / "nowhere", tmp_path / "out", prior)
    code, line = refused(*given, *wrong)
    assert code == (10 if "--prior" in wrong else 2)
    assert wrong[-1] in line
    code, line = refused(
        "simulate", "slices", tmp_path / "nowhere", "-o", tmp_path / "m.h5", "--missing", "1-2"
    )
    assert (code, "'--missing'" in line) == (2, True)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["simulate", "ct"], "scan.txt"),
        (["convert"], "scan"),
        (["tune", "ct"], "tune.h5"),
        (["phantom", "chest"], "c1.xyz"),
    ],
)
def test_endings_of_no_format(
    refused: Refusal, tmp_path: Path, ct: Path, command: list[str], name: str
) -> None:
    given = [] if command[0] == "phantom" else [ct]
    code, line = refused(*command, *given, "-o", tmp_path / name)
    assert code == 2
    assert {"tune": ".json"}.get(command[0], ".h5") in line


def test_input_of_another_kind_is_named_with_the_command_that_takes_it(
    refused: Refusal, tmp_path: Path, ct: Path, prior: Path
) -> None:
    scan, packed, text = tmp_path / "scan.h5", tmp_path / "ct.zip", tmp_path / "a.txt"
    assert recon("simulate", "ct", ct, "-o", scan, "--views", 4, "--quiet") == 0
    shutil.make_archive(str(packed.with_suffix("")), "zip", ct)
    text.write_text("words")
    meas = tmp_path / "meas.h5"
    for command, words in (
        (["reconstruct", packed, "-o", tmp_path / "out", "--prior", prior], "recon study ct"),
        (["reconstruct", ct, "-o", tmp_path / "out", "--prior", prior], "recon study ct"),
        (["reconstruct", text, "-o", tmp_path / "out", "--prior", prior], "no measurement file"),
        (study(scan, tmp_path / "out", prior), "recon reconstruct"),
        (["simulate", "mri", scan, "-o", meas], "recon reconstruct"),
        (["convert", scan, "-o", meas], "recon reconstruct"),
        (["convert", packed, "-o", meas], "recon study ct"),
        (["convert", ct / "0001.dcm", "-o", meas], "recon study ct"),
    ):
        code, line = refused(*command)
        assert code in (3, 4), command
        assert words in line, command
        assert "damaged" not in line


def test_no_slices_left(refused: Refusal, tmp_path: Path, ct: Path, prior: Path) -> None:
    code, line = refused(*study(ct, tmp_path / "out", prior, "--slices", "7:"))
    assert (code, "numbered 0 to 3" in line) == (4, True)


def test_existing_output(refused: Refusal, tmp_path: Path, ct: Path, prior: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    assert refused(*study(ct, out, prior))[0] == 6
    code, line = refused(*study(ct, out, prior, "--overwrite"))
    assert code == 6, "--overwrite replaces earlier outputs only"
    assert "run.json" in line
    (tmp_path / "m.h5").write_text("mine")
    assert refused("simulate", "ct", ct, "-o", tmp_path / "m.h5")[0] == 6
    assert (out / "precious.txt").read_text() == "mine"


def test_overwrite_never_removes_the_input(
    refused: Refusal, tmp_path: Path, ct: Path, prior: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(ct, out / "phantom")
    (out / "run.json").write_text("{}")
    assert refused(*study(out / "phantom", out, prior, "--overwrite"))[0] == 6
    assert len(list((out / "phantom").iterdir())) == 4


def test_output_below_a_file(refused: Refusal, tmp_path: Path, ct: Path, prior: Path) -> None:
    (tmp_path / "file").write_text("")
    assert refused(*study(ct, tmp_path / "file" / "out", prior))[0] == 6


def test_absent_device(refused: Refusal, tmp_path: Path, ct: Path, prior: Path) -> None:
    code, line = refused(*study(ct, tmp_path / "out", prior, "--device", "cuda:99"))
    assert (code, "doctor" in line) == (7, True)


def test_report_of_no_output(refused: Refusal, tmp_path: Path) -> None:
    assert refused("report", tmp_path)[0] == 3


def test_damaged_measurement_file(refused: Refusal, tmp_path: Path, prior: Path) -> None:
    (tmp_path / "m.h5").write_bytes(b"not HDF5")
    arguments = ["reconstruct", tmp_path / "m.h5", "-o", tmp_path / "out", "--prior", prior]
    assert refused(*arguments)[0] == 4
    arguments[1] = tmp_path / "absent.h5"
    assert refused(*arguments)[0] == 3


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ZeroDivisionError("by\nzero"), 1, "--debug"),
        (MemoryError(), 7, "--batch"),
        (OSError(28, "No space left on device", "x.dcm"), 7, "space"),
        (RuntimeError("while serializing: I/O error: No space left (os error 28)"), 7, "space"),
        (PermissionError(13, "Permission denied", "x.dcm"), 6, "permission"),
        (OSError(5, "Input/output error"), 6, "disk"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_happens_in_the_middle(
    refused: Refusal,
    tmp_path: Path,
    ct: Path,
    prior: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    words: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("recon_cli.pipeline.write_dicom", fail)
    got, line = refused(*study(ct, tmp_path / "new" / "out", prior))
    assert (got, words in line) == (code, True)


def test_debug_shows_the_traceback(
    tmp_path: Path, ct: Path, prior: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recon(*study(ct, tmp_path / "out", prior, "--method", "magic", "--debug")) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_failed_companion_is_a_warning(
    tmp_path: Path,
    ct: Path,
    prior: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TypeError("no such thing")

    monkeypatch.setattr("recon_cli.products.write_pdf", fail)
    out = tmp_path / "out"
    assert recon(*study(ct, out, prior, "--pdf", "--slices", 0)) == 0
    assert "warning: --pdf failed (TypeError: no such thing)" in capsys.readouterr().err
    run = json.loads((out / "run.json").read_text())
    assert "NO_COMPANION" in [warning["code"] for warning in run["warnings"]]
    assert {"recon", "report.html", "metrics.json"} <= {path.name for path in out.iterdir()}


def test_half_of_a_companion_goes_and_what_is_whole_stays(
    tmp_path: Path, ct: Path, prior: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def page(folder: Path) -> Path:
        (folder / "report.pdf").write_bytes(b"%PDF-1.4")
        return folder / "report.pdf"

    def half(folder: Path, *_: object, **__: object) -> None:
        folder.mkdir()
        (folder / "0001.dcm").write_bytes(b"half")
        raise ValueError("no more")

    monkeypatch.setattr("recon_cli.report.pdf.build_pdf", page)
    monkeypatch.setattr("inverse.io.dicom.write_pdf", half)
    out = tmp_path / "out"
    assert recon(*study(ct, out, prior, "--pdf", "--slices", 0, "--quiet")) == 0
    run = json.loads((out / "run.json").read_text())
    assert "report.pdf" in run["outputs"]
    assert (out / "report.pdf").exists()
    assert not (out / "report-dicom").exists()


def test_what_the_verdict_says_is_no_warning_too(tmp_path: Path, ct: Path, prior: Path) -> None:
    out = tmp_path / "out"
    assert recon(*study(ct, out, prior, "--slices", 0, "--quiet", "--matrix", 16)) == 0
    run = json.loads((out / "run.json").read_text())
    assert any(
        reason.startswith("pixels of 24 mm") for reason in run["settings"]["verdict"]["reasons"]
    )
    assert "lie outside" in run["settings"]["reconstruction"]["status"]
    assert "PIXEL_SIZE" not in [warning["code"] for warning in run["warnings"]]


def test_a_green_light_takes_no_warning_away() -> None:
    run = RunLog("study", {})
    for code in ("PIXEL_SIZE", "RESIDUAL", "NO_STD"):
        run.warn(code, "words")
    _leave_out_doubles({"light": "green", "reasons": ["residual chi-square 1.9"]}, run)
    assert len(run.warnings) == 3
    _leave_out_doubles({"light": "red", "reasons": ["residual chi-square 9 for 1"]}, run)
    assert [warning["code"] for warning in run.warnings] == ["PIXEL_SIZE", "NO_STD"]


def test_failed_overwrite_keeps_the_earlier_output(
    refused: Refusal, tmp_path: Path, ct: Path, prior: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text('{"earlier": true}')

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("recon_cli.pipeline.write_dicom", fail)
    assert refused(*study(ct, out, prior, "--overwrite"))[0] == 7
    assert (out / "run.json").read_text() == '{"earlier": true}'
