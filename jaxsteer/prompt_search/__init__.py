"""Fluent gradient ascent over prompts: objectives, tasks, EPO, the Pareto archive and the driver."""

from jaxsteer.prompt_search.algorithms import ALGORITHMS, make_search
from jaxsteer.prompt_search.algorithms.epo import EpoConfig, epo
from jaxsteer.prompt_search.checking import check_objective
from jaxsteer.prompt_search.driver import Progress, run_search, standardise
from jaxsteer.prompt_search.population import Search
from jaxsteer.prompt_search.problem import FLUENCY, Fluency, Problem, make_problem
from jaxsteer.prompt_search.rescore import Rescored, rescore
from jaxsteer.prompt_search.results import Found, SearchResult
from jaxsteer.prompt_search.resume import Store
from jaxsteer.prompt_search.task import Task, make_task, score

__all__ = [
    "ALGORITHMS",
    "FLUENCY",
    "EpoConfig",
    "Fluency",
    "Found",
    "Problem",
    "Progress",
    "Rescored",
    "Search",
    "SearchResult",
    "Store",
    "Task",
    "check_objective",
    "epo",
    "make_problem",
    "make_search",
    "make_task",
    "rescore",
    "run_search",
    "score",
    "standardise",
]
