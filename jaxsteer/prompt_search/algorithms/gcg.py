"""GCG, greedy coordinate gradient (arXiv 2307.15043), with the batch sampling and the buffer of its later versions.

One prompt at a time: the token gradient at the best one proposes, many children are scored, the best of them goes on.
It has one fluency weight, that of member 0; the published method is the weight 0 with the log-probability of an answer
as objective. Letters: P rows of the buffer (1 without), W children of a step, S prompt length.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxsteer.errors import UserError
from jaxsteer.models.params import Params
from jaxsteer.prompt_search.algorithms.epo import mutate, usable_top_k
from jaxsteer.prompt_search.algorithms.probe_sampling import Children, ProbeSampling, evaluate_children
from jaxsteer.prompt_search.algorithms.proposals import proposals
from jaxsteer.prompt_search.contexts import Task
from jaxsteer.prompt_search.lengths import require_one_length
from jaxsteer.prompt_search.pareto import insert
from jaxsteer.prompt_search.population import Search, State, Summary, check_sizes, first_state, summary_of
from jaxsteer.prompt_search.problem import Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class GcgConfig:
    """Hyperparameters of GCG. The defaults are those of its best-known implementation, which keeps no buffer."""

    search_width: int = 512
    """Children scored in every step."""
    top_k: int = 256
    replace: int = 1
    """Tokens replaced in every child."""
    buffer: int = 0
    """Best prompts kept. With 0 the best child always goes on, even if it is worse than its parent."""
    archive: int = 64
    probe_sampling: ProbeSampling | None = None
    """Let a draft model choose the children to score (``probe_sampling.with_draft``)."""
    repetition: float = 0.0
    """Weight of the repetition penalty (``constraints.repetition``), subtracted from the objective."""

    def __post_init__(self) -> None:
        """Raise ``UserError`` for sizes that make no search."""
        check_sizes(self, "search_width", "top_k", "replace", "archive")
        if self.buffer < 0:
            raise UserError(f"buffer must be 0 or more, got {self.buffer}")

    @property
    def population(self) -> int:
        """Rows of the state, P."""
        return max(1, self.buffer)

    @property
    def candidates(self) -> int:
        """Prompts scored per problem and step, W."""
        return self.search_width


@functools.cache
def gcg(config: GcgConfig) -> Search:
    """GCG with ``config``, for one problem. The rows of its state are its buffer, the best last step first."""

    def init(params: Params, task: Task, problem: Problem) -> State:
        require_one_length(task, "gcg")
        return first_state(
            params, task, problem, population=config.population, archive=config.archive, penalty=config.repetition
        )

    def step(params: Params, task: Task, problem: Problem, state: State) -> tuple[State, Summary]:
        key = jax.random.fold_in(problem.key, state.step)
        weight = problem.fluency[:1]
        loss = -state.f + weight * state.x
        best = jnp.argmin(loss)[None]
        parent = state.ids[best]
        tokens = proposals(params, task, problem.objective, parent, weight, usable_top_k(task, config.top_k))
        ids = mutate(key, parent, tokens, config.search_width, config.replace)
        children = Children(ids, best, weight, config.replace)
        f, x = evaluate_children(
            params, task, problem, state, children, key, penalty=config.repetition, sampling=config.probe_sampling
        )
        child, worst = jnp.argmin(-f + weight * x), jnp.argmax(loss)
        enters = (-f[child] + weight[0] * x[child] < loss[worst]) | (config.buffer == 0)
        row = jnp.where(enters, worst, config.population)  # an index past the end writes nothing
        new = dataclasses.replace(
            state,
            ids=state.ids.at[row].set(ids[child]),
            f=state.f.at[row].set(f[child]),
            x=state.x.at[row].set(x[child]),
            archive=insert(state.archive, ids, f, x, state.step + 1),
            step=state.step + 1,
        )
        return new, summary_of(new, jnp.broadcast_to(weight, new.f.shape))

    return Search(init, step, config.candidates)
