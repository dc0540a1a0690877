"""``recon benchmark``: the measured claims of this toolkit, for anyone to measure again."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer

from recon_cli.console import log, print_json, print_table
from recon_cli.errors import usage
from recon_cli.options import Json, command, parse_pairs, parse_value

if TYPE_CHECKING:
    from phantoms.benchmarks.harness import Benchmark

_SEPARATOR = re.compile(r",(?! )")  # labels of methods may hold a comma and a space


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(
        app,
        "benchmark",
        examples="""
        recon benchmark --list
        recon benchmark ct --quick -o results
        recon benchmark ct --full -o results --data CT_FOLDER --option views=23,60
        recon benchmark all --quick -o results --page results.md
        """,
    )
    def benchmark(
        name: Annotated[
            str | None,
            typer.Argument(metavar="NAME|all", help="Of --list.", show_default=False),
        ] = None,
        out: Annotated[
            Path | None,
            typer.Option(
                "--out", "-o", metavar="DIR", help="Folder of the results.", show_default=False
            ),
        ] = None,
        quick: Annotated[
            bool,
            typer.Option("--quick/--full", help="Two minutes, or the published settings."),
        ] = True,
        option: Annotated[
            list[str] | None,
            typer.Option(
                "--option",
                metavar="NAME=VALUE",
                help="A setting, values of a list parted by commas without a space, such as "
                "views=23,60; --list shows all. Repeat for more.",
                show_default=False,
            ),
        ] = None,
        data: Annotated[
            Path | None,
            typer.Option(
                "--data",
                metavar="IN",
                help="Your images instead of phantoms: DICOM folder or zip, for MR also .npz.",
                show_default=False,
            ),
        ] = None,
        overwrite: Annotated[
            bool,
            typer.Option(
                "--overwrite", help="Replace results of other settings, code or priors in DIR."
            ),
        ] = False,
        page: Annotated[
            Path | None,
            typer.Option(
                "--page",
                metavar="FILE",
                help="Also write one Markdown page of all results in DIR, which must lie beside "
                "or below it.",
                show_default=False,
            ),
        ] = None,
        listing: Annotated[
            bool, typer.Option("--list", help="List the benchmarks and their settings.")
        ] = False,
        as_json: Json = False,
    ) -> None:
        """Run a benchmark: JSON, Markdown table and picture; an interrupted one goes on.

        Rows that DIR holds already, of the same settings, code and priors, are not made again.
        Without NAME, only the page of --page is written.
        """
        from phantoms.benchmarks.catalogue import BENCHMARKS
        from phantoms.benchmarks.harness import page as assembled
        from phantoms.benchmarks.harness import run

        if listing:
            _list(BENCHMARKS.values(), as_json)
            return
        if out is None:
            raise usage("give the folder of the results by -o, or --list")
        if name is None and page is None:
            raise usage(f"give a NAME: all, {', '.join(BENCHMARKS)}")
        if name is not None and name != "all" and name not in BENCHMARKS:
            raise usage(f"no benchmark '{name}'; there are {', '.join(BENCHMARKS)}, and all")
        if name == "all" and (option or data):
            raise usage("--option and --data are for one benchmark; give its name")
        chosen = list(BENCHMARKS.values()) if name == "all" else [BENCHMARKS[name]] if name else []
        # all settings are checked before the first row is made
        wanted = [_settings(b, quick, option or [], data) for b in chosen]
        found = [
            run(b, settings, out, overwrite=overwrite, log=log)
            for b, settings in zip(chosen, wanted, strict=True)
        ]
        if page is not None:
            page.write_text(assembled(BENCHMARKS.values(), out))
        if as_json:
            print_json([vars(result) for result in found])
        else:
            for b in chosen:
                print((out / f"{b.name}.md").read_text())
            where = "" if page is None else f", the page is {page}"
            log(f"results are in {out}{where}")


def _settings(benchmark: Benchmark, quick: bool, given: list[str], data: Path | None) -> Any:
    """The settings that the options ask for.

    Raises:
        typer.BadParameter: a setting that the benchmark does not have, or of another type.
        ReconError: an impossible one.
    """
    settings = benchmark.quick if quick else benchmark.full
    kinds = get_type_hints(type(settings))
    changed: dict[str, Any] = {}
    for name, text in parse_pairs(given).items():
        if name not in kinds:
            raise usage(f"'{benchmark.name}' has no setting {name}; it has {', '.join(kinds)}")
        changed[name] = _read(name, text, kinds[name])
    if data is not None:
        if "data" not in kinds:
            raise usage(f"'{benchmark.name}' takes no --data")
        changed["data"] = str(data)
    return replace(settings, **changed) if changed else settings


def _read(name: str, text: str, kind: Any) -> Any:
    """A value, or a tuple of values, in the type that the settings declare."""
    if get_origin(kind) is tuple:
        return tuple(_read(name, part, get_args(kind)[0]) for part in _SEPARATOR.split(text))
    return text if kind is str else parse_value(name, text, kind)


def _list(benchmarks: Iterable[Benchmark], as_json: bool) -> None:
    if as_json:
        print_json(
            {
                b.name: {"title": b.title, "quick": vars(b.quick), "full": vars(b.full)}
                for b in benchmarks
            }
        )
        return
    rows = []
    for b in benchmarks:
        settings = (f"{k}={_shown(v)}" for k, v in vars(b.quick).items() if v != "")
        rows.append([b.name, b.title, "\n".join(settings)])
    print_table("Benchmarks", ["name", "what", "settings of --quick"], rows, left=3)


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
