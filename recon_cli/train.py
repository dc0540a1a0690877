"""``recon train``: train a prior on a folder of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from recon_cli import runlog
from recon_cli.console import VERBOSITY, log, print_json
from recon_cli.errors import usage
from recon_cli.options import Json, command
from recon_cli.output import check_file

if TYPE_CHECKING:
    from torch import Tensor

    from inverse.priors import NetworkPrior, PriorCard
    from inverse.training.data import ImageSet
    from inverse.training.loop import TrainConfig

_HELD = 0.1
"""Share of patients that is held out where no other data are."""
_DATA, _NET, _CARD = "Data", "Network and run", "Prior card"


@dataclass(frozen=True)
class _Source:
    """One ``--data`` argument: a path and how often it is drawn."""

    path: Path
    weight: float


def _source(text: str) -> _Source:
    """``PATH`` or ``PATH:WEIGHT``."""
    head, colon, tail = text.rpartition(":")
    if colon and head and not Path(text).exists():
        try:
            weight = float(tail)
        except ValueError:
            weight = 0.0
        if weight > 0:
            return _Source(Path(head), weight)
        raise usage(f"--data '{text}' is not PATH or PATH:WEIGHT with a positive weight")
    return _Source(Path(text), 1.0)


def _selection(texts: Sequence[str]) -> dict[str, list[str]]:
    """``collection=A,B`` as ``{"collection": ["A", "B"]}``; repeats add up."""
    result: dict[str, list[str]] = {}
    for text in texts:
        column, equals, values = text.partition("=")
        if not equals or not column or not values:
            raise usage(f"'{text}' is not COLUMN=VALUE[,VALUE...], such as collection=A,B")
        result.setdefault(column, []).extend(values.split(","))
    return result


def _widths(text: str) -> tuple[int, ...]:
    try:
        widths = tuple(int(part) for part in text.split(","))
    except ValueError:
        widths = ()
    if not widths or min(widths) < 1:
        raise usage(f"--widths '{text}' must be positive numbers, such as 32,64,96,144")
    return widths


def _range(option: str, text: str, example: str) -> tuple[float, float]:
    """``MIN:MAX`` of positive numbers."""
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError:
        low = high = 0.0
    if not 0 < low <= high < math.inf:
        raise usage(f"{option} '{text}' is not MIN:MAX with 0 < MIN <= MAX, such as {example}")
    return low, high


def _averages(text: str | None) -> tuple[float, ...]:
    """Relative widths of ``--ema``."""
    if text is None:
        return ()
    try:
        widths = tuple(float(part) for part in text.split(","))
    except ValueError:
        widths = ()
    if not widths or not all(0 < w < 12**-0.5 for w in widths):
        raise usage(
            f"--ema '{text}' must be relative widths between 0 and 0.288, such as 0.04,0.1,0.2"
        )
    return widths


def _describe(source: _Source, images: ImageSet, licence: str, citation: str) -> dict[str, Any]:
    return {
        "name": source.path.stem,
        "licence": licence or "not stated",
        "patients": len(images.patients),
        "slices": len(images),
        "weight": source.weight,
        "citation": citation or "not stated",
        **({"left_out": dict(images.skipped)} if images.skipped else {}),
    }


def _described_phantoms(drawn: ImageSet, orientation: str) -> dict[str, Any]:
    plane = f" in {orientation} sections, cubic voxels" if orientation else ""
    return {
        "name": f"random chest phantoms{plane}",
        "licence": "made by this toolkit",
        "patients": len(drawn.patients),
        "slices": len(drawn),
        "weight": drawn.weight,
        "citation": "recon-sde, phantoms.anatomy.thorax",
    }


def _inner(low: float, high: float) -> tuple[float, float]:
    """A range without a ninth at each end, where augmentation has room to either side."""
    part = (high - low) / 9
    return round(low + part, 4), round(high - part, 4)


class _ListsObjectives(TyperCommand):
    """The command whose help lists the objectives; they are imported when it is asked for."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The usual help, with one line an objective at its end."""
        from inverse.training.objectives import OBJECTIVES

        lines = [
            f"[bold]{name}[/bold]  {entry.title} ({entry.reference}); network calls "
            f"{entry.calls}, backward passes {entry.backward}"
            + ("; energy network" if entry.network == "energy" else "")
            + ("; whole images" if entry.whole else "")
            + (f"; at most {entry.limit} pixels" if entry.limit else "")
            for name, entry in OBJECTIVES.items()
        ]
        head = (
            "[bold]Objectives[/bold], with the cost of a step (d pixels, k Langevin steps; an "
            "energy network takes one more backward pass a denoiser call)"
        )
        self.epilog = "\n\n".join([head, *lines, self.epilog or ""])
        super().format_help(ctx, formatter)


def _known(objective: str) -> str:
    """An objective of the table."""
    from inverse.training.objectives import OBJECTIVES

    if objective not in OBJECTIVES:
        raise usage(f"--objective '{objective}' is not one of {', '.join(OBJECTIVES)}")
    return objective


@dataclass(frozen=True)
class How:
    """Options of a training."""

    modality: Annotated[
        Literal["ct", "mr"],
        typer.Option(help="Kind of image.", show_default=False, rich_help_panel=_DATA),
    ]
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="Prior to write (.safetensors).",
            show_default=False,
        ),
    ]
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH[:WEIGHT]",
            help="Folder, zip or file of DICOM, NIfTI, or .npz or HDF5 stacks with a .csv "
            "beside them; repeat for more. WEIGHT is how often it is drawn relative to the "
            "others.",
            show_default="phantoms alone",
            rich_help_panel=_DATA,
        ),
    ] = None
    select: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN=A,B",
            help="Of stacks whose table has the column, keep these rows.",
            show_default=False,
            rich_help_panel=_DATA,
        ),
    ] = None
    validation_data: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Held-out images.",
            show_default="a tenth of the patients",
            rich_help_panel=_DATA,
        ),
    ] = None
    validation_select: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN=A,B",
            help="Rows of the validation data to keep.",
            show_default=False,
            rich_help_panel=_DATA,
        ),
    ] = None
    phantoms: Annotated[
        int,
        typer.Option(
            min=0,
            help="Random chest phantoms to add (CT); with --orientation in that plane, of "
            "cubic voxels.",
            rich_help_panel=_DATA,
        ),
    ] = 0
    phantom_weight: Annotated[
        float,
        typer.Option(min=0.001, help="How often phantoms are drawn.", rich_help_panel=_DATA),
    ] = 0.25
    objective: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="What is minimised; listed below.", rich_help_panel=_NET
        ),
    ] = "dsm"
    network: Annotated[
        Literal["score", "energy"],
        typer.Option(
            help="A denoiser, or an energy whose gradient is the score (twice the cost).",
            rich_help_panel=_NET,
        ),
    ] = "score"
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Optimiser steps.",
            show_default="10000, or as many as --minutes hold",
            rich_help_panel=_NET,
        ),
    ] = None
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            help="Time of the run, into which its schedule is fitted (reading and --samples "
            "come on top). With --steps: stop after this time; the same command continues.",
            show_default="no limit",
            rich_help_panel=_NET,
        ),
    ] = None
    warmup: Annotated[
        int,
        typer.Option(
            min=1,
            help="Steps of warm-up, at most a tenth of those that --minutes hold.",
            rich_help_panel=_NET,
        ),
    ] = 200
    run: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of state and log; an existing state is continued.",
            show_default="OUT with the suffix .run",
            rich_help_panel=_NET,
        ),
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything.", rich_help_panel=_NET)] = 0
    widths: Annotated[
        str,
        typer.Option(help="Channels of the network's levels.", rich_help_panel=_NET),
    ] = "32,64,96,144"
    blocks: Annotated[
        int, typer.Option(min=1, help="Residual blocks a level.", rich_help_panel=_NET)
    ] = 2
    size: Annotated[
        int,
        typer.Option(min=16, help="Rows and columns of the image grid.", rich_help_panel=_NET),
    ] = 256
    crop: Annotated[
        int,
        typer.Option(min=16, help="Side of the crops of most steps.", rich_help_panel=_NET),
    ] = 128
    whole: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of steps on whole images.", rich_help_panel=_NET),
    ] = 0.25
    whole_from: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Share of the run after which all steps are on whole images.",
            rich_help_panel=_NET,
        ),
    ] = 0.8
    fine: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Share of steps on a grid of twice the --size at half the pixel size: one "
            "prior for both.",
            rich_help_panel=_NET,
        ),
    ] = 0.0
    sigma_range: Annotated[
        str,
        typer.Option(
            metavar="MIN:MAX",
            help="Noise levels, prior units; equal ends for one level.",
            rich_help_panel=_NET,
        ),
    ] = "0.005:80"
    levels: Annotated[
        int,
        typer.Option(min=1, help="Length of the ladder of ncsn.", rich_help_panel=_NET),
    ] = 10
    langevin_steps: Annotated[
        int,
        typer.Option(min=1, help="Steps of Langevin a negative (cd, pcd).", rich_help_panel=_NET),
    ] = 5
    langevin_step: Annotated[
        float,
        typer.Option(min=1e-9, help="Their size relative to sigma^2.", rich_help_panel=_NET),
    ] = 0.1
    chains: Annotated[
        int, typer.Option(min=1, help="Persistent chains (pcd).", rich_help_panel=_NET)
    ] = 256
    ema: Annotated[
        str | None,
        typer.Option(
            metavar="W,W,...",
            help="Relative widths of averages of the weights to choose among by held-out "
            "error, also after a finished run.",
            show_default="the moving average",
            rich_help_panel=_NET,
        ),
    ] = None
    samples: Annotated[
        int,
        typer.Option(
            min=0,
            help="Samples of the finished prior to compare with their nearest training images.",
            rich_help_panel=_CARD,
        ),
    ] = 8
    shift_mm: Annotated[
        float,
        typer.Option(min=0, help="Largest random shift, mm.", rich_help_panel=_DATA),
    ] = 15.0
    batch: Annotated[int, typer.Option(min=1, help="Crops a step.", rich_help_panel=_NET)] = 16
    learning_rate: Annotated[
        float, typer.Option("--lr", min=1e-8, help="Learning rate.", rich_help_panel=_NET)
    ] = 1e-3
    pixel_mm: Annotated[
        str,
        typer.Option(
            metavar="MIN:MAX",
            help="Range of pixel sizes, mm.",
            rich_help_panel=_NET,
        ),
    ] = "1.1:2.0"
    bfloat16: Annotated[
        bool,
        typer.Option("--bfloat16", help="Network arithmetic in bfloat16.", rich_help_panel=_NET),
    ] = False
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda", help="Device.", rich_help_panel=_NET)
    ] = "auto"
    compile_: Annotated[
        bool,
        typer.Option("--compile", help="Compile the network first.", rich_help_panel=_NET),
    ] = False
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Threads that prepare the next batches.",
            show_default="4 on a GPU, 0 on a CPU",
            rich_help_panel=_NET,
        ),
    ] = None
    name: Annotated[
        str | None,
        typer.Option(help="Name of the prior.", show_default="the file's", rich_help_panel=_CARD),
    ] = None
    licence: Annotated[str, typer.Option(help="Licence of the data.", rich_help_panel=_CARD)] = ""
    citation: Annotated[str, typer.Option(help="Citation of the data.", rich_help_panel=_CARD)] = (
        ""
    )
    orientation: Annotated[
        Literal["", "axial", "coronal", "sagittal"],
        typer.Option(
            help="Plane of the images, and of phantoms: DICOM of others is left out, NIfTI of "
            "cubic voxels is cut anew. A reconstruction in another one is flagged.",
            show_default="not stated",
            rich_help_panel=_CARD,
        ),
    ] = ""
    limits: Annotated[
        list[str] | None,
        typer.Option(
            "--limit",
            help="A known limit, in a sentence; repeat for more.",
            show_default=False,
            rich_help_panel=_CARD,
        ),
    ] = None
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing prior file.")
    ] = False
    as_json: Json = False


@dataclass(frozen=True)
class _Data:
    """Images to train on and to hold out, with what the card says of them."""

    sets: list[ImageSet]
    held: ImageSet
    described: list[dict[str, Any]]


def _gather(how: How, sources: Sequence[_Source], kind: Literal["CT", "MR"]) -> _Data:
    """Read the images and draw the phantoms."""
    from inverse.training.data import load_images, split_by_patient

    wanted, held_rows = _selection(how.select or []), _selection(how.validation_select or [])
    plane = how.orientation or None
    _check_columns(sources, {**wanted, **held_rows}, how.validation_data)
    sets: list[ImageSet] = []
    for source in sources:
        sets.append(
            load_images(source.path, kind, select=wanted, weight=source.weight, plane=plane)
        )
        log(_found(source.path, sets[-1]))
    drawn = _drawn(how) if how.phantoms else None
    if how.validation_data is not None:
        held = load_images(how.validation_data, kind, select=held_rows, plane=plane)
        log(_found(how.validation_data, held))
        out_of_training = set(held.patients)
        sets = [s.where([p not in out_of_training for p in s.patient]) for s in sets]
    elif drawn is not None and not sets:
        drawn, held = split_by_patient(drawn, _HELD, how.seed)
    else:
        sets, held = _split(sets, how.seed)
    described = [
        _describe(source, images, how.licence, how.citation)
        for source, images in zip(sources, sets, strict=True)
    ]
    if drawn is not None:
        sets.append(drawn)
        described.append(_described_phantoms(drawn, how.orientation))
    log(f"held out: {len(held)} slices, {len(held.patients)} patients")
    return _Data(sets, held, described)


def _drawn(how: How) -> ImageSet:
    """Slices of random phantoms."""
    from phantoms.slices import chest_slices

    log(f"drawing {how.phantoms} phantoms")
    low, high = _range("--pixel-mm", how.pixel_mm, "1.1:2.0")
    first = 1000 * (how.seed + 1)
    chests = chest_slices(
        range(first, first + how.phantoms),
        size=2 * how.size if how.fine else how.size,
        pixel_mm=_inner(low / 2, high / 2) if how.fine else _inner(low, high),
        weight=how.phantom_weight,
        plane=how.orientation or "axial",
        cubic=bool(how.orientation),
    )
    return replace(chests, natural=False)


def _config(how: How, device: str) -> TrainConfig:
    """How to train."""
    from inverse.training.loop import TrainConfig

    steps = 10_000 if how.steps is None and how.minutes is None else how.steps
    return TrainConfig(
        steps=steps,
        objective=_known(how.objective),
        network=how.network,
        batch=how.batch,
        crop=how.crop,
        whole=how.whole,
        whole_from=how.whole_from,
        fine=how.fine,
        lr=how.learning_rate,
        warmup=how.warmup,
        averages=_averages(how.ema),
        sigma_range=_range("--sigma-range", how.sigma_range, "0.005:80"),
        levels=how.levels,
        langevin_steps=how.langevin_steps,
        langevin_step=how.langevin_step,
        chains=how.chains,
        seed=how.seed,
        bfloat16=how.bfloat16,
        compile=how.compile_,
        workers=(4 if device.startswith("cuda") else 0) if how.workers is None else how.workers,
    )


def _check(how: How, sources: Sequence[_Source]) -> None:
    """Refuse what has no meaning, before anything is read."""
    from inverse.errors import CheckpointError

    _selection(how.select or [])
    _range("--sigma-range", how.sigma_range, "0.005:80")
    _averages(how.ema)
    if _selection(how.validation_select or []) and how.validation_data is None:
        raise usage("--validation-select needs --validation-data")
    if not sources and not how.phantoms:
        raise usage("there is nothing to train on; give --data, or --phantoms for CT")
    if how.phantoms and how.modality != "ct":
        raise usage("--phantoms are CT images; leave them out for --modality mr")
    _known(how.objective)
    check_file(how.out, how.overwrite)
    if how.out.suffix != ".safetensors":
        raise CheckpointError(f"a prior file ends in .safetensors, got '{how.out.name}'")


def _train(how: How) -> None:
    sources, shape = [_source(text) for text in how.data or []], _widths(how.widths)
    low, high = _range("--pixel-mm", how.pixel_mm, "1.1:2.0")
    _check(how, sources)

    from inverse.priors import NetworkConfig, PriorCard
    from inverse.training.data import Augmentation
    from inverse.training.loop import train as fit
    from inverse.training.parallel import rank
    from recon_cli.task import pick_device

    device = pick_device(how.device)
    config = _config(how, device)
    leads = rank() == 0
    if not leads:
        VERBOSITY.apply(quiet=True, verbose=False, debug=VERBOSITY.debug)
    kind: Literal["CT", "MR"] = "CT" if how.modality == "ct" else "MR"
    finest, noise = low / 2 if how.fine else low, config.sigma_range
    data = _gather(how, sources, kind)
    card = PriorCard(
        name=how.name or how.out.stem,
        modality=kind,
        unit="HU" if kind == "CT" else "relative",
        offset=-500.0 if kind == "CT" else 0.5,
        scale=500.0 if kind == "CT" else 0.5,
        value_range=(0.0, 0.0),
        pixel_mm_range=(finest, high),
        shape=(how.size, how.size),
        sigma_range=noise,
        training_data=tuple(data.described),
        training={"argv": _public_argv()},
        limits=tuple(how.limits or ()),
        orientation=how.orientation or ("" if sources else "axial"),
    )
    spread = how.samples > 0 and noise[0] < noise[1]  # one level cannot be sampled from
    check = _sampler(how.samples, how.seed, (how.size, how.size), device) if spread else None
    with _Progress() as watch:
        done = fit(
            data.sets,
            data.held,
            NetworkConfig(
                widths=shape, blocks=how.blocks, pixel_mm=round(math.sqrt(finest * high), 2)
            ),
            config,
            card,
            how.run or how.out.with_suffix(".run"),
            how.out,
            augmentation=Augmentation(
                size=how.size,
                pixel_mm=(low, high),
                shift_mm=how.shift_mm,
                slabs=how.orientation in ("coronal", "sagittal"),
            ),
            device=device,
            minutes=how.minutes,
            draw=check,
            callback=watch if leads else None,
        )
    if leads:
        _tell(how, done)


def _tell(how: How, done: PriorCard) -> None:
    """Print what came of it."""
    summary = {
        "out": str(how.out),
        "name": done.name,
        "steps": done.training["steps"],
        "minutes": done.training["minutes"],
        **{key: done.training[key] for key in _MEASURED if key in done.training},
        "sha256": done.sha256,
    }
    if how.as_json:
        print_json(summary)
        return
    print(f"{how.out}: {done.name}, {summary['steps']} steps, {summary['minutes']} minutes")
    for line in _judged(done.training):
        print(line)


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(
        app,
        "train",
        examples="""
        recon train --data CT_FOLDER --modality ct --out prior.safetensors --minutes 60
        recon train --modality ct -o p.safetensors --data fine.npz:0.55 --data coarse.npz:0.2
        recon train --modality ct -o p.safetensors --data a.npz --select collection=A,B
        recon train --modality ct -o p.safetensors --data a.npz --validation-data b.npz
        recon train --modality ct -o e.safetensors --data a.npz --network energy
        recon train --modality ct -o s.safetensors --data a.npz --objective ssm-vr
        recon train --modality ct -o p.safetensors --data a.npz --ema 0.04,0.1,0.2 --overwrite
        recon train --modality ct -o c.safetensors --phantoms 300 --orientation coronal --minutes 9
        torchrun --nproc-per-node 4 -m recon_cli.app train --config my.toml
        """,
        cls=_ListsObjectives,
    )
    def train(how: How) -> None:
        """Train a prior, by default by denoising score matching; resumable, patient-wise."""
        _train(how)


_MEASURED = (
    "validation_rmse",
    "training_rmse",
    "memorisation",
    "validation_rmse_fine",
    "training_rmse_fine",
    "memorisation_fine",
    "average",
    "neighbours",
)
"""What a finished run tells of its prior; keys of the card's ``training``."""


def _found(path: Path, images: ImageSet) -> str:
    """What a source gave, and what was left out of it and why."""
    text = f"{path.name}: {len(images)} slices, {len(images.patients)} patients"
    left = [f"{n} x {reason}" for reason, n in images.skipped.items()]
    return f"{text}; left out: {', '.join(left)}" if left else text


def _judged(training: Mapping[str, Any]) -> list[str]:
    """The final report in lines."""

    def losses(name: str) -> str:
        return ", ".join(f"{k}: {v:.4g}" for k, v in training[name].items())

    lines = []
    for suffix, grid in (("", ""), ("_fine", ", finer grid")):
        if f"validation_rmse{suffix}" in training:
            text = losses(f"validation_rmse{suffix}")
            lines.append(f"held-out RMSE by noise level (prior units{grid}): {text}")
        if f"training_rmse{suffix}" in training:
            gap = training[f"memorisation{suffix}"]
            verdict = "ALARM, the prior may repeat its images" if gap["alarm"] else "no alarm"
            lines += [
                f"the same of training patients:               {losses(f'training_rmse{suffix}')}",
                f"memorisation gap: {gap['ratio']:.3f} ({verdict}; {gap['rule']})",
            ]
    if "average" in training:
        tried = ", ".join(f"{k}: {v:.4g}" for k, v in training["average"]["held_out_rmse"].items())
        lines.append(f"average of the weights: {training['average']['chosen']} of {tried}")
    if "neighbours" in training:
        near = training["neighbours"]
        lines.append(
            f"nearest training image: median correlation of {near['samples']} samples "
            f"{near['median_correlation']:.3f}, of held-out slices {near['held_out_median']:.3f}; "
            f"p = {near['p_value']:.2g} that samples are this close by chance"
        )
    return lines


def _sampler(
    count: int, seed: int, shape: tuple[int, int], device: str
) -> Callable[[NetworkPrior], Tensor]:
    """``count`` samples of a finished prior in its physical unit, one at a time."""

    def draw(prior: NetworkPrior) -> Tensor:
        import torch

        from inverse.sampling import SAMPLERS, Noise

        low, high = prior.card.sigma_range
        run, prior = SAMPLERS["heun"].run, prior.to(device)
        log(f"drawing {count} samples for the nearest-neighbour check")
        with torch.inference_mode():
            images = [
                run(prior, Noise([(seed, k)], shape, device), levels=(high, low))
                for k in range(count)
            ]
        return torch.cat(images) * prior.scale + prior.offset

    return draw


def _check_columns(
    sources: Sequence[_Source], wanted: Mapping[str, Any], validation: Path | None
) -> None:
    """Refuse a selection by a column that no table has, rather than keep everything."""
    import csv

    known: set[str] = set()
    paths = [s.path for s in sources] + ([validation] if validation else [])
    for path in paths:
        for table in path.rglob("*.csv") if path.is_dir() else [path.with_suffix(".csv")]:
            if table.is_file():
                with table.open(newline="") as stream:
                    known |= set(next(csv.reader(stream), []))
    if missing := sorted(set(wanted) - known):
        raise usage(
            f"no table beside the data has a column {', '.join(missing)}; there are "
            f"{', '.join(sorted(known)) or 'no tables'}"
        )


def _split(sets: Sequence[ImageSet], seed: int) -> tuple[list[ImageSet], ImageSet]:
    """A tenth of all patients for validation, none of them in any training set."""
    from inverse.training.data import split_by_patient

    merged = replace(
        sets[0],
        images=tuple(i for s in sets for i in s.images),
        pixel_mm=tuple(p for s in sets for p in s.pixel_mm),
        patient=tuple(p for s in sets for p in s.patient),
    )
    _, held = split_by_patient(merged, _HELD, seed)
    out = set(held.patients)
    kept = [s.where([p not in out for p in s.patient]) for s in sets]
    return kept, held


def _public_argv() -> str:
    """The command without folder names, which may hold a patient's."""
    words = ["recon"]
    for word in runlog.ARGV:
        option, equals, value = word.rpartition("=")
        words.append(f"{option}{equals}{Path(value).name}" if "/" in value else word)
    return " ".join(words)


class _Progress:
    """Loss, speed and time left: a moving line on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        import sys

        self._moving = sys.stderr.isatty() and not VERBOSITY.quiet
        self._first: tuple[int, float] | None = None
        self._last = 0.0
        self._loss = 0.0
        self._images = 0
        self._open: int | None = None  # the warm-up of a run whose length is not settled

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        import sys

        if self._moving:
            sys.stderr.write("\n")

    def __call__(self, step: int, steps: int, record: Mapping[str, Any]) -> None:
        import sys

        seconds = float(record["seconds"])
        self._loss = (
            float(record["loss"])
            if not self._loss
            else (0.98 * self._loss + 0.02 * float(record["loss"]))
        )
        if self._first is None:
            self._first = (step, seconds)
        else:
            self._images += record["images"]
        if self._open and "open" not in record:
            log(
                f"the time holds {steps} steps; in place of --minutes, --steps {steps} "
                f"--warmup {self._open} would repeat this run"
            )
        self._open = record["warmup"] if "open" in record else None
        pause = 1.0 if self._moving else 30.0
        checked = record.get("validation")
        if seconds - self._last < pause and not checked and step < steps:
            return
        self._last = seconds
        passed = max(seconds - self._first[1], 1e-9)
        rate = (step - self._first[0]) / passed
        left = (steps - step) / rate / 60 if rate > 0 else float("nan")
        text = (
            f"step {step} of {'about ' if self._open else ''}{steps}, loss {self._loss:.4f}, "
            f"{rate:.2f} steps/s, {self._images / passed:.1f} images/s, {left:.0f} min left"
        )
        for name, grid in (("validation", ""), ("validation_fine", " on the finer grid")):
            if found := record.get(name):
                losses = ", ".join(f"{k}: {v:.4g}" for k, v in found.items())
                text += f"; held-out RMSE{grid} {losses}"
        if "memorisation" in record:
            text += f"; gap to training patients {record['memorisation']['ratio']:.3f}"
        if self._moving and not checked:
            sys.stderr.write(f"\r\x1b[2Krecon: {text}")
            sys.stderr.flush()
        else:
            log(text)
