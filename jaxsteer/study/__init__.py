"""One run end to end: direction, probe, search, evaluation, files."""

from jaxsteer.study.dispatch import run
from jaxsteer.study.named_objectives import custom_objective, load_objective
from jaxsteer.study.options import PRESETS, SearchOptions

__all__ = ["PRESETS", "SearchOptions", "custom_objective", "load_objective", "run"]
