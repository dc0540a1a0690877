"""``recon priors``: bundled and local priors, their cards, their hashes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

import typer

from recon_cli.console import plain_json, print_json, print_table
from recon_cli.options import Json, command

_Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME|FILE", help="Bundled prior or .safetensors file.", show_default=False
    ),
]


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(help="Bundled and local priors with their cards.", no_args_is_help=True)
    app.add_typer(group, name="priors")

    @command(group, "list")
    def list_(as_json: Json = False) -> None:
        """List the bundled priors."""
        from inverse.priors import list_priors

        cards = list_priors()
        if as_json:
            print_json([asdict(card) for card in cards])
            return
        rows = [
            [
                card.name,
                card.modality,
                f"{card.shape[0]} x {card.shape[1]}",
                f"{card.pixel_mm_range[0]:g} to {card.pixel_mm_range[1]:g} mm",
                ", ".join(str(source.get("name", "?")) for source in card.training_data),
                card.sha256[:12],
            ]
            for card in cards
        ]
        columns = ["name", "modality", "matrix", "pixels", "trained on", "sha256"]
        print_table(f"{len(cards)} bundled priors", columns, rows, left=6)

    @command(group, "show", examples="recon priors show ct-small")
    def show(name: _Name, as_json: Json = False) -> None:
        """Print a prior's card: training data, licence, limits, validation."""
        from inverse.priors import load_prior

        card = asdict(load_prior(name).card)
        if as_json:
            print_json(card)
            return
        for line in _lines(plain_json(card)):
            print(line)

    @command(group, "verify", examples="recon priors verify prior.safetensors")
    def verify(name: _Name, as_json: Json = False) -> None:
        """Check a prior file against its own hash; exit 10 if it is refused."""
        from inverse.priors import load_prior

        prior = load_prior(name)
        parameters = sum(p.numel() for p in prior.net.parameters())
        if as_json:
            print_json(
                {"name": prior.card.name, "sha256": prior.card.sha256, "parameters": parameters}
            )
            return
        print(f"{prior.card.name}: ok, {parameters} parameters, sha256 {prior.card.sha256}")


def _lines(value: Mapping[str, Any], indent: str = "") -> list[str]:
    """Nested values as indented text."""
    lines: list[str] = []
    for key, item in value.items():
        if isinstance(item, dict):
            lines += [f"{indent}{key}:", *_lines(item, indent + "  ")]
        elif isinstance(item, list) and any(isinstance(i, (dict, str)) for i in item):
            lines.append(f"{indent}{key}:")
            for i in item:
                body = _lines(i, "") if isinstance(i, dict) else [str(i)]
                lines += [f"{indent}  {'- ' if n == 0 else '  '}{t}" for n, t in enumerate(body)]
        else:
            text = ", ".join(map(str, item)) if isinstance(item, list) else item
            lines.append(f"{indent}{key}: {text}")
    return lines
