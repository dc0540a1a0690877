"""Objectives against closed forms, data without leaks, and a loop that resumes exactly."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from inverse.errors import InputError, NoInputError, NumericalError
from inverse.priors import GaussianPrior, MixturePrior, NetworkConfig, PriorCard, load_prior
from inverse.sde import VE
from inverse.training.data import (
    Augmentation,
    ImageSet,
    draw_batch,
    load_images,
    split_by_patient,
)
from inverse.training.loop import TrainConfig, train
from inverse.training.objectives import denoising_score_matching, lognormal_levels

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


@pytest.mark.parametrize(("sigma", "floor"), [(0.5, 1.052149), (1.0, 0.226973), (2.0, 0.053160)])
def test_dsm_of_the_exact_score_is_the_known_floor(sigma: float, floor: float) -> None:
    """1/2 E|s + z/sigma|^2 = 1/2 (1/sigma^2 - J) on the mixture toy: 'sigma2' is twice that
    times sigma^2 in the score error, so (loss / 2) / sigma^2 here."""
    prior = MixturePrior(
        torch.tensor([0.3, 0.7], dtype=torch.float64),
        torch.tensor([[-2.0], [2.0]]),
        torch.full((2, 1, 1), 0.25),
        (1,),
        VE(),
    )
    n = 400_000
    generator = torch.Generator().manual_seed(0)
    mode = torch.where(torch.rand(n, 1, generator=generator) < 0.3, -2.0, 2.0)
    x0 = (mode + 0.5 * torch.randn(n, 1, generator=generator)).double()
    z = torch.randn(n, 1, generator=generator).double()
    level = torch.full((n,), sigma, dtype=torch.float64)
    t = prior.sde.time(sigma)
    loss = denoising_score_matching(lambda x, _: prior.denoise(x, t), x0, level, z, 1.0, "sigma2")
    value = loss / 2 / sigma**2
    error = float(value.std()) / n**0.5
    assert float(value.mean()) == pytest.approx(floor, abs=4 * error)


def test_edm_weighting_makes_the_untrained_loss_one_at_every_level() -> None:
    x0 = 0.7 * torch.randn(200_000, 1)
    for sigma in (0.01, 1.0, 30.0):
        s = torch.full((len(x0),), sigma)
        skip = 0.49 / (sigma**2 + 0.49)  # F = 0
        loss = denoising_score_matching(
            lambda x, _, k=skip: k * x, x0, s, torch.randn_like(x0), 0.7
        )
        assert float(loss.mean()) == pytest.approx(1.0, rel=0.02)


def test_levels_are_lognormal_stratified_and_clipped() -> None:
    generator = torch.Generator().manual_seed(0)
    levels = lognormal_levels(4096, -1.0, 1.5, (0.01, 50.0), generator)
    assert float(levels.log().mean()) == pytest.approx(-1.0, abs=0.01)
    assert float(levels.log().std()) == pytest.approx(1.5, rel=0.02)
    assert float(levels.min()) >= 0.01 - 1e-8
    few = lognormal_levels(4, -1.0, 1.5, (0.01, 50.0), generator).sort().values
    assert float(few[0]) < np.exp(-1.0) < float(few[-1])


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
    relative = load_images(tmp_path / "a.npz", "MR")
    assert np.percentile(relative.images[0][relative.images[0] > 0], 99.5) == pytest.approx(1)


def run(tmp_path: Path, name: str, config: TrainConfig, **extra) -> PriorCard:
    return train(
        [images()],
        images(seed=9),
        NETWORK,
        config,
        CARD,
        tmp_path / name,
        tmp_path / f"{name}.safetensors",
        **extra,
    )


def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    whole = run(tmp_path, "whole", CONFIG)

    class Kill(Exception):
        pass

    def kill(step: int, *_: object) -> None:
        if step == 5:  # after the state of step 4
            raise Kill

    with pytest.raises(Kill):
        run(tmp_path, "killed", CONFIG, callback=kill)
    resumed = run(tmp_path, "killed", CONFIG)
    assert resumed.sha256 == whole.sha256
    a, b = (load_file(tmp_path / d / "state.safetensors") for d in ("whole", "killed"))
    assert all(torch.equal(a[k], b[k]) for k in a)


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
