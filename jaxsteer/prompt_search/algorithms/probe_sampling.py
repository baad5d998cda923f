"""Probe sampling (arXiv 2403.01251): a small draft model decides which children the large one scores at all.

Both models score a few children at random. The better their ranks agree, the fewer of the draft's favourites the large
model scores; what it does not score is out. Letters: P parents, E children of each, M = P * E, B probes, K favourites
at most, S prompt length.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int, Key

from jaxsteer.errors import UserError
from jaxsteer.models.params import Params
from jaxsteer.objectives import Objective, Reads
from jaxsteer.prompt_search.contexts import Task
from jaxsteer.prompt_search.population import State, evaluate
from jaxsteer.prompt_search.problem import Problem
from jaxsteer.prompt_search.scoring import score


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeSampling:
    """Sizes as published: a 16th of the children are probes, at most an 8th of them favourites."""

    probes: int = 16
    favourites: int = 8

    def __post_init__(self) -> None:
        """Raise ``UserError`` for shares that are none."""
        if min(self.probes, self.favourites) < 1:
            raise UserError(f"probe sampling takes one in {self.probes} and one in {self.favourites}: give 1 or more")


@struct.dataclass
class Draft:
    """A model of the same tokenizer, and the same contexts made into a task of its own (``make_task``)."""

    params: Params
    task: Task


@struct.dataclass
class PairedObjective:
    """An objective of the large model and the one that stands for it in the draft: the projection on the draft's own
    direction, or the log-probability of the same answer."""

    target: Objective
    draft: Objective

    def __call__(self, reads: Reads) -> Float[Array, " rows"]:
        """The large model's."""
        return self.target(reads)


def with_draft(task: Task, draft: Draft) -> Task:
    """The task with a draft beside it, for problems whose objective is a ``PairedObjective``.

    Raises ``UserError`` when the draft's contexts, prompt length or vocabulary are not the task's.
    """
    other = draft.task
    for name, mine, theirs in (
        ("prompt length", task.length, other.length),
        ("shortest prompt", task.least, other.least),
        ("number of contexts", task.contexts, other.contexts),
        ("allowed tokens", task.ids.tolist(), other.ids.tolist()),
    ):
        if mine != theirs:
            raise UserError(
                f"the draft model's task has another {name} ({str(theirs)[:60]}) than the model's ({str(mine)[:60]}): "
                "make both from the same slots and token mask; the two models must share their tokenizer"
            )
    return dataclasses.replace(task, draft=draft)


class Children(NamedTuple):
    """Children of some members of a population, E of each, member by member."""

    ids: Int[Array, "M S"]
    parents: Int[Array, " P"]
    """The members: rows of the state."""
    weight: Float[Array, " P"]
    """Their fluency weights, by which their children are ranked."""
    replace: int
    """Tokens in which a child differs from its parent, at positions from ``epo.draw_positions``."""

    def of_parents(self, values: Float[Array, " P"]) -> Float[Array, " M"]:
        """For every child the value of its parent."""
        return jnp.repeat(values, len(self.ids) // len(self.parents))


def evaluate_children(
    params: Params,
    task: Task,
    problem: Problem,
    state: State,
    children: Children,
    key: Key[Array, ""],
    *,
    penalty: float = 0.0,
    sampling: ProbeSampling | None = None,
) -> tuple[Float[Array, " M"], Float[Array, " M"]]:
    """``evaluate`` for the children of a state's members.

    With ``sampling`` only probes and the draft's favourites are scored, the other children get an objective of -inf;
    children are ranked by how much they lower ``J = -f + weight * x`` of their parent.
    """
    if sampling is not None:
        return _evaluate_favourites(params, task, problem, state, children, key, penalty, sampling)
    parents = state.ids[children.parents] if children.replace == 1 else None
    return evaluate(params, task, problem, children.ids, penalty=penalty, known=state.ids, parents=parents)


def _evaluate_favourites(
    params: Params,
    task: Task,
    problem: Problem,
    state: State,
    children: Children,
    key: Key[Array, ""],
    penalty: float,
    config: ProbeSampling,
) -> tuple[Float[Array, " M"], Float[Array, " M"]]:
    draft, ids, parents = task.draft, children.ids, children.parents
    m, p = len(ids), len(parents)
    if draft is None or not isinstance(problem.objective, PairedObjective):
        raise UserError("probe sampling needs a draft model: give it with with_draft, and a PairedObjective")
    per_child = children.of_parents(children.weight)
    both = jnp.concatenate([state.ids[parents], ids])
    f, x = score(draft.params, draft.task, problem.objective.draft, both)
    before = children.of_parents(_finite(children.weight * x[:p] - f[:p]))
    by_draft = _finite(per_child * x[p:] - f[p:]) - before

    n_probes, most = max(2, m // config.probes), max(1, m // config.favourites)
    probes = jax.random.permutation(jax.random.fold_in(key, m), m)[:n_probes]
    probe_f, probe_x = evaluate(params, task, problem, ids[probes], penalty=penalty)
    before = children.of_parents(_finite(children.weight * state.x[parents] - state.f[parents]))
    by_target = _finite(per_child[probes] * probe_x - probe_f) - before[probes]
    agreement = (1 + _spearman(by_draft[probes], by_target)) / 2
    count = jnp.clip(jnp.floor((1 - agreement) * most), 1, most).astype(jnp.int32)

    favourites = jnp.argsort(by_draft)[:most]
    top_f, top_x = _evaluate_first(params, task, problem, ids[favourites], count, penalty)
    f = jnp.full(m, -jnp.inf).at[favourites].set(top_f).at[probes].set(probe_f)
    x = jnp.full(m, jnp.inf).at[favourites].set(top_x).at[probes].set(probe_x)
    return f, x


def _finite(loss: Array) -> Array:
    return jnp.where(jnp.isfinite(loss), loss, jnp.float32(1e30))


def _spearman(a: Float[Array, " B"], b: Float[Array, " B"]) -> Float[Array, ""]:
    """Rank correlation; -1, the least trust, where it is undefined because one of the two is constant."""
    ranks = [jax.scipy.stats.rankdata(values) for values in (a, b)]
    rho = jnp.corrcoef(*ranks)[0, 1]
    return jnp.where(jnp.isfinite(rho), rho, -1.0)


def _evaluate_first(
    params: Params, task: Task, problem: Problem, ids: Int[Array, "K S"], count: Int[Array, ""], penalty: float
) -> tuple[Float[Array, " K"], Float[Array, " K"]]:
    """``evaluate`` for the first ``count`` prompts; -inf and inf for the rest, of which no whole batch is computed."""
    k = len(ids)
    batch = min(k, task.batch)
    padded = jnp.pad(ids, ((0, -k % batch), (0, 0)), mode="edge")

    def one_batch(i: Array, scores: tuple[Array, Array]) -> tuple[Array, Array]:
        ids = lax.dynamic_slice_in_dim(padded, i * batch, batch)
        new = evaluate(params, task, problem, ids, penalty=penalty)
        return jax.tree.map(lambda all_, some: lax.dynamic_update_slice_in_dim(all_, some, i * batch, 0), scores, new)

    empty = jnp.full(len(padded), -jnp.inf), jnp.full(len(padded), jnp.inf)
    f, x = lax.fori_loop(0, -(-count // batch), one_batch, empty)
    scored = jnp.arange(k) < count
    return jnp.where(scored, f[:k], -jnp.inf), jnp.where(scored, x[:k], jnp.inf)
