"""Runs that are cut short: what stays, who may continue it, and that it ends in the same bits."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_tools import recon, series, tiny_prior

from inverse.operators.linop import Identity
from inverse.priors import GaussianPrior
from inverse.reconstruct import Batch, reconstruct
from inverse.sde import VE
from recon_cli import output
from recon_cli.errors import Terminated
from recon_cli.inspect import _made

HIDDEN = ".out.recon-work"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    tiny_prior(root / "tiny.safetensors")
    series(root / "ct", 4)
    arguments = ["-o", root / "scan.h5", "--views", 8, "--quiet"]
    assert recon("simulate", "ct", root / "ct", *arguments) == 0
    assert recon(*study(root, root / "whole" / "out")) == 0
    return root


def study(root: Path, out: Path, *more: object) -> list[object]:
    """Pieces: FBP, TV and two batches of two slices."""
    return [
        "study", "ct", root / "ct", "-o", out, "--prior", root / "tiny.safetensors", "--views", 8,
        "--steps", 2, "--batch", 2, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def cut(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a study leaves that was killed right after its third piece."""
    where = tmp_path_factory.mktemp("cut")
    program = (
        "import os, signal, sys\n"
        "from recon_cli import output\n"
        "from recon_cli.app import main\n"
        "put = output.Saved.put\n"
        "def last(self, *args):\n"
        "    put(self, *args)\n"
        "    if len(self) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "output.Saved.put = last\n"
        "main(sys.argv[1:])\n"
    )
    arguments = map(str, study(root, where / "out", "--quiet"))
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        check=False,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == -signal.SIGKILL
    assert [p.name for p in where.iterdir()] == [HIDDEN]
    return where / HIDDEN


@pytest.fixture
def left(cut: Path, tmp_path: Path) -> Path:
    """A copy of it for one test."""
    shutil.copytree(cut, tmp_path / HIDDEN)
    return tmp_path / HIDDEN


def timeless(value: Any) -> Any:
    """JSON without the times that a run took."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k != "seconds"}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def content(out: Path) -> dict[str, Any]:
    """Everything of an output that two runs must share: pixels, identifiers, figures."""
    from pydicom import dcmread

    found: dict[str, Any] = {"metrics": timeless(json.loads((out / "metrics.json").read_text()))}
    for path in sorted(out.rglob("*.dcm")):
        ds = dcmread(path)
        name = str(path.relative_to(out))
        found[name] = (ds.PixelData, ds.SOPInstanceUID, ds.SeriesInstanceUID)
    run = json.loads((out / "run.json").read_text())
    for name in ("settings", "inputs", "prior", "warnings"):
        found[name] = run[name]
    return found


# --- continuing --------------------------------------------------------------------------------


def test_a_killed_run_continues_to_the_same_bits(
    root: Path, left: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = json.loads((left / "manifest.json").read_text())
    manifest["started"] = "2001-02-03T12:05:06.789+00:00"
    (left / "manifest.json").write_text(json.dumps(manifest))
    made: list[str] = []
    put = output.Saved.put
    monkeypatch.setattr(
        output.Saved, "put", lambda self, name, *rest: (made.append(name), put(self, name, *rest))
    )
    out = left.parent / "out"
    assert recon(*study(root, out, "--resume")) == 0
    from pydicom import dcmread

    assert "continuing a run that was cut short, with 3 finished pieces" in capsys.readouterr().err
    assert made == ["batch-000001"], "finished pieces are not computed again"
    assert content(out) == content(root / "whole" / "out")
    assert len(content(out)) == 5 + 4 * 4
    run = json.loads((out / "run.json").read_text())
    assert run["resumed"] is True
    assert run["started"] == "2001-02-03T12:05:06+00:00", "it is the run that began then"
    assert dcmread(out / "recon" / "0001.dcm").SeriesDate == "20010203"
    assert not left.exists()


def test_a_finished_run_is_already_complete(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(root / "whole" / "out", out)
    before = content(out)
    capsys.readouterr()
    assert recon(*study(root, out, "--resume")) == 0
    assert "already complete" in capsys.readouterr().err
    assert recon(*study(root, out, "--resume", "--json", "--quiet")) == 0
    assert json.loads(capsys.readouterr().out)["methods"]["prior"]
    shutil.copy(root / "tiny.safetensors", tmp_path / "renamed.safetensors")
    renamed = ("--prior", tmp_path / "renamed.safetensors", "--quiet")
    assert recon(*study(root, out, "--resume", *renamed)) == 0
    for other in (("--seed", 1), ("--views", 9), ("--slices", "0:2"), ("--pdf",)):
        assert recon(*study(root, out, "--resume", "--quiet", *other)) == 6, other
        assert "not empty" in capsys.readouterr().err
    assert recon(*study(root, out, "--quiet")) == 6, "without --resume it is refused as ever"
    series(tmp_path / "other", 4, seed=2)
    given = study(root, out, "--resume", "--quiet")
    given[2] = tmp_path / "other"
    assert recon(*given) == 6, "other images"
    assert content(out) == before


def test_inspect_names_the_series_of_an_output(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recon("inspect", root / "whole" / "out", "--json") == 0
    stacks = json.loads(capsys.readouterr().out)["stacks"]
    assert [stack["made"] for stack in stacks] == ["FBP", "TV", "Prior (pnp_admm)", "Reference"]
    assert recon("inspect", root / "whole" / "out") == 0
    assert "Prior (pnp_admm)" in capsys.readouterr().out
    assert recon("inspect", root / "ct", "--json") == 0
    (stack,) = json.loads(capsys.readouterr().out)["stacks"]
    assert "made" not in stack


def test_nothing_but_the_own_words_is_shown() -> None:
    assert _made("RESEARCH ONLY - Prior (mmps) SMITH^JOHN STD (HU)") == "Prior (mmps) STD"
    assert _made("RESEARCH ONLY - SMITH^JOHN") == _made("SMITH TV") == _made("") == ""
    assert _made("RESEARCH ONLY - TVSMITH") == ""


def test_resume_without_anything_to_continue_is_a_run(root: Path, tmp_path: Path) -> None:
    assert recon(*study(root, tmp_path / "out", "--resume", "--no-tv", "--quiet")) == 0
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["resumed"] is False
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_damaged_piece_is_computed_again(
    root: Path, left: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    piece = left / "saved" / "batch-000000.npz"
    data = bytearray(piece.read_bytes())
    data[len(data) // 2] ^= 1
    piece.write_bytes(data)
    assert recon(*study(root, left.parent / "out", "--resume")) == 0
    assert "'batch-000000' is damaged" in capsys.readouterr().err
    assert content(left.parent / "out") == content(root / "whole" / "out")


def test_measurement_files_too(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def arguments(out: Path) -> list[object]:
        return [
            "reconstruct", root / "scan.h5", "-o", out, "--prior", root / "tiny.safetensors",
            "--steps", 2, "--samples", 2, "--batch", 3, "--resume", "--quiet",
        ]  # fmt: skip

    assert recon(*arguments(tmp_path / "whole" / "out")) == 0
    interrupt(monkeypatch, KeyboardInterrupt(), after=3)
    assert recon(*arguments(tmp_path / "out")) == 130
    monkeypatch.undo()
    assert len(list((tmp_path / HIDDEN / "saved").iterdir())) == 3
    assert recon(*arguments(tmp_path / "out")) == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole" / "out")


def test_complex_images_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    series(tmp_path / "mr", 2, modality="MR")
    prior = tiny_prior(tmp_path / "mr.safetensors", "MR")

    def arguments(out: Path) -> list[object]:
        return [
            "study", "mri", tmp_path / "mr", "-o", out, "--prior", prior, "--steps", 2, "--coils",
            2, "--acceleration", 2, "--batch", 1, "--no-tv", "--resume", "--quiet",
        ]  # fmt: skip

    assert recon(*arguments(tmp_path / "whole" / "out")) == 0
    interrupt(monkeypatch, KeyboardInterrupt(), after=3)
    assert recon(*arguments(tmp_path / "out")) == 130
    monkeypatch.undo()
    names = {p.stem for p in (tmp_path / HIDDEN / "saved").iterdir()}
    assert names == {"direct", "mri", "batch-000000"}
    assert recon(*arguments(tmp_path / "out")) == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole" / "out")


def test_batches_are_taken_and_given() -> None:
    """A run that is handed its first batch computes the others only, to the same bits."""
    n = 4
    prior = GaussianPrior(0.0, torch.eye(n * n, dtype=torch.float64), (n, n), VE(0.01, 10.0))
    from inverse.measurement import Measurement

    y = torch.randn(5, n, n)
    seen = Measurement(Identity((n, n)), y, torch.tensor(0.5), "MR", (1.0, 1.0))
    given: dict[int, Batch] = {}
    kwargs: dict[str, Any] = {"steps": 4, "batch": 2}
    whole = reconstruct(seen, prior, saved=given, **kwargs)
    assert sorted(given) == [0, 1, 2]
    calls: list[tuple[int, int]] = []
    again = reconstruct(
        seen, prior, saved={0: given[0]}, callback=lambda i, n: calls.append((i, n)), **kwargs
    )
    assert torch.equal(again.samples, whole.samples)
    assert (again.nfe, again.operator_calls) == (whole.nfe, whole.operator_calls)
    assert calls[0] == (8, 20)
    assert calls[-1] == (20, 20)


def test_a_slice_has_its_own_noise_whatever_the_others_are() -> None:
    n = 4
    prior = GaussianPrior(0.0, torch.eye(n * n, dtype=torch.float64), (n, n), VE(0.01, 10.0))
    from inverse.errors import ReconError
    from inverse.measurement import Measurement

    y = torch.randn(3, n, n)
    seen = Measurement(Identity((n, n)), y, torch.tensor(0.5), "MR", (1.0, 1.0))
    kwargs: dict[str, Any] = {"method": "dds", "steps": 4, "batch": 1}
    whole = reconstruct(seen, prior, positions=[5, 7, 9], **kwargs)
    one = reconstruct(seen.take(torch.tensor([1])), prior, positions=[7], **kwargs)
    assert torch.equal(one.samples[0], whole.samples[1])
    other = reconstruct(seen.take(torch.tensor([1])), prior, positions=[8], **kwargs)
    assert not torch.equal(one.samples, other.samples)
    with pytest.raises(ReconError, match="number the 3 slices"):
        reconstruct(seen, prior, positions=[1, 2])


def test_so_it_is_on_the_command_line(root: Path, tmp_path: Path) -> None:
    from inverse.io.dicom import read_series

    more = ["--no-tv", "--quiet", "--batch", 1, "--method", "dds"]
    assert recon(*study(root, tmp_path / "all", *more)) == 0
    assert recon(*study(root, tmp_path / "one", *more, "--slices", 3)) == 0
    whole, one = (read_series(tmp_path / name / "recon").array for name in ("all", "one"))
    np.testing.assert_array_equal(one[0], whole[3])


# --- refusals ----------------------------------------------------------------------------------


def test_a_run_that_was_cut_short_is_not_passed_over(
    root: Path, left: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = left.parent / "out"
    before = sorted(left.rglob("*"))
    assert recon(*study(root, out, "--quiet")) == 6
    (line,) = capsys.readouterr().err.splitlines()
    assert "--resume" in line
    assert "--overwrite" in line
    assert sorted(left.rglob("*")) == before
    assert recon(*study(root, out, "--overwrite", "--no-tv")) == 0
    assert "removing what a run that was cut short had left" in capsys.readouterr().err
    assert [p.name for p in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--steps", 3], "--steps (2 then, 3 now)"),
        (["--seed", 1], "--seed (0 then, 1 now)"),
        (["--batch", 3], "--batch (2 then, 3 now)"),
        (["--slices", "0:2"], "--slices"),
        (["--no-tv"], "--tv (True then, False now)"),
    ],
)
def test_other_settings_are_refused(
    root: Path, left: Path, capsys: pytest.CaptureFixture[str], more: list[object], word: str
) -> None:
    assert recon(*study(root, left.parent / "out", *more, "--resume", "--quiet")) == 6
    (line,) = capsys.readouterr().err.splitlines()
    assert word in line
    assert len(list((left / "saved").iterdir())) == 3, "the pieces stay for the right command"
    assert not (left.parent / "out").exists()


def test_other_inputs_priors_and_versions_are_refused(
    root: Path, left: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(root / "ct", tmp_path / "changed" / "ct")
    file = tmp_path / "changed" / "ct" / "0002.dcm"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    tiny_prior(tmp_path / "changed" / "tiny.safetensors", sigma_range=(0.006, 80.0))
    out = tmp_path / "out"
    assert recon(*study(tmp_path / "changed", out, "--resume", "--quiet")) == 6
    (line,) = capsys.readouterr().err.splitlines()
    assert "differs in inputs, measured data;" in line
    manifest = json.loads((left / "manifest.json").read_text())
    manifest["run"]["versions"]["torch"] = "1.0"
    manifest["run"]["prior"] = "0" * 64
    (left / "manifest.json").write_text(json.dumps(manifest))
    assert recon(*study(root, out, "--resume", "--quiet")) == 6
    assert "differs in prior, versions;" in capsys.readouterr().err
    (left / "manifest.json").unlink()
    assert recon(*study(root, out, "--resume", "--quiet")) == 6
    assert "damaged" in capsys.readouterr().err


def test_two_runs_do_not_write_to_one_place(
    root: Path, left: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = left.parent / "out"
    with output.working_folder(out, overwrite=False, resume=True) as work:
        (work.folder / "here").write_text("")
        for more in ("--resume", "--overwrite"):
            assert recon(*study(root, out, more, "--quiet")) == 6
            assert "another run is writing" in capsys.readouterr().err
        assert len(work.saved) == 3
    assert [p.name for p in out.iterdir()] == ["here"]


# --- Ctrl-C ------------------------------------------------------------------------------------


def interrupt(monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int) -> None:
    """Have a signal arrive when a number of pieces are finished."""
    put = output.Saved.put

    def stop(self: output.Saved, name: str, arrays: Any, meta: Any) -> None:
        put(self, name, arrays, meta)
        if len(self) == after:
            raise error

    monkeypatch.setattr(output.Saved, "put", stop)


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (Terminated(), 143)])
def test_signals_leave_nothing_unless_asked(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
) -> None:
    interrupt(monkeypatch, error, after=2)
    out = tmp_path / "deep" / "out"
    assert recon(*study(root, out, "--no-tv")) == code
    assert list(tmp_path.iterdir()) == []
    assert recon(*study(root, out, "--no-tv", "--resume")) == code
    assert "repeat the command with --resume" in capsys.readouterr().err
    assert {p.name for p in (out.parent / HIDDEN).iterdir()} == {"lock", "manifest.json", "saved"}
    monkeypatch.undo()
    assert recon(*study(root, out, "--no-tv", "--resume", "--quiet")) == 0
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_signals_do_not_cut_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = output._exchange

    def late(*paths: Path) -> bool:
        os.kill(os.getpid(), signal.SIGINT)
        return exchange(*paths)

    monkeypatch.setattr(output, "_exchange", late)
    out = tmp_path / "out"
    out.mkdir()
    with output.output_folder(out, overwrite=True) as folder:
        (folder / "run.json").write_text("new")
    assert (out / "run.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


# --- the last step -----------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", [True, False])
def test_an_earlier_output_is_whole_until_the_new_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text("old")
    seen: list[str] = []
    sync = output.sync

    def look(path: Path) -> None:
        seen.append((out / "run.json").read_text())
        sync(path)

    monkeypatch.setattr(output, "sync", look)
    if not exchange:
        monkeypatch.setattr(output, "_exchange", lambda *_: False)
    with output.output_folder(out, overwrite=True) as folder:
        (folder / "run.json").write_text("new")
        (folder / "recon").mkdir()
        (folder / "recon" / "0001.dcm").write_text("pixels")
    assert seen == ["old"] * 4 + ["new"], "all files are on disk before the name is given"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_names_are_exchanged_in_one_step(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    (a / "of a").mkdir(parents=True)
    (b / "of b").mkdir(parents=True)
    if not output._exchange(a, b):
        pytest.skip("this system cannot exchange two names in one step")
    assert (a / "of b").is_dir()
    assert (b / "of a").is_dir()


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    old = tmp_path / HIDDEN / "old"
    old.mkdir(parents=True)
    (old / "run.json").write_text("old")
    from inverse.errors import OutputError

    with pytest.raises(OutputError, match="not empty"):
        output.output_folder(tmp_path / "out", overwrite=False).__enter__()
    assert (tmp_path / "out" / "run.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    from inverse.errors import OutputError

    (tmp_path / "precious" / "out").mkdir(parents=True)
    (tmp_path / HIDDEN).symlink_to(tmp_path / "precious")
    with pytest.raises(OutputError, match="is a link"):
        output.output_folder(tmp_path / "out", overwrite=True).__enter__()
    assert (tmp_path / "precious" / "out").is_dir()


def test_output_may_be_read_by_whom_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with output.output_folder(tmp_path / "out", overwrite=False) as folder:
            assert folder.parent.stat().st_mode & 0o777 == 0o700, "private while it is made"
            np.save(folder / "x.npy", np.zeros(3))
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
