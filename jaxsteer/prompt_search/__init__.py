"""Searches for prompts: contexts and scores, the algorithms, the Pareto archive, the driver and resuming."""

from jaxsteer.prompt_search.algorithms import ALGORITHMS, make_search
from jaxsteer.prompt_search.algorithms.epo import EpoConfig, epo
from jaxsteer.prompt_search.checking import check_objective
from jaxsteer.prompt_search.compiling import Resources
from jaxsteer.prompt_search.contexts import Combination, Task, TokenMask, make_task
from jaxsteer.prompt_search.driver import Hooks, Progress, run_search, standardise
from jaxsteer.prompt_search.population import Search
from jaxsteer.prompt_search.problem import FLUENCY, Fluency, Problem, make_problem
from jaxsteer.prompt_search.rescore import Rescored, rescore
from jaxsteer.prompt_search.results import ScoredPrompt, SearchResult
from jaxsteer.prompt_search.resume import Store
from jaxsteer.prompt_search.scoring import score

__all__ = [
    "ALGORITHMS",
    "Combination",
    "FLUENCY",
    "EpoConfig",
    "Fluency",
    "Hooks",
    "Problem",
    "Progress",
    "Rescored",
    "Resources",
    "ScoredPrompt",
    "Search",
    "SearchResult",
    "Store",
    "Task",
    "TokenMask",
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
