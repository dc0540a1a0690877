"""``recon sample``: images of a prior alone, with no measurement."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from recon_cli import options as o
from recon_cli.console import log, print_json, print_table, progress
from recon_cli.errors import usage
from recon_cli.options import command, read_options
from recon_cli.output import output_folder
from recon_cli.runlog import RunLog, sha256_of, write_json
from recon_cli.task import pick_device

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from inverse.priors import NetworkPrior
    from inverse.sampling import Sampler

_SAMPLING = "Sampling"
_Prior = Annotated[
    str | None,
    typer.Option(
        "--prior",
        metavar="NAME|FILE",
        help="Bundled prior ('recon priors list') or a .safetensors file.",
        show_default="the first bundled prior",
        rich_help_panel=_SAMPLING,
    ),
]
_Sampler = Annotated[
    str, typer.Option("--sampler", help="See 'recon sample --list'.", rich_help_panel=_SAMPLING)
]
_Steps = Annotated[
    int | None,
    typer.Option(
        "--steps", min=1, help="Sampler steps.", show_default="the sampler's",
        rich_help_panel=_SAMPLING,
    ),
]  # fmt: skip
_Option = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="NAME=VALUE",
        help="An option of the sampler, such as eta=0.5 for ddim; repeat for more.",
        show_default=False,
        rich_help_panel=_SAMPLING,
    ),
]


def _sampler(name: str) -> Sampler:
    from inverse.sampling import SAMPLERS

    if name not in SAMPLERS:
        raise usage(
            f"no sampler '{name}'; there are {', '.join(SAMPLERS)} ('recon sample --list')"
        )
    return SAMPLERS[name]


def _options(name: str, steps: int | None, given: Sequence[str]) -> dict[str, Any]:
    """The sampler's resolved options.

    Raises:
        typer.BadParameter: see :func:`recon_cli.options.read_options`, or steps where it has none.
    """
    row = _sampler(name)
    wanted = read_options(row, given)
    if steps is not None and "steps" not in row.options:
        raise usage(f"sampler '{name}' has no option steps; it has {', '.join(row.options)}")
    return row.resolve(wanted if steps is None else {**wanted, "steps": steps})


def _load(
    name: str | None,
    sde: Literal["ve", "vp", "subvp"],
    pixel_mm: float | None,
) -> tuple[NetworkPrior, tuple[float, float]]:
    """The prior under the SDE, and the noise levels that both the SDE and its training have."""
    from inverse.errors import CheckpointError
    from inverse.priors import list_priors, load_prior
    from inverse.sde import SDE, VE, VP, SubVP

    if name is None:
        bundled = list_priors()
        if not bundled:
            raise CheckpointError("no prior is bundled; give one with --prior FILE")
        name = bundled[0].name
    prior = load_prior(name)
    low, high = prior.card.sigma_range
    process: SDE = {"ve": VE(low, high), "vp": VP(), "subvp": SubVP()}[sde]
    levels = (
        min(high, float(process.noise_level(1.0))),
        max(low, float(process.noise_level(process.t_min))),
    )
    return prior.at(pixel_mm=pixel_mm, sde=process), levels


def _draw(
    prior: NetworkPrior,
    sampler: str,
    options: Mapping[str, Any],
    levels: tuple[float, float],
    shape: tuple[int, ...],
    count: int,
    batch: int,
    seed: int,
    device: str,
) -> tuple[NDArray[np.float32], int]:
    """Samples in the prior's physical unit, and network calls a batch."""
    import torch

    from inverse.sampling import SAMPLERS, Noise

    prior = prior.to(device)
    calls = 0

    def counted(*_: object) -> None:
        nonlocal calls
        calls += 1

    hook = prior.net.register_forward_hook(counted)
    drawn = []
    what = f"prior '{prior.card.name}', sampler {sampler}, {count} samples"
    with progress(what) as advance, torch.inference_mode():
        for first in range(0, count, batch):
            size = min(batch, count - first)
            noise = Noise([(seed, first + k) for k in range(size)], shape, device)

            def step(i: int, n: int, first: int = first, size: int = size) -> None:
                advance(first * n + i * size, count * n)

            x = SAMPLERS[sampler].run(prior, noise, levels=levels, callback=step, **options)
            drawn.append((prior.offset + prior.scale * x).cpu())
    hook.remove()
    images = torch.cat(drawn)
    if prior.net.config.channels == 2:
        images = torch.view_as_complex(images.movedim(1, -1).contiguous())
    return images.numpy(), calls // len(drawn)


def _montage(path: Path, images: NDArray[Any], title: str, ct: bool) -> None:
    """All samples in one picture, marked as synthetic."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(images), max(4, round(len(images) ** 0.5)))
    rows = -(-len(images) // columns)
    ratio = images.shape[1] / images.shape[2]
    width = max(2.0 * columns, 5.0)
    figure = Figure((width, 2.0 * ratio * rows + 0.5), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    low, high = (-1000.0, 500.0) if ct else (0.0, float(np.percentile(np.abs(images), 99.5)))
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, image in zip(figure.axes, images, strict=False):
        shown = np.abs(image) if not ct else image
        axes.imshow(shown, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
    figure.suptitle(title, fontsize=8)
    figure.savefig(path)


def _list(wanted: bool) -> None:
    if not wanted:
        return
    from inverse.sampling import SAMPLERS

    rows = [
        [
            name,
            s.title,
            str(s.calls_per_step),
            "yes" if s.stochastic else "no",
            str(s.order),
            ", ".join(f"{k}={'auto' if v is None else v}" for k, v in s.options.items()),
            s.when,
            s.reference,
        ]
        for name, s in SAMPLERS.items()
    ]
    columns = ["name", "sampler", "calls a step", "stochastic", "order", "options", "when"]
    print_table("Samplers of a prior", [*columns, "reference"], rows, left=8)
    raise typer.Exit


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(
        app,
        "sample",
        examples="""
        recon sample -o samples
        recon sample -o samples -n 4 --sampler pc --steps 100 --seed 1
        recon sample -o samples --sampler ddim --option eta=0.5 --sde vp
        """,
    )
    def sample(
        out: o.Out,
        prior: _Prior = None,
        count: Annotated[
            int, typer.Option("--count", "-n", min=1, help="Images.", rich_help_panel=_SAMPLING)
        ] = 8,
        sampler: _Sampler = "heun",
        steps: _Steps = None,
        option: _Option = None,
        sde: Annotated[
            Literal["ve", "vp", "subvp"],
            typer.Option("--sde", help="Forward process.", rich_help_panel=_SAMPLING),
        ] = "ve",
        matrix: Annotated[
            int | None,
            typer.Option(
                "--matrix", min=16, max=1024, help="Rows and columns.",
                show_default="those of the prior's training", rich_help_panel=_SAMPLING,
            ),
        ] = None,
        pixel_mm: Annotated[
            float | None,
            typer.Option(
                "--pixel-mm", min=0.01, help="Pixel size of the images.",
                show_default="the prior's", rich_help_panel=_SAMPLING,
            ),
        ] = None,
        batch: Annotated[
            int, typer.Option("--batch", min=1, help="Images a network call.",
                              rich_help_panel=_SAMPLING),
        ] = 8,
        device: Annotated[
            str, typer.Option("--device", metavar="auto|cpu|cuda", help="Where to compute.",
                              rich_help_panel=_SAMPLING),
        ] = "auto",
        seed: o.Seed = 0,
        overwrite: o.Overwrite = False,
        as_json: o.Json = False,
        _: Annotated[
            bool, typer.Option("--list", callback=_list, is_eager=True, help="List the samplers."),
        ] = False,
    ) -> None:  # fmt: skip
        """Draw images from a prior alone: samples.npz, samples.png, run.json."""
        from dataclasses import asdict

        import numpy as np
        import torch

        options = _options(sampler, steps, option or [])
        run = RunLog("sample", {out: "OUT"})
        with output_folder(out, overwrite=overwrite) as folder:
            chosen, levels = _load(prior, sde, pixel_mm)
            card = chosen.card
            run.prior, run.seed, run.device = asdict(card), seed, pick_device(device)
            low, high = card.pixel_mm_range
            if not 0.95 * low <= chosen.pixel_mm <= 1.05 * high:
                run.warn(
                    "PIXEL_SIZE",
                    f"pixels of {chosen.pixel_mm:.3g} mm lie outside the prior's {low:.3g} to "
                    f"{high:.3g} mm; expect worse images",
                )
            sides = card.shape if matrix is None else (matrix, matrix)
            shape = sides if chosen.net.config.channels == 1 else (2, *sides)
            run.settings = {
                "sampler": sampler, **options, "sde": str(chosen.sde), "levels": levels,
                "count": count, "matrix": sides, "pixel_mm": chosen.pixel_mm, "batch": batch,
                "threads": torch.get_num_threads(),
            }  # fmt: skip
            start = time.monotonic()
            with run.phase("sample"):
                images, calls = _draw(
                    chosen, sampler, options, levels, shape, count, batch, seed, run.device
                )
            seconds = time.monotonic() - start
            run.settings["network_calls"] = calls
            unit = "HU" if card.unit == "HU" else "relative"
            with run.phase("write"):
                np.savez_compressed(
                    folder / "samples.npz",
                    images=images,
                    pixel_mm=np.float64(chosen.pixel_mm),
                    modality=np.str_(card.modality),
                    unit=np.str_(unit),
                )
                title = (
                    f"Synthetic images of no patient: prior {card.name}, sampler {sampler}, "
                    f"{calls} network calls, seed {seed}"
                )
                _montage(folder / "samples.png", images, title, unit == "HU")
                for name in ("samples.npz", "samples.png"):
                    run.outputs[name] = sha256_of(folder / name)
            write_json(folder / "run.json", run.to_dict())
        result = {
            "sampler": sampler,
            "samples": count,
            "network_calls": calls,
            "seconds": round(seconds, 3),
            "unit": unit,
            "mean": float(np.abs(images).mean() if np.iscomplexobj(images) else images.mean()),
            "std": float(images.std()),
        }
        if as_json:
            print_json({"out": str(out), **result, "warnings": run.warnings})
            return
        print_table(
            f"{count} samples of '{card.name}', {sides[0]} x {sides[1]}",
            ["sampler", "network calls", "seconds", f"mean {unit}", f"std {unit}"],
            [[sampler, str(calls), f"{seconds:.1f}", f"{result['mean']:.4g}",
              f"{result['std']:.4g}"]],
        )  # fmt: skip
        print("Synthetic images of no patient; research use only.")
        for name in [*run.outputs, "run.json"]:
            log(f"wrote {out / name}")
