"""PEZ (arXiv 2302.03668): soft prompts that follow the gradient taken at their nearest tokens.

Letters: P members, each with a soft prompt and a fluency weight of its own; S prompt length, D width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jaxsteer.models.params import Params
from jaxsteer.prompt_search.algorithms.relaxed import (
    Arguments,
    Moved,
    RelaxedConfig,
    embedded,
    nearest,
    relaxed_search,
    table_unit,
)
from jaxsteer.prompt_search.contexts import Task
from jaxsteer.prompt_search.population import Search, State
from jaxsteer.prompt_search.problem import Problem
from jaxsteer.prompt_search.scoring import slot_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class PezConfig(RelaxedConfig):
    """Hyperparameters of PEZ. Optimizer and weight decay are the published ones."""

    population: int = 16
    """Soft prompts that run side by side, one fluency weight each."""
    arguments: Arguments = (("weight_decay", 0.1),)
    """Further keyword arguments of the optimizer."""
    repetition: float = 0.0
    """Weight of the repetition penalty (``constraints.repetition``), subtracted from the objective."""


@struct.dataclass
class PezState(State):
    """The best discrete prompts, and what moves."""

    soft: Float[Array, "P S D"]
    """In units of the embedding table's root mean square entry."""
    projected: Int[Array, "P S"]
    """Nearest tokens of ``soft``."""
    optimizer: Any


@functools.cache
def pez(config: PezConfig) -> Search:
    """PEZ with ``config``, for one problem. The gradient of cross-entropy is that of the tokens after the one moved."""

    def relax(params: Params, task: Task, problem: Problem, first: State, begin: Callable[[Array], Any]) -> PezState:
        soft = embedded(params, first.ids)
        return PezState(**vars(first), soft=soft, projected=first.ids, optimizer=begin(soft))

    def move(
        params: Params, task: Task, problem: Problem, state: PezState, descend: Callable[[Array, Array], Moved]
    ) -> tuple[PezState, Int[Array, "P S"]]:
        unit = table_unit(params)
        rows = params.embed[state.projected].astype(jnp.float32)
        grad, _ = jax.grad(slot_loss, argnums=3, has_aux=True)(
            params, task, problem.objective, rows, state.projected, problem.fluency
        )
        soft, optimizer = descend(state.soft, unit * grad)
        projected = nearest(params, task, soft)
        return dataclasses.replace(state, soft=soft, projected=projected, optimizer=optimizer), projected

    return relaxed_search("pez", config, relax, move)
