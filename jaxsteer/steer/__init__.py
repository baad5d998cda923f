"""Steering: edits at the model's named places, which tokens they touch, and vector files."""

from jaxsteer.steer.batching import stack_rows, take_rows
from jaxsteer.steer.cache_contrast import cache_vectors
from jaxsteer.steer.caching import CacheEdit
from jaxsteer.steer.capping import Cap, check_caps, read_capping
from jaxsteer.steer.completions import Example
from jaxsteer.steer.edits import Edit, Edits
from jaxsteer.steer.exports import write_by_block, write_capping
from jaxsteer.steer.gates import Gate, Gated, gated
from jaxsteer.steer.gguf import read_control_vector, write_control_vector
from jaxsteer.steer.imports import import_vectors
from jaxsteer.steer.learning import Learning, learn_vectors
from jaxsteer.steer.norms import count_positions, mean_norms
from jaxsteer.steer.operations import (
    ablate,
    ablate_everywhere,
    add,
    ceiling,
    clamp,
    floor,
    replace,
    scale,
    scale_prompt,
)
from jaxsteer.steer.scaling import Scaling, learn_scaling
from jaxsteer.steer.selectors import Selector, select
from jaxsteer.steer.tuning import tune_gate
from jaxsteer.steer.vectors import Vectors, check_vectors, load_vectors, random_controls, save_vectors

__all__ = [
    "CacheEdit",
    "Cap",
    "Edit",
    "Edits",
    "Example",
    "Learning",
    "Gate",
    "Gated",
    "Selector",
    "Vectors",
    "ablate",
    "ablate_everywhere",
    "add",
    "cache_vectors",
    "ceiling",
    "check_caps",
    "check_vectors",
    "clamp",
    "count_positions",
    "floor",
    "gated",
    "import_vectors",
    "learn_vectors",
    "load_vectors",
    "mean_norms",
    "random_controls",
    "read_capping",
    "read_control_vector",
    "replace",
    "save_vectors",
    "scale",
    "scale_prompt",
    "learn_scaling",
    "Scaling",
    "select",
    "stack_rows",
    "take_rows",
    "tune_gate",
    "write_by_block",
    "write_capping",
    "write_control_vector",
]
