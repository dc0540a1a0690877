"""Many series: job lists, shards, one status a job, and what is done stays done."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_tools import recon, series, tiny_prior

from inverse.errors import InputError, NoInputError
from recon_cli import jobs

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Jobs run here and make an output at once; those of a folder 'broken' fail."""
    calls: list[list[str]] = []

    def launch(arguments: list[str]) -> tuple[int, str]:
        calls.append(arguments)
        if "broken" in arguments[2]:
            return 4, f"recon: error: '{arguments[2]}' is broken; mend it"
        if "killed" in arguments[2]:
            return -9, "recon: reading"
        out = Path(arguments[4])
        out.mkdir()
        method = {"psnr": {"mean": 31.5}, "ssim": {"mean": 0.9}, "residual_chi2": 1.1}
        (out / "metrics.json").write_text(json.dumps({"methods": {"prior": method}}))
        return 0, ""

    monkeypatch.setattr(jobs, "launch", launch)
    return calls


def listing(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def summary(out: Path, name: str = "summary.csv") -> list[dict[str, str]]:
    with (out / name).open() as stream:
        return list(csv.DictReader(stream))


def test_a_list_becomes_command_lines(tmp_path: Path) -> None:
    path = listing(
        tmp_path / "jobs.csv",
        "path,name,kind,views,slices,tv\na,first,,23,,false\nb.zip,,mri,,2:4,\n",
    )
    first, second = jobs.read_jobs(path, "ct", {"seed": "3", "views": "9"})
    assert first.arguments(Path("o")) == [
        "study", "ct", str(tmp_path / "a"), "-o", "o", "--resume", "--quiet",
        "--seed=3", "--views=23", "--no-tv",
    ]  # fmt: skip
    assert (second.name, second.kind) == ("000001", "mri")
    assert second.options == {"seed": "3", "views": "9", "slices": "2:4"}
    lines = '{"path": "a", "option": ["eta=0.5", "weight=2"], "pdf": true, "metal": 1}\n\n'
    (job,) = jobs.read_jobs(listing(tmp_path / "jobs.jsonl", lines), "ct", {})
    assert job.arguments(Path("o"))[7:] == [
        "--option=eta=0.5", "--option=weight=2", "--pdf", "--metal=1",
    ]  # fmt: skip
    folder = tmp_path / "many"
    for name in ("b", "a", ".hidden"):
        (folder / name).mkdir(parents=True)
    (folder / "c.zip").touch()
    (folder / "notes.txt").touch()
    found = jobs.read_jobs(folder, "ct", {})
    assert [job.path.name for job in found] == ["a", "b", "c.zip"]
    assert [job.name for job in found] == ["000000", "000001", "000002"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("path,name\na,x\nb,x\n", "'x' is taken twice"),
        ("path,name\na,status\n", "'status' is taken"),
        ("path,name\na,../x\n", "needs a path"),
        ("name\nx\n", "needs a path"),
        ("path,kind\na,pet\n", "kind 'pet'"),
        ("path,views\na\n", "as many cells"),
    ],
)
def test_lists_that_are_refused(tmp_path: Path, text: str, word: str) -> None:
    with pytest.raises(InputError, match=word):
        jobs.read_jobs(listing(tmp_path / "jobs.csv", text), "ct", {})


def test_other_refusals(
    tmp_path: Path, launched: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="line 1"):
        jobs.read_jobs(listing(tmp_path / "jobs.jsonl", "[1]"), "ct", {})
    with pytest.raises(NoInputError, match="lists no job"):
        jobs.read_jobs(listing(tmp_path / "none.csv", "path\n"), "ct", {})
    assert recon("study", "batch", tmp_path / "absent.csv", "-o", tmp_path / "out") == 3
    path = listing(tmp_path / "jobs.csv", "path\na\n")
    for shard in ("4/4", "1", "-1/2", "0/0"):
        assert recon("study", "batch", path, "-o", tmp_path / "out", f"--shard={shard}") == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert recon("study", "batch", path, "-o", tmp_path / "out") == 2
    assert launched == []


def test_one_status_a_job_and_a_summary(
    tmp_path: Path, launched: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = listing(tmp_path / "jobs.csv", "path,name\na,good\nbroken,bad\nkilled,dead\n")
    out = tmp_path / "out"
    assert recon("study", "batch", path, "-o", out, "--with", "views=9") == 8
    rows = {row["name"]: row for row in summary(out)}
    assert [rows[n]["state"] for n in ("good", "bad", "dead")] == ["done", "failed", "failed"]
    assert (rows["good"]["psnr"], rows["bad"]["code"]) == ("31.5", "4")
    assert rows["bad"]["error"] == "'IN' is broken; mend it"
    assert rows["dead"]["error"] == "killed by signal 9"
    assert str(tmp_path) not in (out / "status" / "bad.json").read_text()
    assert "1 done, 2 failed" in capsys.readouterr().out
    assert [call[4] for call in launched] == [str(out / n) for n in ("good", "bad", "dead")]
    # again: what is done stays done, the others are tried again
    assert recon("study", "batch", path, "-o", out, "--with", "views=9", "--quiet") == 8
    assert [Path(call[4]).name for call in launched[3:]] == ["bad", "dead"]


def test_shards_divide_the_jobs_and_one_call_sums_up(
    tmp_path: Path, launched: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = listing(tmp_path / "jobs.csv", "path\n" + "".join(f"s{k}\n" for k in range(5)))
    out = tmp_path / "out"
    for index in range(7):  # more shards than jobs: the last two have none
        assert recon("study", "batch", path, "-o", out, "--shard", f"{index}/7", "--quiet") == 0
    assert len(launched) == 5
    assert [r["name"] for r in summary(out, "summary-3-of-7.csv")] == ["000003"]
    assert not (out / "summary-5-of-7.csv").exists()
    capsys.readouterr()
    assert recon("study", "batch", path, "-o", out, "--json") == 0
    assert len(launched) == 5
    assert [r["state"] for r in summary(out)] == ["done"] * 5
    told = json.loads(capsys.readouterr().out)
    assert [job["psnr"] for job in told["jobs"]] == [31.5] * 5


def test_kills_at_either_side_of_the_end_of_a_job(
    tmp_path: Path, launched: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = listing(tmp_path / "jobs.csv", "path,name\na,x\n")
    out = tmp_path / "out"
    assert recon("study", "batch", path, "-o", out, "--quiet") == 0
    # the output stands, its status was not written
    (out / "status" / "x.json").write_text('{"name": ')
    assert recon("study", "batch", path, "-o", out, "--quiet") == 0
    assert len(launched) == 1
    assert summary(out)[0]["psnr"] == "31.5"
    # the status says done, the output is gone
    (out / "x" / "metrics.json").unlink()
    (out / "x").rmdir()
    assert recon("study", "batch", path, "-o", out, "--quiet") == 0
    assert len(launched) == 2

    def interrupted(arguments: list[str]) -> tuple[int, str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "launch", interrupted)
    (out / "x" / "metrics.json").unlink()
    (out / "x").rmdir()
    assert recon("study", "batch", path, "-o", out, "--quiet") == 130
    assert json.loads((out / "status" / "x.json").read_text())["state"] == "interrupted"


@pytest.mark.slow
def test_a_batch_in_earnest_continues_after_sigterm(tmp_path: Path) -> None:
    """Two studies in processes of their own; the first is cut short and keeps its pieces."""
    tiny_prior(tmp_path / "tiny.safetensors")
    for name, seed in (("a", 1), ("b", 2)):
        series(tmp_path / "in" / name, 40, seed=seed)
    command = [
        sys.executable, "-m", "recon_cli.app", "study", "batch", str(tmp_path / "in"), "-o",
        str(tmp_path / "out"), "--with", f"prior={tmp_path / 'tiny.safetensors'}", "--with",
        "views=8", "--with", "tv=false", "--with", "batch=1", "--with", "steps=10",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(command, cwd=REPOSITORY, env=environment)
    pieces = tmp_path / "out" / ".000000.recon-work" / "saved"
    deadline = time.monotonic() + 120
    while not list(pieces.glob("batch-*.npz")) and time.monotonic() < deadline:
        time.sleep(0.02)
    started.send_signal(signal.SIGTERM)
    assert started.wait() == 143
    kept = len(list(pieces.glob("batch-*.npz")))
    assert 0 < kept < 40
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, check=False)
    assert done.returncode == 0
    assert [row["state"] for row in summary(tmp_path / "out")] == ["done", "done"]
    run = json.loads((tmp_path / "out" / "000000" / "run.json").read_text())
    assert run["resumed"] is True
