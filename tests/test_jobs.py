"""Many series: job lists, shards, one status a job, and what is done stays done."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cli_tools import recon, series, tiny_prior

from inverse.errors import InputError, NoInputError
from recon_cli import jobs, processes

REPOSITORY = Path(__file__).parent.parent
PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
from recon_cli import jobs, processes
from recon_cli.app import main

def launch(arguments):
    out = Path(arguments[4])
    with (out.parent / "calls").open("a") as stream:
        stream.write(f"{os.environ['RANK']} {out.name}\\n")
    if out.name == sys.argv[1]:  # the jobs before it, of both processes, are done
        while len(list(out.parent.glob("*/metrics.json"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)
    if out.name == "bad":
        return 4, "recon: error: it is broken; mend it"
    if out.name == sys.argv[2]:  # at work when the other one dies
        time.sleep(60)
    method = {"psnr": {"mean": 31.5}, "ssim": {"mean": 0.9}, "residual_chi2": 1.1}
    out.mkdir()
    (out / "metrics.json").write_text(json.dumps({"methods": {"prior": method}}))
    return 0, ""

jobs.launch = launch
sys.exit(main(sys.argv[3:]))
"""


def torchrun(folder: Path, out: Path, dies: str = "", works: str = "", *more: str) -> str:
    """``study batch`` of the list in a folder on two processes; what they told."""
    (folder / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            str(folder / "program.py"), dies, works, "study", "batch", str(folder / "jobs.csv"),
            "-o", str(out), *more,
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    return f"code {done.returncode}\n{done.stdout}\n{done.stderr}"


def calls(out: Path) -> list[tuple[str, str]]:
    """Which process began which job, in the order of the names."""
    text = (out / "calls").read_text()
    (out / "calls").unlink()
    return sorted((name, rank) for rank, name in map(str.split, text.splitlines()))


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


def test_other_refusals(tmp_path: Path, launched: list[list[str]]) -> None:
    with pytest.raises(InputError, match="line 1"):
        jobs.read_jobs(listing(tmp_path / "jobs.jsonl", "[1]"), "ct", {})
    with pytest.raises(NoInputError, match="lists no job"):
        jobs.read_jobs(listing(tmp_path / "none.csv", "path\n"), "ct", {})
    assert recon("study", "batch", tmp_path / "absent.csv", "-o", tmp_path / "out") == 3
    path = listing(tmp_path / "jobs.csv", "path\na\n")
    for shard in ("4/4", "1", "-1/2", "0/0"):
        assert recon("study", "batch", path, "-o", tmp_path / "out", f"--shard={shard}") == 2
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


def test_jobs_are_no_part_of_the_launchers_run(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = {
        "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1",
        "GROUP_RANK": "0", "ROLE_NAME": "default", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = processes.unlaunched()
    assert not set(launcher) & set(found)
    assert found["OMP_NUM_THREADS"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in found
    # a GPU each, of those that the launcher left
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert processes.unlaunched()["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert processes.unlaunched()["CUDA_VISIBLE_DEVICES"] == "5"

    class Child:
        """Takes the place of `subprocess.Popen`."""

        returncode = 0

        def __init__(self, command: list[str], **options: object) -> None:
            given.append(options["env"])

        def communicate(self) -> tuple[None, str]:
            return None, ""

    given: list[object] = []
    monkeypatch.setattr(subprocess, "Popen", Child)
    assert jobs.launch(["study"]) == (0, "")
    assert given == [processes.unlaunched()]


@pytest.mark.slow
def test_two_processes_share_the_jobs_by_position(tmp_path: Path) -> None:
    """A job that fails, a process that dies at work, and the same command once more."""
    names = ["a", "b", "bad", "d", "e"]
    listing(tmp_path / "jobs.csv", "path,name\n" + "".join(f"p{n},{n}\n" for n in names))
    out = tmp_path / "out"
    # the second process dies in its second job, while the first is in its third
    assert "Signal 9" in torchrun(tmp_path, out, "d", "e")
    assert calls(out) == [("a", "0"), ("b", "1"), ("bad", "0"), ("d", "1"), ("e", "0")]
    states = {p.stem: json.loads(p.read_text())["state"] for p in (out / "status").iterdir()}
    assert states == {
        "a": "done", "b": "done", "bad": "failed", "d": "running", "e": "interrupted",
    }  # fmt: skip
    assert not (out / "summary.csv").exists()
    # what is done stays done; the code of a failed job reaches the launcher
    told = torchrun(tmp_path, out)
    assert calls(out) == [("bad", "0"), ("d", "1"), ("e", "0")]
    assert told.count("4 done, 1 failed") == 1
    assert "exitcode  : 8" in told
    assert [(r["name"], r["state"]) for r in summary(out)] == [
        (n, "failed" if n == "bad" else "done") for n in names
    ]
    # shards go on being shards: jobs 1 and 3 of five, one a process
    torchrun(tmp_path, tmp_path / "shard", "", "", "--shard", "1/2")
    assert calls(tmp_path / "shard") == [("b", "0"), ("d", "1")]
    assert [r["name"] for r in summary(tmp_path / "shard", "summary-1-of-2.csv")] == ["b", "d"]


@pytest.mark.slow
@pytest.mark.parametrize(("cut", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_batch_in_earnest_continues_after_a_signal(
    cut: signal.Signals, code: int, tmp_path: Path
) -> None:
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
    started.send_signal(cut)
    assert started.wait() == code
    deadline = time.monotonic() + 60
    with (pieces.parent / "lock").open("rb") as lock:  # the study ends with the batch
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                assert time.monotonic() < deadline, "the study outlived its batch"
                time.sleep(0.05)
    kept = len(list(pieces.glob("batch-*.npz")))
    assert 0 < kept < 40
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, check=False)
    assert done.returncode == 0
    assert [row["state"] for row in summary(tmp_path / "out")] == ["done", "done"]
    run = json.loads((tmp_path / "out" / "000000" / "run.json").read_text())
    assert run["resumed"] is True
