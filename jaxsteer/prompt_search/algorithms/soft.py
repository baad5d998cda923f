"""Soft prompts (prompt tuning, arXiv 2104.08691): free embeddings in the slot that raise the objective.

They belong to no tokens, so they have no cross-entropy and no text, and serve as the bound of what a prompt of that
length could do. Their nearest tokens are scored beside them like any other prompt. Letters: P slots, each with a soft
prompt of its own; S prompt length, D width.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float

from jaxsteer.models.params import Params
from jaxsteer.prompt_search.algorithms.relaxed import Arguments, make_optimizer, nearest, soft_target, table_unit
from jaxsteer.prompt_search.contexts import Task
from jaxsteer.prompt_search.lengths import same_length
from jaxsteer.prompt_search.population import Search, State, Summary, compete, judge, positive, start, summary_of
from jaxsteer.prompt_search.problem import Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftConfig:
    """Hyperparameters of soft prompts."""

    population: int = 1
    """Soft prompts that run side by side, each from tokens of its own."""
    optimizer: str | optax.GradientTransformation = "adamw"
    """Name of an Optax optimizer, or from Python any gradient transformation."""
    learning_rate: float = 0.1
    """In units of the embedding table's root mean square entry."""
    arguments: Arguments = ()
    """Further keyword arguments of the optimizer."""
    archive: int = 64

    def __post_init__(self) -> None:
        """Refuse sizes that make no search and optimizers that do not exist."""
        positive(self, "population", "learning_rate", "archive")
        make_optimizer(self.optimizer, self.learning_rate, self.arguments)

    @property
    def candidates(self) -> int:
        """Prompts scored per problem and step, besides one gradient of each."""
        return self.population


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
    transformation = make_optimizer(config.optimizer, config.learning_rate, config.arguments)

    def init(params: Params, task: Task, problem: Problem) -> SoftState:
        same_length(task, "soft")
        first = start(params, task, problem, population=config.population, archive=config.archive)
        rows = params.embed[first.ids].astype(jnp.float32) / table_unit(params)
        return SoftState(**vars(first), soft=rows, best=rows, best_f=first.f, optimizer=transformation.init(rows))

    def step(params: Params, task: Task, problem: Problem, state: SoftState) -> tuple[SoftState, Summary]:
        unit = table_unit(params)

        def loss(rows: Array) -> tuple[Array, Array]:
            f = soft_target(params, task, problem.objective, rows * unit)
            return -jnp.sum(f), f

        grad, f = jax.grad(loss, has_aux=True)(state.soft)
        better = f > state.best_f  # never where it is NaN
        best = jnp.where(better[:, None, None], state.soft, state.best)
        updates, optimizer = transformation.update(
            jnp.where(jnp.isfinite(grad), grad, 0.0), state.optimizer, state.soft
        )
        rows = optax.apply_updates(state.soft, updates)
        moved = dataclasses.replace(
            state, soft=rows, best=best, best_f=jnp.where(better, f, state.best_f), optimizer=optimizer
        )
        tokens = nearest(params, task, rows)
        token_f, token_x = judge(params, task, problem, tokens, known=state.ids)
        new = compete(moved, tokens, token_f, token_x, problem.fluency)
        return new, summary_of(new, problem.fluency)._replace(best_target=new.best_f.max())

    return Search(init, step, config.candidates)
