"""Fluent gradient ascent over prompts: objectives, tasks, EPO, the Pareto archive and the driver."""

from jaxsteer.search.driver import Found, Progress, SearchResult, run_search, standardise
from jaxsteer.search.epo import FLUENCY, EpoConfig, Fluency, epo
from jaxsteer.search.objectives import Latents, Objective, Projection, Reads, Standardised, latents_objective, needs
from jaxsteer.search.rescore import Rescored, rescore
from jaxsteer.search.task import Task, make_task, score

__all__ = [
    "FLUENCY",
    "EpoConfig",
    "Fluency",
    "Found",
    "Latents",
    "Objective",
    "Progress",
    "Projection",
    "Reads",
    "Rescored",
    "SearchResult",
    "Standardised",
    "Task",
    "epo",
    "latents_objective",
    "make_task",
    "needs",
    "rescore",
    "run_search",
    "score",
    "standardise",
]
