"""Reading the residual stream of many token rows at one position each, in batches of few shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.model import Model
from jaxsteer.models.padding import pad_rows
from jaxsteer.models.params import Params
from jaxsteer.models.sharding import shard_rows
from jaxsteer.models.sites import Site, parse_site
from jaxsteer.models.transformer import block, embed, layer_weights, make_context
from jaxsteer.processes import to_host

PLACES = ("hook_embed", "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
"""Places of width D, where a direction can live."""
BATCH = 32


def direction_sites(model: Model, sites: str | Sequence[str]) -> tuple[Site, ...]:
    """Parsed sites of width D. Raises ``UserError`` for other places and beyond the last layer."""
    parsed = tuple(parse_site(name, model.config.n_layers) for name in ([sites] if isinstance(sites, str) else sites))
    if not parsed:
        raise UserError("no site was given: name at least one, e.g. blocks.2.hook_resid_post")
    for site in parsed:
        if site.place not in PLACES:
            raise UserError(f"a direction cannot be read at {site.name!r}: expected one of {', '.join(PLACES)}")
    return tuple(dict.fromkeys(parsed))


def _padded_length(length: int) -> int:
    """Multiples of 32 up to 256 and of 128 above. The last bits of what is read depend on it: it must not change."""
    step = 32 if length <= 256 else 128
    return -(-length // step) * step


def read_rows(
    model: Model,
    rows: Sequence[np.ndarray],
    reads: Int[np.ndarray, " n"],
    sites: Sequence[Site],
    *,
    batch_size: int = BATCH,
) -> Iterator[tuple[Int[np.ndarray, " b"], Float[np.ndarray, "s b D"]]]:
    """Yield (row numbers, float32 streams at ``sites`` at each row's read position), every row exactly once.

    Rows come ordered by length. They are padded on the right, which a causal model cannot see at or before the read
    position. Raises ``UserError`` for a row longer than the model's positions.
    """
    longest = max(len(row) for row in rows)
    if longest > model.config.max_positions:
        raise UserError(
            f"the longest text has {longest} tokens, but the model has {model.config.max_positions} positions: "
            f"shorten the questions"
        )
    buckets: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        buckets.setdefault(_padded_length(len(row)), []).append(number)
    for length, numbers in sorted(buckets.items()):
        for start in range(0, len(numbers), batch_size):
            chunk = np.asarray(numbers[start : start + batch_size])
            tokens, _ = pad_rows([rows[number] for number in chunk] + [rows[0][:0]] * (batch_size - len(chunk)), length)
            read = np.zeros(batch_size, np.int32)
            read[: len(chunk)] = reads[chunk]
            states = _read(
                model.params,
                model.config,
                shard_rows(model.mesh, tokens),
                shard_rows(model.mesh, read),
                sites=tuple(_as_stream(site) for site in sites),
            )
            yield chunk, to_host(states)[:, : len(chunk)]


def _as_stream(site: Site) -> Site:
    """The stream before a block is the one after the block below, for which one block less is run."""
    if site.place != "hook_resid_pre":
        return site
    return Site(site.layer - 1, "hook_resid_post") if site.layer else Site(0, "hook_embed")


@partial(jax.jit, static_argnames=("config", "sites"))
def _read(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    read: Int[Array, " B"],
    *,
    sites: tuple[Site, ...],
) -> Float[Array, "s B D"]:
    """One scan up to the deepest site; each layer keeps the B read positions only."""

    def pick(x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        return jnp.take_along_axis(x, read[:, None, None], axis=1)[:, 0].astype(jnp.float32)

    context = make_context(config, jnp.arange(tokens.shape[1])[None])
    x = embed(params, config, tokens)
    start = pick(x)
    inside = [site for site in sites if site.place != "hook_embed"]
    places = {site.place for site in inside}

    def step(x: Array, layer: Array) -> tuple[Array, dict[str, Array]]:
        kept: dict[str, Array] = {}

        def tap(name: str, layer: Array | int, value: Array) -> Array:
            if name in places:
                kept[name] = pick(value)
            return value

        return block(layer_weights(params, layer), config, x, context, layer, tap)[0], kept

    found: dict[str, Array] = {}
    if inside:
        _, found = lax.scan(step, x, jnp.arange(max(site.layer for site in inside) + 1))
    return jnp.stack([start if s.place == "hook_embed" else found[s.place][s.layer] for s in sites])
