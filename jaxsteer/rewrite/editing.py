"""``rome`` and ``memit``: facts into a delta of W_down.

1. Prefixes that the model writes, and the mean key of every subject behind them (``rows``, ``keys``).
2. What the MLP should say there (``values``).
3. The update of least weight in the metric of the covariance (``solve``).

ROME changes one layer, so that every fact's mean key gives exactly its value; of one fact it is the update of
2202.05262, of several the one that keeps all their constraints. MEMIT (2210.07229) spreads what the stream after the
last of several layers is to gain over all of them, and measures keys and what is still missing again after each.

The key k* is the mean over prefixes wherever it stands, and what its output is to gain was sought behind the same
prefixes, so that v* = W k* + d. Letters: n facts, I MLP width, D width.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxsteer.checkpoints.deltas import Delta
from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.ranges import CountFrom0, Seed, Weight, check_ranges
from jaxsteer.rewrite.covariance import Covariance
from jaxsteer.rewrite.facts import Fact
from jaxsteer.rewrite.keys import subject_states
from jaxsteer.rewrite.lowrank import LowRank
from jaxsteer.rewrite.rows import fact_row, model_prefixes
from jaxsteer.rewrite.solve import Solver
from jaxsteer.rewrite.values import ValueOptions, Values, wanted_values

log = logging.getLogger(__name__)

Method = Literal["rome", "memit"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EditOptions:
    """Where and how facts are written."""

    method: Method = "rome"
    """rome: one block, every fact exactly; memit: several blocks, facts against the text's keys."""
    layers: tuple[CountFrom0, ...] = ()
    """Blocks to change (default: the one at 5/32 of the depth; memit: those from 4/32 to 8/32)."""
    mu: Weight | None = None
    """Of memit: weight of the text's keys against the facts' (default: the entries of a key, what a key of the text
    weighs on average; the paper's 15,000 is that of GPT-J)."""
    ridge: Weight = 0.0
    """Share of the mean eigenvalue that is added to the covariance's diagonal."""
    prefixes: CountFrom0 = 20
    """Beginnings that the model writes, over which keys are averaged, beside none."""
    seed: Seed = 0
    """Seed of the prefixes."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Rewrite:
    """The delta that facts make, and what it is made of."""

    delta: Delta
    method: Method
    facts: tuple[Fact, ...]
    layers: tuple[int, ...]
    keys: Float[np.ndarray, "n I"]
    """Mean keys of the last layer, before any change."""
    values: Values
    leverage: Float[np.ndarray, " n"]
    """k^T C^-1 k of these keys; I on average over text."""
    whitened: Float[np.ndarray, "n I"]
    """C^-1 k of these keys."""
    reached: Float[np.ndarray, " n"]
    """|stream or output gained - wanted| / |wanted + output| at the keys: 0 where the constraint is kept."""
    prefixes: tuple[str, ...]

    @property
    def alone(self) -> tuple[Float[np.ndarray, "n I"], Float[np.ndarray, "n D"]]:
        """Factors of ROME's update of every fact by itself: its ``left`` [I], its ``right`` [D]."""
        return self.whitened / self.leverage[:, None], self.values.change


def default_layers(model: Model, method: Method) -> tuple[int, ...]:
    """The blocks of the papers' Llama-class settings (5 of 32; 4 to 8 of 32) at the same depth of this model."""
    depth = model.config.n_layers
    if method == "rome":
        return (round(5 * depth / 32),)
    return tuple(range(round(4 * depth / 32), max(round(8 * depth / 32), round(4 * depth / 32) + 1) + 1))


def layers_of(model: Model, options: EditOptions) -> tuple[int, ...]:
    """The blocks to change, in order. Raises ``UserError`` for blocks that do not fit the method or the model."""
    layers = tuple(sorted(set(options.layers))) or default_layers(model, options.method)
    for layer in layers:
        if not 0 <= layer < model.config.n_layers:
            raise UserError(f"there is no block {layer}: {model.name} has blocks 0 to {model.config.n_layers - 1}")
    if options.method == "rome" and len(layers) != 1:
        raise UserError(f"rome changes one block, got {list(layers)}: name one, or use memit")
    if len(layers) > 1 and model.config.post_norms:
        raise UserError(
            f"{model.name} normalises what its MLPs give, so that what the stream is to gain cannot be shared out over "
            "several blocks: name one block (--layers)"
        )
    return layers


def edit(
    model: Model,
    facts: Sequence[Fact],
    covariances: Mapping[int, Covariance],
    *,
    options: EditOptions = EditOptions(),
    values: ValueOptions = ValueOptions(),
    wanted: Values | None = None,
    found: Callable[[Values], None] | None = None,
    say: Callable[[str], None] = log.info,
) -> Rewrite:
    """Write ``facts`` into the model: the delta of the method that ``options`` names.

    ``covariances`` are those of the blocks to change. ``values`` says how the wanted outputs are sought; ``wanted`` are
    some that an earlier call has ``found``. Raises
    ``UserError`` before any search for facts without tokens or with a subject twice, and for covariances that are
    missing, of another model, or cannot be inverted.
    """
    check_ranges(options)
    check_ranges(values)
    facts, layers = tuple(facts), layers_of(model, options)
    if not facts:
        raise UserError("no fact was given: there is nothing to rewrite")
    solvers = _solvers(model, covariances, layers, options.ridge)
    for fact in facts:
        fact_row(model, fact, fact.target_new)
    prefixes = model_prefixes(model, count=options.prefixes, seed=options.seed)
    if wanted is None:
        say(f"seeking the wanted outputs of block {layers[-1]} for {len(facts)} facts")
        wanted = wanted_values(model, facts, prefixes, layers[-1], options=values)
        if found is not None:
            found(wanted)
    start = subject_states(model, facts, prefixes, layers[-1])
    if options.method == "rome":
        factors = {layers[0]: solvers[layers[0]].update(start.keys, wanted.change)}
        gained = start.keys @ factors[layers[0]][0] @ factors[layers[0]][1]
    else:
        mu = float(model.config.d_mlp) if options.mu is None else options.mu
        factors = _spread(model, facts, prefixes, layers, solvers, wanted, start.stream, mu)
        end = subject_states(model, facts, prefixes, layers[-1], edits=low_rank(model, factors, layers))
        gained = end.stream - start.stream
    scale = np.linalg.norm(wanted.output + wanted.change, axis=1)
    return Rewrite(
        delta=Delta(
            factors={
                layer: (left.astype(np.float32), right.astype(np.float32)) for layer, (left, right) in factors.items()
            },
            model=model.name,
            fingerprint=model.fingerprint,
            metadata={"method": options.method, "facts": str(len(facts))},
        ),
        method=options.method,
        facts=facts,
        layers=layers,
        keys=start.keys,
        values=wanted,
        leverage=solvers[layers[-1]].leverage(start.keys),
        whitened=solvers[layers[-1]].whitened(start.keys),
        reached=np.linalg.norm(gained - wanted.change, axis=1) / scale,
        prefixes=prefixes,
    )


Factors = dict[int, tuple[Float[np.ndarray, "I n"], Float[np.ndarray, "n D"]]]


def _spread(
    model: Model,
    facts: Sequence[Fact],
    prefixes: Sequence[str],
    layers: tuple[int, ...],
    solvers: Mapping[int, Solver],
    wanted: Values,
    stream: Float[np.ndarray, "n D"],
    mu: float,
) -> Factors:
    """MEMIT's updates: each layer gives its share of what the stream after the last one still lacks."""
    goal, factors = stream + wanted.change, Factors()
    for number, layer in enumerate(layers):
        edits = low_rank(model, factors, layers) if factors else None
        now = subject_states(model, facts, prefixes, layer, stream_layer=layers[-1], edits=edits)
        gains = (goal - now.stream) / (len(layers) - number)
        factors[layer] = solvers[layer].update(now.keys, gains, mu=mu)
    return factors


def low_rank(model: Model, factors: Factors, layers: Sequence[int]) -> LowRank:
    """The changes so far as an edit of all ``layers``: one program, however many of them have changed."""
    rank = max(left.shape[1] for left, _ in factors.values())
    none = np.zeros((model.config.d_mlp, rank)), np.zeros((rank, model.config.d_model))
    left, right = zip(*(factors.get(layer, none) for layer in layers), strict=True)
    return LowRank(
        layers=jnp.asarray(layers),
        left=jnp.asarray(np.stack(left), jnp.float32)[:, None],
        right=jnp.asarray(np.stack(right), jnp.float32)[:, None],
    )


def _solvers(
    model: Model, covariances: Mapping[int, Covariance], layers: Sequence[int], ridge: float
) -> dict[int, Solver]:
    for layer in layers:
        if layer not in covariances:
            raise UserError(f"there is no covariance of block {layer}: measure it (jaxsteer rewrite covariance)")
        if covariances[layer].fingerprint != model.fingerprint:
            raise UserError(
                f"the covariance of block {layer} is of {covariances[layer].model} (weights "
                f"{covariances[layer].fingerprint[:12]}), not of {model.name} ({model.fingerprint[:12]})"
            )
    return {layer: covariances[layer].solver(ridge=ridge) for layer in layers}
