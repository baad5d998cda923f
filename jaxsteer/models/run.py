"""``run``: one forward pass with what it says and what it computes on the way; ``gradients``: what moves it.

``logits`` and ``capture`` are the two halves of ``run``. All of them may be called inside ``jax.jit`` and ``jax.grad``.
A model is no pytree: what is closed over becomes a constant of the compiled program. Of a large model, and to
differentiate with respect to weights, pass ``model.params`` to the jitted function and put them back inside with
``dataclasses.replace(model, params=params)``.

Letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import ready_for, run_and_read
from jaxsteer.models.model import Model
from jaxsteer.models.params import Params
from jaxsteer.models.roles import Roles
from jaxsteer.models.sharding import shard_rows
from jaxsteer.models.sites import KINDS, Site, find_sites
from jaxsteer.models.taps import Intervention, adding, checked, joined, make_where, tap_of
from jaxsteer.models.transformer import embed, make_context, positions_of, unembed

Tokens = Int[np.ndarray, "B T"] | Int[Array, "B T"]
Mask = Bool[np.ndarray, "B T"] | Bool[Array, "B T"]
Lengths = Int[np.ndarray, " _"] | Int[Array, " _"]


@struct.dataclass
class Run:
    """One forward pass."""

    logits: Float[Array, "B T V"]
    """Of the next token at every position, float32; they mean nothing at padding."""
    states: dict[str, Float[Array, ...]]
    """Values at sites, float32, by name."""


@struct.dataclass
class Gradients:
    """What a number that was computed from a run owes to values on the way."""

    value: Float[Array, ""]
    """The number."""
    states: dict[str, Float[Array, ...]]
    """Values at the sites, float32, by name."""
    gradients: dict[str, Float[Array, ...]]
    """Its gradients with respect to these."""


Metric = Callable[[Run], Float[Array, ""]]


@struct.dataclass
class _Rows:
    """Checked inputs of a run, on the model's mesh."""

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"] | None = None
    edits: Intervention | None = None
    prompt_length: Int[Array, " B"] | None = None
    roles: Roles | None = None


def run(
    model: Model,
    tokens: Tokens,
    mask: Mask | None = None,
    *,
    sites: Sequence[str] = (),
    edits: Intervention | None = None,
    prompt_length: Lengths | None = None,
    roles: Roles | None = None,
) -> Run:
    """Logits, and what the model computes at ``sites``.

    Differentiable with respect to the arrays of ``edits`` and ``model.params``.

    Args:
        mask: False on padding, which may stand on the left or on the right.
        sites: names as in docs/models.md; one with a wildcard ("blocks.*.hook_resid_post") names those of every layer.
        edits: change the computation on its way (``jaxsteer.steer``). States are those after them.
        prompt_length: where each row's response begins, in tokens without padding, for edits that tell prompt from
            response; by default all is prompt.
        roles: whose each token is, for edits that ask for it, where rows are conversations
            (``models.roles.stack_rendered``). They also tell prompt from response.

    Returns:
        Logits, and states by the names that were given (those of a wildcard by their own).

    Raises:
        UserError: for tokens outside the vocabulary or longer than the model's positions, for unknown sites, and for
            edits that do not fit the model or the rows.
    """
    rows, named = _rows(model, tokens, mask, edits, prompt_length, roles), _named(model, sites)
    logits, states = _run(model.params, model.config, rows, sites=_where_known(named, rows), to_logits=True)
    return Run(logits, dict(zip(named, states, strict=True)))


def logits(
    model: Model,
    tokens: Tokens,
    mask: Mask | None = None,
    *,
    edits: Intervention | None = None,
    prompt_length: Lengths | None = None,
    roles: Roles | None = None,
) -> Float[Array, "B T V"]:
    """The logits of ``run``, whose arguments and errors these are."""
    return run(model, tokens, mask, edits=edits, prompt_length=prompt_length, roles=roles).logits


def capture(
    model: Model,
    tokens: Tokens,
    sites: Sequence[str],
    mask: Mask | None = None,
    *,
    edits: Intervention | None = None,
    prompt_length: Lengths | None = None,
    roles: Roles | None = None,
) -> dict[str, Float[Array, ...]]:
    """The states of ``run``, whose arguments and errors these are. No layer above the last site is run."""
    rows, named = _rows(model, tokens, mask, edits, prompt_length, roles), _named(model, sites)
    _, states = _run(model.params, model.config, rows, sites=_where_known(named, rows), to_logits=False)
    return dict(zip(named, states, strict=True))


def gradients(
    model: Model,
    tokens: Tokens,
    metric: Metric,
    mask: Mask | None = None,
    *,
    sites: Sequence[str],
    edits: Intervention | None = None,
    prompt_length: Lengths | None = None,
    roles: Roles | None = None,
) -> Gradients:
    """The gradient of ``metric`` with respect to the value at every one of ``sites``; other arguments as in ``run``.

    ``metric`` is a pure function from the ``Run`` (with states at ``sites``) to one number. Rows do not see each other:
    the sum of a number per row gives every row's own gradients. A gradient is that of the rest of the computation: at
    ``attn.hook_pattern``, say, weights are moved one by one and do not sum to 1 any more. A metric that is a pytree
    (a ``flax.struct`` dataclass, a ``jax.tree_util.Partial``) may change its arrays without a new program; a new plain
    function compiles one. Raises ``UserError`` as ``run``, and for a metric that does not return one number.
    """
    rows, named = _rows(model, tokens, mask, edits, prompt_length, roles), _named(model, sites)
    metric = Partial(metric) if jax.tree_util.all_leaves([metric]) else metric  # a function is no pytree
    value, states, slopes = _gradients(model.params, model.config, rows, metric, sites=tuple(named.items()))
    return Gradients(value, *({name: found[name] for name in named} for found in (states, slopes)))


@partial(jax.jit, static_argnames=("config", "sites", "to_logits"))
def _run(
    params: Params, config: ModelConfig, rows: _Rows, *, sites: tuple[Site, ...], to_logits: bool
) -> tuple[Float[Array, "B T V"] | None, list[Array]]:
    logits, states = _forward(params, config, rows, sites, to_logits=to_logits)
    return logits, [states[site].astype(jnp.float32) for site in sites]


@partial(jax.jit, static_argnames=("config", "sites"))
def _gradients(
    params: Params, config: ModelConfig, rows: _Rows, metric: Metric, *, sites: tuple[tuple[str, Site], ...]
) -> tuple[Array, dict[str, Array], dict[str, Array]]:
    where = [site for _, site in sites]

    def score(added: dict[Site, Array]) -> tuple[Array, dict[str, Array]]:
        logits, found = _forward(params, config, rows, where, to_logits=True, added=added)
        states = {name: found[site].astype(jnp.float32) for name, site in sites}
        value = metric(Run(logits, states))
        if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise UserError(f"metric must return one float, got {value}: sum or average over rows and positions.")
        return value, states

    shapes = jax.eval_shape(lambda: _forward(params, config, rows, where, to_logits=False)[1])
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    (value, states), slopes = jax.value_and_grad(score, has_aux=True)(zeros)
    return value, states, {name: slopes[site].astype(jnp.float32) for name, site in sites}


def _forward(
    params: Params,
    config: ModelConfig,
    rows: _Rows,
    sites: Sequence[Site],
    *,
    to_logits: bool,
    added: Mapping[Site, Array] | None = None,
) -> tuple[Any, dict[Site, Array]]:
    """Logits (if they are asked for) and values at sites in one scan over the layers that are needed; ``added`` is
    added to the values at its sites.
    """
    added = added or {}
    mask, tokens = rows.mask, rows.tokens
    positions = jnp.arange(tokens.shape[1])[None] if mask is None else positions_of(mask)
    where = make_where(tokens, positions, mask, rows.prompt_length, rows.roles)
    edits, context = ready_for(params, config, rows.edits, where, make_context(config, positions, mask))
    tap = tap_of(edits, where)
    ends = joined(tap, adding({site.kind: value for site, value in added.items() if not KINDS[site.kind].in_block}))
    x = embed(params, config, tokens, positions, ends)
    depth = max((site.depth(config.n_layers) for site in sites), default=0)
    x, [states] = run_and_read(
        params, config, x, context, config.n_layers if to_logits else depth, [(sites, lambda _, value: value)],
        tap=tap, added=added,
    )  # fmt: skip
    return unembed(params, config, x, ends) if to_logits else None, states


def _named(model: Model, names: Sequence[str]) -> dict[str, Site]:
    if isinstance(names, str):
        raise UserError(f"sites must be a list of names, got the single string {names!r}. Write [{names!r}].")
    return find_sites(names, model.config)


def _where_known(named: Mapping[str, Site], rows: _Rows) -> tuple[Site, ...]:
    """Without edits, the stream before a block is read below it: the block itself need not run."""
    return tuple(site if rows.edits is not None else site.as_stream() for site in named.values())


def _rows(
    model: Model,
    tokens: Tokens,
    mask: Mask | None,
    edits: Intervention | None,
    prompt_length: Lengths | None,
    roles: Roles | None,
) -> _Rows:
    config = model.config
    if not isinstance(tokens, jax.Array):
        tokens = np.asarray(tokens)
        if tokens.size and tokens.dtype.kind in "iu" and (tokens.min() < 0 or tokens.max() >= config.vocab_size):
            raise UserError(
                f"Token ids must lie in 0 ... {config.vocab_size - 1}; these range from {tokens.min()} to "
                f"{tokens.max()}. Do they come from this model's tokenizer?"
            )
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        text = " Of a text: tokens, mask = jaxsteer.to_tokens(model, TEXT)." if tokens.dtype.kind in "US" else ""
        raise UserError(
            f"tokens must be integers of shape [B, T], got {tokens.dtype} of shape {list(tokens.shape)}.{text}"
        )
    if tokens.shape[1] > config.max_positions:
        raise UserError(f"The text has {tokens.shape[1]} tokens; this model's positions end at {config.max_positions}.")
    if mask is not None and mask.shape != tokens.shape:
        raise UserError(f"mask has shape {list(mask.shape)} and tokens have {list(tokens.shape)}; they must be equal.")
    lengths = None if prompt_length is None else jnp.asarray(prompt_length, jnp.int32)
    if lengths is not None and lengths.shape != tokens.shape[:1]:
        raise UserError(
            f"prompt_length must have one number for each of {len(tokens)} rows, got shape {list(lengths.shape)}."
        )
    if prompt_length is not None and not isinstance(prompt_length, jax.Array):
        given = np.asarray(prompt_length)
        if ((given < 0) | (given > tokens.shape[1])).any():
            raise UserError(
                f"prompt_length must lie in 0 ... {tokens.shape[1]}, the tokens of a row; got {given.tolist()}."
            )
    if roles is not None and roles.role.shape != tokens.shape:
        raise UserError(f"roles are those of tokens {list(roles.role.shape)}, but tokens are {list(tokens.shape)}.")
    return _Rows(
        tokens=shard_rows(model.mesh, tokens.astype(jnp.int32)),
        mask=None if mask is None else shard_rows(model.mesh, mask.astype(bool)),
        edits=checked(edits, config, tokens.shape[0]),
        prompt_length=None if lengths is None else shard_rows(model.mesh, lengths),
        roles=jax.tree.map(partial(shard_rows, model.mesh), roles),
    )
