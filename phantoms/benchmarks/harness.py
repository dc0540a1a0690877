r"""What all benchmarks share: settings, rows that outlive an interruption, tables, one page.

A benchmark is a list of named rows, each made by a function without arguments.  The rows that a
result file lacks are made and written one by one, so that a run that was cut short goes on where
it stopped.  A file belongs to its settings, code and priors: rows of others are never mixed in.

Intervals are those of :func:`inverse.metrics.ci95`, Student's of the mean over slices.  Those of
phantoms are of different bodies, so they are independent.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

import inverse
import phantoms
from inverse.errors import InputError, NoInputError, OutputError, ReconError
from inverse.metrics import ci95
from inverse.priors import load_prior

__all__ = [
    "Benchmark",
    "Result",
    "Row",
    "Task",
    "check",
    "half_width",
    "page",
    "plus_minus",
    "read",
    "run",
    "table",
    "without_repeats",
]

SCHEMA = 1

Row = dict[str, Any]
"""What a task finds: plain JSON values."""
Task = tuple[str, Callable[[], Row]]
"""A row's name, and what makes it."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark by its parts.

    Attributes:
        name: of the command line and of the files.
        title: heading.
        about: Markdown under the heading: what is measured, and how to read it.
        quick: settings that take about two minutes on two cores; a frozen dataclass that refuses
            impossible values.
        full: settings of a published number.
        tasks: settings to the rows' names and makers, in the order of the table.
        markdown: rows by name to Markdown tables.
        figure: rows by name and the PNG to draw; default none.
    """

    name: str
    title: str
    about: str
    quick: Any
    full: Any
    tasks: Callable[[Any], Iterable[Task]]
    markdown: Callable[[Mapping[str, Row]], str]
    figure: Callable[[Mapping[str, Row], Path], None] | None = None


@dataclass(frozen=True)
class Result:
    """A result file.

    Attributes:
        benchmark: name of the benchmark.
        mode: ``"quick"``, ``"full"`` or ``"custom"``.
        finished: whether all rows are there.
        made: date, machine, and what the numbers depend on.
        settings: resolved settings.
        rows: rows by name.
    """

    benchmark: str
    mode: str
    finished: bool
    made: Mapping[str, Any]
    settings: Mapping[str, Any]
    rows: Mapping[str, Row]

    @property
    def identity(self) -> dict[str, Any]:
        """Whatever the numbers depend on, by name."""
        return {**self.settings, **{k: self.made[k] for k in ("versions", "code", "priors")}}


def run(
    benchmark: Benchmark,
    settings: Any,
    folder: Path,
    *,
    overwrite: bool = False,
    log: Callable[[str], None] = lambda text: None,
) -> Result:
    """Make the rows that ``folder`` lacks; write ``NAME.json``, ``NAME.md`` and ``NAME.png``.

    Args:
        benchmark: what to run.
        settings: of the type of ``benchmark.quick``.
        folder: where results lie.
        overwrite: replace a result of other settings, code or priors.
        log: told of each row that is finished.

    Raises:
        OutputError: a result of other settings, code or priors is there.
        InputError: the file there is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{benchmark.name}.json"
    tasks = list(benchmark.tasks(settings))
    result = _fresh(benchmark, settings)
    if path.exists():
        result = _continued(path, result, overwrite)
    rows = dict(result.rows)
    for number, (name, make) in enumerate(tasks, start=1):
        if name in rows:
            continue
        rows[name] = make()
        rows = {key: rows[key] for key, _ in tasks if key in rows}
        result = Result(**{**vars(result), "rows": rows, "finished": len(rows) == len(tasks)})
        _write(path, json.dumps(vars(result), indent=1, allow_nan=False) + "\n")
        log(f"{benchmark.name} {number}/{len(tasks)}: {name}")
    if benchmark.figure is not None:
        benchmark.figure(result.rows, path.with_suffix(".png"))
    _write(path.with_suffix(".md"), section(benchmark, result, "."))
    return result


def read(path: Path) -> Result:
    """A result file.

    Raises:
        InputError: not a result of this version's form.
    """
    try:
        return Result(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"'{path}' is not a benchmark's result ({error}); remove it and run again"
        ) from error


def page(benchmarks: Iterable[Benchmark], folder: Path, title: str = "Results") -> str:
    """One Markdown page of the results in ``folder``, which the page's own folder holds.

    Raises:
        NoInputError: no result there.
    """
    found = [(b, folder / f"{b.name}.json") for b in benchmarks]
    parts = [section(b, read(path), folder.name) for b, path in found if path.exists()]
    if not parts:
        raise NoInputError(f"'{folder}' holds no result of a benchmark; run one with -o {folder}")
    head = (
        f"# {title}\n\nWritten by `recon benchmark all` from the JSON files beside the pictures, "
        "which have the value of every slice. ± is half the width of Student's 95 % interval of "
        "the mean over these slices; a gain is taken slice by slice. How to run one: "
        "[howto.md](howto.md#run-a-benchmark).\n"
    )
    return "\n".join([head, *parts])


def section(benchmark: Benchmark, result: Result, images: str) -> str:
    """Heading, provenance, settings, tables and picture of a result."""
    made = result.made
    versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    priors = "".join(f", prior {name} {digest}" for name, digest in made["priors"].items())
    settings = "; ".join(f"{k} {_shown(v)}" for k, v in result.settings.items() if v != "")
    lines = [
        f"## {benchmark.title}\n",
        f"{benchmark.about.strip()}\n",
        f"*`recon benchmark {benchmark.name}`, {result.mode}; {made['date']}; {made['machine']}; "
        f"{versions}; code {made['code']}{priors}. Settings: {settings}.*\n",
    ]
    if not result.finished:
        lines.append("**Not finished: rows are missing.**\n")
    lines.append(benchmark.markdown(result.rows))
    if benchmark.figure is not None:
        lines.append(f"![{benchmark.title}]({images}/{benchmark.name}.png)\n")
    return "\n".join(lines)


def half_width(values: ArrayLike) -> float | None:
    """Half of Student's 95 % interval of the mean; ``None`` of fewer than two values."""
    ends = ci95(values)
    return None if ends is None else (ends[1] - ends[0]) / 2


def plus_minus(values: ArrayLike, digits: int = 2) -> str:
    """Mean and half width, such as ``31.2 ± 0.4``."""
    half = half_width(values)
    mean = f"{float(np.mean(np.asarray(values))):.{digits}f}"
    return mean if half is None else f"{mean} ± {half:.{digits}f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> str:
    """A Markdown table whose first ``text`` columns are aligned to the left."""
    rule = ["---" if i < text else "--:" for i in range(len(header))]
    lines = [header, rule, *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def without_repeats(values: Iterable[Any]) -> list[Any]:
    """The values in order, each once."""
    return list(dict.fromkeys(values))


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _fresh(benchmark: Benchmark, settings: Any) -> Result:
    """A result without rows."""
    assert is_dataclass(settings)
    assert not isinstance(settings, type)
    known = {benchmark.quick: "quick", benchmark.full: "full"}
    return Result(
        benchmark=benchmark.name,
        mode=known.get(settings, "custom"),
        finished=False,
        made={
            "schema": SCHEMA,
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "machine": _machine(),
            "versions": _versions(),
            "code": _code(),
            "priors": _priors(settings),
        },
        settings=_plain(settings),
        rows={},
    )


def _continued(path: Path, fresh: Result, overwrite: bool) -> Result:
    """The result at ``path`` if it is of the same identity, else ``fresh``."""
    try:
        there = read(path)
        theirs = json.loads(json.dumps(there.identity))
    except (InputError, KeyError, AttributeError):
        if overwrite:
            return fresh
        raise InputError(
            f"'{path}' is damaged or of another version; remove it, or give --overwrite"
        ) from None
    mine = json.loads(json.dumps(fresh.identity))
    if mine == theirs:
        return there
    if overwrite:
        return fresh
    differing = [k for k in sorted(mine | theirs) if mine.get(k) != theirs.get(k)]
    raise OutputError(
        f"'{path}' is a result of other {', '.join(differing)}; give another -o to keep it, or "
        "--overwrite to replace it"
    )


def _plain(settings: Any) -> dict[str, Any]:
    """Settings as JSON values; of paths only the name, which is all that others may know."""
    values = asdict(settings)
    if values.get("data"):
        values["data"] = Path(values["data"]).name
    return dict(json.loads(json.dumps(values)))


def _priors(settings: Any) -> dict[str, str]:
    """Hash of the weights of every prior that the settings name."""
    names = [getattr(settings, f.name) for f in fields(settings) if f.name.endswith("prior")]
    return {Path(name).stem: load_prior(name).card.sha256[:12] for name in names}


def _versions() -> dict[str, str]:
    return {"recon-sde": inverse.__version__, "torch": version("torch"), "numpy": version("numpy")}


def _machine() -> str:
    """The machine in words, without its name."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores"
    kind = torch.backends.cpu.get_cpu_capability()
    return (
        f"{platform.machine()} ({kind}), {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    )


def _code() -> str:
    """Hash of all sources that the numbers can depend on."""
    digest = hashlib.sha256()
    for package in (inverse, phantoms):
        root = Path(package.__file__ or "").parent
        for path in sorted(root.rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _write(path: Path, text: str) -> None:
    """Write a file that is whole or as it was."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(
            f"'{path}' cannot be written ({error.strerror}); give another -o"
        ) from error


def check(condition: bool, text: str) -> None:
    """Refuse an impossible setting.

    Raises:
        ReconError: with ``text``, if the condition does not hold.
    """
    if not condition:
        raise ReconError(text)
