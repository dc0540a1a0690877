"""Options from a file: command line over ``--config FILE.toml`` over defaults.

The file holds option names without their dashes, one a line::

    views = 60
    method = "dds"
    tv = false
    option = ["weight=4"]
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from recon_cli.errors import usage
from recon_cli.runlog import nameless

__all__ = ["Config", "resolved"]

_TELLING = {"config", "quiet", "verbose", "debug", "json", "help", "dry-run"}
"""Options that change what is told, not what is made."""


def _names(context: typer.Context) -> dict[str, Any]:
    """The options of a command by the name that the user writes, without dashes."""
    return {
        opt.removeprefix("--"): parameter
        for parameter in context.command.params
        if parameter.param_type_name == "option"
        for opt in parameter.opts
        if opt.startswith("--")
    }


def _text(key: str, value: Any, parameter: Any) -> Any:
    """A value as the command line would give it, so that the same checks apply."""
    if parameter.is_flag:
        if isinstance(value, bool):
            return value
        raise usage(f"--config: '{key}' is true or false, got {value!r}")
    if parameter.multiple:
        if isinstance(value, list) and all(isinstance(v, str | int | float) for v in value):
            return [str(v) for v in value]
        raise usage(f"--config: '{key}' is a list of texts or numbers, got {value!r}")
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise usage(f"--config: '{key}' is one text or number, got {value!r}")


def _load(context: typer.Context, path: Path | None) -> Path | None:
    """Make the file's values the defaults of the command that runs."""
    if path is None:
        return None
    try:
        given = tomllib.loads(path.read_text())
    except OSError as error:
        raise usage(f"--config file '{path}' cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise usage(f"--config file '{path}' is not valid TOML: {error}") from None
    names = {k: p for k, p in _names(context).items() if k not in ("config", "help")}
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise usage(
            f"--config file '{path}' sets {', '.join(map(repr, unknown))}, which "
            f"'{context.command_path}' does not have; it has {', '.join(sorted(names))}"
        )
    context.default_map = {names[k].name: _text(k, v, names[k]) for k, v in given.items()}
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE.toml",
        help="Options from a file; those on the command line win.",
        callback=_load,
        is_eager=True,
        show_default=False,
    ),
]


def resolved(context: typer.Context, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a command runs with, wherever each comes from, but for what is told.

    Values are `nameless`, since folders and identifiers tell patients, unless the user asks.
    """

    def told(value: Any) -> Any:
        if isinstance(value, list):
            return [told(v) for v in value]
        if not isinstance(value, str | Path):
            return value
        return str(value) if given.get("include_phi") else nameless(str(value))

    names = {k: p.name for k, p in _names(context).items() if k not in _TELLING}
    return {name: told(given.get(parameter)) for name, parameter in names.items()}
