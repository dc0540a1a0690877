"""The comparison of networks counts what it says it counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from inverse.errors import ReconError
from inverse.priors import NetworkConfig, NetworkPrior, UNet, load_prior
from inverse.priors.network import edm_denoise, position_channels
from phantoms.benchmarks import architecture, harness
from phantoms.slices import chest_slices


def test_flops_are_those_of_the_convolutions() -> None:
    """Two operations a multiply-add: 2 k^2 n_in n_out for every output pixel."""
    net = UNet(NetworkConfig(widths=(8, 16), blocks=1, embedding=16))
    counted = []

    def convolution(module: nn.Conv2d, _: object, out: torch.Tensor) -> None:
        counted.append(2 * module.weight.numel() * out[0, 0].numel())

    def linear(module: nn.Linear, _: object, out: torch.Tensor) -> None:
        counted.append(2 * module.weight.numel())

    hooks = [
        m.register_forward_hook(convolution if isinstance(m, nn.Conv2d) else linear)
        for m in net.modules()
        if isinstance(m, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        one = torch.ones(1)
        edm_denoise(net, torch.zeros(1, 1, 32, 32), one, one, position_channels((32, 32)))
    for hook in hooks:
        hook.remove()
    assert architecture.flops(net, 32) == sum(counted)


def test_rows_are_made_of_cost_and_of_error_after_the_same_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = {"a": NetworkConfig(widths=(8,)), "b": NetworkConfig(widths=(8, 8), patch=4)}
    monkeypatch.setattr(architecture, "VARIANTS", tiny)
    settings = architecture.Settings(("a", "b"), steps=1, batch=1, crop=16, chests=4, runs=1)
    done = architecture.Quality(dict.fromkeys(architecture.LEVELS, 0.1), 7.0, (30.0, 31.0))
    monkeypatch.setattr(architecture, "trained", lambda config, settings: done)
    result = harness.run(architecture.BENCHMARK, settings, tmp_path)
    a, b = result.rows["a"], result.rows["b"]
    assert a["parameters"] == sum(p.numel() for p in UNet(tiny["a"]).parameters())
    assert a["bytes_fp16"] == 2 * a["parameters"]
    assert a["flops"]["512"] == pytest.approx(4 * a["flops"]["256"], rel=0.01)
    assert b["patch"] == 4
    assert a["mean_rmse"] == pytest.approx(0.1)
    text = (tmp_path / "architecture.md").read_text()
    assert "| a | 8 | 2 | 2 |" in text
    assert "σ = 0.05" in text
    assert "| 0.1000 | 30.50 | 7 |" in text
    with pytest.raises(ReconError, match="no huge"):
        architecture.Settings(variants=("huge",))


def test_patients_that_judge_do_not_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architecture, "chest_slices", set)
    sets: Any = architecture.images("", 40)
    own, held = sets
    assert (len(own), len(held)) == (40, 10)
    assert not own & held
    assert not set(architecture.TRAINING) & set(architecture.HELD_OUT)


def test_one_scan_a_patient() -> None:
    held = chest_slices(range(20_040, 20_043), size=128, pixel_mm=(2.8, 3.0))
    psnr = architecture.sparse_view(load_prior("ct-small"), held, 2)
    assert len(psnr) == 2  # of three patients with two slices each
    assert min(psnr) > 22
    blind = NetworkPrior(UNet(NetworkConfig(widths=(8, 8))), architecture._CARD)
    assert max(architecture.sparse_view(blind, held, 2)) < min(psnr)
