"""GBDA (arXiv 2104.13733): gradient descent on token probabilities through the Gumbel softmax.

Letters: P members, each with logits and a fluency weight of its own; n samples of a member per step, S prompt length,
A allowed tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsteer.models.params import Params
from jaxsteer.prompt_search.algorithms.relaxed import Moved, RelaxedConfig, allowed_at, mixture_loss, relaxed_search
from jaxsteer.prompt_search.contexts import Task
from jaxsteer.prompt_search.population import Search, State, check_sizes
from jaxsteer.prompt_search.problem import Problem

GIVEN = 12.0
"""Logit of the tokens of a given first prompt, above all others: sampled nearly always at first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GbdaConfig(RelaxedConfig):
    """Hyperparameters of GBDA. Optimizer, rate, samples and first temperature are the published ones."""

    population: int = 4
    samples: int = 10
    """Prompts drawn of every member and step: relaxed for the gradient, as tokens for the score."""
    temperature: float = 1.0
    final_temperature: float = 1.0
    """Reached by geometric steps after ``anneal_steps``."""
    anneal_steps: int = 100
    optimizer: str | optax.GradientTransformation = "adam"
    """Name of an Optax optimizer, or from Python any gradient transformation."""
    learning_rate: float = 0.3
    """In units of logits."""
    repetition: float = 0.0
    """Weight of the repetition penalty (``constraints.repetition``), subtracted from the objective."""

    def __post_init__(self) -> None:
        """Raise ``UserError`` for sizes that make no search and optimizers that do not exist."""
        super().__post_init__()
        check_sizes(self, "samples", "temperature", "final_temperature", "anneal_steps")

    @property
    def candidates(self) -> int:
        """Prompts scored per problem and step, besides one gradient of each."""
        return self.population * self.samples


@struct.dataclass
class GbdaState(State):
    """The best discrete prompts, and the logits of every member over the allowed tokens."""

    logits: Float[Array, "P S A"]
    optimizer: Any


@functools.cache
def gbda(config: GbdaConfig) -> Search:
    """GBDA with ``config``, for one problem."""
    temperature = optax.exponential_decay(
        config.temperature,
        config.anneal_steps,
        config.final_temperature / config.temperature,
        end_value=config.final_temperature,
    )

    def relax(params: Params, task: Task, problem: Problem, first: State, begin: Callable[[Array], Any]) -> GbdaState:
        logits = jnp.zeros((config.population, task.length, len(task.ids)), jnp.float32)
        if problem.ids is not None:
            logits = jnp.where(first.ids[..., None] == task.ids, GIVEN, logits)
        return GbdaState(**vars(first), logits=logits, optimizer=begin(logits))

    def move(
        params: Params, task: Task, problem: Problem, state: GbdaState, descend: Callable[[Array, Array], Moved]
    ) -> tuple[GbdaState, Int[Array, "Pn S"]]:
        key = jax.random.fold_in(problem.key, state.step)
        tau = temperature(state.step)

        def of_member(row: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            logits, weight, member = row
            noise = jax.random.gumbel(jax.random.fold_in(key, member), (config.samples, *logits.shape))
            noise = jnp.where(allowed_at(task), noise, -jnp.inf)

            def loss(logits: Array) -> Array:
                mixture = jax.nn.softmax((logits + noise) / tau)
                return mixture_loss(params, task, problem.objective, mixture, weight)

            return jax.grad(loss)(logits), task.ids[jnp.argmax(logits + noise, axis=-1)]

        # One member after the other: a gradient holds the layers' inputs of n samples in all contexts.
        grad, drawn = lax.map(of_member, (state.logits, problem.fluency, jnp.arange(config.population)))
        logits, optimizer = descend(state.logits, grad)
        return dataclasses.replace(state, logits=logits, optimizer=optimizer), drawn.reshape(-1, task.length)

    return relaxed_search("gbda", config, relax, move)
