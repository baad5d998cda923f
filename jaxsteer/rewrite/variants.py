"""What an edit is measured beside: each fact alone, fine-tuning, the fact in the context, steering, random changes.

A variant changes a model without copying its weights; where every fact has a change of its own, each row of a batch
computes with that of its fact. Letters: n facts, I MLP width, D width, B rows, T time, A answer tokens.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import run_layers, scan_blocks
from jaxsteer.models.log_probs import label_log_probs
from jaxsteer.models.model import Model
from jaxsteer.models.padding import bucket
from jaxsteer.models.params import Params
from jaxsteer.models.sharding import shard_rows
from jaxsteer.models.taps import Intervention, make_where
from jaxsteer.models.transformer import embed, make_context
from jaxsteer.processes import to_host
from jaxsteer.rewrite.editing import Factors, Rewrite, low_rank
from jaxsteer.rewrite.facts import Fact
from jaxsteer.rewrite.lowrank import LowRank, Push, of_each_row
from jaxsteer.rewrite.rows import fact_row, pad, row_arrays

STEPS, ENOUGH = 50, 0.05
"""Of fine-tuning: steps of Adam, and the loss at which it ends (nats)."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Variant:
    """One way to make a model say new answers."""

    name: str
    together: Intervention | None = None
    """The change that all rows have."""
    alone: LowRank | Push | None = None
    """The changes of the facts, one for each."""
    told: bool = False
    """Whether the new fact stands before every text about it."""
    norm: float | None = None
    """Frobenius norm of the change of weights (of the facts' own changes the mean)."""

    def edits(self, facts: Int[np.ndarray, " B"]) -> Intervention | None:
        """For rows about these facts."""
        if self.alone is None:
            return self.together
        if isinstance(self.alone, Push):
            return Push(layer=self.alone.layer, vectors=self.alone.vectors[facts])
        return LowRank(layers=self.alone.layers, left=self.alone.left[:, facts], right=self.alone.right[:, facts])

    def before(self, fact: Fact) -> str:
        """What stands before a text about a fact."""
        return f"{fact.text} {fact.target_new.strip()}. " if self.told else ""


PLAIN = Variant(name="the model as it is")


def delta_variant(model: Model, factors: Factors, name: str) -> Variant:
    """The changes of a delta, all at once."""
    edits = low_rank(model, factors, tuple(factors))
    norm = np.sqrt(sum(_norm(left, right) ** 2 for left, right in factors.values()))
    return Variant(name=name, together=edits, norm=float(norm))


def variants_of(model: Model, rewrite: Rewrite, *, seed: int = 0) -> list[Variant]:
    """The edit, each of its facts alone where it is of one block, and what it is measured beside."""
    factors, layer = dict(rewrite.delta.factors), rewrite.layers[-1]
    together = delta_variant(model, factors, f"{rewrite.method}, all facts at once")
    found = [PLAIN, together]
    if len(rewrite.layers) == 1:
        left, right = rewrite.alone
        sizes = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        name = "rome, each fact alone"
        found.append(Variant(name=name, alone=of_each_row(layer, left, right), norm=float(sizes.mean())))
        rng = np.random.default_rng(seed)
        drawn = [_unit(rng.standard_normal(part.shape)) for part in (left, right)]
        random = of_each_row(layer, drawn[0] * sizes[:, None], drawn[1])
        found.append(Variant(name="random rank one, each alone", alone=random, norm=float(sizes.mean())))
    found.append(_random(model, factors, seed))
    found.append(_fine_tuned(model, rewrite, float(together.norm or 0.0)))
    found.append(Variant(name="the fact in the context, each alone", told=True))
    push = Push(layer=jnp.int32(layer), vectors=jnp.asarray(rewrite.values.change, jnp.float32))
    found.append(Variant(name="the value as steering vector, each alone", alone=push))
    return found


def _unit(rows: np.ndarray) -> np.ndarray:
    unit: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def _norm(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.sqrt(np.abs(np.sum((left.T @ left) * (right @ right.T)))))


def _random(model: Model, factors: Factors, seed: int) -> Variant:
    """A change of the same rank and norm in every block, of random factors."""
    rng, drawn = np.random.default_rng([seed, 1]), Factors()
    for layer, (left, right) in factors.items():
        new = rng.standard_normal(left.shape), rng.standard_normal(right.shape)
        drawn[layer] = (new[0] * _norm(left, right) / _norm(*new), new[1])
    return dataclasses.replace(delta_variant(model, drawn, ""), name="random, of equal rank and norm")


def _fine_tuned(model: Model, rewrite: Rewrite, norm: float) -> Variant:
    """W_down of the last block trained on the new answers by Adam, its change kept within the edit's norm."""
    rows = [fact_row(model, fact, fact.target_new) for fact in rewrite.facts]
    width = min(bucket(max(len(row.ids) for row in rows)), model.config.max_positions)
    tokens = pad([row.ids for row in rows], len(rows), width)
    arrays = (shard_rows(model.mesh, array) for array in (tokens, *row_arrays(rows)))
    change = to_host(_fine_tune(model.params, model.config, *arrays, np.float32(norm), layer=rewrite.layers[-1]))
    return Variant(
        name="fine-tuning of the same matrix, equal norm",
        together=LowRank(
            layers=jnp.asarray([rewrite.layers[-1]]),
            left=jnp.asarray(change)[None, None],
            right=jnp.eye(change.shape[1], dtype=jnp.float32)[None, None],
        ),
        norm=float(np.linalg.norm(change)),
    )


@partial(jax.jit, static_argnames=("config", "layer"))
def _fine_tune(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    reads: Int[Array, "B A"],
    labels: Int[Array, "B A"],
    weights: Float[Array, "B A"],
    norm: Float[Array, ""],
    *,
    layer: int,
) -> Float[Array, "I D"]:
    positions = jnp.arange(tokens.shape[1])[None]
    context, where = make_context(config, positions), make_where(tokens, positions, None)
    before = run_layers(params, config, embed(params, config, tokens, positions), context, 0, layer)
    shape = (config.d_mlp, config.d_model)
    identity = jnp.eye(config.d_model, dtype=jnp.float32)[None, None]

    def loss(change: Float[Array, "I D"]) -> Float[Array, ""]:
        edits = LowRank(layers=jnp.asarray([layer]), left=change[None, None], right=identity)
        x, _ = scan_blocks(params, config, before, context, layer, layer + 1, tap=edits.tap(where))
        x = run_layers(params, config, x, context, layer + 1, config.n_layers)
        hidden = jnp.take_along_axis(x, reads[:, :, None], axis=1)
        found = label_log_probs(params, config, hidden.reshape(-1, x.shape[-1]), labels.reshape(-1))
        return -jnp.sum(found.reshape(labels.shape) * weights) / len(tokens)

    rate = norm / np.sqrt(np.prod(shape)) / 5
    optimizer = optax.adam(1.0)

    def step(carry: tuple) -> tuple:
        change, state, count, _ = carry
        value, gradient = jax.value_and_grad(loss)(change)
        update, state = optimizer.update(gradient, state)
        new = change + rate * update
        new = new * jnp.minimum(1.0, norm / jnp.linalg.norm(new))
        return jnp.where(value > ENOUGH, new, change), state, count + 1, value

    zero = jnp.zeros(shape, jnp.float32)
    start = (zero, optimizer.init(zero), 0, jnp.float32(jnp.inf))
    return lax.while_loop(lambda carry: (carry[2] < STEPS) & (carry[3] > ENOUGH), step, start)[0]
