"""Every comparison of docs/score-family.md, at reduced size, agrees with its closed form."""

from __future__ import annotations

import math

import pytest
import torch

from phantoms.benchmarks import score_family as family


@pytest.mark.slow
@pytest.mark.parametrize("part", family.PARTS, ids=lambda part: part.__name__)
def test_every_comparison_agrees(part) -> None:
    rows = list(part(True))
    assert rows
    assert all(math.isfinite(row.measured) for row in rows)
    assert [f"{row.method}, {row.quantity}" for row in rows if not row.ok] == []


def test_the_reference_values_are_those_of_the_density() -> None:
    """The tabulated Fisher informations, from finite differences of the log-density alone."""
    for sigma, value in family.J.items():
        x, w = family.line(sigma, 4001)
        h = 1e-4
        slope = (
            torch.log(family.density(x + h, sigma)) - torch.log(family.density(x - h, sigma))
        ) / (2 * h)
        assert float(w @ slope**2) == pytest.approx(value, abs=2e-6)


def test_a_wrong_score_is_noticed(monkeypatch) -> None:
    """The comparisons are not true by construction."""
    right = family.noisy_score
    monkeypatch.setattr(family, "noisy_score", lambda sigma: lambda x: 1.02 * right(sigma)(x))
    rows = list(family.score_matching(True))
    assert sum(not row.ok for row in rows) > 5


def test_the_table_shows_what_differs() -> None:
    row = family.Row("objective", "ISM", "minimum", 1.0, 2.0, 0.1, 1, 2, 0.0)
    assert not row.ok
    assert "**differs**" in family.markdown([row])
