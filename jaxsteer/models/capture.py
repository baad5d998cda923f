"""``logits`` and ``capture``: what a model says, and what it computes on the way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import forward, run_and_read
from jaxsteer.models.model import Model
from jaxsteer.models.params import Params
from jaxsteer.models.sharding import shard_rows
from jaxsteer.models.sites import Site, find_sites
from jaxsteer.models.taps import Intervention, checked, make_where, tap_of
from jaxsteer.models.transformer import embed, make_context, positions_of

Tokens = Int[np.ndarray, "B T"] | Int[Array, "B T"]
Mask = Bool[np.ndarray, "B T"] | Bool[Array, "B T"]
Lengths = Int[np.ndarray, " B"] | Int[Array, " B"]


def logits(
    model: Model,
    tokens: Tokens,
    mask: Mask | None = None,
    *,
    edits: Intervention | None = None,
    prompt_length: Lengths | None = None,
) -> Float[Array, "B T V"]:
    """Float32 next-token logits at every position.

    ``mask`` is False on padding, which may stand on the left or on the right; logits at padding mean nothing.
    ``edits`` change the computation on its way (``jaxsteer.steer``); for those that tell prompt from response,
    ``prompt_length`` says where each row's response begins, in tokens without padding (by default all is prompt).
    Raises ``UserError`` for tokens outside the vocabulary or longer than the model's positions, and for edits that do
    not fit the model or the rows.
    """
    inputs = _inputs(model, tokens, mask)
    edits = checked(edits, model.config, tokens.shape[0])
    return _logits(model.params, model.config, *inputs, edits, _lengths(model, prompt_length, tokens.shape[0]))


def capture(
    model: Model,
    tokens: Tokens,
    sites: Sequence[str],
    mask: Mask | None = None,
    *,
    edits: Intervention | None = None,
    prompt_length: Lengths | None = None,
) -> dict[str, Float[Array, ...]]:
    """What the model computes at ``sites``, in float32, by the names that were given.

    Streams and outputs (``hook_embed``, ``blocks.i.hook_resid_pre/mid/post``, ``hook_attn_out``, ``hook_mlp_out``,
    ``mlp.hook_in``) are [B, T, D]; ``attn.hook_q/z`` [B, T, N, H]; ``attn.hook_k/v`` [B, T, K, H];
    ``attn.hook_pattern`` [B, N, T, T]; ``mlp.hook_pre/pre_linear/post`` [B, T, I]. q and k are before their norm and
    the rotary embedding, as in TransformerLens. No layer above the last site is run. Aliases and negative layers are
    accepted (see ``jaxsteer.models.sites``). Values are those after ``edits``, which are as in ``logits``. Raises
    ``UserError`` as ``logits`` does, and for unknown sites.
    """
    if isinstance(sites, str):
        raise UserError(f"sites must be a list of names, got the single string {sites!r}. Write [{sites!r}].")
    parsed = find_sites(sites, model.config)
    inputs = _inputs(model, tokens, mask)
    edits = checked(edits, model.config, tokens.shape[0])
    if edits is None:
        parsed = {name: site.as_stream() for name, site in parsed.items()}
    edited = (edits, _lengths(model, prompt_length, tokens.shape[0]))
    found = _capture(model.params, model.config, *inputs, *edited, sites=tuple(sorted(set(parsed.values()))))
    return {name: found[site.name] for name, site in parsed.items()}


def _inputs(model: Model, tokens: Tokens, mask: Mask | None) -> tuple[jax.Array, jax.Array | None]:
    """Checked tokens and mask on the model's mesh."""
    config = model.config
    if not isinstance(tokens, jax.Array):
        tokens = np.asarray(tokens)
        if tokens.size and tokens.dtype.kind in "iu" and (tokens.min() < 0 or tokens.max() >= config.vocab_size):
            raise UserError(
                f"Token ids must lie in 0 ... {config.vocab_size - 1}; these range from {tokens.min()} to "
                f"{tokens.max()}. Do they come from this model's tokenizer?"
            )
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise UserError(f"tokens must be integers of shape [B, T], got {tokens.dtype} of shape {list(tokens.shape)}.")
    if tokens.shape[1] > config.max_positions:
        raise UserError(f"The text has {tokens.shape[1]} tokens; this model's positions end at {config.max_positions}.")
    if mask is not None and mask.shape != tokens.shape:
        raise UserError(f"mask has shape {list(mask.shape)} and tokens have {list(tokens.shape)}; they must be equal.")
    rows = shard_rows(model.mesh, tokens.astype(jnp.int32))
    return rows, None if mask is None else shard_rows(model.mesh, mask.astype(bool))


def _lengths(model: Model, prompt_length: Lengths | None, rows: int) -> jax.Array | None:
    if prompt_length is None:
        return None
    lengths = np.asarray(prompt_length, np.int32)
    if lengths.shape != (rows,):
        raise UserError(f"prompt_length must have one number for each of {rows} rows, got shape {list(lengths.shape)}.")
    return shard_rows(model.mesh, lengths)


_logits = jax.jit(forward, static_argnames="config")


@partial(jax.jit, static_argnames=("config", "sites"))
def _capture(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    mask: jax.Array | None,
    edits: Intervention | None,
    prompt_length: jax.Array | None,
    *,
    sites: tuple[Site, ...],
) -> dict[str, jax.Array]:
    """One scan over the layers that are needed."""
    positions = jnp.arange(tokens.shape[1])[None] if mask is None else positions_of(mask)
    context = make_context(config, positions, mask)
    tap = tap_of(edits, make_where(tokens, positions, mask, prompt_length))
    x = embed(params, config, tokens, tap)
    depth = max((site.depth(config.n_layers) for site in sites), default=0)
    wanted = [(sites, lambda kind, value: value.astype(jnp.float32))]
    _, [found] = run_and_read(params, config, x, context, depth, wanted, tap=tap)
    return {site.name: value for site, value in found.items()}
