"""``recon study batch``: many series, one study each, on as many machines as there are.

::

    OUT/NAME/            the study of a job, as 'recon study' writes it
    OUT/status/NAME.json how the job went; written when it begins and when it ends
    OUT/summary.csv      a row a job, of all jobs or of a shard

Each job is a process of its own, so that one that fails, is killed or runs out of memory takes no
other with it.  The same command goes on where it was cut short: what is done stays done.  Under
``torchrun`` each process takes whole jobs by their position, and the first sums up.
"""

from __future__ import annotations

import csv
import ctypes
import io
import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from recon_cli import options as o
from recon_cli.console import VERBOSITY, log, print_json, print_table
from recon_cli.errors import usage
from recon_cli.options import command, parse_pairs
from recon_cli.processes import joined, unlaunched
from recon_cli.runlog import SCHEMA_VERSION, write_json, write_whole

__all__ = ["Job", "Status", "read_jobs", "register"]

Kind = Literal["ct", "mri", "inpaint", "slices"]
_KINDS = ("ct", "mri", "inpaint", "slices")
_ENDINGS = (".zip", ".dcm", ".nii", ".nii.gz")
_SHOWN = 40  # rows of the table on the terminal

_Jobs = Annotated[
    Path,
    typer.Argument(
        metavar="JOBS",
        help="Job list (.csv, or .jsonl with one object a line), or a folder of series.",
        show_default=False,
    ),
]
_Shard = Annotated[
    str,
    typer.Option(
        "--shard",
        metavar="I/N",
        help="Every N-th job only, from the I-th on, counted from 0; for arrays of cluster jobs.",
    ),
]
_KindOption = Annotated[
    Literal["ct", "mri", "inpaint", "slices"],
    typer.Option("--kind", help="Which study, for jobs that do not say."),
]
_With = Annotated[
    list[str] | None,
    typer.Option(
        "--with",
        metavar="NAME=VALUE",
        help="An option of the study for all jobs that do not give it, such as views=23; repeat "
        "for more.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class Job:
    """One study: which series, which kind, and options of ``recon study`` by name."""

    name: str
    path: Path
    kind: Kind = "ct"
    options: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self, out: Path) -> list[str]:
        """Of ``recon``."""
        words = ["study", self.kind, str(self.path), "-o", str(out), "--resume", "--quiet"]
        for name, value in self.options.items():
            for each in value if isinstance(value, list) else [value]:
                if each is True or each == "true":
                    words.append(f"--{name}")
                elif each is False or each == "false":
                    words.append(f"--no-{name}")
                else:
                    words.append(f"--{name}={each}")
        return words


@dataclass
class Status:
    """How a job went; what ``status/NAME.json`` holds."""

    name: str
    kind: str
    state: Literal["running", "done", "failed", "interrupted"]
    started: str
    code: int | None = None
    seconds: float = 0.0
    error: str = ""
    psnr: float | None = None
    ssim: float | None = None
    residual_chi2: float | None = None
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def read(cls, path: Path) -> Status | None:
        """That of a file; ``None`` where there is none that can be read."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None


# --- the list ----------------------------------------------------------------------------------


def read_jobs(path: Path, kind: Kind, common: Mapping[str, str]) -> list[Job]:
    """The jobs of a list or of a folder.

    Rows have ``path``, relative to the list, and may have ``name``, ``kind`` and any option of
    the study; without a name they are numbered, since folder names often hold patients' names.

    Args:
        path: a ``.csv`` or ``.jsonl`` file, or a folder with a series an entry.
        kind: of jobs that do not say.
        common: options of jobs that do not give them.

    Raises:
        NoInputError: no such file, or no job in it.
        InputError: a row that is not a job, or two of one name.
    """
    from inverse.errors import InputError, NoInputError

    if path.is_dir():
        entries = sorted(p for p in path.iterdir() if not p.name.startswith("."))
        found = [p for p in entries if p.is_dir() or p.name.lower().endswith(_ENDINGS)]
        rows: list[dict[str, Any]] = [{"path": p.name} for p in found]
        base = path
    elif path.is_file():
        rows, base = list(_rows(path)), path.parent
    else:
        raise NoInputError(f"no job list or folder '{path}'")
    if not rows:
        raise NoInputError(f"'{path}' lists no job; give a row, or a folder of series")
    jobs = []
    for number, row in enumerate(rows):
        options = {k: v for k, v in row.items() if v not in ("", None)}
        where, name = options.pop("path", None), str(options.pop("name", f"{number:06d}"))
        own = options.pop("kind", kind)
        if where is None or own not in _KINDS or not re.fullmatch(r"[\w][\w.\-]*", name):
            raise InputError(
                f"job {number} of '{path}' needs a path, a kind ({', '.join(_KINDS)}) and a name "
                f"of letters, digits, '.', '-' and '_'; got kind '{own}', name '{name}'"
            )
        jobs.append(Job(name, base / str(where), own, {**common, **options}))
    names = Counter([*(job.name for job in jobs), "status"])
    if len(names) <= len(jobs):
        twice = next(name for name, times in names.items() if times > 1)
        raise InputError(f"the name '{twice}' is taken twice in '{path}'; name each job otherwise")
    return jobs


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a CSV file with a heading, or objects of JSON lines."""
    from inverse.errors import InputError

    text = path.read_text()
    if path.suffix.lower() == ".csv":
        for number, cells in enumerate(csv.DictReader(io.StringIO(text))):
            if None in cells or None in cells.values():
                raise InputError(
                    f"job {number} of '{path}' has not as many cells as the heading; correct it"
                )
            yield dict(cells)
        return
    for number, line in enumerate(filter(str.strip, text.splitlines())):
        row: Any = None
        with suppress(ValueError):
            row = json.loads(line)
        if not isinstance(row, dict):
            raise InputError(f"line {number + 1} of '{path}' is not a JSON object; correct it")
        yield row


def _parse_shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    index, count = (int(v) for v in match.groups()) if match else (0, 0)
    if not index < count:
        raise usage(f"--shard '{text}' is not I/N with I from 0 to N - 1, such as 0/4")
    return index, count


# --- running -----------------------------------------------------------------------------------


def launch(arguments: Sequence[str]) -> tuple[int, str]:
    """Run ``recon`` in a process of its own; exit code, and the last line that it told.

    A signal that ends this process ends that one too, which keeps its finished pieces.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", "recon_cli.app", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=unlaunched(),
        text=True,
        errors="replace",
        preexec_fn=_end_with_parent,
    )
    try:
        _, told = child.communicate()
    except BaseException:
        child.terminate()
        child.wait()
        raise
    lines = told.strip().splitlines()
    return child.returncode, lines[-1] if lines else ""


def _end_with_parent() -> None:
    """Have Linux end this process when its parent dies, even of what no handler can catch."""
    with suppress(OSError, AttributeError):  # other systems
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _run(job: Job, out: Path) -> Status:
    """Do one job, unless it is done."""
    target, file = out / job.name, out / "status" / f"{job.name}.json"
    before = Status.read(file)
    if before is not None and before.state == "done" and (target / "metrics.json").is_file():
        return before
    begun = time.monotonic()
    status = Status(job.name, job.kind, "running", datetime.now(UTC).isoformat(timespec="seconds"))
    write_json(file, asdict(status))
    try:
        # an output without a status stands since before a kill
        code, told = (
            (0, "") if (target / "metrics.json").is_file() else launch(job.arguments(target))
        )
    except BaseException:
        status.state = "interrupted"
        status.seconds = round(time.monotonic() - begun, 1)
        write_json(file, asdict(status))
        raise
    status.code, status.seconds = code, round(time.monotonic() - begun, 1)
    status.state = "done" if code == 0 else "failed"
    if code:
        message = told.removeprefix("recon: error: ").replace(str(job.path), "IN")
        status.error = message if code > 0 else f"killed by signal {-code}"
    else:
        measured = json.loads((target / "metrics.json").read_text())["methods"]["prior"]
        for name in ("psnr", "ssim"):
            setattr(status, name, (measured.get(name) or {}).get("mean"))
        status.residual_chi2 = measured["residual_chi2"]
    write_json(file, asdict(status))
    return status


def _summary(statuses: Sequence[Status]) -> bytes:
    """A CSV row a job."""
    stream = io.StringIO()
    names = [name for name in asdict(statuses[0]) if name != "schema_version"]
    writer = csv.DictWriter(stream, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(status) for status in statuses)
    return stream.getvalue().encode()


def register(group: typer.Typer) -> None:
    """Add the command to the group ``study``."""

    @command(
        group,
        "batch",
        examples="""
        recon study batch jobs.csv -o out
        recon study batch FOLDER_OF_SERIES -o out --kind ct --with views=23 --with tv=false
        recon study batch jobs.csv -o out --shard 3/64
        """,
    )
    def batch(
        path: _Jobs,
        out: o.Out,
        kind: _KindOption = "ct",
        common: _With = None,
        shard: _Shard = "0/1",
        as_json: o.Json = False,
    ) -> None:
        """One study a series, for many series; the same command continues and sums up."""
        index, count = _parse_shard(shard)
        jobs = read_jobs(path, kind, parse_pairs(common or [], "--with", "views=23"))
        part = jobs[index::count]
        table = out / ("summary.csv" if count == 1 else f"summary-{index}-of-{count}.csv")
        (out / "status").mkdir(parents=True, exist_ok=True)
        with joined() as processes:
            VERBOSITY.quiet |= not processes.first
            own = []
            mine = part[processes.rank :: processes.size]
            for number, job in enumerate(mine):
                status = _run(job, out)
                own.append(status)
                log(
                    f"{number + 1} of {len(mine)}: job {job.name} {status.state}"
                    + (f" ({status.error})" if status.error else "")
                )
            held = processes.to_first(own)  # waits for all of them

            def sum_up() -> bool:
                statuses = [held[k % len(held)][k // len(held)] for k in range(len(part))]
                if statuses:
                    write_whole(table, _summary(statuses))
                    log(f"wrote {table}")
                _tell(statuses, as_json)
                return all(status.state == "done" for status in statuses)

            # the others stay until it is written, as a launcher ends all when one has failed
            done = processes.from_first(sum_up)
        if not done:
            raise typer.Exit(8)


def _tell(statuses: Sequence[Status], as_json: bool) -> None:
    """The summary on stdout: JSON, or a table of all jobs, of the failed ones where many."""
    if as_json:
        print_json({"schema_version": SCHEMA_VERSION, "jobs": [asdict(s) for s in statuses]})
        return
    failed = [s for s in statuses if s.state != "done"]
    shown = statuses if len(statuses) <= _SHOWN or VERBOSITY.verbose else failed[:_SHOWN]
    rows = [
        [
            s.name,
            s.kind,
            s.state,
            f"{s.seconds:.1f}",
            "-" if s.psnr is None else f"{s.psnr:.2f}",
            "-" if s.ssim is None else f"{s.ssim:.3f}",
            s.error,
        ]
        for s in shown
    ]
    title = f"{len(statuses)} jobs, {len(statuses) - len(failed)} done, {len(failed)} failed"
    columns = ["job", "kind", "state", "seconds", "PSNR dB", "SSIM", "error"]
    print_table(title, columns, rows, left=3)
