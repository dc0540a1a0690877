"""The console script ``recon``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from recon_cli import (
    benchmark,
    convert,
    demo,
    doctor,
    inspect,
    likelihood,
    methods,
    phantom,
    priors,
    reconstruct,
    runlog,
    sample,
    simulate,
    study,
    train,
    tune,
)
from recon_cli.errors import guarded
from recon_cli.report import command as report

app = typer.Typer(
    name="recon",
    help="Reconstruct CT and MR images from incomplete data with a learned prior, from DICOM to "
    "DICOM. Research use only; not a medical device.",
    epilog="Start with [bold]recon demo -o demo-out[/bold]. Exit codes: 0 ok, 1 internal, "
    "2 usage, 3 no input, 4 invalid input, 5 unsupported, 6 output, 7 resources, "
    "8 part of a batch failed, 9 numerical, 10 prior refused.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"recon {version('recon-sde')}")
        except PackageNotFoundError:
            print("recon 0+source")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


for module in (
    demo, phantom, inspect, convert, simulate, reconstruct, study, tune, report, train, sample,
    likelihood, priors, methods, benchmark, doctor,
):  # fmt: skip
    module.register(app)


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments; those of the process by default.

    Returns:
        The exit code; see :mod:`recon_cli.errors`.
    """
    arguments = sys.argv[1:] if argv is None else argv
    runlog.ARGV[:] = arguments
    return guarded(lambda: app(arguments, prog_name="recon", standalone_mode=False))


if __name__ == "__main__":
    sys.exit(main())
