"""PEZ (arXiv 2302.03668): soft prompts that follow the gradient taken at their nearest tokens.

Letters: P slots, each with a soft prompt and a fluency weight of its own; S prompt length, D width.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from jaxsteer.models.params import Params
from jaxsteer.prompt_search.algorithms.relaxed import Arguments, make_optimizer, nearest, table_unit
from jaxsteer.prompt_search.contexts import Task
from jaxsteer.prompt_search.lengths import same_length
from jaxsteer.prompt_search.population import Search, State, Summary, compete, judge, positive, start, summary_of
from jaxsteer.prompt_search.problem import Problem
from jaxsteer.prompt_search.scoring import slot_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class PezConfig:
    """Hyperparameters of PEZ. Optimizer and weight decay are the published ones."""

    population: int = 16
    """Soft prompts that run side by side, one fluency weight each."""
    optimizer: str | optax.GradientTransformation = "adamw"
    """Name of an Optax optimizer, or from Python any gradient transformation."""
    learning_rate: float = 0.1
    """In units of the embedding table's root mean square entry."""
    arguments: Arguments = (("weight_decay", 0.1),)
    """Further keyword arguments of the optimizer."""
    archive: int = 64
    repetition: float = 0.0
    """Weight of the repetition penalty (``constraints.repetition``), subtracted from the objective."""

    def __post_init__(self) -> None:
        """Refuse sizes that make no search and optimizers that do not exist."""
        positive(self, "population", "learning_rate", "archive")
        make_optimizer(self.optimizer, self.learning_rate, self.arguments)

    @property
    def candidates(self) -> int:
        """Prompts scored per problem and step, besides one gradient of each."""
        return self.population


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
    transformation = make_optimizer(config.optimizer, config.learning_rate, config.arguments)

    def init(params: Params, task: Task, problem: Problem) -> PezState:
        same_length(task, "pez")
        first = start(
            params, task, problem, population=config.population, archive=config.archive, penalty=config.repetition
        )
        soft = params.embed[first.ids].astype(jnp.float32) / table_unit(params)
        return PezState(**vars(first), soft=soft, projected=first.ids, optimizer=transformation.init(soft))

    def step(params: Params, task: Task, problem: Problem, state: PezState) -> tuple[PezState, Summary]:
        unit = table_unit(params)
        rows = params.embed[state.projected].astype(jnp.float32)
        grad, _ = jax.grad(slot_loss, argnums=3, has_aux=True)(
            params, task, problem.objective, rows, state.projected, problem.fluency
        )
        grad = jnp.where(jnp.isfinite(grad), unit * grad, 0.0)
        updates, optimizer = transformation.update(grad, state.optimizer, state.soft)
        soft = optax.apply_updates(state.soft, updates)
        projected = nearest(params, task, soft)
        f, x = judge(params, task, problem, projected, penalty=config.repetition, known=state.ids)
        moved = dataclasses.replace(state, soft=soft, projected=projected, optimizer=optimizer)
        new = compete(moved, projected, f, x, problem.fluency)
        return new, summary_of(new, problem.fluency)

    return Search(init, step, config.candidates)
