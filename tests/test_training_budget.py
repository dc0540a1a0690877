"""Runs that are given a time: they fill it, end at the learning rate zero, and can be repeated."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_training import CARD, Kill, images
from torch import Tensor

from inverse.errors import ReconError
from inverse.priors import NetworkConfig, PriorCard
from inverse.training import loop
from inverse.training.budget import MARGIN, Plan, Progress
from inverse.training.data import Batch
from inverse.training.judge import Judge
from inverse.training.loop import TrainConfig, train

CONFIG = TrainConfig(
    steps=None,
    batch=2,
    crop=8,
    whole=0.3,
    warmup=20,
    sigma_range=(0.1, 1.0),
    validate_every=11,
    save_every=7,
)
SECONDS = 50.0
PLAN = Plan(
    costs={"coarse crops": 1.0, "coarse whole": 5.0},
    mixed=2.0,
    whole=5.0,
    validation=10.0,
    every=20,
    end=30.0,
    setup=40.0,
    whole_from=0.8,
    free=0.6,
    warmup=5,
)


class Machine:
    """A clock that moves by what is computed: 1 s a step of crops, 1.5 s one of whole images.

    Args:
        speed: how much faster a step is, by the seconds that have passed.
    """

    def __init__(self, speed: Callable[[float], float] = lambda _: 1.0) -> None:
        self.now, self.speed = 1000.0, speed

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds / self.speed(self.now - 1000.0)


@pytest.fixture
def timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., PriorCard]:
    """Train a tiny network on a machine."""
    loss, errors = loop._loss, Judge.errors

    def run(
        name: str,
        machine: Machine,
        config: TrainConfig = CONFIG,
        minutes: float | None = SECONDS / 60,
        **more: object,
    ) -> PriorCard:
        def slow_loss(net, objective, drawn, task) -> Tensor:
            machine.work(1.5 if drawn.batch.images.shape[-1] == 16 else 1.0)
            return loss(net, objective, drawn, task)

        def slow_errors(self: Judge, weights, batch: Batch) -> Tensor:
            machine.work(0.05 * len(batch.images))
            return errors(self, weights, batch)

        monkeypatch.setattr(loop, "_loss", slow_loss)
        monkeypatch.setattr(Judge, "errors", slow_errors)
        return train(
            [images(n=16)],
            images(n=16, seed=9),
            NetworkConfig(widths=(8,), blocks=1, embedding=8),
            config,
            dataclasses.replace(CARD, shape=(16, 16)),
            tmp_path / name,
            tmp_path / f"{name}.safetensors",
            minutes=minutes,
            clock=machine,
            **more,
        )

    return run


def log(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def test_the_length_solves_the_sum_of_costs() -> None:
    n = PLAN.length(1000.0)
    total = 40 + 0.8 * n * 2 + 0.2 * n * 5 + n / 20 * 10 + 30
    assert total == pytest.approx((1 - MARGIN) * 1000)
    # twice as slow as the trial, which counts like ten steps
    r = (10 * 2 + 2 * (210 + 5 * 10)) / (10 * 2 + 210 + 5 * 10)
    slow = PLAN.length(1000.0, Progress(100, 40 + 2 * (210 + 5 * 10), 210.0))
    assert 40 + r * slow * (1.6 + 1.0 + 0.5) + r * 30 == pytest.approx((1 - MARGIN) * 1000)
    assert Plan.of({"plan": PLAN.to_text()}) == PLAN
    assert Plan.of({}) is None
    assert PLAN.length(1.0) == 1.0


def test_a_settled_length_leaves_what_was_done_as_it_was() -> None:
    """At the last step done, neither the decay nor the whole images may have begun."""
    for step in range(1, 200):
        n = PLAN.settle(1e9, Progress(step, 41.0, step)).steps
        assert n is not None
        assert step - 1 < 0.6 * n + 1e-6
        assert 0.6 * n < step + 1e-6 < 0.6 * (n + 1)
    start = Progress(0, 40.0, 0.0)
    at_once = dataclasses.replace(PLAN, free=0.0)
    assert at_once.due(1000.0, start)
    assert at_once.settle(1000.0, start).steps == int(PLAN.length(1000.0))


def test_a_timed_run_fills_its_time_ends_at_rest_and_is_that_of_its_steps(
    timed: Callable[..., PriorCard], tmp_path: Path
) -> None:
    machine = Machine()
    card = timed("timed", machine)
    assert 0.92 * SECONDS < machine.now - 1000 <= SECONDS
    lines = log(tmp_path / "timed")
    steps = card.training["steps"]
    assert [x["step"] for x in lines] == list(range(1, steps + 1))
    assert lines[-1]["lr"] == pytest.approx(1e-3 / max(1.0, 0.4 * steps))
    assert lines[-1]["steps"] == steps
    open_ = [x.get("open", False) for x in lines]
    assert open_ == sorted(open_, reverse=True)
    assert sum(open_) == pytest.approx(0.6 * steps, abs=1)
    settings = card.training["settings"]
    assert settings["steps"] == steps
    assert settings["warmup"] < 5
    again = dataclasses.replace(CONFIG, steps=steps, warmup=settings["warmup"])
    assert timed("again", Machine(), again, None).sha256 == card.sha256
    assert [x["loss"] for x in log(tmp_path / "again")] == [x["loss"] for x in lines]
    # the whole run is over: the same command has nothing left to train
    assert timed("timed", Machine()).sha256 == card.sha256


@pytest.mark.parametrize("kill_at", [10, 25])
def test_a_timed_run_resumes_to_the_same_bits(
    timed: Callable[..., PriorCard], tmp_path: Path, kill_at: int
) -> None:
    whole = timed("whole", Machine(), dataclasses.replace(CONFIG, workers=2))

    def kill(step: int, *_: object) -> None:
        if step == kill_at:
            raise Kill

    with pytest.raises(Kill):
        timed("killed", Machine(), callback=kill)
    resumed = timed("killed", Machine())
    assert resumed.training["steps"] == whole.training["steps"]
    assert resumed.sha256 == whole.sha256


@pytest.mark.slow
@pytest.mark.parametrize("speed", [0.8, 2.0])
def test_the_speed_may_change_before_the_decay(
    timed: Callable[..., PriorCard], tmp_path: Path, speed: float
) -> None:
    machine = Machine(lambda seconds: 1.0 if seconds < 14 else speed)
    card = timed("run", machine)
    lines = log(tmp_path / "run")
    assert card.training["steps"] == lines[-1]["steps"]
    assert lines[-1]["lr"] < 3e-4
    assert 0.75 * SECONDS < machine.now - 1000 <= 1.08 * SECONDS


@pytest.mark.slow
def test_a_machine_that_slows_at_the_end_is_stopped_in_time(
    timed: Callable[..., PriorCard], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    machine = Machine(lambda seconds: 1.0 if seconds < 36 else 0.3)
    card = timed("run", machine)
    assert machine.now - 1000 < 1.05 * SECONDS + (1.5 + 1.6) / 0.3  # a step and a validation
    assert "the machine has slowed down" in caplog.text
    steps = card.training["settings"]["steps"]
    assert card.training["steps"] < steps
    rest = dataclasses.replace(CONFIG, steps=steps, warmup=card.training["settings"]["warmup"])
    done = timed("run", Machine(), rest, None)
    assert done.training["steps"] == steps
    assert timed("other", Machine(), rest, None).sha256 == done.sha256


def test_steps_and_minutes_stop_and_resume(timed: Callable[..., PriorCard]) -> None:
    config = dataclasses.replace(CONFIG, steps=16, warmup=3)
    whole = timed("whole", Machine(), config, None)
    first = timed("run", Machine(), config, 0.15)
    assert 4 < first.training["steps"] < 10
    assert timed("run", Machine(), config, 60.0).sha256 == whole.sha256
    with pytest.raises(ReconError, match="steps, or the minutes"):
        timed("none", Machine(), CONFIG, None)


@pytest.mark.slow
def test_trial_steps_leave_no_trace(timed: Callable[..., PriorCard]) -> None:
    """Also where the objective has a state and parameters of its own."""
    config = dataclasses.replace(
        CONFIG, objective="pcd", network="energy", crop=16, langevin_steps=1, chains=4
    )
    card = timed("timed", Machine(), config, 0.7)
    settings = card.training["settings"]
    again = dataclasses.replace(config, steps=settings["steps"], warmup=settings["warmup"])
    assert timed("again", Machine(), again, None).sha256 == card.sha256
    assert torch.is_grad_enabled()
