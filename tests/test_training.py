"""Data without leaks, and a loop that resumes exactly under every objective."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_tools import recon
from safetensors.torch import load_file

from inverse.errors import (
    InputError,
    NoInputError,
    NumericalError,
    ReconError,
    UnsupportedError,
)
from inverse.priors import (
    GaussianPrior,
    NetworkConfig,
    NetworkEnergyPrior,
    PriorCard,
    load_prior,
)
from inverse.training.data import (
    Augmentation,
    ImageSet,
    draw_batch,
    load_images,
    split_by_patient,
)
from inverse.training.loop import TrainConfig, train
from inverse.training.objectives import OBJECTIVES

CARD = PriorCard(
    name="tiny",
    modality="CT",
    unit="HU",
    offset=-500.0,
    scale=500.0,
    value_range=(0, 0),
    pixel_mm_range=(1.0, 2.0),
    shape=(32, 32),
    sigma_range=(0, 0),
)
NETWORK = NetworkConfig(widths=(8, 12), blocks=1, embedding=16)
CONFIG = TrainConfig(
    steps=6, batch=4, crop=16, warmup=2, validate_every=3, save_every=2, whole=0.5
)


def images(patients: int = 4, each: int = 3, n: int = 40, seed: int = 0) -> ImageSet:
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[:n, :n] - n / 2
    stack = [
        np.where(xx**2 + yy**2 < rng.uniform(8, 16) ** 2, rng.uniform(0, 80), -1000.0)
        for _ in range(patients * each)
    ]
    return ImageSet(
        tuple(s.astype(np.float32) for s in stack),
        (1.5,) * len(stack),
        tuple(f"{seed}-{i // each}" for i in range(len(stack))),
        -1000.0,
    )


def test_split_leaves_no_patient_on_both_sides() -> None:
    train_set, held = split_by_patient(images(10), 0.3, seed=1)
    assert len(held.patients) == 3
    assert not set(train_set.patients) & set(held.patients)
    assert len(train_set) + len(held) == 30
    with pytest.raises(InputError, match="at least 2 patients"):
        split_by_patient(images(1), 0.3, seed=1)


def test_unmoved_batch_is_the_image_and_crops_carry_their_position() -> None:
    data = images(1, 1, n=32)
    still = Augmentation(size=32, pixel_mm=(1.5, 1.5), rotation=0, shift_mm=0, zoom=0)
    generator = torch.Generator().manual_seed(0)
    whole = draw_batch([data], still, 1, None, generator)
    np.testing.assert_allclose(whole.images[0].numpy(), data.images[0], atol=1e-2)
    crop = draw_batch([data], still, 1, 16, generator)
    row = int(torch.round((crop.position[0, 0, 0, 0] + 1) * 16 - 0.5))
    col = int(torch.round((crop.position[0, 1, 0, 0] + 1) * 16 - 0.5))
    np.testing.assert_allclose(
        crop.images[0].numpy(), data.images[0][row : row + 16, col : col + 16], atol=1e-2
    )


def test_fine_images_are_area_averaged_to_a_pixel_size_in_the_range() -> None:
    fine = dataclasses.replace(images(1, 1, n=128), pixel_mm=(0.5,))
    motion = Augmentation(size=32, pixel_mm=(1.0, 2.0), rotation=0, shift_mm=0)
    batch = draw_batch([fine], motion, 8, None, torch.Generator().manual_seed(0))
    assert float(batch.pixel_mm.min()) >= 1.0
    assert float(batch.pixel_mm.max()) <= 2.0
    assert len(set(batch.pixel_mm.tolist())) > 4
    # the disc keeps its area in mm^2
    area = ((batch.images > -500).flatten(1).sum(dim=1) * batch.pixel_mm**2).numpy()
    exact = (fine.images[0] > -500).sum() * 0.25
    np.testing.assert_allclose(area, exact, rtol=0.12)


def test_load_images_reads_npz_by_its_table(tmp_path: Path) -> None:
    hu = np.random.default_rng(0).normal(0, 3000, (3, 8, 8)).astype(np.int16)
    np.savez(tmp_path / "a.npz", hu=hu)
    with pytest.raises(InputError, match="have a table"):
        load_images(tmp_path / "a.npz", "CT")
    (tmp_path / "a.csv").write_text("patient,pixel_mm,kind\np1,1.5,x\np2,1.2,y\np2,1.2,x\n")
    loaded = load_images(tmp_path / "a.npz", "CT", select={"kind": ["x"]})
    assert loaded.patient == ("p1", "p2")
    assert loaded.images[0].min() >= -1024
    with pytest.raises(NoInputError, match="no usable slice"):
        load_images(tmp_path / "a.npz", "CT", select={"kind": ["z"]})
    with pytest.raises(NoInputError, match="do not exist"):
        load_images(tmp_path / "b.npz", "CT")
    with pytest.raises(NoInputError, match="3 x slice with large negative values"):
        load_images(tmp_path / "a.npz", "MR")
    np.savez(tmp_path / "a.npz", hu=np.abs(hu))
    relative = load_images(tmp_path / "a.npz", "MR")
    assert np.percentile(relative.images[0][relative.images[0] > 0], 99.5) == pytest.approx(1)


def run(tmp_path: Path, name: str, config: TrainConfig, size: int = 32, **extra) -> PriorCard:
    return train(
        [images()],
        images(seed=9),
        NETWORK,
        config,
        dataclasses.replace(CARD, shape=(size, size)),
        tmp_path / name,
        tmp_path / f"{name}.safetensors",
        **extra,
    )


def energy_config(objective: str, **changes) -> TrainConfig:
    """An energy network on whole images, which every objective can train."""
    return dataclasses.replace(
        CONFIG,
        objective=objective,
        network="energy",
        crop=16,
        langevin_steps=2,
        chains=6,
        **changes,
    )


class Kill(Exception):
    pass


@pytest.mark.parametrize(
    "config",
    [CONFIG, *(energy_config(name) for name in ("ncsn", "ssm-vr", "pcd", "nce", "fce"))],
    ids=lambda c: f"{c.objective}-{c.network}",
)
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    tmp_path: Path, config: TrainConfig
) -> None:
    size = 32 if config is CONFIG else 16
    whole = run(tmp_path, "whole", config, size)

    def kill(step: int, *_: object) -> None:
        if step == 5:  # after the state of step 4
            raise Kill

    with pytest.raises(Kill):
        run(tmp_path, "killed", config, size, callback=kill)
    resumed = run(tmp_path, "killed", config, size)
    assert resumed.sha256 == whole.sha256
    a, b = (load_file(tmp_path / d / "state.safetensors") for d in ("whole", "killed"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    stateful = {"pcd": "objective.state", "nce": "objective.c", "fce": "objective.flow"}
    if config.objective in stateful:
        own = {k: v for k, v in a.items() if k.startswith(stateful[config.objective])}
        assert any(bool((v != 0).any()) for v in own.values())
    if config.objective == "fce":
        last = [v for k, v in own.items() if k.endswith("net.4.weight")]
        assert len(last) == 6
        assert all(bool((v != 0).any()) for v in last), "each coupling starts at zero and learns"


@pytest.mark.parametrize("network", ["score", "energy"])
@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n != "ism"])
def test_every_objective_trains_a_usable_prior_or_says_why_not(
    tmp_path: Path, name: str, network: str
) -> None:
    config = dataclasses.replace(energy_config(name, steps=2, batch=2), network=network)
    if network == "score" and OBJECTIVES[name].network == "energy":
        with pytest.raises(UnsupportedError, match="needs the energy itself"):
            run(tmp_path, "x", config, 16)
        return
    card = run(tmp_path, "x", config, 16)
    assert card.network == network
    assert card.training["settings"]["objective"] == name
    errors = card.training["validation_rmse"]
    assert all(np.isfinite(v) for v in errors.values())
    assert errors["5"] < 1.5, "a denoiser from the start: far below the noise"
    prior = load_prior(tmp_path / "x.safetensors")
    assert isinstance(prior, NetworkEnergyPrior) == (network == "energy")
    assert bool(torch.isfinite(prior.denoise(torch.zeros(1, 32, 32), 0.5)).all())


def small(tmp_path: Path, config: TrainConfig, size: int = 8) -> PriorCard:
    card = dataclasses.replace(CARD, shape=(size, size))
    return train(
        [images(n=size)],
        images(n=size, seed=9),
        dataclasses.replace(NETWORK, patch=1, widths=(8,)),
        config,
        card,
        tmp_path / "run",
        tmp_path / "small.safetensors",
    )


@pytest.mark.parametrize("network", ["score", "energy"])
def test_exact_score_matching_trains_small_images_only(tmp_path: Path, network: str) -> None:
    config = dataclasses.replace(energy_config("ism"), network=network, steps=1, batch=2, crop=8)
    assert small(tmp_path, config).training["steps"] == 1
    with pytest.raises(UnsupportedError, match="at most 1024 pixels, got 40 x 40"):
        small(tmp_path, config, size=40)


def test_one_noise_level_trains_at_that_level(tmp_path: Path) -> None:
    config = energy_config("ssm", sigma_range=(0.3, 0.3))
    card = run(tmp_path, "one", config, 16)
    assert list(card.training["validation_rmse"]) == ["0.3"]
    prior = load_prior(tmp_path / "one.safetensors")
    assert prior.sde.noise_level(prior.sde.time(0.3)) == pytest.approx(0.3)


def test_training_refuses_objectives_that_do_not_fit(tmp_path: Path) -> None:
    for config, error, text in (
        (energy_config("gan"), ReconError, "there are dsm, "),
        (dataclasses.replace(energy_config("pcd"), crop=8), UnsupportedError, "whole images"),
        (energy_config("pcd", batch=12), InputError, "a chain for every image"),
        (energy_config("dsm", sigma_range=(0.0, 1.0)), ReconError, "must be positive"),
        (energy_config("dsm", sigma_range=(2.0, 1.0)), ReconError, "increasing"),
        (
            energy_config("dsm-likelihood", sigma_range=(1.0, 1.0)),
            UnsupportedError,
            "single level",
        ),
        (energy_config("cd", langevin_step=1e9), NumericalError, "Langevin diverged"),
    ):
        with pytest.raises(error, match=text):
            run(tmp_path, "refused", config, 16)
    good = images()
    bad = dataclasses.replace(good, images=(*good.images[:-1], good.images[-1] * np.nan))
    with pytest.raises(InputError, match="NaN"):
        train([bad], images(seed=9), NETWORK, CONFIG, CARD, tmp_path / "n", tmp_path / "n.st")
    run(tmp_path, "state", CONFIG)
    with pytest.raises(InputError, match="another network, objective"):
        run(tmp_path, "state", dataclasses.replace(CONFIG, objective="ncsn"))
    with pytest.raises(InputError, match="another network, objective"):
        run(tmp_path, "state", dataclasses.replace(CONFIG, network="energy"))


def test_training_writes_log_card_and_a_loadable_prior(tmp_path: Path) -> None:
    card = run(tmp_path, "one", CONFIG)
    lines = [json.loads(x) for x in (tmp_path / "one/log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [1, 2, 3, 4, 5, 6]
    assert set(lines[2]["validation"]) == set(lines[5]["validation"])
    prior = load_prior(tmp_path / "one.safetensors")
    assert prior.card == card
    assert card.value_range[0] == -1000.0
    assert card.training["validation_patients"] == 4
    assert card.sigma_range == CONFIG.sigma_range
    assert prior.net.config.sigma_data == pytest.approx(
        float(np.std([(i + 500) / 500 for i in images().images])), rel=0.2
    )


def test_training_lowers_the_held_out_error(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=120, lr=1e-2, validate_every=120)
    trained = run(tmp_path, "long", config).training["validation_rmse"]
    first = run(tmp_path, "short", dataclasses.replace(CONFIG, steps=1)).training[
        "validation_rmse"
    ]
    assert trained["1"] < 0.9 * first["1"]


def test_training_refuses_shared_patients_foreign_states_and_nan(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="both training and validation"):
        train([images()], images(), NETWORK, CONFIG, CARD, tmp_path / "a", tmp_path / "a.st")
    run(tmp_path, "b", CONFIG)
    with pytest.raises(InputError, match="another network"):
        train(
            [images()],
            images(seed=9),
            dataclasses.replace(NETWORK, widths=(8, 16)),
            CONFIG,
            CARD,
            tmp_path / "b",
            tmp_path / "b.safetensors",
        )
    with pytest.raises(NumericalError, match="not finite at step"):
        run(tmp_path, "c", dataclasses.replace(CONFIG, steps=40, lr=1e30, warmup=1))


def test_default_error_of_a_gaussian_prior_is_its_mean_posterior_variance() -> None:
    prior = GaussianPrior(0.0, torch.diag(torch.tensor([1.0, 4.0])), (2,))
    expected = ((1 * 1 / 2 + 4 * 1 / 5) / 2) ** 0.5
    assert float(prior.error(1.0)) == pytest.approx(expected)


def test_load_images_reads_dicom_and_tells_patients_apart(tmp_path: Path) -> None:
    from phantoms.series import write_phantom_series

    for seed in (1, 2):
        volume = np.random.default_rng(seed).normal(0, 50, (2, 16, 16)).astype(np.float32)
        write_phantom_series(tmp_path / f"s{seed}", volume, (3.0, 1.5, 1.5), seed=seed)
    loaded = load_images(tmp_path, "CT")
    assert len(loaded) == 4
    assert len(loaded.patients) == 2
    assert set(loaded.pixel_mm) == {1.5}
    assert not any("PHANTOM" in p.upper() for p in loaded.patients)
    with pytest.raises(NoInputError, match="no usable slice"):
        load_images(tmp_path, "MR")


def test_command_line_lists_objectives_and_trains_by_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recon("train", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, entry in OBJECTIVES.items():
        assert f"{name} {entry.title}" in text
    stack = images()
    np.savez(tmp_path / "a.npz", hu=np.stack(stack.images))
    rows = "".join(f"{patient},1.5\n" for patient in stack.patient)
    (tmp_path / "a.csv").write_text("patient,pixel_mm\n" + rows)
    out = tmp_path / "e.safetensors"
    arguments = [
        "train", "--data", tmp_path / "a.npz", "--modality", "ct", "--out", out, "--steps", 1,
        "--widths", "8", "--size", 16, "--crop", 16, "--batch", 2, "--network", "energy",
    ]  # fmt: skip
    assert recon(*arguments, "--objective", "gan") == 2
    assert "is not one of dsm" in capsys.readouterr().err
    assert recon(*arguments, "--objective", "cd") == 0
    assert isinstance(load_prior(out), NetworkEnergyPrior)
