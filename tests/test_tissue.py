"""Signal equations: limits, the Ernst angle, nulled fluid, and contrasts as they are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from inverse.errors import InputError
from phantoms.anatomy import head
from phantoms.tissue import (
    SEQUENCES,
    TISSUES,
    InversionRecovery,
    SpinEcho,
    SpoiledGradientEcho,
    Tissue,
    nulling_time,
    signals,
)

WATER = Tissue(1000.0, 100.0, 0.8)


def test_full_recovery_and_no_decay_give_the_density():
    assert SpinEcho(1e5, 1e-3).signal(WATER) == pytest.approx(0.8, rel=1e-4)
    ernst = SpoiledGradientEcho(1e5, 1e-3, math.pi / 2, 1e9)
    assert ernst.signal(WATER) == pytest.approx(0.8, rel=1e-4)
    assert InversionRecovery(2e5, 1e-3, 1e5).signal(WATER) == pytest.approx(0.8, rel=1e-4)


def test_spin_echo_by_hand():
    # 0.8 (1 - 2 e^-0.49 + e^-0.5) e^-0.2
    expected = 0.8 * (1 - 2 * 0.6126263941844161 + 0.6065306597126334) * 0.8187307530779818
    assert SpinEcho(500, 20).signal(WATER) == pytest.approx(expected, rel=1e-12)


def test_gradient_echo_is_largest_at_the_ernst_angle():
    angles = np.linspace(0.01, math.pi / 2, 2000)
    best = angles[np.argmax([SpoiledGradientEcho(50, 2, a).signal(WATER) for a in angles])]
    assert best == pytest.approx(math.acos(math.exp(-50 / 1000)), abs=2e-3)


def test_decay_by_t2_and_t2_star():
    short, long = SpinEcho(1e5, 10).signal(WATER), SpinEcho(1e5, 110).signal(WATER)
    assert long / short == pytest.approx(math.exp(-1), rel=1e-3)
    both = [SpoiledGradientEcho(500, te, 0.5, t2_prime=50).signal(WATER) for te in (5, 15)]
    assert both[1] / both[0] == pytest.approx(math.exp(-10 * (1 / 100 + 1 / 50)), rel=1e-12)


def test_inversion_nulls_its_tissue():
    ti = nulling_time(1000, 6000)
    assert InversionRecovery(6000, 10, ti).signal(WATER) == pytest.approx(0, abs=1e-12)
    assert nulling_time(1000, 1e9) == pytest.approx(1000 * math.log(2))
    flair = signals(SEQUENCES["flair"], 1.5)
    assert flair["csf"] < 1e-6
    assert flair["oedema"] > flair["grey"] > flair["csf"]


@pytest.mark.parametrize("field", [1.5, 3.0])
def test_contrasts_are_those_of_textbooks(field):
    t1, t2 = signals(SEQUENCES["t1"], field), signals(SEQUENCES["t2"], field)
    assert t1["fat"] > t1["white"] > t1["grey"] > t1["csf"]
    assert t2["csf"] > t2["oedema"] > t2["grey"] > t2["white"]
    assert signals(SEQUENCES["pd"], field)["cortex"] < 0.01
    assert all(tissue[field].t2 <= tissue[field].t1 for tissue in TISSUES.values())


def test_head_takes_the_signals():
    table = signals(SEQUENCES["t2"], 3.0)
    first, second = head(4, contrast=table), head(4, contrast="t2")
    np.testing.assert_array_equal(first.centre, second.centre)
    image = first.slice(8.0).image((96, 96), 2.5)
    assert image.min() > -0.05
    assert 0.7 * table["csf"] < image.max() < 1.3 * table["csf"]
    with pytest.raises(InputError, match="lacks the signal of grey"):
        head(4, contrast={k: v for k, v in table.items() if k != "grey"})


@pytest.mark.parametrize(
    "make",
    [
        lambda: SpinEcho(-1, 10),
        lambda: SpinEcho(10, 20),
        lambda: SpoiledGradientEcho(20, 4, 2.0),
        lambda: InversionRecovery(1000, 100, 950),
        lambda: signals(SEQUENCES["t1"], 7.0),
    ],
)
def test_impossible_settings(make):
    with pytest.raises(InputError):
        make()
