"""Work end to end: ``run`` does what ``jaxsteer search`` does, the other functions are its stages (``stages``)."""

from jaxsteer.study.dispatch import run
from jaxsteer.study.named_objectives import load_objective, named_objective
from jaxsteer.study.objective_stage import choose_objective, task_of
from jaxsteer.study.options import PRESETS, SearchOptions
from jaxsteer.study.stages import Ascent, persona_setting, restarts, search

__all__ = [
    "PRESETS",
    "Ascent",
    "SearchOptions",
    "choose_objective",
    "named_objective",
    "load_objective",
    "persona_setting",
    "restarts",
    "run",
    "search",
    "task_of",
]
