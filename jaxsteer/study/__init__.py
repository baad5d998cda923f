"""One run end to end: direction, probe, search, evaluation, files."""

from jaxsteer.study.options import PRESETS, SearchOptions, load_objective
from jaxsteer.study.pipeline import run

__all__ = ["PRESETS", "SearchOptions", "load_objective", "run"]
