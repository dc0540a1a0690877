"""The training engine: grids, processes, averages, memory, files, and what a crash leaves."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cli_tools import recon
from safetensors.torch import load_file
from test_training import CARD, CONFIG, NETWORK, Kill, energy_config, images, run
from torch import nn

from inverse.errors import InputError, NoInputError, ReconError, UnsupportedError
from inverse.priors import GaussianPrior, PriorCard, load_prior
from inverse.training.data import Augmentation, ImageSet, draw_batch, load_images, on_grid
from inverse.training.ema import (
    Average,
    combination,
    combine,
    half_life,
    power,
    power_exponent,
    profile,
)
from inverse.training.judge import Judge
from inverse.training.loop import Task, TrainConfig, _draw, train
from inverse.training.memorisation import gap, nearest_neighbours
from inverse.training.parallel import Team

ROOT = Path(__file__).resolve().parent.parent
ALONE = Team(0, 1, torch.device("cpu"))


def log(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def stack(path: Path, name: str, patients: int = 4, each: int = 3) -> Path:
    """An npz stack of discs with its table."""
    data = images(patients, each, seed=len(name))
    np.savez(path / f"{name}.npz", hu=np.stack(data.images))
    rows = "".join(f"{name}-{patient},1.5\n" for patient in data.patient)
    (path / f"{name}.csv").write_text("patient,pixel_mm\n" + rows)
    return path / f"{name}.npz"


# --- the finer grid ----------------------------------------------------------------------------


def test_the_stated_share_of_steps_runs_on_the_finer_grid_from_fine_images_only() -> None:
    coarse = images(2, 2)
    fine = dataclasses.replace(images(2, 2, n=96, seed=5), pixel_mm=(0.6,) * 4)
    moves = Augmentation(size=16, pixel_mm=(1.0, 2.0))
    config = TrainConfig(steps=1000, batch=2, crop=16, fine=0.3)
    task = Task([coarse, fine], coarse, moves, CARD, config, NETWORK, ALONE)
    drawn = [_draw(task, step).batch for step in range(300)]
    # coarse grids have pixels from 1 mm on, fine ones up to 1 mm; both come whole and in crops
    finer = [b for b in drawn if float(b.pixel_mm.max()) < 1.0]
    assert len(finer) == pytest.approx(90, abs=32)  # 4 standard deviations of Binomial(300, 0.3)
    assert {b.images.shape[-1] for b in finer} == {16, 32}
    assert min(float(b.pixel_mm.min()) for b in finer) >= 0.6
    assert all(
        float(b.pixel_mm.min()) >= 1.0
        for b in drawn
        if b.images.shape[-1] == 16 and not any(b is f for f in finer)
    )
    without = dataclasses.replace(task, sets=[coarse], config=dataclasses.replace(config, fine=0))
    none = [_draw(without, step) for step in range(20)]
    assert {d.batch.images.shape[-1] for d in none} == {16}


def test_fine_needs_fine_images_and_widens_the_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="pixels of at most 1 mm, got none"):
        run(tmp_path, "coarse", dataclasses.replace(CONFIG, fine=0.5))
    data = dataclasses.replace(images(), pixel_mm=(0.7,) * 12)
    np.savez(tmp_path / "a.npz", hu=np.stack(data.images))
    rows = "".join(f"{patient},0.7\n" for patient in data.patient)
    (tmp_path / "a.csv").write_text("patient,pixel_mm\n" + rows)
    arguments = [
        "train", "--data", tmp_path / "a.npz", "--modality", "ct", "--steps", 2, "--widths", "8",
        "--size", 16, "--crop", 16, "--batch", 2, "--pixel-mm", "1.1:2", "--samples", 0, "--json",
    ]  # fmt: skip
    assert recon(*arguments, "--out", tmp_path / "f.safetensors", "--fine", 0.5) == 0
    assert recon(*arguments, "--out", tmp_path / "g.safetensors", "--fine", 1.5) == 2
    capsys.readouterr()
    prior = load_prior(tmp_path / "f.safetensors")
    assert prior.card.pixel_mm_range == (0.55, 2.0)
    assert prior.net.config.pixel_mm == round(math.sqrt(0.55 * 2), 2)


def test_both_grids_are_judged_where_held_out_images_are_fine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def fine(data: ImageSet) -> ImageSet:
        return dataclasses.replace(data, pixel_mm=(0.6,) * len(data))

    def trained(name: str, held: ImageSet, config: TrainConfig, moves: Augmentation) -> PriorCard:
        card = dataclasses.replace(CARD, shape=(16, 16))
        out = tmp_path / f"{name}.safetensors"
        own = [fine(images(n=64)), images(n=16, seed=3)]
        return train(own, held, NETWORK, config, card, tmp_path / name, out, augmentation=moves)

    moves = Augmentation(size=16, pixel_mm=(1.0, 2.0))
    config = dataclasses.replace(
        CONFIG, steps=3, fine=0.5, crop=8, sigma_range=(0.1, 0.5), averages=(0.2,)
    )
    held = fine(images(n=64, seed=9))
    card = trained("both", held, config, moves)
    keys = {"validation", "training", "memorisation"}
    judged = log(tmp_path / "both")[2]
    assert {k for k in judged if k.startswith(tuple(keys))} == keys | {f"{k}_fine" for k in keys}
    # the finer grid is one of 32 x 32 pixels from 0.5 mm on, and the errors are those of it
    task = Task([held], held, moves, card, config, NETWORK, ALONE)
    coarse, finer = Judge(task)._grids
    assert finer.held.images.shape[1:] == (32, 32)
    assert float(finer.held.pixel_mm.max()) <= 1.0 <= float(coarse.held.pixel_mm.min())
    both = [card.training[f"validation_rmse{s}"] for s in ("", "_fine")]
    assert both[0] != both[1]
    geometric = np.exp(np.mean(np.log([v for errors in both for v in errors.values()])))
    choice = card.training["average"]
    assert choice["held_out_rmse"][choice["chosen"]] == pytest.approx(geometric, rel=1e-3)
    assert recon("priors", "show", tmp_path / "both.safetensors") == 0
    assert "validation_rmse_fine" in capsys.readouterr().out
    plain = trained("coarse", images(n=16, seed=9), dataclasses.replace(config, steps=1), moves)
    assert "validation_rmse_fine" not in plain.training
    assert "too coarse for the finer grid" in caplog.text


# --- several processes -------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 5, 16])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_cover_a_batch_once(count: int, size: int) -> None:
    parts = [range(count)[Team(r, size, torch.device("cpu")).share(count)] for r in range(size)]
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_share_of_a_batch_is_that_part_of_the_whole_batch() -> None:
    moves = Augmentation(size=32, pixel_mm=(1.0, 2.0))

    def batch(share: slice) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        return draw_batch([images()], moves, 5, 16, generator, share).images

    assert torch.equal(batch(slice(1, 3)), batch(slice(None))[1:3])
    assert batch(slice(2, 2)).shape == (0, 16, 16)


_WORKER = """
import dataclasses, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from test_training import CONFIG, Kill, energy_config, run
from inverse.errors import UnsupportedError
tmp = Path(sys.argv[1])
config = dataclasses.replace(CONFIG, batch=3)

def kill(step, *_):
    if step == 5:
        raise Kill

torch.distributed.init_process_group("gloo")
run(tmp, "two", config)
try:
    run(tmp, "two-killed", config, callback=kill)
except Kill:
    pass
run(tmp, "one-killed", config)
try:
    run(tmp, "refused", energy_config("pcd"), 16)
except UnsupportedError as error:
    assert "one process" in str(error)
else:
    raise AssertionError("pcd needs a whole batch on one process")
torch.distributed.destroy_process_group()
"""


def processes(command: list[str], count: int) -> None:
    """Run a command as ``count`` processes of one group, and wait."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = [
        subprocess.Popen(
            command,
            cwd=ROOT / "tests",
            env={
                **os.environ, "RANK": str(rank), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(ROOT),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    texts = [p.communicate(timeout=300)[0] for p in group]
    assert [p.returncode for p in group] == [0] * count, "\n".join(texts)


def same_curve(one: Path, two: Path) -> None:
    """Losses, gradients and weights agree to float tolerance."""
    a, b = log(one), log(two)
    assert [x["step"] for x in a] == [x["step"] for x in b]
    for key in ("loss", "gradient", "images"):
        np.testing.assert_allclose([x[key] for x in a], [x[key] for x in b], rtol=2e-4)
    x, y = (load_file(d / "state.safetensors") for d in (one, two))
    for name, value in x.items():
        # what the last normalisation takes away again has a gradient of rounding alone, which
        # Adam scales up
        idle = name.endswith(("up.0.0.conv2.bias", "up.0.0.skip.bias"))
        if name.startswith(("net.", "ema.", "slow.")) and not idle:
            torch.testing.assert_close(y[name], value, rtol=0, atol=5e-5, msg=name)


@pytest.mark.slow
def test_two_processes_follow_one_and_resume_each_other(tmp_path: Path) -> None:
    # batches of 3 crops, or of one whole image, which leaves a process without any
    config = dataclasses.replace(CONFIG, batch=3)

    def kill(step: int, *_: object) -> None:
        if step == 5:
            raise Kill

    run(tmp_path, "one", config)
    with pytest.raises(Kill):
        run(tmp_path, "one-killed", config, callback=kill)
    processes([sys.executable, "-c", _WORKER, str(tmp_path)], 2)
    run(tmp_path, "two-killed", config)
    assert {x["images"] for x in log(tmp_path / "one")} == {1, 3}
    for name in ("two", "two-killed", "one-killed"):
        same_curve(tmp_path / "one", tmp_path / name)
    assert load_prior(tmp_path / "two.safetensors").card.training["processes"] == 2


_ELASTIC = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from test_training import CONFIG, run
tmp = Path(sys.argv[1])

def fail(step, *_):
    if step == 5 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os._exit(7)

run(tmp, "elastic", CONFIG, callback=fail)
"""


def torchrun(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=cwd, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.slow
def test_torchrun_restarts_a_failed_process_from_the_state(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n{_ELASTIC}")
    done = torchrun("--nproc-per-node", 2, "--max-restarts", 3, script, tmp_path)
    assert done.returncode == 0, done.stderr
    run(tmp_path, "one", CONFIG)
    same_curve(tmp_path / "one", tmp_path / "elastic")


@pytest.mark.slow
def test_the_command_trains_under_torchrun_and_one_process_speaks(tmp_path: Path) -> None:
    stack(tmp_path, "a")
    arguments = [
        "train", "--data", tmp_path / "a.npz", "--modality", "ct", "--steps", 3, "--widths", "8",
        "--size", 32, "--crop", 16, "--batch", 3, "--samples", 2, "--device", "cpu", "--json",
    ]  # fmt: skip
    out = tmp_path / "two.safetensors"
    done = torchrun("--nproc-per-node", 2, "-m", "recon_cli.app", *arguments, "--out", out)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 3
    assert done.stderr.count("recon: a.npz: 12 slices, 4 patients") == 1
    assert recon(*arguments, "--out", tmp_path / "one.safetensors") == 0
    same_curve(tmp_path / "one.run", tmp_path / "two.run")


# --- averages of the weights -------------------------------------------------------------------


@pytest.mark.parametrize("sigma_rel", [0.03, 0.05, 0.1, 0.25])
def test_power_average_has_the_stated_width(sigma_rel: float) -> None:
    gamma = power_exponent(sigma_rel)
    width = math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))
    assert width == pytest.approx(sigma_rel, rel=1e-9)
    weights = profile(power(sigma_rel), 4000, 4000)
    assert weights.sum() == pytest.approx(1)
    t = np.arange(4001) / 4000
    mean = (weights * t).sum()
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-3)
    assert math.sqrt((weights * (t - mean) ** 2).sum()) == pytest.approx(sigma_rel, rel=2e-2)


def test_published_exponents() -> None:
    """Karras et al. 2024 give 6.94 and 16.97 for widths of 0.10 and 0.05."""
    assert power_exponent(0.10) == pytest.approx(6.94, abs=5e-3)
    assert power_exponent(0.05) == pytest.approx(16.97, abs=5e-3)
    for width in (0.0, 0.3, -1.0):
        with pytest.raises(ReconError, match="relative width"):
            power_exponent(width)


def test_any_average_is_rebuilt_from_snapshots_of_two() -> None:
    torch.manual_seed(0)
    net = nn.Linear(40, 1)
    steps, wanted = 600, (0.05, 0.08, 0.12, 0.2)
    kept = [Average.of(net, half_life(0.05)), Average.of(net, power(0.2))]
    direct = [Average.of(net, power(w)) for w in wanted]
    snapshots, profiles = [], []
    for step in range(1, steps + 1):
        with torch.no_grad():
            net.weight += 0.1 * torch.randn(net.weight.shape)
        for average in (*kept, *direct):
            average.update(net, step)
        if step % (steps // 12) == 0:
            for average in kept:
                snapshots.append({k: v.clone() for k, v in average.weights.items()})
                profiles.append(profile(average.keep, step, steps))
    for width, average in zip(wanted, direct, strict=True):
        x, left = combination(profiles, profile(power(width), steps, steps))
        rebuilt = combine(snapshots, x.tolist())["weight"]
        error = (rebuilt - average.weights["weight"]).norm()
        moved = (net.weight.detach() - average.weights["weight"]).norm()
        assert left < 0.02
        assert float(error / moved) < 0.01, width


def test_the_average_is_chosen_after_the_run_by_held_out_error(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=24, lr=1e-2, validate_every=24, save_every=24)
    plain = run(tmp_path, "one", config)
    assert len(list((tmp_path / "one" / "averages").glob("*.safetensors"))) == 11
    chosen = run(tmp_path, "one", dataclasses.replace(config, averages=(0.04, 0.1, 0.2)))
    found = chosen.training["average"]
    assert list(found["held_out_rmse"]) == ["ema", "0.04", "0.1", "0.2"]
    assert found["held_out_rmse"][found["chosen"]] == min(found["held_out_rmse"].values())
    assert found["chosen"] != "ema", "a run this short wants a short average"
    assert chosen.sha256 != plain.sha256
    geometric = np.exp(np.mean(np.log(list(chosen.training["validation_rmse"].values()))))
    assert geometric == pytest.approx(found["held_out_rmse"][found["chosen"]], rel=1e-3)
    assert run(tmp_path, "two", config).sha256 == plain.sha256
    with pytest.raises(ReconError, match="relative width"):
        run(tmp_path, "bad", dataclasses.replace(CONFIG, averages=(0.5,)))


# --- what the network is judged by -------------------------------------------------------------


def smooth(count: int, seed: int, size: int = 64) -> torch.Tensor:
    """Gaussian fields with structure over a few pixels of the small grid."""
    white = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(white, size=(size, size), mode="bicubic")[:, 0]


def test_copies_of_training_images_are_found_and_fresh_images_are_not() -> None:
    training, held, fresh = smooth(60, 0), smooth(24, 1), smooth(12, 2)
    copies = training[[5, 40, 17, 9, 30, 2]].roll((4, -2), dims=(1, 2)) * 3 + 7
    copies = copies + 0.3 * smooth(6, 3)
    found = nearest_neighbours(copies, training, held)
    assert found.nearest == (5, 40, 17, 9, 30, 2)
    assert min(found.correlation) > 0.9
    assert found.p_value < 1e-3
    assert found.record()["samples"] == 6
    assert nearest_neighbours(fresh, training, held).p_value > 0.05
    with pytest.raises(InputError, match="held-out images must be a finite stack"):
        nearest_neighbours(copies, training, held * math.nan)


def test_gap_alarm_follows_its_rule() -> None:
    generator = torch.Generator().manual_seed(0)

    def errors(level: float, spread: float) -> torch.Tensor:
        return level * torch.exp(spread * torch.randn(8, 16, generator=generator))

    alike = gap(errors(1.0, 0.3), errors(1.0, 0.3))
    worse = gap(errors(1.5, 0.3), errors(1.0, 0.3))
    unsure = gap(errors(1.5, 2.5), errors(1.0, 2.5))
    slight = gap(errors(1.1, 0.01), errors(1.0, 0.01))
    assert worse.ratio == pytest.approx(math.sqrt(1.5), rel=0.1)
    assert [g.alarm for g in (alike, worse, unsure, slight)] == [False, True, False, False]


def test_a_memorising_network_raises_the_alarm_and_simulated_images_do_not_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    card = run(tmp_path, "one", CONFIG)
    lines = log(tmp_path / "one")
    assert lines[2]["training"].keys() == lines[2]["validation"].keys()
    assert card.training["memorisation"] == lines[-1]["memorisation"]
    assert card.training["training_rmse"] == lines[-1]["training"]
    # the alarm in a run: held-out images that are another kind are denoised worse
    other = images(seed=9)
    other = dataclasses.replace(
        other, images=tuple(np.flip(i).copy() * 3 + 900 for i in other.images)
    )
    config = dataclasses.replace(CONFIG, steps=60, lr=1e-2, validate_every=60, save_every=60)
    arguments = (NETWORK, config, dataclasses.replace(CARD, shape=(32, 32)))
    done = train([images()], other, *arguments, tmp_path / "x", tmp_path / "x.safetensors")
    assert done.training["memorisation"]["alarm"]
    assert "memorisation" in caplog.text
    phantoms = dataclasses.replace(images(), natural=False)
    quick = dataclasses.replace(CONFIG, steps=1)
    arguments = (NETWORK, quick, dataclasses.replace(CARD, shape=(32, 32)))
    only = train([phantoms], other, *arguments, tmp_path / "y", tmp_path / "y.safetensors")
    assert "memorisation" not in only.training


def test_neighbours_of_samples_reach_the_card(tmp_path: Path) -> None:
    own = on_grid(images(), Augmentation(size=32, pixel_mm=(1.0, 2.0)))
    copied = run(tmp_path, "copied", dataclasses.replace(CONFIG, steps=1), draw=lambda _: own[:8])
    found = load_prior(tmp_path / "copied.safetensors").card.training["neighbours"]
    assert found == copied.training["neighbours"]
    assert found["largest_correlation"] == pytest.approx(1, abs=1e-3)


def gaussian_images(count: int, seed: int) -> tuple[ImageSet, np.ndarray]:
    """Draws of a smooth Gaussian on 8 x 8 pixels, and its covariance."""
    x = np.arange(8)
    line = np.exp(-((x[:, None] - x) ** 2) / 8.0)
    covariance = np.kron(line, line) + 1e-6 * np.eye(64)
    z = np.random.default_rng(seed).normal(size=(count, 64)) @ np.linalg.cholesky(covariance).T
    stack = tuple(i.astype(np.float32) for i in z.reshape(-1, 8, 8))
    patients = tuple(f"{seed}-{i}" for i in range(count))
    return ImageSet(stack, (1.0,) * count, patients, 0.0), covariance


def test_held_out_error_approaches_the_tweedie_floor_and_stays_above(tmp_path: Path) -> None:
    own, covariance = gaussian_images(4000, 1)
    held, _ = gaussian_images(400, 2)
    prior = GaussianPrior(0.0, torch.from_numpy(covariance), (8, 8))
    still = Augmentation(size=8, pixel_mm=(1.0, 1.0), rotation=0, shift_mm=0, zoom=0)
    config = TrainConfig(
        steps=150, batch=32, crop=8, warmup=10, lr=4e-3, validate_every=150, save_every=150
    )
    card = dataclasses.replace(
        CARD, unit="relative", offset=0.0, scale=1.0, shape=(8, 8), pixel_mm_range=(1.0, 1.0)
    )
    network = dataclasses.replace(NETWORK, patch=1, widths=(16, 24))
    done = train(
        [own], held, network, config, card, tmp_path / "g", tmp_path / "g.safetensors",
        augmentation=still, exact=prior,
    )  # fmt: skip
    floor, error = done.training["floor_rmse"], done.training["validation_rmse"]
    assert log(tmp_path / "g")[-1]["floor"] == floor
    values = np.linalg.eigvalsh(covariance)
    exact = math.sqrt(np.mean(values * 0.25 / (values + 0.25)))
    assert floor["0.5"] == pytest.approx(exact, rel=1e-3)
    for level in ("0.2", "0.5", "1", "2"):
        ratio = error[level] / floor[level]
        assert 0.9 < ratio < 1.35, (level, ratio)  # 16 images know their mean error to 10 %


# --- files -------------------------------------------------------------------------------------


def test_a_mixed_folder_is_read_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    import h5py

    from phantoms.series import write_phantom_series

    rng = np.random.default_rng(0)
    folder = tmp_path / "mixed"
    folder.mkdir()
    stack(folder, "a")
    for seed, modality in ((1, "CT"), (2, "MR")):
        volume = rng.normal(0, 50, (2, 16, 16)).astype(np.float32) + (modality == "MR") * 500
        write_phantom_series(
            folder / f"s{seed}", volume, (3.0, 1.5, 1.5), seed=seed, modality=modality
        )
    affine = np.diag([1.2, 1.2, 3.0, 1.0])
    nifti = rng.normal(0, 50, (16, 16, 4)).astype(np.float32)
    nifti[..., 0] = -1000.0
    nibabel.save(nibabel.Nifti1Image(nifti, affine), folder / "sub-07_ct.nii.gz")
    positive = np.abs(nifti) + 1
    nibabel.save(nibabel.Nifti1Image(positive, affine), folder / "raw.nii.gz")
    with h5py.File(folder / "h.h5", "w") as file:
        file["volume"] = rng.normal(0, 50, (3, 16, 16)).astype(np.float32)
        file["volume"].attrs["pixel_mm"] = 1.3
    (folder / "broken.nii").write_bytes(b"nothing of the kind")
    (folder / "readme.txt").write_text("hello")
    next((folder / "s1").glob("*.dcm")).with_name("twin.dcm").write_bytes(
        next(iter(sorted((folder / "s1").glob("*.dcm")))).read_bytes()
    )
    loaded = load_images(folder, "CT")
    assert len(loaded) == 12 + 2 + 3 + 3
    assert {p for p in loaded.patients if p.startswith(("sub-", "h", "a"))} >= {"sub-07", "h"}
    assert len(loaded.patients) == 4 + 1 + 1 + 1
    assert sorted(set(loaded.pixel_mm)) == pytest.approx([1.2, 1.3, 1.5])
    assert loaded.skipped == {
        "NIfTI file that cannot be used": 2,
        "constant or non-finite slice": 1,
        "copy of another slice": 1,
        "file that is not DICOM, NIfTI, npz or HDF5": 1,
        "slice of modality MR": 2,
    }


def test_a_zip_archive_is_read_like_a_folder(tmp_path: Path) -> None:
    from phantoms.series import write_phantom_series

    rng = np.random.default_rng(0)
    for seed in (1, 2):
        volume = rng.normal(0, 50, (3, 16, 16)).astype(np.float32)
        write_phantom_series(tmp_path / "in" / str(seed), volume, (3.0, 1.5, 1.5), seed=seed)
    (tmp_path / "in" / "note.txt").write_text("hello")
    packed = tmp_path / "in.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((tmp_path / "in").rglob("*")):
            archive.write(path, path.relative_to(tmp_path / "in"))
    whole, folder = load_images(packed, "CT"), load_images(tmp_path / "in", "CT")
    assert whole.patients == folder.patients
    assert sorted(map(bytes, whole.images)) == sorted(map(bytes, folder.images))
    assert whole.skipped == folder.skipped == {"file that is not DICOM, NIfTI, npz or HDF5": 1}
    # a byte of one member's pixels is wrong, another member ends early
    with zipfile.ZipFile(packed) as archive:
        infos = [i for i in archive.infolist() if i.filename.endswith(".dcm")]
    content = bytearray(packed.read_bytes())
    content[infos[1].header_offset + 200 + infos[1].compress_size // 2] ^= 0xFF
    packed.write_bytes(content)
    with zipfile.ZipFile(packed, "a") as archive:
        end = next((tmp_path / "in" / "1").glob("*.dcm")).read_bytes()[:-100]
        archive.writestr("short.dcm", end)
    damaged = load_images(packed, "CT")
    assert len(damaged) == 5
    assert damaged.skipped["zip member that cannot be used"] == 2
    (tmp_path / "both").mkdir()
    packed.rename(tmp_path / "both" / "a.zip")
    assert len(load_images(tmp_path / "both", "CT")) == 5
    # without its directory it is no archive, and is told so before the first step
    cut = tmp_path / "cut.zip"
    cut.write_bytes(content[:-400])
    with pytest.raises(InputError, match=r"'cut\.zip' is a damaged zip archive"):
        load_images(cut, "CT")
    shutil.copy(cut, tmp_path / "both" / "cut.zip")
    assert load_images(tmp_path / "both", "CT").skipped["zip file that cannot be used"] == 1


def test_unusable_files_and_too_few_images_are_told_with_their_exit_codes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def code(data: Path, *more: object) -> tuple[int, str]:
        result = recon(
            "train", "--data", data, "--modality", "ct", "--out", tmp_path / "p.safetensors",
            "--steps", 1, "--widths", "8", "--size", 16, "--crop", 16, *more,
        )  # fmt: skip
        return result, capsys.readouterr().err

    (tmp_path / "empty").mkdir()
    assert code(tmp_path / "absent")[0] == 3
    assert code(tmp_path / "empty")[0] == 3
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "x.txt").write_text("x")
    found, text = code(tmp_path / "t")
    assert found == 3
    assert "1 x file that is not DICOM, NIfTI, npz or HDF5" in text
    bad = tmp_path / "bad.npz"
    bad.write_bytes(b"no archive")
    assert code(bad)[0] == 4
    found, text = code(stack(tmp_path, "one", patients=1))
    assert found == 4
    assert "at least 2 patients" in text
    found, text = code(stack(tmp_path, "few", patients=2, each=1))
    assert found == 4
    assert "at least 4 slices beside the held-out ones, got 1" in text
    found, text = code(stack(tmp_path, "b"), "--select", "colour=red")
    assert found == 2
    assert "no table beside the data has a column colour" in text
    assert "patient, pixel_mm" in text
    constant = np.zeros((3, 8, 8), np.int16)
    np.savez(tmp_path / "c.npz", hu=constant)
    (tmp_path / "c.csv").write_text("patient,pixel_mm\np,1\nq,1\nr,1\n")
    with pytest.raises(NoInputError, match="3 x constant or non-finite slice"):
        load_images(tmp_path / "c.npz", "CT")
    (tmp_path / "c.csv").write_text("patient,pixel_mm\np,1\nq,x\nr,1\n")
    with pytest.raises(InputError, match="expected millimetres"):
        load_images(tmp_path / "c.npz", "CT")


def test_patients_of_nifti_files_are_subjects_folders_or_files(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    rng = np.random.default_rng(0)

    def write(*names: str) -> Path:
        root = tmp_path / names[0].split("/")[0] / str(len(names))
        for name in names:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            volume = np.abs(rng.normal(100, 20, (8, 8, 2))).astype(np.float32)
            nibabel.save(nibabel.Nifti1Image(volume, np.diag([1.0, 1.0, 3.0, 1.0])), path)
        return root

    files = load_images(write("a_T1.nii.gz", "b_T1.nii.gz", "c_T1.nii.gz"), "MR")
    assert files.patients == ("a_T1", "b_T1", "c_T1")
    folders = load_images(write("p1/T1.nii.gz", "p1/T2.nii.gz", "p2/T1.nii.gz"), "MR")
    assert folders.patients == ("p1", "p2")
    assert len(folders) == 6
    bids = load_images(write("sub-1/anat/sub-1_T1w.nii.gz", "sub-2/anat/sub-2_T1w.nii.gz"), "MR")
    assert bids.patients == ("sub-1", "sub-2")


def test_development_data_load_from_one_folder(shared_data: Path) -> None:
    pytest.importorskip("nibabel")
    ct = load_images(shared_data / "ct_dicom", "CT")
    assert (len(ct), len(ct.patients)) == (64, 22)
    mr = load_images(shared_data / "mr_brain", "MR")
    assert len(mr) > 1224
    assert "sub-01" in mr.patients, "the volume of a subject of the stack is no new patient"


# --- what a crash leaves -----------------------------------------------------------------------


def test_a_full_disk_leaves_the_last_state_from_which_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path, "whole", CONFIG)
    from inverse.priors import checkpoint

    real: Callable[..., None] = checkpoint.save_file
    calls = SimpleNamespace(states=0)

    def full(tensors: dict, path: Path, metadata: dict) -> None:
        if "state" in Path(path).name:
            calls.states += 1
            if calls.states == 2:
                Path(path).write_bytes(b"half of a sta")
                raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, "full", CONFIG)
    assert len(load_file(tmp_path / "full" / "state.safetensors")) > 10
    assert not list((tmp_path / "full").rglob("*.tmp"))
    monkeypatch.undo()
    (tmp_path / "full" / ".state.safetensors.1.tmp").write_bytes(b"of a killed process")
    later = tmp_path / "full" / "averages" / "000000099.safetensors"
    later.write_bytes(b"of a longer run")
    assert run(tmp_path, "full", CONFIG).sha256 == whole.sha256
    assert [x["step"] for x in log(tmp_path / "full")] == [1, 2, 3, 4, 5, 6]
    assert not later.exists()
    assert not list((tmp_path / "full").rglob("*.tmp"))


def test_a_damaged_or_foreign_state_is_refused(tmp_path: Path) -> None:
    run(tmp_path, "one", CONFIG)
    state = tmp_path / "one" / "state.safetensors"
    good = state.read_bytes()
    state.write_bytes(good[: len(good) // 2])
    with pytest.raises(InputError, match="it is damaged"):
        run(tmp_path, "one", CONFIG)
    state.write_bytes(good.replace(b"training state 2", b"training state 1"))
    with pytest.raises(InputError, match="another version"):
        run(tmp_path, "one", CONFIG)
    state.write_bytes(good)
    with pytest.raises(InputError, match="another network, objective"):
        run(tmp_path, "one", dataclasses.replace(CONFIG, ema=0.1))


# --- speed and settings ------------------------------------------------------------------------


def test_batches_prepared_ahead_are_the_same(tmp_path: Path) -> None:
    plain = run(tmp_path, "plain", CONFIG)
    ahead = run(tmp_path, "ahead", dataclasses.replace(CONFIG, workers=3))
    assert ahead.sha256 == plain.sha256


def test_compiled_networks_serve_denoising_only(tmp_path: Path) -> None:
    for config in (
        dataclasses.replace(CONFIG, compile=True, objective="ssm"),
        dataclasses.replace(energy_config("dsm"), compile=True),
    ):
        with pytest.raises(UnsupportedError, match="second derivatives"):
            run(tmp_path, "refused", config, 16)


def test_settings_reach_the_run_and_speed_reaches_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p.safetensors"
    (tmp_path / "my.toml").write_text("langevin-step = 0.05\nchains = 32\nlevels = 7\n")
    arguments = [
        "train", "--data", stack(tmp_path, "a"), "--modality", "ct", "--out", out, "--steps", 2,
        "--widths", "8", "--size", 16, "--crop", 16, "--batch", 2, "--config",
        tmp_path / "my.toml", "--langevin-steps", 3, "--sigma-range", "0.02:10", "--samples", 2,
    ]  # fmt: skip
    assert recon(*arguments) == 0
    shown = capsys.readouterr()
    assert "images/s" in shown.err
    assert "nearest training image" in shown.out
    assert "memorisation gap" in shown.out
    card = load_prior(out).card
    settings = card.training["settings"]
    assert (settings["langevin_steps"], settings["langevin_step"]) == (3, 0.05)
    assert (settings["chains"], settings["levels"]) == (32, 7)
    assert card.sigma_range == (0.02, 10.0)
    assert card.training["neighbours"]["samples"] == 2
    first = log(out.with_suffix(".run"))[0]
    assert first["images"] == 2
    assert first["images_per_second"] > 0
    assert recon(*arguments, "--overwrite", "--sigma-range", "0:1") == 2
    assert recon(*arguments, "--overwrite", "--ema", "0.5") == 2
    assert recon(*arguments, "--overwrite", "--ema", "0.1,0.2", "--json") == 0
    assert set(json.loads(capsys.readouterr().out)["average"]["held_out_rmse"]) == {
        "ema", "0.1", "0.2",
    }  # fmt: skip
