"""``recon report``: make the report of an output folder again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recon_cli.options import command


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(
        app,
        "report",
        examples="""
        recon report demo-out
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
                help="Position of the overview's slice in the output.",
                show_default="the middle",
            ),
        ] = None,
    ) -> None:
        """(Re)build the HTML report of an output folder from the files in it."""
        from recon_cli.report.build import build, draw_overview

        if overview is not None:
            draw_overview(folder, overview, index)
            print(overview)
        else:
            print(build(folder))
