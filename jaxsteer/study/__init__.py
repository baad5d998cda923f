"""One run end to end: direction, probe, search, evaluation, files."""

from jaxsteer.study.named_objectives import custom_objective, load_objective
from jaxsteer.study.options import PRESETS, SearchOptions
from jaxsteer.study.pipeline import run

__all__ = ["PRESETS", "SearchOptions", "custom_objective", "load_objective", "run"]
