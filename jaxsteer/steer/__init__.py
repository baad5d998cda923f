"""Steering: edits at the model's named places, which tokens they touch, and vector files."""

from jaxsteer.steer.edits import Edit, Edits
from jaxsteer.steer.measure import count_positions, mean_norms
from jaxsteer.steer.operations import ablate, ablate_everywhere, add, ceiling, clamp, floor, replace, scale
from jaxsteer.steer.rows import stack_rows, take_rows
from jaxsteer.steer.selectors import Selector, select

__all__ = [
    "Edit",
    "Edits",
    "Selector",
    "ablate",
    "ablate_everywhere",
    "add",
    "ceiling",
    "clamp",
    "count_positions",
    "floor",
    "mean_norms",
    "replace",
    "scale",
    "select",
    "stack_rows",
    "take_rows",
]
