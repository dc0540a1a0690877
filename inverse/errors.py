"""Errors that a caller can act on.

::

    ValueError
    └── ReconError          one sentence: object, expected, got, what to do
        ├── GeometryError       impossible or inconsistent geometry            (exit 4)
        ├── InputError          unreadable, malformed or inconsistent input    (exit 4)
        ├── NoInputError        nothing to read where something was expected   (exit 3)
        ├── UnsupportedError    valid, but this toolkit does not serve it      (exit 5)
        ├── OutputError         output exists already or cannot be written     (exit 6)
        ├── ResourceError       out of memory, disk or device                  (exit 7)
        ├── NumericalError      non-finite or diverging computation            (exit 9)
        └── CheckpointError     a prior file was refused                       (exit 10)

The exit codes are the command line's; the API raises the same classes.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "GeometryError",
    "InputError",
    "NoInputError",
    "NumericalError",
    "OutputError",
    "ReconError",
    "ResourceError",
    "UnsupportedError",
]


class ReconError(ValueError):
    """Base of every error that a caller caused or can cure; its text says how."""

    exit_code: int = 4


class GeometryError(ReconError):
    """An impossible or inconsistent geometry: zero views, a negative pixel, a wrong shape."""


class InputError(ReconError):
    """Input that cannot be read or contradicts itself: truncated file, missing slice, NaN."""


class NoInputError(ReconError):
    """Nothing to read where input was expected: an empty folder, a missing file."""

    exit_code = 3


class UnsupportedError(ReconError):
    """Valid input that this toolkit does not serve, with the reason and the alternatives."""

    exit_code = 5


class OutputError(ReconError):
    """The output exists already, or cannot be written."""

    exit_code = 6


class ResourceError(ReconError):
    """Out of memory, disk space or device."""

    exit_code = 7


class NumericalError(ReconError):
    """A computation left the finite numbers or diverged."""

    exit_code = 9


class CheckpointError(ReconError):
    """A prior file was refused: wrong format, wrong hash, wrong modality."""

    exit_code = 10
