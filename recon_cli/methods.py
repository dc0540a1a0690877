"""``recon methods``: the samplers, what they cost and what they can claim."""

from __future__ import annotations

import typer

from recon_cli.console import print_json, print_table
from recon_cli.options import Json, command


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(app, "methods")
    def methods(as_json: Json = False) -> None:
        """List the reconstruction methods: cost, exactness, when to use which."""
        from inverse.posterior.methods import METHODS, PRESETS

        if as_json:
            print_json(
                {
                    name: {
                        "title": m.title,
                        "options": dict(m.options),
                        "accepts": dict(m.accepts),
                        "presets": {
                            modality: preset
                            for (method, modality), preset in PRESETS.items()
                            if method == name
                        },
                        "network_calls": m.network_calls,
                        "operator_calls_per_step": m.operator_calls,
                        "jacobian": m.jacobian,
                        "exactness": m.exactness,
                        "spread": m.spread,
                        "noise": m.noise,
                        "when": m.when,
                        "reference": m.reference,
                    }
                    for name, m in METHODS.items()
                }
            )
            return
        rows = [
            [
                name,
                m.title,
                str(m.network_calls),
                "yes" if m.jacobian else "no",
                m.exactness,
                m.noise,
                m.when,
                m.reference,
            ]
            for name, m in METHODS.items()
        ]
        print_table(
            "Methods (network calls a slice and sample, by default)",
            ["name", "method", "network calls", "gradient", "exactness", "noise", "when",
             "reference"],
            rows,
            left=8,
        )  # fmt: skip
