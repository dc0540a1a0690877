"""One reconstruction by several processes: the same bits for any number, also after a death."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from cli_tools import recon, series, tiny_prior
from test_cli_resume import content

from inverse.errors import OutputError, ResourceError
from recon_cli import processes
from recon_cli.output import Batches, Saved
from recon_cli.processes import ALONE, Processes, shared_folder

REPOSITORY = Path(__file__).parent.parent
PROGRAM = """
import os, signal, sys
from recon_cli import output
from recon_cli.app import main

put = output.Saved.put

def last(self, name, *rest):
    put(self, name, *rest)
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and os.environ["RANK"] == sys.argv[1] and name.startswith("batch"):
        os.kill(os.getpid(), signal.SIGKILL)

output.Saved.put = last
sys.exit(main(sys.argv[2:]))
"""


def torchrun(
    count: int, *arguments: object, dies: int = -1, restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run ``recon`` on some processes, one of which may die after its first piece."""
    program = Path(os.environ["RECON_CACHE_DIR"]) / "program.py"
    program.write_text(PROGRAM)
    return subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts",
            str(restarts), "--nproc-per-node", str(count), str(program), str(dies),
            *map(str, arguments),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("processes")
    tiny_prior(root / "tiny.safetensors")
    series(root / "ct", 5)
    arguments = ["-o", root / "scan.h5", "--views", 8, "--quiet"]
    assert recon("simulate", "ct", root / "ct", *arguments) == 0
    return root


def reconstruct(root: Path, out: Path, *more: object) -> list[object]:
    """Three parts of at most two images."""
    return [
        "reconstruct", root / "scan.h5", "-o", out, "--prior", root / "tiny.safetensors",
        "--steps", 2, "--batch", 2, "--resume", "--quiet", *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_bits(root: Path, tmp_path: Path) -> None:
    """Two of three parts each, and four processes for three parts, after one of two died."""
    assert recon(*reconstruct(root, tmp_path / "one" / "out")) == 0
    wanted = content(tmp_path / "one" / "out")
    done = torchrun(2, *reconstruct(root, tmp_path / "two" / "out"))
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "two" / "out") == wanted
    died = torchrun(2, *reconstruct(root, tmp_path / "died" / "out"), dies=1)
    assert died.returncode != 0
    assert not (tmp_path / "died" / "out").exists()
    (hidden,) = (tmp_path / "died").iterdir()
    assert list((hidden / "saved").glob("batch-*.npz"))
    resumed = torchrun(4, *reconstruct(root, tmp_path / "died" / "out"))
    assert resumed.returncode == 0, resumed.stderr
    assert content(tmp_path / "died" / "out") == wanted
    assert json.loads((tmp_path / "died" / "out" / "run.json").read_text())["resumed"] is True


@pytest.mark.slow
def test_a_launcher_that_restarts_the_processes_finishes_the_run(
    root: Path, tmp_path: Path
) -> None:
    done = torchrun(2, *reconstruct(root, tmp_path / "out"), dies=1, restarts=1)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "run.json").read_text())["resumed"] is True
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_one_error_is_told_once(root: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    done = torchrun(2, *reconstruct(root, tmp_path / "out"))
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("recon: error")]
    assert len(told) == 1
    assert "is not empty" in told[0]


def test_a_part_is_claimed_once_a_run(tmp_path: Path) -> None:
    with shared_folder(tmp_path / "out", overwrite=False, resume=True) as work:
        assert work.processes == ALONE
        first, second = Batches(work.saved), Batches(Saved(work.saved.folder))
        assert [first.claim(0), second.claim(0), second.claim(1), first.claim(1)] == [
            True,
            False,
            True,
            False,
        ]
    with shared_folder(tmp_path / "other", overwrite=False, resume=True) as work:
        assert Batches(work.saved).claim(0)


def test_what_the_first_process_fails_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes played by one: what the first broadcasts is what the second receives."""
    wire: list[list[object]] = []

    def broadcast(self: Processes, held: list[object]) -> None:
        if self.first:
            wire.append(list(held))
        else:
            held[:] = wire.pop(0)

    monkeypatch.setattr(Processes, "_broadcast", broadcast)
    first, second = Processes(0, 2), Processes(1, 2)
    assert first.from_first(lambda: 7) == 7
    assert second.from_first(lambda: 8) == 7

    def fail() -> None:
        raise OutputError("no room")

    with pytest.raises(OutputError):
        first.from_first(fail)
    with pytest.raises(typer.Exit) as error:
        second.from_first(lambda: None)
    assert error.value.exit_code == 6


def test_a_lost_process_is_told_with_what_to_do() -> None:
    def gone() -> None:
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(ResourceError, match=r"process 1 of 2 lost another one; .*--resume"):
        Processes(1, 2)._guarded(gone)


def test_a_launcher_of_one_process_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with processes.joined() as found:
        assert found == ALONE
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert processes.local_rank() == 3
