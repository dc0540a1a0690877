"""What a training run keeps on disk, so that a kill or a full disk costs at most one interval.

``state.safetensors`` holds weights, their averages, the optimiser's moments and the objective's
state; ``averages/STEP.safetensors`` holds both averages now and then, for any other average after
the run (:mod:`inverse.training.ema`).  Every file is written beside its name, brought to disk and
then renamed: it is the old one or the new one, never half of one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from inverse.errors import InputError
from inverse.priors.checkpoint import write_tensors
from inverse.training.budget import Plan
from inverse.training.ema import Average, combination, combine, power, profile

__all__ = ["RunState", "read_state"]

_FORMAT = "recon-sde training state 2"
SNAPSHOTS = 12
"""Snapshots of the averages a run, evenly spread."""


@dataclass
class RunState:
    """A run between two steps.

    Attributes:
        net: the network under training.
        averages: averages of its weights, by name.
        objective: the objective, with its own state.
        optimiser: the optimiser.
        identity: settings that a state must share to be continued.
        step: steps done.
        seconds: time spent on them.
        plan: how a time budget is spent; None for a run of given length.
        expected: seconds of the steps done by the plan's costs.
    """

    net: nn.Module
    averages: dict[str, Average]
    objective: nn.Module
    optimiser: torch.optim.Optimizer
    identity: Mapping[str, Any]
    step: int = 0
    seconds: float = 0.0
    plan: Plan | None = None
    expected: float = 0.0

    def save(self, run: Path) -> None:
        """Write the state file of a run's folder."""
        tensors = {f"net.{k}": v for k, v in self.net.state_dict().items()}
        for name, average in self.averages.items():
            tensors |= {f"{name}.{k}": v for k, v in average.weights.items()}
        tensors |= {f"objective.{k}": v for k, v in self.objective.state_dict().items()}
        for index, entry in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{k}": torch.as_tensor(v) for k, v in entry.items()}
        metadata = {
            "format": _FORMAT,
            "step": str(self.step),
            "seconds": repr(self.seconds),
            "identity": _canonical(self.identity),
            "plan": self.plan.to_text() if self.plan else "",
            "expected": repr(self.expected),
        }
        write_tensors(run / "state.safetensors", _plain(tensors), metadata)

    def restore(self, found: tuple[dict[str, str], dict[str, Tensor]]) -> None:
        """Continue from what :func:`read_state` found.

        Raises:
            InputError: the state is of other settings.
        """
        metadata, tensors = found
        if metadata["identity"] != _canonical(self.identity):
            raise InputError(
                "the state in the run's folder is of another network, objective, data scale or "
                "seed; give the settings it was started with, or another run folder"
            )
        self.net.load_state_dict(_part(tensors, "net"))
        self.objective.load_state_dict(_part(tensors, "objective"))
        for name, average in self.averages.items():
            for key, value in _part(tensors, name).items():
                average.weights[key].copy_(value)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in _part(tensors, "adam").items():
            index, key = name.split(".")
            moments.setdefault(int(index), {})[key] = value
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": moments, "param_groups": groups})
        self.step, self.seconds = int(metadata["step"]), float(metadata["seconds"])
        self.plan, self.expected = Plan.of(metadata), float(metadata.get("expected", 0))

    def snapshot(self, run: Path) -> None:
        """Keep both averages of this step, in half precision."""
        tensors = {
            f"{name}.{k}": v.half() if v.dtype.is_floating_point else v
            for name, average in self.averages.items()
            for k, v in average.weights.items()
        }
        path = run / "averages" / f"{self.step:09d}.safetensors"
        write_tensors(path, _plain(tensors), {"format": _FORMAT})

    def tidy(self, run: Path) -> None:
        """Remove what a killed run left: unfinished files, and what is of steps after this one."""
        for path in run.rglob(".*.tmp"):
            path.unlink()
        for path in (run / "averages").glob("*.safetensors"):
            if int(path.stem) > self.step:
                path.unlink()
        log = run / "log.jsonl"
        if log.exists():
            lines = log.read_text().splitlines(keepends=True)
            kept = [line for line in lines if _step(line) <= self.step]
            if len(kept) < len(lines):
                temporary = log.with_name(f".{log.name}.tmp")
                temporary.write_text("".join(kept))
                temporary.replace(log)

    def average(self, run: Path, sigma_rel: float) -> tuple[dict[str, Tensor], float]:
        """The power-function average of a relative width, out of the snapshots.

        Args:
            run: the run's folder.
            sigma_rel: width as a share of the steps done.

        Returns:
            Weights, and the relative error of their profile.
        """
        weights: list[Mapping[str, Tensor]] = []
        profiles = []
        for path in sorted((run / "averages").glob("*.safetensors")):
            if int(path.stem) < self.step:
                tensors = load_file(path)
                for name, average in self.averages.items():
                    weights.append(_part(tensors, name))
                    profiles.append(profile(average.keep, int(path.stem), self.step))
        for average in self.averages.values():
            weights.append({k: v.cpu() for k, v in average.weights.items()})
            profiles.append(profile(average.keep, self.step, self.step))
        target = profile(power(sigma_rel), self.step, self.step)
        coefficients, error = combination(profiles, target)
        return combine(weights, coefficients.tolist()), error


def read_state(run: Path) -> tuple[dict[str, str], dict[str, Tensor]] | None:
    """Metadata and tensors of a run's state file, or None where there is none.

    Raises:
        InputError: damaged, or of another version.
    """
    path = run / "state.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"the state in '{run.name}' cannot be read ({type(error).__name__}); it is damaged: "
            "remove that folder, or give another"
        ) from error
    if metadata.get("format") != _FORMAT:
        raise InputError(
            f"the state in '{run.name}' is of another version of this toolkit; finish that run "
            "with the version that began it, or give another run folder"
        )
    return metadata, tensors


def _canonical(identity: Mapping[str, Any]) -> str:
    return json.dumps(identity, sort_keys=True)


def _step(line: str) -> int:
    """The step of a log line; a line cut short by a kill is of none that counts."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62


def _part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors under ``name.``, without it."""
    start = f"{name}."
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
