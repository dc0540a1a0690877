r"""Training objectives of scores, denoisers and energies.

Pure functions take plain callables on tensors ``(n, *shape)``, an analytic score as well as a
network, and return one loss a sample, ``(n,)``; all randomness is an argument.  Notation: score
:math:`s`, denoiser :math:`D = x + \sigma^2 s`, energy :math:`E` with :math:`s = -\nabla E`,
``d`` unknowns.  All hold on clean and on perturbed samples alike, since :math:`x_0 + \sigma z` is
again a sample of a density.  Losses carry a graph for the backward pass unless called under
``no_grad``.

:data:`OBJECTIVES` names those that ``recon train --objective`` offers.  There they train a model
of the perturbed images :math:`x = x_0 + \sigma z` conditional on :math:`\sigma`, so that each
yields a prior for every sampler.

A new objective is a function and an :class:`Objective` in the module of its family, and a row of
:data:`OBJECTIVES`:

=========================  ==================================================================
:mod:`.score_matching`     exact (implicit) and sliced score matching
:mod:`.denoising`          denoising score matching and its weights, NCSN's ladder
:mod:`.stein`              Stein's unbiased risk estimate
:mod:`.contrastive`        contrastive divergence, from the data and persistent
:mod:`.noise_contrastive`  noise-contrastive estimation, against a Gaussian or a flow
:mod:`.levels`             noise levels
:mod:`.base`               what they share
=========================  ==================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from inverse.training.objectives.base import Model, Objective, Perturbed, Setting
from inverse.training.objectives.contrastive import (
    Contrastive,
    Persistent,
    contrastive_divergence,
    langevin_chain,
    persistent_contrastive_divergence,
)
from inverse.training.objectives.denoising import (
    Denoising,
    Ladder,
    Likelihood,
    Sigma2,
    Weighting,
    denoising_score_matching,
    weight,
)
from inverse.training.objectives.levels import draw_levels, geometric_levels, lognormal_levels
from inverse.training.objectives.noise_contrastive import (
    WHOLE_LIMIT,
    FlowContrastive,
    NoiseContrastive,
    flow_contrastive_estimation,
    noise_contrastive_estimation,
)
from inverse.training.objectives.score_matching import (
    EXACT_LIMIT,
    Exact,
    Sliced,
    SlicedReduced,
    exact_score_matching,
    projections,
    sliced_score_matching,
)
from inverse.training.objectives.stein import Sure, sure

__all__ = [
    "EXACT_LIMIT",
    "OBJECTIVES",
    "Model",
    "Objective",
    "ObjectiveEntry",
    "Perturbed",
    "Setting",
    "Weighting",
    "contrastive_divergence",
    "denoising_score_matching",
    "draw_levels",
    "exact_score_matching",
    "flow_contrastive_estimation",
    "geometric_levels",
    "langevin_chain",
    "lognormal_levels",
    "noise_contrastive_estimation",
    "persistent_contrastive_divergence",
    "projections",
    "sliced_score_matching",
    "sure",
    "weight",
]


@dataclass(frozen=True)
class ObjectiveEntry:
    """One row of :data:`OBJECTIVES`.

    Attributes:
        title: its name in the field.
        make: the objective of a run.
        network: ``"energy"`` if it needs an energy network, ``"score"`` if either will do.
        calls: calls of the network a step, in terms of ``d`` pixels and ``k`` Langevin steps.
        backward: backward passes a step with a score network; an energy network takes one more a
            call of the denoiser.
        whole: needs whole images of one size, not crops.
        limit: most pixels of an image, ``None`` for any.
        reference: source.
    """

    title: str
    make: type[Objective]
    network: Literal["score", "energy"]
    calls: str
    backward: str
    whole: bool
    limit: int | None
    reference: str


OBJECTIVES: Mapping[str, ObjectiveEntry] = {
    "dsm": ObjectiveEntry(
        "denoising score matching, EDM weights, lognormal levels",
        Denoising, "score", "1", "1", False, None, "Karras et al., NeurIPS 2022",
    ),
    "dsm-sigma2": ObjectiveEntry(
        "denoising score matching, sigma^2 weights, lognormal levels",
        Sigma2, "score", "1", "1", False, None, "Vincent, Neural Computation 2011",
    ),
    "ncsn": ObjectiveEntry(
        "denoising score matching, sigma^2 weights, geometric levels",
        Ladder, "score", "1", "1", False, None, "Song and Ermon, NeurIPS 2019",
    ),
    "dsm-likelihood": ObjectiveEntry(
        "denoising score matching, likelihood weights g(t)^2, uniform times",
        Likelihood, "score", "1", "1", False, None, "Song et al., NeurIPS 2021",
    ),
    "ism": ObjectiveEntry(
        "exact (implicit) score matching",
        Exact, "score", "1", "d + 1", False, EXACT_LIMIT, "Hyvarinen, JMLR 2005",
    ),
    "ssm": ObjectiveEntry(
        "sliced score matching",
        Sliced, "score", "1", "2", False, None, "Song et al., UAI 2019",
    ),
    "ssm-vr": ObjectiveEntry(
        "sliced score matching with variance reduction",
        SlicedReduced, "score", "1", "2", False, None, "Song et al., UAI 2019",
    ),
    "sure": ObjectiveEntry(
        "Stein's unbiased risk estimate, from noisy images alone",
        Sure, "score", "1", "2", False, None, "Ramani et al., IEEE TIP 2008",
    ),
    "cd": ObjectiveEntry(
        "contrastive divergence with Langevin",
        Contrastive, "energy", "k + 2", "k + 1", False, None, "Hinton, Neural Computation 2002",
    ),
    "pcd": ObjectiveEntry(
        "persistent contrastive divergence with Langevin",
        Persistent, "energy", "k + 2", "k + 1", True, None, "Tieleman, ICML 2008",
    ),
    "nce": ObjectiveEntry(
        "noise-contrastive estimation against a Gaussian",
        NoiseContrastive, "energy", "2", "1", True, WHOLE_LIMIT,
        "Gutmann and Hyvarinen, AISTATS 2010",
    ),
    "fce": ObjectiveEntry(
        "flow-contrastive estimation against a real-NVP flow",
        FlowContrastive, "energy", "2", "1", True, WHOLE_LIMIT, "Gao et al., CVPR 2020",
    ),
}  # fmt: skip
"""Objectives that ``recon train --objective`` offers."""
