"""What rows of the tables of samplers and of posterior methods share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from inverse.errors import ReconError

__all__ = ["Named"]


@dataclass(frozen=True)
class Named:
    """A function of a table, with its keyword arguments as options.

    Attributes:
        run: the function.
        title: what it is.
    """

    run: Callable[..., Tensor]
    title: str

    _not_options: ClassVar[frozenset[str]] = frozenset()

    @property
    def options(self) -> Mapping[str, Any]:
        """Option names and their defaults."""
        return {
            p.name: p.default
            for p in inspect.signature(self.run).parameters.values()
            if p.kind is p.KEYWORD_ONLY and p.name not in self._not_options
        }

    def resolve(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults overridden by ``given``.

        Raises:
            ReconError: for an option that the function does not have.
        """
        unknown = sorted(set(given) - set(self.options))
        if unknown:
            raise ReconError(
                f"'{self.title}' has no option {', '.join(unknown)}; it has "
                f"{', '.join(self.options)}"
            )
        return {**self.options, **given}
