"""Random mutation: EPO's populations and selection without its gradient, the control for what the gradient is worth."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from jaxsteer.models.params import Params
from jaxsteer.prompt_search.algorithms.epo import draw_positions, evolve, replaced
from jaxsteer.prompt_search.contexts import Task
from jaxsteer.prompt_search.lengths import draw_edits, edited, same_length
from jaxsteer.prompt_search.population import Search, positive
from jaxsteer.prompt_search.problem import Problem
from jaxsteer.prompts.slots import PAD


@dataclasses.dataclass(frozen=True, kw_only=True)
class MutationConfig:
    """Hyperparameters of random mutation."""

    population: int = 16
    children: int = 32
    replace: int = 1
    """Tokens replaced in every child."""
    restart_every: int = 50
    archive: int = 64
    repetition: float = 0.0
    """Weight of the repetition penalty (``constraints.repetition``), subtracted from the objective."""

    def __post_init__(self) -> None:
        """Refuse sizes that make no search."""
        positive(self, "population", "children", "replace", "restart_every", "archive")

    @property
    def candidates(self) -> int:
        """Prompts scored per problem and step, M."""
        return self.population * self.children


@functools.cache
def mutation(config: MutationConfig) -> Search:
    """Evolution by uniform positions and uniform allowed tokens, with EPO's slots, selection, restarts and archive."""

    def children_of(
        params: Params, task: Task, problem: Problem, parents: Int[Array, "P S"], key: Key[Array, ""]
    ) -> Int[Array, "M S"]:
        where, what = jax.random.split(key)
        if task.varies:
            if config.replace > 1:
                same_length(task, "replace > 1")
            edits = draw_edits(where, task, parents, config.children)
            begins = edits.at == (parents == PAD).sum(-1)[:, None]
            return edited(parents, edits, _drawn(task, what, parents, edits.at[..., None], begins[..., None])[..., 0])
        position = draw_positions(where, (len(parents), config.children), task.length, config.replace)
        return replaced(parents, position, _drawn(task, what, parents, position, position == 0))

    return evolve(config, children_of, replace=config.replace)


def _drawn(
    task: Task, key: Key[Array, ""], parents: Int[Array, "P S"], position: Int[Array, "P E r"], begins: Array
) -> Int[Array, "P E r"]:
    """Uniform allowed tokens for these places; ``begins`` says which of them are a prompt's first."""
    inner, first = jax.random.bits(key, (2, *position.shape))
    return jnp.where(
        begins, _other(task.first_ids, first, parents, position), _other(task.ids, inner, parents, position)
    )


def _other(
    ids: Int[Array, " n"], bits: Array, parents: Int[Array, "P S"], position: Int[Array, "P E r"]
) -> Int[Array, "P E r"]:
    """Uniform tokens of a list, one further where the parent has that very token."""
    drawn = bits % jnp.uint32(len(ids))
    current = parents[jnp.arange(len(parents))[:, None, None], position]
    return jnp.where(ids[drawn] == current, ids[(drawn + 1) % len(ids)], ids[drawn])
