"""``recon tune``: a method's options that give the best images, found on validation data."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from recon_cli import options as o
from recon_cli.console import log, plain_json, print_json, print_table
from recon_cli.errors import one_line, usage
from recon_cli.options import check_ending, parse_value
from recon_cli.output import check_file
from recon_cli.pipeline import evaluate
from recon_cli.runlog import RunLog, write_json
from recon_cli.scans import Scan, Selection, read, register_scans, simulate
from recon_cli.task import Recipe, Task, check_method, choose_prior, named_prior, pick_device

Metric = Literal["psnr", "ssim"]
Trial = dict[str, Any]

SHOWN = 5
"""Rows of the table of the best trials."""
EDGE = 0.05
"""Share of a range that counts as its end."""

_TUNING = "Search"
_Ranges = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="NAME=LOW:HIGH|A,B",
        help="An option of the method ('recon methods --json' lists them) and its range, or the "
        "values to try, or the one value to keep; repeat for more.",
        show_default=False,
        rich_help_panel=_TUNING,
    ),
]
_Trials = Annotated[
    int,
    typer.Option(
        "--trials",
        min=1,
        help="Reconstructions of all slices, each with other options.",
        rich_help_panel=_TUNING,
    ),
]
_Rounds = Annotated[
    int,
    typer.Option(
        "--rounds",
        min=0,
        max=10,
        help="Times that the ranges are halved about the best so far.",
        rich_help_panel=_TUNING,
    ),
]
_MetricName = Annotated[
    Metric,
    typer.Option("--metric", help="What is to be largest.", rich_help_panel=_TUNING),
]
_Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace the file and start again, where an unfinished tune would go on.",
    ),
]


# --- where to search ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """An interval of a number, searched on a log scale where it spans a decade or more."""

    name: str
    low: float
    high: float
    whole: bool

    @property
    def scale(self) -> Literal["log", "linear"]:
        """On which equal steps are equally likely."""
        return "log" if self.low > 0 and self.high / self.low >= 10 else "linear"

    @property
    def text(self) -> str:
        """In words."""
        return f"{self.name} from {self.low:g} to {self.high:g} ({self.scale} scale)"

    def at(self, u: float) -> float:
        """The value at a share ``u`` of the range, in four digits, so that it can be retyped.

        A share beyond an end gives that end.
        """
        u = min(max(u, 0.0), 1.0)
        if self.scale == "log":
            value = self.low * (self.high / self.low) ** u
        else:
            value = self.low + u * (self.high - self.low)
        if self.whole:
            return round(value)
        return min(max(float(f"{value:.4g}"), self.low), self.high)

    def share(self, value: float) -> float:
        """The inverse of :meth:`at`."""
        if self.scale == "log":
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def window(self, value: float, width: float) -> tuple[float, float]:
        """Shares about a value; what reaches beyond an end makes that end itself likely."""
        centre = self.share(value)
        return centre - width / 2, centre + width / 2

    def holds(self, value: Any) -> bool:
        """Whether a value lies in the range."""
        return isinstance(value, int | float) and self.low <= value <= self.high

    def ends_at(self, value: float) -> bool:
        """Whether a value lies at an end, so that a better one may lie beyond."""
        return not EDGE < self.share(value) < 1 - EDGE


@dataclass(frozen=True)
class Values:
    """A list of values, which stays whole in every round."""

    name: str
    values: tuple[Any, ...]

    @property
    def text(self) -> str:
        """In words."""
        return f"{self.name} of {', '.join(map(_word, self.values))}"

    def at(self, u: float) -> Any:
        """The value at a share ``u`` of the list."""
        return self.values[min(int(u * len(self.values)), len(self.values) - 1)]

    def window(self, value: Any, width: float) -> tuple[float, float]:
        """All of it."""
        return 0.0, 1.0

    def holds(self, value: Any) -> bool:
        """Whether a value is in the list."""
        return value in self.values


Axis = Range | Values


def _word(value: Any) -> str:
    """A value as ``--option`` takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _axis(name: str, text: str, kind: Any) -> Axis:
    """The search space of one option from ``LOW:HIGH``, ``A,B,C`` or one value.

    Raises:
        typer.BadParameter: an empty range, or a bound that is not of the option's type.
    """
    if ":" not in text:
        values = [parse_value(name, part.strip(), kind) for part in text.split(",")]
        return Values(name, tuple(dict.fromkeys(values)))
    ends = [parse_value(name, part.strip(), kind) for part in text.split(":")]
    if len(ends) != 2 or any(isinstance(end, bool | str) for end in ends):
        raise usage(f"--option '{name}={text}' is not {name}=LOW:HIGH, nor {name}=A,B,C")
    low, high = (float(end) for end in ends)
    if low >= high:
        raise usage(f"--option '{name}={text}' is an empty range; give LOW:HIGH with LOW < HIGH")
    return Range(name, low, high, whole=all(isinstance(end, int) for end in ends))


def _space(method: str, given: Sequence[str]) -> list[Axis]:
    """The axes of the search.

    Raises:
        typer.BadParameter: nothing to search, or an option that is unknown or malformed.
    """
    from inverse.posterior.methods import METHODS

    known = [name for name in METHODS[method].options if name != "steps"]
    if not known:
        raise usage(f"method '{method}' has no options to tune")
    axes: list[Axis] = list(o.read_options(METHODS[method], given, _axis).values())
    if not any(isinstance(axis, Range) or len(axis.values) > 1 for axis in axes):
        raise usage(
            f"there is nothing to tune: give --option NAME=LOW:HIGH or NAME=A,B; method "
            f"'{method}' has {', '.join(known)}"
        )
    return axes


# --- how to search -----------------------------------------------------------------------------


def best_of(trials: Sequence[Trial], metric: Metric) -> Trial | None:
    """The trial with the largest mean, the first of equals; ``None`` where all failed."""
    done = [trial for trial in trials if trial["status"] != "failed"]
    return max(done, key=lambda trial: trial[metric]["mean"], default=None)


def propose(
    axes: Sequence[Axis],
    tried: Sequence[Trial],
    *,
    metric: Metric,
    start: Mapping[str, Any],
    trials: int,
    rounds: int,
    seed: int,
) -> dict[str, Any] | None:
    """The options of the next trial: the first point of a sequence that was not tried.

    The first trial is ``start``, the method's defaults, where they lie in the space.  Trials are
    shared evenly among a spread over the whole space and ``rounds`` refinements; each refinement
    draws from a box of half the side about the best before it.  The sequence is a scrambled
    Halton sequence of the seed and the round, so that a search which is taken up again goes on
    as if it had never stopped.

    Source: Halton, Numer. Math. 2 (1960); scrambling by Owen, arXiv:1706.02808.

    Returns:
        Values by name; ``None`` where every point was tried.
    """
    import numpy as np
    from scipy.stats import qmc

    if not tried and all(axis.holds(start.get(axis.name)) for axis in axes):
        return {axis.name: start[axis.name] for axis in axes}
    at = len(tried) * (rounds + 1) // trials
    before = -(-at * trials // (rounds + 1))  # trials of earlier rounds
    best = best_of(tried[:before], metric)
    seen = [trial["options"] for trial in tried]
    for width in (2.0**-at, 1.0):  # the whole space once the box is used up
        box = [
            (0.0, 1.0)
            if best is None or width == 1.0
            else axis.window(best["options"][axis.name], width)
            for axis in axes
        ]
        halton = qmc.Halton(len(axes), scramble=True, seed=np.random.default_rng((seed, at)))
        for point in halton.random(512).tolist():
            options = {
                axis.name: axis.at(low + u * (high - low))
                for axis, (low, high), u in zip(axes, box, point, strict=True)
            }
            if options not in seen:
                return options
    return None


def _attempt(task: Task, recipe: Recipe, metric: Metric) -> Trial:
    """One trial; options that a method refuses or diverges with are a result too.

    Raises:
        UnsupportedError, CheckpointError, ResourceError: what no option would cure.
    """
    from inverse.errors import CheckpointError, ReconError, ResourceError, UnsupportedError

    trial: Trial = {"options": dict(recipe.options)}
    run = RunLog("trial", {})
    start = time.monotonic()
    try:
        judged = evaluate(task, recipe, run)
    except (UnsupportedError, CheckpointError, ResourceError):
        raise
    except (ReconError, ArithmeticError) as error:
        return trial | {"status": "failed", "reason": one_line(error)}
    row = judged["methods"]["prior"]
    if not math.isfinite(row[metric]["mean"]):
        return trial | {"status": "failed", "reason": "the images are not finite"}
    settings = run.settings["reconstruction"]
    return trial | {
        "status": settings["status"],
        "psnr": row["psnr"],
        "ssim": row["ssim"],
        "residual_chi2": row["residual_chi2"],
        "network_calls": row["network_calls"],
        "seconds": round(time.monotonic() - start, 3),
        "per_slice": [
            entry["prior"][metric] for entry in judged["per_slice"] if metric in entry["prior"]
        ],
        "settings": settings,
    }


# --- the file ----------------------------------------------------------------------------------


def _unfinished(path: Path, overwrite: bool) -> dict[str, Any] | None:
    """The content of an unfinished tune, which may go on; ``None`` where there is no file.

    Raises:
        OutputError: there is another file.
    """
    if path.is_file() and not overwrite:
        try:
            found = json.loads(path.read_text())
            if not found["tune"]["complete"]:
                return dict(found)
        except (ValueError, KeyError, TypeError):
            pass
    check_file(path, overwrite)
    return None


def _trials_of(earlier: Mapping[str, Any], run: RunLog, path: Path) -> list[Trial]:
    """The trials of an unfinished tune of the same question.

    Raises:
        OutputError: other images, prior, scan, method or search.
    """
    from inverse.errors import OutputError

    now = run.to_dict()
    for key in ("command", "inputs", "seed", "prior", "settings"):
        if earlier.get(key) != now[key]:
            raise OutputError(
                f"'{path}' holds an unfinished tune with other {key}; give another -o, or "
                "--overwrite to start again"
            )
    return list(earlier["tune"]["trials"])


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Replace the file as a whole, so that an interruption leaves the earlier one.

    Raises:
        OutputError: it cannot be written.
    """
    from inverse.errors import OutputError

    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(temporary, content)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(
            f"output file '{path}' cannot be written ({error.strerror}); give another -o"
        ) from None


def _arguments(method: str, steps: int | None, best: Trial | None) -> list[str]:
    """What to give ``study`` and ``reconstruct`` for the best options."""
    if best is None:
        return []
    options = [f"--option {name}={_word(value)}" for name, value in best["options"].items()]
    return [f"--method {method}", *([] if steps is None else [f"--steps {steps}"]), *options]


def _summary(
    axes: Sequence[Axis], tried: Sequence[Trial], recipe: Recipe, metric: Metric, complete: bool
) -> dict[str, Any]:
    """The section ``tune`` of the file."""
    best = best_of(tried, metric)
    return {
        "complete": complete,
        "metric": metric,
        "best": best,
        "arguments": _arguments(recipe.method, recipe.steps, best),
        "at_the_end": [
            axis.name
            for axis in axes
            if best and isinstance(axis, Range) and axis.ends_at(best["options"][axis.name])
        ],
        "trials": list(tried),
    }


# --- telling -----------------------------------------------------------------------------------


def _mean(row: Mapping[str, Any], digits: int) -> str:
    text = f"{row['mean']:.{digits}f}"
    if row["ci95"]:
        text += f" [{row['ci95'][0]:.{digits}f}, {row['ci95'][1]:.{digits}f}]"
    return text


def _table(task: Task, axes: Sequence[Axis], tune: Mapping[str, Any]) -> None:
    """The best trials, how far each is behind the best on the same slices, and what to type."""
    import numpy as np

    from inverse.metrics import ci95

    metric, best = tune["metric"], tune["best"]
    digits = 2 if metric == "psnr" else 4
    done = [trial for trial in tune["trials"] if trial["status"] != "failed"]
    rows = []
    for trial in sorted(done, key=lambda t: -t[metric]["mean"])[:SHOWN]:
        behind = np.array(best["per_slice"]) - np.array(trial["per_slice"])
        gap = {"mean": behind.mean(), "ci95": ci95(behind)}
        rows.append(
            [
                *(_word(trial["options"][axis.name]) for axis in axes),
                _mean(trial["psnr"], 2),
                _mean(trial["ssim"], 4),
                "-" if trial is best else _mean(gap, digits),
                f"{trial['residual_chi2']:.3g}",
                str(trial["network_calls"]),
                f"{trial['seconds']:.1f}",
            ]
        )
    unit = "PSNR dB" if metric == "psnr" else "SSIM"
    print_table(
        f"{task.label}: the best by mean {metric.upper()}, trials: {len(tune['trials'])}",
        [
            *(axis.name for axis in axes),
            "PSNR dB [95 %]",
            "SSIM [95 %]",
            f"{unit} behind the best [95 %]",
            "residual χ²",
            "network calls",
            "seconds",
        ],
        rows,
        left=0,
    )
    print(f"Searched {'; '.join(axis.text for axis in axes)}.")
    print(f"Use: {' '.join(tune['arguments'])}")


@dataclass(frozen=True)
class How:
    """Options of every search: all but what is scanned."""

    prior: o.PriorName = None
    method: o.MethodName = o.DEFAULT_METHOD
    option: _Ranges = None
    steps: o.Steps = None
    samples: o.Samples = 1
    batch: o.Batch = 8
    device: o.Device = "auto"
    trials: _Trials = 20
    rounds: _Rounds = 2
    metric: _MetricName = "psnr"
    seed: o.Seed = 0
    slices: o.Slices = None
    series: o.SeriesName = None
    stack: o.StackName = None
    limits: o.Limits = 4.0
    overwrite: _Overwrite = False
    as_json: o.Json = False


def _tune(scan: Scan, path: Path, out: Path, how: How) -> None:
    check_ending(out, ".json")
    check_method(how.method)
    axes = _space(how.method, how.option or [])
    earlier = _unfinished(out, how.overwrite)

    from inverse.errors import NumericalError
    from inverse.posterior.methods import METHODS

    run = RunLog(f"tune {scan.command}", {path: "IN", out: "OUT"})
    device, asked = pick_device(how.device), named_prior(how.prior)
    selection = Selection(path, how.series, how.stack, how.slices, how.limits)
    images, chosen = read(selection, scan, run)
    recipe = Recipe(
        prior=choose_prior(asked, images.modality),
        method=how.method,
        steps=how.steps,
        samples=how.samples,
        seed=how.seed,
        batch=how.batch,
        device=device,
    )
    task = simulate(scan, images, chosen, how.seed, run)
    del images  # the whole series; the task holds what is needed
    run.prior = asdict(recipe.prior.card)
    run.seed, run.device, run.simulation = how.seed, device, True
    run.settings |= {
        "label": task.label,
        "slices": list(task.slices),
        "method": how.method,
        "steps": how.steps,
        "samples": how.samples,
        "search": {
            "metric": how.metric,
            "trials": how.trials,
            "rounds": how.rounds,
            "options": [
                asdict(axis) | ({"scale": axis.scale} if isinstance(axis, Range) else {})
                for axis in axes
            ],
        },
    }
    tried = [] if earlier is None else _trials_of(earlier, run, out)
    if tried:
        log(f"going on from {len(tried)} trials in {out}")
    run.warn(
        "TUNED_ON_TRUTH",
        "the options are chosen by the truth of these images, so they must not be of test "
        "patients, and their metrics are no estimate of what to expect",
    )
    start = METHODS[how.method].resolve({}, task.measurement.modality)
    complete = False
    while not complete:
        options = propose(
            axes,
            tried,
            metric=how.metric,
            start=start,
            trials=how.trials,
            rounds=how.rounds,
            seed=how.seed,
        )
        if options is None:
            run.warn("EXHAUSTED", f"every point was tried after {len(tried)} trials")
        else:
            words = ", ".join(f"{name} {_word(value)}" for name, value in options.items())
            log(f"trial {len(tried) + 1} of {how.trials}: {words}")
            with run.phase("trials"):
                trial = _attempt(task, replace(recipe, options=options), how.metric)
            tried.append(plain_json(trial))
            said = trial.get("reason") or _mean(trial[how.metric], 4)
            log(f"trial {len(tried)} of {how.trials}: {how.metric} {said}")
        complete = options is None or len(tried) == how.trials
        tune = _summary(axes, tried, recipe, how.metric, complete)
        if complete and tune["at_the_end"]:
            run.warn(
                "END_OF_RANGE",
                f"the best {' and '.join(tune['at_the_end'])} lies at the end of its range; "
                "widen it, or keep the option at that end",
            )
        _write(out, run.to_dict() | {"tune": tune})
    failed = [trial for trial in tried if trial["status"] == "failed"]
    if len(failed) == len(tried):
        raise NumericalError(
            f"all {len(tried)} trials failed, the last because {failed[-1]['reason']}; give other "
            "ranges"
        )
    if failed:
        log(f"{len(failed)} of {len(tried)} trials failed, the first because "
            f"{failed[0]['reason']}")  # fmt: skip
    if how.as_json:
        print_json({"out": str(out), **tune, "warnings": run.warnings})
        return
    _table(task, axes, tune)
    print("Tuned on the truth of these images: judge on other patients; research use only.")
    log(f"wrote {out}")


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(
        help="Find the options of a method that give the best images of a simulated measurement: "
        "on validation data, since the truth of the images chooses, never on test patients.",
        no_args_is_help=True,
    )
    app.add_typer(group, name="tune")

    examples = {
        "ct": """
        recon tune ct CT_FOLDER -o t.json --method song --option lam=0.3:1 --option snr=0.1:0.5
        recon tune ct CT_FOLDER -o t.json --option weight=1:30 --steps 20 --slices 10:50:8
        recon tune ct CT_FOLDER -o t.json --method dds --option eta=0.5,1 --option weight=4
        """,
        "mri": "recon tune mri MR_FOLDER -o t.json --method score_mri --option snr=0.05:0.6",
        "inpaint": "recon tune inpaint CT_FOLDER -o t.json --method ddnm --option eta=0.3:1",
        "slices": "recon tune slices CT_FOLDER -o t.json --thickness 3 --option weight=1:30",
    }
    register_scans(group, _tune, How, o.OutFile, examples)
