"""Objectives: pure functions from what was read of a forward pass to one score per row."""

from jaxsteer.objectives.reads import Needs, Objective, Reads, needs
from jaxsteer.objectives.terms import (
    Attention,
    ByContext,
    LogitDifference,
    MatchDistribution,
    Neuron,
    Projection,
    Standardised,
    TargetLogProb,
    WeightedSum,
    as_pytree,
    weighted_sum,
)

__all__ = [
    "Attention",
    "ByContext",
    "LogitDifference",
    "MatchDistribution",
    "Needs",
    "Neuron",
    "Objective",
    "Projection",
    "Reads",
    "Standardised",
    "TargetLogProb",
    "WeightedSum",
    "as_pytree",
    "needs",
    "weighted_sum",
]
