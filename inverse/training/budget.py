r"""The length of a run that has to fit into a given time.

Schedules are functions of ``step / steps``.  A few trial steps of each kind and a trial validation
tell what everything costs; from these follows

.. math:: N(r) = \frac{(\beta T - t_0)/r - t_{end}}{w\,c_m + (1 - w)\,c_w + c_v/V}

with the budget T, of which :math:`1 - \beta` is a margin, the time :math:`t_0` of the trial, the
time :math:`t_{end}` of what follows the last step, the costs :math:`c_m` of a step of the mixture
of crops and whole images, which make the share w of the run, :math:`c_w` of a step on whole
images, and :math:`c_v` of a validation, one in V steps; r is how much slower the run has been
than its steps were in the trial.  :math:`N(1)` is only an estimate: neither the learning rate
after its warm-up nor the choice of images depends on N before the share f (``free``) of the run.
N is settled where the run reaches that share at its own speed,

.. math:: k \ge f\, N(r) \;\Rightarrow\; N = k/f,

and stays.  So all that was done is what a run of N steps would have done, bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = ["Plan", "Progress"]

MARGIN = 0.02
"""Share of a budget that is not planned for."""
SLACK = 0.05
"""Share of a budget by which a run may exceed it rather than stop before it is at rest."""
TRUST = 10
"""Steps that the trial counts for where the speed of a run is told."""


@dataclass(frozen=True)
class Progress:
    """What a run has done.

    Attributes:
        step: steps.
        seconds: time since its start.
        expected: seconds of these steps by the plan's costs.
    """

    step: int
    seconds: float
    expected: float


@dataclass(frozen=True)
class Plan:
    """What a run costs and how long it becomes.

    Attributes:
        costs: seconds of a step of each kind; a kind is named by :meth:`kind`.
        mixed: seconds of a step before ``whole_from``, on average.
        whole: seconds of a step after it, on average.
        validation: seconds of a validation.
        every: steps between validations.
        end: seconds of what follows the last step.
        setup: seconds before the first step.
        whole_from: share of the run after which all steps are on whole images.
        free: share of the run before which nothing depends on its length.
        warmup: steps of warm-up, which a short run shortens.
        steps: the length, once it is settled.
    """

    costs: Mapping[str, float]
    mixed: float
    whole: float
    validation: float
    every: int
    end: float
    setup: float
    whole_from: float
    free: float
    warmup: int
    steps: int | None = None

    @staticmethod
    def kind(fine: bool, whole: bool) -> str:
        """The name of a kind of step: its grid and its images."""
        return f"{'fine' if fine else 'coarse'} {'whole' if whole else 'crops'}"

    def slowness(self, done: Progress) -> float:
        """r, the trial counting like :data:`TRUST` steps; 1 before the first step."""
        known = TRUST * self.mixed
        expected = done.expected + done.step // self.every * self.validation
        return (known + max(done.seconds - self.setup, 0.0)) / (known + expected)

    def length(self, budget: float, done: Progress | None = None) -> float:
        """N(r), at least 1.

        Args:
            budget: seconds of the whole run.
            done: what has been done; nothing by default.
        """
        w, r = self.whole_from, 1.0 if done is None else self.slowness(done)
        each = w * self.mixed + (1 - w) * self.whole + self.validation / self.every
        left = ((1 - MARGIN) * budget - self.setup) / r - self.end
        return max(1.0, left / each)

    def due(self, budget: float, done: Progress) -> bool:
        """Whether the share ``free`` of the run is over."""
        return done.step >= self.free * self.length(budget, done)

    def settle(self, budget: float, done: Progress) -> Plan:
        """The plan with its length, when it is due."""
        length = self.length(budget, done)
        if self.free and done.step:
            length = done.step / self.free + 1e-9  # 6 / 0.6 may be 9.999...
        return replace(self, steps=math.floor(length))

    def over(self, budget: float, done: Progress) -> bool:
        """Whether not even :data:`SLACK` leaves time for more than the end."""
        return done.seconds > (1 + SLACK) * budget - self.slowness(done) * self.end

    def to_text(self) -> str:
        """As JSON, for the state of a run."""
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Plan | None:
        """The plan in the metadata of a state, where there is one."""
        return cls(**json.loads(metadata["plan"])) if metadata.get("plan") else None
