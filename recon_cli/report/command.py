"""``recon report``: make the report of an output folder again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recon_cli.console import print_json
from recon_cli.errors import usage
from recon_cli.options import Json, check_ending, command
from recon_cli.runlog import SCHEMA_VERSION


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(
        app,
        "report",
        examples="""
        recon report demo-out
        recon report demo-out --figures figures
        recon report demo-out --overview overview.png
        """,
    )
    def report(
        folder: Annotated[
            Path,
            typer.Argument(
                metavar="OUT",
                help="Folder that demo, study or reconstruct wrote.",
                show_default=False,
            ),
        ],
        into: Annotated[
            Path | None,
            typer.Option(
                "--figures",
                metavar="DIR",
                help="Write the figures of the report as PNG files, for papers, instead of it.",
                show_default=False,
            ),
        ] = None,
        overview: Annotated[
            Path | None,
            typer.Option(
                metavar="PNG",
                help="Write one picture of a slice instead of the report.",
                show_default=False,
            ),
        ] = None,
        index: Annotated[
            int | None,
            typer.Option(
                "--slice",
                min=0,
                help="Position of the overview's slice in the output; needs --overview.",
                show_default="the middle",
            ),
        ] = None,
        as_json: Json = False,
    ) -> None:
        """(Re)build the HTML report of an output folder from the files in it."""
        from recon_cli.report.build import build, draw_figures, draw_overview

        if index is not None and overview is None:
            raise usage("--slice is the slice of an overview; give --overview PNG too")
        if overview is not None:
            check_ending(overview, ".png")
        made: list[Path] = []
        if into is not None:
            made += draw_figures(folder, into)
        if overview is not None:
            draw_overview(folder, overview, index)
            made.append(overview)
        if into is None and overview is None:
            made.append(build(folder))
        if as_json:
            files = [str(path) for path in made]
            print_json({"schema_version": SCHEMA_VERSION, "files": files})
        else:
            print(*made, sep="\n")
