"""Knowledge editing: ROME, MEMIT, and weight deltas as files."""

from jaxsteer.checkpoints.deltas import Delta, applied, load_delta
from jaxsteer.rewrite.covariance import (
    Convergence,
    Covariance,
    CovarianceOptions,
    covariances,
    load_covariance,
    save_covariance,
)
from jaxsteer.rewrite.editing import EditOptions, Rewrite, edit
from jaxsteer.rewrite.evaluation import MeasureOptions, known_facts
from jaxsteer.rewrite.facts import Fact, Neighbour, read_facts
from jaxsteer.rewrite.pipeline import RewriteOptions, evaluate, run
from jaxsteer.rewrite.result import RewriteResult
from jaxsteer.rewrite.values import ValueOptions

__all__ = [
    "Convergence",
    "Covariance",
    "CovarianceOptions",
    "Delta",
    "EditOptions",
    "Fact",
    "MeasureOptions",
    "Neighbour",
    "Rewrite",
    "RewriteOptions",
    "RewriteResult",
    "ValueOptions",
    "applied",
    "covariances",
    "edit",
    "evaluate",
    "known_facts",
    "load_covariance",
    "load_delta",
    "read_facts",
    "run",
    "save_covariance",
]
