"""Random mutation: EPO without its gradient, the control for what the gradient is worth."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from jaxsteer.models.params import Params
from jaxsteer.prompt_search.algorithms.epo import EvolutionConfig, draw_positions, evolve, replace_tokens
from jaxsteer.prompt_search.contexts import Task
from jaxsteer.prompt_search.lengths import apply_mutations, draw_mutations, require_one_length
from jaxsteer.prompt_search.population import Search, check_sizes
from jaxsteer.prompt_search.problem import Problem
from jaxsteer.prompts.slots import PAD


@dataclasses.dataclass(frozen=True, kw_only=True)
class MutationConfig(EvolutionConfig):
    """Hyperparameters of random mutation."""

    replace: int = 1
    """Tokens replaced in every child."""

    def __post_init__(self) -> None:
        """Raise ``UserError`` for sizes that make no search."""
        super().__post_init__()
        check_sizes(self, "replace")


@functools.cache
def mutation(config: MutationConfig) -> Search:
    """Evolution by uniform positions and uniform allowed tokens, with EPO's selection, restarts and archive."""

    def make_children(
        params: Params, task: Task, problem: Problem, parents: Int[Array, "P S"], key: Key[Array, ""]
    ) -> Int[Array, "M S"]:
        where, what = jax.random.split(key)
        if task.varies:
            if config.replace > 1:
                require_one_length(task, "replace > 1")
            mutations = draw_mutations(where, task, parents, config.children)
            begins = mutations.at == (parents == PAD).sum(-1)[:, None]
            tokens = _draw_tokens(task, what, parents, mutations.at[..., None], begins[..., None])
            return apply_mutations(parents, mutations, tokens[..., 0])
        position = draw_positions(where, (len(parents), config.children), task.length, config.replace)
        return replace_tokens(parents, position, _draw_tokens(task, what, parents, position, position == 0))

    return evolve(config, make_children, replace=config.replace)


def _draw_tokens(
    task: Task, key: Key[Array, ""], parents: Int[Array, "P S"], position: Int[Array, "P E r"], begins: Array
) -> Int[Array, "P E r"]:
    """Uniform allowed tokens for these positions; ``begins`` says which of them are a prompt's first."""
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
