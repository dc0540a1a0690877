"""What rows of the tables of samplers and of posterior methods share: options and their bounds.

An option is a keyword argument of the row's function, and its annotation says what it may be::

    def dds(problem: Problem, *, steps: Count = 40, eta: Share = 1.0, weight: Positive = 6.0): ...
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, Union, get_args, get_origin
from typing import get_type_hints as type_hints

from torch import Tensor

from inverse.errors import InputError

__all__ = ["Count", "Interval", "Mixing", "Named", "NotNegative", "Positive", "Share"]


@dataclass(frozen=True)
class Interval:
    """Numbers between two ends, ``[`` or ``]`` where an end belongs to them, else ``(`` or ``)``.

    Attributes:
        low: lower end.
        high: upper end.
        ends: whether they belong to the interval, such as ``"(]"``.
    """

    low: float
    high: float = math.inf
    ends: Literal["[]", "[)", "(]", "()"] = "[]"

    def __contains__(self, value: float) -> bool:
        above = self.low <= value if self.ends[0] == "[" else self.low < value
        below = value <= self.high if self.ends[1] == "]" else value < self.high
        return above and below

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{'of at least' if self.ends[0] == '[' else 'above'} {self.low:g}"
        return f"in {self.ends[0]}{self.low:g}, {self.high:g}{self.ends[1]}"


Count: TypeAlias = Annotated[int, Interval(1)]
Share: TypeAlias = Annotated[float, Interval(0, 1)]
Mixing: TypeAlias = Annotated[float, Interval(0, 1, "(]")]
Positive: TypeAlias = Annotated[float, Interval(0, ends="()")]
NotNegative: TypeAlias = Annotated[float, Interval(0)]

_WORDS = {bool: "True or False", int: "a whole number", float: "a number", NoneType: "None"}


@dataclass(frozen=True)
class Named:
    """A function of a table, with its keyword arguments as options.

    Attributes:
        name: its key in the table.
        run: the function.
        title: what it is.
    """

    name: str
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

    @property
    def accepts(self) -> Mapping[str, str]:
        """What each option may be, in words."""
        hints = type_hints(self.run, include_extras=True)
        return {name: _in_words(hints[name]) for name in self.options}

    def check_names(self, given: Mapping[str, Any]) -> None:
        """Refuse options that the function does not have.

        Raises:
            InputError: with the names of those that it has.
        """
        unknown = sorted(set(given) - set(self.options))
        if unknown:
            others = ", ".join(name for name in self.options if name != "steps")
            has = f"it has {others}" if "steps" not in self.options else (
                f"besides steps it has {others or 'none'}"
            )  # fmt: skip
            raise InputError(f"{self._label} has no option {', '.join(unknown)}; {has}")

    def resolve(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults overridden by ``given``, as plain numbers.

        Raises:
            InputError: an option that the function does not have, or a value out of its bounds.
        """
        self.check_names(given)
        hints = type_hints(self.run, include_extras=True)
        for name, value in given.items():
            if not _fits(value, hints[name]):
                raise InputError(
                    f"option {name} of {self._label} must be {_in_words(hints[name])}, "
                    f"got {value!r}"
                )
        return {**self.options, **{name: _plain(value) for name, value in given.items()}}

    @property
    def _label(self) -> str:
        return f"{type(self).__name__.lower()} '{self.name}'"


def _parts(hint: Any) -> tuple[Any, ...]:
    """Type and intervals of an annotation."""
    return get_args(hint) if get_origin(hint) is Annotated else (hint,)


def _in_words(hint: Any) -> str:
    """What an annotation asks for."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_in_words, get_args(hint)))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    kind, *intervals = _parts(hint)
    return " ".join([_WORDS[kind], *map(str, intervals)])


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation asks for."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    kind, *intervals = _parts(hint)
    if kind in (bool, NoneType):
        return isinstance(value, kind)
    return (
        not isinstance(value, bool)
        and isinstance(value, Integral if kind is int else Real)
        and math.isfinite(value)
        and all(value in interval for interval in intervals)
    )


def _plain(value: Any) -> Any:
    """A number of any library as Python's own."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)
