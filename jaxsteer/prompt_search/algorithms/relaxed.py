"""What the relaxed searches (PEZ, GBDA, soft prompts) share: the optimizer, nearest tokens, losses of embeddings.

They move something continuous, and discrete prompts alone count: what they propose is scored as token ids by the same
code as the candidates of every other search. Letters: P members, n samples per member, S prompt length, D width,
A allowed tokens, O openings (distinct texts before the slot).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.models.log_probs import VOCABULARY_BLOCK
from jaxsteer.models.params import Params
from jaxsteer.models.transformer import scale_embeddings, unembed
from jaxsteer.objectives import Objective
from jaxsteer.prompt_search.contexts import Task
from jaxsteer.prompt_search.lengths import require_one_length
from jaxsteer.prompt_search.population import (
    Search,
    State,
    Summary,
    check_sizes,
    compete,
    evaluate,
    first_state,
    summary_of,
)
from jaxsteer.prompt_search.problem import Problem
from jaxsteer.prompt_search.scoring import first_log_probs, run_slots

OPTIMIZERS = (
    "adabelief", "adadelta", "adagrad", "adam", "adamax", "adamaxw", "adamw", "amsgrad", "lamb", "lars", "lion",
    "nadam", "nadamw", "novograd", "radam", "rmsprop", "rprop", "sgd", "sm3", "yogi",
)  # fmt: skip
"""Of Optax, those that a learning rate makes and that need no value of the loss."""
Arguments = tuple[tuple[str, Any], ...]
"""Keyword arguments that a frozen config can hold: ``(("b1", 0.8), ("weight_decay", 0.1))``."""


def make_optimizer(
    optimizer: str | optax.GradientTransformation, learning_rate: float, arguments: Arguments = ()
) -> optax.GradientTransformation:
    """The Optax optimizer of that name with these arguments, or ``optimizer`` itself if it is one already.

    Raises ``UserError`` for a name that is none of ``OPTIMIZERS`` and for arguments that it does not take.
    """
    if not isinstance(optimizer, str):
        return optimizer
    if optimizer not in OPTIMIZERS:
        raise UserError(
            f"optimizer {optimizer!r} is not known: give one of {', '.join(OPTIMIZERS)}, or from Python any "
            "optax.GradientTransformation"
        )
    try:
        made: optax.GradientTransformation = getattr(optax, optimizer)(learning_rate, **dict(arguments))
    except TypeError as error:
        raise UserError(f"optimizer {optimizer!r} of Optax does not take {dict(arguments)}: {error}") from error
    return made


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelaxedConfig:
    """Hyperparameters of every relaxed search."""

    population: int
    """Members that move side by side."""
    optimizer: str | optax.GradientTransformation = "adamw"
    """Name of an Optax optimizer, or from Python any gradient transformation."""
    learning_rate: float = 0.1
    """In units of the embedding table's root mean square entry, where embeddings move."""
    arguments: Arguments = ()
    """Further keyword arguments of the optimizer."""
    archive: int = 64

    def __post_init__(self) -> None:
        """Raise ``UserError`` for sizes that make no search and optimizers that do not exist."""
        check_sizes(self, "population", "learning_rate", "archive")
        make_optimizer(self.optimizer, self.learning_rate, self.arguments)

    @property
    def candidates(self) -> int:
        """Prompts scored per problem and step, besides one gradient of each member."""
        return self.population


class Moved(NamedTuple):
    """What one step of gradient descent leaves: what moves, and the optimizer's state."""

    value: Array
    optimizer: Any


@runtime_checkable
class Relax(Protocol):
    """How a relaxed search begins."""

    def __call__(
        self, params: Params, task: Task, problem: Problem, first: State, begin: Callable[[Array], Any], /
    ) -> Any:
        """The algorithm's state at the ``first`` prompts. ``begin(value)`` gives the optimizer's for what moves."""


@runtime_checkable
class Move(Protocol):
    """How a relaxed search goes on."""

    def __call__(
        self, params: Params, task: Task, problem: Problem, state: Any, descend: Callable[[Array, Array], Moved], /
    ) -> tuple[Any, Int[Array, "M S"]]:
        """The state after its gradient step, and the prompts to score. ``descend(value, gradient)`` does the step."""


def relaxed_search(algorithm: str, config: RelaxedConfig, relax: Relax, move: Move) -> Search:
    """The search that descends on what ``relax`` makes of the first prompts, and scores the prompts of every ``move``.

    The algorithm's state is a ``State`` with further fields, one of them ``optimizer``. Entries of a gradient that are
    not finite count as 0. Prompts must have one length; the error that says so names the ``algorithm``.
    """
    optimizer = make_optimizer(config.optimizer, config.learning_rate, config.arguments)
    penalty = getattr(config, "repetition", 0.0)

    def init(params: Params, task: Task, problem: Problem) -> Any:
        require_one_length(task, algorithm)
        first = first_state(
            params, task, problem, population=config.population, archive=config.archive, penalty=penalty
        )
        return relax(params, task, problem, first, optimizer.init)

    def step(params: Params, task: Task, problem: Problem, state: Any) -> tuple[Any, Summary]:
        def descend(value: Array, gradient: Array) -> Moved:
            gradient = jnp.where(jnp.isfinite(gradient), gradient, 0.0)
            updates, after = optimizer.update(gradient, state.optimizer, value)
            return Moved(optax.apply_updates(value, updates), after)

        moved, ids = move(params, task, problem, state, descend)
        f, x = evaluate(params, task, problem, ids, penalty=penalty, known=state.ids)
        new = compete(moved, ids, f, x, problem.fluency)
        return new, summary_of(new, problem.fluency)

    return Search(init, step, config.candidates)


def table_unit(params: Params) -> Float[Array, ""]:
    """Root mean square entry of the embedding table: the unit in which soft prompts move, so that a learning rate means
    the same for every model."""
    return jnp.sqrt(jnp.mean(jnp.square(params.embed.astype(jnp.float32))))


def allowed_at(task: Task) -> Bool[Array, "S A"]:
    """Which of the allowed tokens ``task.ids`` may stand at each position."""
    first = jnp.arange(task.length)[:, None] == 0
    return jnp.where(first, task.allowed_first[task.ids], True)


def nearest(params: Params, task: Task, soft: Float[Array, "P S D"]) -> Int[Array, "P S"]:
    """The allowed token whose embedding has the largest cosine with each soft one."""
    table = params.embed
    norm = jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(table.astype(jnp.float32)), axis=-1)), 1e-12)

    def one(row: tuple[Array, Array]) -> Array:
        likeness = jnp.matmul(table, row[0].astype(table.dtype), preferred_element_type=jnp.float32) / norm
        usable = jnp.where(row[1] == 0, task.allowed_first, task.allowed)
        return jnp.argmax(jnp.where(usable, likeness, -jnp.inf)).astype(jnp.int32)

    population, length, _ = soft.shape
    rows = (soft.reshape(population * length, -1), jnp.tile(jnp.arange(length), population))
    at_once = max(1, VOCABULARY_BLOCK // len(table))
    return lax.map(one, rows, batch_size=min(at_once, population * length)).reshape(population, length)


def embedded(params: Params, ids: Int[Array, "P S"]) -> Float[Array, "P S D"]:
    """The embeddings of tokens in float32, in units of ``table_unit``."""
    return params.embed[ids].astype(jnp.float32) / table_unit(params)


def soft_target(params: Params, task: Task, objective: Objective, rows: Float[Array, "P S D"]) -> Float[Array, " P"]:
    """(P,) the objective with embedding rows in the slot."""
    return run_slots(params, task, objective, scale_embeddings(rows.astype(params.embed.dtype), task.config))[0]


def mixture_loss(
    params: Params, task: Task, objective: Objective, mixture: Float[Array, "n S A"], fluency: Float[Array, ""]
) -> Float[Array, ""]:
    """Mean over samples of ``J`` where every position holds a mixture of the allowed tokens.

    Its cross-entropy is that of the mixture: ``-sum_v mixture_v log P(v | mixtures before)`` per token.
    """
    table = params.embed[task.ids]
    rows = jnp.einsum("nsa,ad->nsd", mixture, table, preferred_element_type=jnp.float32)
    f, hidden = run_slots(params, task, objective, scale_embeddings(rows.astype(table.dtype), task.config))

    weight, openings = task.opening_weight, hidden.shape[0]

    @jax.checkpoint
    def one(row: tuple[Array, Array]) -> Array:
        log_probs = jax.nn.log_softmax(unembed(params, task.config, row[0]))[:, task.ids]  # (O, A)
        return jnp.sum(weight * (log_probs @ row[1]))

    samples, length, _ = mixture.shape
    total, scored = jnp.zeros((samples,)), length - 1
    if length > 1:
        predictors = jnp.moveaxis(hidden, 0, 2).reshape(samples * (length - 1), openings, -1)
        weights = mixture[:, 1:].reshape(samples * (length - 1), -1)
        at_once = max(1, VOCABULARY_BLOCK // (task.config.vocab_size * openings))
        picked = lax.map(one, (predictors, weights), batch_size=min(at_once, len(weights)))
        total = picked.reshape(samples, length - 1).sum(-1)
    if task.scores_first:
        first = jnp.einsum("o,oa->a", weight, first_log_probs(params, task)[:, task.ids])
        total, scored = total + mixture[:, 0] @ first, scored + 1
    return jnp.mean(-fluency * total / max(scored, 1) - f)
