"""EPO, evolutionary prompt optimisation (arXiv 2402.01702), as an ``(init, step)`` pair.

Letters: R problems, P slots of a population, E children per slot, M = P * E candidates per step, S prompt length,
k proposals per position, r tokens replaced in a child.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from jaxsteer.models.params import Params
from jaxsteer.prompt_search.algorithms.probe_sampling import ProbeSampling, judge_children
from jaxsteer.prompt_search.algorithms.proposals import proposals, proposals_and_insertions
from jaxsteer.prompt_search.contexts import Task
from jaxsteer.prompt_search.lengths import INSERT, INSERTIONS, draw_edits, edited
from jaxsteer.prompt_search.population import Search, State, Summary, compete, positive, start, summary_of
from jaxsteer.prompt_search.problem import Problem
from jaxsteer.prompt_search.shared_scoring import stratified


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpoConfig:
    """Hyperparameters of EPO. The defaults are the published ones of RESGA and SAEGA."""

    population: int = 16
    children: int = 32
    top_k: int = 512
    restart_every: int = 50
    archive: int = 64
    probe_sampling: ProbeSampling | None = None
    """Let a draft model choose the children to score (``probe_sampling.with_draft``)."""
    repetition: float = 0.0
    """Weight of the repetition penalty (``constraints.repetition``), subtracted from the objective."""

    def __post_init__(self) -> None:
        """Refuse sizes that make no search."""
        positive(self, "population", "children", "top_k", "restart_every", "archive")

    @property
    def candidates(self) -> int:
        """Prompts scored per problem and step, M."""
        return self.population * self.children


def draw_positions(key: Key[Array, ""], shape: tuple[int, int], length: int, replace: int) -> Int[Array, "P E r"]:
    """For every child ``replace`` different positions of its prompt, uniformly; a single one stratified."""
    if replace == 1:
        return stratified(key, *shape, length)[..., None]
    return jnp.argsort(jax.random.uniform(key, (*shape, length)), axis=-1)[..., :replace]


def replaced(
    parents: Int[Array, "P S"], position: Int[Array, "P E r"], tokens: Int[Array, "P E r"]
) -> Int[Array, "M S"]:
    """Copies of the parents with ``tokens`` at ``position``, one row per child."""
    population, children, replace = position.shape
    copies = jnp.broadcast_to(parents[:, None], (population, children, parents.shape[1]))
    for r in range(replace):
        here = jnp.arange(parents.shape[1]) == position[..., r, None]
        copies = jnp.where(here, tokens[..., r, None], copies)
    return copies.reshape(population * children, -1)


def mutate(
    key: Key[Array, ""], parents: Int[Array, "P S"], tokens: Int[Array, "P S k"], children: int, replace: int = 1
) -> Int[Array, "M S"]:
    """``children`` copies of every parent with ``replace`` tokens replaced: uniform positions, uniform proposals."""
    population, length, top_k = tokens.shape
    where, what = jax.random.split(key)
    position = draw_positions(where, (population, children), length, replace)
    rank = jax.random.randint(what, position.shape, 0, top_k)
    return replaced(parents, position, tokens[jnp.arange(population)[:, None, None], position, rank])


def usable_top_k(task: Task, top_k: int) -> int:
    """``top_k`` or as many proposals as the token mask leaves at every position."""
    return min(top_k, len(task.ids) - 1, len(task.first_ids) - 1)


@functools.cache
def epo(config: EpoConfig) -> Search:
    """EPO with ``config``, for one problem; ``run_search`` maps it over problems."""

    def children_of(
        params: Params, task: Task, problem: Problem, parents: Int[Array, "P S"], key: Key[Array, ""]
    ) -> Int[Array, "M S"]:
        top_k = usable_top_k(task, config.top_k)
        if task.varies:
            return _edited(params, task, problem, parents, key, top_k, config.children)
        tokens = proposals(params, task, problem.objective, parents, problem.fluency, top_k)
        return mutate(key, parents, tokens, config.children)

    return evolve(config, children_of, sampling=config.probe_sampling)


def _edited(
    params: Params, task: Task, problem: Problem, parents: Int[Array, "P S"], key: Key[Array, ""], top_k: int, each: int
) -> Int[Array, "M S"]:
    """Children of other lengths, too: gradients propose what is exchanged, the model itself what is inserted."""
    where, what, drawn = jax.random.split(key, 3)
    most = min(INSERTIONS, len(task.ids), len(task.first_ids))
    swaps, inserts = proposals_and_insertions(
        params, task, problem.objective, parents, problem.fluency, top_k, drawn, most
    )
    edits = draw_edits(where, task, parents, each)
    row, rank = jnp.arange(len(parents))[:, None], jax.random.bits(what, edits.at.shape)
    tokens = [table[row, edits.at, rank % jnp.uint32(table.shape[-1])] for table in (swaps, inserts)]
    return edited(parents, edits, jnp.where(edits.kind == INSERT, tokens[1], tokens[0]))


def evolve(
    config: Any,
    children_of: Callable[..., Int[Array, "M S"]],
    *,
    replace: int = 1,
    sampling: ProbeSampling | None = None,
) -> Search:
    """The evolution of EPO with any way to make children: ``children_of(params, task, problem, parents, key)``, with
    ``replace`` positions of each from ``draw_positions``."""

    def init(params: Params, task: Task, problem: Problem) -> State:
        return start(
            params, task, problem, population=config.population, archive=config.archive, penalty=config.repetition
        )

    def step(params: Params, task: Task, problem: Problem, state: State) -> tuple[State, Summary]:
        key = jax.random.fold_in(problem.key, state.step)
        mutation_key, restart_key = jax.random.split(key)
        children = children_of(params, task, problem, state.ids, mutation_key)
        f, x = judge_children(
            params,
            task,
            problem,
            state,
            children,
            mutation_key,
            parents=jnp.arange(config.population),
            weight=problem.fluency,
            replace=replace,
            penalty=config.repetition,
            sampling=sampling,
        )
        drawn = jax.random.uniform(restart_key, (1,), minval=problem.restart[0], maxval=problem.restart[1])
        restarting = (state.step > 0) & (state.step % config.restart_every == 0)
        new = compete(state, children, f, x, jnp.where(restarting, drawn, problem.fluency))
        return new, summary_of(new, problem.fluency)

    return Search(init, step, config.candidates)
