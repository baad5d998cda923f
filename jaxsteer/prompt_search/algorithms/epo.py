"""EPO, evolutionary prompt optimisation (arXiv 2402.01702), as an ``(init, step)`` pair.

Letters: R problems, P members of a population, E children of each, M = P * E candidates per step, S prompt length,
k proposals per position, r tokens replaced in a child.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from jaxsteer.models.params import Params
from jaxsteer.prompt_search.algorithms.probe_sampling import Children, ProbeSampling, evaluate_children
from jaxsteer.prompt_search.algorithms.proposals import proposals, proposals_and_insertions
from jaxsteer.prompt_search.contexts import Task
from jaxsteer.prompt_search.lengths import INSERT, INSERTIONS, apply_mutations, draw_mutations
from jaxsteer.prompt_search.population import Search, State, Summary, check_sizes, compete, first_state, summary_of
from jaxsteer.prompt_search.problem import Problem
from jaxsteer.prompt_search.shared_scoring import stratified


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvolutionConfig:
    """Hyperparameters of every evolution. The defaults are the published ones of RESGA and SAEGA."""

    population: int = 16
    children: int = 32
    """Of every member, in every step."""
    restart_every: int = 50
    """Steps from one restart to the next."""
    archive: int = 64
    """Prompts that the Pareto archive holds."""
    repetition: float = 0.0
    """Weight of the repetition penalty (``constraints.repetition``), subtracted from the objective."""

    def __post_init__(self) -> None:
        """Raise ``UserError`` for sizes that make no search."""
        check_sizes(self, "population", "children", "restart_every", "archive")

    @property
    def candidates(self) -> int:
        """Prompts scored per problem and step, M."""
        return self.population * self.children


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpoConfig(EvolutionConfig):
    """Hyperparameters of EPO."""

    top_k: int = 512
    """Tokens per position that the gradient proposes."""
    probe_sampling: ProbeSampling | None = None
    """Let a draft model choose the children to score (``probe_sampling.with_draft``)."""

    def __post_init__(self) -> None:
        """Raise ``UserError`` for sizes that make no search."""
        super().__post_init__()
        check_sizes(self, "top_k")


def draw_positions(key: Key[Array, ""], shape: tuple[int, int], length: int, replace: int) -> Int[Array, "P E r"]:
    """For every child ``replace`` different positions of its prompt, uniformly; a single one stratified."""
    if replace == 1:
        return stratified(key, *shape, length)[..., None]
    return jnp.argsort(jax.random.uniform(key, (*shape, length)), axis=-1)[..., :replace]


def replace_tokens(
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
    return replace_tokens(parents, position, tokens[jnp.arange(population)[:, None, None], position, rank])


def usable_top_k(task: Task, top_k: int) -> int:
    """``top_k`` or as many proposals as the token mask leaves at every position."""
    return min(top_k, len(task.ids) - 1, len(task.first_ids) - 1)


@functools.cache
def epo(config: EpoConfig) -> Search:
    """EPO with ``config``, for one problem; ``run_search`` maps it over problems."""

    def make_children(
        params: Params, task: Task, problem: Problem, parents: Int[Array, "P S"], key: Key[Array, ""]
    ) -> Int[Array, "M S"]:
        if task.varies:
            return _mutate_lengths(params, task, problem, parents, key, config)
        tokens = proposals(params, task, problem.objective, parents, problem.fluency, usable_top_k(task, config.top_k))
        return mutate(key, parents, tokens, config.children)

    return evolve(config, make_children, sampling=config.probe_sampling)


def _mutate_lengths(
    params: Params, task: Task, problem: Problem, parents: Int[Array, "P S"], key: Key[Array, ""], config: EpoConfig
) -> Int[Array, "M S"]:
    """Children of other lengths, too: gradients propose what is exchanged, the model itself what is inserted."""
    where, what, drawn = jax.random.split(key, 3)
    top_k, most = usable_top_k(task, config.top_k), min(INSERTIONS, len(task.ids), len(task.first_ids))
    swaps, inserts = proposals_and_insertions(
        params, task, problem.objective, parents, problem.fluency, top_k, drawn, most
    )
    mutations = draw_mutations(where, task, parents, config.children)
    row, rank = jnp.arange(len(parents))[:, None], jax.random.bits(what, mutations.at.shape)
    swap, insert = (table[row, mutations.at, rank % jnp.uint32(table.shape[-1])] for table in (swaps, inserts))
    return apply_mutations(parents, mutations, jnp.where(mutations.kind == INSERT, insert, swap))


@runtime_checkable
class Mutate(Protocol):
    """How an evolution makes children."""

    def __call__(
        self, params: Params, task: Task, problem: Problem, parents: Int[Array, "P S"], key: Key[Array, ""], /
    ) -> Int[Array, "M S"]:
        """As many children of every parent, parent by parent."""


def evolve(
    config: EvolutionConfig, make_children: Mutate, *, replace: int = 1, sampling: ProbeSampling | None = None
) -> Search:
    """The evolution of EPO with any way to make children that changes ``replace`` tokens of each, at positions from
    ``draw_positions``.
    """

    def init(params: Params, task: Task, problem: Problem) -> State:
        return first_state(
            params, task, problem, population=config.population, archive=config.archive, penalty=config.repetition
        )

    def step(params: Params, task: Task, problem: Problem, state: State) -> tuple[State, Summary]:
        key = jax.random.fold_in(problem.key, state.step)
        mutation_key, restart_key = jax.random.split(key)
        ids = make_children(params, task, problem, state.ids, mutation_key)
        children = Children(ids, jnp.arange(config.population), problem.fluency, replace)
        f, x = evaluate_children(
            params, task, problem, state, children, mutation_key, penalty=config.repetition, sampling=sampling
        )
        drawn = jax.random.uniform(restart_key, (1,), minval=problem.restart[0], maxval=problem.restart[1])
        restarting = (state.step > 0) & (state.step % config.restart_every == 0)
        new = compete(state, ids, f, x, jnp.where(restarting, drawn, problem.fluency))
        return new, summary_of(new, problem.fluency)

    return Search(init, step, config.candidates)
