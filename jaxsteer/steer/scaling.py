"""Activation scaling (2410.04962): one learned number per layer, site and token of the prompt, h + alpha h.

What is minimised, in the mean over rows with a wanted and another answer of one token each:

    effectiveness   max(margin - (logit of wanted - logit of other), 0)
    faithfulness    KL(model as it is || scaled) of the next token, both without the two answers
    minimality      the sum of |alpha|

With ``both_ways`` the same is asked of - alpha with the answers exchanged, so that the sign of the coefficient chooses
the answer. The paper's exact forms and weights are not known to us; these are ours.

Letters: n rows, T time, M layers of a kind of site, P tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsteer import __version__
from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import run_layers
from jaxsteer.models.log_probs import LOGITS_NOT_FINITE
from jaxsteer.models.model import Model
from jaxsteer.models.padding import bucket, pad_rows
from jaxsteer.models.params import Params
from jaxsteer.models.sharding import shard_rows
from jaxsteer.models.sites import Site, find_sites, layers_by_kind
from jaxsteer.models.taps import Intervention, make_where, of_one_token, tap_of
from jaxsteer.models.transformer import embed, make_context, unembed
from jaxsteer.prompts.generate import Prompt, encode_prompts
from jaxsteer.ranges import Positive, Weight, as_tuple, check_ranges, must_be
from jaxsteer.steer.edits import Edits
from jaxsteer.steer.operations import scale_prompt
from jaxsteer.steer.vectors import Vectors

CHUNK = 20
"""Steps of one call, between which progress is told."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
    """How the numbers are learned, by Adam on all rows at once, from 0."""

    steps: int = 200
    rate: Positive = 0.01
    tokens: int = 8
    """Last tokens of the prompt that have numbers."""
    margin: Positive = 1.0
    """Logits by which the wanted answer shall lead."""
    faithfulness: Weight = 1.0
    minimality: Weight = 0.01
    both_ways: bool = True


@struct.dataclass
class _Data:
    tokens: Int[Array, "n T"]
    mask: Bool[Array, "n T"]
    wanted: Int[Array, " n"]
    other: Int[Array, " n"]
    weight: Float[Array, " n"]
    """Of each row in the means: 0 for those that only fill up the devices."""


Alphas = dict[str, Float[Array, "M P"]]


def learn_scaling(
    model: Model,
    prompts: Sequence[Prompt],
    wanted: Sequence[int] | Int[np.ndarray, " _"],
    other: Sequence[int] | Int[np.ndarray, " _"],
    sites: str | Sequence[str],
    *,
    scaling: Scaling = Scaling(),
    progress: Callable[[int, int, float], None] | None = None,
) -> Vectors:
    """Scale the prompts' activations at ``sites`` until the model gives the ``wanted`` answer and not the ``other``.

    Answers are one token id for every prompt; prompts are what ``generate`` takes. Vectors of operation "scale" come
    back: ``arrays[site]`` are the alphas of the prompt's last ``scaling.tokens`` tokens, the last one first, and
    coefficient 1 is what was learned. The metadata hold the three terms before and after, and the share of prompts with
    the wanted answer ahead. ``progress(done, total, loss)`` counts steps. Raises ``UserError`` for answers that are the
    same or not one for each prompt, ids outside the vocabulary, and logits that are not finite.
    """
    must_be(model, Model, "learn_scaling's model")
    must_be(scaling, Scaling, "scaling")
    check_ranges(scaling)
    config, where = model.config, sorted(set(find_sites(sites, model.config).values()))
    rows = [row.ids for row in encode_prompts(model, as_tuple(prompts))]
    given = [np.asarray(as_tuple(ids)) for ids in (wanted, other)]
    if any(ids.shape != (len(rows),) or ids.dtype.kind not in "iu" for ids in given):
        got = " and ".join(f"{ids.dtype} {list(ids.shape)}" for ids in given)
        raise UserError(
            f"give one token id of each answer, wanted and other, for each of {len(rows)} prompts, got {got}"
        )
    answers = np.stack(given)
    if answers.min() < 0 or answers.max() >= config.vocab_size or (answers[0] == answers[1]).any():
        raise UserError(f"answers are two different token ids from 0 to {config.vocab_size - 1}")
    longest = max(map(len, rows))
    if not where or not min(map(len, rows)) or longest > config.max_positions:
        raise UserError(f"scaling needs sites, and prompts of 1 to {config.max_positions} tokens; got {longest}")
    shards = 1 if model.mesh is None else model.mesh.shape.get("prompts", 1)
    spare = -len(rows) % shards
    index = np.r_[np.arange(len(rows)), np.zeros(spare, int)]
    weight = np.r_[np.full(len(rows), 1 / len(rows)), np.zeros(spare)].astype(np.float32)
    tokens, mask = pad_rows([rows[i] for i in index], min(bucket(longest), config.max_positions))
    arrays = tokens, mask, *answers[:, index].astype(np.int32), weight
    data = _Data(*(shard_rows(model.mesh, a) for a in arrays))
    groups = layers_by_kind(where)
    alphas: Alphas = {kind: jnp.zeros((len(layers), scaling.tokens)) for kind, layers in groups.items()}
    base = _last_logits(model.params, config, data, None)
    if not np.isfinite(np.asarray(base)).all():
        raise UserError(LOGITS_NOT_FINITE)
    static = dict(config=config, sites=tuple(where), scaling=scaling)
    before = _terms(model.params, data, base, alphas, **static)[1]
    state: Any = optax.adam(scaling.rate).init(alphas)
    for done in range(0, scaling.steps, CHUNK):
        steps = min(CHUNK, scaling.steps - done)
        alphas, state, loss = _train(model.params, data, base, alphas, state, steps=steps, **static)
        if not np.isfinite(float(loss)):
            raise UserError(
                f"{LOGITS_NOT_FINITE} This was after {done + steps} steps of scaling: choose a smaller rate"
            )
        if progress is not None:
            progress(done + steps, scaling.steps, float(loss))
    after = _terms(model.params, data, base, alphas, **static)[1]
    return Vectors(
        arrays={
            Site(layer, kind).name: np.asarray(alphas[kind][i])
            for kind, layers in groups.items()
            for i, layer in enumerate(layers)
        },
        operation="scale",
        sign="towards the wanted answers",
        model=model.name,
        fingerprint=model.fingerprint,
        read_position=f"the last {scaling.tokens} tokens of the prompt",
        metadata={
            "estimator": "activation scaling",
            "n_prompts": str(len(rows)),
            "scaling": json.dumps(dataclasses.asdict(scaling)),
            "before": json.dumps({name: float(value) for name, value in before.items()}),
            "after": json.dumps({name: float(value) for name, value in after.items()}),
            "jaxsteer_version": __version__,
        },
    )


@partial(jax.jit, static_argnames=("config", "sites", "scaling", "steps"))
def _train(
    params: Params,
    data: _Data,
    base: Float[Array, "n V"],
    alphas: Alphas,
    state: Any,
    *,
    config: ModelConfig,
    sites: tuple[Site, ...],
    scaling: Scaling,
    steps: int,
) -> tuple[Alphas, Any, Float[Array, ""]]:
    """The alphas after ``steps`` of Adam, and the last loss. Many parameters: what is trained, and what is static."""

    def loss(alphas: Alphas) -> Float[Array, ""]:
        return _terms(params, data, base, alphas, config=config, sites=sites, scaling=scaling)[0]

    def step(carry: tuple[Alphas, Any], _: None) -> tuple[tuple[Alphas, Any], Array]:
        alphas, state = carry
        value, slopes = jax.value_and_grad(loss)(alphas)
        changes, state = optax.adam(scaling.rate).update(slopes, state)
        return (jax.tree.map(jnp.add, alphas, changes), state), value

    (alphas, state), values = lax.scan(step, (alphas, state), length=steps)
    return alphas, state, values[-1]


@partial(jax.jit, static_argnames=("config", "sites", "scaling"))
def _terms(
    params: Params,
    data: _Data,
    base: Float[Array, "n V"],
    alphas: Alphas,
    *,
    config: ModelConfig,
    sites: tuple[Site, ...],
    scaling: Scaling,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss, and its terms with the share of rows that the wanted answer leads in."""
    groups = layers_by_kind(sites)
    pick = lambda logits, ids: jnp.take_along_axis(logits, ids[:, None], axis=-1)[:, 0]  # noqa: E731
    answers = jax.nn.one_hot(data.wanted, base.shape[-1]) + jax.nn.one_hot(data.other, base.shape[-1]) > 0
    rest = lambda logits: jax.nn.log_softmax(jnp.where(answers, -1e30, logits))  # noqa: E731
    effect, kl, ahead = [], [], []
    for sign in (1.0, -1.0) if scaling.both_ways else (1.0,):
        edits = Edits(
            tuple(
                scale_prompt([Site(layer, kind) for layer in layers], alphas[kind], sign)
                for kind, layers in groups.items()
            )
        )
        logits = _last_logits(params, config, data, edits)
        lead = sign * (pick(logits, data.wanted) - pick(logits, data.other))
        effect.append(data.weight @ jax.nn.relu(scaling.margin - lead))
        kl.append(data.weight @ jnp.sum(jnp.exp(rest(base)) * (rest(base) - rest(logits)), axis=-1))
        ahead.append(data.weight @ (lead > 0))
    terms = {
        "effectiveness": jnp.stack(effect).mean(),
        "faithfulness": jnp.stack(kl).mean(),
        "minimality": jnp.stack([jnp.abs(a).sum() for a in alphas.values()]).sum(),
    }
    weighted = scaling.faithfulness * terms["faithfulness"] + scaling.minimality * terms["minimality"]
    return terms["effectiveness"] + weighted, terms | {"ahead": ahead[0]}


@partial(jax.jit, static_argnames="config")
def _last_logits(params: Params, config: ModelConfig, data: _Data, edits: Intervention | None) -> Float[Array, "n V"]:
    """Logits behind the last token of every prompt."""
    positions = jnp.broadcast_to(jnp.arange(data.tokens.shape[1]), data.tokens.shape)
    where = make_where(data.tokens, positions, data.mask)
    tap, last = tap_of(edits, where), where.prompt_length[:, None] - 1
    context = make_context(config, positions, data.mask)
    x = embed(params, config, data.tokens, positions, tap)
    x = run_layers(params, config, x, context, 0, config.n_layers, tap=tap)
    x = jnp.take_along_axis(x, last[:, :, None], axis=1)[:, 0]
    return unembed(params, config, x, of_one_token(tap_of(edits, where.at(last))))
