"""What all algorithms share: the state of one problem, its beginning, how candidates are evaluated and who survives.

Member k of a population minimises ``J_k = -f + fluency_k * x``; the weight belongs to the number k and never moves.
Letters: P members, S prompt length, M candidates of a step, A archive capacity.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from jaxsteer.errors import UserError
from jaxsteer.models.params import Params
from jaxsteer.prompt_search.constraints import repeats, repetition
from jaxsteer.prompt_search.contexts import Task
from jaxsteer.prompt_search.pareto import Archive, empty_archive, insert
from jaxsteer.prompt_search.problem import FIRST_DRAW, Problem
from jaxsteer.prompt_search.scoring import score
from jaxsteer.prompt_search.shared_scoring import score_children, starts
from jaxsteer.prompts.slots import PAD


@struct.dataclass
class State:
    """What one problem needs to go on: a pytree whose arrays all gain a leading R axis in a search. Algorithms that
    keep more add fields of their own."""

    ids: Int[Array, "P S"]
    """The population: in a relaxed search, the best discrete prompts so far."""
    f: Float[Array, " P"]
    """Its objectives, larger being better; -inf for a prompt that does not count."""
    x: Float[Array, " P"]
    """Its cross-entropies, in nats per token."""
    archive: Archive
    """The Pareto frontier of all prompts that were ever scored."""
    verified: Archive
    """The archive when texts were last checked. What the host never checks leaves it empty."""
    step: Int[Array, ""]
    """Steps done."""


class Summary(NamedTuple):
    """What one step reports, per problem."""

    best_target: Float[Array, ""]
    """The best objective of the population."""
    loss: Float[Array, " P"]
    """J of every member."""
    cross_entropy: Float[Array, " P"]


@runtime_checkable
class InitFn(Protocol):
    """The first function of a ``Search``."""

    def __call__(self, params: Params, task: Task, problem: Problem, /) -> Any:
        """Draw the first population of one problem and score it.

        Called once per problem, inside jit: pure, and with shapes that depend on shapes alone.

        Args:
            params: The model's parameters.
            task: What candidates are scored against.
            problem: The objective's arrays, the key, the fluency weights, and the first prompts where they are given.

        Returns:
            The first state: any pytree with the fields of ``State``, its ``step`` being 0.
        """


@runtime_checkable
class StepFn(Protocol):
    """The second function of a ``Search``."""

    def __call__(self, params: Params, task: Task, problem: Problem, state: Any, /) -> tuple[Any, Summary]:
        """Propose candidates, score them, and keep the best.

        Called many times inside one loop on the device. All randomness comes from folding ``state.step`` into
        ``problem.key``, so that a search that goes on from a saved state ends like one that never stopped.

        Args:
            params: The model's parameters.
            task: What candidates are scored against.
            problem: As given to ``init``.
            state: What ``init`` or the last step returned. Between two steps the host may have taken members out
                (``evict``): their ``f`` is -inf.

        Returns:
            The state one step on, of the same structure, shapes and dtypes: ``step`` is one more, and every prompt
            that was scored has been offered to ``archive`` (``pareto.insert``). And what the step reports.
        """


class Search(NamedTuple):
    """A search in the manner of Optax's gradient transformations: a pair of pure functions on one problem.

    ``run_search`` runs any such pair over many problems; each sees its own problem alone. A user's own ``init`` may
    return any pytree that has the fields of ``State``.
    """

    init: InitFn
    step: StepFn
    candidates: int
    """Prompts scored per problem and step."""


def check_sizes(config: Any, *names: str) -> None:
    """Raise ``UserError`` for hyperparameters among ``names`` that are not above 0, and for a negative penalty."""
    for name in names:
        if not getattr(config, name) > 0:
            least = "at least 1" if isinstance(getattr(config, name), int) else "above 0"
            raise UserError(f"{name} must be {least}, got {getattr(config, name)}")
    if getattr(config, "repetition", 0.0) < 0:
        raise UserError(f"repetition must be 0 or more, got {config.repetition}: it is subtracted from the objective")


def random_ids(key: Key[Array, ""], task: Task, rows: int) -> Int[Array, "rows S"]:
    """Uniformly random prompts over the allowed tokens, of uniformly random lengths where these vary."""
    first, rest = jax.random.split(key)
    ids = jnp.concatenate(
        [
            jax.random.choice(first, task.first_ids, (rows, 1)),
            jax.random.choice(rest, task.ids, (rows, task.length - 1)),
        ],
        axis=1,
    )
    if not task.varies:
        return ids
    pads = jax.random.randint(jax.random.fold_in(key, 2), (rows, 1), 0, task.length - task.least + 1)
    column = jnp.arange(task.length)
    return jnp.where(column < pads, PAD, jnp.where(column == pads, ids[:, :1], ids))


def evaluate(
    params: Params,
    task: Task,
    problem: Problem,
    ids: Int[Array, "M S"],
    *,
    penalty: float = 0.0,
    known: Int[Array, "P S"] | None = None,
    parents: Int[Array, "Q S"] | None = None,
) -> tuple[Float[Array, " M"], Float[Array, " M"]]:
    """Objective less ``penalty`` times repetition, and cross-entropy, of every prompt.

    A prompt without finite scores gets an objective of -inf, and so does one that is among ``known`` or before it in
    ``ids``: scored twice, it would be taken for two. With ``parents``, ``ids`` are as many children of each of them,
    parent by parent, with positions from ``stratified``: what they share is computed once.
    """
    if parents is None:
        f, x = score(params, task, problem.objective, ids)
    else:
        each = starts(len(ids) // len(parents), task.length)
        f, x = score_children(params, task, problem.objective, parents, ids, each)
    if penalty:
        f = f - penalty * repetition(ids)
    good = jnp.isfinite(f) & jnp.isfinite(x)
    if known is not None:
        f = jnp.where(repeats(ids, known), -jnp.inf, f)
    return jnp.where(good, f, -jnp.inf), jnp.where(good, x, jnp.inf)


def first_state(
    params: Params, task: Task, problem: Problem, *, population: int, archive: int, penalty: float = 0.0
) -> State:
    """The problem's own first prompts, or random ones, with their scores."""
    ids = problem.ids
    if ids is None:
        ids = random_ids(jax.random.fold_in(problem.key, FIRST_DRAW), task, population)
    f, x = evaluate(params, task, problem, ids, penalty=penalty)
    empty = empty_archive(archive, task.length)
    known = insert(empty, ids, f, x, jnp.int32(0))
    return State(ids=ids, f=f, x=x, archive=known, verified=empty, step=jnp.int32(0))


def select(
    f: Float[Array, " pool"], x: Float[Array, " pool"], fluency: Float[Array, " P"]
) -> tuple[Int[Array, " P"], Float[Array, " P"]]:
    """For every member the prompt of the pool with the least ``J = -f + fluency * x``; ties go to the earlier."""
    loss = -f[None] + fluency[:, None] * x[None]
    best = jnp.argmin(loss, axis=1)
    return best, jnp.take_along_axis(loss, best[:, None], axis=1)[:, 0]


def compete(
    state: Any, ids: Int[Array, "M S"], f: Float[Array, " M"], x: Float[Array, " M"], weights: Float[Array, " P"]
) -> Any:
    """The state one step on: every member becomes the best of population and new prompts by its own weight, and the
    archive takes its share."""
    all_ids, all_f, all_x = (jnp.concatenate(pair) for pair in ((state.ids, ids), (state.f, f), (state.x, x)))
    chosen, _ = select(all_f, all_x, weights)
    return dataclasses.replace(
        state,
        ids=all_ids[chosen],
        f=all_f[chosen],
        x=all_x[chosen],
        archive=insert(state.archive, ids, f, x, state.step + 1),
        step=state.step + 1,
    )


def summary_of(state: Any, fluency: Float[Array, " P"]) -> Summary:
    """What a population has reached."""
    return Summary(best_target=state.f.max(), loss=-state.f + fluency * state.x, cross_entropy=state.x)


def evict(state: Any, invalid: Bool[Array, " P"], invalid_archive: Bool[Array, " A"]) -> Any:
    """Take prompts that were found not to re-tokenise out of a population and its archive: they score -inf.

    What they had pushed out of the archive since the last check comes back, as far as it is known, and so does what is
    left of the population.
    """
    f, before = jnp.where(invalid, -jnp.inf, state.f), state.verified
    archive = dataclasses.replace(state.archive, f=jnp.where(invalid_archive, -jnp.inf, state.archive.f))
    archive = insert(archive, before.ids, before.f, before.x, before.step)
    archive = insert(archive, state.ids, f, state.x, state.step)
    return dataclasses.replace(state, f=f, archive=archive, verified=archive)
