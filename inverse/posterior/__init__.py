"""Posterior sampling: a prior and a measurement combined, method by method."""

from inverse.posterior.guidance import Proximal
from inverse.posterior.methods import METHODS, Method, Problem
from inverse.posterior.projection import song_projection

__all__ = ["METHODS", "Method", "Problem", "Proximal", "song_projection"]
