"""Options that commands share, and how a command is registered."""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from recon_cli import runlog
from recon_cli.config import Config, resolved
from recon_cli.console import VERBOSITY
from recon_cli.errors import usage

if TYPE_CHECKING:
    from inverse.sampling import Named

__all__ = ["bytes_of", "check_ending", "command", "companions", "parse_pairs", "parse_slices",
           "parse_value", "read_options"]  # fmt: skip

_SCAN, _RECON, _OUT = "Measurement", "Reconstruction", "Input and output"

DEFAULT_METHOD = "pnp_admm"
"""That of :func:`inverse.reconstruct`, which is slow to import."""

Input = Annotated[
    Path,
    typer.Argument(
        metavar="IN",
        help="DICOM folder, file or zip archive, or NIfTI file.",
        show_default=False,
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        "--out", "-o", metavar="DIR", help="Output folder.", show_default=False,
        rich_help_panel=_OUT,
    ),
]  # fmt: skip
OutFile = Annotated[
    Path,
    typer.Option(
        "--out", "-o", metavar="FILE", help="File to write.", show_default=False,
        rich_help_panel=_OUT,
    ),
]  # fmt: skip
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace an earlier output of recon, once the new one is complete.",
        rich_help_panel=_OUT,
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue a run that was cut short, and keep finished pieces if this one is.",
        rich_help_panel=_OUT,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Read and check everything, tell what would be written, and write nothing.",
        rich_help_panel=_OUT,
    ),
]
Pdf = Annotated[
    bool,
    typer.Option(
        "--pdf",
        help="Write the report also as PDF, and as a DICOM object of the study.",
        rich_help_panel=_OUT,
    ),
]
ParametricMap = Annotated[
    bool,
    typer.Option(
        "--parametric-map",
        help="Write the std map also as DICOM Parametric Map with exact values (extra 'maps').",
        rich_help_panel=_OUT,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
SeriesName = Annotated[
    str | None,
    typer.Option(
        "--series",
        help="Which series, where there are several: number, UID, or hash of 'recon inspect'.",
        show_default=False,
        rich_help_panel=_OUT,
    ),
]
StackName = Annotated[
    str | None,
    typer.Option(
        "--stack",
        help="Which stack, as numbered by 'recon inspect'.",
        show_default=False,
        rich_help_panel=_OUT,
    ),
]
Limits = Annotated[
    float,
    typer.Option(
        "--limits",
        metavar="GIB",
        min=0.001,
        help="Refuse input or a scan that claims more memory than this, before it is decoded or "
        "simulated.",
    ),
]


def bytes_of(gib: float) -> int:
    """A limit in bytes."""
    return int(gib * 2**30)


def _range(text: str | None) -> str | None:
    """A text of ``START:STOP:STEP``, checked before anything is read.

    Raises:
        typer.BadParameter: not of that form, or a step of zero.
    """
    try:
        parts = [int(part) if part.strip() else None for part in (text or "0").split(":")]
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 3 or (len(parts) == 1 and parts[0] is None) or parts[2:] == [0]:
        raise usage(f"'{text}' is not START:STOP:STEP, such as 10:50:4, or one number")
    return text


Slices = Annotated[
    str | None,
    typer.Option(
        "--slices",
        metavar="START:STOP:STEP",
        callback=_range,
        help="Slices to use, counted from 0 at the lowest position.",
        show_default="all",
        rich_help_panel=_OUT,
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of noise and samples.")]

Views = Annotated[
    int, typer.Option("--views", min=1, help="Number of views.", rich_help_panel=_SCAN)
]
GeometryName = Annotated[
    Literal["parallel", "fan", "fan-curved", "cone"],
    typer.Option(
        "--geometry",
        help="Beam, and whether its detector is curved; a cone beam measures all slices together.",
        rich_help_panel=_SCAN,
    ),
]
Arc = Annotated[
    float | None,
    typer.Option(
        "--arc",
        metavar="DEG",
        min=1.0,
        max=360.0,
        help="Angle that the views cover.",
        show_default="180 for parallel, 360 for fan",
        rich_help_panel=_SCAN,
    ),
]
ShortScan = Annotated[
    bool,
    typer.Option(
        "--short-scan",
        help="Cover a half turn and the fan angle, the least that measures every line.",
        rich_help_panel=_SCAN,
    ),
]
Detector = Annotated[
    int | None,
    typer.Option(
        "--detector",
        metavar="BINS",
        min=1,
        help="Detector bins of about a pixel; fewer than cover the image truncate it.",
        show_default="as many as cover the image",
        rich_help_panel=_SCAN,
    ),
]
ElectronicNoise = Annotated[
    float,
    typer.Option(
        "--electronic-noise",
        min=0.0,
        help="Std of the electronics' noise, in photons a detector bin.",
        rich_help_panel=_SCAN,
    ),
]
Kvp = Annotated[
    float | None,
    typer.Option(
        "--kvp",
        min=40.0,
        max=150.0,
        help="Tube voltage of a polychromatic beam, which bone and metal harden.",
        show_default="one energy",
        rich_help_panel=_SCAN,
    ),
]
Metal = Annotated[
    int,
    typer.Option(
        "--metal",
        metavar="RODS",
        min=0,
        max=8,
        help="Titanium rods of 10 mm to put into the images; rays through them are left out.",
        rich_help_panel=_SCAN,
    ),
]
MetalTraceName = Annotated[
    Literal["true", "segmented", "none"],
    typer.Option(
        "--metal-trace",
        help="Rays that are left out: through the true rods, through what a filtered "
        "backprojection of the scan shows above 3000 HU, or none.",
        rich_help_panel=_SCAN,
    ),
]
MetalThreshold = Annotated[
    float | None,
    typer.Option(
        "--metal-threshold",
        metavar="HU",
        min=500.0,
        help="CT: leave out the rays through what a filtered backprojection shows above this "
        "(such as 3000), and fill them by the prior.",
        show_default="keep all rays",
        rich_help_panel=_RECON,
    ),
]
BaselineNames = Annotated[
    list[str] | None,
    typer.Option(
        "--baseline",
        metavar="NAME",
        help="A further classical image: cgls, sirt, os-sart, poisson (penalised likelihood of "
        "photon counts) or tv; repeat for more.",
        show_default=False,
        rich_help_panel=_RECON,
    ),
]
Photons = Annotated[
    float,
    typer.Option(
        "--photons",
        min=1.0,
        help="Photons a detector bin in air; fewer is a lower dose.",
        rich_help_panel=_SCAN,
    ),
]
Matrix = Annotated[
    int | None,
    typer.Option(
        "--matrix",
        min=16,
        max=1024,
        help="Rows and columns of the reconstruction, over the same field of view.",
        show_default="256, or the images' where smaller",
        rich_help_panel=_SCAN,
    ),
]
Acceleration = Annotated[
    float,
    typer.Option(
        "--acceleration", min=1.0, help="k-space size over samples.", rich_help_panel=_SCAN
    ),
]
MaskName = Annotated[
    Literal[
        "uniform1d", "random1d", "gaussian1d", "partial1d", "random2d", "gaussian2d", "poisson"
    ],
    typer.Option("--mask", help="Sampling pattern in k-space.", rich_help_panel=_SCAN),
]
Centre = Annotated[
    float,
    typer.Option(
        "--centre",
        min=0.0,
        max=1.0,
        help="Share of k-space around its centre that is always sampled.",
        rich_help_panel=_SCAN,
    ),
]

Coils = Annotated[
    int,
    typer.Option(
        "--coils",
        min=1,
        max=64,
        help="Receive coils around the object; their maps are calibrated from the data.",
        rich_help_panel=_SCAN,
    ),
]
TrajectoryName = Annotated[
    Literal["cartesian", "radial", "spiral"],
    typer.Option(
        "--trajectory",
        help="Path through k-space; other than cartesian needs the extra 'nufft', and leaves "
        "--mask and --centre without effect.",
        rich_help_panel=_SCAN,
    ),
]

NoiseLevel = Annotated[
    float,
    typer.Option(
        "--noise",
        min=1e-6,
        help="Noise std relative to water (CT) or to the brightest signal (MR).",
        rich_help_panel=_SCAN,
    ),
]
Hole = Annotated[
    float,
    typer.Option(
        "--hole",
        min=0.01,
        max=0.99,
        help="Side of the missing square relative to the image's, or share of missing pixels.",
        rich_help_panel=_SCAN,
    ),
]
VolumeScan = Annotated[
    bool,
    typer.Option(
        "--volume",
        help="One 3-D scan of all slices, phase encoded along slices and rows; needs a --mask of "
        "two directions.",
        rich_help_panel=_SCAN,
    ),
]
Missing = Annotated[
    str | None,
    typer.Option(
        "--missing",
        metavar="START:STOP:STEP",
        callback=_range,
        help="Slices that are not measured, counted from 0 among those chosen.",
        show_default=False,
        rich_help_panel=_SCAN,
    ),
]
Thickness = Annotated[
    int | None,
    typer.Option(
        "--thickness",
        metavar="SLICES",
        min=2,
        help="Slices of the images that a thick one averages.",
        show_default=False,
        rich_help_panel=_SCAN,
    ),
]
SliceStep = Annotated[
    int | None,
    typer.Option(
        "--slice-step",
        metavar="SLICES",
        min=1,
        help="Slices from one thick slice to the next.",
        show_default="the thickness",
        rich_help_panel=_SCAN,
    ),
]
HoleKind = Annotated[
    Literal["square", "pixels"],
    typer.Option("--hole-kind", help="What is missing.", rich_help_panel=_SCAN),
]

PriorName = Annotated[
    str | None,
    typer.Option(
        "--prior",
        metavar="NAME|FILE",
        help="Bundled prior ('recon priors list') or a .safetensors file.",
        show_default="the bundled prior of the modality",
        rich_help_panel=_RECON,
    ),
]
MethodName = Annotated[
    str, typer.Option("--method", help="Sampler; see 'recon methods'.", rich_help_panel=_RECON)
]
MethodOption = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="NAME=VALUE",
        help="An option of the method ('recon methods --json' lists them), such as eta=0.5; "
        "repeat for more.",
        show_default=False,
        rich_help_panel=_RECON,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        "--steps",
        min=1,
        help="Sampler steps; each costs one network call a slice and sample, or two.",
        show_default="the method's",
        rich_help_panel=_RECON,
    ),
]
Samples = Annotated[
    int,
    typer.Option(
        "--samples",
        min=1,
        help="Posterior samples a slice; 8 or more for a useful std map.",
        rich_help_panel=_RECON,
    ),
]
Batch = Annotated[
    int,
    typer.Option(
        "--batch",
        min=1,
        help="Images a network call; the result does not depend on it.",
        rich_help_panel=_RECON,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device", metavar="auto|cpu|cuda", help="Where to compute.", rich_help_panel=_RECON
    ),
]
CouplingName = Annotated[
    Literal["none", "noise", "tv", "planes"],
    typer.Option(
        "--coupling",
        help="How neighbouring slices are made consistent: by noise that they share, total "
        "variation along z, or priors of three planes in turn.",
        rich_help_panel=_RECON,
    ),
]
PlanePrior = Annotated[
    list[str] | None,
    typer.Option(
        "--plane-prior",
        metavar="PLANE=NAME|FILE",
        help="Prior of coronal or sagittal images for --coupling planes; repeat for both.",
        show_default=False,
        rich_help_panel=_RECON,
    ),
]
MaxMemory = Annotated[
    float | None,
    typer.Option(
        "--max-memory",
        metavar="GIB",
        min=0.01,
        help="Send fewer images than --batch to the network at a time, where these need more.",
        show_default=False,
        rich_help_panel=_RECON,
    ),
]
TvWeight = Annotated[
    float | None,
    typer.Option(
        "--tv-weight",
        min=1e-9,
        help="Weight of total variation in the TV baseline.",
        show_default="tuned on phantoms",
        rich_help_panel=_RECON,
    ),
]

Tv = Annotated[
    bool,
    typer.Option(
        "--tv/--no-tv",
        help="Run the TV baseline (for MRI also L1-wavelet), which takes about as long as the "
        "prior.",
        rich_help_panel=_RECON,
    ),
]

_SHARED = {
    "quiet": Annotated[bool, typer.Option("--quiet", "-q", help="Print the result only.")],
    "verbose": Annotated[bool, typer.Option("--verbose", "-v", help="Print more of the log.")],
    "debug": Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")],
}
_INCLUDE_PHI = Annotated[
    bool,
    typer.Option(
        "--include-phi",
        help="Let JSON and report name the patient, paths and identifiers; without it they do "
        "not.",
        rich_help_panel=_OUT,
    ),
]


def command(
    app: typer.Typer, name: str, *, examples: str = "", phi: bool = False, **settings: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command that also has `_SHARED` options and ``--config``.

    A parameter whose type is a dataclass stands for an option a field, in the order of its
    fields: what several commands share is written once.

    Args:
        app: group of the command.
        name: its name.
        examples: command lines for the end of its help, one a line.
        phi: whether it has ``--include-phi``, which `RunLog.include_phi` tells.
        **settings: passed to ``typer.Typer.command``.
    """
    lines = [line.strip() for line in examples.strip().splitlines()]
    epilog = "[bold]Examples[/bold]\n\n" + "\n\n".join(lines) if lines else None

    def register(function: Callable[..., None]) -> Callable[..., None]:
        own = get_type_hints(function, include_extras=True)
        del own["return"]
        groups: dict[str, Any] = {n: hint for n, hint in own.items() if is_dataclass(hint)}

        @functools.wraps(function)
        def run(
            *,
            context: typer.Context,
            config: Path | None,
            quiet: bool,
            verbose: bool,
            debug: bool,
            **given: Any,
        ) -> None:
            VERBOSITY.apply(quiet=quiet, verbose=verbose, debug=debug)
            runlog.OPTIONS = resolved(context, given)
            given.pop("include_phi", None)
            for group_name, group in groups.items():
                values = {f.name: given.pop(f.name) for f in fields(group)}
                given[group_name] = group(**values)
            with warnings.catch_warnings():
                # third-party warnings print values of headers, and nobody can act on them
                warnings.simplefilter("default" if debug else "ignore")
                function(**given)

        parameters = []
        for p in inspect.signature(function).parameters.values():
            if p.name in groups:
                kinds = get_type_hints(own[p.name], include_extras=True)
                parameters += [
                    inspect.Parameter(
                        f.name,
                        inspect.Parameter.KEYWORD_ONLY,
                        default=inspect.Parameter.empty if f.default is MISSING else f.default,
                        annotation=kinds[f.name],
                    )
                    for f in fields(groups[p.name])
                ]
            else:
                parameters.append(
                    p.replace(annotation=own[p.name], kind=inspect.Parameter.KEYWORD_ONLY)
                )
        parameters += [
            inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=a)
            for n, a in _SHARED.items()
        ]
        if phi:
            parameters.append(
                inspect.Parameter(
                    "include_phi",
                    inspect.Parameter.KEYWORD_ONLY,
                    default=False,
                    annotation=_INCLUDE_PHI,
                )
            )
        parameters += [
            inspect.Parameter(
                "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Config
            ),
            inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
        ]
        vars(run)["__signature__"] = inspect.Signature(parameters)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        del vars(run)["__wrapped__"]
        app.command(name, epilog=epilog, **settings)(run)
        return function

    return register


def check_ending(out: Path, *endings: str) -> None:
    """Refuse an output whose ending tells another format than what is written.

    Raises:
        typer.BadParameter: with the endings that exist.
    """
    if not out.name.lower().endswith(endings):
        raise usage(f"output '{out}' must end in {' or '.join(endings)}")


def companions(*, pdf: bool, parametric_map: bool) -> tuple[str, ...]:
    """Names of the files that a run writes on request, checked before it begins.

    Raises:
        UnsupportedError: a Parametric Map, and the package that makes it is absent.
    """
    if parametric_map:
        from inverse.io.dicom import check_highdicom

        check_highdicom()
    return ("pdf",) * pdf + ("parametric-map",) * parametric_map


def parse_pairs(
    texts: Sequence[str], option: str = "--option", example: str = "eta=0.5"
) -> dict[str, str]:
    """``NAME=VALUE`` texts of an option by name.

    Raises:
        typer.BadParameter: not of that form, or a name twice.
    """
    pairs: dict[str, str] = {}
    for text in texts:
        name, _, value = (part.strip() for part in text.partition("="))
        if not name or not value:
            raise usage(f"{option} '{text}' is not NAME=VALUE, such as {example}")
        if name in pairs:
            raise usage(f"{option} {name} is given twice; give it once")
        pairs[name] = value
    return pairs


def parse_value(name: str, text: str, kind: Any) -> bool | int | float | str:
    """The value of an option in the type that its function declares.

    Args:
        name: of the option, for the message.
        text: as the user wrote it.
        kind: ``int``, ``float``, ``bool``, a ``Literal`` of words, or one of the numbers or
            ``None``.

    Raises:
        typer.BadParameter: not a value of that type.
    """
    number = next((k for k in get_args(kind) if k in (int, float)), kind)
    words: dict[str, bool | str] = {}
    if number is bool:
        words = {"true": True, "false": False}
    elif get_origin(number) is Literal:
        words = {word: word for word in get_args(number)}
    if words:
        if text not in words:
            raise usage(f"--option {name} takes {' or '.join(words)}, got '{text}'")
        return words[text]
    try:
        value: int | float = number(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        what = "a whole number" if number is int else "a finite number"
        raise usage(f"--option {name} takes {what}, got '{text}'")
    return value


def parse_slices(text: str | None, count: int) -> list[int]:
    """Indices of ``START:STOP:STEP`` (or of one number) among ``count`` slices.

    Raises:
        InputError: nothing is selected.
    """
    from inverse.errors import InputError

    if text is None:
        return list(range(count))
    parts = [int(part) if part.strip() else None for part in text.split(":")]
    if len(parts) == 1:
        chosen = [i for i in range(count) if i == parts[0]]
    else:
        chosen = list(range(count))[slice(*parts)]
    if not chosen:
        raise InputError(
            f"--slices {text} selects nothing of the {count} slices, numbered 0 to {count - 1}"
        )
    return chosen


def read_options(
    row: Named, given: Sequence[str], read: Callable[[str, str, Any], Any] = parse_value
) -> dict[str, Any]:
    """The values of ``NAME=VALUE`` texts, for options of a method or a sampler.

    Args:
        row: the method or sampler.
        given: the texts of ``--option``.
        read: name, text and declared type to the value.

    Raises:
        typer.BadParameter: an option that the row does not have, or a value of another type.
    """
    from inverse.errors import ReconError

    pairs = parse_pairs(given)
    if "steps" in pairs:
        raise usage("--option steps is an option of its own; give --steps")
    try:
        row.check_names(pairs)
    except ReconError as error:
        raise usage(str(error)) from None
    kinds = get_type_hints(row.run)
    return {name: read(name, text, kinds[name]) for name, text in pairs.items()}
