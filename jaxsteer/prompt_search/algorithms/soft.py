"""Soft prompts (prompt tuning, arXiv 2104.08691): free embeddings in the slot that raise the objective.

They belong to no tokens, so they have no cross-entropy and no text, and serve as the bound of what a prompt of that
length could do. Their nearest tokens are scored beside them like any other prompt. Letters: P members, each with a soft
prompt of its own; S prompt length, D width.
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
    Moved,
    RelaxedConfig,
    embedded,
    nearest,
    relaxed_search,
    soft_target,
    table_unit,
)
from jaxsteer.prompt_search.contexts import Task
from jaxsteer.prompt_search.population import Search, State, Summary
from jaxsteer.prompt_search.problem import Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftConfig(RelaxedConfig):
    """Hyperparameters of soft prompts."""

    population: int = 1
    """Soft prompts that run side by side, each from tokens of its own."""


@struct.dataclass
class SoftState(State):
    """The best nearest tokens, the soft prompts, and the best of those."""

    soft: Float[Array, "P S D"]
    """In units of the embedding table's root mean square entry, as ``best``."""
    best: Float[Array, "P S D"]
    best_f: Float[Array, " P"]
    """The objective of ``best``."""
    optimizer: Any


@functools.cache
def soft(config: SoftConfig) -> Search:
    """Gradient ascent on the objective over embeddings. The summary's best target is that of the soft prompts."""

    def relax(params: Params, task: Task, problem: Problem, first: State, begin: Callable[[Array], Any]) -> SoftState:
        rows = embedded(params, first.ids)
        return SoftState(**vars(first), soft=rows, best=rows, best_f=first.f, optimizer=begin(rows))

    def move(
        params: Params, task: Task, problem: Problem, state: SoftState, descend: Callable[[Array, Array], Moved]
    ) -> tuple[SoftState, Int[Array, "P S"]]:
        unit = table_unit(params)

        def loss(rows: Array) -> tuple[Array, Array]:
            f = soft_target(params, task, problem.objective, rows * unit)
            return -jnp.sum(f), f

        grad, f = jax.grad(loss, has_aux=True)(state.soft)
        better = f > state.best_f  # never where it is NaN
        best = jnp.where(better[:, None, None], state.soft, state.best)
        rows, optimizer = descend(state.soft, grad)
        best_f = jnp.where(better, f, state.best_f)
        moved = dataclasses.replace(state, soft=rows, best=best, best_f=best_f, optimizer=optimizer)
        return moved, nearest(params, task, rows)

    search = relaxed_search("soft", config, relax, move)

    def step(params: Params, task: Task, problem: Problem, state: SoftState) -> tuple[SoftState, Summary]:
        new, summary = search.step(params, task, problem, state)
        return new, summary._replace(best_target=new.best_f.max())

    return search._replace(step=step)
