"""GBDA (arXiv 2104.13733): gradient descent on token probabilities through the Gumbel softmax.

Letters: P slots, each with logits and a fluency weight of its own; n samples of a slot per step, S prompt length,
A allowed tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax
from jaxtyping import Array, Float

from jaxsteer.models.params import Params
from jaxsteer.prompt_search.algorithms.relaxed import Arguments, allowed_at, make_optimizer, mixture_loss
from jaxsteer.prompt_search.contexts import Task
from jaxsteer.prompt_search.lengths import same_length
from jaxsteer.prompt_search.population import Search, State, Summary, compete, judge, positive, start, summary_of
from jaxsteer.prompt_search.problem import Problem

GIVEN = 12.0
"""Logit of the tokens of a given first prompt, above all others: sampled nearly always at first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GbdaConfig:
    """Hyperparameters of GBDA. Optimizer, rate, samples and first temperature are the published ones."""

    population: int = 4
    samples: int = 10
    """Prompts drawn of every slot and step: relaxed for the gradient, as tokens for the score."""
    temperature: float = 1.0
    final_temperature: float = 1.0
    """Reached by geometric steps after ``anneal_steps``."""
    anneal_steps: int = 100
    optimizer: str | optax.GradientTransformation = "adam"
    """Name of an Optax optimizer, or from Python any gradient transformation."""
    learning_rate: float = 0.3
    arguments: Arguments = ()
    """Further keyword arguments of the optimizer."""
    archive: int = 64
    repetition: float = 0.0
    """Weight of the repetition penalty (``constraints.repetition``), subtracted from the objective."""

    def __post_init__(self) -> None:
        """Refuse sizes that make no search and optimizers that do not exist."""
        positive(
            self,
            "population",
            "samples",
            "temperature",
            "final_temperature",
            "anneal_steps",
            "learning_rate",
            "archive",
        )
        make_optimizer(self.optimizer, self.learning_rate, self.arguments)

    @property
    def candidates(self) -> int:
        """Prompts scored per problem and step, besides one gradient of each."""
        return self.population * self.samples


@struct.dataclass
class GbdaState(State):
    """The best discrete prompts, and the logits of every slot over the allowed tokens."""

    logits: Float[Array, "P S A"]
    optimizer: Any


@functools.cache
def gbda(config: GbdaConfig) -> Search:
    """GBDA with ``config``, for one problem."""
    transformation = make_optimizer(config.optimizer, config.learning_rate, config.arguments)
    temperature = optax.exponential_decay(
        config.temperature,
        config.anneal_steps,
        config.final_temperature / config.temperature,
        end_value=config.final_temperature,
    )

    def init(params: Params, task: Task, problem: Problem) -> GbdaState:
        same_length(task, "gbda")
        first = start(
            params, task, problem, population=config.population, archive=config.archive, penalty=config.repetition
        )
        logits = jnp.zeros((config.population, task.length, len(task.ids)), jnp.float32)
        if problem.ids is not None:
            logits = jnp.where(first.ids[..., None] == task.ids, GIVEN, logits)
        return GbdaState(**vars(first), logits=logits, optimizer=transformation.init(logits))

    def step(params: Params, task: Task, problem: Problem, state: GbdaState) -> tuple[GbdaState, Summary]:
        key = jax.random.fold_in(problem.key, state.step)
        tau = temperature(state.step)

        def of_slot(row: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            logits, weight, slot = row
            noise = jax.random.gumbel(jax.random.fold_in(key, slot), (config.samples, *logits.shape))
            noise = jnp.where(allowed_at(task), noise, -jnp.inf)
            loss = lambda logits: mixture_loss(  # noqa: E731
                params, task, problem.objective, jax.nn.softmax((logits + noise) / tau), weight
            )
            return jax.grad(loss)(logits), task.ids[jnp.argmax(logits + noise, axis=-1)]

        # One slot after the other: a gradient holds the layers' inputs of n samples in all contexts.
        slots = jnp.arange(config.population)
        grad, drawn = lax.map(of_slot, (state.logits, problem.fluency, slots))
        grad = jnp.where(jnp.isfinite(grad), grad, 0.0)
        updates, optimizer = transformation.update(grad, state.optimizer, state.logits)
        logits = optax.apply_updates(state.logits, updates)
        drawn = drawn.reshape(-1, task.length)
        f, x = judge(params, task, problem, drawn, penalty=config.repetition, known=state.ids)
        moved = dataclasses.replace(state, logits=logits, optimizer=optimizer)
        new = compete(moved, drawn, f, x, problem.fluency)
        return new, summary_of(new, problem.fluency)

    return Search(init, step, config.candidates)
