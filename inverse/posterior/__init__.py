"""Posterior sampling: a prior and a measurement combined, method by method."""

from inverse.posterior.guidance import Proximal
from inverse.posterior.methods import METHODS, Method
from inverse.posterior.problem import Problem
from inverse.posterior.projection import song_projection

__all__ = ["METHODS", "Method", "Problem", "Proximal", "song_projection"]
