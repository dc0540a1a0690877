"""Instruments of calibration: they pass exact draws, refuse wrong ones, and agree by hand."""

from __future__ import annotations

import math

import pytest
import torch
from laws import random

from inverse.errors import GeometryError, InputError
from inverse.trust import coverage, fourier_ring_correlation, ranks, sfrc, tarp
from phantoms.benchmarks.calibration import acceptance


@pytest.mark.parametrize("kind", ["ct", "mri"])
def test_the_instruments_pass_exact_draws_and_refuse_others(kind: str) -> None:
    """METHODS section 4 at reduced size: 320 simulations of 63 draws on fields of 8 x 8."""
    rows = {row.draws: row for row in acceptance(kind, side=8, simulations=320, seed=2)}
    right = rows.pop("posterior")
    assert right.right
    assert right.sbc_p > 0.01
    assert right.tarp_p > 0.05
    assert right.held_75 == pytest.approx(0.75, abs=0.02)
    assert right.mean_ok
    assert right.spread_ok
    for row in rows.values():
        assert row.sbc_p < 1e-3, row.draws
        assert row.tarp_p < 1e-3, row.draws
        assert not (row.mean_ok and row.spread_ok), row.draws
    assert rows["posterior, spread x 0.8"].held_75 < 0.69
    # the marginals of the prior are right: only what depends on the data tells
    assert rows["prior"].held_75 == pytest.approx(0.75, abs=0.02)


def test_ranks_by_hand() -> None:
    truth = torch.tensor([[0.5, 9.0]] * 10)
    samples = torch.tensor([0.0, 0.2, 1.0])[None, :, None].expand(10, 3, 2)
    found = ranks(truth, samples, bins=2)
    assert found.ranks.tolist() == [[2, 3]] * 10
    assert found.counts.tolist() == [[0, 0], [10, 10]]
    # (0 - 5)^2 / 5 twice: chi-square of 10 with one degree
    assert found.p_each.tolist() == pytest.approx([math.erfc(math.sqrt(10 / 2))] * 2)
    assert found.p == pytest.approx(2 * math.erfc(math.sqrt(5)))
    assert found.draws == 3


def test_p_values_of_ranks_are_uniform_under_the_null() -> None:
    p = []
    for seed in range(300):
        draws = random((160, 16, 1), torch.float64, seed)
        p.append(ranks(draws[:, 0], draws[:, 1:], bins=8).p)
    values = torch.tensor(p)
    for level in (0.05, 0.2, 0.5):
        error = 4 * math.sqrt(level * (1 - level) / 300)
        assert float((values <= level).double().mean()) == pytest.approx(level, abs=error)


def test_coverage_is_nominal_where_ranks_allow() -> None:
    draws = random((4000, 20, 2), torch.float64, 0)
    found = coverage(draws[:, 0], draws[:, 1:], (0.5, 0.8, 0.9))
    assert found.levels == (0.5, 0.8, 0.9)
    for level, held, error in zip(found.levels, found.held, found.error, strict=True):
        assert held == pytest.approx(level, abs=4 * error)
        assert error == pytest.approx(math.sqrt(level * (1 - level) / 8000), rel=0.1)
    # both numbers of a simulation alike: half as many independent ones
    same = draws[..., :1].expand(-1, -1, 2)
    twice = coverage(same[:, 0], same[:, 1:], (0.5,)).error[0]
    assert twice == pytest.approx(math.sqrt(0.25 / 4000), rel=0.05)


def test_tarp_sees_what_marginals_hide() -> None:
    """Right marginals without their correlation; and exact draws pass, at every level."""
    n, draws = 400, 200
    z = random((n, draws + 1, 2), torch.float64, 1)
    joint = torch.stack([z[..., 0], 0.9 * z[..., 0] + math.sqrt(0.19) * z[..., 1]], dim=-1)
    reference = torch.tensor([4.0, -4.0]) + random((n, 2), torch.float64, 3)
    right = tarp(joint[:, 0], joint[:, 1:], reference)
    assert right.p > 0.05
    assert float((right.expected_coverage - right.levels).abs().max()) < 1.63 / math.sqrt(n)
    apart = tarp(joint[:, 0], z[:, 1:], reference)
    assert apart.p < 1e-3
    assert ranks(joint[:, 0], z[:, 1:192], bins=16).p > 0.01


def test_tarp_by_hand() -> None:
    truth, reference = torch.tensor([[2.0]]), torch.tensor([[0.0]])
    samples = torch.tensor([[[1.0], [-1.5], [3.0]]])
    found = tarp(truth, samples, reference)
    assert 2 / 4 <= float(found.share) < 3 / 4  # two of three are nearer


def test_ring_correlation_of_what_is_known() -> None:
    x = random((3, 32, 32), torch.float64, 0)
    torch.testing.assert_close(
        fourier_ring_correlation(x, 3 * x + 5), torch.ones(3, 16, dtype=torch.float64)
    )
    torch.testing.assert_close(
        fourier_ring_correlation(x, -x), -torch.ones(3, 16, dtype=torch.float64)
    )
    # independent noise: mean 0, variance 1 / modes, half of them being conjugates
    y = random((400, 2, 64, 64), torch.float64, 1)
    free = fourier_ring_correlation(y[:, 0], y[:, 1], window=False)
    assert float(free.mean(dim=0).abs().max()) < 0.06
    k = torch.fft.fftfreq(64, 1 / 64, dtype=torch.float64)
    modes = int((torch.hypot(k[:, None], k).round() == 20).sum())
    assert float(free[:, 19].var()) == pytest.approx(1 / modes, rel=0.3)
    # signal in noise of equal power: correlation 1 / 2
    noisy = y[:, 0] + y.flip(0)[:, 1]
    half = fourier_ring_correlation(noisy, y[:, 0] + y[:, 1], window=False)
    assert float(half[:, 10:].mean()) == pytest.approx(0.5, abs=0.02)


def test_patches_with_false_structure_are_found_where_they_are() -> None:
    """Blur does not flag; a disc that was put in does, in its patches only."""
    i = torch.arange(128, dtype=torch.float64)
    truth = random((1, 128, 128), torch.float64, 2)
    spectrum = torch.fft.fft2(truth)
    k = torch.fft.fftfreq(128, dtype=torch.float64)
    low = torch.exp(-((torch.hypot(k[:, None], k) / 0.08) ** 2))
    truth = torch.fft.ifft2(spectrum * low).real
    truth = truth / truth.std()
    blurred = torch.fft.ifft2(torch.fft.fft2(truth) * low).real
    assert sfrc(blurred, truth).rate < 0.1
    disc = ((i[:, None] - 40) ** 2 + (i - 88) ** 2 < 64).double()
    found = sfrc(truth + 8 * disc, truth)
    rows, columns = found.flagged[0].nonzero().T
    assert len(rows) > 0
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        assert abs(16 * row + 16 - 40) <= 26
        assert abs(16 * column + 16 - 88) <= 26
    assert found.rate == pytest.approx(len(rows) / found.patches)
    assert sfrc(random((1, 64, 64), torch.float64, 5), truth[:, :64, :64]).rate > 0.9
    assert sfrc(truth, truth).rate == 0.0
    empty = sfrc(torch.zeros(64, 64), torch.zeros(64, 64))
    assert (empty.rate, empty.patches) == (0.0, 0)


def test_calibration_refuses_bad_input() -> None:
    truth, samples = torch.zeros(80, 2), torch.zeros(80, 15, 2)
    for wrong in (samples[:79], samples[..., :1], samples[:, :0], samples[:, 0]):
        with pytest.raises(GeometryError, match="truths"):
            ranks(truth, wrong)
    with pytest.raises(InputError, match="do not divide"):
        ranks(truth, samples, bins=3)
    with pytest.raises(InputError, match="at least 80 simulations"):
        ranks(truth[:40], samples[:40], bins=16)
    with pytest.raises(InputError, match="finite"):
        coverage(truth * torch.nan, samples)
    with pytest.raises(InputError, match="between 0 and 1"):
        coverage(truth, samples, (1.0,))
    with pytest.raises(GeometryError, match="one reference"):
        tarp(truth, samples, truth[:1])
    x = torch.zeros(64, 64)
    with pytest.raises(GeometryError, match="square"):
        fourier_ring_correlation(x, x[:32])
    with pytest.raises(GeometryError, match="one shape"):
        sfrc(x, x[:32])
    with pytest.raises(InputError, match="between 0 and 1"):
        sfrc(x, x, frequency=0.0)
    with pytest.raises(InputError, match="NaN"):
        sfrc(x * torch.nan, x)
